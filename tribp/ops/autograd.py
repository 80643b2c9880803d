"""What the operations' functions and derivatives share."""

from collections.abc import Sequence

import torch
from torch import Tensor

# What comes of wrong arguments. Other exceptions end a computation that is to end: torch.utils.checkpoint's do.
REFUSALS = (AttributeError, RuntimeError, TypeError, ValueError)


def sigmoid_(z: Tensor) -> Tensor:
    """σ of a tensor that nobody else has: in its place, except where autograd would make a copy of a view of it."""
    return torch.sigmoid(z) if z.requires_grad else torch.sigmoid_(z)


def in_places(needs: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that an operator returned, each in its place."""
    found = iter(grads)
    dx, dw, db = (next(found) if need else None for need in needs)
    return dx, dw, db
