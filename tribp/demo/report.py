"""What the program prints."""

from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import runtime
from . import checks as demo
from . import digits, picture
from .training import SIZES, Training


def checks(device: torch.device) -> bool:
    """Print every check with the number expected beside the one found; whether all are right."""
    difference = demo.network_gradient_difference(device)
    small = difference < demo.BOUND
    print("Gradient check, float64: the library's gradients against central differences, two layers, every parameter")
    print(f"  largest relative difference {difference:.1e}, must be under {demo.BOUND:.0e}  {_mark(small)}")

    examples = {
        "y = σ(w x + b) at x = 1, w = 0.5, b = 0.5": demo.single_unit(device),
        "network 2-2-1, its gradients, and the change ΔW by one step of SGD, lr = 0.01": demo.two_two_one(device),
    }
    print("\nWorked examples, float64; the expected gradients come from float32 and are right to 7e-6 of each")
    for title, rows in examples.items():
        print(f"\n  {title}", flush=True)
        table = _table("", "found", "expected", "")
        for row in rows:
            table.add_row(row.name, _written(row.found), _written(row.expected), _mark(row.right))
        _console().print(table)

    sentence = demo.refusal(device)
    print("The weight [[3.0]] of the tutorial's second layer made its program crash; what tribp says to it:")
    print(f"  {sentence or 'nothing'}  {_mark(sentence is not None)}")
    return small and all(row.right for rows in examples.values() for row in rows) and sentence is not None


def training(
    device: torch.device, batch_size: int | None, epochs: int, lr: float, epsilon: float, seed: int, output: Path
) -> None:
    """Train, print how it went, and draw it. Ctrl-C raises a KeyboardInterrupt that says how far it came."""
    generator = torch.Generator().manual_seed(seed)
    data = digits.load(device, generator)
    run = Training(data, generator, batch_size=batch_size, epochs=epochs, lr=lr, epsilon=epsilon)
    network = "-".join(map(str, SIZES))
    print(f"\nTraining {network}, sigmoid after both layers, on {len(data.labels):,} MNIST digits")
    print("  loss       ½ Σ (output − target)², mean over the batch; target 1 for the digit, else 0")
    print(f"  optimizer  torch's Adam, learning rate {lr:g}, falling linearly to 0")
    print(f"  weights    from U(−ε, ε), ε = {epsilon:g}, seed {seed}")
    print(f"  batches    of {run.batch_size:,}, {run.steps_per_epoch:,} per epoch; epochs: {epochs:,}", flush=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = _console()
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("epoch 1", total=epochs * run.steps_per_epoch)
            for epoch in range(epochs):
                run.epoch(lambda: bar.advance(task))
                bar.update(task, description=f"epoch {epoch + 1}: {run.held_out_accuracies[-1]:.1f} % right")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"after {len(run.accuracies)} of {epochs} epochs") from None

    steps = len(run.plain.seconds)
    table = _table("", "tribp", "plain torch")
    table.add_row("backend", _backend(run.parameter), "torch")
    table.add_row("device", *2 * [_device(run.parameter.device)])
    table.add_row("time per step", *(f"{1e3 * learner.median_step:.3f} ms" for learner in (run.tribp, run.plain)))
    table.add_row("largest difference of a parameter", f"{run.difference:.1e}", "")
    print()
    console.print(table)
    print(f"Time: median of {steps:,} steps, the two networks in turn on the same batches; difference: after epoch 1.")

    picture.draw(run, f"tribp: {network} on MNIST, Adam, learning rate {lr:g}, ε = {epsilon:g}", output)
    print(f"Picture: {output.resolve()}")
    print(f"held-out accuracy: {run.held_out_accuracies[-1]:.1f} %")


def _console() -> Console:
    return Console(highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


def _mark(right: bool) -> str:
    return "✓" if right else "✗"


def _written(numbers: list[float]) -> str:
    return ", ".join(f"{number:#.6g}" for number in numbers)


def _backend(tensor: torch.Tensor) -> str:
    backend = runtime.backend_of(tensor)
    return f"{backend}, interpreted" if backend == "triton" and runtime.interpreting() else backend


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}"
