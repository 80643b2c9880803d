"""The optimizer step: one launch updates every tensor of every parameter group of one combination of types.

`multi_tensor_step` walks the tensors; what it does to an element is a rule (`sgd`, `rmsprop`, `adagrad`, `adam`) that
it is given as a parameter. A rule is two functions: `…_scalars` reads the group's hyperparameters, forms what depends
on them and on the step alone, in float64, and rounds last (1 − float32(0.999) would be wrong by 1.3e-5); the other one
reads like the formula. Optional buffers arrive as 0 where a tensor has none, and each formula is written so that 0
gives the plain variant: groups with and without momentum, amsgrad or centered share a launch.

Tables, all of 8-byte words (`tribp/optim/device_tables.py` writes them):
- `rows`, one row a tensor: the addresses and numbers of the columns below;
- `grads`, one address a tensor, 0 where there is no gradient: such a tensor is left as it is, its step too;
- `chunks`, one row a program: which tensor, and which of its chunks (−1: none, a launch has at least one program);
- `hypers`, one row a group: float64 values, then as many addresses of device scalars that stand in for them (0: none).
"""

import triton
import triton.language as tl

from ..launch import arch
from .common import round_to

# Columns of `rows`. RANDOM_STEP is a counter of its own where STEP does not count all of a parameter's life (SGD).
PARAM, STATE, EMA = tl.constexpr(0), tl.constexpr(1), tl.constexpr(4)
STEP, EMA_STEP, RANDOM_STEP, NUMEL, GROUP, LAYOUT, STREAM = (tl.constexpr(i) for i in range(5, 12))
ROW = tl.constexpr(12)

# Columns of `hypers`: those of every rule, then a rule's own. GRAD_SIGN is −1 where the objective is maximized; of the
# two weight decays one is added to the gradient, the other one (AdamW's) shrinks the parameter.
LR, EPS, GRAD_SIGN, WEIGHT_DECAY, DECOUPLED_DECAY, EMA_DECAY, MAX_GRAD_NORM = (tl.constexpr(i) for i in range(7))
OWN = tl.constexpr(7)
HYPER = tl.constexpr(10)

# A tensor whose parts do not lie alike in memory has a row of sizes and, for each part, of strides, in elements.
MAX_DIMS = tl.constexpr(arch.MAX_DIMS)


@triton.jit
def root(x):
    """√x, correctly rounded: Triton's own float32 root is approximate and flushes subnormal numbers to 0."""
    if x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: in float32 Triton's own is wrong by up to 2 units in the last place."""
    if b.dtype == tl.float32:
        q = tl.div_rn(a, b)
    else:
        q = a / b
    return q


@triton.jit
def denominator(square, eps, EPS_INSIDE: tl.constexpr):
    """√square + ε, or √(square + ε)."""
    if EPS_INSIDE:
        d = root(square + eps)
    else:
        d = root(square) + eps
    return d


@triton.jit
def hyper(h, column, ON_DEVICE: tl.constexpr):
    """A hyperparameter, in float64. ON_DEVICE: some are tensors on the device, float32, or float64 (lowest bit set)."""
    value = tl.load(h + column).to(tl.float64, bitcast=True)
    if ON_DEVICE:
        at = tl.load(h + HYPER + column)
        if at != 0:
            if at % 2 == 0:
                value = tl.load(at.to(tl.pointer_type(tl.float32))).to(tl.float64)
            else:
                value = tl.load((at - 1).to(tl.pointer_type(tl.float64)))
    return value


@triton.jit
def power(beta, step):
    """βᵗ in float64, for 0 ≤ β < 1."""
    return tl.exp2(step * tl.log2(beta))


@triton.jit
def sgd_scalars(h, step, ACC: tl.constexpr, ON_DEVICE: tl.constexpr):
    momentum = hyper(h, OWN, ON_DEVICE)
    dampening = hyper(h, OWN + 1, ON_DEVICE)
    nesterov = hyper(h, OWN + 2, ON_DEVICE)
    return momentum.to(ACC), (1.0 - dampening).to(ACC), nesterov != 0.0, step == 1.0


@triton.jit
def sgd(p, g, buf, unused1, unused2, lr, eps, s, EPS_INSIDE: tl.constexpr):
    """b ← μ·b + (1 − τ)·g, the first time b ← g; θ ← θ − η·b, with Nesterov's θ ← θ − η·(g + μ·b)."""
    momentum, undamped, nesterov, first = s
    buf = tl.where(first | (momentum == 0.0), g, momentum * buf + undamped * g)
    return p - lr * tl.where(nesterov, g + momentum * buf, buf), buf, unused1, unused2


@triton.jit
def rmsprop_scalars(h, step, ACC: tl.constexpr, ON_DEVICE: tl.constexpr):
    alpha = hyper(h, OWN, ON_DEVICE)
    momentum = hyper(h, OWN + 1, ON_DEVICE)
    centered = hyper(h, OWN + 2, ON_DEVICE)  # 0 or 1
    return alpha.to(ACC), (1.0 - alpha).to(ACC), momentum.to(ACC), (centered * (1.0 - alpha)).to(ACC)


@triton.jit
def rmsprop(p, g, square_avg, buf, grad_avg, lr, eps, s, EPS_INSIDE: tl.constexpr):
    """v ← α·v + (1 − α)·g², ḡ ← α·ḡ + (1 − α)·g, b ← μ·b + g/(√(v − ḡ²) + ε), θ ← θ − η·b.

    v − ḡ² is a variance: where all gradients are alike rounding may make it negative, which counts as 0.
    """
    alpha, rest, momentum, rest_centered = s
    square_avg = alpha * square_avg + rest * (g * g)
    grad_avg += rest_centered * (g - grad_avg)
    variance = tl.maximum(square_avg - grad_avg * grad_avg, 0.0, propagate_nan=tl.PropagateNan.ALL)
    buf = momentum * buf + divide(g, denominator(variance, eps, EPS_INSIDE))
    return p - lr * buf, square_avg, buf, grad_avg


@triton.jit
def adagrad_scalars(h, step, ACC: tl.constexpr, ON_DEVICE: tl.constexpr):
    lr_decay = hyper(h, OWN, ON_DEVICE)
    return (hyper(h, LR, ON_DEVICE) / (1.0 + (step - 1.0) * lr_decay)).to(ACC), lr_decay


@triton.jit
def adagrad(p, g, state_sum, unused1, unused2, lr, eps, s, EPS_INSIDE: tl.constexpr):
    """G ← G + g², θ ← θ − η/(1 + (t − 1)·decay) · g/(√G + ε)."""
    decayed_lr, _ = s
    state_sum += g * g
    return p - decayed_lr * divide(g, denominator(state_sum, eps, EPS_INSIDE)), state_sum, unused1, unused2


@triton.jit
def adam_scalars(h, step, ACC: tl.constexpr, ON_DEVICE: tl.constexpr):
    beta1 = hyper(h, OWN, ON_DEVICE)
    beta2 = hyper(h, OWN + 1, ON_DEVICE)
    step_size = hyper(h, LR, ON_DEVICE) / (1.0 - power(beta1, step))
    corrects_root = 1.0 / tl.sqrt(1.0 - power(beta2, step))
    return (1.0 - beta1).to(ACC), beta2.to(ACC), (1.0 - beta2).to(ACC), step_size.to(ACC), corrects_root.to(ACC)


@triton.jit
def adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, lr, eps, s, EPS_INSIDE: tl.constexpr):
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ).

    Kingma and Ba 2015. With amsgrad the largest v so far takes the place of v.
    """
    rest1, beta2, rest2, step_size, corrects_root = s
    exp_avg += rest1 * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (g * g)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    if EPS_INSIDE:
        d = root(max_exp_avg_sq * (corrects_root * corrects_root) + eps)
    else:
        d = root(max_exp_avg_sq) * corrects_root + eps
    return p - step_size * divide(exp_avg, d), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def load_state(pointer, at, inside, PRESENT: tl.constexpr, OPTIONAL: tl.constexpr, ACC: tl.constexpr):
    """A buffer's elements; 0 where it is not PRESENT in this launch, or (OPTIONAL) where this tensor has none."""
    if not PRESENT:
        x = tl.zeros_like(at).to(ACC)
    elif OPTIONAL:
        x = tl.load(pointer + at, mask=inside & (pointer.to(tl.int64) != 0), other=0.0).to(ACC)
    else:
        x = tl.load(pointer + at, mask=inside).to(ACC)
    return x


@triton.jit
def store_state(pointer, at, x, inside, PRESENT: tl.constexpr, OPTIONAL: tl.constexpr):
    if PRESENT:
        x = round_to(x, pointer.dtype.element_ty)
        if OPTIONAL:
            tl.store(pointer + at, x, mask=inside & (pointer.to(tl.int64) != 0))
        else:
            tl.store(pointer + at, x, mask=inside)


@triton.jit
def round_stochastically(x, i, seed, step, stream):
    """float32 → bfloat16, up or down with the probability that makes the mean right.

    Philox's counter is (element, step, tensor): the same numbers whatever the launch looks like.
    """
    step, stream = step.to(tl.uint32), stream.to(tl.uint32)
    zero = tl.zeros_like(i).to(tl.uint32)
    low, high = i.to(tl.uint32), (i >> 32).to(tl.uint32)
    random, _, _, _ = tl.philox(seed, low, high, zero + step, zero + stream)
    bits = (x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def update(
    param, grad, state0, state1, state2, ema, i, at_param, at_grad, at_state, inside,
    scale, clip, lr, eps, sign, decay, shrink, ema_decay, ema_first, s, seed, step, stream,
    RULE: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr, HAS_EMA: tl.constexpr,
    ACC: tl.constexpr, AMP: tl.constexpr, CLIP: tl.constexpr, EPS_INSIDE: tl.constexpr, STOCHASTIC: tl.constexpr,
    OPTIONAL: tl.constexpr,
):  # fmt: skip
    """One block of one tensor: everything is read once, changed, and written once."""
    p = tl.load(param + at_param, mask=inside).to(ACC)
    g = tl.load(grad + at_grad, mask=inside).to(ACC)
    a = load_state(state0, at_state, inside, HAS0, OPTIONAL, ACC)
    b = load_state(state1, at_state, inside, HAS1, OPTIONAL, ACC)
    c = load_state(state2, at_state, inside, HAS2, OPTIONAL, ACC)
    e = load_state(ema, at_state, inside, HAS_EMA, OPTIONAL, ACC)
    if AMP:
        g = divide(g, scale)
        tl.store(grad + at_grad, round_to(g, grad.dtype.element_ty), mask=inside)
    if CLIP:
        g *= clip
    g *= sign
    g = tl.where(decay != 0.0, g + decay * p, g)  # without decay an infinite parameter does not spoil its gradient
    p, a, b, c = RULE(p * shrink, g, a, b, c, lr, eps, s, EPS_INSIDE)
    if STOCHASTIC:
        rounded = round_stochastically(p, i, seed, step, stream)
    else:
        rounded = round_to(p, param.dtype.element_ty)
    tl.store(param + at_param, rounded, mask=inside)
    store_state(state0, at_state, a, inside, HAS0, OPTIONAL)
    store_state(state1, at_state, b, inside, HAS1, OPTIONAL)
    store_state(state2, at_state, c, inside, HAS2, OPTIONAL)
    p = rounded.to(ACC)
    store_state(ema, at_state, tl.where(ema_first, p, e + (1.0 - ema_decay) * (p - e)), inside, HAS_EMA, OPTIONAL)


@triton.jit
def strided(i, layout, PART: tl.constexpr):
    """Where element i of a part lies: 0 the parameter, 1 the gradient, 2 the states. `layout`: sizes, then strides."""
    at = tl.zeros_like(i)
    for k in tl.static_range(MAX_DIMS):
        size = tl.load(layout + (MAX_DIMS - 1 - k))
        at += i % size * tl.load(layout + (MAX_DIMS * (1 + PART) + MAX_DIMS - 1 - k))
        i = i // size
    return at


@triton.jit(do_not_specialize=["tensors", "chunk_blocks", "seed"])
def multi_tensor_step(
    rows, grads, chunks, hypers, finished, found_inf, grad_scale, grad_norm, tensors, chunk_blocks, seed,
    SCALARS: tl.constexpr, RULE: tl.constexpr, PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    STATE0: tl.constexpr, STATE1: tl.constexpr, STATE2: tl.constexpr, EMA_TYPE: tl.constexpr, ACC: tl.constexpr,
    ON_DEVICE: tl.constexpr, EPS_INSIDE: tl.constexpr, STOCHASTIC: tl.constexpr, OPTIONAL: tl.constexpr,
    STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One optimizer step of `tensors` tensors, in place: parameters, states, step counters (see the tables above).

    found_inf, grad_scale: float32 scalars of a GradScaler, or None: gradients, no two elements of which may then be one
    in memory, are divided by the scale and written back; nothing at all changes if found_inf is not 0. grad_norm: the
    float64 norm of all gradients (unscaled), or None: they are clipped to the group's max_grad_norm.
    """
    AMP: tl.constexpr = grad_scale is not None
    CLIP: tl.constexpr = grad_norm is not None
    wanted = True
    if found_inf is not None:
        wanted = tl.load(found_inf) == 0.0
    if wanted:
        tensor = tl.load(chunks + 2 * tl.program_id(0))
        row = rows + tl.maximum(tensor, 0).to(tl.int64) * ROW
        grad_at = tl.load(grads + tl.maximum(tensor, 0))
        if (tensor >= 0) & (grad_at != 0):
            h = hypers + tl.load(row + GROUP) * (2 * HYPER)
            numel = tl.load(row + NUMEL)
            step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            stream = tl.load(row + STREAM)
            random_step = step
            if STOCHASTIC:
                random_step_at = tl.load(row + RANDOM_STEP)
                if random_step_at != 0:
                    random_step = tl.load(random_step_at.to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            lr64 = hyper(h, LR, ON_DEVICE)
            lr = lr64.to(ACC)
            eps = hyper(h, EPS, ON_DEVICE).to(ACC)
            sign = hyper(h, GRAD_SIGN, ON_DEVICE).to(ACC)
            decay = hyper(h, WEIGHT_DECAY, ON_DEVICE).to(ACC)
            shrink = (1.0 - lr64 * hyper(h, DECOUPLED_DECAY, ON_DEVICE)).to(ACC)
            s = SCALARS(h, step, ACC, ON_DEVICE)
            scale = lr
            clip = lr
            ema_decay = lr
            ema_first = True
            if AMP:
                scale = tl.load(grad_scale).to(ACC)
            if CLIP:
                # torch.nn.utils.clip_grad_norm_'s coefficient; a norm that is NaN makes all gradients NaN, as there.
                fraction = hyper(h, MAX_GRAD_NORM, ON_DEVICE) / (tl.load(grad_norm) + 1e-6)
                clip = tl.where(fraction > 1.0, 1.0, fraction).to(ACC)
            if EMA_TYPE is not None:
                ema_decay = hyper(h, EMA_DECAY, ON_DEVICE).to(ACC)
                ema_step = tl.load(row + EMA_STEP)
                if ema_step != 0:
                    ema_first = tl.load(ema_step.to(tl.pointer_type(tl.float32))) == 0.0

            param_at = tl.load(row + PARAM)
            state0_at = tl.load(row + STATE)
            state1_at = tl.load(row + STATE + 1)
            state2_at = tl.load(row + STATE + 2)
            ema_at = tl.load(row + EMA)
            layout_at = tl.load(row + LAYOUT)
            param = param_at.to(tl.pointer_type(PARAM_TYPE))
            grad = grad_at.to(tl.pointer_type(GRAD_TYPE))
            state0 = state0_at.to(tl.pointer_type(PARAM_TYPE if STATE0 is None else STATE0))
            state1 = state1_at.to(tl.pointer_type(PARAM_TYPE if STATE1 is None else STATE1))
            state2 = state2_at.to(tl.pointer_type(PARAM_TYPE if STATE2 is None else STATE2))
            ema = ema_at.to(tl.pointer_type(PARAM_TYPE if EMA_TYPE is None else EMA_TYPE))
            aligned = ((param_at | grad_at | state0_at | state1_at | state2_at | ema_at) % 16 == 0) & (layout_at == 0)

            first_block = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * chunk_blocks
            for block in range(first_block, tl.minimum(first_block + chunk_blocks, tl.cdiv(numel, BLOCK))):
                if aligned & ((block + 1) * BLOCK <= numel):
                    # 128-bit access needs both facts and no mask; without this branch every access is a scalar one.
                    whole = block * BLOCK + tl.arange(0, BLOCK)
                    update(
                        tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(state0, 16),
                        tl.multiple_of(state1, 16), tl.multiple_of(state2, 16), tl.multiple_of(ema, 16),
                        whole, whole, whole, whole, True,
                        scale, clip, lr, eps, sign, decay, shrink, ema_decay, ema_first, s, seed, random_step,
                        stream, RULE, STATE0 is not None, STATE1 is not None, STATE2 is not None,
                        EMA_TYPE is not None, ACC, AMP, CLIP, EPS_INSIDE, STOCHASTIC, OPTIONAL,
                    )  # fmt: skip
                else:
                    # Two dimensions, for the compiler gives one layout to all accesses of one shape. Counted: in that
                    # of 128-bit accesses a warp's scalar ones would meet four times as many sectors.
                    COLS: tl.constexpr = 128 if BLOCK > 128 else BLOCK
                    i = (block * BLOCK + tl.arange(0, BLOCK // COLS) * COLS)[:, None] + tl.arange(0, COLS)[None, :]
                    inside = i < numel
                    i = tl.where(inside, i, 0)
                    at_param = i
                    at_grad = i
                    at_state = i
                    if STRIDED:
                        if layout_at != 0:
                            layout = layout_at.to(tl.pointer_type(tl.int64))
                            at_param = strided(i, layout, 0)
                            at_grad = strided(i, layout, 1)
                            at_state = strided(i, layout, 2)
                    update(
                        param, grad, state0, state1, state2, ema, i, at_param, at_grad, at_state, inside,
                        scale, clip, lr, eps, sign, decay, shrink, ema_decay, ema_first, s, seed,
                        random_step, stream, RULE, STATE0 is not None, STATE1 is not None, STATE2 is not None,
                        EMA_TYPE is not None, ACC, AMP, CLIP, EPS_INSIDE, STOCHASTIC, OPTIONAL,
                    )  # fmt: skip
        # The counters may move only when every program has read them. The barrier keeps a slow warp of this program
        # from reading late; the last program to arrive moves them, and leaves `finished` at 0 for the next launch.
        tl.debug_barrier()
        if tl.atomic_add(finished, 1) == tl.num_programs(0) - 1:
            tl.store(finished, 0)
            for first in range(0, tensors, BLOCK):
                j = first + tl.arange(0, BLOCK)
                moves = (j < tensors) & (tl.load(grads + j, mask=j < tensors, other=0) != 0)
                advance(rows + j * ROW + STEP, moves)
                if STOCHASTIC:
                    advance(rows + j * ROW + RANDOM_STEP, moves)
                if EMA_TYPE is not None:
                    advance(rows + j * ROW + EMA_STEP, moves)


@triton.jit
def advance(address, moves):
    """Add 1 to the counters at these addresses, where there is one."""
    at = tl.load(address, mask=moves, other=0)
    counter = at.to(tl.pointer_type(tl.float32))
    tl.store(counter, tl.load(counter, mask=at != 0, other=0.0) + 1.0, mask=at != 0)


@triton.jit(do_not_specialize=["first_program", "programs", "chunk_blocks"])
def gradient_norm(
    rows, grads, chunks, partials, norm, finished, grad_scale, first_program, programs, chunk_blocks,
    GRAD_TYPE: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """‖g‖₂ over the gradients of all tensors, in one pass over them: what `multi_tensor_step` clips by.

    partials: float64, one a program of every launch that belongs to this norm; this launch writes those from
    `first_program` on. The last program of the LAST launch adds all `programs` of them, in order: the same bits each
    time. norm: a float64 scalar, divided by the GradScaler's grad_scale if there is one.
    """
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    grad_at = tl.load(grads + tl.maximum(tensor, 0))
    total = tl.full((), 0.0, tl.float64)
    if (tensor >= 0) & (grad_at != 0):
        row = rows + tensor.to(tl.int64) * ROW
        numel = tl.load(row + NUMEL)
        layout_at = tl.load(row + LAYOUT)
        grad = grad_at.to(tl.pointer_type(GRAD_TYPE))
        WIDE: tl.constexpr = tl.float64 if GRAD_TYPE == tl.float64 else tl.float32
        squares = tl.zeros((BLOCK,), WIDE)
        first_block = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * chunk_blocks
        for block in range(first_block, tl.minimum(first_block + chunk_blocks, tl.cdiv(numel, BLOCK))):
            i = block * BLOCK + tl.arange(0, BLOCK)
            if (grad_at % 16 == 0) & (layout_at == 0) & ((block + 1) * BLOCK <= numel):
                g = tl.load(tl.multiple_of(grad, 16) + i).to(WIDE)
            else:
                inside = i < numel
                i = tl.where(inside, i, 0)
                if STRIDED:
                    if layout_at != 0:
                        i = strided(i, layout_at.to(tl.pointer_type(tl.int64)), 1)
                g = tl.load(grad + i, mask=inside, other=0.0).to(WIDE)
            squares += g * g
        total = tl.sum(squares.to(tl.float64), 0)
    tl.store(partials + first_program + tl.program_id(0), total)
    if LAST:
        tl.debug_barrier()
        if tl.atomic_add(finished, 1) == tl.num_programs(0) - 1:
            tl.store(finished, 0)
            sums = tl.zeros((BLOCK,), tl.float64)
            for first in range(0, programs, BLOCK):
                j = first + tl.arange(0, BLOCK)
                # From L2, where the other programs' results are.
                sums += tl.load(partials + j, mask=j < programs, other=0.0, cache_modifier=".cg")
            result = tl.sqrt(tl.sum(sums, 0))
            if grad_scale is not None:
                result = result / tl.load(grad_scale).to(tl.float64)
            tl.store(norm, result)
