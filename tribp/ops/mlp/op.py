"""A multi-layer perceptron: the function and its derivative across layers.

Where something sees operators alone (the compiler, export, a dispatch mode), where torch must compute by itself and
where no kernel runs, it is one `linear` after another. Else a call is one autograd node for all layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import autocasting, backward_by_torch, kernels_cannot_see, needs_operator, without_autocast
from ..activations import Activation, ActivationLike, activation_of
from ..checks import check_dtypes, check_tensors
from ..linear import reference
from ..linear.op import activated_linear, check_linear, fits
from ..linear.reference import as_matrix
from ..shared import autocast_all, launching, uses_tf32


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: ActivationLike = "sigmoid",
    output_activation: ActivationLike = None,
) -> Tensor:
    """Linear layers, each with an activation: what `linear(linear(input, w0, b0, act), w1, b1, act)…` computes.

    Args:
        input: `(*, sizes[0])`, any number of leading dimensions, any strides.
        weights: `(sizes[l + 1], sizes[l])` each, at least one.
        biases: `(sizes[l + 1],)` or None each; or None.
            All of one dtype (float16, bfloat16, float32, float64) and on one device.
        activation: of all layers but the last, as for `linear`.
        output_activation: of the last layer.

    Returns:
        `(*, sizes[-1])`, contiguous, of the same dtype; all else as for `linear`.

    The backward pass crosses the layers: the product that hands a gradient down multiplies it by the derivative of the
    layer below and sums that layer's bias gradient, so that no pass over memory does. Under `torch.compile` and export
    the layers are operators by themselves.

    Raises:
        ValueError: shapes or devices that do not fit together; an activation that is not known.
        TypeError: dtypes that differ or are not among the four; arguments that are no tensors.
    """
    acts = [activation_of("mlp", activation)] * (len(weights) - 1) + [activation_of("mlp", output_activation)]
    given = [None] * len(weights) if biases is None else list(biases)
    if not weights or len(given) != len(weights):
        raise ValueError(f"mlp: biases must be one for each of at least 1 weights, got {len(given)} and {len(weights)}")
    optional = {f"biases[{n}]": b for n, b in enumerate(given)}
    check_tensors("mlp", *optional, input=input, **{f"weights[{n}]": w for n, w in enumerate(weights)}, **optional)
    tensors = [t for t in (input, *weights, *given) if t is not None]
    if torch.overrides.has_torch_function(tensors):
        arguments = (input, weights, biases, activation, output_activation)
        return torch.overrides.handle_torch_function(mlp, tensors, *arguments)
    by_layers = needs_operator() or kernels_cannot_see(*tensors) or dispatch.backend_of(input) == "torch"
    if by_layers or not fits(input, *weights):
        for n, (w, b, act) in enumerate(zip(weights, given, acts, strict=True)):
            input = activated_linear(f"mlp, layer {n}", input, w, b, act)
        return input
    x = input
    for n, (w, b) in enumerate(zip(weights, given, strict=True)):
        check_linear(f"mlp, layer {n}", x, w, b)
        x = input.new_empty(()).expand(*input.shape[:-1], w.shape[0])  # of the shape that comes out
    if autocasting(input.device.type):
        input, *cast = autocast_all(input, *weights, *given)
        weights, given = cast[: len(weights)], cast[len(weights) :]
    for n, (w, b) in enumerate(zip(weights, given, strict=True)):
        check_dtypes(f"mlp, layer {n}", input, weight=w, bias=b)
    given = [None if b is None else b.expand(w.shape[0]) for w, b in zip(weights, given, strict=True)]
    layers = [t for pair in zip(weights, given, strict=True) for t in pair]
    needs_grad = any(t.requires_grad for t in (input, *layers) if t is not None)
    if needs_grad and torch.is_grad_enabled():
        return _MLP.apply(tuple(acts), input, *layers)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(input, layers, acts)[-1]


def _forward(input: Tensor, layers: Sequence[Tensor | None], acts: Sequence[Activation]) -> list[Tensor]:
    """Every layer's output. layers: weight and bias of each."""
    perform, plan = launching("mlp")

    outputs: list[Tensor] = []
    tensors: list[Tensor | None] = [as_matrix(input)]
    for w, b in zip(layers[::2], layers[1::2], strict=True):
        assert w is not None
        outputs.append(input.new_empty((*input.shape[:-1], w.shape[0])))
        tensors += [w, b, as_matrix(outputs[-1])]
    with dispatch.on_device(input):
        perform(plan.forward, tensors, input.device, activations=tuple(acts), tf32=uses_tf32(input))
    return outputs


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: tuple[Activation, ...], input: Tensor, *layers: Tensor | None) -> Tensor:
        outputs = _forward(input, layers, acts)
        ctx.activations = acts
        ctx.save_for_backward(input, *layers, *outputs)
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, *saved = ctx.saved_tensors
        acts = ctx.activations
        layers, outputs = saved[: 2 * len(acts)], saved[2 * len(acts) :]
        needs = ctx.needs_input_grad[1:]
        with without_autocast(grad.device.type):
            if backward_by_torch(grad, operator=False):
                return None, *_backward_by_layers(grad, input, layers, outputs, acts, needs)
            return None, *_backward(grad, input, layers, outputs, acts, needs)


def _backward(
    grad: Tensor, input: Tensor, layers: Sequence[Tensor | None], outputs: Sequence[Tensor],
    acts: Sequence[Activation], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the input and of each weight and bias, where `needs` says so."""
    perform, plan = launching("mlp")

    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
             for need, t in zip(needs, (input, *layers), strict=True)]  # fmt: skip
    dx, *others = grads
    tensors = [as_matrix(grad), as_matrix(input), None if dx is None else as_matrix(dx)]
    for n, y in enumerate(outputs):
        tensors += [layers[2 * n], as_matrix(y), *others[2 * n : 2 * n + 2]]
    with dispatch.on_device(grad):
        perform(plan.backward, tensors, grad.device, activations=tuple(acts), tf32=uses_tf32(grad))
    return grads


def _backward_by_layers(
    grad: Tensor, input: Tensor, layers: Sequence[Tensor | None], outputs: Sequence[Tensor],
    acts: Sequence[Activation], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The same by torch's operations; differentiable again, for which the outputs are computed again."""
    if torch.is_grad_enabled():
        outputs, x = [], input
        for w, b, act in zip(layers[::2], layers[1::2], acts, strict=True):
            assert w is not None
            x = reference.linear(x, w, b, act)
            outputs.append(x)
    grads: list[Tensor | None] = []
    for n in reversed(range(len(acts))):
        below = outputs[n - 1] if n else input
        wanted = (any(needs[: 2 * n + 1]), needs[2 * n + 1], needs[2 * n + 2])
        y = outputs[n] if acts[n].name else None
        dx, dw, db = reference.linear_backward(grad, below, layers[2 * n], y, acts[n], wanted)
        grads = [dw, db, *grads]
        if dx is None:
            grads = [*(None for _ in range(2 * n)), *grads]
            break
        grad = dx
    return [grad if needs[0] else None, *grads]
