"""float32 products at TF32: operands are rounded to nearest on their way into tensor cores, which would cut them.

Results are compared with float64 products of rounded operands. A cut operand makes them 7e-4 smaller on these positive
numbers, one that keeps float32 about 3e-5 larger or smaller; sums in float32, whose every step a tensor core cuts,
differ by under 1e-5.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import tribp
from tribp.kernels import common
from tribp.launch.buffer import Buffer
from tribp.launch.layout import operand
from tribp.launch.matmul import MatmulConfig
from tribp.launch.plan import Plan
from tribp.ops.activations import Activation
from tribp.ops.linear import plan as linear
from tribp.ops.linear.config import ForwardProblem

from ..conv3x3.cases import Case, Layout, contiguous, last
from ..oracle import Conv3x3, assert_close
from .plans import run

WITHIN = 1e-5


def rounded(values: Tensor) -> Tensor:
    """float32 values as TF32 has them, in float64: to nearest, ties away from zero."""
    bits = values.detach().cpu().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def positive(*shape: int, device: str) -> Tensor:
    return (torch.rand(shape, dtype=torch.float32) + 0.1).to(device)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products and convolutions may both use TF32."""
    holders = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [holder.fp32_precision for holder in holders]
    for holder in holders:
        holder.fp32_precision = "tf32"
    yield
    for holder, value in zip(holders, before, strict=True):
        holder.fp32_precision = value


@triton.jit
def round_kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(y + i, common.round_to_tf32(tl.load(x + i)))


def test_rounding(kernels: str) -> None:
    """Ties, carries into the exponent, subnormals, overflow; infinities and NaN stay what they are."""
    patterns = [0x3F801000, 0x3F800FFF, 0x3F803000, 0x3FFFFFFF, 0x00001000, 0x00000FFF, 0x7F7FEFFF, 0x7F7FFFFF, 0]
    exact = [0x3F802000, 0x3F800000, 0x3F804000, 0x40000000, 0x00002000, 0x00000000, 0x7F7FE000, 0x7F800000, 0]
    special = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float32)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FFFF000, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    values = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    expected = torch.tensor(exact, dtype=torch.int32).view(torch.float32)
    x = torch.cat([values, -values, special, nan, torch.zeros(7)]).to(kernels)
    y = torch.full_like(x, torch.nan)
    round_kernel[(1,)](x, y, SIZE=32)
    torch.testing.assert_close(
        y.cpu(), torch.cat([expected, -expected, special, nan, torch.zeros(7)]), rtol=0, atol=0, equal_nan=True
    )


SIGMOID = Activation("sigmoid")
M, N, K = 112, 48, 80  # multiples of 16: strides of descriptors in the interpreter of Triton 3.5
BASE = MatmulConfig(64, 32, 32, num_warps=4, num_stages=3, reason="test", group=2)
FORMS = {"pointers": BASE, "prefetch": replace(BASE, prefetch=True, num_stages=1), "tma": replace(BASE, tma=True)}


def dgrad(plan: Plan, dz: Buffer, y: Buffer | None, w: Buffer, dx: Buffer, *, config: MatmulConfig) -> None:
    ys = None if y is None else operand(plan, y)
    linear.dgrad(plan, operand(plan, dz), ys, operand(plan, w), dx, config, SIGMOID, "tf32")


def wgrad(
    plan: Plan, dz: Buffer, y: Buffer, x: Buffer, dw: Buffer, dz_out: Buffer | None, db: Buffer | None,
    *, config: MatmulConfig,
) -> None:  # fmt: skip
    dzs, ys, xs = (operand(plan, t) for t in (dz, y, x))
    linear.wgrad(plan, dzs, ys, xs, dw, dz_out, db, config, SIGMOID, "tf32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_each_form_of_linear(form: str, transposed: bool, kernels: str) -> None:
    def lying(rows: int, cols: int) -> Tensor:
        return positive(cols, rows, device=kernels).t() if transposed else positive(rows, cols, device=kernels)

    x, w = lying(M, K), lying(N, K) / (4 * K)
    dz = positive(M, N, device=kernels)
    y, dx, dw = torch.empty_like(dz), positive(M, K, device=kernels), positive(1, N, K, device=kernels)
    run(linear.forward_layer, (x, w, None, y), {ForwardProblem: FORMS[form]}, activation=SIGMOID, tf32=True)
    assert_close(y, torch.sigmoid(rounded(x) @ rounded(w).t()), tolerance=2e-6)
    run(dgrad, (dz, None, w, dx), config=FORMS[form])
    assert_close(dx, rounded(dz) @ rounded(w), tolerance=WITHIN)
    run(wgrad, (dz, y, x, dw, None, None), config=FORMS[form])
    assert_close(dw[0], rounded(dz).t() @ rounded(x), tolerance=WITHIN)


@pytest.mark.parametrize("form", ["pointers", "tma"])
def test_dz_formed_on_load(form: str, kernels: str) -> None:
    """dz is rounded as any operand is, but not dy and y, nor what is summed for db."""
    config = replace(FORMS[form], fuse_dz=True)
    x, w = positive(M, K, device=kernels), positive(N, K, device=kernels)
    dy, y = positive(M, N, device=kernels), positive(M, N, device=kernels) / 1.2
    dz = dy * ((1 - y) * y)
    dx, dw, db, dz_out = torch.empty_like(x), torch.empty(1, N, K, device=kernels), torch.empty(1, N), torch.empty(M, N)
    db, dz_out = db.to(kernels), dz_out.to(kernels)
    run(dgrad, (dy, y, w, dx), config=config)
    assert_close(dx, rounded(dz) @ rounded(w), tolerance=WITHIN)
    run(wgrad, (dy, y, x, dw, dz_out, db), config=config)
    assert_close(dw[0], rounded(dz).t() @ rounded(x), tolerance=WITHIN)
    assert_close(rounded(dz_out), rounded(dz))
    assert_close(db[0], dz.double().sum(0).cpu(), tolerance=5e-7)


CASES = {
    "dense": Case((2, 16, 6, 8), 32, padding=(1, 1)),
    "no box divides": Case((1, 16, 7, 7), 20, padding=(1, 1)),
    "strided": Case((2, 16, 8, 6), 16, (2, 2), (1, 1)),
    "few channels": Case((2, 3, 6, 7), 24, padding=(1, 1)),
    "groups": Case((2, 16, 5, 6), 16, padding=(1, 1), groups=4),
    "dz of a sigmoid": Case((2, 16, 4, 8), 16, padding=(1, 1), activation="sigmoid"),
    "few channels, dz of a sigmoid": Case((2, 3, 5, 6), 16, padding=(1, 1), activation="sigmoid"),
}


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, last) for name in CASES), ("dense", contiguous), ("few channels", contiguous)]
)
@pytest.mark.usefixtures("tf32")
def test_convolution(name: str, layout: Layout, kernels: str) -> None:
    case = CASES[name]
    fan = case.size[1] // case.groups * 9
    x = layout(positive(*case.size, device=kernels)).requires_grad_()
    w = layout(positive(case.out, fan // 9, 3, 3, device=kernels) / fan).requires_grad_()
    b = positive(case.out, device=kernels).requires_grad_()
    y = case.ours(x, w, b)
    dy = layout(positive(*y.shape, device=kernels))
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    dz = dy * ((1 - y) * y) if case.activation else dy
    plain = case._replace(activation=None)
    exact = Conv3x3(rounded(x), rounded(w), b, case.stride, case.padding, case.groups, case.activation)
    exact_dx, exact_dw, _, _ = plain.exact(rounded(x), rounded(w)).gradients(rounded(dz), dz)
    assert_close(y, exact.y, tolerance=2e-6 if case.activation else WITHIN)
    assert_close(dx, exact_dx, tolerance=WITHIN)
    assert_close(dw, exact_dw, tolerance=WITHIN)
    assert_close(db, dz.detach().double().sum((0, 2, 3)).cpu(), tolerance=5e-7)


@pytest.mark.usefixtures("tf32")
def test_linear_as_a_whole(kernels: str) -> None:
    x, w, b = positive(M, K, device=kernels), positive(N, K, device=kernels) / (4 * K), positive(N, device=kernels)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    y = tribp.linear_sigmoid(*inputs)
    dy = positive(M, N, device=kernels)
    dx, dw, db = torch.autograd.grad(y, inputs, dy)
    dz = dy * ((1 - y) * y)
    assert_close(y, torch.sigmoid(rounded(x) @ rounded(w).t() + b.detach().double().cpu()), tolerance=2e-6)
    assert_close(dx, rounded(dz) @ rounded(w), tolerance=WITHIN)
    assert_close(dw, rounded(dz).t() @ rounded(x), tolerance=WITHIN)
    assert_close(db, dz.detach().double().sum(0).cpu(), tolerance=5e-7)
