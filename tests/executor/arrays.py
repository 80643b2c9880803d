"""PTX's types as numpy's."""

from typing import Any

import numpy as np

Array = Any  # np.ndarray, of the type and shape that the place says: numpy's own annotations know neither
TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32, "u16x2": np.uint32, "s16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


def size_of(kind: str) -> int:
    """Bytes."""
    return int(np.dtype(TYPES[kind]).itemsize)


def bits_of(kind: str) -> str:
    """The type of as many bits, and no meaning."""
    return kind if kind == "pred" else f"b{8 * size_of(kind)}"


def extended(values: Array, kind: str, size: int) -> Array:
    """The values in a register of `size` bytes, by their sign if the type has one."""
    if values.dtype.itemsize >= size:
        return values
    return values.astype((SIGNED if kind[0] == "s" else UNSIGNED)[size])


def log2(unit: int) -> int:
    return unit.bit_length() - 1


def distinct(values: Array) -> Array:
    """np.unique, which numpy 2.3 made ten times as slow as sorting."""
    values = np.sort(values)
    first = np.empty(len(values), np.bool_)
    first[:1] = True
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]
