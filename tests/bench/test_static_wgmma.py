"""Hopper's asynchronous products: what `python -m bench static` sees in made-up machine code, and in kernels that the
compiler is known to get wrong.
"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import wgmma
from bench.expectations import Compiled, always, broken
from tribp.launch.arch import ARCHS

from ..processes import called
from .machine_code import sass

# -- kernels that Triton or ptxas compiles badly ----------------------------------------------------------------------


@triton.jit
def product(  # type: ignore[no-untyped-def]
    a, b, c, K, RESHAPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """c (BM, BN) = a·b. Tiles of a come by a descriptor and are RESHAPED, or by pointers if that is None."""
    rows, cols = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if RESHAPED is None:
            step = k + tl.arange(0, BK)
            x = tl.load(a + step[:, None] * BM + rows[None, :])
            acc = tl.dot(tl.trans(x), tl.load(b + step[:, None] * BN + cols[None, :]), acc)
        elif RESHAPED:
            acc = tl.dot(a.load([0, 0, k]).reshape(BM, BK), b.load([k, 0]), acc)
        else:
            acc = tl.dot(a.load([0, k]), b.load([k, 0]), acc)
    tl.store(c + rows[:, None] * BN + cols[None, :], acc)


def plant() -> dict[str, Any]:
    """What is said of each. Runs where the compiler does, in a process of its own."""
    from bench.compile import read_launches
    from tribp.launch.launches import Launch

    k, step = 4096, 64

    def launch(rows: int, cols: int, reshaped: bool | None, **changed: Any) -> Launch:
        a = torch.empty(k, rows, device="meta", dtype=torch.bfloat16)
        b = a.new_empty(k, cols)
        left: object = a
        right: object = b
        if reshaped is not None:
            right = TensorDescriptor(b, [k, cols], [cols, 1], [step, cols])
            left = TensorDescriptor(a, [rows, k], [k, 1], [rows, step])
        if reshaped:
            left = TensorDescriptor(a, [rows // 8, 8, k], [8 * k, k, 1], [rows // 8, 8, step])
        constants = dict(RESHAPED=reshaped, BM=rows, BN=cols, BK=step)
        return Launch(
            product,
            (1,),
            (left, right, a.new_empty(rows, cols), k),
            constants,
            **dict(num_warps=8, num_stages=3) | changed,
        )

    launches = {
        "descriptors": launch(128, 128, False),
        "one stage": launch(128, 128, False, num_stages=1),
        "reshaped": launch(128, 128, True),
        "reshaped, narrow": launch(64, 64, True, num_warps=4, num_stages=4),
        "pointers": launch(64, 64, None, num_warps=4),
    }
    arch = ARCHS["sm_90"]
    twice = [read_launches(list(launches.values()), arch) for _ in range(2)]  # the second time out of Triton's cache
    said = [[broken(code, always(arch)) for code, _ in read] for read in twice]
    return {"said": dict(zip(launches, said[0], strict=True)), "cached": dict(zip(launches, said[1], strict=True))}


@pytest.fixture(scope="module")
def planted() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = called(plant)
    return found


VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


SERIALIZED = {"wgmma loop", "ptxas"}


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("descriptors", [set()]),
        ("one stage", [set()]),  # its wait for all groups is Triton's own
        # Under Triton 3.9 the next turn's registers are others, and copied behind a wait.
        ("reshaped", [{"wgmma registers"} if VERSION < (3, 9) else set()]),
        ("reshaped, narrow", [SERIALIZED]),
        ("pointers", [set()]),
    ],
)
def test_compiled_products(planted: dict[str, dict[str, list[str]]], name: str, possible: list[set[str]]) -> None:
    said = planted["said"][name]
    assert {sentence.split(":")[0] for sentence in said} in possible, said
    assert planted["cached"] == planted["said"]


# -- SASS -------------------------------------------------------------------------------------------------------------


LOAD, MORE = "LDSM.16.M88.4 R88, [R3]", "LDSM.16.M88.4 R92, [R3+0x20]"
FIRST, LAST = (
    "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], R24",
    "HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8], R24, gsb0",
)
KEEP, ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
AGAIN = "@P0 BRA 0x0"


def refills(*instructions: str) -> list[tuple[int, int]]:
    return wgmma.refilled(sass(*instructions, "EXIT"))


def test_the_next_turn_refills_registers_of_the_group_that_the_wait_leaves_running() -> None:
    assert refills(LOAD, MORE, FIRST, LAST, KEEP, AGAIN) == [(2, 0), (3, 1)]
    assert refills(LOAD, MORE, FIRST, LAST, ALL, AGAIN) == []
    assert refills(LOAD, MORE, FIRST, LAST, KEEP, ALL, AGAIN) == []
    assert refills(LOAD, MORE, FIRST, LAST, KEEP) == []  # no second turn


def test_a_group_older_than_the_wait_leaves_running_has_been_read() -> None:
    other = [text.replace("R88", "R96").replace("R92", "R100") for text in (LOAD, MORE, FIRST, LAST)]
    assert refills(LOAD, MORE, FIRST, LAST, KEEP, *other, KEEP, AGAIN) == []
    two = "WARPGROUP.DEPBAR.LE gsb0, 0x2"
    assert refills(LOAD, MORE, FIRST, LAST, *other, two, AGAIN) == [(2, 0), (3, 1), (6, 4), (7, 5)]


def test_a_group_is_in_flight_before_it_is_closed() -> None:
    assert refills(LOAD, FIRST, ALL, LOAD, LAST, ALL) == [(1, 3)]


def test_one_path_of_several_is_enough() -> None:
    around = ["@P1 BRA 0x60", ALL, "BRA 0x70", "NOP"]  # 3 … 6: one side waits
    assert refills(LOAD, MORE, LAST, *around, MORE, ALL) == [(2, 7)]
    assert refills(LOAD, MORE, LAST, *around, ALL, MORE) == []
    # Behind another group the first one is the older, and done; on the way past it, it still runs.
    other = [LOAD, FIRST + ", gsb0"]
    assert refills(MORE, LAST, "@P1 BRA 0x50", *other, KEEP, MORE) == [(1, 6)]
    assert refills(MORE, LAST, *other, KEEP, MORE) == []


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("LDSM.16.M88.4 R88, [R3]", range(88, 92)),
        ("LDSM.16.MT88.2 R88, [R3]", range(88, 90)),
        ("LDSM.16.M88 R88, [R3]", range(88, 89)),
        ("LDS.128 R88, [R3]", range(88, 92)),
        ("LDG.E.64.CONSTANT R88, desc[UR4][R2.64]", range(88, 90)),
        ("@!P1 LDG.E R88, desc[UR4][R2.64]", range(88, 89)),
        ("IMAD.WIDE.U32 R88, R2, R3, R4", range(88, 90)),
        ("IMAD.MOV.U32 R88, RZ, RZ, R3", range(88, 89)),
        ("F2FP.BF16.F32.PACK_AB R88, R3, R2", range(88, 89)),
        ("DFMA R88, R2, R4, R6", range(88, 90)),
        ("F2F.F64.F32 R88, R2", range(88, 90)),
        ("F2F.F32.F64 R88, R2", range(88, 89)),
        ("CS2R R88, SRZ", range(88, 90)),
        ("CS2R.32 R88, SR_CLOCKLO", range(88, 89)),
        ("HMMA.16816.F32.BF16 R88, R4, R8, R12", range(88, 92)),
        ("SHFL.BFLY PT, R88, R2, 0x1, 0x1f", range(88, 89)),
        ("ATOMG.E.ADD.STRONG.GPU PT, R88, desc[UR4][R2.64], R5", range(88, 89)),
        ("IADD3 R88, P1, R2, R3, RZ", range(88, 89)),
        ("ISETP.GT.AND P1, PT, R88, UR4, P1", range(0)),
        ("STS.128 [R3], R88", range(0)),
        ("STG.E.128 desc[UR4][R2.64], R88", range(0)),
        ("R2UR UR5, R88", range(0)),
        ("BAR.SYNC.DEFER_BLOCKING R88, 0x80", range(0)),
        ("LDGSTS.E.BYPASS.128 [R88], desc[UR4][R2.64]", range(0)),
        ("EXIT", range(0)),
    ],
)
def test_the_registers_that_an_instruction_writes(text: str, registers: range) -> None:
    (instruction,) = sass(text)
    assert wgmma.written(instruction) == registers


def test_operand_a_lies_in_registers_or_in_shared_memory() -> None:
    assert [wgmma.operand_registers(i) for i in sass(FIRST, LAST)] == [range(88, 92), range(92, 96)]
    (shared,) = sass("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0")
    assert not wgmma.operand_registers(shared)


def test_a_loop_whose_groups_all_wait_for_one_another() -> None:
    each = [FIRST + ", gsb0", ALL, LAST, ALL]
    assert wgmma.waiting_loops(sass(*each, AGAIN, "EXIT")) == [2]
    assert wgmma.waiting_loops(sass(FIRST, LAST, KEEP, AGAIN, "EXIT")) == []
    assert wgmma.waiting_loops(sass(FIRST, LAST, ALL, AGAIN, "EXIT")) == [2]
    assert wgmma.waiting_loops(sass(FIRST + ", gsb0", LAST, ALL, AGAIN, "EXIT")) == []  # two in the same turn
    assert wgmma.waiting_loops(sass(*each, "EXIT")) == []  # no loop
    # What ran before the loop runs beside its first product, and beside no other.
    assert wgmma.waiting_loops(sass(LAST, *each, "@P0 BRA 0x10", "EXIT")) == [2]


# -- PTX --------------------------------------------------------------------------------------------------------------


def test_a_program_that_keeps_a_group_running_has_to_show_one_and_every_one_that_loads_its_operands() -> None:
    assert wgmma.keeps_running("wgmma.wait_group.sync.aligned 0;\n\twgmma.wait_group.sync.aligned \t1;")
    assert not wgmma.keeps_running("wgmma.wait_group.sync.aligned 0;\n cp.async.wait_group 1;")
    code, product = sass(FIRST, LAST, ALL, AGAIN, "EXIT"), "wgmma.mma_async.sync.aligned {%r1}, %rd1, %rd2;\n"
    all_wait, one_runs = (f"{product}wgmma.wait_group.sync.aligned {n};" for n in (0, 1))
    assert wgmma.faults(code, all_wait, "", as_loaded=False) == {}
    for ptx, as_loaded in ((all_wait, True), (one_runs, False)):
        assert list(wgmma.faults(code, ptx, "", as_loaded=as_loaded)) == ["wgmma loop"]


# -- what is expected, and of which target ----------------------------------------------------------------------------

LOG = """ptxas info    : (C7519) warpgroup.arrive is injected in around line 1710 by compiler to allow use of registers
ptxas info    : (C7519) warpgroup.arrive is injected in around line 1726 by compiler to allow use of registers
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'f'
ptxas info    : Used 90 registers, used 1 barriers
"""


def test_each_warning_of_ptxas_is_told_once() -> None:
    code, ptx = sass("EXIT"), "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;"
    assert wgmma.faults(code, ptx, LOG, as_loaded=False) == {
        "ptxas": "C7519 warpgroup.arrive is injected; "
        "C7515 Potential Performance Loss: wgmma.mma_async instructions are serialized"
    }
    assert wgmma.faults(code, ptx, LOG.splitlines()[-1], as_loaded=False) == {}
    assert wgmma.faults(code, "", LOG, as_loaded=True) == {}  # no such product


def test_every_fault_breaks_an_expectation_on_sm_90_and_nothing_is_expected_elsewhere() -> None:
    bad = Compiled(1000, wgmma=dict.fromkeys(wgmma.EXPECTED, "what"))
    assert [s.split(":")[0] for s in broken(bad, always(ARCHS["sm_90"]))] == list(wgmma.EXPECTED)
    good = Compiled(1000)
    assert broken(good, always(ARCHS["sm_90"])) == []
    for target in ("sm_80", "sm_100", "gfx942"):
        assert {e.name for e in always(ARCHS[target])} == {"spills", "shared memory", "the launch before"}
