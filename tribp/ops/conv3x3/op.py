"""act(x ⋆ w + b): the function, its derivative, and the operators `tribp::conv3x3` and `tribp::conv3x3_backward`.

As in `linear/op.py`: eager mode goes to `forward` and `backward`; the registered operators are for the
compiler, for export and for dispatch modes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import dispatch
from ...dispatch import (
    autocasting,
    backward_by_torch,
    implementation_for,
    kernels_compute,
    needs_operator,
    plain_cpu_call,
    shows_call,
    unwrap_dead,
    without_autocast,
)
from ..activations import NONE, Activation, ActivationLike, activate, activate_, activation_of
from ..checks import check_dtypes
from ..shared import (
    NAMESPACE,
    REFUSALS,
    Grads,
    Needs,
    autocast_activates,
    autocast_all,
    bare_apply,
    import_plan,
    refuse_tangents,
    scatter,
    unless_refused,
    uses_tf32,
)
from . import reference
from .checks import cached_window, check_conv3x3, known_window
from .reference import ChannelsLast, Window, channels_last_of, conv3x3_format


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
    """A 3×3 convolution with bias and activation as one kernel: the same as torch's `conv2d` and an activation.

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

    The backward pass computes only the gradients that are needed, and for an activation keeps only the output. Double
    backward, `torch.func` and forward-mode differentiation use torch's own code; `torch.compile` sees one operator.

    Raises:
        ValueError: shapes, devices or options that do not fit together, or that only `torch.nn.Conv2d` takes.
        TypeError: dtypes that differ or are not among the four; arguments of the wrong kind.
    """
    by_torch = False
    try:
        if plain_cpu_call(input, weight, bias) and groups == 1 and (bias is None or bias.is_cpu):
            window = cached_window(stride, padding, groups, dilation)
            act = NONE if activation is None else activation_of("conv3x3", activation)
            _, channels, height, width = weight.shape
            # What `reference` works around torch for has several groups, or is in bfloat16 with a stride of 2.
            in_bfloat16 = input.dtype == torch.bfloat16 or autocasting("cpu")
            if channels and height == width == 3 and (window.stride[1] == 1 or not in_bfloat16):
                by_torch = True
                # As they were given: torch refuses True and 1.0, which the cache takes for 1.
                output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
                return output if activation is None else activate_(output, act)
        quick = weight is not None and kernels_compute(input, weight, bias) and input.ndim == 4
        if quick:
            window, act = known_window(stride, padding, groups, dilation), activation_of("conv3x3", activation)
    except REFUSALS:
        if by_torch:  # the checks may know a better sentence; if not, that was a hook or a mode
            check_conv3x3(input, weight, bias, stride, padding, groups, dilation)
            if not autocasting("cpu"):
                check_dtypes("conv3x3", input, weight=weight, bias=bias)
            raise
        quick = False
    if quick and (done := unless_refused(by_kernels, input, weight, bias, window, act)) is not None:
        return done
    if shows_call(input, weight, bias):
        tensors = (input, weight, bias)
        return torch.overrides.handle_torch_function(
            conv3x3, tensors, *tensors, stride, padding, groups, activation, dilation=dilation
        )
    window = check_conv3x3(input, weight, bias, stride, padding, groups, dilation)
    act = activation_of("conv3x3", activation)
    if autocast_activates(input.device.type, act):
        return activate(conv3x3(input, weight, bias, stride, padding, groups, dilation=dilation), *act)
    if autocasting(input.device.type):
        input, weight, bias = autocast_all(input, weight, bias)
    check_dtypes("conv3x3", input, weight=weight, bias=bias)
    if input.dim() == 3:
        return _conv3x3(input.unsqueeze(0), weight, bias, window, act).squeeze(0)
    return _conv3x3(input, weight, bias, window, act)


def _conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: Activation) -> Tensor:
    implementation = implementation_for(input, weight, bias)
    if implementation == "torch":
        return reference.conv3x3(input, weight, bias, window, activation)
    if implementation == "operator":
        output: Tensor = operator(input, weight, bias, *window, *activation)
        return output
    input, weight, bias = unwrap_dead(input, weight, bias)
    return by_kernels(input, weight, bias, window, activation)


def by_kernels(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: Activation) -> Tensor:
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return apply(input, weight, bias, window, activation)  # type: ignore[no-any-return]
    return forward(input, weight, bias, window, activation, "triton")


class _Conv3x3(torch.autograd.Function):
    """The derivative: of the kernels as eager mode calls them, and of the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, window, activation = inputs
        output = forward(input, weight, bias, window, activation, "triton")
        _Conv3x3.save(ctx, input, weight, window, activation, output)
        return output

    @staticmethod
    def save(
        ctx: Any, input: Tensor, weight: Tensor, window: Window, activation: Activation, output: Tensor,
        by_operator: bool = False,
    ) -> None:  # fmt: skip
        ctx.by_operator, ctx.window, ctx.activation, ctx.input_size = by_operator, window, activation, input.shape
        ctx.last = channels_last_of(input, weight)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            input if needs_weight else None, weight if needs_input else None, output if ctx.activation.name else None
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad), None, None


apply = bare_apply(_Conv3x3)


def _gradients(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    """Of input, weight and bias, as linear's."""
    input, weight, output = ctx.saved_tensors
    needs, window, act, size = ctx.needs_input_grad[:3], ctx.window, ctx.activation, ctx.input_size
    by_operator = ctx.by_operator or needs_operator()
    with without_autocast(grad.device.type):
        if backward_by_torch(grad, by_operator):
            return reference.conv3x3_backward(grad, input, weight, output, size, window, act, needs)
        if by_operator:
            grads = backward_operator(grad, input, weight, output, size, *window, *act, needs, *ctx.last)
            return scatter(needs, grads)
        return backward(grad, input, weight, output, size, window, act, needs, ctx.last, "triton")


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: Activation, backend: str
) -> Tensor:
    """act(input ⋆ weight + bias). input: (N, C, H, W), weight: (O, C / groups, 3, 3), bias: (O,)."""
    if backend == "triton":
        perform, plan = import_plan("conv3x3")
        tf32 = uses_tf32(input, convolution=True)
        done = perform(plan.forward, (input, weight, bias), window=window, activation=activation, tf32=tf32)
        if done:
            return done[0]  # type: ignore[no-any-return]
    output = reference.conv3x3(input, weight, bias, window, activation)
    return output.contiguous(memory_format=conv3x3_format(input, weight))


def backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None,
    input_size: Sequence[int], window: Window, activation: Activation, needs: Needs, last: ChannelsLast, backend: str,
) -> Grads:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so.

    `input` is read only for the weight's gradient, `weight` only for the input's, `output` only for the activation's;
    each may be None otherwise.
    """
    if backend == "triton":
        perform, plan = import_plan("conv3x3")
        facts = dict(input_size=tuple(input_size), window=window, activation=activation, needs=needs, last=last)
        tf32 = uses_tf32(grad, convolution=True)
        done = perform(plan.backward, (grad, input, weight, output), **facts, tf32=tf32)
        if done:
            return tuple(done)
    grads = reference.conv3x3_backward(grad, input, weight, output, input_size, window, activation, needs)
    laid = zip(grads, reference.formats(last), strict=True)
    dx, dw, db = (None if t is None else _empty(t.shape, t, layout).copy_(t) for t, layout in laid)
    return dx, dw, db


def _empty(size: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=layout)


@torch.library.custom_op(f"{NAMESPACE}::conv3x3", mutates_args=())
def operator(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int,
    activation: str | None = None, a: float = 0.0, b: float = 0.0,
) -> Tensor:  # fmt: skip
    refuse_tangents(input, weight, bias)
    with without_autocast(input.device.type):  # as for linear
        act = Activation(activation, a, b)
        return forward(input, weight, bias, as_window(stride, padding, groups), act, dispatch.backend_of(input))


@operator.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], groups: int,
    activation: str | None = None, a: float = 0.0, b: float = 0.0,
) -> Tensor:  # fmt: skip
    size = reference.output_size(input, weight, as_window(stride, padding, groups))
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
    sizes = reference.grad_sizes(grad, input_size, as_window(stride, padding, groups))
    outputs = zip(sizes, reference.formats(ChannelsLast(input_last, weight_last)), needs, strict=True)
    return [_empty(size, grad, layout) for size, layout, need in outputs if need]


def as_window(stride: Sequence[int], padding: Sequence[int], groups: int) -> Window:
    return Window((stride[0], stride[1]), (padding[0], padding[1]), groups)


def _needs(needs: Sequence[bool]) -> Needs:
    return needs[0], needs[1], needs[2]


def _save_of_operator(ctx: Any, inputs: Any, output: Tensor) -> None:
    input, weight, _, stride, padding, groups, *activation = inputs
    window = as_window(stride, padding, groups)
    _Conv3x3.save(ctx, input, weight, window, Activation(*activation), output, by_operator=True)


operator.register_autograd(lambda ctx, grad: (*_gradients(ctx, grad), *[None] * 6), setup_context=_save_of_operator)
