"""What the tests of torch's machinery share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tribp

from ..conv3x3.cases import Case

Function = Callable[..., Tensor]


class Operation(NamedTuple):
    """One of ours beside torch's, as functions of (input, weight, bias), and float64 arguments for them."""

    name: str
    ours: Function
    theirs: Function
    make: Callable[[str], list[Tensor]]
    operator: str
    bare: Function  # the operator, called as an exported graph does

    def __str__(self) -> str:
        return self.name


def eager_linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.sigmoid(torch.nn.functional.linear(x, w, b))


def matrices(device: str) -> list[Tensor]:
    return [torch.randn(*size, device=device, dtype=torch.float64) for size in ((6, 5), (4, 5), (4,))]


CONV = Case((2, 4, 3, 4), 6, (2, 1), (1, 1), groups=2, activation="sigmoid")


def images(device: str) -> list[Tensor]:
    return [t for t in CONV.make(torch.float64, device) if t is not None]


def mlp(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return tribp.mlp(x, [w, w], [b, b], "tanh", "sigmoid")


def eager_mlp(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return eager_linear(torch.tanh(torch.nn.functional.linear(x, w, b)), w, b)


def square_matrices(device: str) -> list[Tensor]:
    return [torch.randn(*size, device=device, dtype=torch.float64) for size in ((6, 5), (5, 5), (5,))]


# The methods of a case are wrapped: jit.trace wants functions.
OPERATIONS = [
    Operation(
        "linear_sigmoid", tribp.linear_sigmoid, eager_linear, matrices, "linear",
        lambda x, w, b: torch.ops.tribp.linear(x, w, b, "sigmoid"),
    ),
    Operation(
        "conv3x3", lambda x, w, b=None: CONV.ours(x, w, b), lambda x, w, b=None: CONV.theirs(x, w, b), images,
        "conv3x3",
        lambda x, w, b: torch.ops.tribp.conv3x3(x, w, b, [2, 1], [1, 1], 2, "sigmoid"),
    ),
    Operation(
        "mlp", mlp, eager_mlp, square_matrices, "mlp",
        lambda x, w, b: torch.ops.tribp.mlp(
            x, [w, w], [b, b], [True, True], "tanh", 0.0, 0.0, "sigmoid", 0.0, 0.0
        )[-1],
    ),
]  # fmt: skip


def assert_same_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(expected)
    grads = (torch.autograd.grad(y, inputs, dy) for y in (found, expected))
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs)


class Seen(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
