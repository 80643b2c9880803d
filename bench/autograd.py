"""The problem of every differentiable function: an output, and gradients of all arguments or of all but the first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import Reference

DIRECTIONS = ("forward", "backward", "frozen input", "both")

# Relative Frobenius error against float64: one rounding to the type (half a unit in the last place: 6e-8, 5e-4, 4e-3)
# with room for a second, not for a lost term. TF32 rounds every operand to 11 bits.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
TF32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DifferentiableProblem:
    """`arguments` by name, the first being the input, and `output_grad`, what comes back from the layer above.

    `exact` computes the output from float64 arguments. A gradient whose sum can cancel has the size of the sum's terms
    in `scales(arguments, output gradient)`, by the argument's name.
    """

    arguments: Mapping[str, Tensor]
    output_grad: Tensor
    exact: Callable[..., Tensor]
    scales: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, float]]
    tf32: bool = False

    def reference(self) -> Mapping[str, Reference]:
        exact = {name: value.detach().double().requires_grad_() for name, value in self.arguments.items()}
        output_grad = self.output_grad.double()
        output = self.exact(*exact.values())
        grads = torch.autograd.grad(output, list(exact.values()), output_grad)
        scales = self.scales({name: value.detach() for name, value in exact.items()}, output_grad)
        found = {"output": Reference(output.detach(), float(output.detach().norm()))}
        for name, grad in zip(exact, grads, strict=True):
            found[f"{name}.grad"] = Reference(grad, max(float(grad.norm()), scales.get(name, 0.0)))
        return found

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
        output, inputs = self._forward(function, direction)
        if direction == "forward":
            # With the arguments requiring gradients, as in training: what is saved for backward is part of the cost.
            return lambda: function(*inputs.values())
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
        inputs = {name: value.detach() for name, value in self.arguments.items()}
        first = next(iter(inputs))
        for name, value in inputs.items():
            value.requires_grad_(not (name == first and direction == "frozen input"))
        output = function(*inputs.values())
        return output, {name: value for name, value in inputs.items() if value.requires_grad}
