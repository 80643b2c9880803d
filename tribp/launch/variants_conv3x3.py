"""The convolution's part of `variants.py`. A box has as many pixels as the tile's side that stands for it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

from .arch import ITEMSIZE, Arch, cdiv, power_of_2
from .conv3x3 import (
    WORKSPACE,
    Box,
    Convolution,
    Relayout,
    choose_box,
    choose_line,
    even_splits,
    pairs_rows,
    small_stages,
    two_rows,
    unrounded,
)
from .matmul import by_mma_sync, fit, needs_registers, stages_in_memory
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

DEEPEST = 192  # registers a thread may keep of wgrad's results: three of 128×128 with 8 warps


def other_boxes(s: Convolution, n: int, p: int, q: int) -> Iterator[Convolution]:
    """With boxes half as long on one side and twice on another that need at most a quarter more of them."""
    for shrunk in range(3):
        for grown in (2, 1, 0):
            if grown != shrunk and s.box[shrunk] > 1:
                sides = list(s.box)
                sides[shrunk], sides[grown] = sides[shrunk] // 2, sides[grown] * 2
                other = replace(s, box=(sides[0], sides[1], sides[2]))
                if max(sides) <= LONGEST and 4 * other.boxes(n, p, q) <= 5 * s.boxes(n, p, q):
                    yield other


def boxed(s: Convolution, pixels: str, n: int, p: int, q: int, *, wide: bool) -> Convolution:
    """The settings with a box for the side `pixels`, the one they have if it is as large."""
    size = getattr(s, pixels)
    box = choose_box(size, n, p, q, wide=wide, one_row=s.rows > 1)
    return s if prod(s.box) == size else replace(s, box=box)


def around_conv(
    s: Convolution, n: int, p: int, q: int, j: int, l: int, bundles: int, bundle: int, classes: int,
    dtype: str, precision: str, arch: Arch, vec: int, tma: bool, along: bool, whole: bool, wide: bool,
    stepped: bool,
) -> Iterator[Convolution]:  # fmt: skip
    from_registers = arch.backend == "cuda" and not arch.has_tma
    bundled = bundle > 1 and arch.backend != "interpreter"  # a tile has a bundle's columns and sum, and no more
    deepest = 32 if from_registers else s.block_l if bundled else 128
    largest = LONGEST * LONGEST
    if from_registers:
        largest = 128 * 128 if ITEMSIZE[dtype] == 2 else 128 * 64 // classes

    def settled(s: Convolution) -> Iterator[Convolution]:
        if needs_registers(dtype, precision, arch, tma=s.tma, along=along):
            s = by_mma_sync(s, precision)
        s = boxed(s, "block_i", n, p, q, wide=wide)
        tile = s.block_i * s.block_j
        if tile < 64 * 64:
            s = replace(s, num_warps=min(s.num_warps, 4))
        if not s.tma and s.num_warps > 4:
            s = replace(s, flat=False)  # computed wrong results elsewhere: see `conv3x3.convolve`
        steps_past = s.tma and whole and l % s.block_l
        columns = LONGEST if s.tma and not wide else 128
        beside = ((s.rows + 1) * s.block_i + 2 * s.block_j) * s.block_l if s.rows > 1 else 0
        stages = min(s.num_stages, stages_in_memory(s, ITEMSIZE[dtype], arch, extra=beside))
        in_registers = registers(s.rows * tile, dtype, s.num_warps, arch) <= RESULT and tile <= largest
        able = s.rows == 1 or (pairs_rows(s, l, dtype, arch, whole=whole, stepped=stepped) and s.box[1] == 1)
        if stages >= 1 and in_registers and s.block_j <= columns and not steps_past and able:
            yield replace(s, num_stages=stages)

    others = [
        *other_warps(s, arch),
        *other_stages(s, arch),
        *resized(s, "block_l", 16, fit(deepest, l)),
        *resized(s, "block_i", 16, s.block_i if bundled else fit(LONGEST, n * p * q)),
        *([] if bundled else resized(s, "block_j", 16, fit(LONGEST, j))),
        *other_boxes(s, n, p, q),
        *([replace(s, flat=not s.flat)] if s.rows == 1 and (s.tma or s.num_warps <= 4) else []),
        *other_registers(s, arch),
        *(resized(s, "group", 1, 32) if j > s.block_j or bundles > 1 else []),
    ]
    if s.tma and bundle == 1:
        others.append(replace(two_rows(n, q, j, wide, arch), reason=s.reason) if s.rows == 1 else replace(s, rows=1))
    if s.tma and vec * ITEMSIZE[dtype] >= 4:
        others.append(replace(s, tma=False, flat=s.num_warps <= 4, max_registers=unrounded(arch)))
    elif tma and arch.has_tma and not s.tma:
        others.append(replace(s, tma=True, flat=True))
    for other in others:
        yield from settled(other)


def around_conv_wgrad(
    s: Convolution, n: int, p: int, q: int, o: int, c: int, bundles: int, bundle: int,
    dtype: str, precision: str, arch: Arch, vec: int, tma: bool, spare: int,
) -> Iterator[Convolution]:  # fmt: skip
    most = max(spare, WORKSPACE) // (max(ITEMSIZE[dtype], 4) * 9 * o * c * bundles)

    def settled(s: Convolution) -> Iterator[Convolution]:
        if needs_registers(dtype, precision, arch, tma=s.tma, along=False):
            s = by_mma_sync(replace(s, taps=1), precision)
        line = choose_line((s.block_l,), n, q, dtype, arch)
        if s.tma and line is None:
            return
        s = replace(s, box=line) if s.tma and line else boxed(s, "block_l", n, p, q, wide=False)
        tile = s.taps * s.block_i * s.block_j
        if s.block_i * s.block_j < 64 * 64:
            s = replace(s, num_warps=min(s.num_warps, 4))
        stages = min(s.num_stages, stages_in_memory(replace(s, block_j=s.taps * s.block_j), ITEMSIZE[dtype], arch))
        few = registers(tile, dtype, s.num_warps, arch) <= (DEEPEST if arch.has_tma else DEEPEST // 2)
        if stages >= 1 and few:
            boxes = s.boxes(n, p, q)
            yield replace(s, num_stages=stages, splits=even_splits(boxes, min(s.splits, boxes)))

    others = [
        *resized(s, "splits", 1, max(1, most)),
        *other_warps(s, arch),
        *other_stages(s, arch),
        *resized(s, "block_l", 16, 128),
        *resized(s, "block_i", 16, fit(128, o)),
        *resized(s, "block_j", 16, fit(128, c)),
        *other_boxes(s, n, p, q),
        replace(s, taps=1 if s.taps == 3 else 3),
        *other_registers(s, arch),
    ]
    if s.tma and vec * ITEMSIZE[dtype] >= 4:
        others.append(replace(s, tma=False, block_l=min(s.block_l, 32), max_registers=unrounded(arch)))
    elif tma and arch.has_tma and not s.tma:
        others.append(replace(s, tma=True, x_first=False))
    for other in others:
        yield from settled(other)


def other_rows(s: Convolution) -> Iterator[Convolution]:
    for rows in halved_or_doubled(s.box[1], 1, LONGEST):
        yield replace(s, box=(s.box[0], rows, s.box[2]))


def around_small(
    s: Convolution, n: int, p: int, q: int, o: int, c: int, dtype: str, arch: Arch, wgrad: bool, fused: bool = False
) -> Iterator[Convolution]:
    if not wgrad:
        images, rows, columns = s.box
        others = [
            *other_rows(s),
            *other_warps(s, arch),
            *resized(s, "block_j", 16, fit(128, o)),
            *other_registers(s, arch),
        ]
        if columns > 1:
            others.append(replace(s, box=(images * 2, rows, columns // 2)))
        if images > 1:
            others.append(replace(s, box=(images // 2, rows, columns * 2)))
        for other in others:
            if registers(other.block_i * other.block_j, dtype, other.num_warps, arch) <= RESULT:
                yield other
        return
    most = max(1, WORKSPACE // (max(ITEMSIZE[dtype], 4) * 9 * o * c))
    others = [
        *other_warps(s, arch),
        *resized(s, "block_l", 16, 256),
        *resized(s, "block_i", 16, fit(128, o)),
        *other_boxes(s, n, p, q),
        *other_registers(s, arch),
        *resized(s, "splits", 1, most),
        *(other_stages(s, arch) if small_stages(dtype, arch) > 1 else []),
    ]
    for other in others:
        other = boxed(other, "block_l", n, p, q, wide=True)
        i, j, l = other.block_i, other.block_j, other.block_l
        stages = min(other.num_stages, stages_in_memory(other, ITEMSIZE[dtype], arch))
        if stages >= 1 and registers(max(i * j, i * l, j * l), dtype, other.num_warps, arch) <= RESULT:
            boxes = other.boxes(n, p, q)
            yield replace(other, num_stages=stages, splits=even_splits(boxes, min(other.splits, boxes)))


def around_small_dgrad(
    s: Convolution, n: int, h: int, w: int, o: int, dtype: str, precision: str, arch: Arch, tma: bool
) -> Iterator[Convolution]:
    yield from other_rows(s)
    yield from other_warps(s, arch)
    yield from other_registers(s, arch)
    if s.num_stages > 1:
        for other in other_stages(s, arch):
            if other.num_stages <= stages_in_memory(s, ITEMSIZE[dtype], arch):
                yield other


def around_depthwise(
    s: Convolution, n: int, p: int, q: int, c: int, dtype: str, arch: Arch, last: bool, wgrad: bool
) -> Iterator[Convolution]:
    """Of a program's elements, and of its columns, channels, images and rows; block_i is images × columns."""
    (images, rows, columns), channels = s.box, s.block_j
    most_rows = min(8 if wgrad else 64, power_of_2(p))
    shapes = [(images, r, columns, channels) for r in (rows // 2, rows * 2) if 1 <= r <= most_rows]
    for factor in (1, 2):  # what is taken off one side is given to another, or to none
        shapes += [
            (images // 2, rows, columns * factor, channels),
            (images, rows, columns // 2, channels * factor),
            (images * factor, rows, columns // 2, channels),
            (images, rows, columns * factor, channels // 2),
        ]
    shapes += [(images, rows, columns * 2, channels), (images, rows, columns, channels * 2)]
    most = max(1, WORKSPACE // (max(ITEMSIZE[dtype], 4) * 9 * c))
    others: list[Convolution] = [*other_warps(s, arch), *other_registers(s, arch)]
    for shape in shapes:
        tile = shape[0] * shape[2] * shape[3]
        inside = shape[0] <= power_of_2(n) and shape[2] <= power_of_2(q) and shape[3] <= power_of_2(c)
        if all(shape) and inside and max(shape) <= LONGEST and 64 <= tile <= 2048:
            box: Box = (shape[0], shape[1], shape[2])
            others.append(replace(s, box=box, block_i=shape[0] * shape[2], block_j=shape[3]))
    if wgrad:
        others += resized(s, "splits", 1, most)
    for other in others:
        boxes = other.boxes(n, p, q)
        yield replace(other, splits=even_splits(boxes, min(other.splits, boxes)))


def around_relayout(s: Relayout, n: int, p: int, c: int, dtype: str, arch: Arch) -> Iterator[Relayout]:
    others = [
        *resized(s, "tiles", 1, 1 << 20),
        *resized(s, "block_p", 1, min(1024, max(16, power_of_2(p)))),
        *resized(s, "block_c", 8, min(256, max(8, power_of_2(c)))),
        *other_warps(s, arch),
        *other_registers(s, arch),
    ]
    for other in others:
        programs = cdiv(n * cdiv(p, other.block_p), other.tiles)
        few = programs * c * max(4, ITEMSIZE[dtype]) <= WORKSPACE or programs <= cdiv(n * cdiv(p, s.block_p), s.tiles)
        if few and 64 <= other.block_p * other.block_c <= 4096:
            yield other


AROUND: dict[str, Callable[..., Iterator[Any]]] = {
    "choose_conv": around_conv,
    "choose_conv_wgrad": around_conv_wgrad,
    "choose_small": around_small,
    "choose_small_dgrad": around_small_dgrad,
    "choose_depthwise": around_depthwise,
    "choose_relayout": around_relayout,
}
