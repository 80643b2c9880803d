"""Configs of `reduce_partials`, the second pass of every split sum."""

from dataclasses import dataclass
from typing import NamedTuple

from .arch import Arch, power_of_2
from .configs import REASON_INTERPRETED, is_compilable
from .neighbors import Steps, by_two


@dataclass(frozen=True)
class ReduceConfig:
    """Of `reduce_partials`."""

    block_parts: int
    block: int
    num_warps: int
    reason: str


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
