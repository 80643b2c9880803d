"""Linear + sigmoid in plain torch: the fallback where no kernel runs, and the tests' oracle."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """σ(input · weightᵀ + bias)."""
    return torch.sigmoid(F.linear(input, weight, bias))


def as_matrix(tensor: Tensor) -> Tensor:
    """`tensor`, its leading dimensions in one; `reshape(-1, n)` cannot tell how many rows of no columns there are."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def linear_sigmoid_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, each where `needs` says so, from the output alone; differentiable again.

    dz = dy·y·(1 − y), dx = dz·W, dW = dzᵀ·x, db = Σ_rows dz. `input` is needed for dW only, `weight` for dx only.
    """
    dz = torch.ops.aten.sigmoid_backward(grad, output)
    rows = as_matrix(dz)
    dx = dw = db = None
    if needs[0]:
        assert weight is not None
        dx = dz @ weight
    if needs[1]:
        assert input is not None
        dw = rows.t() @ as_matrix(input)
    if needs[2]:
        db = rows.sum(0)
    return dx, dw, db
