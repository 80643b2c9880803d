"""Values and derivatives of the kernels' activations, where they are hard: near 0, far out, at kinks."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from tribp.kernels import activations, common
from tribp.ops.activations import DEFAULTS, activation_of, as_stored, gradient

from ..oracle import ACTIVATIONS, Activation, activated, derivative, exactly

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZE = 2048


@triton.jit
def both(z, dy, y, dz, SIZE: tl.constexpr, ACT: tl.constexpr, STORED: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = act(z), and dz from what is stored of it. z: in the accumulator's type."""
    i = tl.arange(0, SIZE)
    value = activations.activate(tl.load(z + i), ACT, y.dtype.element_ty, PTX)
    tl.store(y + i, common.round_to(value, y.dtype.element_ty))
    stored = tl.load(y + i)
    tl.store(dz + i, activations.gradient(tl.load(dy + i), stored, STORED))


def values() -> Tensor:
    """Both signs, of every size that matters: ±2⁻³⁰ to ±200, and densely from −7 to 7."""
    sizes = torch.logspace(-30, 7.6, 256, base=2, dtype=torch.float64)
    return torch.cat([sizes, -sizes, torch.linspace(-7, 7, SIZE - 512, dtype=torch.float64)])


def run(z: Tensor, dy: Tensor, activation: Activation, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.full(z.shape, torch.nan, dtype=dtype, device=device)
    dz = torch.full(z.shape, torch.nan, dtype=accumulator, device=device)
    act = activation_of("test", activation)
    arguments = (z.to(device, accumulator), dy.to(device, dtype), y, dz)
    both[(1,)](*arguments, SIZE=SIZE, ACT=act, STORED=as_stored(act, dtype), PTX=True)
    return y.cpu(), dz.cpu()


def steps(found: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far apart, in units in the last place of `exact`. What the GPU flushes to zero may be off by all it is."""
    limits = torch.finfo(dtype)
    size = exact.abs().clamp_min(limits.smallest_normal)
    unit = torch.exp2(torch.floor(torch.log2(size))) * limits.eps
    off = (found.double() - exact).abs()
    return torch.where((exact.abs() < 2**-126) & (off < 2**-126), 0, off / unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_values_are_within_a_few_units_in_the_last_place(
    activation: Activation, dtype: torch.dtype, kernels: str
) -> None:
    """Rounded once where 16 bits are stored, and within four units in float32 and float64; five, where `ex2.approx`,
    which may be two off, is rounded four times more (float32 softplus: 4.07 on an H200).

    The interpreter rounds a product before it adds to it: far out, eᶻ is as wrong as the product z·log₂e is.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    z = values().to(accumulator)
    y, dz = run(z, torch.ones(SIZE), activation, dtype, kernels)
    exact = exactly(z.double(), activation)
    far = 3 * z.double().abs() if common.INTERPRETED and dtype == torch.float32 else 0.0
    most = steps(y, exact, dtype) - far
    on_gpu = "softplus" in (activation or "") and dtype == torch.float32 and not common.INTERPRETED
    units = 5 if on_gpu else 4
    assert float(most.max()) <= (0.51 if dtype.itemsize == 2 else units), f"at {z[most.argmax()]}"
    exact = derivative(y.double(), activation, dtype)
    elu = "elu" in (activation or "")  # y + α cancels
    most = (dz - exact).abs() / torch.finfo(accumulator).eps if elu else steps(dz, exact, accumulator)
    assert float(most.max()) <= 4, f"at {y[most.argmax()]}"


SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 6.0, -3.0, 3.0, 1.0, -1.0, 7.0, -4.0]
KINKED = ["relu", "leaky_relu", ("leaky_relu", 0.25), "elu", "hardsigmoid", "hardtanh", ("hardtanh", -3, 3), "relu6"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*KINKED, "sigmoid", "tanh", "softplus", None], ids=str)
def test_special_values_are_torchs(activation: Activation, dtype: torch.dtype, kernels: str) -> None:
    """NaN, infinities, both zeros, and what stands at a kink: torch's value, and its side of the gradient."""
    z = torch.tensor(SPECIAL, dtype=dtype)
    # Each by itself, for in rows torch's CPU code has other NaNs than its CUDA code.
    alone = [t.requires_grad_() for t in z.clone().split(1)]
    outputs = [activated(t, activation) for t in alone]
    expected = torch.cat(outputs)
    grads = torch.cat(
        [
            torch.autograd.grad(y, t, torch.full_like(t, 2))[0] if activation else t
            for y, t in zip(outputs, alone, strict=True)
        ]
    )
    many = z.repeat(SIZE // len(SPECIAL) + 1)[:SIZE]
    y, dz = (t[: len(SPECIAL)] for t in run(many, torch.full((SIZE,), 2.0), activation, dtype, kernels))
    units = max(2 * torch.finfo(dtype).eps, 1e-7 * (activation == "hardsigmoid"))  # whose ⅙ is a float32 in torch
    torch.testing.assert_close(y, expected.detach(), rtol=units, atol=0.0, equal_nan=True)
    if activation not in ("relu", "tanh"):  # these may make 0.0 of −0.0, relu in torch as well, on some devices
        zero = expected == 0
        assert torch.equal(y[zero].signbit(), expected[zero].signbit())
    if activation in KINKED:
        torch.testing.assert_close(dz.to(dtype), grads, rtol=units, atol=units, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [(1.0, 20.0), (1.0, 17.0), (0.25, 18.5), (3.0, 20.0)], ids=str)
def test_softplus_at_its_threshold(numbers: tuple[float, float], dtype: torch.dtype, kernels: str) -> None:
    """σ of the threshold itself, as in torch; 1 beyond."""
    beta, threshold = numbers
    at = torch.tensor(threshold / beta, dtype=dtype)
    z = torch.stack([at * 0.5, at, at * 1.25]).requires_grad_()
    (expected,) = torch.autograd.grad(F.softplus(z, beta, threshold).sum(), z)
    z = z.detach().repeat(SIZE // 3 + 1)[:SIZE]
    activation = ("softplus", beta, threshold)
    y, dz = run(z, torch.ones(SIZE), activation, dtype, kernels)
    torch.testing.assert_close(dz[:3].to(dtype), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    by_torch = gradient(torch.ones_like(y), y, activation_of("test", activation))
    torch.testing.assert_close(by_torch[:3], expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nothing_comes_of_nothing(activation: Activation, kernels: str) -> None:
    """What lies outside a matrix is loaded as dy = 0 and y = 0, and must add nothing to a sum."""
    act, zeros = activation_of("test", activation), torch.zeros(SIZE, device=kernels)
    dz = torch.full_like(zeros, torch.nan)
    both[(1,)](
        zeros, zeros, torch.empty_like(zeros), dz, SIZE=SIZE, ACT=activation_of("test", None), STORED=act, PTX=True
    )
    assert not dz.any()


def names() -> Iterator[str]:
    for activation in ACTIVATIONS:
        if activation:
            yield activation[0] if isinstance(activation, tuple) else activation


def test_every_activation_is_tested() -> None:
    assert set(names()) == set(DEFAULTS)
