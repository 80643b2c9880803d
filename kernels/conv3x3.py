"""y = act(x ⋆ w + b), a 3×3 convolution on tensor cores, and its gradients.

    x: (N, H, W, C)    w: (O, 9, C): a row of C for each tap (r, s)    b: (O,)    y, dy, dz: (N, P, Q, O)

    forward    y[n, p, q]  = act(b + Σ_rs x[n, p·SH + r − pad_h, q·SW + s − pad_w]·w[rs]ᵀ)
    dgrad      dx[n, h, v] = Σ_rs dz[n, (h + pad_h − r)/SH, (v + pad_w − s)/SW]·w[rs],    where the divisions are exact
    wgrad      dw[rs]      = Σ_npq dz[n, p, q]ᵀ·x[n, p·SH + r − pad_h, q·SW + s − pad_w],    db = Σ_npq dz[n, p, q]

Each is a matrix product whose rows (of wgrad: whose sum) are pixels. A tile takes a *box* of them, BOX.N images × BOX.H
rows × BOX.W columns, so that a tap is the same box elsewhere: for descriptors an offset, with zeros outside the image
for free; for pointers new addresses by the image's strides, and no division by a size.

Groups come in *tiles* of as many as fill a tile's columns, GROUPS_PER_TILE. Of several groups w is a block-diagonal
matrix (DIAGONAL), which forward and dgrad read from memory (`spread_weight`); one is an ordinary product. The files
beside this one hold what is no such product: `conv3x3_few_channels.py` few input channels, `conv3x3_depthwise.py` one
channel a group, `relayout.py` the way from one layout to another.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from .activations import Act, activate
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
    round_to,
    tile_of,
    zeros,
)

# A group has OG output and CG input channels in w or dw, CX input channels in dgrad's dx. Where rows are padded to
# whole 16 bytes, forward's and dgrad's w, dz and x are, dw and dx are not, and wgrad rounds up. Of y, P and Q follow
# from H and W (`output_size`). Not specialized: no recompile for a batch of 1 or a stride of 2. Distances in memory
# are, as numbers of a tuple: 16 divides them or does not. What else does, VEC says.
SIZES = "N H W groups OG CG CX step_h step_w".split()


class Box(NamedTuple):
    """The size of a box of pixels."""

    N: int  # images
    H: int  # rows
    W: int  # columns


class Product(NamedTuple):
    """What is fixed when `forward` or `dgrad` is compiled; other fields as in `common`."""

    BLOCK_J: int  # channels of the result
    BLOCK_L: int  # channels of the sum
    BOX: Box
    PAD_H: int  # the padding
    PAD_W: int
    GROUP: int
    GROUPS_PER_TILE: int
    DIAGONAL: bool  # several groups a tile
    FLAT: bool  # one loop over taps and channels (`convolve`)
    TMA: bool
    PRECISION: str
    CHANNELS_LAST: bool  # in the result; else its columns are contiguous
    VEC: int
    VEC_W: int
    VEC_STORE: int
    SPLIT: bool | None = None  # a program has a part of the sum
    SUMS: Reduce | None = None
    W_TRANSPOSED: bool | None = None  # of dgrad: w is (C, 9, O), of a single group
    ACT: Act | None = None  # of forward
    PTX: bool | None = None


class Wgrad(NamedTuple):
    """What is fixed when `wgrad` is compiled; other fields as in `common` and `Product`."""

    BLOCK_O: int
    BLOCK_C: int
    BOX: Box
    PAD_H: int
    PAD_W: int
    TAPS: int  # that a program takes: 1, or the 3 of a row
    GROUPS_PER_TILE: int
    DIAGONAL: bool
    TMA: bool
    X_FIRST: bool  # x is the first operand
    TAPS_LAST: bool  # in dw
    PRECISION: str
    VEC_O: int
    VEC_C: int
    VEC_STORE: int


class SpreadWeight(NamedTuple):
    """What is fixed when `spread_weight` is compiled."""

    GROUPS_PER_TILE: int
    BLOCK: int


# A tensor (N, C, H, W) in memory, as an argument of a kernel. Its sizes are arguments of their own (`common`).
Strided = namedtuple("Strided", "data stride_n stride_c stride_h stride_w")
# The same within a kernel: a batch of images (N, H, W) of channels up to C. data: a pointer or a tensor descriptor.
Batch = namedtuple("Batch", "data stride_n stride_c stride_h stride_w N H W C")
# One pixel or several: image, row, column.
Pixels = namedtuple("Pixels", "n h w")
# From pixels of a box to those of an image that they meet: row h to h·step_h + shift_h; columns likewise.
PixelMap = namedtuple("PixelMap", "step_h step_w shift_h shift_w")
# Every step-th tap from a row and a column on: all nine, or in dgrad those that a class of pixels meets. From each to
# the next the pixels met move by one: forward, or in dgrad, which looks back, backward.
Taps = namedtuple("Taps", "row column step_h step_w")
# The groups of a tile: which tile, how many groups it has, the output and the input channels of each, and the first of
# their channels that a program computes. Of a group LG channels are summed and JG computed: CG and OG, in dgrad OG and
# CG.
Groups = namedtuple("Groups", "tile count OG CG col")


@triton.jit
def output_size(H, W, step_h, step_w, CONFIG: tl.constexpr):
    """P and Q: the rows and columns of the convolution of an image of H × W. A step is 1 or 2: a shift divides."""
    P = ((H + (2 * CONFIG.PAD_H - 3)) >> (step_h - 1)) + 1
    Q = ((W + (2 * CONFIG.PAD_W - 3)) >> (step_w - 1)) + 1
    return P, Q


@triton.jit
def box_at(index, rows, cols, BOX: tl.constexpr):
    """The first pixel of a box, of all those that cover images of rows × cols.

    With a stride of 2 and one row or column, a class of dx's pixels has none: then all that is asked for lies outside.
    """
    across = tl.maximum(tl.cdiv(cols, BOX.W), 1)
    down = tl.maximum(tl.cdiv(rows, BOX.H), 1)
    return Pixels(index // across // down * BOX.N, index // across % down * BOX.H, index % across * BOX.W)


@triton.jit
def next_box(box, rows, cols, BOX: tl.constexpr):
    """The box behind `box` of those of `box_at`, without its divisions."""
    w = box.w + BOX.W
    h = tl.where(w < cols, box.h, box.h + BOX.H)
    n = tl.where(h < rows, box.n, box.n + BOX.N)
    return Pixels(n, tl.where(h < rows, h, 0), tl.where(w < cols, w, 0))


@triton.jit
def pixels_of(box, BOX: tl.constexpr):
    """All pixels of the box whose first pixel is `box`."""
    m = tl.arange(0, BOX.N * BOX.H * BOX.W)
    return Pixels(box.n + m // (BOX.H * BOX.W), box.h + m // BOX.W % BOX.H, box.w + m % BOX.W)


@triton.jit
def pixel_offsets(image, pixels, VEC: tl.constexpr):
    """Where pixels lie, and which of them exist; the others become 0, as in `masked_range`. VEC divides strides."""
    n, h, w = pixels
    inside = (n < image.N) & (h >= 0) & (h < image.H) & (w >= 0) & (w < image.W)
    at = n.to(tl.int64) * (image.stride_n // VEC * VEC)
    at += h.to(tl.int64) * (image.stride_h // VEC * VEC) + w.to(tl.int64) * (image.stride_w // VEC * VEC)
    # Said of the result: Triton 3.9 does not see it through `where`, and would load and store element by element.
    return tl.multiple_of(tl.where(inside, at, 0), VEC), inside


@triton.jit
def rows_of_class(size, pad, of_class, step):
    """Of the `size` rows of dx those that meet the taps of_class + t·step: how many; which row of dz the first meets.

    Row h + pad = i·step + of_class of dx meets tap of_class + t·step of the row i − t of dz. Columns likewise. step is
    1 or 2: a shift divides.
    """
    first = (pad - of_class + step - 1) >> (step - 1)
    return ((size - 1 + pad - of_class) >> (step - 1)) - first + 1, first


@triton.jit
def row_of_class(i, first, pad, of_class, step):
    """Where the i-th row of a class lies in dx."""
    return i * step + (first * step + of_class - pad)


@triton.jit
def taps_from(first, step):
    """How many of three taps there are from the first one on, step apart."""
    return ((2 - first) >> (step - 1)) + 1


@triton.jit
def tap_at(t, taps_w):
    """Row and column of the t-th tap, of up to three rows of taps_w: t / taps_w, without a division."""
    row = (t >= taps_w).to(tl.int32) + (t >= 2 * taps_w).to(tl.int32)
    return row, t - row * taps_w


@triton.jit
def load_box(
    image, box, pixel_map, channel, BOX: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    TRANSPOSED: tl.constexpr = False, WITHIN=None,
):  # fmt: skip
    """The pixels of an image that a box meets, by a `PixelMap`, from a channel on: (pixels, BLOCK), zeros outside.

    TRANSPOSED, of pointers alone: (BLOCK, pixels). Compiled: where tensor cores take operands from registers, Triton
    does not pipeline a load behind which `tl.trans` stands.

    A descriptor has five dimensions, (N, H / step_h, step_h, W / step_w, step_w · C): every step-th row is a box in it.
    If boxes are of images alone, N stands behind W / step_w: then the reshape drops leading ones alone (`convolve`).
    WITHIN: (rows, columns), from which on pixels of the box are zeros too; a descriptor's box must not have any.
    """
    step_h, step_w, shift_h, shift_w = pixel_map
    if not image.data.dtype.is_ptr():
        tl.static_assert(not TRANSPOSED)
        h = box.h + (shift_h >> (step_h - 1))  # step is 1 or 2; a shift rounds down where a division rounds to zero
        w = box.w + (shift_w >> (step_w - 1))
        c = (shift_w & (step_w - 1)) * (image.stride_w // VEC * VEC) + channel
        if BOX.H * BOX.W == 1:
            tile = image.data.load([h, shift_h & (step_h - 1), w, box.n, c]).reshape(BOX.N, BLOCK)
        else:
            tile = image.data.load([box.n, h, shift_h & (step_h - 1), w, c]).reshape(BOX.N * BOX.H * BOX.W, BLOCK)
    else:
        m = pixels_of(box, BOX)
        at, inside = pixel_offsets(image, Pixels(m.n, m.h * step_h + shift_h, m.w * step_w + shift_w), VEC)
        if WITHIN is not None:
            inside = inside & (m.h < WITHIN[0]) & (m.w < WITHIN[1])
        c, c_inside = masked_range(channel, image.C, BLOCK, VEC)
        mask = inside[None, :] & c_inside[:, None] if TRANSPOSED else inside[:, None] & c_inside[None, :]
        at = at[None, :] + c[:, None] if TRANSPOSED else at[:, None] + c[None, :]
        tile = tl.load(image.data + at, mask=mask, other=0.0)
    return tile


@triton.jit
def offsets(image, pixels, c, c_inside, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, RUN: tl.constexpr):
    """Offsets of pixels × channels, and which of them exist.

    Contiguous are the channels (CHANNELS_LAST) or the columns of the image. VEC divides the other strides, and in the
    second case W; RUN pixels then follow each other from a multiple of RUN on, all inside together or all outside.
    """
    if CHANNELS_LAST:
        at, inside = pixel_offsets(image, pixels, VEC)
        at = at[:, None] + c[None, :]
    else:
        n, h, w = pixels
        inside = (n < image.N) & (h >= 0) & (h < image.H) & (w >= 0) & (w < image.W // VEC * VEC)
        at = n.to(tl.int64) * (image.stride_n // VEC * VEC) + h.to(tl.int64) * (image.stride_h // VEC * VEC) + w
        at = tl.max_contiguous(tl.multiple_of(tl.where(inside, at, 0), RUN), RUN)
        at = at[:, None] + c[None, :] * (image.stride_c // VEC * VEC)
    return at, inside[:, None] & c_inside[None, :]


@triton.jit
def from_channel(image, first, CONFIG: tl.constexpr):
    """An image without the channels before `first`. CHANNELS_LAST and VEC_STORE as in `offsets`."""
    VEC: tl.constexpr = CONFIG.VEC_STORE
    at = first // VEC * VEC if CONFIG.CHANNELS_LAST else first.to(tl.int64) * (image.stride_c // VEC * VEC)
    return Batch(
        image.data + at, image.stride_n, image.stride_c, image.stride_h, image.stride_w,
        image.N, image.H, image.W, image.C,
    )  # fmt: skip


@triton.jit
def part_of_output(image, N, part, VEC: tl.constexpr):
    """Where a part of the sum is written: behind N images for each part before. image: a `Strided`; VEC divides it."""
    data, stride_n, stride_c, stride_h, stride_w = image
    data += part.to(tl.int64) * N * (stride_n // VEC * VEC)
    return Strided(data, stride_n, stride_c, stride_h, stride_w)


@triton.jit
def store_box(image, tile, pixels, channel, BLOCK: tl.constexpr, CONFIG: tl.constexpr):
    """Write the pixels of a box from a channel on, rounded to the type of the image. VEC_STORE as in `offsets`."""
    BOX: tl.constexpr = CONFIG.BOX
    VEC: tl.constexpr = CONFIG.VEC_STORE
    c, c_inside = masked_range(channel, image.C, BLOCK, VEC if CONFIG.CHANNELS_LAST else 1)
    at, mask = offsets(image, pixels, c, c_inside, CONFIG.CHANNELS_LAST, VEC, VEC if VEC < BOX.W else BOX.W)
    tl.store(image.data + at, round_to(tile, image.data.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(w, tap, l, col, first, DGRAD: tl.constexpr, CONFIG: tl.constexpr):
    """The BLOCK_L × BLOCK_J tile at (l, col) of one tap's weights, for the groups from output channel `first` on.

    w: a `Matrix` of the groups' output × input channels. Summed index l and column are input and output channels, or
    (DGRAD) the other way round.
    """
    BLOCK_L: tl.constexpr = CONFIG.BLOCK_L
    BLOCK_J: tl.constexpr = CONFIG.BLOCK_J
    VEC: tl.constexpr = CONFIG.VEC_W
    if not w.data.dtype.is_ptr():
        if DGRAD:
            tile = w.data.load([tap, first + l, col]).reshape(BLOCK_L, BLOCK_J)
        else:
            tile = tl.trans(w.data.load([tap, first + col, l]).reshape(BLOCK_J, BLOCK_L))
    else:
        pitch = w.cols // VEC * VEC
        at_tap = w.data + (first.to(tl.int64) * 9 + tap) * pitch
        rows, cols = (w.rows, w.cols) if DGRAD else (w.cols, w.rows)
        tile = load_tile(Matrix(at_tap, rows, cols, 9 * pitch), l, col, BLOCK_L, BLOCK_J, not DGRAD, VEC)
    return tile


@triton.jit(do_not_specialize=["OG", "CG"])
def spread_weight(w, out, OG, CG, stride_o, stride_c, stride_r, stride_s, CONFIG: tl.constexpr):
    """out (O, 9, GROUPS_PER_TILE·CG) = a block-diagonal matrix for each tile of groups and tap: w's rows in their
    groups' columns.
    """
    await_previous()
    o = tl.program_id(0)
    i = tl.arange(0, CONFIG.BLOCK)
    width = CONFIG.GROUPS_PER_TILE * CG
    tap = i // width
    c = i % width - o // OG % CONFIG.GROUPS_PER_TILE * CG
    within = i < 9 * width
    inside = within & (c >= 0) & (c < CG)
    at = tl.where(inside, c * stride_c + tap // 3 * stride_r + tap % 3 * stride_s, 0)
    row = tl.load(w + o.to(tl.int64) * stride_o + at, mask=inside, other=0.0)
    tl.store(out + (o.to(tl.int64) * (9 * width) + tl.where(within, i, 0)), row, mask=within)


@triton.jit
def convolve_by_group(image, w, box, pixel_map, taps, groups, DGRAD: tl.constexpr, CONFIG: tl.constexpr):
    """What `convolve` computes, one column after the other, which meets its own group's channels. Slow, seldom needed.

    image.data begins with the groups' first channel. w: a pointer.

    Compiled: all columns at once need an address for each element, and spill up to 7,064 bytes.
    """
    BOX: tl.constexpr = CONFIG.BOX
    PIXELS: tl.constexpr = BOX.N * BOX.H * BOX.W
    BLOCK_J: tl.constexpr = CONFIG.BLOCK_J
    ACC: tl.constexpr = accumulator(image.data.dtype)
    SIGN: tl.constexpr = -1 if DGRAD else 1
    n, i, j = pixels_of(box, BOX)
    tile, groups_here, OG, CG, col = groups
    LG = OG if DGRAD else CG
    JG = CG if DGRAD else OG
    first = tile * CONFIG.GROUPS_PER_TILE * OG
    taps_h = taps_from(taps.row, taps.step_h)
    taps_w = taps_from(taps.column, taps.step_w)
    acc = tl.zeros((PIXELS, BLOCK_J), ACC)
    for column in range(col, tl.minimum(col + BLOCK_J, groups_here * JG)):
        total = tl.zeros((PIXELS,), ACC)
        for t in range(0, taps_h * taps_w):
            t_h, t_w = tap_at(t, taps_w)
            tap = (taps.row + t_h * taps.step_h) * 3 + taps.column + t_w * taps.step_w
            h = i * pixel_map.step_h + (pixel_map.shift_h + SIGN * t_h)
            v = j * pixel_map.step_w + (pixel_map.shift_w + SIGN * t_w)
            at, inside = pixel_offsets(image, Pixels(n, h, v), CONFIG.VEC)
            for channel in range(column // JG * LG, (column // JG + 1) * LG):
                value = tl.load(image.data + (at + channel), mask=inside, other=0.0)
                o, c = (channel, column) if DGRAD else (column, channel)
                at_w = ((first + o).to(tl.int64) * 9 + tap) * (CONFIG.GROUPS_PER_TILE * CG) + c
                total += value.to(ACC) * tl.load(w + at_w).to(ACC)
        acc = tl.where((col + tl.arange(0, BLOCK_J) == column)[None, :], total[:, None], acc)
    return acc


@triton.jit
def without_zeros(acc, image, memory, box, pixel_map, taps, groups, DGRAD: tl.constexpr, CONFIG: tl.constexpr):
    """The sums of a block-diagonal product, anew by `convolve_by_group` if there is a NaN among them.

    A zero between two groups times an infinity of one is NaN in the other. memory: pointers to image and w.
    """
    # One sum over both axes: with a reduction along either, Triton 3.7 does not compile for sm_100.
    if tl.sum((acc != acc).to(tl.int32)) > 0:
        LG = groups.OG if DGRAD else groups.CG
        origin = groups.tile * (CONFIG.GROUPS_PER_TILE * LG // CONFIG.VEC * CONFIG.VEC)
        by_pointer = Batch(
            memory[0] + origin, image.stride_n, 1, image.stride_h, image.stride_w, image.N, image.H, image.W,
            groups.count * LG,
        )  # fmt: skip
        acc = convolve_by_group(by_pointer, memory[1], box, pixel_map, taps, groups, DGRAD, CONFIG)
    return acc


@triton.jit
def convolve(image, w, memory, box, pixel_map, taps, groups, part, DGRAD: tl.constexpr, CONFIG: tl.constexpr):
    """Σ over taps and a tile's groups' channels of image[tap]·w[tap], for a box and BLOCK_J columns.

    memory: pointers to image and w, if there are groups to take apart; these may be descriptors.

    With SPLIT a `part` of the sum: its share of the turns of a FLAT loop.

    FLAT is one loop over taps and channels, so that loads are pipelined across taps, but not with 8 warps and pointers:
    Triton miscompiles that loop, https://github.com/pytorch/pytorch/issues/173068. Otherwise the loop over channels
    stands in one over taps; compiled, unrolling that took 3.6 times the code and as many registers.

    With descriptors the product is w[tap]ᵀ·src[tap]ᵀ, and the sum is transposed at the end. Compiled: wgmma reads its
    first operand from shared memory only if no reshape stands behind the load, but one that drops leading ones. A box
    of pixels has another. It would go through registers, which the next turn's loads overwrite while wgmma reads them
    (https://github.com/triton-lang/triton/issues/9433), or ptxas makes each product wait. Not so with tf32x3: it makes
    its operands in registers anyway, and waits; there weights come second, for the second is written back to memory.
    """
    BOX: tl.constexpr = CONFIG.BOX
    BLOCK_J: tl.constexpr = CONFIG.BLOCK_J
    BLOCK_L: tl.constexpr = CONFIG.BLOCK_L
    FLAT: tl.constexpr = CONFIG.FLAT
    SPLIT: tl.constexpr = CONFIG.SPLIT
    VEC: tl.constexpr = CONFIG.VEC
    PRECISION: tl.constexpr = CONFIG.PRECISION
    GROUPS_PER_TILE: tl.constexpr = CONFIG.GROUPS_PER_TILE
    PIXELS: tl.constexpr = BOX.N * BOX.H * BOX.W
    WEIGHTS_FIRST: tl.constexpr = CONFIG.TMA and PRECISION != "tf32x3"
    SIGN: tl.constexpr = -1 if DGRAD else 1
    taps_h = taps_from(taps.row, taps.step_h)
    taps_w = taps_from(taps.column, taps.step_w)
    tile, groups_here, OG, CG, col = groups
    LG = OG if DGRAD else CG
    length = groups_here * LG
    origin = tile * (GROUPS_PER_TILE * LG // VEC * VEC)  # the groups' first channel in the image
    first = tile * GROUPS_PER_TILE * OG
    start = origin if CONFIG.TMA else 0  # in `source`: a descriptor begins with the first channel of all
    source = image.data if CONFIG.TMA else image.data + origin
    src = Batch(source, image.stride_n, 1, image.stride_h, image.stride_w, image.N, image.H, image.W, start + length)
    acc = tl.zeros((BLOCK_J, PIXELS) if WEIGHTS_FIRST else (PIXELS, BLOCK_J), accumulator(source.dtype))
    steps = tl.cdiv(length, BLOCK_L)
    turns = taps_h * taps_w * steps if FLAT else steps
    t = 0
    for outer in range(0, 1 if FLAT else taps_h * taps_w):
        if not FLAT:
            t = outer
        l = 0
        if SPLIT:
            tl.static_assert(FLAT, "taps have a loop of their own")
            share = tl.cdiv(turns, tl.num_programs(1))
            done = part * share
            turns = tl.minimum(share, turns - done)
            t = done // steps
            l = done % steps * BLOCK_L
        # One turn at least: `common.product`.
        for _ in range(0, tl.maximum(turns, 1)):
            t_h, t_w = tap_at(t, taps_w)
            tap = (taps.row + t_h * taps.step_h) * 3 + taps.column + t_w * taps.step_w
            shift_h, shift_w = pixel_map.shift_h + SIGN * t_h, pixel_map.shift_w + SIGN * t_w
            shifted = PixelMap(pixel_map.step_h, pixel_map.step_w, shift_h, shift_w)
            a = load_box(src, box, shifted, start + l, BOX, BLOCK_L, VEC)
            if CONFIG.W_TRANSPOSED:
                b = load_weight(Matrix(w, CG, OG, 1), tap, l, col, first, False, CONFIG)
            else:
                of_groups = Matrix(w, groups_here * OG, GROUPS_PER_TILE * CG, 1)
                b = load_weight(of_groups, tap, l, col, first, DGRAD, CONFIG)
            acc = dot(tl.trans(b), tl.trans(a), acc, PRECISION) if WEIGHTS_FIRST else dot(a, b, acc, PRECISION)
            l += BLOCK_L
            if FLAT:
                t += (l >= length).to(tl.int32)
                l = tl.where(l >= length, 0, l)
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    if CONFIG.DIAGONAL:
        acc = without_zeros(acc, image, memory, box, pixel_map, taps, groups, DGRAD, CONFIG)
    return acc


@triton.jit(do_not_specialize=SIZES)
def forward(x, strides, w, memory, b, y, N, H, W, groups, OG, CG, step_h, step_w, CONFIG: tl.constexpr):
    """y = act(x ⋆ w + b): a box of y's pixels and BLOCK_J of a tile's groups' output channels a program.

    With SPLIT, y has the images of each part of the sum behind those of the one before, without b and act.
    """
    await_previous()
    ACT: tl.constexpr = CONFIG.ACT
    BOX: tl.constexpr = CONFIG.BOX
    BLOCK_J: tl.constexpr = CONFIG.BLOCK_J
    GROUPS_PER_TILE: tl.constexpr = CONFIG.GROUPS_PER_TILE
    P, Q = output_size(H, W, step_h, step_w, CONFIG)
    columns = tl.cdiv(GROUPS_PER_TILE * OG, BLOCK_J)
    boxes = tl.cdiv(N, BOX.N) * tl.cdiv(P, BOX.H) * tl.cdiv(Q, BOX.W)
    index, column = tile_of(tl.program_id(0), boxes, columns * tl.cdiv(groups, GROUPS_PER_TILE), CONFIG.GROUP)
    box = box_at(index, P, Q, BOX)
    tile = column // columns
    col = column % columns * BLOCK_J
    groups_here = tl.minimum(GROUPS_PER_TILE, groups - tile * GROUPS_PER_TILE)
    of_tile = Groups(tile, groups_here, OG, CG, col)
    image = Batch(x, *strides, N, H, W, CG)
    pixel_map = PixelMap(step_h, step_w, -CONFIG.PAD_H, -CONFIG.PAD_W)
    part = tl.program_id(1)
    z = convolve(image, w, memory, box, pixel_map, Taps(0, 0, 1, 1), of_tile, part, False, CONFIG)
    first = tile * (GROUPS_PER_TILE * OG)
    if CONFIG.SPLIT:
        y = part_of_output(y, N, part, CONFIG.VEC_STORE)
    y = from_channel(Batch(*y, N, P, Q, groups_here * OG), first, CONFIG)
    if b is not None:
        o, inside = masked_range(col, groups_here * OG, BLOCK_J, 1)
        z += tl.load(b + first + o, mask=inside, other=0.0).to(z.dtype)[None, :]
    z = activate(z, ACT, y.data.dtype.element_ty, CONFIG.PTX)
    store_box(y, z, pixels_of(box, BOX), col, BLOCK_J, CONFIG)


@triton.jit(do_not_specialize=SIZES)
def dgrad(dz, strides, w, memory, dx, sums, N, H, W, groups, OG, CG, CX, step_h, step_w, CONFIG: tl.constexpr):
    """dx from dz: a box of dx's pixels and BLOCK_J of a tile's groups' input channels, of CX a group, a program.

    W_TRANSPOSED: w is (C, 9, O), of a single group; its rows then lie along the sum.

    With a stride of 2 the rows of dx fall into two classes, program_id(1): those that meet the taps 0 and 2, and those
    that meet tap 1; the columns likewise. Each class is a convolution of its own with the taps that it meets.

    Of a single class the sum may be SPLIT, as in `forward`: dx then has the images of all parts.

    The programs behind those of dx add up wgrad's partial results.
    """
    await_previous()
    SUMS: tl.constexpr = CONFIG.SUMS
    SPLIT: tl.constexpr = CONFIG.SPLIT
    BOX: tl.constexpr = CONFIG.BOX
    BLOCK_J: tl.constexpr = CONFIG.BLOCK_J
    GROUPS_PER_TILE: tl.constexpr = CONFIG.GROUPS_PER_TILE
    VEC: tl.constexpr = CONFIG.VEC_STORE
    class_h = 0 if SPLIT else tl.program_id(1) >> (step_w - 1)
    class_w = 0 if SPLIT else tl.program_id(1) & (step_w - 1)
    columns = tl.cdiv(GROUPS_PER_TILE * CG, BLOCK_J)
    down = tl.cdiv((H + step_h - 1) >> (step_h - 1), BOX.H)
    boxes = tl.cdiv(N, BOX.N) * down * tl.cdiv((W + step_w - 1) >> (step_w - 1), BOX.W)
    if SUMS is not None:
        behind = tl.program_id(0) - boxes * columns * tl.cdiv(groups, GROUPS_PER_TILE)
        if behind >= 0:
            add_appended(sums, behind * tl.num_programs(1) + tl.program_id(1), SUMS)
            return
    index, column = tile_of(tl.program_id(0), boxes, columns * tl.cdiv(groups, GROUPS_PER_TILE), CONFIG.GROUP)
    tile = column // columns
    col = column % columns * BLOCK_J
    groups_here = tl.minimum(GROUPS_PER_TILE, groups - tile * GROUPS_PER_TILE)
    if SPLIT:
        dx = part_of_output(dx, N, tl.program_id(1), VEC)
    dx = from_channel(Batch(*dx, N, H, W, groups_here * CX), tile * (GROUPS_PER_TILE * CX), CONFIG)
    P, Q = output_size(H, W, step_h, step_w, CONFIG)
    rows, first_h = rows_of_class(H, CONFIG.PAD_H, class_h, step_h)
    cols, first_w = rows_of_class(W, CONFIG.PAD_W, class_w, step_w)
    box = box_at(index, rows, cols, BOX)
    of_tile = Groups(tile, groups_here, OG, CG, col)
    image = Batch(dz, *strides, N, P, Q, OG)
    pixel_map = PixelMap(1, 1, first_h, first_w)
    taps = Taps(class_h, class_w, step_h, step_w)
    total = convolve(image, w, memory, box, pixel_map, taps, of_tile, tl.program_id(1), True, CONFIG)
    n, i, j = pixels_of(box, BOX)
    h = row_of_class(i, first_h, CONFIG.PAD_H, class_h, step_h)
    v = j  # step_w is 1; the compiler sees columns side by side
    if CONFIG.CHANNELS_LAST or VEC == 1:
        v = row_of_class(j, first_w, CONFIG.PAD_W, class_w, step_w)
    store_box(dx, total, Pixels(n, h, v), col, BLOCK_J, CONFIG)


@triton.jit(do_not_specialize=[*SIZES, "boxes_per_split"])
def wgrad(
    dz, z_strides, x, strides, dw, db, N, H, W, groups, OG, CG, step_h, step_w, boxes_per_split, CONFIG: tl.constexpr
):
    """dw[split] = Σ dzᵀ·x[tap] over the boxes of split = program_id(1): a tap or (TAPS = 3) a row of taps a program.

    dw: (splits, O, 9, C / groups), or (splits, O, C / groups, 9) with TAPS_LAST. db: (splits, O) or None, the sums of
    dz, which the programs of the first tap and the first input channels write. Where rows of dz or x were padded, their
    zeros up to a multiple of VEC_O or VEC_C are read.

    A descriptor's box is a line, of images or of columns: dz is the first operand (`convolve`). X_FIRST: x is, where
    products take operands from registers. Compiled: with several products in a loop, each warp has rows of its own and
    all columns, so the first operand is read from shared memory once and the second by every warp, and x is 3 tiles.

    Of 16 bits db is the product of dz with ones, exact in every term. Compiled: a sum would read the shared memory that
    wgmma reads, and Triton 3.7 refills it too early (https://github.com/triton-lang/triton/issues/6691); before Hopper
    it would take three times the shared memory's time. It comes first, for the last product in a loop decides how the
    warps share them all. All programs form db: a branch in the loop makes every wgmma wait.
    """
    await_previous()
    BOX: tl.constexpr = CONFIG.BOX
    BLOCK_O: tl.constexpr = CONFIG.BLOCK_O
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    TAPS: tl.constexpr = CONFIG.TAPS
    GROUPS_PER_TILE: tl.constexpr = CONFIG.GROUPS_PER_TILE
    TMA: tl.constexpr = CONFIG.TMA
    X_FIRST: tl.constexpr = CONFIG.X_FIRST
    PRECISION: tl.constexpr = CONFIG.PRECISION
    PIXELS: tl.constexpr = BOX.N * BOX.H * BOX.W
    DTYPE: tl.constexpr = element_type(dz.dtype)
    ACC: tl.constexpr = accumulator(dz.dtype)
    BY_PRODUCT: tl.constexpr = DTYPE.primitive_bitwidth == 16
    O_FIRST: tl.constexpr = not (TMA or X_FIRST)  # z_tile is loaded as (BLOCK_O, PIXELS)
    tl.static_assert(not TMA or BOX.N == PIXELS or BOX.W == PIXELS, "the box of a descriptor must be a line")
    columns_o = tl.cdiv(GROUPS_PER_TILE * OG, BLOCK_O)
    columns_c = tl.cdiv(GROUPS_PER_TILE * CG, BLOCK_C)
    taps = tl.program_id(0) % (9 // TAPS)
    tile = tl.program_id(0) // (9 // TAPS)
    col_c = tile % columns_c * BLOCK_C
    col_o = tile // columns_c % columns_o * BLOCK_O
    group_tile = tile // columns_c // columns_o
    groups_here = tl.minimum(GROUPS_PER_TILE, groups - group_tile * GROUPS_PER_TILE)
    r = taps if TAPS == 3 else taps // 3
    s = 0 if TAPS == 3 else taps % 3
    split = tl.program_id(1)
    P, Q = output_size(H, W, step_h, step_w, CONFIG)
    boxes = tl.cdiv(N, BOX.N) * tl.cdiv(P, BOX.H) * tl.cdiv(Q, BOX.W)
    origin_o = group_tile * (GROUPS_PER_TILE * OG // CONFIG.VEC_O * CONFIG.VEC_O)
    origin_c = group_tile * (GROUPS_PER_TILE * CG // CONFIG.VEC_C * CONFIG.VEC_C)
    start_o = origin_o if TMA else 0  # as in `convolve`
    start_c = origin_c if TMA else 0
    dz = dz if TMA else dz + origin_o
    x = x if TMA else x + origin_c
    end_o = start_o + tl.cdiv(groups_here * OG, CONFIG.VEC_O) * CONFIG.VEC_O
    end_c = start_c + tl.cdiv(groups_here * CG, CONFIG.VEC_C) * CONFIG.VEC_C
    image = Batch(x, *strides, N, H, W, end_c)
    dz = Batch(dz, *z_strides, N, P, Q, end_o)
    acc = zeros(TAPS, BLOCK_C if X_FIRST else BLOCK_O, BLOCK_O if X_FIRST else BLOCK_C, ACC)
    ones = round_to(tl.full((16, PIXELS) if X_FIRST else (PIXELS, 16), 1.0, ACC), DTYPE)
    if BY_PRODUCT:
        sums = tl.zeros((16, BLOCK_O) if X_FIRST else (BLOCK_O, 16), ACC)
    else:
        sums = tl.zeros((PIXELS, BLOCK_O), ACC)
    index = split * boxes_per_split
    box = box_at(index, P, Q, BOX)
    for _turn in range(index, tl.minimum(index + boxes_per_split, boxes)):
        z_tile = load_box(dz, box, PixelMap(1, 1, 0, 0), start_o + col_o, BOX, BLOCK_O, CONFIG.VEC_O, O_FIRST)
        if db is not None:
            if BY_PRODUCT and X_FIRST:
                sums = dot(ones, z_tile, sums, PRECISION)
            elif BY_PRODUCT:
                sums = dot(z_tile if O_FIRST else tl.trans(z_tile), ones, sums, PRECISION)
            else:
                sums += tl.trans(z_tile) if O_FIRST else z_tile
        added = ()
        for t in tl.static_range(TAPS):
            # Where dz does not exist its zero must meet a zero: an infinity of x would make it NaN.
            met = PixelMap(step_h, step_w, r - CONFIG.PAD_H, s + t - CONFIG.PAD_W)
            x_tile = load_box(image, box, met, start_c + col_c, BOX, BLOCK_C, CONFIG.VEC_C, X_FIRST, WITHIN=(P, Q))
            a, b = (x_tile, z_tile) if X_FIRST else (z_tile if O_FIRST else tl.trans(z_tile), x_tile)
            added = added + (dot(a, b, acc[t], PRECISION),)
        acc = added
        box = next_box(box, P, Q, BOX)
    first = group_tile * GROUPS_PER_TILE * OG
    o, o_inside = masked_range(col_o, groups_here * OG, BLOCK_O, 1)
    c, c_inside = masked_range(col_c, groups_here * CG, BLOCK_C, CONFIG.VEC_STORE)
    if db is not None:
        # The product has 16 equal rows or columns.
        total = tl.max(sums, 0 if X_FIRST else 1) if BY_PRODUCT else tl.sum(sums, 0)
        at = db + (split.to(tl.int64) * groups * OG + first + o)
        tl.store(at, round_to(total, db.dtype.element_ty), mask=o_inside & (taps == 0) & (col_c == 0))
    inside = o_inside[:, None] & c_inside[None, :]
    if CONFIG.DIAGONAL:
        inside = inside & ((o // OG)[:, None] == (c // CG)[None, :])
        c = c % CG
    pitch = CG // CONFIG.VEC_STORE * CONFIG.VEC_STORE
    dw += split.to(tl.int64) * groups * OG * (9 * pitch)
    at = (first + o.to(tl.int32)) * (9 * pitch)  # of one weight, which has less than 2³¹ elements: registers are scarce
    c = c.to(tl.int32) * (9 if CONFIG.TAPS_LAST else 1)
    step = 1 if CONFIG.TAPS_LAST else pitch
    to = at[:, None] + c[None, :]  # for all taps: compiled, an offset for each spilled with Triton 3.5 and 3.6
    dw += (r * 3 + s) * step
    for t in tl.static_range(TAPS):
        sum_of_tap = tl.trans(acc[t]) if X_FIRST else acc[t]
        tl.store(dw + t * step + to, round_to(sum_of_tap, dw.dtype.element_ty), mask=inside)
