"""y = σ(x·wᵀ + b) and its gradients.

    x: (M, K)    w: (N, K)    b: (N,)    y, dy, dz: (M, N)

    forward       y  = σ(x·wᵀ + b)
    output_grad   dz = dy·y·(1 − y),   db = Σ_rows dz
    dgrad         dx = dz·w
    wgrad         dw = dzᵀ·x

Backward needs the output y, never z. It comes in two shapes. Either `output_grad` writes dz and the two products read
it; or a product forms dz from dy and y while it loads its operand (FUSE_DZ), and wgrad hands dz on to dgrad and sums db
as it goes: a pass over memory less, for more instructions in the loop. Sums over rows that several programs share leave
partial results, one a program, which `sum_partials` adds in a fixed order: no atomics, the same bits every time.
"""

import triton
import triton.language as tl

from .common import (
    dot,
    indices,
    load_tile,
    product,
    round_operand,
    round_to,
    sigmoid,
    sigmoid_backward,
    store_tile,
    tile_of,
)

SIZES = ["M", "N", "K", "ldx", "ldw", "ldy", "rows_per_program", "rows_per_split"]
# Sizes are not specialized: no recompile when a batch is 1 or a multiple of 16; what alignment there is, VEC says.


@triton.jit
def _forward_tile(
    x, w, b, y, tile, M, N, K, ldx, ldw,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr, PTX: tl.constexpr,
    TMA: tl.constexpr, TMA_STORE: tl.constexpr, X_TRANSPOSED: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    PREFETCH: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, col = tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = row * BLOCK_M
    n = col * BLOCK_N
    z = product(
        x, w, m, n, 0, K, M, N, ldx, ldw,
        ACC, PRECISION, TMA, X_TRANSPOSED, not W_TRANSPOSED, PREFETCH, VEC, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        j, inside = indices(n, N, BLOCK_N, 1)
        z += tl.load(b + j, mask=inside, other=0.0).to(ACC)[None, :]
    store_tile(y, sigmoid(z, ACCURATE, PTX), m, n, M, N, BLOCK_M, BLOCK_N, TMA_STORE, VEC_STORE)


@triton.jit(do_not_specialize=SIZES[:5])
def forward(
    x, w, b, y, M, N, K, ldx, ldw,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ACCURATE: tl.constexpr, PTX: tl.constexpr,
    TMA: tl.constexpr, TMA_STORE: tl.constexpr, X_TRANSPOSED: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    PREFETCH: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """y = σ(x·wᵀ + b). One tile of y a program, or (PERSISTENT) every num_programs-th."""
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False):
            _forward_tile(
                x, w, b, y, tile, M, N, K, ldx, ldw, HAS_BIAS, ACC, PRECISION, ACCURATE, PTX, TMA, TMA_STORE,
                X_TRANSPOSED, W_TRANSPOSED, PREFETCH, VEC, VEC_STORE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    else:
        _forward_tile(
            x, w, b, y, tl.program_id(0), M, N, K, ldx, ldw, HAS_BIAS, ACC, PRECISION, ACCURATE, PTX, TMA, TMA_STORE,
            X_TRANSPOSED, W_TRANSPOSED, PREFETCH, VEC, VEC_STORE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "rows_per_program"])
def output_grad(
    dy, y, dz, db, M, N, stride_dym, stride_dyn, rows_per_program,
    WRITE_DZ: tl.constexpr, WRITE_DB: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, VEC_DY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = dy·y·(1 − y), and db[p] = Σ dz over the rows of block p. dy has any strides: an expanded scalar's too."""
    n = tl.program_id(0) * BLOCK_N
    j, j_inside = indices(n, N, BLOCK_N, VEC)
    first = tl.program_id(1) * rows_per_program
    sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)  # of every BLOCK_M-th row: adding up across threads can wait until the end
    for m in range(first, tl.minimum(first + rows_per_program, M), BLOCK_M):
        i, i_inside = indices(m, M, BLOCK_M, 1)
        inside = i_inside[:, None] & j_inside[None, :]
        y_tile = tl.load(y + (i[:, None] * (N // VEC * VEC) + j[None, :]), mask=inside, other=0.0)
        at = dy + (i[:, None] * (stride_dym // VEC_DY * VEC_DY) + j[None, :] * stride_dyn)
        dy_tile = tl.load(at, mask=inside, other=0.0)
        dz_tile = sigmoid_backward(dy_tile, y_tile, ACC)
        if WRITE_DZ:
            store_tile(dz, dz_tile, m, n, M, N, BLOCK_M, BLOCK_N, False, VEC)
        if WRITE_DB:
            sums += dz_tile
    if WRITE_DB:
        total = round_to(tl.sum(sums, 0), db.dtype.element_ty)
        tl.store(db + tl.program_id(1).to(tl.int64) * N + j, total, mask=j_inside)


@triton.jit
def load_dz(
    dy, y, m, n, M, N, ldy,
    ACC: tl.constexpr, TMA: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile of dz = dy·y·(1 − y) at (m, n)."""
    dy_tile = load_tile(dy, m, n, M, N, ldy, BLOCK_M, BLOCK_N, TMA, False, VEC)
    y_tile = load_tile(y, m, n, M, N, N, BLOCK_M, BLOCK_N, TMA, False, VEC)
    return sigmoid_backward(dy_tile, y_tile, ACC)


@triton.jit(do_not_specialize=["M", "N", "K", "ldy", "ldw"])
def dgrad(
    dz, y, w, dx, M, N, K, ldy, ldw,
    FUSE_DZ: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, TMA_STORE: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    PREFETCH: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dz·w. With FUSE_DZ the argument `dz` holds dy, and dz = dy·y·(1 − y) is formed tile by tile."""
    row, col = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    m = row * BLOCK_M
    k = col * BLOCK_K
    if FUSE_DZ:
        acc = tl.zeros((BLOCK_K, BLOCK_M), ACC)
        dz_tile = load_dz(dz, y, m, 0, M, N, ldy, ACC, TMA, VEC, BLOCK_M, BLOCK_N)
        for n in tl.range(0, N, BLOCK_N, num_stages=STAGES):  # as in wgrad
            w_tile = load_tile(w, n, k, N, K, ldw, BLOCK_N, BLOCK_K, TMA, W_TRANSPOSED, VEC)
            rounded = round_operand(dz_tile, w_tile.dtype, PRECISION)
            dy_tile = load_tile(dz, m, n + BLOCK_N, M, N, ldy, BLOCK_M, BLOCK_N, TMA, False, VEC)
            y_tile = load_tile(y, m, n + BLOCK_N, M, N, N, BLOCK_M, BLOCK_N, TMA, False, VEC)
            acc = dot(tl.trans(w_tile), tl.trans(rounded), acc, PRECISION)
            dz_tile = sigmoid_backward(dy_tile, y_tile, ACC)
        acc = tl.trans(acc)
    else:
        acc = product(
            dz, w, m, k, 0, N, M, K, ldy, ldw,
            ACC, PRECISION, TMA, False, W_TRANSPOSED, PREFETCH, VEC, BLOCK_M, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    store_tile(dx, acc, m, k, M, K, BLOCK_M, BLOCK_K, TMA_STORE, VEC_STORE)


@triton.jit(do_not_specialize=["M", "N", "K", "ldy", "ldx", "rows_per_split"])
def wgrad(
    dz, y, x, dw, dz_out, db, M, N, K, ldy, ldx, rows_per_split,
    FUSE_DZ: tl.constexpr, WRITE_DZ: tl.constexpr, WRITE_DB: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, X_TRANSPOSED: tl.constexpr, PREFETCH: tl.constexpr, VEC: tl.constexpr, VEC_STORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dw[s] = dzᵀ·x over the rows of split s = program_id(1). dw: (splits, N, K).

    With FUSE_DZ the argument `dz` holds dy; the programs of the first tile column also write dz to `dz_out` (M, N) and
    the sums of its rows to `db` (splits, N).

    A tile of dz is formed a turn before it is multiplied. Compiled: Triton waits for a product whose operand the turn
    itself wrote to shared memory, but ptxas puts arithmetic between the product and the wait: 88 of a turn's 260
    instructions. STAGES, `num_stages` again: without it loads for the next turn's dz would not run ahead.
    """
    row, col = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    n = row * BLOCK_N
    k = col * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    if FUSE_DZ:
        acc = tl.zeros((BLOCK_K, BLOCK_N), ACC)
        sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        mine = N * (col == 0).to(tl.int32)  # how far along N this program's share of dz and db reaches: all or nothing
        dz_tile = load_dz(dz, y, first, n, last, N, ldy, ACC, TMA, VEC, BLOCK_M, BLOCK_N)
        for m in tl.range(first, last, BLOCK_M, num_stages=STAGES):
            x_tile = load_tile(x, m, k, last, K, ldx, BLOCK_M, BLOCK_K, TMA, X_TRANSPOSED, VEC)
            rounded = round_operand(dz_tile, x_tile.dtype, PRECISION)
            if WRITE_DB:
                sums += dz_tile
            if WRITE_DZ:
                i, i_inside = indices(m, last, BLOCK_M, 1)
                j, j_inside = indices(n, mine, BLOCK_N, VEC)
                at = dz_out + (i[:, None] * (N // VEC * VEC) + j[None, :])
                tl.store(at, rounded, mask=i_inside[:, None] & j_inside[None, :])
            dy_tile = load_tile(dz, m + BLOCK_M, n, last, N, ldy, BLOCK_M, BLOCK_N, TMA, False, VEC)
            y_tile = load_tile(y, m + BLOCK_M, n, last, N, N, BLOCK_M, BLOCK_N, TMA, False, VEC)
            # Compiled: as wgmma's first operand dz would stay in registers, and each product wait for the one before.
            acc = dot(tl.trans(x_tile), rounded, acc, PRECISION)
            dz_tile = sigmoid_backward(dy_tile, y_tile, ACC)  # the next turn's, while this one's product runs
        acc = tl.trans(acc)
        if WRITE_DB:
            j, j_inside = indices(n, mine, BLOCK_N, 1)
            tl.store(db + split * N + j, round_to(tl.sum(sums, 0), db.dtype.element_ty), mask=j_inside)
    else:
        acc = product(
            dz, x, n, k, first, last, N, K, ldy, ldx,
            ACC, PRECISION, TMA, True, X_TRANSPOSED, PREFETCH, VEC, BLOCK_N, BLOCK_K, BLOCK_M,
        )  # fmt: skip
    store_tile(dw + split * N * (K // VEC_STORE * VEC_STORE), acc, n, k, N, K, BLOCK_N, BLOCK_K, False, VEC_STORE)
