"""A 3×3 convolution of each channel by itself: nine multiplications a pixel, bound by memory.

    y[n, p, q, c] = act(b[c] + Σ_rs x[n, p·SH + r − pad_h, q·SW + s − pad_w, c]·w[c, rs])    and its gradients

A program takes BOX_H rows of a tile of columns (of BOX_N images) × channels, wide in whichever is contiguous: either
layout is read where it lies. A row that is read, three times for its three taps, serves all the rows of the result that
it meets. (Compiled for sm_90, bfloat16: a load for each tap of each row took 58 instructions a result, and memory
leaves time for 38.)
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


@triton.jit(do_not_specialize=[*SIZES, "boxes_per_split"])
def depthwise_forward(
    x, w, b, y, N, H, W, P, Q, C, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    y_stride_n, y_stride_c, y_stride_h, y_stride_w, boxes_per_split,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    ACCURATE: tl.constexpr, PTX: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(x ⋆ w + b): `boxes_per_split` boxes of y's pixels and BLOCK_C channels a program."""
    columns = tl.cdiv(C, BLOCK_C)
    c, c_inside = indices(tl.program_id(0) % columns * BLOCK_C, C, BLOCK_C, VEC if LAST else 1)
    taps = load_taps(w, c, c_inside, ACC)
    if HAS_BIAS:
        bias = tl.load(b + c, mask=c_inside, other=0.0).to(ACC)
    boxes = tl.cdiv(N, BOX_N) * tl.cdiv(P, BOX_H) * tl.cdiv(Q, BOX_W)
    first = tl.program_id(0) // columns * boxes_per_split
    for box in range(first, tl.minimum(first + boxes_per_split, boxes)):
        n, i, j = box_at(box, P, Q, BOX_N, BOX_H, BOX_W)
        n, _, j = pixels(n, i, j, BOX_N, 1, BOX_W)
        z = zeros(BOX_H, BOX_N * BOX_W, BLOCK_C, ACC)
        for t in tl.static_range((BOX_H - 1) * STEP_H + 3):
            for s in tl.static_range(3):
                row = load_row(
                    x, n, i * STEP_H + (t - pad_h), j * STEP_W + (s - pad_w), c, c_inside, N, H, W,
                    stride_n, stride_c, stride_h, stride_w, LAST, VEC, ACC,
                )  # fmt: skip
                added = ()
                for a in tl.static_range(BOX_H):
                    if t - a * STEP_H >= 0 and t - a * STEP_H <= 2:
                        added = added + (z[a] + row * taps[(t - a * STEP_H) * 3 + s],)
                    else:
                        added = added + (z[a],)
                z = added
        for a in tl.static_range(BOX_H):
            result = z[a]
            if HAS_BIAS:
                result += bias[None, :]
            if SIGMOID:
                result = sigmoid(result, ACCURATE, PTX)
            store_row(
                y, result, n, i + a, j, c, c_inside, N, P, Q, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
                LAST, VEC_STORE,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "boxes_per_split"])
def depthwise_dgrad(
    dz, w, dx, N, H, W, P, Q, C, pad_h, pad_w, stride_n, stride_c, stride_h, stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, boxes_per_split,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx from dz: `boxes_per_split` boxes of dx's pixels and BLOCK_C channels a program.

    With a stride of 2, pixels that meet the same taps make a class, program_id(1), as in `conv3x3.dgrad`.
    """
    columns = tl.cdiv(C, BLOCK_C)
    c, c_inside = indices(tl.program_id(0) % columns * BLOCK_C, C, BLOCK_C, VEC if LAST else 1)
    taps = load_taps(w, c, c_inside, ACC)
    for class_h in tl.static_range(STEP_H):
        for class_w in tl.static_range(STEP_W):
            if tl.program_id(1) == class_h * STEP_W + class_w:
                rows, first_h = rows_of_class(H, pad_h, class_h, STEP_H)
                cols, first_w = rows_of_class(W, pad_w, class_w, STEP_W)
                TAPS_H: tl.constexpr = (2 - class_h) // STEP_H + 1
                TAPS_W: tl.constexpr = (2 - class_w) // STEP_W + 1
                boxes = tl.cdiv(N, BOX_N) * tl.cdiv(rows, BOX_H) * tl.cdiv(cols, BOX_W)
                first = tl.program_id(0) // columns * boxes_per_split
                for box in range(first, tl.minimum(first + boxes_per_split, boxes)):
                    n, i, j = box_at(box, rows, cols, BOX_N, BOX_H, BOX_W)
                    n, _, j = pixels(n, i, j, BOX_N, 1, BOX_W)
                    acc = zeros(BOX_H, BOX_N * BOX_W, BLOCK_C, ACC)
                    for t in tl.static_range(BOX_H + TAPS_H - 1):
                        for t_w in tl.static_range(TAPS_W):
                            row = load_row(
                                dz, n, i + (first_h + t - (TAPS_H - 1)), j + (first_w - t_w), c, c_inside, N, P, Q,
                                stride_n, stride_c, stride_h, stride_w, LAST, VEC, ACC,
                            )  # fmt: skip
                            added = ()
                            for a in tl.static_range(BOX_H):
                                # Row a meets tap t_h in row a − t_h of dz, and this is row t − (TAPS_H − 1).
                                if a - t + TAPS_H - 1 >= 0 and a - t + TAPS_H - 1 < TAPS_H:
                                    tap = taps[(class_h + (a - t + TAPS_H - 1) * STEP_H) * 3 + class_w + t_w * STEP_W]
                                    added = added + (acc[a] + row * tap,)
                                else:
                                    added = added + (acc[a],)
                            acc = added
                    v = row_of_class(j, first_w, pad_w, class_w, STEP_W)
                    for a in tl.static_range(BOX_H):
                        h = row_of_class(i + a, first_h, pad_h, class_h, STEP_H)
                        store_row(
                            dx, acc[a], n, h, v, c, c_inside, N, H, W, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
                            LAST, VEC_STORE,
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
