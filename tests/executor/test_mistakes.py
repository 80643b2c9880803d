"""What the executor promises to detect, planted in small kernels: each is found, and the right kernel is left alone."""

from typing import Any

import pytest
import torch

from . import engines
from .by_hand import run
from .tensor_copies import TensorMap
from .wgmma import Descriptor

# One line a thread: global memory, shared memory, cp.async, barriers.

AT = "add.s64 %rd10, %rd1, %rd50;\n"  # this thread's word of the tensor
MINE = "mov.b32 %r2, global_smem;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r2, %r3;\n"  # %r4: this thread's word
OTHERS = "xor.b32 %r6, %r4, 128;\n"  # %r6: one of the other warp's
COPY = MINE + AT + "cp.async.ca.shared.global [%r4], [%rd10], 4;\ncp.async.commit_group;\n"
SAME_COPY = COPY.replace(AT, "and.b32 %r7, %r3, 127;\ncvt.u64.u32 %rd11, %r7;\nadd.s64 %rd10, %rd1, %rd11;\n")
STORE, LOAD = "st.shared.b32 [%r4], %r1;\n", "ld.shared.b32 %r5, [%r4];\n"
LOAD_OTHERS, BARRIER, LANDED = "ld.shared.b32 %r5, [%r6];\n", "bar.sync 0;\n", "cp.async.wait_group 0;\n"
FEW = "setp.lt.s32 %p1, %r1, 5;\n@%p1 bra L1;\n"
ONE, TWO = {"shared": 128}, {"shared": 256, "threads": 64}  # warps


@pytest.mark.parametrize(
    ("body", "options", "kind"),
    [
        (AT + "st.global.b32 [%rd10], %r1;", {}, None),
        (AT + "st.global.b32 [%rd10+4], %r1;", {}, "out of bounds"),
        (AT + "ld.global.b32 %r2, [%rd10+-4];", {}, "out of bounds"),
        (AT + "atom.global.add.u32 %r2, [%rd10+4], 1;", {}, "out of bounds"),
        (AT + "ld.global.v2.b32 {%r2, %r3}, [%rd10];", {}, "misaligned"),
        ("st.global.b32 [%rd1], %r1;", {}, "global race"),
        ("atom.global.add.u32 %r2, [%rd1], 1;", {"grid": 2}, None),
        (AT + "mov.u32 %r2, %ctaid.x;\nst.global.b32 [%rd10], %r2;", {"grid": 2}, "global race"),
        (AT + "mov.u32 %r2, %ctaid.x;\nsetp.eq.u32 %p1, %r2, 0;\n@%p1 st.global.b32 [%rd10], %r1;\n"
         "ld.global.b32 %r3, [%rd10];", {"grid": 2}, "global race"),
        (MINE + LOAD, ONE, "read of uninitialised shared memory"),
        (MINE + STORE + LOAD, ONE, None),
        (MINE + "st.shared.b32 [%r4+4], %r1;", ONE, "out of bounds (shared)"),
        (MINE + "st.shared.b32 [%r4+2], %r1;", TWO, "misaligned (shared)"),
        (MINE + "st.shared.b32 [%r2], %r1;", ONE, "shared race"),
        (MINE + OTHERS + STORE + BARRIER + LOAD_OTHERS, TWO, None),
        (MINE + OTHERS + STORE + LOAD_OTHERS, TWO, "shared race"),
        (MINE + OTHERS + STORE + BARRIER + LOAD_OTHERS + STORE, TWO, "shared race"),
        (COPY + LANDED + LOAD, ONE, None),
        (COPY + LOAD, ONE, "read of a copy on its way"),
        (COPY + "cp.async.wait_group 1;\n" + LOAD, ONE, "read of a copy on its way"),
        (SAME_COPY + OTHERS + LANDED + BARRIER + LOAD_OTHERS, TWO, None),
        (SAME_COPY + OTHERS + LANDED + LOAD_OTHERS, TWO, "shared race"),
        # Zeros in place of what is not read: no access.
        (COPY.replace("[%rd10], 4", "[%rd1+4096], 4, 0") + LANDED + LOAD, ONE, None),
        (COPY.replace("[%rd10], 4", "[%rd10], 4, 2") + LANDED + LOAD, ONE, None),
        (FEW + "bar.sync 0;\nL1:\n", {}, None),  # those that have left are not waited for
        (FEW + "bar.sync 0, 64;\nL1:\n", {}, "deadlock"),
        (FEW + "mov.b32 %r2, 7;\nshfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;\nL1:\n", {}, "shuffle"),
        (FEW + MINE + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];\nL1:\n", ONE, "divergence"),
        ("setp.eq.s32 %p1, %r1, 5;\n@%p1 trap;", {}, "trap"),
        ("div.s32 %r2, 5, %r1;", {}, "division by zero"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_of_threads(body: str, options: dict[str, Any], kind: str | None, schedule: str) -> None:
    _, problems = run(body, torch.zeros(32, dtype=torch.int32), schedule=schedule, **options)
    kinds = {problem.kind for problem in problems}
    assert kind in kinds if kind else not kinds, kinds


def test_a_loop_without_an_end_is_stopped() -> None:
    (problem,) = run("L1:\nbra.uni L1;", limit=1000)[1]
    assert "does not come to an end" in problem.detail


def test_gaps_of_a_strided_tensor_are_not_written() -> None:
    wide = torch.zeros(64, dtype=torch.int32)
    body = "shl.b64 %rd50, %rd50, 1;\nadd.s64 %rd10, %rd1, %rd50;\nst.global.b32 [%rd10{}], %r1;"
    assert run(body.format(""), wide[::2])[1] == []
    assert [problem.kind for problem in run(body.format("+4"), wide[::2])[1]] == ["out of bounds", "write to a gap"]


def test_words_of_two_programs_are_not_one_behind_an_odd_number_of_bytes() -> None:
    """What lies in memory before them, a mask of booleans say, does not matter."""
    memory = torch.zeros(128, dtype=torch.uint8)
    body = "mov.u32 %r2, %ctaid.x;\nmul.wide.u32 %rd9, %r2, 4;\nadd.s64 %rd10, %rd2, %rd9;\n"
    body += "setp.eq.u32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd10], %r1;"
    for odd in (memory[:3], memory[1:3], memory[1:4]):
        assert run(body, odd, memory[64:].view(torch.int32), grid=2)[1] == []


# Steps of a kernel, of which a mistake leaves one out, or does something before one.

Steps = dict[str, str]
FIRST = "setp.eq.u32 %p1, %r1, 0;\n"
ZEROS = "{0, 0, 0, 0}"


def found(steps: Steps, change: Steps, *arguments: Any, **options: Any) -> list[str]:
    """The problems of the kernel with some steps changed."""
    assert change.keys() <= steps.keys()
    return [str(problem) for problem in run("".join((steps | change).values()), *arguments, **options)[1]]


def before(steps: Steps, step: str, code: str) -> Steps:
    return {step: code + steps[step]}


# wgmma: A 64 × 16 at 0, B 16 × 8 at 2048, no swizzle; %r2: 16 bytes of this thread.

A, B = Descriptor(0, 1024, 128, 0, 16).encode(), Descriptor(2048, 128, 128, 0, 16).encode()
MMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, "
WGMMA: Steps = {
    "start": f"shl.b32 %r2, %r1, 4;\nmov.b64 %rd10, {A};\nmov.b64 %rd11, {B};\n" + "mov.b32 %r10, 0;\n"
    "mov.b32 %r11, 0;\nmov.b32 %r12, 0;\nmov.b32 %r13, 0;\nmov.b32 %r20, %r1;\nmov.b32 %r21, %r1;\n",
    "store": f"st.shared.v4.b32 [%r2], {ZEROS};\nst.shared.v4.b32 [%r2+2048], {ZEROS};\n",
    "proxy fence": "fence.proxy.async.shared::cta;\n",
    "barrier": BARRIER,
    "fence": "wgmma.fence.sync.aligned;\n",
    "product": MMA + "%rd10, %rd11, 1, 1, 1, 0, 0;\n",
    "commit": "wgmma.commit_group.sync.aligned;\n",
    "wait": "wgmma.wait_group.sync.aligned 0;\n",
    "end": "add.f32 %r10, %r10, %r10;\n",
}
A_IN_REGISTERS = {"product": MMA + "{%r20, %r21, %r20, %r21}, %rd11, 1, 1, 1, 0;\n"}


@pytest.mark.parametrize("settings", [{}, {"copies": "early"}, {"schedule": "random"}])
def test_a_right_wgmma(settings: dict[str, Any]) -> None:
    options = {"threads": 256, "shared": 8192, **settings}
    assert found(WGMMA, {}, **options) == []
    refilled = before(WGMMA, "end", "mov.b32 %r20, 7;\nst.shared.v4.b32 [%r2], {1, 1, 1, 1};\n")
    again = "mov.b32 %r20, 7;\n" + "".join((WGMMA | A_IN_REGISTERS)[s] for s in ("fence", "product", "commit", "wait"))
    assert found(WGMMA, A_IN_REGISTERS | refilled | before(WGMMA, "end", BARRIER), **options) == []
    assert found(WGMMA, A_IN_REGISTERS | before(WGMMA, "end", again), **options) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"proxy fence": ""}, "reads what was stored without fence.proxy.async"),
        ({"barrier": ""}, "reads what another warp has written"),
        ({"store": ""}, "reads what nobody has written"),
        ({"fence": ""}, "without a wgmma.fence"),
        ({"commit": ""}, "never committed"),
        ({"wait": ""}, "never waited for"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;\n"}, "never waited for"),
        (before(WGMMA, "wait", "st.shared.v4.b32 [%r2], {1, 1, 1, 1};\n"), "operand A of a wgmma, at 0x0, was over"),
        (before(WGMMA, "wait", "st.shared.v4.b32 [%r2+2048], {1, 1, 1, 1};\n"), "operand B of a wgmma, at 0x800"),
        (A_IN_REGISTERS | before(WGMMA, "wait", "mov.b32 %r20, 7;\n"), "the registers with operand A"),
        (A_IN_REGISTERS | before(A_IN_REGISTERS, "product", "mov.b32 %r20, 7;\n"), "without a wgmma.fence since"),
        (before(WGMMA, "fence", "cvt.u64.u32 %rd12, %r1;\nadd.s64 %rd10, %rd10, %rd12;\n"), "differs between"),
        (before(WGMMA, "fence", FIRST + "@%p1 wgmma.fence.sync.aligned;\n"), "not all threads of the warpgroup"),
        (before(WGMMA, "fence", f"mov.b64 %rd10, {A | 1 << 49};\n"), "base offset"),
        (before(WGMMA, "fence", f"mov.b64 %rd10, {A | 1 << 62 | 8};\n"), "off the 1024-byte pattern"),
        (before(WGMMA, "fence", f"mov.b64 %rd10, {A | 0x3FFF};\n"), "reads shared memory up to"),
    ],
)
def test_of_wgmma(change: Steps, words: str) -> None:
    problems = found(WGMMA, change, threads=128, shared=4096)
    assert any(words in problem for problem in problems), problems


def test_more_shared_memory_than_there_is_is_refused() -> None:
    assert "a CTA may have 232448" in found(WGMMA, {}, threads=128, shared=1 << 18)[0]


# Tensor copies: a box of 8 × 32 words into 0 … 1023, the mbarrier at 1024; %r2: a word of this thread.

POLL = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;\n@!%p2 bra LOOP;\n"
LOADING: Steps = {
    "start": FIRST + "shl.b32 %r2, %r1, 2;\nmov.b32 %r3, 1024;\nmov.b32 %r4, 0;\n",
    "init": "@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\n",
    "barrier": BARRIER,
    "expect": "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;\n",
    "load": "@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], "
    "[%rd1, {%r4, %r4}], [%r3];\n",
    "wait": "LOOP:\n" + POLL,
    "read": "ld.shared.b32 %r10, [%r2];\n",
    "last barrier": BARRIER,
    "end": "@%p1 mbarrier.inval.shared::cta.b64 [%r3];\n",
}


def tensor_and_map(rows: int = 8) -> tuple[torch.Tensor, TensorMap]:
    tensor = torch.zeros(8, 32)
    return tensor, TensorMap(tensor.data_ptr(), 7, (32, rows), (128,), (32, 8), 0)


def loading(change: Steps, rows: int = 8, **options: Any) -> list[str]:
    tensor, tensor_map = tensor_and_map(rows)
    return found(LOADING, change, tensor_map, tensor, **({"threads": 64, "shared": 1152} | options))


@pytest.mark.parametrize("settings", [{}, {"copies": "early"}, {"schedule": "random"}])
def test_a_right_load(settings: dict[str, Any]) -> None:
    assert loading({}, **settings) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wait": ""}, "read of a copy on its way"),
        ({"init": ""}, "no mbarrier at 0x400"),
        ({"barrier": ""}, "uses an mbarrier that another warp has changed"),
        ({"last barrier": ""}, "changes an mbarrier that another warp has used"),
        ({"expect": LOADING["expect"].replace("1024", "2048")}, "1024 bytes to come"),
        ({"expect": LOADING["expect"] * 2}, "1 arrivals where"),
        ({"expect": "@%p1 mbarrier.expect_tx.shared::cta.b64 [%r3], 1024;\n"}, "1 of 1 arrivals"),
        ({"init": LOADING["init"].replace("[%r3]", "[%r3+4]")}, "not a multiple of 8"),
        ({"init": LOADING["init"].replace(", 1;", ", 0;")}, "with count 0"),
        (before(LOADING, "wait", "@%p1 st.shared.b64 [%r3], 0;\n"), "overwritten"),
        (before(LOADING, "wait", BARRIER + LOADING["end"]), "invalidated"),
        ({"load": LOADING["load"] * 2}, "two tensor loads"),
        ({"load": LOADING["load"].replace("[%r4],", "[%r4+16],")}, "no multiple of 128"),
        ({"load": LOADING["load"].replace("[%r4],", "[%r4+256],")}, "passes the end of shared memory"),
        ({"load": LOADING["load"].replace("{%r4, %r4}", "{%r4, %r4, %r4}")}, "3 coordinates"),
        ({"load": LOADING["load"].replace("[%rd1", "[%rd2")}, "where no parameter is one"),
        (before(LOADING, "load", "st.shared.b32 [%r2], %r1;\n"), "overwrites what another warp has written"),
        ({"wait": "", "read": ""}, "never waited for"),
    ],
)  # fmt: skip
def test_of_loads(change: Steps, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PATIENCE", 20)
    problems = loading(change)
    assert any(words in problem for problem in problems), problems


def test_a_tensor_map_that_promises_too_much() -> None:
    beyond = "mov.b32 %r5, 4;\n" + LOADING["load"].replace("{%r4, %r4}", "{%r4, %r5}")
    problems = loading({"load": beyond}, rows=16)
    assert any("leaves the tensors" in problem for problem in problems), problems


STORING: Steps = {
    "start": FIRST + "shl.b32 %r2, %r1, 4;\nmov.b32 %r4, 0;\n",
    "fill": f"st.shared.v4.b32 [%r2], {ZEROS};\n",
    "proxy fence": "fence.proxy.async.shared::cta;\n",
    "barrier": BARRIER,
    "store": "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r4, %r4}], [%r4];\n",
    "commit": "@%p1 cp.async.bulk.commit_group;\n",
    "wait": "cp.async.bulk.wait_group.read 0;\n",
    "end": BARRIER + "st.shared.v4.b32 [%r2], {1, 1, 1, 1};\n",
}


def storing(change: Steps, **options: Any) -> list[str]:
    tensor, tensor_map = tensor_and_map()
    return found(STORING, change, tensor_map, tensor, **({"threads": 64, "shared": 1024} | options))


@pytest.mark.parametrize("settings", [{}, {"copies": "early"}, {"schedule": "random"}])
def test_a_right_store(settings: dict[str, Any]) -> None:
    assert storing({}, **settings) == []


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"fill": ""}, {}, "a tensor store reads what nobody has written"),
        ({"proxy fence": ""}, {}, "a tensor store reads what was stored without"),
        ({"barrier": ""}, {}, "a tensor store reads what another warp has written"),
        ({"commit": ""}, {}, "never committed"),
        ({"wait": ""}, {}, "never waited for"),
        ({"wait": "cp.async.bulk.wait_group.read 1;\n"}, {}, "was overwritten before wait_group.read"),
        ({}, {"grid": 2}, "two CTAs write"),
        ({"end": STORING["end"] + "add.s64 %rd10, %rd2, %rd50;\nld.global.b32 %r9, [%rd10];\n"}, {"grid": 2}, "writes"),
    ],
)
def test_of_stores(change: Steps, options: dict[str, Any], words: str) -> None:
    problems = storing(change, **options)
    assert any(words in problem for problem in problems), problems
