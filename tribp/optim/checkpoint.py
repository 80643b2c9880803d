"""What a checkpoint holds: torch's keys, nothing lost on the way in, nothing half begun on the way out."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .torch_buckets import counter_dtype
from .tracked_state import WatchedState

if TYPE_CHECKING:
    from .optimizer import Optimizer

State = dict[str, Any]


def states_of(optimizer: "Optimizer", states: Mapping[Any, State]) -> dict[Any, State]:
    """Copies of the states of `optimizer`'s parameters (keyed in any way), as its torch counterpart would have them.

    A kernel counts on the device; torch does only if `fused` or `capturable`, and would wait for the device at every
    step of a checkpoint with counters there. And a step that a GradScaler skipped made momentum buffers without using
    them: torch would have none.
    """
    counters = optimizer._plan.counters if optimizer._plan is not None else {}
    stays = {
        id(optimizer.state[p]): bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for p in group["params"]
        if p in optimizer.state
    }
    found: dict[Any, State] = {}
    moving: list[tuple[State, str, torch.dtype]] = []
    for owner, state in states.items():
        if id(state) not in stays:  # of no parameter: whatever the user keeps there
            found[owner] = state
            continue
        copy = dict(state)
        buffer = copy.get("momentum_buffer")
        kept, count = counters.get(id(buffer), (None, 1))
        if kept is not None and kept is buffer and float(count) == 0.0:
            del copy["momentum_buffer"]
        for key in ("step", "ema_step"):
            if not isinstance(copy.get(key), Tensor):
                continue
            kernels = key == "step" and copy[key].dtype == torch.float32
            dtype = counter_dtype(stays[id(state)]) if kernels else copy[key].dtype
            if copy[key].is_cpu or stays[id(state)]:
                copy[key] = copy[key].to(dtype, copy=True)  # not a view of all counters
            else:
                moving.append((copy, key, dtype))
        if copy:
            found[owner] = copy
    if moving:  # one transfer for all
        device = moving[0][0][moving[0][1]].device
        counts = torch.stack([copy[key].to(device) for copy, key, _ in moving]).cpu()
        for (copy, key, dtype), count in zip(moving, counts.unbind(), strict=True):
            copy[key] = count.to(dtype, copy=True)
    return found


@contextlib.contextmanager
def as_torch_has_it(optimizer: "Optimizer") -> Iterator[None]:
    """While torch packs a checkpoint: convert the states before any hook of the user's sees them."""

    def convert(_: Any, packed: State) -> None:
        packed["state"] = states_of(optimizer, packed["state"])

    handle = optimizer.register_state_dict_post_hook(convert, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def nothing_lost(optimizer: "Optimizer") -> Iterator[None]:
    """While torch loads a checkpoint: keep the types of its states, share none of its memory, keep our options.

    torch casts states to their parameter's type (float32 moments of bfloat16 parameters are cut), and uses the very
    tensors it is given. Hooks are where the checkpoint can be seen as it is loaded: after every hook of the user's
    has changed it, and before any of theirs looks at the result.
    """
    from .optimizer import _OFF

    loaded: State = {}
    before = optimizer.param_groups

    def capture(_: Any, state_dict: State) -> None:
        loaded.update(state_dict)

    def restore(_: Any) -> None:
        for old, new in zip(before, optimizer.param_groups, strict=True):
            for name in _OFF:
                if name in old:
                    new.setdefault(name, old[name])
        for group, packed in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
            for p, number in zip(group["params"], packed["params"], strict=True):
                source = loaded["state"].get(number)
                if source:
                    _restore(p, group, optimizer.state[p], source)
                    optimizer.state[p] = WatchedState(optimizer.state[p])  # nobody has been given one yet

    handles = [
        optimizer.register_load_state_dict_pre_hook(capture),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _restore(p: Tensor, group: State, state: State, source: State) -> None:
    for key, value in source.items():
        if not isinstance(value, Tensor) or not isinstance(state.get(key), Tensor):
            continue
        if key not in ("step", "ema_step", "ema") and value.is_floating_point():
            dtype = group.get("state_dtype") or value.dtype
        else:
            dtype = state[key].dtype if key == "step" else value.dtype
        if state[key].dtype != dtype:
            state[key] = value.to(device=state[key].device, dtype=dtype)
        if state[key] is value or _same_memory(state[key], value):
            state[key] = value.detach().clone(memory_format=torch.preserve_format)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.numel() > 0 and a.data_ptr() == b.data_ptr()
