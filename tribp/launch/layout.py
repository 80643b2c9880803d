"""How a tensor lies in memory, and what a kernel can make of that: vectors, descriptors. Imports triton."""

import itertools
import math
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import versions
from ..kernels import common
from .buffer import Buffer
from .plan import Plan


class Operand(NamedTuple):
    """A matrix as a product reads it: row-major, or column-major (`transposed`), with `ld` elements between lines."""

    tensor: Buffer
    transposed: bool
    ld: int
    vec: int  # elements, 16 bytes at most, that divide ld, the contiguous length and the address
    tma: bool  # whether a tensor descriptor can describe it

    def argument(self, use_tma: bool, block_rows: int, block_cols: int, precision: str = "ieee") -> object:
        """The kernel argument: the tensor itself, or a descriptor of its tiles. precision: see `descriptor`."""
        if not use_tma:
            return self.tensor
        rows, cols = self.tensor.shape
        if self.transposed:
            return descriptor(self.tensor, [cols, rows], [self.ld, 1], [block_cols, block_rows], precision)
        return descriptor(self.tensor, [rows, cols], [self.ld, 1], [block_rows, block_cols], precision)


def descriptor(
    tensor: Buffer, shape: list[int], strides: list[int], block: list[int], precision: str
) -> TensorDescriptor:
    """A descriptor of tiles. precision: of the product whose operand it loads as it is; "tf32_rounded" has it round."""
    rounding = {"round_f32_to_tf32": True} if precision == "tf32_rounded" else {}
    return TensorDescriptor(tensor, shape, strides, block, **rounding)


def precision_in_kernel(precision: str, tma: bool) -> str:
    """The kernels' PRECISION, of a product that heuristics call `precision`.

    TF32 operands are to be rounded: by the descriptors that load them, which costs nothing, or else in registers.
    """
    return "tf32_rounded" if precision == "tf32" and tma and versions.descriptors_round_to_tf32() else precision


def matrix(plan: Plan, tensor: Buffer) -> Buffer:
    """The buffer with its leading dimensions in one: a copy where one stride does not lead through them."""
    *lead, cols = tensor.shape
    if len(lead) == 1:
        return tensor
    rows = [(size, stride) for size, stride in zip(lead, tensor.stride(), strict=False) if size != 1]
    if any(outer != inner * size for (_, outer), (size, inner) in itertools.pairwise(rows)):
        return matrix(plan, plan.contiguous(tensor))
    stride = rows[-1][1] if rows else cols * tensor.stride(-1)
    return tensor.viewed((math.prod(lead), cols), (stride, tensor.stride(-1)))


def operand(plan: Plan, matrix: Buffer) -> Operand:
    """`matrix` as an operand. One whose rows and columns are both strided is copied, as torch does for its products."""
    if matrix.stride(1) != 1 and matrix.stride(0) != 1:
        matrix = plan.contiguous(matrix)
    transposed = matrix.stride(1) != 1
    contiguous, lines = (0, 1) if transposed else (1, 0)
    ld = matrix.stride(lines) if matrix.shape[lines] > 1 else matrix.shape[contiguous]
    length, itemsize = matrix.shape[contiguous], matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0
    return Operand(
        matrix,
        transposed,
        ld,
        vec=vector_length(itemsize, ld, length) if aligned else 1,
        tma=aligned and ld >= length and ld % versions.descriptor_unit(itemsize, bool(common.INTERPRETED)) == 0,
    )


def vector_length(itemsize: int, *lengths: int) -> int:
    """The largest number of elements, 16 bytes at most, that divides every length."""
    vec = 16 // itemsize
    while any(length % vec for length in lengths):
        vec //= 2
    return vec


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of `dtype` are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
