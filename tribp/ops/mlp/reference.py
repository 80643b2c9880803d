"""Linear layers with activations in plain torch: the fallback where no kernel runs, and the tests' oracle."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..activations import Activation
from ..linear import reference as linear


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    activation: Activation


def mlp(input: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """Every layer's output."""
    outputs: list[Tensor] = []
    for layer in layers:
        input = linear.linear(input, *layer)
        outputs.append(input)
    return outputs


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
        wanted = n > 0 or needs[0], needs[1 + n], needs[1 + count + n]
        dx, dw, db = linear.linear_backward(dx, sources[n], weights[n], y, activations[n], wanted)
        dws, dbs = [dw, *dws], [db, *dbs]
    return [dx, *dws, *dbs]
