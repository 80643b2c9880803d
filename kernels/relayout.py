"""From one layout to another, with the activation's derivative on the way: (N, P, C), P the pixels of an image.

    dst[n, p, c] = src[n, p, c],  or  src·act′(y);  0 for the channels that only `dst` has;  db[c] = Σ_np dst[n, p, c]

Tensor cores want channels side by side, in rows that are multiples of 16 bytes. What is laid out otherwise goes through
here once; read in place, every element would be loaded nine times, two bytes at a time and not asynchronously. `pack`
does nothing else, but for three tensors in one launch, for a launch takes as long as 7 MB.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from .activations import Act, gradient
from .common import accumulator, await_previous, from_tuple, masked_range, round_to


class Contiguous(NamedTuple):
    """What is contiguous in a tensor (N, P, C): its pixels, its channels, or neither."""

    PIXELS: bool
    CHANNELS: bool
    VEC: int  # divides the other strides


class Relayout(NamedTuple):
    """What is fixed when `relayout` or `pack` is compiled."""

    BLOCK_P: int  # pixels of a tile
    BLOCK_C: int  # channels of a tile
    VEC_P: int  # divides P
    VEC_C: int  # divides C
    VEC_DST: int  # divides dst_c
    SRC: Contiguous
    Y: Contiguous | None = None
    DST: Contiguous | None = None
    ACT: Act | None = None  # of y
    THIRD: "Relayout | None" = None  # of pack's third tensor, which has a layout of its own


# A tensor (N, P, C) in memory.
StridedPlanes = namedtuple("StridedPlanes", "data stride_n stride_p stride_c")
# A tensor src (N, P, C) that is packed into dst (N, P, dst_c) by `programs` for each BLOCK_C channels.
Move = namedtuple("Move", "src dst programs tiles_per_program N P C dst_c stride_n stride_p stride_c")
FIELDS = tl.constexpr(len(Move._fields))


@triton.jit
def addresses(planes, n, p, c, LAYOUT: tl.constexpr):
    """Of pixels × channels of image n. LAYOUT: a `Contiguous`."""
    at = n.to(tl.int64) * (planes.stride_n // LAYOUT.VEC * LAYOUT.VEC)
    if LAYOUT.CHANNELS:
        at += p[:, None] * (planes.stride_p // LAYOUT.VEC * LAYOUT.VEC) + c[None, :]
    elif LAYOUT.PIXELS:
        at += p[:, None] + c[None, :] * (planes.stride_c // LAYOUT.VEC * LAYOUT.VEC)
    else:
        at += p[:, None] * planes.stride_p + c[None, :] * planes.stride_c
    return planes.data + at


@triton.jit(do_not_specialize=["N", "P", "C", "dst_c", "tiles_per_program"])
def relayout(src, y, dst, db, N, P, C, dst_c, tiles_per_program, CONFIG: tl.constexpr):
    """`tiles_per_program` tiles of BLOCK_P pixels of one image, BLOCK_C channels. db: (programs, C), a sum of each.

    y, and dst or db, may be None.
    """
    await_previous()
    ACT: tl.constexpr = CONFIG.ACT
    BLOCK_P: tl.constexpr = CONFIG.BLOCK_P
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    SRC: tl.constexpr = CONFIG.SRC
    Y: tl.constexpr = CONFIG.Y
    DST: tl.constexpr = CONFIG.DST
    col = tl.program_id(0) * BLOCK_C  # there can be more than 65,535, where a grid's second axis ends
    c, c_inside = masked_range(col, C, BLOCK_C, CONFIG.VEC_C)
    c_dst, c_dst_inside = masked_range(col, dst_c, BLOCK_C, CONFIG.VEC_DST)
    tiles_p = (P - 1) // BLOCK_P + 1  # P + BLOCK_P may pass 2³¹
    first = tl.program_id(1) * tiles_per_program
    last = first + tl.minimum(tiles_per_program, N * tiles_p - first)
    sums = tl.zeros((BLOCK_P, BLOCK_C), accumulator(src.data.dtype))
    for tile in range(first, last):
        n = tile // tiles_p
        p, p_inside = masked_range(tile % tiles_p * BLOCK_P, P, BLOCK_P, CONFIG.VEC_P)
        inside = p_inside[:, None] & c_inside[None, :]
        value = tl.load(addresses(src, n, p, c, SRC), mask=inside, other=0.0)
        if y is not None:
            value = gradient(value, tl.load(addresses(y, n, p, c, Y), mask=inside, other=0.0), ACT)
        if db is not None:
            sums += value.to(sums.dtype)
        if dst is not None:
            at = addresses(dst, n, p, c_dst, DST)
            tl.store(at, round_to(value, dst.data.dtype.element_ty), mask=p_inside[:, None] & c_dst_inside[None, :])
    if db is not None:
        total = round_to(tl.sum(sums, 0), db.dtype.element_ty)
        tl.store(db + tl.program_id(1).to(tl.int64) * C + c, total, mask=c_inside)


@triton.jit
def pack_tiles(move, program, CONFIG: tl.constexpr):
    """dst = src, and zeros behind its C channels: the tiles of one program of a `Move`."""
    BLOCK_P: tl.constexpr = CONFIG.BLOCK_P
    VEC_DST: tl.constexpr = CONFIG.VEC_DST
    SRC: tl.constexpr = CONFIG.SRC
    src = StridedPlanes(move.src, move.stride_n, move.stride_p, move.stride_c)
    col = program // move.programs * CONFIG.BLOCK_C
    c, c_inside = masked_range(col, move.C, CONFIG.BLOCK_C, CONFIG.VEC_C)
    c_dst, c_dst_inside = masked_range(col, move.dst_c, CONFIG.BLOCK_C, VEC_DST)
    tiles_p = (move.P - 1) // BLOCK_P + 1
    pitch = move.dst_c // VEC_DST * VEC_DST
    first = program % move.programs * move.tiles_per_program
    for tile in range(first, first + tl.minimum(move.tiles_per_program, move.N * tiles_p - first)):
        n = tile // tiles_p
        p, p_inside = masked_range(tile % tiles_p * BLOCK_P, move.P, BLOCK_P, CONFIG.VEC_P)
        value = tl.load(addresses(src, n, p, c, SRC), mask=p_inside[:, None] & c_inside[None, :], other=0.0)
        at = (n.to(tl.int64) * move.P + p[:, None]) * pitch + c_dst[None, :]
        tl.store(move.dst + at, value, mask=p_inside[:, None] & c_dst_inside[None, :])


@triton.jit
def from_argument(move):
    """A `Move` with its numbers as they are. move: with each as `from_tuple` takes it."""
    fields = (move[0], move[1])
    for k in tl.static_range(2, FIELDS):
        fields = fields + (from_tuple(move[k]),)
    return Move(*fields)


@triton.jit
def pack(first, second, third, CONFIG: tl.constexpr):
    """`pack_tiles` of up to three tensors, each a `Move` for `from_argument`: first the programs of the first, then of
    the second, which has its layout, then of the third, which may be None.

    Images have the same layout, so they share the code; one that is not there has no programs.
    """
    await_previous()
    program = tl.program_id(0)
    program2 = program - from_tuple(first.programs) * tl.cdiv(from_tuple(first.dst_c), CONFIG.BLOCK_C)
    program3 = program2 - from_tuple(second.programs) * tl.cdiv(from_tuple(second.dst_c), CONFIG.BLOCK_C)
    if program3 < 0:
        fields = ()
        for k in tl.static_range(FIELDS):
            fields = fields + (tl.where(program2 >= 0, second[k], first[k]),)
        pack_tiles(from_argument(fields), tl.where(program2 >= 0, program2, program), CONFIG)
    elif third is not None:
        THIRD: tl.constexpr = CONFIG.THIRD
        pack_tiles(from_argument(third), program3, THIRD)
