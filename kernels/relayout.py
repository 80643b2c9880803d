"""From one layout to another, and the sigmoid's derivative on the way: (N, P, C), where P are the pixels of an image.

    dst[n, p, c] = src[n, p, c],  or  src·y·(1 − y);  0 for the channels that only `dst` has;  db[c] = Σ_np dst[n, p, c]

Tensor cores want channels side by side, in rows that are multiples of 16 bytes. What does not lie so goes through here
once; read in place, every element would be loaded nine times, two bytes at a time and not asynchronously. `pack` does
nothing else, but for three tensors in one launch, for a launch takes as long as 7 MB.
"""

import triton
import triton.language as tl

from .common import indices, round_to, sigmoid_backward

SIZES = "programs tiles N P C dst_c stride_n stride_p stride_c".split()
PACKED_SIZES = [name + number for number in ("", "2", "3") for name in SIZES]


@triton.jit
def positions(n, p, c, stride_n, stride_p, stride_c, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr):
    """Offsets of pixels × channels. Contiguous: CHANNELS, or PIXELS, or neither; VEC divides the other strides."""
    at = n.to(tl.int64) * (stride_n // VEC * VEC)
    if CHANNELS:
        at += p[:, None] * (stride_p // VEC * VEC) + c[None, :]
    elif PIXELS:
        at += p[:, None] + c[None, :] * (stride_c // VEC * VEC)
    else:
        at += p[:, None] * stride_p + c[None, :] * stride_c
    return at


@triton.jit(do_not_specialize=["N", "P", "C", "dst_c", "tiles_per_program"])
def relayout(
    src, y, dst, db, N, P, C, dst_c, tiles_per_program,
    src_stride_n, src_stride_p, src_stride_c, y_stride_n, y_stride_p, y_stride_c,
    dst_stride_n, dst_stride_p, dst_stride_c,
    SRC_PIXELS: tl.constexpr, SRC_CHANNELS: tl.constexpr, SRC_VEC: tl.constexpr,
    Y_PIXELS: tl.constexpr, Y_CHANNELS: tl.constexpr, Y_VEC: tl.constexpr,
    DST_PIXELS: tl.constexpr, DST_CHANNELS: tl.constexpr, DST_VEC: tl.constexpr,
    HAS_Y: tl.constexpr, WRITE_DST: tl.constexpr, WRITE_DB: tl.constexpr, ACC: tl.constexpr,
    VEC_P: tl.constexpr, VEC_C: tl.constexpr, VEC_DST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`tiles_per_program` tiles of BLOCK_P pixels of one image, BLOCK_C channels. db: (programs, C), a sum of each.

    VEC_P, VEC_C and VEC_DST divide P, C and dst_c.
    """
    c, c_inside = indices(tl.program_id(1) * BLOCK_C, C, BLOCK_C, VEC_C)
    c_dst, c_dst_inside = indices(tl.program_id(1) * BLOCK_C, dst_c, BLOCK_C, VEC_DST)
    tiles_p = tl.cdiv(P, BLOCK_P)
    first = tl.program_id(0) * tiles_per_program
    sums = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for tile in range(first, tl.minimum(first + tiles_per_program, N * tiles_p)):
        n = tile // tiles_p
        p, p_inside = indices(tile % tiles_p * BLOCK_P, P, BLOCK_P, VEC_P)
        inside = p_inside[:, None] & c_inside[None, :]
        at = positions(n, p, c, src_stride_n, src_stride_p, src_stride_c, SRC_PIXELS, SRC_CHANNELS, SRC_VEC)
        value = tl.load(src + at, mask=inside, other=0.0)
        if HAS_Y:
            at = positions(n, p, c, y_stride_n, y_stride_p, y_stride_c, Y_PIXELS, Y_CHANNELS, Y_VEC)
            value = sigmoid_backward(value, tl.load(y + at, mask=inside, other=0.0), ACC)
        if WRITE_DB:
            sums += value.to(ACC)
        if WRITE_DST:
            at = positions(n, p, c_dst, dst_stride_n, dst_stride_p, dst_stride_c, DST_PIXELS, DST_CHANNELS, DST_VEC)
            mask = p_inside[:, None] & c_dst_inside[None, :]
            tl.store(dst + at, round_to(value, dst.dtype.element_ty), mask=mask)
    if WRITE_DB:
        total = round_to(tl.sum(sums, 0), db.dtype.element_ty)
        tl.store(db + tl.program_id(0).to(tl.int64) * C + c, total, mask=c_inside)


@triton.jit
def pack_tiles(
    src, dst, program, programs, tiles_per_program, N, P, C, dst_c, stride_n, stride_p, stride_c,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr,
    VEC_P: tl.constexpr, VEC_C: tl.constexpr, VEC_DST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dst (N, P, dst_c) = src, and zeros behind its C channels: the tiles of a program, of `programs` side by side."""
    col = program // programs * BLOCK_C
    c, c_inside = indices(col, C, BLOCK_C, VEC_C)
    c_dst, c_dst_inside = indices(col, dst_c, BLOCK_C, VEC_DST)
    tiles_p = tl.cdiv(P, BLOCK_P)
    pitch = dst_c // VEC_DST * VEC_DST
    first = program % programs * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, N * tiles_p)):
        n = tile // tiles_p
        p, p_inside = indices(tile % tiles_p * BLOCK_P, P, BLOCK_P, VEC_P)
        at = positions(n, p, c, stride_n, stride_p, stride_c, PIXELS, CHANNELS, VEC)
        value = tl.load(src + at, mask=p_inside[:, None] & c_inside[None, :], other=0.0)
        at = (n.to(tl.int64) * P + p[:, None]) * pitch + c_dst[None, :]
        tl.store(dst + at, value, mask=p_inside[:, None] & c_dst_inside[None, :])


@triton.jit(do_not_specialize=PACKED_SIZES)
def pack(
    src, dst, programs, tiles, N, P, C, dst_c, stride_n, stride_p, stride_c,
    src2, dst2, programs2, tiles2, N2, P2, C2, dst_c2, stride_n2, stride_p2, stride_c2,
    src3, dst3, programs3, tiles3, N3, P3, C3, dst_c3, stride_n3, stride_p3, stride_c3,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr,
    VEC_P: tl.constexpr, VEC_C: tl.constexpr, VEC_DST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXELS3: tl.constexpr, CHANNELS3: tl.constexpr, VEC3: tl.constexpr,
    VEC_P3: tl.constexpr, VEC_C3: tl.constexpr, VEC_DST3: tl.constexpr, BLOCK_P3: tl.constexpr, BLOCK_C3: tl.constexpr,
):  # fmt: skip
    """`pack_tiles` of up to three tensors: first the programs of src, then of src2, which lies alike, then of src3.

    Images lie alike, so they share the code; one that is not there has no programs.
    """
    program = tl.program_id(0)
    program2 = program - programs * tl.cdiv(dst_c, BLOCK_C)
    program3 = program2 - programs2 * tl.cdiv(dst_c2, BLOCK_C)
    if program3 < 0:
        second = program2 >= 0
        pack_tiles(
            tl.where(second, src2, src), tl.where(second, dst2, dst), tl.where(second, program2, program),
            tl.where(second, programs2, programs), tl.where(second, tiles2, tiles),
            tl.where(second, N2, N), tl.where(second, P2, P), tl.where(second, C2, C), tl.where(second, dst_c2, dst_c),
            tl.where(second, stride_n2, stride_n), tl.where(second, stride_p2, stride_p),
            tl.where(second, stride_c2, stride_c),
            PIXELS, CHANNELS, VEC, VEC_P, VEC_C, VEC_DST, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    elif src3 is not None:
        pack_tiles(
            src3, dst3, program3, programs3, tiles3, N3, P3, C3, dst_c3, stride_n3, stride_p3, stride_c3,
            PIXELS3, CHANNELS3, VEC3, VEC_P3, VEC_C3, VEC_DST3, BLOCK_P3, BLOCK_C3,
        )  # fmt: skip
