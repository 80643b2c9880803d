"""Modules, with torch.nn's parameter names, shapes, initialization and state_dict."""

import torch
from torch import Tensor, nn

from .functional import linear_sigmoid

__all__ = ["LinearSigmoid"]


class LinearSigmoid(nn.Module):
    """`nn.Linear` followed by `nn.Sigmoid` as one kernel: y = σ(x · weightᵀ + bias).

    Parameters, their initialization, the random numbers it draws, and the state_dict are those of `nn.Linear`, so that
    checkpoints load both ways. It is no subclass of `nn.Linear`: tools that replace those would lose the sigmoid.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias of shape `(out_features,)`.
        device, dtype: of the parameters, as for `nn.Linear`; float16, bfloat16, float32 or float64.

    Shape: `(*, in_features)` to `(*, out_features)`. Errors: those of `tribp.linear_sigmoid`.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize weight and bias as `nn.Linear` does, by torch's own code: it reads those two and nothing else."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, input: Tensor) -> Tensor:
        return linear_sigmoid(input, self.weight, self.bias)
