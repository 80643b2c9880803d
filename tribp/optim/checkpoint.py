"""Checkpoints: out with torch's keys and types, in without loss of precision or of options."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import codes
from .options import DEFAULTS, EXCLUSIVE
from .rule import Rule, counter_dtype, is_shared
from .tracked_state import WatchedState

State = dict[str, Any]
# torch's loops over an optimizer's hooks stop at one that is added meanwhile.
_hooking: weakref.WeakKeyDictionary[torch.optim.Optimizer, threading.RLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _hooking_of(optimizer: torch.optim.Optimizer) -> Any:
    """An optimizer's lock. All of them together would wait for each other where hooks do."""
    with _making:
        return _hooking.setdefault(optimizer, threading.RLock())


def states_of(
    optimizer: torch.optim.Optimizer,
    states: Mapping[Any, State],
    is_unused: Callable[[object], bool],
    rule: type[Rule],
    compressed: bool,
) -> dict[Any, State]:
    """Copies of the states of `optimizer`'s parameters (keyed in any way), as its torch counterpart would have them.

    A kernel counts on the device; most of torch's classes do only if `fused` or `capturable`, and would wait for the
    device at every step of a checkpoint with counters there. And a step that a GradScaler skipped made momentum buffers
    without using them (`is_unused`): torch would have none. compressed: codes stay codes, which no other class knows.
    """
    owners = {
        id(optimizer.state[p]): (p, group)
        for group in optimizer.param_groups
        for p in group["params"]
        if p in optimizer.state
    }
    exported: dict[Any, State] = {}
    moving: list[tuple[State, str, torch.dtype]] = []
    for owner, state in states.items():
        if id(state) not in owners:  # of no parameter: whatever the user keeps there
            exported[owner] = state
            continue
        (p, group), copy = owners[id(state)], dict(state)
        if is_unused(copy.get("momentum_buffer")):
            del copy["momentum_buffer"]
            copy.pop(codes.scale_of("momentum_buffer"), None)
        if not compressed:
            codes.decode_states(copy)
        on_device = rule.scalars_on_device(group)
        for key in rule.scalars():
            if not isinstance(copy.get(key), Tensor):
                continue
            by_kernel = key == "step" and copy[key].dtype == torch.float32
            dtype = counter_dtype(bool(group.get("fused"))) if by_kernel else copy[key].dtype
            if is_shared(copy[key]):
                continue  # another process counts, too
            if copy[key].is_cpu or on_device:
                device = p.device if on_device and p.is_cuda else copy[key].device
                copy[key] = copy[key].to(device, dtype, copy=True)  # not a view of all counters
            else:
                moving.append((copy, key, dtype))
        if copy:
            exported[owner] = copy
    if moving:  # one transfer for all of them
        device = moving[0][0][moving[0][1]].device
        counts = torch.stack([copy[key].to(device) for copy, key, _ in moving]).cpu()
        for (copy, key, dtype), count in zip(moving, counts.unbind(), strict=True):
            copy[key] = count.to(dtype, copy=True)
    return exported


@contextlib.contextmanager
def export_state(
    optimizer: torch.optim.Optimizer, is_unused: Callable[[object], bool], rule: type[Rule], compressed: bool
) -> Iterator[None]:
    """While torch packs a checkpoint: convert the states before any hook of the user's sees them."""

    over = False

    def convert(_: Any, packed: State) -> None:
        if not over:
            packed["state"] = states_of(optimizer, packed["state"], is_unused, rule, compressed)

    handles: list[RemovableHandle] = []
    with _hooking_of(optimizer):
        try:
            handles.append(optimizer.register_state_dict_post_hook(convert, prepend=True))
            yield
        finally:
            over = True  # an interrupt may leave the hook behind, which must not act in another call
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def keep_loaded_state(optimizer: torch.optim.Optimizer, scalars: Collection[str]) -> Iterator[None]:
    """While torch loads a checkpoint: keep the types of its states, share none of its memory, keep our options.

    torch casts states to their parameter's type (float32 moments of bfloat16 parameters are cut), and uses the very
    tensors it is given. Hooks are where the checkpoint can be seen as it is loaded: after every hook of the user's
    has changed it, and before any of theirs looks at the result.
    """
    loaded: State = {}
    before = optimizer.param_groups
    over = False

    def capture(_: Any, state_dict: State) -> None:
        if not over:
            loaded.update(state_dict)

    def restore(_: Any) -> None:
        if over:
            return
        for old, new in zip(before, optimizer.param_groups, strict=True):
            for name in DEFAULTS:
                if name in old and not (name in EXCLUSIVE and any(map(new.get, EXCLUSIVE))):
                    new.setdefault(name, old[name])
        for group, packed in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
            for p, param_id in zip(group["params"], packed["params"], strict=True):
                source = loaded["state"].get(param_id)
                if source:
                    _restore(group, optimizer.state[p], source, scalars)
                    optimizer.state[p] = WatchedState(optimizer.state[p])  # nobody has been given one yet

    handles: list[RemovableHandle] = []
    with _hooking_of(optimizer):
        try:
            handles.append(optimizer.register_load_state_dict_pre_hook(capture))
            handles.append(optimizer.register_load_state_dict_post_hook(restore, prepend=True))
            yield
        finally:
            over = True  # as above
            loaded.clear()
            for handle in handles:
                handle.remove()


def _restore(group: State, state: State, source: State, scalars: Collection[str]) -> None:
    scales = set(map(codes.scale_of, codes.coded_entries(source)))  # float32 numbers, whatever the states' type
    for key, value in source.items():
        if not isinstance(value, Tensor) or not isinstance(state.get(key), Tensor):
            continue
        if key == "ema":  # torch's class makes one of the parameter's type, in which it would hardly move
            dtype = torch.promote_types(value.dtype, torch.float32)
        elif key not in scalars and key not in scales and value.is_floating_point():
            wide = value.dtype if group.get("state_bits") else torch.promote_types(value.dtype, state[key].dtype)
            dtype = group.get("state_dtype") or wide
        else:
            dtype = state[key].dtype if key == "step" else value.dtype
        if state[key].dtype != dtype:
            state[key] = value.to(device=state[key].device, dtype=dtype)
        if state[key] is value or _same_memory(state[key], value):
            state[key] = value.detach().clone(memory_format=torch.preserve_format)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.numel() > 0 and a.data_ptr() == b.data_ptr()
