"""Configs of matrix products: tile shapes, warps, stages, splits, and the heuristics that choose them.

A heuristic is a pure function of shapes, types and the GPU, by arithmetic that a person can check; nothing is timed at
the first call, and nothing but the standard library is imported. Every config carries the `reason` it was chosen for,
and the reason begins with what it rests on (`basis`):

- "derived": arithmetic on bytes and operations;
- "compiled": the machine code of all of ARCHS, read for registers, spills and shared memory (`python -m bench static`);
- "measured on sm_90": timed on that GPU (`python -m bench tune`, or TRIBP_AUTOTUNE=1); on any other one, derived.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

from .. import versions
from .arch import ARCHS, ITEMSIZE, Arch, cdiv, power_of_2
from .neighbors import Steps, all_registers, by_one, by_two, toggled

BASES = ("derived", "compiled", "measured")
REASON_INTERPRETED = "derived: interpreted, a program takes 6 ms whatever its size"


class Config(Protocol):
    """What all configs have."""

    @property
    def reason(self) -> str: ...


def basis(config: Config, arch: Arch) -> str:
    """What a config rests on, on this machine: one of BASES. Raises ValueError if its reason doesn't say."""
    said, colon, _ = config.reason.partition(": ")
    word, _, where = said.partition(" on ")
    if not colon or word not in BASES or (word == "measured") != bool(where):
        raise ValueError(f"a reason begins with one of {', '.join(BASES)}, measured with where: {config.reason!r}")
    holds = {"derived": True, "compiled": arch.name in ARCHS, "measured": arch.name in where.split(", ")}
    return word if holds[word] else "derived"


@dataclass(frozen=True)
class MatmulConfig:
    """Of a matrix product: a block_i × block_j tile a program, block_l of the summed index a step."""

    block_i: int
    block_j: int
    block_l: int
    num_warps: int
    num_stages: int
    reason: str
    group: int = 8  # tile rows that run together: 8 · 128 rows and as many columns share operands that fit a 50 MB L2
    tma: bool = False
    prefetch: bool = False
    persistent: bool = False  # a program a processor, which share all tiles between them; else a program a tile
    splits: int = 1  # programs that share the summed index of one tile
    fuse_dz: bool = False  # form dz = dy·act′ while loading
    max_registers: int | None = None  # a thread; None: as many as ptxas thinks best for occupancy

    def tiles(self, i: int, j: int) -> int:
        return cdiv(i, self.block_i) * cdiv(j, self.block_j)

    def covered(self, i: int, j: int) -> int:
        """Elements of all tiles, those that lie outside an i × j result too."""
        return self.tiles(i, j) * self.block_i * self.block_j


M = TypeVar("M", bound=MatmulConfig)


@dataclass(frozen=True)
class ReduceConfig:
    """Of `reduce_partials`."""

    block_parts: int
    block: int
    num_warps: int
    reason: str


def fit_block(block: int, size: int) -> int:
    """The block, halved while half of it still covers `size`; a matrix instruction needs 16."""
    return max(16, min(block, power_of_2(size)))


class MatmulProblem(Protocol):
    """What a problem that is a matrix product says of its operands."""

    @property
    def dtype(self) -> str: ...
    @property
    def precision(self) -> str:
        """`arch.precision_of`."""

    @property
    def arch(self) -> Arch: ...
    @property
    def vec(self) -> int:
        """Elements that every row pitch, contiguous length and base address is a multiple of (16 bytes at most)."""

    @property
    def tma(self) -> bool:
        """Whether the operands can have tensor descriptors."""

    @property
    def along(self) -> bool:
        """Whether both operands are contiguous along the summed index."""


def needs_registers(problem: MatmulProblem, *, tma: bool) -> bool:
    """Whether a product must not go to wgmma, on a GPU that has it, but to mma.sync with operands in registers.

    wgmma reads its second operand from shared memory. What is formed in registers must be stored there, and the
    program then waits for all products before it may store the next tile. Compiled, that is so

    - in tf32x3, which splits operands (shared memory takes three times as long as tensor cores, 4096³ on sm_90);
    - in TF32, if the kernel has to round them, or one does not lie `along` the summed index: wgmma can't turn it.

    By pointers, 16 bits go wrong where Triton leaves out the fence between copy and product.
    """
    if not problem.arch.has_wgmma or problem.dtype == "float64":
        return False
    if problem.dtype == "float32":
        return problem.precision == "tf32x3" or not (tma and problem.along and versions.descriptors_round_to_tf32())
    return not tma and not versions.fences_copies()


def by_mma_sync(config: M, precision: str) -> M:
    """The config as a product by mma.sync, where wgmma is ruled out: that takes 64 rows and four warps.

    Compiled: with two warps a thread has room for 64 numbers of the result; beside tf32x3's halves for 32, of 32 rows.
    """
    if precision == "tf32x3":
        return replace(config, block_i=min(config.block_i, 32), block_j=min(config.block_j, 128), num_warps=4)
    if config.block_i < 64:
        return config
    columns = 64 * 64 // config.block_i
    return replace(config, block_j=max(16, min(config.block_j, columns)), num_warps=2)


# Sums up to which a tile's end takes so long that another program on the processor should hide it. Measured on an H200,
# in tiles of 128×256 and of 128×128 with four warps, in µs: forward 8192×1024×1024 35.5 and 33.0, 65536×256×784 65.8
# and 63.8; backward 65536×256×784 (dgrad sums 256; 256×128) 182 and 172, 8192×1024×1024 91.4 and 88.3, 65536×1024×256
# 183 and 185. Elsewhere derived; on sm_100, by eight warps, up to half of that.
SHORT_SUM = 1024


def candidates(problem: MatmulProblem, l: int) -> list[MatmulConfig]:
    """The tiles worth considering for a product summed over l, the largest first."""
    dtype, arch = problem.dtype, problem.arch
    tma = problem.tma and arch.has_tma
    two_byte_loads = problem.vec * ITEMSIZE[dtype] < 4 and not tma
    if arch.backend == "interpreter":
        # Tiles just small enough that the tests' shapes take several.
        return [MatmulConfig(32, 32, 32, 1, 1, REASON_INTERPRETED, tma=tma, prefetch=two_byte_loads)]
    if two_byte_loads:
        return _odd_pitch_tiles(arch, l)
    if arch.backend == "hip":
        return _amd_tiles(dtype)
    if needs_registers(problem, tma=tma):
        return _mma_sync_tiles(problem, tma)
    if dtype in ("float32", "float64"):
        return _wide_type_tiles(problem, tma)
    return _half_tiles(problem, l, tma)


def _odd_pitch_tiles(arch: Arch, l: int) -> list[MatmulConfig]:
    # Two-byte loads go through registers. One stage: the loop is its own pipeline, and a second one on top does not
    # compile for sm_100 in Triton 3.5.
    reason = "compiled: odd pitch: two-byte loads, prefetched by hand"
    wide = MatmulConfig(128, 128, 32, 8, 1, reason, prefetch=True)
    if arch.backend == "cuda":
        wide = replace(wide, max_registers=255)  # compiled: ptxas would hold it to 96 on sm_89, and spill 232 bytes
    small = replace(wide, block_i=64, block_j=64, num_warps=4, reason="derived: odd pitch: 64×64 fills the GPU")
    # 1000×77×333, µs: forward with 32 deep tiles 10.2, 64 8.4, 128 10.7; weight and bias 22.6 and 20.4.
    tiny = replace(small, block_i=32, block_j=32, block_l=64 if l > 128 else 32)
    tiny = replace(tiny, reason="measured on sm_90: odd pitch: a small result, a long sum in few steps")
    return [wide, replace(wide, block_j=64), small, tiny]


def _amd_tiles(dtype: str) -> list[MatmulConfig]:
    depth = {"float64": 16, "float32": 32}.get(dtype, 64)
    wide = MatmulConfig(128, 128, depth, 8, 2, "derived: MFMA; two stages fill 64 KB of LDS")
    return [wide, replace(wide, block_i=64, block_j=64, num_warps=4)]


def _mma_sync_tiles(problem: MatmulProblem, tma: bool) -> list[MatmulConfig]:
    """Where `needs_registers` rules out wgmma."""
    depth = 32 if problem.dtype == "float32" else 64
    reason = "compiled: mma.sync: two warps a program, or 32 rows"
    wide = by_mma_sync(MatmulConfig(64, 128, depth, 2, 4, reason, tma=tma, max_registers=255), problem.precision)
    return [wide, replace(wide, block_i=32, block_j=32, num_warps=4, reason="derived: 32×32: a small result")]


def _wide_type_tiles(problem: MatmulProblem, tma: bool) -> list[MatmulConfig]:
    """Of float32 and float64."""
    precision = problem.precision
    # Compiled: left to itself, ptxas rounds the registers of these down to a step of occupancy and spills 4–20 bytes
    # for it; with 255 allowed they take what they need. Before Hopper, whose tensor cores read shared memory, the
    # halves that tf32x3 makes of both operands lie in registers: 128×128 spills there, 128×64 does not.
    if problem.dtype == "float64":
        wide = MatmulConfig(64, 64, 16, 8, 2, "compiled: float64: DMMA", tma=tma, max_registers=255)
    elif precision == "tf32x3" and not problem.arch.has_tma:
        wide = MatmulConfig(128, 64, 32, 8, 3, "compiled: tf32x3 from registers: 128×64", tma=tma, max_registers=255)
    else:
        wide = MatmulConfig(128, 128, 32, 8, 3, f"compiled: {precision}: 128×128", tma=tma, max_registers=255)
    small = replace(wide, block_i=64, block_j=64, num_warps=4, reason=f"derived: {precision}: 64×64 fills the GPU")
    tiny = replace(small, block_i=32, block_j=32, reason=f"derived: {precision}: a small result")
    return [wide, tiny] if problem.dtype == "float64" else [wide, small, tiny]


def _half_tiles(problem: MatmulProblem, l: int, tma: bool) -> list[MatmulConfig]:
    """Of 16 bits, summed over l."""
    arch = problem.arch
    # Compiled: before Hopper a 128×256 result beside operands in registers leaves no room for 64 deep tiles.
    depth = 64 if arch.has_tma else 32
    big = MatmulConfig(128, 256, depth, 8, 4, "derived: 128×256: the most multiplication per byte of operand", tma=tma)
    reason = "derived: 128×128: two programs a processor, one's epilogue behind the other's loop"
    wide = MatmulConfig(128, 128, 64, 8, 3, reason, tma=tma)
    small = MatmulConfig(64, 64, 64, 4, 4, "derived: 64×64: larger tiles would leave processors idle", tma=tma)
    if arch.has_wgmma and tma:
        # Two warp groups wait for each other at the end of every sum, and a sum of four steps fills no third stage.
        # Forward 65536×1024×256: 114 µs with 8 warps, 108 with 4, 101 with 2 stages. 3×3 on 64×512 images of 7²:
        # 39.5 and 36.7.
        reason = "measured on sm_90: 128×128: one warp group; two programs a processor or three"
        wide = replace(wide, num_warps=4, num_stages=2 if l <= 256 else 3, reason=reason)
    if not arch.has_tma and problem.vec * ITEMSIZE[problem.dtype] < 8:
        # Compiled: 4-byte accesses to 64 deep tiles have so many addresses that one spills with Triton 3.9 on sm_80.
        small = replace(small, block_l=32)
    tiles = [wide, small, replace(small, block_i=32, block_j=32, reason="derived: 32×32: a small result")]
    if arch.has_wgmma and tma:
        tiles.insert(1, replace(small, block_j=128, reason="derived: 64×128: half the programs of 64×64, less to read"))
    return [big, *tiles] if l > (SHORT_SUM // 2 if tma and not arch.has_wgmma else SHORT_SUM) else tiles


def prefer_tall_tiles(tiles: list[MatmulConfig], i: int, j: int) -> list[MatmulConfig]:
    """The tiles, with 256×128 in place of 128×256 where less of it lies outside an i × j result.

    Measured on an H200, dw and db of 65536×256×784: 104 → 93 µs.
    """
    big = tiles[0]
    if not (big.tma and big.block_j == 256):
        return tiles
    tall = replace(big, block_i=256, block_j=128, reason=big.reason.replace("128×256", "256×128"))
    return [tall, *tiles[1:]] if tall.covered(i, j) < big.covered(i, j) else tiles


def fit_tile(config: MatmulConfig, problem: MatmulProblem, i: int, j: int, l: int) -> MatmulConfig:
    """The config, no larger than an i × j result summed over l needs, with the stages that shared memory holds."""
    block_i, block_j, block_l = fit_block(config.block_i, i), fit_block(config.block_j, j), fit_block(config.block_l, l)
    warps = config.num_warps if block_i * block_j >= 64 * 64 else min(config.num_warps, 4)
    config = replace(config, block_i=block_i, block_j=block_j, block_l=block_l, num_warps=warps)
    return replace(config, num_stages=stages_that_fit(config, ITEMSIZE[problem.dtype], problem.arch))


def fills_gpu(programs: int, arch: Arch) -> bool:
    """Whether so many programs are enough for the GPU.

    Derived: three quarters of its processors are. The next smaller tile reads its operands about twice as often for a
    third more processors at best. By the model (`python -m bench static --model`), against a program for each of them:
    58 → 39 µs for dw and db of 8192×1024×1024, 52 → 31 for 3×3 on 64×512 images of 7×7, and nothing is slower.
    """
    return 4 * programs >= 3 * arch.processors


def choose_product(problem: MatmulProblem, i: int, j: int, l: int) -> MatmulConfig:
    """The config for an i × j result summed over l."""
    tiles = prefer_tall_tiles(candidates(problem, l), i, j)
    if tiles[0].tma and tiles[0].block_i * tiles[0].block_j > 128 * 128 and j <= 128:
        tiles = tiles[1:]
    chosen = pick_tile([fit_tile(tile, problem, i, j, l) for tile in tiles], problem, lambda tile: tile.tiles(i, j))
    return set_stages(chosen, problem, chosen.tiles(i, j))


def pick_tile(tiles: Sequence[M], problem: MatmulProblem, programs: Callable[[M], int]) -> M:
    """Of tiles with so many programs each: by wgmma the cheapest, elsewhere the largest that fills the GPU."""
    arch = problem.arch
    filling = [tile for tile in tiles if fills_gpu(programs(tile), arch)] or tiles[-1:]
    if not counts_by_wgmma(problem, tiles):
        return filling[0]
    # Measured: 64×256→256 images of 14² take 30 µs in 196 tiles of 128×128; by the model 32 in 98 of 256×128.
    possible = [tile for tile in tiles if tile in filling or tile.block_i * tile.block_j <= 128 * 128]
    return min(possible, key=lambda tile: step_cost(tile, arch, programs(tile)))


def counts_by_wgmma(problem: MatmulProblem, tiles: Sequence[MatmulConfig]) -> bool:
    """Whether `step_cost` says what the tiles take: wgmma multiplies what descriptors load."""
    by_wgmma = problem.arch.has_wgmma and problem.dtype != "float64"
    return by_wgmma and tiles[0].tma and not needs_registers(problem, tma=True)


def step_cost(tile: MatmulConfig, arch: Arch, programs: int) -> float:
    """What all programs take for one step of the sum, in the time that L2 takes to hand each processor one number.

    Derived: 5,120 bytes a cycle for 132 processors are 39 each, in which time it multiplies 74 pairs of 16-bit numbers
    for each of those (`bench/model/machines.py`); TF32 takes twice as long for both. They are added, for neither quite
    hides the other. Larger tiles read less, smaller ones leave fewer processors idle: by the model 64×64 is 1.8 times
    as fast as 32×32 at 512×768×3072, where 96 programs have 132 processors. It agrees with what was measured of three
    programs a processor (`takes_three_a_processor`).
    """
    read = programs * (tile.block_i + tile.block_j) / arch.processors
    return read + cdiv(programs, arch.processors) * tile.block_i * tile.block_j / 74


def takes_three_a_processor(config: MatmulConfig, problem: MatmulProblem, programs: int) -> bool:
    """Whether all programs are there at once if a processor takes three: tiles of 128×128, of two stages.

    Measured on an H200, µs, 392 programs of three stages and of two: 3×3 on 64×128 of 28², forward and dgrad, 34.2,
    33.4 and 28.1, 27.8; forward of 6272×1024×1024 28.8 and 25.4. With 196 tiles of 128×256, and with these: 3×3 on
    256×512 of 7² 101.8, 101.7 and 93, 99.9; 12544×512×2048 54.7 and 40.7; 6272×1024×4096 96.8 and 73.7.
    """
    small, each = (config.block_i, config.block_j, config.num_warps) == (128, 128, 4), problem.arch.processors
    return small and feeds_wgmma(config, problem) and 2 * each < programs <= 3 * each


def set_stages(config: M, problem: MatmulProblem, programs: int) -> M:
    """The config with more stages, if each program has a processor's shared memory to itself.

    Fewer where a processor takes three programs (`takes_three_a_processor`).

    Measured on an H200, 3×3 on 64×512 images of 7² (100 programs), dgrad and forward, with three stages and four: 36.7,
    38.0 and 29.0, 30.1 µs; five are no faster.
    """
    if takes_three_a_processor(config, problem, programs):
        config = replace(config, num_stages=min(config.num_stages, 2))
    elif feeds_wgmma(config, problem) and programs <= problem.arch.processors:
        config = replace(config, num_stages=max(config.num_stages, 4))
    return replace(config, num_stages=stages_that_fit(config, ITEMSIZE[problem.dtype], problem.arch))


def feeds_wgmma(config: MatmulConfig, problem: MatmulProblem) -> bool:
    """Whether descriptors load the tiles that wgmma multiplies as they are."""
    return problem.arch.has_wgmma and config.tma and ITEMSIZE[problem.dtype] == 2


def stages_that_fit(config: MatmulConfig, itemsize: int, arch: Arch, *, extra: int = 0, output: int = 0) -> int:
    """The config's stages, or as many of them as shared memory holds.

    A stage keeps its two operand tiles and `extra` elements; `output` elements stay beside all stages. Compiled: where
    products take their operands from registers (before Hopper, and AMD), the stage in use is no longer in memory.
    """
    return max(1, min(config.num_stages, stages_in_memory(config, itemsize, arch, extra=extra, output=output)))


def stages_in_memory(config: MatmulConfig, itemsize: int, arch: Arch, *, extra: int = 0, output: int = 0) -> int:
    """How many stages shared memory holds; arguments as in `stages_that_fit`.

    Compiled: where operands lie in registers, those of a single stage get there one after the other; CUDA's of float64
    at once.
    """
    i, j, l = config.block_i, config.block_j, config.block_l
    stage = ((i + j) * l + extra) * itemsize
    in_memory = (arch.shared_memory - 1024 - output * itemsize) // stage
    if arch.has_tma:
        return in_memory
    at_once = i + j if itemsize == 8 and arch.backend == "cuda" else max(i, j)
    return in_memory + 1 if in_memory else int(at_once * l * itemsize <= arch.shared_memory)


def rows_per_split(m: int, splits: int, block: int) -> int:
    """How many of m rows each split has, in whole blocks; the last one has what is left."""
    return cdiv(cdiv(m, splits), block) * block


def whole_splits(m: int, splits: int, block: int) -> int:
    """As many splits of m rows, or fewer, so that each has whole blocks of them and none is left without."""
    return cdiv(m, rows_per_split(m, splits, block))


# -- what is legal

MAX_TILE = 256  # of a tile's sides, and of a descriptor's
WORKSPACE = 32 << 20  # bytes that partial results may always take; cuDNN's algorithms ask for as much and more
RESULT_REGISTERS = 128  # registers a thread may keep of a result: 128×256 in float32 with 8 warps

# What every product can vary.
STEPS: Steps = dict(
    num_warps=by_two, num_stages=by_one, block_l=by_two, block_i=by_two, block_j=by_two, tma=toggled,
    max_registers=all_registers, group=by_two,
)  # fmt: skip


def register_limit(arch: Arch) -> int | None:
    """The limit that makes ptxas take what it needs; compiled, it rounds down to a step of occupancy, and spills."""
    return 255 if arch.backend == "cuda" else None


def registers(elements: int, dtype: str, num_warps: int, arch: Arch) -> int:
    """Registers a thread, for a result of so many elements in the accumulator's type; the interpreter has no end."""
    if arch.backend == "interpreter":
        return 0
    threads = num_warps * (64 if arch.backend == "hip" else 32)
    return elements * (2 if dtype == "float64" else 1) // threads


def is_compilable(config: Any) -> bool:
    """Whether sides of tiles and warps are powers of two, as Triton takes them, and registers as many as ptxas takes.

    Compiled: below 28 it refuses every product, below 90 and 146 some large ones of sm_90 and sm_100.
    """
    sizes = [value for field, value in vars(config).items() if field.startswith("block") or field == "num_warps"]
    limit = getattr(config, "max_registers", None)
    return all(size > 0 and size & (size - 1) == 0 for size in sizes) and (limit is None or 28 <= limit <= 255)


def legal_threads(config: Any, arch: Arch, *, wgmma: bool = True, tile: int = 0) -> bool:
    """Whether the config compiles, and warps and registers are as the GPU has them.

    wgmma: whether tensor cores may be wgmma's, which need four warps. tile: elements of a product's result; a small one
    is not worth more than four.
    """
    if not is_compilable(config):
        return False
    if arch.backend == "interpreter":
        return bool(config.num_warps == 1 and config.max_registers is None)
    least, most = 4 if arch.has_tma and wgmma else 2, 4 if 0 < tile < 64 * 64 else 8
    return least <= config.num_warps <= most and (config.max_registers is None or arch.backend == "cuda")


def legal_product(
    config: MatmulConfig, problem: MatmulProblem, i: int, j: int, l: int, *, extra: int = 0, output: int = 0
) -> bool:
    """Whether an i × j result summed over l is computed right, and nothing that was seen to spill is asked for.

    extra and output as in `stages_that_fit`.
    """
    arch, itemsize = problem.arch, ITEMSIZE[problem.dtype]
    tile = config.block_i * config.block_j
    # Prefetching copies nothing asynchronously.
    by_registers = needs_registers(problem, tma=config.tma) and not config.prefetch
    most, deepest, widest = RESULT_REGISTERS, 128, MAX_TILE
    if config.prefetch:  # what is prefetched lies in registers as well, and where it comes from
        most = RESULT_REGISTERS // (2 if config.num_warps == 8 else 4)
        deepest, widest = 64 if tile <= 32 * 32 else 32, 128
    stages = stages_in_memory(config, itemsize, arch, extra=extra, output=output)
    single = config.prefetch or arch.backend == "interpreter"  # one pipeline on top of another does not compile
    return (
        legal_threads(config, arch, wgmma=not by_registers, tile=tile)
        and 16 <= config.block_i <= fit_block(widest, i)
        and 16 <= config.block_j <= fit_block(widest, j)
        and 16 <= config.block_l <= fit_block(deepest, l)
        and 1 <= config.num_stages <= (1 if single else stages)
        and registers(tile, problem.dtype, config.num_warps, arch) <= most
        and (not by_registers or config == by_mma_sync(config, problem.precision))
        # Narrower loads than four bytes are not pipelined.
        and (problem.tma and arch.has_tma if config.tma else (problem.vec * itemsize < 4) == config.prefetch)
        and not (config.tma and config.prefetch)
        # A single row or column of tiles has one order.
        and 1 <= config.group <= 32
        and (config.group == MatmulConfig.group or (i > config.block_i and j > config.block_j))
    )


def adjusted_product(config: M, problem: MatmulProblem, *, extra: int = 0, output: int = 0) -> M:
    """The config with warps and stages as its tiles and the GPU's memory allow."""
    if needs_registers(problem, tma=config.tma) and not config.prefetch:
        config = by_mma_sync(config, problem.precision)
    if config.block_i * config.block_j < 64 * 64:
        config = replace(config, num_warps=min(config.num_warps, 4))
    stages = stages_in_memory(config, ITEMSIZE[problem.dtype], problem.arch, extra=extra, output=output)
    return replace(config, num_stages=min(config.num_stages, stages))


class ReduceProblem(NamedTuple):
    """The second pass of every split sum: of `parts` partial results of `length` elements."""

    parts: int
    length: int
    arch: Arch
    rows: int = 1  # of the matrices that are transposed
    vec: int = 4  # elements an access

    @property
    def least_block(self) -> int:
        """Derived: a sector of each row of a matrix, or a line of what is not transposed."""
        return 8 * power_of_2(self.rows) if self.rows > 1 else 32

    def steps(self) -> Steps:
        return dict(block_parts=by_two, block=by_two, num_warps=by_two)

    def choose(self) -> ReduceConfig:
        parts, arch, vec = self.parts, self.arch, self.vec
        if arch.backend == "interpreter":
            return ReduceConfig(4, 512, 1, REASON_INTERPRETED)
        # Derived: three forms are enough.
        least = self.least_block
        elements = 512 * vec
        block_parts = min(elements // least, 2 if parts <= 4 else 16 if parts <= 32 else 64)
        block = max(least, min(elements // block_parts, 256))  # compiled: 512 of few parts spill
        return ReduceConfig(
            block_parts, block, 1, "derived: 16 loads in flight a thread; one warp: no sum crosses warps"
        )

    def adjusted(self, config: ReduceConfig) -> ReduceConfig:
        return config

    def is_legal(self, config: ReduceConfig) -> bool:
        interpreted = self.arch.backend == "interpreter"
        return (
            is_compilable(config)
            and config.block_parts <= 128
            and config.block >= self.least_block
            and (interpreted or config.block * config.block_parts <= 1024 * self.vec)
            and config.num_warps <= (1 if interpreted else 8)
        )


APPENDED_PARTS = 8  # partial results that programs of another kernel's launch read at once


def appended_sums(arch: Arch, num_warps: int, rows: int, vec: int) -> ReduceConfig:
    """Of sums in another kernel's launch, of so many warps.

    One form for any number of parts, for each would be a kernel more. By the model 8 parts at once are best over the
    layers of a ResNet-18: 893 µs for the backward passes of 64 images, 16 at once 3 more, 4 at once 4.
    """
    if arch.backend == "interpreter":
        return ReduceConfig(4, 512, num_warps, REASON_INTERPRETED)
    elements = 512 * vec * num_warps
    block = max(8 * power_of_2(rows), elements // APPENDED_PARTS)
    return ReduceConfig(elements // block, block, num_warps, "derived: 16 loads in flight a thread")
