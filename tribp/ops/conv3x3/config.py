"""Configs of convolutions as products over boxes of pixels, and the heuristics that choose them.

`tribp.launch.configs` says what a reason begins with, `tribp.launch.neighbors` what the parts of a problem are for.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from math import prod
from typing import NamedTuple

from ... import versions
from ...launch.arch import ITEMSIZE, Arch, cdiv, power_of_2
from ...launch.configs import (
    MAX_TILE,
    REASON_INTERPRETED,
    fit_block,
    most_parts,
    register_limit,
    registers,
    whole_splits,
)
from ...launch.matmul import (
    RESULT_REGISTERS,
    STEPS,
    MatmulConfig,
    adjusted_product,
    by_mma_sync,
    fit_stages,
    legal_tile,
    needs_registers,
)
from ...launch.neighbors import Steps, by_two, toggled
from ...launch.tiles import LONG_SUM, can_be_part, candidates, fit_tile, pick_tile, set_stages, split_sum
from .boxes import BoxSize, ConvConfig, adjusted_splits, beside, choose_box, legal_splits, sparing

DEEPEST = 192  # registers a thread may keep of wgrad's results: three of 128×128 with 8 warps


def choose_line(lengths: tuple[int, ...], n: int, q: int, dtype: str, arch: Arch) -> BoxSize | None:
    """The first box of a descriptor of wgrad that suits n images of q columns: a line of images or of columns.

    Other boxes send dz through registers (`conv3x3.wgrad`). Behind the last image neither dz nor x has anything, and an
    eighth of what is multiplied may lie there. Columns must divide the image's: a descriptor knows x's edges, but not
    dz's, and pixels that dz has not must be zero in x too.

    None where wgmma would read dz too late: three taps' products and db's take it from one tile.
    """
    if ITEMSIZE[dtype] == 2 and arch.has_wgmma and not versions.keeps_shared_tiles():
        return None
    for length in lengths:
        if 8 * cdiv(n, length) * length <= 9 * n:
            return length, 1, 1
        if q % length == 0:
            return 1, 1, length
    return None


def choose_groups_per_tile(groups: int, channels_in: int, channels_out: int, columns: int) -> int:
    """How many groups share a tile: one where it fills a matrix instruction's 16, else enough for so many columns."""
    if groups == 1 or min(channels_in, channels_out) >= 16:
        return 1
    return min(power_of_2(groups), max(1, columns // max(channels_in, channels_out)))


def one_or_three(taps: int) -> Iterator[int]:
    yield 4 - taps


def convolution(product: MatmulConfig, **extra: object) -> ConvConfig:
    """The config of a product, and what a convolution needs besides."""
    return ConvConfig(**{f.name: getattr(product, f.name) for f in fields(product)}, **extra)  # type: ignore[arg-type]


class ConvProblem(NamedTuple):
    """Forward, or dgrad: n images of p × q pixels and j columns, over nine taps of l channels, for each tile of groups.

    classes: of pixels that meet the same taps, each with p × q. along: of dgrad false, unless the weights were turned.
    whole: a step must not run past the l channels, for behind them lie another tile's, or the next pixel's.
    wide: the result's columns are contiguous. stepped: with a stride of 2.
    """

    n: int
    p: int
    q: int
    j: int
    l: int
    group_tiles: int
    groups_per_tile: int
    classes: int
    dtype: str
    precision: str
    arch: Arch
    vec: int
    tma: bool
    along: bool
    whole: bool
    wide: bool
    stepped: bool

    def steps(self) -> Steps:
        return {**STEPS, "box": beside, "flat": toggled, "splits": by_two}

    @property
    def most_splits(self) -> int:
        """Parts of the sum for whose partial results there is room; 1 where the kernel can't split it."""
        if self.classes * self.group_tiles * self.groups_per_tile > 1:
            return 1
        return most_parts(self.n * self.p * self.q * self.j, self.dtype)

    def may_be_part(self, config: MatmulConfig) -> bool:
        """Whether sums in parts of this tile do not spill.

        Compiled: by pointers, whose loop has four warps then, tf32x3 of 128×64 spills 32 to 240 bytes on sm_80. For
        stores of single columns 128×128 takes eight.
        """
        most = 64 * 64 if self.precision == "tf32x3" else 128 * 64 if self.wide else 128 * 128
        return can_be_part(config, self) and (config.tma or config.block_i * config.block_j <= most)

    def splits_of(self, config: MatmulConfig) -> int:
        """As many parts as the config has, or fewer, so that each has turns of the loop over taps and channels."""
        turns = 9 * cdiv(self.l, config.block_l)
        return whole_splits(turns, min(config.splits, self.most_splits), 1)

    @property
    def largest_tile(self) -> int:
        """Elements of a result. Compiled: where operands lie in registers beside addresses, larger ones spill."""
        if self.arch.backend != "cuda" or self.arch.has_tma:
            return MAX_TILE * MAX_TILE
        return 128 * 128 if ITEMSIZE[self.dtype] == 2 else 128 * 64 // self.classes

    def choose(self) -> ConvConfig:
        n, p, q, j, l, group_tiles, groups_per_tile, classes, dtype, _, arch, *_ = self
        i = n * p * q
        tiles = candidates(self, 9 * l)
        if arch.has_tma and tiles[0].tma and ITEMSIZE[dtype] == 2 and arch.backend != "interpreter":
            big = tiles[0]
            tiles = [tile for tile in tiles if tile.block_j < 2 * j] or tiles[-1:]  # others would be cut, a kernel each
            if 32 < j <= 64 and arch.has_wgmma:
                # Measured on an H200, 256 images of 56², 64 channels, forward and dgrad: 155 and 152 µs; 256×64 with
                # four stages 193 and 194. Other shapes and a stride of 2: derived from these.
                reason = "measured on sm_90: 128×64, three stages: three programs a processor"
                tiles.insert(0, replace(big, block_i=128, block_j=64, num_warps=4, num_stages=3, reason=reason))
            elif j <= 64:
                # Derived: with all columns in one tile the weights are what is read again, once for each box: larger
                # boxes.
                reason = "derived: 256×64: few columns"
                tiles.insert(0, replace(big, block_i=256, block_j=64, num_warps=8, num_stages=4, reason=reason))
        # Compiled: beside a result of 256 columns the addresses of pointers spill (4 bytes on sm_80, 56 unrolled), and
        # those of a store of single columns (1,064 bytes on sm_90, 7×7 images).
        tiles = [tile for tile in tiles if (tile.tma and not self.wide) or tile.block_j <= 128]
        if arch.backend == "cuda" and not arch.has_tma:
            # Compiled: deeper ones spill, too.
            shallow = [replace(tile, block_l=min(tile.block_l, 32)) for tile in tiles]
            tiles = [tile for tile in shallow if tile.block_i * tile.block_j <= self.largest_tile] or tiles[-1:]

        def covering(tile: MatmulConfig) -> int:
            box = choose_box(tile.block_i, n, p, q, wide=self.wide)
            return convolution(tile, box=box).boxes(n, p, q) * cdiv(j, tile.block_j)

        def programs(tile: MatmulConfig) -> int:
            return tile.tiles(i, j) * tile.splits * group_tiles * classes

        tiles = [fit_tile(tile, self, i, j, l) for tile in tiles]
        chosen = pick_tile(tiles, self, programs)
        if 9 * l >= LONG_SUM and self.most_splits > 1:
            parts = [tile for tile in tiles if self.may_be_part(tile)]
            chosen = split_sum(chosen, parts, self, covering, i * j, 9 * l, self.most_splits)
            chosen = replace(chosen, splits=self.splits_of(chosen))
        if self.wide and chosen.block_i * chosen.block_j == 128 * 128:
            # Compiled: beside stores of single columns four warps have no registers for tanh, and spill 384 bytes.
            chosen = replace(chosen, num_warps=8)
        chosen = set_stages(chosen, self, programs(chosen))
        if needs_registers(self, tma=chosen.tma):
            chosen = by_mma_sync(chosen, self.precision)
        if chosen.tma and self.whole and l % chosen.block_l:
            return self._replace(tma=False).choose()
        few_warps = ITEMSIZE[dtype] == 2 and chosen.block_i * chosen.block_j <= 128 * 64
        if not chosen.tma and (few_warps or chosen.splits > 1):
            chosen = replace(chosen, num_warps=min(chosen.num_warps, 4))
        # A loop over the channels of one tap that takes a single step can't be pipelined; one over all taps can.
        flat = chosen.tma or chosen.splits > 1 or (l <= chosen.block_l and chosen.num_warps <= 4)
        limit = chosen.max_registers if chosen.tma and groups_per_tile == 1 else register_limit(arch)
        config = convolution(
            replace(chosen, prefetch=False, max_registers=limit),
            box=choose_box(chosen.block_i, n, p, q, wide=self.wide),
            groups_per_tile=groups_per_tile,
            flat=flat,
        )
        if self.wide and self.precision == "tf32x3" and not arch.has_tma and config.box[0] >= 128:
            # Compiled: boxes of 128 images, stored column by column, spill 12 bytes on sm_80, outside of the loop.
            config = replace(config, block_l=min(config.block_l, 16))
        return config

    def adjusted(self, config: ConvConfig) -> ConvConfig:
        n, p, q, arch = self.n, self.p, self.q, self.arch
        if not config.tma or self.groups_per_tile > 1:
            config = replace(config, max_registers=register_limit(arch))
        config = adjusted_product(config, self)
        if prod(config.box) != config.block_i:
            config = replace(config, box=choose_box(config.block_i, n, p, q, wide=self.wide))
        flat = config.flat and (config.tma or config.num_warps <= 4)
        return replace(config, flat=flat, splits=self.splits_of(config) if flat else 1)

    def is_legal(self, config: ConvConfig) -> bool:
        n, p, q, j, l, group_tiles, groups_per_tile, _, dtype, _, arch, vec, *_ = self
        tile, chosen = config.block_i * config.block_j, self.choose()
        # A tile has its groups' columns and sum, and no more.
        diagonal = groups_per_tile > 1 and arch.backend != "interpreter"
        deepest = 32 if arch.backend == "cuda" and not arch.has_tma else chosen.block_l if diagonal else 128
        return (
            legal_tile(config, self)
            and config.block_i <= (chosen.block_i if diagonal else fit_block(MAX_TILE, n * p * q))
            # Beside more than 128 columns the addresses of pointers, and of stores of single columns, spill.
            and config.block_j <= min(fit_block(MAX_TILE, j), MAX_TILE if config.tma and not self.wide else 128)
            and (not diagonal or config.block_j == chosen.block_j)
            and config.block_l <= fit_block(deepest, l)
            and tile <= self.largest_tile
            and not (self.wide and arch.has_wgmma and tile == 128 * 128 and config.num_warps < 8)
            and registers(tile, dtype, config.num_warps, arch) <= RESULT_REGISTERS
            and (config.tma or vec * ITEMSIZE[dtype] >= 4 or not chosen.tma)
            # A step would read the next pixel.
            and not (config.tma and self.whole and l % config.block_l)
            # By pointers and with 8 warps, https://github.com/pytorch/pytorch/issues/173068: see `conv3x3.convolve`.
            and (config.tma or not config.flat or config.num_warps <= 4)
            and prod(config.box) == config.block_i
            and sparing(config, chosen, n, p, q)
            and 1 <= config.group <= 32
            and (config.group == ConvConfig.group or j > config.block_j or group_tiles > 1)
            and (config.groups_per_tile, config.taps) == (groups_per_tile, 1)
            and config.splits == self.splits_of(config)
            and (config.splits == 1 or (config.flat and self.may_be_part(config)))
        )


class ConvWgradProblem(NamedTuple):
    """dw (o × c of each tile of groups, nine taps), summed over n images of p × q pixels, and split between programs.

    spare: bytes that partial results may take, as in `linear.config.WgradProblem`.
    """

    n: int
    p: int
    q: int
    o: int
    c: int
    group_tiles: int
    groups_per_tile: int
    dtype: str
    precision: str
    arch: Arch
    vec: int
    tma: bool
    spare: int

    @property
    def along(self) -> bool:
        """Pixels of both lie across the sum."""
        return False

    def steps(self) -> Steps:
        return {**STEPS, "box": beside, "splits": by_two, "taps": one_or_three}

    def choose(self) -> ConvConfig:
        n, p, q, o, c, group_tiles, groups_per_tile, dtype, precision, arch, vec, tma, _ = self
        size = ITEMSIZE[dtype]
        # Compiled: descriptors of 16 deep tiles take two thirds of the instructions of pointers to 32 deep ones.
        line = choose_line((64, 32) if size == 2 else (32, 16), n, q, dtype, arch) if tma and arch.has_tma else None
        tma = line is not None
        # Derived: dz is read once for three taps. Compiled: three results of 128×128 fit the registers beside wgmma,
        # which reads both operands from shared memory, and the addresses of 32 deep tiles, but not those of 4-byte
        # accesses; where operands lie in registers, three of 64×32 do.
        if arch.backend == "interpreter":
            tile, taps = MatmulConfig(32, 32, 32, 1, 1, REASON_INTERPRETED), 3
        elif size == 8:
            tile, taps = MatmulConfig(64, 64, 16, 8, 2, "derived: float64: 64×64, one tap"), 1
        elif size == 4 and arch.has_wgmma:
            # Compiled: wgmma takes 64 rows and more. It can't turn float32 tiles, which lie across the sum here: they
            # would be copied once more, or be summed for db while it reads them (`conv3x3.wgrad`).
            tile, taps = MatmulConfig(32, 128, 32, 4, 3, f"compiled: {precision}: 32×128, one tap, by mma.sync"), 1
        elif size == 4:
            tile, taps = MatmulConfig(64, 64, 32, 8, 3, f"derived: {precision}: 64×64, one tap"), 1
        elif needs_registers(self, tma=tma):
            # Compiled: of three results two warps spill 1,196 bytes.
            tile, taps = MatmulConfig(64, 64, 32, 2, 3, "compiled: 64×64, one tap, by mma.sync"), 1
        elif arch.has_tma:
            # Compiled: of a single part, whose taps may lie side by side in dw, three results of 128×128 spill 20 bytes
            # on sm_90 and 36 on sm_100, by pointers.
            j = 128 if tma or (vec >= 4 and n * p * q > 16 * 32) else 64
            tile, taps = MatmulConfig(128, j, 32, 8, 3, f"compiled: 128×{j}, three taps: dz is read once for them"), 3
        else:
            tile, taps = MatmulConfig(64, 64, 32, 4, 3, "compiled: 64×64, three taps: dz is read once for them"), 3
        tile = replace(tile, block_i=fit_block(tile.block_i, o), block_j=fit_block(tile.block_j, c))
        # Counted: one warp group reads a third less of shared memory than two.
        few = tile.block_i * tile.block_j <= 64 * 64
        if few:
            tile = replace(tile, num_warps=min(tile.num_warps, 4))
        box = line or choose_box(tile.block_l, n, p, q)
        tile = replace(tile, block_l=prod(box))
        tile = replace(tile, tma=tma, max_registers=register_limit(arch) if size >= 4 or few or not tma else None)
        x_first = taps > 1 and not tma and (not arch.has_tma or arch.backend == "interpreter")
        chosen = convolution(tile, box=box, groups_per_tile=groups_per_tile, taps=taps, x_first=x_first)
        chosen = fit_stages(chosen, self, self._ones(chosen))
        programs = chosen.tiles(o, c) * group_tiles * (9 // taps)
        resident = arch.processors if taps * tile.block_i * tile.block_j > 128 * 128 else 2 * arch.processors
        splits = max(1, min(resident // programs, cdiv(chosen.boxes(n, p, q), 8), self.most_splits))
        return replace(chosen, splits=whole_splits(chosen.boxes(n, p, q), splits, 1))

    def adjusted(self, config: ConvConfig) -> ConvConfig:
        n, p, q, dtype, arch = self.n, self.p, self.q, self.dtype, self.arch
        if needs_registers(self, tma=config.tma):
            config = replace(config, taps=1)
        config = replace(config, x_first=config.x_first and not config.tma)
        line = choose_line((config.block_l,), n, q, dtype, arch) if config.tma else None
        if line or prod(config.box) != config.block_l:
            config = replace(config, box=line or choose_box(config.block_l, n, p, q))
        config = adjusted_product(config, self, self._ones(config))
        return adjusted_splits(config, n, p, q)

    @property
    def most_splits(self) -> int:
        return most_parts(9 * self.o * self.c * self.group_tiles, self.dtype, self.spare)

    def _ones(self, config: ConvConfig) -> int:
        """16 columns of ones, by which dz of 16 bits is multiplied for db: they stay in shared memory."""
        return 16 * config.block_l if ITEMSIZE[self.dtype] == 2 and self.arch.has_tma else 0

    def is_legal(self, config: ConvConfig) -> bool:
        n, p, q, o, c, _, groups_per_tile, dtype, _, arch, vec, *_ = self
        results, chosen = config.taps * config.block_i * config.block_j, self.choose()
        return (
            legal_tile(config, self, self._ones(config))
            and config.block_i <= fit_block(128, o)
            and config.block_j <= fit_block(128, c)
            and config.block_l <= 128
            and config.taps in ((1,) if needs_registers(self, tma=config.tma) else (1, 3))
            and registers(results, dtype, config.num_warps, arch) <= (DEEPEST if arch.has_tma else DEEPEST // 2)
            and (config.tma or vec * ITEMSIZE[dtype] >= 4 or not chosen.tma)
            # A descriptor's box is a line: it knows x's edges, but not dz's.
            and (not config.tma or config.box == choose_line((config.block_l,), n, q, dtype, arch))
            and prod(config.box) == config.block_l
            and sparing(config, chosen, n, p, q)
            and legal_splits(config, n, p, q, self.most_splits)
            and (config.groups_per_tile, config.group) == (groups_per_tile, ConvConfig.group)
        )
