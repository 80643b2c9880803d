"""A multi-layer perceptron on the linear layer's kernels: which launches make up each direction. Imports triton."""

from collections.abc import Sequence
from typing import NamedTuple

from ...dispatch import dtype_name
from ...launch.arch import cdiv, precision_of
from ...launch.layout import Operand, accumulator, operand
from ...launch.plan import Buffer, Plan
from ...launch.reduce import Partials, append_sums, partials_of, reduce_partials
from ..activations import NONE, Activation, as_stored
from ..linear.config import WgradProblem
from ..linear.plan import dgrad, dgrad_config, output_grad, wgrad
from ..linear.plan import forward as linear


class Layer(NamedTuple):
    """One layer's tensors in backward; dw and db where they are wanted."""

    w: Buffer
    y: Buffer
    dw: Buffer | None
    db: Buffer | None


def forward(plan: Plan, x: Buffer, *layers: Buffer | None, activations: Sequence[Activation], tf32: bool) -> None:
    """y = act(x·wᵀ + b), each layer's y the next one's x. layers: w, b and y of each."""
    for n, activation in enumerate(activations):
        w, b, y = layers[3 * n : 3 * n + 3]
        assert w is not None
        assert y is not None
        linear(plan, x, w, b, y, activation=activation, tf32=tf32)
        x = y


def backward(
    plan: Plan, dy: Buffer, x: Buffer, dx: Buffer | None, *layers: Buffer | None,
    activations: Sequence[Activation], tf32: bool,
) -> None:  # fmt: skip
    """Those of dx and each layer's dw and db that are given. layers: w, y, dw and db of each; a last y may be None.

    A layer's dgrad multiplies what it writes by the derivative of the layer below, and leaves partial sums of its db:
    a dz is written once, and only the last one is formed by a pass over memory.
    """
    every = [Layer(*layers[4 * n : 4 * n + 4]) for n in range(len(activations))]  # type: ignore[arg-type]
    plan.writes(dx, *(t for layer in every for t in layer[2:]))
    acts = [as_stored(activation, dy.dtype) for activation in activations]
    precision = precision_of(dtype_name(dy.dtype), tf32, plan.arch)
    m = dy.shape[0]

    dz, sums = _last_dz(plan, dy, every[-1], acts[-1])
    for n, layer in reversed([*enumerate(every)]):
        source = every[n - 1].y if n else x
        pending: tuple[Partials, ...] = (sums,)
        if layer.dw is not None:
            pending = (_wgrad(plan, dz, operand(plan, source), layer.dw, tf32, (dx or source).numel()), sums)
        lower = every[:n]
        if n and (dx is not None or any(t is not None for below in lower for t in below[2:])):
            ws = operand(plan, layer.w)
            s = dgrad_config(plan, dz, None, ws, precision)
            out = plan.scratch(source.shape, source.dtype)
            parts = partials_of(plan, lower[-1].db, cdiv(m, s.block_i), accumulator(dy.dtype))
            dgrad(plan, dz, None, ws, out, s, acts[n - 1], precision, source, parts)
            append_sums(plan, *pending)
            dz, sums = operand(plan, out), Partials(parts, lower[-1].db)
        elif n == 0 and dx is not None:
            ws = operand(plan, layer.w)
            dgrad(plan, dz, None, ws, dx, dgrad_config(plan, dz, None, ws, precision), NONE, precision)
            append_sums(plan, *pending)
        else:
            reduce_partials(plan, *pending)
            return


def _last_dz(plan: Plan, dy: Buffer, layer: Layer, activation: Activation) -> tuple[Operand, Partials]:
    """dz of the last layer: dy where that is what a product can read, else written here; and db's partial sums."""
    dys = operand(plan, dy)
    as_it_is = activation.name is None and not dys.transposed and dys.ld >= dy.shape[1]
    if as_it_is and layer.db is None:
        return dys, Partials(None, None)
    return output_grad(plan, dy, layer.y if activation.name else None, activation, dys if as_it_is else None, layer.db)


def _wgrad(plan: Plan, dz: Operand, x: Operand, dw: Buffer, tf32: bool, spare: int) -> Partials:
    """dw, or partial results of it. spare: elements that those may take."""
    (m, n), k = dz.tensor.shape, x.tensor.shape[1]
    dtype = dtype_name(dw.dtype)
    precision = precision_of(dtype, tf32, plan.arch)
    s = plan.config(
        WgradProblem(
            m, n, k, dtype, precision, plan.arch, vec=min(dz.vec, x.vec), tma=dz.tma and x.tma, may_fuse=False,
            spare=spare * dw.element_size(),
        )
    )  # fmt: skip
    shares = partials_of(plan, dw, s.splits, accumulator(dw.dtype))
    assert shares is not None
    wgrad(plan, dz, None, x, shares, None, None, s, NONE, precision)
    return Partials(shares, dw)
