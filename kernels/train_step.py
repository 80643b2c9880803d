"""A small multi-layer perceptron's training step up to the update, in two launches, or three.

    x: (M, K)    wₗ: (Nₗ, Nₗ₋₁), N₋₁ = K    y₋₁ = x

    train_rows      yₗ = actₗ(yₗ₋₁·wₗᵀ + bₗ)
                    E = loss(y, target),  dy = ∂E/∂y           of the last layer
                    dzₗ = dyₗ·actₗ′,  dyₗ₋₁ = dzₗ·wₗ
    train_weights   dwₗ = dzₗᵀ·yₗ₋₁,  dbₗ = Σ_rows dzₗ

A row needs no other row until the weights' gradients sum over them; a weight needs no other weight once each dz is
there. So one launch divides rows among programs, the next weights: between them all wait for all, within them nobody
for anybody. Every program of the first reads all weights, which is why the network must be small. Where the first
layer is not, `linear.forward` computes that one before. What a layer hands to the next passes through memory, for a
product reads its operands in steps.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from .activations import Act, activate, gradient, log1p_fraction
from .common import (
    Matrix,
    accumulator,
    await_previous,
    load_tile,
    masked_range,
    product,
    round_to,
    store_tile,
    transposed,
)

NamedAct = namedtuple("NamedAct", "name a b")


class Train(NamedTuple):
    """What is fixed when `train_rows` and `train_weights` are compiled; fields as in `common`."""

    SIZES: tuple[int, ...]  # K, and each layer's N
    ACTS: tuple[Act, ...]  # each layer's
    STORED_ACTS: tuple[Act, ...]  # with the numbers that outputs reach as they are stored
    LOSS: str
    FIRST: int  # the first layer that `train_rows` computes: 0, or 1
    REDUCTION: str  # "sum" of all elements (of cross_entropy: of rows), their "mean", or "batchmean": the sum over rows
    BLOCK_M: int  # rows, a program
    BLOCK_L: int  # what a step of its products sums over
    BLOCK_N: int  # the tile of a weight's gradient
    BLOCK_K: int
    BLOCK_ROWS: int  # what a step of that one sums over
    PARTS: int  # a power of 2 that holds the parts of the loss, one a program of `train_rows`
    PRECISION: str
    PTX: bool
    VEC: int = 1  # of sizes that it knows the compiler knows what divides them
    PREFETCH: bool | None = None


@triton.constexpr_function
def side(length):
    """Of the tile that holds a whole dimension: a power of 2, and at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(length))


@triton.constexpr_function
def tiles(n, k, block_n, block_k):
    return triton.cdiv(n, block_n) * triton.cdiv(k, block_k)


@triton.constexpr_function
def act_of(config, number):
    """A layer's activation. Triton can't index a tuple of tuples; up to 3.6 its interpreter hands over unnamed ones."""
    return NamedAct(*Train(*config).ACTS[number])


@triton.constexpr_function
def stored_act_of(config, number):
    """A layer's activation for its gradient."""
    return NamedAct(*Train(*config).STORED_ACTS[number])


@triton.jit
def dense(data, rows, COLS: tl.constexpr):
    """A `Matrix` without gaps."""
    cols = tl.full((), COLS, tl.int32)
    return Matrix(data, rows, cols, cols)


@triton.jit
def layer(x, w, b, m, M, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Rows from m on of y = act(x·wᵀ + b), rounded to the parameters' type."""
    SIZES: tl.constexpr = CONFIG.SIZES
    ACT: tl.constexpr = act_of(CONFIG, LAYER)
    K: tl.constexpr = SIZES[LAYER]
    N: tl.constexpr = SIZES[LAYER + 1]
    BLOCK_N: tl.constexpr = side(N)
    wt = transposed(dense(w, tl.full((), N, tl.int32), K))
    z = product(dense(x, M, K), wt, m, 0, 0, False, True, CONFIG.BLOCK_M, BLOCK_N, CONFIG.BLOCK_L, CONFIG)
    if b is not None:
        j, inside = masked_range(0, N, BLOCK_N, 1)
        z += tl.load(b + j, mask=inside, other=0.0).to(z.dtype)[None, :]
    return round_to(activate(z, ACT, w.dtype.element_ty, CONFIG.PTX), w.dtype.element_ty)


@triton.jit
def log_complement(y):
    """log(1 − y), without what a small y would lose."""
    half = tl.minimum(y, 0.5)
    return tl.where(y <= 0.5, log1p_fraction(half / (1.0 - half)) * -1.0, tl.log(1.0 - y))


@triton.jit
def counted_rows(target, M, CONFIG: tl.constexpr):
    """How many rows have a target that counts: not −100, as in torch."""
    count = tl.zeros((256,), tl.int32)
    for start in range(0, M, 256):
        i, inside = masked_range(start, M, 256, 1)
        count += (tl.load(target + i, mask=inside, other=-100) != -100).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def cross_entropy(z, t, N: tl.constexpr):
    """Of each row, −log softmax(z)[t], and its gradient by z. Where t is no class, NaN and 0. z: −∞ behind column N."""
    z -= tl.max(z, 1)[:, None]
    e = tl.exp(z)
    total = tl.sum(e, 1)
    is_target = tl.arange(0, z.shape[1])[None, :] == t[:, None]
    value = tl.log(total) - tl.sum(tl.where(is_target, z, 0.0), 1)
    known = (t >= 0) & (t < N)
    dz = tl.where(known[:, None], e / total[:, None] - is_target.to(z.dtype), 0.0)
    return tl.where(known, value, float("nan")), dz


@triton.jit
def binary_cross_entropy(y, t):
    """−(t·log y + (1 − t)·log(1 − y)), and its gradient by y. Where t or y lies outside 0 to 1, NaN and 0.

    Of a y that is NaN both are NaN, unless t lies outside.

    As in torch, logarithms are at least −100, and y·(1 − y) at least 1e-12.
    """
    log_y = tl.maximum(tl.log(y), -100.0, propagate_nan=tl.PropagateNan.ALL)
    log_rest = tl.maximum(log_complement(y), -100.0, propagate_nan=tl.PropagateNan.ALL)
    dy = (y - t) / tl.maximum((1.0 - y) * y, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    value = (t - 1.0) * log_rest - t * log_y
    known = (t >= 0.0) & (t <= 1.0) & ((y >= 0.0) & (y <= 1.0) | (y != y))
    return tl.where(known, value, float("nan")), tl.where(known, dy, 0.0)


@triton.jit
def loss_and_gradient(y, target, m, M, N: tl.constexpr, CONFIG: tl.constexpr):
    """These rows' part of E, and ∂E/∂y, 0 where y lies outside. y: of the accumulator's type."""
    LOSS: tl.constexpr = CONFIG.LOSS
    i, i_inside = masked_range(m, M, CONFIG.BLOCK_M, 1)
    _, j_inside = masked_range(0, N, y.shape[1], 1)
    inside = i_inside[:, None] & j_inside[None, :]
    terms = tl.full((), 1, tl.int32)
    if LOSS == "cross_entropy":
        t = tl.load(target + i, mask=i_inside, other=-100)
        inside &= (t != -100)[:, None]
        value, dy = cross_entropy(tl.where(j_inside[None, :], y, float("-inf")), t, N)
        value = tl.where(i_inside & (t != -100), value, 0.0)
        if CONFIG.REDUCTION != "sum":
            terms = counted_rows(target, M, CONFIG)
    else:
        t = load_tile(dense(target, M, N), m, 0, CONFIG.BLOCK_M, y.shape[1], False, 1).to(y.dtype)
        if LOSS == "binary_cross_entropy":
            value, dy = binary_cross_entropy(y, t)
        else:
            HALF: tl.constexpr = 0.5 if LOSS == "half_squared_error" else 1.0
            tl.static_assert(LOSS == "half_squared_error" or LOSS == "mse_loss")
            value = HALF * ((y - t) * (y - t))
            dy = (2.0 * HALF) * (y - t)
        value = tl.sum(tl.where(inside, value, 0.0), 1)
        if CONFIG.REDUCTION == "mean":
            terms = M * N
        elif CONFIG.REDUCTION == "batchmean":
            terms = terms * M
    return tl.sum(value, 0) / terms.to(y.dtype), tl.where(inside, dy / terms.to(y.dtype), 0.0)


@triton.jit
def store_dz(dz, dy, y, m, M, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Rows from m on of dz = dy·act′."""
    SIZES: tl.constexpr = CONFIG.SIZES
    N: tl.constexpr = SIZES[LAYER + 1]
    tile = gradient(dy, y, stored_act_of(CONFIG, LAYER))
    store_tile(dense(dz, M, N), tile, m, 0, CONFIG.BLOCK_M, side(N), 1)


@triton.jit
def layer_grad(dz, w, m, M, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Rows from m on of dx = dz·w."""
    SIZES: tl.constexpr = CONFIG.SIZES
    N: tl.constexpr = SIZES[LAYER + 1]
    K: tl.constexpr = SIZES[LAYER]
    w = dense(w, tl.full((), N, tl.int32), K)
    return product(dense(dz, M, N), w, m, 0, 0, False, False, CONFIG.BLOCK_M, side(K), CONFIG.BLOCK_L, CONFIG)


@triton.jit(do_not_specialize=["M"])
def train_rows(x, target, losses, weights, biases, ys, dzs, M, CONFIG: tl.constexpr):
    """BLOCK_M rows of each layer's output and dz, and their part of the loss.

    Tuples, an entry a layer: weights; biases, or None; ys, None for the last; dzs. With FIRST the first y is there.
    """
    await_previous()
    SIZES: tl.constexpr = CONFIG.SIZES
    FIRST: tl.constexpr = CONFIG.FIRST
    LAST: tl.constexpr = len(SIZES) - 2
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    m = tl.program_id(0) * BLOCK_M
    source = x if FIRST == 0 else ys[0]
    for n in tl.static_range(FIRST, LAST):
        y = layer(source, weights[n], biases[n], m, M, n, CONFIG)
        store_tile(dense(ys[n], M, SIZES[n + 1]), y, m, 0, BLOCK_M, side(SIZES[n + 1]), 1)
        tl.debug_barrier()  # the next product reads what other threads wrote
        source = ys[n]
    y = layer(source, weights[LAST], biases[LAST], m, M, LAST, CONFIG)
    value, dy = loss_and_gradient(y.to(accumulator(x.dtype)), target, m, M, SIZES[LAST + 1], CONFIG)
    tl.store(losses + tl.program_id(0), value)
    store_dz(dzs[LAST], dy, y, m, M, LAST, CONFIG)
    for n in tl.static_range(LAST, 0, -1):
        tl.debug_barrier()
        dy = layer_grad(dzs[n], weights[n], m, M, n, CONFIG)
        y = load_tile(dense(ys[n - 1], M, SIZES[n]), m, 0, BLOCK_M, side(SIZES[n]), False, 1)
        store_dz(dzs[n - 1], dy, y, m, M, n - 1, CONFIG)


@triton.jit
def weight_tile(program, y, dz, dw, db, M, N: tl.constexpr, K: tl.constexpr, CONFIG: tl.constexpr):
    """One tile of dw = dzᵀ·y; in the first tile column also db. Either may be None."""
    BLOCK_ROWS: tl.constexpr = CONFIG.BLOCK_ROWS
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    COLUMNS: tl.constexpr = triton.cdiv(K, CONFIG.BLOCK_K)
    n = program // COLUMNS * BLOCK_N
    k = program % COLUMNS * CONFIG.BLOCK_K
    if dw is not None:
        dzt = transposed(dense(dz, M, N))
        acc = product(dzt, dense(y, M, K), n, k, 0, True, False, BLOCK_N, CONFIG.BLOCK_K, BLOCK_ROWS, CONFIG)
        store_tile(dense(dw, tl.full((), N, tl.int32), K), acc, n, k, BLOCK_N, CONFIG.BLOCK_K, 1)
    if db is not None:
        if k == 0:
            sums = tl.zeros((BLOCK_ROWS, BLOCK_N), accumulator(dz.dtype))
            for m in range(0, M, BLOCK_ROWS):
                sums += load_tile(dense(dz, M, N), m, n, BLOCK_ROWS, BLOCK_N, False, 1).to(sums.dtype)
            j, inside = masked_range(n, N, BLOCK_N, 1)
            tl.store(db + j, round_to(tl.sum(sums, 0), db.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "parts"])
def train_weights(x, losses, loss, ys, dzs, dws, dbs, M, parts, CONFIG: tl.constexpr):
    """Every gradient that has a place, and the loss, of its `parts`."""
    await_previous()
    SIZES: tl.constexpr = CONFIG.SIZES
    program = tl.program_id(0)
    if program == 0:
        i, inside = masked_range(0, parts, CONFIG.PARTS, 1)
        total = tl.sum(tl.load(losses + i, mask=inside, other=0.0), 0)
        tl.store(loss, round_to(total, loss.dtype.element_ty))
    source = x
    for n in tl.static_range(len(SIZES) - 1):
        if (program >= 0) & (program < tiles(SIZES[n + 1], SIZES[n], CONFIG.BLOCK_N, CONFIG.BLOCK_K)):
            weight_tile(program, source, dzs[n], dws[n], dbs[n], M, SIZES[n + 1], SIZES[n], CONFIG)
        program -= tiles(SIZES[n + 1], SIZES[n], CONFIG.BLOCK_N, CONFIG.BLOCK_K)
        source = ys[n]
