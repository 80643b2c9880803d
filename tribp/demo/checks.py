"""Is the gradient right? Central differences, and the worked examples of back-propagation with their known numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import conv3x3, linear_sigmoid, mlp
from ..nn import Conv3x3, LinearSigmoid
from ..optim import SGD
from .losses import cross_entropy, half_squared_error

STEP = 1e-5  # central differences in float64 are off by about STEP² from curvature and 1e-16 / STEP from rounding
BOUND = 1e-7
# The examples' known gradients were computed in float32: with y near 1, the rounding of 1 − y puts them off by 7e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Check:
    """A quantity as found here, and the numbers expected."""

    name: str
    found: Sequence[float]
    expected: Sequence[float]

    @property
    def right(self) -> bool:
        pairs = zip(self.found, self.expected, strict=True)
        return all(abs(found - expected) <= TOLERANCE * abs(expected) for found, expected in pairs)


def gradient_difference(function: Callable[..., Tensor], *inputs: Tensor) -> float:
    """The largest difference of analytic from numerical gradient, relative to the input's largest numerical one.

    `function` maps the float64 `inputs` to a scalar.
    """
    inputs = tuple(t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in inputs)
    analytic = torch.autograd.grad(function(*inputs), inputs)
    worst = 0.0
    with torch.no_grad():
        for tensor, gradient in zip(inputs, analytic, strict=True):
            values, numerical = tensor.view(-1), torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
            for i, value in enumerate(values.tolist()):
                values[i] = value + STEP
                above = function(*inputs)
                values[i] = value - STEP
                below = function(*inputs)
                values[i] = value
                numerical[i] = (above - below) / (2 * STEP)
            difference = (gradient.flatten().cpu() - numerical).abs().max() / numerical.abs().max()
            worst = max(worst, difference.nan_to_num(float("inf")).item())  # NaN must not pass for small
    return worst


def network_gradient_difference(device: torch.device) -> float:
    """`gradient_difference` of two layers of tribp under the loss, for input, weights and biases."""
    uniform = _uniform(device)
    target = uniform(4, 2)

    def loss(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return half_squared_error(linear_sigmoid(linear_sigmoid(x, w1, b1), w2, b2), target)

    return gradient_difference(loss, uniform(4, 5), uniform(3, 5), uniform(3), uniform(2, 3), uniform(2))


def three_layer_gradient_difference(device: torch.device) -> float:
    """The same for three layers that one backward pass crosses, with MLP3's activations and loss.

    ReLU has a kink at 0: its inputs are all further from it than STEP moves them.
    """
    uniform = _uniform(device)
    target = uniform(4, 2).abs()

    def loss(x: Tensor, *layers: Tensor) -> Tensor:
        return cross_entropy(mlp(x, layers[::2], layers[1::2], "relu", "sigmoid"), target)

    sizes = ((3, 5), (3,), (4, 3), (4,), (2, 4), (2,))
    return gradient_difference(loss, uniform(4, 5), *(uniform(*size) for size in sizes))


def convolutional_gradient_difference(device: torch.device) -> float:
    """The same for a small network of the CNN's layers, under its loss.

    Max pooling has kinks, where two of its inputs tie: these are at least 1e-3 apart, and STEP moves them by less than
    1e-5.
    """
    uniform = _uniform(device)
    target = uniform(2, 2).abs()

    def loss(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
        for weight, bias in ((w1, b1), (w2, b2)):
            x = F.max_pool2d(conv3x3(x, weight, bias, activation="sigmoid"), 2)
        return cross_entropy(linear_sigmoid(x.flatten(1), w3, b3), target)

    images, kernels = uniform(2, 1, 10, 10), (uniform(2, 1, 3, 3), uniform(2), uniform(3, 2, 3, 3), uniform(3))
    return gradient_difference(loss, images, *kernels, uniform(2, 3), uniform(2))


def convolution(device: torch.device) -> list[Check]:
    """The size of what a 3×3 convolution gives, and one whose sums can be formed by hand."""
    sized = Conv3x3(1, 6, device=device, dtype=torch.float64)(
        torch.zeros(1, 1, 32, 32, dtype=torch.float64, device=device)
    )
    x = torch.arange(1.0, 17, dtype=torch.float64, device=device).view(1, 1, 4, 4)
    w = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, device=device).expand(1, 1, 3, 3).clone()
    y = conv3x3(x.requires_grad_(), w.requires_grad_())
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    return [
        Check("shape of Conv3x3(1, 6) of (1, 1, 32, 32)", tuple(sized.shape), (1, 6, 30, 30)),
        Check("y", _numbers(y), [-6.0, -6.0, -6.0, -6.0]),
        *(
            Check(f"dS/dw, row {i}", _numbers(dw[0, 0, i - 1]), row)
            for i, row in enumerate(([14.0, 18.0, 22.0], [30.0, 34.0, 38.0], [46.0, 50.0, 54.0]), 1)
        ),
        Check("dS/dx, row 1", _numbers(dx[0, 0, 0]), [1.0, 1.0, -1.0, -1.0]),
        Check("dS/dx, row 2", _numbers(dx[0, 0, 1]), [2.0, 2.0, -2.0, -2.0]),
    ]


def single_unit(device: torch.device) -> list[Check]:
    """y = σ(w x + b) at x = 1, w = 0.5, b = 0.5."""
    x, w, b = (torch.tensor(v, dtype=torch.float64, device=device) for v in ([[1.0]], [[0.5]], [0.5]))
    y = linear_sigmoid(x, w.requires_grad_(), b.requires_grad_())
    dw, db = torch.autograd.grad(y, (w, b))
    return [
        Check("y", _numbers(y), [0.731059]),
        Check("dy/dw", _numbers(dw), [0.196612]),
        Check("dy/db", _numbers(db), [0.196612]),
    ]


def two_two_one_network(device: torch.device) -> tuple[LinearSigmoid, LinearSigmoid, Tensor, Tensor]:
    """The layers of the network 2-2-1 with the weights of the example, its input and its target."""
    x, target, w1, w2 = (
        torch.tensor(rows, dtype=torch.float64, device=device)
        for rows in ([[0.1, 0.8]], [[0.5]], [[1.0, 2.0], [0.0, 1.0]], [[3.0, 3.0]])
    )
    first = LinearSigmoid(2, 2, device=device, dtype=torch.float64)
    second = LinearSigmoid(2, 1, device=device, dtype=torch.float64)
    first.load_state_dict({"weight": w1, "bias": torch.zeros(2, device=device)})
    second.load_state_dict({"weight": w2, "bias": torch.zeros(1, device=device)})
    return first, second, x, target


def two_two_one(device: torch.device) -> list[Check]:
    """The network 2-2-1: output, loss, gradients, and what one step of SGD with lr = 0.01 adds to the weights."""
    first, second, x, target = two_two_one_network(device)
    network, w1, w2 = nn.Sequential(first, second), first.weight.detach().clone(), second.weight.detach().clone()

    output = network(x)
    loss = half_squared_error(output, target)
    dw1, dw2 = torch.autograd.grad(loss, (first.weight, second.weight), retain_graph=True)
    loss.backward()  # type: ignore[no-untyped-call]
    SGD(network.parameters(), lr=0.01).step()
    step1, step2 = first.weight - w1, second.weight - w2
    return [
        Check("output", _numbers(output), [0.990112]),
        Check("loss", _numbers(loss), [0.120105]),
        Check("dW1, row 1", _numbers(dw1[0]), [0.000187999, 0.00150399]),
        Check("dW1, row 2", _numbers(dw1[1]), [0.000307910, 0.00246328]),
        Check("dW2", _numbers(dw2), [0.00405699, 0.00331059]),
        Check("ΔW1, row 1", _numbers(step1[0]), [-0.01 * 0.000187999, -0.01 * 0.00150399]),
        Check("ΔW1, row 2", _numbers(step1[1]), [-0.01 * 0.000307910, -0.01 * 0.00246328]),
        Check("ΔW2", _numbers(step2), [-0.01 * 0.00405699, -0.01 * 0.00331059]),
    ]


def worked_examples(device: torch.device, with_convolution: bool) -> dict[str, list[Check]]:
    """The examples under their titles, with or without that of the convolution."""
    examples = {
        "y = σ(w x + b) at x = 1, w = 0.5, b = 0.5": single_unit(device),
        "network 2-2-1, its gradients, and the change ΔW by one step of SGD, lr = 0.01": two_two_one(device),
    }
    if with_convolution:
        title = "3×3 convolution of the rows 1 2 3 4, 5 6 7 8, … with w of rows 1 0 −1, an edge finder; S = Σ y"
        examples[title] = convolution(device)
    return examples


def mark(right: bool) -> str:
    return "✓" if right else "✗"


def written(numbers: Sequence[float]) -> str:
    return ", ".join(str(n) if isinstance(n, int) else f"{n:#.6g}" for n in numbers)


def refusal(device: torch.device) -> str | None:
    """What tribp says to the second weight of the tutorial, [[3.0]], where two hidden units need (1, 2)."""
    try:
        linear_sigmoid(torch.zeros(1, 2, device=device), torch.full((1, 1), 3.0, device=device))
    except ValueError as error:
        return str(error)
    return None


def _uniform(device: torch.device) -> Callable[..., Tensor]:
    """A function from sizes to float64 numbers in [−1, 1], the same at every call of this."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = dict(generator=generator, dtype=torch.float64, device="cpu")
    return lambda *shape: (2 * torch.rand(shape, **options) - 1).to(device)


def _numbers(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.detach().flatten().tolist()
    return values
