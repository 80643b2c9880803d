"""The convolutions that are measured, the least work that each takes, and what was set for an H100."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .registry import Case, Target, Work

PADDING = 1


@dataclass(frozen=True)
class ConvCase(Case):
    """shape: (N, C, O, H, W). Named 64x128-256x28x28/2 with a stride of 2, 64x384-384x56x56:384 with 384 groups."""

    stride: int = 1
    groups: int = 1
    last: bool = True  # channels_last: input, weight, and what comes back from the layer above
    bias: bool = True
    sigmoid: bool = False

    @property
    def name(self) -> str:
        n, c, o, h, w = self.shape
        window = (f"/{self.stride}" if self.stride > 1 else "") + (f":{self.groups}" if self.groups > 1 else "")
        on = ["NHWC" if self.last else "NCHW"] + ["bias"] * self.bias + ["sigmoid"] * self.sigmoid
        return " ".join([f"{n}x{c}-{o}x{h}x{w}{window}", self.dtype_name, *on])

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.last else torch.contiguous_format

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        n, c, _, h, w = self.shape
        return n, c, h, w

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        _, c, o, _, _ = self.shape
        return o, c // self.groups, 3, 3

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        n, _, o, h, w = self.shape
        p, q = ((length + 2 * PADDING - 3) // self.stride + 1 for length in (h, w))
        return n, o, p, q

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.shape[1] == self.shape[2]


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FIRST, THREE = (256, 1, 32, 28, 28), (256, 3, 64, 224, 224)  # few input channels
FEW = [(n, 64, 64, 56, 56) for n in (64, 256)]
RESNET = [*FEW, *((n, c, c, size, size) for c, size in ((128, 28), (256, 14), (512, 7)) for n in (64, 256))]
STRIDED, GROUPED, DEPTHWISE = (64, 128, 256, 28, 28), (64, 128, 128, 28, 28), (64, 384, 384, 56, 56)
LENET, ODD = (1, 1, 6, 32, 32), (3, 5, 7, 33, 29)
SMALL = {FIRST, LENET, ODD}  # around 10 µs of work and less: a launch costs as much

BASE = [ConvCase(shape, BF16, small=shape in SMALL) for shape in (FIRST, THREE, *RESNET)] + [
    ConvCase(DEPTHWISE, BF16, groups=384),
    ConvCase(STRIDED, BF16, stride=2),
    ConvCase(GROUPED, BF16, groups=32),
    ConvCase(ODD, BF16, small=True),
]
VARIANTS: list[dict[str, Any]] = [dict(bias=False), dict(sigmoid=True), dict(bias=False, sigmoid=True)]
KINDS: list[dict[str, Any]] = [dict(last=False), dict(dtype=FP32), dict(dtype=FP32, tf32=True), dict(dtype=FP16)]
VARIED = {FIRST, THREE, FEW[0], DEPTHWISE}  # shapes whose variants are measured in the other types and layouts too


def cases() -> list[ConvCase]:
    """The most valuable first: a run may be cut off."""
    lenet = ConvCase(LENET, FP32, small=True)
    nchw, *types = [[replace(case, **kind) for case in BASE] for kind in KINDS]
    return [
        *BASE,
        *nchw,
        lenet,
        replace(lenet, tf32=True),
        *(case for typed in types for case in typed),
        *(replace(case, **variant) for variant in VARIANTS for case in [*BASE, lenet]),
        *(replace(c, **variant) for kind in (nchw, *types) for variant in VARIANTS for c in kind if c.shape in VARIED),
    ]


def smoke_cases() -> list[ConvCase]:
    """A program or two of every kernel; interpreted, one costs 50 ms, and a case runs its own ten times."""
    return [
        ConvCase((2, 16, 16, 4, 4), BF16, small=True),
        ConvCase((1, 3, 8, 3, 5), BF16, sigmoid=True),
        ConvCase((1, 8, 8, 3, 5), BF16, groups=8),
        ConvCase((1, 8, 8, 3, 5), FP32, groups=2),
        ConvCase((1, 8, 16, 3, 6), FP32, tf32=True, stride=2, bias=False),
        ConvCase((1, 9, 8, 3, 5), FP16, last=False, sigmoid=True),
    ]


def pairs(length: int, stride: int) -> int:
    """Of the pairs of a result's row and a tap's, those that meet a row of the image and not its padding."""
    rows = (length + 2 * PADDING - 3) // stride + 1
    return sum(PADDING <= row * stride + tap < length + PADDING for row in range(rows) for tap in range(3))


def work(case: ConvCase, direction: str) -> Work:
    """Each input read once, each output written once; "both" is forward, then backward with all gradients."""
    n, c, o, height, width = case.shape
    x, y = math.prod(case.input_size), math.prod(case.output_size)
    w, b = 9 * o * c // case.groups, o if case.bias else 0
    operations = 2 * n * o * (c // case.groups) * pairs(height, case.stride) * pairs(width, case.stride)
    dz = y + (y if case.sigmoid else 0)  # dy, and the output for the sigmoid's derivative
    elements = {
        "forward": Work(x + w + b + y, operations),
        "dgrad": Work(dz + w + x, operations),
        "wgrad": Work(dz + x + w + b, operations),
        "both": Work((x + w + b + y) + (dz + x + w) + (x + w + b), 3 * operations),
    }[direction]
    return replace(elements, bytes=elements.bytes * case.dtype.itemsize)


def targets(case: ConvCase, direction: str) -> Sequence[Target]:
    """Ratios of cuDNN's time, with its benchmark mode on, to tribp's; of depthwise also a share of the copy's rate."""
    if case.dtype != BF16 or not case.bias or case.sigmoid:
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
    if case.shape in (FIRST, THREE):
        return [Target("eager", 2.0)]
    if case.shape in FEW:
        return [Target("eager", 1.3)]
    return [Target("eager", 1.0)] if case.shape in RESNET and case.groups == 1 else []
