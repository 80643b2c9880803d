"""A multi-layer perceptron: the function and its derivative across layers.

Where something sees operators alone (the compiler, export, a dispatch mode), where torch must compute by itself and
where no kernel runs, it is one `linear` after another. Else a call is one autograd node for all layers.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import autocasting, backward_by_torch, kernels_cannot_see, needs_operator, without_autocast
from ..activations import Activation, ActivationLike, activation_of
from ..checks import check_dtypes, check_tensors
from ..linear import reference
from ..linear.op import activated_linear, backward_operator, check_linear, fits
from ..linear.reference import as_matrix
from ..shared import autocast_all, in_places, launching, uses_tf32


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
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):  # type: ignore[unreachable]
        raise TypeError(f"mlp: weights must be a list of tensors, got {type(weights).__name__}")
    weights = list(weights)
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
    layers = [Layer(w, b if b is None or b.shape == w.shape[:1] else b.expand(w.shape[0]), act)
              for w, b, act in zip(weights, given, acts, strict=True)]  # fmt: skip
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        flat = [t for layer in layers for t in layer[:2]]
        return _MLP.apply(tuple(acts), input, *flat)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(input, layers, keep=False)[-1]


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    activation: Activation


def layers_of(acts: Sequence[Activation], tensors: Sequence[Any]) -> list[Layer]:
    """From the activations, and weight and bias of each layer one after the other."""
    return [Layer(*each) for each in zip(tensors[::2], tensors[1::2], acts, strict=True)]


def _forward(input: Tensor, layers: Sequence[Layer], keep: bool) -> list[Tensor]:
    """Every layer's output, or (not `keep`) the last one's."""
    perform, plan = launching("mlp")

    sizes = [(*input.shape[:-1], layer.weight.shape[0]) for layer in layers]
    outputs = [input.new_empty(size) if keep or n + 1 == len(sizes) else None for n, size in enumerate(sizes)]
    tensors: list[Tensor | None] = [as_matrix(input)]
    for layer, y in zip(layers, outputs, strict=True):
        tensors += [layer.weight, layer.bias, None if y is None else as_matrix(y)]
    acts = tuple(layer.activation for layer in layers)
    with dispatch.on_device(input):
        perform(plan.forward, tensors, input.device, activations=acts, tf32=uses_tf32(input))
    return [y for y in outputs if y is not None]


class _MLP(torch.autograd.Function):
    """All layers as one node of the graph.

    Backward goes from the last layer down to the lowest of which a gradient is wanted, `first`, and autograd keeps what
    that reads: inputs of layers whose weight's gradient or whose lower neighbour's derivative is wanted, weights above
    `first`, the last output if it has an activation. A second derivative computes the outputs again, from the input of
    `first` and the parameters; what autograd does not keep of these must not have been changed.
    """

    @staticmethod
    def forward(ctx: Any, acts: tuple[Activation, ...], input: Tensor, *parameters: Tensor | None) -> Tensor:
        every = layers_of(acts, parameters)
        outputs = _forward(input, every, keep=True)
        needs_input, *needs = ctx.needs_input_grad[1:]
        first = 0 if needs_input else next((n for n in range(len(every)) if any(needs[2 * n : 2 * n + 2])), 0)
        source, *sources = [input, *outputs[:-1]][first:]
        weight, *weights = [layer.weight for layer in every[first:]]
        ctx.save_for_backward(
            source if needs[2 * first] else None, *sources, outputs[-1] if acts[-1].name else None,
            weight if needs_input else None, *weights,
        )  # fmt: skip
        ctx.first, ctx.source, ctx.layers = first, source, every[first:]
        ctx.versions = [t._version for t in _recomputed(ctx)]
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.layers)
        saved, (needs_input, *needs) = ctx.saved_tensors, ctx.needs_input_grad[1:]
        sources, output, weights = saved[:count], saved[count], saved[count + 1 :]
        needs = needs[2 * ctx.first :]
        operator = needs_operator()
        with without_autocast(grad.device.type):
            if torch.is_grad_enabled():
                if [t._version for t in _recomputed(ctx)] != ctx.versions:
                    raise RuntimeError("mlp: what a second derivative computes again was changed in place")
                sources, output = _again(ctx.source, ctx.layers)
                weights = [layer.weight for layer in ctx.layers]
            acts = [layer.activation for layer in ctx.layers]
            if operator or backward_by_torch(grad, operator):
                by_operators = operator and not backward_by_torch(grad, operator)
                dx, *grads = _by_layers(grad, sources, weights, output, acts, needs_input, needs, by_operators)
            else:
                sizes = [layer.weight.shape for layer in ctx.layers]
                dx, *grads = _by_kernels(grad, sources, weights, output, acts, needs_input, needs, sizes)
        return None, dx, *(None for _ in range(2 * ctx.first)), *grads


def _recomputed(ctx: Any) -> list[Tensor]:
    return [ctx.source, *(t for layer in ctx.layers for t in layer[:2] if t is not None)]


def _again(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor]:
    """Each layer's input, and the last output, by torch's operations."""
    sources: list[Tensor] = []
    for layer in layers:
        sources.append(x)
        x = reference.linear(x, *layer)
    return sources, x


def _by_kernels(
    grad: Tensor, sources: Sequence[Tensor | None], weights: Sequence[Tensor | None], output: Tensor | None,
    acts: Sequence[Activation], needs_input: bool, needs: Sequence[bool], sizes: Sequence[torch.Size],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the lowest layer's input, and of weight and bias of each layer, where they are wanted."""
    perform, plan = launching("mlp")

    dx = grad.new_empty((*grad.shape[:-1], sizes[0][1])) if needs_input else None
    shapes = [shape for size in sizes for shape in (size, size[:1])]
    grads = [grad.new_empty(shape) if need else None for shape, need in zip(shapes, needs, strict=True)]
    # Kernels read outputs as rows without gaps; a saved tensor's hooks may have returned anything.
    x, *ys = [None if t is None else as_matrix(t) for t in (*sources, output)]
    ys = [None if y is None else y.contiguous() for y in ys]
    tensors = [as_matrix(grad), x, None if dx is None else as_matrix(dx)]
    for n, (w, y) in enumerate(zip(weights, ys, strict=True)):
        tensors += [w, y, *grads[2 * n : 2 * n + 2]]
    with dispatch.on_device(grad):
        perform(plan.backward, tensors, grad.device, activations=tuple(acts), tf32=uses_tf32(grad))
    return [dx, *grads]


def _by_layers(
    grad: Tensor, sources: Sequence[Tensor | None], weights: Sequence[Tensor | None], output: Tensor | None,
    acts: Sequence[Activation], needs_input: bool, needs: Sequence[bool], by_operators: bool,
) -> list[Tensor | None]:  # fmt: skip
    """The same, one layer after the other: by `linear_backward`'s operator, or torch's own, differentiable again."""
    grads: list[Tensor | None] = []
    for n in reversed(range(len(acts))):
        x, w, y = sources[n], weights[n], (*sources, output)[n + 1] if acts[n].name else None
        wanted = (n > 0 or needs_input, needs[2 * n], needs[2 * n + 1])
        if by_operators:
            dx, dw, db = in_places(wanted, backward_operator(grad, x, w, y, *acts[n], wanted))
        else:
            dx, dw, db = reference.linear_backward(grad, x, w, y, acts[n], wanted)
        grads = [dw, db, *grads]
        if dx is None:
            return [None, *grads]
        grad = dx
    return [grad, *grads]
