"""Configs of convolutions of few input channels."""

from dataclasses import replace
from math import prod
from typing import NamedTuple

from ... import versions
from ...launch.arch import ITEMSIZE, Arch, cdiv, power_of_2
from ...launch.configs import (
    MAX_TILE,
    REASON_INTERPRETED,
    fit_block,
    legal_threads,
    most_parts,
    register_limit,
    registers,
)
from ...launch.matmul import RESULT_REGISTERS, stages_in_memory
from ...launch.neighbors import Steps, all_registers, by_one, by_two, differs_by_steps
from .boxes import ConvConfig, adjusted_splits, beside, choose_box, legal_splits, sparing, with_rows, with_splits

FEW_CHANNELS = 7  # input channels up to which nine taps of them fit the 64 summed elements of one product


def few_channels_stages(dtype: str, arch: Arch) -> int:
    """The stages that `few_channels_wgrad` may have.

    Compiled: with two, wgmma reads float32 tiles where `cp.async` brings the next ones, or registers that are refilled.
    """
    early = arch.has_wgmma and (ITEMSIZE[dtype] == 4 or not versions.fences_copies())
    return 1 if early or arch.backend == "interpreter" else 2


class FewChannelsProblem(NamedTuple):
    """Few input channels. Forward: rows of pixels, and three products of 3·c summed elements for each of them.

    wgrad: one of 9·c columns for a box of pixels. fused: it forms dz on load. summed: it adds dz up, for db.
    """

    n: int
    p: int
    q: int
    o: int
    c: int
    dtype: str
    arch: Arch
    wgrad: bool
    fused: bool = False
    summed: bool = False

    def steps(self) -> Steps:
        return dict(
            box=beside, num_warps=by_two, num_stages=by_one, block_i=by_two, block_j=by_two, block_l=by_two,
            splits=by_two, max_registers=all_registers,
        )  # fmt: skip

    def choose(self) -> ConvConfig:
        n, p, q, o, c, dtype, arch, wgrad, fused, summed = self
        k = max(16, power_of_2(9 * c))
        if arch.backend == "interpreter":
            pixels, warps, reason = 32, 1, REASON_INTERPRETED
        elif ITEMSIZE[dtype] == 8:
            pixels, warps, reason = 16 if wgrad else 32, 4, "derived: float64: two registers an element"
        elif ITEMSIZE[dtype] == 4:
            pixels, warps, reason = 32 if wgrad else 64, 4, "derived: float32: both halves of tf32x3 in registers"
        else:
            # Counted: by mma.sync four warps of wgrad read a tile of x four times from shared memory, two read it
            # twice.
            warps = 2 if wgrad and not fused and arch.backend == "cuda" and not arch.has_tma else 4
            pixels, reason = 32 * warps, "derived: a pixel a thread, which knows its taps when it is compiled"
            if fused:
                pixels, reason = 64, "compiled: dz and its sums fit registers"
        channels = fit_block(64 if ITEMSIZE[dtype] <= 4 and arch.backend != "interpreter" else 32, o)
        if not wgrad:
            k = max(16, power_of_2(3 * c))
            if arch.backend == "cuda" and not arch.has_tma:
                # Compiled: weights lie in registers; beside twice the pixels they spill, up to 668 bytes.
                pixels >>= (ITEMSIZE[dtype] == 4) + (k > 16)
            box = choose_box(pixels, n, 1, q, wide=True)
            chosen = ConvConfig(pixels, channels, k, warps, 1, reason, box=box, max_registers=self._limit)
            return with_rows(chosen, n, p, q, cdiv(o, channels), arch)
        box = choose_box(pixels, n, p, q, wide=True)
        stages = few_channels_stages(dtype, arch)
        if arch.backend == "cuda" and (ITEMSIZE[dtype] > 2 or (fused and summed)):
            # Counted: two stages lie in shared memory without swizzle if ldmatrix cannot transpose the type, or if the
            # product and the sum read them in different layouts: up to 32 threads then read one bank. 256×3→64, 224²,
            # on sm_80, bfloat16 with sigmoid and bias: 1,011,220 cycles of shared memory a program, and 202,772.
            stages = 1
        chosen = ConvConfig(channels, k, pixels, warps, stages, reason, box=box, max_registers=self._limit)
        return with_splits(chosen, n, p, q, cdiv(o, channels), arch)

    @property
    def _limit(self) -> int | None:
        """Of registers. Measured on an H200, 256×3→64 of 224², forward and wgrad with 255 allowed: 770 and 846 µs with
        181 and 175 registers (Triton 3.6); as ptxas rounds them, 152 and 111, 597 and 626. Compiled: before Hopper a
        wgrad that forms dz on load spills 16 bytes if they are rounded.
        """
        return None if ITEMSIZE[self.dtype] == 2 and self.arch.has_wgmma else register_limit(self.arch)

    def adjusted(self, config: ConvConfig) -> ConvConfig:
        if not self.wgrad:
            return replace(config, block_i=config.box[0] * config.box[2])
        n, p, q = self.n, self.p, self.q
        if prod(config.box) != config.block_l:
            config = replace(config, box=choose_box(config.block_l, n, p, q, wide=True))
        stages = min(few_channels_stages(self.dtype, self.arch), stages_in_memory(config, self.dtype, self.arch))
        return adjusted_splits(replace(config, num_stages=min(config.num_stages, stages)), n, p, q)

    def is_legal(self, config: ConvConfig) -> bool:
        n, p, q, o, c, dtype, arch, wgrad = self.n, self.p, self.q, self.o, self.c, self.dtype, self.arch, self.wgrad
        chosen = self.choose()
        i, j, l = config.block_i, config.block_j, config.block_l
        largest = max(i * j, i * l, j * l) if wgrad else i * j
        return (
            legal_threads(config, arch)
            and min(i, j, l) >= 16
            and (i if wgrad else j) <= fit_block(128, o)
            # All that a pixel meets is one step: of wgrad nine taps, else a row of three.
            and (j == chosen.block_j and l <= MAX_TILE if wgrad else (i, l) == (chosen.block_i, chosen.block_l))
            and prod(config.box) == (l if wgrad else i * config.box[1])
            and registers(largest, dtype, config.num_warps, arch) <= RESULT_REGISTERS
            and 1 <= config.num_stages <= (few_channels_stages(dtype, arch) if wgrad else 1)
            and sparing(config, chosen, n, p, q)
            and (legal_splits(config, n, p, q, most_parts(9 * o * c, dtype)) if wgrad else config.splits == 1)
        )


class FewChannelsDgradProblem(NamedTuple):
    """dx of few input channels, n images of h × w: rows of dz, one after the other, times nine taps of four channels.

    A descriptor's box is a line of columns: of others a reshape would send dz through registers (`conv3x3.convolve`).
    """

    n: int
    h: int
    w: int
    o: int
    dtype: str
    precision: str
    arch: Arch
    tma: bool

    def steps(self) -> Steps:
        return dict(box=beside, num_warps=by_two, num_stages=by_one, max_registers=all_registers)

    def choose(self) -> ConvConfig:
        n, h, w, o, dtype, arch, tma = self.n, self.h, self.w, self.o, self.dtype, self.arch, self.tma
        block_l = fit_block(128, o)
        if arch.backend == "interpreter":
            pixels, warps, stages, reason = 32, 1, 1, REASON_INTERPRETED
        else:
            # Compiled: of longer rows a thread holds more weights, and spills beside the products of 128 pixels on
            # sm_80.
            pixels = 128 if block_l * ITEMSIZE[dtype] <= 128 else 64
            warps, reason = 4, "derived: 16 KB a stage: three in flight, of each of two programs a processor or more"
            stages = 2 if arch.backend == "hip" else 4
        tma = tma and arch.has_tma
        if not tma:
            stages = stages if few_channels_stages(dtype, arch) > 1 else 1
        narrowest = min(64, pixels) if tma else 8
        widths = [k for k in (128, 64, 32, 16, 8) if narrowest <= k <= pixels]
        columns = min(widths, key=lambda columns: cdiv(w, columns - 2) * columns)
        images = 1 if tma else pixels // columns
        chosen = ConvConfig(
            images * columns, 64, block_l, warps, stages, reason, tma=tma, box=(images, 1, columns),
            max_registers=register_limit(arch),
        )  # fmt: skip
        return with_rows(chosen, n, h, w, 1, arch, rim=2)

    def adjusted(self, config: ConvConfig) -> ConvConfig:
        return config

    def is_legal(self, config: ConvConfig) -> bool:
        chosen, size = self.choose(), ITEMSIZE[self.dtype]
        images, rows, columns = config.box
        # Weights, and what is exchanged, take 16 KB.
        copies = config.num_stages - (not self.arch.has_tma) if config.num_stages > 1 else 0
        return (
            legal_threads(config, self.arch)
            and differs_by_steps(self, config)
            and (images, columns) == (chosen.box[0], chosen.box[2])
            and 1 <= rows <= MAX_TILE
            and (config.num_stages == 1 if chosen.num_stages == 1 else config.num_stages >= 1)
            and copies * config.block_i * config.block_l * size < self.arch.shared_memory - 16 * 1024
        )
