"""Argument checks that operations share. Every error names the argument, what was expected and what was given."""

from torch import Tensor

from ..dispatch import FLOATS, dtype_name


def check_tensors(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")


def check_devices(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{function}: {name} must be on input's device {input.device}, got {tensor.device}")


def check_dtypes(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(
                f"{function}: {name} must be float16, bfloat16, float32 or float64, got {dtype_name(tensor.dtype)}"
            )
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"{function}: {name} must have input's dtype {dtype_name(input.dtype)}, got {dtype_name(tensor.dtype)}"
            )
