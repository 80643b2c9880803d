"""The losses: each sums over the outputs of a digit and averages over the digits."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Loss:
    """Call it with outputs and targets, `(digits, outputs)` both."""

    formula: str
    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    kind: str  # what `tribp.train_step` calls it, with the reduction "batchmean"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.function(output, target)


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """½ Σ (output − target)² of each row, averaged over the rows."""
    return 0.5 * (output - target).square().sum(1).mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """−Σ (target · ln output + (1 − target) · ln(1 − output)) of each row, averaged over the rows."""
    # torch keeps logarithms above −100, so that an output that rounds to 1 where 0 is due costs no infinity.
    return F.binary_cross_entropy(output, target, reduction="sum") / len(output)


HALF_SQUARED_ERROR = Loss("½ Σ (output − target)²", "half squared error", half_squared_error, "half_squared_error")
# Its gradient by an output unit's sum z is y − t, without the σ′(z) that lets a unit that is surely wrong learn slowly.
CROSS_ENTROPY = Loss("−Σ (t ln y + (1 − t) ln(1 − y))", "binary cross-entropy", cross_entropy, "binary_cross_entropy")
