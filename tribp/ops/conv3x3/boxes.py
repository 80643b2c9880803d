"""Boxes of pixels, and the config that says how a convolution is divided into them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from ...launch.arch import Arch, cdiv
from ...launch.configs import MAX_TILE, SECOND_AXIS, whole_splits
from ...launch.matmul import MatmulConfig

BoxSize = tuple[int, int, int]


@dataclass(frozen=True)
class ConvConfig(MatmulConfig):
    """Of a convolution: block_i pixels in a box, block_j channels of the result, block_l summed a step (depthwise: 1).

    Of wgrad: block_l pixels in a box, which are summed, block_i output channels, block_j input channels.
    """

    box: BoxSize = (1, 1, 1)  # images, rows, columns
    groups_per_tile: int = 1  # groups that share a tile's columns; more than one make a block-diagonal product
    flat: bool = False  # one loop over taps and channels
    taps: int = 1  # of wgrad: taps of one row that a program sums, and reads dz once for
    x_first: bool = False  # of wgrad: multiply xᵀ·dz and not dzᵀ·x

    @property
    def stage(self) -> int:
        """Elements of a stage: of wgrad a tile of dz, and one of x for each tap."""
        return (self.block_i + self.taps * self.block_j) * self.block_l

    def columns(self, channels: int, groups: int) -> int:
        """Tiles across the result's channels, `channels` of them in each group."""
        return cdiv(self.groups_per_tile * channels, self.block_j) * cdiv(groups, self.groups_per_tile)

    def boxes(self, n: int, p: int, q: int, rim: int = 0) -> int:
        """How many cover n images of p × q, if neighbours share `rim` columns."""
        return cdiv(n, self.box[0]) * cdiv(p, self.box[1]) * cdiv(q, self.box[2] - rim)


@lru_cache(maxsize=4096)
def choose_box(pixels: int, n: int, p: int, q: int, *, wide: bool = False) -> BoxSize:
    """The box of `pixels` pixels that covers n images of p × q with the least that lies outside, or hardly more.

    A box is a constant of its kernel, so the first that will do is taken of a few: training on batches of many sizes
    then compiles few kernels. wide: columns are contiguous in memory, and of all boxes the widest is best.
    """
    if wide:
        sizes = [1 << k for k in range(pixels.bit_length())]
        shapes = sorted(((r, c) for c in sizes for r in sizes), key=lambda shape: shape[::-1], reverse=True)
    else:
        shapes = [(1, 8), (pixels // 8, 8), (8, 8), (4, 4), (1, 1), (2, 1), (1, pixels), (pixels, 1)]
    boxes = [(pixels // (rows * cols), rows, cols) for rows, cols in shapes if 0 < rows * cols <= pixels]

    def covered(box: BoxSize) -> int:
        return cdiv(n, box[0]) * cdiv(p, box[1]) * cdiv(q, box[2])

    share = 8 if wide or pixels > 64 else 3  # an eighth, or a third where little is done
    least = min(map(covered, boxes))
    return next(box for box in boxes if share * covered(box) <= (share + 1) * least)


def beside(box: BoxSize) -> Iterator[BoxSize]:
    """With one side half or twice as long, and with what is taken off one side given to another."""
    for side in range(3):
        for factor in (1, 4):  # in halves
            if box[side] * factor >= 2:
                yield _resized(box, {side: factor})
        if box[side] > 1:
            yield from (_resized(box, {side: 1, other: 4}) for other in (2, 1, 0) if other != side)


def _resized(box: BoxSize, halves: dict[int, int]) -> BoxSize:
    n, h, w = (length * halves.get(side, 2) // 2 for side, length in enumerate(box))
    return n, h, w


def sparing(config: ConvConfig, chosen: ConvConfig, n: int, p: int, q: int) -> bool:
    """Whether boxes of a config cover at most a quarter more than those of the heuristic's."""

    def covered(c: ConvConfig) -> int:
        return c.boxes(n, p, q) * prod(c.box)

    return max(config.box) <= MAX_TILE and 4 * covered(config) <= 5 * covered(chosen)


def with_splits(config: ConvConfig, n: int, p: int, q: int, tiles: int, arch: Arch) -> ConvConfig:
    """The config with boxes split between four programs a processor, which hide each other's loads.

    Derived: splits of under four boxes mostly write results. tiles: of channels.
    """
    boxes = config.boxes(n, p, q)
    splits = max(1, min(4 * arch.processors // tiles, cdiv(boxes, 4)))
    return replace(config, splits=whole_splits(boxes, splits, 1))


def legal_splits(config: ConvConfig, n: int, p: int, q: int, most: int) -> bool:
    """Whether there are at most so many splits, and each has boxes."""
    return config.splits <= min(SECOND_AXIS, most) and config == adjusted_splits(config, n, p, q)


def adjusted_splits(config: ConvConfig, n: int, p: int, q: int) -> ConvConfig:
    return replace(config, splits=whole_splits(config.boxes(n, p, q), config.splits, 1))


def with_rows(
    config: ConvConfig, n: int, p: int, q: int, tiles: int, arch: Arch, *, rim: int = 0,
    choices: tuple[int, ...] = (32, 16, 8, 4),
) -> ConvConfig:  # fmt: skip
    """The config, with boxes of as many rows as leave four programs a processor.

    Derived: of two rows each neighbours read both, which is a sixteenth then. tiles: of channels; rim: as in `boxes`.
    """
    images, _, columns = config.box
    for rows in choices:
        config = replace(config, box=(images, rows, columns))
        if config.boxes(n, p, q, rim) * tiles >= 4 * arch.processors:
            break
    return config
