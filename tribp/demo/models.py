"""The networks of the demo: layers of tribp, the same in plain torch, and what each is trained with unless told so."""

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..fusion import unfuse
from ..nn import MLP, Conv3x3, LinearSigmoid
from .losses import CROSS_ENTROPY, HALF_SQUARED_ERROR, Loss
from .methods import METHODS

SIDE, CLASSES = 28, 10  # pixels of a digit's image each way; digits
SIZES = (SIDE * SIDE, 128, CLASSES)  # of the MLP
SIZES3 = (SIDE * SIDE, 256, 64, CLASSES)  # of that of three layers
CHANNELS = (1, 6, 16)  # of the CNN, and its hidden units
HIDDEN = 120
POOL = 2


def mlp() -> nn.Sequential:
    """`LinearSigmoid` layers of SIZES."""
    return nn.Sequential(*_linear(*SIZES))


def mlp3() -> nn.Sequential:
    """One `MLP` of SIZES3, with ReLU between its layers and a sigmoid at the end."""
    return nn.Sequential(MLP(SIZES3, "relu", "sigmoid"))


def cnn() -> nn.Sequential:
    """Twice a 3×3 convolution with sigmoid, and max pooling, then `LinearSigmoid` layers; it takes rows of pixels."""
    layers: list[nn.Module] = [nn.Unflatten(1, (CHANNELS[0], SIDE, SIDE))]
    side = SIDE
    for before, after in itertools.pairwise(CHANNELS):
        layers += [Conv3x3(before, after, activation="sigmoid"), nn.MaxPool2d(POOL)]
        side = (side - 2) // POOL
    return nn.Sequential(*layers, nn.Flatten(), *_linear(CHANNELS[-1] * side * side, HIDDEN, CLASSES))


def _linear(*sizes: int) -> list[nn.Module]:
    return [LinearSigmoid(k, n) for k, n in itertools.pairwise(sizes)]


@dataclass(frozen=True)
class Model:
    """A network: how to make it, its loss, and where weights start and how far the first step goes by default."""

    name: str
    layers: Callable[[], nn.Sequential]
    loss: Loss
    epsilon: float
    rates: Mapping[str, float]  # of each of METHODS

    def network(self, epsilon: float, generator: torch.Generator) -> nn.Sequential:
        """Its layers, all parameters uniform in [−ε, ε]."""
        layers = self.layers()
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.uniform_(-epsilon, epsilon, generator=generator)
        return layers

    @property
    def parameters(self) -> int:
        """Their number."""
        return sum(p.numel() for p in self.layers().parameters())

    def __str__(self) -> str:
        parts: list[str] = []
        for layer in self.layers():
            if isinstance(layer, LinearSigmoid):
                start = f"LinearSigmoid {layer.in_features}"
                chained = parts and parts[-1].startswith("LinearSigmoid")
                parts.append(f"{parts.pop() if chained else start}-{layer.out_features}")
            elif isinstance(layer, Conv3x3):
                parts.append(f"Conv3x3({layer.in_channels}→{layer.out_channels}, {layer.activation})")
            elif isinstance(layer, MLP):
                sizes = "-".join(map(str, layer.sizes))
                parts.append(f"MLP {sizes}, {layer.activation}, {layer.output_activation}")
            elif isinstance(layer, nn.MaxPool2d):
                parts.append(f"MaxPool2d({layer.kernel_size})")
        return ", ".join(parts)


MODELS = {
    "mlp": Model(
        "MLP", mlp, HALF_SQUARED_ERROR, epsilon=0.1, rates={name: method.lr for name, method in METHODS.items()}
    ),
    # 15 epochs, seed 0: SGD 95.4, Momentum 95.5, AdaGrad 94.6, RMSProp 95.4, Adam 94.9 %; Adam with seeds 1 to 3: 94.0,
    # 94.5, 94.8 %, at 0.002 0.3 % less on average. tanh in place of ReLU is as good (Adam: 94.7, 94.1, 94.7, 94.4 %).
    "mlp3": Model(
        "MLP3",
        mlp3,
        CROSS_ENTROPY,
        epsilon=0.1,
        rates={"sgd": 0.2, "momentum": 0.2, "adagrad": 0.02, "rmsprop": 0.002, "adam": 0.001, "adamw": 0.001},
    ),
    # From ±0.1 or ±0.3 the CNN says the same to every digit for several epochs or for all, and from ±1 it ends lower:
    # 93 to 96 % in 10 epochs where ±0.7 gives 95 to 97. The half squared error gets as far, but sets off later. Max
    # pooling got to 95 % in 6 epochs and averages to 93, each at the best rate and range tried. With Adam at 0.005, 15
    # epochs and seeds 0 to 7: 97.0, 96.1, 96.6, 97.2, 97.0, 96.9, 96.6, 96.2 %; at 0.01 seed 1 learns next to nothing.
    # Others, seed 0: SGD 95.0, Momentum 93.7 (0.3 lies between rates tried), AdaGrad 91.0; RMSProp 91.8 in 6 epochs;
    # AdamW takes Adam's.
    "cnn": Model(
        "CNN",
        cnn,
        CROSS_ENTROPY,
        epsilon=0.7,
        rates={"sgd": 0.2, "momentum": 0.3, "adagrad": 0.02, "rmsprop": 0.002, "adam": 0.005, "adamw": 0.005},
    ),
}


def in_plain_torch(layers: nn.Sequential) -> nn.Sequential:
    """The same network of torch's modules, one behind the other, with the same parameters in memory of their own."""
    twin = copy.deepcopy(layers)
    unfuse(twin)
    return nn.Sequential(*(module for module in twin.modules() if not list(module.children())))
