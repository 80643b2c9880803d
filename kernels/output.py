"""What makes the output of a sum that several programs have formed in parts: a long one, for few tiles."""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import Act, activate
from .common import await_previous, masked_range, round_to


class Output(NamedTuple):
    """What is fixed when `output` is compiled; fields as in `common`."""

    BLOCK: int  # elements of y, a program
    BLOCK_PARTS: int  # partial results that are read at once
    VEC: int
    ACT: Act
    PTX: bool


@triton.jit(do_not_specialize=["parts", "M", "N", "run"])
def output(partials, b, y, parts, M, N, run, CONFIG: tl.constexpr):
    """y = act(Σₛ partials[s] + b), always in the same order. partials: (parts, M, N), b: (N,), y: (M, N).

    run: None, or of how many elements each of the M·N consists, as the pixels of an image whose columns are contiguous.
    """
    await_previous()
    BLOCK: tl.constexpr = CONFIG.BLOCK
    ACT: tl.constexpr = CONFIG.ACT
    VEC: tl.constexpr = CONFIG.VEC
    pitch = (N if run is None else N * run) // VEC * VEC
    i, inside = masked_range(tl.program_id(0) * BLOCK, M * pitch, BLOCK, VEC)
    z = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for first in range(0, parts, CONFIG.BLOCK_PARTS):
        part, exists = masked_range(first, parts, CONFIG.BLOCK_PARTS, 1)
        at = partials + (part[:, None] * (M * pitch) + i[None, :])
        z += tl.sum(tl.load(at, mask=exists[:, None] & inside[None, :], other=0.0), 0)
    if b is not None:
        at_b = i % pitch if run is None else i // run % N
        z += tl.load(b + at_b, mask=inside, other=0.0).to(z.dtype)
    y_block = activate(z, ACT, y.dtype.element_ty, CONFIG.PTX)
    tl.store(y + i, round_to(y_block, y.dtype.element_ty), mask=inside)
