"""The picture: loss per step with its moving averages, and accuracy per epoch."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import averages
from .training import Training

BETA = 0.9
WINDOW = 100  # steps; a third of all where there are fewer than three windows of them


def draw(training: Training, title: str, path: Path) -> None:
    """Write the picture of `training` to `path`, in the format of its suffix."""
    losses = training.losses
    window = max(1, min(WINDOW, len(losses) // 3))
    steps = range(1, len(losses) + 1)
    epochs = range(1, len(training.accuracies) + 1)

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss, accuracy = figure.subplots(2, 1)

    marker = "o" if len(losses) < 50 else ""
    loss.plot(steps, losses, color="0.8", linewidth=0.8, marker=marker, label="each step")
    loss.plot(steps, averages.exponential(losses, BETA), color="tab:orange", linewidth=1, label=f"EMA, β = {BETA}")
    # A mean stands over the last of the steps that it covers.
    loss.plot(
        steps[window - 1 :], averages.simple(losses, window), color="tab:blue", label=f"SMA, window of {window} steps"
    )
    loss.set(xlabel=f"step (batches of {training.batch_size:,})", ylabel="loss ½ Σ (output − target)²", yscale="log")
    loss.legend()

    accuracy.plot(epochs, training.accuracies, color="tab:blue", marker="o", label="training digits")
    accuracy.plot(epochs, training.held_out_accuracies, color="tab:orange", marker="s", label="held-out digits")
    accuracy.set(xlabel="epoch", ylabel="digits recognized (%)", xlim=(0.5, max(len(epochs), 2) + 0.5))
    accuracy.legend(loc="lower right")

    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
