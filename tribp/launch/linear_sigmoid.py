"""The launch settings of the linear layer: forward, dgrad, wgrad, and the pass over the output's gradient."""

from dataclasses import dataclass, replace

from .arch import ITEMSIZE, Arch, cdiv
from .matmul import (
    INTERPRETED,
    Product,
    candidates,
    choose_product,
    fills,
    fit,
    fitted,
    needs_registers,
    stages_that_fit,
    whole_splits,
)
from .tuning import rule


@dataclass(frozen=True)
class Pass:
    """Launch settings of a pass over a matrix: a program takes `rows` × `block_n` of it, `block_m` rows at a time."""

    block_m: int
    block_n: int
    rows: int
    num_warps: int
    reason: str


@rule
def choose_forward(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, along: bool = True
) -> Product:
    """y (m × n) = σ(x·wᵀ + b), summed over k; `along` as in `candidates`."""
    chosen = choose_product(m, n, k, dtype, precision, arch, vec=vec, tma=tma, along=along)
    if chosen.tma and chosen.block_i * chosen.block_j > 128 * 128 and chosen.tiles(m, n) > 2 * arch.processors:
        # Published for Triton on an H100: 84–92 % of cuBLAS with persistent programs, 75–85 % with a program a tile.
        # Compiled: the next tile's loads start under the output's store, not under its sigmoid, and the output tile
        # stays in shared memory beside the stages (213 KB with three). The model sees no difference: measure it first.
        chosen = replace(
            chosen,
            persistent=arch.processors,
            num_stages=stages_that_fit(chosen, ITEMSIZE[dtype], arch, output=chosen.block_i * chosen.block_j),
            reason=chosen.reason + "; persistent: more than two waves of them",
        )
    return chosen


@rule
def choose_dgrad(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, may_fuse: bool,
    along: bool = False,
) -> Product:  # fmt: skip
    """dx (m × k) = dz·w, summed over n. may_fuse: nobody else needs dz, so it may be formed on the way in.

    `along` as in `candidates`: a weight's rows lie across the sum.
    """
    chosen = choose_product(m, k, n, dtype, precision, arch, vec=vec, tma=tma, along=along, short=0)
    may_fuse = may_fuse and not needs_registers(dtype, precision, arch, tma=tma, along=along)
    return fuse_dz(chosen, k, dtype, arch) if may_fuse else chosen


@rule
def choose_wgrad(
    m: int, n: int, k: int, dtype: str, precision: str, arch: Arch, *, vec: int, tma: bool, may_fuse: bool, spare: int
) -> Product:
    """dw (n × k) = dzᵀ·x, summed over m, split between programs where the result alone can't fill the GPU.

    The splits depend on the shape and the GPU alone, so the sums have one order. Their float32 partial results may take
    `spare` bytes: what torch would have allocated at this point and tribp does not.
    """
    accumulator = 8 if dtype == "float64" else 4

    def most_splits(tile: Product) -> int:
        """Splits of under eight steps do little but write partial results."""
        return max(1, min(cdiv(m, 8 * tile.block_l), spare // (accumulator * n * k)))

    tiles = candidates(m, dtype, precision, arch, vec, tma, along=False)
    filling = [tile for tile in tiles if fills(tile.tiles(n, k) * most_splits(tile), arch)]
    chosen = fitted((filling or tiles[-1:])[0], n, k, m, dtype, arch)
    if may_fuse and not needs_registers(dtype, precision, arch, tma=tma, along=False):
        chosen = fuse_dz(chosen, k, dtype, arch)
    resident = arch.processors if chosen.block_i * chosen.block_j > 128 * 128 else 2 * arch.processors
    splits = max(1, min(resident // chosen.tiles(n, k), most_splits(chosen)))
    return replace(chosen, splits=whole_splits(m, splits, chosen.block_l))


def fuse_dz(chosen: Product, cols: int, dtype: str, arch: Arch) -> Product:
    """Form dz while loading, if at most four tile columns repeat that work and descriptors load the tiles.

    Derived: a pass of its own reads dy and y and writes dz, and the product reads that again: four units of memory
    where the fused form has two. But the loop has three times the instructions, once for each tile column. Compiled:
    with pointers the fused wgrad spills up to 230 bytes on sm_90, and up to 1,300 where operands lie in registers; so
    it is not for products that `needs_registers` keeps from wgmma.
    """
    if cdiv(cols, chosen.block_j) > 4 or not chosen.tma:
        return chosen
    if chosen.block_i * chosen.block_j > 128 * 128:
        # Compiled: beside a 128×256 result dy and y leave no registers for 64 deep tiles (255, and a spill).
        chosen = replace(chosen, block_l=min(chosen.block_l, 32))
    chosen = replace(chosen, fuse_dz=True, reason=chosen.reason + "; dz formed on load: at most 4 tile columns")
    extra = chosen.block_i * chosen.block_l
    return replace(chosen, num_stages=stages_that_fit(chosen, ITEMSIZE[dtype], arch, extra=extra))


@rule
def choose_pass(m: int, n: int, dtype: str, arch: Arch) -> Pass:
    """The pass that writes dz and partial sums of db."""
    if arch.backend == "interpreter":
        return Pass(16, 32, 32, 1, INTERPRETED)
    block_n = fit(128, n)
    block_m = max(1, 4096 // block_n if ITEMSIZE[dtype] <= 4 else 2048 // block_n)
    blocks = cdiv(m, block_m)
    programs = max(1, 4 * arch.processors // cdiv(n, block_n))
    rows = cdiv(blocks, programs) * block_m
    return Pass(block_m, block_n, rows, 8, "derived: 16 elements a thread: two 16-byte loads of dy and of y in flight")
