"""What an optimizer says of its update. The rest of this folder knows nothing else of it.

A new optimizer is a pair of functions in `kernels/optim_rules.py`, a formula of the same name in `reference.py`, and a
`Rule` beside its class.
"""

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from .layouts import PLAIN

Group = dict[str, Any]
Number = float | Tensor
FLAGS = ("amsgrad", "decoupled_weight_decay", "maximize", "nesterov")
Prepare = Callable[[list[Tensor]], list[Tensor]]


class CommonHyper(NamedTuple):
    """The hyperparameters of a parameter group that every step takes, whatever the rule; 0 where one is off."""

    lr: Number
    eps: Number
    grad_sign: float  # −1 where the objective is maximized
    weight_decay: Number  # added to the gradient
    decoupled_decay: Number  # shrinks the parameter (AdamW)
    ema_decay: float
    max_grad_norm: float


class FusedTensors(NamedTuple):
    """What a fused CPU kernel takes, one list entry a parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]  # a list for each of the rule's states, an entry a parameter
    steps: list[Tensor]
    scratch: list[Tensor]
    fresh: list[bool] | None  # whether this is the first step of a parameter's momentum buffer; None: of none


class Rule:
    """A class's states, hyperparameters and variants; what it answers follows from a parameter group's options."""

    formula: ClassVar[Callable[..., Any]]  # in `reference.py`; the kernel's functions have its name
    options: ClassVar[tuple[str, ...]]  # of a group: everything the update depends on
    counts_steps: ClassVar[bool] = True  # whether torch keeps a `step` for every parameter
    scalar_states: ClassVar[tuple[str, ...]] = ()  # besides: up to two states of one number a parameter
    optional_states: ClassVar[tuple[str, ...]] = ()  # that an option adds, which may come later
    squares: ClassVar[tuple[str, ...] | None] = None  # the states that are never negative; None: none can be 8 bits
    adds_eps_to_root: ClassVar[bool] = True  # whether there is a √v + ε, which `eps_inside_sqrt` changes
    needs_scratch: ClassVar[bool] = False  # whether the fused CPU kernel writes more than the update needs
    formula_on_cpu: ClassVar[bool] = False  # whether the formula takes as long as torch's own code, or less
    # Of a large tensor it takes about so many elements a thread at a time: 1 MiB of each tensor, which caches hold. A
    # piece costs 15 to 20 µs besides: in a quarter of it 1 M elements took up to 1.4 times as long, and 262,145 in two
    # of them up to 1.3 times as long as in one. Twice as many are too many: of 520,000 elements Rprop took 1.5 times as
    # long in one piece as in two. Pieces of 32,766, which one thread computes alone, take twice as long on two quiet
    # cores, and not less on busy ones.
    piece: ClassVar[int] = 1 << 18

    def __init__(self, defaults: Group) -> None:
        self.defaults = defaults  # the optimizer's

    def states(self, group: Group) -> tuple[str | None, ...]:
        """The names of up to three states in the formula's order; None for one that this group does not have."""
        raise NotImplementedError

    def hyper(self, group: Group) -> Any:
        """The rule's own hyperparameters: a NamedTuple, by whose names kernel and formula know them."""
        raise NotImplementedError

    def decays(self, group: Group) -> tuple[Number, Number]:
        """The weight decay that is added to the gradient, and the one that shrinks the parameter."""
        decay = group.get("weight_decay", 0.0)
        return (0.0, decay) if group.get("decoupled_weight_decay") else (decay, 0.0)

    def new_state(self, group: Group, p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def uncoded(self, group: Group) -> tuple[str, ...]:
        """The names of the states that 8 bits are too few for."""
        return ()

    def new_scalar(self, group: Group, name: str) -> float:
        """What one of `scalar_states` begins with."""
        return 1.0

    def fused_on_cpu(self, group: Group, dtype: torch.dtype) -> bool:
        """Whether one of torch's fused CPU kernels computes this group's update, and right."""
        return False

    def fused_update(self, arguments: Group, t: FusedTensors) -> None:
        """The update by that kernel. arguments: those of `fused_arguments`."""
        raise NotImplementedError

    def torch_update(self, optimizer: torch.optim.Optimizer, group: Group, prepare: Prepare) -> None:
        """torch's own update of the group's parameters that have a gradient; `prepare` may scale the gradients.

        A class that torch does not have leaves it as it is: what no kernel takes goes by the formula.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update for sparse gradients or differentiable=True")

    # What follows from these.

    @classmethod
    def scalars_on_device(cls, group: Group) -> bool:
        """Whether torch keeps a parameter's states of one number on its device, rather than on the CPU."""
        return bool(group.get("capturable") or group.get("fused"))

    def arguments(self, group: Group) -> Group:
        """A group's options by the names of torch's functions, which have one for each number of a pair."""
        single = {name: group[name] for name in self.options if name in group and name != "betas"}
        return {**self.hyper(group)._asdict(), **single}

    def fused_arguments(self, group: Group) -> Group:
        """The same as torch's fused kernels take them: its other code takes 1 and numpy's numbers, too."""
        plain = self.arguments(group)
        for name, value in plain.items():
            if name in FLAGS:
                plain[name] = bool(value)
            elif not (name == "lr" and isinstance(value, Tensor)):
                plain[name] = float(value)
        return plain

    def has_torch_update(self) -> bool:
        return type(self).torch_update is not Rule.torch_update

    def common(self, group: Group) -> CommonHyper:
        decay, decoupled = self.decays(group)
        return CommonHyper(
            group["lr"], group.get("eps", 0.0), -1.0 if group["maximize"] else 1.0, decay, decoupled,
            group.get("ema_decay") or 0.0, group.get("max_grad_norm") or 0.0,
        )  # fmt: skip

    def has_state(self, group: Group) -> bool:
        return any(self.states(group)) or any(group.get(k) for k in ("ema_decay", "stochastic_rounding", "master_bits"))

    def entries(self, group: Group) -> list[str]:
        """The keys of a parameter's state that the update may use."""
        return list(dict.fromkeys([*self.scalars(), *filter(None, self.states(group)), "ema"]))

    @classmethod
    def scalars(cls) -> tuple[str, ...]:
        """The keys of a parameter's state that hold one number each."""
        return ("step", "ema_step", *cls.scalar_states)


def full_state(p: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A new state that holds `value`; for a complex parameter, value + value·i."""
    start = complex(value, value) if p.is_complex() else value
    return torch.full_like(p, start, dtype=dtype, memory_format=torch.preserve_format)


# For `torch_update`.


def init_group(optimizer: torch.optim.Optimizer, group: Group, list_count: int) -> tuple[Any, list[list[Any]]]:
    """What torch's `_init_group` returns, and the lists, so many, that it fills.

    It makes the counters of new states on the default device, where reading one may cost a wait.
    """
    lists: list[list[Any]] = [[] for _ in range(list_count)]
    new = any(not optimizer.state.get(p) for p in group["params"])
    with torch.device("cpu") if new else contextlib.nullcontext():
        return optimizer._init_group(group, *lists), lists  # type: ignore[attr-defined]


def counter_dtype(fused: bool) -> torch.dtype:
    """The type of torch's `step`."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32


def is_shared(t: Tensor) -> bool:
    """Whether other processes may have a tensor's memory, as Hogwild's have: what counts there must stay there."""
    return t.is_cpu and t.untyped_storage().is_shared()


def check_fused(group: Group) -> None:
    """What torch's classes that have `fused` ask of their parameters, for those that have not."""
    if group.get("fused"):
        for p in group["params"]:
            _device_dtype_check_for_fused(p)


def fused_argument(group: Group, steps: list[Tensor]) -> bool | None:
    """What to pass as torch's `fused`: True if it is on and a counter is no plain tensor (a FakeTensor), else None.

    torch's other code reads the counters' values, which a fake one lacks. Parameters with real counters come here
    because of their memory layout, which torch's fused kernels ignore.
    """
    return True if group["fused"] and any(type(step) not in PLAIN for step in steps) else None


def _makes_on_cpu() -> bool:
    """Whether tensors are made on the CPU by default."""
    try:
        return torch.get_default_device().type == "cpu"
    except AttributeError:  # torch 2.9's, where another default was set and taken back
        return True


class FunctionRule(Rule):
    """The rule of a class that torch has no fused kernel for, but a function of lists."""

    formula_on_cpu = True
    function: ClassVar[Callable[..., None]]  # torch's
    lists: ClassVar[tuple[str, ...]]  # the keys of the states that it takes, in its order, which is the formula's

    def __init__(self, defaults: Group) -> None:
        super().__init__(defaults)
        self._states = tuple(name for name in self.lists if name not in self.scalars())

    def states(self, group: Group) -> tuple[str | None, ...]:
        return self._states

    def torch_update(self, optimizer: torch.optim.Optimizer, group: Group, prepare: Prepare) -> None:
        check_fused(group)
        has_complex, (params, grads, *_) = init_group(optimizer, group, 2 + len(self.lists))
        states = [[optimizer.state[p][name] for p in params] for name in self.lists]
        # ASGD's makes tensors of one number, and reads them at once.
        with contextlib.nullcontext() if _makes_on_cpu() else torch.device("cpu"):
            type(self).function(
                params, prepare(grads), *states, has_complex=has_complex, foreach=group["foreach"],
                differentiable=group["differentiable"], capturable=group["capturable"], **self.arguments(group),
            )  # fmt: skip
