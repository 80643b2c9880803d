"""The config of a matrix product, what is legal in one, and the stages that shared memory holds.

`tiles` chooses one.
"""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from .. import versions
from .arch import ITEMSIZE, Arch, cdiv
from .configs import MAX_TILE, fit_block, legal_threads, registers
from .neighbors import Steps, all_registers, by_one, by_two, toggled

RESULT_REGISTERS = 128  # registers a thread may keep of a result: 128×256 in float32 with 8 warps


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

    @property
    def stage(self) -> int:
        """Elements of a stage: a tile of each operand, and of y where dz is formed on load."""
        return (self.block_i + self.block_j + self.fuse_dz * self.block_i) * self.block_l

    def tiles(self, i: int, j: int) -> int:
        return cdiv(i, self.block_i) * cdiv(j, self.block_j)

    def covered(self, i: int, j: int) -> int:
        """Elements of all tiles, those that lie outside an i × j result too."""
        return self.tiles(i, j) * self.block_i * self.block_j


M = TypeVar("M", bound=MatmulConfig)
# What every product can vary.
STEPS: Steps = dict(
    num_warps=by_two, num_stages=by_one, block_l=by_two, block_i=by_two, block_j=by_two, tma=toggled,
    max_registers=all_registers, group=by_two,
)  # fmt: skip


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


def feeds_wgmma(config: MatmulConfig, problem: MatmulProblem) -> bool:
    """Whether descriptors load the tiles that wgmma multiplies as they are."""
    return problem.arch.has_wgmma and config.tma and ITEMSIZE[problem.dtype] == 2


def fit_stages(config: M, problem: MatmulProblem, beside: int = 0) -> M:
    """The config with as many of its stages as shared memory holds, but at least one. beside: as below."""
    stages = stages_in_memory(config, problem.dtype, problem.arch, beside)
    return replace(config, num_stages=max(1, min(config.num_stages, stages)))


def stages_in_memory(config: MatmulConfig, dtype: str, arch: Arch, beside: int = 0) -> int:
    """How many stages shared memory holds. beside: elements that lie there beside all stages.

    Compiled: where operands lie in registers (before Hopper, and AMD), the stage in use is no longer in memory, and
    those of a single stage get there one after the other; CUDA's of float64 at once. The tile that a persistent program
    stores stays beside the stages.
    """
    itemsize = ITEMSIZE[dtype]
    beside += config.persistent * config.block_i * config.block_j
    in_memory = (arch.shared_memory - 1024 - beside * itemsize) // (config.stage * itemsize)
    if arch.has_tma:
        return in_memory
    i, j = config.block_i, config.block_j
    at_once = i + j if itemsize == 8 and arch.backend == "cuda" else max(i, j)
    return in_memory + 1 if in_memory else int(at_once * config.block_l * itemsize <= arch.shared_memory)


def legal_tile(config: MatmulConfig, problem: MatmulProblem, beside: int = 0) -> bool:
    """Whether a product, of layers or of images, can be computed in such tiles: threads, memory, operands.

    beside: as in `stages_in_memory`.
    """
    # Prefetching copies nothing asynchronously.
    by_registers = needs_registers(problem, tma=config.tma) and not config.prefetch
    arch, stages = problem.arch, stages_in_memory(config, problem.dtype, problem.arch, beside)
    if config.prefetch or arch.backend == "interpreter":  # one pipeline on top of another does not compile
        stages = 1
    return (
        legal_threads(config, arch, wgmma=not by_registers, tile=config.block_i * config.block_j)
        and min(config.block_i, config.block_j, config.block_l) >= 16
        and 1 <= config.num_stages <= stages
        and (not by_registers or config == by_mma_sync(config, problem.precision))
        and (not config.tma or (problem.tma and arch.has_tma))
    )


def legal_product(config: MatmulConfig, problem: MatmulProblem, i: int, j: int, l: int) -> bool:
    """Whether an i × j result summed over l is computed right, and nothing that was seen to spill is asked for."""
    arch, tile = problem.arch, config.block_i * config.block_j
    most, deepest, widest = RESULT_REGISTERS, 128, MAX_TILE
    if config.prefetch:  # what is prefetched lies in registers as well, and where it comes from
        most = RESULT_REGISTERS // (2 if config.num_warps == 8 else 4)
        deepest, widest = 64 if tile <= 32 * 32 else 32, 128
    return (
        legal_tile(config, problem)
        and config.block_i <= fit_block(widest, i)
        and config.block_j <= fit_block(widest, j)
        and config.block_l <= fit_block(deepest, l)
        and registers(tile, problem.dtype, config.num_warps, arch) <= most
        # Narrower loads than four bytes are not pipelined.
        and config.prefetch == (not config.tma and problem.vec * ITEMSIZE[problem.dtype] < 4)
        # A single row or column of tiles has one order.
        and 1 <= config.group <= 32
        and (config.group == MatmulConfig.group or (i > config.block_i and j > config.block_j))
    )


def adjusted_product(config: M, problem: MatmulProblem, beside: int = 0) -> M:
    """The config with warps and stages as its tiles and the GPU's memory allow. beside: as in `stages_in_memory`."""
    if needs_registers(problem, tma=config.tma) and not config.prefetch:
        config = by_mma_sync(config, problem.precision)
    if config.block_i * config.block_j < 64 * 64:
        config = replace(config, num_warps=min(config.num_warps, 4))
    stages = stages_in_memory(config, problem.dtype, problem.arch, beside)
    return replace(config, num_stages=min(config.num_stages, stages))
