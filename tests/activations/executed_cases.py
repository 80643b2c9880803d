"""Activations where compiled code is executed: float32 ones, far out."""

from typing import NamedTuple

import torch

import tribp

from ..executed.checks import DOUBLE, SINGLE, Case, differences
from ..oracle import Activation, exactly


class FarOut(NamedTuple):
    """e⁻⁸⁰ as exact as e⁻¹, which the interpreter cannot show: it has no fused multiply-add."""

    activation: Activation
    factor: float = 1.0  # of z in the exponent: none of float32's, so that its product is rounded, too
    processors: int = 2

    def wrong(self) -> list[str]:
        # Of 11 bits each: the product with 1 is exact, however operands reach the tensor cores.
        z = torch.arange(-640, 641, dtype=SINGLE) / (16 if self.factor > 1 else 8)
        z = z[(self.factor * z).abs() < 87]  # further out e^z is flushed to 0
        y = tribp.linear(z[:, None], torch.ones(1, 1), None, self.activation)
        exact = exactly(z[:, None].to(DOUBLE), self.activation)
        return differences("y", y, exact, 4 * torch.finfo(SINGLE).eps * exact.abs())


QUICK_ON_HOPPER: dict[str, Case] = {
    "sigmoid far out": FarOut("sigmoid"),
    "softplus far out": FarOut(("softplus", 2.7, 18), 2.7),
    "tanh far out": FarOut("tanh"),
}
