"""act(x ⋆ w + b): the function, its derivative, and the operators `tribp::conv3x3` and `tribp::conv3x3_backward`.

As in `linear/op.py`: eager mode goes to `forward` and `backward`; the registered operators are for the
compiler, for export and for dispatch modes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import dispatch
from ...dispatch import (
    autocasting,
    backward_by_torch,
    kernels_cannot_see,
    needs_operator,
    plain_cpu_call,
    without_autocast,
)
from ..activations import NONE, Activation, ActivationLike, activate_, activation_of
from ..checks import check_dtypes
from ..shared import MAX_SIZE, NAMESPACE, REFUSALS, Grads, Needs, autocast_all, in_places, launching, uses_tf32
from . import reference
from .checks import cached_window, check_conv3x3
from .reference import Window, channels_last, conv3x3_format


class ChannelsLast(NamedTuple):
    """Which gradients lie in channels_last order: the input's as torch chooses, the weight's as the weight does."""

    input: bool
    weight: bool


def channels_last_of(input: Tensor, weight: Tensor) -> ChannelsLast:
    return ChannelsLast(conv3x3_format(input, weight) == torch.channels_last, channels_last(weight))


def conv3x3(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    groups: int = 1,
    activation: ActivationLike = None,
    *,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """A 3×3 convolution with bias and activation as one kernel: what `conv2d` of torch and an activation compute.

    y[n, o, p, q] = act(b[o] + Σ x[n, c, p·s + r − pad, q·s + t − pad] · w[o, c, r, t]), over r and t in 0, 1, 2 and the
    channels c of o's group, with zeros outside the image.

    Args:
        input: `(N, in_channels, H, W)` or `(in_channels, H, W)`, any strides; with its padding at least 3 × 3.
        weight: `(out_channels, in_channels / groups, 3, 3)`.
        bias: `(out_channels,)` or None. All of one dtype (float16, bfloat16, float32, float64) and on one device.
        stride: 1 or 2, or a pair (vertical, horizontal).
        padding: zeros around the image, a number or a pair; "same" (1, for stride 1) or "valid" (0).
        groups: into which in_channels and out_channels are divided; each sees its own alone.
        activation: as for `linear`.
        dilation: 1.

    Returns:
        `(N, out_channels, P, Q)` or `(out_channels, P, Q)` with P = ⌊(H + 2·pad − 3) / s⌋ + 1, in the memory format
        that torch's convolution gives: channels_last where input or weight is. Sums are formed in float32 (float64 for
        float64); the precision of float32 products follows `torch.backends.cudnn.conv`, as torch's convolution does,
        whose default is TF32. Under autocast the arguments are cast as for `torch.nn.functional.conv2d`.

    The backward pass computes only what is asked for, and for an activation keeps only the output. Double backward,
    `torch.func` and forward-mode differentiation go torch's way; `torch.compile` sees one operator.

    Raises:
        ValueError: shapes, devices or options that do not fit together, or that only `torch.nn.Conv2d` takes.
        TypeError: dtypes that differ or are not among the four; arguments of the wrong kind.
    """
    try:
        if plain_cpu_call(input, weight, bias) and groups == 1 and (bias is None or bias.is_cpu):
            window = cached_window(stride, padding, groups, dilation)
            act = NONE if activation is None else activation_of("conv3x3", activation)
            _, channels, height, width = weight.shape
            # What `reference` works around torch for has several groups, or is in bfloat16 with a stride of 2.
            if channels and height == width == 3 and (window.stride[1] == 1 or input.dtype != torch.bfloat16):
                # As they were given: torch refuses True and 1.0, which the cache takes for 1.
                output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
                return output if activation is None else activate_(output, act)
    except REFUSALS:
        pass
    if torch.overrides.has_torch_function((input, weight, bias)):
        tensors = (input, weight, bias)
        return torch.overrides.handle_torch_function(
            conv3x3, tensors, *tensors, stride, padding, groups, activation, dilation=dilation
        )
    window = check_conv3x3(input, weight, bias, stride, padding, groups, dilation)
    act = activation_of("conv3x3", activation)
    if autocasting(input.device.type):
        input, weight, bias = autocast_all(input, weight, bias)
    check_dtypes("conv3x3", input, weight=weight, bias=bias)
    if input.dim() == 3:
        return _conv3x3(input.unsqueeze(0), weight, bias, window, act).squeeze(0)
    return _conv3x3(input, weight, bias, window, act)


def _conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: Activation) -> Tensor:
    if kernels_cannot_see(input, weight, bias) or not (needs_operator() or dispatch.backend_of(input) == "triton"):
        return reference.conv3x3(input, weight, bias, window, activation)
    if needs_operator():
        output: Tensor = operator(input, weight, bias, *window, *activation)
        return output
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _Conv3x3.apply(input, weight, bias, *window, *activation)  # type: ignore[no-any-return, no-untyped-call]
    return forward(input, weight, bias, window, activation, "triton")


class _Conv3x3(torch.autograd.Function):
    """The derivative: of the kernels as eager mode calls them, and of the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, stride, padding, groups, *activation = inputs
        output = forward(input, weight, bias, Window(stride, padding, groups), Activation(*activation), "triton")
        _Conv3x3.save(ctx, inputs, output, operator=False)
        return output

    @staticmethod
    def save(ctx: Any, inputs: Any, output: Tensor, operator: bool = True) -> None:
        input, weight, _, stride, padding, groups, *activation = inputs
        ctx.activation = Activation(*activation)
        ctx.operator, ctx.window, ctx.input_size = operator, as_window(stride, padding, groups), input.shape
        ctx.formats = channels_last_of(input, weight)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            input if needs_weight else None, weight if needs_input else None, output if ctx.activation.name else None
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        needs, window, act, size = ctx.needs_input_grad[:3], ctx.window, ctx.activation, ctx.input_size
        operator = ctx.operator or needs_operator()
        grads: Sequence[Tensor | None]
        with without_autocast(grad.device.type):
            if backward_by_torch(grad, operator):
                grads = reference.conv3x3_backward(grad, input, weight, output, size, window, act, needs)
            elif operator:
                found = backward_operator(grad, input, weight, output, size, *window, *act, needs, *ctx.formats)
                grads = in_places(needs, found)
            else:
                grads = backward(grad, input, weight, output, size, window, act, needs, ctx.formats, "triton")
        return *grads, None, None, None, None, None, None


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: Activation, backend: str
) -> Tensor:
    """act(input ⋆ weight + bias). input: (N, C, H, W), weight: (O, C / groups, 3, 3), bias: (O,)."""
    layout = conv3x3_format(input, weight)
    if backend == "torch" or not _fits(input, weight):
        return reference.conv3x3(input, weight, bias, window, activation).contiguous(memory_format=layout)
    perform, plan = launching("conv3x3")

    output = _empty(_output_size(input, weight, window), input, layout)
    tensors = (input, weight, bias, output)
    with dispatch.on_device(input):
        tf32 = uses_tf32(input, convolution=True)
        perform(plan.forward, tensors, input.device, window=window, activation=activation, tf32=tf32)
    return output


def backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None,
    input_size: Sequence[int], window: Window, activation: Activation, needs: Needs, last: ChannelsLast, backend: str,
) -> Grads:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so.

    `input` is read only for the weight's gradient, `weight` only for the input's, `output` only for the activation's;
    each may be None otherwise.
    """
    dx, dw, db = _empty_grads(grad, input_size, window, needs, last)
    small = _small_enough(grad.shape[1], input_size[1] // window.groups)
    if backend == "torch" or not (small and _fits(grad, input, weight)) or 0 in input_size:
        found = reference.conv3x3_backward(grad, input, weight, output, input_size, window, activation, needs)
        for empty, value in zip((dx, dw, db), found, strict=True):
            if empty is not None and value is not None:
                empty.copy_(value)
        return dx, dw, db
    perform, plan = launching("conv3x3")

    tensors = (grad, input, weight, output, dx, dw, db)
    with dispatch.on_device(grad):
        tf32 = uses_tf32(grad, convolution=True)
        perform(plan.backward, tensors, grad.device, window=window, activation=activation, tf32=tf32)
    return dx, dw, db


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
        if t is None or 0 < t.numel() <= MAX_SIZE:  # then no dimension is longer
            continue
        if t.numel() == 0 or max(t.shape) > MAX_SIZE:
            return False
    return True


def _small_enough(o: int, c: int) -> bool:
    """Whether 32 bits hold an offset within the weight, as wgrad writes it."""
    return 9 * o * c < 2**31


@torch.library.custom_op(f"{NAMESPACE}::conv3x3", mutates_args=())
def operator(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int,
    activation: str | None = None, a: float = 0.0, b: float = 0.0,
) -> Tensor:  # fmt: skip
    with without_autocast(input.device.type):  # as for linear
        act = Activation(activation, a, b)
        return forward(input, weight, bias, as_window(stride, padding, groups), act, dispatch.backend_of(input))


@operator.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int,
    activation: str | None = None, a: float = 0.0, b: float = 0.0,
) -> Tensor:  # fmt: skip
    size = _output_size(input, weight, as_window(stride, padding, groups))
    return _empty(size, input, conv3x3_format(input, weight))


def decomposed(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int,
    activation: str | None = None, a: float = 0.0, b: float = 0.0,
) -> Tensor:  # fmt: skip
    return forward(input, weight, bias, as_window(stride, padding, groups), Activation(activation, a, b), "torch")


@torch.library.custom_op(f"{NAMESPACE}::conv3x3_backward", mutates_args=())
def backward_operator(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, input_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], groups: int, activation: str | None, a: float, b: float,
    needs: Sequence[bool], input_last: bool, weight_last: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `needs` asks for, in the order input, weight, bias."""
    with without_autocast(grad.device.type):
        grads = backward(
            grad, input, weight, output, input_size, as_window(stride, padding, groups), Activation(activation, a, b),
            _needs(needs), ChannelsLast(input_last, weight_last), dispatch.backend_of(grad),
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@backward_operator.register_fake
def _(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, input_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], groups: int, activation: str | None, a: float, b: float,
    needs: Sequence[bool], input_last: bool, weight_last: bool,
) -> list[Tensor]:  # fmt: skip
    last = ChannelsLast(input_last, weight_last)
    grads = _empty_grads(grad, input_size, as_window(stride, padding, groups), _needs(needs), last)
    return [grad for grad in grads if grad is not None]


def as_window(stride: Sequence[int], padding: Sequence[int], groups: int) -> Window:
    return Window((stride[0], stride[1]), (padding[0], padding[1]), groups)


def _needs(needs: Sequence[bool]) -> Needs:
    return needs[0], needs[1], needs[2]


operator.register_autograd(_Conv3x3.backward, setup_context=_Conv3x3.save)
