"""A multi-layer perceptron on the linear layer's kernels: which launches make up each direction. Imports triton."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from ...launch.buffer import Buffer
from ...launch.layout import matrix
from ...launch.plan import Plan
from ...launch.reduce import Partials, reduce_partials
from ..activations import NONE, Activation
from ..checks import matrices_fit, saved_fit
from ..linear.plan import LowerLayer, backward_layer, check_call, forward_layer
from .reference import grad_sizes


class Layer(NamedTuple):
    """One layer's tensors in backward; dw and db where they are wanted."""

    w: Buffer | None  # of the first layer, if dx is not wanted
    y: Buffer | None  # of the last layer, if it has no activation
    dw: Buffer | None
    db: Buffer | None


def forward(
    plan: Plan, input: Buffer, *layers: Buffer | None, activations: Sequence[Activation], keep: bool, tf32: bool
) -> None:
    """Each layer's output, or (not `keep`) the last one's; nothing where kernels can't take the tensors.

    layers: every weight, then every bias.
    """
    count = len(activations)
    weights, biases = cast(Sequence[Buffer], layers[:count]), layers[count:]
    source = input
    for w, b in zip(weights, biases, strict=True):
        check_call(source, w, b)
        source = input.viewed((*input.shape[:-1], w.shape[0]), input.stride())  # of the shape that comes out
    if not matrices_fit(input, *weights):
        return
    outputs = []
    x = matrix(plan, input)
    for n, (w, b, activation) in enumerate(zip(weights, biases, activations, strict=True), 1):
        kept = plan.output if keep or n == count else plan.scratch
        outputs.append(kept((*input.shape[:-1], w.shape[0]), input.dtype))
        y = matrix(plan, outputs[-1])
        forward_layer(plan, x, w, b, y, activation=activation, tf32=tf32)
        x = y
    plan.returns(*(outputs if keep else outputs[-1:]))


def backward(
    plan: Plan, grad: Buffer, *tensors: Buffer | None, activations: Sequence[Activation], needs: Sequence[bool],
    tf32: bool,
) -> None:  # fmt: skip
    """The gradients of the input, of every weight and of every bias, each where `needs` says so; nothing as above.

    tensors: the input and every output, which is needed for the activation's derivative, and, but for the last, for dw
    of the layer above; every weight.

    What hands a gradient down multiplies it by the derivative of the layer below, and leaves partial sums of its db: a
    dz is written once. Only the last one takes a pass over memory of its own; where a long sum is formed in parts, what
    adds them up makes the dz of the layer below.
    """
    count = len(activations)
    (input, *outputs), weights = tensors[: count + 1], tensors[count + 1 :]
    if not (matrices_fit(grad, *tensors) and saved_fit(grad, input, outputs, weights)):
        return
    sizes = zip(grad_sizes(grad, input, outputs[:-1], weights[0]), needs, strict=True)
    dx, *grads = [plan.output(size, grad.dtype) if need else None for size, need in sizes]
    dy, x, flat_dx, *ys = [None if t is None else matrix(plan, t) for t in (grad, input, dx, *outputs)]
    assert dy is not None
    # As for one layer.
    ys = [None if y is None else plan.contiguous(y) for y in ys]
    every = [Layer(*layer) for layer in zip(weights, ys, grads[:count], grads[count:], strict=True)]
    _backward(plan, dy, x, flat_dx, every, activations, tf32)
    plan.returns(dx, *grads)


def _backward(
    plan: Plan, dy: Buffer, x: Buffer | None, dx: Buffer | None, every: Sequence[Layer],
    activations: Sequence[Activation], tf32: bool,
) -> None:  # fmt: skip
    last = len(every) - 1
    pending: Sequence[Partials] = ()
    for n, (w, y, dw, db) in reversed([*enumerate(every)]):
        lower, source, out = None, x, dx
        if n > 0:
            source = every[n - 1].y
            assert source is not None
            lower = LowerLayer(source, activations[n - 1], every[n - 1].db)
            out = plan.scratch(source.shape, source.dtype)
        pending = backward_layer(
            plan, dy, source, w, y if n == last and activations[n].name else None, out, dw, db if n == last else None,
            activation=activations[n] if n == last else NONE, tf32=tf32, lower=lower, pending=pending,
        )  # fmt: skip
        dy = dy if out is None else out
    reduce_partials(plan, *pending)
