"""wgmma.mma_async (PTX ISA 9.7.15) on arrays: its matrices in shared memory and registers, products, groups in flight.

    smem        one CTA's shared memory: bytes, whose index is the shared-memory address
    registers   of a warpgroup: uint32 (registers, 128), a column for each thread

Asynchrony comes in two ways. Early: an operation is done the moment it is issued. Late: as late as the program allows,
and until then its results are poison (NaN), so that a read without a wait is seen in the results; operands are read
when it is issued and again when it is done, and a difference is reported.
"""

import functools
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .arrays import Array
from .findings import RefusedError
from .formats import rounded, values_of

WARPGROUP = 128
SPANS = (16, 128, 64, 32)  # bytes, by the descriptor's swizzling mode; 16: none
K_OF = {"f16": 16, "bf16": 16, "tf32": 8}


class Proxy(Protocol):
    """What is known of the shared memory that asynchronous operations read and write, in chunks of 16 bytes."""

    def coming(self, chunks: Array, /) -> None:
        """A tensor load into them is issued."""

    def arrived(self, chunks: Array, /) -> None:
        """It is complete."""

    def reads(self, chunks: Array, /) -> str:
        """A wgmma or a tensor store reads them. What is wrong with that, or nothing."""


def swizzled(addresses: Array, span: int) -> Array:
    """CuTe's Swizzle<B, 4, 3> of byte addresses, span = 16·2^B: bits 4 and up are XORed with those from bit 7 on.

    The 16-byte chunk within `span` bytes is XORed with the number of the 128-byte line: of absolute addresses, which is
    why a descriptor may start inside a pattern (at the next k) and still find its elements.
    """
    return addresses ^ ((addresses >> 7 & (span // 16 - 1)) << 4)


# Matrices in shared memory.


@dataclass(frozen=True)
class Descriptor:
    """9.7.15.5.1.2.2, Matrix Descriptor Format: where a matrix lies in shared memory. Offsets in bytes."""

    start: int
    leading: int
    stride: int
    base_offset: int
    span: int  # of the swizzle; 16: none

    @classmethod
    def decode(cls, bits: int) -> "Descriptor":
        start, leading, stride = ((bits >> low & 0x3FFF) << 4 for low in (0, 16, 32))
        return cls(start, leading, stride, bits >> 49 & 7, SPANS[bits >> 62 & 3])

    def encode(self) -> int:
        fields = (self.start >> 4) | (self.leading >> 4) << 16 | (self.stride >> 4) << 32
        return fields | self.base_offset << 49 | SPANS.index(self.span) << 62

    def complaint(self) -> str:
        """What is wrong with it, if anything can be seen."""
        if self.base_offset:
            return f"wgmma descriptor with base offset {self.base_offset}: the executor does not know these"
        if self.span > 16 and (self.start >> 7) & (self.span // 16 - 1):
            return f"wgmma descriptor starts at {self.start:#x}, off the {8 * self.span}-byte pattern, base offset 0"
        return ""


@functools.lru_cache(maxsize=512)
def _chunk_offsets(
    rows: int, k_bytes: int, itemsize: int, leading: int, stride: int, span: int, mn_major: bool
) -> Array:
    """Byte offsets of a tile's 16-byte chunks before the swizzle (9.7.15.5.1.2.1.3, Canonical Layouts).

    K-major: (rows, chunks along k). MN-major: (chunks along m or n, k). With T = 16 / itemsize, from the ISA's table:

        K-major,  none       ((8, m), (T, 2k)) : ((1T, SBO), (1, LBO))
        K-major,  swizzled   ((8, m), (T, 2k)) : ((span/16 · T, SBO), (1, T))
        MN-major, none       ((T, 1, m), (8, k)) : ((1, T, SBO), (1T, LBO))
        MN-major, swizzled   ((T, span/16, m), (8, k)) : ((1, T, LBO), (span/16 · T, SBO))
    """
    if not mn_major:
        row, chunk = np.arange(rows)[:, None], np.arange(k_bytes // 16)[None, :]
        return row % 8 * span + row // 8 * stride + chunk * (leading if span == 16 else 16)
    chunk, k = np.arange(rows * itemsize // 16)[:, None], np.arange(k_bytes // itemsize)[None, :]
    if span == 16:
        return chunk * stride + k % 8 * 16 + k // 8 * leading
    per = span // 16
    return chunk % per * 16 + chunk // per * leading + k % 8 * span + k // 8 * stride


def tile_chunks(d: Descriptor, rows: int, k: int, itemsize: int, mn_major: bool) -> Array:
    """The shared-memory addresses of the 16-byte chunks of a rows × k operand (A: rows = m; B: rows = n)."""
    offsets = _chunk_offsets(rows, k * itemsize, itemsize, d.leading, d.stride, d.span, mn_major)
    return swizzled(d.start + offsets, d.span)


def gather_tile(smem: Array, d: Descriptor, rows: int, k: int, itemsize: int, mn_major: bool) -> Array:
    """The bits of a rows × k operand, as uint16 or uint32."""
    chunks = tile_chunks(d, rows, k, itemsize, mn_major)
    if (end := int(chunks.max()) + 16) > len(smem):
        raise RefusedError(f"wgmma reads shared memory up to {end:#x} of {len(smem):#x}: {d}")
    values = in_chunks(smem)[chunks >> 4].view({2: np.uint16, 4: np.uint32}[itemsize])  # (a, b, 16 bytes)
    return values.transpose(0, 2, 1).reshape(rows, k) if mn_major else values.reshape(rows, k)


def in_chunks(smem: Array) -> Array:
    return smem[: len(smem) // 16 * 16].reshape(-1, 16)


# Matrices in registers.


def a_from_registers(registers: Array, itemsize: int) -> Array:
    """The bits of A, 64 × k (9.7.15.5.1.1.1: k = 16 of 16 bits; 9.7.15.5.1.1.2: k = 8 of 32 bits).

    Thread 32w + 4g + t holds rows 16w + g and, 8 below, every second register; the upper two lie 8 (or 4) columns on:
        16 bits: register 2c + h has (16w + 8h + g, 8c + 2t + 0 | 1), the lower column in the lower half
        32 bits: register 2c + h has (16w + 8h + g, 4c + t)
    """
    if itemsize == 2:
        halves = np.ascontiguousarray(registers).view(np.uint16).reshape(2, 2, 4, 8, 4, 2)  # c h w g t e
        return halves.transpose(2, 1, 3, 0, 4, 5).reshape(64, 16)
    return registers.reshape(2, 2, 4, 8, 4).transpose(2, 1, 3, 0, 4).reshape(64, 8)  # c h w g t


def d_to_matrix(registers: Array, n: int, half: bool) -> Array:
    """The accumulator, 64 × n (9.7.15.5.1.1.1), of float32 or (half) float16, from its registers.

    Thread 32w + 4g + t: element 4j + 2h + e is (16w + 8h + g, 8j + 2t + e); of float16, two share a register.
    """
    if half:
        parts: Array = np.ascontiguousarray(registers).view(np.float16).reshape(n // 8, 2, 4, 8, 4, 2)  # j h w g t e
        return parts.transpose(2, 1, 3, 0, 4, 5).reshape(64, n)
    parts = np.ascontiguousarray(registers).view(np.float32).reshape(n // 8, 2, 2, 4, 8, 4)  # j h e w g t
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(64, n)


def d_to_registers(matrix: Array) -> Array:
    """The reverse: float32 (n/2, 128) or float16 (n/4, 128) as uint32."""
    n = matrix.shape[1]
    parts = matrix.reshape(4, 2, 8, n // 8, 4, 2)  # w h g j t e
    axes = (3, 1, 0, 2, 4, 5) if matrix.dtype == np.float16 else (3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(parts.transpose(axes)).view(np.uint32).reshape(-1, WARPGROUP)


# Products.


@dataclass(frozen=True)
class Wgmma:
    """One form of the instruction. Raises ValueError for a form that is not known."""

    n: int
    k: int
    d: str  # "f32" or "f16"
    kind: str  # of a and b

    FORM = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)$")

    @classmethod
    @functools.cache
    def parse(cls, opcode: str) -> "Wgmma":
        if not (match := cls.FORM.match(opcode)):
            raise ValueError(opcode)
        n, k = int(match[1]), int(match[2])
        d, a, b = match.groups()[2:]
        accumulates = d == "f32" or (d == "f16" and a == "f16")
        if K_OF.get(a) != k or a != b or n % 8 or not 8 <= n <= 256 or not accumulates:
            raise ValueError(opcode)
        return cls(n, k, d, a)

    @property
    def itemsize(self) -> int:
        return 32 // self.k

    def multiply(self, a: Array, b: Array, d: Array | None, sign: int = 1, truncate: bool = False) -> Array:
        """±A · B (+ D, a 64 × n matrix), from A's bits and those of B's transpose.

        Sums in float64, rounded once: hardware keeps fewer bits. truncate: towards zero, as it rounds sums of float32.
        """
        with np.errstate(all="ignore"):
            product = (values_of(a, self.kind) * sign) @ values_of(b, self.kind).T
            if d is not None:
                product += d
            return product.astype(np.float16) if self.d == "f16" else rounded(product, truncate)


@dataclass(eq=False)
class Product:
    """One wgmma of a program. Raises RefusedError for what the hardware does not do."""

    form: Wgmma
    dest: Hashable  # names of D's registers
    a: "int | Array"  # a descriptor, or A's registers
    b: int
    trans: tuple[int, int] = (0, 0)
    sign: int = 1
    where: str = ""  # in the program, for reports
    a_name: Any = None  # what A's registers are looked up by
    operands: list[Array] = field(init=False)  # their bits when it was issued
    result: Array = field(init=False)  # D, a matrix, after this one

    def read(self, smem: Array) -> list[Array]:
        """The bits of A (64 × k) and of B's transpose (n × k)."""
        k, itemsize = self.form.k, self.form.itemsize
        if any(self.trans) and itemsize != 2:
            raise RefusedError("wgmma: only 16-bit operands can be M- or N-major")
        return [
            a_from_registers(at, itemsize)
            if isinstance(at, np.ndarray)
            else gather_tile(smem, Descriptor.decode(at), rows, k, itemsize, bool(trans))
            for at, rows, trans in zip((self.a, self.b), (64, self.form.n), self.trans, strict=True)
        ]

    def in_memory(self) -> Iterator[tuple[str, Descriptor, Array]]:
        """Of the operands in shared memory: A or B, its descriptor, its chunks."""
        for name, at, rows, trans in zip("AB", (self.a, self.b), (64, self.form.n), self.trans, strict=True):
            if not isinstance(at, np.ndarray):
                descriptor = Descriptor.decode(at)
                chunks = tile_chunks(descriptor, rows, self.form.k, self.form.itemsize, bool(trans))
                yield name, descriptor, chunks.ravel()


class WgmmaQueue:
    """The wgmmas of one warpgroup that are under way: fence, commit_group, wait_group (9.7.15.6).

    Results reach the registers when `wait` says so. Those of a group are visible only after a wait for it, and until
    then neither the registers nor the shared memory that it reads may change.
    """

    def __init__(
        self, smem: Array, report: Callable[[str], object], proxy: Proxy | None = None,
        late: bool = True, truncate: bool = False,
    ) -> None:  # fmt: skip
        self.smem, self.report, self.proxy, self.late, self.truncate = smem, report, proxy, late, truncate
        self.open: list[Product] = []  # issued, not committed
        self.groups: list[list[Product]] = []
        self.accumulators: dict[Hashable, Array] = {}  # pending results of D registers, as matrices
        self.fenced = False

    def issue(self, product: Product, d: Array, accumulate: bool) -> Array:
        """wgmma.mma_async: what the D registers hold from now on."""
        if not self.fenced:
            self.report(f"{product.where}: wgmma without a wgmma.fence before it")
        for _, descriptor, _ in product.in_memory():
            if complaint := descriptor.complaint():
                self.report(f"{product.where}: {complaint}")
        product.operands = product.read(self.smem)
        self._ask_proxy(product, "reads")
        old, form = None, product.form
        if accumulate:
            old = self.accumulators.get(product.dest)
            old = d_to_matrix(d, form.n, form.d == "f16") if old is None else old
        a, b = product.operands
        product.result = form.multiply(a, b, old, product.sign, self.truncate)
        if not self.late:
            return d_to_registers(product.result)
        self.open.append(product)
        self.accumulators[product.dest] = product.result
        return np.full(d.shape, 0xFFFFFFFF, np.uint32)

    def _ask_proxy(self, product: Product, how: str) -> None:
        if self.proxy is None:
            return
        for _, _, chunks in product.in_memory():
            if what := self.proxy.reads(chunks):
                self.report(f"{product.where}: a wgmma {how} {what}")

    def fence(self) -> None:
        """wgmma.fence: orders the registers, and shared memory, before the next wgmma.

        Needed once before the first, and again when registers were changed: of A's the engines see to that.
        """
        self.fenced = True

    def commit(self) -> None:
        """wgmma.commit_group"""
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int, registers: Callable[[Any], Array]) -> list[tuple[Any, Array]]:
        """wgmma.wait_group: done are all groups but the latest `pending`. The D registers that have results now.

        registers: what registers hold now, by the name of a product's A.
        """
        done = self.groups[: max(0, len(self.groups) - pending)]
        self.groups = self.groups[len(done) :]
        finished = [product for group in done for product in group]
        for product in finished:
            self._check_operands(product, registers)
        still = {product.dest for group in [*self.groups, self.open] for product in group}
        results = {product.dest: product.result for product in finished if product.dest not in still}
        for dest in results:
            del self.accumulators[dest]
        return [(dest, d_to_registers(result)) for dest, result in results.items()]

    def _check_operands(self, product: Product, registers: Callable[[Any], Array]) -> None:
        self._ask_proxy(product, "reads until its wait_group")
        now = dict(zip("AB", zip(product.operands, product.read(self.smem), strict=True), strict=True))
        for name, descriptor, _ in product.in_memory():
            if not np.array_equal(*now[name]):
                what = f"operand {name} of a wgmma, at {descriptor.start:#x}, was overwritten before wait_group"
                self.report(f"{product.where}: {what}")
        if isinstance(product.a, np.ndarray) and not np.array_equal(registers(product.a_name), product.a):
            what = "the registers with operand A of a wgmma were changed before wait_group"
            self.report(f"{product.where}: {what}")

    def finish(self) -> None:
        """The program ends."""
        if self.open:
            self.report(f"{len(self.open)} wgmma were never committed")
        if any(self.groups):
            self.report(f"{sum(map(bool, self.groups))} wgmma groups were never waited for")
