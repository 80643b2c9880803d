"""The process's own memory, of which only the spans of known tensors may be touched."""

import bisect
import ctypes
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .arrays import UNSIGNED, Array, log2

BASE = 4096  # addresses below are nobody's


class GlobalMemory:
    """Reads and writes of many threads at once; which bytes are tensors' elements, which CTA wrote and read them."""

    MANY = -1

    def __init__(self) -> None:
        size = (1 << 47) - BASE
        raw: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(BASE))
        self._views = {n: raw.view(U) for n, U in UNSIGNED.items()}
        self.start_launch()

    # What may be touched.

    def start_launch(self) -> None:
        self._spans: dict[tuple[Any, ...], torch.Tensor | None] = {}  # by first and last address and, of gaps, shape
        self._searched: set[int] = set()
        self._stale = True
        self.searching = False  # whether any tensor that is alive may be meant, because tables hold addresses
        self.starts = self.ends = self.shift = np.zeros(0, np.int64)  # ranges; from an address to a place in the tables
        self.writers = self.readers = np.zeros(0, np.int32)  # the CTA plus 1, of every two bytes; MANY, if several

    def allow(self, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        first, size = tensor.data_ptr(), tensor.element_size()
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        dense = extent == tensor.numel()
        key = (first, first + extent * size, None if dense else (*tensor.shape, *tensor.stride()))
        if key not in self._spans:
            self._spans[key] = None if dense else tensor
            self._stale = True

    def _build(self) -> None:
        """Join the spans that overlap: the sorted ranges, and which of their bytes are elements."""
        merged: list[tuple[int, int, list[Any]]] = []
        for (low, high, _), tensor in sorted(self._spans.items(), key=lambda item: item[0][:2]):
            start, end, parts = merged.pop() if merged and low < merged[-1][1] else (low, high, [])
            merged.append((start, max(end, high), [*parts, (low, high, tensor)]))
        before = list(zip(self.starts, self.shift, self.ends, strict=True))
        self.starts = np.array([start for start, _, _ in merged], dtype=np.int64)
        self.ends = np.array([end for _, end, _ in merged], dtype=np.int64)
        evens = self.starts & -2  # else a tensor of an odd number of bytes puts two elements of the next in one place
        offsets = np.concatenate([[0], np.cumsum((self.ends + 1 & -2) - evens)]).astype(np.int64)
        self.shift = offsets[:-1] - evens
        self._elements = None
        shifted = zip(merged, self.shift.tolist(), strict=True)
        parts = [(low + shift, high - low, tensor) for (_, _, m), shift in shifted for low, high, tensor in m]
        if any(tensor is not None for _, _, tensor in parts):
            self._elements = np.zeros(offsets[-1], dtype=np.bool_)
            for at, size, tensor in parts:
                _elements_of(tensor, self._elements[at : at + size])[...] = True
        size, kept = (int(offsets[-1]) >> 1) + 2, (self.writers, self.readers)
        self.writers, self.readers = np.zeros(size, np.int32), np.zeros(size, np.int32)
        for start, shift, end in before:
            k = int(np.searchsorted(self.starts, start, "right") - 1)
            if k >= 0 and end <= self.ends[k]:
                new, old, n = int(start + self.shift[k]) >> 1, int(start + shift) >> 1, int(end - start) >> 1
                for table, values in zip((self.writers, self.readers), kept, strict=True):
                    table[new : new + n] = values[old : old + n]
        self._stale = False

    def _search(self) -> bool:
        """Every tensor that is alive may be meant by an address in a table. Whether there are new ones."""
        before = len(self._spans)
        kinds = {kind for kind in _with_subclasses(torch.Tensor) if kind.__name__ not in _WITHOUT_MEMORY}
        for thing in [thing for thing in gc.get_objects() if type(thing) in kinds]:  # of half a million objects
            try:
                if thing.device.type == "cpu" and thing.layout == torch.strided:
                    self.allow(thing)
                    if thing.is_leaf and thing.grad is not None:
                        self.allow(thing.grad)
            except Exception:  # a tensor that is being made
                continue
        return len(self._spans) != before

    def _ranges(self, addresses: Array, size: int) -> tuple[Array, Array]:
        if self._stale:
            self._build()
        if not len(self.starts):
            return np.zeros(len(addresses), np.int64), np.zeros(len(addresses), np.bool_)
        low, high = int(addresses.min()), int(addresses.max())
        one = bisect.bisect_right(self.starts, low) - 1
        if one >= 0 and high + size <= self.ends[one]:
            return np.full(len(addresses), one), np.ones(len(addresses), np.bool_)
        n = np.searchsorted(self.starts, addresses, "right") - 1
        inside: Array = (n >= 0) & (addresses + size <= self.ends[n])
        return n, inside

    def check(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Of each address which range it lies in, and whether the access may be made."""
        n, inside = self._ranges(addresses, size)
        if self.searching and not inside.all():
            missing = addresses[~inside]
            if int(missing.min()) not in self._searched and self._search():
                n, inside = self._ranges(addresses, size)
            self._searched |= set(addresses[~inside].tolist()[:64])
        return n, inside

    def is_element(self, n: Array, addresses: Array, size: int) -> Array:
        """Whether all bytes belong to elements of tensors, and none to the gaps of a strided one."""
        if self._elements is None:
            return np.ones(len(addresses), np.bool_)
        at = addresses + self.shift[n]
        return np.all([self._elements[at + k] for k in range(size)], axis=0)

    def nearest(self, address: int) -> str:
        """What is at, or near, an address, in words."""
        if not len(self.starts):
            return "and no tensor is known"
        away = np.minimum(np.abs(self.ends - 1 - address), np.abs(self.starts - address))
        k = int(away.argmin())
        start, end = int(self.starts[k]), int(self.ends[k])
        return f"byte {address - start} of a tensor of {end - start} bytes"

    # Reading and writing. Addresses are int64, checked and aligned to the unit.

    def load(self, addresses: Array, unit: int) -> Array:
        return self._views[unit].take((addresses - BASE) >> log2(unit))

    def store(self, addresses: Array, values: Array, unit: int) -> None:
        self._views[unit][(addresses - BASE) >> log2(unit)] = values


_WITHOUT_MEMORY = ("FakeTensor", "FunctionalTensor")


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    subclasses: list[type] = kind.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _elements_of(tensor: torch.Tensor | None, where: Array) -> Array:
    """Of the bytes from a tensor's first to its last those of its elements; None: all of them."""
    if tensor is None:
        return where
    size = tensor.element_size()
    shape, strides = (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1)
    return np.lib.stride_tricks.as_strided(where, shape, strides)
