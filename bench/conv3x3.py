"""`conv3x3`: y = act(x ⋆ w + b), x (N, C, H, W), w (O, C / groups, 3, 3), padding 1."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tribp
from tribp.launch.arch import Arch, cdiv
from tribp.ops.activations import activate, activation_of

from . import expectations as expect
from .expectations import Expectation, Launch, size, threads
from .model import work as model
from .operation import Case, DifferentiableWorkload, Given, KernelTests, Operation, Target, Work, functions, layer_work

PADDING = 1


@dataclass(frozen=True)
class ConvCase(Case):
    """shape: (N, C, O, H, W). Named 64x128-256x28x28/2 with a stride of 2, 64x384-384x56x56:384 with 384 groups."""

    stride: int = 1
    groups: int = 1
    last: bool = True  # channels_last: input, weight, and what comes back from the layer above
    bias: bool = True
    activation: str | None = None

    @property
    def name(self) -> str:
        n, c, o, h, w = self.shape
        window = (f"/{self.stride}" if self.stride > 1 else "") + (f":{self.groups}" if self.groups > 1 else "")
        on = ["NHWC" if self.last else "NCHW"] + ["bias"] * self.bias + ([self.activation] if self.activation else [])
        return " ".join([f"{n}x{c}-{o}x{h}x{w}{window}", self.dtype_name, *on])

    @property
    def sizes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of the input, the weight and the output."""
        n, c, o, h, w = self.shape
        p, q = ((length + 2 * PADDING - 3) // self.stride + 1 for length in (h, w))
        return (n, c, h, w), (o, c // self.groups, 3, 3), (n, o, p, q)

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.shape[1] == self.shape[2]


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FIRST, THREE = (256, 1, 32, 28, 28), (256, 3, 64, 224, 224)  # few input channels
FEW = [(n, 64, 64, 56, 56) for n in (64, 256)]
RESNET = [*FEW, *((n, c, c, size, size) for c, size in ((128, 28), (256, 14), (512, 7)) for n in (64, 256))]
STRIDED, GROUPED, DEPTHWISE = (64, 128, 256, 28, 28), (64, 128, 128, 28, 28), (64, 384, 384, 56, 56)
LENET, ODD = (1, 1, 6, 32, 32), (3, 5, 7, 33, 29)
VGG = [(64, c, c, side, side) for c, side in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))]
FEW_IMAGES = [(1, 512, 512, 7, 7), (8, 512, 512, 7, 7), (2, 1280, 1280, 8, 8), (2, 1280, 1280, 16, 16)]  # sums in parts
SMALL = {FIRST, LENET, ODD, FEW_IMAGES[0]}  # around 10 µs of work and less: a launch costs as much

BASE = [ConvCase(shape, BF16, small=shape in SMALL) for shape in (FIRST, THREE, *RESNET)] + [
    ConvCase(DEPTHWISE, BF16, groups=384),
    ConvCase(STRIDED, BF16, stride=2),
    ConvCase(GROUPED, BF16, groups=32),
    ConvCase(ODD, BF16, small=True),
]
VARIANTS: list[dict[str, Any]] = [dict(bias=False), dict(activation="sigmoid"), dict(bias=False, activation="sigmoid")]
KINDS: list[dict[str, Any]] = [dict(last=False), dict(dtype=FP32), dict(dtype=FP32, tf32=True), dict(dtype=FP16)]
VARIED = {FIRST, THREE, FEW[0], DEPTHWISE}  # shapes whose variants are measured in the other types and layouts too


def cases() -> list[ConvCase]:
    """The most valuable first: a run may be cut off."""
    lenet = ConvCase(LENET, FP32, small=True)
    nchw, *types = [[replace(case, **kind) for case in BASE] for kind in KINDS]
    return [
        *BASE,
        *(ConvCase(shape, BF16, small=shape in SMALL) for shape in FEW_IMAGES),
        *nchw,
        lenet,
        replace(lenet, tf32=True),
        *(case for typed in types for case in typed),
        *(replace(case, **variant) for variant in VARIANTS for case in [*BASE, lenet]),
        *(replace(c, **variant) for kind in (nchw, *types) for variant in VARIANTS for c in kind if c.shape in VARIED),
        *(ConvCase(shape, BF16, activation="relu") for shape in VGG),
    ]


# A program or two of every kernel; interpreted, one costs 50 ms, and a case runs its own ten times.
SMOKE_CASES = [
    ConvCase((2, 16, 16, 4, 4), BF16, small=True),
    ConvCase((1, 3, 8, 3, 5), BF16, activation="sigmoid"),
    ConvCase((1, 8, 8, 3, 5), BF16, groups=8),
    ConvCase((1, 8, 8, 3, 5), FP32, groups=2),
    ConvCase((1, 8, 16, 3, 6), FP32, tf32=True, stride=2, bias=False),
    ConvCase((1, 9, 8, 3, 5), FP16, last=False, activation="sigmoid"),
]


def pairs(length: int, stride: int) -> int:
    """Of the pairs of a result's row and a tap's, those that meet a row of the image and not its padding."""
    rows = (length + 2 * PADDING - 3) // stride + 1
    return sum(PADDING <= row * stride + tap < length + PADDING for row in range(rows) for tap in range(3))


def work(case: ConvCase, direction: str) -> Work:
    n, c, o, height, width = case.shape
    x, w, y = map(math.prod, case.sizes)
    b = o if case.bias else 0
    operations = 2 * n * o * (c // case.groups) * pairs(height, case.stride) * pairs(width, case.stride)
    dz = y + (y if case.activation else 0)  # dy, and the output for the activation's derivative
    return layer_work(case, direction, x=x, w=w, b=b, y=y, dz=dz, operations=operations)


FORWARD = {**dict.fromkeys(RESNET, 1.0), **dict.fromkeys(FEW, 1.3), FIRST: 2.0, THREE: 2.0}


def targets(case: ConvCase, direction: str) -> Sequence[Target]:
    """Ratios of cuDNN's time, with its benchmark mode on, to tribp's; of depthwise also a share of the copy's rate."""
    if case.dtype != BF16 or not case.bias or case.activation:
        return []
    if not case.last:
        return [Target("eager", 1.0)]
    if direction == "both":
        return []
    if case.depthwise:
        return [Target("copy", 0.8, "bandwidth"), Target("eager", 2.0)]
    if direction == "dgrad":
        return [Target("eager", 0.9)]
    if direction == "wgrad":
        return [Target("eager", 1.5 if case.shape in (FIRST, THREE, ODD) else 0.9)]
    return [Target("eager", FORWARD[case.shape])] if case.shape in FORWARD and case.groups == 1 else []


# Elements of input and output that are convolved in float64 at a time. torch keeps some four copies of them for the
# gradients, and cuDNN a workspace; the largest output, 256×64×224², would take 6.6 GB for each.
AT_A_TIME = 1 << 26


def eager(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, stride: int, padding: int, groups: int, activation: str | None
) -> Tensor:
    return activate(F.conv2d(x, w, b, stride, padding, 1, groups), *activation_of("bench", activation))


def workload(case: ConvCase, device: torch.device) -> DifferentiableWorkload:
    """Fresh inputs, scaled as a trained layer's are: z has a standard deviation near 1, so σ does not saturate."""

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return case.normal(device, *shape, std=std).to(memory_format=layout)

    layout = torch.channels_last if case.last else torch.contiguous_format
    x, w, y = case.sizes
    arguments = {"input": normal(*x), "weight": normal(*w, std=math.prod(w[1:]) ** -0.5)}
    if case.bias:
        arguments["bias"] = case.normal(device, w[0])
    options = dict(stride=case.stride, padding=PADDING, groups=case.groups, activation=case.activation)
    return DifferentiableWorkload(arguments, normal(*y), eager, case.tf32, options, images_at_a_time(case))


def images_at_a_time(case: ConvCase) -> int:
    x, _, y = case.sizes
    return max(1, AT_A_TIME // (math.prod(x[1:]) + math.prod(y[1:])))


# What is compiled without a GPU: bf16 over all forms, the other types where their rules differ from it.
MIDDLE, MANY = (256, 256, 256, 14, 14), (64, 512, 512, 7, 7)
UNEVEN_TYPES = ((BF16, False), (FP16, False), (FP32, False), (FP32, True))
NARROW = (64, 13, 11, 33, 29)  # channels that make no rows of whole 16 bytes
UNEVEN, FEWER = (16, 128, 128, 13, 13), (16, 512, 512, 7, 7)  # no box divides them: wgrad by pointers
WIDE = (256, 512, 512, 7, 7)  # in NCHW: boxes of images, stored column by column
APART = ("forward", "dgrad", "wgrad")


def compiled(everything: bool) -> Iterator[tuple[ConvCase, Sequence[str]]]:
    few, three, depthwise = ConvCase(FEW[0], BF16), ConvCase(THREE, BF16), ConvCase(DEPTHWISE, BF16, groups=384)
    some = [
        few, ConvCase(MIDDLE, BF16), ConvCase(NARROW, BF16), three, depthwise, ConvCase(STRIDED, BF16, stride=2),
        ConvCase(GROUPED, BF16, groups=32), *(replace(case, last=False) for case in (few, three, depthwise)),
        *(replace(few, dtype=FP32, tf32=tf32) for tf32 in (False, True)), replace(three, dtype=FP32),
        replace(few, dtype=FP64), replace(depthwise, dtype=FP32),
    ]  # fmt: skip
    yield from ((case, APART) for case in some)
    yield replace(few, activation="sigmoid"), ("forward", "backward")
    yield replace(few, last=False, activation="sigmoid"), ("backward",)
    yield replace(three, activation="sigmoid"), ("forward", "wgrad")
    yield ConvCase(MANY, BF16, last=False, activation="tanh"), ("forward",)
    yield ConvCase(FEW_IMAGES[0], BF16), ("forward", "dgrad")
    if not everything:
        return
    # All that is measured, and float64.
    measured = [*cases(), *(replace(case, dtype=FP64) for case in BASE)]
    some_shapes = (UNEVEN, FEWER, *FEW_IMAGES)
    measured += [ConvCase(shape, dtype, tf32) for shape in some_shapes for dtype, tf32 in UNEVEN_TYPES]
    measured += [ConvCase(FEW_IMAGES[0], dtype, last=False) for dtype in (BF16, FP32, FP64)]
    yield from ((case, (*APART, "backward")) for case in measured)
    yield ConvCase(LENET, BF16), ("dgrad",)
    for activation in ("tanh", "elu", "softplus"):  # those that take most registers
        yield from ((replace(case, activation=activation), ("forward",)) for case in (few, depthwise))
    for channels, side, stride in ((64, 112, 2), (120, 56, 1), (256, 28, 1)):  # those that spilled
        yield ConvCase((8, channels, channels, side, side), BF16, groups=channels, stride=stride), APART
    yield ConvCase(WIDE, FP32, last=False, activation="tanh"), ("forward",)


# -- what machine code must show --------------------------------------------------------------------------------------


def expectations(launch: Launch, case: ConvCase, arch: Arch) -> Iterator[Expectation]:
    kernel, given, dtype = launch.kernel.__name__, launch.named, case.dtype
    if kernel in ("forward", "dgrad", "wgrad", "few_channels_forward", "few_channels_dgrad", "few_channels_wgrad"):
        yield from product_expectations(launch, dtype, arch)
    elif kernel == "relayout":
        yield from relayout_expectations(launch, dtype, arch)
    elif kernel == "pack":
        share = size(given, "BLOCK_P", "BLOCK_C") * dtype.itemsize // (16 * threads(launch, arch))
        loads = share if is_aligned(given, dtype, "SRC", "VEC_C") else 0
        stores = share if expect.is_whole(given, dtype, "VEC_DST") else 0
        if loads + stores:
            yield expect.vectors(loads, stores, "16 bytes a thread, of every tile of an image")
    elif kernel.startswith("depthwise"):
        loads, stores = row_accesses(given, kernel)
        across = size(given, "BOX_N", "BOX_W", "BLOCK_C") * dtype.itemsize // (16 * threads(launch, arch))
        # A row of channels is as wide under every tap; one of columns lies anywhere.
        loads = loads if given["CHANNELS_LAST"] and expect.is_whole(given, dtype, "VEC") else 0
        stores = stores if given["CHANNELS_LAST"] and expect.is_whole(given, dtype, "VEC_STORE") else 0
        if across and loads + stores:
            reason = "16 bytes a thread, of every row that is read and every row that is written"
            yield expect.vectors(across * loads, across * stores, reason)
    elif kernel in ("output", "reduce_partials"):
        yield from expect.partial_sums(launch)


def product_expectations(launch: Launch, dtype: torch.dtype, arch: Arch) -> Iterator[Expectation]:
    kernel, given = launch.kernel.__name__, launch.named
    sides: tuple[str, ...] = ("BLOCK_O", "BLOCK_C") if "wgrad" in kernel else ("BOX_N", "BOX_H", "BOX_W", "BLOCK_J")
    if kernel in ("few_channels_forward", "few_channels_dgrad"):  # a row at a time
        sides = ("BOX_N", "BOX_W", "BLOCK_O")
    weights_first = kernel == "few_channels_forward" or (kernel in ("forward", "dgrad") and bool(given["TMA"]))
    yield from expect.product(size(given, *(sides[-1:] if weights_first else sides[:-1])), dtype, launch, arch)
    if not kernel.startswith("few_channels") or (kernel == "few_channels_dgrad" and launch.num_stages > 1):
        yield expect.PIPELINED
    if kernel in ("few_channels_dgrad", "few_channels_wgrad") or (
        kernel == "wgrad" and (given.get("TAPS_LAST") or given["DIAGONAL"])
    ):
        return  # rows of few elements, elements nine apart, or a group's part of a row: nothing to write at once
    if given.get("SUMS_BLOCK_ROWS", 1) > 1:
        return  # sums that are transposed are written element by element; dgrad alone has none
    if arch.backend == "hip" and given.get("CHANNELS_LAST") is False:
        return  # side by side in a thread are channels; neighbouring columns are in neighbouring lanes, 64 bytes a row
    out = {"dgrad": "dx", "wgrad": "dw"}.get(kernel, "y")
    yield from expect.tile_stores(launch, out, sides, arch)


def relayout_expectations(launch: Launch, dtype: torch.dtype, arch: Arch) -> Iterator[Expectation]:
    """Wide on both sides, where a thread has 16 bytes to move and what is contiguous is a multiple of them."""
    given = launch.named
    if size(given, "BLOCK_P", "BLOCK_C") * dtype.itemsize < 16 * threads(launch, arch):
        return
    if is_aligned(given, dtype, "SRC", "VEC_C") and (given["y"] is None or is_aligned(given, dtype, "Y", "VEC_C")):
        yield expect.wide("loads", 128, "what is contiguous is a multiple of 16 bytes")
    if given["dst"] is not None and is_aligned(given, dtype, "DST", "VEC_DST"):
        yield expect.wide("stores", 128, "what is contiguous is a multiple of 16 bytes")


def is_aligned(given: Given, dtype: torch.dtype, side: str, channels: str) -> bool:
    """Whether what is contiguous on this side comes in whole 16 bytes. channels: the constant that says how many."""
    inner = channels if given[f"{side}_CHANNELS"] else "VEC_P" if given[f"{side}_PIXELS"] else ""
    return bool(inner) and expect.is_whole(given, dtype, inner, f"{side}_VEC")


def row_accesses(given: Given, kernel: str) -> tuple[int, int]:
    """How many rows of a box's width a depthwise program loads and stores at once: an image row once for each tap."""
    rows, step_h, step_w = (given[name] for name in ("BOX_H", "STEP_H", "STEP_W"))
    if kernel == "depthwise_forward":
        return 4 * 3, 4 // step_h
    if kernel == "depthwise_wgrad":
        return rows + 3 * ((rows - 1) * step_h + 3), 0
    # A class of pixels meets every STEP-th tap from its own on, and all classes are in the code.
    return 4 * 3 * step_h, 4 * step_h * step_w


# -- what a launch does -----------------------------------------------------------------------------------------------


def pixels_of(given: Given) -> int:
    return size(given, "BOX_N", "BOX_H", "BOX_W")


def product_work(
    given: Given, grid: tuple[int, ...], case: Any, operand: str, out: str, channels: str
) -> dict[str, Any]:
    """forward and dgrad: taps × steps through the channels. A class of pixels meets 9 / (classes) taps on average,
    a part of a sum 9 / (parts).
    """
    turns = cdiv(size(given, "GROUPS_PER_TILE", channels), given["BLOCK_L"])
    taps = 9 / grid[1]
    pixels = pixels_of(given)
    step = pixels * given["BLOCK_J"] * given["BLOCK_L"]
    read = (pixels + given["BLOCK_J"]) * given["BLOCK_L"] * model.itemsize(given, operand)
    loops = (taps * turns, step) if given["FLAT"] else (turns, step, (taps,))
    work = model.product(given, operand, *loops)
    written = pixels * given["BLOCK_J"] * model.itemsize(given, out)
    if out == "y" and given["b"] is not None:
        work |= dict(chain=2)
    programs = math.prod(grid)
    return work | model.traffic(given, programs * taps * turns * read, programs * written, programs)


def wgrad_work(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    taps, pixels, turns = given["TAPS"], pixels_of(given), given["boxes_per_split"]
    work = model.product(given, "x", turns, taps * pixels * size(given, "BLOCK_O", "BLOCK_C"))
    read = pixels * (given["BLOCK_O"] + taps * given["BLOCK_C"]) * model.itemsize(given, "x")
    written = taps * size(given, "BLOCK_O", "BLOCK_C") * model.itemsize(given, "dw")
    programs = math.prod(grid)
    return work | model.traffic(given, programs * turns * read, programs * written, programs)


def few_channels_forward_work(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    """A row of y a turn, three products."""
    step = 3 * size(given, "BOX_N", "BOX_W", "BLOCK_O", "BLOCK_K")
    return model.product(given, "y", given["BOX_H"], step) | dict(chain=1 + (given["b"] is not None))


def few_channels_dgrad_work(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    """A row of dz a turn. Boxes read two rows and two columns of their neighbours."""
    rows, columns, itemsize = given["BOX_H"], given["BOX_W"], model.itemsize(given, "dx")
    step = size(given, "BOX_N", "BOX_W", "BLOCK_O", "BLOCK_K")
    read = size(given, "N", "P", "Q", "O") * (rows + 2) / rows * columns / (columns - 2)
    return model.product(given, "dx", rows + 2, step) | dict(l2=itemsize * (read + size(given, "N", "H", "W", "C")))


def relayout_work(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    step = (1 + (given["y"] is not None)) * size(given, "BLOCK_P", "BLOCK_C") * model.itemsize(given, "src")
    return dict(turns=given["tiles_per_program"], step=step, chain=0)


def pack_work(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    """Of the images; a weight beside them is small."""
    turns, step = (given["first_tiles_per_program"] - 3) // 2, size(given, "BLOCK_P", "BLOCK_C")
    return dict(turns=turns, step=step * model.itemsize(given, "first"), chain=0)


OPERATION = Operation(
    name="conv",
    summary="tribp.conv3x3 against conv2d(…), and act(conv2d(…)), of cuDNN",
    cases=cases(),
    smoke_cases=SMOKE_CASES,
    directions=("forward", "dgrad", "wgrad", "both"),
    providers=functions(tribp.conv3x3, eager),
    workload=workload,
    work=work,
    targets=targets,
    compiled=compiled,
    expectations=expectations,
    kernel_work={
        "forward": partial(product_work, operand="x", out="y", channels="CG"),
        "dgrad": partial(product_work, operand="dz", out="dx", channels="OG"),
        "wgrad": wgrad_work,
        "spread_weight": lambda *_: {},
        "few_channels_forward": few_channels_forward_work,
        "few_channels_dgrad": few_channels_dgrad_work,
        "few_channels_wgrad": lambda given, *_: model.product(
            given, "x", given["boxes_per_split"], pixels_of(given) * size(given, "BLOCK_O", "BLOCK_K")
        ),
        # Four rows a turn.
        "depthwise_forward": lambda given, *_: dict(turns=(given["BOX_H"] * given["STEP_H"] + 2) / 4),
        "depthwise_dgrad": lambda given, *_: dict(turns=(given["BOX_H"] + 2) / 4),
        "depthwise_wgrad": lambda given, *_: dict(turns=given["boxes_per_split"]),
        "relayout": relayout_work,
        "pack": pack_work,
        "output": model.output,
        "reduce_partials": model.reduce_partials,
    },
    tests=KernelTests(
        ["tests/conv3x3/test_integration.py", "tests/conv3x3/test_module.py"],
        ["tests/conv3x3/test_kernels.py", "-k",
         "(bfloat16 or few_input or one_channel or relayout or nan or infinity) and not gpu"],
        ["tests/conv3x3/test_kernels.py", "-k", "relayout and copy and NCHW"],
        large=["tests/conv3x3/test_extremes.py"],
        kernels=["tests/conv3x3/test_kernels.py"],
    ),
    legend=f"Shapes are N×C-O×H×W, /stride, :groups; padding {PADDING}. dgrad is the input's gradient alone, wgrad the "
    "weight's and the bias's, both: forward, and backward with all of them. Eager torch has cuDNN's benchmark mode on. "
    f"{Operation.legend}",
)  # fmt: skip
