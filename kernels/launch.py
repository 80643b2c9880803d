"""How each kernel is launched: tile shapes, warps, stages, splits, and why.

Everything here follows from shapes, types and the GPU, by rules a person can check; nothing is timed at the first call,
and nothing but the standard library is imported. Every setting carries the `reason` it was chosen for.

No setting has been measured on a GPU yet. What the reasons call compiled was read off the machine code (registers,
spills, shared memory: `python -m bench static`); what they call derived is arithmetic on bytes and operations.
"""

from dataclasses import dataclass, replace
from functools import lru_cache


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
        return self.backend == "interpreter" or (self.backend == "cuda" and self.capability >= 90)


# The machines the static checks compile for; on a real one `tribp.runtime.arch_of` reads the numbers off the device.
ARCHS = {
    "sm_80": Arch("cuda", 80, 108, 163 * 1024, "sm_80"),
    "sm_90": Arch("cuda", 90, 132, 227 * 1024, "sm_90"),
    "sm_100": Arch("cuda", 100, 148, 227 * 1024, "sm_100"),
    "gfx942": Arch("hip", 942, 304, 64 * 1024, "gfx942"),
}
INTERPRETER = Arch("interpreter", 0, 4, 1 << 30, "interpreter")

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


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

    def tiles(self, i: int, j: int) -> int:
        return cdiv(i, self.block_i) * cdiv(j, self.block_j)


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
    (gfx942) or where there are none (the interpreter).
    """
    if dtype != "float32" or arch.backend != "cuda":
        return "ieee"
    return "tf32" if tf32 else "tf32x3"


@lru_cache(maxsize=4096)
def choose_product(
    i: int, j: int, l: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, fill: bool = True
) -> Product:
    """Settings for an i × j result summed over l.

    vec: elements that every row pitch, contiguous length and base address is a multiple of (16 bytes at most).
    tma: whether the operands can have tensor descriptors. fill: shrink tiles until they fill the GPU (False where the
    summed index will be split instead).
    """
    itemsize = ITEMSIZE[dtype]
    tma = tma and arch.has_tma
    if arch.backend == "interpreter":
        # 6 ms a program whatever its size: tiles just small enough that the tests' shapes take several.
        return Product(32, 32, 32, 1, 1, "interpreter", tma=tma, prefetch=vec * itemsize < 4)

    if vec * itemsize < 4 and not tma:
        # Two-byte loads go through registers: 128×64×32 takes 128 of them, 128×128×32 twice as many, 64 deep spills.
        base = Product(128, 64, 32, 8, 2, "odd pitch: prefetch by hand, 2-byte loads", prefetch=True)
        tiles = [base, replace(base, block_i=64, num_warps=4)]
    elif dtype == "float64":
        tiles = [Product(64, 64, 16, 4, 3, "float64: DMMA at 64×64×16, 175 registers")]
    elif arch.backend == "hip":
        depth = 32 if dtype == "float32" else 64
        wide = Product(128, 128, depth, 8, 2, "MFMA, 64 KB of LDS: two stages of 128×128")
        tiles = [wide, replace(wide, block_i=64, block_j=64, num_warps=4)]
    elif dtype == "float32":
        # tf32x3 keeps both halves of both operands: 128×128×32 takes 180–202 registers at 8 warps, no spill.
        wide = Product(128, 128, 32, 8, 3, f"{precision}: 128×128×32 is the largest tile that does not spill")
        small = replace(wide, block_i=64, block_j=64, num_warps=4, reason=f"{precision}: 64×64 tiles fill the GPU")
        tiles = [wide, small, replace(small, block_i=32, block_j=32, reason=f"{precision}: a small result")]
    else:
        big = Product(128, 256, 64, 8, 4, "a full wave of 128×256 tiles: the most multiplication per byte of operand")
        wide = Product(128, 128, 64, 8, 3, "128×128: two programs a processor, one's epilogue behind the other's loop")
        small = Product(64, 64, 64, 4, 4, "64×64 tiles, or larger ones would leave processors idle")
        tiles = [wide, small, replace(small, block_i=32, block_j=32, reason="32×32 tiles: a small result")]
        if l > 1024:
            tiles.insert(0, big)  # short sums spend their time in the epilogue, and want the two programs

    chosen = tiles[-1]
    for candidate in tiles:
        if not fill or candidate.tiles(i, j) >= arch.processors:
            chosen = candidate
            break
    chosen = replace(
        chosen, block_i=fit(chosen.block_i, i), block_j=fit(chosen.block_j, j), block_l=fit(chosen.block_l, l), tma=tma
    )
    if chosen.block_i * chosen.block_j < 64 * 64:
        chosen = replace(chosen, num_warps=min(chosen.num_warps, 4))
    return replace(chosen, num_stages=stages_that_fit(chosen, itemsize, arch))


def stages_that_fit(settings: Product, itemsize: int, arch: Arch, *, extra: int = 0, output: int = 0) -> int:
    """The settings' stages, or as many of them as shared memory holds.

    A stage keeps its two operand tiles and `extra` elements; `output` elements stay beside all stages.
    """
    stage = ((settings.block_i + settings.block_j) * settings.block_l + extra) * itemsize
    return max(1, min(settings.num_stages, (arch.shared_memory - 1024 - output * itemsize) // stage))


@lru_cache(maxsize=4096)
def choose_forward(m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool) -> Product:
    """y (m × n) = σ(x·wᵀ + b), summed over k."""
    chosen = choose_product(m, n, k, dtype, precision, arch, vec=vec, tma=tma)
    if chosen.tma and chosen.block_j == 256 and chosen.tiles(m, n) > 2 * arch.processors:
        # Derived: with one program a processor nothing else hides its sigmoid, so the next tile's loads start under it.
        # The output tile then stays in shared memory beside the stages (compiled: 213 KB with three).
        chosen = replace(
            chosen,
            persistent=arch.processors,
            num_stages=stages_that_fit(chosen, ITEMSIZE[dtype], arch, output=chosen.block_i * chosen.block_j),
            reason=chosen.reason + "; persistent: more than two waves of them",
        )
    return chosen


@lru_cache(maxsize=4096)
def choose_dgrad(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, may_fuse: bool
) -> Product:
    """dx (m × k) = dz·w, summed over n. may_fuse: nobody else needs dz, so it may be formed on the way in."""
    chosen = choose_product(m, k, n, dtype, precision, arch, vec=vec, tma=tma)
    return fuse_dz(chosen, cdiv(k, chosen.block_j), dtype, arch) if may_fuse else chosen


@lru_cache(maxsize=4096)
def choose_wgrad(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, may_fuse: bool, spare: int
) -> Product:
    """dw (n × k) = dzᵀ·x, summed over m, split between programs where the result alone can't fill the GPU.

    The splits depend on the shape and the GPU alone, so the sums have one order. Their float32 partial results may take
    `spare` bytes: what torch would have allocated at this point and tribp does not.
    """
    chosen = choose_product(n, k, m, dtype, precision, arch, vec=vec, tma=tma, fill=False)
    tiles = chosen.tiles(n, k)
    accumulator = 8 if dtype == "float64" else 4
    resident = 2 * arch.processors if chosen.block_i * chosen.block_j <= 128 * 128 else arch.processors
    worthwhile = cdiv(m, 8 * chosen.block_l)  # splits of under eight steps do little but write partial results
    splits = max(1, min(resident // tiles, worthwhile, spare // (accumulator * n * k)))
    rows = cdiv(cdiv(m, splits), chosen.block_l) * chosen.block_l
    chosen = replace(chosen, splits=cdiv(m, rows))
    return fuse_dz(chosen, cdiv(k, chosen.block_j), dtype, arch) if may_fuse else chosen


def fuse_dz(chosen: Product, tile_cols: int, dtype: str, arch: Arch) -> Product:
    """Form dz while loading, if few tile columns repeat that work.

    Derived: a pass of its own reads dy and y and writes dz, and the product reads that again: four units of memory
    where the fused form has two. But the loop has three times the instructions, once for each tile column.
    """
    if tile_cols > 4 or chosen.prefetch:
        return chosen
    if chosen.block_i * chosen.block_j > 128 * 128:
        # Compiled: the 128×256 accumulator leaves no registers for dy and y.
        chosen = replace(chosen, block_j=128)
    chosen = replace(chosen, fuse_dz=True, reason=chosen.reason + "; dz formed on load: at most 4 tile columns")
    extra = chosen.block_i * chosen.block_l
    return replace(chosen, num_stages=stages_that_fit(chosen, ITEMSIZE[dtype], arch, extra=extra))


@lru_cache(maxsize=4096)
def choose_pass(m: int, n: int, dtype: str, arch: Arch) -> Pass:
    """The pass that writes dz and partial sums of db."""
    if arch.backend == "interpreter":
        return Pass(16, 32, 32, 1, "interpreter")
    block_n = fit(128, n)
    block_m = max(1, 4096 // block_n if ITEMSIZE[dtype] <= 4 else 2048 // block_n)
    blocks = cdiv(m, block_m)
    programs = max(1, 4 * arch.processors // cdiv(n, block_n))
    rows = cdiv(blocks, programs) * block_m
    return Pass(block_m, block_n, rows, 8, "16 elements a thread: two 16-byte loads in flight from each of dy and y")


@lru_cache(maxsize=4096)
def choose_sum(parts: int, length: int, arch: Arch) -> Sum:
    """The second pass of every split sum."""
    if arch.backend == "interpreter":
        return Sum(4, 512, 1, "interpreter")
    block_parts = min(64, power_of_2(parts))
    block = max(32, min(1024, 2048 // block_parts))
    return Sum(block_parts, min(block, max(32, power_of_2(length))), 4, "2,048 loads in flight a program")
