"""What a step does while nothing changes, and how it is noticed that something did.

Reading 1,000 gradients, their addresses and their parameters' costs the host 0.3 ms; finding out what can be updated
how costs 5. So `Plan` finds it out once, and `Plan.gradients` looks, every step, at everything the plan rests on:
- the groups: the same parameter objects, the same objects as options. Hyperparameters may be replaced: they are
  written again; those that can change in place, as tensors and lists do, are written at every step;
- the gradients: the type, strides and kind of each (torch's own guards do it in C++), their memory, and which of them
  are there;
- how and where the parameters lie, for `p.data = …` and `module.to(…)` keep the object;
- the states, which tell (`WatchedState`): of a tensor that was replaced, and that somebody was given one. From then on
  and for as long as somebody holds one, it is looked at how and where they lie.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import eq, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch
from . import checks, layouts, torch_buckets
from .buckets import Member, Part, Step
from .footprint import Footprint, guard, holders, look, places, storage_sizes
from .layouts import PLAIN, local
from .tracked_state import WatchedState, peek

if TYPE_CHECKING:
    from .optimizer import Group, Optimizer
    from .triton_bucket import Kernel

_PARAMS: Callable[[dict[str, Any]], list[Tensor]] = itemgetter("params")

KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Options that decide how a group is updated, whatever the class; the others are numbers.
_SWITCHES = (
    "differentiable", "fused", "foreach", "capturable", "state_dtype", "stochastic_rounding", "seed",
    "eps_inside_sqrt", "max_grad_norm", "ema_decay",
)  # fmt: skip


class Presence:
    """Which gradients there are, how they lie, and that their memory holds them.

    Several live side by side: models that skip layers alternate.
    """

    def __init__(self, grads: Sequence[Tensor | None], planned: Sequence[bool]) -> None:
        self._there = bytes(grad is not None for grad in grads)
        self._missing = bytes(grad is None for grad in grads)
        self._all = 1 not in self._missing
        self.complete = all(there for there, wanted in zip(self._there, planned, strict=True) if wanted)
        self._check = guard([grad for grad in grads if grad is not None])
        self._sizes: list[int] = []  # of the storages that were seen to hold the gradients

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        present: Sequence[Any] = grads
        if not self._all:
            if any(grad is not None for grad in compress(grads, self._missing)):
                return False
            present = list(compress(grads, self._there))
        return self._check(present) and self._hold(present)

    def _hold(self, grads: Sequence[Tensor]) -> bool:
        sizes = storage_sizes(grads)
        if sizes != self._sizes:
            if not all(map(layouts.is_held, grads)):
                return False
            self._sizes = sizes
        return True


# Types of hyperparameters that can't change in place.
_CONSTANT = {float, int, bool, type(None), torch.dtype, str}


def _steady(values: Iterable[Any]) -> bool:
    """Whether none of these can change without being replaced."""
    types = set(map(type, values))
    if tuple in types:
        types = types - {tuple} | set(map(type, chain.from_iterable(v for v in values if type(v) is tuple)))
    return types <= _CONSTANT


def _identity(values: Iterable[Any]) -> tuple[object, ...]:
    """Constants by value, everything else by identity: two tensors are equal only as long as none is changed."""
    return tuple(v if type(v) in _CONSTANT else _identity(v) if type(v) is tuple else (type(v), id(v)) for v in values)


class Plan:
    """How every parameter of an optimizer is updated; valid while `gradients` returns them."""

    def __init__(self, optimizer: "Optimizer", before: "Plan | None") -> None:
        groups = optimizer.param_groups
        self.counts = optimizer._COUNTS
        self.fused = [bool(group.get("fused")) for group in groups]
        self.params: list[Tensor] = list(chain.from_iterable(map(_PARAMS, groups)))
        self.sizes = list(map(len, map(_PARAMS, groups)))
        self._names = list(map(tuple, groups))
        keys = [k for k in (*optimizer._KEYS, *_SWITCHES) if any(k in group for group in groups)]
        self._read = itemgetter(*keys) if all(k in g for k in keys for g in groups) else _reader(keys)
        self._remember(groups, list(map(self._read, groups)))
        self.max_grad_norm = _one_norm(groups)
        self.backend = dispatch.backend()
        self.counters: dict[int, tuple[Tensor, Tensor | int]] = dict(before.counters) if before else {}
        self._held = _held_by_others(optimizer, before)
        positions = [(number, i, p) for number, group in enumerate(groups) for i, p in enumerate(group["params"])]
        touched = [self._touched(optimizer, number, position, p) for number, position, p in positions]
        self._entangled = _entangled(self.params, touched)
        kinds = [
            self._kind(optimizer, index, groups[number], touched[index])
            for index, (number, _, _) in enumerate(positions)
        ]
        self.rest: dict[int, list[Tensor]] = defaultdict(list)  # by group: what only torch's own code can update
        self._in_turn: set[int] = set()  # groups of it that are updated one parameter after the other
        members: dict[str, list[Member]] = {"kernel": [], "fused": [], "reference": []}
        self.watched: list[int] = []  # of the parameters
        self._unwatched: list[Tensor] = []  # with sparse gradients, say, that no kernel takes
        self._expected: dict[int, tuple[object, ...]] = {}  # of their gradients, where one may come
        self._overlapping = False  # whether one of them overlaps itself
        for index, (kind, (number, _, p)) in enumerate(zip(kinds, positions, strict=True)):
            grad = local(p if p.grad is None else p.grad)
            if not _plain(grad):
                self._unwatched.append(p)
            else:
                self.watched.append(index)
                if kind != "dormant":
                    self._expected[index] = look(grad)
                    self._overlapping |= layouts.overlaps_itself(grad)
            if kind == "rest":
                self.rest[number].append(p)
                if p.grad is not None and optimizer._has_state(groups[number]):
                    optimizer.state[p]  # made now, in torch's order
                if index in self._entangled:
                    self._in_turn.add(number)
            elif kind != "dormant":
                members[kind].append(self._member(optimizer, p, groups[number], number, index))
        self._kernels: list[Kernel] = []
        if members["kernel"]:
            from . import triton_bucket

            self._kernels = triton_bucket.parts(self, optimizer, members["kernel"])
        others = torch_buckets.parts(self, members["fused"], members["reference"])
        self.parts: list[Part] = [*self._kernels, *others]
        self._only_kernels = not (others or self.rest)
        self._note(optimizer, members, [_used(optimizer, groups[number]) for number, _, _ in positions])

    def _remember(self, groups: "list[Group]", values: list[Any]) -> None:
        self.values = values
        self._options = list(chain.from_iterable(map(dict.values, groups)))
        self._unsteady: list[int] = []  # groups with options that can change in place
        self.alike = values  # by group: equal where the options are, and will be as long as none is replaced
        if not _steady(chain.from_iterable(values)):
            self._unsteady = [number for number, some in enumerate(values) if not _steady(some)]
            self.alike = list(map(_identity, values))

    def _touched(self, optimizer: "Optimizer", number: int, position: int, p: Tensor) -> dict[str, Any] | None:
        """What the update of a parameter reads and writes of its state, checked; None before the first gradient."""
        group, state = optimizer.param_groups[number], optimizer.state.get(p, {})
        names = [name for name in (*optimizer._names(group), "step" if self.counts else None) if name is not None]
        if p.grad is None and any(peek(state, name) is None for name in names):
            return None  # torch makes a state when it sees the first gradient
        found = {name: value for name in _used(optimizer, group) if (value := peek(state, name)) is not None}
        checks.check_tensors(optimizer, number, position, p, p.grad, found)
        return found

    def _kind(self, optimizer: "Optimizer", index: int, group: "Group", touched: dict[str, Any] | None) -> str:
        """Which code can update a parameter: "kernel", "fused", "reference", "rest" (torch's own), or "dormant"."""
        if touched is None:
            return "dormant"
        p = self.params[index]
        g = p if p.grad is None else p.grad
        others = [t for name, t in touched.items() if name not in checks.COUNTERS]
        kind = "rest"
        if not (g.layout != torch.strided or p.layout != torch.strided or group.get("differentiable")):
            parts = layouts.local_parts(p, g, *others)
            if parts is not None and not any(
                t.is_conj() or t.is_neg() or t.device != parts[0].device or t.shape != parts[0].shape for t in parts
            ):
                types = {t.dtype.to_real() for t in parts}
                if (
                    dispatch.backend_of(parts[0]) == "triton"
                    and index not in self._entangled
                    and types <= set(KERNEL_TYPES)
                    and layouts.layout([layouts.as_reals(t) for t in parts]) is not None
                ):
                    return "kernel"
                kind = torch_buckets.kind(optimizer, group, parts)
        if kind == "fused" and index in self._entangled:
            kind = "rest"
        if kind == "rest":
            torch_buckets.refuse_options(optimizer, group, p, g)
        return kind

    def _member(self, optimizer: "Optimizer", p: Tensor, group: "Group", number: int, index: int) -> Member:
        """Makes the states that are missing, as torch would; counters come later, all at once."""
        names, state = optimizer._names(group), optimizer.state[p] if optimizer._has_state(group) else {}
        if type(state) is not WatchedState and optimizer._has_state(group):
            state = optimizer.state[p] = WatchedState(state)
        dtype = group.get("state_dtype")
        if dtype is None or p.is_complex():
            dtype = p.dtype
        rounds = group.get("stochastic_rounding") and p.dtype == torch.bfloat16
        if (optimizer._COUNTS or rounds) and "step" not in state:
            state["step"] = None  # torch's first key; SGD has it for its random numbers
        for name in names:
            if name is not None and peek(state, name) is None:
                state[name] = optimizer._new_state(p, name, dtype)
                self.counters[id(peek(state, name))] = (peek(state, name), 0)
        if group.get("ema_decay") and "ema" not in state:
            state["ema"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            state["ema_step"] = None
        return Member(index, number, local(p), local(p if p.grad is None else p.grad), state, names)

    def _note(self, optimizer: "Optimizer", members: dict[str, list[Member]], used: Sequence[Iterable[str]]) -> None:
        """Everything that this plan rests on. used: the names of what it takes from each parameter's state."""
        self.sharded = any(layouts.is_dtensor(p) for p in self.params)
        self._all = len(self.watched) == len(self.params)
        for m in chain.from_iterable(members.values()):
            m.grad = m.param  # or a whole set of gradients would live as long as the plan
        self._presences: list[Presence] = []
        params = self._local(self.params)
        self._alike, self._there = guard(params), places(params)
        self._changes: list[object] = []  # told by states
        self._looks: list[object] = []  # told by them too
        for p, state in optimizer.state.items():
            if type(state) is WatchedState:
                state.changes, state.looks = self._changes, self._looks
            elif isinstance(state, dict):
                optimizer.state[p] = WatchedState(state, self._changes, self._looks)
        self._states = list(optimizer.state.values())
        owners = {id(self._counted(m)) for kind in members.values() for m in kind}
        self.counters = {key: entry for key, entry in self.counters.items() if key in owners}
        self._fused = bool(members["fused"])
        self.structure = [self._structure(optimizer, group) for group in optimizer.param_groups]
        states = [(optimizer.state.get(p, {}), names) for p, names in zip(self.params, used, strict=True)]
        self._used = [
            t for state, names in states for name in names if isinstance(t := peek(state, name), Tensor) and _plain(t)
        ]
        self._state_shards = not set(map(type, self._used)) <= set(PLAIN)
        self._state_footprint = Footprint(self._state_tensors())
        self._holders: list[object] | None = None  # of the states, when nobody but us has one

    # SGD has no step. Whether a momentum buffer has begun is counted here, for the buffer or, if none, the parameter.

    def _counted(self, m: Member) -> Tensor:
        return next((peek(m.state, name) for name in m.names if name is not None), m.param)

    def counter(self, m: Member) -> Tensor | int:
        """How often a member was updated since its buffer was made; 1 for one that was there before us."""
        owner = self._counted(m)
        kept, count = self.counters.get(id(owner), (None, 1))
        return count if kept is owner else 1

    def count_on(self, m: Member, counter: Tensor | int) -> None:
        owner = self._counted(m)
        self.counters[id(owner)] = (owner, counter)

    # What is noticed, every step.

    def gradients(self, optimizer: "Optimizer") -> list[Tensor | None] | None:
        """The gradients of all parameters (their local parts), or None if the plan no longer fits."""
        if self._changes or dispatch.backend() != self.backend:
            return None
        if len(optimizer.state) != len(self._states) or not all(map(is_, optimizer.state.values(), self._states)):
            return None
        if (self._looks or self._held) and not self._states_lie_still():
            return None
        groups = optimizer.param_groups
        lists = list(map(_PARAMS, groups))
        params = lists[0] if len(lists) == 1 else list(chain.from_iterable(lists))
        if list(map(len, lists)) != self.sizes or not all(map(is_, params, self.params)):
            return None
        options = list(chain.from_iterable(map(dict.values, groups)))
        if len(options) != len(self._options) or not all(map(is_, options, self._options)):
            if not self._follows(optimizer):
                return None
        elif self._unsteady:
            self.values = list(self.values)
            if any(self._structure(optimizer, groups[number]) != self.structure[number] for number in self._unsteady):
                return None
        watched = self._local(params)
        if not (self._there(watched) and self._alike(watched)):
            return None
        if self._unwatched and any(p.grad is not None and _plain(p.grad) for p in self._unwatched):
            return None
        grads = layouts.local_grads(params) if self.sharded else list(map(layouts.GRAD, params))
        return grads if self._fits(self._watch(grads)) else None

    def shares_memory(self, grads: list[Tensor | None]) -> bool:
        """Whether two elements of these gradients are one in memory, which then can't be divided in place."""
        addresses = [grad.data_ptr() for grad in self._watch(grads) if grad is not None and grad.numel()]
        return self._overlapping or len(set(addresses)) < len(addresses)

    def _follows(self, optimizer: "Optimizer") -> bool:
        """Take over options that were replaced; False if the plan can't follow them."""
        groups = optimizer.param_groups
        if list(map(tuple, groups)) != self._names:
            return False
        self._remember(groups, list(map(self._read, groups)))
        if [self._structure(optimizer, group) for group in groups] != self.structure:
            return False
        alike = self.alike
        return all(alike[number] == alike[part.groups[0]] for part in self.parts for number in part.groups)

    def _structure(self, optimizer: "Optimizer", group: "Group") -> tuple[object, ...]:
        """What a group's options decide beyond numbers."""
        fused = optimizer._fused_on_cpu(group, torch.float32) if self._fused else None
        return fused, optimizer._names(group), bool(group.get("ema_decay")), *map(group.get, _SWITCHES[:-1])

    def _state_tensors(self) -> list[Tensor]:
        return layouts.local_all(self._used) if self._state_shards else self._used

    def _states_lie_still(self) -> bool:
        """Whether the states' memory is as it was, and whether anybody could change that unnoticed from now on."""
        states = self._state_tensors()
        if not self._state_footprint.fits(states):
            return False
        self._looks.clear()
        if self._holders is not None and not self.rest:  # else torch's own code will look again anyway
            self._held = not all(map(eq, holders(states), self._holders))
        return True

    def _fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the watched gradients are such as the plan was made for; the one that fitted last is tried first."""
        for presence in self._presences:
            if presence.fits(grads):
                break
        else:
            for index, grad in zip(self.watched, grads, strict=True):
                if grad is not None and look(grad) != self._expected.get(index):
                    return False
            presence = Presence(grads, [index in self._expected for index in self.watched])
            if not presence.fits(grads):
                return False
            self._presences = [presence, *self._presences[:7]]
        if presence is not self._presences[0]:
            self._presences.remove(presence)
            self._presences.insert(0, presence)
        self._complete = presence.complete
        return True

    def _watch(self, items: list[Any]) -> list[Any]:
        return items if self._all else [items[i] for i in self.watched]

    def _local(self, params: list[Tensor]) -> list[Tensor]:
        """The memory of the watched ones."""
        watched = self._watch(params)
        return layouts.local_all(watched) if self.sharded else watched

    # The step itself.

    def run(
        self, optimizer: "Optimizer", grads: list[Tensor | None], grad_scale: Tensor | None,
        found_inf: Tensor | None, capturing: bool,
    ) -> None:  # fmt: skip
        """One step. grad_scale, found_inf: a GradScaler's, or None."""
        for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if scalar is not None:
                checks.check_scalar(f"{type(optimizer).__name__}: {name}", scalar)
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
            torch_buckets.run_rest(optimizer.param_groups[number], params, step, number in self._in_turn)
        if self._holders is None and not (self._held or self._looks):
            self._holders = list(holders(self._state_tensors()))

    def _norm(self, step: Step) -> Tensor:
        """‖g‖₂ over all gradients, unscaled: by one more launch, or by torch where they are not all in one place."""
        one_device = len({part.device for part in self._kernels}) == 1
        if self._only_kernels and one_device and not self.sharded:
            from . import triton_bucket

            return triton_bucket.gradient_norm(self._kernels, step)
        norm = torch_buckets.total_norm([p.grad for p in dict.fromkeys(self.params) if p.grad is not None])
        return norm if step.grad_scale is None else norm / step.grad_scale.to(norm.device)


def _plain(grad: Tensor) -> bool:
    grad = local(grad)
    return type(grad) in PLAIN and grad.layout == torch.strided


def _used(optimizer: "Optimizer", group: "Group") -> list[str]:
    """What the update takes from a state."""
    return list(dict.fromkeys(["step", *filter(None, optimizer._names(group)), "ema", "ema_step"]))


def _held_by_others(optimizer: "Optimizer", before: Plan | None) -> bool:
    """Whether others may hold states: those that were given to somebody, and those that we did not make."""
    return (before is not None and before._held) or any(
        type(state) is not WatchedState or bool(state.looks) for state in optimizer.state.values()
    )


def _entangled(params: Sequence[Tensor], touched: Sequence[dict[str, Any] | None]) -> set[int]:
    """Parameters that are listed twice, or share memory with another one or its states.

    In a launch two programs would race on it; torch's loop updates one after the other.
    """
    listed: dict[int, list[int]] = defaultdict(list)
    owned: list[tuple[int, Tensor]] = []
    for index, (p, state) in enumerate(zip(params, touched, strict=True)):
        listed[id(p)].append(index)
        if state is not None:
            parts = [local(t) for t in (p, *state.values()) if isinstance(t, Tensor)]
            owned += [(index, t) for t in parts if _plain(t) and t.device.type != "meta"]
    found = layouts.overlapping(owned)
    for indices in listed.values():
        if len(indices) > 1:
            found.update(indices)
    return found


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
