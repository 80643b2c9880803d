"""What exported programs need of tribp: torch's operations for its registered operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .dispatch import without_autocast
from .ops.conv3x3 import op as conv3x3
from .ops.linear import op as linear
from .ops.mlp import op as mlp
from .ops.shared import NAMESPACE


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """torch's operations for each of tribp's operators: a table for `torch.export.ExportedProgram.run_decompositions`.

    The program then runs, and can be exported further, where tribp is not installed. These are not in torch's own table
    of decompositions: then `torch.compile` would refuse to call the operators where the variable CI is set.
    """
    operators = getattr(torch.ops, NAMESPACE)
    return {
        operators.linear.default: linear.decomposed,
        operators.linear_sigmoid.default: lambda input, weight, bias: linear.decomposed(input, weight, bias, "sigmoid"),
        operators.mlp.default: mlp.decomposed,
        operators.conv3x3.default: conv3x3.decomposed,
    }


# Under torch.func an operator is these: its own derivative knows no transform, and torch would drop a tangent unsaid.
_TRANSFORMED: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
for _operator, _function in decompositions().items():

    def _compute(input: Tensor, *others: Any, function: Callable[..., Any] = _function) -> Any:
        with without_autocast(input.device.type):  # as where no transform is
            return function(input, *others)

    _TRANSFORMED.impl(_operator, _compute, "FuncTorchDynamicLayerFrontMode")
