"""The optimizer step: one launch updates every tensor of every parameter group of one combination of types.

`multi_tensor_step` walks the tensors; what it does to an element is a pair of functions of `optim_rules.py` that it is
given. CONFIG is a `tribp.launch.optim.StepConfig`, HYPER the columns of `hypers` by name.

Tables, all of 8-byte words (`tribp/optim/triton_bucket.py` writes them):
- `rows`, one row a tensor: the addresses and numbers of the columns below;
- `grads`, one address a tensor, 0 where there is no gradient: such a tensor is left as it is, its step too;
- `chunks`, one row a program: which tensor, and which of its chunks;
- `hypers`, one row a group: each float64 value, then the address of the device scalar that stands in for it (0: none).
"""

import triton
import triton.language as tl

from ..launch import arch
from . import optim_codes
from .common import round_to
from .optim_rules import divide, hyper

# Columns of `rows`. RANDOM_STEP is a counter of its own where STEP does not count all of a parameter's life (SGD).
# SCALAR0 and SCALAR1 are the addresses of states of one number; NEXT0 and NEXT1 hold, within a launch, what becomes of
# them.
PARAM, STATE0, STATE1, STATE2, EMA, STEP = (tl.constexpr(i) for i in range(6))
EMA_STEP, RANDOM_STEP, NUMEL, GROUP, LAYOUT, STREAM = (tl.constexpr(i) for i in range(6, 12))
SCALAR0, SCALAR1, NEXT0, NEXT1 = (tl.constexpr(i) for i in range(12, 16))
SCALE0, SCALE1, SCALE2, RESIDUAL = (tl.constexpr(i) for i in range(16, 20))  # of states that are codes; the 8 bits more
ROW = tl.constexpr(20)

# A tensor whose parts differ in layout has a row of sizes and, for each part, of strides, in elements.
MAX_DIMS = tl.constexpr(arch.MAX_DIMS)


@triton.jit
def load_state(pointer, scale, at, inside, blocks, TYPE: tl.constexpr, CONFIG: tl.constexpr):
    """A buffer's elements; 0 where this launch has none (TYPE is None), or (OPTIONAL) where this tensor has none.

    Where they are codes, `scale` has their scales, and `blocks` says which, and which of them there are.
    """
    if TYPE is None:
        x = tl.zeros_like(at).to(CONFIG.ACC)
    else:
        if CONFIG.OPTIONAL:
            inside &= pointer.to(tl.int64) != 0
            x = tl.load(pointer + at, mask=inside, other=0.0)
        else:
            x = tl.load(pointer + at, mask=inside)
        if optim_codes.is_code(TYPE):
            block, there = blocks
            if CONFIG.OPTIONAL:
                there &= pointer.to(tl.int64) != 0
            x = optim_codes.decode(x, tl.load(scale + block, mask=there, other=0.0), TYPE)
        x = x.to(CONFIG.ACC)
    return x


@triton.jit
def store_state(pointer, scale, at, x, inside, blocks, random, TYPE: tl.constexpr, CONFIG: tl.constexpr):
    """random: 16 random bits for each element, where it becomes a code."""
    if TYPE is not None:
        there = True
        if CONFIG.OPTIONAL:
            there = pointer.to(tl.int64) != 0
        if optim_codes.is_code(TYPE):
            block, whole = blocks
            x, scales = optim_codes.encode(x, inside, random, TYPE)
            tl.store(scale + block, scales, mask=whole & there)
        else:
            x = round_to(x, pointer.dtype.element_ty)
        tl.store(pointer + at, x, mask=inside & there)


@triton.jit
def random_numbers(i, seed, step, stream):
    """Philox's, of counter (element, step, tensor): the same numbers whatever the launch looks like."""
    step, stream = step.to(tl.uint32), stream.to(tl.uint32)
    zero = tl.zeros_like(i).to(tl.uint32)
    low, high = i.to(tl.uint32), (i >> 32).to(tl.uint32)
    random, _, _, _ = tl.philox(seed, low, high, zero + step, zero + stream)
    return random


@triton.jit
def round_stochastically(x, i, seed, step, stream):
    """float32 → bfloat16, up or down with the probability that makes the mean right."""
    random = random_numbers(i, seed, step, stream)
    bits = (x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def update(
    pointers, codes, i, at_param, at_grad, at_state, inside, blocks, scale, clip, scalars, rule_scalars,
    RULE: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """One block of one tensor, elements i: everything is read once, changed, and written once."""
    param, grad, state0, state1, state2, ema = pointers
    scale0, scale1, scale2, residual, key = codes
    lr, eps, sign, decay, shrink, ema_decay, ema_first, seed, step, stream = scalars
    p = tl.load(param + at_param, mask=inside)
    if CONFIG.RESIDUAL:
        p = optim_codes.join(p, tl.load(residual + at_state, mask=inside))
    p = p.to(CONFIG.ACC)
    g = tl.load(grad + at_grad, mask=inside).to(CONFIG.ACC)
    a = load_state(state0, scale0, at_state, inside, blocks, CONFIG.STATE0, CONFIG)
    b = load_state(state1, scale1, at_state, inside, blocks, CONFIG.STATE1, CONFIG)
    c = load_state(state2, scale2, at_state, inside, blocks, CONFIG.STATE2, CONFIG)
    e = load_state(ema, None, at_state, inside, blocks, CONFIG.EMA_TYPE, CONFIG)
    if scale is not None:
        g = divide(g, scale)
        tl.store(grad + at_grad, round_to(g, grad.dtype.element_ty), mask=inside)
    if clip is not None:
        g *= clip
    g *= sign
    g = tl.where(decay != 0.0, g + decay * p, g)  # without decay an infinite parameter does not spoil its gradient
    p, a, b, c = RULE(p * shrink, g, a, b, c, lr, eps, rule_scalars, CONFIG)
    if CONFIG.RESIDUAL:
        below = 128
        if CONFIG.STOCHASTIC:
            below = random_numbers(i, seed, step, stream) & 0xFF
        rounded, low = optim_codes.split(p, below)
        tl.store(residual + at_state, low, mask=inside)
        p = optim_codes.join(rounded, low).to(CONFIG.ACC)
    else:
        if CONFIG.STOCHASTIC:
            rounded = round_stochastically(p, i, seed, step, stream)
        else:
            rounded = round_to(p, param.dtype.element_ty)
        p = rounded.to(CONFIG.ACC)
    tl.store(param + at_param, rounded, mask=inside)
    low = 0
    high = 0
    if CONFIG.CODED:
        bits = optim_codes.random_bits(i, key)
        low = bits & 0xFFFF
        high = bits >> 16
    store_state(state0, scale0, at_state, a, inside, blocks, low, CONFIG.STATE0, CONFIG)
    store_state(state1, scale1, at_state, b, inside, blocks, high, CONFIG.STATE1, CONFIG)
    store_state(state2, scale2, at_state, c, inside, blocks, high, CONFIG.STATE2, CONFIG)
    e = tl.where(ema_first, p, e + (1.0 - ema_decay) * (p - e))
    store_state(ema, None, at_state, e, inside, blocks, 0, CONFIG.EMA_TYPE, CONFIG)


@triton.jit
def rows_of(block, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """The elements of a block in rows of COLS."""
    return (tl.arange(0, BLOCK // COLS) * COLS + block * BLOCK)[:, None] + tl.arange(0, COLS)[None, :]


@triton.jit
def blocks_of(block, BLOCK: tl.constexpr):
    """Which of the tensor's blocks of codes the rows of a block are."""
    ROWS: tl.constexpr = BLOCK // optim_codes.BLOCK
    return (tl.arange(0, ROWS) + block * ROWS)[:, None]


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
    SCALARS: tl.constexpr, RULE: tl.constexpr, HYPER: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """One optimizer step of `tensors` tensors, in place: parameters, states, step counters (see the tables above).

    found_inf, grad_scale: float32 scalars of a GradScaler, or None: gradients, no two elements of which may then be one
    in memory, are divided by the scale and written back; nothing at all changes if found_inf is not 0. grad_norm: the
    float64 norm of all gradients (unscaled), or None: they are clipped to the group's max_grad_norm.
    """
    BLOCK: tl.constexpr = CONFIG.BLOCK
    finite = True
    if found_inf is not None:
        finite = tl.load(found_inf) == 0.0
    if finite:
        tensor = tl.load(chunks + 2 * tl.program_id(0))
        row = rows + tensor.to(tl.int64) * ROW
        grad_at = tl.load(grads + tensor)
        if grad_at != 0:
            h = hypers + tl.load(row + GROUP) * (2 * len(HYPER))
            numel = tl.load(row + NUMEL)
            step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            stream = tl.load(row + STREAM)
            random_step = step
            if CONFIG.STOCHASTIC or CONFIG.CODED:
                random_step_at = tl.load(row + RANDOM_STEP)
                if random_step_at != 0:
                    random_step = tl.load(random_step_at.to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            lr64 = hyper(h, HYPER.lr, CONFIG)
            lr = lr64.to(CONFIG.ACC)
            eps = hyper(h, HYPER.eps, CONFIG).to(CONFIG.ACC)
            sign = hyper(h, HYPER.grad_sign, CONFIG).to(CONFIG.ACC)
            decay = hyper(h, HYPER.weight_decay, CONFIG).to(CONFIG.ACC)
            shrink = (1.0 - lr64 * hyper(h, HYPER.decoupled_decay, CONFIG)).to(CONFIG.ACC)
            if CONFIG.SCALAR_TYPE is None:
                rule_scalars = SCALARS(h, step, HYPER, CONFIG)
            else:
                # Every program of a tensor has to read them before they change: the launch's last one changes them.
                scalar0 = load_scalar(row + SCALAR0, CONFIG)
                scalar1 = load_scalar(row + SCALAR1, CONFIG)
                rule_scalars, scalar0, scalar1 = SCALARS(h, step, scalar0, scalar1, HYPER, CONFIG)
                if tl.load(chunks + 2 * tl.program_id(0) + 1) == 0:
                    tl.store(row + NEXT0, scalar0.to(tl.float64).to(tl.int64, bitcast=True))
                    tl.store(row + NEXT1, scalar1.to(tl.float64).to(tl.int64, bitcast=True))
            scale = None
            clip = None
            ema_decay = lr
            ema_first = True
            if grad_scale is not None:
                scale = tl.load(grad_scale).to(CONFIG.ACC)
            if grad_norm is not None:
                # torch.nn.utils.clip_grad_norm_'s coefficient; a norm that is NaN makes all gradients NaN, as there.
                fraction = hyper(h, HYPER.max_grad_norm, CONFIG) / (tl.load(grad_norm) + 1e-6)
                clip = tl.where(fraction > 1.0, 1.0, fraction).to(CONFIG.ACC)
            if CONFIG.EMA_TYPE is not None:
                ema_decay = hyper(h, HYPER.ema_decay, CONFIG).to(CONFIG.ACC)
                ema_step = tl.load(row + EMA_STEP)
                if ema_step != 0:
                    ema_first = tl.load(ema_step.to(tl.pointer_type(tl.float32))) == 0.0

            param_at = tl.load(row + PARAM)
            state0_at = tl.load(row + STATE0)
            state1_at = tl.load(row + STATE1)
            state2_at = tl.load(row + STATE2)
            ema_at = tl.load(row + EMA)
            layout_at = tl.load(row + LAYOUT)
            param = param_at.to(tl.pointer_type(CONFIG.PARAM_TYPE))
            grad = grad_at.to(tl.pointer_type(CONFIG.GRAD_TYPE))
            state0 = state0_at.to(tl.pointer_type(CONFIG.PARAM_TYPE if CONFIG.STATE0 is None else CONFIG.STATE0))
            state1 = state1_at.to(tl.pointer_type(CONFIG.PARAM_TYPE if CONFIG.STATE1 is None else CONFIG.STATE1))
            state2 = state2_at.to(tl.pointer_type(CONFIG.PARAM_TYPE if CONFIG.STATE2 is None else CONFIG.STATE2))
            ema = ema_at.to(tl.pointer_type(CONFIG.PARAM_TYPE if CONFIG.EMA_TYPE is None else CONFIG.EMA_TYPE))
            aligned = ((param_at | grad_at | state0_at | state1_at | state2_at | ema_at) % 16 == 0) & (layout_at == 0)

            scale0 = rows  # any pointer will do where there are no codes
            scale1 = rows
            scale2 = rows
            residual = rows
            key = seed
            if CONFIG.CODED:
                scale0 = tl.load(row + SCALE0).to(tl.pointer_type(tl.float32))
                scale1 = tl.load(row + SCALE1).to(tl.pointer_type(tl.float32))
                scale2 = tl.load(row + SCALE2).to(tl.pointer_type(tl.float32))
                key = optim_codes.random_key(seed, random_step, stream)
            if CONFIG.RESIDUAL:
                residual_at = tl.load(row + RESIDUAL)
                residual = residual_at.to(tl.pointer_type(tl.int8))
                aligned &= residual_at % 16 == 0
            pointers = (param, grad, state0, state1, state2, ema)
            codes = (scale0, scale1, scale2, residual, key)
            scalars = (lr, eps, sign, decay, shrink, ema_decay, ema_first, seed, random_step, stream)
            first_block = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * chunk_blocks
            for block in range(first_block, tl.minimum(first_block + chunk_blocks, tl.cdiv(numel, BLOCK))):
                if aligned & ((block + 1) * BLOCK <= numel):
                    # 128-bit access needs both facts and no mask; without this branch every access is a scalar one.
                    whole = block * BLOCK + tl.arange(0, BLOCK)
                    at_block = block
                    if CONFIG.CODED:
                        whole = rows_of(block, BLOCK, optim_codes.BLOCK)
                        at_block = blocks_of(block, BLOCK)
                    wide = (
                        tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(state0, 16),
                        tl.multiple_of(state1, 16), tl.multiple_of(state2, 16), tl.multiple_of(ema, 16),
                    )  # fmt: skip
                    wide_codes = (scale0, scale1, scale2, tl.multiple_of(residual, 16), key)
                    update(
                        wide, wide_codes, whole, whole, whole, whole, True, (at_block, True), scale, clip, scalars,
                        rule_scalars, RULE, CONFIG,
                    )  # fmt: skip
                else:
                    # Two dimensions, for the compiler gives one layout to all accesses of one shape. Counted: in that
                    # of 128-bit accesses a warp's scalar ones would meet four times as many sectors.
                    # Codes take a quarter at a time: addresses of 8 elements a thread take 254 registers, of 2 128.
                    # No min or max: Triton 3.5 takes them for operations on tensors.
                    WIDEST: tl.constexpr = optim_codes.BLOCK if CONFIG.CODED else 128
                    COLS: tl.constexpr = WIDEST if BLOCK > WIDEST else BLOCK
                    QUARTER: tl.constexpr = BLOCK // 4 if BLOCK // 4 > COLS else COLS
                    PART: tl.constexpr = QUARTER if CONFIG.CODED else BLOCK
                    for k in range(0, BLOCK // PART):
                        part = block * (BLOCK // PART) + k
                        i = rows_of(part, PART, COLS)
                        inside = i < numel
                        at_blocks = part
                        if CONFIG.CODED:
                            at_blocks = blocks_of(part, PART)
                        blocks = (at_blocks, at_blocks * optim_codes.BLOCK < numel)
                        i = tl.where(inside, i, 0)
                        at_param = i
                        at_grad = i
                        at_state = i
                        if CONFIG.STRIDED:
                            if layout_at != 0:
                                layout = layout_at.to(tl.pointer_type(tl.int64))
                                at_param = strided(i, layout, 0)
                                at_grad = strided(i, layout, 1)
                                at_state = strided(i, layout, 2)
                        update(
                            pointers, codes, i, at_param, at_grad, at_state, inside, blocks, scale, clip, scalars,
                            rule_scalars, RULE, CONFIG,
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
                if CONFIG.STOCHASTIC or CONFIG.CODED:
                    advance(rows + j * ROW + RANDOM_STEP, moves)
                if CONFIG.EMA_TYPE is not None:
                    advance(rows + j * ROW + EMA_STEP, moves)
                if CONFIG.SCALAR_TYPE is not None:
                    store_scalar(rows + j * ROW + SCALAR0, rows + j * ROW + NEXT0, moves, CONFIG)
                    store_scalar(rows + j * ROW + SCALAR1, rows + j * ROW + NEXT1, moves, CONFIG)


@triton.jit
def advance(address, moves):
    """Add 1 to the counters at these addresses, where there is one."""
    at = tl.load(address, mask=moves, other=0)
    counter = at.to(tl.pointer_type(tl.float32))
    tl.store(counter, tl.load(counter, mask=at != 0, other=0.0) + 1.0, mask=at != 0)


@triton.jit
def load_scalar(address, CONFIG: tl.constexpr):
    """A state of one number, in the type it is kept in; 0 where the rule has none."""
    at = tl.load(address)
    return tl.load(at.to(tl.pointer_type(CONFIG.SCALAR_TYPE)), mask=at != 0, other=0.0)


@triton.jit
def store_scalar(address, value, moves, CONFIG: tl.constexpr):
    """Write the values, which other programs left, to these addresses, where there is one."""
    at = tl.load(address, mask=moves, other=0)
    bits = tl.load(value, mask=moves, other=0, cache_modifier=".cg")  # from L2, where the other programs' results are
    number = bits.to(tl.float64, bitcast=True).to(CONFIG.SCALAR_TYPE)
    tl.store(at.to(tl.pointer_type(CONFIG.SCALAR_TYPE)), number, mask=at != 0)


@triton.jit(do_not_specialize=["first_program", "programs", "chunk_blocks"])
def gradient_norm(
    rows, grads, chunks, partials, norm, finished, grad_scale, first_program, programs, chunk_blocks,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """‖g‖₂ over the gradients of all tensors, in one pass over them: what `multi_tensor_step` clips by.

    partials: float64, one a program of every launch that belongs to this norm; this launch writes those from
    `first_program` on. The last program of the LAST launch adds all `programs` of them, in order: the same bits each
    time. norm: a float64 scalar, divided by the GradScaler's grad_scale if there is one. CONFIG: a
    `tribp.launch.optim.NormConfig`.
    """
    BLOCK: tl.constexpr = CONFIG.BLOCK
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    grad_at = tl.load(grads + tensor)
    total = tl.full((), 0.0, tl.float64)
    if grad_at != 0:
        row = rows + tensor.to(tl.int64) * ROW
        numel = tl.load(row + NUMEL)
        layout_at = tl.load(row + LAYOUT)
        grad = grad_at.to(tl.pointer_type(CONFIG.GRAD_TYPE))
        WIDE: tl.constexpr = tl.float64 if CONFIG.GRAD_TYPE == tl.float64 else tl.float32
        squares = tl.zeros((BLOCK,), WIDE)
        first_block = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * chunk_blocks
        for block in range(first_block, tl.minimum(first_block + chunk_blocks, tl.cdiv(numel, BLOCK))):
            i = block * BLOCK + tl.arange(0, BLOCK)
            if (grad_at % 16 == 0) & (layout_at == 0) & ((block + 1) * BLOCK <= numel):
                g = tl.load(tl.multiple_of(grad, 16) + i).to(WIDE)
            else:
                inside = i < numel
                i = tl.where(inside, i, 0)
                if CONFIG.STRIDED:
                    if layout_at != 0:
                        i = strided(i, layout_at.to(tl.pointer_type(tl.int64)), 1)
                g = tl.load(grad + i, mask=inside, other=0.0).to(WIDE)
            squares += g * g
        total = tl.sum(squares.to(tl.float64), 0)
    tl.store(partials + first_program + tl.program_id(0), total)
    if CONFIG.LAST:
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
