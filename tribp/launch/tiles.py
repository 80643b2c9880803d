"""The heuristics that choose a matrix product's config: its tile, warps and stages.

A heuristic is a pure function of shapes, types and the GPU, by arithmetic that a person can check; nothing is timed at
the first call, and nothing but the standard library is imported. What its reasons rest on: `configs.basis`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .arch import ITEMSIZE, Arch, cdiv
from .configs import REASON_INTERPRETED, fit_block, register_limit, rows_per_split, whole_splits
from .matmul import M, MatmulConfig, MatmulProblem, by_mma_sync, feeds_wgmma, fit_stages, needs_registers

# Sums up to which a tile's end takes so long that another program on the processor should hide it. Measured on an H200,
# in tiles of 128×256 and of 128×128 with four warps, in µs: forward 8192×1024×1024 35.5 and 33.0, 65536×256×784 65.8
# and 63.8; backward 65536×256×784 (dgrad sums 256; 256×128) 182 and 172, 8192×1024×1024 91.4 and 88.3, 65536×1024×256
# 183 and 185. Elsewhere derived; on sm_100, by eight warps, up to half of that.
SHORT_SUM = 1024
LONG_SUM = 1024  # from which on `split_sum` can give two parts enough to do


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
    return fit_stages(replace(config, block_i=block_i, block_j=block_j, block_l=block_l, num_warps=warps), problem)


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


def sum_cost(tile: MatmulConfig, problem: MatmulProblem, tiles: int, results: int, l: int) -> float:
    """What so many tiles take, of so many results that are sums over l, in the parts that `tile.splits` says.

    In the unit of `step_cost`.

    Derived: float32 partial results are written and read, four numbers. By the model a launch more takes 3 µs, 100,000
    numbers for each processor, and a program's step at least 0.12 µs: twice that where loads are prefetched by hand,
    three times where operands are split into halves.
    """
    least = 4_100 * (3 if problem.precision == "tf32x3" else 2 if tile.prefetch else 1)
    step = max(step_cost(tile, problem.arch, tile.splits * tiles), least / tile.block_l)
    partials = 4 * tile.splits * results / problem.arch.processors + 100_000 if tile.splits > 1 else 0
    return rows_per_split(l, tile.splits, tile.block_l) * step + partials


def can_be_part(tile: MatmulConfig, problem: MatmulProblem) -> bool:
    """Whether sums in parts of this tile do not spill.

    Compiled, by pointers: 8 bytes on sm_90 in tf32x3, of 16×128, and on sm_100 in float64, of 64×64.
    """
    if tile.tma or not problem.arch.has_tma:
        return True
    return tile.block_j <= (32 if problem.dtype == "float64" else 64 if problem.precision == "tf32x3" else 256)


def split_sum(
    whole: MatmulConfig, tiles: Iterable[MatmulConfig], problem: MatmulProblem, count: Callable[[MatmulConfig], int],
    results: int, l: int, most: int,
) -> MatmulConfig:  # fmt: skip
    """`whole`, or where that takes less, one of `tiles` with a long sum in up to `most` parts.

    count: how many there are of a tile for all the results.

    A program a processor: larger tiles in more parts read less. Sums of under 512 do little but start. By the model 16
    bits must be a tenth less; wider types, and all before Hopper, nearly half, or some are slower than `whole`.
    """
    arch, configs = problem.arch, [whole]
    for tile in tiles:
        # By the model pointers take two warps, of TF32, 2 µs a step for a tile of 64×64, and half a µs for 32×32.
        is_slow = tile.num_warps == 2 and not tile.tma
        if is_slow or max(tile.block_i, tile.block_j) > 128 or not can_be_part(tile, problem):
            continue
        splits = min(arch.processors // count(tile), l // 512, most)
        if splits > 1:
            reason = f"{tile.reason}; in parts: a long sum for few tiles"
            splits = whole_splits(l, splits, tile.block_l)
            # Compiled: left to itself, ptxas spills 4 bytes on sm_100, of 16×128. There is one program a processor.
            limit = tile.max_registers or register_limit(arch)
            configs.append(replace(tile, splits=splits, reason=reason, max_registers=limit))
    costs = [sum_cost(config, problem, count(config), results, l) for config in configs]
    chosen = configs[costs.index(min(costs))]
    pays = min(costs) < (0.9 if arch.has_tma and ITEMSIZE[problem.dtype] == 2 else 0.55) * costs[0]
    return set_stages(chosen, problem, chosen.splits * count(chosen)) if pays else whole


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
    return fit_stages(config, problem)
