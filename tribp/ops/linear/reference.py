"""Linear + activation in plain torch: the fallback where no kernel runs, and the tests' oracle."""

import math

from torch import Tensor
from torch.nn import functional as F

from ..activations import Activation, activate, gradient
from ..checks import Described


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """act(input · weightᵀ + bias)."""
    return activate(F.linear(input, weight, bias), *activation)


def as_matrix(tensor: Tensor) -> Tensor:
    """`tensor`, its leading dimensions in one; `reshape(-1, n)` cannot tell how many rows of no columns there are."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def grad_sizes(
    grad: Described, input: Described | None, weight: Described | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the gradients of input, weight and bias. Of input and weight one may be None, or both if neither is asked."""
    n, k = grad.shape[-1], next((t.shape[-1] for t in (input, weight) if t is not None), 0)
    return (*grad.shape[:-1], k), (n, k), (n,)


def linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, activation: Activation,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so; differentiable again.

    dz = dy·act′, dx = dz·W, dW = dzᵀ·x, db = Σ_rows dz. `output` is needed for an activation's derivative only, `input`
    for dW only, `weight` for dx only.
    """
    dz = grad if output is None else gradient(grad, output, activation)
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
