"""What a launch does, read off its grid and arguments: how often its loops turn, what it multiplies, what it moves.

Only a kernel says what its loops run over: each operation has a function a kernel in `kernel_work`, built from these.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tribp.launch.arch import cdiv

from ..expectations import Launch, size
from ..operation import Given, Operation


@dataclass(frozen=True)
class LaunchWork:
    """Bytes are of all programs; what a program does is that of the busiest one."""

    programs: int
    tensors: Mapping[int, float]  # bytes that are read or written of each tensor
    turns: float = 0  # of a program's main loop, one after the other: steps of a product, blocks, boxes
    step: float = 0  # what a turn does: multiply-adds, or bytes that the threads load; 0: unknown
    outer: tuple[float, ...] = ()  # turns of the loops around it, the outermost first
    chain: int = 1  # loads before and after the loop that wait for one another
    macs: float = 0  # multiply-adds of a program
    bits: int = 16  # of the multiplied numbers; 32 is TF32
    l2: float = 0  # bytes that programs load and store; 0: as many as `tensors` have
    copied: float = 0  # bytes that descriptors bring to the shared memory of a program
    turns_beside: float = 0  # of a few programs beside the others, in each of which they wait for memory
    behind: int = 0  # programs besides that add up partial results
    turns_behind: float = 0  # of each, on average
    paths_behind: int = 1  # ways through their code

    @property
    def bytes(self) -> float:
        return sum(self.tensors.values())


def work_of(operation: Operation, launch: Launch, case: Any) -> LaunchWork:
    """What a launch of the operation's does. Raises ValueError if the operation does not tell."""
    given, kernel = launch.named, launch.kernel.__name__
    if kernel not in operation.kernel_work:
        raise ValueError(f"the kernel_work of {operation.name} does not tell what a launch of {kernel} does")
    grid, behind = launch.grid, _sums(given)
    if behind:
        grid = (grid[0] - cdiv(behind["behind"], math.prod(grid[1:])), *grid[1:])
        if not behind["behind"]:
            given = {**given, "sums": None}  # whole results
    work = dict(tensors=_tensors(given)) | operation.kernel_work[kernel](given, grid, case) | behind
    if behind and "l2" in work:
        work["l2"] += sum(_tensors({"sums": given["sums"]}).values())
    return LaunchWork(math.prod(grid), **work)


def _sums(given: Given) -> dict[str, Any]:
    """What the programs do that `append_sums` appended."""
    if given.get("sums") is None:
        return {}
    parts, matrices, _, cols, parts2, length2 = ((n - 3) // 2 for n in given["sums"] if isinstance(n, int))
    block = given["SUMS_BLOCK"]
    first, second = matrices * cdiv(cols, block // given["SUMS_BLOCK_ROWS"]), cdiv(length2, block)
    turns = first * cdiv(parts, given["SUMS_BLOCK_PARTS"]) + second * cdiv(parts2, given["SUMS_BLOCK_PARTS"])
    mean = turns / max(first + second, 1)
    return dict(behind=first + second, turns_behind=mean, paths_behind=2 if length2 else 1)


def _tensors(given: Given) -> dict[int, float]:
    values = [tensor_of(item) for value in given.values() for item in (value if type(value) is tuple else [value])]
    return {id(t): float(t.numel() * t.element_size()) for t in values if isinstance(t, Tensor)}


def tensor_of(value: Any) -> Any:
    """The tensor that a descriptor describes; any other argument as it is."""
    return getattr(value, "base", value)


def itemsize(given: Given, name: str) -> int:
    return int(tensor_of(given[name]).element_size())


def product(given: Given, operand: str, turns: float, step: float, outer: tuple[float, ...] = ()) -> dict[str, Any]:
    """A product of `step` multiply-adds a turn; tf32x3 makes three of each."""
    step *= 3 if given["PRECISION"] == "tf32x3" else 1
    return dict(turns=turns, step=step, outer=outer, macs=turns * step * math.prod(outer),
                bits=8 * itemsize(given, operand))  # fmt: skip


def traffic(given: Given, loaded: float, stored: float, programs: int) -> dict[str, Any]:
    """Bytes between L2 and all programs."""
    return dict(l2=loaded + stored, copied=loaded / programs if given.get("TMA") else 0.0)


def reduce_partials(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    turns = cdiv(given["parts"], given["BLOCK_PARTS"])
    second = cdiv(given["parts2"], given["BLOCK_PARTS2"]) if given.get("parts2") else 0
    step = size(given, "BLOCK_PARTS", "BLOCK") * itemsize(given, "partials")
    return dict(turns=turns, step=step, chain=0, turns_beside=second)


def output(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    return reduce_partials(given, grid, case) | dict(chain=1)
