"""Linear layers with activations in plain torch: the fallback where no kernel runs, and the tests' oracle."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..activations import Activation
from ..checks import Described
from ..linear import reference as linear


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    activation: Activation


def mlp(input: Tensor, layers: Sequence[Layer], keep: bool = True) -> list[Tensor]:
    """Every layer's output, or (not `keep`) the last one's."""
    outputs: list[Tensor] = []
    for layer in layers:
        input = linear.linear(input, *layer)
        outputs = [*outputs, input] if keep else [input]
    return outputs


def grad_sizes(
    grad: Described, input: Described | None, hidden: Sequence[Described | None], weight: Described | None
) -> list[tuple[int, ...]]:
    """Of the gradients of the input, of each weight and of each bias; hidden: the outputs of all layers but the last.

    Either of input and the lowest layer's weight may be None where its shape is not asked.
    """
    lowest = next((t.shape[-1] for t in (input, weight) if t is not None), 0)
    sizes = [lowest, *(t.shape[-1] for t in hidden if t is not None), grad.shape[-1]]
    return [(*grad.shape[:-1], lowest), *((n, k) for k, n in itertools.pairwise(sizes)), *((n,) for n in sizes[1:])]


def mlp_backward(
    grad: Tensor, sources: Sequence[Tensor | None], output: Tensor | None, weights: Sequence[Tensor | None],
    activations: Sequence[Activation], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the lowest layer's input, of each weight and of each bias, where `needs` says so.

    Differentiable again. sources: each layer's input. The lowest layer's input is read for its weight's gradient only,
    its weight for its input's, `output` for the last activation's derivative; each may be None otherwise.
    """
    count = len(activations)
    dws: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    dx: Tensor | None = grad
    for n in reversed(range(count)):
        assert dx is not None
        y = (*sources, output)[n + 1] if activations[n].name else None
        of_layer = n > 0 or needs[0], needs[1 + n], needs[1 + count + n]
        dx, dw, db = linear.linear_backward(dx, sources[n], weights[n], y, activations[n], of_layer)
        dws, dbs = [dw, *dws], [db, *dbs]
    return [dx, *dws, *dbs]
