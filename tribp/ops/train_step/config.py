"""Which networks `kernels.train_step` trains, and in which tiles."""

from dataclasses import dataclass
from typing import NamedTuple

from ...launch.arch import ITEMSIZE, Arch, cdiv
from ...launch.configs import register_limit

MAX_OUTPUTS = 256  # outputs of a layer, which are one tile beside 16 rows; of float64 half as many
MAX_LAYERS = 8  # layers: the code is as long
MAX_BATCH_ROWS = 1024  # rows: a program of the second launch sums over all of them. By the model, 4,096 take 44 µs.
# Of all weights but the first: each program reads them. By arithmetic, 64 bytes a clock: 1 MB takes a processor 9 µs.
MAX_WEIGHT_BYTES = 1 << 20
# Weights of a first layer that is computed with the others. By the model, 128 rows in float32: 784-128-10 takes 12 µs
# with it, 12 and 5 in two launches; 784-256-64-10 takes 23, 12 and 10.
MAX_FIRST_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class TrainConfig:
    """Rows of a program, and what a step of its products sums over; tile, step and warps of a weight's gradient."""

    first: int  # layer that is not computed by itself: 0 or 1
    block_m: int
    block_l: int
    block_n: int
    block_k: int
    block_rows: int
    num_warps: int
    weight_warps: int
    num_stages: int
    max_registers: int | None


class TrainProblem(NamedTuple):
    """m rows, and the sizes of the input and of each layer's output."""

    m: int
    sizes: tuple[int, ...]
    dtype: str
    arch: Arch

    def obstacle(self) -> str | None:
        """Why the kernels don't train this network; None if they do."""
        layers, widest = len(self.sizes) - 1, max(self.sizes[1:])
        bytes = ITEMSIZE[self.dtype] * sum(n * k for k, n in zip(self.sizes[1:], self.sizes[2:], strict=False))
        if layers > MAX_LAYERS:
            return f"it has {layers} layers, more than {MAX_LAYERS}"
        most = MAX_OUTPUTS if ITEMSIZE[self.dtype] < 8 else MAX_OUTPUTS // 2
        if widest > most:
            return f"a layer has {widest} {self.dtype} outputs, more than {most}"
        if self.m > MAX_BATCH_ROWS:
            return f"the batch has {self.m} rows, more than {MAX_BATCH_ROWS}"
        if bytes > MAX_WEIGHT_BYTES:
            most = MAX_WEIGHT_BYTES
            return f"its weights above the first take {bytes} bytes, more than {most}, which each program reads"
        return None

    def choose(self) -> TrainConfig:
        first = int(len(self.sizes) > 2 and self.sizes[0] * self.sizes[1] > MAX_FIRST_WEIGHTS)
        if self.arch.backend == "interpreter":
            return TrainConfig(first, 16, 32, 32, 64, 32, 1, 1, 1, None)
        size = ITEMSIZE[self.dtype]
        deep = 64 if size == 2 else 32 if size == 4 else 16
        # Compiled: beside 256 columns of float32, steps of 32 spill 32 bytes on sm_80, and do not fit gfx942's memory.
        step = deep // 2 if max(self.sizes[1:]) > 128 else deep
        # By the model, 784-256-64-10 in float32: with 8 warps 23 µs for 37, as each forms half of a row's sums.
        rows = 64 if self.m > 32 and size < 8 else 32
        return TrainConfig(first, 16, max(step, 16), 32, deep, rows, 8, 4, 3, register_limit(self.arch))

    def programs(self, config: TrainConfig) -> int:
        """Of the second launch."""
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        return sum(cdiv(n, config.block_n) * cdiv(k, config.block_k) for k, n in pairs)
