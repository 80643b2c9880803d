"""The optimizers of the demo, each with the genuine one of torch that must give the same numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import optim

BATCH_SIZE = 16  # the learning rates below and in models.py are for it


@dataclass(frozen=True)
class Method:
    """`tribp.optim.<ours>(…, **arguments)`, and `torch.optim.<theirs>(…, **their_arguments)`, which is the same."""

    ours: str
    theirs: str
    lr: float  # of the first step, for the MLP: tried 1, 2, 5 × 10ⁿ; this one is among the best on the held-out digits
    arguments: Mapping[str, Any] = field(default_factory=dict)
    their_arguments: Mapping[str, Any] = field(default_factory=dict)

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(optim, self.ours)(parameters, lr=lr, **self.arguments)
        return made

    def their_optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, self.theirs)(parameters, lr=lr, **self.their_arguments)
        return made

    def __str__(self) -> str:
        return _written(f"tribp.optim.{self.ours}", self.arguments)

    @property
    def twin(self) -> str:
        return _written(f"torch.optim.{self.theirs}", self.their_arguments)


def _written(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})" if arguments else name


METHODS = {
    "sgd": Method("SGD", "SGD", lr=2.0),
    # v₁ = g₁ in full, so the first gradient moves the weights by lr·g₁/(1 − β) in the end, which with the usual β = 0.9
    # saturates the outputs, or takes a rate too small to learn much: 10 to 82 % right where 0.5 gives 91.
    "momentum": Method(
        "Momentum", "SGD", lr=0.7, arguments={"beta": 0.5}, their_arguments={"momentum": 0.5, "dampening": 0.5}
    ),
    # √(G + ε): torch, with √G + ε, gets there by a sum that starts from ε.
    "adagrad": Method(
        "AdaGrad",
        "Adagrad",
        lr=0.05,
        arguments={"eps": 1e-8, "eps_inside_sqrt": True},
        their_arguments={"eps": 0, "initial_accumulator_value": 1e-8},
    ),
    "rmsprop": Method("RMSProp", "RMSprop", lr=0.01),
    "adam": Method("Adam", "Adam", lr=0.01),
    "adamw": Method("AdamW", "AdamW", lr=0.01),
}


@dataclass(frozen=True)
class Run:
    """One line of the comparison."""

    name: str
    optimizer: str
    batch_size: int | None  # None: all digits
    lr: float
    share: float = 1.0  # of the epochs

    def epochs(self, epochs: int) -> int:
        return math.ceil(self.share * epochs)


COMPARED = (
    Run("SGD, batch", "sgd", None, 1.0, share=10),
    Run("SGD, stochastic", "sgd", 1, 0.5, share=0.25),
    *(
        Run("SGD, mini-batch" if name == "sgd" else method.ours, name, BATCH_SIZE, method.lr)
        for name, method in METHODS.items()
    ),
)
