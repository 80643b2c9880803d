"""What a checkpoint holds: torch's keys, nothing lost on the way in, nothing half begun on the way out."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Optimizer

State = dict[str, Any]


def _as_torch_has_it(optimizer: "Optimizer") -> dict[Tensor, State]:
    """Every parameter's state with its counters where torch has them, without what has not begun.

    A kernel counts on the device; torch does only if `fused` or `capturable`, and would wait for the device at every
    step of a checkpoint with counters there. An SGD step that a GradScaler skipped made a buffer and did not use it.
    """
    plan = optimizer._plan
    on_device = {id(p): bool(g.get("capturable") or g.get("fused")) for g in optimizer.param_groups for p in g["params"]}
    found: dict[Tensor, State] = {}
    moving: list[tuple[State, str]] = []
    for p, state in optimizer.state.items():
        copy = dict(state) if isinstance(p, Tensor) else state
        found[p] = copy
        if not isinstance(p, Tensor):
            continue
        if plan is not None and (buffer := copy.get("momentum_buffer")) is not None and not optimizer._COUNTS:
            kept, count = plan.counters.get(id(buffer), (None, 1))
            if kept is buffer and float(count) == 0.0:
                del copy["momentum_buffer"]
        for key in ("step", "ema_step"):
            counter = copy.get(key)
            if isinstance(counter, Tensor):
                if counter.device.type != "cpu" and not on_device.get(id(p), False):
                    moving.append((copy, key))
                elif counter.untyped_storage().nbytes() > counter.nbytes:
                    copy[key] = counter.clone()  # not a view of all counters
    by_device: dict[torch.device, list[tuple[State, str]]] = {}
    for copy, key in moving:
        by_device.setdefault(copy[key].device, []).append((copy, key))
    for places in by_device.values():
        counts = torch.stack([copy[key] for copy, key in places]).cpu()
        for (copy, key), count in zip(places, counts.unbind(), strict=True):
            copy[key] = count.clone()
    return {p: state for p, state in found.items() if state}


def as_torch_has_it(optimizer: "Optimizer", state_dict: State) -> State:
    """torch's own `state_dict()`, with the states as torch would have them."""
    states = _as_torch_has_it(optimizer)
    numbers: dict[int, int] = {}
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        numbers |= {id(p): number for p, number in zip(group["params"], packed["params"], strict=True)}
    state_dict["state"] = {numbers.get(id(p), p): state for p, state in states.items()}
    return state_dict


def detached(optimizer: "Optimizer") -> Any:
    """The states for pickling and copying."""
    state = type(optimizer.state)(dict)
    state.update(_as_torch_has_it(optimizer))
    return state


@contextlib.contextmanager
def nothing_lost(optimizer: "Optimizer") -> Iterator[None]:
    """While torch loads a checkpoint: keep the types of its states, share none of its memory, keep our options.

    torch casts states to their parameter's type (float32 moments of bfloat16 parameters are cut), and uses the very
    tensors it is given. Hooks are where the checkpoint can be seen as it is loaded: after every hook of the user's
    has changed it, and before any of theirs looks at the result.
    """
    from .base import _OFF

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
