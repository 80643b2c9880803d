"""Checks before every step that nothing a plan was built on has changed.

- Groups: the same parameter objects, the same option objects. A hyperparameter may be replaced: it is written again.
  One that can change in place (a tensor, a list) is written at every step.
- Gradients: which parameters have one; its type, strides and kind (by torch's guards, in C++); that its storage holds
  it. Its address may change: a bucket uploads addresses that changed.
- Parameters: layout and address, because `p.data = …` and `module.to(…)` keep the object.
- States: a `WatchedState` reports that a tensor was replaced or handed out. From then on, while somebody holds one,
  layouts and addresses are compared.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress, pairwise
from operator import eq, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..footprint import Footprint, address_guard, dict_version, layout_guard, reference_counts, signature, storage_sizes
from . import layouts
from .buckets import Bucket
from .codes import RESIDUAL, extra_keys
from .layouts import PLAIN, local
from .options import SWITCHES
from .rule import Group, Rule
from .tracked_state import Notes, WatchedState, peek

_PARAMS: Callable[[Group], list[Tensor]] = itemgetter("params")
# Types of hyperparameters that can't change in place.
_CONSTANT = {float, int, bool, type(None), torch.dtype, str}


class Options:
    """The groups' options as they were last read."""

    def __init__(self, rule: Rule, groups: list[Group]) -> None:
        self._rule = rule
        self._keys = list(map(tuple, groups))
        keys = [k for k in (*rule.options, *SWITCHES, "ema_decay") if any(k in group for group in groups)]
        complete = all(k in group for k in keys for group in groups)
        self._read = itemgetter(*keys) if complete else lambda group: tuple(map(group.get, keys))
        self._remember(groups)

    def _remember(self, groups: list[Group]) -> None:
        self._versions = list(map(dict_version, groups))
        self.values: list[Any] = list(map(self._read, groups))
        self._unsteady: list[int] = []  # groups with options that can change in place
        self.comparable = self.values  # by group: equal where the options are, and as long as none is replaced
        if not _steady(chain.from_iterable(self.values)):
            self._unsteady = [group_index for group_index, values in enumerate(self.values) if not _steady(values)]
            self.comparable = list(map(_identity, self.values))

    def remember_variants(self, groups: list[Group], fused: bool) -> None:
        """fused: whether some parameters are updated by a fused CPU kernel."""
        self._fused = fused
        self._variants = list(map(self._variant, groups))

    def accept_changes(self, groups: list[Group], buckets: Sequence[Bucket]) -> bool:
        """Take over options that were replaced; False if the plan can't follow them."""
        if list(map(dict_version, groups)) == self._versions:
            if not self._unsteady:
                return True
            self.values = list(self.values)  # another list: buckets compare it by identity, and read it again
            return all(
                self._variant(groups[group_index]) == self._variants[group_index] for group_index in self._unsteady
            )
        if list(map(tuple, groups)) != self._keys:
            return False
        self._remember(groups)
        same = self.comparable
        return list(map(self._variant, groups)) == self._variants and all(
            same[group_index] == same[bucket.groups[0]] for bucket in buckets for group_index in bucket.groups
        )

    def _variant(self, group: Group) -> object:
        """What a group's options decide beyond numbers."""
        fused = self._rule.fused_on_cpu(group, torch.float32) if self._fused else None
        return fused, self._rule.states(group), bool(group.get("ema_decay")), *map(group.get, SWITCHES)


def _steady(values: Iterable[Any]) -> bool:
    """Whether none of these can change without being replaced."""
    types = set(map(type, values))
    if tuple in types:
        types = types - {tuple} | set(map(type, chain.from_iterable(v for v in values if type(v) is tuple)))
    return types <= _CONSTANT


def _identity(values: Iterable[Any]) -> tuple[object, ...]:
    """Constants by value, everything else by identity: two tensors are equal only as long as none is changed."""
    return tuple(v if type(v) in _CONSTANT else _identity(v) if type(v) is tuple else (type(v), id(v)) for v in values)


class GradMask:
    """Which gradients there are, how they lie, and that their memory holds them.

    Several live side by side: models that skip layers alternate.
    """

    def __init__(self, grads: Sequence[Tensor | None], planned: Sequence[bool]) -> None:
        self._present = bytes(grad is not None for grad in grads)
        self._absent = bytes(grad is None for grad in grads)
        self._all_present = 1 not in self._absent
        self.complete = all(there for there, needed in zip(self._present, planned, strict=True) if needed)
        self._check = layout_guard([grad for grad in grads if grad is not None])
        self._sizes: list[int] = []  # of the storages that were seen to hold the gradients

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        present: Sequence[Any] = grads
        if not self._all_present:
            if any(grad is not None for grad in compress(grads, self._absent)):
                return False
            present = list(compress(grads, self._present))
        return self._check(present) and self._fit_storages(present)

    def _fit_storages(self, grads: Sequence[Tensor]) -> bool:
        sizes = storage_sizes(grads)
        if sizes != self._sizes:
            if not all(map(layouts.fits_storage, grads)):
                return False
            self._sizes = sizes
        return True


class Watch:
    """What a plan rests on: options, parameters, gradients, states."""

    def __init__(
        self, rule: Rule, optimizer: torch.optim.Optimizer, options: Options, buckets: Sequence[Bucket],
        kinds: Sequence[str | None], shared: bool, apart: bool,
    ) -> None:  # fmt: skip
        """kinds: which code updates each parameter, in `UpdatePlan`'s words. shared: whether others may hold states.

        apart: whether no two parameters or states share memory.
        """
        groups: list[Group] = optimizer.param_groups
        self.options, self._buckets, self.shared = options, buckets, shared
        self._by_torch, self._apart = "torch" in kinds, apart
        self.captured = False  # whether a CUDA graph reads the buckets' tables
        options.remember_variants(groups, "fused" in kinds)
        self._backend = dispatch.backend()
        lists = list(map(_PARAMS, groups))
        self._sizes = list(map(len, lists))
        self.params = list(chain.from_iterable(lists))
        self._watch_params_and_gradients(kinds)
        self._watch_states(rule, optimizer)

    def _watch_params_and_gradients(self, kinds: Sequence[str | None]) -> None:
        self.sharded = any(layouts.is_dtensor(p) for p in self.params)
        params_and_kinds = zip(self.params, kinds, strict=True)
        self._sharded_indices = [
            n for n, (p, kind) in enumerate(params_and_kinds) if kind != "torch" and layouts.is_dtensor(p)
        ]
        self._watched: list[int] = []  # of the parameters
        self._unwatched: list[Tensor] = []  # with sparse gradients, say, that no kernel takes
        self._expected: dict[int, tuple[object, ...]] = {}  # of their gradients, where one may come
        self._overlapping = False  # whether one of them overlaps itself
        for index, p in enumerate(self.params):
            grad = local(p if p.grad is None else p.grad)
            if not is_plain(grad):
                self._unwatched.append(p)
                continue
            self._watched.append(index)
            if kinds[index] is not None:
                self._expected[index] = signature(grad.detach() if grad is p else grad)  # a gradient is no Parameter
                self._overlapping |= layouts.overlaps_itself(grad)
        self._all = len(self._watched) == len(self.params)
        self._masks: list[GradMask] = []
        self.complete = False  # whether every parameter that the plan updates has a gradient
        memory = self._memory(self.params)
        self._same_layouts, self._same_addresses = layout_guard(memory), address_guard(memory)
        self._state_ranges: list[tuple[str, int, int]] | None = None  # of the states, once parameters have moved

    def _watch_states(self, rule: Rule, optimizer: torch.optim.Optimizer) -> None:
        states: dict[Any, Any] = optimizer.state
        entries = [[*rule.entries(group), *extra_keys(rule, group)] for group in optimizer.param_groups]
        self.notes = Notes({*chain.from_iterable(entries), RESIDUAL})
        for p, state in states.items():
            if type(state) is WatchedState:
                state.notes.change()  # for another optimizer, maybe, which shares this state
                state.notes = self.notes
            elif isinstance(state, dict) and isinstance(p, Tensor):
                states[p] = WatchedState(state, self.notes)
        self._owners, self._states, self._states_version = list(states), list(states.values()), dict_version(states)
        self._used: list[Tensor] = []
        for group, names in zip(optimizer.param_groups, entries, strict=True):
            for state in (states.get(p, {}) for p in group["params"]):
                used = (peek(state, name) for name in names)
                self._used += [t for t in used if isinstance(t, Tensor) and is_plain(t)]
        self._state_shards = not set(map(type, self._used)) <= set(PLAIN)
        self._state_footprint = Footprint(self._state_tensors())
        self._reference_counts: list[object] | None = None  # of the states, when nobody but us has one

    # Every step.

    def checked_gradients(self, optimizer: torch.optim.Optimizer) -> list[Tensor | None] | None:
        """The gradients of all parameters (their local parts), or None if the plan no longer fits."""
        if self.notes.changed or dispatch.backend() != self._backend:
            return None
        if not self._same_states(optimizer.state):
            return None
        if (self.notes.accessed or self.shared) and not self._states_lie_still():
            return None
        groups: list[Group] = optimizer.param_groups
        lists = list(map(_PARAMS, groups))
        params = lists[0] if len(lists) == 1 else list(chain.from_iterable(lists))
        if list(map(len, lists)) != self._sizes or not all(map(is_, params, self.params)):
            return None
        if not self.options.accept_changes(groups, self._buckets):
            return None
        memory = self._memory(params)
        # The guard first: it is all C++, and memory that both read is waited for in less time than between calls from
        # Python. That is 1 to 5 % of a step of 400 shards that are in no cache; otherwise the order is all the same.
        if not (self._same_layouts(memory) and (self._same_addresses(memory) or self._accept_moved_parameters(memory))):
            return None
        if self._unwatched and any(p.grad is not None and is_plain(p.grad) for p in self._unwatched):
            return None
        grads = layouts.gradients(params) if self.sharded else list(map(layouts.GRAD, params))
        if self.sharded:
            all_sharded = len(self._sharded_indices) == len(params)
            some = (params, grads) if all_sharded else map(self._select_sharded, (params, grads))
            if not layouts.sharded_alike(*some):
                return None
            grads = layouts.local_all(grads)
        return grads if self._fit(self._select(grads)) else None

    def _accept_moved_parameters(self, memory: list[Tensor]) -> bool:
        """Have the buckets go on with parameters that were given other memory, of the same kind; False if they can't.

        Optimizers around this one do so at every step (SAM's `p.data = old_p`): another plan takes ten times as long.
        """
        if not (self._apart and self._all) or self.sharded or self.captured:
            return False
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return False  # it would upload tables
        if self._state_ranges is None:
            self._state_ranges = list(map(layouts.memory_range, self._state_tensors()))
        stretches = sorted(s for s in (*map(layouts.memory_range, memory), *self._state_ranges) if s[1] < s[2])
        meet = any(a[0] == b[0] and b[1] < a[2] for a, b in pairwise(stretches))
        if meet or not all(map(layouts.fits_storage, memory)):
            return False
        for bucket in self._buckets:
            bucket.parameters_moved()
        self._same_addresses = address_guard(memory)
        return True

    def shares_memory(self, grads: list[Tensor | None]) -> bool:
        """Whether two elements of these gradients are one in memory, which then can't be divided in place."""
        addresses = [grad.data_ptr() for grad in self._select(grads) if grad is not None and grad.numel()]
        return self._overlapping or len(set(addresses)) < len(addresses)

    def release(self) -> None:
        """Hold no state any longer; the plan does not hold."""
        self.notes.changed = True
        self._buckets, self._used, self._states = [], [], []
        del self._state_footprint

    def after_step(self) -> None:
        """Remember who holds the states, if nobody else does."""
        if self._reference_counts is None and not (self.shared or self.notes.accessed):
            self._reference_counts = list(reference_counts(self._state_tensors()))

    def _same_states(self, states: Mapping[Any, Any]) -> bool:
        """Whether every parameter has the same dict as its state; they are looked at only if an entry has changed."""
        version = dict_version(states)
        if version != self._states_version:
            same = all(map(is_, states, self._owners)) and all(map(is_, states.values(), self._states))
            if len(states) != len(self._states) or not same:
                return False
            self._states_version = version
        return True

    def _states_lie_still(self) -> bool:
        """Whether the states' memory is as it was, and whether anybody could change that unnoticed from now on."""
        states = self._state_tensors()
        if not self._state_footprint.fits(states):
            return False
        self.notes.accessed = False
        # Who holds one stays unknown where torch's own code asks for them, or somebody did before the first step's end.
        unknown = self._by_torch or self._reference_counts is None
        self.shared = unknown or not all(map(eq, reference_counts(states), self._reference_counts or ()))
        return True

    def _fit(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the watched gradients are such as the plan was made for; the mask that fitted last is tried first."""
        for mask in self._masks:
            if mask.fits(grads):
                break
        else:
            for index, grad in zip(self._watched, grads, strict=True):
                if grad is not None and signature(grad) != self._expected.get(index):
                    return False
            mask = GradMask(grads, [index in self._expected for index in self._watched])
            if not mask.fits(grads):
                return False
            self._masks = [mask, *self._masks[:7]]
        if mask is not self._masks[0]:
            self._masks.remove(mask)
            self._masks.insert(0, mask)
        self.complete = mask.complete
        return True

    def _state_tensors(self) -> list[Tensor]:
        return layouts.local_all(self._used) if self._state_shards else self._used

    def _select(self, items: list[Any]) -> list[Any]:
        return items if self._all else [items[i] for i in self._watched]

    def _select_sharded(self, items: list[Any]) -> list[Any]:
        return [items[n] for n in self._sharded_indices]

    def _memory(self, params: list[Tensor]) -> list[Tensor]:
        """That of the watched ones."""
        watched = self._select(params)
        return layouts.local_all(watched) if self.sharded else watched


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor in this process, strided, whatever it is a shard of."""
    tensor = local(tensor)
    return type(tensor) in PLAIN and tensor.layout == torch.strided
