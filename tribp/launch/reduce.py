"""Sums that several programs share: each leaves a partial result, which a later launch adds up in a fixed order."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..kernels import common
from ..kernels import output as kernels
from ..kernels.activations import Act
from .arch import cdiv, power_of_2
from .buffer import Buffer
from .configs import register_limit
from .launches import Launch, in_tuple
from .layout import accumulator, vector_length
from .plan import Plan
from .reduce_config import APPENDED_PARTS, ReduceConfig, ReduceProblem, appended_sums

# Turns of a loop behind another kernel. By the model: 512 parts, 8 at once, take 42 µs there; 64 at once, 7 in a launch
# of their own.
MAX_TURNS = 16


class Partials(NamedTuple):
    """A result to come: the sum of partial results."""

    partials: Buffer | None = None
    out: Buffer | None = None
    transposed: tuple[int, int] | None = None  # (rows, cols) of the matrices whose transposes `out` consists of

    @property
    def parts(self) -> int:
        return 0 if self.partials is None else self.partials.shape[0]

    @property
    def pending(self) -> bool:
        return self.partials is not None and self.out is not None and self.partials is not self.out


def partials_of(plan: Plan, out: Buffer | None, parts: int, shape: tuple[int, ...] | None = None) -> Partials:
    """`out`, and room for so many partial results of it, in its shape or in another; `out` itself for a single one."""
    if out is None or parts == 1:
        return Partials(out, out)
    return Partials(plan.scratch((parts, *(shape or out.shape)), accumulator(out.dtype)), out)


class Sums(NamedTuple):
    """Up to two results: the arguments of `common.reduce_partials`."""

    partials: Buffer
    out: Buffer
    parts: int
    matrices: int
    rows: int
    cols: int
    partials2: Buffer | None
    out2: Buffer | None
    parts2: int
    length2: int

    @property
    def vecs(self) -> tuple[int, int]:
        size = self.partials.element_size()
        return vector_length(size, self.cols), vector_length(size, self.length2)

    def programs(self, config: ReduceConfig, second: ReduceConfig) -> int:
        first = self.matrices * cdiv(self.cols, config.block // power_of_2(self.rows))
        return first + cdiv(self.length2, second.block)

    def compiled(self, config: ReduceConfig, second: ReduceConfig) -> common.Reduce:
        (vec, vec2), rows = self.vecs, power_of_2(self.rows)
        return common.Reduce(config.block, config.block_parts, rows, vec, second.block, second.block_parts, vec2)


def sums_of(pending: Sequence[Partials]) -> Sums | None:
    """Of up to two results. The first is the longer; only it is transposed."""
    assert len(pending) <= 2
    if not pending:
        return None
    (partials, out, transposed), (partials2, out2, transposed2) = (*pending, Partials())[:2]
    assert transposed2 is None
    assert partials is not None
    assert out is not None
    rows, cols = transposed or (1, out.numel())
    parts2, length2 = (0, 0) if partials2 is None or out2 is None else (partials2.shape[0], out2.numel())
    matrices = out.numel() // (rows * cols) if partials.shape[0] else 0
    return Sums(partials, out, partials.shape[0], matrices, rows, cols, partials2, out2, parts2, length2)


def reduce_partials(plan: Plan, *results: Partials) -> None:
    """Launch the sums of partial results, two in a launch.

    out = partials.sum(0), in a fixed order. partials: (parts, …), contiguous, in the accumulator's type, which all
    results share.
    """
    pending = [result for result in results if result.pending]
    if len(pending) > 2:
        reduce_partials(plan, *pending[:2])
        reduce_partials(plan, *pending[2:])
        return
    sums = sums_of(pending)
    if sums is None:
        return
    problem = ReduceProblem(sums.parts, sums.out.numel(), plan.arch, sums.rows, min(sums.vecs))
    config = plan.config(problem)
    # As many parts at once as suit the second sum: of few at a time its program would be the last to finish.
    second = ReduceProblem(sums.parts2, sums.length2, plan.arch, vec=sums.vecs[1]).choose()
    plan.launch(
        common.reduce_partials,
        (sums.programs(config, second),),
        tuple(sums),
        sums.compiled(config, second),
        config,
        # Compiled: rounded down to a step of occupancy, float64 of odd length spills 8 bytes with Triton 3.5 and 3.6.
        max_registers=register_limit(plan.arch),
    )


def sum_parts(
    plan: Plan, shares: Buffer, b: Buffer | None, y: Buffer, activation: Act, shape: tuple[int, int],
    run: int | None = None,
) -> None:  # fmt: skip
    """Launch y = act(Σ shares + b). shares: (parts, …), b: (N,); shape and run as `output`'s M, N and run."""
    (parts, *_), (m, n) = shares.shape, shape
    length = n * (run or 1)
    vec = min(vector_length(t.element_size(), length) for t in (shares, y))
    config = plan.config(ReduceProblem(parts, m * length, plan.arch, vec=vec))
    plan.launch(
        kernels.output,
        (cdiv(m * length, config.block),),
        (shares, b, y, parts, m, n, run),
        kernels.Output(config.block, config.block_parts, vec, activation, plan.arch.backend != "hip"),
        config,
        max_registers=register_limit(plan.arch),
    )


def append_sums(plan: Plan, *results: Partials) -> Sequence[Partials]:
    """Let the last launch, if its kernel has an argument `sums`, add up what `reduce_partials` would, behind its own.

    Two results at most, of few parts. Returns those that are left.
    """
    step = len(plan.steps) - 1
    launch = plan.steps[step]
    assert isinstance(launch, Launch)
    if "sums" not in launch.kernel.arg_names:
        return results
    constants: Any = launch.constants["CONFIG"]
    if getattr(constants, "PREFETCH", False):
        # Compiled: with a way past its loop ptxas gives that kernel 255 registers in place of 168, and spills on sm_80.
        reduce_partials(plan, *results)
        return ()
    pending = [result for result in results if result.pending]
    few = [result for result in pending if result.parts <= MAX_TURNS * APPENDED_PARTS][:2]
    left = [result for result in pending if result not in few]
    sums = sums_of(few)
    if sums is None:
        whole = next((result for result in results if result.out is not None), None)
        if whole is None or whole.out is None:
            return left
        # No program adds up a result that is whole already: 0 parts, and the kernel is the same.
        sums = sums_of([whole._replace(partials=plan.scratch((0,), accumulator(whole.out.dtype)))])
        assert sums is not None
    config = appended_sums(plan.arch, launch.num_warps, sums.rows, min(sums.vecs))
    first, *others = launch.grid
    at = launch.kernel.arg_names.index("sums")
    numbers = tuple(in_tuple(n) if isinstance(n, int) else n for n in sums)
    plan.steps[step] = launch._replace(
        grid=(first + cdiv(sums.programs(config, config), math.prod(others)), *others),
        arguments=(*launch.arguments[:at], numbers, *launch.arguments[at + 1 :]),
        constants={"CONFIG": constants._replace(SUMS=sums.compiled(config, config))},
        # Compiled: as above, dgrads of 48 registers spill 4 bytes on sm_100.
        max_registers=launch.max_registers or register_limit(plan.arch),
    )
    return left
