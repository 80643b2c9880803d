"""From one layout to another, and the sigmoid's derivative on the way: (N, P, C), where P are the pixels of an image.

    dst[n, p, c] = src[n, p, c],  or  src·y·(1 − y);  0 for the channels that only `dst` has;  db[c] = Σ_np dst[n, p, c]

Tensor cores want channels side by side, in rows that are multiples of 16 bytes. What does not lie so goes through here
once; read in place, every element would be loaded nine times, two bytes at a time and not asynchronously.
"""

import triton
import triton.language as tl

from .common import indices, round_to, sigmoid_backward


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
