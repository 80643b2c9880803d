"""What a launch does, read off its grid and arguments: how often its loops turn, what it multiplies, what it moves.

One function a kernel, for only the kernel says what its loops run over.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tribp.kernels import common, conv3x3, conv3x3_depthwise, conv3x3_few_channels, linear_sigmoid, optim, relayout
from tribp.launch.arch import cdiv
from tribp.launch.plan import Launch

from . import registry
from .registry import KernelWork

Given = Mapping[str, Any]  # a launch's arguments and constants by name


@dataclass(frozen=True)
class LaunchWork:
    """Bytes are of all programs; what a program does is that of the busiest one."""

    programs: int
    tensors: Mapping[int, float]  # bytes that are read or written of each tensor
    turns: float = 0  # of a program's main loop, one after the other: steps of a product, blocks, boxes
    step: float = 0  # what a turn does: multiply-adds, or bytes that the threads load; 0: unknown
    outer: tuple[float, ...] = ()  # turns of the loops around it, the outermost first
    paths: int = 1  # ways through the code of which a program takes one
    aligned: float = 1.0  # the part of the turns that meets whole, aligned data
    chain: int = 1  # loads before and after the loop that wait for one another
    macs: float = 0  # multiply-adds of a program
    bits: int = 16  # of the multiplied numbers; 32 is TF32
    l2: float = 0  # bytes that programs load and store; 0: as many as `tensors` have
    copied: float = 0  # bytes that descriptors bring to the shared memory of a program

    @property
    def bytes(self) -> float:
        return sum(self.tensors.values())


def work_of(launch: Launch, lengths: Sequence[int] = ()) -> LaunchWork:
    """What a launch does, as its operation's `kernel_work` tells. Raises ValueError if none does.

    lengths: of the tensors that an optimizer's launch updates, which its tables on the device know.
    """
    given = launch.named
    programs = math.prod(launch.grid)
    if launch.kernel in (optim.multi_tensor_step, optim.gradient_norm):
        return _step(given, programs, lengths)
    for operation in registry.find([]):
        if of := operation.kernel_work().get(launch.kernel):
            return LaunchWork(programs, _tensors(given), **of(given, launch.grid))
    raise ValueError(f"no operation's kernel_work tells what a launch of {launch.kernel.__name__} does")


def _tensors(given: Given) -> dict[int, float]:
    found = [value.base if isinstance(value, TensorDescriptor) else value for value in given.values()]
    return {id(t): float(t.numel() * t.element_size()) for t in found if isinstance(t, Tensor)}


def _size(given: Given, *names: str) -> int:
    return math.prod(given[name] for name in names)


def _itemsize(given: Given, name: str) -> int:
    value = given[name]
    return int((value.base if isinstance(value, TensorDescriptor) else value).element_size())


def _product(given: Given, operand: str, turns: float, step: int, outer: tuple[float, ...] = ()) -> dict[str, Any]:
    """A product of `step` multiply-adds a turn; tf32x3 makes three of each."""
    step *= 3 if given["PRECISION"] == "tf32x3" else 1
    return dict(turns=turns, step=step, outer=outer, macs=turns * step * math.prod(outer),
                bits=8 * _itemsize(given, operand))  # fmt: skip


def _traffic(given: Given, loaded: float, stored: float, programs: int) -> dict[str, Any]:
    """Bytes between L2 and all programs."""
    return dict(l2=loaded + stored, copied=loaded / programs if given["TMA"] else 0.0)


def _turns(given: Given, length: int, block: str) -> int:
    """Of a product's loop. Where it prefetches by hand, what is left of the sum comes before it."""
    return length // given[block] if given["PREFETCH"] else cdiv(length, given[block])


def _linear_forward(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    m, n, k, size = given["M"], given["N"], given["K"], _itemsize(given, "x")
    rows, cols = cdiv(m, given["BLOCK_M"]), cdiv(n, given["BLOCK_N"])
    outer = (cdiv(rows * cols, grid[0]),) if given["PERSISTENT"] else ()
    product = _product(given, "x", cdiv(k, given["BLOCK_K"]), _size(given, "BLOCK_M", "BLOCK_N", "BLOCK_K"), outer)
    loaded = size * (m * k * cols + n * k * rows)
    turns = dict(turns=_turns(given, k, "BLOCK_K"), chain=1 + (given["b"] is not None))
    return product | turns | _traffic(given, loaded, size * m * n, grid[0])


def _linear_dgrad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    m, n, k, size = given["M"], given["N"], given["K"], _itemsize(given, "dx")
    rows, cols, read = cdiv(m, given["BLOCK_M"]), cdiv(k, given["BLOCK_K"]), 1 + given["FUSE_DZ"]
    product = _product(given, "dx", cdiv(n, given["BLOCK_N"]), _size(given, "BLOCK_M", "BLOCK_N", "BLOCK_K"))
    loaded, turns = size * (read * m * n * cols + n * k * rows), _turns(given, n, "BLOCK_N")
    return product | dict(turns=turns) | _traffic(given, loaded, size * m * k, grid[0])


def _linear_wgrad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    m, n, k, size = given["M"], given["N"], given["K"], _itemsize(given, "x")
    rows, cols, read = cdiv(n, given["BLOCK_N"]), cdiv(k, given["BLOCK_K"]), 1 + given["FUSE_DZ"]
    turns = cdiv(given["rows_per_split"], given["BLOCK_M"])
    product = _product(given, "x", turns, _size(given, "BLOCK_M", "BLOCK_N", "BLOCK_K"))
    written = grid[1] * n * k * _itemsize(given, "dw") + m * n * size * (given["dz_out"] is not None)
    return product | _traffic(given, size * (read * m * n * cols + m * k * rows), written, math.prod(grid))


def _output_grad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    turns = cdiv(given["rows_per_program"], given["BLOCK_M"])
    return dict(turns=turns, step=2 * _size(given, "BLOCK_M", "BLOCK_N") * _itemsize(given, "y"), chain=0)


def _reduce_partials(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    turns = cdiv(given["parts"], given["BLOCK_PARTS"])
    return dict(turns=turns, step=_size(given, "BLOCK_PARTS", "BLOCK") * _itemsize(given, "partials"), chain=0)


def _pixels(given: Given) -> int:
    return _size(given, "BOX_N", "BOX_H", "BOX_W")


def _convolve(given: Given, grid: tuple[int, ...], operand: str, length: int, steps: tuple[int, int]) -> dict[str, Any]:
    """forward and dgrad: taps × steps through the channels. A class of pixels meets 9 / (classes) taps on average."""
    rows = given["ROWS"]
    turns = cdiv(length, given["BLOCK_L"])
    if rows > 1:  # a turn takes the taps of one column
        taps, pixels, products, weights = 3.0, (rows + 2) * _pixels(given), 3 * rows, 3
    else:
        taps, pixels, products, weights = 9 / math.prod(steps), _pixels(given), 1, 1
    step = products * _pixels(given) * given["BLOCK_J"] * given["BLOCK_L"]
    read = (pixels + weights * given["BLOCK_J"]) * given["BLOCK_L"] * _itemsize(given, operand)
    product = (
        _product(given, operand, taps * turns, step)
        if given["FLAT"]
        else _product(given, operand, turns, step, (taps,))
    )
    written = rows * _pixels(given) * given["BLOCK_J"] * _itemsize(given, operand)
    programs = math.prod(grid)
    return product | _traffic(given, programs * taps * turns * read, programs * written, programs)


def _conv_forward(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    found = _convolve(given, grid, "y", _size(given, "GROUPS_PER_TILE", "CG"), (1, 1))
    return found | dict(chain=1 + (given["b"] is not None))


def _conv_dgrad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    return _convolve(given, grid, "dx", _size(given, "GROUPS_PER_TILE", "OG"), (given["step_h"], given["step_w"]))


def _conv_wgrad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    taps, pixels, turns = given["TAPS"], _pixels(given), given["boxes_per_split"]
    product = _product(given, "x", turns, taps * pixels * _size(given, "BLOCK_O", "BLOCK_C"))
    read = pixels * (given["BLOCK_O"] + taps * given["BLOCK_C"]) * _itemsize(given, "x")
    written = taps * _size(given, "BLOCK_O", "BLOCK_C") * _itemsize(given, "dw")
    programs = math.prod(grid)
    return product | _traffic(given, programs * turns * read, programs * written, programs)


def _few_channels_forward(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    """A row of y a turn, three products."""
    step = 3 * _size(given, "BOX_N", "BOX_W", "BLOCK_J", "BLOCK_K")
    return _product(given, "y", given["BOX_H"], step) | dict(chain=1 + (given["b"] is not None))


def _few_channels_dgrad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    """A row of dz a turn. Boxes read two rows and two columns of their neighbours."""
    rows, columns, size = given["BOX_H"], given["BOX_W"], _itemsize(given, "dx")
    step = _size(given, "BOX_N", "BOX_W", "BLOCK_L") * 64
    read = _size(given, "N", "P", "Q", "O") * (rows + 2) / rows * columns / (columns - 2)
    return _product(given, "dx", rows + 2, step) | dict(l2=size * (read + _size(given, "N", "H", "W", "C")))


def _few_channels_wgrad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    step = _pixels(given) * _size(given, "BLOCK_O", "BLOCK_K")
    return _product(given, "x", given["boxes_per_split"], step)


def _depthwise(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    """Four rows a turn, of forward and dgrad."""
    dgrad = "dx" in given
    rows = given["BOX_H"] * (1 if dgrad else given["STEP_H"]) + 2
    return dict(turns=rows / 4, paths=grid[1] if dgrad else 1)


def _depthwise_wgrad(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    return dict(turns=given["boxes_per_split"])


def _relayout(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    step = (1 + (given["y"] is not None)) * _size(given, "BLOCK_P", "BLOCK_C") * _itemsize(given, "src")
    return dict(turns=given["tiles_per_program"], step=step, chain=0)


def _pack(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    """Of the images; a weight beside them is small."""
    return dict(turns=given["tiles"], step=_size(given, "BLOCK_P", "BLOCK_C") * _itemsize(given, "src"), chain=0)


def _once(given: Given, grid: tuple[int, ...]) -> dict[str, Any]:
    return {}


def _step(given: Given, programs: int, lengths: Sequence[int]) -> LaunchWork:
    """An optimizer's step, or the norm before it. A program reads four tables before its first element (which chunk,
    its tensor's row, the hyperparameters and the counter's address, the counter), and counts itself at the end."""
    sizes = {name: given[name].primitive_bitwidth // 8 for name in _TYPES if given.get(name) is not None}
    if "RULE" in given:
        moved = 2 * sum(sizes.values()) - (0 if isinstance(given["grad_scale"], Tensor) else sizes["GRAD_TYPE"])
    else:
        moved = sizes["GRAD_TYPE"]
    block, elements = given["BLOCK"], sum(lengths)
    blocks = sum(cdiv(n, block) for n in lengths)
    return LaunchWork(
        programs,
        {id(given["grads"]): float(elements * moved)},
        turns=min(given["chunk_blocks"], max(cdiv(n, block) for n in lengths)),
        step=block * sum(sizes.values()),
        aligned=sum(n // block for n in lengths) / blocks,
        chain=5,
    )


_TYPES = ("PARAM_TYPE", "GRAD_TYPE", "STATE0", "STATE1", "STATE2", "EMA_TYPE")
LINEAR: KernelWork = {
    linear_sigmoid.forward: _linear_forward,
    linear_sigmoid.output_grad: _output_grad,
    linear_sigmoid.dgrad: _linear_dgrad,
    linear_sigmoid.wgrad: _linear_wgrad,
    common.reduce_partials: _reduce_partials,
}
CONV: KernelWork = {
    conv3x3.forward: _conv_forward,
    conv3x3.dgrad: _conv_dgrad,
    conv3x3.wgrad: _conv_wgrad,
    conv3x3.spread_weight: _once,
    conv3x3_few_channels.few_channels_forward: _few_channels_forward,
    conv3x3_few_channels.few_channels_dgrad: _few_channels_dgrad,
    conv3x3_few_channels.few_channels_wgrad: _few_channels_wgrad,
    conv3x3_depthwise.depthwise_forward: _depthwise,
    conv3x3_depthwise.depthwise_dgrad: _depthwise,
    conv3x3_depthwise.depthwise_wgrad: _depthwise_wgrad,
    relayout.relayout: _relayout,
    relayout.pack: _pack,
    common.reduce_partials: _reduce_partials,
}
