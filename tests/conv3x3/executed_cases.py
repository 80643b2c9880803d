"""`conv3x3` where compiled code is executed: cases, and how far off their results may be."""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import tribp

from ..executed.checks import (
    BRAIN,
    DOUBLE,
    HALF,
    SINGLE,
    Case,
    Gradients,
    Layout,
    Rounding,
    differences,
    gradients,
    output_bound,
    require_gradients,
)
from ..oracle import ACTIVATIONS, Activation, derivative
from . import cases as images


class Conv(NamedTuple):
    case: images.Case
    dtype: torch.dtype = BRAIN
    x: Layout = images.last
    w: Layout = images.last
    dy: Layout | None = None  # None: as y lies
    needs: str = "xwb"
    tf32: bool = False
    processors: int = 2

    def wrong(self) -> list[str]:
        case = self.case
        draw = torch.rand if self.tf32 else torch.randn
        terms_of_y = case.size[1] // case.groups * 9
        x = self.x(draw(case.size, dtype=DOUBLE).to(self.dtype))
        w = draw(case.out, terms_of_y // 9, 3, 3, dtype=DOUBLE) / (terms_of_y if self.tf32 else terms_of_y**0.5)
        w = self.w(w.to(self.dtype))
        b = draw(case.out, dtype=DOUBLE).to(self.dtype) if case.bias else None
        inputs = require_gradients(self.needs, x, w, b)
        torch.backends.cudnn.allow_tf32 = self.tf32
        y = case.ours(x, w, b)
        dy = draw(y.shape, dtype=DOUBLE).to(self.dtype)
        dy = self.dy(dy) if self.dy else torch.empty_like(y).copy_(dy)
        found = gradients(y, inputs, dy)

        rounding = Rounding(self.dtype, self.tf32)
        oracle = case.exact(x, w, b)
        # The same sums over squares: how large the terms of each are.
        squares = [None if t is None else t.detach().double().square() for t in (x, w, b)]
        square = case._replace(activation=None).exact(*squares)  # type: ignore[arg-type]
        error = rounding.sum_of(terms_of_y) * square.y.sqrt()
        wrong = differences("y", y, oracle.y, output_bound(rounding, oracle.y, error, case.activation))
        dz = dy.double() * derivative(y.detach().double(), case.activation, self.dtype)
        dx, dw, db, terms = oracle.gradients(dy, y)
        dx_size, dw_size, *_ = square.gradients(dz.square(), square.y)
        pixels, rounded = dz.numel() // dz.shape[1], case.activation is not None
        exact = Gradients(
            (dx, rounding.sum_of(9 * case.out // case.groups, rounded) * dx_size.sqrt()),
            (dw, rounding.sum_of(pixels, rounded) * dw_size.sqrt()),
            (db, Rounding(self.dtype).sum_of(pixels) * terms),
        )
        return wrong + exact.differences(found, rounding)


class Apart(NamedTuple):
    """Groups that share a tile, an infinity in one of them: no other group may see it."""

    channels: int
    groups: int
    processors: int = 2

    def wrong(self) -> list[str]:
        x = images.last(torch.randn(2, self.channels, 8, 8, dtype=DOUBLE).to(BRAIN))
        w = images.last(torch.randn(self.channels, self.channels // self.groups, 3, 3, dtype=DOUBLE).to(BRAIN))
        dy = images.last(torch.randn(x.shape, dtype=DOUBLE).to(BRAIN))
        x[0, 5, 3, 3] = dy[1, 9, 2, 2] = math.inf
        y = tribp.conv3x3(x.requires_grad_(), w, None, padding=1, groups=self.groups)
        found = {"y": y, "dx": torch.autograd.grad(y, x, dy)[0]}
        wide = x.detach().double().contiguous().requires_grad_()
        exact = torch.nn.functional.conv2d(wide, w.double().contiguous(), None, 1, 1, 1, self.groups)
        wrong = []
        for name, wanted in {"y": exact.detach(), "dx": torch.autograd.grad(exact, wide, dy.double())[0]}.items():
            finite = wanted.isfinite()
            if not torch.equal(found[name].isfinite(), finite):
                wrong.append(f"{name} is not finite where it should be, or the other way round")
            bound = torch.full_like(wanted, 2 * Rounding(BRAIN).unit * float(wanted[finite].abs().max()))
            wrong += differences(name, found[name][finite], wanted[finite], bound[finite])
        return wrong


def conv(
    size: tuple[int, int, int, int], out: int, *, stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1, groups: int = 1, activation: Activation = None, bias: bool = True, **more: Any,
) -> Conv:  # fmt: skip
    """A case from the size of x and the number of output channels."""
    strides, paddings = (pair if isinstance(pair, tuple) else (pair, pair) for pair in (stride, padding))
    return Conv(images.Case(size, out, strides, paddings, groups, activation, bias), **more)


QUICK: dict[str, Case] = {
    "conv, NCHW": conv((4, 32, 8, 16), 40, x=images.contiguous, w=images.contiguous, activation="sigmoid"),
    "conv, split sum": conv((4, 32, 16, 16), 32, groups=2, w=images.contiguous, needs="wb", processors=18),
    "conv, padded channels": conv((2, 13, 9, 7), 11, x=images.contiguous, dtype=HALF),
    "conv, stride 2, odd": conv((2, 72, 11, 9), 24, stride=(1, 2), x=images.cropped_last, bias=False),
    "conv, bundles": conv((2, 40, 6, 7), 20, groups=5, activation="sigmoid"),
    "conv, image": conv((2, 3, 16, 12), 72, activation="sigmoid", needs="wb"),
    "conv, dx of an image, even pitch": conv((2, 2, 5, 9), 6, needs="x"),
    "conv, dx of an NCHW image": conv((5, 4, 7, 12), 6, padding=(2, 0), x=images.contiguous, w=images.contiguous),
    "conv, NCHW image, float32": conv(
        (2, 3, 9, 12), 20, stride=2, x=images.contiguous, w=images.contiguous, bias=False, needs="w", dtype=SINGLE
    ),
    "conv, depthwise": conv((6, 72, 17, 11), 72, groups=72, stride=(2, 1), processors=108),  # boxes below each other
    "conv, float32": conv((1, 32, 8, 8), 32, dtype=SINGLE),
    "conv, tf32": conv((1, 64, 8, 8), 64, dtype=SINGLE, tf32=True),
    "conv, NCHW depthwise, float32": conv(
        (2, 8, 8, 16), 8, groups=8, x=images.contiguous, stride=(1, 2), activation="sigmoid", bias=False, dtype=SINGLE
    ),
    "conv, db alone": conv((2, 8, 9, 7), 72, needs="b"),
    "conv, y in parts": conv((1, 480, 6, 7), 24, activation="sigmoid", needs="", processors=8),
    "conv, y in parts, NCHW": conv(
        (2, 480, 5, 4), 20, x=images.contiguous, activation="relu", needs="", dtype=HALF, processors=8
    ),
    "conv, dx in parts": conv((1, 24, 6, 7), 480, needs="xw", processors=8),
}
QUICK_ON_HOPPER: dict[str, Case] = {
    "conv, float64": conv((1, 24, 8, 8), 24, dtype=DOUBLE),
    "conv, 128 columns": conv((1, 128, 16, 16), 136),
    "conv, box and rest, sigmoid": conv((3, 24, 13, 11), 40, activation="sigmoid"),
    "conv, lines of images": conv((32, 24, 3, 2), 72, needs="wb"),
    "conv, lines of columns": conv((1, 24, 3, 32), 72, needs="wb", stride=(2, 1)),
    "conv, groups": conv((2, 64, 8, 8), 144, groups=2),
    "conv, image, no activation": conv((2, 3, 9, 12), 40, needs="wb", dtype=HALF),
    "conv, dx of an image": conv((2, 3, 9, 140), 40, needs="x"),
}

DTYPES = (HALF, BRAIN, SINGLE, DOUBLE)
SLOW: dict[str, Case] = {
    "conv, y in parts, no bias, stride 2": conv((2, 480, 9, 8), 20, stride=2, bias=False, needs="", processors=8),
    "conv, dx in parts, NCHW": conv((2, 20, 6, 7), 480, x=images.contiguous, needs="x", dtype=HALF, processors=8),
    "conv, large y in parts": conv((1, 480, 16, 8), 128, needs="", processors=8),
    "conv, dx in parts, float32": conv((1, 24, 6, 7), 480, needs="x", dtype=SINGLE, processors=8),
    "conv, y in parts, tf32": conv((1, 480, 6, 7), 24, needs="", dtype=SINGLE, tf32=True, processors=8),
    "conv, y in parts, float64": conv((1, 480, 6, 7), 24, needs="", dtype=DOUBLE, processors=8),
    "conv, groups taken apart": Apart(64, 16),
    "conv, 64 columns": conv((2, 64, 16, 16), 64),
    "conv, 40 columns, NCHW": conv((15, 40, 5, 8), 40, padding=(0, 1), x=images.contiguous, needs="x", processors=1),
    "conv, split sum behind dx": conv((8, 32, 16, 16), 72, stride=2, w=images.contiguous, processors=18),
    "conv, box and rest": conv((4, 32, 7, 7), 40),
    "conv, stride 2": conv((2, 64, 16, 16), 72, stride=2),
    "conv, bundles of 64 columns": conv((15, 128, 5, 8), 128, groups=16, needs="x", processors=1),
    "conv, relu": conv((3, 24, 13, 11), 40, activation="relu"),
    "conv, NCHW, tanh": conv((2, 24, 7, 9), 40, x=images.contiguous, activation="tanh", dtype=SINGLE),
    "conv, image, hardtanh": conv((2, 3, 16, 12), 24, activation=("hardtanh", -0.3, 0.1), needs="wb"),
    "conv, depthwise, elu": conv((2, 16, 9, 8), 16, groups=16, activation="elu"),
    "conv, 3 columns": conv((2, 24, 9, 10), 3, activation="sigmoid"),
    "conv, dx of an image, stride 2": conv((2, 3, 9, 12), 24, stride=2),
    "conv, dx of an image, float32": conv((2, 3, 40, 70), 24, needs="x", dtype=SINGLE),
    "conv, dx of an image, tf32": conv((1, 1, 9, 70), 64, needs="x", dtype=SINGLE, tf32=True),
    "conv, dx of an image, 128 channels": conv((1, 2, 6, 70), 128, padding=(1, 2), needs="x", dtype=HALF),
    "conv, dx of an image, far padding": conv((2, 3, 3, 5), 24, padding=(4, 3), needs="x", dtype=SINGLE),
    "conv, far padding": conv((2, 16, 3, 5), 24, padding=(4, 3)),
    "conv, one pixel": conv((3, 16, 1, 1), 16),
    "conv, 256 columns": conv((2, 40, 16, 16), 264, needs="xw"),
    "conv, tf32 image": conv((2, 3, 16, 16), 24, dtype=SINGLE, tf32=True),
    "conv, tf32 wgrad alone": conv((4, 64, 8, 8), 64, dtype=SINGLE, tf32=True, needs="wb"),
    "conv, tf32 stride 2": conv((2, 32, 9, 8), 40, stride=2, dtype=SINGLE, tf32=True),
    "conv, tf32 groups": conv((2, 64, 8, 8), 64, groups=2, dtype=SINGLE, tf32=True),
    # Tensor cores of sm_90 read these weights and pixels from registers, or a ring that is summed as well.
    **{
        f"conv, {c} to {o}, {size}, stride {stride}": conv((4, c, size, size), o, stride=stride)
        for c, o, size, stride in [
            (64, 128, 14, 1), (64, 256, 14, 2), (64, 512, 7, 1), (128, 64, 8, 1), (128, 128, 8, 2),
        ]
    },
    **{
        f"conv, wgrad with bias, {n} of {size}": conv((n, 64, size, size), 72, needs="wb")
        for n, size in [(8, 7), (2, 13), (1, 14), (3, 15), (1, 27), (1, 30)]
    },
    **{
        f"conv, {str(dtype)[6:]}, {way}": case._replace(dtype=dtype)
        for dtype in DTYPES
        for way, case in {
            "dense": conv((2, 40, 9, 10), 24, activation="sigmoid"),
            "stride 2": conv((2, 16, 10, 12), 24, stride=2, x=images.contiguous),
            "groups": conv((2, 32, 5, 6), 48, groups=2, stride=(2, 1)),
            "bundles": conv((1, 24, 7, 7), 48, groups=6),
            "image": conv((2, 4, 10, 9), 12, activation="sigmoid", x=images.transposed),
            "depthwise": conv((2, 12, 7, 9), 12, groups=12, stride=2, x=images.cropped),
        }.items()
    },
}  # fmt: skip


STRIDES: list[int | tuple[int, int]] = [1, 1, 2, (1, 2), (2, 1)]
PADDINGS: list[int | tuple[int, int]] = [0, 1, 1, 2, (0, 1)]


def random_conv(chance: random.Random) -> Case:
    groups, c, o = (
        chance.choice([1, 1, 1, 2, 5, 0]),
        chance.choice([1, 3, 4, 7, 8, 13, 16, 40]),
        chance.choice([1, 6, 8, 20]),
    )
    c, o, groups = (c, c, c) if groups == 0 else (c * groups, o * groups, groups)
    return conv(
        (chance.choice([1, 2, 5]), c, chance.randint(3, 17), chance.randint(3, 17)), o,
        stride=chance.choice(STRIDES), padding=chance.choice(PADDINGS), groups=groups,
        activation=chance.choice(ACTIVATIONS), bias=chance.random() < 0.7, dtype=chance.choice(DTYPES),
        x=chance.choice([images.contiguous, images.last, images.every_other, images.cropped, images.sliced_last]),
        w=chance.choice([images.contiguous, images.last]), needs=chance.choice(["xwb", "xw", "wb", "w", "x"]),
        processors=chance.choice([1, 2, 8, 108]),
    )  # fmt: skip


RANDOM: dict[str, Callable[[random.Random], Case]] = {"conv": random_conv}
