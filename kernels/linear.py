"""y = act(x·wᵀ + b) and its gradients.

    x: (M, K)    w: (N, K)    b: (N,)    y, dy, dz: (M, N)

    forward       y  = act(x·wᵀ + b), or with SPLIT parts of x·wᵀ, which `output` makes y of
    output_grad   dz = dy·act′,   db = Σ_rows dz
    dgrad         dx = dz·w
    wgrad         dw = dzᵀ·x
    backward      all of these in one pass over x, of a layer of few outputs

Backward needs the output y, never z (`activations`); without an activation not even that, for dz is dy. It has one of
three forms:

    few outputs            backward
    few columns of x       wgrad, which forms dz as it loads dy and y (FUSE_DZ), sums db as it goes, and hands dz on to
                           dgrad: a pass over memory less, for more instructions in the loop
    otherwise              output_grad, then wgrad and dgrad, which read dz

What writes the dx of a layer that stands above another multiplies it by that one's derivative (LOWER_ACT): it is the
lower layer's dz. Sums over rows that several programs share leave partial results, one a program, which
`reduce_partials` adds in a fixed order: no atomics, the same bits every time.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import Act, activate, gradient
from .common import (
    Matrix,
    Reduce,
    accumulator,
    add_appended,
    await_previous,
    dot,
    element_type,
    load_tile,
    masked_range,
    product,
    round_operand,
    round_to,
    store_tile,
    tile_of,
)

# Sizes are not specialized: no recompile when a batch is 1 or a multiple of 16; what alignment there is, VEC says.


class Product(NamedTuple):
    """What is fixed when `forward`, `dgrad` or `wgrad` is compiled; fields as in `common`."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    PRECISION: str
    TMA: bool
    PREFETCH: bool
    VEC: int
    VEC_STORE: int
    ACT: Act | None = None  # of forward, and with FUSE_DZ
    LOWER_ACT: Act | None = None  # of dgrad: the activation of the layer below, whose dz it writes
    VEC_LOWER: int | None = None  # divides the rows of `lower_y` and its address
    TMA_STORE: bool | None = None
    X_TRANSPOSED: bool | None = None  # x lies column by column
    W_TRANSPOSED: bool | None = None
    PERSISTENT: bool | None = None  # a program takes several tiles of y
    SPLIT: bool | None = None  # of forward: a program has a part of the sum
    FUSE_DZ: bool | None = None
    SUMS: Reduce | None = None
    STAGES: int | None = None
    PTX: bool | None = None


class Backward(NamedTuple):
    """What is fixed when `backward` is compiled; fields as in `common`."""

    BLOCK_M: int
    BLOCK_N: int  # at least N
    BLOCK_K: int
    PRECISION: str
    VEC: int  # of dz and y
    VEC_X: int
    VEC_W: int
    VEC_STORE: int
    W_TRANSPOSED: bool
    FUSE_DZ: bool
    ACT: Act | None
    LOWER_ACT: Act | None
    SUMS: Reduce | None = None


class OutputGrad(NamedTuple):
    """What is fixed when `output_grad` is compiled; fields as in `common`."""

    BLOCK_M: int
    BLOCK_N: int
    ACT: Act
    VEC: int
    VEC_DY: int  # divides dy's distance from row to row


@triton.jit
def forward_tile(x, w, b, y, tile, first, CONFIG: tl.constexpr):
    """One tile of y = act(x·wᵀ + b), summed from column `first` of x on. x, w and y are a `Matrix` each."""
    ACT: tl.constexpr = CONFIG.ACT
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    W_TRANSPOSED: tl.constexpr = CONFIG.W_TRANSPOSED
    row, col = tile_of(tile, tl.cdiv(y.rows, BLOCK_M), tl.cdiv(y.cols, BLOCK_N), CONFIG.GROUP)
    m = row * BLOCK_M
    n = col * BLOCK_N
    z = product(x, w, m, n, first, CONFIG.X_TRANSPOSED, not W_TRANSPOSED, BLOCK_M, BLOCK_N, CONFIG.BLOCK_K, CONFIG)
    if b is not None:
        j, inside = masked_range(n, y.cols, BLOCK_N, 1)
        z += tl.load(b + j, mask=inside, other=0.0).to(z.dtype)[None, :]
    y_tile = activate(z, ACT, element_type(y.data.dtype), CONFIG.PTX)
    store_tile(y, y_tile, m, n, BLOCK_M, BLOCK_N, CONFIG.VEC_STORE)


@triton.jit(do_not_specialize=["M", "N", "K", "ldx", "ldw", "columns_per_split"])
def forward(x, w, b, y, M, N, K, ldx, ldw, columns_per_split, CONFIG: tl.constexpr):
    """y = act(x·wᵀ + b). One tile of y a program, or (PERSISTENT) every num_programs-th.

    With SPLIT, y[s] = x·wᵀ over the columns of split s = program_id(1), y: (splits, M, N), without b and act.
    """
    await_previous()
    if CONFIG.SPLIT:
        first = tl.program_id(1) * columns_per_split
        last = first + tl.minimum(columns_per_split, K - first)  # their sum may pass 2³¹
        pitch = N // CONFIG.VEC_STORE * CONFIG.VEC_STORE
        y = Matrix(y + tl.program_id(1).to(tl.int64) * M * pitch, M, N, N)
        forward_tile(Matrix(x, M, last, ldx), Matrix(w, last, N, ldw), b, y, tl.program_id(0), first, CONFIG)
    else:
        x = Matrix(x, M, K, ldx)
        w = Matrix(w, K, N, ldw)
        y = Matrix(y, M, N, N)
        if CONFIG.PERSISTENT:
            tiles = tl.cdiv(M, CONFIG.BLOCK_M) * tl.cdiv(N, CONFIG.BLOCK_N)
            for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False):
                forward_tile(x, w, b, y, tile, 0, CONFIG)
        else:
            forward_tile(x, w, b, y, tl.program_id(0), 0, CONFIG)


@triton.jit(do_not_specialize=["M", "N", "parts", "rows_per_program"])
def output_grad(dy, y, dz, db, M, N, parts, stride_dym, stride_dyn, rows_per_program, CONFIG: tl.constexpr):
    """dz = dy·act′, and db[p] = Σ dz over the rows of block p. dy has any strides: an expanded scalar's too.

    dz or db may be None, and y if there is no activation. parts: None, or of how many dy is the sum: (parts, M, N).
    """
    await_previous()
    ACT: tl.constexpr = CONFIG.ACT
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    VEC: tl.constexpr = CONFIG.VEC
    n = tl.program_id(0) * BLOCK_N
    j, j_inside = masked_range(n, N, BLOCK_N, VEC)
    first = tl.program_id(1) * rows_per_program
    # Of every BLOCK_M-th row: adding up across threads can wait until the end.
    sums = tl.zeros((BLOCK_M, BLOCK_N), accumulator(dy.dtype))
    last = first + tl.minimum(rows_per_program, M - first)  # their sum may pass 2³¹
    for m in range(first, last, BLOCK_M):
        i, i_inside = masked_range(m, M, BLOCK_M, 1)
        inside = i_inside[:, None] & j_inside[None, :]
        at = dy + (i[:, None] * (stride_dym // CONFIG.VEC_DY * CONFIG.VEC_DY) + j[None, :] * stride_dyn)
        dz_tile = tl.load(at, mask=inside, other=0.0)
        if parts is not None:
            for _ in range(1, parts):
                at += M * (stride_dym // CONFIG.VEC_DY * CONFIG.VEC_DY)
                dz_tile += tl.load(at, mask=inside, other=0.0)
        of_y = i[:, None] * (N // VEC * VEC) + j[None, :]
        if y is not None:
            dz_tile = gradient(dz_tile, tl.load(y + of_y, mask=inside, other=0.0), ACT)
        if dz is not None:
            tl.store(dz + of_y, round_to(dz_tile, dz.dtype.element_ty), mask=inside)
        if db is not None:
            sums += dz_tile.to(sums.dtype)
    if db is not None:
        total = round_to(tl.sum(sums, 0), db.dtype.element_ty)
        tl.store(db + tl.program_id(1).to(tl.int64) * N + j, total, mask=j_inside)


@triton.jit
def load_dy_and_y(dy, y, m, n, CONFIG: tl.constexpr):
    """The tiles of dy and y, a `Matrix` each, at (m, n)."""
    dy_tile = load_tile(dy, m, n, CONFIG.BLOCK_M, CONFIG.BLOCK_N, False, CONFIG.VEC)
    y_tile = load_tile(y, m, n, CONFIG.BLOCK_M, CONFIG.BLOCK_N, False, CONFIG.VEC)
    return dy_tile, y_tile


@triton.jit(do_not_specialize=["M", "N", "K", "ldy", "ldw"])
def dgrad(dz, y, w, dx, lower_y, lower_db, sums, M, N, K, ldy, ldw, CONFIG: tl.constexpr):
    """dx = dz·w. With FUSE_DZ the argument `dz` holds dy, and dz = dy·act′ is formed tile by tile.

    With LOWER_ACT, `dx` is the dz of the layer below, whose output is `lower_y` (M, K): dx = (dz·w)·act′. Each tile
    then leaves the sums of its rows, partial results of that layer's db, in `lower_db` (rows of tiles, K), or None.

    The programs behind those of dx add up partial results of launches before.
    """
    await_previous()
    SUMS: tl.constexpr = CONFIG.SUMS
    ACT: tl.constexpr = CONFIG.ACT
    LOWER_ACT: tl.constexpr = CONFIG.LOWER_ACT
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    PRECISION: tl.constexpr = CONFIG.PRECISION
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    if SUMS is not None:
        if tl.program_id(0) >= tiles:
            add_appended(sums, tl.program_id(0) - tiles, SUMS)
            return
    row, col = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), CONFIG.GROUP)
    m = row * BLOCK_M
    k = col * BLOCK_K
    dz = Matrix(dz, M, N, ldy)
    w = Matrix(w, N, K, ldw)
    if CONFIG.FUSE_DZ:
        dy = dz
        y = Matrix(y, M, N, N)
        acc = tl.zeros((BLOCK_K, BLOCK_M), accumulator(dy.data.dtype))
        dy_tile, y_tile = load_dy_and_y(dy, y, m, 0, CONFIG)
        dz_tile = gradient(dy_tile, y_tile, ACT)
        for n in tl.range(0, N, BLOCK_N, num_stages=CONFIG.STAGES):  # as in wgrad
            w_tile = load_tile(w, n, k, BLOCK_N, BLOCK_K, CONFIG.W_TRANSPOSED, CONFIG.VEC)
            rounded = round_operand(dz_tile, w_tile.dtype, PRECISION)
            dy_tile, y_tile = load_dy_and_y(dy, y, m, n + BLOCK_N, CONFIG)
            acc = dot(tl.trans(w_tile), tl.trans(rounded), acc, PRECISION)
            dz_tile = gradient(dy_tile, y_tile, ACT)
        acc = tl.trans(acc)
    else:
        acc = product(dz, w, m, k, 0, False, CONFIG.W_TRANSPOSED, BLOCK_M, BLOCK_K, BLOCK_N, CONFIG)
    if LOWER_ACT is not None:
        y_tile = load_tile(Matrix(lower_y, M, K, K), m, k, BLOCK_M, BLOCK_K, False, CONFIG.VEC_LOWER)
        acc = gradient(acc, y_tile, LOWER_ACT)
        if lower_db is not None:
            inside = tl.arange(0, BLOCK_M) < M - m  # other rows are of anything (`product`)
            total = tl.sum(tl.where(inside[:, None], acc, 0.0), 0)
            j, j_inside = masked_range(k, K, BLOCK_K, 1)
            tl.store(lower_db + row.to(tl.int64) * K + j, round_to(total, lower_db.dtype.element_ty), mask=j_inside)
    store_tile(Matrix(dx, M, K, K), acc, m, k, BLOCK_M, BLOCK_K, CONFIG.VEC_STORE)


@triton.jit(do_not_specialize=["M", "N", "K", "ldy", "ldx", "rows_per_split"])
def wgrad(dz, y, x, dw, dz_out, db, M, N, K, ldy, ldx, rows_per_split, CONFIG: tl.constexpr):
    """dw[s] = dzᵀ·x over the rows of split s = program_id(1). dw: (splits, N, K).

    With FUSE_DZ the argument `dz` holds dy; the programs of the first tile column also write dz to `dz_out` (M, N) and
    the sums of its rows to `db` (splits, N), unless these are None.

    A tile of dz is formed a turn before it is multiplied. Compiled: Triton waits for a product whose operand the turn
    itself wrote to shared memory, but ptxas puts arithmetic between the product and the wait: 88 of a turn's 260
    instructions. STAGES, `num_stages` again: without it loads for the next turn's dz would not run ahead.
    """
    await_previous()
    ACT: tl.constexpr = CONFIG.ACT
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    PRECISION: tl.constexpr = CONFIG.PRECISION
    VEC: tl.constexpr = CONFIG.VEC
    VEC_STORE: tl.constexpr = CONFIG.VEC_STORE
    row, col = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), CONFIG.GROUP)
    n = row * BLOCK_N
    k = col * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * rows_per_split
    last = first + tl.minimum(rows_per_split, M - first)  # their sum may pass 2³¹
    x = Matrix(x, last, K, ldx)
    if CONFIG.FUSE_DZ:
        dy = Matrix(dz, last, N, ldy)
        y = Matrix(y, last, N, N)
        acc = tl.zeros((BLOCK_K, BLOCK_N), accumulator(dy.data.dtype))
        sums = tl.zeros((BLOCK_M, BLOCK_N), acc.dtype)
        mine = N * (col == 0).to(tl.int32)  # only the first tile column writes dz and db: elsewhere 0 masks every store
        dy_tile, y_tile = load_dy_and_y(dy, y, first, n, CONFIG)
        dz_tile = gradient(dy_tile, y_tile, ACT)
        for m in tl.range(first, last, BLOCK_M, num_stages=CONFIG.STAGES):
            x_tile = load_tile(x, m, k, BLOCK_M, BLOCK_K, CONFIG.X_TRANSPOSED, VEC)
            rounded = round_operand(dz_tile, x_tile.dtype, PRECISION)
            if db is not None:
                sums += dz_tile
            if dz_out is not None:
                i, i_inside = masked_range(m, last, BLOCK_M, 1)
                j, j_inside = masked_range(n, mine, BLOCK_N, VEC)
                at = dz_out + (i[:, None] * (N // VEC * VEC) + j[None, :])
                tl.store(at, rounded, mask=i_inside[:, None] & j_inside[None, :])
            dy_tile, y_tile = load_dy_and_y(dy, y, m + BLOCK_M, n, CONFIG)
            # Compiled: as wgmma's first operand dz would stay in registers, and each product wait for the one before.
            acc = dot(tl.trans(x_tile), rounded, acc, PRECISION)
            dz_tile = gradient(dy_tile, y_tile, ACT)  # the next turn's, while this one's product runs
        acc = tl.trans(acc)
        if db is not None:
            j, j_inside = masked_range(n, mine, BLOCK_N, 1)
            tl.store(db + split * N + j, round_to(tl.sum(sums, 0), db.dtype.element_ty), mask=j_inside)
    else:
        dz = Matrix(dz, N, last, ldy)  # transposed
        acc = product(dz, x, n, k, first, True, CONFIG.X_TRANSPOSED, BLOCK_N, BLOCK_K, BLOCK_M, CONFIG)
    dw = Matrix(dw + split * N * (K // VEC_STORE * VEC_STORE), N, K, K)
    store_tile(dw, acc, n, k, BLOCK_N, BLOCK_K, VEC_STORE)


@triton.jit(do_not_specialize=["M", "N", "K", "ldy", "ldx", "ldw", "rows_per_split"])
def backward(dz, y, x, w, dx, dw, db, lower_db, sums, M, N, K, ldy, ldx, ldw, rows_per_split, CONFIG: tl.constexpr):
    """dx = dz·w and dw[s] = dzᵀ·x over the rows of split s, in one pass: for a layer of at most BLOCK_N outputs.

    A program takes BLOCK_K columns of x, of which it keeps those of w and of dw. With FUSE_DZ the argument `dz` holds
    dy, and dz = dy·act′. With LOWER_ACT, `dx` is the dz of the layer below, whose output x is: dx = (dz·w)·act′.

    dw: (splits, N, K). db: (splits, N) or None, by the programs of the first columns. lower_db, sums of dx's rows:
    (splits, K) or None. The programs behind add up partial results of launches before.
    """
    await_previous()
    SUMS: tl.constexpr = CONFIG.SUMS
    FUSE_DZ: tl.constexpr = CONFIG.FUSE_DZ
    ACT: tl.constexpr = CONFIG.ACT
    LOWER_ACT: tl.constexpr = CONFIG.LOWER_ACT
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    PRECISION: tl.constexpr = CONFIG.PRECISION
    VEC_STORE: tl.constexpr = CONFIG.VEC_STORE
    cols = tl.cdiv(K, BLOCK_K)
    programs = cols * ((M - 1) // rows_per_split + 1)  # M + rows_per_split may pass 2³¹
    if SUMS is not None:
        if tl.program_id(0) >= programs:
            add_appended(sums, tl.program_id(0) - programs, SUMS)
            return
    col = tl.program_id(0) % cols
    k = col * BLOCK_K
    split = tl.program_id(0) // cols
    first = split * rows_per_split
    last = first + tl.minimum(rows_per_split, M - first)
    split = split.to(tl.int64)
    dz = Matrix(dz, last, N, ldy)
    y = Matrix(y, last, N, N)
    x = Matrix(x, last, K, ldx)
    dx = Matrix(dx, last, K, K)
    w_tile = load_tile(Matrix(w, N, K, ldw), 0, k, BLOCK_N, BLOCK_K, CONFIG.W_TRANSPOSED, CONFIG.VEC_W)
    acc = tl.zeros((BLOCK_N, BLOCK_K), accumulator(dz.data.dtype))
    zero_tile = tl.zeros((BLOCK_M, BLOCK_K), acc.dtype)
    db_sum = tl.zeros((BLOCK_N,), acc.dtype)
    lower_sums = tl.zeros((BLOCK_M // 2, BLOCK_K), acc.dtype)
    # A turn ahead, in registers: as formed, turned or narrow tiles its loads would not run ahead by themselves.
    dz_next = load_tile(dz, first, 0, BLOCK_M, BLOCK_N, False, CONFIG.VEC)
    if FUSE_DZ:
        y_next = load_tile(y, first, 0, BLOCK_M, BLOCK_N, False, CONFIG.VEC)
    for m in range(first, last, BLOCK_M):
        x_tile = load_tile(x, m, k, BLOCK_M, BLOCK_K, False, CONFIG.VEC_X)
        dz_tile = dz_next
        dz_next = load_tile(dz, m + BLOCK_M, 0, BLOCK_M, BLOCK_N, False, CONFIG.VEC)
        if FUSE_DZ:
            dz_tile = gradient(dz_tile, y_next, ACT)
            y_next = load_tile(y, m + BLOCK_M, 0, BLOCK_M, BLOCK_N, False, CONFIG.VEC)
        if db is not None:
            db_sum += tl.sum(dz_tile.to(acc.dtype), 0)
        dz_tile = round_operand(dz_tile, x_tile.dtype, PRECISION)
        acc = dot(tl.trans(dz_tile), x_tile, acc, PRECISION)
        dx_tile = dot(dz_tile, w_tile, zero_tile, PRECISION)
        if LOWER_ACT is not None:
            dx_tile = gradient(dx_tile, x_tile, LOWER_ACT)
            if lower_db is not None:
                inside = m + tl.arange(0, BLOCK_M) < last
                summed = tl.where(inside[:, None], dx_tile, 0.0)  # elsewhere 0·∞, of such a weight
                # Compiled: of 16 rows a thread holds two, 8 apart. To add up all rows in each turn would cross warps.
                pairs = tl.reshape(summed, (BLOCK_M // 16, 2, 8, BLOCK_K))
                lower_sums += tl.reshape(tl.sum(pairs, 1), (BLOCK_M // 2, BLOCK_K))
        store_tile(dx, dx_tile, m, k, BLOCK_M, BLOCK_K, VEC_STORE)
    store_tile(Matrix(dw + split * N * (K // VEC_STORE * VEC_STORE), N, K, K), acc, 0, k, BLOCK_N, BLOCK_K, VEC_STORE)
    if db is not None:
        j, inside = masked_range(0, N * (col == 0).to(tl.int32), BLOCK_N, 1)
        tl.store(db + split * N + j, round_to(db_sum, db.dtype.element_ty), mask=inside)
    if lower_db is not None:
        j, inside = masked_range(k, K, BLOCK_K, 1)
        tl.store(lower_db + split * K + j, round_to(tl.sum(lower_sums, 0), lower_db.dtype.element_ty), mask=inside)
