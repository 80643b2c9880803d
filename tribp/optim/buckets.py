"""What a plan consists of: members, the parts that update them together, and what a part is told of a step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from .layouts import local
from .tracked_state import peek

if TYPE_CHECKING:
    from .optimizer import Optimizer


@dataclass
class Member:
    """A parameter that a part of the plan updates, with its local memory."""

    index: int  # among all parameters of the optimizer
    group: int
    param: Tensor
    grad: Tensor  # an example, while the plan is made; afterwards, and where there was none, the parameter itself
    state: dict[str, Any]
    names: tuple[str | None, ...]  # of the rule's states, in its order; None: not used in this group

    @property
    def states(self) -> list[Tensor | None]:
        return [None if name is None else local(peek(self.state, name)) for name in self.names]

    @property
    def parts(self) -> list[Tensor]:
        """Everything an update touches but counters: the parameter, its gradient, its states."""
        return [t for t in (self.param, self.grad, *self.states, self.ema) if t is not None]

    @property
    def ema(self) -> Tensor | None:
        return local(peek(self.state, "ema")) if "ema" in self.state else None


class Step(NamedTuple):
    """What a part needs to know of one step."""

    optimizer: "Optimizer"
    groups: list[dict[str, Any]]
    values: list[Any]  # the groups' options; another list whenever one of them changed
    grads: list[Tensor | None]  # local ones, of all parameters
    complete: bool  # whether every parameter that the plan updates has one
    grad_scale: Tensor | None
    norm: Tensor | None  # what to clip by
    found_inf: Tensor | None
    capturing: bool


class Part(Protocol):
    """Some parameters that are updated together."""

    members: list[Member]
    groups: list[int]  # that must go on having the same options

    def run(self, step: Step) -> None: ...
