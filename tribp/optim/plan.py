"""What a step does while nothing changes, and how it is noticed that something did.

Reading 1,000 gradients, their addresses and their parameters' costs the host 0.3 ms; finding out what can be updated
how costs 5. So `Plan` finds it out once, and `Plan.gradients` looks, every step, at everything the plan rests on:
- the groups: the same parameter objects, the same options (hyperparameters may change: they are written again);
- the gradients: the type, strides and kind of each (torch's own guards do it in C++), and which of them are there;
- the parameters' addresses, for `p.data = …` and `module.to(…)` keep the object;
- the states, which tell: `WatchedState` of a tensor that was replaced, and a weak reference when the memory of one is
  freed (`state.data = …`, as offloading does it). Memory that moves with its storage (`storage.resize_`) does not tell;
  whoever does that does it to all states of a parameter, so the first one's address is looked at too.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import runtime
from . import fallback, tensors
from .parts import Member, Part, Step
from .tensors import PLAIN, local
from .watched import WatchedState

if TYPE_CHECKING:
    from .base import Group, Optimizer
    from .kernel import Kernel

_PARAMS: Callable[[dict[str, Any]], list[Tensor]] = itemgetter("params")
_GRAD: Callable[[Tensor], Tensor | None] = attrgetter("grad")
_ADDRESS = Tensor.data_ptr

KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Options that decide how a group is updated, whatever the class; the others are numbers.
_SWITCHES = (
    "differentiable", "fused", "foreach", "capturable", "state_dtype", "stochastic_rounding", "seed",
    "eps_inside_sqrt", "max_grad_norm", "ema_decay",
)  # fmt: skip


class Presence:
    """Which gradients there are, and their guard. Several live side by side: models that skip layers alternate."""

    def __init__(self, grads: Sequence[Tensor | None], planned: Sequence[bool]) -> None:
        self._there = bytes(grad is not None for grad in grads)
        self._missing = bytes(grad is None for grad in grads)
        self._all = 1 not in self._missing
        self.complete = all(there for there, wanted in zip(self._there, planned, strict=True) if wanted)
        self._check = guard([grad for grad in grads if grad is not None])

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        if self._all:
            return self._check(grads)
        if any(grad is not None for grad in compress(grads, self._missing)):
            return False
        return self._check(list(compress(grads, self._there)))


def guard(examples: list[Tensor]) -> Callable[[Sequence[Any]], bool]:
    """Whether tensors have the Python type, dtype, device, shape and strides of these; None never has.

    torch.compile's guards say so in 0.05 ms for 1,000 tensors. They are no public interface: where they are missing,
    Python looks, in 0.6 ms.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in examples]  # their annotation has a flat list
        strides: Any = [list(t.stride()) for t in examples]
        guards = TensorGuards(*examples, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if guards.check(*examples):
            return lambda tensors: bool(guards.check(*tensors))
    except (ImportError, TypeError, RuntimeError, SystemError):
        pass
    expected = [_look(t) for t in examples]
    return lambda tensors: all(t is not None and _look(t) == e for t, e in zip(tensors, expected, strict=True))


def _look(t: Tensor) -> tuple[object, ...]:
    strides = t.stride() if t.layout == torch.strided else None
    return type(t), t.dtype, t.device, t.shape, t.layout, strides, t.is_conj(), t.is_neg()


class Plan:
    """How every parameter of an optimizer is updated; valid while `gradients` returns them."""

    def __init__(self, optimizer: "Optimizer", before: "Plan | None") -> None:
        groups = optimizer.param_groups
        self.counts = optimizer._COUNTS
        self.fused = [bool(group.get("fused")) for group in groups]
        self.params: list[Tensor] = list(chain.from_iterable(map(_PARAMS, groups)))
        self.sizes = list(map(len, map(_PARAMS, groups)))
        self.lengths = list(map(len, groups))
        keys = [k for k in (*optimizer._KEYS, *_SWITCHES) if any(k in group for group in groups)]
        self._read = itemgetter(*keys) if all(k in g for k in keys for g in groups) else _reader(keys)
        self.values = list(map(self._read, groups))
        self.structure = [_structure(optimizer, group) for group in groups]
        self.max_grad_norm = _one_norm(groups)
        self.backend = runtime.backend()
        self.counters: dict[int, tuple[Tensor, Tensor | int]] = dict(before.counters) if before else {}
        self.rest: dict[int, list[Tensor]] = defaultdict(list)  # by group: what only torch's own code can update
        members: dict[str, list[Member]] = {"kernel": [], "fused": [], "reference": []}
        self.watched: list[int] = []  # of the parameters
        self._unwatched: list[Tensor] = []  # with sparse gradients, say, that no kernel takes
        self._expected: dict[int, tuple[object, ...]] = {}  # of their gradients, where one may come
        positions = enumerate((number, p) for number, group in enumerate(groups) for p in group["params"])
        for index, (number, p) in positions:
            kind = self._kind(optimizer, p, groups[number])
            grad = local(p if p.grad is None else p.grad)
            if not _plain(grad):
                self._unwatched.append(p)
            else:
                self.watched.append(index)
                if kind != "dormant":
                    self._expected[index] = _look(grad)
            if kind == "rest":
                self.rest[number].append(p)
            elif kind != "dormant":
                members[kind].append(self._member(optimizer, p, groups[number], number, index))
        self._kernels: list[Kernel] = []
        if members["kernel"]:
            from . import kernel

            self._kernels = kernel.parts(self, optimizer, members["kernel"])
        others = fallback.parts(self, members["fused"], members["reference"])
        self.parts: list[Part] = [*self._kernels, *others]
        self._only_kernels = not (others or self.rest)
        self._note(optimizer, members)

    def _kind(self, optimizer: "Optimizer", p: Tensor, group: "Group") -> str:
        """Which code can update a parameter: "kernel", "fused", "reference", "rest" (torch's own), or "dormant"."""
        g, state = p.grad, optimizer.state.get(p, {})
        names = optimizer._names(group)
        if g is None:
            if any(
                name is not None and state.get(name) is None for name in (*names, "step" if optimizer._COUNTS else None)
            ):
                return "dormant"  # torch makes a state when it sees the first gradient
            g = p
        others = [state[name] for name in names if name is not None and isinstance(state.get(name), Tensor)]
        if isinstance(state.get("ema"), Tensor):
            others.append(state["ema"])
        kind = "rest"
        if not (g.layout != torch.strided or p.layout != torch.strided or group.get("differentiable")):
            parts = tensors.local_parts(p, g, *others)
            if parts is not None and not any(t.is_conj() or t.is_neg() or t.device != parts[0].device for t in parts):
                types = {t.dtype.to_real() for t in parts}
                if (
                    runtime.backend_of(parts[0]) == "triton"
                    and types <= set(KERNEL_TYPES)
                    and tensors.layout([tensors.as_reals(t) for t in parts]) is not None
                ):
                    return "kernel"
                kind = fallback.kind(optimizer, group, parts)
        if kind == "rest":
            fallback.refuse_options(optimizer, group, g)
        return kind

    def _member(self, optimizer: "Optimizer", p: Tensor, group: "Group", number: int, index: int) -> Member:
        """Makes the states that are missing, as torch would; counters come later, all at once."""
        names, state = optimizer._names(group), optimizer.state[p] if optimizer._has_state(group) else {}
        if type(state) is dict and optimizer._has_state(group):
            state = optimizer.state[p] = WatchedState(state, [])
        dtype = group.get("state_dtype")
        if dtype is None or p.is_complex():
            dtype = p.dtype
        rounds = group.get("stochastic_rounding") and p.dtype == torch.bfloat16
        if (optimizer._COUNTS or rounds) and "step" not in state:
            state["step"] = None  # torch's first key; SGD has it for its random numbers
        for name in names:
            if name is not None and state.get(name) is None:
                state[name] = optimizer._new_state(p, name, dtype)
                self.counters[id(state[name])] = (state[name], 0)
        if group.get("ema_decay") and "ema" not in state:
            state["ema"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            state["ema_step"] = None
        return Member(index, number, local(p), local(p if p.grad is None else p.grad), state, names)

    def _note(self, optimizer: "Optimizer", members: dict[str, list[Member]]) -> None:
        """Everything that this plan rests on."""
        self.sharded = any(tensors.is_dtensor(p) for p in self.params)
        self._all = len(self.watched) == len(self.params)
        for m in chain.from_iterable(members.values()):
            m.grad = m.param  # or a whole set of gradients would live as long as the plan
        self._presences: list[Presence] = []
        self._first_states = [next((t for t in m.states if t is not None), m.param) for m in members["kernel"]]
        self._addresses = list(map(_ADDRESS, self._located(self.params)))
        self._changes: list[object] = []  # told by states
        for p, state in optimizer.state.items():
            if type(state) is WatchedState:
                state.changes = self._changes
            elif type(state) is dict:
                optimizer.state[p] = WatchedState(state, self._changes)
        self._states = list(optimizer.state.values())
        states = [t for m in members["kernel"] for t in m.state.values() if isinstance(t, Tensor)]
        self._storages = [weakref.ref(local(t).untyped_storage(), self._changes.append) for t in states]
        owners = {id(self._counted(m)) for kind in members.values() for m in kind}
        self.counters = {key: entry for key, entry in self.counters.items() if key in owners}

    # SGD has no step. Whether a momentum buffer has begun is counted here, for the buffer or, if none, the parameter.

    def _counted(self, m: Member) -> Tensor:
        return next((m.state[name] for name in m.names if name is not None), m.param)

    def counter(self, m: Member) -> Tensor | int:
        """How often a member was updated since its buffer was made; 1 for one that was there before us."""
        owner = self._counted(m)
        kept, count = self.counters.get(id(owner), (None, 1))
        return count if kept is owner else 1

    def count_on(self, m: Member, counter: Tensor | int) -> None:
        owner = self._counted(m)
        self.counters[id(owner)] = (owner, counter)

    # What is noticed, every step.

    def gradients(self, optimizer: "Optimizer") -> Sequence[Tensor | None] | None:
        """The gradients of all parameters (their local parts), or None if the plan no longer fits."""
        groups = optimizer.param_groups
        lists = list(map(_PARAMS, groups))
        params = lists[0] if len(lists) == 1 else list(chain.from_iterable(lists))
        if list(map(len, lists)) != self.sizes or not all(map(is_, params, self.params)):
            return None
        if self._changes or runtime.backend() != self.backend or list(map(len, groups)) != self.lengths:
            return None
        values = list(map(self._read, groups))
        if values != self.values:
            if [_structure(optimizer, group) for group in groups] != self.structure:
                return None
            if any(values[number] != values[part.groups[0]] for part in self.parts for number in part.groups):
                return None
            self.values = values
        if len(optimizer.state) != len(self._states) or not all(map(is_, optimizer.state.values(), self._states)):
            return None
        if list(map(_ADDRESS, self._located(params))) != self._addresses:
            return None
        if self._unwatched and any(p.grad is not None and _plain(p.grad) for p in self._unwatched):
            return None
        grads: list[Tensor | None] = list(map(_GRAD, params))
        if self.sharded:
            grads = [None if g is None else local(g) for g in grads]
        return grads if self._fits(self._watch(grads)) else None

    def _fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the watched gradients are such as the plan was made for; the one that fitted last is tried first."""
        for presence in self._presences:
            if presence.fits(grads):
                break
        else:
            for index, grad in zip(self.watched, grads, strict=True):
                if grad is not None and _look(grad) != self._expected.get(index):
                    return False
            presence = Presence(grads, [index in self._expected for index in self.watched])
            self._presences = [presence, *self._presences[:7]]
        if presence is not self._presences[0]:
            self._presences.remove(presence)
            self._presences.insert(0, presence)
        self._complete = presence.complete
        return True

    def _watch(self, items: Sequence[Any]) -> Sequence[Any]:
        return items if self._all else [items[i] for i in self.watched]

    def _located(self, params: Sequence[Tensor]) -> Iterable[Tensor]:
        """What is looked at for where it lies."""
        watched = self._watch(params)
        return chain(map(local, watched) if self.sharded else watched, self._first_states)

    # The step itself.

    def run(
        self, optimizer: "Optimizer", grads: Sequence[Tensor | None], grad_scale: Tensor | None,
        found_inf: Tensor | None, capturing: bool,
    ) -> None:  # fmt: skip
        """One step. grad_scale, found_inf: a GradScaler's, or None."""
        if not self._only_kernels and found_inf is not None:
            if found_inf.item() != 0:
                return
            found_inf = None
        if capturing and self not in optimizer._captured:
            optimizer._captured.append(self)  # the graph reads this plan's tables as long as it lives
        step = Step(
            optimizer,
            optimizer.param_groups,
            self.values,
            grads,
            self._complete,
            grad_scale,
            None,
            found_inf,
            capturing,
        )
        for kernels in self._kernels:
            kernels.write_tables(step)
        if self.max_grad_norm is not None:
            norm = optimizer.grad_norm = self._norm(step)
            step = step._replace(norm=norm)
        for part in self.parts:
            part.run(step)
        for number, params in self.rest.items():
            fallback.run_rest(optimizer.param_groups[number], params, step)

    def _norm(self, step: Step) -> Tensor:
        """‖g‖₂ over all gradients, unscaled: by one more launch, or by torch where they are not all in one place."""
        one_device = len({part.device for part in self._kernels}) == 1
        if self._only_kernels and one_device and not self.sharded:
            from . import kernel

            return kernel.gradient_norm(self._kernels, step)
        norm = fallback.total_norm([p.grad for p in self.params if p.grad is not None])
        return norm if step.grad_scale is None else norm / step.grad_scale.to(norm.device)


def _plain(grad: Tensor) -> bool:
    grad = local(grad)
    return type(grad) in PLAIN and grad.layout == torch.strided


def _structure(optimizer: "Optimizer", group: "Group") -> tuple[object, ...]:
    return optimizer._names(group), bool(group.get("ema_decay")), *map(group.get, _SWITCHES[:-1])


def _one_norm(groups: "list[Group]") -> float | None:
    norms = {group.get("max_grad_norm") for group in groups}
    if len(norms) > 1:
        raise ValueError(
            f"max_grad_norm is the norm of all gradients together and must be equal in all groups, got {norms}"
        )
    return norms.pop()


def _reader(keys: Sequence[str]) -> Callable[[dict[str, Any]], tuple[object, ...]]:
    """For groups of which only some have an option."""
    return lambda group: tuple(map(group.get, keys))
