"""Functions on tensors, as in `torch.nn.functional`: argument checks, autocast and autograd around the operators."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, runtime
from .ops import linear_sigmoid as ops
from .runtime import dtype_name

__all__ = ["linear_sigmoid"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    if torch.overrides.has_torch_function((input, weight, bias)):
        arguments = (input, weight, bias)
        return torch.overrides.handle_torch_function(linear_sigmoid, arguments, *arguments)
    _check(input, weight, bias)
    if _autocasting(input.device.type):
        input, weight, bias = _autocast(input), _autocast(weight), None if bias is None else _autocast(bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.expand(weight.shape[0])
    _check_dtypes(input, weight, bias)
    if _transformed(input, weight, bias) or not (_dispatching() or runtime.backend_of(input) == "triton"):
        return reference.linear_sigmoid(input, weight, bias)
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    # An exported graph holds the operator alone either way; torch 2.9 cannot export the function around it.
    if needs_grad and torch.is_grad_enabled() and not _exporting():
        return _LinearSigmoid.apply(input, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    if _dispatching():
        output: Tensor = ops.linear_sigmoid(input, weight, bias)
        return output
    return ops.forward(input, weight, bias, "triton")


class _LinearSigmoid(torch.autograd.Function):
    """The derivative of the kernels, and of the operators where something looks on."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dispatching = _dispatching()
        if ctx.dispatching:
            output: Tensor = ops.linear_sigmoid(input, weight, bias)
        else:
            output = ops.forward(input, weight, bias, "triton")
        needs_input, needs_weight, _ = ctx.needs_input_grad
        # A frozen weight needs no input, and an input without gradient no weight: neither is kept then.
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight, output = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if ctx.dispatching:
            grads = iter(ops.linear_sigmoid_backward(grad, input, weight, output, needs))
            dx, dw, db = (next(grads) if need else None for need in needs)
            return dx, dw, db
        device = grad.device.type
        # Backward under autocast, which torch advises against, would cast the operands of float32 products.
        with torch.autocast(device, enabled=False) if _autocasting(device) else nullcontext():
            if torch.is_grad_enabled():
                # Only under create_graph=True: whoever differentiates the gradient again needs torch's own operations.
                return reference.linear_sigmoid_backward(grad, input, weight, output, needs)
            return ops.backward(grad, input, weight, output, needs, "triton")


def _dispatching() -> bool:
    """Whether something looks on that sees operators but not kernel launches: the compiler, export, a dispatch mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _transformed(*tensors: Tensor | None) -> bool:
    """Whether torch must compute by itself: inside torch.func, in forward mode, under jit.trace, for tensor subclasses.

    A kernel would read the memory behind a wrapped tensor and return a result without its tangent, batch or trace.
    """
    if _transforming():
        return True
    if torch.compiler.is_compiling():  # fake tensors are subclasses too, and the operators take them
        return False
    return any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors if t is not None)


def _constant_while_compiling(predicate: Callable[[], bool]) -> Callable[[], bool]:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler for setting this one mark."""
    predicate._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return predicate


@_constant_while_compiling  # and guarded: Dynamo has guards of its own on all three
def _transforming() -> bool:
    """Inside torch.func, in forward mode, or under jit.trace."""
    functorch, tracing = torch._C._are_functorch_transforms_active(), torch._C._get_tracing_state()
    return bool(functorch or tracing or forward_ad._current_level >= 0)


@_constant_while_compiling  # asked directly, torch 2.11's Dynamo says yes to everyone
def _exporting() -> bool:
    return torch.compiler.is_exporting()


def _autocasting(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch has no autocast on meta, and raises


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to torch's linear: everything but float64 in the autocast dtype."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"linear_sigmoid: {name} must be a tensor, got {type(tensor).__name__}")
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
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"linear_sigmoid: {name} must be on input's device {input.device}, got {tensor.device}")


def _check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(
                f"linear_sigmoid: {name} must be float16, bfloat16, float32 or float64, got {dtype_name(tensor.dtype)}"
            )
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"linear_sigmoid: {name} must have input's dtype {dtype_name(input.dtype)}, "
                f"got {dtype_name(tensor.dtype)}"
            )
