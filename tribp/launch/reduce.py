"""Sums that several programs share: each leaves a partial result, and one more launch adds them in a fixed order."""

from typing import NamedTuple

import torch

from ..kernels import common
from .arch import cdiv, power_of_2
from .layout import vector_length
from .matmul import ReduceProblem
from .plan import Buffer, Plan


class Partials(NamedTuple):
    """A result to come: the sum of partial results."""

    partials: Buffer | None
    out: Buffer | None
    transposed: tuple[int, int] | None = None  # (rows, cols) of the matrices whose transposes `out` consists of

    @property
    def pending(self) -> bool:
        return self.partials is not None and self.out is not None and self.partials is not self.out


def partials_of(
    plan: Plan, out: Buffer | None, parts: int, dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> Buffer | None:
    """Room for `parts` partial results of `out`, in its shape or in another; `out` itself if there is only one."""
    if out is None or parts == 1:
        return out
    return plan.scratch((parts, *(shape or out.shape)), dtype)


def reduce_partials(plan: Plan, *results: Partials) -> None:
    """Launch the sums of those of two partial results that are not `out` themselves, in one launch.

    out = partials.sum(0), in a fixed order. partials: (parts, …), contiguous, in the accumulator's type, which two
    results share. The first one is the longer, and only it may be transposed.
    """
    pending = [result for result in results if result.pending]
    if not pending:
        return
    (partials, out, transposed), (partials2, out2, _) = (*pending, Partials(None, None))[:2]
    assert partials is not None
    assert out is not None
    parts, length = partials.shape[0], out.numel()
    rows, cols = transposed or (1, length)
    matrices = length // (rows * cols)
    size, length2 = partials.element_size(), 0 if out2 is None else out2.numel()
    vec, vec2 = vector_length(size, cols), vector_length(size, length2)
    config = plan.config(ReduceProblem(parts, length, plan.arch, rows, min(vec, vec2)))
    block_rows = power_of_2(rows)
    programs = matrices * cdiv(cols, config.block // block_rows) + cdiv(length2, config.block)
    plan.launch(
        common.reduce_partials,
        (programs,),
        (
            partials, out, parts, matrices, rows, cols,
            partials2, out2, 0 if partials2 is None else partials2.shape[0], length2,
        ),
        common.Reduce(config.block, config.block_parts, block_rows, vec, vec2),
        config,
        # Compiled: rounded down to a step of occupancy, float64 of odd length spills 8 bytes with Triton 3.5 and 3.6.
        max_registers=255 if plan.arch.backend == "cuda" else None,
    )  # fmt: skip
