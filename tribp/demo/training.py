"""A network of tribp trained on the digits, and the same network in plain torch beside it."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..training import train_step
from .digits import Digits
from .losses import Loss
from .methods import Method
from .models import CLASSES, Model, in_plain_torch

COMPARED_STEPS = 20  # plain torch stops after the first epoch that ends with as many steps timed


class Learner:
    """A network with its optimizer, and the time each compared step took."""

    def __init__(
        self, layers: nn.Sequential, optimizer: torch.optim.Optimizer, loss: Loss, steps: int, fused: bool = False
    ) -> None:
        self.layers, self.optimizer, self.loss = layers, optimizer, loss
        self.fused = train_step(layers, optimizer, loss.kind, "batchmean") if fused else None
        self.schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        self.seconds: list[float] = []

    def gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(self.layers(images), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward, update; returns the loss before the update."""
        if self.fused is not None:
            return self.fused(images, targets)
        loss = self.gradients(images, targets)
        self.optimizer.step()
        return loss

    @property
    def median_step(self) -> float:
        """Seconds; NaN before anything was timed."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


class Training:
    """Call `epoch` as often as `epochs` says; the lists grow by what it measured.

    batch_size: None for all digits at once. compared_steps: 0 to leave plain torch out. fused_step: whether tribp's
    network takes its steps by `tribp.train_step`.
    """

    def __init__(
        self,
        digits: Digits,
        generator: torch.Generator,
        *,
        model: Model,
        method: Method,
        batch_size: int | None,
        epochs: int,
        lr: float,
        epsilon: float,
        compared_steps: int = COMPARED_STEPS,
        fused_step: bool = False,
    ) -> None:
        self.digits, self.generator, self.model, self.compared_steps = digits, generator, model, compared_steps
        self.device = digits.images.device
        self.batch_size = min(batch_size or len(digits.labels), len(digits.labels))
        self.steps_per_epoch = -(-len(digits.labels) // self.batch_size)
        self.targets = F.one_hot(digits.labels, CLASSES).to(digits.images.dtype)
        self.epochs, self.steps = epochs, epochs * self.steps_per_epoch
        layers = model.network(epsilon, generator)
        twin = in_plain_torch(layers).to(self.device)
        self.plain = Learner(twin, method.their_optimizer(twin.parameters(), lr), model.loss, self.steps)
        layers.to(self.device)
        self.tribp = Learner(layers, method.optimizer(layers.parameters(), lr), model.loss, self.steps, fused_step)
        self.losses: list[float] = []  # of every step
        self.accuracies: list[float] = []  # percent on the training digits, after every epoch
        self.held_out_accuracies: list[float] = []
        self.seconds = 0.0  # spent on learning, by both networks where plain torch is beside
        self.difference = float("nan")  # largest between the two networks' parameters, after the first epoch
        first = slice(self.batch_size)
        for learner in (self.tribp, self.plain):  # compiling the kernels is no part of a step's time
            learner.gradients(digits.images[first], self.targets[first])

    @property
    def parameter(self) -> Tensor:
        return next(self.tribp.layers.parameters())

    def epoch(self, advance: Callable[[], None]) -> None:
        """Use every training digit once, in a new order; call `advance` after every step."""
        compared = len(self.tribp.seconds) < self.compared_steps
        learners = [self.tribp, self.plain] if compared else [self.tribp]
        losses: dict[Learner, list[Tensor]] = {learner: [] for learner in learners}
        begin = time.perf_counter()
        order = torch.randperm(len(self.targets), generator=self.generator, device="cpu").to(self.device)
        for batch in order.split(self.batch_size):  # type: ignore[no-untyped-call]
            images, targets = self.digits.images[batch], self.targets[batch]
            for learner in learners:
                self._synchronize(compared)
                start = time.perf_counter()
                losses[learner].append(learner.step(images, targets))
                self._synchronize(compared)
                if compared:
                    learner.seconds.append(time.perf_counter() - start)
                learner.schedule.step()
            learners.reverse()  # neither network always finds the batch in the cache
            advance()
        self.losses += torch.stack(losses[self.tribp]).tolist()  # waits for the device
        self.seconds += time.perf_counter() - begin
        if compared and not self.accuracies:
            pairs = zip(self.tribp.layers.parameters(), self.plain.layers.parameters(), strict=True)
            self.difference = max((p - q).abs().max().item() for p, q in pairs)
        self.accuracies.append(self.accuracy(self.digits.images, self.digits.labels))
        self.held_out_accuracies.append(self.accuracy(self.digits.held_out_images, self.digits.held_out_labels))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Percent of `images` whose largest output is the one of their label."""
        return 100 * float((self.tribp.layers(images).argmax(1) == labels).double().mean())

    @torch.no_grad()
    def final_loss(self) -> float:
        """The loss over all training digits, as the network is now."""
        return self.model.loss(self.tribp.layers(self.digits.images), self.targets).item()

    def _synchronize(self, wanted: bool) -> None:
        if wanted and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
