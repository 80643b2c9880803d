"""The 3×3 convolution in plain torch: the fallback where no kernel runs, and the tests' oracle."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import Activation, activate, gradient
from ..checks import Described, Strided


class Window(NamedTuple):
    """How the 3×3 window of a convolution moves: (height, width) pairs, and how many groups the channels fall into."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of this height and width; below 1 if it is too small."""
        (sh, sw), (ph, pw) = self.stride, self.padding
        return (height + 2 * ph - 3) // sh + 1, (width + 2 * pw - 3) // sw + 1


class ChannelsLast(NamedTuple):
    """Which gradients lie in channels_last order: the input's as torch chooses, the weight's as the weight does."""

    input: bool
    weight: bool


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: Activation) -> Tensor:
    """act(input ⋆ weight + bias). input: (N, C, H, W)."""
    if _onednn_errs(input, input.shape, window):
        x, w, b = map(_widened, (input, weight, bias))
        with torch.autocast("cpu", enabled=False):
            return conv3x3(x, w, b, window, activation).to(input.dtype)
    stride, padding, groups = window
    return activate(
        F.conv2d(_regular(input, weight, groups), weight, bias, stride, padding, groups=groups), *activation
    )


def channels_last(tensor: Strided) -> bool:
    """Whether torch takes a 4-dimensional tensor for channels_last: by its strides, as c10/core/MemoryFormat.h has it.

    It need not be dense; strides that would fit both ways count as contiguous.
    """
    size, stride = tensor.shape, tensor.stride()
    least = 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or stride[1] == 0 or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * size[d]
    return True


def _onednn_errs(tensor: Tensor, input_size: Sequence[int], window: Window) -> bool:
    """Whether torch would read memory that nobody wrote: in bfloat16 of stride 2, for a result one column wide.

    oneDNN does with AVX-512 and AMX in torch 2.13 and 2.15. https://github.com/pytorch/pytorch/issues/169688: stride 3.
    """
    narrow = tensor.dtype == torch.bfloat16 and window.stride[1] == 2 and tensor.device.type == "cpu"
    return narrow and window.output_size(*input_size[2:])[1] == 1


def _widened(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.float()


def _regular(input: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`input`, copied where torch would compute a wrong gradient of the weight from it on the CPU.

    Of a grouped convolution in channels_last order it reads the strides of dimensions of length 1, which can be any:
    https://github.com/pytorch/pytorch/issues/190773.
    """
    if groups == 1 or 1 not in input.shape or input.device.type != "cpu" or not channels_last(weight):
        return input
    expected, odd = 1, False
    for d in (1, 3, 2, 0):
        size, stride = input.shape[d], input.stride(d)
        if size > 1 and stride != expected:
            return input  # torch copies it
        odd = odd or stride != expected
        expected *= size
    return input.clone(memory_format=torch.channels_last) if odd else input


def conv3x3_format(input: Strided, weight: Strided) -> torch.memory_format:
    """The memory format that torch gives a convolution's output and the gradient of its input."""
    if input.device.type == "cuda" and input.dtype == torch.float64:
        return torch.contiguous_format  # as cuDNN's are
    last = channels_last(input) or channels_last(weight)
    return torch.channels_last if last else torch.contiguous_format


def channels_last_of(input: Strided, weight: Strided) -> ChannelsLast:
    return ChannelsLast(conv3x3_format(input, weight) == torch.channels_last, channels_last(weight))


def output_size(input: Described, weight: Described, window: Window) -> tuple[int, ...]:
    return (input.shape[0], weight.shape[0], *window.output_size(*input.shape[2:]))


def grad_sizes(
    grad: Described, input_size: Sequence[int], window: Window
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the gradients of input, weight and bias."""
    o, c = grad.shape[1], input_size[1] // window.groups
    return tuple(input_size), (o, c, 3, 3), (o,)


def formats(last: ChannelsLast) -> list[torch.memory_format]:
    """Of the gradients of input, weight and bias."""
    return [torch.channels_last if yes else torch.contiguous_format for yes in (*last, False)]


def conv3x3_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None,
    input_size: Sequence[int], window: Window, activation: Activation, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so; differentiable again.

    `output` is needed for an activation's derivative only, `input` for the weight's gradient only, `weight` for the
    input's only.
    """
    if _onednn_errs(grad, input_size, window):
        dy, x, w, y = map(_widened, (grad, input, weight, output))
        grads = conv3x3_backward(dy, x, w, y, input_size, window, activation, needs)
        dx, dw, db = (None if t is None else t.to(grad.dtype) for t in grads)
        return dx, dw, db
    stride, padding, groups = window
    dz = grad if output is None else gradient(grad, output, activation)
    n, c = dz.shape[1], input_size[1] // groups
    dx = dw = db = None
    if needs[0] or needs[1]:
        # Whichever is not needed is asked for its shape alone.
        x = input if input is not None else dz.new_empty(1).expand(tuple(input_size))
        w = weight if weight is not None else dz.new_empty(1).expand(n, c, 3, 3)
        x = _regular(x, w, groups)
        mask = [needs[0], needs[1], False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dz, x, w, None, stride, padding, (1, 1), False, (0, 0), groups, mask
        )
    if needs[2]:
        db = dz.sum((0, 2, 3))
    return dx, dw, db
