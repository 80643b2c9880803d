"""Cheap checks that tensors and dicts have not changed: layout, address, storage size, references, entries."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_ADDRESS = Tensor.data_ptr
_STORAGE = Tensor.untyped_storage
_version: Callable[[dict[Any, Any]], object] | None
try:
    from torch._C._dynamo.guards import dict_version as _version
except ImportError:
    _version = None


def dict_version(mapping: object) -> object:
    """A value that stays equal while no entry of the dict is added, replaced or removed.

    It is the version that torch.compile's guards read, in 0.1 µs. The function is not public: where it is missing, the
    value equals nothing. Nor does an empty dict's: on Python 3.12 the version misses that `update` fills it.
    """
    return _version(mapping) if _version is not None and isinstance(mapping, dict) and mapping else object()


def dict_versions(mappings: Iterable[dict[Any, Any]]) -> list[object]:
    """The versions of dicts that are not empty: equal to what they were while no entry of any has been changed."""
    return [object()] if _version is None else list(map(_version, mappings))


def signature(t: Tensor) -> tuple[object, ...]:
    """What a guard compares."""
    strides = t.stride() if t.layout == torch.strided else None
    return type(t), t.dtype, t.device, t.shape, t.layout, strides, t.is_conj(), t.is_neg(), t._is_zerotensor()


def layout_guard(examples: Sequence[Tensor]) -> Callable[[Sequence[Any]], bool]:
    """A check that tensors have the Python type, dtype, device, shape and strides of these; None fails it.

    torch.compile's guards take 0.05 ms for 1,000 tensors. They are not public: where they are missing or refuse the
    examples, Python compares, in 0.6 ms.
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
    expected = [signature(t) for t in examples]
    return lambda tensors: all(t is not None and signature(t) == e for t, e in zip(tensors, expected, strict=True))


def storage_sizes(tensors: Sequence[Tensor]) -> list[int]:
    """Bytes of the memory that each is a view of: `storage.resize_` changes them and no tensor."""
    return list(map(len, map(_STORAGE, tensors)))


def address_guard(examples: Sequence[Tensor]) -> Callable[[list[Any]], bool]:
    """A check that tensors begin at the addresses of these.

    torch's builds for GPUs have a function for it: 29 µs for 1,000 tensors instead of 52.
    """
    addresses: list[int | None] = list(map(_ADDRESS, examples))
    numbers = list(range(len(examples)))
    try:
        equal = torch._C._tensors_data_ptrs_at_indices_equal
    except AttributeError:
        return lambda tensors: list(map(_ADDRESS, tensors)) == addresses
    return lambda tensors: bool(equal(tensors, addresses, numbers))


class Footprint:
    """How some tensors lay in memory: type, dtype, shape, strides, address, size of the storage."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._same_layouts, self._same_addresses = layout_guard(tensors), address_guard(tensors)
        self._sizes = storage_sizes(tensors)

    def fits(self, tensors: list[Tensor]) -> bool:
        return self._same_layouts(tensors) and self._same_addresses(tensors) and storage_sizes(tensors) == self._sizes


def reference_counts(tensors: Sequence[Tensor]) -> Iterator[object]:
    """The reference counts of the tensors, of their storage objects, and of the storages in C++.

    They are equal while nobody else takes a reference. The cheapest first: a state_dict() that is kept shows there.
    """
    yield list(map(sys.getrefcount, tensors))
    storages = list(map(_STORAGE, tensors))
    yield list(map(sys.getrefcount, storages))
    try:
        yield [torch._C._storage_Use_Count(s._cdata) for s in storages]
    except AttributeError:
        yield object()  # equal to nothing: as if somebody held them
