"""How each kernel is launched: tile shapes, warps, stages, splits, and why.

Everything here follows from shapes, types and the GPU, by rules a person can check; nothing is timed at the first call,
and nothing but the standard library is imported. Every setting carries the `reason` it was chosen for, and the reason
begins with what it rests on (`basis`):

- "derived": arithmetic on bytes and operations;
- "compiled": the machine code of all of ARCHS, read for registers, spills and shared memory (`python -m bench static`);
- "measured on sm_90": timed on that GPU (`python -m bench sweep`, or TRIBP_AUTOTUNE=1); on any other one, derived.

No rule has been measured on a GPU yet.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from .. import versions
from .launch_tuning import rule

BASES = ("derived", "compiled", "measured")


@dataclass(frozen=True)
class Arch:
    """What the rules need to know of a GPU."""

    backend: str  # "cuda", "hip" or "interpreter"
    capability: int  # 90 for sm_90, 942 for gfx942
    processors: int  # multiprocessors or compute units
    shared_memory: int  # bytes one program may use
    name: str

    @property
    def has_tma(self) -> bool:
        """Whether descriptors feed tensor cores that read shared memory: Hopper and data-centre Blackwell.

        sm_120 has descriptors too, but multiplies from registers as sm_80 does, with 99 KB of shared memory. Compiled:
        with descriptors it spills and takes 131 KB; with sm_80's settings neither.
        """
        return self.backend == "interpreter" or (self.backend == "cuda" and 90 <= self.capability < 120)

    @property
    def has_wgmma(self) -> bool:
        """Whether tensor cores work beside the program, on tiles in shared memory: Hopper alone."""
        return self.backend == "cuda" and 90 <= self.capability < 100

    def __hash__(self) -> int:
        """Two numbers tell machines apart; to hash all fields would be a third of what an answered question costs."""
        return self.capability << 16 ^ self.processors


# The machines the static checks compile for; on a real one `tribp.runtime.arch_of` reads the numbers off the device.
ARCHS = {
    "sm_80": Arch("cuda", 80, 108, 163 * 1024, "sm_80"),
    "sm_90": Arch("cuda", 90, 132, 227 * 1024, "sm_90"),
    "sm_100": Arch("cuda", 100, 148, 227 * 1024, "sm_100"),
    "gfx942": Arch("hip", 942, 304, 64 * 1024, "gfx942"),
}
INTERPRETER = Arch("interpreter", 0, 4, 1 << 30, "interpreter")
INTERPRETED = "derived: interpreted, a program takes 6 ms whatever its size"

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Settings(Protocol):
    """What all launch settings have."""

    @property
    def reason(self) -> str: ...


def basis(settings: Settings, arch: Arch) -> str:
    """What the settings rest on, on this machine: one of BASES. Raises ValueError if their reason doesn't say."""
    said, colon, _ = settings.reason.partition(": ")
    word, _, where = said.partition(" on ")
    if not colon or word not in BASES or (word == "measured") != bool(where):
        raise ValueError(f"a reason begins with one of {', '.join(BASES)}, measured with where: {settings.reason!r}")
    holds = {"derived": True, "compiled": arch.name in ARCHS, "measured": arch.name in where.split(", ")}
    return word if holds[word] else "derived"


@dataclass(frozen=True)
class Product:
    """Launch settings of a matrix product: a BLOCK_I × BLOCK_J tile a program, BLOCK_L of the summed index a step."""

    block_i: int
    block_j: int
    block_l: int
    num_warps: int
    num_stages: int
    reason: str
    group: int = 8  # tile rows that run together: 8 · 128 rows and as many columns share operands that fit a 50 MB L2
    tma: bool = False
    prefetch: bool = False
    persistent: int = 0  # programs that share all tiles between them; 0: a program a tile
    splits: int = 1  # programs that share the summed index of one tile
    fuse_dz: bool = False  # form dz = dy·y·(1 − y) while loading
    max_registers: int | None = None  # a thread; None: as many as ptxas thinks best for occupancy

    def tiles(self, i: int, j: int) -> int:
        return cdiv(i, self.block_i) * cdiv(j, self.block_j)

    def covered(self, i: int, j: int) -> int:
        """Elements of all tiles, those that lie outside an i × j result too."""
        return self.tiles(i, j) * self.block_i * self.block_j


@dataclass(frozen=True)
class Pass:
    """Launch settings of a pass over a matrix: a program takes `rows` × `block_n` of it, `block_m` rows at a time."""

    block_m: int
    block_n: int
    rows: int
    num_warps: int
    reason: str


@dataclass(frozen=True)
class Sum:
    """Launch settings of `sum_partials`."""

    block_parts: int
    block: int
    num_warps: int
    reason: str


@dataclass(frozen=True)
class Step:
    """Launch settings of a pass over many tensors (`optim.py`): a program takes `chunk_blocks` blocks of one tensor."""

    block: int
    chunk_blocks: int
    num_warps: int
    reason: str
    max_registers: int | None = None

    @property
    def chunk(self) -> int:
        return self.block * self.chunk_blocks


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def fit(block: int, size: int) -> int:
    """The block, halved while half of it still covers `size`; a matrix instruction needs 16."""
    return max(16, min(block, power_of_2(size)))


def precision_of(dtype: str, tf32: bool, arch: Arch) -> str:
    """How a product takes its operands: Triton's `input_precision`.

    float32 at torch's default keeps float32 accuracy: three TF32 products on NVIDIA's tensor cores (`ieee` would
    compile to 2,048 FFMA a 128×128×32 tile and no tensor core), `ieee` where that is on the matrix units anyway
    (gfx942) or where there are none (the interpreter, which yet rounds as TF32 does where that is allowed).
    """
    if dtype != "float32" or arch.backend == "hip":
        return "ieee"
    return "tf32" if tf32 else "tf32x3" if arch.backend == "cuda" else "ieee"


def needs_registers(dtype: str, precision: str, arch: Arch, *, tma: bool, along: bool) -> bool:
    """Whether a product must not go to wgmma, on a GPU that has it, but to mma.sync with operands in registers.

    wgmma reads its second operand from shared memory. What is formed in registers must be stored there, and the
    program then waits for all products before it may store the next tile. Compiled, that is so

    - in tf32x3, which splits operands (shared memory takes three times as long as tensor cores, 4096³ on sm_90);
    - in TF32, if the kernel has to round them, or one does not lie `along` the summed index: wgmma can't turn it.

    By pointers, 16 bits go wrong where Triton leaves out the fence between copy and product.
    """
    if not arch.has_wgmma or dtype == "float64":
        return False
    if dtype == "float32":
        return precision == "tf32x3" or not (tma and along and versions.descriptors_round_to_tf32())
    return not tma and not versions.fences_copies()


def by_mma_sync(settings: Product, precision: str) -> Product:
    """The settings as a product by mma.sync, where wgmma is ruled out: that takes 64 rows and four warps.

    Compiled: with two warps a thread has room for 64 numbers of the result; beside tf32x3's halves for 32, of 32 rows.
    """
    if precision == "tf32x3":
        return replace(settings, block_i=min(settings.block_i, 32), block_j=min(settings.block_j, 128), num_warps=4)
    if settings.block_i < 64:
        return settings
    columns = 64 * 64 // settings.block_i
    return replace(settings, block_j=max(16, min(settings.block_j, columns)), num_warps=2)


def candidates(
    l: int, dtype: str, precision: str, arch: Arch, vec: int, tma: bool, along: bool = True, short: int = 512
) -> list[Product]:
    """The tiles worth considering for a product summed over l, the largest first.

    short: sums up to which a tile's end takes so long that another program on the processor should hide it. By the
    model a sigmoid does, of sums up to 512, and a store alone never (8192×1024×1024: forward 33.0 → 29.8 µs, dgrad
    32.7 → 25.7).
    vec: elements that every row pitch, contiguous length and base address is a multiple of (16 bytes at most).
    tma: whether the operands can have tensor descriptors. along: whether both are contiguous along the summed index.
    """
    tma = tma and arch.has_tma
    odd = vec * ITEMSIZE[dtype] < 4 and not tma
    if arch.backend == "interpreter":
        # Tiles just small enough that the tests' shapes take several.
        return [Product(32, 32, 32, 1, 1, INTERPRETED, tma=tma, prefetch=odd)]
    if odd:
        # Two-byte loads go through registers: 128×64×32 takes 128 of them, 128×128×32 twice as many, 64 deep spills.
        # One stage: the loop is its own pipeline, and a second one on top does not compile for sm_100 in Triton 3.5.
        wide = Product(128, 64, 32, 8, 1, "compiled: odd pitch: two-byte loads, prefetched by hand", prefetch=True)
        if arch.backend == "cuda":
            wide = replace(wide, max_registers=255)  # compiled: ptxas would hold it to 96 on sm_89, and spill 232 bytes
        return [wide, replace(wide, block_i=64, num_warps=4)]
    if arch.backend == "hip":
        depth = {"float64": 16, "float32": 32}.get(dtype, 64)
        wide = Product(128, 128, depth, 8, 2, "derived: MFMA; two stages fill 64 KB of LDS")
        return [wide, replace(wide, block_i=64, block_j=64, num_warps=4)]
    if needs_registers(dtype, precision, arch, tma=tma, along=along):
        depth = 32 if dtype == "float32" else 64
        reason = "compiled: mma.sync: two warps a program, or 32 rows"
        wide = by_mma_sync(Product(64, 128, depth, 2, 4, reason, tma=tma, max_registers=255), precision)
        return [wide, replace(wide, block_i=32, block_j=32, num_warps=4, reason="derived: 32×32: a small result")]
    if dtype in ("float32", "float64"):
        # Compiled: left to itself, ptxas rounds the registers of these down to a step of occupancy and spills 4–20
        # bytes for it; with 255 allowed they take what they need. Before Hopper, whose tensor cores read shared memory,
        # the halves that tf32x3 makes of both operands lie in registers: 128×128 spills there, 128×64 does not.
        if dtype == "float64":
            wide = Product(64, 64, 16, 8, 2, "compiled: float64: DMMA", tma=tma, max_registers=255)
        elif precision == "tf32x3" and not arch.has_tma:
            wide = Product(128, 64, 32, 8, 3, "compiled: tf32x3 from registers: 128×64", tma=tma, max_registers=255)
        else:
            wide = Product(128, 128, 32, 8, 3, f"compiled: {precision}: 128×128", tma=tma, max_registers=255)
        small = replace(wide, block_i=64, block_j=64, num_warps=4, reason=f"derived: {precision}: 64×64 fills the GPU")
        tiny = replace(small, block_i=32, block_j=32, reason=f"derived: {precision}: a small result")
        return [wide, tiny] if dtype == "float64" else [wide, small, tiny]
    # Compiled: before Hopper a 128×256 result beside operands in registers leaves no room for 64 deep tiles.
    depth = 64 if arch.has_tma else 32
    big = Product(128, 256, depth, 8, 4, "derived: 128×256: the most multiplication per byte of operand", tma=tma)
    reason = "derived: 128×128: two programs a processor, one's epilogue behind the other's loop"
    wide = Product(128, 128, 64, 8, 3, reason, tma=tma)
    small = Product(64, 64, 64, 4, 4, "derived: 64×64: larger tiles would leave processors idle", tma=tma)
    if not arch.has_tma and vec * ITEMSIZE[dtype] < 8:
        # Compiled: 4-byte accesses to 64 deep tiles have so many addresses that one spills with Triton 3.9 on sm_80.
        small = replace(small, block_l=32)
    tiles = [wide, small, replace(small, block_i=32, block_j=32, reason="derived: 32×32: a small result")]
    return [big, *tiles] if l > (short if tma else 1024) else tiles


def fitted(settings: Product, i: int, j: int, l: int, dtype: str, arch: Arch) -> Product:
    """The settings, no larger than an i × j result summed over l needs, with the stages that shared memory holds."""
    block_i, block_j, block_l = fit(settings.block_i, i), fit(settings.block_j, j), fit(settings.block_l, l)
    warps = settings.num_warps if block_i * block_j >= 64 * 64 else min(settings.num_warps, 4)
    settings = replace(settings, block_i=block_i, block_j=block_j, block_l=block_l, num_warps=warps)
    return replace(settings, num_stages=stages_that_fit(settings, ITEMSIZE[dtype], arch))


def fills(programs: int, arch: Arch) -> bool:
    """Whether so many programs are enough for the GPU.

    Derived: three quarters of its processors are. The next smaller tile reads its operands about twice as often for a
    third more processors at best. By the model (`python -m bench static --model`), against a program for each of them:
    58 → 39 µs for dw and db of 8192×1024×1024, 52 → 31 for 3×3 on 64×512 images of 7×7, and nothing is slower.
    """
    return 4 * programs >= 3 * arch.processors


def choose_product(
    i: int, j: int, l: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, along: bool,
    short: int = 512,
) -> Product:  # fmt: skip
    """Settings for an i × j result summed over l: the largest tiles that fill the GPU."""
    tiles = candidates(l, dtype, precision, arch, vec, tma, along, short)
    big = tiles[0]
    if big.tma and big.block_j == 256:
        tall = replace(big, block_i=256, block_j=128, reason=big.reason.replace("128×256", "256×128"))
        if tall.covered(i, j) < big.covered(i, j):
            tiles[0] = tall
        if j <= 128:
            tiles = tiles[1:]
    filling = [tile for tile in tiles if fills(tile.tiles(i, j), arch)]
    return fitted((filling or tiles[-1:])[0], i, j, l, dtype, arch)


def stages_that_fit(settings: Product, itemsize: int, arch: Arch, *, extra: int = 0, output: int = 0) -> int:
    """The settings' stages, or as many of them as shared memory holds.

    A stage keeps its two operand tiles and `extra` elements; `output` elements stay beside all stages. Compiled: where
    products take their operands from registers (before Hopper, and AMD), the stage in use is no longer in memory.
    """
    return max(1, min(settings.num_stages, stages_in_memory(settings, itemsize, arch, extra=extra, output=output)))


def stages_in_memory(settings: Product, itemsize: int, arch: Arch, *, extra: int = 0, output: int = 0) -> int:
    """How many stages shared memory holds; arguments as in `stages_that_fit`."""
    stage = ((settings.block_i + settings.block_j) * settings.block_l + extra) * itemsize
    in_memory = (arch.shared_memory - 1024 - output * itemsize) // stage
    return in_memory if arch.has_tma else in_memory + 1


@rule
def choose_forward(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, along: bool = True
) -> Product:
    """y (m × n) = σ(x·wᵀ + b), summed over k; `along` as in `candidates`."""
    chosen = choose_product(m, n, k, dtype, precision, arch, vec=vec, tma=tma, along=along)
    if chosen.tma and chosen.block_i * chosen.block_j > 128 * 128 and chosen.tiles(m, n) > 2 * arch.processors:
        # Published for Triton on an H100: 84–92 % of cuBLAS with persistent programs, 75–85 % with a program a tile.
        # Compiled: the next tile's loads start under the output's store, not under its sigmoid, and the output tile
        # stays in shared memory beside the stages (213 KB with three). The model sees no difference: measure it first.
        chosen = replace(
            chosen,
            persistent=arch.processors,
            num_stages=stages_that_fit(chosen, ITEMSIZE[dtype], arch, output=chosen.block_i * chosen.block_j),
            reason=chosen.reason + "; persistent: more than two waves of them",
        )
    return chosen


@rule
def choose_dgrad(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, may_fuse: bool,
    along: bool = False,
) -> Product:  # fmt: skip
    """dx (m × k) = dz·w, summed over n. may_fuse: nobody else needs dz, so it may be formed on the way in.

    `along` as in `candidates`: a weight's rows lie across the sum.
    """
    chosen = choose_product(m, k, n, dtype, precision, arch, vec=vec, tma=tma, along=along, short=0)
    may_fuse = may_fuse and not needs_registers(dtype, precision, arch, tma=tma, along=along)
    return fuse_dz(chosen, k, dtype, arch) if may_fuse else chosen


@rule
def choose_wgrad(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, may_fuse: bool, spare: int
) -> Product:
    """dw (n × k) = dzᵀ·x, summed over m, split between programs where the result alone can't fill the GPU.

    The splits depend on the shape and the GPU alone, so the sums have one order. Their float32 partial results may take
    `spare` bytes: what torch would have allocated at this point and tribp does not.
    """
    accumulator = 8 if dtype == "float64" else 4

    def most_splits(tile: Product) -> int:
        """Splits of under eight steps do little but write partial results."""
        return max(1, min(cdiv(m, 8 * tile.block_l), spare // (accumulator * n * k)))

    tiles = candidates(m, dtype, precision, arch, vec, tma, along=False)
    filling = [tile for tile in tiles if fills(tile.tiles(n, k) * most_splits(tile), arch)]
    chosen = fitted((filling or tiles[-1:])[0], n, k, m, dtype, arch)
    if may_fuse and not needs_registers(dtype, precision, arch, tma=tma, along=False):
        chosen = fuse_dz(chosen, k, dtype, arch)
    resident = arch.processors if chosen.block_i * chosen.block_j > 128 * 128 else 2 * arch.processors
    splits = max(1, min(resident // chosen.tiles(n, k), most_splits(chosen)))
    return replace(chosen, splits=whole_splits(m, splits, chosen.block_l))


def whole_splits(m: int, splits: int, block: int) -> int:
    """As many splits of m rows, or fewer, so that each has whole blocks of them and none is left without."""
    return cdiv(m, cdiv(cdiv(m, splits), block) * block)


def fuse_dz(chosen: Product, cols: int, dtype: str, arch: Arch) -> Product:
    """Form dz while loading, if at most four tile columns repeat that work and descriptors load the tiles.

    Derived: a pass of its own reads dy and y and writes dz, and the product reads that again: four units of memory
    where the fused form has two. But the loop has three times the instructions, once for each tile column. Compiled:
    with pointers the fused wgrad spills up to 230 bytes on sm_90, and up to 1,300 where operands lie in registers; so
    it is not for products that `needs_registers` keeps from wgmma.
    """
    if cdiv(cols, chosen.block_j) > 4 or not chosen.tma:
        return chosen
    if chosen.block_i * chosen.block_j > 128 * 128:
        # Compiled: beside a 128×256 result dy and y leave no registers for 64 deep tiles (255, and a spill).
        chosen = replace(chosen, block_l=min(chosen.block_l, 32))
    chosen = replace(chosen, fuse_dz=True, reason=chosen.reason + "; dz formed on load: at most 4 tile columns")
    extra = chosen.block_i * chosen.block_l
    return replace(chosen, num_stages=stages_that_fit(chosen, ITEMSIZE[dtype], arch, extra=extra))


@rule
def choose_pass(m: int, n: int, dtype: str, arch: Arch) -> Pass:
    """The pass that writes dz and partial sums of db."""
    if arch.backend == "interpreter":
        return Pass(16, 32, 32, 1, INTERPRETED)
    block_n = fit(128, n)
    block_m = max(1, 4096 // block_n if ITEMSIZE[dtype] <= 4 else 2048 // block_n)
    blocks = cdiv(m, block_m)
    programs = max(1, 4 * arch.processors // cdiv(n, block_n))
    rows = cdiv(blocks, programs) * block_m
    return Pass(block_m, block_n, rows, 8, "derived: 16 elements a thread: two 16-byte loads of dy and of y in flight")


@rule
def choose_sum(parts: int, length: int, arch: Arch, *, rows: int = 1, vec: int = 4) -> Sum:
    """The second pass of every split sum. rows: of the matrices that it transposes; vec: elements an access."""
    if arch.backend == "interpreter":
        return Sum(4, 512, 1, INTERPRETED)
    # Derived: a sector of each row of a matrix, or a line of what is not transposed. Three forms are enough.
    least = 8 * power_of_2(rows) if rows > 1 else 32
    elements = 512 * vec
    block_parts = min(elements // least, 2 if parts <= 4 else 16 if parts <= 32 else 64)
    block = max(least, min(elements // block_parts, 256))  # compiled: 512 of few parts spill
    return Sum(block_parts, block, 1, "derived: 16 loads in flight a thread; one warp: no sum crosses warps")


MAX_DIMS = 6  # of a tensor whose parameter, gradient and states do not lie alike: the kernel's loop is unrolled


@rule
def choose_step(elements: int, types: frozenset[str], strided: bool, arch: Arch) -> Step:
    """The optimizer step, and the pass over the gradients before it, of `elements` numbers in all.

    types: of the parameters, gradients and states. strided: some of them do not lie alike in memory.
    """
    if arch.backend == "interpreter":
        return Step(64, 2, 1, INTERPRETED)
    if "float64" in types:
        block, reason = 512, "derived: 4 elements a thread: two 16-byte accesses to each operand"
    elif arch.backend == "hip" and types & {"float16", "bfloat16"}:
        block, reason = 2048, "derived: 8 elements a thread: a 16-byte access to each 16-bit operand"
    elif arch.backend == "cuda" and strided:
        # Compiled: the addresses of 8 elements a thread leave no registers if all is on (44 bytes).
        block, reason = 512, "compiled: 4 elements a thread: strided addresses take many registers"
    else:
        block, reason = 1024, "derived: 8 elements a thread: 16 bytes of each 16-bit operand, twice of one of 32 bits"
    # Derived: a program reads three tables, one after the other, before its first element. Up to 8 blocks share that,
    # but never so many that a processor gets fewer than 16 programs: four reside there, four waves even the end out.
    blocks = max(1, min(8, elements // (block * 16 * arch.processors)))
    # Compiled: left to itself, ptxas holds float64 to a step of occupancy, and Adagrad spills 8 bytes for it.
    limit = 255 if "float64" in types and arch.backend == "cuda" else None
    return Step(block, blocks, 4, reason, limit)
