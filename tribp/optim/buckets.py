"""What a plan consists of: parameters in slots, buckets that update them together, what a bucket is told of a step."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codes import RESIDUAL, join, scale_of
from .layouts import local
from .rule import Group, Rule
from .tracked_state import peek


@dataclass(eq=False)
class UpdateCount:
    """How often a momentum buffer was updated since it was made; SGD keeps no `step` that would say so."""

    owner: Tensor | None  # the buffer, or where there is none the parameter; None: whatever it was, it has begun
    value: Tensor | int  # a tensor where the kernel counts


@dataclass
class ParamSlot:
    """A parameter in a bucket, with its local memory."""

    index: int  # among all parameters of the optimizer
    group: int
    whole: Tensor  # the parameter, of which this process may have a shard
    grad: Tensor  # an example, while the plan is made; afterwards, and where there was none, the parameter itself
    state: dict[str, Any]
    names: tuple[str | None, ...]  # of the rule's states, in its order; None: not used in this group
    has_residual: bool  # whether the parameter has 24 bits
    has_ema: bool  # whether its average goes on: one that was kept before stays as it is
    count: UpdateCount

    @property
    def param(self) -> Tensor:
        """Asked for each time: to hold a shard would keep its memory when the model is moved away."""
        return local(self.whole)

    @property
    def states(self) -> list[Tensor | None]:
        return [None if name is None else local(peek(self.state, name)) for name in self.names]

    @property
    def scales(self) -> list[Tensor | None]:
        """Of those states that are codes."""
        return [None if name is None else peek(self.state, scale_of(name)) for name in self.names]

    @property
    def residual(self) -> Tensor | None:
        return local(peek(self.state, RESIDUAL)) if self.has_residual else None

    @property
    def weight(self) -> Tensor:
        """The parameter with all its bits."""
        return self.param if self.residual is None else join(self.param, self.residual)

    @property
    def ema(self) -> Tensor | None:
        return local(peek(self.state, "ema")) if self.has_ema else None

    @property
    def tensors(self) -> list[Tensor]:
        """Everything an update touches but counters: the parameter, its gradient, its states."""
        return [t for t in (self.param, self.grad, *self.states, self.ema, self.residual) if t is not None]


class StepInputs(NamedTuple):
    """What a bucket needs to know of one step."""

    optimizer: torch.optim.Optimizer  # for torch's own code
    groups: list[Group]
    values: list[Any]  # the groups' options; another list whenever one of them changed
    grads: list[Tensor | None]  # local ones, of all parameters
    complete: bool  # whether every parameter that the plan updates has one
    grad_scale: Tensor | None
    norm: Tensor | None  # what to clip by
    found_inf: Tensor | None
    captured: list[object] | None  # keeps what the CUDA graph reads that is being captured; None: no capture


class Bucket:
    """Some parameters that are updated together."""

    def __init__(self, rule: Rule, slots: list[ParamSlot], groups: list[Group]) -> None:
        self.rule, self.slots = rule, slots
        self.groups: list[int] = []  # that must go on having the same options
        self._indices = [slot.index for slot in slots]
        self._every = self._indices == list(range(sum(len(group["params"]) for group in groups)))

    def gradients(self, step: StepInputs) -> list[Any]:
        """Those of its slots; None where there is none."""
        return step.grads if self._every else [step.grads[i] for i in self._indices]

    def run(self, step: StepInputs) -> None:
        raise NotImplementedError

    def parameters_moved(self) -> None:
        """Parameters were given other memory, of the same kind: `p.data = …`."""
