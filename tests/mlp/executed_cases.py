"""`mlp` where compiled code is executed: a dgrad that writes the dz of the layer below, and sums it."""

import copy
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
        """Against float64, by the size of each gradient: several roundings to the type, one a layer.

        A bias has a row for each of x's in float64: what it adds up may cancel, and is rounded by its own size.
        """
        torch.backends.cuda.matmul.allow_tf32 = False
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
        rows = [t.detach().double().expand(*[self.rows] * (t.dim() == 1), *t.shape) for t in needed]
        exact = [t.clone().requires_grad_() for t in rows]
        z, *rest = exact if self.input else (x.detach().double(), *exact)
        for n in range(len(weights)):
            z = z @ rest[n].t() + (rest[len(weights) + n] if self.bias else 0)
            z = activated(z, self.activation if n + 1 < len(weights) else self.last)
        values = [z.detach(), *torch.autograd.grad(z, exact, dy.double())]
        unit = float(torch.finfo(self.dtype).eps)
        wrong: list[str] = []
        for name, result, value in zip(["y", *map(str, range(len(found)))], [y, *found], values, strict=True):
            terms = value.square().sum(0).sqrt() if result.dim() == 1 else 0
            value = value.sum(0) if result.dim() == 1 else value
            size = value.abs() + value.square().mean().sqrt() + terms
            wrong += differences(name, result, value, 8 * len(weights) * unit * size)
        return wrong


class Train(NamedTuple):
    """Loss and gradients of `train_step`."""

    sizes: tuple[int, ...]
    rows: int
    loss: str = "cross_entropy"
    reduction: str = "mean"
    dtype: torch.dtype = BRAIN
    activation: Activation = "sigmoid"
    last: Activation = None
    bias: bool = True
    processors: int = 2

    def wrong(self) -> list[str]:
        """As `MLP`; the loss by its own size."""
        torch.backends.cuda.matmul.allow_tf32 = False
        model = tribp.nn.MLP(self.sizes, self.activation, self.last, self.bias, dtype=self.dtype)
        exact = copy.deepcopy(model).double()
        x = torch.randn(self.rows, self.sizes[0], dtype=DOUBLE).to(self.dtype)
        target = torch.rand(self.rows, self.sizes[-1], dtype=DOUBLE).to(self.dtype)
        if self.loss == "cross_entropy":
            target = torch.randint(self.sizes[-1], (self.rows,))
            if self.rows > 1:
                target[self.rows // 2] = -100
        step, separate = (
            tribp.train_step(m, torch.optim.SGD(m.parameters(), lr=0.0), self.loss, self.reduction)
            for m in (model, exact)
        )
        value = step(x, target)
        with tribp.use_backend("torch"):
            true = separate(x.double(), target.double() if target.is_floating_point() else target)
        unit = 8 * len(self.sizes) * float(torch.finfo(self.dtype).eps)
        wrong = [f"it went the ordinary way: {step.reason}"] if step.reason else []
        wrong += differences("loss", value, true, unit * (1 + true.abs()))
        for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            size = q.grad.abs() + q.grad.square().mean().sqrt()
            wrong += differences(name, p.grad, q.grad, unit * size)
        return wrong


QUICK: dict[str, Case] = {
    "train, half, no bias": Train((33, 130, 9), 21, "half_squared_error", "sum", HALF, "elu", "tanh", bias=False),
    "train, float64, one layer": Train((16, 5), 33, "mse_loss", "mean", DOUBLE, last="softplus"),
    "mlp, float32, odd": MLP((33, 77, 10), 70, SINGLE, "elu", bias=False),
    "mlp, odd pitch": MLP((33, 77, 10), 70, BRAIN, "elu"),
    "mlp, one row of tiles": MLP((24, 40, 16), 9, SINGLE, "softplus", input=True),
    "mlp, dz of parts": MLP((16, 24, 4200), 9, activation="tanh", processors=8),
}
QUICK_ON_HOPPER: dict[str, Case] = {
    "train, bf16, a large first layer": Train((1030, 136, 10), 20),
    "mlp, three layers": MLP((40, 72, 64, 24), 136, HALF, "tanh", "sigmoid", input=True),
}
SLOW: dict[str, Case] = {
    "train, float32, odd": Train((77, 45, 7), 19, "binary_cross_entropy", "batchmean", SINGLE, "tanh", "sigmoid"),
    "mlp, bf16": MLP((72, 136, 10), 300),
    "train, bf16, three layers": Train((40, 72, 24, 10), 37),
    **{
        f"mlp, {str(dtype)[6:]}, {rows}": MLP((72, 264, 77, 10), rows, dtype, "tanh", "sigmoid", input=True)
        for dtype in (HALF, BRAIN, SINGLE, DOUBLE)
        for rows in (1, 129, 1000)
    },
    **{
        f"train, {str(dtype)[6:]}, {rows}": Train((784, 128, 10), rows, dtype=dtype)
        for dtype in (HALF, BRAIN, SINGLE, DOUBLE)
        for rows in (1, 128)
    },
}


def random_mlp(chance: random.Random) -> Case:
    smooth = [a for a in ACTIVATIONS if a in (None, "sigmoid", "tanh", "elu", "softplus")]
    return MLP(
        tuple(chance.choice([1, 7, 16, 33, 72, 136]) for _ in range(chance.choice([2, 3, 4]))),
        chance.choice([1, 9, 64, 200]), chance.choice([HALF, BRAIN, SINGLE, DOUBLE]), chance.choice(smooth),
        chance.choice(smooth), chance.random() < 0.7, chance.random() < 0.5, chance.choice([1, 2, 8, 108]),
    )  # fmt: skip


def random_train(chance: random.Random) -> Case:
    loss = chance.choice(["half_squared_error", "mse_loss", "cross_entropy", "binary_cross_entropy"])
    return Train(
        tuple(chance.choice([1, 2, 7, 16, 33, 72, 120]) for _ in range(chance.choice([2, 3, 4]))),
        chance.choice([2, 9, 64, 200]), loss, chance.choice(["mean", "sum", "batchmean"]),
        chance.choice([HALF, BRAIN, SINGLE, DOUBLE]), chance.choice([None, "sigmoid", "tanh", "elu", "softplus"]),
        "sigmoid" if loss == "binary_cross_entropy" else None, chance.random() < 0.7,
    )  # fmt: skip


RANDOM: dict[str, Callable[[random.Random], Case]] = {"mlp": random_mlp, "train": random_train}
