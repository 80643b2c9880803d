"""A 3×3 convolution of few input channels: all taps and channels are one summed index, gathered into one product.

    y[n, p, q, o] = act(b[o] + Σₖ g[n, p, q, k]·w[o, k])        dw[o, k] = Σ_npq dz[n, p, q, o]·g[n, p, q, k]

with k = (channel, tap) or (tap, channel), as the weight's memory has it, and g the input under the tap. x is read where
it lies, whatever its layout: a tap of one channel is no tile of anything, and the loads of neighbouring pixels share
cache lines either way.

dgrad is the same the other way round: one product of dz with all taps and channels, whose columns are then added where
their taps meet. It takes strides of 1 and up to four channels; else it is `conv3x3.dgrad`, with few columns.
"""

import triton
import triton.language as tl

from .common import dot, indices, round_operand, round_to, sigmoid, sigmoid_backward
from .conv3x3 import box_at, load_box, pixels, positions, store_box
from .conv3x3_depthwise import store_row

SIZES = ["N", "H", "W", "P", "Q", "O", "pad_h", "pad_w"]


@triton.jit
def gather(
    x, n, i, j, N, H, W, P, Q, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    C: tl.constexpr, TAPS_LAST: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, ONES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g for the pixels (n, i, j), transposed: (BLOCK_K, pixels). Zeros outside the image, from k = 9·C on, and for
    pixels that y has not: a zero of dz must not meet an infinity there. ONES: k = 9·C, which no power of two is, sums.

    Pixels come last, so that a thread has all k of a pixel: it knows the taps when it is compiled, and forms nine masks
    and not one for each element. Within an image of under 2³¹ elements 32 bits hold an offset.
    """
    k = tl.arange(0, BLOCK_K)[:, None]
    if TAPS_LAST:
        c = k // 9
        tap = k % 9
    else:
        c = k % C
        tap = k // C
    h = (i * STEP_H)[None, :] + (tap // 3 - pad_h)
    v = (j * STEP_W)[None, :] + (tap % 3 - pad_w)
    h_inside = (h.to(tl.uint32) < H.to(tl.uint32)) & ((n < N) & (i < P))[None, :]  # a negative one is a large one
    v_inside = (v.to(tl.uint32) < W.to(tl.uint32)) & (j < Q)[None, :]
    image = x + tl.where(n < N, n, 0).to(tl.int64) * stride_n
    at = image[None, :] + (tl.where(h_inside, h, 0) * stride_h + tl.where(v_inside, v, 0) * stride_w)
    at += tl.where(k < 9 * C, c, 0) * stride_c
    g = tl.load(at, mask=h_inside & v_inside & (k < 9 * C), other=0.0)
    if ONES:
        g = tl.where(k == 9 * C, round_to(tl.full((BLOCK_K, 1), 1.0, tl.float32), g.dtype), g)
    return g


@triton.jit
def gather_row(
    x, n, h, j, N, H, W, pad_w, stride_n, stride_c, stride_h, stride_w,
    C: tl.constexpr, STEP_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[n, h, j·STEP_W + s − pad_w, c] for k = (s, c): (BLOCK_K, pixels), zeros outside. Otherwise as `gather`."""
    k = tl.arange(0, BLOCK_K)[:, None]
    v = (j * STEP_W)[None, :] + (k // C - pad_w)
    inside = ((n < N) & (h >= 0) & (h < H))[None, :] & (v.to(tl.uint32) < W.to(tl.uint32)) & (k < 3 * C)
    image = x + tl.where(n < N, n, 0).to(tl.int64) * stride_n
    at = image[None, :] + (tl.where((h >= 0) & (h < H), h, 0) * stride_h + tl.where(inside, v * stride_w, 0))
    return tl.load(at + tl.where(k < 3 * C, k % C, 0) * stride_c, mask=inside, other=0.0)


@triton.jit
def load_taps(w, r, o, o_inside, C: tl.constexpr, TAPS_LAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """w[o, r, k] for k = (s, c): (outputs, BLOCK_K)."""
    k = tl.arange(0, BLOCK_K)[None, :]
    if TAPS_LAST:
        at = k % C * 9 + r * 3 + k // C
    else:
        at = r * (3 * C) + k
    inside = o_inside[:, None] & (k < 3 * C)
    return tl.load(w + tl.where(inside, o[:, None] * (9 * C) + at, 0), mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def small_forward(
    x, w, b, y, N, H, W, P, Q, O, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    C: tl.constexpr, TAPS_LAST: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr, ACCURATE: tl.constexpr, PTX: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = act(x ⋆ w + b): BOX_H rows of BOX_W columns of BOX_N images, BLOCK_J output channels a program. w: (O, 9·C).

    Row by row: what is gathered of a row of x serves the rows of y that it meets.
    """
    columns = tl.cdiv(O, BLOCK_J)
    n, first, j = box_at(tl.program_id(0) // columns, P, Q, BOX_N, BOX_H, BOX_W)
    n, _, j = pixels(n, first, j, BOX_N, 1, BOX_W)
    col = tl.program_id(0) % columns * BLOCK_J
    o, o_inside = indices(col, O, BLOCK_J, 1)
    w0 = load_taps(w, 0, o, o_inside, C, TAPS_LAST, BLOCK_K)
    w1 = load_taps(w, 1, o, o_inside, C, TAPS_LAST, BLOCK_K)
    w2 = load_taps(w, 2, o, o_inside, C, TAPS_LAST, BLOCK_K)
    if HAS_BIAS:
        bias = tl.load(b + o, mask=o_inside, other=0.0).to(ACC)
    h = first * STEP_H - pad_h
    g0 = gather_row(x, n, h, j, N, H, W, pad_w, stride_n, stride_c, stride_h, stride_w, C, STEP_W, BLOCK_K)
    g1 = gather_row(x, n, h + 1, j, N, H, W, pad_w, stride_n, stride_c, stride_h, stride_w, C, STEP_W, BLOCK_K)
    for t in range(0, tl.minimum(BOX_H, P - first)):
        h = (first + t) * STEP_H - pad_h
        g2 = gather_row(x, n, h + 2, j, N, H, W, pad_w, stride_n, stride_c, stride_h, stride_w, C, STEP_W, BLOCK_K)
        # Weights first, as in `conv3x3.convolve`. Compiled: Triton else starts the product from the bias, and ptxas
        # puts waits of its own between its instructions.
        z = dot(w0, g0, tl.zeros((BLOCK_J, BOX_N * BOX_W), ACC), PRECISION)
        z = tl.trans(dot(w2, g2, dot(w1, g1, z, PRECISION), PRECISION))
        if HAS_BIAS:
            z += bias[None, :]
        if SIGMOID:
            z = sigmoid(z, ACCURATE, PTX)
        store_box(
            y, z, n, first + t, j, col, O, N, P, Q, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
            LAST, VEC_STORE, BOX_W, BLOCK_J,
        )  # fmt: skip
        if STEP_H == 1:
            g0, g1 = g1, g2
        else:
            g0 = g2
            g1 = gather_row(x, n, h + 3, j, N, H, W, pad_w, stride_n, stride_c, stride_h, stride_w, C, STEP_W, BLOCK_K)


@triton.jit
def three_of_four(x):
    """Of x (rows, columns, 2, 2) the parts (0, 0), (0, 1) and (1, 0), each (rows, columns)."""
    even, odd = tl.split(x)
    first, third = tl.split(even)
    second, _ = tl.split(odd)
    return first, second, third


@triton.jit(do_not_specialize=SIZES)
def small_dgrad(
    dz, w, dx, N, H, W, P, Q, O, pad_h, pad_w, stride_n, stride_h, stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    C: tl.constexpr, TAPS_LAST: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    VEC: tl.constexpr, LAST: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dx of up to four channels, with a stride of 1: BOX_H rows of BOX_W − 2 columns of BOX_N images a program.

        dx[n, h, v, c] = Σ_rs p[n, h + pad_h − r, v + pad_w − s, k]      p[n, i, j, k] = Σₒ dz[n, i, j, o]·w[o, k]

    with k = (r, s, c). Row by row, BOX_W pixels of dz are read once and multiplied with all taps. Each row of dx is the
    sum of three rows of products, and each pixel that of three neighbours in it; a box's last two miss some, and are
    the next box's.

    k has the bits r r s c c s. Compiled: of a product a thread has columns that differ in the first three and the last
    bit, and four lanes share the others, so rows are added and taps taken apart within a thread. Only neighbours meet
    through shared memory.
    """
    PIXELS: tl.constexpr = BOX_N * BOX_W
    n, first, left = box_at(tl.program_id(0), H, W, BOX_N, BOX_H, BOX_W - 2)
    k = tl.arange(0, 64)[None, :]
    r, s, c = k // 16, k // 8 % 2 * 2 + k % 2, k // 2 % 4
    if TAPS_LAST:
        at = c * 9 + r * 3 + s
    else:
        at = (r * 3 + s) * C + c
    o, o_inside = indices(0, O, BLOCK_L, 1)
    inside = o_inside[:, None] & (r < 3) & (s < 3) & (c < C)
    taps = tl.load(w + tl.where(inside, o[:, None] * (9 * C) + at, 0), mask=inside, other=0.0)
    taps = round_operand(taps, taps.dtype, PRECISION)

    m_n, _, column = pixels(n, 0, 0, BOX_N, 1, BOX_W)
    v = tl.where(column < BOX_W - 2, left + column, -1)
    c, c_inside = indices(0, C, 4, VEC_STORE if LAST else 1)
    m = tl.broadcast_to(tl.arange(0, PIXELS)[:, None], (PIXELS, 4))
    # What the last two rows of dz gave the row of dx that the next one completes, and the row after that.
    complete = tl.zeros((PIXELS, 16), ACC)
    begun = tl.zeros((PIXELS, 16), ACC)
    for t in range(0, tl.minimum(BOX_H, H - first) + 2):
        z = load_box(
            dz, n, first + t, left, pad_h - 2, pad_w - 2, 0, tl.cdiv(O, VEC) * VEC, N, P, Q,
            stride_n, stride_h, stride_w, 0, 0, 1, 1, False, TMA, VEC, BOX_N, 1, BOX_W, BLOCK_L,
        )  # fmt: skip
        p = dot(z, taps, tl.zeros((PIXELS, 64), ACC), PRECISION)
        p0, p1, p2 = three_of_four(tl.permute(tl.reshape(p, (PIXELS, 2, 2, 16)), (0, 3, 1, 2)))
        q0, q1, q2 = three_of_four(tl.permute(tl.reshape(complete + p0, (PIXELS, 2, 4, 2)), (0, 2, 1, 3)))
        complete, begun = begun + p1, p2
        q1 = tl.gather(q1, tl.minimum(m + 1, PIXELS - 1), 0)
        q0 = tl.gather(q0, tl.minimum(m + 2, PIXELS - 1), 0)
        store_row(
            dx, q2 + q1 + q0, m_n, tl.where(t < 2, -1, first + t - 2), v, c, c_inside, N, H, W,
            x_stride_n, x_stride_c, x_stride_h, x_stride_w, LAST, VEC_STORE,
        )  # fmt: skip


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
    # Counted: a tile that is multiplied and summed lies in shared memory so that eight threads at a time read one bank.
    # 16-bit numbers are summed by the product itself, exactly, in a column that it has free.
    ONES: tl.constexpr = WRITE_DB and not FUSE_DZ and dz.dtype.element_ty.primitive_bitwidth == 16
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
        if WRITE_DB and not ONES:
            sums += z.to(ACC)
        g = gather(
            x, n, i, j, N, H, W, P, Q, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
            C, TAPS_LAST, STEP_H, STEP_W, ONES, BLOCK_K,
        )  # fmt: skip
        acc = dot(tl.trans(round_to(z, g.dtype)), tl.trans(g), acc, PRECISION)
    row = split.to(tl.int64) * O + o
    k, k_inside = indices(0, 9 * C, BLOCK_K, 1)
    if WRITE_DB:
        if ONES:
            column = tl.arange(0, BLOCK_K)[None, :] == 9 * C
            at = db + row[:, None] + tl.zeros((1, BLOCK_K), tl.int32)
            tl.store(at, round_to(acc, db.dtype.element_ty), mask=o_inside[:, None] & column)
        else:
            tl.store(db + row, round_to(tl.sum(sums, 0), db.dtype.element_ty), mask=o_inside)
    at = dw + (row[:, None] * (9 * C) + k[None, :])
    tl.store(at, round_to(acc, dw.dtype.element_ty), mask=o_inside[:, None] & k_inside[None, :])
