"""The optimizer step: one launch updates every tensor of every parameter group of one combination of types.

`multi_tensor_step` walks the tensors; what it does to an element is a pair of functions of `optim_rules.py` that it is
given. CONFIG is a `tribp.launch.optim.StepConfig`, HYPER the columns of `hypers` by name.

Tables, of 8-byte words but for `chunks` (`tribp/optim/triton_bucket.py` writes them):
- `rows`, a `Row` for each tensor;
- `grads`, one address a tensor, 0 where there is no gradient: such a tensor is left as it is, its step too;
- `chunks`, int32, one row a program: which tensor, and which of its chunks;
- `hypers`, one row a group: each float64 value, then the address of the device scalar that stands in for it (0: none).
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from . import optim_codes
from .common import await_previous, round_to
from .optim_rules import divide_exactly, hyper


class Row(NamedTuple):
    """What a launch knows of a tensor: addresses, 0 where it has no such thing, and three numbers."""

    param: int
    state0: int
    state1: int
    state2: int
    ema: int
    step: int  # counts its updates
    ema_step: int
    random_step: int  # counts all steps of its life, where `step` does not (SGD); random numbers depend on it
    numel: int  # a number: of elements, real ones
    group: int  # a number: which row of `hypers`
    layout: int  # of sizes and strides, where its parts differ in layout (`strided`)
    stream: int  # a number: that of its random numbers
    scalar0: int  # states of one number
    scalar1: int
    code_scale0: int  # of states that are codes
    code_scale1: int
    code_scale2: int
    residual: int  # the parameter's 8 bits more
    next_scalar0: int = 0  # not an address: what becomes of scalar0, which the kernel keeps here within a launch
    next_scalar1: int = 0


# The columns by name, and how many there are.
(
    PARAM, STATE0, STATE1, STATE2, EMA, STEP, EMA_STEP, RANDOM_STEP, NUMEL, GROUP, LAYOUT, STREAM, SCALAR0, SCALAR1,
    CODE_SCALE0, CODE_SCALE1, CODE_SCALE2, RESIDUAL, NEXT_SCALAR0, NEXT_SCALAR1,
) = map(tl.constexpr, range(len(Row._fields)))  # fmt: skip
COLUMNS = tl.constexpr(len(Row._fields))

# A tensor's memory, as pointers; where the launch or (OPTIONAL) the tensor lacks a part, its pointer leads nowhere.
Buffers = namedtuple("Buffers", "param grad state0 state1 state2 ema code_scale0 code_scale1 code_scale2 residual")
# Some elements of a tensor. index: their numbers; param, grad, state: their offsets in these buffers; inside: a mask of
# those that exist. Where states are codes, a row is a block of codes: block has the numbers of these, block_inside a
# mask.
Elements = namedtuple("Elements", "index param grad state inside block block_inside")
# What an update of a tensor takes besides its elements. rule: what `…_scalars` returns; grad_scale, clip: None where
# gradients are not unscaled, not clipped.
Scalars = namedtuple("Scalars", "lr eps sign decay shrink rule grad_scale clip ema_decay ema_first")
# What an element's random bits depend on, besides its number: those that round its codes, and its parameter.
Keys = namedtuple("Keys", "codes param")


@triton.constexpr_function
def pointer_to(dtype):
    """The type of a buffer's pointer; any will do where the launch has none (None)."""
    return tl.pointer_type(tl.int8 if dtype is None else dtype)


@triton.jit
def load_state(pointer, code_scale, elements, TYPE: tl.constexpr, CONFIG: tl.constexpr):
    """A state's elements; 0 where this launch has none (TYPE is None), or (OPTIONAL) where this tensor has none."""
    if TYPE is None:
        x = tl.zeros_like(elements.state).to(CONFIG.ACC)
    else:
        inside, block_inside = elements.inside, elements.block_inside
        if CONFIG.OPTIONAL:
            exists = pointer.to(tl.int64) != 0
            inside &= exists
            block_inside &= exists
            x = tl.load(pointer + elements.state, mask=inside, other=0.0)
        else:
            x = tl.load(pointer + elements.state, mask=inside)
        if optim_codes.is_code(TYPE):
            x = optim_codes.decode(
                x, tl.load(code_scale + elements.block, mask=block_inside, other=0.0), TYPE, CONFIG.PTX
            )
        x = x.to(CONFIG.ACC)
    return x


@triton.jit
def store_state(pointer, code_scale, elements, x, dither, TYPE: tl.constexpr, CONFIG: tl.constexpr):
    """dither: random bits for each element, the last 15 of which are used where it becomes a code."""
    if TYPE is not None:
        exists = True
        if CONFIG.OPTIONAL:
            exists = pointer.to(tl.int64) != 0
        if optim_codes.is_code(TYPE):
            x, scales = optim_codes.encode(x, elements.inside, dither, TYPE, CONFIG.PTX)
            tl.store(code_scale + elements.block, scales, mask=elements.block_inside & exists)
        else:
            x = round_to(x, pointer.dtype.element_ty)
        tl.store(pointer + elements.state, x, mask=elements.inside & exists)


@triton.jit
def round_stochastically(x, random):
    """To bfloat16, up or down with the probability that makes the mean right. random: bits, the last 16 are used."""
    bits = (x.to(tl.float32).to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def store_param(p, buffers, elements, keys, CONFIG: tl.constexpr):
    """Write the parameter, rounded as the group's options say; returns what was written, residual included."""
    if CONFIG.RESIDUAL:
        dither = 128
        if CONFIG.STOCHASTIC:
            dither = optim_codes.random_bits(elements.index, keys.param) & 0xFF
        rounded, low = optim_codes.split(p, dither)
        tl.store(buffers.residual + elements.state, low, mask=elements.inside)
        p = optim_codes.join(rounded, low).to(CONFIG.ACC)
    else:
        if CONFIG.STOCHASTIC:
            rounded = round_stochastically(p, optim_codes.random_bits(elements.index, keys.param))
        else:
            rounded = round_to(p, buffers.param.dtype.element_ty)
        p = rounded.to(CONFIG.ACC)
    tl.store(buffers.param + elements.param, rounded, mask=elements.inside)
    return p


@triton.jit
def update(buffers, elements, scalars, keys, RULE: tl.constexpr, CONFIG: tl.constexpr):
    """Everything of these elements is read once, changed, and written once."""
    p = tl.load(buffers.param + elements.param, mask=elements.inside)
    if CONFIG.RESIDUAL:
        p = optim_codes.join(p, tl.load(buffers.residual + elements.state, mask=elements.inside))
    p = p.to(CONFIG.ACC)
    g = tl.load(buffers.grad + elements.grad, mask=elements.inside).to(CONFIG.ACC)
    a = load_state(buffers.state0, buffers.code_scale0, elements, CONFIG.STATE0_TYPE, CONFIG)
    b = load_state(buffers.state1, buffers.code_scale1, elements, CONFIG.STATE1_TYPE, CONFIG)
    c = load_state(buffers.state2, buffers.code_scale2, elements, CONFIG.STATE2_TYPE, CONFIG)
    ema = load_state(buffers.ema, None, elements, CONFIG.EMA_TYPE, CONFIG)
    if scalars.grad_scale is not None:
        g = divide_exactly(g, scalars.grad_scale)
        tl.store(buffers.grad + elements.grad, round_to(g, buffers.grad.dtype.element_ty), mask=elements.inside)
    if scalars.clip is not None:
        g *= scalars.clip
    g *= scalars.sign
    # without decay an infinite parameter does not spoil its gradient
    g = tl.where(scalars.decay != 0.0, g + scalars.decay * p, g)
    p, a, b, c = RULE(p * scalars.shrink, g, a, b, c, scalars.lr, scalars.eps, scalars.rule, CONFIG)
    p = store_param(p, buffers, elements, keys, CONFIG)
    low = 0
    high = 0
    if CONFIG.CODED:
        low = optim_codes.random_bits(elements.index, keys.codes)
        high = low >> 16
    store_state(buffers.state0, buffers.code_scale0, elements, a, low, CONFIG.STATE0_TYPE, CONFIG)
    store_state(buffers.state1, buffers.code_scale1, elements, b, high, CONFIG.STATE1_TYPE, CONFIG)
    store_state(buffers.state2, buffers.code_scale2, elements, c, high, CONFIG.STATE2_TYPE, CONFIG)
    ema = tl.where(scalars.ema_first, p, ema + (1.0 - scalars.ema_decay) * (p - ema))
    store_state(buffers.ema, None, elements, ema, 0, CONFIG.EMA_TYPE, CONFIG)


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
def strided(i, layout, PART: tl.constexpr, CONFIG: tl.constexpr):
    """Where element i of a part lies: 0 the parameter, 1 the gradient, 2 the states. `layout`: sizes, then strides."""
    DIMS: tl.constexpr = CONFIG.LAYOUT_DIMS
    offset = tl.zeros_like(i)
    for k in tl.static_range(DIMS):
        size = tl.load(layout + (DIMS - 1 - k))
        offset += i % size * tl.load(layout + (DIMS * (1 + PART) + DIMS - 1 - k))
        i = i // size
    return offset


@triton.jit
def update_whole_block(block, buffers, scalars, keys, RULE: tl.constexpr, CONFIG: tl.constexpr):
    """Update a block of aligned, dense memory all of whose elements exist."""
    BLOCK: tl.constexpr = CONFIG.BLOCK
    i = block * BLOCK + tl.arange(0, BLOCK)
    code_block = block
    if CONFIG.CODED:
        i = rows_of(block, BLOCK, optim_codes.BLOCK)
        code_block = blocks_of(block, BLOCK)
    update(buffers, Elements(i, i, i, i, True, code_block, True), scalars, keys, RULE, CONFIG)


@triton.jit
def update_partial_block(block, numel, layout, buffers, scalars, keys, RULE: tl.constexpr, CONFIG: tl.constexpr):
    """Update what there is of a block, wherever it lies.

    In two dimensions, for the compiler gives one layout to all accesses of one shape. Counted: in that of 128-bit
    accesses a warp's scalar ones would meet four times as many sectors. Codes take a quarter at a time: addresses of 8
    elements a thread take 254 registers, of 2 128.
    """
    BLOCK: tl.constexpr = CONFIG.BLOCK
    # No min or max: Triton 3.5 takes them for operations on tensors.
    WIDEST: tl.constexpr = optim_codes.BLOCK if CONFIG.CODED else 128
    COLS: tl.constexpr = WIDEST if BLOCK > WIDEST else BLOCK
    QUARTER: tl.constexpr = BLOCK // 4 if BLOCK // 4 > COLS else COLS
    PART: tl.constexpr = QUARTER if CONFIG.CODED else BLOCK
    for k in range(0, BLOCK // PART):
        part = block * (BLOCK // PART) + k
        i = rows_of(part, PART, COLS)
        inside = i < numel
        code_block = part
        if CONFIG.CODED:
            code_block = blocks_of(part, PART)
        code_block_inside = code_block * optim_codes.BLOCK < numel
        i = tl.where(inside, i, 0)
        in_param = i
        in_grad = i
        in_state = i
        if CONFIG.LAYOUT_DIMS > 0:
            if layout != 0:
                sizes = layout.to(tl.pointer_type(tl.int64))
                in_param = strided(i, sizes, 0, CONFIG)
                in_grad = strided(i, sizes, 1, CONFIG)
                in_state = strided(i, sizes, 2, CONFIG)
        elements = Elements(i, in_param, in_grad, in_state, inside, code_block, code_block_inside)
        update(buffers, elements, scalars, keys, RULE, CONFIG)


@triton.jit
def load_counter(address):
    return tl.load(address.to(tl.pointer_type(tl.float32)))


@triton.jit
def load_rule_scalars(row, h, step, chunk, SCALARS: tl.constexpr, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    """The rule's own scalars. Its states of one number become what they are to be next, for the launch's end.

    Every program of a tensor has to read them before they change: the launch's last program changes them.
    """
    if CONFIG.SCALAR_TYPE is None:
        scalars = SCALARS(h, step, HYPER, CONFIG)
    else:
        scalar0 = load_scalar(row + SCALAR0, CONFIG)
        scalar1 = load_scalar(row + SCALAR1, CONFIG)
        scalars, scalar0, scalar1 = SCALARS(h, step, scalar0, scalar1, HYPER, CONFIG)
        if tl.load(chunk + 1) == 0:
            tl.store(row + NEXT_SCALAR0, scalar0.to(tl.float64).to(tl.int64, bitcast=True))
            tl.store(row + NEXT_SCALAR1, scalar1.to(tl.float64).to(tl.int64, bitcast=True))
    return scalars


@triton.jit
def clip_coefficient(h, grad_norm, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    """torch.nn.utils.clip_grad_norm_'s; a norm that is NaN makes all gradients NaN, as there."""
    fraction = hyper(h, HYPER.max_grad_norm, CONFIG) / (tl.load(grad_norm) + 1e-6)
    return tl.where(fraction > 1.0, 1.0, fraction).to(CONFIG.ACC)


@triton.jit
def update_chunk(
    row, grad, chunk, hypers, grad_scale, grad_norm, chunk_blocks, seed,
    SCALARS: tl.constexpr, RULE: tl.constexpr, HYPER: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """What one program updates: some blocks of one tensor. grad: the address of its gradient."""
    ACC: tl.constexpr = CONFIG.ACC
    h = hypers + tl.load(row + GROUP) * (2 * len(HYPER))
    numel = tl.load(row + NUMEL)
    step = load_counter(tl.load(row + STEP)).to(tl.float64) + 1.0
    keys = None
    if CONFIG.STOCHASTIC or CONFIG.CODED:
        random_step = step
        random_counter = tl.load(row + RANDOM_STEP)
        if random_counter != 0:
            random_step = load_counter(random_counter).to(tl.float64) + 1.0
        keys = Keys(*optim_codes.random_keys(seed, random_step, tl.load(row + STREAM)))
    lr64 = hyper(h, HYPER.lr, CONFIG)
    lr = lr64.to(ACC)
    eps = hyper(h, HYPER.eps, CONFIG).to(ACC)
    sign = hyper(h, HYPER.grad_sign, CONFIG).to(ACC)
    decay = hyper(h, HYPER.weight_decay, CONFIG).to(ACC)
    shrink = (1.0 - lr64 * hyper(h, HYPER.decoupled_decay, CONFIG)).to(ACC)
    rule = load_rule_scalars(row, h, step, chunk, SCALARS, HYPER, CONFIG)
    scale = None
    clip = None
    ema_decay = lr
    ema_first = True
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(ACC)
    if grad_norm is not None:
        clip = clip_coefficient(h, grad_norm, HYPER, CONFIG)
    if CONFIG.EMA_TYPE is not None:
        ema_decay = hyper(h, HYPER.ema_decay, CONFIG).to(ACC)
        ema_counter = tl.load(row + EMA_STEP)
        if ema_counter != 0:
            ema_first = load_counter(ema_counter) == 0.0
    scalars = Scalars(lr, eps, sign, decay, shrink, rule, scale, clip, ema_decay, ema_first)
    update_blocks(row, grad, numel, chunk, chunk_blocks, scalars, keys, RULE, CONFIG)


@triton.jit
def update_blocks(row, grad, numel, chunk, chunk_blocks, scalars, keys, RULE: tl.constexpr, CONFIG: tl.constexpr):
    """Update the chunk's blocks, once their tensor's scalars are known. grad: the address of its gradient."""
    param = tl.load(row + PARAM)
    state0 = tl.load(row + STATE0)
    state1 = tl.load(row + STATE1)
    state2 = tl.load(row + STATE2)
    ema = tl.load(row + EMA)
    layout = tl.load(row + LAYOUT)
    aligned = ((param | grad | state0 | state1 | state2 | ema) % 16 == 0) & (layout == 0)
    code_scale0 = row  # any pointer will do where there are no codes
    code_scale1 = row
    code_scale2 = row
    residual = row
    if CONFIG.CODED:
        code_scale0 = tl.load(row + CODE_SCALE0).to(tl.pointer_type(tl.float32))
        code_scale1 = tl.load(row + CODE_SCALE1).to(tl.pointer_type(tl.float32))
        code_scale2 = tl.load(row + CODE_SCALE2).to(tl.pointer_type(tl.float32))
    if CONFIG.RESIDUAL:
        residual_address = tl.load(row + RESIDUAL)
        residual = residual_address.to(tl.pointer_type(tl.int8))
        aligned &= residual_address % 16 == 0
    buffers = Buffers(
        param.to(pointer_to(CONFIG.PARAM_TYPE)), grad.to(pointer_to(CONFIG.GRAD_TYPE)),
        state0.to(pointer_to(CONFIG.STATE0_TYPE)), state1.to(pointer_to(CONFIG.STATE1_TYPE)),
        state2.to(pointer_to(CONFIG.STATE2_TYPE)), ema.to(pointer_to(CONFIG.EMA_TYPE)),
        code_scale0, code_scale1, code_scale2, residual,
    )  # fmt: skip
    first_block = tl.load(chunk + 1).to(tl.int64) * chunk_blocks
    for block in range(first_block, tl.minimum(first_block + chunk_blocks, tl.cdiv(numel, CONFIG.BLOCK))):
        if aligned & ((block + 1) * CONFIG.BLOCK <= numel):
            # 128-bit access needs both facts and no mask; without this branch every access is a scalar one. Said of
            # pointers that are made in this function: what is said of another's results is lost when it is inlined.
            wide = Buffers(
                tl.multiple_of(buffers.param, 16), tl.multiple_of(buffers.grad, 16),
                tl.multiple_of(buffers.state0, 16), tl.multiple_of(buffers.state1, 16),
                tl.multiple_of(buffers.state2, 16), tl.multiple_of(buffers.ema, 16),
                code_scale0, code_scale1, code_scale2, tl.multiple_of(residual, 16),
            )  # fmt: skip
            update_whole_block(block, wide, scalars, keys, RULE, CONFIG)
        else:
            update_partial_block(block, numel, layout, buffers, scalars, keys, RULE, CONFIG)


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
    await_previous()
    finite = True
    if found_inf is not None:
        finite = tl.load(found_inf) == 0.0
    if finite:
        chunk = chunks + 2 * tl.program_id(0)
        tensor = tl.load(chunk)
        row = rows + tensor.to(tl.int64) * COLUMNS
        grad = tl.load(grads + tensor)
        if grad != 0:
            update_chunk(
                row, grad, chunk, hypers, grad_scale, grad_norm, chunk_blocks, seed, SCALARS, RULE, HYPER, CONFIG
            )
        # The counters may move only when every program has read them. The barrier keeps a slow warp of this program
        # from reading late; the last program to arrive moves them, and leaves `finished` at 0 for the next launch.
        tl.debug_barrier()
        if tl.atomic_add(finished, 1) == tl.num_programs(0) - 1:
            tl.store(finished, 0)
            advance_all(rows, grads, tensors, CONFIG)


@triton.jit
def advance_all(rows, grads, tensors, CONFIG: tl.constexpr):
    """Move the counters, and the states of one number, of all tensors that were updated."""
    for first in range(0, tensors, CONFIG.BLOCK):
        j = first + tl.arange(0, CONFIG.BLOCK)
        moves = (j < tensors) & (tl.load(grads + j, mask=j < tensors, other=0) != 0)
        row = rows + j * COLUMNS
        advance(row + STEP, moves)
        if CONFIG.STOCHASTIC or CONFIG.CODED:
            advance(row + RANDOM_STEP, moves)
        if CONFIG.EMA_TYPE is not None:
            advance(row + EMA_STEP, moves)
        if CONFIG.SCALAR_TYPE is not None:
            store_scalar(row + SCALAR0, row + NEXT_SCALAR0, moves, CONFIG)
            store_scalar(row + SCALAR1, row + NEXT_SCALAR1, moves, CONFIG)


@triton.jit
def advance(address, moves):
    """Add 1 to the counters at these addresses, where there is one."""
    counter_address = tl.load(address, mask=moves, other=0)
    exists = counter_address != 0
    counter = counter_address.to(tl.pointer_type(tl.float32))
    tl.store(counter, tl.load(counter, mask=exists, other=0.0) + 1.0, mask=exists)


@triton.jit
def load_scalar(address, CONFIG: tl.constexpr):
    """A state of one number, in the type it is kept in; 0 where the rule has none."""
    scalar_address = tl.load(address)
    return tl.load(scalar_address.to(tl.pointer_type(CONFIG.SCALAR_TYPE)), mask=scalar_address != 0, other=0.0)


@triton.jit
def store_scalar(address, value, moves, CONFIG: tl.constexpr):
    """Write the values, which other programs left, to these addresses, where there is one."""
    scalar_address = tl.load(address, mask=moves, other=0)
    bits = tl.load(value, mask=moves, other=0, cache_modifier=".cg")  # from L2, where the other programs' results are
    scalar = bits.to(tl.float64, bitcast=True).to(CONFIG.SCALAR_TYPE)
    tl.store(scalar_address.to(tl.pointer_type(CONFIG.SCALAR_TYPE)), scalar, mask=scalar_address != 0)


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
    await_previous()
    BLOCK: tl.constexpr = CONFIG.BLOCK
    chunk = chunks + 2 * tl.program_id(0)
    tensor = tl.load(chunk)
    grad_address = tl.load(grads + tensor)
    total = tl.full((), 0.0, tl.float64)
    if grad_address != 0:
        row = rows + tensor.to(tl.int64) * COLUMNS
        numel = tl.load(row + NUMEL)
        layout = tl.load(row + LAYOUT)
        grad = grad_address.to(tl.pointer_type(CONFIG.GRAD_TYPE))
        ACC: tl.constexpr = tl.float64 if CONFIG.GRAD_TYPE == tl.float64 else tl.float32
        squares = tl.zeros((BLOCK,), ACC)
        first_block = tl.load(chunk + 1).to(tl.int64) * chunk_blocks
        for block in range(first_block, tl.minimum(first_block + chunk_blocks, tl.cdiv(numel, BLOCK))):
            i = block * BLOCK + tl.arange(0, BLOCK)
            if (grad_address % 16 == 0) & (layout == 0) & ((block + 1) * BLOCK <= numel):
                g = tl.load(tl.multiple_of(grad, 16) + i).to(ACC)
            else:
                inside = i < numel
                i = tl.where(inside, i, 0)
                if CONFIG.LAYOUT_DIMS > 0:
                    if layout != 0:
                        i = strided(i, layout.to(tl.pointer_type(tl.int64)), 1, CONFIG)
                g = tl.load(grad + i, mask=inside, other=0.0).to(ACC)
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
