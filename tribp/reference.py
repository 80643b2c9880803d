"""The library's mathematics in plain torch: the fallback where no kernel runs, and the tests' oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """σ(input · weightᵀ + bias)."""
    return torch.sigmoid(F.linear(input, weight, bias))


def linear_sigmoid_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, each where `needs` says so, from the output alone; differentiable again.

    dz = dy·y·(1 − y), dx = dz·W, dW = dzᵀ·x, db = Σ_rows dz. `input` is needed for dW only, `weight` for dx only.
    """
    dz = torch.ops.aten.sigmoid_backward(grad, output)
    rows = dz.reshape(-1, dz.shape[-1])
    dx = dw = db = None
    if needs[0]:
        assert weight is not None
        dx = dz @ weight
    if needs[1]:
        assert input is not None
        dw = rows.t() @ input.reshape(-1, input.shape[-1])
    if needs[2]:
        db = rows.sum(0)
    return dx, dw, db
