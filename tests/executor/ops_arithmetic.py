"""Arithmetic and conversions: tables from an opcode to what it does with arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arrays import FLOATS, TYPES, Array, extended, size_of
from .formats import (
    flush,
    fma32,
    fma64,
    from_bf16,
    halves,
    pack,
    saturate,
    to_bf16,
    to_f16,
    to_integer,
    to_tf32,
    toward_zero,
)
from .ops import Act, compute, op, reader, type_of
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine, Program

Function = Callable[..., Array]


def floating(i: Instruction, program: Program, function: Function, sources: int) -> Act:
    """`function` of float32 or float64 arrays, on any floating type, rounded and flushed as the opcode says."""
    kind = type_of(i)
    kinds = [kind] * sources
    if kind in ("f16x2", "bf16x2"):
        to = to_bf16 if kind == "bf16x2" else to_f16

        def packed(*bits: Array) -> Array:
            parts = [halves(np.asarray(b), kind) for b in bits]
            low, high = (to(function(*operands)) for operands in zip(*parts, strict=True))
            return pack(low, high)

        return compute(i, program, packed, kinds)
    if kind == "bf16":
        return compute(i, program, lambda *x: to_bf16(function(*map(from_bf16, x))), kinds)
    if kind == "f16":
        return compute(i, program, lambda *x: to_f16(function(*(y.astype(np.float32) for y in x))), kinds)
    ftz = i.has("ftz") and kind == "f32"
    if not ftz and not i.has("sat"):
        return compute(i, program, function, kinds)

    def act(*x: Array) -> Array:
        result = np.asarray(function(*map(flush, x) if ftz else x)).astype(TYPES[kind], copy=False)
        result = saturate(result) if i.has("sat") else result
        return flush(result) if ftz else result

    return compute(i, program, act, kinds)


ARITHMETIC: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": np.minimum,
    "max": np.maximum,
}


@op("add", "sub", "min", "max")
def _binary(i: Instruction, program: Program) -> Act:
    kind, function = type_of(i), ARITHMETIC[i.name]
    if kind not in FLOATS:
        if i.has("cc", "sat"):
            raise i.unknown()
        if kind in ("u16x2", "s16x2"):
            half = TYPES[kind[:3]]

            def packed(a: Array, b: Array) -> Array:
                sides = (np.ascontiguousarray(np.broadcast_to(x, np.shape(a + b))).view(half) for x in (a, b))
                return np.asarray(function(*sides)).view(np.uint32)

            return compute(i, program, packed, [kind, kind])
        return compute(i, program, function, [kind, kind])
    if i.name in ("min", "max") and not i.has("NaN"):
        function = np.fmax if i.name == "max" else np.fmin
    if i.has("xorsign"):  # of the sizes, with the product's sign: Triton's clamp to ±a on Hopper
        if not i.has("abs"):
            raise i.unknown()
        of_sizes = function

        def function(a: Array, b: Array) -> Array:
            return np.copysign(of_sizes(np.abs(a), np.abs(b)), np.copysign(1, a) * np.copysign(1, b))

    return floating(i, program, function, 2)


_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@op("mul", "mad", "fma")
def _mul(i: Instruction, program: Program) -> Act:
    """A product and, but for mul, a sum."""
    kind, adds = type_of(i), i.name != "mul"
    if kind in FLOATS:
        return floating(i, program, (fma64 if kind == "f64" else fma32) if adds else ARITHMETIC["mul"], 2 + adds)
    result = _WIDER[kind] if i.has("wide") else kind

    def product(a: Array, b: Array) -> Array:
        return _high(a, b, kind) if i.has("hi") else np.multiply(a, b, dtype=TYPES[result])

    if not adds:
        return compute(i, program, product, [kind, kind])
    return compute(i, program, lambda a, b, c: product(a, b) + c, [kind, kind, result])


def _high(a: Array, b: Array, kind: str) -> Array:
    """The upper half of a product."""
    if (size := size_of(kind)) < 8:
        wide = TYPES[f"{kind[0]}{16 * size}"]
        return (np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> 8 * size).astype(TYPES[kind])
    ua, ub = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = ua & low, ua >> half, ub & low, ub >> half
    middle = (al * bl >> half) + (ah * bl & low) + (al * bh & low)
    high = ah * bh + (ah * bl >> half) + (al * bh >> half) + (middle >> half)
    if kind[0] == "s":
        sign = np.uint64(63)
        high = high - np.where(ua >> sign == 1, ub, 0) - np.where(ub >> sign == 1, ua, 0)
    return high.astype(np.uint64).view(TYPES[kind])


def _quotient(a: Array, b: Array) -> Array:
    """Integer division that cuts towards zero; by zero, by one."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    if a.dtype.kind == "u":
        return a // safe
    size = np.abs(a) // np.abs(safe)
    return np.where((a < 0) != (safe < 0), -size, size).astype(a.dtype)


@op("div", "rem")
def _div(i: Instruction, program: Program) -> Act:
    kind = type_of(i)
    if kind in FLOATS:
        return floating(i, program, ARITHMETIC["div"], 2)
    target, *sources = i.operands
    reads = [reader(source, kind, program) for source in sources]

    def act(m: Machine, active: Array | None) -> None:
        a, b = (np.broadcast_to(read(m), m.T) for read in reads)
        zero = (b == 0) if active is None else (b == 0) & active
        m.report("division by zero", zero, m.every, i.opcode)
        quotient = _quotient(a, b)
        m.set(target, quotient if i.name == "div" else a - quotient * b, active)

    return act


@op("neg", "abs")
def _sign(i: Instruction, program: Program) -> Act:
    kind, negates = type_of(i), i.name == "neg"
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        dtype = TYPES["b32" if kind.endswith("x2") else "b16"]
        sign = dtype(0x80008000 if kind.endswith("x2") else 0x8000)
        bits = f"b{8 * dtype().itemsize}"
        return compute(i, program, lambda b: b ^ sign if negates else b & ~sign, [bits])
    function = np.negative if negates else np.abs
    return floating(i, program, function, 1) if kind in FLOATS else compute(i, program, function, [kind])


SPECIAL_FUNCTIONS: dict[str, Function] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@op(*SPECIAL_FUNCTIONS)
def _special(i: Instruction, program: Program) -> Act:
    """Rounded to nearest, where the hardware's are approximate; of float64 ones it gives the upper word alone."""
    function, kind = SPECIAL_FUNCTIONS[i.name], type_of(i)
    if kind == "f64" and i.has("approx"):
        upper = np.uint64(0xFFFFFFFF00000000)
        return compute(i, program, lambda x: (np.asarray(function(x)).view(np.uint64) & upper).view(np.float64), [kind])
    if kind == "f32" and not i.has("rn"):
        return floating(i, program, lambda x: np.asarray(function(x.astype(np.float64))).astype(np.float32), 1)
    return floating(i, program, function, 1)


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@op("cvt")
def _cvt(i: Instruction, program: Program) -> Act:
    kinds = [part for part in i.parts if part in TYPES]
    to, source = kinds[0], kinds[-1]
    if to in ("bf16x2", "f16x2"):
        if not i.has("rn") or i.has("relu"):
            raise i.unknown()
        narrow = to_bf16 if to == "bf16x2" else to_f16
        return compute(i, program, lambda high, low: pack(narrow(low), narrow(high)), ["f32", "f32"])
    if to == "tf32":
        if not i.has("rna"):
            raise i.unknown()
        return compute(i, program, to_tf32, ["f32"])
    cut, whole = i.has("rz"), next((_TO_WHOLE[part] for part in i.parts if part in _TO_WHOLE), None)
    if i.has("rm", "rp") or (cut and to not in ("bf16", "f32")) or (i.has("sat") and to in ("bf16", "f16")):
        raise i.unknown()

    def convert(x: Array) -> Array:
        x = from_bf16(x) if source == "bf16" else np.asarray(x)
        if i.has("ftz") and source == "f32":
            x = flush(x)
        if to in FLOATS:
            return rounded(whole(x) if whole is not None else x)
        if source in FLOATS:
            return to_integer((whole or np.trunc)(x.astype(np.float64)), TYPES[to])
        if i.has("sat"):
            limits = np.iinfo(TYPES[to])
            x = np.clip(x, limits.min, limits.max)
        return x.astype(TYPES[to])

    def rounded(x: Array) -> Array:
        if to == "bf16":
            return to_bf16(x.astype(np.float32), cut)
        if to == "f16":
            return to_f16(x.astype(np.float32) if source not in FLOATS else x)
        if cut:
            return toward_zero(x.astype(np.float64), x.astype(np.float32))
        result = x.astype(TYPES[to])
        if i.has("ftz") and to == "f32":
            result = flush(result)
        return saturate(result) if i.has("sat") else result

    width = i.operands[0].bits // 8
    return compute(i, program, lambda x: extended(np.asarray(convert(x)), to, width), [source])
