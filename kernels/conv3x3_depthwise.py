"""A 3×3 convolution of each channel by itself: nine multiplications a pixel, bound by memory.

    y[n, p, q, c] = act(b[c] + Σ_rs x[n, p·SH + r − pad_h, q·SW + s − pad_w, c]·w[c, rs])    and its gradients

A program takes BOX.H rows of a tile of columns (of BOX.N images) × channels, wide in whichever is contiguous: either
layout is read where it lies. A row that is read, three times for its three taps, serves all the rows of the result that
it meets, four rows at a time. (Compiled for sm_90, bfloat16: a load for each tap of each row took 58 instructions a
result, and memory leaves time for 38.)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import Act, activate
from .common import accumulator, await_previous, masked_range, round_to, zeros
from .conv3x3 import Batch, Box, Pixels, box_at, next_box, offsets, pixels_of, row_of_class, rows_of_class

SIZES = ["N", "H", "W", "P", "Q", "C", "pad_h", "pad_w"]


class Depthwise(NamedTuple):
    """What is fixed when a kernel of this file is compiled; PTX as in `common`."""

    BLOCK_C: int  # channels a program
    BOX: Box  # pixels of the result, a program; in wgrad of dz
    STEP_H: int  # the stride
    STEP_W: int
    CHANNELS_LAST: bool  # in memory; else columns are contiguous
    VEC: int  # as in `conv3x3.offsets`, of what is read; in wgrad of x
    VEC_STORE: int | None = None  # of what is written
    VEC_Z: int | None = None  # of dz, in wgrad
    WHOLE: bool | None = None  # of wgrad: all rows of every box exist
    ACT: Act | None = None  # of forward
    PTX: bool | None = None


@triton.jit
def load_row(image, pixels, c, c_inside, VEC: tl.constexpr, CONFIG: tl.constexpr):
    """Pixels × channels of an image in the accumulator's type, zeros outside. VEC as in `conv3x3.offsets`.

    Where columns are contiguous they come last here: a warp's threads then take neighbouring ones, one each. Counted:
    of 8 columns a thread, which only a store can have at once, a load under a tap met 20 sectors for 2.
    """
    at, mask = offsets(image, pixels, c, c_inside, CONFIG.CHANNELS_LAST, VEC, 1)
    if CONFIG.CHANNELS_LAST:
        row = tl.load(image.data + at, mask=mask, other=0.0)
    else:
        row = tl.trans(tl.load(image.data + tl.trans(at), mask=tl.trans(mask), other=0.0))
    return row.to(accumulator(image.data.dtype))


@triton.jit
def store_row(image, tile, pixels, c, c_inside, CONFIG: tl.constexpr):
    """Write pixels × channels of an image, rounded to its type; likewise, with VEC_STORE."""
    at, mask = offsets(image, pixels, c, c_inside, CONFIG.CHANNELS_LAST, CONFIG.VEC_STORE, 1)
    tile = round_to(tile, image.data.dtype.element_ty)
    if CONFIG.CHANNELS_LAST:
        tl.store(image.data + at, tile, mask=mask)
    else:
        tl.store(image.data + tl.trans(at), tl.trans(tile), mask=tl.trans(mask))


@triton.jit
def load_taps(w, c, c_inside):
    """The nine weights of each channel, a row for each tap. w: (C, 9)."""
    taps = ()
    for tap in tl.static_range(9):
        row = tl.load(w + (c * 9 + tap), mask=c_inside, other=0.0).to(accumulator(w.dtype))
        taps = taps + (row[None, :],)
    return taps


@triton.jit
def load_rows(image, first, c, c_inside, STEP: tl.constexpr, TAPS: tl.constexpr, CONFIG: tl.constexpr):
    """Four rows from the pixels `first` on, each under TAPS taps, STEP columns apart. All are asked for before one is
    used.
    """
    n, h, v = first
    rows = ()
    for u in tl.static_range(4):
        row = ()
        for t in tl.static_range(TAPS):
            row = row + (load_row(image, Pixels(n, h + u, v + t * STEP), c, c_inside, CONFIG.VEC, CONFIG),)
        rows = rows + (row,)
    return rows


@triton.jit
def add_taps(total, row, taps, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """total + Σₜ row[t]·taps[FIRST + t·STEP]."""
    for t in tl.static_range(COUNT):
        total += row[t] * taps[FIRST + t * STEP]
    return total


@triton.jit(do_not_specialize=SIZES)
def depthwise_forward(x, w, b, y, N, H, W, P, Q, C, pad_h, pad_w, CONFIG: tl.constexpr):
    """y = act(x ⋆ w + b): BOX.H rows of BOX.W columns of BOX.N images, BLOCK_C channels a program.

    A row of x is read once and added to the rows of y that it meets: the one it completes, and those begun with it.
    """
    await_previous()
    ACT: tl.constexpr = CONFIG.ACT
    BOX: tl.constexpr = CONFIG.BOX
    PIXELS: tl.constexpr = BOX.N * BOX.W  # of a row
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    STEP_H: tl.constexpr = CONFIG.STEP_H
    columns = tl.cdiv(C, BLOCK_C)
    col = tl.program_id(0) % columns * BLOCK_C
    c, c_inside = masked_range(col, C, BLOCK_C, CONFIG.VEC if CONFIG.CHANNELS_LAST else 1)
    taps = load_taps(w, c, c_inside)
    zero = tl.zeros((PIXELS, BLOCK_C), accumulator(x.data.dtype))
    if b is not None:
        bias = tl.load(b + c, mask=c_inside, other=0.0).to(zero.dtype)[None, :]
    x = Batch(*x, N, H, W, C)
    y = Batch(*y, N, P, Q, C)
    box = box_at(tl.program_id(0) // columns, P, Q, BOX)
    first = box.h
    n, _, j = pixels_of(box, Box(BOX.N, 1, BOX.W))
    complete = zero
    begun = zero
    height = tl.minimum(BOX.H, P - first)
    for t in range(0, (height - 1) * STEP_H + 3, 4):
        met = Pixels(n, first * STEP_H + (t - pad_h), j * CONFIG.STEP_W - pad_w)
        rows = load_rows(x, met, c, c_inside, 1, 3, CONFIG)
        for u in tl.static_range(4):
            if u % STEP_H == 0:
                result = add_taps(complete, rows[u], taps, 6, 1, 3)
                if STEP_H == 1:
                    complete = add_taps(begun, rows[u], taps, 3, 1, 3)
                    begun = add_taps(zero, rows[u], taps, 0, 1, 3)
                else:
                    complete = add_taps(zero, rows[u], taps, 0, 1, 3)
                if b is not None:
                    result += bias
                result = activate(result, ACT, y.data.dtype.element_ty, CONFIG.PTX)
                i = (t + u - 2) // STEP_H
                h = tl.where((t + u >= 2) & (i < height), first + i, -1)
                store_row(y, result, Pixels(n, h, j), c, c_inside, CONFIG)
            else:
                complete = add_taps(complete, rows[u], taps, 3, 1, 3)


@triton.jit(do_not_specialize=SIZES)
def depthwise_dgrad(dz, w, dx, N, H, W, P, Q, C, pad_h, pad_w, CONFIG: tl.constexpr):
    """dx from dz: BOX.H rows of BOX.W columns of BOX.N images, BLOCK_C channels a program, row by row as forward.

    With a stride of 2, pixels that meet the same taps make a class, program_id(1), as in `conv3x3.dgrad`.
    """
    await_previous()
    BOX: tl.constexpr = CONFIG.BOX
    PIXELS: tl.constexpr = BOX.N * BOX.W  # of a row
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    STEP_H: tl.constexpr = CONFIG.STEP_H
    STEP_W: tl.constexpr = CONFIG.STEP_W
    columns = tl.cdiv(C, BLOCK_C)
    col = tl.program_id(0) % columns * BLOCK_C
    c, c_inside = masked_range(col, C, BLOCK_C, CONFIG.VEC if CONFIG.CHANNELS_LAST else 1)
    taps = load_taps(w, c, c_inside)
    zero = tl.zeros((PIXELS, BLOCK_C), accumulator(dz.data.dtype))
    dz = Batch(*dz, N, P, Q, C)
    dx = Batch(*dx, N, H, W, C)
    for class_h in tl.static_range(STEP_H):
        for class_w in tl.static_range(STEP_W):
            if tl.program_id(1) == class_h * STEP_W + class_w:
                height, first_h = rows_of_class(H, pad_h, class_h, STEP_H)
                width, first_w = rows_of_class(W, pad_w, class_w, STEP_W)
                TAPS_H: tl.constexpr = (2 - class_h) // STEP_H + 1
                TAPS_W: tl.constexpr = (2 - class_w) // STEP_W + 1
                ROW: tl.constexpr = 3 * STEP_H  # from one tap of a column to the next
                TAP: tl.constexpr = class_h * 3 + class_w
                box = box_at(tl.program_id(0) // columns, height, width, BOX)
                first = box.h
                n, _, j = pixels_of(box, Box(BOX.N, 1, BOX.W))
                v = row_of_class(j, first_w, pad_w, class_w, STEP_W)
                end = tl.minimum(first + BOX.H, height)
                complete = zero
                begun = zero
                for t in range(1 - TAPS_H, end - first, 4):
                    met = Pixels(n, first + t + first_h, j + first_w)
                    rows = load_rows(dz, met, c, c_inside, -1, TAPS_W, CONFIG)
                    for u in tl.static_range(4):
                        result = add_taps(complete, rows[u], taps, TAP, STEP_W, TAPS_W)
                        if TAPS_H == 3:
                            complete = add_taps(begun, rows[u], taps, TAP + ROW, STEP_W, TAPS_W)
                            begun = add_taps(zero, rows[u], taps, TAP + 2 * ROW, STEP_W, TAPS_W)
                        elif TAPS_H == 2:
                            complete = add_taps(zero, rows[u], taps, TAP + ROW, STEP_W, TAPS_W)
                        i = first + t + u
                        h = row_of_class(i, first_h, pad_h, class_h, STEP_H)
                        h = tl.where((t + u >= 0) & (i < end), h, -1)
                        store_row(dx, result, Pixels(n, h, v), c, c_inside, CONFIG)


@triton.jit(do_not_specialize=[*SIZES, "boxes_per_split"])
def depthwise_wgrad(dz, x, dw, db, N, H, W, P, Q, C, pad_h, pad_w, boxes_per_split, CONFIG: tl.constexpr):
    """dw[split] (C, 9) and db[split] (C,), or None, of the boxes of split = program_id(1), BLOCK_C channels a program.

    Where dz does not exist its zero must meet a zero, for an infinity of x would make it NaN.
    """
    await_previous()
    BOX: tl.constexpr = CONFIG.BOX
    PIXELS: tl.constexpr = BOX.N * BOX.W  # of a row
    ROWS: tl.constexpr = BOX.H
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    STEP_H: tl.constexpr = CONFIG.STEP_H
    ACC: tl.constexpr = accumulator(dz.data.dtype)
    split = tl.program_id(1)
    c, c_inside = masked_range(tl.program_id(0) * BLOCK_C, C, BLOCK_C, CONFIG.VEC if CONFIG.CHANNELS_LAST else 1)
    boxes = tl.cdiv(N, BOX.N) * tl.cdiv(P, BOX.H) * tl.cdiv(Q, BOX.W)
    dz = Batch(*dz, N, P, Q, C)
    x = Batch(*x, N, H, W, C)
    acc = zeros(9, PIXELS, BLOCK_C, ACC)
    sums = tl.zeros((PIXELS, BLOCK_C), ACC)
    index = split * boxes_per_split
    box = box_at(index, P, Q, BOX)
    for _turn in range(index, tl.minimum(index + boxes_per_split, boxes)):  # Triton 3.6 carries a `_`
        i = box.h
        n, _, j = pixels_of(box, Box(BOX.N, 1, BOX.W))
        z = ()
        for a in tl.static_range(ROWS):
            z_row = load_row(dz, Pixels(n, i + a, j), c, c_inside, CONFIG.VEC_Z, CONFIG)
            z = z + (z_row,)
            if db is not None:
                sums += z_row
        for t in tl.static_range((ROWS - 1) * STEP_H + 3):
            for s in tl.static_range(3):
                v = tl.where(j < Q, j * CONFIG.STEP_W + (s - pad_w), -1)
                row = load_row(x, Pixels(n, i * STEP_H + (t - pad_h), v), c, c_inside, CONFIG.VEC, CONFIG)
                for a in tl.static_range(ROWS):
                    if t - a * STEP_H >= 0 and t - a * STEP_H <= 2:
                        met = row
                        if not CONFIG.WHOLE:
                            met = tl.where(i + a < P, row, 0.0)
                        acc = replaced(acc, (t - a * STEP_H) * 3 + s, acc[(t - a * STEP_H) * 3 + s] + z[a] * met)
        box = next_box(box, P, Q, BOX)
    if db is not None:
        total = round_to(tl.sum(sums, 0), db.dtype.element_ty)
        tl.store(db + split.to(tl.int64) * C + c, total, mask=c_inside)
    for tap in tl.static_range(9):
        total = round_to(tl.sum(acc[tap], 0), dw.dtype.element_ty)
        tl.store(dw + ((split.to(tl.int64) * C + c) * 9 + tap), total, mask=c_inside)


@triton.jit
def replaced(tiles, INDEX: tl.constexpr, tile):
    """`tiles` with another one at INDEX."""
    result = ()
    for k in tl.static_range(9):
        result = result + (tile if k == INDEX else tiles[k],)
    return result
