"""Configs of passes from one layout to another."""

from dataclasses import dataclass
from typing import NamedTuple

from ...launch.arch import ITEMSIZE, Arch, cdiv, power_of_2
from ...launch.configs import REASON_INTERPRETED, SECOND_AXIS, legal_threads, most_parts, register_limit
from ...launch.neighbors import Steps, all_registers, by_two


@dataclass(frozen=True)
class RelayoutConfig:
    """Of a pass from one layout to another: `tiles` tiles of block_p pixels, block_c channels."""

    block_p: int
    block_c: int
    tiles: int
    num_warps: int
    reason: str
    max_registers: int | None = None


class RelayoutProblem(NamedTuple):
    """A pass over n images of p pixels and c channels."""

    n: int
    p: int
    c: int
    dtype: str
    arch: Arch

    def steps(self) -> Steps:
        return dict(tiles=by_two, block_p=by_two, block_c=by_two, num_warps=by_two, max_registers=all_registers)

    def choose(self) -> RelayoutConfig:
        n, p, c, dtype, arch = self
        if arch.backend == "interpreter":
            return RelayoutConfig(32, 32, 2, 1, REASON_INTERPRETED)
        # Compiled: 64 channels of a weight take 72 registers, for its taps make no wide access; images beside it take
        # 56.
        block_c = min(64 if p > 9 else 32, max(8, power_of_2(c)))
        block_p = min(2048 // block_c, max(16, power_of_2(p)))
        if ITEMSIZE[dtype] == 8:
            block_p = max(1, block_p // 2)
        programs = max(1, 8 * arch.processors // cdiv(c, block_c))
        tiles = cdiv(n * cdiv(p, block_p), programs)
        reason = "derived: 16 elements a thread, 64 × 32: whole sectors on either side"
        return RelayoutConfig(block_p, block_c, tiles, 4, reason, register_limit(arch))

    def adjusted(self, config: RelayoutConfig) -> RelayoutConfig:
        return config

    def is_legal(self, config: RelayoutConfig) -> bool:
        n, p, c, dtype, arch = self
        programs, chosen = (cdiv(n * cdiv(p, s.block_p), s.tiles) for s in (config, self.choose()))
        return (
            legal_threads(config, arch)
            and programs <= min(SECOND_AXIS, max(chosen, most_parts(c, dtype)))
            and 1 <= config.block_p <= min(1024, max(16, power_of_2(p)))
            and 8 <= config.block_c <= min(256, max(32, power_of_2(c)))
            and 64 <= config.block_p * config.block_c <= 4096
        )
