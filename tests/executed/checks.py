"""What a case of executed code is, and how far its results may be from float64's."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..oracle import Activation

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
Layout = Callable[[Tensor], Tensor]


class Case(Protocol):
    """A case is data, and picklable: another process computes it."""

    @property
    def processors(self) -> int:
        """How many the GPU has: few, so that heuristics give small shapes the tiles and splits of large ones."""

    def wrong(self) -> list[str]:
        """Compute it with whatever runs the kernels, and say in words what is wrong with the results."""


# ---- how far a result may be from float64's


class Rounding(NamedTuple):
    """What the number formats cost, relative to a number (`unit`) or to the root of the sum of squared terms."""

    dtype: torch.dtype
    tf32: bool = False

    @property
    def unit(self) -> float:
        """Of one rounding to the type, at most."""
        return float(torch.finfo(self.dtype).eps) / 2

    def sum_of(self, terms: int, rounded: bool = False) -> float:
        """Of a sum of products. rounded: one factor of each was rounded to the type on its way into the product.

        Tensor cores cut a float32 sum after every instruction: an error of 2⁻²³ of the sum so far, which of terms of
        either sign is as large as the root of their squares. The errors of rounded factors are independent of each
        other: their root mean square is a third of their bound, at most, and nothing lies nine of them out.
        """
        accumulator = 2.0**-52 if self.dtype == DOUBLE else 2.0**-23
        factors = 3 * self.unit * rounded + 3 * 2.0**-11 * self.tf32
        return (terms + 8) * accumulator + factors


def differences(name: str, result: Tensor, exact: Tensor, bound: Tensor) -> list[str]:
    """What is wrong if an element of `result` is further from `exact` than `bound` says: how many, where, the worst.

    A few of the type's smallest steps are granted: what is rounded to them loses more than a part of itself.
    """
    bound = bound + 4 * torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    result = result.detach().double()
    if result.shape != exact.shape:
        return [f"{name} has the shape {tuple(result.shape)}, not {tuple(exact.shape)}"]
    off = (result - exact).abs()
    wrong = ~(off <= bound)  # also what is not a number
    if not wrong.any():
        return []
    excess = (off / bound).nan_to_num(math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    box = ", ".join(f"{int(i.min())}…{int(i.max())}" for i in wrong.nonzero(as_tuple=True))
    return [
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, at [{box}] of {list(result.shape)}; "
        f"{name}{list(worst)} is {float(result[worst]):.9g}, not {float(exact[worst]):.9g}: {float(excess[worst]):.3g} "
        "times as far off as rounding explains"
    ]


class Gradients(NamedTuple):
    """Exact gradients of x, w and b, and how far off each may be besides its own rounding."""

    x: tuple[Tensor, Tensor]
    w: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]

    def differences(self, found: dict[str, Tensor], rounding: Rounding) -> list[str]:
        wrong = []
        for name, result in found.items():
            exact, error = getattr(self, name)
            wrong += differences(f"d{name}", result, exact, rounding.unit * exact.abs() + error)
        return wrong


def require_gradients(needs: str, x: Tensor, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """Of these tensors, those whose letters are in `needs`."""
    inputs = {name: t for name, t in (("x", x), ("w", w), ("b", b)) if t is not None and name in needs}
    for t in inputs.values():
        t.requires_grad_()
    return inputs


def gradients(y: Tensor, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(y, list(inputs.values()), dy) if inputs else ()
    return dict(zip(inputs, found, strict=True))


def output_bound(rounding: Rounding, y: Tensor, error: Tensor, activation: Activation) -> Tensor:
    """Of y = act(z), where z has the error. act's slope is 1 at most, σ's ¼; some take a few operations."""
    smooth = isinstance(activation, str) and activation in ("sigmoid", "tanh", "elu", "softplus")
    smooth = smooth or (isinstance(activation, tuple) and activation[0] in ("elu", "softplus"))
    operations = smooth * (2.0**-50 if rounding.dtype == DOUBLE else 2.0**-21)
    return rounding.unit * y.abs() + error * (0.25 if activation == "sigmoid" else 1) + operations
