"""The problem of every differentiable function: an output, and gradients of all arguments or of some."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .registry import Reference

DIRECTIONS = ("forward", "backward", "frozen input", "both")
PARTS = ("forward", "dgrad", "wgrad", "both")  # the gradient of the input alone, and all but it

# Relative Frobenius error against float64: one rounding to the type (half a unit in the last place: 6e-8, 5e-4, 4e-3)
# with room for a second, not for a lost term. TF32 rounds every operand to 11 bits.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
TF32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DifferentiableProblem:
    """`arguments` by name, the first being the input, and `output_grad`, what comes back from the layer above.

    `exact` computes the output from float64 arguments. A gradient whose sum can cancel has the size of the sum's terms
    in `scales(arguments, output gradient)`, by the argument's name. Every function is called with `options` besides.
    """

    arguments: Mapping[str, Tensor]
    output_grad: Tensor
    exact: Callable[..., Tensor]
    scales: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, float]]
    tf32: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None  # of the input, that are computed at a time in float64; None: all

    def reference(self) -> Mapping[str, Reference]:
        """Rows of the output and of the input's gradient depend on that row of the input alone, and the gradients of
        the other arguments are sums over rows: so they can be had in several parts, in the memory that one takes.
        """
        first, *others = self.arguments
        rows = self.rows or len(self.output_grad)
        output, input_grad = list[Tensor](), list[Tensor]()
        sums, squares = dict[str, Tensor](), dict[str, float]()
        parts = [torch.split(tensor, rows) for tensor in (self.arguments[first], self.output_grad)]
        for some, output_grad in zip(*parts, strict=True):
            exact = {name: value.detach().double() for name, value in {**self.arguments, first: some}.items()}
            output_grad = output_grad.double()
            for name, scale in self.scales(exact, output_grad).items():
                squares[name] = squares.get(name, 0.0) + scale**2
            leaves = [value.requires_grad_() for value in exact.values()]
            output.append(self.exact(*leaves, **self.options))
            grad, *grads = torch.autograd.grad(output[-1], leaves, output_grad)
            output[-1] = output[-1].detach()
            input_grad.append(grad)
            for name, grad in zip(others, grads, strict=True):
                sums[name] = sums[name] + grad if name in sums else grad
        values = {"output": torch.cat(output), f"{first}.grad": torch.cat(input_grad)}
        values |= {f"{name}.grad": grad for name, grad in sums.items()}
        scales = {f"{name}.grad": math.sqrt(square) for name, square in squares.items()}
        return {
            name: Reference(value, max(float(value.norm()), scales.get(name, 0.0))) for name, value in values.items()
        }

    def results(self, function: Callable[..., Tensor], direction: str) -> Mapping[str, Tensor]:
        output, inputs = self._forward(function, direction)
        found = {"output": output.detach()} if direction in ("forward", "both") else {}
        if direction != "forward":
            grads = torch.autograd.grad(output, list(inputs.values()), self.output_grad)
            found |= {f"{name}.grad": grad for name, grad in zip(inputs, grads, strict=True)}
        return found

    def action(self, function: Callable[..., Tensor], direction: str) -> Callable[[], object]:
        if direction == "both":
            return lambda: self.results(function, direction)
        if direction == "forward":
            # With the arguments requiring gradients, as in training: what is saved for backward is part of the cost.
            inputs = self._inputs(direction)
            return lambda: function(*inputs.values(), **self.options)
        output, inputs = self._forward(function, direction)
        wanted = list(inputs.values())
        return lambda: torch.autograd.grad(output, wanted, self.output_grad, retain_graph=True)

    def tolerance(self, name: str) -> tuple[float, bool]:
        """The output must meet its type's tolerance and stay within twice torch's error.

        A gradient must do one of the two: it is formed from the rounded output, by torch as well, and where the
        sigmoid saturates 1 − y has lost the digits that the tolerance asks for.
        """
        dtype = self.output_grad.dtype
        return TF32_TOLERANCE if self.tf32 else TOLERANCE[dtype], name == "output"

    def _forward(self, function: Callable[..., Tensor], direction: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the arguments that a gradient is wanted of."""
        inputs = self._inputs(direction)
        output = function(*inputs.values(), **self.options)
        return output, {name: value for name, value in inputs.items() if value.requires_grad}

    def _inputs(self, direction: str) -> dict[str, Tensor]:
        inputs = {name: value.detach() for name, value in self.arguments.items()}
        first = next(iter(inputs))
        for name, value in inputs.items():
            frozen = direction in ("frozen input", "wgrad") if name == first else direction == "dgrad"
            value.requires_grad_(not frozen)
        return inputs
