"""What all of tribp's optimizers share: `step`, the options beyond torch's, and what they keep in a checkpoint."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypedDict, TypeVar

import torch
from torch import Tensor

from . import checkpoint, hooked
from .layouts import local, separate_gradients
from .plan import Plan

if TYPE_CHECKING:
    from .torch_buckets import Tensors

Group = dict[str, Any]
T = TypeVar("T")


class Beyond(TypedDict, total=False):
    """Keyword arguments beyond torch's, off by default. All but the first two may also be set in one parameter group.

    max_grad_norm: clip all gradients together to this L2 norm, as `torch.nn.utils.clip_grad_norm_` does, within the
        step: the gradients are read once more and not written. The norm is then in `grad_norm`, a float64 tensor.
    seed: of the random numbers of stochastic rounding. The numbers depend on it, the step, the parameter's place in
        the optimizer and the element alone.
    ema_decay: keep in `state[p]["ema"]` an exponential moving average of the parameters, in float32 at least:
        v₁ = x₁, then v ← d·v + (1 − d)·x after every step. `swap_ema()` puts it in their place.
    state_dtype: keep the moments of real parameters in this type; the default is the parameter's.
    stochastic_rounding: round bfloat16 parameters up or down at random, right on average: updates that are too small
        for the type are then not lost. Other types are rounded to nearest.
    eps_inside_sqrt: √(v + ε) instead of √v + ε; not for SGD, which has neither.
    """

    max_grad_norm: float | None
    seed: int
    ema_decay: float | None
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
    eps_inside_sqrt: bool


# Values that mean "off". What is off is in no group, so that a checkpoint has torch's keys and no others.
_OFF: Group = dict(
    max_grad_norm=None, seed=0, ema_decay=None, state_dtype=None, stochastic_rounding=False, eps_inside_sqrt=False,
    capturable=False, fused=None,
)  # fmt: skip


class Shared(Generic[T]):
    """An attribute that wrappers have in common with the optimizer they wrap.

    Lightning's and Fabric's optimizers copy the attributes of an optimizer once. What changes from step to step lies in
    one dict, `_shared`, that the copy refers to as well.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> T:
        kept: dict[str, T] = {} if optimizer is None else optimizer._shared
        return kept.get(self._name, self._default)

    def __set__(self, optimizer: Any, value: T) -> None:
        optimizer._shared[self._name] = value


class Optimizer(torch.optim.Optimizer):
    """The base of every class here, mixed in before its torch counterpart.

    A class says what its states and hyperparameters are; `Plan` finds out which tensors can be updated how, and keeps
    that while nothing changes.
    """

    _RULE: ClassVar[str]  # in tribp.kernels.optim and tribp.reference
    _KEYS: ClassVar[tuple[str, ...]]  # of a group: everything the update depends on
    _COUNTS: ClassVar[bool] = True  # whether torch keeps a `step` for every parameter
    _SCRATCH: ClassVar[bool] = False  # whether the fused CPU kernel writes more than the update needs

    _beyond: Group
    _shared: dict[str, Any]
    _captured: list[Plan]
    _plan = Shared[Plan | None](None)
    _in_swap = Shared(False)
    grad_norm = Shared[Tensor | None](None)  # of the last step, where max_grad_norm is on

    def _switch_on(self, beyond: Group) -> None:
        """Remember the options that are on, before torch's constructor makes the groups."""
        for name in beyond:
            if name not in _OFF:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self._shared = {}
        self._captured = []
        self._beyond = {name: value for name, value in beyond.items() if value != _OFF[name]}
        _check(self._beyond, type(self).__name__)

    def _switched_on(self) -> None:
        """After torch's constructor: groups that are added later get the options too."""
        self.defaults.update(self._beyond)
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True  # neither Adagrad of torch 2.11 nor RMSprop says so

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            for name, value in self.__dict__.get("_beyond", {}).items():
                param_group.setdefault(name, value)
            _check({k: v for k, v in param_group.items() if k in _OFF and v != _OFF[k]}, type(self).__name__)
        super().add_param_group(param_group)

    # What a class says of a parameter group.

    def _names(self, group: Group) -> tuple[str | None, ...]:
        """The rule's states, in the kernel's order; None for those that the group's parameters don't have."""
        raise NotImplementedError

    def _has_state(self, group: Group) -> bool:
        return any(self._names(group)) or any(group.get(k) for k in ("ema_decay", "stochastic_rounding"))

    def _fused_on_cpu(self, group: Group, dtype: torch.dtype) -> bool:
        """Whether torch's fused CPU kernel computes this group's update, and right."""
        raise NotImplementedError

    def _fused_update(self, group: Group, tensors: "Tensors") -> None:
        """The same, done."""
        raise NotImplementedError

    def _torch_update(self, group: Group, prepare: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """torch's own update of the group's parameters that have a gradient; `prepare` may scale the gradients."""
        raise NotImplementedError

    def _gathered(self, group: Group, number: int) -> tuple[Any, list[list[Any]]]:
        """What torch's `_init_group` says, and the so many lists that it fills.

        It makes the counters of new states on the default device, where reading one may cost a wait.
        """
        lists: list[list[Any]] = [[] for _ in range(number)]
        new = any(not self.state.get(p) for p in group["params"])
        with torch.device("cpu") if new else contextlib.nullcontext():
            return self._init_group(group, *lists), lists  # type: ignore[attr-defined]

    def _new_state(self, p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _own_values(self, group: Group) -> Sequence[float | Tensor]:
        """The rule's own hyperparameters, in the kernel's order."""
        raise NotImplementedError

    def _decays(self, group: Group) -> tuple[float | Tensor, float | Tensor]:
        """The weight decay that is added to the gradient, and the one that shrinks the parameter."""
        return group["weight_decay"], 0.0

    def _values(self, group: Group) -> list[float | Tensor]:
        """A row of the kernel's table of hyperparameters."""
        decay, decoupled = self._decays(group)
        common = [
            group["lr"], group.get("eps", 0.0), -1.0 if group["maximize"] else 1.0, decay, decoupled,
            group.get("ema_decay") or 0.0, group.get("max_grad_norm") or 0.0,
        ]  # fmt: skip
        own = list(self._own_values(group))
        return common + own + [0.0] * (3 - len(own))

    def _before_step(self) -> None:
        """Last changes to the groups."""

    # The step.

    profile_hook_step = staticmethod(hooked.wrap)  # torch wraps a class's `step` in it

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        closure: evaluates the model again and returns the loss, which is then returned. Raises RuntimeError within
        `swap_ema()`, and while a CUDA graph is captured unless every group is `capturable`.
        """
        if torch.compiler.is_dynamo_compiling():
            return _not_traced(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        if self._in_swap:
            raise RuntimeError(
                "step() within swap_ema(): the parameters are their averages; leave the `with` block first"
            )
        self._before_step()
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what torch.no_grad() does; its object costs 1 of a small step's 16 µs
        try:
            plan, grads, uncounted = self._plan, None, False
            grad_scale = getattr(self, "grad_scale", None)
            if plan is not None:
                grads = plan.gradients(self)
            if (
                grad_scale is not None
                and (plan is None or grads is None or plan.shares_memory(grads))
                and separate_gradients(p for group in self.param_groups for p in group["params"])
            ):
                grads = None if plan is None else plan.gradients(self)
            capturing = self._capturing()
            if plan is None or grads is None:
                if capturing:
                    raise RuntimeError(
                        "step() must have run at least once, on gradients like these, before it is captured in a CUDA "
                        "graph: the first step makes the states and tables"
                    )
                uncounted = plan is None and _only_makes_states(self)
                plan = self._plan = Plan(self, plan)
                grads = plan.gradients(self)
                assert grads is not None, "a new plan fits what it was made from"
            plan.run(self, grads, grad_scale, getattr(self, "found_inf", None), capturing)
            if uncounted:
                for state in self.state.values():
                    if "ema_step" in state:
                        state["ema_step"].zero_()
        finally:
            torch._C._set_grad_enabled(enabled)

    def _capturing(self) -> bool:
        """Whether a CUDA graph is being captured. Raises RuntimeError, as torch does, if that was not announced."""
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return False
        if not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: step() is captured in a CUDA graph, but capturable is not True in every group"
            )
        return True

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the `with` block the parameters hold their moving averages (`ema_decay`), for evaluation.

        Parameters without an average yet keep their values. Raises RuntimeError if ema_decay is off.
        """
        if not any(group.get("ema_decay") for group in self.param_groups):
            raise RuntimeError(f"swap_ema() needs {type(self).__name__}(…, ema_decay=…): no average is kept")
        if self._in_swap:
            raise RuntimeError("swap_ema() within swap_ema(): the parameters already are their averages")
        averaged = [(p, state["ema"]) for p, state in self.state.items() if "ema" in state and _started(state)]
        with torch.no_grad():
            weights = [p.detach().clone() for p, _ in averaged]
            for p, ema in averaged:
                p.copy_(ema)
        self._in_swap = True
        try:
            yield
        finally:
            self._in_swap = False
            with torch.no_grad():
                for (p, _), weight in zip(averaged, weights, strict=True):
                    p.copy_(weight)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """torch's, key for key: load it with either class. Options that are on add keys, those that are off do not."""
        if self._in_swap:
            raise RuntimeError("state_dict() within swap_ema(): leave the `with` block first")
        with checkpoint.as_torch_has_it(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its torch counterpart.

        Unlike torch's, it keeps the type of a loaded state (unless `state_dtype` says otherwise), copies what it
        loads, and leaves options that the checkpoint does not know as they are.
        """
        with checkpoint.nothing_lost(self):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(super().__getstate__())
        states = checkpoint.states_of(self, self.state)
        kept["state"] = defaultdict(dict, states)
        # A spawned process is given memory by its file descriptor, after this returns: the copies must live until then.
        dicts = [state for state in states.values() if isinstance(state, dict)]
        self._shared["sent"] = [state[key] for state in dicts for key in ("step", "ema_step") if key in state]
        if getattr(self, "_step_supports_amp_scaling", False):
            kept["_step_supports_amp_scaling"] = True
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_shared", {})
        self.__dict__.setdefault("_captured", [])
        self._plan = None
        with torch.device("cpu"):  # where torch makes counters of numbers in old checkpoints, whatever the default is
            super().__setstate__(state)


def _check(options: Group, name: str) -> None:
    decay, norm = options.get("ema_decay"), options.get("max_grad_norm")
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"{name}: ema_decay must be in [0, 1), got {decay!r}")
    if norm is not None and not norm > 0.0:
        raise ValueError(f"{name}: max_grad_norm must be positive, got {norm!r}")
    dtype = options.get("state_dtype")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2):
        raise ValueError(f"{name}: state_dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")


def _only_makes_states(optimizer: Optimizer) -> bool:
    """Whether this is how torch.distributed.checkpoint makes the states of a new optimizer: a step that does nothing.

    All rates and gradients are 0. torch's counters count it; an average that began with it would hold on to parameters
    that are about to be loaded, or were never trained.
    """
    groups = optimizer.param_groups
    averages = any(group.get("ema_decay") for group in groups)
    if not averages or optimizer.state or any(group["lr"] != 0 for group in groups):
        return False
    grads = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    return all(grad.layout == torch.strided and not grad.any() for grad in grads)


def _started(state: Group) -> bool:
    return bool(state["ema_step"].item() > 0)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _not_traced(optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
    """Under torch.compile the step runs as it is: it is one launch already, and a trace can't read addresses."""
    return Optimizer.step(optimizer, closure)
