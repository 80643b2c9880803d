"""The pictures: loss, accuracy and what was learned; or the losses of several methods."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from . import averages, learned
from .training import Training

BETA = 0.9
WINDOW = 100  # steps; a third of all where there are fewer than three windows of them
MOST_UNITS, MOST_DIGITS = 14, 7  # of the first layer; of the digits recognized, and of those mistaken
WEIGHTS_COLORS = "RdBu"
MEMORY = 1000  # digits that the averages of a comparison go back: one number for every batch size


def draw(training: Training, title: str, path: Path) -> None:
    """Write the picture of `training` to `path`, in the format of its suffix."""
    figure = _figure(title, height=10.5)
    loss, accuracy, weights, digits = figure.subplots(4, 1, height_ratios=(4, 4, 1, 1.2))
    curves(training, loss, accuracy)

    units = learned.first_weights(training.tribp.layers, MOST_UNITS)
    _images(weights, list(units), WEIGHTS_COLORS, (-1, 1))
    weights.set_title(f"weights of {len(units)} units of the first layer: blue positive, red negative", fontsize=9)
    judged = learned.judged(training, MOST_DIGITS)
    _images(digits, [digit.image for digit in judged], "gray_r", (0, 1))
    digits.set_title("held-out digits, and what the network says", fontsize=9)
    for i, digit in enumerate(judged):
        color = "black" if digit.right else "tab:red"
        digits.text(i + 0.5, -0.1, str(digit), color=color, fontsize=8, ha="center", va="top")
    _save(figure, path)


def curves(training: Training, loss: Axes, accuracy: Axes) -> None:
    """Draw the loss per step with its moving averages, and the accuracy per epoch."""
    losses = training.losses
    window = max(1, min(WINDOW, len(losses) // 3))
    steps = range(1, len(losses) + 1)
    epochs = range(1, len(training.accuracies) + 1)

    marker = "o" if len(losses) < 50 else ""
    loss.plot(steps, losses, color="0.5", alpha=0.5, linewidth=0.8, marker=marker, label="each step")
    loss.plot(steps, averages.exponential(losses, BETA), color="tab:orange", linewidth=1, label=f"EMA, β = {BETA}")
    # A mean stands over the last of the steps that it covers.
    loss.plot(
        steps[window - 1 :], averages.simple(losses, window), color="tab:blue", label=f"SMA, window of {window} steps"
    )
    loss.set(
        xlabel=f"step (batches of {training.batch_size:,})",
        ylabel=f"{training.model.loss.name}\n{training.model.loss.formula}",
        yscale="log",
    )
    loss.legend()

    accuracy.plot(epochs, training.accuracies, color="tab:blue", marker="o", label="training digits")
    accuracy.plot(epochs, training.held_out_accuracies, color="tab:orange", marker="s", label="held-out digits")
    accuracy.set(xlabel="epoch", ylabel="digits recognized (%)", xlim=(0.5, max(len(epochs), 2) + 0.5))
    accuracy.legend(loc="lower right")

    for axes in (loss, accuracy):
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)


def _images(axes: Axes, images: Sequence[Tensor], colors: str, limits: tuple[float, float]) -> None:
    """Images in a row, the i-th at i + 0.05 to i + 0.95."""
    for i, image in enumerate(images):
        axes.imshow(image.numpy(), cmap=colors, vmin=limits[0], vmax=limits[1], extent=(i + 0.05, i + 0.95, 0, 0.9))
    axes.set(xlim=(0, max(len(images), 2 * MOST_DIGITS)), ylim=(-0.3, 0.95))
    axes.set_axis_off()


def compare(trainings: Mapping[str, Training], title: str, path: Path) -> None:
    """Write the losses of `trainings`, each under its name, to `path`: EMAs over about MEMORY digits, by epochs."""
    figure = _figure(title)
    axes = figure.subplots()
    (loss,) = {training.model.loss for training in trainings.values()}
    for i, (name, training) in enumerate(trainings.items()):
        size, digits = training.batch_size, len(training.digits.labels)
        epochs = [size * step / digits for step in range(1, len(training.losses) + 1)]
        beta = max(0.0, 1 - size / MEMORY)
        label = f"{name}: {training.held_out_accuracies[-1]:.1f} % right"
        style = "--" if i % 2 else "-"  # a line that lies on its neighbour hides it only in part
        axes.plot(epochs, averages.exponential(training.losses, beta), style, linewidth=1.5, label=label)
    axes.set(
        xlabel="epochs (times every digit was used)", ylabel=f"{loss.name} {loss.formula}, EMA over {MEMORY:,} digits"
    )
    axes.set(xscale="log", yscale="log", xlim=(0.01, None))  # before that the averages have little to go by
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3, which="both")
    _save(figure, path)


def _figure(title: str, height: float = 8) -> Figure:
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)  # the layers of the CNN take one line, just
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Draw to memory first: Ctrl-C leaves no half picture."""
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:], dpi=120)
    path.write_bytes(file.getvalue())
