"""What the operators count for in `torch.utils.flop_counter.FlopCounterMode`: as many operations as torch's own.

torch's module gets the formulas when somebody imports it. Imported from here it would bring triton along, or a warning
that there is none, into every program.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from itertools import pairwise
from math import prod
from types import ModuleType
from typing import Any

import torch

from .shared import NAMESPACE

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def linear(input: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(input) * weight[0]


def linear_backward(
    grad: Shape, input: Shape | None, weight: Shape | None, output: Shape | None,
    activation: str | None, a: float, b: float, needs: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    features = (input or weight or [0])[-1]
    return 2 * prod(grad) * features * (needs[0] + needs[1])


def mlp(input: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * prod(input[:-1]) * sum(map(prod, weights))


def mlp_backward(
    grad: Shape, input: Shape | None, hidden: Sequence[Shape], output: Shape | None, weight: Shape | None,
    weights: Sequence[Shape], activation: str | None, a: float, b: float,
    output_activation: str | None, output_a: float, output_b: float, needs: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    widths = [(input or weight or [0])[-1], *(shape[-1] for shape in (*hidden, grad))]
    products = [needs[0] + needs[1], *(1 + need for need in needs[2 : len(widths)])]  # each hands a gradient down
    return 2 * prod(grad[:-1]) * sum(k * n * p for (k, n), p in zip(pairwise(widths), products, strict=True))


def conv3x3(input: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


def conv3x3_backward(
    grad: Shape, input: Shape | None, weight: Shape | None, output: Shape | None, input_size: Shape,
    stride: Shape, padding: Shape, groups: int, activation: str | None, a: float, b: float, needs: Sequence[bool],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * prod(grad) * 9 * input_size[1] // groups * (needs[0] + needs[1])


FORMULAS: list[Callable[..., int]] = [linear, linear_backward, mlp, mlp_backward, conv3x3, conv3x3_backward]


def register(counter: ModuleType) -> None:
    operators = getattr(torch.ops, NAMESPACE)
    for formula in FORMULAS:
        counter.register_flop_formula(getattr(operators, formula.__name__))(formula)


class _Import:
    """Stands before the finders of modules until the counter is imported, and registers then."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            vars(spec.loader)["exec_module"] = execute_and_register
        return spec


def register_when_imported() -> None:
    """Once the operators are registered themselves."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Import())
