"""Checks that gradients and states fit their parameter, and that scalars are scalars.

Neither our kernels nor torch's fused ones check: with another size they would access memory out of bounds.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from . import layouts
from .rule import Group
from .tracked_state import peek


def check_state_tensors(
    optimizer: torch.optim.Optimizer, group_index: int, position: int, grad: Tensor | None, state: Mapping[str, Any],
    scalars: Collection[str], coded: Collection[str],
) -> None:  # fmt: skip
    """Raise ValueError or TypeError if a gradient or an entry of `state` can't belong to its parameter.

    group_index, position: of the group, and of the parameter in it. state: of what the update uses. None: there is none
    yet. scalars: the entries that hold one number each. coded: those that are codes, of whatever kind the parameter is.
    """
    group = optimizer.param_groups[group_index]
    p: Tensor = group["params"][position]

    def described(name: str) -> str:
        parameter = _parameter(group, group_index, position)
        return f"{name} of {parameter}" if name else parameter

    caller = type(optimizer).__name__
    for name, t in (("", p), ("gradient", grad), *state.items()):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            if name in scalars:
                continue  # torch's own code takes numbers too
            raise TypeError(f"{caller}: {described(name)} must be a tensor, got {type(t).__name__}")
        if name in scalars:
            if t.numel() != 1 or t.is_complex():
                raise ValueError(
                    f"{caller}: {described(name)} must be one real number, got {_kind(t)} of shape {tuple(t.shape)}"
                )
        elif t.shape != p.shape:
            raise ValueError(
                f"{caller}: {described(name)} must have the parameter's shape, {tuple(p.shape)}, got {tuple(t.shape)}"
            )
        elif t.device != p.device:
            raise ValueError(
                f"{caller}: {described(name)} must be on the parameter's device, {p.device}, got {t.device}"
            )
        elif name not in coded and (t.is_complex(), t.is_floating_point()) != (p.is_complex(), p.is_floating_point()):
            raise TypeError(f"{caller}: {described(name)} must be {_kind(p)}, as the parameter is, got {t.dtype}")
        part = layouts.local(t)
        if type(part) in layouts.PLAIN and part.layout == torch.strided and not layouts.fits_storage(part):
            raise ValueError(
                f"{caller}: {described(name)} has shape {tuple(part.shape)}, strides {part.stride()} and offset "
                f"{part.storage_offset()} in {part.dtype}, but its memory was cut to "
                f"{part.untyped_storage().nbytes()} bytes (storage.resize_)"
            )


def check_complete(
    optimizer: torch.optim.Optimizer, group_index: int, position: int, state: Mapping[str, Any], needed: Collection[str]
) -> None:
    """Raise KeyError, as torch does, if a state has begun, but with only some of the entries that it needs."""
    missing = [name for name in needed if peek(state, name) is None]
    if missing and len(missing) < len(needed):
        there = ", ".join(name for name in needed if name not in missing)
        parameter = _parameter(optimizer.param_groups[group_index], group_index, position)
        raise KeyError(
            f"{type(optimizer).__name__}: the state of {parameter} has {there}, but no {', '.join(missing)}, as if it "
            "were another class's"
        )


def check_scalar(name: str, t: Tensor) -> None:
    """Raise ValueError if a tensor that stands for a number, as a GradScaler's do, does not hold just one."""
    part = layouts.local(t)
    if part.numel() != 1 or not part.is_floating_point() or not layouts.fits_storage(part):
        raise ValueError(f"{name} must hold one floating-point number, got {part.dtype} of shape {tuple(part.shape)}")


def _parameter(group: Group, group_index: int, position: int) -> str:
    names = group.get("param_names")
    name = f" ({names[position]!r})" if names else ""
    return f"parameter {position} of group {group_index}{name}"


def _kind(t: Tensor) -> str:
    return "complex" if t.is_complex() else "real" if t.is_floating_point() else "integer"
