"""`mlp` where compiled code is executed: a dgrad that writes the dz of the layer below, and sums it."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

import tribp

from ..executed.checks import BRAIN, DOUBLE, HALF, SINGLE, Case, differences
from ..oracle import ACTIVATIONS, Activation, activated


class MLP(NamedTuple):
    sizes: tuple[int, ...]
    rows: int
    dtype: torch.dtype = BRAIN
    activation: Activation = "sigmoid"
    last: Activation = None
    bias: bool = True
    input: bool = False  # whether its gradient is asked for
    processors: int = 2

    def wrong(self) -> list[str]:
        """Against float64, by the size of each gradient: several roundings to the type, one a layer."""
        tensors = [torch.randn(self.rows, self.sizes[0], dtype=DOUBLE)]
        for k, n in zip(self.sizes, self.sizes[1:], strict=False):
            tensors += [torch.randn(n, k, dtype=DOUBLE) / k**0.5, torch.randn(n, dtype=DOUBLE)]
        x, *layers = (t.to(self.dtype).requires_grad_() for t in tensors)
        x.requires_grad_(self.input)
        weights, biases = layers[::2], layers[1::2] if self.bias else None
        needed = [*[x] * self.input, *weights, *(biases or [])]
        y = tribp.mlp(x, weights, biases, self.activation, self.last)
        dy = torch.randn(y.shape, dtype=DOUBLE).to(self.dtype)
        found = torch.autograd.grad(y, needed, dy)
        exact = [t.detach().double().requires_grad_() for t in needed]
        z, *rest = exact if self.input else (x.detach().double(), *exact)
        for n in range(len(weights)):
            z = torch.nn.functional.linear(z, rest[n], rest[len(weights) + n] if self.bias else None)
            z = activated(z, self.activation if n + 1 < len(weights) else self.last)
        values = [z.detach(), *torch.autograd.grad(z, exact, dy.double())]
        unit = float(torch.finfo(self.dtype).eps)
        wrong: list[str] = []
        for name, result, value in zip(["y", *map(str, range(len(found)))], [y, *found], values, strict=True):
            size = value.abs() + value.square().mean().sqrt()
            wrong += differences(name, result, value, 8 * len(weights) * unit * size)
        return wrong


QUICK: dict[str, Case] = {
    "mlp, bf16": MLP((72, 136, 10), 300),
    "mlp, three layers": MLP((40, 72, 64, 24), 200, HALF, "tanh", "sigmoid", input=True),
    "mlp, float32, odd": MLP((33, 77, 45, 10), 70, SINGLE, "elu", bias=False),
    "mlp, odd pitch": MLP((33, 77, 45, 10), 70, BRAIN, "elu"),
    "mlp, one row of tiles": MLP((24, 40, 16), 9, SINGLE, "softplus", input=True),
}
SLOW: dict[str, Case] = {
    f"mlp, {str(dtype)[6:]}, {rows}": MLP((72, 264, 77, 10), rows, dtype, "tanh", "sigmoid", input=True)
    for dtype in (HALF, BRAIN, SINGLE, DOUBLE)
    for rows in (1, 129, 1000)
}


def random_mlp(chance: random.Random) -> Case:
    smooth = [a for a in ACTIVATIONS if a in (None, "sigmoid", "tanh", "elu", "softplus")]
    return MLP(
        tuple(chance.choice([1, 7, 16, 33, 72, 136]) for _ in range(chance.choice([2, 3, 4]))),
        chance.choice([1, 9, 64, 200]), chance.choice([HALF, BRAIN, SINGLE, DOUBLE]), chance.choice(smooth),
        chance.choice(smooth), chance.random() < 0.7, chance.random() < 0.5, chance.choice([1, 2, 8, 108]),
    )  # fmt: skip


RANDOM: dict[str, Callable[[random.Random], Case]] = {"mlp": random_mlp}
