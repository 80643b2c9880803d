"""Argument checks of the convolution. Every error names the argument, what was expected and what was given."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import Described, check_devices, check_tensors, is_whole, refusing
from .reference import Window


@refusing
def check_conv3x3(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: int | Sequence[int], padding: str | int | Sequence[int], groups: int, dilation: int | Sequence[int],
) -> Window:  # fmt: skip
    """The window, once everything fits; sizes are `(*, channels, height, width)`."""
    check_tensors("conv3x3", "bias", input=input, weight=weight, bias=bias)
    window = window_of("conv3x3", stride, padding, groups, dilation)
    check_layouts(input, weight, bias, window)
    return window


def check_layouts(input: Described, weight: Described, bias: Described | None, window: Window) -> None:
    groups = window.groups
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
    check_devices("conv3x3", input, weight=weight, bias=bias)
    # Each by itself: of sizes that an exported program leaves open, `min` would say which is smaller for good.
    if any(size < 1 for size in (channels, height, width, *window.output_size(height, width))):
        raise ValueError(
            f"conv3x3: input must have channels and pixels, and be at least 3 high and wide with its padding, got "
            f"{channels} channels of {height} x {width} with padding {window.padding}"
        )


def small_enough(o: int, c: int) -> bool:
    """Whether 32 bits hold an offset within the weight, as forward reads it and wgrad writes it."""
    return 9 * o * c < 2**31


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
    if min(strides) < 1:
        raise ValueError(f"{caller}: stride must be at least 1, got {stride}")
    if max(strides) > 2:
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
    if not _is_whole(groups):
        raise TypeError(f"{caller}: groups must be a whole number, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{caller}: groups must be at least 1, got {groups}")
    return Window(strides, paddings, operator.index(groups))


@functools.lru_cache
def cached_window(
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    groups: int,
    dilation: int | tuple[int, ...],
) -> Window:
    """What `window_of` said of equal arguments."""
    return window_of("conv3x3", stride, padding, groups, dilation)


def known_window(*arguments: Any) -> Window:
    """`cached_window` of whole numbers, pairs of them and words; it would take True and 1.0 for 1.

    Raises TypeError for others, which the checks know better.
    """
    for value in arguments:
        kind = type(value)
        if kind is not int and kind is not str and not (kind is tuple and all(type(v) is int for v in value)):
            raise TypeError(f"conv3x3: not among what is usual: {value!r}")
    return cached_window(*arguments)


def _pair(caller: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if type(value) is int:  # what is usual, at once
        return value, value
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        values = (*values, *values)  # torch takes (1,) for both
    if len(values) != 2 or not all(map(_is_whole, values)):
        raise TypeError(f"{caller}: {name} must be a whole number or a pair of them, got {value!r}")
    return operator.index(values[0]), operator.index(values[1])


def _is_whole(value: object) -> bool:
    """Whether torch takes a value for a whole number: numpy's too, no bool, and here no tensor."""
    return is_whole(value) and not isinstance(value, (bool, Tensor))
