"""The memory behind a tensor: shards, pairs of reals, strides."""

import sys
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
GRAD: Callable[[Tensor], Tensor | None] = attrgetter("grad")
_LOCAL: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")
_SPEC: Callable[[Any], object] = attrgetter("_spec")
MAX_DIMS = 6  # of a tensor whose parameter, gradient and states differ in layout: the kernel's loop is unrolled


def dtensor_type() -> type | None:
    """torch's DTensor, if anything in this process can be one: its module takes a second to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor) not in PLAIN and (kind := dtensor_type()) is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that lies in this process; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined, unused-ignore]


def local_all(tensors: Sequence[Any]) -> list[Any]:
    """`local` of each, None of None; where all are distributed, in 16 µs for 400 instead of 150."""
    if set(map(type, tensors)) == {dtensor_type()}:
        return list(map(_LOCAL, tensors))
    return [None if t is None else local(t) for t in tensors]


def gradients(params: Sequence[Tensor]) -> list[Any]:
    """Each one's, or None. Nobody is asked for its `__torch_function__`, which would double the time."""
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(GRAD, params))


def sharded_alike(params: Sequence[Tensor], grads: Sequence[Any]) -> bool:
    """Whether each distributed parameter's gradient, if it has one, is sharded or replicated as it is.

    FSDP2 gives both one description, which 400 are asked for in 30 µs; where each has its own it takes 80.
    """
    try:
        if all(map(is_, map(_SPEC, grads), map(_SPEC, params))):
            return True
    except AttributeError:  # not every one has a gradient, or a distributed one
        pass
    return all(grad is None or _described_alike(p, grad) for p, grad in zip(params, grads, strict=True))


def _described_alike(p: Any, grad: Any) -> bool:
    one, other = p._spec, getattr(grad, "_spec", None)
    return other is one or (
        other is not None and other.placements == one.placements and (other.mesh is one.mesh or other.mesh == one.mesh)
    )


def local_parts(p: Tensor, *others: Tensor) -> list[Tensor] | None:
    """The local, plain memory of a parameter and of what belongs to it; None if that is not what they are.

    Distributed tensors count where all are sharded in one way: an update element by element is then one of the shards.
    """
    if is_dtensor(p):
        if any(not is_dtensor(t) or t.placements != p.placements or t.device_mesh != p.device_mesh for t in others):  # type: ignore[attr-defined]
            return None
        if any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
            return None
    elif any(is_dtensor(t) for t in others):
        return None
    parts = [local(t) for t in (p, *others)]
    return parts if all(type(t) in PLAIN for t in parts) else None


def as_reals(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals; any other one itself."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def fits_storage(tensor: Tensor) -> bool:
    """Whether a tensor's storage holds all its elements; it does not after `storage.resize_(0)`, which frees them."""
    needed = extent(tensor)
    return not needed or (tensor.storage_offset() * tensor.element_size() + needed <= tensor.untyped_storage().nbytes())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of a tensor's elements may be one and the same in memory, as those of an expanded one are."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def separate_gradients(params: Iterable[Tensor]) -> bool:
    """Put copies in the place of gradients that a GradScaler's scale can't divide in place; return whether any was.

    Those that overlap themselves (torch raises an error that asks for a clone) and those that begin where another one
    begins, which would be divided twice. Columns of one matrix overlap as stretches of memory, and stay as they are.
    """
    begun: set[int] = set()
    separated = False
    for p in dict.fromkeys(params):
        if p.grad is None:
            continue
        grad = local(p.grad)
        if type(grad) not in PLAIN or grad.layout != torch.strided or not (grad.numel() and fits_storage(grad)):
            continue
        if overlaps_itself(grad) or (grad.data_ptr() in begun and not grad.is_meta):
            p.grad = p.grad.clone()
            separated = True
        begun.add(grad.data_ptr())
    return separated


def give_memory(params: Iterable[Tensor]) -> bool:
    """Put what they stand for in the place of gradients that are zero without memory, as that of `sgn`, or whose memory
    holds their negative or conjugate, as that of `imag`; return whether any was."""
    lazy = [p for p in dict.fromkeys(params) if p.grad is not None and _is_lazy(local(p.grad))]
    for p in lazy:
        p.grad = p.grad.resolve_neg().resolve_conj().clone()  # type: ignore[union-attr]
    return bool(lazy)


def _is_lazy(t: Tensor) -> bool:
    return t._is_zerotensor() or t.is_neg() or t.is_conj()


def memory_range(t: Tensor) -> tuple[str, int, int]:
    """The memory that a tensor lies in: the device, where it begins and ends."""
    start = t.data_ptr()
    return str(t.device), start, start + (t.nbytes if t.is_contiguous() else extent(t))


def overlapping(owned: Iterable[tuple[int, Tensor]]) -> set[int]:
    """The owners of tensors whose stretches of memory meet, be it with another's or with another of their own."""
    stretches = sorted((*memory_range(t), owner) for owner, t in owned if t.numel())
    owners: set[int] = set()
    device, end, last = "", 0, 0  # of the stretch that reaches furthest so far
    for where, start, stop, owner in stretches:
        if where == device and start < end:
            owners |= {owner, last}
        if where != device or stop > end:
            device, end, last = where, stop, owner
    return owners


def coalesce(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The same elements in as few dimensions as possible, in the order in which the first tensor lies in memory.

    strides: of each tensor. Returns sizes and each tensor's strides: `[n], [[1], …]` if all are dense in one layout.
    """
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[0][d])
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d in order:
        if sizes and all(m[-1] == s[d] * shape[d] for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= shape[d]
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[d]
        else:
            sizes.append(shape[d])
            for m, s in zip(merged, strides, strict=True):
                m.append(s[d])
    return (sizes, merged) if sizes else ([1], [[1] for _ in strides])


def layout_row(tensors: Sequence[Tensor]) -> list[int] | None:
    """How the kernel walks a parameter, its gradient, its states: [] if all are dense in one layout, else a table row.

    The row: MAX_DIMS sizes, then MAX_DIMS strides each of the parameter, the gradient and the states, the innermost
    last. None where that can't say it: states of different layouts, too many dimensions, overlapping writes.
    """
    first, shape = tensors[0].stride(), tensors[0].shape
    if all(t.stride() == first for t in tensors) and (
        tensors[0].is_contiguous() or tensors[0].is_contiguous(memory_format=torch.channels_last)
    ):
        return []
    if not tensors[0].numel():
        return []
    sizes, strides = coalesce(shape, [t.stride() for t in tensors])
    if all(s == [1] for s in strides):
        return []
    states = strides[2:] or [strides[0]]
    if len(sizes) > MAX_DIMS or any(s != states[0] for s in states):
        return None
    if any(overlaps_itself(t) for i, t in enumerate(tensors) if i != 1):
        return None
    pad = MAX_DIMS - len(sizes)
    row = [1] * pad + sizes
    for part in (strides[0], strides[1], states[0]):
        row += [0] * pad + part
    return row
