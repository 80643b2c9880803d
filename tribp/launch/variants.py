"""Launch settings worth trying in place of given ones: one step away, and valid by construction.

What is valid, a launch computes correctly, whatever it takes; `choose_…` beside it says why one is best. Where a
comment there says that something spills, it is left out here too. Order and number follow from the facts alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .arch import ITEMSIZE, Arch, cdiv, power_of_2
from .conv3x3 import WORKSPACE
from .linear_sigmoid import Pass
from .matmul import Product, Sum, by_mma_sync, fit, needs_registers, stages_in_memory, whole_splits
from .neighbors import (
    LONGEST,
    RESULT,
    halved_or_doubled,
    other_registers,
    other_stages,
    other_warps,
    registers,
    resized,
)
from .optim import MultiTensorConfig as Step
from .tuning import Question
from .variants_conv3x3 import AROUND as AROUND_CONV3X3


def variants(question: Question, settings: Any) -> list[Any]:
    """The settings around these that would answer the question as well, in the order in which to try them."""
    found = dict.fromkeys(AROUND[question.rule](settings, **question.facts))
    return [other for other in found if other != settings]


def around_forward(
    s: Product, m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, vec: int, tma: bool, along: bool = True
) -> Iterator[Product]:
    for other in _products(s, m, n, k, dtype, arch, vec, tma):
        yield from _settled(other, dtype, precision, arch, along)
    if s.tma:
        other = replace(s, persistent=0 if s.persistent else arch.processors)
        yield from _settled(other, dtype, precision, arch, along)


def around_dgrad(
    s: Product, m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, vec: int, tma: bool, may_fuse: bool,
    along: bool = False,
) -> Iterator[Product]:  # fmt: skip
    for other in [*_products(s, m, k, n, dtype, arch, vec, tma), *_other_fusion(s, may_fuse)]:
        yield from _settled(other, dtype, precision, arch, along)


def around_wgrad(
    s: Product, m: int, n: int, k: int, dtype: str, precision: str, arch: Arch,
    vec: int, tma: bool, may_fuse: bool, spare: int,
) -> Iterator[Product]:  # fmt: skip
    share = (8 if dtype == "float64" else 4) * n * k
    splits = resized(s, "splits", 1, max(1, spare // share))
    for other in [*splits, *_products(s, n, k, m, dtype, arch, vec, tma), *_other_fusion(s, may_fuse)]:
        whole = whole_splits(m, min(other.splits, cdiv(m, other.block_l)), other.block_l)
        yield from _settled(replace(other, splits=whole), dtype, precision, arch, False)


def _products(s: Product, i: int, j: int, l: int, dtype: str, arch: Arch, vec: int, tma: bool) -> Iterator[Product]:
    """What every product of this shape can vary."""
    yield from other_warps(s, arch)
    yield from other_stages(s, arch)
    yield from resized(s, "block_l", 16, fit(32 if s.prefetch else 128, l))
    yield from resized(s, "block_i", 16, fit(LONGEST, i))
    yield from resized(s, "block_j", 16, fit(LONGEST, j))
    if s.tma and vec * ITEMSIZE[dtype] >= 4:  # pointers to less would not be pipelined
        yield replace(s, tma=False, persistent=0, fuse_dz=False)
    elif tma and arch.has_tma and not s.tma:
        yield replace(s, tma=True, prefetch=False)
    yield from other_registers(s, arch)
    if i > s.block_i and j > s.block_j:  # a single row or column of tiles has one order
        yield from resized(s, "group", 1, 32)


def _other_fusion(s: Product, may_fuse: bool) -> Iterator[Product]:
    if may_fuse and s.tma:
        yield replace(s, fuse_dz=not s.fuse_dz)


def _settled(s: Product, dtype: str, precision: str, arch: Arch, along: bool) -> Iterator[Product]:
    """The settings with as many of their stages as shared memory holds, if registers hold their result."""
    if needs_registers(dtype, precision, arch, tma=s.tma, along=along):
        s = by_mma_sync(replace(s, fuse_dz=False), precision)
    tile = s.block_i * s.block_j
    if tile < 64 * 64:
        s = replace(s, num_warps=min(s.num_warps, 4))
    if s.fuse_dz and tile > 128 * 128:
        s = replace(s, block_l=min(s.block_l, 32))
    extra, output = s.block_i * s.block_l if s.fuse_dz else 0, tile if s.persistent else 0
    stages = min(s.num_stages, stages_in_memory(s, ITEMSIZE[dtype], arch, extra=extra, output=output))
    most = RESULT // 4 if s.prefetch else RESULT  # what is prefetched lies in registers as well
    if stages >= 1 and registers(tile, dtype, s.num_warps, arch) <= most:
        yield replace(s, num_stages=stages)


def around_pass(s: Pass, m: int, n: int, dtype: str, arch: Arch) -> Iterator[Pass]:
    def settled(other: Pass) -> Iterator[Pass]:
        rows = cdiv(max(other.rows, other.block_m), other.block_m) * other.block_m
        parts = cdiv(m, rows)
        few = parts <= 65_535 and parts * n * max(4, ITEMSIZE[dtype]) <= WORKSPACE
        if (few or rows >= s.rows) and other.block_m * other.block_n <= 8192:
            yield replace(other, rows=rows)

    others = [
        *resized(s, "rows", s.block_m, power_of_2(m)),
        *resized(s, "block_m", 1, power_of_2(m)),
        *resized(s, "block_n", 16, fit(1024, n)),
        *other_warps(s, arch),
    ]
    for other in others:
        yield from settled(other)


def around_sum(s: Sum, parts: int, length: int, arch: Arch, rows: int = 1, vec: int = 4) -> Iterator[Sum]:
    for parts_at_once in halved_or_doubled(s.block_parts, 1, min(128, power_of_2(parts))):
        yield replace(s, block_parts=parts_at_once)
    for block in halved_or_doubled(s.block, 32 * power_of_2(rows), 1024 * vec // s.block_parts):
        yield replace(s, block=block)
    if arch.backend != "interpreter":
        yield from resized(s, "num_warps", 1, 8)


def around_step(s: Step, elements: int, types: frozenset[str], strided: bool, arch: Arch) -> Iterator[Step]:
    yield from resized(s, "chunk_blocks", 1, 32)
    yield from resized(s, "block", 32 if arch.backend == "interpreter" else 256, 4096)
    yield from other_warps(s, arch)


AROUND: dict[str, Callable[..., Iterator[Any]]] = {
    "choose_forward": around_forward,
    "choose_dgrad": around_dgrad,
    "choose_wgrad": around_wgrad,
    "choose_pass": around_pass,
    "choose_sum": around_sum,
    "choose_step": around_step,
    **AROUND_CONV3X3,
}
