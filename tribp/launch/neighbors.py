"""Single steps away from launch settings, which the variants of every kind of them are made of."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .arch import Arch
from .matmul import Product

LONGEST = 256  # of a tile's sides, and of a descriptor's
RESULT = 128  # registers a thread may keep of a result: 128×256 in float32 with 8 warps


def halved_or_doubled(value: int, least: int, most: int) -> Iterator[int]:
    for other in (value // 2, value * 2):
        if least <= other <= most:
            yield other


def resized(settings: Any, field: str, least: int, most: int) -> Iterator[Any]:
    """The settings with half and with twice of a field."""
    for value in halved_or_doubled(getattr(settings, field), least, most):
        yield replace(settings, **{field: value})


def other_warps(settings: Any, arch: Arch) -> Iterator[Any]:
    """With half and twice the warps; a warpgroup's instructions, where there are any, need four."""
    if arch.backend != "interpreter":
        yield from resized(settings, "num_warps", 4 if arch.has_tma else 2, 8)


def other_stages(settings: Product, arch: Arch) -> Iterator[Any]:
    """With a stage less and one more; a loop that prefetches by hand has one."""
    if arch.backend != "interpreter" and not settings.prefetch:
        for stages in (settings.num_stages - 1, settings.num_stages + 1):
            if stages >= 1:
                yield replace(settings, num_stages=stages)


def other_registers(settings: Any, arch: Arch) -> Iterator[Any]:
    """With and without letting a thread take all registers there are."""
    if arch.backend == "cuda":
        yield replace(settings, max_registers=None if settings.max_registers else 255)


def registers(elements: int, dtype: str, num_warps: int, arch: Arch) -> int:
    """Registers a thread, for a result of so many elements in the accumulator's type; the interpreter has no end."""
    if arch.backend == "interpreter":
        return 0
    threads = num_warps * (64 if arch.backend == "hip" else 32)
    return elements * (2 if dtype == "float64" else 1) // threads
