"""The hastened interpreter keeps numbers and shapes: none stands for another."""

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl: Any = triton.language


@triton.jit
def numbers(x, out, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.static_assert((i * 2).dtype.is_int())
    tl.static_assert((i * 2.0).dtype.is_floating())
    tl.static_assert((i * 2).dtype.is_int())
    tl.store(out + i, value * 2)
    tl.store(out + BLOCK + i, value * 2.5)
    tl.store(out + 2 * BLOCK + i, 2.5 - value)
    tl.store(out + 3 * BLOCK + i, tl.sum(value * 2.5, 0) * 2.5)
    tl.store(out + 4 * BLOCK + i, value.to(tl.float16) * 0.1)
    tl.store(out + 5 * BLOCK + i, value * 0.1)
    tl.store(out + 6 * BLOCK + i, i / 2)


@triton.jit
def apart(out) -> None:  # type: ignore[no-untyped-def]
    tl.store(out, tl.sum(tl.arange(0, 4) + tl.arange(0, 8), 0))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("block", [4, 8])
def test_numbers_keep_their_type_and_shape(block: int) -> None:
    x = torch.arange(1.0, block + 1)
    out = x.new_empty(7, block)
    numbers[(1,)](x, out, block)
    expected = [
        x * 2, x * 2.5, 2.5 - x, (x * 2.5).sum().mul(2.5).expand(block), x.half() * torch.full((block,), 0.1).half(),
        x * 0.1, torch.arange(block) / 2,
    ]  # fmt: skip
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.usefixtures("interpreter")
def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Exception, match="incompatible dimensions"):
        apart[(1,)](torch.empty(1))
