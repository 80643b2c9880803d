"""The operators `tribp::conv3x3` and `tribp::conv3x3_backward`, and the branch between backends.

As in `linear_sigmoid.py`: eager mode calls `forward` and `backward`; the operators are for the compiler, for export and
for dispatch modes.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from ... import dispatch, reference
from ...modes import without_autocast
from ...reference import Window, channels_last, conv3x3_format

Needs = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
LONGEST = 2**31 - 256  # a tile is at most 256 long


class ChannelsLast(NamedTuple):
    """Which gradients lie in channels_last order: the input's as torch chooses, the weight's as the weight does."""

    input: bool
    weight: bool


def channels_last_of(input: Tensor, weight: Tensor) -> ChannelsLast:
    return ChannelsLast(conv3x3_format(input, weight) == torch.channels_last, channels_last(weight))


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: str | None, backend: str
) -> Tensor:
    """act(input ⋆ weight + bias). input: (N, C, H, W), weight: (O, C / groups, 3, 3), bias: (O,)."""
    layout = conv3x3_format(input, weight)
    if backend == "torch" or not _fits(input, weight):
        return reference.conv3x3(input, weight, bias, window, activation).contiguous(memory_format=layout)
    calls, kernels = _launching()

    output = _empty(_output_size(input, weight, window), input, layout)
    with dispatch.on_device(input):
        calls.perform(
            kernels.forward,
            dict(x=input, w=weight, b=bias, y=output),
            _facts(input, window) | {"activation": activation},
            outputs=("y",),
        )
    return output


def backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None,
    input_size: Sequence[int], window: Window, needs: Needs, last: ChannelsLast, backend: str,
) -> Grads:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so.

    `input` is read only for the weight's gradient, `weight` only for the input's, `output` only for the activation's;
    each may be None otherwise.
    """
    dx, dw, db = _empty_grads(grad, input_size, window, needs, last)
    small = _small_enough(grad.shape[1], input_size[1] // window.groups)
    if backend == "torch" or not (small and _fits(grad, input, weight)) or 0 in input_size:
        found = reference.conv3x3_backward(grad, input, weight, output, input_size, window, needs)
        for empty, value in zip((dx, dw, db), found, strict=True):
            if empty is not None and value is not None:
                empty.copy_(value)
        return dx, dw, db
    calls, kernels = _launching()

    with dispatch.on_device(grad):
        calls.perform(
            kernels.backward,
            dict(dy=grad, x=input, w=weight, y=output, dx=dx, dw=dw, db=db),
            _facts(grad, window),
            outputs=("dx", "dw", "db"),
        )
    return dx, dw, db


@functools.cache
def _launching() -> tuple[Any, Any]:
    """What imports triton, imported where kernels are to run: once, for an import statement takes 0.5 µs each time."""
    from ...launch import calls
    from . import plan

    return calls, plan


def _facts(tensor: Tensor, window: Window) -> dict[str, object]:
    """What launches depend on besides the tensors."""
    tf32 = tensor.dtype == torch.float32 and dispatch.tf32_allowed(convolution=True)
    return dict(window=window, arch=dispatch.arch_of(tensor.device.index), tf32=tf32)


def _output_size(input: Tensor, weight: Tensor, window: Window) -> tuple[int, ...]:
    return (input.shape[0], weight.shape[0], *window.output_size(*input.shape[2:]))


def _empty_grads(grad: Tensor, input_size: Sequence[int], window: Window, needs: Needs, last: ChannelsLast) -> Grads:
    """Room for the gradients, each in its memory format."""
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    o, c = grad.shape[1], input_size[1] // window.groups
    dx = _empty(input_size, grad, formats[last.input]) if needs[0] else None
    dw = _empty((o, c, 3, 3), grad, formats[last.weight]) if needs[1] else None
    return dx, dw, grad.new_empty(o) if needs[2] else None


def _empty(size: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=layout)


def _fits(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these: none of them empty, and no dimension too long for the int32 start of a tile."""
    for t in tensors:
        if t is None or 0 < t.numel() <= LONGEST:  # then no dimension is longer
            continue
        if t.numel() == 0 or max(t.shape) > LONGEST:
            return False
    return True


def _small_enough(o: int, c: int) -> bool:
    """Whether 32 bits hold an offset within the weight, as wgrad writes it."""
    return 9 * o * c < 2**31


@torch.library.custom_op("tribp::conv3x3", mutates_args=())
def conv3x3(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int, activation: str | None,
) -> Tensor:  # fmt: skip
    with without_autocast(input.device.type):  # as for linear_sigmoid
        return forward(input, weight, bias, as_window(stride, padding, groups), activation, dispatch.backend_of(input))


@conv3x3.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int, activation: str | None,
) -> Tensor:  # fmt: skip
    size = _output_size(input, weight, as_window(stride, padding, groups))
    return _empty(size, input, conv3x3_format(input, weight))


@register_decomposition(torch.ops.tribp.conv3x3.default)
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int, activation: str | None,
) -> Tensor:  # fmt: skip
    return forward(input, weight, bias, as_window(stride, padding, groups), activation, "torch")


@torch.library.custom_op("tribp::conv3x3_backward", mutates_args=())
def conv3x3_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, input_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], groups: int, needs: Sequence[bool],
    input_last: bool, weight_last: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `needs` asks for, in the order input, weight, bias."""
    with without_autocast(grad.device.type):
        grads = backward(
            grad, input, weight, output, input_size, as_window(stride, padding, groups), _needs(needs),
            ChannelsLast(input_last, weight_last), dispatch.backend_of(grad),
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@conv3x3_backward.register_fake
def _(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, input_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], groups: int, needs: Sequence[bool],
    input_last: bool, weight_last: bool,
) -> list[Tensor]:  # fmt: skip
    last = ChannelsLast(input_last, weight_last)
    grads = _empty_grads(grad, input_size, as_window(stride, padding, groups), _needs(needs), last)
    return [grad for grad in grads if grad is not None]


def as_window(stride: Sequence[int], padding: Sequence[int], groups: int) -> Window:
    return Window((stride[0], stride[1]), (padding[0], padding[1]), groups)


def _needs(needs: Sequence[bool]) -> Needs:
    return needs[0], needs[1], needs[2]
