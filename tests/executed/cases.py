"""What the executor runs: lists of cases for every kernel family, small shapes that take the code of large ones."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch

from ..conv3x3 import cases as images
from ..optim import cases as lies
from .checks import BRAIN, DOUBLE, HALF, SHAPES, SINGLE, Apart, Beyond, Case, Conv, Linear, Rule, expanded


def conv(
    size: tuple[int, int, int, int], out: int, *, stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1, groups: int = 1, sigmoid: bool = False, bias: bool = True, **more: Any,
) -> Conv:  # fmt: skip
    """A case from the size of x and the number of output channels."""
    strides, paddings = (pair if isinstance(pair, tuple) else (pair, pair) for pair in (stride, padding))
    return Conv(images.Case(size, out, strides, paddings, groups, "sigmoid" if sigmoid else None, bias), **more)


def shifted_columns(t: torch.Tensor) -> torch.Tensor:
    return lies.shifted(t.t()).t()


ALIGNED = ("block and rest", "channels_last", "0-d", "empty")

# What every run of the tests executes: each kernel, with each of its compile-time switches on and off
# (`test_every_form_was_executed` holds the list to that).
QUICK: dict[str, Case] = {
    "linear, whole tiles": Linear((136, 264, 200)),
    "linear, columns": Linear((136, 72, 136), HALF, lies.transposed, lies.transposed),
    "linear, persistent": Linear((136, 264, 1032), needs="", processors=1),
    "linear, odd pitch": Linear((70, 77, 65), x=lies.transposed),
    "linear, even pitch": Linear((72, 42, 78), HALF, w=lies.transposed),
    "linear, misaligned": Linear((40, 24, 72), x=lies.shifted, w=shifted_columns, dy=lies.gaps, bias=False),
    "linear, float32": Linear((136, 72, 104), SINGLE),
    "linear, tf32": Linear((72, 72, 136), SINGLE, tf32=True),
    "linear, float64": Linear((72, 40, 56), DOUBLE),
    "linear, frozen weight": Linear((72, 136, 72), needs="xb", dy=expanded),
    "linear, split sum": Linear((1100, 40, 72), HALF, needs="wb"),
    "linear, dx alone": Linear((136, 72, 72), needs="x"),
    "linear, wide dx": Linear((136, 72, 200), needs="x", processors=1),
    "linear, tall dx": Linear((250, 72, 360), needs="x", processors=1),
    "linear, db alone": Linear((136, 72, 24), needs="b"),
    "conv, 64 columns": conv((2, 64, 16, 16), 64),
    "conv, 128 columns": conv((1, 128, 16, 16), 136),
    "conv, two rows": conv((16, 64, 4, 8), 64, needs="x", processors=1),
    "conv, two rows of few images": conv((1, 64, 4, 72), 64, needs="x", processors=1),
    "conv, two rows and rest, NCHW": conv(
        (15, 40, 5, 8), 40, padding=(0, 1), x=images.contiguous, needs="x", processors=1
    ),
    "conv, two rows of 128 columns": conv((15, 40, 4, 8), 136, sigmoid=True, needs="", processors=1),
    "conv, box and rest": conv((4, 32, 7, 7), 40),
    "conv, box and rest, sigmoid": conv((3, 24, 13, 11), 40, sigmoid=True),
    "conv, lines of images": conv((32, 24, 3, 2), 72, needs="wb"),
    "conv, lines of columns": conv((1, 24, 3, 32), 72, needs="wb", stride=(2, 1)),
    "conv, NCHW": conv((4, 32, 8, 16), 40, x=images.contiguous, w=images.contiguous, sigmoid=True),
    "conv, split sum": conv((4, 32, 16, 16), 32, groups=2, w=images.contiguous, needs="wb", processors=18),
    "conv, padded channels": conv((2, 13, 9, 7), 11, x=images.contiguous, dtype=HALF),
    "conv, stride 2": conv((2, 64, 16, 16), 72, stride=2),
    "conv, stride 2, odd": conv((2, 72, 11, 9), 24, stride=(1, 2), x=images.cropped_last, bias=False),
    "conv, groups": conv((2, 64, 8, 8), 144, groups=2),
    "conv, bundles": conv((2, 40, 6, 7), 20, groups=5, sigmoid=True),
    "conv, groups taken apart": Apart(64, 16),
    "conv, image": conv((2, 3, 16, 12), 72, sigmoid=True, needs="wb"),
    "conv, image, no activation": conv((2, 3, 9, 12), 40, needs="wb", dtype=HALF),
    "conv, dx of an image": conv((2, 3, 9, 140), 40, needs="x"),
    "conv, dx of an image, even pitch": conv((2, 2, 5, 9), 6, needs="x"),
    "conv, dx of an NCHW image": conv((5, 4, 7, 12), 6, padding=(2, 0), x=images.contiguous, w=images.contiguous),
    "conv, NCHW image, float32": conv(
        (2, 3, 9, 12), 20, stride=2, x=images.contiguous, w=images.contiguous, bias=False, needs="w", dtype=SINGLE
    ),
    "conv, depthwise": conv((6, 72, 17, 11), 72, groups=72, stride=(2, 1), processors=108),  # boxes below each other
    "conv, NCHW depthwise, float32": conv(
        (2, 8, 8, 16), 8, groups=8, x=images.contiguous, stride=(1, 2), sigmoid=True, bias=False, dtype=SINGLE
    ),
    "conv, float32": conv((1, 32, 8, 8), 32, dtype=SINGLE),
    "conv, tf32": conv((1, 64, 8, 8), 64, dtype=SINGLE, tf32=True),
    "conv, float64": conv((1, 24, 8, 8), 24, dtype=DOUBLE),
    "conv, db alone": conv((2, 8, 9, 7), 72, needs="b"),
    "SGD": Rule("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "Momentum": Rule("Momentum", {}, BRAIN),
    "RMSprop": Rule("RMSprop", {"momentum": 0.9, "centered": True}, HALF),
    "Adagrad": Rule("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.3}),
    "Adam, amsgrad in one group": Rule("Adam", {}, DOUBLE, second={"amsgrad": True}),
    "AdamW": Rule("AdamW", {}, BRAIN),
    "Adagrad, 600 tensors": Rule(
        "Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.3}, layouts=("0-d",) * 600
    ),
    "aligned, clipping, ε inside": Beyond(
        "Adagrad", (SINGLE,), {"max_grad_norm": 1.0, "eps_inside_sqrt": True}, layouts=ALIGNED
    ),
    "clipping, GradScaler": Beyond("SGD", (HALF, SINGLE), {"max_grad_norm": 1.0, "state_dtype": SINGLE}, 8.0),
    "averages, stochastic rounding": Beyond("AdamW", (BRAIN,), {"ema_decay": 0.9, "stochastic_rounding": True}),
}

# What `-m slow` adds: the same ways of the kernels in other types and sizes.
DTYPES = (HALF, BRAIN, SINGLE, DOUBLE)
WIDE = {HALF: SINGLE, BRAIN: SINGLE, SINGLE: SINGLE, DOUBLE: DOUBLE}
SLOW: dict[str, Case] = {
    "linear, tf32 columns": Linear((72, 136, 72), SINGLE, lies.transposed, lies.transposed, tf32=True),
    "linear, one row": Linear((1, 40, 72)),
    "linear, one column": Linear((72, 1, 72), HALF),
    "linear, one term": Linear((33, 17, 1), SINGLE),
    "linear, many rows": Linear((4099, 10, 40)),
    "linear, long sum": Linear((136, 136, 2056), needs="xw"),
    "conv, 3 columns": conv((2, 24, 9, 10), 3, sigmoid=True),
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
        f"linear, {str(dtype)[6:]}, x {x.__name__}, w {w.__name__}, dy {dy.__name__}": Linear(
            (136, 72, 88), dtype, x, w, dy
        )
        for dtype, (x, w, dy) in itertools.product(
            DTYPES,
            [
                (lies.plain, lies.transposed, lies.transposed),
                (lies.transposed, lies.plain, lies.shifted),
                (lies.gaps, shifted_columns, lies.plain),
            ],
        )
    },
    **{
        f"conv, {str(dtype)[6:]}, {way}": case._replace(dtype=dtype)
        for dtype in DTYPES
        for way, case in {
            "dense": conv((2, 40, 9, 10), 24, sigmoid=True),
            "stride 2": conv((2, 16, 10, 12), 24, stride=2, x=images.contiguous),
            "groups": conv((2, 32, 5, 6), 48, groups=2, stride=(2, 1)),
            "bundles": conv((1, 24, 7, 7), 48, groups=6),
            "image": conv((2, 4, 10, 9), 12, sigmoid=True, x=images.transposed),
            "depthwise": conv((2, 12, 7, 9), 12, groups=12, stride=2, x=images.cropped),
        }.items()
    },
    **{
        f"{lies.title(variant)}, {str(dtype)[6:]}": Rule(*variant, dtype)
        for variant, dtype in itertools.product(lies.VARIANTS, lies.DTYPES)
    },
    **{
        f"{name} beyond, {str(dtype)[6:]}": Beyond(
            name, (dtype,), {"max_grad_norm": 0.5, "ema_decay": 0.99, "state_dtype": WIDE[dtype]}, 4.0
        )
        for name, dtype in itertools.product(lies.CLASSES, DTYPES)
    },
    **{
        f"{name}, stochastic rounding": Beyond(name, (BRAIN,), {"stochastic_rounding": True, "seed": 7})
        for name in lies.CLASSES
    },
}  # fmt: skip


# ---- random ones


def random_linear(chance: random.Random) -> Case:
    m, n, k = (chance.choice([1, 2, 7, 16, 31, 40, 64, 72, 100, 129, 200]) for _ in range(3))
    return Linear(
        (m, n, k),
        chance.choice(DTYPES),
        x=chance.choice([lies.plain, lies.transposed, lies.gaps, lies.shifted]),
        w=chance.choice([lies.plain, lies.transposed, lies.gaps, lies.shifted]),
        dy=chance.choice([lies.plain, lies.transposed, lies.shifted, expanded]),
        needs="".join(letter for letter in "xwb" if chance.random() < 0.8),
        bias=chance.random() < 0.7,
        processors=chance.choice([1, 2, 8, 108]),
    )


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
        sigmoid=chance.random() < 0.5, bias=chance.random() < 0.7, dtype=chance.choice(DTYPES),
        x=chance.choice([images.contiguous, images.last, images.every_other, images.cropped, images.sliced_last]),
        w=chance.choice([images.contiguous, images.last]), needs=chance.choice(["xwb", "xw", "wb", "w", "x"]),
        processors=chance.choice([1, 2, 8, 108]),
    )  # fmt: skip


def random_rule(chance: random.Random) -> Case:
    layouts = chance.choices(list(SHAPES), k=chance.randint(2, 9))
    return Rule(*chance.choice(lies.VARIANTS), chance.choice(lies.DTYPES), layouts, processors=chance.choice([1, 108]))


def random_beyond(chance: random.Random) -> Case:
    dtypes = tuple(chance.choices(DTYPES, k=chance.choice([1, 1, 2])))
    extra: lies.Options = {"ema_decay": 0.9} if chance.random() < 0.5 else {}
    if chance.random() < 0.3:  # not beside clipping: the fallback rounds what it has clipped
        dtypes, extra["stochastic_rounding"] = (BRAIN, *dtypes), True
    elif chance.random() < 0.7:
        extra["max_grad_norm"] = chance.choice([0.5, 1e3])
        if HALF in dtypes:  # where small squares are 0: a centered RMSprop has negative variances, torch's root is NaN
            extra["state_dtype"] = DOUBLE if DOUBLE in dtypes else SINGLE
    layouts, scale = chance.choices(list(SHAPES), k=chance.randint(2, 9)), chance.choice([None, 8.0])
    return Beyond(chance.choice(lies.CLASSES), dtypes, extra, scale, layouts, processors=chance.choice([1, 108]))


RANDOM: dict[str, Callable[[random.Random], Case]] = {
    "linear": random_linear, "conv": random_conv, "rule": random_rule, "beyond": random_beyond,
}  # fmt: skip
