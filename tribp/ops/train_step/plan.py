"""A small perceptron's training step: which launches make it up. Imports triton."""

from collections.abc import Sequence
from dataclasses import replace

from ...dispatch import dtype_name
from ...kernels import train_step as kernels
from ...launch.arch import cdiv, power_of_2, precision_of
from ...launch.buffer import Buffer
from ...launch.layout import accumulator
from ...launch.plan import Plan
from ..activations import Activation, as_stored
from ..linear.plan import forward_layer
from .config import TrainProblem


def train(
    plan: Plan, x: Buffer, target: Buffer, loss: Buffer, *layers: Buffer | None,
    activations: Sequence[Activation], kind: str, reduction: str, tf32: bool,
) -> None:  # fmt: skip
    """The loss, and those of each layer's dw and db that are given: two launches, and one of a large first layer.

    layers: w, b, dw and db of each, contiguous.
    """
    weights, biases, dws, dbs = (layers[n::4] for n in range(4))
    m, k = x.shape
    sizes = (k, *(w.shape[0] for w in weights if w is not None))
    problem = TrainProblem(m, sizes, dtype_name(x.dtype), plan.arch)
    s = problem.choose()
    programs = cdiv(m, s.block_m)
    precision = precision_of(dtype_name(x.dtype), tf32, plan.arch)
    config = kernels.Train(
        SIZES=sizes, ACTS=tuple(activations), STORED_ACTS=tuple(as_stored(act, x.dtype) for act in activations),
        FIRST=s.first, LOSS=kind, REDUCTION=reduction, BLOCK_M=s.block_m, BLOCK_L=s.block_l, BLOCK_N=s.block_n,
        BLOCK_K=s.block_k, BLOCK_ROWS=s.block_rows, PARTS=power_of_2(programs), PRECISION=precision,
        PTX=plan.arch.backend != "hip",
    )  # fmt: skip
    x, target = plan.contiguous(x), plan.contiguous(target)
    losses = plan.scratch((programs,), accumulator(x.dtype))
    dzs = tuple(plan.scratch((m, n), x.dtype) for n in sizes[1:])
    ys = (*(plan.scratch((m, n), x.dtype) for n in sizes[1:-1]), None)
    if s.first:
        assert weights[0] is not None
        assert ys[0] is not None
        forward_layer(plan, x, weights[0], biases[0], ys[0], activation=activations[0], tf32=tf32)
    plan.launch(kernels.train_rows, (programs,), (x, target, losses, weights, biases, ys, dzs, m), config, s)
    arguments = (x, losses, loss, ys, dzs, dws, dbs, m, programs)
    plan.launch(kernels.train_weights, (problem.programs(s),), arguments, config, replace(s, num_warps=s.weight_warps))
