"""A 3×3 convolution of few input channels: all taps and channels are one summed index, gathered into one product.

    y[n, p, q, o] = act(b[o] + Σₖ g[n, p, q, k]·w[o, k])        dw[o, k] = Σ_npq dz[n, p, q, o]·g[n, p, q, k]

with k = (channel, tap) or (tap, channel), as the weight's memory has it, and g the input under the tap. x is read where
it lies, whatever its layout: a tap of one channel is no tile of anything, and the loads of neighbouring pixels share
cache lines either way. dgrad is `conv3x3.dgrad`, with few columns.
"""

import triton
import triton.language as tl

from .common import dot, indices, round_to, sigmoid, sigmoid_backward
from .conv3x3 import box_at, pixels, positions, store_box

SIZES = ["N", "H", "W", "P", "Q", "O", "pad_h", "pad_w"]


@triton.jit
def gather(
    x, n, i, j, N, H, W, P, Q, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    C: tl.constexpr, TAPS_LAST: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g for the pixels (n, i, j): (pixels, BLOCK_K), zeros outside the image, from k = 9·C on, and for pixels that y
    has not: a zero of dz must not meet an infinity there.

    Within an image of under 2³¹ elements 32 bits hold an offset, and there are 9·C of them for each pixel.
    """
    k = tl.arange(0, BLOCK_K)
    if TAPS_LAST:
        c = k // 9
        tap = k % 9
    else:
        c = k % C
        tap = k // C
    r = tap // 3 - pad_h
    s = tap % 3 - pad_w
    h = (i * STEP_H)[:, None] + r[None, :]
    v = (j * STEP_W)[:, None] + s[None, :]
    within = (h.to(tl.uint32) < H.to(tl.uint32)) & (v.to(tl.uint32) < W.to(tl.uint32))  # a negative one is a large one
    inside = within & ((n < N) & (i < P) & (j < Q))[:, None] & (k < 9 * C)[None, :]
    image = tl.where(n < N, n, 0).to(tl.int64) * stride_n
    pixel = i * STEP_H * stride_h + j * STEP_W * stride_w
    shift = c * stride_c + r * stride_h + s * stride_w
    at = tl.where(inside, pixel[:, None] + shift[None, :], 0)
    return tl.load(x + (image[:, None] + at), mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def small_forward(
    x, w, b, y, N, H, W, P, Q, O, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    C: tl.constexpr, TAPS_LAST: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr, ACCURATE: tl.constexpr, PTX: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = act(x ⋆ w + b): a box of y's pixels and BLOCK_J output channels a program. w: (O, 9·C)."""
    columns = tl.cdiv(O, BLOCK_J)
    n, i, j = box_at(tl.program_id(0) // columns, P, Q, BOX_N, BOX_H, BOX_W)
    n, i, j = pixels(n, i, j, BOX_N, BOX_H, BOX_W)
    col = tl.program_id(0) % columns * BLOCK_J
    g = gather(
        x, n, i, j, N, H, W, P, Q, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
        C, TAPS_LAST, STEP_H, STEP_W, BLOCK_K,
    )  # fmt: skip
    o, o_inside = indices(col, O, BLOCK_J, 1)
    k, k_inside = indices(0, 9 * C, BLOCK_K, 1)
    w_tile = tl.load(w + (k[:, None] + o[None, :] * (9 * C)), mask=k_inside[:, None] & o_inside[None, :], other=0.0)
    # Weights first, as in `conv3x3.convolve`. Compiled: Triton else starts the product from the bias, and ptxas puts
    # waits of its own between its instructions.
    z = tl.trans(dot(tl.trans(w_tile), tl.trans(g), tl.zeros((BLOCK_J, BOX_N * BOX_H * BOX_W), ACC), PRECISION))
    if HAS_BIAS:
        z += tl.load(b + o, mask=o_inside, other=0.0).to(ACC)[None, :]
    if SIGMOID:
        z = sigmoid(z, ACCURATE, PTX)
    store_box(
        y, z, n, i, j, col, O, N, P, Q, y_stride_n, y_stride_c, y_stride_h, y_stride_w, LAST, VEC_STORE, BOX_W, BLOCK_J
    )


@triton.jit(do_not_specialize=[*SIZES, "boxes_per_split"])
def small_wgrad(
    dz, y, x, dw, db, N, H, W, P, Q, O, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    z_stride_n, z_stride_c, z_stride_h, z_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w, boxes_per_split,
    C: tl.constexpr, TAPS_LAST: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    FUSE_DZ: tl.constexpr, WRITE_DB: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split] (O, 9·C) and db[split] (O,) of the boxes of split = program_id(1).

    With FUSE_DZ the argument `dz` holds dy, and dz = dy·y·(1 − y) is formed on the way in: nobody else needs it.
    """
    RUN: tl.constexpr = VEC if VEC < BOX_W else BOX_W
    col = tl.program_id(0) * BLOCK_O
    split = tl.program_id(1)
    boxes = tl.cdiv(N, BOX_N) * tl.cdiv(P, BOX_H) * tl.cdiv(Q, BOX_W)
    o, o_inside = indices(col, O, BLOCK_O, VEC if LAST else 1)
    acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    sums = tl.zeros((BOX_N * BOX_H * BOX_W, BLOCK_O), ACC)
    for box in range(split * boxes_per_split, tl.minimum((split + 1) * boxes_per_split, boxes)):
        n, i, j = box_at(box, P, Q, BOX_N, BOX_H, BOX_W)
        n, i, j = pixels(n, i, j, BOX_N, BOX_H, BOX_W)
        at, inside = positions(n, i, j, o, N, P, Q, z_stride_n, z_stride_c, z_stride_h, z_stride_w, LAST, VEC, RUN)
        mask = inside[:, None] & o_inside[None, :]
        z = tl.load(dz + at, mask=mask, other=0.0)
        if FUSE_DZ:
            at, _ = positions(n, i, j, o, N, P, Q, y_stride_n, y_stride_c, y_stride_h, y_stride_w, LAST, VEC, RUN)
            z = sigmoid_backward(z, tl.load(y + at, mask=mask, other=0.0), ACC)
        if WRITE_DB:
            sums += z.to(ACC)
        g = gather(
            x, n, i, j, N, H, W, P, Q, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
            C, TAPS_LAST, STEP_H, STEP_W, BLOCK_K,
        )  # fmt: skip
        acc = dot(tl.trans(round_to(z, g.dtype)), g, acc, PRECISION)
    if WRITE_DB:
        total = round_to(tl.sum(sums, 0), db.dtype.element_ty)
        tl.store(db + split.to(tl.int64) * O + o, total, mask=o_inside)
    k, k_inside = indices(0, 9 * C, BLOCK_K, 1)
    at = dw + ((split.to(tl.int64) * O + o)[:, None] * (9 * C) + k[None, :])
    tl.store(at, round_to(acc, dw.dtype.element_ty), mask=o_inside[:, None] & k_inside[None, :])
