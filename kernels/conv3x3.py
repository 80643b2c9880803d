"""y = act(x ⋆ w + b), a 3×3 convolution on tensor cores, and its gradients.

    x: (N, H, W, C)    w: (O, 9, C): a row of C for each tap (r, s)    b: (O,)    y, dy, dz: (N, P, Q, O)

    forward    y[n, p, q]  = act(b + Σ_rs x[n, p·SH + r − pad_h, q·SW + s − pad_w]·w[rs]ᵀ)
    dgrad      dx[n, h, v] = Σ_rs dz[n, (h + pad_h − r)/SH, (v + pad_w − s)/SW]·w[rs],    where the divisions are exact
    wgrad      dw[rs]      = Σ_npq dz[n, p, q]ᵀ·x[n, p·SH + r − pad_h, q·SW + s − pad_w],    db = Σ_npq dz[n, p, q]

Each is a matrix product whose rows (of wgrad: whose sum) are pixels. A tile takes a *box* of them, BOX_N images × BOX_H
rows × BOX_W columns, so that a tap is the same box elsewhere: for descriptors an offset, with zeros outside the image
for free; for pointers nine additions to one vector of addresses, and no division by a size.

Groups come in *bundles* of as many as fill a tile's columns. Within a bundle w is a block-diagonal matrix (DIAGONAL),
which forward and dgrad read from memory (`spread_weight`); a bundle of one group is an ordinary product. The files
beside this one hold what is no such product: `conv3x3_few_channels.py` few input channels, `conv3x3_depthwise.py` one
channel a group, `relayout.py` the way from one layout to another.
"""

import triton
import triton.language as tl

from .common import dot, indices, load_tile, round_to, sigmoid, tile_of

# Not specialized: no recompile for a batch of 1, a stride of 2 or pixels of another pitch; what divides them, VEC says.
SIZES = "N H W P Q groups OG CG OZ CX pad_h pad_w step_h step_w".split()
STRIDES = ["stride_n", "stride_h", "stride_w"]


@triton.jit
def box_at(index, rows, cols, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """(image, row, column) of the first pixel of a box, of all those that cover images of rows × cols.

    With a stride of 2 and one row or column, a class of dx's pixels has none: then all that is asked for lies outside.
    """
    across = tl.maximum(tl.cdiv(cols, BOX_W), 1)
    down = tl.maximum(tl.cdiv(rows, BOX_H), 1)
    return index // across // down * BOX_N, index // across % down * BOX_H, index % across * BOX_W


@triton.jit
def pixels(n, i, j, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Image, row and column of each pixel of the box whose first pixel is (n, i, j)."""
    m = tl.arange(0, BOX_N * BOX_H * BOX_W)
    return n + m // (BOX_H * BOX_W), i + m // BOX_W % BOX_H, j + m % BOX_W


@triton.jit
def offsets(n, h, w, N, H, W, stride_n, stride_h, stride_w, VEC: tl.constexpr):
    """Where pixels lie, and which of them exist; the others become 0, as in `common.indices`. VEC divides strides."""
    inside = (n < N) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = n.to(tl.int64) * (stride_n // VEC * VEC)
    at += h.to(tl.int64) * (stride_h // VEC * VEC) + w.to(tl.int64) * (stride_w // VEC * VEC)
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
def tap_at(t, taps_w):
    """Row and column of the t-th tap, of up to three rows of taps_w: t / taps_w, without a division."""
    row = (t >= taps_w).to(tl.int32) + (t >= 2 * taps_w).to(tl.int32)
    return row, t - row * taps_w


@triton.jit
def load_box(
    src, n, i, j, dh, dw, channel, limit, N, H, W, stride_n, stride_h, stride_w, rows, cols,
    step_h, step_w, WITHIN: tl.constexpr, TMA: tl.constexpr, VEC: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """src[n, i·step_h + dh, j·step_w + dw, channel …] for the pixels of a box: (pixels, BLOCK), zeros outside.

    TRANSPOSED, of pointers alone: (BLOCK, pixels). Compiled: where tensor cores take operands from registers, Triton
    does not pipeline a load behind which `tl.trans` stands.

    A descriptor has five dimensions, (N, H / step_h, step_h, W / step_w, step_w · C): every step-th row is a box in it.
    If boxes are of images alone, N stands behind W / step_w: then the reshape drops leading ones alone (`convolve`).
    WITHIN: zeros also for the pixels of the box from `rows` and `cols` on; a descriptor's box must not have any.
    """
    tl.static_assert(not (TMA and TRANSPOSED))
    if TMA:
        at_h = i + (dh >> (step_h - 1))  # step is 1 or 2, and a shift rounds down where a division would round to zero
        at_w = j + (dw >> (step_w - 1))
        at_c = (dw & (step_w - 1)) * (stride_w // VEC * VEC) + channel
        if BOX_H * BOX_W == 1:
            tile = src.load([at_h, dh & (step_h - 1), at_w, n, at_c]).reshape(BOX_N, BLOCK)
        else:
            tile = src.load([n, at_h, dh & (step_h - 1), at_w, at_c]).reshape(BOX_N * BOX_H * BOX_W, BLOCK)
    else:
        m_n, m_i, m_j = pixels(n, i, j, BOX_N, BOX_H, BOX_W)
        at, inside = offsets(
            m_n, m_i * step_h + dh, m_j * step_w + dw, N, H, W, stride_n, stride_h, stride_w, VEC
        )  # fmt: skip
        if WITHIN:
            inside = inside & (m_i < rows) & (m_j < cols)
        c, c_inside = indices(channel, limit, BLOCK, VEC)
        if TRANSPOSED:
            tile = tl.load(src + (at[None, :] + c[:, None]), mask=inside[None, :] & c_inside[:, None], other=0.0)
        else:
            tile = tl.load(src + (at[:, None] + c[None, :]), mask=inside[:, None] & c_inside[None, :], other=0.0)
    return tile


@triton.jit
def positions(
    n, h, w, c, N, H, W, stride_n, stride_c, stride_h, stride_w,
    LAST: tl.constexpr, VEC: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Offsets of pixels × channels, and which of the pixels exist.

    Contiguous are the channels (LAST) or the columns of the image. VEC divides the other strides, and in the second
    case W; RUN pixels then follow each other from a multiple of RUN on, all inside together or all outside.
    """
    if LAST:
        at, inside = offsets(n, h, w, N, H, W, stride_n, stride_h, stride_w, VEC)
        at = at[:, None] + c[None, :]
    else:
        inside = (n < N) & (h >= 0) & (h < H) & (w >= 0) & (w < W // VEC * VEC)
        at = n.to(tl.int64) * (stride_n // VEC * VEC) + h.to(tl.int64) * (stride_h // VEC * VEC) + w
        at = tl.max_contiguous(tl.multiple_of(tl.where(inside, at, 0), RUN), RUN)
        at = at[:, None] + c[None, :] * (stride_c // VEC * VEC)
    return at, inside


@triton.jit
def store_box(
    dst, tile, n, h, w, channel, limit, N, H, W, stride_n, stride_c, stride_h, stride_w,
    LAST: tl.constexpr, VEC: tl.constexpr, BOX_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dst[n, h, w, channel …] for the pixels of a box, rounded to the type of `dst`. VEC as in `positions`."""
    c, c_inside = indices(channel, limit, BLOCK, VEC if LAST else 1)
    at, inside = positions(
        n, h, w, c, N, H, W, stride_n, stride_c, stride_h, stride_w, LAST, VEC, VEC if VEC < BOX_W else BOX_W
    )
    tl.store(dst + at, round_to(tile, dst.dtype.element_ty), mask=inside[:, None] & c_inside[None, :])


@triton.jit
def load_weight(
    w, tap, l, col, first, rows, cols,
    DGRAD: tl.constexpr, TMA: tl.constexpr, VEC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The BLOCK_L × BLOCK_J tile at (l, col) of one tap's weights, for the bundle from output channel `first` on.

    Summed index l and column are input and output channels, or (DGRAD) the other way round; cols and rows: how many of
    each the bundle has.
    """
    if TMA:
        if DGRAD:
            tile = w.load([tap, first + l, col]).reshape(BLOCK_L, BLOCK_J)
        else:
            tile = tl.trans(w.load([tap, first + col, l]).reshape(BLOCK_J, BLOCK_L))
    else:
        pitch = cols // VEC * VEC
        at_tap = w + (first.to(tl.int64) * 9 + tap) * pitch
        if DGRAD:
            tile = load_tile(at_tap, l, col, rows, cols, 9 * pitch, BLOCK_L, BLOCK_J, False, False, VEC)
        else:
            tile = load_tile(at_tap, l, col, cols, rows, 9 * pitch, BLOCK_L, BLOCK_J, False, True, VEC)
    return tile


@triton.jit(do_not_specialize=["OG", "CG"])
def spread_weight(
    w, out, OG, CG, stride_o, stride_c, stride_r, stride_s, BUNDLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (O, 9, BUNDLE·CG) = a block-diagonal matrix for each bundle and tap: w's rows in their groups' columns."""
    o = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    width = BUNDLE * CG
    tap = i // width
    c = i % width - o // OG % BUNDLE * CG
    inside = (i < 9 * width) & (c >= 0) & (c < CG)
    at = tl.where(inside, c * stride_c + tap // 3 * stride_r + tap % 3 * stride_s, 0)
    row = tl.load(w + o.to(tl.int64) * stride_o + at, mask=inside, other=0.0)
    within = i < 9 * width
    tl.store(out + (o.to(tl.int64) * (9 * width) + tl.where(within, i, 0)), row, mask=within)


@triton.jit
def convolve_by_group(
    src, w, n, i, j, first_h, first_w, first, members, col, N, H, W, stride_n, stride_h, stride_w, OG, CG,
    step_h, step_w, tap_h, tap_w, tap_step_h, tap_step_w, taps_h, taps_w,
    DGRAD: tl.constexpr, BUNDLE: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """What `convolve` computes, one column after the other, which meets its own group's channels. Slow, seldom needed.

    Compiled: all columns at once need an address for each element, and spill up to 7,064 bytes.
    """
    SIGN: tl.constexpr = -1 if DGRAD else 1
    n, i, j = pixels(n, i, j, BOX_N, BOX_H, BOX_W)
    if DGRAD:
        LG = OG
        JG = CG
    else:
        LG = CG
        JG = OG
    acc = tl.zeros((BOX_N * BOX_H * BOX_W, BLOCK_J), ACC)
    for column in range(col, tl.minimum(col + BLOCK_J, members * JG)):
        total = tl.zeros((BOX_N * BOX_H * BOX_W,), ACC)
        for t in range(0, taps_h * taps_w):
            t_h, t_w = tap_at(t, taps_w)
            tap = (tap_h + t_h * tap_step_h) * 3 + tap_w + t_w * tap_step_w
            at, inside = offsets(
                n, i * step_h + (first_h + SIGN * t_h), j * step_w + (first_w + SIGN * t_w), N, H, W,
                stride_n, stride_h, stride_w, VEC,
            )  # fmt: skip
            for channel in range(column // JG * LG, (column // JG + 1) * LG):
                value = tl.load(src + (at + channel), mask=inside, other=0.0)
                if DGRAD:
                    at_w = ((first + channel).to(tl.int64) * 9 + tap) * (BUNDLE * CG) + column
                else:
                    at_w = ((first + column).to(tl.int64) * 9 + tap) * (BUNDLE * CG) + channel
                total += value.to(ACC) * tl.load(w + at_w).to(ACC)
        acc = tl.where((col + tl.arange(0, BLOCK_J) == column)[None, :], total[:, None], acc)
    return acc


@triton.jit
def convolve(
    src, w, src_memory, w_memory, n, i, j, first_h, first_w, bundle, members, col, N, H, W,
    stride_n, stride_h, stride_w, OG, CG,
    step_h, step_w, tap_h, tap_w, tap_step_h, tap_step_w, DGRAD: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    DIAGONAL: tl.constexpr, BUNDLE: tl.constexpr, FLAT: tl.constexpr, TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr, VEC_W: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Σ over taps (tap_h + t·tap_step_h, …) and a bundle's channels of src[tap]·w[tap], for a box and BLOCK_J columns.

    src_memory and w_memory: pointers to src and w, if these are descriptors and there are groups to take apart.

    W_TRANSPOSED: w is (C, 9, O), of a single group.

    The t-th row of taps meets the rows i·step_h + first_h ± t of src: + going forward, − in dgrad, which looks back.
    FLAT is one loop over taps and channels, so that loads are pipelined across taps; with 8 warps and pointers such a
    loop was seen to compute wrong results in another project (pytorch #173068). Otherwise the loop over channels stands
    in one over taps; compiled, unrolling that took 3.6 times the code and as many registers.

    With descriptors the product is w[tap]ᵀ·src[tap]ᵀ, and the sum is transposed at the end. Compiled: wgmma reads its
    first operand from shared memory only if no reshape stands behind the load, but one that drops leading ones. A box
    of pixels has another. It would go through registers, which the next turn's loads overwrite while wgmma reads them
    (https://github.com/triton-lang/triton/issues/9433), or ptxas makes each product wait. Not so with tf32x3: it makes
    its operands in registers anyway, and waits; there weights come second, for the second is written back to memory.
    """
    SIGN: tl.constexpr = -1 if DGRAD else 1
    taps_h = ((2 - tap_h) >> (tap_step_h - 1)) + 1
    taps_w = ((2 - tap_w) >> (tap_step_w - 1)) + 1
    if DGRAD:
        LG = OG
    else:
        LG = CG
    length = members * LG
    origin = bundle * (BUNDLE * LG // VEC * VEC)  # the bundle's first channel in src
    first = bundle * BUNDLE * OG
    start = 0
    if TMA:
        start = origin
    else:
        src += origin
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    WEIGHTS_FIRST: tl.constexpr = TMA and PRECISION != "tf32x3"
    acc = tl.zeros((BLOCK_J, PIXELS) if WEIGHTS_FIRST else (PIXELS, BLOCK_J), ACC)
    steps = tl.cdiv(length, BLOCK_L)
    taps = taps_h * taps_w
    t = 0
    for outer in range(0, 1 if FLAT else taps):
        if not FLAT:
            t = outer
        l = 0
        for _ in range(0, tl.maximum(taps * steps if FLAT else steps, 1)):  # one turn at least: `common.product`
            t_h, t_w = tap_at(t, taps_w)
            tap = (tap_h + t_h * tap_step_h) * 3 + tap_w + t_w * tap_step_w
            a = load_box(
                src, n, i, j, first_h + SIGN * t_h, first_w + SIGN * t_w, start + l, start + length, N, H, W,
                stride_n, stride_h, stride_w, 0, 0, step_h, step_w, False, TMA, VEC, BOX_N, BOX_H, BOX_W, BLOCK_L,
            )  # fmt: skip
            if W_TRANSPOSED:
                b = load_weight(w, tap, l, col, first, CG, OG, not DGRAD, TMA, VEC_W, BLOCK_L, BLOCK_J)
            else:
                b = load_weight(w, tap, l, col, first, members * OG, BUNDLE * CG, DGRAD, TMA, VEC_W, BLOCK_L, BLOCK_J)
            if WEIGHTS_FIRST:
                acc = dot(tl.trans(b), tl.trans(a), acc, PRECISION)
            else:
                acc = dot(a, b, acc, PRECISION)
            l += BLOCK_L
            if FLAT:
                t += (l >= length).to(tl.int32)
                l = tl.where(l >= length, 0, l)
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    if DIAGONAL:
        # A zero between two groups times an infinity of one is NaN in the other: where there is one, go without zeros.
        # (One sum over both axes: with a reduction along either, Triton 3.7 does not compile for sm_100.)
        if tl.sum((acc != acc).to(tl.int32)) > 0:
            acc = convolve_by_group(
                src_memory + origin, w_memory, n, i, j, first_h, first_w, first, members, col, N, H, W,
                stride_n, stride_h, stride_w, OG, CG,
                step_h, step_w, tap_h, tap_w, tap_step_h, tap_step_w, taps_h, taps_w,
                DGRAD, BUNDLE, ACC, VEC, BOX_N, BOX_H, BOX_W, BLOCK_J,
            )  # fmt: skip
    return acc


@triton.jit
def convolve_rows(
    src, w, n, i, j, first_h, first_w, bundle, col, OG, CG,
    DGRAD: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BOX_N: tl.constexpr, BOX_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """What `convolve` computes with descriptors, a stride of 1 and bundles of one group, for ROWS boxes of one row
    each, the one below the other: a tuple of their tiles.

    A turn takes the taps of one column. Each of ROWS + 2 rows of src, read once, meets up to three of them: with two
    rows, src is read six times, not nine.
    """
    PIXELS: tl.constexpr = BOX_N * BOX_W
    if DGRAD:
        length = OG
        first_h -= 2  # the row above: looking back, it meets the last tap
    else:
        length = CG
    steps = tl.cdiv(length, BLOCK_L)
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros((BLOCK_J, PIXELS), ACC),)
    for turn in range(0, tl.maximum(3 * steps, 1)):
        t_w = turn // steps
        l = turn % steps * BLOCK_L
        weights = ()
        for t_h in tl.static_range(3):
            tap = (2 - t_h if DGRAD else t_h) * 3 + t_w
            b = load_weight(w, tap, l, col, bundle * OG, OG, CG, DGRAD, True, 1, BLOCK_L, BLOCK_J)
            weights = weights + (tl.trans(b),)
        at_w = first_w - t_w if DGRAD else first_w + t_w
        for q in tl.static_range(ROWS + 2):
            a = load_box(
                src, n, i, j, first_h + q, at_w, bundle * length + l, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1,
                False, True, 1, BOX_N, 1, BOX_W, BLOCK_L,
            )  # fmt: skip
            added = ()
            for row in tl.static_range(ROWS):
                if row <= q and q < row + 3:
                    added = added + (dot(weights[q - row], tl.trans(a), acc[row], PRECISION),)
                else:
                    added = added + (acc[row],)
            acc = added
    tiles = ()
    for row in tl.static_range(ROWS):
        tiles = tiles + (tl.trans(acc[row]),)
    return tiles


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *(f"y_{stride}" for stride in STRIDES), "y_stride_c"])
def forward(
    x, w, x_memory, w_memory, b, y, N, H, W, P, Q, groups, OG, CG, pad_h, pad_w, step_h, step_w,
    stride_n, stride_h, stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr, ACCURATE: tl.constexpr, PTX: tl.constexpr,
    DIAGONAL: tl.constexpr, BUNDLE: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr, VEC_W: tl.constexpr,
    LAST: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """y = act(x ⋆ w + b): a box of y's pixels and BLOCK_J of a bundle's output channels a program.

    Or ROWS boxes of one row each (`convolve_rows`).
    """
    columns = tl.cdiv(BUNDLE * OG, BLOCK_J)
    boxes = tl.cdiv(N, BOX_N) * tl.cdiv(P, BOX_H * ROWS) * tl.cdiv(Q, BOX_W)
    box, column = tile_of(tl.program_id(0), boxes, columns * tl.cdiv(groups, BUNDLE), GROUP)
    n, i, j = box_at(box, P, Q, BOX_N, BOX_H * ROWS, BOX_W)
    bundle = column // columns
    col = column % columns * BLOCK_J
    members = tl.minimum(BUNDLE, groups - bundle * BUNDLE)
    if ROWS > 1:
        tiles = convolve_rows(
            x, w, n, i, j, -pad_h, -pad_w, bundle, col, OG, CG,
            False, ROWS, ACC, PRECISION, BOX_N, BOX_W, BLOCK_J, BLOCK_L,
        )  # fmt: skip
    else:
        tiles = (
            convolve(
                x, w, x_memory, w_memory, n, i, j, -pad_h, -pad_w, bundle, members, col, N, H, W,
                stride_n, stride_h, stride_w, OG, CG, step_h, step_w, 0, 0, 1, 1, False, False,
                DIAGONAL, BUNDLE, FLAT, TMA, ACC, PRECISION, VEC, VEC_W, BOX_N, BOX_H, BOX_W, BLOCK_J, BLOCK_L,
            ),
        )  # fmt: skip
    first = bundle * (BUNDLE * OG)
    if LAST:
        y += first // VEC_STORE * VEC_STORE
    else:
        y += first.to(tl.int64) * (y_stride_c // VEC_STORE * VEC_STORE)
    for row in tl.static_range(ROWS):
        z = tiles[row]
        if HAS_BIAS:
            o, inside = indices(col, members * OG, BLOCK_J, 1)
            z += tl.load(b + first + o, mask=inside, other=0.0).to(ACC)[None, :]
        if SIGMOID:
            z = sigmoid(z, ACCURATE, PTX)
        m_n, m_i, m_j = pixels(n, i + row, j, BOX_N, BOX_H, BOX_W)
        store_box(
            y, z, m_n, m_i, m_j, col, members * OG, N, P, Q, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
            LAST, VEC_STORE, BOX_W, BLOCK_J,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *(f"x_{stride}" for stride in STRIDES), "x_stride_c"])
def dgrad(
    dz, w, dz_memory, w_memory, dx, N, H, W, P, Q, groups, OG, CG, CX, pad_h, pad_w, step_h, step_w,
    stride_n, stride_h, stride_w, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    W_TRANSPOSED: tl.constexpr, DIAGONAL: tl.constexpr, BUNDLE: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr, VEC_W: tl.constexpr,
    LAST: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dx from dz: a box of dx's pixels and BLOCK_J of a bundle's input channels, of CX a group, a program.

    W_TRANSPOSED: w is (C, 9, O), of a single group; its rows then lie along the sum.

    With a stride of 2 the rows of dx fall into two classes, program_id(1): those that meet the taps 0 and 2, and those
    that meet tap 1; the columns likewise. Each class is a convolution of its own with the taps that it meets.
    """
    class_h = tl.program_id(1) >> (step_w - 1)
    class_w = tl.program_id(1) & (step_w - 1)
    columns = tl.cdiv(BUNDLE * CG, BLOCK_J)
    tl.static_assert(ROWS == 1 or BOX_H == 1)  # and step_h and step_w are 1
    down = tl.cdiv((H + step_h - 1) >> (step_h - 1), BOX_H * ROWS)
    boxes = tl.cdiv(N, BOX_N) * down * tl.cdiv((W + step_w - 1) >> (step_w - 1), BOX_W)
    box, column = tile_of(tl.program_id(0), boxes, columns * tl.cdiv(groups, BUNDLE), GROUP)
    bundle = column // columns
    col = column % columns * BLOCK_J
    members = tl.minimum(BUNDLE, groups - bundle * BUNDLE)
    first = bundle * (BUNDLE * CX)
    if LAST:
        dx += first // VEC_STORE * VEC_STORE
    else:
        dx += first.to(tl.int64) * (x_stride_c // VEC_STORE * VEC_STORE)
    rows, first_h = rows_of_class(H, pad_h, class_h, step_h)
    cols, first_w = rows_of_class(W, pad_w, class_w, step_w)
    n, i, j = box_at(box, rows, cols, BOX_N, BOX_H * ROWS, BOX_W)
    if ROWS > 1:
        tiles = convolve_rows(
            dz, w, n, i, j, first_h, first_w, bundle, col, OG, CG,
            True, ROWS, ACC, PRECISION, BOX_N, BOX_W, BLOCK_J, BLOCK_L,
        )  # fmt: skip
    else:
        tiles = (
            convolve(
                dz, w, dz_memory, w_memory, n, i, j, first_h, first_w, bundle, members, col, N, P, Q,
                stride_n, stride_h, stride_w, OG, CG, 1, 1, class_h, class_w, step_h, step_w, True, W_TRANSPOSED,
                DIAGONAL, BUNDLE, FLAT, TMA, ACC, PRECISION, VEC, VEC_W, BOX_N, BOX_H, BOX_W, BLOCK_J, BLOCK_L,
            ),
        )  # fmt: skip
    for row in tl.static_range(ROWS):
        m_n, m_i, m_j = pixels(n, i + row, j, BOX_N, BOX_H, BOX_W)
        h = row_of_class(m_i, first_h, pad_h, class_h, step_h)
        if LAST or VEC_STORE == 1:
            v = row_of_class(m_j, first_w, pad_w, class_w, step_w)
        else:
            v = m_j  # step_w is 1; the compiler sees columns side by side
        store_box(
            dx, tiles[row], m_n, h, v, col, members * CX, N, H, W, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
            LAST, VEC_STORE, BOX_W, BLOCK_J,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *(f"z_{stride}" for stride in STRIDES), "boxes_per_split"])
def wgrad(
    dz, x, dw, db, N, H, W, P, Q, groups, OG, CG, OZ, CX, pad_h, pad_w, step_h, step_w,
    z_stride_n, z_stride_h, z_stride_w, stride_n, stride_h, stride_w, boxes_per_split,
    WRITE_DB: tl.constexpr, TAPS: tl.constexpr,
    DIAGONAL: tl.constexpr, BUNDLE: tl.constexpr, TMA: tl.constexpr, X_FIRST: tl.constexpr, TAPS_LAST: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, VEC_O: tl.constexpr, VEC_C: tl.constexpr, VEC_STORE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw[split] = Σ dzᵀ·x[tap] over the boxes of split = program_id(1): a tap or (TAPS = 3) a row of taps a program.

    dw: (splits, O, 9, C / groups), or (splits, O, C / groups, 9) with TAPS_LAST. db: (splits, O), the sums of dz, which
    the programs of the first tap and the first input channels write. A group of dz has OZ channels and one of x CX: OG
    and CG or, where rows were padded, more.

    A descriptor's box is a line, of images or of columns: dz is the first operand (`convolve`). X_FIRST: x is, where
    products take operands from registers. Compiled: with several products in a loop, each warp has rows of its own and
    all columns, so the first operand is read from shared memory once and the second by every warp, and x is 3 tiles.

    Of 16 bits db is the product of dz with ones, exact in every term. Compiled: a sum would read the shared memory that
    wgmma reads, and Triton 3.7 refills it too early (https://github.com/triton-lang/triton/issues/6691); before Hopper
    it would take three times the shared memory's time. It comes first, for the last product in a loop decides how the
    warps share them all. All programs form db: a branch in the loop makes every wgmma wait.
    """
    columns_o = tl.cdiv(BUNDLE * OG, BLOCK_O)
    columns_c = tl.cdiv(BUNDLE * CG, BLOCK_C)
    taps = tl.program_id(0) % (9 // TAPS)
    tile = tl.program_id(0) // (9 // TAPS)
    col_c = tile % columns_c * BLOCK_C
    col_o = tile // columns_c % columns_o * BLOCK_O
    bundle = tile // columns_c // columns_o
    members = tl.minimum(BUNDLE, groups - bundle * BUNDLE)
    if TAPS == 3:
        r = taps
        s = 0
    else:
        r = taps // 3
        s = taps % 3
    split = tl.program_id(1)
    boxes = tl.cdiv(N, BOX_N) * tl.cdiv(P, BOX_H) * tl.cdiv(Q, BOX_W)
    length_o = members * OZ
    length_c = members * CX
    origin_o = bundle * (BUNDLE * OZ // VEC_O * VEC_O)
    origin_c = bundle * (BUNDLE * CX // VEC_C * VEC_C)
    start_o = col_o
    start_c = col_c
    if TMA:
        start_o += origin_o
        start_c += origin_c
        length_o += origin_o
        length_c += origin_c
    else:
        dz += origin_o
        x += origin_c
    acc = ()
    for _ in tl.static_range(TAPS):
        acc = acc + (tl.zeros((BLOCK_C, BLOCK_O) if X_FIRST else (BLOCK_O, BLOCK_C), ACC),)
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    tl.static_assert(not TMA or BOX_N == PIXELS or BOX_W == PIXELS, "the box of a descriptor must be a line")
    DTYPE: tl.constexpr = dz.dtype if TMA else dz.dtype.element_ty
    BY_PRODUCT: tl.constexpr = DTYPE.primitive_bitwidth == 16
    O_FIRST: tl.constexpr = not (TMA or X_FIRST)  # z_tile is loaded as (BLOCK_O, PIXELS)
    ones = round_to(tl.full((16, PIXELS) if X_FIRST else (PIXELS, 16), 1.0, ACC), DTYPE)
    if BY_PRODUCT:
        sums = tl.zeros((16, BLOCK_O) if X_FIRST else (BLOCK_O, 16), ACC)
    else:
        sums = tl.zeros((PIXELS, BLOCK_O), ACC)
    for box in range(split * boxes_per_split, tl.minimum((split + 1) * boxes_per_split, boxes)):
        n, i, j = box_at(box, P, Q, BOX_N, BOX_H, BOX_W)
        z_tile = load_box(
            dz, n, i, j, 0, 0, start_o, length_o, N, P, Q, z_stride_n, z_stride_h, z_stride_w,
            0, 0, 1, 1, False, TMA, VEC_O, BOX_N, BOX_H, BOX_W, BLOCK_O, O_FIRST,
        )  # fmt: skip
        if WRITE_DB:
            if BY_PRODUCT and X_FIRST:
                sums = dot(ones, z_tile, sums, PRECISION)
            elif BY_PRODUCT:
                sums = dot(z_tile if O_FIRST else tl.trans(z_tile), ones, sums, PRECISION)
            else:
                sums += tl.trans(z_tile) if O_FIRST else z_tile
        added = ()
        for t in tl.static_range(TAPS):
            # Where dz does not exist its zero must meet a zero: an infinity of x would make it NaN.
            x_tile = load_box(
                x, n, i, j, r - pad_h, s + t - pad_w, start_c, length_c, N, H, W, stride_n, stride_h, stride_w, P, Q,
                step_h, step_w, True, TMA, VEC_C, BOX_N, BOX_H, BOX_W, BLOCK_C, X_FIRST,
            )  # fmt: skip
            if X_FIRST:
                added = added + (dot(x_tile, z_tile, acc[t], PRECISION),)
            else:
                added = added + (dot(z_tile if O_FIRST else tl.trans(z_tile), x_tile, acc[t], PRECISION),)
        acc = added
    first = bundle * BUNDLE * OG
    o, o_inside = indices(col_o, members * OG, BLOCK_O, 1)
    c, c_inside = indices(col_c, members * CG, BLOCK_C, VEC_STORE)
    if WRITE_DB:
        # The product has 16 equal rows or columns.
        total = tl.max(sums, 0 if X_FIRST else 1) if BY_PRODUCT else tl.sum(sums, 0)
        at = db + (split.to(tl.int64) * groups * OG + first + o)
        tl.store(at, round_to(total, db.dtype.element_ty), mask=o_inside & (taps == 0) & (col_c == 0))
    inside = o_inside[:, None] & c_inside[None, :]
    if DIAGONAL:
        inside = inside & ((o // OG)[:, None] == (c // CG)[None, :])
        c = c % CG
    pitch = CG // VEC_STORE * VEC_STORE
    dw += split.to(tl.int64) * groups * OG * (9 * pitch)
    at = (first + o.to(tl.int32)) * (9 * pitch)  # of one weight, which has less than 2³¹ elements: registers are scarce
    c = c.to(tl.int32)
    if TAPS_LAST:
        step = 1
        c *= 9
    else:
        step = pitch
    to = at[:, None] + c[None, :]  # for all taps: compiled, an offset for each spilled with Triton 3.5 and 3.6
    dw += (r * 3 + s) * step
    for t in tl.static_range(TAPS):
        sum_of_tap = tl.trans(acc[t]) if X_FIRST else acc[t]
        tl.store(dw + t * step + to, round_to(sum_of_tap, dw.dtype.element_ty), mask=inside)
