"""Small Triton kernels, compiled and executed: right as they are, and wrong without what is taken out of their PTX.

Under Triton's interpreter they are skipped; tests/executor/test_command.py runs them in a process that compiles.
"""
# mypy: disable-error-code="no-untyped-def, name-defined"

import os
import re
from typing import Any
from unittest import mock

import pytest
import torch

from .machine import launch
from .run import Report, executed

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="needs the compiler: pytest --execute sm_90")


@triton.jit
def by_pointers(
    a, b, c, M, N, K, sam, sak, sbk, sbn,
    A_T: tl.constexpr, B_T: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        l = k + tl.arange(0, BK)
        x = tl.load(a + i[:, None] * sam + l[None, :] * sak, mask=(i[:, None] < M) & (l[None, :] < K), other=0.0)
        y = tl.load(b + l[:, None] * sbk + j[None, :] * sbn, mask=(j[None, :] < N) & (l[:, None] < K), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
    at = c + i[:, None] * N + j[None, :]
    tl.store(at, acc.to(c.dtype.element_ty), mask=(i[:, None] < M) & (j[None, :] < N))


@triton.jit
def by_descriptors(
    a, b, c, K,
    A_T: tl.constexpr, B_T: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM
    j = tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        x = tl.trans(a.load([k, i])) if A_T else a.load([i, k])
        y = tl.trans(b.load([j, k])) if B_T else b.load([k, j])
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
    c.store([i, j], acc.to(c.dtype))


@triton.jit
def multiplied_and_summed(a, b, c, s, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Triton up to 3.7 gives a's ring one place too few: https://github.com/triton-lang/triton/issues/6691"""
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    for k in range(0, K, BK):
        l = k + tl.arange(0, BK)
        x = tl.load(a + i[:, None] * K + l[None, :])
        acc = tl.dot(x, tl.load(b + l[:, None] * BN + j[None, :]), acc)
        sums += tl.sum(x.to(tl.float32), 1)
    tl.store(c + i[:, None] * BN + j[None, :], acc)
    tl.store(s + i, sums)


# Triton 3.5 and 3.6 emit no fence between cp.async and wgmma in kernels of pointers, and the executor says so.
UNFENCED = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)


def check(report: Report) -> None:
    """That there were no problems, or only those of this Triton."""
    problems = [p for p in report.problems if not (UNFENCED and "without fence.proxy.async" in str(p))]
    assert problems == []


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(values: torch.Tensor, transposed: bool) -> torch.Tensor:
    return values.t().contiguous().t() if transposed else values


def product(
    target: str, kernel: Any, tile: tuple[int, int, int], warps: int, stages: int, trans: tuple[bool, bool],
    dtype: torch.dtype, precision: str = "ieee", sizes: tuple[int, ...] = (), **options: Any,
) -> tuple[bool, Report]:  # fmt: skip
    """A product of small integers, which is exact in whatever order it is formed: whether it is, and the report."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    BM, BN, BK = tile
    M, N, K = sizes or (BM, BN, 4 * BK)
    a, b = laid_out(integers((M, K), dtype, 1), trans[0]), laid_out(integers((K, N), dtype, 2), trans[1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    c = torch.full((M, N), float("nan"), dtype=wide)
    arguments: tuple[Any, ...] = (a, b, c, M, N, K, *a.stride(), *b.stride())
    if kernel is by_descriptors:
        boxes = [[BK, BM] if trans[0] else [BM, BK], [BN, BK] if trans[1] else [BK, BN], [BM, BN]]
        stored = (a.t() if trans[0] else a, b.t() if trans[1] else b, c)
        arguments = (*(TensorDescriptor.from_tensor(t, box) for t, box in zip(stored, boxes, strict=True)), K)
    with executed(target, poison=False, **options) as report:
        kernel[(-(-M // BM), -(-N // BN))](
            *arguments, *trans, precision, tl.float64 if wide == torch.float64 else tl.float32, *tile,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return torch.equal(c.double(), a.double() @ b.double()), report


def slow(*values: Any) -> Any:
    """Ways that the cases of `tests/executed` take as well."""
    return pytest.param(*values, marks=pytest.mark.slow)


KERNELS = [("sm_80", by_pointers), ("sm_90", by_pointers), ("sm_90", by_descriptors)]


@pytest.mark.parametrize(("target", "kernel"), KERNELS)
@pytest.mark.parametrize(
    ("trans", "dtype", "precision"),
    [
        ((False, True), torch.bfloat16, "ieee"),
        ((True, False), torch.float32, "tf32"),
        ((False, False), torch.float32, "ieee"),
        *(slow(trans, torch.bfloat16, "ieee") for trans in ((False, False), (True, False), (True, True))),
        slow((False, True), torch.float16, "ieee"),
        slow((False, True), torch.float32, "tf32x3"),
        slow((True, True), torch.float64, "ieee"),
    ],
)
def test_products(target: str, kernel: Any, trans: tuple[bool, bool], dtype: torch.dtype, precision: str) -> None:
    tile = (64, 16, 16) if dtype == torch.float64 else (64, 64, 32)
    right, report = product(target, kernel, tile, 4, 3, trans, dtype, precision)
    check(report)
    assert right
    assert bool(report.launches[0].matrix) == (precision != "ieee" or dtype != torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kernel"), KERNELS)
@pytest.mark.parametrize(
    ("tile", "warps", "stages"),
    [
        ((128, 128, 64), 8, 3), ((128, 128, 64), 4, 2), ((128, 256, 32), 8, 3), ((64, 32, 32), 4, 4),
        ((256, 64, 32), 8, 1), ((64, 16, 16), 4, 2), ((128, 64, 128), 8, 2),
    ],
)  # fmt: skip
def test_products_of_all_sizes(target: str, kernel: Any, tile: Any, warps: int, stages: int) -> None:
    right, report = product(target, kernel, tile, warps, stages, (True, False), torch.bfloat16)
    check(report)
    assert right


@pytest.mark.parametrize(("target", "kernel"), KERNELS)
@pytest.mark.parametrize(
    "options",
    [dict(schedule="random", order="random", seed=1), slow({}), slow(dict(copies="early")), slow(dict(threads=256))],
)
def test_products_with_edges(target: str, kernel: Any, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16
    right, report = product(
        target, kernel, (128, 128, 64), 8, 3, (False, True), dtype, sizes=(136, 200, 152), **options
    )
    check(report)
    assert right


@pytest.mark.parametrize(
    ("target", "kernel", "pattern", "words"),
    [
        ("sm_90", by_descriptors, r"fence\.proxy\.async\.shared::cta;", "a tensor store reads what was stored without"),
        ("sm_90", by_pointers, r"fence\.proxy\.async\.shared::cta;", "a wgmma reads what was stored without"),
        ("sm_90", by_descriptors, r"wgmma\.wait_group\.sync\.aligned 1;", "overwritten before wait_group"),
        ("sm_90", by_pointers, r"wgmma\.wait_group\.sync\.aligned 1;", "overwritten before wait_group"),
        ("sm_90", by_descriptors, r"wgmma\.wait_group\.sync\.aligned 0;", "never waited"),
        ("sm_90", by_descriptors, r"wgmma\.fence\.sync\.aligned;", "without a wgmma.fence"),
        ("sm_90", by_descriptors, r"cp\.async\.bulk\.wait_group(\.read)?\s*0;", "never waited"),
        ("sm_90", by_descriptors, r"cp\.async\.bulk\.commit_group;", "never committed"),
        ("sm_90", by_descriptors, r"bar\.sync\s+0;", "another warp"),
        ("sm_90", by_descriptors, r"@!complete bra\.uni waitLoop;", "yet to bring"),
        ("sm_90", by_pointers, r"bar\.sync\s+0;", "another warp"),
        ("sm_80", by_pointers, r"bar\.sync\s+0;", "another warp"),
        ("sm_80", by_pointers, r"cp\.async\.wait_group\s+\w+;", "copy on its way"),
    ],
)
def test_what_is_taken_out_of_a_kernel_is_missed(target: str, kernel: Any, pattern: str, words: str) -> None:
    if UNFENCED and kernel is by_pointers and "fence" in pattern:
        pytest.skip("this Triton leaves the fence out itself")

    def changed(text: str, *rest: Any) -> Any:
        without = re.sub(pattern, "", text)
        assert without != text
        return launch(without, *rest)

    with mock.patch("tests.executor.run.launch", changed):
        _, report = product(target, kernel, (128, 128, 64), 8, 3, (False, True), torch.bfloat16)
    assert any(words in str(problem) for problem in report.problems), report.problems


def test_a_ring_that_is_too_small_is_seen() -> None:
    """Not a test of the executor alone: whether this Triton has the bug, and that it is seen."""
    BM, BN, BK, K = 64, 64, 64, 512
    a, b = integers((BM, K), torch.bfloat16, 1), integers((K, BN), torch.bfloat16, 2)
    c, s = torch.zeros(BM, BN), torch.zeros(BM)
    with executed("sm_90") as report:
        multiplied_and_summed[(1,)](a, b, c, s, K, BM, BN, BK, num_warps=4, num_stages=3)
    assert torch.equal(s.double(), a.double().sum(1))
    if triton.__version__ >= "3.8" and not report.problems:
        pytest.skip("this Triton gives the ring enough places")
    assert any("yet to bring" in str(problem) or "overwritten" in str(problem) for problem in report.problems)


@triton.jit
def doubled(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < N), mask=i < N + 1)


def test_blocks_nest_and_report_what_is_theirs() -> None:
    x, room = torch.ones(100), torch.zeros(101)
    with executed("sm_90") as outer:
        doubled[(2,)](x, room, 100, 64)
        with executed("sm_80") as inner:
            doubled[(2,)](x, room[:100], 100, 64)
            inner.allow(room)
            doubled[(2,)](x, room[:100], 100, 64)
        doubled[(2,)](x, room, 100, 64)
    outer.check()
    assert [len(report.launches) for report in (outer, inner)] == [2, 2]
    (problem,) = inner.problems
    assert (problem.kind, problem.kernel, problem.count) == ("out of bounds", "doubled", 1)
    with pytest.raises(AssertionError, match="out of bounds in doubled"):
        inner.check()
    assert "doubled" in outer.table()


@triton.jit
def through_a_table(table, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(tl.load(table).to(tl.pointer_type(tl.float32)) + i, 1.0, mask=i < N)


@pytest.mark.parametrize("n", [8, 9])
def test_addresses_in_tables_lead_to_living_tensors(n: int) -> None:
    x = torch.zeros(8)
    with executed("sm_80") as report:
        through_a_table[(1,)](torch.tensor([x.data_ptr()]), n, 16)
    assert [problem.kind for problem in report.problems] == ["out of bounds"] * (n - 8)
    assert x.eq(1).all()


def test_new_memory_is_poisoned() -> None:
    with executed("sm_80"):
        assert torch.empty(3).isnan().all()


def test_what_is_given_is_checked() -> None:
    with pytest.raises(ValueError, match="target must be one of 'sm_80', 'sm_90', got 'sm_70'"), executed("sm_70"):
        pass
    with pytest.raises(ValueError, match="copies must be one of 'late', 'early', got 'never'"):
        executed("sm_80", copies="never").__enter__()
