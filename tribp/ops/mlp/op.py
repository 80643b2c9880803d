"""A multi-layer perceptron: the function, its derivative across layers, and the operators of both.

A call is one node of autograd's graph for all layers. The operators `tribp::mlp` and `tribp::mlp_backward` are what the
compiler, export and dispatch modes see of it, as for `linear`. Where torch must compute by itself, and where no kernel
runs, it is one `linear` after another.
"""

from collections.abc import Iterable, Sequence
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
    shows_call,
    unwrap_dead,
    without_autocast,
)
from ..activations import Activation, ActivationLike, activate, activate_, activation_of
from ..checks import check_dtypes, check_tensors, matrices_fit
from ..linear.checks import check_linear, check_refused
from ..linear.op import activated_linear, torch_computes
from ..linear.reference import linear_backward
from ..shared import (
    NAMESPACE,
    REFUSALS,
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
from .reference import Layer

Both = tuple[Activation, Activation]  # of all layers but the last, and of the last


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

    The backward pass is fused across the layers: the kernel that computes the gradient of a layer's input multiplies it
    by the derivative of the activation below, and sums that lower layer's bias gradient, so neither needs a pass over
    memory of its own. `torch.compile` sees one operator for all layers; where no gradient is wanted, one for each.

    Raises:
        ValueError: shapes or devices that do not fit together; an activation that is not known.
        TypeError: dtypes that differ or are not among the four; arguments that are no tensors.
    """
    if not _is_list(weights):
        raise TypeError(f"mlp: weights must be a list of tensors, got {type(weights).__name__}")
    if biases is not None and not _is_list(biases):
        raise TypeError(f"mlp: biases must be a list of tensors and None, or None, got {type(biases).__name__}")
    weights = list(weights)
    both = activation_of("mlp", activation), activation_of("mlp", output_activation, "output_activation")
    given = [None] * len(weights) if biases is None else list(biases)
    if not weights:
        raise ValueError("mlp: weights must be at least one, got none")
    if len(given) != len(weights):
        raise ValueError(f"mlp: biases must be one for each of {len(weights)} weights, got {len(given)}")
    done, by_torch = 0, False
    try:
        x = input
        for w, b, act in zip(weights, given, _each(len(weights), both), strict=True):
            by_torch = False  # until it is known of this layer
            if not (by_torch := torch_computes(x, w, b)):
                break
            x = activate_(F.linear(x, w, b), act)
            done += 1
        else:
            return x
        quick = all(w is not None for w in weights) and kernels_compute(input, *weights, *given)
    except REFUSALS:
        if by_torch:
            check_refused(f"mlp, layer {done}", x, weights[done], given[done])  # which knows a better sentence
            raise
        quick = False
    if quick and (output := unless_refused(by_kernels, input, weights, given, both)) is not None:
        return output
    tensors = [t for t in (input, *weights, *given) if t is not None]
    if shows_call(*tensors):
        arguments = (input, weights, None if biases is None else given, activation, output_activation)
        return torch.overrides.handle_torch_function(mlp, tensors, *arguments)
    optional = {f"biases[{n}]": b for n, b in enumerate(given)}
    check_tensors("mlp", *optional, input=input, **{f"weights[{n}]": w for n, w in enumerate(weights)}, **optional)
    if autocast_activates(input.device.type, both[1]):
        return activate(mlp(input, weights, given, activation), *both[1])
    implementation = implementation_for(*tensors)
    if implementation == "operator":
        # Without a derivative an operator for all layers would do nothing but hold all their outputs at once.
        at_once = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    else:
        at_once = implementation == "kernels" and matrices_fit(input, *weights)
    if not at_once:
        for n, (w, b, act) in enumerate(zip(weights, given, _each(len(weights), both), strict=True)):
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
    given = [b if b is None or b.shape == w.shape[:1] else b.expand(w.shape[0])
             for w, b in zip(weights, given, strict=True)]  # fmt: skip
    if implementation == "operator":
        present = [b for b in given if b is not None]
        outputs: list[Tensor] = operator(input, weights, present, [b is not None for b in given], *both[0], *both[1])
        return outputs[-1]
    input, *tensors = unwrap_dead(input, *weights, *given)
    return by_kernels(input, tensors[: len(weights)], tensors[len(weights) :], both)


def _is_list(tensors: object) -> bool:
    """Whether it has tensors in it; a list or a tuple is known to in a tenth of the time."""
    return type(tensors) in (list, tuple) or (not isinstance(tensors, Tensor) and isinstance(tensors, Iterable))


def by_kernels(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], both: Both) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *weights, *biases)):
        return apply(both, input, *weights, *biases)  # type: ignore[no-any-return]
    return forward(input, _layers(weights, biases, both), "triton", keep=False)[-1]


def _each(count: int, both: Both) -> list[Activation]:
    return [both[0]] * (count - 1) + [both[1]]


def _layers(weights: Sequence[Tensor], biases: Sequence[Tensor | None], both: Both) -> list[Layer]:
    return [Layer(*each) for each in zip(weights, biases, _each(len(weights), both), strict=True)]


# Of gradients and whether they are wanted, the order is: the input's, each weight's, each bias's.


class _MLP(torch.autograd.Function):
    """The derivative of the kernels as eager mode calls them."""

    @staticmethod
    def forward(ctx: Any, both: Both, input: Tensor, *parameters: Any) -> Tensor:
        count = len(parameters) // 2
        layers = _layers(parameters[:count], parameters[count:], both)
        outputs = forward(input, layers, "triton")
        _save(ctx, input, layers, outputs, ctx.needs_input_grad[1:], by_operator=False)
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, grad, ctx.needs_input_grad[1:])


apply = bare_apply(_MLP)


def _save(
    ctx: Any, input: Tensor, layers: Sequence[Layer], outputs: Sequence[Tensor], needs: Sequence[bool],
    by_operator: bool,
) -> None:  # fmt: skip
    """Backward goes from the last layer down to the lowest of which a gradient is wanted, `first`.

    Autograd keeps what that reads: inputs of layers whose weight's gradient or whose lower neighbour's derivative is
    wanted, weights above `first`, the last output if it has an activation. A second derivative reads no more than that:
    see `_KeptLayer`.
    """
    first = _lowest(needs)
    source, *hidden = [input, *outputs[:-1]][first:]
    weight, *weights = [layer.weight for layer in layers[first:]]
    ctx.save_for_backward(
        source if needs[1 + first] else None, *hidden, outputs[-1] if layers[-1].activation.name else None,
        weight if needs[0] else None, *weights,
    )  # fmt: skip
    ctx.by_operator, ctx.first, ctx.layers = by_operator, first, layers[first:]
    # Only as what a second derivative goes on to. Autograd frees what it keeps, with the backward pass.
    ctx.source = source if needs[0] and not needs[1 + first] else None
    ctx.both = layers[0].activation, layers[-1].activation
    tensors = [ctx.source, *(t for layer in ctx.layers for t in layer[:2])]
    ctx.histories = [(t, t.grad_fn) for t in tensors if t is not None and t.requires_grad]


def _lowest(needs: Sequence[bool]) -> int:
    """The lowest layer of which a gradient is wanted."""
    count = len(needs) // 2
    return 0 if needs[0] else next((n for n in range(count) if needs[1 + n] or needs[1 + count + n]), 0)


class _KeptLayer(torch.autograd.Function):
    """A layer whose output is kept already, as a function of its input and parameters: of what torch would keep.

    Of the outputs that a backward pass reads autograd knows the values alone. So a second derivative can be taken of
    what has since been changed in place where torch does not read it: biases, the lowest weight of a frozen input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor, input: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        return output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, input, weight, _, ctx.activation = inputs
        _, needs_input, needs_weight = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            input if needs_weight else None, weight if needs_input else None, output if ctx.activation.name else None
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        with without_autocast(grad.device.type):
            needs = ctx.needs_input_grad[1:4]
            return None, *linear_backward(grad, input, weight, output, ctx.activation, needs), None


def _as_functions(
    ctx: Any, input: Tensor | None, outputs: Sequence[Tensor | None], weights: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """These outputs, one a layer, as functions of what `needs` says. input: of the lowest of these layers."""
    if any(t.grad_fn is not history for t, history in ctx.histories):
        raise RuntimeError(
            "mlp: the input or a parameter was changed in place by what a second derivative goes through"
        )
    results: list[Tensor | None] = []
    x = input if ctx.source is None else ctx.source
    if x is not None and not needs[0]:
        x = x.detach()
    for n, (layer, w, y) in enumerate(zip(ctx.layers, weights, outputs, strict=True), 1):
        if y is not None:
            w = layer.weight if w is None else w
            b = layer.bias if needs[n + len(outputs)] else None
            y = _KeptLayer.apply(y.detach(), x, w if needs[n] else w.detach(), b, layer.activation)  # type: ignore[no-untyped-call]
        x = y
        results.append(y)
    return results


def _gradients(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    saved, first, count = ctx.saved_tensors, ctx.first, len(ctx.layers)
    sources, output, weights = saved[:count], saved[count], saved[count + 1 :]
    of_weights, of_biases = needs[1 : 1 + first + count], needs[1 + first + count :]
    needs = [needs[0], *of_weights[first:], *of_biases[first:]]
    by_operator = ctx.by_operator or needs_operator()
    # As in linear's backward.
    with without_autocast(grad.device.type):
        if torch.is_grad_enabled():
            *hidden, output = _as_functions(ctx, sources[0], [*sources[1:], output], weights, needs)
            sources = [sources[0], *hidden]
        read = sources[0], sources[1:], output, weights[0], weights[1:]
        if backward_by_torch(grad, by_operator):
            grads = backward(grad, *read, ctx.both, needs, "torch")
        elif by_operator:
            grads = scatter(needs, backward_operator(grad, *read, *ctx.both[0], *ctx.both[1], needs))
        else:
            grads = backward(grad, *read, ctx.both, needs, "triton")
    lower: list[Tensor | None] = [None] * first  # no gradient of these layers is wanted
    return [grads[0], *lower, *grads[1 : 1 + count], *lower, *grads[1 + count :]]


def forward(input: Tensor, layers: Sequence[Layer], backend: str, keep: bool = True) -> list[Tensor]:
    """Every layer's output, or (not `keep`) the last one's."""
    if backend == "triton":
        perform, plan = import_plan("mlp")
        weights, biases, acts = zip(*layers, strict=True)
        tensors, tf32 = (input, *weights, *biases), uses_tf32(input)
        done: list[Tensor] = perform(plan.forward, tensors, activations=acts, keep=keep, tf32=tf32)
        if done:
            return done
    return reference.mlp(input, layers, keep)


def backward(
    grad: Tensor, input: Tensor | None, hidden: Sequence[Tensor], output: Tensor | None, weight: Tensor | None,
    weights: Sequence[Tensor], both: Both, needs: Sequence[bool], backend: str,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients, each where `needs` says so.

    hidden: the outputs of all layers but the last. weight: the lowest layer's, weights: the others'. `input` is read
    only for the lowest weight's gradient, `weight` only for the input's, `output` only for the last activation's
    derivative; each may be None otherwise.
    """
    acts = _each(len(hidden) + 1, both)
    if backend == "triton":
        perform, plan = import_plan("mlp")
        tensors = (grad, input, *hidden, output, weight, *weights)
        facts = dict(activations=tuple(acts), needs=tuple(needs), tf32=uses_tf32(grad))
        done: list[Tensor | None] = perform(plan.backward, tensors, **facts)
        if done:
            return done
    return reference.mlp_backward(grad, [input, *hidden], output, [weight, *weights], acts, needs)


@torch.library.custom_op(f"{NAMESPACE}::mlp", mutates_args=())
def operator(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool],
    activation: str | None, a: float, b: float, output_activation: str | None, output_a: float, output_b: float,
) -> list[Tensor]:  # fmt: skip
    """Every layer's output. biases: of the layers that have one, for autograd sees no tensors in a list with None."""
    both = Activation(activation, a, b), Activation(output_activation, output_a, output_b)
    layers = _layers(weights, scatter(has_bias, biases), both)
    refuse_tangents(input, *weights, *biases)
    with without_autocast(input.device.type):
        return forward(input, layers, dispatch.backend_of(input))


@operator.register_fake
def _(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool],
    activation: str | None, a: float, b: float, output_activation: str | None, output_a: float, output_b: float,
) -> list[Tensor]:  # fmt: skip
    return [input.new_empty((*input.shape[:-1], weight.shape[0])) for weight in weights]


def decomposed(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool],
    activation: str | None, a: float, b: float, output_activation: str | None, output_a: float, output_b: float,
) -> list[Tensor]:  # fmt: skip
    both = Activation(activation, a, b), Activation(output_activation, output_a, output_b)
    return reference.mlp(input, _layers(weights, scatter(has_bias, biases), both))


@torch.library.custom_op(f"{NAMESPACE}::mlp_backward", mutates_args=())
def backward_operator(
    grad: Tensor, input: Tensor | None, hidden: Sequence[Tensor], output: Tensor | None, weight: Tensor | None,
    weights: Sequence[Tensor], activation: str | None, a: float, b: float,
    output_activation: str | None, output_a: float, output_b: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that `needs` asks for, in its order."""
    both = Activation(activation, a, b), Activation(output_activation, output_a, output_b)
    with without_autocast(grad.device.type):
        grads = backward(grad, input, hidden, output, weight, weights, both, needs, dispatch.backend_of(grad))
    return [grad for grad in grads if grad is not None]


@backward_operator.register_fake
def _(
    grad: Tensor, input: Tensor | None, hidden: Sequence[Tensor], output: Tensor | None, weight: Tensor | None,
    weights: Sequence[Tensor], activation: str | None, a: float, b: float,
    output_activation: str | None, output_a: float, output_b: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    sizes = reference.grad_sizes(grad, input, hidden, weight)
    return [grad.new_empty(size) for size, need in zip(sizes, needs, strict=True) if need]


def _save_of_operator(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    input, weights, biases, ctx.has_bias, act, a, b, output_act, output_a, output_b = inputs
    both = Activation(act, a, b), Activation(output_act, output_a, output_b)
    needs_input, *needs = ctx.needs_input_grad  # here without the lists' structure
    count = len(weights)
    needs = [needs_input, *needs[:count], *scatter(ctx.has_bias, needs[count:])]
    _save(ctx, input, _layers(weights, scatter(ctx.has_bias, biases), both), output, needs, by_operator=True)
    ctx.mark_non_differentiable(*output[:-1])
    ctx.set_materialize_grads(False)  # no zeros for those


def _backward_of_operator(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    needs_input, weights, biases = ctx.needs_input_grad[:3]
    needs = [needs_input, *weights, *scatter(ctx.has_bias, biases)]
    grad = grads[-1]
    dx, *others = [None] * len(needs) if grad is None else _gradients(ctx, grad, needs)
    count = len(weights)
    dbs = [db for db, has_bias in zip(others[count:], ctx.has_bias, strict=True) if has_bias]
    return dx, others[:count], dbs, *[None] * 7


operator.register_autograd(_backward_of_operator, setup_context=_save_of_operator)
