"""A 3×3 convolution of each channel by itself: nine multiplications a pixel, bound by memory.

    y[n, p, q, c] = act(b[c] + Σ_rs x[n, p·SH + r − pad_h, q·SW + s − pad_w, c]·w[c, rs])    and its gradients

A program takes BOX_H rows of a tile of columns (of BOX_N images) × channels, wide in whichever is contiguous: either
layout is read where it lies. A row that is read, three times for its three taps, serves all the rows of the result that
it meets, four rows at a time. (Compiled for sm_90, bfloat16: a load for each tap of each row took 58 instructions a
result, and memory leaves time for 38.)
"""

import triton
import triton.language as tl

from .common import indices, round_to, sigmoid
from .conv3x3 import box_at, pixels, positions, row_of_class, rows_of_class

SIZES = ["N", "H", "W", "P", "Q", "C", "pad_h", "pad_w"]


@triton.jit
def load_row(
    src, n, h, v, c, c_inside, N, H, W, stride_n, stride_c, stride_h, stride_w,
    LAST: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Row h of images n, columns v: pixels × channels, zeros outside. VEC as in `conv3x3.positions`.

    Where columns are contiguous they come last here: a warp's threads then take neighbouring ones, one each. Counted:
    of 8 columns a thread, which only a store can have at once, a load under a tap met 20 sectors for 2.
    """
    at, inside = positions(n, h, v, c, N, H, W, stride_n, stride_c, stride_h, stride_w, LAST, VEC, 1)
    mask = inside[:, None] & c_inside[None, :]
    if LAST:
        row = tl.load(src + at, mask=mask, other=0.0)
    else:
        row = tl.trans(tl.load(src + tl.trans(at), mask=tl.trans(mask), other=0.0))
    return row.to(ACC)


@triton.jit
def store_row(
    dst, tile, n, h, v, c, c_inside, N, H, W, stride_n, stride_c, stride_h, stride_w,
    LAST: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    at, inside = positions(n, h, v, c, N, H, W, stride_n, stride_c, stride_h, stride_w, LAST, VEC, 1)
    mask = inside[:, None] & c_inside[None, :]
    tile = round_to(tile, dst.dtype.element_ty)
    if LAST:
        tl.store(dst + at, tile, mask=mask)
    else:
        tl.store(dst + tl.trans(at), tl.trans(tile), mask=tl.trans(mask))


@triton.jit
def load_taps(w, c, c_inside, ACC: tl.constexpr):
    """The nine weights of each channel, a row for each tap. w: (C, 9)."""
    taps = ()
    for tap in tl.static_range(9):
        taps = taps + (tl.load(w + (c * 9 + tap), mask=c_inside, other=0.0).to(ACC)[None, :],)
    return taps


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLS), ACC),)
    return tiles


@triton.jit
def load_rows(
    src, n, h, v, c, c_inside, N, H, W, stride_n, stride_c, stride_h, stride_w,
    STEP: tl.constexpr, TAPS: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Four rows from h on, each under TAPS taps, STEP columns apart from v on. All are asked for before one is used."""
    rows = ()
    for u in tl.static_range(4):
        row = ()
        for t in tl.static_range(TAPS):
            tile = load_row(
                src,
                n,
                h + u,
                v + t * STEP,
                c,
                c_inside,
                N,
                H,
                W,
                stride_n,
                stride_c,
                stride_h,
                stride_w,
                LAST,
                VEC,
                ACC,
            )
            row = row + (tile,)
        rows = rows + (row,)
    return rows


@triton.jit
def add_taps(total, row, taps, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """total + Σₜ row[t]·taps[FIRST + t·STEP]."""
    for t in tl.static_range(COUNT):
        total += row[t] * taps[FIRST + t * STEP]
    return total


@triton.jit(do_not_specialize=SIZES)
def depthwise_forward(
    x, w, b, y, N, H, W, P, Q, C, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    ACCURATE: tl.constexpr, PTX: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(x ⋆ w + b): BOX_H rows of BOX_W columns of BOX_N images, BLOCK_C channels a program.

    A row of x is read once and added to the rows of y that it meets: the one it completes, and those begun with it.
    """
    columns = tl.cdiv(C, BLOCK_C)
    c, c_inside = indices(tl.program_id(0) % columns * BLOCK_C, C, BLOCK_C, VEC if LAST else 1)
    taps = load_taps(w, c, c_inside, ACC)
    if HAS_BIAS:
        bias = tl.load(b + c, mask=c_inside, other=0.0).to(ACC)[None, :]
    n, first, j = box_at(tl.program_id(0) // columns, P, Q, BOX_N, BOX_H, BOX_W)
    n, _, j = pixels(n, first, j, BOX_N, 1, BOX_W)
    none = tl.zeros((BOX_N * BOX_W, BLOCK_C), ACC)
    complete = none
    begun = none
    height = tl.minimum(BOX_H, P - first)
    for t in range(0, (height - 1) * STEP_H + 3, 4):
        rows = load_rows(
            x, n, first * STEP_H + (t - pad_h), j * STEP_W - pad_w, c, c_inside, N, H, W,
            stride_n, stride_c, stride_h, stride_w, 1, 3, LAST, VEC, ACC,
        )  # fmt: skip
        for u in tl.static_range(4):
            if u % STEP_H == 0:
                result = add_taps(complete, rows[u], taps, 6, 1, 3)
                if STEP_H == 1:
                    complete = add_taps(begun, rows[u], taps, 3, 1, 3)
                    begun = add_taps(none, rows[u], taps, 0, 1, 3)
                else:
                    complete = add_taps(none, rows[u], taps, 0, 1, 3)
                if HAS_BIAS:
                    result += bias
                if SIGMOID:
                    result = sigmoid(result, ACCURATE, PTX)
                i = (t + u - 2) // STEP_H
                store_row(
                    y, result, n, tl.where((t + u >= 2) & (i < height), first + i, -1), j, c, c_inside, N, P, Q,
                    y_stride_n, y_stride_c, y_stride_h, y_stride_w, LAST, VEC_STORE,
                )  # fmt: skip
            else:
                complete = add_taps(complete, rows[u], taps, 3, 1, 3)


@triton.jit(do_not_specialize=SIZES)
def depthwise_dgrad(
    dz, w, dx, N, H, W, P, Q, C, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx from dz: BOX_H rows of BOX_W columns of BOX_N images, BLOCK_C channels a program, row by row as forward.

    With a stride of 2, pixels that meet the same taps make a class, program_id(1), as in `conv3x3.dgrad`.
    """
    columns = tl.cdiv(C, BLOCK_C)
    c, c_inside = indices(tl.program_id(0) % columns * BLOCK_C, C, BLOCK_C, VEC if LAST else 1)
    taps = load_taps(w, c, c_inside, ACC)
    none = tl.zeros((BOX_N * BOX_W, BLOCK_C), ACC)
    for class_h in tl.static_range(STEP_H):
        for class_w in tl.static_range(STEP_W):
            if tl.program_id(1) == class_h * STEP_W + class_w:
                height, first_h = rows_of_class(H, pad_h, class_h, STEP_H)
                width, first_w = rows_of_class(W, pad_w, class_w, STEP_W)
                TAPS_H: tl.constexpr = (2 - class_h) // STEP_H + 1
                TAPS_W: tl.constexpr = (2 - class_w) // STEP_W + 1
                ROW: tl.constexpr = 3 * STEP_H  # from one tap of a column to the next
                TAP: tl.constexpr = class_h * 3 + class_w
                n, first, j = box_at(tl.program_id(0) // columns, height, width, BOX_N, BOX_H, BOX_W)
                n, _, j = pixels(n, first, j, BOX_N, 1, BOX_W)
                v = row_of_class(j, first_w, pad_w, class_w, STEP_W)
                end = tl.minimum(first + BOX_H, height)
                complete = none
                begun = none
                for t in range(1 - TAPS_H, end - first, 4):
                    rows = load_rows(
                        dz, n, first + t + first_h, j + first_w, c, c_inside, N, P, Q,
                        stride_n, stride_c, stride_h, stride_w, -1, TAPS_W, LAST, VEC, ACC,
                    )  # fmt: skip
                    for u in tl.static_range(4):
                        result = add_taps(complete, rows[u], taps, TAP, STEP_W, TAPS_W)
                        if TAPS_H == 3:
                            complete = add_taps(begun, rows[u], taps, TAP + ROW, STEP_W, TAPS_W)
                            begun = add_taps(none, rows[u], taps, TAP + 2 * ROW, STEP_W, TAPS_W)
                        elif TAPS_H == 2:
                            complete = add_taps(none, rows[u], taps, TAP + ROW, STEP_W, TAPS_W)
                        i = first + t + u
                        h = row_of_class(i, first_h, pad_h, class_h, STEP_H)
                        store_row(
                            dx, result, n, tl.where((t + u >= 0) & (i < end), h, -1), v, c, c_inside, N, H, W,
                            x_stride_n, x_stride_c, x_stride_h, x_stride_w, LAST, VEC_STORE,
                        )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "boxes_per_split"])
def depthwise_wgrad(
    dz, x, dw, db, N, H, W, P, Q, C, pad_h, pad_w, z_stride_n, z_stride_c, z_stride_h, z_stride_w,
    stride_n, stride_c, stride_h, stride_w, boxes_per_split,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, WRITE_DB: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, VEC_Z: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw[split] (C, 9) and db[split] (C,) of the boxes of split = program_id(1), BLOCK_C channels a program.

    Where dz does not exist its zero must meet a zero, for an infinity of x would make it NaN. WHOLE: all rows exist.
    """
    split = tl.program_id(1)
    c, c_inside = indices(tl.program_id(0) * BLOCK_C, C, BLOCK_C, VEC if LAST else 1)
    boxes = tl.cdiv(N, BOX_N) * tl.cdiv(P, BOX_H) * tl.cdiv(Q, BOX_W)
    acc = zeros(9, BOX_N * BOX_W, BLOCK_C, ACC)
    sums = tl.zeros((BOX_N * BOX_W, BLOCK_C), ACC)
    for box in range(split * boxes_per_split, tl.minimum((split + 1) * boxes_per_split, boxes)):
        n, i, j = box_at(box, P, Q, BOX_N, BOX_H, BOX_W)
        n, _, j = pixels(n, i, j, BOX_N, 1, BOX_W)
        z = ()
        for a in tl.static_range(BOX_H):
            z_row = load_row(
                dz, n, i + a, j, c, c_inside, N, P, Q, z_stride_n, z_stride_c, z_stride_h, z_stride_w,
                LAST, VEC_Z, ACC,
            )  # fmt: skip
            z = z + (z_row,)
            if WRITE_DB:
                sums += z_row
        for t in tl.static_range((BOX_H - 1) * STEP_H + 3):
            for s in tl.static_range(3):
                v = tl.where(j < Q, j * STEP_W + (s - pad_w), -1)
                row = load_row(
                    x, n, i * STEP_H + (t - pad_h), v, c, c_inside, N, H, W,
                    stride_n, stride_c, stride_h, stride_w, LAST, VEC, ACC,
                )  # fmt: skip
                for a in tl.static_range(BOX_H):
                    if t - a * STEP_H >= 0 and t - a * STEP_H <= 2:
                        met = row
                        if not WHOLE:
                            met = tl.where(i + a < P, row, 0.0)
                        acc = replaced(acc, (t - a * STEP_H) * 3 + s, acc[(t - a * STEP_H) * 3 + s] + z[a] * met)
    if WRITE_DB:
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
        if k == INDEX:
            result = result + (tile,)
        else:
            result = result + (tiles[k],)
    return result
