"""What the program prints."""

from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import dispatch
from . import checks as demo
from . import digits, graph, page, picture
from .methods import COMPARED, METHODS
from .models import MODELS, Model
from .training import Training


def checks(device: torch.device, model: str) -> bool:
    """Print every check of what `model` consists of, with the number expected beside the one found; all are right?"""
    print("Gradient check, float64: the library's gradients against central differences, two layers, every parameter")
    small = _gradient_check(demo.network_gradient_difference(device))
    if model == "mlp3":
        print("  and for three layers that one backward pass crosses, ReLU and sigmoid, under the MLP3's loss")
        small &= _gradient_check(demo.three_layer_gradient_difference(device))
    if model == "cnn":
        print("  and for two convolutions with sigmoid and max pooling before a layer, under the CNN's loss")
        small &= _gradient_check(demo.convolutional_gradient_difference(device))

    examples = demo.worked_examples(device, with_convolution=model == "cnn")
    print("\nWorked examples, float64; the expected gradients come from float32 and are right to 7e-6 of each")
    for title, rows in examples.items():
        print(f"\n  {title}", flush=True)
        table = _table("", "found", "expected", "")
        for row in rows:
            table.add_row(row.name, demo.written(row.found), demo.written(row.expected), demo.mark(row.right))
        _console().print(table)

    sentence = demo.refusal(device)
    print("The weight [[3.0]] of the tutorial's second layer made its program crash; what tribp says to it:")
    print(f"  {sentence or 'nothing'}  {demo.mark(sentence is not None)}")
    return small and all(row.right for rows in examples.values() for row in rows) and sentence is not None


def _gradient_check(difference: float) -> bool:
    small = difference < demo.BOUND
    print(f"  largest relative difference {difference:.1e}, must be under {demo.BOUND:.0e}  {demo.mark(small)}")
    return small


def training(
    device: torch.device,
    model: str,
    optimizer: str,
    batch_size: int | None,
    epochs: int,
    lr: float,
    epsilon: float,
    seed: int,
    output: Path,
    fused_step: bool = False,
    html: Path | None = None,
) -> None:
    """Train, print how it went, and draw it. Ctrl-C raises a KeyboardInterrupt that says how far it came.

    html: where to write a page of it, too.
    """
    generator = torch.Generator().manual_seed(seed)
    data = digits.load(device, generator)
    network, method = MODELS[model], METHODS[optimizer]
    run = Training(
        data, generator, model=network, method=method, batch_size=batch_size, epochs=epochs, lr=lr, epsilon=epsilon,
        fused_step=fused_step,
    )  # fmt: skip
    _introduce(data, network, epsilon, seed)
    print(f"  optimizer  {method}, learning rate {lr:g}, falling linearly to 0")
    print(f"             beside it, with plain torch: {method.twin}")
    print(f"  batches    of {run.batch_size:,}, {run.steps_per_epoch:,} per epoch; epochs: {epochs:,}", flush=True)

    console = _console()
    with _progress(console) as bar:
        _train(run, bar, bar.add_task("", total=run.steps))

    steps = len(run.plain.seconds)
    table = _table("", "tribp", "plain torch")
    table.add_row("backend", _backend(run.parameter), "torch")
    if run.tribp.fused is not None:
        table.add_row("step", "the fused step" if run.tribp.fused.reason is None else "the ordinary way", "")
    table.add_row("device", *2 * [_device(run.parameter.device)])
    table.add_row("time per step", *(f"{1e3 * learner.median_step:.3f} ms" for learner in (run.tribp, run.plain)))
    table.add_row("largest difference of a parameter", f"{run.difference:.1e}", "")
    print()
    console.print(table)
    print(
        f"Time: median of {steps:,} steps, the two networks in turn on the same batches; difference: after epoch 1,\n"
        "grown from the rounding of float32."
    )
    if run.tribp.fused is not None and run.tribp.fused.reason is not None:
        print(f"The step is not fused: {run.tribp.fused.reason}.")

    settings = f"{network.parameters:,} parameters, {method}, learning rate {lr:g}, ε = {epsilon:g}"
    picture.draw(run, f"tribp: {network.name} on MNIST\n{network}\n{settings}", output)
    print(f"Picture: {output.resolve()}")
    if html is not None:
        facts = {
            "network": f"{network}, {network.parameters:,} parameters, from U(−ε, ε) with ε = {epsilon:g}, seed {seed}",
            "loss": f"{network.loss.name} {network.loss.formula}, mean over the batch",
            "optimizer": f"{method}, learning rate {lr:g}, falling linearly to 0",
            "batches": f"of {run.batch_size:,} of {len(data.labels):,} digits; {epochs:,} epochs",
            "backend": f"{_backend(run.parameter)}, on {_device(run.parameter.device)}",
            "largest difference from plain torch": f"{run.difference:.1e}, of a parameter after epoch 1",
            "held-out accuracy": f"{run.held_out_accuracies[-1]:.1f} %",
        }
        examples = demo.worked_examples(device, with_convolution=model == "cnn")
        title = f"tribp: {network.name} on MNIST"
        page.write(html, title, facts, examples, demo.refusal(device) or "nothing", graph.values(device), run)
        print(f"Page: {html.resolve()}")
    print(f"held-out accuracy: {run.held_out_accuracies[-1]:.1f} %")


def comparison(device: torch.device, epochs: int, epsilon: float, seed: int, output: Path) -> None:
    """Train once with each of COMPARED, print a table, and draw their losses. Ctrl-C as in `training`."""
    network, generator = MODELS["mlp"], torch.Generator().manual_seed(seed)
    data = digits.load(device, generator)
    runs: list[Training] = []
    for run in COMPARED:
        own = torch.Generator()
        own.set_state(generator.get_state())  # the same weights first, and the same order of the digits
        method, often = METHODS[run.optimizer], run.epochs(epochs)
        runs.append(
            Training(
                data, own, model=network, method=method, batch_size=run.batch_size, epochs=often, lr=run.lr,
                epsilon=epsilon, compared_steps=0,
            )
        )  # fmt: skip
    batch, stochastic = (run.epochs for run in runs[:2])
    _introduce(data, network, epsilon, seed)
    print(f"  methods    {len(runs)}, each from these weights and with its own learning rate, falling linearly to 0")
    print(f"  epochs     {epochs:,}; {stochastic:,} for stochastic gradient descent, with its many steps of one digit,")
    print(f"             and {batch:,} for batch gradient descent, which makes but one step in each", flush=True)

    console = _console()
    with _progress(console) as bar:
        task = bar.add_task("", total=sum(training.steps for training in runs))
        for number, (run, training) in enumerate(zip(COMPARED, runs, strict=True), 1):
            try:
                _train(training, bar, task, f"{run.name}, ")
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(f"{stop} of {run.name}, method {number} of {len(runs)}") from None

    table = _table("method", *("rate", "batch", "steps", "time", "final loss", "held-out accuracy"))
    table.columns[0].no_wrap = True
    for run, training in zip(COMPARED, runs, strict=True):
        table.add_row(
            run.name, f"{run.lr:g}", f"{training.batch_size:,}", f"{training.steps:,}", f"{training.seconds:.1f} s",
            f"{training.final_loss():.4f}", f"{training.held_out_accuracies[-1]:.1f} %",
        )  # fmt: skip
    print()
    console.print(table)
    print(f"Rate: of the first step; final loss: over all {len(data.labels):,} training digits.")

    lines = {run.name: training for run, training in zip(COMPARED, runs, strict=True)}
    picture.compare(
        lines, f"tribp: {network.name} on MNIST\n{network}\n{network.parameters:,} parameters, ε = {epsilon:g}", output
    )
    print(f"Picture: {output.resolve()}")


def _introduce(data: digits.Digits, model: Model, epsilon: float, seed: int) -> None:
    print(f"\nTraining the {model.name}, {model.parameters:,} parameters, on {len(data.labels):,} MNIST digits")
    print(f"  layers     {model}")
    print(f"  loss       {model.loss.name} {model.loss.formula}, mean over the batch;")
    print("             target 1 for the digit, else 0")
    print(f"  weights    from U(−ε, ε), ε = {epsilon:g}, seed {seed}")


def _train(run: Training, bar: Progress, task: TaskID, name: str = "") -> None:
    """All epochs. Ctrl-C raises a KeyboardInterrupt that says how many were done."""
    bar.update(task, description=f"{name}epoch 1")
    try:
        for epoch in range(1, run.epochs + 1):
            run.epoch(lambda: bar.advance(task))
            bar.update(task, description=f"{name}epoch {epoch}: {run.held_out_accuracies[-1]:.1f} % right")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"after {len(run.accuracies)} of {run.epochs} epochs") from None


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _console() -> Console:
    return Console(highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


def _backend(tensor: torch.Tensor) -> str:
    backend = dispatch.backend_of(tensor)
    return f"{backend}, interpreted" if backend == "triton" and dispatch.interpreting() else backend


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}"
