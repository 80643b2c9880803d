"""What a trained network has learned: its first layer's weights as images, and what it says of digits."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models import SIDE
from .training import Training


@dataclass(frozen=True)
class Judged:
    """A held-out digit: `image` is (SIDE, SIDE) with values in [0, 1]."""

    image: Tensor
    label: int
    prediction: int

    @property
    def right(self) -> bool:
        return self.prediction == self.label

    def __str__(self) -> str:
        return str(self.prediction) if self.right else f"{self.prediction}, not {self.label}"


def first_weights(network: nn.Module, most: int) -> Tensor:
    """The weights of the first layer's units, those of the largest norm, as `(units, height, width)` within [−1, 1]."""
    weight = next(network.parameters()).detach().double().cpu()
    images = weight.view(-1, SIDE, SIDE) if weight.dim() == 2 else weight[:, 0]
    chosen = images[images.flatten(1).norm(dim=1).argsort(descending=True)[:most]]
    return chosen / chosen.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def judged(training: Training, most: int) -> list[Judged]:
    """Held-out digits: of those recognized and of those mistaken, `most` each, or as many as there are."""
    digits = training.digits
    predictions = training.tribp.layers(digits.held_out_images).argmax(1)
    right = predictions == digits.held_out_labels
    some = torch.randperm(len(right), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(
        right.device
    )  # not all zeros
    chosen = [some[right[some] == truth][:most] for truth in (True, False)]
    return [
        Judged(digits.held_out_images[i].view(SIDE, SIDE).cpu(), int(digits.held_out_labels[i]), int(predictions[i]))
        for i in torch.cat(chosen).tolist()
    ]
