"""`mlp`: layers of y = act(x·wᵀ + b). A shape is (rows, features of the input, of each layer's output)."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tribp

from . import linear
from .operation import Case, DifferentiableWorkload, KernelTests, Operation, Target, Work, functions

TALL, DEEP, DIGITS = (65536, 784, 256, 10), (8192, 1024, 1024, 1024, 1024), (128, 784, 256, 64, 10)
FIELD = (262144, 64, 64, 64, 16)  # a function of points: every layer has few outputs
SHAPES = (TALL, DEEP, DIGITS, FIELD)
BF16, FP32 = torch.bfloat16, torch.float32
OPTIONS: dict[str, Any] = dict(activation="sigmoid", last="sigmoid")


def cases() -> list[Case]:
    return [Case(shape, dtype, small=shape == DIGITS) for dtype in (BF16, FP32) for shape in SHAPES]


def ours(x: Tensor, *layers: Tensor, activation: str, last: str) -> Tensor:
    return tribp.mlp(x, layers[::2], layers[1::2], activation, last)


def eager(x: Tensor, *layers: Tensor, activation: str, last: str) -> Tensor:
    for w, b in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        x = linear.eager(x, w, b, activation=activation)
    return linear.eager(x, *layers[-2:], activation=last)


def workload(case: Case, device: torch.device) -> DifferentiableWorkload:
    """Fresh inputs, scaled as trained layers' are."""
    rows, *sizes = case.shape
    normal = partial(case.normal, device)
    arguments = {"input": normal(rows, sizes[0])}
    for n, (before, after) in enumerate(itertools.pairwise(sizes)):
        arguments |= {f"weight{n}": normal(after, before, std=before**-0.5), f"bias{n}": normal(after)}
    grad, layers = normal(rows, sizes[-1]), len(sizes) - 1
    return DifferentiableWorkload(arguments, grad, eager, case.tf32, OPTIONS, layers=layers)


def work(case: Case, direction: str) -> Work:
    """Each input read once, each output written once; what passes from layer to layer once each way."""
    rows, *sizes = case.shape
    weights = sum(k * n for k, n in itertools.pairwise(sizes))
    parameters = weights + sum(sizes[1:])
    hidden = rows * sum(sizes[1:-1])
    x, y = rows * sizes[0], rows * sizes[-1]
    elements, products = {
        "forward": (x + parameters + hidden + y, 1.0),
        "backward": (2 * y + hidden + 2 * hidden + x + x + 2 * parameters, 2.0),
        "wgrad only": (2 * y + hidden + 2 * hidden + x + 2 * parameters, 2 - sizes[0] * sizes[1] / weights),
    }[direction]
    return Work(elements * case.dtype.itemsize, products * 2 * rows * weights)


def targets(case: Case, direction: str) -> list[Target]:
    """Never slower than layers of torch's, compiled or not."""
    return [Target("eager", 1.0), Target("compile", 1.0)] if case.dtype == BF16 else []


def compiled(everything: bool) -> Iterator[tuple[Case, Sequence[str]]]:
    """What the linear layer's own cases have not: a dgrad that goes on to the layer below."""
    odd = (1000, 333, 77, 10)
    some = [*(Case(shape, BF16) for shape in (DEEP, FIELD, odd)), Case(DEEP, FP32)]
    others = [Case(odd, torch.float64), *cases()] if everything else []
    yield from ((case, ["backward"]) for case in [*some, *others])


OPERATION = Operation(
    name="mlp",
    summary="tribp.mlp against layers of torch's",
    cases=cases(),
    smoke_cases=[Case((33, 16, 24, 8), BF16, small=True), Case((20, 7, 19, 5), FP32)],
    directions=("forward", "backward", "wgrad only"),
    providers=functions(ours, eager),
    workload=workload,
    work=work,
    targets=targets,
    compiled=compiled,
    expectations=linear.expectations,
    kernel_work=linear.OPERATION.kernel_work,
    tests=KernelTests(
        ["tests/mlp"], ["tests/mlp", "-k", "matches_torch and (sigmoid or relu)"], ["tests/mlp", "-k", "rows"]
    ),
)
