"""`tribp.linear_sigmoid` on any shape, layout and type, by the kernels."""

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tribp
from bench.linear import OPERATION, LinearCase
from tribp.launch.arch import ARCHS
from tribp.ops.activations import NONE
from tribp.ops.checks import MAX_SIZE
from tribp.ops.linear.config import OutputGradProblem

from ..covering import DTYPES
from ..oracle import TOLERANCE, LinearSigmoid, assert_close, matrix
from ..processes import called

dimension = st.integers(1, 70)


def test_offsets_of_prefetched_tiles_fit_32_bits() -> None:
    """Rows of odd pitch are prefetched by hand, unless a tile of them spans 2³¹ elements."""
    pytest.importorskip("triton")
    for k, prefetched in ((333, True), ((1 << 23) + 1, False)):
        case = LinearCase((64, 77, k), torch.bfloat16)
        found = [x.named for d in ("forward", "backward") for x in OPERATION.launches(case, d, ARCHS["sm_80"])]
        assert {constants["PREFETCH"] for constants in found if "PREFETCH" in constants} == {prefetched}


def rows_that_the_last_program_summed() -> tuple[float, int]:
    """Of a dy of ones that has as many rows as there can be; and how many it had. Without the interpreter."""
    from tribp.launch.buffer import Buffer
    from tribp.launch.launches import CachedLaunch
    from tribp.launch.plan import Plan
    from tribp.ops.linear import plan as ops

    from ..executor.run import executed
    from ..launch.plans import plan_of

    problem = OutputGradProblem(MAX_SIZE, 1, "float32", ARCHS["sm_80"])
    most = MAX_SIZE - 4096 - MAX_SIZE % 4096  # of two programs; begun so late, as many again end behind 2³¹
    config = replace(problem.choose(), rows=most)
    assert problem.is_legal(config)
    dy, db = torch.ones(1, 1).expand(MAX_SIZE, 1), torch.zeros(1)

    def build(plan: Plan, dy: Buffer, db: Buffer) -> None:
        ops.sum_rows(plan, dy, None, NONE, None, db)

    def the_last(first: int, last: int, count: int) -> Any:
        return np.array([last])

    with executed("sm_80", ctas=1) as report, mock.patch.object(np, "linspace", the_last):
        plan = plan_of(build, (dy, db), {OutputGradProblem: config})
        (launch,) = plan.launches
        memory = plan.memory((dy, db))
        CachedLaunch(launch)(memory)
    report.check()
    partials = memory[-1]
    assert partials is not None
    return partials[-1].item(), MAX_SIZE - most


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is executed are CPU tensors")
def test_the_last_rows_of_all_are_summed() -> None:
    pytest.importorskip("triton")
    summed, rows = called(rows_that_the_last_program_summed)
    assert summed == rows > 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=dimension, n=dimension, k=dimension,
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "strided", "shifted", "padded"])] * 3),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape_layout_and_type(
    m: int, n: int, k: int, dtype: torch.dtype, layouts: tuple[str, str, str], bias: bool, seed: int, kernels: str
) -> None:
    torch.manual_seed(seed)

    def laid_out(rows: int, cols: int, layout: str) -> Tensor:
        if layout == "strided":
            return matrix(rows, 2 * cols, dtype, kernels)[:, ::2]
        if layout == "padded":
            return matrix(rows, cols + 16 - cols % 16, dtype, kernels)[:, :cols]
        if layout == "shifted":
            return matrix(rows, cols + 1, dtype, kernels)[:, 1:]
        return matrix(rows, cols, dtype, kernels, transposed=layout == "columns")

    x, w, dy = (laid_out(*s, layout) for s, layout in zip(((m, k), (n, k), (m, n)), layouts, strict=True))
    x, w = x.detach().requires_grad_(), (w / k**0.5).detach().requires_grad_()
    b = matrix(1, n, dtype, kernels)[0].requires_grad_() if bias else None
    y = tribp.linear_sigmoid(x, w, b)
    exact = LinearSigmoid(x, w, b)
    assert_close(y, exact.y)
    dx, dw, db, terms = exact.gradients(dy, y)
    inputs = [x, w] if b is None else [x, w, b]
    found = torch.autograd.grad(y, inputs, dy)
    # Few terms of either sign may cancel; then it is their size that rounding is relative to.
    sizes = LinearSigmoid(x.abs(), w.abs(), None).gradients(dy.abs(), y)
    for result, value, size in zip(found, (dx, dw, db), (sizes[0], sizes[1], terms), strict=False):
        # Of a few elements each may have been rounded twice in the same direction: dz, then the result.
        assert_close(result, value, scale=size, tolerance=max(TOLERANCE[dtype], 1.01 * torch.finfo(dtype).eps))
