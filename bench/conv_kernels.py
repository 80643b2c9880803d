"""The convolution's kernels for GPUs that are not there: launches on tensors without memory, what must be seen."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tribp.launch.arch import Arch
from tribp.ops.conv3x3.reference import Window

from .conv_cases import (
    BASE,
    BF16,
    DEPTHWISE,
    FEW,
    FIRST,
    FP16,
    FP32,
    GROUPED,
    LENET,
    PADDING,
    STRIDED,
    THREE,
    ConvCase,
    cases,
)
from .linear import bytes_of
from .registry import StaticCase

if TYPE_CHECKING:
    from tribp.launch.plan import Launch

    from .expectations import Expectation


def launches(case: ConvCase, direction: str, arch: Arch) -> "list[Launch]":
    """The launches of one direction. "backward" is dgrad and wgrad in one call."""
    from tribp.launch.plan import launches_of
    from tribp.ops.conv3x3 import plan

    def empty(*size: int) -> Tensor:
        layout = case.memory_format if len(size) == 4 else torch.contiguous_format
        return torch.empty(size, device="meta", dtype=case.dtype, memory_format=layout)

    window = Window((case.stride, case.stride), (PADDING, PADDING), case.groups)
    facts = dict(window=window, tf32=case.tf32)
    x, w, y = empty(*case.input_size), empty(*case.weight_size), empty(*case.output_size)
    b, activation = empty(y.shape[1]) if case.bias else None, "sigmoid" if case.sigmoid else None
    if direction == "forward":
        return launches_of(plan.forward, arch, (x, w, b, y), activation=activation, **facts)
    dx = None if direction == "wgrad" else empty(*x.shape)
    dw, db = (None, None) if direction == "dgrad" else (empty(*w.shape), None if b is None else empty(*b.shape))
    dy, kept = empty(*y.shape), y if case.sigmoid else None
    needed_x, needed_w = None if dw is None else x, None if dx is None else w
    return launches_of(plan.backward, arch, (dy, needed_x, needed_w, kept, dx, dw, db), **facts)


# What is compiled without a GPU: bf16 over all forms, the other types where their rules differ from it.
FP64 = torch.float64
MIDDLE, MANY = (256, 256, 256, 14, 14), (64, 512, 512, 7, 7)
UNEVEN_TYPES = ((BF16, False), (FP16, False), (FP32, False), (FP32, True))
NARROW = (64, 13, 11, 33, 29)  # channels that make no rows of whole 16 bytes
UNEVEN, FEWER = (16, 128, 128, 13, 13), (16, 512, 512, 7, 7)  # no box divides them: wgrad by pointers
ONE, APART = ("forward",), ("forward", "dgrad", "wgrad")


def selection() -> Iterator[tuple[ConvCase, Sequence[str]]]:
    few, three, depthwise = ConvCase(FEW[0], BF16), ConvCase(THREE, BF16), ConvCase(DEPTHWISE, BF16, groups=384)
    yield few, APART
    yield ConvCase(MIDDLE, BF16), APART
    yield three, APART
    yield ConvCase(FIRST, BF16), APART
    yield ConvCase(LENET, BF16), ("dgrad",)
    yield depthwise, APART
    yield ConvCase(STRIDED, BF16, stride=2), APART
    yield ConvCase(GROUPED, BF16, groups=32), APART
    yield ConvCase(NARROW, BF16), APART
    yield replace(few, last=False), APART
    yield replace(three, last=False), APART
    yield replace(depthwise, last=False), APART
    yield replace(few, sigmoid=True), ("forward", "backward")
    yield replace(few, last=False, sigmoid=True), ("backward",)
    yield replace(three, sigmoid=True), ("forward", "wgrad")
    yield ConvCase(MANY, BF16), APART
    for dtype, tf32 in ((FP32, False), (FP32, True), (FP64, False)):
        yield replace(few, dtype=dtype, tf32=tf32), APART
        yield replace(three, dtype=dtype, tf32=tf32), APART
    for dtype in (FP32, FP64):
        yield replace(depthwise, dtype=dtype), APART
    yield replace(few, dtype=FP16), APART
    yield replace(three, dtype=FP16), APART
    yield replace(depthwise, dtype=FP16), ONE
    yield ConvCase(UNEVEN, BF16), ("wgrad",)


def static_cases(arch: Arch, everything: bool) -> Iterator[StaticCase]:
    chosen = list(selection())
    if everything:  # all that is measured, and float64
        measured = [*cases(), *(replace(case, dtype=FP64) for case in BASE)]
        measured += [ConvCase(shape, dtype, tf32) for shape in (UNEVEN, FEWER) for dtype, tf32 in UNEVEN_TYPES]
        chosen += [(case, (*APART, "backward")) for case in measured]
    for case, directions in chosen:
        if case.tf32 and arch.backend == "hip":
            continue  # gfx942 has no TF32: the same code again
        for direction in directions:
            for launch in launches(case, direction, arch):
                yield StaticCase(f"{case.name} {direction}", launch, expectations(launch, case, arch))


def expectations(launch: "Launch", case: ConvCase, arch: Arch) -> "Sequence[Expectation]":
    """What the launch's machine code must show; no spills and enough shared memory are expected of every kernel."""
    from . import expectations as e

    kernel, constants = launch.kernel.__name__, launch.named
    found: list[Expectation] = []
    if kernel in ("forward", "dgrad", "wgrad", "few_channels_forward", "few_channels_dgrad", "few_channels_wgrad"):
        found += product_expectations(launch, case.dtype, arch)
    elif kernel == "relayout":
        found += relayout_expectations(launch, case.dtype, arch)
    elif kernel == "pack":
        share = tile_bytes(constants, case.dtype, "BLOCK_P", "BLOCK_C") // (16 * threads(launch, arch))
        inner = "VEC_C" if constants["CHANNELS"] else "VEC_P"
        loads = share if constants["CHANNELS"] or constants["PIXELS"] else 0
        loads = loads if whole(constants, case.dtype, "VEC", inner) else 0
        stores = share if whole(constants, case.dtype, "VEC_DST") else 0
        if loads + stores:
            found.append(e.vectors(loads, stores, "16 bytes a thread, of every tile of an image"))
    elif kernel.startswith("depthwise"):
        loads, stores = row_accesses(constants, kernel)
        across = tile_bytes(constants, case.dtype, "BOX_N", "BOX_W", "BLOCK_C") // (16 * threads(launch, arch))
        # A row of channels is as wide under every tap; one of columns lies anywhere.
        loads = loads if constants["CHANNELS_LAST"] and whole(constants, case.dtype, "VEC") else 0
        stores = stores if constants["CHANNELS_LAST"] and whole(constants, case.dtype, "VEC_STORE") else 0
        if across and loads + stores:
            reason = "16 bytes a thread, of every row that is read and every row that is written"
            found.append(e.vectors(across * loads, across * stores, reason))
    elif kernel == "reduce_partials" and all(
        bytes_of(launch.arguments[0], constants[v]) == 16 for v in ("VEC", "VEC2")
    ):
        found.append(e.wide("loads", 128, "rows of partial sums are multiples of 16 bytes"))
    return found


def product_expectations(launch: "Launch", dtype: torch.dtype, arch: Arch) -> "Iterator[Expectation]":
    from . import expectations as e

    kernel, constants = launch.kernel.__name__, launch.named
    sides: tuple[str, ...] = ("BLOCK_O", "BLOCK_C") if "wgrad" in kernel else ("BOX_N", "BOX_H", "BOX_W", "BLOCK_J")
    if kernel in ("few_channels_forward", "few_channels_dgrad"):  # a row at a time
        sides = ("BOX_N", "BOX_W", "BLOCK_J" if kernel == "few_channels_forward" else "BLOCK_L")
    weights_first = kernel == "few_channels_forward" or (kernel in ("forward", "dgrad") and bool(constants["TMA"]))
    rows = size(constants, *(sides[-1:] if weights_first else sides[:-1]))
    rows = rows if launch.num_warps >= 4 else 0  # two warps, so that mma.sync multiplies
    if matrix := e.matrix_instructions(rows, dtype, arch):
        yield e.multiplies_with(*matrix[0], reason=matrix[1])
    if not kernel.startswith("few_channels") or (kernel == "few_channels_dgrad" and launch.num_stages > 1):
        yield e.PIPELINED
    if kernel in ("few_channels_dgrad", "few_channels_wgrad") or (
        kernel == "wgrad" and (constants.get("TAPS_LAST") or constants["DIAGONAL"])
    ):
        return  # rows of few elements, elements nine apart, or a group's part of a row: nothing to write at once
    out = launch.named[{"dgrad": "dx", "wgrad": "dw"}.get(kernel, "y")]
    assert isinstance(out, Tensor)
    if arch.backend == "hip" and not constants.get("CHANNELS_LAST", True):
        return  # side by side in a thread are channels; neighbouring columns are in neighbouring lanes, 64 bytes a row
    share = tile_bytes(constants, out.dtype, *sides) // threads(launch, arch)
    if stores := e.tile_stores(bytes_of(out, constants["VEC_STORE"]), share, out.dtype, arch):
        yield stores


def relayout_expectations(launch: "Launch", dtype: torch.dtype, arch: Arch) -> "Iterator[Expectation]":
    """Wide on both sides, where a thread has 16 bytes to move and what is contiguous is a multiple of them."""
    from .expectations import wide

    constants = launch.named
    if tile_bytes(constants, dtype, "BLOCK_P", "BLOCK_C") < 16 * threads(launch, arch):
        return

    def aligned(side: str, channels: str) -> bool:
        inner = channels if constants[f"{side}_CHANNELS"] else "VEC_P" if constants[f"{side}_PIXELS"] else ""
        return bool(inner) and whole(constants, dtype, inner, f"{side}_VEC")

    if aligned("SRC", "VEC_C") and (constants["y"] is None or aligned("Y", "VEC_C")):
        yield wide("loads", 128, "what is contiguous is a multiple of 16 bytes")
    if constants["dst"] is not None and aligned("DST", "VEC_DST"):
        yield wide("stores", 128, "what is contiguous is a multiple of 16 bytes")


def row_accesses(constants: "Mapping[str, object]", kernel: str) -> tuple[int, int]:
    """How many rows of a box's width a depthwise program loads and stores at once: an image row once for each tap."""
    rows = size(constants, "BOX_H")
    steps = size(constants, "STEP_H"), size(constants, "STEP_W")
    if kernel == "depthwise_forward":
        return 4 * 3, 4 // steps[0]
    if kernel == "depthwise_wgrad":
        return rows + 3 * ((rows - 1) * steps[0] + 3), 0
    # A class of pixels meets every STEP-th tap from its own on, and all classes are in the code.
    return 4 * 3 * steps[0], 4 * steps[0] * steps[1]


def size(constants: "Mapping[str, object]", *names: str) -> int:
    return math.prod(int(str(constants[name])) for name in names)


def tile_bytes(constants: "Mapping[str, object]", dtype: torch.dtype, *names: str) -> int:
    return size(constants, *names) * dtype.itemsize


def threads(launch: "Launch", arch: Arch) -> int:
    return launch.num_warps * (64 if arch.backend == "hip" else 32)


def whole(constants: "Mapping[str, object]", dtype: torch.dtype, *names: str) -> bool:
    """Whether each of these numbers of elements makes 16 bytes; one that a kernel has not does."""
    return all(size(constants, name) * dtype.itemsize == 16 for name in names if name in constants)
