"""What all of tribp's optimizers share: `step`, the options beyond torch's, and what they keep in a checkpoint."""

import contextlib
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from . import checkpoint, codes, hooked
from .layouts import give_memory, is_dtensor, local, separate_gradients
from .options import enable_options, enabled_options
from .plan import UpdatePlan
from .rule import Group, Rule
from .tracked_state import all_or_none

T = TypeVar("T")
BITS = ("state_bits", "master_bits", "state_dtype")  # options that decide in which form states are kept


class SharedAttribute(Generic[T]):
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


def _defer_to_torch(method: Callable[..., T], of: type | None = None) -> Callable[..., T]:
    """Let a method take torch's own optimizers too, and pass those on to torch's method.

    After `patch()` the name `torch.optim.Adam` is tribp's class, but `torch.optim.Adam.step(optimizer)` may be called
    on an optimizer made before. of: the class that defines the method, for `__init__`; default: the optimizer's class.
    """
    name = method.__name__

    @functools.wraps(method)
    def deferring(optimizer: Any, *args: Any, **kwargs: Any) -> T:
        if isinstance(optimizer, Optimizer):
            return method(optimizer, *args, **kwargs)
        kinds = (kind for kind in (of or type(optimizer)).__mro__ if kind.__module__.startswith("torch.optim."))
        return getattr(next(kinds), name)(optimizer, *args, **kwargs)  # type: ignore[no-any-return]

    return deferring


class Optimizer(torch.optim.Optimizer):
    """The base of every class here, mixed in before its torch counterpart.

    A class's `_rule` says what its update is; `UpdatePlan` finds out which tensors can be updated how.
    """

    _rule: ClassVar[type[Rule]]

    _options: Group  # those beyond torch's that are on
    _shared: dict[str, Any]
    # Kept alive for CUDA graphs, which read them at every replay: plans, staging memory, tables.
    _captured: list[object]
    _plan = SharedAttribute[UpdatePlan | None](None)
    _in_swap = SharedAttribute(False)
    grad_norm = SharedAttribute[Tensor | None](None)  # of the last step, where max_grad_norm is on

    def __new__(cls, *args: Any, **kwargs: Any) -> "Optimizer":
        optimizer = super().__new__(cls)
        optimizer._options, optimizer._shared, optimizer._captured = {}, {}, []
        return optimizer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls) and any(base.__module__.startswith("torch.optim.") for base in cls.__bases__):
            cls.__init__ = _defer_to_torch(cls.__init__, cls)  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _enabled(self, extra: Group) -> Iterator[None]:
        """While torch's constructor makes the groups: give them, and those that are added later, these options."""
        self._options = enable_options(extra, type(self).__name__)
        yield
        self.defaults.update(self._options)
        if self.defaults.get("fused"):
            # In torch's words, for classes that torch has no `fused` for.
            if self.defaults.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            if self.defaults.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
            self._step_supports_amp_scaling = True  # neither Adagrad of torch 2.11 nor RMSprop says so

    @_defer_to_torch
    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            for name, value in self._options.items():
                param_group.setdefault(name, value)
            options = self._checked_options(param_group)
            if "seed" in options:
                param_group["seed"] = options["seed"]  # numpy's, as an int
        super().add_param_group(param_group)

    def _before_step(self) -> None:
        """Last changes to the groups."""

    def _checked_options(self, group: Group) -> Group:
        """The extra options of a group that are on. Raises ValueError or TypeError for what this class can't do."""
        caller = type(self).__name__
        options = enabled_options(group, caller)
        if options.get("eps_inside_sqrt") and not self._rule.adds_eps_to_root:
            raise TypeError(f"{caller} has no √v + ε, so there is no eps_inside_sqrt")
        if options.get("state_bits") and self._rule.squares is None:
            raise TypeError(f"{caller} keeps no states in 8 bits, so there is no state_bits")
        return options

    # The step.

    profile_hook_step = staticmethod(hooked.wrap)  # torch wraps a class's `step` in it

    @_defer_to_torch
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
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what torch.no_grad() does; its object costs 1 of a small step's 16 µs
        try:
            plan, restart_averages = self._plan, False
            grad_scale = getattr(self, "grad_scale", None)
            grads = self._planned_gradients(plan, scaled=grad_scale is not None)
            capturing = self._capturing()
            if plan is None or grads is None:
                if capturing:
                    raise RuntimeError(
                        "step() must have run at least once, on gradients like these, before it is captured in a CUDA "
                        "graph: the first step makes the states and tables"
                    )
                restart_averages = plan is None and _only_makes_states(self)
                if plan is not None:
                    plan.release()  # states that were thrown away must not live until there are others
                rule = self._rule(self.defaults)
                for group in self.param_groups:  # that were edited, or came with a checkpoint
                    self._checked_options({name: group[name] for name in BITS if group.get(name)})
                # No harm where the rest of this is refused, or interrupted.
                codes.conform_all(rule, self, self._is_unused)
                with all_or_none(self.state):
                    self._plan = plan = UpdatePlan(rule, self, plan)
                grads = plan.watch.checked_gradients(self)
                assert grads is not None, "a new plan fits what it was made from"
            if capturing and not plan.watch.captured:
                plan.watch.captured = True
                self._captured.append(plan)  # the graph reads its tables as long as it lives
            captured = self._captured if capturing else None
            norm = plan.run(self, grads, grad_scale, getattr(self, "found_inf", None), captured)
            if norm is not None:
                self.grad_norm = norm
            if restart_averages:
                for state in self.state.values():
                    if "ema_step" in state:
                        state["ema_step"].zero_()
        finally:
            torch._C._set_grad_enabled(grad_enabled)

    def _planned_gradients(self, plan: UpdatePlan | None, scaled: bool) -> list[Tensor | None] | None:
        """The gradients, if there is a plan that fits them.

        scaled: a GradScaler's scale is to be divided out of them, in place: each needs memory of its own first.
        """
        grads = None if plan is None else plan.watch.checked_gradients(self)
        may_share = scaled and (plan is None or grads is None or plan.watch.shares_memory(grads))
        if grads is not None and not may_share:
            return grads
        params = [p for group in self.param_groups for p in group["params"]]
        replaced = give_memory(params), may_share and separate_gradients(params)
        if plan is not None and any(replaced):
            grads = plan.watch.checked_gradients(self)
        return grads

    def _steady_plan(self) -> UpdatePlan | None:
        """The plan that the next step will use; None if that step would make a new one.

        For CUDA graphs, which replay steps without calling `step`.
        """
        self._before_step()
        plan = None if self._in_swap else self._plan
        return plan if plan is not None and plan.watch.checked_gradients(self) is not None else None

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
    def swap_ema(self, model: nn.Module | None = None) -> Iterator[None]:
        """Within the `with` block the parameters hold their moving averages (`ema_decay`), for evaluation.

        Parameters that have no average yet keep their values. model: the one that has these parameters; needed if they
        are distributed, since FSDP2 keeps the gathered parameters of a forward pass until a backward pass, and would
        use them again. Raises RuntimeError if ema_decay is off, if that model is missing, or if FSDP1 has flattened its
        parameters; TypeError if the model is no module.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"swap_ema: model must be a torch.nn.Module, got {type(model).__name__}")
        if not any(group.get("ema_decay") for group in self.param_groups):
            raise RuntimeError(f"swap_ema() needs {type(self).__name__}(…, ema_decay=…): no average is kept")
        if self._in_swap:
            raise RuntimeError("swap_ema() within swap_ema(): the parameters already are their averages")
        averaged = [(p, state["ema"]) for p, state in self.state.items() if "ema" in state and _started(state)]
        if model is None and any(is_dtensor(p) or hasattr(p, "_is_flat_param") for p, _ in averaged):
            raise RuntimeError(
                "swap_ema() of distributed parameters needs the model, swap_ema(model): parameters that it gathered "
                "must be freed first"
            )
        _drop_gathered(model)
        weights = [(p, p.detach().clone()) for p, _ in averaged]
        self._in_swap = True
        try:
            _copy_into(averaged)
            yield
        finally:
            try:
                self._in_swap = False
                _drop_gathered(model)
                _copy_into(weights)
            except BaseException:  # Ctrl-C, say: there is no other copy of the weights
                self._in_swap = False
                _copy_into(weights)
                raise

    # Checkpoints.

    @_defer_to_torch
    def state_dict(self, *, compressed: bool = False) -> dict[str, Any]:
        """torch's, key for key: either class can load it. Only options that are on add keys.

        States of 8 bits are float32 in it. compressed: keep them as codes with their scales, which torch's classes do
        not know. Raises RuntimeError within `swap_ema()`, and for the codes of distributed parameters, whose blocks are
        those of one process's shard.
        """
        if self._in_swap:
            raise RuntimeError("state_dict() within swap_ema(): leave the `with` block first")
        if compressed and any(is_dtensor(p) for group in self.param_groups for p in group["params"]):
            raise RuntimeError(
                "state_dict(compressed=True): the blocks of codes are those of one process's shard of a distributed "
                "parameter; leave out `compressed`"
            )
        with checkpoint.export_state(self, self._is_unused, self._rule, compressed):
            return super().state_dict()

    @_defer_to_torch
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its torch counterpart.

        Unlike torch's, it keeps the type of a loaded state if that is the wider one (unless `state_dtype` says
        otherwise), copies what it loads, and leaves options that the checkpoint does not have as they are.
        """
        with checkpoint.keep_loaded_state(self, self._rule.scalars()):
            super().load_state_dict(state_dict)

    def _is_unused(self, buffer: object) -> bool:
        return self._plan is not None and self._plan.is_unused(buffer)

    @_defer_to_torch
    def __getstate__(self) -> dict[str, Any]:
        kept = dict(super().__getstate__())
        states = checkpoint.states_of(self, self.state, self._is_unused, self._rule, compressed=True)
        kept["state"] = defaultdict(dict, states)
        # A spawned process is given memory by its file descriptor, after this returns: the copies must live until then.
        dicts = [state for state in states.values() if isinstance(state, dict)]
        self._shared["sent"] = [state[key] for state in dicts for key in self._rule.scalars() if key in state]
        if getattr(self, "_step_supports_amp_scaling", False):
            kept["_step_supports_amp_scaling"] = True
        return kept

    def __copy__(self) -> "Optimizer":
        """As torch's copies do, it shares groups and states with the original."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(super().__getstate__())
        return twin

    @_defer_to_torch
    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None
        with torch.device("cpu"):  # where torch makes counters of numbers in old checkpoints, whatever the default is
            super().__setstate__(state)


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


@torch.no_grad()
def _copy_into(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for p, value in pairs:
        p.copy_(value)


def _drop_gathered(model: nn.Module | None) -> None:
    """Have FSDP's modules gather their parameters anew."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if model is None or fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise RuntimeError("swap_ema() does not know the flat parameters of FSDP1; FSDP2 (fully_shard) works")
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


@torch._disable_dynamo  # type: ignore[attr-defined]
def _not_traced(optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
    """Under torch.compile the step runs as it is: it is one launch already, and a trace can't read addresses."""
    return Optimizer.step(optimizer, closure)
