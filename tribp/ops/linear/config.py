"""Configs of the linear layer's kernels, a problem for each.

Each problem chooses by the heuristics of `tribp.launch.tiles`; `tribp.launch.neighbors` says what its parts are for.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ...launch.arch import ITEMSIZE, Arch, cdiv
from ...launch.configs import (
    REASON_INTERPRETED,
    SECOND_AXIS,
    fit_block,
    legal_threads,
    most_parts,
    register_limit,
    whole_splits,
)
from ...launch.matmul import (
    STEPS,
    MatmulConfig,
    MatmulProblem,
    adjusted_product,
    feeds_wgmma,
    fit_stages,
    legal_product,
    needs_registers,
)
from ...launch.neighbors import Steps, by_one, by_two, differs_by_steps, toggled
from ...launch.tiles import (
    LONG_SUM,
    can_be_part,
    candidates,
    choose_product,
    counts_by_wgmma,
    fills_gpu,
    fit_tile,
    prefer_tall_tiles,
    split_sum,
    sum_cost,
)


@dataclass(frozen=True)
class ElementwiseConfig:
    """Of a pass over a matrix: a program takes `rows` × `block_n` of it, `block_m` rows at a time."""

    block_m: int
    block_n: int
    rows: int
    num_warps: int
    reason: str
    max_registers: int | None = None


def has_room(config: MatmulConfig, problem: MatmulProblem) -> bool:
    """Whether an epilogue that takes registers has them beside the result.

    Compiled, on sm_100: beside 128×256 a tanh spills 24 bytes, a tile of the layer below's output 4. On gfx942: beside
    128×128 in float64 a tanh spills 36.
    """
    large = problem.arch.backend == "hip" and problem.dtype == "float64"
    return problem.arch.has_wgmma or config.block_i * config.block_j <= 128 * (64 if large else 128)


class ForwardProblem(NamedTuple):
    """y (m × n) = act(x·wᵀ + b), summed over k. What says how operands lie: `tribp.launch.matmul.MatmulProblem`."""

    m: int
    n: int
    k: int
    dtype: str
    precision: str
    arch: Arch
    vec: int
    tma: bool
    along: bool = True
    costly: bool = False  # the activation

    def steps(self) -> Steps:
        return {**STEPS, "persistent": toggled, "splits": by_two}

    @property
    def most_splits(self) -> int:
        return min(SECOND_AXIS, most_parts(self.m * self.n, self.dtype))

    def choose(self) -> MatmulConfig:
        m, n, k = self[:3]
        chosen = choose_product(self, m, n, k)
        if k >= LONG_SUM:
            tiles = [fit_tile(tile, self, m, n, k) for tile in candidates(self, k)]
            chosen = split_sum(chosen, tiles, self, lambda tile: tile.tiles(m, n), m * n, k, self.most_splits)
        if chosen.splits > 1:
            return chosen
        if self.costly and not has_room(chosen, self):
            chosen = self.adjusted(replace(chosen, block_j=chosen.block_j // 2))
        if chosen.tma and chosen.block_i * chosen.block_j > 128 * 128 and chosen.tiles(m, n) > 2 * self.arch.processors:
            # Published for Triton on an H100: 84–92 % of cuBLAS with persistent programs, 75–85 % with a program a
            # tile. Compiled: the next tile's loads start under the output's store, not under its sigmoid, and the
            # output tile stays in shared memory beside the stages (213 KB with three). The model sees no difference:
            # measure it first.
            reason = chosen.reason + "; persistent: more than two waves of them"
            chosen = fit_stages(replace(chosen, persistent=True, reason=reason), self)
        return chosen

    def adjusted(self, config: MatmulConfig) -> MatmulConfig:
        config = adjusted_product(config, self)
        persistent, prefetch = config.persistent and config.tma, config.prefetch and not config.tma
        splits = 1 if persistent else whole_splits(self.k, config.splits, config.block_l)
        return replace(config, persistent=persistent, prefetch=prefetch, splits=splits)

    def is_legal(self, config: MatmulConfig) -> bool:
        return (
            config.splits <= self.most_splits
            and (config.splits == 1 or (not config.persistent and can_be_part(config, self)))
            and not config.fuse_dz
            and config.persistent <= config.tma
            and (has_room(config, self) or not self.costly)
            and legal_product(config, self, self.m, self.n, self.k)
        )


class DgradProblem(NamedTuple):
    """dx (m × k) = dz·w, summed over n. A weight's rows lie across the sum, unless `along` says otherwise."""

    m: int
    n: int
    k: int
    dtype: str
    precision: str
    arch: Arch
    vec: int
    tma: bool
    may_fuse: bool  # nobody else needs dz, so it may be formed on the way in
    along: bool = False
    for_lower: bool = False  # dx becomes the dz of the layer below, whose output is read, too

    @property
    def is_split(self) -> bool:
        """Whether it should be left to `forward`, as the product of dz and wᵀ: that splits long sums for few tiles.

        It must save the passes that this kernel does without, over the lower layer's dz and to form its own.
        """
        m, n, k, arch = self.m, self.n, self.k, self.arch
        problem = ForwardProblem(m, k, n, *self[3:8], along=self.along)
        chosen = problem.choose()
        if chosen.splits == 1:
            return False
        passes = [m * k] * self.for_lower + [m * n] * self.may_fuse
        costs = [sum_cost(c, self, c.tiles(m, k), m * k, n) for c in (choose_product(problem, m, k, n), chosen)]
        saved = costs[0] - costs[1]
        return saved > sum(100_000 + 3 * elements / arch.processors for elements in passes)

    def steps(self) -> Steps:
        return {**STEPS, "fuse_dz": toggled}

    def choose(self) -> MatmulConfig:
        chosen = choose_product(self, self.m, self.k, self.n)
        if self.for_lower and not has_room(chosen, self):
            chosen = self.adjusted(replace(chosen, block_j=chosen.block_j // 2))
        if self.for_lower and chosen.block_i * chosen.block_j == 128 * 128:
            # Compiled: beside the layer below's output four warps spill up to 290 bytes. Eight take 168 registers, and
            # with them a whole processor (measured on an H200: 54 µs for 31 without that output, 8192×1024×1024); of
            # 128, two programs share one.
            limit = 128 if feeds_wgmma(chosen, self) else chosen.max_registers
            chosen = replace(chosen, num_warps=8, max_registers=limit)
        may_fuse = self.may_fuse and not needs_registers(self, tma=self.tma)
        chosen = fuse_dz(chosen, self) if may_fuse else chosen
        return chosen if chosen.fuse_dz or self.along else self._shallow(chosen)

    def _shallow(self, chosen: MatmulConfig) -> MatmulConfig:
        """32 deep in four stages, three programs a processor at a time, where it has four.

        Measured on an H200, a backward pass, µs, 64 and 32 deep: 8192×512×1024 55.0 and 51.7, 4096×1024×2048 78.1 and
        73.8, 8192×1024×1024 80.2 and 77.7. Of eight programs a processor and more it is a tie: 16384×1024×1024 137.8
        and 135.4, 65536×1024×256 185.4 and 187.5, 8192×1024×4096 206 and 214. Forward, whose weights lie along the
        sum, loses: 33.1 and 36.3.
        """
        tiles, each = chosen.tiles(self.m, self.k), self.arch.processors
        of_four = (chosen.block_i, chosen.block_j, chosen.num_warps) == (128, 128, 4)
        if not (of_four and feeds_wgmma(chosen, self) and 3 * each < tiles <= 4 * each):
            return chosen
        reason = "measured on sm_90: 128×128, 32 deep: three programs a processor at a time"
        return replace(chosen, block_l=fit_block(32, self.n), num_stages=4, reason=reason)

    def adjusted(self, config: MatmulConfig) -> MatmulConfig:
        return adjusted_fusion(config, self)

    def is_legal(self, config: MatmulConfig) -> bool:
        plain = config.splits == 1 and not config.persistent
        if self.for_lower:
            spills = config.block_i * config.block_j == 128 * 128 and config.num_warps < 8
            plain = plain and has_room(config, self) and not spills
        return plain and legal_fusion(config, self, self.m, self.k, self.n)


class WgradProblem(NamedTuple):
    """dw (n × k) = dzᵀ·x, summed over m, split between programs where the result alone can't fill the GPU.

    The splits depend on the shape and the GPU alone, so the sums have one order.
    """

    m: int
    n: int
    k: int
    dtype: str
    precision: str
    arch: Arch
    vec: int
    tma: bool
    may_fuse: bool
    spare: int  # bytes that float32 partial results may take: what torch would have allocated here, and tribp does not

    def steps(self) -> Steps:
        return {**STEPS, "fuse_dz": toggled, "splits": by_two}

    @property
    def along(self) -> bool:
        """Rows of both lie across the sum."""
        return False

    @property
    def most_splits(self) -> int:
        """Splits for whose partial results there is room.

        Measured on an H200: dw and db of 1000×77×333 by 6 programs, for which alone dy's 154 KB have room, took 23 µs;
        by 24, and dx besides, 20.
        """
        return most_parts(self.n * self.k, self.dtype, self.spare)

    def choose(self) -> MatmulConfig:
        m, n, k, arch, room = self.m, self.n, self.k, self.arch, self.most_splits

        def most_splits(tile: MatmulConfig) -> int:
            """Splits of under eight steps, where loads run ahead, do little but write partial results."""
            return max(1, min(cdiv(m, 256 if tile.prefetch else 8 * tile.block_l), room))

        tiles = prefer_tall_tiles(candidates(self, m), n, k)
        enough = [tile for tile in tiles if fills_gpu(tile.tiles(n, k) * most_splits(tile), arch)]
        chosen = fit_tile((enough or tiles[-1:])[0], self, n, k, m)
        if self.may_fuse and not needs_registers(self, tma=self.tma):
            chosen = fuse_dz(chosen, self)
        area = chosen.block_i * chosen.block_j
        resident = arch.processors if area > 128 * 128 else 2 * arch.processors
        splits = max(1, min(resident // chosen.tiles(n, k), most_splits(chosen)))
        if area >= 128 * 128 and counts_by_wgmma(self, tiles):
            most = min(4 * arch.processors // chosen.tiles(n, k), most_splits(chosen))
            # By the model 8192×768×3072, of 72 tiles, takes 103 µs whole, and 78 in three parts.
            possible = range(1, max(most, 1) + 1)
            tiled, results = chosen.tiles(n, k), n * k
            splits = min(possible, key=lambda s: sum_cost(replace(chosen, splits=s), self, tiled, results, m))
        return replace(chosen, splits=whole_splits(m, splits, chosen.block_l))

    def adjusted(self, config: MatmulConfig) -> MatmulConfig:
        config = adjusted_fusion(config, self)
        return replace(config, splits=whole_splits(self.m, config.splits, config.block_l))

    def is_legal(self, config: MatmulConfig) -> bool:
        plain = config.splits <= min(SECOND_AXIS, self.most_splits) and not config.persistent
        return plain and legal_fusion(config, self, self.n, self.k, self.m)


class BackwardProblem(NamedTuple):
    """dx (m × k) = dz·w and dw (n × k) = dzᵀ·x in one pass over x, of few outputs n.

    A program takes block_j columns of x, block_i rows at a time, and keeps what belongs to these columns of w and dw,
    for all of the block_l outputs; the rows are split as those of `WgradProblem`.
    """

    m: int
    n: int
    k: int
    dtype: str
    precision: str
    arch: Arch
    vec: int  # of x

    def steps(self) -> Steps:
        return dict(num_stages=by_one, block_i=by_two, block_j=by_two, splits=by_two)

    @property
    def pays(self) -> bool:
        """Whether w and dw have room beside the rest, and loads of x run ahead: narrower ones than four bytes do not.

        By bytes it pays for as many outputs as there is room for: dz and x are read once, not twice.
        """
        itemsize = ITEMSIZE[self.dtype]
        return self.n <= (64 if itemsize == 2 else 16) and self.vec * itemsize >= 4

    def choose(self) -> MatmulConfig:
        m, n, k, dtype, arch = self.m, self.n, self.k, self.dtype, self.arch
        if arch.backend == "interpreter":
            chosen = MatmulConfig(32, 32, 16, 1, 1, REASON_INTERPRETED)
        else:
            # Compiled: w lies in registers, all of a column block in each warp, and with twice as many rows, columns or
            # outputs it spills. Memory takes as long as two warps on each scheduler, and mma.sync, which two warps a
            # program go to, keeps up with it; wgmma needed 15 instructions an element for 18, and (before Triton 3.7)
            # descriptors, which a dz of few columns cannot have.
            rows, columns = {"float64": (16, 32), "float32": (32, 32)}.get(dtype, (16 if n > 32 else 32, 64))
            reason = f"compiled: w and dw in registers, beside {rows}×{columns} of dx"
            chosen = MatmulConfig(rows, columns, 16, 2, 4, reason, max_registers=register_limit(arch))
        chosen = replace(
            chosen, block_i=fit_block(chosen.block_i, m), block_j=fit_block(chosen.block_j, k), block_l=fit_block(64, n)
        )
        # Derived: four programs of two warps have a processor's registers; under four steps a split does little but
        # write partial results.
        splits = max(1, min(4 * arch.processors // cdiv(k, chosen.block_j), cdiv(m, 4 * chosen.block_i)))
        return replace(chosen, splits=whole_splits(m, splits, chosen.block_i))

    def adjusted(self, config: MatmulConfig) -> MatmulConfig:
        return replace(config, splits=whole_splits(self.m, config.splits, config.block_i))

    def is_legal(self, config: MatmulConfig) -> bool:
        n, k, dtype, arch = self.n, self.k, self.dtype, self.arch
        most, itemsize = self.choose(), ITEMSIZE[dtype]
        stage = config.block_i * (config.block_j + 2 * config.block_l) * itemsize  # x, dy and y
        return (
            legal_threads(config, arch, wgmma=False)
            and 16 <= config.block_i <= most.block_i
            and 16 <= config.block_j <= most.block_j
            and 1 <= config.num_stages <= (1 if arch.backend == "interpreter" else (arch.shared_memory - 1024) // stage)
            and config.splits <= max(most.splits, most_parts(n * k, dtype))
            and differs_by_steps(self, config)
        )


def fuse_dz(chosen: MatmulConfig, of: "DgradProblem | WgradProblem") -> MatmulConfig:
    """Form dz while loading, if few tile columns repeat that work and descriptors load the tiles.

    A pass of its own reads dy and y and writes dz, and the product reads that again: four units of memory where the
    fused form has two. But the loop has three times the instructions, once for each tile column. Measured on an H200,
    backward, fused and not: one tile column (65536×1024×256) 183 and 229 µs; four (65536×256×784) 204 and 182,
    (8192×1024×1024) 102 and 92. Interpolated, the fused form is the faster one for two tile columns and no more; and
    for four where dz has few elements: they cost a µs for each million, and a launch two.
    Compiled: with pointers the fused wgrad spills up to 230 bytes on sm_90, and up to 1,300 where operands lie in
    registers; so it is not for products that `needs_registers` keeps from wgmma.
    """
    most = 4 if of.m * of.n <= 1 << 20 else 2
    if cdiv(of.k, chosen.block_j) > most or not chosen.tma:
        return chosen
    reason = f"{chosen.reason}; dz formed on load: at most {most} tile columns"
    return fit_stages(shallow(replace(chosen, fuse_dz=True, reason=reason)), of)


def shallow(config: MatmulConfig) -> MatmulConfig:
    """Compiled: beside a 128×256 result dy and y leave no registers for 64 deep tiles (255, and a spill), nor beside a
    128×128 result of four warps (40 bytes with Triton 3.5).
    """
    tile = config.block_i * config.block_j if config.fuse_dz else 0
    if tile > 128 * 128:
        return replace(config, block_l=min(config.block_l, 32))
    return replace(config, num_warps=max(config.num_warps, 8)) if tile == 128 * 128 else config


def adjusted_fusion(config: MatmulConfig, of: DgradProblem | WgradProblem) -> MatmulConfig:
    fuses = config.fuse_dz and config.tma and not needs_registers(of, tma=config.tma)
    return adjusted_product(shallow(replace(config, fuse_dz=fuses, prefetch=config.prefetch and not config.tma)), of)


def legal_fusion(config: MatmulConfig, of: DgradProblem | WgradProblem, i: int, j: int, l: int) -> bool:
    by_registers = needs_registers(of, tma=config.tma)
    fusable = of.may_fuse and config.tma and not by_registers and config == shallow(config)
    return (fusable or not config.fuse_dz) and legal_product(config, of, i, j, l)


class OutputGradProblem(NamedTuple):
    """The pass that writes dz and partial sums of db."""

    m: int
    n: int
    dtype: str
    arch: Arch

    def steps(self) -> Steps:
        return dict(rows=by_two, block_m=by_two, block_n=by_two, num_warps=by_two)

    def choose(self) -> ElementwiseConfig:
        m, n, dtype, arch = self
        if arch.backend == "interpreter":
            return ElementwiseConfig(16, 32, 32, 1, REASON_INTERPRETED)
        block_n = fit_block(128, n)
        block_m = max(1, 4096 // block_n if ITEMSIZE[dtype] <= 4 else 2048 // block_n)
        blocks = cdiv(m, block_m)
        # Measured on an H200, dw and db of 65536×256×784 with four programs a processor and two: 104 and
        # 97 µs; of 8192×1024×1024 57 and 57.
        programs = max(1, 2 * arch.processors // cdiv(n, block_n))
        rows = cdiv(blocks, programs) * block_m
        reason = "derived: 16 elements a thread: two 16-byte loads of dy and of y in flight"
        return ElementwiseConfig(block_m, block_n, rows, 8, reason)

    def adjusted(self, config: ElementwiseConfig) -> ElementwiseConfig:
        return replace(config, rows=cdiv(max(config.rows, config.block_m), config.block_m) * config.block_m)

    def is_legal(self, config: ElementwiseConfig) -> bool:
        m, n, dtype, arch = self
        parts, chosen = cdiv(m, config.rows), self.choose()
        return (
            legal_threads(config, arch)
            and (parts <= min(SECOND_AXIS, most_parts(n, dtype)) or config.rows >= chosen.rows)
            and config.rows % config.block_m == 0
            and config.block_m >= 1
            and 16 <= config.block_n <= fit_block(1024, max(n, 32))
            and config.block_m * config.block_n <= 8192
        )
