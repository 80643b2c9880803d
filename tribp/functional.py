"""Functions on tensors, as in `torch.nn.functional`: argument checks, autocast and autograd around the operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from . import dispatch, reference
from .modes import (
    autocast,
    autocasting,
    compiler,
    dispatch_modes,
    dispatching,
    dynamo_compiling,
    transformed,
    transforming,
    without_autocast,
)
from .ops import flops
from .ops.checks import FLOATS, cached_window, check_conv3x3, check_dtypes, check_linear
from .ops.conv3x3 import op as conv_ops
from .ops.linear_sigmoid import op as linear_ops
from .reference import Window

__all__ = ["conv3x3", "linear_sigmoid"]

# What comes of wrong arguments. Other exceptions end a computation that is to end: torch.utils.checkpoint's do.
REFUSALS = (AttributeError, RuntimeError, TypeError, ValueError)


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """σ(input · weightᵀ + bias) with σ(z) = 1 / (1 + e⁻ᶻ), as one kernel; what `sigmoid(linear(…))` of torch computes.

    Args:
        input: `(*, in_features)`, any number of leading dimensions, any strides.
        weight: `(out_features, in_features)`, torch's layout.
        bias: `(out_features,)`, or one element for all, or None.
            All of one dtype (float16, bfloat16, float32, float64) and on one device.

    Returns:
        `(*, out_features)`, contiguous, of the same dtype. Sums are formed in float32 (float64 for float64); the
        precision of float32 products follows `torch.backends.cuda.matmul`. Under autocast the arguments are cast as for
        `torch.nn.functional.linear`.

    The backward pass (dz = dy·y·(1 − y), dx = dz·W, dW = dzᵀ·x, db = Σ dz) keeps the output and computes only what is
    asked for. Double backward, `torch.func` and forward-mode differentiation go torch's way and are right;
    `torch.compile` sees one operator.

    Raises:
        ValueError: shapes or devices that do not fit together.
        TypeError: dtypes that differ or are not among the four; arguments that are no tensors.
    """
    try:
        if _left_to_torch(input, weight, bias) and weight.ndim == 2 and (bias is None or bias.ndim < 2):
            return _sigmoid(F.linear(input, weight, bias))
    except REFUSALS:
        pass  # the checks know a better sentence
    if torch.overrides.has_torch_function((input, weight, bias)):
        arguments = (input, weight, bias)
        return torch.overrides.handle_torch_function(linear_sigmoid, arguments, *arguments)
    check_linear(input, weight, bias)
    if autocasting(input.device.type):
        input, weight, bias = autocast(input), autocast(weight), None if bias is None else autocast(bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.expand(weight.shape[0])
    check_dtypes("linear_sigmoid", input, weight, bias)
    if transformed(input, weight, bias) or not (dispatching() or dispatch.backend_of(input) == "triton"):
        return reference.linear_sigmoid(input, weight, bias)
    if dispatching():
        output: Tensor = linear_ops.linear_sigmoid(input, weight, bias)
        return output
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _LinearSigmoid.apply(input, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return linear_ops.forward(input, weight, bias, "triton")


class _LinearSigmoid(torch.autograd.Function):
    """The derivative: of the kernels as eager mode calls them, and of the operator."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = linear_ops.forward(input, weight, bias, "triton")
        _LinearSigmoid.save(ctx, (input, weight, bias), output, operator=False)
        return output

    @staticmethod
    def save(ctx: Any, inputs: Any, output: Tensor, operator: bool = True) -> None:
        ctx.operator = operator
        input, weight, _ = inputs
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        # A frozen weight needs no input, and an input without gradient no weight: neither is kept then.
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        operator = ctx.operator or dispatching()
        # Backward under autocast, which torch advises against, would cast the operands of float32 products.
        with without_autocast(grad.device.type):
            if _torch_computes(grad, operator):
                return reference.linear_sigmoid_backward(grad, input, weight, output, needs)
            if operator:
                return _where(needs, linear_ops.linear_sigmoid_backward(grad, input, weight, output, needs))
            return linear_ops.backward(grad, input, weight, output, needs, "triton")


linear_ops.linear_sigmoid.register_autograd(_LinearSigmoid.backward, setup_context=_LinearSigmoid.save)


def conv3x3(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    groups: int = 1,
    activation: str | None = None,
    *,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """A 3×3 convolution, with bias and sigmoid in one kernel: what `conv2d` of torch computes, and `sigmoid` after it.

    y[n, o, p, q] = act(b[o] + Σ x[n, c, p·s + r − pad, q·s + t − pad] · w[o, c, r, t]), over r and t in 0, 1, 2 and the
    channels c of o's group, with zeros outside the image.

    Args:
        input: `(N, in_channels, H, W)` or `(in_channels, H, W)`, any strides; with its padding at least 3 × 3.
        weight: `(out_channels, in_channels / groups, 3, 3)`.
        bias: `(out_channels,)` or None. All of one dtype (float16, bfloat16, float32, float64) and on one device.
        stride: 1 or 2, or a pair (vertical, horizontal).
        padding: zeros around the image, a number or a pair; "same" (1, for stride 1) or "valid" (0).
        groups: into which in_channels and out_channels are divided; each sees its own alone.
        activation: None or "sigmoid".
        dilation: 1.

    Returns:
        `(N, out_channels, P, Q)` or `(out_channels, P, Q)` with P = ⌊(H + 2·pad − 3) / s⌋ + 1, in the memory format
        that torch's convolution gives: channels_last where input or weight is. Sums are formed in float32 (float64 for
        float64); the precision of float32 products follows `torch.backends.cudnn.conv`, as torch's convolution does,
        whose default is TF32. Under autocast the arguments are cast as for `torch.nn.functional.conv2d`.

    The backward pass computes only what is asked for, and of a sigmoid needs only the output. Double backward,
    `torch.func` and forward-mode differentiation go torch's way; `torch.compile` sees one operator.

    Raises:
        ValueError: shapes, devices or options that do not fit together, or that only `torch.nn.Conv2d` takes.
        TypeError: dtypes that differ or are not among the four; arguments of the wrong kind.
    """
    try:
        if _left_to_torch(input, weight, bias) and groups == 1 and (bias is None or bias.is_cpu):
            window = cached_window(stride, padding, groups, activation, dilation)
            _, channels, height, width = weight.shape
            if channels and height == width == 3 and (window.stride[1] == 1 or input.dtype != torch.bfloat16):
                # As they were given: torch refuses True and 1.0, which the cache takes for 1.
                output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
                return output if activation is None else _sigmoid(output)
    except REFUSALS:
        pass
    if torch.overrides.has_torch_function((input, weight, bias)):
        tensors = (input, weight, bias)
        return torch.overrides.handle_torch_function(
            conv3x3, tensors, *tensors, stride, padding, groups, activation, dilation=dilation
        )
    window = check_conv3x3(input, weight, bias, stride, padding, groups, activation, dilation)
    if autocasting(input.device.type):
        input, weight, bias = autocast(input), autocast(weight), None if bias is None else autocast(bias)
    check_dtypes("conv3x3", input, weight, bias)
    if input.dim() == 3:
        return _conv3x3(input.unsqueeze(0), weight, bias, window, activation).squeeze(0)
    return _conv3x3(input, weight, bias, window, activation)


def _conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: str | None) -> Tensor:
    if transformed(input, weight, bias) or not (dispatching() or dispatch.backend_of(input) == "triton"):
        return reference.conv3x3(input, weight, bias, window, activation)
    if dispatching():
        output: Tensor = conv_ops.conv3x3(input, weight, bias, *window, activation)
        return output
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _Conv3x3.apply(input, weight, bias, *window, activation)  # type: ignore[no-any-return, no-untyped-call]
    return conv_ops.forward(input, weight, bias, window, activation, "triton")


class _Conv3x3(torch.autograd.Function):
    """The derivative: of the kernels as eager mode calls them, and of the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, stride, padding, groups, activation = inputs
        output = conv_ops.forward(input, weight, bias, Window(stride, padding, groups), activation, "triton")
        _Conv3x3.save(ctx, inputs, output, operator=False)
        return output

    @staticmethod
    def save(ctx: Any, inputs: Any, output: Tensor, operator: bool = True) -> None:
        input, weight, _, stride, padding, groups, activation = inputs
        ctx.operator, ctx.window, ctx.input_size = operator, conv_ops.as_window(stride, padding, groups), input.shape
        ctx.formats = conv_ops.channels_last_of(input, weight)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            input if needs_weight else None, weight if needs_input else None, output if activation else None
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        needs, window, size = ctx.needs_input_grad[:3], ctx.window, ctx.input_size
        operator = ctx.operator or dispatching()
        with without_autocast(grad.device.type):
            if _torch_computes(grad, operator):
                grads = reference.conv3x3_backward(grad, input, weight, output, size, window, needs)
            elif operator:
                found = conv_ops.conv3x3_backward(grad, input, weight, output, size, *window, needs, *ctx.formats)
                grads = _where(needs, found)
            else:
                grads = conv_ops.backward(grad, input, weight, output, size, window, needs, ctx.formats, "triton")
        return *grads, None, None, None, None


conv_ops.conv3x3.register_autograd(_Conv3x3.backward, setup_context=_Conv3x3.save)
flops.register_when_imported()


def _left_to_torch(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's operators compute this with nobody looking on, and will refuse what else is wrong.

    Of the arguments' types and devices it says what they don't: they take a weight on the meta device, and some biases
    of another type. Each question takes 40 ns, and a function for some of them 60 more.
    """
    return (
        not (has_torch_function_variadic(input, weight, bias) or dynamo_compiling() or dispatch_modes())
        and not compiler._is_compiling_flag
        and dispatch._backend != "triton"  # of a tensor on the CPU `backend_of` asks no more
        and input.is_cpu
        and weight.is_cpu
        and (dtype := input.dtype) in FLOATS
        and (bias is None or bias.dtype is dtype)
    )


def _sigmoid(z: Tensor) -> Tensor:
    """σ of a tensor that nobody else has: in its place, except where autograd would make a copy of a view of it."""
    return torch.sigmoid(z) if z.requires_grad else torch.sigmoid_(z)


def _torch_computes(grad: Tensor, operator: bool) -> bool:
    """Whether the gradients are left to torch's operations.

    For whoever differentiates them again (create_graph=True), where torch asks for many at once
    (is_grads_batched=True), and (operators see to it themselves) for gradients that are no plain memory.
    """
    return torch.is_grad_enabled() or transforming(grad) or (not operator and transformed(grad))


def _where(needs: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that an operator returned, each in its place."""
    found = iter(grads)
    dx, dw, db = (next(found) if need else None for need in needs)
    return dx, dw, db
