"""Number formats: what an instruction's result is rounded to, and sums and products that are rounded once."""

import numpy as np

from .arrays import Array


def from_bf16(bits: Array) -> Array:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Array, cut: bool = False) -> Array:
    """Bits of the nearest, ties to even. cut: towards zero."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16 if cut else (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_f16(x: Array) -> Array:
    """Bits of the nearest, ties to even."""
    half = np.asarray(x).astype(np.float16)
    return np.where(np.isnan(half), np.uint16(0x7FFF), half.view(np.uint16)).astype(np.uint16)


def to_tf32(x: Array) -> Array:
    """Bits of the nearest, ties away from zero."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))


def flush(x: Array) -> Array:
    """float32: denormal numbers become zeros of their sign."""
    bits = np.asarray(x).view(np.uint32)
    return np.where(bits & 0x7F800000 == 0, bits & 0x80000000, bits).astype(np.uint32).view(np.float32)


def toward_zero(exact: Array, rounded: Array) -> Array:
    """`rounded` (float32) moved to the next number towards zero where it is farther from it than `exact` (float64)."""
    bits = rounded.view(np.int32)
    over = np.abs(rounded.astype(np.float64)) > np.abs(exact)
    return np.where(over, bits - 1, bits).astype(np.int32).view(np.float32)


def values_of(bits: Array, kind: str) -> Array:
    """float64. Tensor cores see 19 bits of a tf32 number: they cut it."""
    if kind == "bf16":
        return from_bf16(bits).astype(np.float64)
    if kind == "tf32":
        bits = bits & np.uint32(0xFFFFE000)
    dtype = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}[kind]
    return bits.view(dtype).astype(np.float64)


def rounded(exact: Array, truncate: bool) -> Array:
    """float64 sums as float32. truncate: as tensor cores do, which cut and do not round to nearest."""
    result = exact.astype(np.float32)
    return np.where(np.isfinite(result), toward_zero(exact, result), result) if truncate else result


def halves(bits: Array, kind: str) -> tuple[Array, Array]:
    """The lower and the upper half of packed registers, as float32."""
    parts = (bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)
    low, high = (from_bf16(h) if kind == "bf16x2" else h.view(np.float16).astype(np.float32) for h in parts)
    return low, high


def pack(low: Array, high: Array) -> Array:
    return np.asarray(low).astype(np.uint32) | np.asarray(high).astype(np.uint32) << 16


def saturate(x: Array) -> Array:
    """In 0 … 1; NaN becomes 0."""
    return np.clip(np.where(np.isnan(x), x.dtype.type(0), x), x.dtype.type(0), x.dtype.type(1))


def to_integer(x: Array, kind: type) -> Array:
    """Of whole numbers in float64; saturates, and NaN becomes 0."""
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    inside = np.clip(np.where(np.isnan(x), 0.0, x), float(low), float(high))
    over = inside >= float(high)  # float(high) may be high + 1
    return np.where(over, high, np.where(over, 0, inside).astype(kind)).astype(kind)


def _add_to_odd(a: Array, b: Array) -> Array:
    """float64 a + b, rounded to odd: what is then rounded to fewer bits is rounded once."""
    total, error = _two_sum(a, b)
    bits = np.asarray(total).view(np.int64)
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(total) & np.isfinite(error)
    away = (error > 0) == (total > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum, and what its rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The product, and what its rounding lost (Dekker)."""

    def split(x: Array) -> tuple[Array, Array]:
        high = x * 134217729.0
        high = high - (high - x)
        return high, x - high

    product, (ah, al), (bh, bl) = a * b, split(a), split(b)
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def fma32(a: Array, b: Array, c: Array) -> Array:
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    return _add_to_odd(np.asarray(product), np.asarray(c, dtype=np.float64)).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond's; where it would overflow on its way, a product that is rounded."""
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (a, b, c))
    high, low = _two_product(a, b)
    upper, rest = _two_sum(c, low)
    total, error = _two_sum(high, upper)
    result = total + _add_to_odd(np.asarray(rest), np.asarray(error))
    return np.where(np.isfinite(result), result, a * b + c)
