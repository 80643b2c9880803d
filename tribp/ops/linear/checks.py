"""Argument checks of the linear layer. Every error names the argument, what was expected and what was given."""

from torch import Tensor

from ...dispatch import autocasting
from ..checks import Described, check_devices, check_dtypes, check_tensors, refusing


@refusing
def check_linear(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Of a call; autocast may change its dtypes, which are checked then."""
    check_tensors(function, "bias", input=input, weight=weight, bias=bias)
    check_layouts(function, input, weight, bias)


def check_refused(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise what the checks have against a call that torch raised for; if nothing, that was a hook or a mode."""
    if not input.is_nested:
        check_linear(function, input, weight, bias)
        if not autocasting(input.device.type):
            check_dtypes(function, input, weight=weight, bias=bias)


def check_layouts(function: str, input: Described, weight: Described, bias: Described | None) -> None:
    if input.dim() == 0:
        raise ValueError(f"{function}: input must have shape (*, in_features), got ()")
    k, n = input.shape[-1], weight.shape[0] if weight.dim() else 1
    if weight.dim() != 2 or weight.shape[1] != k:
        needed = f"({n}, {k})" if weight.dim() == 2 else f"(out_features, {k})"
        raise ValueError(
            f"{function}: weight must have shape {needed}, (out_features, in_features), for an input of shape "
            f"{tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (n,) and not (bias.dim() <= 1 and bias.numel() == 1):
        raise ValueError(
            f"{function}: bias must have shape ({n},), (out_features,), for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    check_devices(function, input, weight=weight, bias=bias)
