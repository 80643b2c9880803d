"""The optimizer steps that are measured: which class, on which parameters, with which options."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tribp.dispatch import dtype_name

Shapes = Sequence[tuple[int, ...]]


# An element's additions, multiplications, divisions and roots, counted from the formulas without options (SGD: with
# momentum): where the roofline shows the step. Memory bounds it wherever these numbers lie.
OPERATIONS = {"Adam": 13, "RMSprop": 9, "Adagrad": 7, "SGD": 4}


@dataclass(frozen=True)
class StepCase:
    """One optimizer on one set of parameters."""

    optimizer: str  # torch's and tribp's class
    shapes_name: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)  # that torch has too
    beyond: Mapping[str, Any] = field(default_factory=dict)  # that it has not
    scaler: bool = False  # under a GradScaler
    grouped: bool = True  # False: a parameter group for every tensor
    small: bool = False  # bound by its launches: wall clock, time on the host, time in a CUDA graph

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def name(self) -> str:
        on = [key if value is True else f"{key}={value}" for key, value in (self.options | self.beyond).items()]  # type: ignore[operator]
        on = [word.replace("torch.", "") for word in on] + ["scaler"] * self.scaler
        return " ".join([self.optimizer, *on, self.shapes_name, self.dtype_name])

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def operations(self) -> int:
        return OPERATIONS[self.optimizer] * self.elements

    @property
    def clip(self) -> float | None:
        return self.beyond.get("max_grad_norm")


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """A GPT-2's parameters: 124 M of them by default, in 148 tensors."""
    norm = [(width,), (width,)]

    def linear(inputs: int, outputs: int) -> list[tuple[int, ...]]:
        return [(inputs, outputs), (outputs,)]

    attention = [*norm, *linear(width, 3 * width), *linear(width, width)]
    block = [*attention, *norm, *linear(width, 4 * width), *linear(4 * width, width)]
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def resnet50() -> Shapes:
    """ResNet-50's parameters: 25.6 M in 161 tensors."""

    def conv(outputs: int, inputs: int, size: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]  # and its batch normalization

    shapes, inputs = conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [*conv(width, inputs, 1), *conv(width, width, 3), *conv(4 * width, width, 1)]
            if block == 0:
                shapes += conv(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


MOMENTUM = {"momentum": 0.9}
ALL = {"RMSprop": {}, "SGD": MOMENTUM, "Adagrad": {}}
LARGE, HUGE = ("1e8", [(10**8,)]), ("1e9", [(10**9,)])
BF16, FP32 = torch.bfloat16, torch.float32


def cases() -> list[StepCase]:
    """The most valuable first: a run may be cut off."""
    tiny, *lengths = [(f"1000x{n}", [(n,)] * 1000) for n in (8, 64, 512, 4096)]
    others = list(ALL.items())
    return [
        StepCase("Adam", *LARGE),
        *(StepCase(name, *LARGE, options=options) for name, options in others),
        StepCase("Adam", *tiny, small=True),
        *(StepCase("Adam", *shapes, small=True) for shapes in lengths),
        StepCase("Adam", "gpt2", gpt2()),
        StepCase("Adam", "resnet50", resnet50(), small=True),
        StepCase("Adam", "465 groups of 8", [(8,)] * 465, grouped=False, small=True),
        *(StepCase(name, *tiny, options=options, small=True) for name, options in others),
        StepCase("Adam", *LARGE, dtype=BF16),
        StepCase("Adam", *LARGE, dtype=BF16, beyond={"state_dtype": FP32}),
        StepCase("Adam", *LARGE, dtype=BF16, beyond={"state_dtype": FP32, "stochastic_rounding": True}),
        StepCase("Adam", *LARGE, options={"amsgrad": True}),
        StepCase("RMSprop", *LARGE, options={"centered": True, **MOMENTUM}),
        StepCase("Adam", *LARGE, scaler=True),
        StepCase("Adam", *LARGE, beyond={"max_grad_norm": 1.0}),
        StepCase("Adam", "gpt2", gpt2(), beyond={"max_grad_norm": 1.0}),
        *(StepCase(name, *shapes, options=options, small=True) for shapes in lengths for name, options in others),
        StepCase("SGD", *LARGE),
        StepCase("Adam", *HUGE),
        *(StepCase(name, *HUGE, options=options) for name, options in others),
    ]


def smoke_cases() -> list[StepCase]:
    """Interpreted, a program of 128 elements costs 6 ms."""
    two = ("70+9", [(70,), (3, 3)])
    return [
        StepCase("Adam", *two, small=True),
        *(StepCase(name, *two, options=options) for name, options in ALL.items()),
        StepCase("Adam", "3 groups of 8", [(8,)] * 3, grouped=False, small=True),
        StepCase("Adam", *two, dtype=BF16),
        StepCase("Adam", *two, dtype=BF16, beyond={"state_dtype": FP32}),
        StepCase("Adam", *two, dtype=BF16, beyond={"state_dtype": FP32, "stochastic_rounding": True}),
        StepCase("Adam", *two, options={"amsgrad": True}),
        StepCase("RMSprop", *two, options={"centered": True, **MOMENTUM}),
        StepCase("Adam", *two, scaler=True),
        StepCase("Adam", *two, beyond={"max_grad_norm": 1.0}),
    ]
