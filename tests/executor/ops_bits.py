"""Comparisons, choices and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arrays import FLOATS, TYPES, UNSIGNED, Array, bits_of, size_of
from .formats import flush, from_bf16, halves
from .ops import Act, compute, op, reader, type_of
from .parse import Imm, Instruction, Pair

if TYPE_CHECKING:
    from .machine import Machine, Program

COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    """Of floating values, "…u" holds for NaN too, and the others do not."""
    if kind not in FLOATS:
        return COMPARE[name]
    unordered = name == "nan" or (name.endswith("u") and name[:-1] in COMPARE)
    inner = None if name in ("num", "nan") else COMPARE[name[:-1] if unordered else name]

    def compare(a: Array, b: Array) -> Array:
        if kind == "bf16":
            a, b = from_bf16(a), from_bf16(b)
        missing = np.isnan(a) | np.isnan(b)
        if inner is None:
            return missing if unordered else ~missing
        return inner(a, b) | missing if unordered else inner(a, b) & ~missing

    return compare


@op("setp")
def _setp(i: Instruction, program: Program) -> Act:
    kind = type_of(i)
    packed = kind in ("f16x2", "bf16x2")
    compare = comparison(i.parts[1], "f32" if packed else kind)
    joined = next((BOOLEAN[part] for part in i.parts[2:] if part in BOOLEAN), None)
    target, a, b, *others = i.operands
    x, y = reader(a, kind, program), reader(b, kind, program)
    z = reader(others[0], "pred", program) if others else None
    if isinstance(target, Pair) != packed or (packed and i.has("ftz")) or (z is None) != (joined is None):
        raise i.unknown()
    targets = [target.first, target.second] if isinstance(target, Pair) else [target]

    def act(m: Machine, active: Array | None) -> None:
        values = [x(m), y(m)]
        if i.has("ftz"):
            values = [flush(v) for v in values]
        sides = zip(*(halves(np.asarray(v), kind) if packed else [v] for v in values), strict=True)
        third = None if z is None else z(m)
        for each, side in zip(targets, sides, strict=True):
            result = np.asarray(compare(*side))
            m.set(each, result if third is None or joined is None else joined(result, third), active)

    return act


@op("selp")
def _selp(i: Instruction, program: Program) -> Act:
    bits = bits_of(type_of(i))
    return compute(i, program, lambda a, b, p: np.where(p, a, b), [bits, bits, "pred"])


@op("slct")
def _slct(i: Instruction, program: Program) -> Act:
    bits = bits_of(type_of(i, -2))
    return compute(i, program, lambda a, b, c: np.where(c >= 0, a, b), [bits, bits, type_of(i)])


@op("and", "or", "xor")
def _logic(i: Instruction, program: Program) -> Act:
    kind = type_of(i)
    return compute(i, program, (BOOLEAN if kind == "pred" else BITWISE)[i.name], [kind, kind])


@op("not", "cnot")
def _not(i: Instruction, program: Program) -> Act:
    kind = type_of(i)
    if i.name == "cnot":
        return compute(i, program, lambda a: (a == 0).astype(TYPES[kind]), [kind])
    return compute(i, program, np.logical_not if kind == "pred" else np.invert, [kind])


@op("shl", "shr")
def _shift(i: Instruction, program: Program) -> Act:
    """Shifts by the width and more leave zeros, or signs."""
    kind = type_of(i)
    dtype, bits = np.dtype(TYPES[kind]), 8 * size_of(kind)
    shift = np.left_shift if i.name == "shl" else np.right_shift
    keeps_sign = i.name == "shr" and dtype.kind == "i"

    def act(a: Array, by: Array) -> Array:
        result = shift(a, np.minimum(by, bits - 1).astype(dtype))
        return result if keeps_sign else np.where(by >= bits, dtype.type(0), result)

    return compute(i, program, act, [kind, "u32"])


@op("shf")
def _funnel(i: Instruction, program: Program) -> Act:
    left, wrap = i.has("l"), i.has("wrap")

    def act(a: Array, b: Array, by: Array) -> Array:
        by = (by & 31 if wrap else np.minimum(by, 32)).astype(np.uint64)
        both = _joined(a, b)
        return (both << by >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return compute(i, program, act, ["u32", "u32", "u32"])


def _joined(low: Array, high: Array) -> Array:
    return np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)


def _ones(length: Array, bits: int) -> Array:
    """So many of the lowest bits."""
    unsigned = UNSIGNED[bits // 8]
    some = (unsigned(1) << np.minimum(length, bits - 1).astype(unsigned)) - unsigned(1)
    return np.where(length >= bits, ~unsigned(0), some).astype(unsigned)


@op("bfe")
def _bfe(i: Instruction, program: Program) -> Act:
    kind = type_of(i)
    bits, unsigned = 8 * size_of(kind), UNSIGNED[size_of(kind)]

    def act(a: Array, start: Array, length: Array) -> Array:
        start, length = np.asarray(start) & 0xFF, np.asarray(length) & 0xFF
        raw, mask = np.asarray(a).view(unsigned), _ones(length, bits)
        shifted = np.where(start < bits, raw >> np.minimum(start, bits - 1).astype(unsigned), unsigned(0))
        value = shifted.astype(unsigned) & mask
        if kind[0] == "s":
            top = np.minimum(start + length.astype(np.int64) - 1, bits - 1).astype(unsigned)
            negative = (raw >> top & unsigned(1)).astype(bool) & (length > 0)
            value = np.where(negative, value | ~mask, value).astype(unsigned)
        return value.view(TYPES[kind])

    return compute(i, program, act, [kind, "u32", "u32"])


@op("bfi")
def _bfi(i: Instruction, program: Program) -> Act:
    kind = type_of(i)
    bits, unsigned = 8 * size_of(kind), UNSIGNED[size_of(kind)]

    def act(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = np.asarray(start) & 0xFF, np.asarray(length) & 0xFF
        at = np.minimum(start, bits - 1).astype(unsigned)
        mask = np.where(start < bits, _ones(length, bits) << at, unsigned(0)).astype(unsigned)
        return (b & ~mask) | (a << at & mask)

    return compute(i, program, act, [kind, kind, "u32", "u32"])


@op("prmt")
def _prmt(i: Instruction, program: Program) -> Act:
    """Four bytes, each chosen by a nibble from the eight of two registers, or that byte's sign."""
    if i.parts[1:] != ["b32"]:
        raise i.unknown()

    def act(a: Array, b: Array, choice: Array) -> Array:
        both = _joined(a, b)
        result = np.zeros(np.broadcast(a, b, choice).shape, np.uint32)
        for n in range(4):
            nibble = np.asarray(choice) >> np.uint32(4 * n)
            place = ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            byte = (both >> place & np.uint64(0xFF)).astype(np.uint32)
            byte = np.where(nibble & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(0xFF), byte).astype(np.uint32)
            result |= byte << np.uint32(8 * n)
        return result

    return compute(i, program, act, ["b32", "b32", "b32"])


@op("lop3")
def _lop3(i: Instruction, program: Program) -> Act:
    table = i.operands[-1]
    if not isinstance(table, Imm) or isinstance(i.operands[0], Pair):
        raise i.unknown()

    def act(a: Array, b: Array, c: Array, _: Array) -> Array:
        result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for n in range(8):
            if table.value >> n & 1:
                result |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return result

    return compute(i, program, act, ["b32"] * 4)


@op("popc", "clz", "brev", "bfind")
def _count(i: Instruction, program: Program) -> Act:
    kind = type_of(i)
    bits = 8 * size_of(kind)

    def ones(x: Array) -> Array:
        return np.bitwise_count(x).astype(np.uint32)

    def leading_zeros(x: Array) -> Array:
        n = np.asarray(x).astype(np.uint64)
        for s in (1, 2, 4, 8, 16, 32):
            n = n | n >> np.uint64(s)
        return (bits - ones(n)).astype(np.uint32)

    def reverse(x: Array) -> Array:
        x = np.asarray(x)
        result = np.zeros_like(x)
        for n in range(bits):
            result |= (x >> x.dtype.type(n) & x.dtype.type(1)) << x.dtype.type(bits - 1 - n)
        return result

    def highest(x: Array) -> Array:
        x = np.where(x < 0, ~x, x) if kind[0] == "s" else np.asarray(x)
        place = np.int64(bits - 1) - leading_zeros(x.view(UNSIGNED[bits // 8])).astype(np.int64)
        return place.astype(np.int32).view(np.uint32)

    function = {"popc": ones, "clz": leading_zeros, "brev": reverse, "bfind": highest}[i.name]
    return compute(i, program, function, [kind])
