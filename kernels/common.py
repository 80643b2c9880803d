"""Device helpers that every kernel shares: rounding, tile order, tiles in and out, and the product loop.

Conventions, here and in the other kernel files: lower-case names are run-time values. UPPER-CASE names are sizes, or
`constexpr` where a signature says so. A tensor is named as in the mathematics (`x`, `w`, `dy`) whether it arrives as a
pointer or as a tensor descriptor (TMA).

A layer's kernel has one `constexpr`, CONFIG: a NamedTuple of plain values that holds all that is fixed when it is
compiled, besides the types of its arguments and which of them are None. Values that belong together are a namedtuple
(`Matrix`), as arguments too: a tensor and its strides. But not sizes, for in a tuple Triton specializes 1 and multiples
of 16, whatever `do_not_specialize` says (`from_tuple`); nor tensor descriptors, which Triton before 3.9 does not launch
there. Fields of CONFIG have a local name where they are read often, stand in a shape or (Triton 3.5) are strings or
tuples themselves.

Fields of a CONFIG, where several kernels have them; one that a kernel has no use for is None:

    BLOCK_*     sides of a tile; powers of 2
    VEC, VEC_*  elements that divide the strides, the contiguous length and the address of what is read or written
    TMA         operands are tensor descriptors; TMA_STORE: the result is one. So do their types say, and whoever loads
                or stores a tile asks these
    PRECISION   how float32 operands reach the tensor cores (`dot`)
    GROUP       tile rows that programs take at a time (`tile_of`)
    PREFETCH    the next tiles' loads are kept in flight by hand (`product`)
    SUMS        of what the programs behind the result's add up (`add_appended`), or None
    STAGES      `num_stages`, for a loop that the compiler would not pipeline by itself
    ACT         the activation, as in `activations`
    FUSE_DZ     dz = dy·act′ is formed on load, from dy, which the argument `dz` holds, and y
    PTX         the target takes PTX; AMD's do not
"""

from collections import namedtuple
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

# Triton's interpreter is not the compiler with another back end: it has no inline assembly, computes bfloat16 on the
# raw bits and truncates where a GPU rounds. The few helpers that must know read this; `@triton.jit` reads that knob.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# A matrix of rows × cols that one tensor holds, with `ld` elements from line to line. Lines are rows, or columns where
# `load_tile` is told that it lies transposed. A tensor descriptor knows the rest.
Matrix = namedtuple("Matrix", "data rows cols ld")
# `out`, the sum of `parts` partial results, each of which consists of `matrices` of rows × cols.
Sum = namedtuple("Sum", "partials out parts matrices rows cols")


class Reduce(NamedTuple):
    """What is fixed when `reduce_partials` is compiled."""

    BLOCK: int  # elements of a result, a program
    BLOCK_PARTS: int  # partial results that are read at once
    BLOCK_ROWS: int  # a power of 2 that holds the rows of a matrix to transpose; 1: nothing is transposed
    VEC: int  # divides cols
    BLOCK2: int  # of the second sum, which nothing transposes
    BLOCK_PARTS2: int
    VEC2: int  # divides length2


@triton.constexpr_function
def element_type(dtype):
    """Of what a pointer or a tensor descriptor of this `dtype` leads to."""
    return dtype.element_ty if dtype.is_ptr() else dtype


@triton.constexpr_function
def accumulator(dtype):
    """The type that sums of elements are formed in. dtype: as of `element_type`."""
    element = dtype.element_ty if dtype.is_ptr() else dtype
    return tl.float64 if element == tl.float64 else tl.float32


@triton.jit
def from_tuple(n):
    """The number that a tuple holds as 2n + 3: it specializes 1 and multiples of 16, which that never is."""
    return (n >> 1) - 1


@tl.core.extern
def wait_if_early(_semantic: Any = None) -> None:
    """`await_previous`, compiled."""
    if getattr(_semantic.builder.options, "launch_pdl", False):  # an option of CUDA's alone
        gdc_wait(_semantic=_semantic)


@triton.jit
def await_previous():
    """Wait until the launch before is done: a kernel's first statement.

    A launch of a kernel that has it may begin while the one before ends (`tribp.launch.launches.Launch.early`): its
    programs are there when they may read. Measured on an H200: 0.9 µs less for each of a row of small launches.
    """
    if not INTERPRETED:
        wait_if_early()


@triton.jit
def ptx(INSTRUCTION: tl.constexpr, REGISTERS: tl.constexpr, x):
    """One instruction from float32 to float32, of each element."""
    return tl.inline_asm_elementwise(INSTRUCTION, REGISTERS, [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1/x. With PTX of float32 within 1 unit in the last place, and subnormal numbers count as 0."""
    return 1.0 / x if INTERPRETED or not PTX or x.dtype != tl.float32 else ptx("rcp.approx.ftz.f32 $0, $1;", "=f,f", x)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """`x` as DTYPE, rounded to nearest even, also where the interpreter would truncate."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DTYPE)
    return rounded


@triton.jit
def round_to_tf32(x):
    """float32 `x` with 10 bits of mantissa, rounded to nearest, ties away from zero; infinities and NaN stay.

    As torch's libraries round, what exceeds the largest such number by half a unit or more becomes an infinity.
    """
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000  # a carry would make -0 of a NaN whose bits are all set
        rounded = tl.where(finite, (bits + 0x1000) & 0xFFFFE000, bits).to(tl.float32, bitcast=True)
    else:
        rounded = ptx("cvt.rna.tf32.f32 $0, $1;", "=r,r", x)
    return rounded


@triton.jit
def round_operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What a kernel computed, as an operand of a product in DTYPE, whoever rounds the other operand."""
    x = round_to(x, DTYPE)
    if PRECISION == "tf32_rounded":
        x = round_to_tf32(x)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b, in the type of `acc`. PRECISION says how float32 operands reach the tensor cores.

    Those ignore the low 13 bits of an operand that they take as TF32. Cut, results on positive numbers are 7e-4 too
    small on average; rounded, they are right within 1e-6. "tf32" rounds here; "tf32_rounded" says that descriptors
    rounded on the way in, which Triton's interpreter does not do. Triton itself rounds the halves of "tf32x3".
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "tf32" or (INTERPRETED and PRECISION == "tf32_rounded"):
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    FORM: tl.constexpr = "tf32" if PRECISION == "tf32_rounded" else PRECISION
    return tl.dot(a, b, acc, input_precision=FORM, out_dtype=acc.dtype)


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DTYPE: tl.constexpr):
    """A tuple of tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLS), DTYPE),)
    return tiles


@triton.jit
def tile_of(tile, tile_rows, tile_cols, GROUP: tl.constexpr):
    """(row, column) of a tile, GROUP tile rows at a time, so that programs that run together share operands in L2."""
    per_group = GROUP * tile_cols
    first_row = (tile // per_group) * GROUP
    group_rows = tl.minimum(tile_rows - first_row, GROUP)
    within = tile % per_group
    return first_row + within % group_rows, within // group_rows


@triton.jit
def transposed(matrix):
    """The `Matrix` whose rows are the columns of another. Its lines stay where they are in memory."""
    return Matrix(matrix.data, matrix.cols, matrix.rows, matrix.ld)


@triton.jit
def masked_range(start, limit, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """start … start + BLOCK − 1 as int64, and which are below `limit`. BLOCK divides `start`, VEC divides `limit`.

    The others become 0 before an address is formed from them: no lane, masked or not, points outside its tensor
    (pytorch #186440 read 16 GiB away). int64, because row · pitch passes 2³¹ long before a row does. Dividing by VEC
    and multiplying again is how the compiler learns that VEC neighbours are inside together, or outside together.
    """
    i = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, BLOCK), BLOCK), BLOCK)
    inside = i < limit // VEC * VEC
    i = tl.max_contiguous(tl.multiple_of(tl.where(inside, i, 0), BLOCK), BLOCK)
    return i.to(tl.int64), inside


@triton.jit
def load_tile(
    matrix, row, col, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, TRANSPOSED: tl.constexpr, VEC: tl.constexpr
):
    """The BLOCK_ROW × BLOCK_COL tile of a matrix at (row, col), zeros outside.

    TRANSPOSED: lines are columns. A tensor descriptor then describes the transpose, for its last dimension must be the
    contiguous one. VEC divides `ld` and the length of the contiguous dimension.
    """
    if not matrix.data.dtype.is_ptr():
        tile = tl.trans(matrix.data.load([col, row])) if TRANSPOSED else matrix.data.load([row, col])
    else:
        pitch = (matrix.ld // VEC).to(tl.int64) * VEC
        r, r_inside = masked_range(row, matrix.rows, BLOCK_ROW, VEC if TRANSPOSED else 1)
        c, c_inside = masked_range(col, matrix.cols, BLOCK_COL, 1 if TRANSPOSED else VEC)
        at = r[:, None] + c[None, :] * pitch if TRANSPOSED else r[:, None] * pitch + c[None, :]
        tile = tl.load(matrix.data + at, mask=r_inside[:, None] & c_inside[None, :], other=0.0)
    return tile


@triton.jit
def tile_addresses(matrix, row, col, first, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr):
    """Of the BLOCK × BLOCK_L tile at (row, col): its first address, offsets from it, elements from column to column.

    In place of rows that do not exist stands the last one, in place of columns before `first` that one. Offsets have 32
    bits, of which no more than BLOCK · ld is needed.
    """
    i = tl.max_contiguous(tl.minimum(tl.arange(0, BLOCK), matrix.rows - 1 - row), BLOCK)
    k = tl.max_contiguous(tl.maximum(tl.arange(0, BLOCK_L), first - col), BLOCK_L)
    ld = matrix.ld
    step = ld.to(tl.int64) if TRANSPOSED else 1
    corner = matrix.data + (row + col * step if TRANSPOSED else row * ld.to(tl.int64) + col)
    offsets = i[:, None] + k[None, :] * ld if TRANSPOSED else i[:, None] * ld + k[None, :]
    return corner, offsets, step


@triton.jit
def store_tile(matrix, tile, row, col, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, VEC: tl.constexpr):
    """Write a tile of a contiguous matrix at (row, col), rounded to the type of the matrix. VEC divides cols."""
    if not matrix.data.dtype.is_ptr():
        matrix.data.store([row, col], round_to(tile, matrix.data.dtype))
    else:
        c, c_inside = masked_range(col, matrix.cols, BLOCK_COL, VEC)
        pitch = matrix.cols // VEC * VEC
        r = tl.arange(0, BLOCK_ROW)
        first = matrix.data + row * pitch.to(tl.int64)
        at = (first + c)[None, :] + (tl.minimum(r, matrix.rows - 1 - row).to(tl.int64) * pitch)[:, None]
        inside = r[:, None] < tl.where(c_inside, matrix.rows - row, 0)[None, :]
        tl.store(at, round_to(tile, matrix.data.dtype.element_ty), mask=inside)


@triton.jit
def product(
    a, b, row, col, first, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Σₗ a[i, l]·b[l, j] over l from `first` to the last column of a, for the tile at (row, col) of the result.

    TRANSPOSED: how a and b lie (`load_tile`).

    The compiler overlaps loads with multiplication (`num_stages`) if an access is at least four bytes wide. Rows of
    16-bit numbers with an odd pitch never are; for them PREFETCH keeps the next tiles' loads in flight by hand. The
    remainder of the sum comes first, in a tile that ends with the sum: of its columns those before `left` are masked.
    Its addresses, moved by l − window columns, serve all other tiles. Those are whole and need no masks, for what is
    read in place of rows that do not exist ends in rows of the result that do not.

    No sum is empty, which the loop's end tells the compiler. Compiled: for a loop of no turn Triton 3.6 sets the result
    to zero on a way past it, which ptxas sees between products and the wait for them, and serializes them (C7515).
    """
    VEC: tl.constexpr = CONFIG.VEC
    PRECISION: tl.constexpr = CONFIG.PRECISION
    acc = tl.zeros((BLOCK_I, BLOCK_J), accumulator(a.data.dtype))
    last = a.cols
    if CONFIG.PREFETCH:
        window = last - BLOCK_L  # where the tile begins that ends with the sum
        a_corner, a_offsets, a_step = tile_addresses(a, row, window, first, A_TRANSPOSED, BLOCK_I, BLOCK_L)
        bt = transposed(b)
        b_corner, b_offsets, b_step = tile_addresses(bt, col, window, first, not B_TRANSPOSED, BLOCK_J, BLOCK_L)
        a_at = a_corner + a_offsets
        b_at = b_corner + tl.trans(b_offsets)  # of offsets: AMD's compiler cannot transpose addresses
        left = last - (last - first) % BLOCK_L
        inside = tl.arange(0, BLOCK_L) >= left - window
        a_next = tl.load(a_at, mask=inside[None, :], other=0.0)
        b_next = tl.load(b_at, mask=inside[:, None], other=0.0)
        for l in range(first, left, BLOCK_L):
            a_tile = a_next
            b_tile = b_next
            a_next = tl.load(a_at + (l - window) * a_step)
            b_next = tl.load(b_at + (l - window) * b_step)
            acc = dot(a_tile, b_tile, acc, PRECISION)
        acc = dot(a_next, b_next, acc, PRECISION)
    else:
        for l in range(first, tl.maximum(last, first + 1), BLOCK_L):
            a_tile = load_tile(a, row, l, BLOCK_I, BLOCK_L, A_TRANSPOSED, VEC)
            b_tile = load_tile(b, l, col, BLOCK_L, BLOCK_J, B_TRANSPOSED, VEC)
            acc = dot(a_tile, b_tile, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["parts", "matrices", "rows", "cols", "parts2", "length2"])
def reduce_partials(partials, out, parts, matrices, rows, cols, partials2, out2, parts2, length2, CONFIG: tl.constexpr):
    """Up to two sums of partial results, each always in the same order: out[i] = Σₛ partials[s, i], and out2 likewise.

    With BLOCK_ROWS a partial result consists of `matrices` of rows × cols, and `out` of the transpose of each.
    """
    await_previous()
    first = Sum(partials, out, parts, matrices, rows, cols)
    add_both(first, Sum(partials2, out2, parts2, 1, 1, length2), tl.program_id(0), CONFIG)


@triton.jit
def add_appended(sums, program, CONFIG: tl.constexpr):
    """What a program of `reduce_partials` does, in a kernel that has its arguments as one tuple, for `from_tuple`."""
    partials, out, parts, matrices, rows, cols, partials2, out2, parts2, length2 = sums
    first = Sum(partials, out, from_tuple(parts), from_tuple(matrices), from_tuple(rows), from_tuple(cols))
    add_both(first, Sum(partials2, out2, from_tuple(parts2), 1, 1, from_tuple(length2)), program, CONFIG)


@triton.jit
def add_both(first, second, program, CONFIG: tl.constexpr):
    """What a program of `reduce_partials` does, and those behind the last one do not. second.partials may be None."""
    programs = first.matrices * tl.cdiv(first.cols, CONFIG.BLOCK // CONFIG.BLOCK_ROWS)
    if program < programs:
        add_up(first, program, CONFIG.BLOCK, CONFIG.BLOCK_PARTS, CONFIG.BLOCK_ROWS, CONFIG.VEC)
    elif second.partials is not None:
        if program - programs < tl.cdiv(second.cols, CONFIG.BLOCK2):
            add_up(second, program - programs, CONFIG.BLOCK2, CONFIG.BLOCK_PARTS2, 1, CONFIG.VEC2)


@triton.jit
def add_up(
    of, program, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """BLOCK elements of a `Sum`: of one matrix all rows, which are at most BLOCK_ROWS, and some columns."""
    partials, out, parts, matrices, rows, cols = of
    COLS: tl.constexpr = BLOCK // BLOCK_ROWS
    k = tl.arange(0, BLOCK)
    matrix = program // tl.cdiv(cols, COLS)
    first_col = program % tl.cdiv(cols, COLS) * COLS
    row, col, inside = k // COLS, first_col + k % COLS, k // COLS < rows
    inside &= col < cols // VEC * VEC
    pitch = (cols // VEC).to(tl.int64) * VEC
    i = tl.where(inside, (matrix * rows + row) * pitch + col, 0)
    i = tl.max_contiguous(tl.multiple_of(i, VEC), VEC)
    total = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for first in range(0, parts, BLOCK_PARTS):
        part, exists = masked_range(first, parts, BLOCK_PARTS, 1)
        at = partials + (part[:, None] * (matrices * rows * pitch) + i[None, :])
        total += tl.sum(tl.load(at, mask=exists[:, None] & inside[None, :], other=0.0), 0)
    if BLOCK_ROWS > 1:
        total = tl.reshape(tl.trans(tl.reshape(total, (BLOCK_ROWS, COLS))), (BLOCK,))
        row, col = k % BLOCK_ROWS, first_col + k // BLOCK_ROWS
        inside = (row < rows) & (col < cols)
        i = tl.where(inside, (matrix * pitch + col) * rows + row, 0)
    tl.store(out + i, round_to(total, out.dtype.element_ty), mask=inside)
