"""What the tests of the optimizers' surroundings share."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import (
    Optimizer,
)
from torch.testing import assert_close

import tribp.optim

from .cases import TORCHS

Options = dict[str, Any]


PAIRS: list[tuple[type[Optimizer], type[Optimizer]]] = [
    (getattr(tribp.optim, name), getattr(torch.optim, name)) for name in TORCHS
]


every_pair = pytest.mark.parametrize(("kind", "genuine"), PAIRS, ids=lambda kind: str(kind.__module__.split(".")[0]))


def weights(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Parameter]:
    made = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(n, generator=made, dtype=torch.float64).to(device, dtype)) for n in (5, 3)]


def gradients(params: Sequence[Tensor], number: int) -> None:
    """Those of step `number`, the same every time."""
    made = torch.Generator().manual_seed(100 + number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=made, dtype=torch.float64).to(p.device, p.dtype)


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert_close(list(found), list(expected), rtol=1e-11, atol=1e-13)


def model(device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(device, torch.float64)


def loss_of(network: torch.nn.Module, number: int = 0) -> Tensor:
    p = next(network.parameters())
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(p.device, p.dtype)
    return network(x).square().sum()  # type: ignore[no-any-return]
