"""What the comparison with float64 lets pass, and what it does not."""

import pytest
import torch
from torch import Tensor

from .oracle import assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def rounded(exact: Tensor, dtype: torch.dtype, times: int = 1) -> Tensor:
    """As after so many operations: each rounds to the type, and moves what the next one rounds."""
    values = exact
    for _ in range(times - 1):
        scale = 1 + torch.rand(exact.shape, dtype=torch.float64)
        values = (values * scale).to(dtype).double() / scale
    return values.to(dtype)


def with_fewer_bits(exact: Tensor, dtype: torch.dtype, lost: int) -> Tensor:
    """Rounded to the bits that the type would have without the last ones."""
    fraction, exponent = torch.frexp(exact)
    units = 2**lost * torch.finfo(dtype).eps / 2  # of fractions, which are between ½ and 1
    return torch.ldexp((fraction / units).round() * units, exponent).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 64, 1000])
def test_three_roundings_are_no_loss_however_exact_torch_is(n: int, dtype: torch.dtype) -> None:
    for _ in range(100):
        exact = torch.randn(n, dtype=torch.float64)
        assert_close(rounded(exact, dtype, 3), exact, rounded(exact, dtype), tolerance=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [119, 4096])
def test_two_lost_bits_are_a_loss(n: int, dtype: torch.dtype) -> None:
    for _ in range(20):
        exact = torch.randn(n, dtype=torch.float64)
        assert_close(with_fewer_bits(exact, dtype, 0), exact, rounded(exact, dtype), tolerance=1)
        with pytest.raises(AssertionError, match="over twice torch's"):
            assert_close(with_fewer_bits(exact, dtype, 2), exact, rounded(exact, dtype), tolerance=1)


@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16], ids=str)  # float16: as many bits as TF32
def test_narrow_operands_are_a_loss_even_of_one_element(operand: torch.dtype) -> None:
    x, w = torch.rand(1, 64) + 0.5, torch.rand(64, 1) + 0.5
    exact = x.double() @ w.double()
    assert_close(x @ w, exact, x @ w)
    with pytest.raises(AssertionError, match="over twice torch's"):
        assert_close(x.to(operand).float() @ w.to(operand).float(), exact, x @ w, tolerance=1)
