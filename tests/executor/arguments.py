"""A launch's arguments as the bytes of the kernel's parameters. What differs between Triton's versions is here.

Triton 3.5 to 3.9: from 3.7 on a descriptor that is taken apart has a flag more (round_f32_to_tf32). On sm_90 it is one
tensor map, made as the kernel's metadata say; before, the kernel computes addresses, and has no such metadata. Behind
the arguments stand two pointers to scratch memory, which no kernel here has. Opcodes: whatever a version emits is in
the tables of ops_*.py, and an unknown one is an error that names it.
"""

import struct
from collections.abc import Iterator
from typing import Any

import torch

from .findings import RefusedError
from .parse import Kernel
from .tensor_copies import DATA_TYPES, TensorMap

SCRATCH = 2  # pointers behind the arguments
# triton/backends/nvidia/driver.py: TMA_DTYPE_DEVICE_TO_HOST, TMA_TF32
_DEVICE_TO_HOST = {8: 10, 9: 8, 10: 9}
_TF32 = 11
_FORMATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "fp16": "<e"}


def values_of(compiled: Any, arguments: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """(type, value) of each parameter, in order. compiled: Triton's CompiledKernel.

    Of type "map": a TensorMap and its tensor.
    """
    maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or [])
    kinds = compiled.src.signature.values()
    return [value for kind, argument in zip(kinds, arguments, strict=True) for value in _flatten(kind, argument, maps)]


def _flatten(kind: Any, argument: Any, maps: Iterator[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    if isinstance(kind, tuple):
        for inner, item in zip(kind, argument, strict=True):
            yield from _flatten(inner, item, maps)
    elif kind.startswith("tensordesc"):
        if (meta := next(maps, None)) is not None:
            yield "map", (tensor_map(argument, meta), argument.base)
        else:
            yield "*", argument.base
            yield from (("i64", n) for n in (*argument.shape, *argument.strides))
            yield "i1", argument.padding == "nan"
            if hasattr(argument, "round_f32_to_tf32"):
                yield "i1", argument.round_f32_to_tf32
        yield from (("i32", n) for n in argument.shape)
        yield from (("i64", n) for n in argument.strides)
    elif kind != "constexpr":
        yield kind, argument


def tensor_map(descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    """The map that Triton's driver makes of a host TensorDescriptor (driver.py, make_tensordesc_arg; driver.c).

    meta: swizzle, elem_size, elem_type, block_size (the box, outermost first: a block wider than the swizzle's span
    takes several), fp4_padded. Raises RefusedError for what cuTensorMapEncodeTiled refuses.
    """
    shape, strides, itemsize = list(descriptor.shape), list(descriptor.strides), meta["elem_size"]
    if meta["fp4_padded"] or meta.get("is_im2col", False) or strides[-1] != 1:
        raise RefusedError(f"a tensor map of strides {strides} by {meta}: the executor does not know these")
    kind = _DEVICE_TO_HOST.get(meta["elem_type"], meta["elem_type"])
    if getattr(descriptor, "round_f32_to_tf32", False):
        kind = _TF32
    if DATA_TYPES[kind][1] != itemsize:
        raise RefusedError(f"a tensor map of {itemsize} bytes an element of type {DATA_TYPES[kind][0]}")
    return TensorMap(
        address=descriptor.base.data_ptr(),
        data_type=kind,
        dims=tuple(int(size) for size in reversed(shape)),
        strides=tuple(int(s) * itemsize for s in reversed(strides[:-1])),
        box=tuple(reversed(meta["block_size"])),
        swizzle=meta["swizzle"],
        nan_fill=descriptor.padding == "nan",
    )


def packed(kernel: Kernel, values: list[tuple[str, Any]]) -> tuple[bytes, dict[int, TensorMap]]:
    """The parameters' bytes, scratch memory's 0, and the tensor maps by their offset."""
    if len(values) + SCRATCH != len(kernel.params):
        raise RuntimeError(f"{kernel.name}: {len(values)} values for {len(kernel.params)} parameters")
    room = bytearray(max((param.offset + param.size for param in kernel.params), default=0))
    maps = {}
    for param, (kind, value) in zip(kernel.params, values, strict=False):
        if kind == "map":
            maps[param.offset] = value[0]
        else:
            room[param.offset : param.offset + param.size] = _bytes(kind, value, param.size)
    return bytes(room), maps


def _bytes(kind: str, value: Any, size: int) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if kind in _FORMATS:
        return struct.pack(_FORMATS[kind], value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
