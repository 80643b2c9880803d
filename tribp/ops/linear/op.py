"""σ(x·Wᵀ + b): the function, its derivative, and the operators `tribp::linear_sigmoid` and `…_backward`.

`linear_sigmoid` is what users call. In eager mode it goes to `forward` and `backward` below. The registered operators
wrap these for the compiler, for export and for dispatch modes, where a bare kernel launch could not be seen; they cost
20 µs more a call, so eager mode avoids them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
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
from ..checks import check_devices, check_dtypes, check_tensors
from ..shared import MAX_SIZE, REFUSALS, Grads, Needs, autocast_all, in_places, launching, sigmoid_, uses_tf32
from . import reference
from .reference import as_matrix


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
        if plain_cpu_call(input, weight, bias) and weight.ndim == 2 and (bias is None or bias.ndim < 2):
            return sigmoid_(F.linear(input, weight, bias))
    except REFUSALS:
        pass  # the checks know a better sentence
    if torch.overrides.has_torch_function((input, weight, bias)):
        arguments = (input, weight, bias)
        return torch.overrides.handle_torch_function(linear_sigmoid, arguments, *arguments)
    check_linear(input, weight, bias)
    if autocasting(input.device.type):
        input, weight, bias = autocast_all(input, weight, bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.expand(weight.shape[0])
    check_dtypes("linear_sigmoid", input, weight=weight, bias=bias)
    if kernels_cannot_see(input, weight, bias) or not (needs_operator() or dispatch.backend_of(input) == "triton"):
        return reference.linear_sigmoid(input, weight, bias)
    if needs_operator():
        output: Tensor = operator(input, weight, bias)
        return output
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _LinearSigmoid.apply(input, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return forward(input, weight, bias, "triton")


class _LinearSigmoid(torch.autograd.Function):
    """The derivative: of the kernels as eager mode calls them, and of the operator."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = forward(input, weight, bias, "triton")
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
        operator = ctx.operator or needs_operator()
        # Backward under autocast, which torch advises against, would cast the operands of float32 products.
        with without_autocast(grad.device.type):
            if backward_by_torch(grad, operator):
                return reference.linear_sigmoid_backward(grad, input, weight, output, needs)
            if operator:
                return in_places(needs, backward_operator(grad, input, weight, output, needs))
            return backward(grad, input, weight, output, needs, "triton")


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors("linear_sigmoid", "bias", input=input, weight=weight, bias=bias)
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
    check_devices("linear_sigmoid", input, weight=weight, bias=bias)


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """σ(input·weightᵀ + bias), contiguous. input: (*, K), weight: (N, K), bias: (N,); all of one dtype and device."""
    n = weight.shape[0]
    if backend == "torch" or not _fits(input, weight):
        return reference.linear_sigmoid(input, weight, bias)
    perform, plan = launching("linear")

    output = torch.empty((*input.shape[:-1], n), dtype=input.dtype, device=input.device)
    tensors = (as_matrix(input), weight, bias, as_matrix(output))
    with dispatch.on_device(input):
        perform(plan.forward, tensors, input.device, tf32=uses_tf32(input))
    return output


def backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: Needs, backend: str
) -> Grads:
    """Gradients of input, weight and bias, each where `needs` says so.

    `input` is read only for the weight's gradient and `weight` only for the input's, and may be None otherwise.
    """
    if backend == "torch" or not _fits(output, input, weight):
        return reference.linear_sigmoid_backward(grad, input, weight, output, needs)
    perform, plan = launching("linear")

    n = output.shape[-1]
    x = as_matrix(input) if input is not None else None
    dx = dw = db = None
    if needs[0]:
        assert weight is not None
        dx = torch.empty((*output.shape[:-1], weight.shape[1]), dtype=output.dtype, device=output.device)
    if needs[1]:
        assert x is not None
        dw = torch.empty((n, x.shape[1]), dtype=output.dtype, device=output.device)
    if needs[2]:
        db = torch.empty(n, dtype=output.dtype, device=output.device)
    y, flat_dx = as_matrix(output.contiguous()), as_matrix(dx) if dx is not None else None
    with dispatch.on_device(output):
        tensors = (as_matrix(grad), x, weight, y, flat_dx, dw, db)
        perform(plan.backward, tensors, output.device, tf32=uses_tf32(output))
    return dx, dw, db


def _fits(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these: none of them empty, and no dimension too long for the int32 start of a tile."""
    for t in tensors:
        if t is None or 0 < (numel := t.numel()) <= MAX_SIZE:  # then no dimension is longer
            continue
        if numel == 0 or max(numel // t.shape[-1], t.shape[-1]) > MAX_SIZE:
            return False
    return True


@torch.library.custom_op("tribp::linear_sigmoid", mutates_args=())
def operator(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast(input.device.type):  # the result has the type of the arguments, as the compiler was told
        return forward(input, weight, bias, dispatch.backend_of(input))


@operator.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@register_decomposition(torch.ops.tribp.linear_sigmoid.default)
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For ONNX and other exporters, which know torch's operators alone and look for this."""
    return reference.linear_sigmoid(input, weight, bias)


@torch.library.custom_op("tribp::linear_sigmoid_backward", mutates_args=())
def backward_operator(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that `needs` asks for, in the order input, weight, bias."""
    wanted = (needs[0], needs[1], needs[2])
    with without_autocast(grad.device.type):
        grads = backward(grad, input, weight, output, wanted, dispatch.backend_of(output))
    return [grad for grad in grads if grad is not None]


@backward_operator.register_fake
def _(grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    grads = []
    n = output.shape[-1]
    if needs[0]:
        assert weight is not None
        grads.append(output.new_empty((*output.shape[:-1], weight.shape[1])))
    if needs[1]:
        assert input is not None
        grads.append(output.new_empty((n, input.shape[-1])))
    if needs[2]:
        grads.append(output.new_empty((n,)))
    return grads


operator.register_autograd(_LinearSigmoid.backward, setup_context=_LinearSigmoid.save)
