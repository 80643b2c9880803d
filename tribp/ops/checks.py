"""What the functions demand of their arguments: one sentence that names the argument, what is needed and what came."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import dtype_name
from ..reference import Window

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_tensors("linear_sigmoid", input, weight, bias)
    if input.dim() == 0:
        raise ValueError("linear_sigmoid: input must have shape (*, in_features), got ()")
    k, n = input.shape[-1], weight.shape[0] if weight.dim() else 1
    if weight.dim() != 2 or weight.shape[1] != k:
        needed = f"({n}, {k})" if weight.dim() == 2 else f"(out_features, {k})"
        raise ValueError(
            f"linear_sigmoid: weight must have shape {needed}, (out_features, in_features), for an input of shape "
            f"{tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (n,) and not (bias.dim() <= 1 and bias.numel() == 1):
        raise ValueError(
            f"linear_sigmoid: bias must have shape ({n},), (out_features,), for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    _check_devices("linear_sigmoid", input, weight, bias)


def check_conv3x3(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: int | Sequence[int], padding: str | int | Sequence[int], groups: int, activation: str | None,
    dilation: int | Sequence[int],
) -> Window:  # fmt: skip
    """The window, once everything fits; sizes are `(*, channels, height, width)`."""
    _check_tensors("conv3x3", input, weight, bias)
    window = window_of("conv3x3", stride, padding, groups, dilation)
    check_activation("conv3x3", activation)
    if input.dim() not in (3, 4):
        raise ValueError(f"conv3x3: input must have shape (N, C, H, W) or (C, H, W), got {tuple(input.shape)}")
    channels, height, width = input.shape[-3:]
    if weight.dim() == 4 and weight.shape[2:] != (3, 3):
        raise ValueError(
            f"conv3x3: weight must have shape (out_channels, in_channels / groups, 3, 3), got {tuple(weight.shape)}; "
            "for other kernel sizes use torch.nn.Conv2d"
        )
    if channels % groups:
        raise ValueError(f"conv3x3: groups must divide input's {channels} channels, got {groups}")
    if weight.dim() != 4 or weight.shape[1] != channels // groups:
        raise ValueError(
            f"conv3x3: weight must have shape (out_channels, {channels // groups}, 3, 3), (out_channels, in_channels / "
            f"groups, 3, 3), for an input of shape {tuple(input.shape)} and groups={groups}, got {tuple(weight.shape)}"
        )
    n = weight.shape[0]
    if n == 0 or n % groups:
        raise ValueError(f"conv3x3: groups must divide weight's {n} out_channels (at least 1), got {groups}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(
            f"conv3x3: bias must have shape ({n},), (out_channels,), for a weight of shape {tuple(weight.shape)}, "
            f"got {tuple(bias.shape)}"
        )
    _check_devices("conv3x3", input, weight, bias)
    if min(channels, height, width, *window.output_size(height, width)) < 1:
        raise ValueError(
            f"conv3x3: input must have channels and pixels, and be at least 3 high and wide with its padding, got "
            f"{channels} channels of {height} x {width} with padding {window.padding}"
        )
    return window


def window_of(
    caller: str,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int] = 1,
) -> Window:
    """The arguments as pairs; ValueError or TypeError, in the name of `caller`, for what conv3x3 does not take."""
    if _pair(caller, "dilation", dilation) != (1, 1):
        raise ValueError(f"{caller}: dilation must be 1, got {dilation}; for other dilations use torch.nn.Conv2d")
    strides = _pair(caller, "stride", stride)
    if not set(strides) <= {1, 2}:
        raise ValueError(
            f"{caller}: stride must be 1 or 2, or a pair of these, got {stride}; for others use torch.nn.Conv2d "
            "(the size of the kernel is no argument)"
        )
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"{caller}: padding must be 'same', 'valid', or numbers, got {padding!r}")
        if padding == "same" and strides != (1, 1):
            raise ValueError(f"{caller}: padding='same' needs stride 1, got stride {stride}")
        padding = 1 if padding == "same" else 0
    paddings = _pair(caller, "padding", padding)
    if min(paddings) < 0:
        raise ValueError(f"{caller}: padding must be at least 0, got {padding}")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{caller}: groups must be a whole number of at least 1, got {groups!r}")
    return Window(strides, paddings, groups)


@functools.lru_cache
def cached_window(
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    groups: int,
    activation: str | None,
    dilation: int | tuple[int, ...],
) -> Window:
    """What `window_of` said of equal arguments; the activation was checked too."""
    check_activation("conv3x3", activation)
    return window_of("conv3x3", stride, padding, groups, dilation)


def check_activation(caller: str, activation: str | None) -> None:
    if activation not in (None, "sigmoid"):
        raise ValueError(f"{caller}: activation must be None or 'sigmoid', got {activation!r}")


def _pair(caller: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if type(value) is int:  # what is usual, at once
        return value, value
    values = (value, value) if isinstance(value, int) else value
    if isinstance(values, (tuple, list)) and len(values) == 1:
        values = (*values, *values)  # torch takes (1,) for both
    whole = isinstance(values, (tuple, list)) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not whole or len(values) != 2:
        raise TypeError(f"{caller}: {name} must be a whole number or a pair of them, got {value!r}")
    return values[0], values[1]


def _check_tensors(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")


def _check_devices(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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
