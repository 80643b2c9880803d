"""A 3×3 convolution of few input channels: all taps and channels are one summed index, gathered into one product.

    y[n, p, q, o] = act(b[o] + Σₖ g[n, p, q, k]·w[o, k])        dw[o, k] = Σ_npq dz[n, p, q, o]·g[n, p, q, k]

with k = (channel, tap) or (tap, channel), as the weight's memory has it, and g the input under the tap. x is read where
it lies, whatever its layout: a tap of one channel is no tile of anything, and the loads of neighbouring pixels share
cache lines either way.

dgrad is the same the other way round: one product of dz with all taps and channels, whose columns are then added where
their taps meet. It takes strides of 1 and up to four channels; else it is `conv3x3.dgrad`, with few columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import Act, activate, gradient
from .common import accumulator, await_previous, dot, masked_range, round_operand, round_to
from .conv3x3 import Batch, Box, PixelMap, Pixels, box_at, load_box, next_box, offsets, pixels_of, store_box
from .conv3x3_depthwise import store_row

SIZES = ["N", "H", "W", "P", "Q", "O", "pad_h", "pad_w"]


class FewChannels(NamedTuple):
    """What is fixed when a kernel of this file is compiled; other fields as in `common`."""

    BLOCK_O: int  # output channels a program; in dgrad a power of 2 that holds them all
    BLOCK_K: int  # a power of 2 that holds three taps of C channels; in wgrad all taps, and one column more
    BOX: Box  # pixels of the result, a program; in wgrad of dz
    C: int  # input channels
    TAPS_LAST: bool  # in w and dw; else channels
    PRECISION: str
    CHANNELS_LAST: bool  # in the result, and in wgrad in dz and y; else their columns are contiguous
    STEP_H: int = 1  # the stride
    STEP_W: int = 1
    VEC: int | None = None
    VEC_STORE: int | None = None
    TMA: bool | None = None
    FUSE_DZ: bool | None = None
    ACT: Act | None = None  # of forward, and with FUSE_DZ
    PTX: bool | None = None


@triton.jit
def gather(image, pixels, P, Q, padding, ONES: tl.constexpr, CONFIG: tl.constexpr):
    """g for pixels of y, which is P × Q, transposed: (BLOCK_K, pixels). Zeros outside the image, from k = 9·C on, and
    for pixels that y has not: a zero of dz must not meet an infinity there. ONES: k = 9·C, which no power of two is,
    sums.

    Pixels come last, so that a thread has all k of a pixel: it knows the taps when it is compiled, and forms nine masks
    and not one for each element. Within an image of under 2³¹ elements 32 bits hold an offset.
    """
    C: tl.constexpr = CONFIG.C
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    n, i, j = pixels
    pad_h, pad_w = padding
    k = tl.arange(0, BLOCK_K)[:, None]
    c = k // 9 if CONFIG.TAPS_LAST else k % C
    tap = k % 9 if CONFIG.TAPS_LAST else k // C
    h = (i * CONFIG.STEP_H)[None, :] + (tap // 3 - pad_h)
    v = (j * CONFIG.STEP_W)[None, :] + (tap % 3 - pad_w)
    # A negative number is a large one.
    h_inside = (h.to(tl.uint32) < image.H.to(tl.uint32)) & ((n < image.N) & (i < P))[None, :]
    v_inside = (v.to(tl.uint32) < image.W.to(tl.uint32)) & (j < Q)[None, :]
    of_image = image.data + tl.where(n < image.N, n, 0).to(tl.int64) * image.stride_n
    at = of_image[None, :] + (tl.where(h_inside, h, 0) * image.stride_h + tl.where(v_inside, v, 0) * image.stride_w)
    at += tl.where(k < 9 * C, c, 0) * image.stride_c
    # Counted: behind an operation on g its elements would reach shared memory one at a time, and not eight.
    ones = round_to((k == 9 * C).to(tl.float32), at.dtype.element_ty)
    return tl.load(at, mask=h_inside & v_inside & (k < 9 * C), other=ones if ONES else 0.0)


@triton.jit
def gather_row(image, n, h, j, pad_w, CONFIG: tl.constexpr):
    """image[n, h, j·STEP_W + s − pad_w, c] for k = (s, c): (BLOCK_K, pixels), zeros outside. Otherwise as `gather`."""
    C: tl.constexpr = CONFIG.C
    H = image.H
    W = image.W
    k = tl.arange(0, CONFIG.BLOCK_K)[:, None]
    v = (j * CONFIG.STEP_W)[None, :] + (k // C - pad_w)
    inside = ((n < image.N) & (h >= 0) & (h < H))[None, :] & (v.to(tl.uint32) < W.to(tl.uint32)) & (k < 3 * C)
    of_image = image.data + tl.where(n < image.N, n, 0).to(tl.int64) * image.stride_n
    h = tl.where((h >= 0) & (h < H), h, 0)
    at = of_image[None, :] + (h * image.stride_h + tl.where(inside, v * image.stride_w, 0))
    return tl.load(at + tl.where(k < 3 * C, k % C, 0) * image.stride_c, mask=inside, other=0.0)


@triton.jit
def load_tap_row(w, r, o, o_inside, CONFIG: tl.constexpr):
    """w[o, r, k] for k = (s, c): (outputs, BLOCK_K)."""
    C: tl.constexpr = CONFIG.C
    k = tl.arange(0, CONFIG.BLOCK_K)[None, :]
    at = k % C * 9 + r * 3 + k // C if CONFIG.TAPS_LAST else r * (3 * C) + k
    inside = o_inside[:, None] & (k < 3 * C)
    return tl.load(w + tl.where(inside, o[:, None] * (9 * C) + at, 0), mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def few_channels_forward(x, w, b, y, N, H, W, P, Q, O, pad_h, pad_w, CONFIG: tl.constexpr):
    """y = act(x ⋆ w + b): BOX.H rows of BOX.W columns of BOX.N images, BLOCK_O output channels a program. w: (O, 9·C).

    Row by row: what is gathered of a row of x serves the rows of y that it meets.
    """
    await_previous()
    ACT: tl.constexpr = CONFIG.ACT
    BOX: tl.constexpr = CONFIG.BOX
    PIXELS: tl.constexpr = BOX.N * BOX.W
    BLOCK_O: tl.constexpr = CONFIG.BLOCK_O
    STEP_H: tl.constexpr = CONFIG.STEP_H
    PRECISION: tl.constexpr = CONFIG.PRECISION
    ACC: tl.constexpr = accumulator(x.data.dtype)
    columns = tl.cdiv(O, BLOCK_O)
    box = box_at(tl.program_id(0) // columns, P, Q, BOX)
    first = box.h
    n, _, j = pixels_of(box, Box(BOX.N, 1, BOX.W))
    col = tl.program_id(0) % columns * BLOCK_O
    o, o_inside = masked_range(col, O, BLOCK_O, 1)
    w0 = load_tap_row(w, 0, o, o_inside, CONFIG)
    w1 = load_tap_row(w, 1, o, o_inside, CONFIG)
    w2 = load_tap_row(w, 2, o, o_inside, CONFIG)
    if b is not None:
        bias = tl.load(b + o, mask=o_inside, other=0.0).to(ACC)
    x = Batch(*x, N, H, W, 0)
    y = Batch(*y, N, P, Q, O)
    h = first * STEP_H - pad_h
    g0 = gather_row(x, n, h, j, pad_w, CONFIG)
    g1 = gather_row(x, n, h + 1, j, pad_w, CONFIG)
    for t in range(0, tl.minimum(BOX.H, P - first)):
        h = (first + t) * STEP_H - pad_h
        g2 = gather_row(x, n, h + 2, j, pad_w, CONFIG)
        # Weights first, as in `conv3x3.convolve`. Compiled: Triton else starts the product from the bias, and ptxas
        # puts waits of its own between its instructions.
        z = dot(w0, g0, tl.zeros((BLOCK_O, PIXELS), ACC), PRECISION)
        z = tl.trans(dot(w2, g2, dot(w1, g1, z, PRECISION), PRECISION))
        if b is not None:
            z += bias[None, :]
        z = activate(z, ACT, y.data.dtype.element_ty, CONFIG.PTX)
        store_box(y, z, Pixels(n, first + t, j), col, BLOCK_O, CONFIG)
        if STEP_H == 1:
            g0, g1 = g1, g2
        else:
            g0 = g2
            g1 = gather_row(x, n, h + 3, j, pad_w, CONFIG)


@triton.jit
def three_of_four(x):
    """Of x (rows, columns, 2, 2) the parts (0, 0), (0, 1) and (1, 0), each (rows, columns)."""
    even, odd = tl.split(x)
    first, third = tl.split(even)
    second, _ = tl.split(odd)
    return first, second, third


@triton.jit(do_not_specialize=SIZES)
def few_channels_dgrad(dz, strides, w, dx, N, H, W, P, Q, O, pad_h, pad_w, CONFIG: tl.constexpr):
    """dx of up to four channels, with a stride of 1: BOX.H rows of BOX.W − 2 columns of BOX.N images a program.

        dx[n, h, v, c] = Σ_rs p[n, h + pad_h − r, v + pad_w − s, k]      p[n, i, j, k] = Σₒ dz[n, i, j, o]·w[o, k]

    with k = (r, s, c). Row by row, BOX.W pixels of dz are read once and multiplied with all taps. Each row of dx is the
    sum of three rows of products, and each pixel that of three neighbours in it; a box's last two miss some, and are
    the next box's.

    k has the bits r r s c c s: BLOCK_K is 64. Compiled: of a product a thread has columns that differ in the first
    three and the last bit, and four lanes share the others, so rows are added and taps taken apart within a thread.
    Only neighbours meet through shared memory.
    """
    await_previous()
    BOX: tl.constexpr = CONFIG.BOX
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    C: tl.constexpr = CONFIG.C
    VEC: tl.constexpr = CONFIG.VEC
    PRECISION: tl.constexpr = CONFIG.PRECISION
    PIXELS: tl.constexpr = BOX.N * BOX.W
    ACC: tl.constexpr = accumulator(dx.data.dtype)
    n, first, left = box_at(tl.program_id(0), H, W, Box(BOX.N, BOX.H, BOX.W - 2))
    k = tl.arange(0, BLOCK_K)[None, :]
    r, s, c = k // 16, k // 8 % 2 * 2 + k % 2, k // 2 % 4
    at = c * 9 + r * 3 + s if CONFIG.TAPS_LAST else (r * 3 + s) * C + c
    o, o_inside = masked_range(0, O, CONFIG.BLOCK_O, 1)
    inside = o_inside[:, None] & (r < 3) & (s < 3) & (c < C)
    taps = tl.load(w + tl.where(inside, o[:, None] * (9 * C) + at, 0), mask=inside, other=0.0)
    taps = round_operand(taps, taps.dtype, PRECISION)

    m_n, _, column = pixels_of(Pixels(n, 0, 0), Box(BOX.N, 1, BOX.W))
    v = tl.where(column < BOX.W - 2, left + column, -1)
    c, c_inside = masked_range(0, C, 4, CONFIG.VEC_STORE if CONFIG.CHANNELS_LAST else 1)
    m = tl.broadcast_to(tl.arange(0, PIXELS)[:, None], (PIXELS, 4))
    dx = Batch(*dx, N, H, W, C)
    # What the last two rows of dz gave the row of dx that the next one completes, and the row after that.
    complete = tl.zeros((PIXELS, 16), ACC)
    begun = tl.zeros((PIXELS, 16), ACC)
    for t in range(0, tl.minimum(BOX.H, H - first) + 2):
        box = Pixels(n, first + t, left)
        pixel_map = PixelMap(1, 1, pad_h - 2, pad_w - 2)
        image = Batch(dz, *strides, N, P, Q, tl.cdiv(O, VEC) * VEC)
        z = load_box(image, box, pixel_map, 0, Box(BOX.N, 1, BOX.W), CONFIG.BLOCK_O, VEC)
        p = dot(z, taps, tl.zeros((PIXELS, BLOCK_K), ACC), PRECISION)
        p0, p1, p2 = three_of_four(tl.permute(tl.reshape(p, (PIXELS, 2, 2, 16)), (0, 3, 1, 2)))
        q0, q1, q2 = three_of_four(tl.permute(tl.reshape(complete + p0, (PIXELS, 2, 4, 2)), (0, 2, 1, 3)))
        complete, begun = begun + p1, p2
        q1 = tl.gather(q1, tl.minimum(m + 1, PIXELS - 1), 0)
        q0 = tl.gather(q0, tl.minimum(m + 2, PIXELS - 1), 0)
        total = q2 + q1 + q0
        pixels = Pixels(m_n, tl.where(t < 2, -1, first + t - 2), v)
        store_row(dx, total, pixels, c, c_inside, CONFIG)


@triton.jit(do_not_specialize=[*SIZES, "boxes_per_split"])
def few_channels_wgrad(dz, y, x, dw, db, N, H, W, P, Q, O, pad_h, pad_w, boxes_per_split, CONFIG: tl.constexpr):
    """dw[split] (O, 9·C) and db[split] (O,), or None, of the boxes of split = program_id(1).

    With FUSE_DZ the argument `dz` holds dy, and dz = dy·act′ is formed on the way in: nobody else needs it.
    """
    await_previous()
    ACT: tl.constexpr = CONFIG.ACT
    BOX: tl.constexpr = CONFIG.BOX
    PIXELS: tl.constexpr = BOX.N * BOX.H * BOX.W
    BLOCK_O: tl.constexpr = CONFIG.BLOCK_O
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    C: tl.constexpr = CONFIG.C
    CHANNELS_LAST: tl.constexpr = CONFIG.CHANNELS_LAST
    VEC: tl.constexpr = CONFIG.VEC
    PRECISION: tl.constexpr = CONFIG.PRECISION
    RUN: tl.constexpr = VEC if VEC < BOX.W else BOX.W
    # Counted: a tile that is multiplied and summed lies in shared memory so that eight threads at a time read one bank.
    # 16-bit numbers are summed by the product itself, exactly, in a column that it has free.
    HALF: tl.constexpr = dz.data.dtype.element_ty.primitive_bitwidth == 16
    ONES: tl.constexpr = HALF and not CONFIG.FUSE_DZ and db is not None
    ACC: tl.constexpr = accumulator(dz.data.dtype)
    col = tl.program_id(0) * BLOCK_O
    split = tl.program_id(1)
    boxes = tl.cdiv(N, BOX.N) * tl.cdiv(P, BOX.H) * tl.cdiv(Q, BOX.W)
    o, o_inside = masked_range(col, O, BLOCK_O, VEC if CHANNELS_LAST else 1)
    x = Batch(*x, N, H, W, C)
    dz = Batch(*dz, N, P, Q, O)
    acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    sums = tl.zeros((PIXELS, BLOCK_O), ACC)
    index = split * boxes_per_split
    box = box_at(index, P, Q, BOX)
    for _turn in range(index, tl.minimum(index + boxes_per_split, boxes)):  # Triton 3.6 carries a `_`
        pixels = pixels_of(box, BOX)
        at, mask = offsets(dz, pixels, o, o_inside, CHANNELS_LAST, VEC, RUN)
        z = tl.load(dz.data + at, mask=mask, other=0.0)
        if CONFIG.FUSE_DZ:
            at, _ = offsets(Batch(*y, N, P, Q, O), pixels, o, o_inside, CHANNELS_LAST, VEC, RUN)
            z = gradient(z, tl.load(y.data + at, mask=mask, other=0.0), ACT)
        if db is not None and not ONES:
            sums += z.to(ACC)
        g = gather(x, pixels, P, Q, (pad_h, pad_w), ONES, CONFIG)
        acc = dot(tl.trans(round_to(z, g.dtype)), tl.trans(g), acc, PRECISION)
        box = next_box(box, P, Q, BOX)
    row = split.to(tl.int64) * O + o
    k, k_inside = masked_range(0, 9 * C, BLOCK_K, 1)
    if db is not None:
        if ONES:
            column = tl.arange(0, BLOCK_K)[None, :] == 9 * C
            at = db + row[:, None] + tl.zeros((1, BLOCK_K), tl.int32)
            tl.store(at, round_to(acc, db.dtype.element_ty), mask=o_inside[:, None] & column)
        else:
            tl.store(db + row, round_to(tl.sum(sums, 0), db.dtype.element_ty), mask=o_inside)
    at = dw + (row[:, None] * (9 * C) + k[None, :])
    tl.store(at, round_to(acc, dw.dtype.element_ty), mask=o_inside[:, None] & k_inside[None, :])
