"""act(x·Wᵀ + b): the functions, their derivative, and the operators `tribp::linear` and `tribp::linear_backward`.

`linear` is what users call. In eager mode it goes to `forward` and `backward` below. The registered operators
wrap these for the compiler, for export and for dispatch modes, where a bare kernel launch could not be seen; they cost
20 µs more a call, so eager mode avoids them.
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
from .checks import check_linear, check_refused

SIGMOID = Activation("sigmoid")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: ActivationLike = None) -> Tensor:
    """act(input · weightᵀ + bias) as one kernel: the same as torch's `linear` followed by an activation.

    Args:
        input: `(*, in_features)`, any number of leading dimensions, any strides.
        weight: `(out_features, in_features)`, torch's layout.
        bias: `(out_features,)`, or one element for all, or None.
            All of one dtype (float16, bfloat16, float32, float64) and on one device.
        activation: None, or "sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "hardsigmoid", "hardtanh" or
            "relu6": torch's function of that name. A tuple also gives its numbers, as in `("leaky_relu", 0.2)`, in the
            order of torch's arguments: negative_slope and alpha (both at least 0), beta and threshold, min_val and
            max_val.

    Returns:
        `(*, out_features)`, contiguous, of the same dtype. Sums are formed in float32 (float64 for float64); the
        precision of float32 products follows `torch.backends.cuda.matmul`. Under autocast the arguments are cast as for
        `torch.nn.functional.linear`.

    The backward pass (dz = dy·act′, dx = dz·W, dW = dzᵀ·x, db = Σ dz) computes only the gradients that are needed. If
    there is an activation, it keeps the output, from which it computes the derivative. Double backward, `torch.func`
    and forward-mode differentiation use torch's own code; `torch.compile` sees one operator.

    Raises:
        ValueError: shapes or devices that do not fit together; an activation that is not known.
        TypeError: dtypes that differ or are not among the four; arguments that are no tensors.
    """
    by_torch = False
    try:
        if by_torch := torch_computes(input, weight, bias):
            if activation is None:
                return F.linear(input, weight, bias)
            act = activation_of("linear", activation)
            return activate_(F.linear(input, weight, bias), act)
        act, quick = activation_of("linear", activation), weight is not None and kernels_compute(input, weight, bias)
    except REFUSALS:
        if by_torch:
            check_refused("linear", input, weight, bias)  # which knows a better sentence
            raise
        quick = False
    if quick and (output := unless_refused(by_kernels, input, weight, bias, act)) is not None:
        return output
    if shows_call(input, weight, bias):
        tensors = (input, weight, bias)
        return torch.overrides.handle_torch_function(linear, tensors, *tensors, activation)
    return activated_linear("linear", input, weight, bias, activation_of("linear", activation))


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """σ(input · weightᵀ + bias) with σ(z) = 1 / (1 + e⁻ᶻ): `linear` with the activation "sigmoid"."""
    by_torch = False
    try:
        if by_torch := torch_computes(input, weight, bias):
            return activate_(F.linear(input, weight, bias), SIGMOID)
        quick = weight is not None and kernels_compute(input, weight, bias)
    except REFUSALS:
        if by_torch:
            check_refused("linear_sigmoid", input, weight, bias)
            raise
        quick = False
    if quick and (output := unless_refused(by_kernels, input, weight, bias, SIGMOID)) is not None:
        return output
    if shows_call(input, weight, bias):
        tensors = (input, weight, bias)
        return torch.overrides.handle_torch_function(linear_sigmoid, tensors, *tensors)
    return activated_linear("linear_sigmoid", input, weight, bias, SIGMOID)


def torch_computes(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's own functions compute a call, or raise, so that nothing need be checked before."""
    return plain_cpu_call(input, weight, bias) and weight.ndim == 2 and (bias is None or bias.ndim < 2)


def activated_linear(
    function: str, input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
) -> Tensor:
    """Any call that the quick checks above do not settle. function: the name that errors begin with."""
    if isinstance(input, Tensor) and input.is_nested:
        return reference.linear(input, weight, bias, activation)
    check_linear(function, input, weight, bias)
    if autocast_activates(input.device.type, activation):
        return activate(activated_linear(function, input, weight, bias, NONE), *activation)
    if autocasting(input.device.type):
        input, weight, bias = autocast_all(input, weight, bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.expand(weight.shape[0])
    check_dtypes(function, input, weight=weight, bias=bias)
    implementation = implementation_for(input, weight, bias)
    if implementation == "torch":
        return reference.linear(input, weight, bias, activation)
    if implementation == "operator":
        output: Tensor = operator(input, weight, bias, *activation)
        return output
    input, weight, bias = unwrap_dead(input, weight, bias)
    return by_kernels(input, weight, bias, activation)


def by_kernels(input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return apply(input, weight, bias, activation)  # type: ignore[no-any-return]
    return forward(input, weight, bias, activation, "triton")


class _Linear(torch.autograd.Function):
    """The derivative: of the kernels as eager mode calls them, and of the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, activation = inputs
        output = forward(input, weight, bias, activation, "triton")
        _Linear.save(ctx, input, weight, activation, output)
        return output

    @staticmethod
    def save(
        ctx: Any, input: Tensor, weight: Tensor, activation: Activation, output: Tensor, by_operator: bool = False
    ) -> None:
        ctx.by_operator, ctx.activation = by_operator, activation
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        # A frozen weight needs no input, and an input without gradient no weight: neither is kept then.
        ctx.save_for_backward(
            input if needs_weight else None, weight if needs_input else None, output if ctx.activation.name else None
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad), None


apply = bare_apply(_Linear)


def _gradients(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    """Of input, weight and bias. Not `_Linear.backward`: Dynamo takes that for another call of the Function."""
    input, weight, output = ctx.saved_tensors
    needs, act = ctx.needs_input_grad[:3], ctx.activation
    by_operator = ctx.by_operator or needs_operator()
    # Backward under autocast, which torch advises against, would cast the operands of float32 products.
    with without_autocast(grad.device.type):
        if backward_by_torch(grad, by_operator):
            return reference.linear_backward(grad, input, weight, output, act, needs)
        if by_operator:
            return scatter(needs, backward_operator(grad, input, weight, output, *act, needs))
        return backward(grad, input, weight, output, act, needs, "triton")


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, backend: str) -> Tensor:
    """act(input·weightᵀ + bias), contiguous. input: (*, K), weight: (N, K), bias: (N,); all of one dtype and device."""
    if backend == "triton":
        perform, plan = import_plan("linear")
        done = perform(plan.forward, (input, weight, bias), activation=activation, tf32=uses_tf32(input))
        if done:
            return done[0]  # type: ignore[no-any-return]
    return reference.linear(input, weight, bias, activation)


def backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, activation: Activation,
    needs: Needs, backend: str,
) -> Grads:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so.

    `input` is read only for the weight's gradient, `weight` only for the input's, `output` only for the activation's;
    each may be None otherwise.
    """
    if backend == "triton":
        perform, plan = import_plan("linear")
        tensors, tf32 = (grad, input, weight, output), uses_tf32(grad)
        done = perform(plan.backward, tensors, activation=activation, needs=needs, tf32=tf32)
        if done:
            return tuple(done)
    return reference.linear_backward(grad, input, weight, output, activation, needs)


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def operator(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, a: float = 0.0, b: float = 0.0
) -> Tensor:
    refuse_tangents(input, weight, bias)
    with without_autocast(input.device.type):  # the result has the type of the arguments, as the compiler was told
        return forward(input, weight, bias, Activation(activation, a, b), dispatch.backend_of(input))


@operator.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, a: float = 0.0, b: float = 0.0
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def decomposed(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, a: float = 0.0, b: float = 0.0
) -> Tensor:
    return reference.linear(input, weight, bias, Activation(activation, a, b))


@torch.library.custom_op(f"{NAMESPACE}::linear_backward", mutates_args=())
def backward_operator(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None,
    activation: str | None, a: float, b: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that `needs` asks for, in the order input, weight, bias."""
    act, of_three = Activation(activation, a, b), (needs[0], needs[1], needs[2])
    with without_autocast(grad.device.type):
        grads = backward(grad, input, weight, output, act, of_three, dispatch.backend_of(grad))
    return [grad for grad in grads if grad is not None]


@backward_operator.register_fake
def _(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None,
    activation: str | None, a: float, b: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    sizes = reference.grad_sizes(grad, input, weight)
    return [grad.new_empty(size) for size, need in zip(sizes, needs, strict=True) if need]


def _save_of_operator(ctx: Any, inputs: Any, output: Tensor) -> None:
    input, weight, _, *activation = inputs
    _Linear.save(ctx, input, weight, Activation(*activation), output, by_operator=True)


operator.register_autograd(
    lambda ctx, grad: (*_gradients(ctx, grad), None, None, None), setup_context=_save_of_operator
)


# What the operator was called when it had the sigmoid alone, for a release: exported graphs hold it.


@torch.library.custom_op(f"{NAMESPACE}::linear_sigmoid", mutates_args=())
def sigmoid_operator(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    refuse_tangents(input, weight, bias)
    with without_autocast(input.device.type):
        return forward(input, weight, bias, SIGMOID, dispatch.backend_of(input))


@sigmoid_operator.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


sigmoid_operator.register_autograd(
    lambda ctx, grad: tuple(_gradients(ctx, grad)),
    setup_context=lambda ctx, inputs, output: _save_of_operator(ctx, (*inputs, *SIGMOID), output),
)
