"""Codes by the kernel's own functions, on the worst that a GPU's fast arithmetic may do."""

from typing import Any

import numpy as np
import pytest
import torch

from tribp.optim import codes

from ..conftest import HAS_GPU
from .test_codes import every_half

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from tribp.kernels import optim_codes  # noqa: E402


@triton.jit
def encode(x, random, codes, scales, ROWS: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * 32 + tl.arange(0, 32)[None, :]
    q, scale = optim_codes.encode(tl.load(x + at), at >= 0, tl.load(random + at), TYPE, PTX=True)
    tl.store(codes + at, q)
    tl.store(scales + row, scale)


@pytest.mark.parametrize("units", [-2, 0, 2])
@pytest.mark.parametrize("random", [0, 0x7FFF])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_the_largest_number_has_the_last_code(
    dtype: torch.dtype, random: int, units: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """… or the one before. Above the last comes 0, which divides a moment by nothing, or a code of the other sign.

    units: in the last place, that a quotient is off: `div.full.f32` and `sqrt.approx.f32` as PTX allows them.
    """
    if not HAS_GPU:
        interpreter = pytest.importorskip("triton.runtime.interpreter")

        def off(exact: Any) -> Any:
            for _ in range(abs(units)):
                exact = np.nextafter(exact, np.copysign(np.inf, units * exact), dtype=exact.dtype)
            return exact

        monkeypatch.setattr(
            interpreter.InterpreterBuilder, "create_fdiv",
            lambda self, a, b: self.binary_op(a, b, lambda a, b: off(np.divide(a, b))),
        )  # fmt: skip
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, "create_sqrt",
            lambda self, x: self.unary_op(x, lambda x: off(np.sqrt(x))),
        )  # fmt: skip
    rows = 256
    size = torch.logspace(-30, 30, rows)
    sign = torch.tensor([1.0, -1.0] if dtype == torch.int8 else [1.0]).repeat(rows)[:rows]
    x = (size * sign)[:, None].repeat(1, 32)
    x[:, 1:] *= torch.linspace(0, 1, 31)
    q, scales = torch.zeros_like(x, dtype=dtype, device=kernels), torch.zeros(rows, device=kernels)
    bits = torch.full_like(x, random, dtype=torch.int32, device=kernels)
    encode[(1,)](x.to(kernels), bits, q, scales, rows, tl.int8 if dtype == torch.int8 else tl.uint8)
    assert torch.equal(scales.cpu(), size)
    found = codes.decode(q.cpu(), scales.cpu())
    last = 127 if dtype == torch.int8 else 255
    assert (q[:, 0].cpu().int().abs() >= last - 1).all()  # by the last place and 2⁻¹⁵ of a code
    assert (found.abs() <= size[:, None] * (1 + 1e-6)).all()
    assert (found * x >= 0).all()
    assert dtype == torch.int8 or (found[:, 2:] > 0).all()


@pytest.mark.parametrize("largest", [65504.0, 1.0, 0.75, 2.0**-14, 2.0**-24])
@pytest.mark.parametrize("random", [0, 0x4000, 0x7FFF])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_rounded_at_random_a_state_is_off_by_a_code(
    dtype: torch.dtype, random: int, largest: float, kernels: str
) -> None:  # fmt: skip
    """As a step rounds it: by the kernel's function and by the fallback's, which differ in a code's last place."""
    rows, x = 256, every_half(largest)
    signed = dtype == torch.int8
    x = x if signed else x.abs()
    x = torch.cat([x, x.new_ones(-len(x) % rows, 32)])  # whole programs
    bits = torch.full_like(x, random, dtype=torch.int32)
    q, scales = torch.zeros_like(x, dtype=dtype, device=kernels), torch.zeros(len(x), device=kernels)
    encode[(len(x) // rows,)](
        x.to(kernels), bits.to(kernels), q, scales, rows, tl.int8 if signed else tl.uint8
    )  # fmt: skip
    fallback, others = torch.empty_like(x, dtype=dtype), torch.empty(len(x))
    codes.encode(x, fallback, others, bits.long())
    assert torch.equal(scales.cpu(), others)
    off = (q.cpu().int() - fallback.int()).abs()
    assert off.max() <= 1
    assert (off > 0).double().mean() < 2e-3
    for result in (q.cpu(), fallback):
        found, exact, s = codes.decode(result, others).double(), x.double(), others[:, None].double()
        if signed:
            farther = torch.maximum(exact.abs(), found.abs())  # a code is wider there
            units = (found - exact).abs() / ((s + farther) ** 2 / (254 * s))
            assert (found.sign() * exact.sign() >= 0).all()
        else:
            units = (found.sqrt() - exact.sqrt()).abs() / (s.sqrt() / 255)
            assert torch.equal(found == 0, exact == 0)
        # Plus 2⁻¹⁵, by which the random numbers of the two stand apart, and what float32 rounds.
        assert units.max() <= 1 + 2.0**-12
        if random == 0x4000:  # to nearest; no square above 0 becomes 0
            some = units if signed else units[exact.sqrt() >= 0.5 / 255 * s.sqrt()]
            assert some.max() <= 0.5 + 2.0**-12
