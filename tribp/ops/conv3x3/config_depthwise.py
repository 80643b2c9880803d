"""Configs of convolutions of each channel by itself."""

from dataclasses import replace
from math import prod
from typing import NamedTuple

from ...launch.arch import ITEMSIZE, Arch, cdiv, power_of_2
from ...launch.configs import MAX_TILE, REASON_INTERPRETED, legal_threads, most_parts, register_limit
from ...launch.neighbors import Steps, all_registers, by_two
from .boxes import ConvConfig, adjusted_splits, beside, choose_box, legal_splits, with_rows, with_splits


class DepthwiseProblem(NamedTuple):
    """Each channel by itself: a few rows of pixels × channels, wide in what is contiguous."""

    n: int
    p: int
    q: int
    c: int
    dtype: str
    arch: Arch
    channels_last: bool
    wgrad: bool
    crowded: bool = False  # a costly activation, or a stride: registers are short

    def steps(self) -> Steps:
        return dict(num_warps=by_two, max_registers=all_registers, box=beside, block_j=by_two, splits=by_two)

    def choose(self) -> ConvConfig:
        n, p, q, c, dtype, arch, channels_last, wgrad, crowded = self
        most = 64  # channels
        if arch.backend == "interpreter":
            elements, rows, warps, reason = 256, 2, 1, REASON_INTERPRETED
        else:
            threads = 256 if arch.backend == "hip" else 128
            elements, rows, warps = threads * max(4, 16 // ITEMSIZE[dtype]), 4, 4
            reason = "compiled: 16 bytes a thread to a row; rows share what they read"
            if not channels_last or (wgrad and ITEMSIZE[dtype] == 8) or c % (16 // ITEMSIZE[dtype]):
                # Compiled: nine weights of each of 8 channels a thread, or sums of two registers, or rows of single
                # elements spill.
                elements //= 2
            elif ITEMSIZE[dtype] == 2 and arch.has_wgmma and not crowded and c % 128 == 0:
                # Compiled: others spill, up to 236 bytes (120 channels; 64 with a stride of 2; 32; tanh with Triton
                # 3.9), and rows that are not whole boxes of eight 76.
                # 64×384 of 56², µs: forward and dgrad with 1,024 elements a row 141, 142, with 2,048 113, 109; wgrad
                # with boxes of four rows 162, of eight 142, by two warps 130: its programs then are there all at once.
                if wgrad:
                    elements, rows, warps = elements // 2, 4 if p % 8 else 8, 2
                else:
                    elements, most = 2 * elements, 128
                reason = "measured on sm_90: two accesses of 16 bytes a thread to a row, or eight rows by two warps"
        if channels_last:
            channels = min(power_of_2(c), most)
            images, _, columns = choose_box(min(elements // channels, MAX_TILE), n, 1, q)
        else:
            columns = min(power_of_2(q), 128)
            channels = min(power_of_2(c), elements // columns, MAX_TILE)
            images = min(elements // columns // channels, MAX_TILE)
        box = (images, min(rows, power_of_2(p)), columns)
        chosen = ConvConfig(
            images * columns, channels, 1, warps, 1, reason, box=box, max_registers=register_limit(arch)
        )
        if not wgrad:
            # What begins and ends a box's rows makes fours of them.
            return with_rows(chosen, n, p, q, cdiv(c, channels), arch, choices=(30, 14, 6))
        return with_splits(chosen, n, p, q, cdiv(c, channels), arch)

    def adjusted(self, config: ConvConfig) -> ConvConfig:
        config = replace(config, block_i=config.box[0] * config.box[2])
        return adjusted_splits(config, self.n, self.p, self.q) if self.wgrad else config

    def is_legal(self, config: ConvConfig) -> bool:
        n, p, q, c, dtype, arch, wgrad = self.n, self.p, self.q, self.c, self.dtype, self.arch, self.wgrad
        images, rows, columns = config.box
        chosen, channels = self.choose(), config.block_j

        def covered(s: ConvConfig) -> int:
            return s.boxes(n, p, q) * prod(s.box) * cdiv(c, s.block_j) * s.block_j

        return (
            legal_threads(config, arch, wgmma=False)
            and config.block_i == images * columns
            and 1 <= rows <= (8 if wgrad else 64)  # rows of wgrad are unrolled
            and max(images, columns, channels) <= MAX_TILE
            and 64 <= images * columns * channels <= 2048
            and 4 * covered(config) <= 5 * covered(chosen)
            and (legal_splits(config, n, p, q, most_parts(9 * c, dtype)) if wgrad else config.splits == 1)
        )
