"""Tensor maps and tensor copies (TMA): cp.async.bulk.tensor (PTX ISA 9.7.9.27.1.2, tile mode) on arrays.

Early and late as in wgmma.py: loads are complete, and stores have read, at once or as late as the program allows.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .arrays import UNSIGNED, Array
from .findings import RefusedError
from .formats import to_tf32
from .mbarriers import Mbarrier, expect_bytes, passed
from .wgmma import Proxy, in_chunks, swizzled

POISON = 0xFF  # in every byte: a NaN as float16, bfloat16, float32 and float64
SWIZZLE_SPANS = (16, 32, 64, 128)  # CUtensorMapSwizzle: none, 32B, 64B, 128B
# CUtensorMapDataType: name, bytes
DATA_TYPES = (
    ("uint8", 1), ("uint16", 2), ("uint32", 4), ("int32", 4), ("uint64", 8), ("int64", 8), ("float16", 2),
    ("float32", 4), ("float64", 8), ("bfloat16", 2), ("float32_ftz", 4), ("tfloat32", 4), ("tfloat32_ftz", 4),
)  # fmt: skip
_NAN = {"float16": 0x7FFF, "bfloat16": 0x7FFF, "float64": 0x7FFFFFFFFFFFFFFF}  # others: 0x7FFFFFFF


class Rows(Protocol):
    """Global memory: rows of the same number of bytes at these addresses."""

    def gather(self, addresses: Array, nbytes: int, /) -> Array: ...
    def scatter(self, addresses: Array, rows: Array, /) -> None: ...


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled is told. Dimensions from the innermost on, strides in bytes.

    Raises RefusedError for what that function refuses.
    """

    address: int
    data_type: int  # CUtensorMapDataType
    dims: tuple[int, ...]
    strides: tuple[int, ...]  # of all dimensions but the innermost
    box: tuple[int, ...]
    swizzle: int  # CUtensorMapSwizzle
    nan_fill: bool = False

    def __post_init__(self) -> None:
        inner = self.row_bytes
        rules = [
            (1 <= self.rank <= 5 and len(self.strides) == self.rank - 1 and len(self.box) == self.rank, "its rank"),
            (self.address % 16 == 0, f"base address {self.address:#x} is no multiple of 16"),
            (all(0 < dim <= 1 << 32 for dim in self.dims), f"a dimension of {self.dims} is not in 1 … 2^32"),
            (all(s % 16 == 0 for s in self.strides), f"a stride of {self.strides} bytes is no multiple of 16"),
            (all(0 <= s < 1 << 40 for s in self.strides), f"a stride of {self.strides} bytes is not below 2^40"),
            (all(0 < size <= 256 for size in self.box), f"a box dimension of {self.box} is not in 1 … 256"),
            (inner % 16 == 0, f"the box's inner dimension has {inner} bytes, no multiple of 16"),
            (self.swizzle == 0 or inner <= self.span, f"the box's inner {inner} bytes exceed a swizzle of {self.span}"),
        ]
        if broken := [what for holds, what in rules if not holds]:
            raise RefusedError(f"tensor map of {self.dims}: {'; '.join(broken)}")

    @property
    def type_name(self) -> str:
        return DATA_TYPES[self.data_type][0]

    @property
    def itemsize(self) -> int:
        return DATA_TYPES[self.data_type][1]

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def span(self) -> int:
        return SWIZZLE_SPANS[self.swizzle]

    @property
    def row_bytes(self) -> int:
        """Of a box's row."""
        return self.box[0] * self.itemsize

    @property
    def box_bytes(self) -> int:
        """What a load counts on its barrier, whatever lies outside the tensor."""
        return int(np.prod(self.box)) * self.itemsize

    def chunks(self, address: int) -> Array:
        """Where a box's 16-byte chunks lie in shared memory: dense, the innermost dimension first, then swizzled."""
        return swizzled(address + np.arange(0, self.box_bytes, 16, dtype=np.int64), self.span)

    def inside(self, coordinates: Sequence[int]) -> tuple[Array, Array, int, int]:
        """Which rows of a box are inside the tensor, their global addresses, which bytes of each row are (from, to).

        An address is that of the first byte inside. Coordinates are signed; what lies outside is zero, or not written.
        """
        first, *others = (c - (1 << 32) if c >= 1 << 31 else c for c in coordinates)
        at = _box_rows(self.box) + np.array(others, np.int64).reshape(-1, 1)
        within = np.all((at >= 0) & (at < np.array(self.dims[1:], np.int64).reshape(-1, 1)), axis=0)
        low = min(max(0, -first), self.box[0])
        high = max(low, min(self.box[0], self.dims[0] - first))
        if low == high:
            within = np.zeros_like(within)
        strides = np.array(self.strides, np.int64).reshape(-1, 1)
        rows = self.address + (at * strides).sum(0) + (first + low) * self.itemsize
        return within, rows[within], low * self.itemsize, high * self.itemsize

    def read(self, coordinates: Sequence[int], memory: Rows) -> Array:
        """The bytes of a box in the order of shared memory, before the swizzle: uint8 (rows, bytes of a row)."""
        within, addresses, low, high = self.inside(coordinates)
        rows = np.zeros((len(within), self.row_bytes), np.uint8)
        if self.nan_fill:
            rows.view(UNSIGNED[self.itemsize])[:] = _NAN.get(self.type_name, 0x7FFFFFFF)
        if len(addresses):
            rows[within, low:high] = memory.gather(addresses, high - low)
        if self.type_name.startswith("tfloat32"):
            rows = to_tf32(rows.view(np.float32)).view(np.uint8)
        return rows

    def write(self, coordinates: Sequence[int], memory: Rows, rows: Array) -> None:
        """The reverse; what lies outside the tensor is dropped."""
        within, addresses, low, high = self.inside(coordinates)
        if len(addresses):
            memory.scatter(addresses, np.ascontiguousarray(rows[within, low:high]))


@functools.lru_cache(maxsize=512)
def _box_rows(box: tuple[int, ...]) -> Array:
    """Of each row of a box, in the order of shared memory, its coordinates in all dimensions but the innermost."""
    outer = box[1:]
    if not outer:
        return np.zeros((0, 1), np.int64)
    grid = np.indices(outer[::-1]).reshape(len(outer), -1)[::-1]  # the first outer dimension moves fastest
    return np.ascontiguousarray(grid.astype(np.int64))


@dataclass(eq=False)
class _Load:
    tensor: TensorMap
    coordinates: tuple[int, ...]
    chunks: Array
    barrier: int


@dataclass(eq=False)
class _Store:
    tensor: TensorMap
    coordinates: tuple[int, ...]
    chunks: Array
    source: Array
    where: str
    read: bool = False


class TensorCopies:
    """The tensor copies of one CTA: loads that complete on an mbarrier, stores in each thread's bulk groups."""

    def __init__(
        self, smem: Array, memory: Rows, report: Callable[[str], object], proxy: Proxy | None = None, late: bool = True
    ) -> None:
        self.smem, self.memory, self.report, self.proxy, self.late = smem, memory, report, proxy, late
        self.loads: list[_Load] = []  # under way
        self.asked: set[int] = set()  # barriers that were polled in vain
        self.open: dict[int, list[_Store]] = {}  # by thread: stores that are not in a group yet
        self.groups: dict[int, list[list[_Store]]] = {}

    def _chunks(self, tensor: TensorMap, coordinates: Sequence[int], address: int, what: str) -> Array:
        if len(coordinates) != tensor.rank:
            raise RefusedError(f"{what} with {len(coordinates)} coordinates for a tensor map of rank {tensor.rank}")
        if address % 128:
            raise RefusedError(f"{what} at shared address {address:#x}, no multiple of 128")
        if address + tensor.box_bytes > len(self.smem):
            raise RefusedError(f"{what} of {tensor.box_bytes} bytes at {address:#x} passes the end of shared memory")
        return tensor.chunks(address)

    # Loads: cp.async.bulk.tensor.*.shared::cta.global.mbarrier::complete_tx::bytes

    def load(self, tensor: TensorMap, coordinates: Sequence[int], to: int, barrier: int, where: str = "") -> None:
        Mbarrier.at(self.smem, barrier)  # there must be one
        chunks = self._chunks(tensor, coordinates, to, "a tensor load")
        load = _Load(tensor, tuple(coordinates), chunks, barrier)
        if self.proxy is not None:
            self.proxy.coming(chunks)
        if not self.late:
            self._complete(load)
            return
        if any(np.intersect1d(other.chunks, chunks).size for other in self.loads):
            self.report(f"{where}: two tensor loads into {to:#x} are under way at once")
        if any(np.intersect1d(store.chunks, chunks).size for store in self._unread()):
            self.report(f"{where}: a tensor load overwrites what a tensor store still reads")
        in_chunks(self.smem)[chunks >> 4] = POISON
        self.loads.append(load)

    def _complete(self, load: _Load) -> None:
        rows = load.tensor.read(load.coordinates, self.memory)
        in_chunks(self.smem)[load.chunks >> 4] = rows.reshape(-1, 16)
        if self.proxy is not None:
            self.proxy.arrived(load.chunks)
        expect_bytes(self.smem, load.barrier, -load.tensor.box_bytes)

    def try_wait(self, barrier: int, parity: int) -> bool:
        """mbarrier.try_wait.parity. As late as can be: loads arrive when somebody asks for them the second time."""
        if passed(self.smem, barrier, parity):
            return True
        if self.late and barrier not in self.asked:
            self.asked.add(barrier)
            return False
        self.asked.discard(barrier)
        ready = [load for load in self.loads if load.barrier == barrier]
        self.loads = [load for load in self.loads if load.barrier != barrier]
        for load in ready:
            self._complete(load)
        return bool(ready) and passed(self.smem, barrier, parity)

    # Stores: cp.async.bulk.tensor.*.global.shared::cta.bulk_group

    def store(self, thread: int, tensor: TensorMap, coordinates: Sequence[int], source: int, where: str = "") -> None:
        chunks = self._chunks(tensor, coordinates, source, "a tensor store")
        if self.proxy is not None and (what := self.proxy.reads(chunks)):
            self.report(f"{where}: a tensor store reads {what}")
        store = _Store(tensor, tuple(coordinates), chunks, in_chunks(self.smem)[chunks >> 4], where)
        if not self.late:
            self._write(store)
        self.open.setdefault(thread, []).append(store)

    def _write(self, store: _Store) -> None:
        store.tensor.write(store.coordinates, self.memory, store.source.reshape(-1, store.tensor.row_bytes))

    def _unread(self) -> list[_Store]:
        groups = [*(group for mine in self.groups.values() for group in mine), *self.open.values()]
        return [store for group in groups for store in group if not store.read]

    def commit(self, thread: int) -> None:
        """cp.async.bulk.commit_group, of one thread."""
        self.groups.setdefault(thread, []).append(self.open.pop(thread, []))

    def wait(self, thread: int, pending: int, read: bool) -> None:
        """cp.async.bulk.wait_group(.read): all groups of a thread but the latest have read (and written)."""
        groups = self.groups.get(thread, [])
        done = groups[: max(0, len(groups) - pending)]
        for store in (store for group in done for store in group):
            self._finish_reading(store)
        if not read:
            self.groups[thread] = groups[len(done) :]

    def _finish_reading(self, store: _Store) -> None:
        if not store.read and self.late:
            if not np.array_equal(in_chunks(self.smem)[store.chunks >> 4], store.source):
                self.report(f"{store.where}: the source of a tensor store was overwritten before wait_group.read")
            self._write(store)
        store.read = True

    def finish(self) -> None:
        """The CTA ends: its shared memory goes to the next one."""
        if self.loads:
            self.report(f"{len(self.loads)} tensor loads were never waited for")
        if any(self.open.values()):
            self.report("tensor stores were never committed")
        if unread := self._unread():
            self.report(f"{len(unread)} tensor stores were never waited for: shared memory may be gone when they read")
        for store in unread:
            self._finish_reading(store)
