"""`python -m tribp`: its checks, its training, and how it behaves at the command line."""

import contextlib
import dataclasses
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from tribp import __main__ as program
from tribp.demo import averages, checks
from tribp.demo.methods import COMPARED, METHODS

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the program itself does, and for its reason."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    """The modules that need the extras; a test that needs them is skipped where they are missing."""
    for extra in program.EXTRAS:
        pytest.importorskip(extra)
    names = ("digits", "picture", "report", "training")
    return SimpleNamespace(**{name: importlib.import_module(f"tribp.demo.{name}") for name in names})


@pytest.fixture(scope="module")
def mnist(demo: SimpleNamespace) -> Any:
    return demo.digits.mnist_data()


@pytest.fixture
def few(demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 digits to train on and 50 held out, of the 5,000: for tests that look at everything but the accuracy."""
    images, labels = mnist
    some = [i for digit in range(10) for i in (labels == digit).nonzero()[0][:15]]
    monkeypatch.setattr(demo.digits, "mnist_data", lambda: (images[some], labels[some]))
    monkeypatch.setattr(demo.digits, "HELD_OUT", 5)


# The checks


def test_worked_examples(device: str) -> None:
    place = torch.device(device)
    found = {c.name: c.found for c in checks.single_unit(place) + checks.two_two_one(place)}
    expected = {
        "y": [0.731059],
        "dy/dw": [0.196612],
        "dy/db": [0.196612],
        "output": [0.990112],
        "loss": [0.120105],
        "dW1, row 1": [0.000187999, 0.00150399],
        "dW1, row 2": [0.000307910, 0.00246328],
        "dW2": [0.00405699, 0.00331059],
        "ΔW1, row 1": [-0.00000187999, -0.0000150399],
        "ΔW1, row 2": [-0.00000307910, -0.0000246328],
        "ΔW2": [-0.0000405699, -0.0000331059],
    }
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found[name] == pytest.approx(numbers, rel=1e-5, abs=0), name
    assert all(c.right for c in checks.single_unit(place) + checks.two_two_one(place))


@pytest.mark.parametrize("found", [[1.0, 2.00003], [1.0, float("nan")], [1.0, 0.0]])
def test_check_sees_wrong_number(found: list[float]) -> None:
    assert checks.Check("", [1.0, 2.0], [1.0, 2.0]).right
    assert not checks.Check("", found, [1.0, 2.0]).right


class _Planted(torch.autograd.Function):
    """The identity with a gradient that is off by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


def _planted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _Planted.apply(tribp.linear_sigmoid(input, weight, bias), 1.0001)
    return y


@pytest.mark.parametrize(
    ("factor", "low", "high"),
    [(1.0, 0.0, checks.BOUND), (1.0001, 0.99e-4, 1.01e-4), (-1.0, 1.9, 2.1), (float("nan"), 1e300, float("inf"))],
)
def test_gradient_check_finds_planted_error(factor: float, low: float, high: float) -> None:
    z = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)

    def function(t: Tensor, u: Tensor) -> Tensor:
        y: Tensor = _Planted.apply(t.sigmoid(), factor)
        return (y * u).square().sum()

    # The second input's gradient is right; the first one's must show all the same.
    assert low <= checks.gradient_difference(function, z, torch.ones_like(z)) <= high


def test_gradient_check_of_the_network(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.device(device)
    assert checks.network_gradient_difference(place) < checks.BOUND
    if device == "cpu" and tribp.runtime.backend_of(torch.empty(0)) == "torch":  # the interpreter takes seconds
        monkeypatch.setattr(checks, "linear_sigmoid", _planted)
        assert checks.network_gradient_difference(place) > checks.BOUND


def test_refusal_names_the_shapes() -> None:
    sentence = checks.refusal(torch.device("cpu"))
    assert sentence is not None
    for part in ("weight", "(1, 1)", "(1, 2)"):
        assert part in sentence


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("linear_sigmoid", _planted),
        ("network_gradient_difference", lambda device: 1.01 * checks.BOUND),
        ("refusal", lambda device: None),
        ("two_two_one", lambda device: [checks.Check("output", [0.9901], [0.990112])]),
    ],
)
def test_wrong_gradients_end_the_program(
    few: None,
    demo: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    planted: Any,
) -> None:
    monkeypatch.setattr(checks, name, planted)
    assert program.main(["--output", str(tmp_path / "a.png")]) == 1
    captured = capsys.readouterr()
    assert "✗" in captured.out
    assert "Training" not in captured.out
    assert captured.err.count("\n") == 1
    assert "wrong" in captured.err


# Averages


def test_averages_by_hand() -> None:
    assert averages.simple([1, 2, 3, 4, 5, 12], 5) == pytest.approx([3.0, 5.2])
    assert averages.exponential([10.0, 20.0, 30.0], 0.9) == pytest.approx([10.0, 11.0, 12.9])
    assert averages.exponential([], 0.9) == []


def test_averages_of_thirty_days() -> None:
    np = pytest.importorskip("numpy")
    days = [float(20 + 7 * i % 11) for i in range(30)]
    found = averages.simple(days, 5)
    assert len(found) == 26
    assert found == pytest.approx(np.convolve(days, np.ones(5) / 5, mode="valid").tolist())


# Digits and training


def test_digits(demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.digits, "mnist_data", lambda: mnist)
    data, again, other = (demo.digits.load(torch.device("cpu"), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert data.images.shape == (4000, 784)
    assert data.images.aminmax() == (0, 1)
    assert data.labels.bincount().tolist() == [400] * 10
    assert data.held_out_labels.bincount().tolist() == [100] * 10
    # Every digit of the file is on one side, with its own label.
    images, labels = torch.cat((data.images, data.held_out_images)), torch.cat((data.labels, data.held_out_labels))
    found = torch.column_stack((images * 255, labels))
    file = torch.column_stack((torch.as_tensor(mnist[0]), torch.as_tensor(mnist[1])))
    assert torch.equal(found.round().to(torch.uint8).unique(dim=0), file.to(torch.uint8).unique(dim=0))
    assert len(found.unique(dim=0)) == 5000
    assert torch.equal(data.held_out_images, again.held_out_images)
    assert not torch.equal(data.held_out_images, other.held_out_images)


def _training(demo: SimpleNamespace, seed: int = 0, **changed: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    data = demo.digits.load(torch.device("cpu"), generator)
    settings = {"method": METHODS["adam"], "batch_size": 16, "epochs": 3, "lr": 0.01, "epsilon": 0.1} | changed
    return demo.training.Training(data, generator, **settings)


def test_training_beside_plain_torch(few: None, demo: SimpleNamespace) -> None:
    run = _training(demo)
    pairs = list(zip(run.tribp.layers.parameters(), run.plain.layers.parameters(), strict=True))
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
        assert ours.abs().max() <= 0.1
    first = run.tribp.layers[0].weight
    assert first.max() > 0.0999
    assert first.min() < -0.0999
    before = first.detach().clone()
    advanced: list[None] = []
    for _ in range(3):
        run.epoch(lambda: advanced.append(None))
    assert (first - before).abs().max() > 0.01
    assert run.difference < 1e-6
    assert len(advanced) == len(run.losses) == 3 * 7
    assert len(run.accuracies) == len(run.held_out_accuracies) == 3
    seen = run.accuracy(run.digits.images, run.digits.labels)
    held_out = run.accuracy(run.digits.held_out_images, run.digits.held_out_labels)
    assert seen != held_out  # or a mix-up of the two could not show
    assert (run.accuracies[-1], run.held_out_accuracies[-1]) == (seen, held_out)
    assert len(run.tribp.seconds) == len(run.plain.seconds) == 21  # the third epoch brings it over COMPARED_STEPS
    assert run.tribp.optimizer.param_groups[0]["lr"] == pytest.approx(0)
    assert run.losses[-1] < run.losses[0] / 2


TWINS: dict[
    str, tuple[Any, Any, dict[str, Any], dict[str, Any]]
] = {  # ours and torch's, and the hyperparameters that make them the same
    "sgd": (tribp.optim.SGD, torch.optim.SGD, {"momentum": 0, "dampening": 0}, {"momentum": 0, "dampening": 0}),
    "momentum": (
        tribp.optim.Momentum,
        torch.optim.SGD,
        {"momentum": 0.5, "dampening": 0.5},
        {"momentum": 0.5, "dampening": 0.5, "nesterov": False},
    ),
    "adagrad": (
        tribp.optim.AdaGrad,
        torch.optim.Adagrad,
        {"eps": 1e-8, "eps_inside_sqrt": True, "initial_accumulator_value": 0, "lr_decay": 0},
        {"eps": 0, "initial_accumulator_value": 1e-8, "lr_decay": 0},
    ),
    "rmsprop": (tribp.optim.RMSProp, torch.optim.RMSprop, {"alpha": 0.99}, {"alpha": 0.99, "eps": 1e-8}),
    "adam": (tribp.optim.Adam, torch.optim.Adam, {"betas": (0.9, 0.999)}, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "adamw": (tribp.optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.01}, {"weight_decay": 0.01}),
}


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_beside_its_twin(few: None, demo: SimpleNamespace, name: str) -> None:
    assert METHODS.keys() == TWINS.keys()
    method, (ours, theirs, group, their_group) = METHODS[name], TWINS[name]
    run = _training(demo, method=method, lr=method.lr)
    for learner, kind, expected in ((run.tribp, ours, group), (run.plain, theirs, their_group)):
        assert type(learner.optimizer) is kind
        found = learner.optimizer.param_groups[0] | {"lr": learner.optimizer.param_groups[0]["initial_lr"]}
        assert {key: found[key] for key in expected} == expected
        assert found["lr"] == method.lr
    before = [p.detach().clone() for p in run.tribp.layers.parameters()]
    for _ in range(3):
        run.epoch(lambda: None)
    for start, p, q in zip(before, run.tribp.layers.parameters(), run.plain.layers.parameters(), strict=True):
        moved = (p - start).abs().max()
        assert moved > 0.01
        assert (p - q).abs().max() < 1e-4 * moved
    assert run.difference < 1e-5
    assert run.losses[-1] < 0.55  # from 1.2; nothing learned but "rarely", 0.45 is the loss of always saying 0.1


def test_twin_of_another_kind_differs(few: None, demo: SimpleNamespace) -> None:
    """The tolerance above tells AdaGrad with its ε inside the root from torch's, and Momentum from torch's."""
    for name, wrong in (("adagrad", {"eps": 1e-8}), ("momentum", {"momentum": 0.5})):
        method = dataclasses.replace(METHODS[name], their_arguments=wrong)
        run = _training(demo, method=method, lr=method.lr)
        run.epoch(lambda: None)
        assert run.difference > 1e-4, name


def test_training_without_plain_torch(few: None, demo: SimpleNamespace) -> None:
    run, beside = _training(demo, compared_steps=0), _training(demo)
    before = [p.detach().clone() for p in run.plain.layers.parameters()]
    for training in (run, beside):
        for _ in range(3):
            training.epoch(lambda: None)
    assert run.losses == beside.losses
    assert all(torch.equal(p, q) for p, q in zip(before, run.plain.layers.parameters(), strict=True))
    assert run.plain.seconds == run.tribp.seconds == []
    assert run.difference != run.difference  # NaN: there is none
    assert sum(beside.tribp.seconds + beside.plain.seconds) < beside.seconds
    targets = torch.eye(10)[run.digits.labels]
    loss = 0.5 * (run.tribp.layers(run.digits.images) - targets).square().sum(1).mean()
    assert run.final_loss() == pytest.approx(loss.item(), rel=1e-6)


def test_difference_from_plain_torch_is_seen(few: None, demo: SimpleNamespace) -> None:
    run = _training(demo)
    with torch.no_grad():
        run.plain.layers[2].bias[3] += 0.5
    run.epoch(lambda: None)
    assert 0.3 < run.difference < 0.7


def test_accuracy_counts(few: None, demo: SimpleNamespace) -> None:
    run = _training(demo)
    run.tribp.layers[1].weight.data.zero_()
    run.tribp.layers[1].bias.data[:] = torch.arange(10) == 7  # whatever it sees, it says 7
    assert run.accuracy(run.digits.images, run.digits.labels) == 10


def test_same_seed_same_numbers(few: None, demo: SimpleNamespace) -> None:
    runs = [_training(demo, seed) for seed in (0, 0, 1)]
    for run in runs:
        run.epoch(lambda: None)
    assert runs[0].losses == runs[1].losses != runs[2].losses


@pytest.mark.parametrize(("batch_size", "steps"), [(None, 1), (1, 100), (64, 2), (1000, 1)])
def test_batch_sizes(few: None, demo: SimpleNamespace, batch_size: int | None, steps: int) -> None:
    run = _training(demo, batch_size=batch_size)
    run.epoch(lambda: None)
    assert len(run.losses) == run.steps_per_epoch == steps


# The program


@pytest.fixture(scope="module")
def default_run(demo: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    picture = tmp_path_factory.mktemp("demo") / "digits.png"
    torch.set_num_threads(2)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert program.main(["--output", str(picture)]) == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    return out.getvalue(), picture


def test_default_run_learns(default_run: tuple[str, Path]) -> None:
    out, _ = default_run
    last = out.splitlines()[-1]
    match = re.fullmatch(r"held-out accuracy: (\d+\.\d) %", last)
    assert match, last
    assert out.count("held-out accuracy") == 1
    assert float(match[1]) >= 93


def test_default_run_tells_what_it_did(default_run: tuple[str, Path]) -> None:
    out, picture = default_run
    assert "✗" not in out
    assert out.count("✓") == 13
    for part in (
        "784-128-10", "½ Σ (output − target)²", "tribp.optim.Adam, learning rate 0.01", "plain torch: torch.optim.Adam",
        "ε = 0.1", "4,000", str(picture),
    ):  # fmt: skip
        assert part in out, part
    rows = {m[1]: (m[2], m[3]) for m in re.finditer(r"^ *(\w[\w ]*?)  +(\S.*?)  +(\S.*?)? *$", out, re.MULTILINE)}
    gpu = torch.cuda.is_available()
    assert rows["backend"] == ("triton" if gpu else "torch", "torch")
    assert rows["device"][0].startswith("cuda" if gpu else "cpu")
    assert all(re.fullmatch(r"\d+\.\d{3} ms", cell) for cell in rows["time per step"])
    assert float(rows["largest difference of a parameter"][0]) < 1e-3
    assert "━" not in out, "a progress bar where there is no terminal"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out), "control characters where there is no terminal"


def test_default_run_draws(default_run: tuple[str, Path]) -> None:
    from matplotlib import image

    assert default_run[1].read_bytes().startswith(PNG)
    pixels = image.imread(default_run[1])
    assert min(pixels.shape[:2]) > 500
    assert 0.005 < (pixels[..., :3].min(-1) < 0.99).mean() < 0.5  # something is drawn, and most is paper


def test_picture_holds_the_series(
    few: None, demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _training(demo)
    for _ in range(3):
        run.epoch(lambda: None)
    figures: list[Any] = []
    monkeypatch.setattr(demo.picture.Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    demo.picture.draw(run, "", tmp_path / "unused.png")
    loss, accuracy = figures[0].axes
    raw, ema, sma = ([list(xy) for xy in line.get_data()] for line in loss.get_lines())
    assert raw == [list(range(1, 22)), run.losses]
    assert ema == [list(range(1, 22)), averages.exponential(run.losses, 0.9)]
    assert sma == [list(range(7, 22)), averages.simple(run.losses, 7)]
    seen, held_out = (list(line.get_ydata()) for line in accuracy.get_lines())
    assert (seen, held_out) == (run.accuracies, run.held_out_accuracies)
    for axes in (loss, accuracy):
        assert axes.get_xlabel()
        assert axes.get_ylabel()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_options_reach_the_training(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    picture = tmp_path / f"p{suffix}"
    options = "--device cpu --optimizer momentum --batch-size full --epochs 2 --lr 0.5 --epsilon 0.25 --seed 3 --output"
    assert program.main([*options.split(), str(picture)]) == 0
    out = capsys.readouterr().out
    for part in (
        "tribp.optim.Momentum(beta=0.5), learning rate 0.5",
        "ε = 0.25",
        "seed 3",
        "of 100, 1 per epoch; epochs: 2",
        "cpu",
    ):
        assert part in out, part
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_of_choice(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    options = ["--device", "cpu", "--optimizer", name, "--epochs", "1", "--output", str(tmp_path / "p.png")]
    assert program.main(options) == 0
    out = capsys.readouterr().out
    assert f"{METHODS[name]}, learning rate {METHODS[name].lr:g}" in out
    assert METHODS[name].twin in out
    match = re.search(r"difference of a parameter +(\S+)", out)
    assert match
    assert float(match[1]) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_learns(demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(demo.digits, "mnist_data", lambda: mnist)
    method = METHODS[name]
    run = _training(demo, method=method, lr=method.lr, compared_steps=0)
    for _ in range(3):
        run.epoch(lambda: None)
    assert run.held_out_accuracies[-1] > 75


# The comparison


@pytest.fixture
def lines(demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure that is saved; each still is."""
    found: list[Any] = []
    original = demo.picture.Figure.savefig

    def planted(figure: Any, *args: Any, **named: Any) -> None:
        found.extend(figure.axes)
        original(figure, *args, **named)

    monkeypatch.setattr(demo.picture.Figure, "savefig", planted)
    return found


NAMES = [
    "SGD, batch", "SGD, stochastic", "SGD, mini-batch", "Momentum", "AdaGrad", "RMSProp", "Adam", "AdamW",
]  # fmt: skip
BATCHES = [100, 1, *6 * [16]]
STEPS = [4 * 10, 100, *6 * [4 * 7]]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_comparison(
    few: None,
    demo: SimpleNamespace,
    lines: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    runs: list[Any] = []
    original = demo.picture.compare

    def drawn(trainings: dict[str, Any], *rest: Any) -> None:
        runs.extend(trainings.values())
        original(trainings, *rest)

    monkeypatch.setattr(demo.picture, "compare", drawn)
    picture = tmp_path / f"c{suffix}"
    options = "--compare --device cpu --epochs 4 --epsilon 0.2 --seed 3 --output"
    assert program.main([*options.split(), str(picture)]) == 0
    out = capsys.readouterr().out
    for part in ("784-128-10", "½ Σ (output − target)²", "ε = 0.2, seed 3", str(picture)):
        assert part in out, part
    assert re.search(r"epochs +4; 1 for stochastic .*\n.* 40 for batch", out)
    assert out.count("✓") == 13
    assert "plain torch" not in out
    assert "━" not in out, "a progress bar where there is no terminal"

    assert len(runs) == len(NAMES)
    cells = r"(\S+) +(\S+) +(\S+) +\d+\.\d s +(\d\.\d{4}) +(\d+\.\d) %"
    rows = [m.groups() for m in re.finditer(rf"^  (\w.*?)  +{cells} *$", out, re.MULTILINE)]
    rates = [run.tribp.optimizer.param_groups[0]["initial_lr"] for run in runs]
    assert [row[:4] for row in rows] == [
        (name, f"{lr:g}", f"{batch:,}", f"{steps:,}")
        for name, lr, batch, steps in zip(NAMES, rates, BATCHES, STEPS, strict=True)
    ]
    assert [row[4:] for row in rows] == [(f"{r.final_loss():.4f}", f"{r.held_out_accuracies[-1]:.1f}") for r in runs]
    assert rates == [run.lr for run in COMPARED]
    assert rates[2:] == [method.lr for method in METHODS.values()]
    kinds = [type(run.tribp.optimizer) for run in runs]
    assert kinds == [tribp.optim.SGD, tribp.optim.SGD, *(ours for ours, *_ in TWINS.values())]
    assert all(run.losses[0] == pytest.approx(runs[2].losses[0]) for run in runs[2:])  # the same weights and batches
    assert [len(run.losses) for run in runs] == STEPS

    (axes,) = lines
    assert len(axes.get_lines()) == len(runs)
    for line, name, run, batch in zip(axes.get_lines(), NAMES, runs, BATCHES, strict=True):
        assert line.get_label().startswith(f"{name}:")
        epochs, losses = (list(xy) for xy in line.get_data())
        assert epochs == pytest.approx([batch * (i + 1) / 100 for i in range(len(run.losses))])
        assert losses == averages.exponential(run.losses, 1 - batch / 1000)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [x.get_label() for x in axes.get_lines()]
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert picture.stat().st_size > 1000
    # The other way to the same numbers: the training of one optimizer alone.
    alone = _training(demo, 3, method=METHODS["adamw"], epochs=4, epsilon=0.2)
    for _ in range(4):
        alone.epoch(lambda: None)
    assert alone.losses == runs[-1].losses


def test_one_progress_bar_over_the_comparison(
    few: None, demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bars: list[Any] = []
    original = demo.report._progress

    def made(console: Any) -> Any:
        bars.append(original(console))
        return bars[-1]

    monkeypatch.setattr(demo.report, "_progress", made)
    assert program.main(["--compare", "--device", "cpu", "--epochs", "4", "--output", str(tmp_path / "c.png")]) == 0
    (bar,) = bars
    (task,) = bar.tasks
    assert task.total == task.completed == sum(STEPS)


def test_interrupted_comparison(
    few: None,
    demo: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, picture = demo.training.Training.epoch, tmp_path / "c.png"

    def planted(run: Any, advance: Any) -> None:
        if type(run.tribp.optimizer) is tribp.optim.Momentum and len(run.accuracies) == 2:
            raise KeyboardInterrupt
        original(run, advance)

    monkeypatch.setattr(demo.training.Training, "epoch", planted)
    assert program.main(["--compare", "--epochs", "3", "--output", str(picture)]) == 130
    captured = capsys.readouterr()
    assert captured.err == "stopped after 2 of 3 epochs of Momentum, method 4 of 8\n"
    assert "final loss" not in captured.out
    assert not picture.exists()


@pytest.mark.parametrize("options", [[], ["--compare"]], ids=" ".join)
def test_interrupted_drawing_leaves_no_half_picture(
    few: None,
    demo: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    def planted(figure: Any, file: Any, **named: Any) -> None:
        if isinstance(file, Path):
            file.write_bytes(PNG)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.picture.Figure, "savefig", planted)
    assert program.main([*options, "--epochs", "1", "--output", str(tmp_path / "c.png")]) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert not list(tmp_path.iterdir())


# The command line


def test_program_through_the_kernels(
    few: None,
    demo: SimpleNamespace,
    kernels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo.training, "SIZES", (784, 16, 10))  # the interpreter is slow
    options = ["--device", kernels, "--batch-size", "full", "--epochs", "1", "--output", str(tmp_path / "k.png")]
    assert program.main(options) == 0
    out = capsys.readouterr().out
    assert re.search(r"backend +triton, interpreted +torch" if kernels == "cpu" else r"backend +triton +torch", out)
    match = re.search(r"difference of a parameter +(\S+)", out)
    assert match
    # Adam's first step moves a parameter by lr · g / (|g| + 1e-8): only where g is near 1e-8 may the two differ much.
    assert float(match[1]) < 1e-3


def test_help_teaches_and_imports_no_extra() -> None:
    code = """if True:
        import sys
        from tribp.__main__ import main
        try:
            main(["--help"])
        finally:
            print("imported:", sorted({"matplotlib", "mlxtend", "rich"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout
    for option in ("device", "batch-size", "epochs", "lr", "epsilon", "seed", "output"):
        assert re.search(rf"^  --{option} \w+", done.stdout, re.MULTILINE), option
    assert re.search(r"^  --optimizer \{sgd,momentum,adagrad,rmsprop,adam,adamw\}$", done.stdout, re.MULTILINE)
    assert re.search(r"^  --compare  ", done.stdout, re.MULTILINE)
    assert done.stdout.count("(default:") == 8
    rates = ", ".join(f"{name} {method.lr:g}" for name, method in METHODS.items())
    for word in ("full", "stochastic", "mini-batch", "linearly to 0", f"(default: {rates})", "(default: adam)"):
        assert word in " ".join(done.stdout.split()), word


@pytest.mark.parametrize(
    "options",
    [
        *(["--batch-size", value] for value in ("0", "-1", "abc", "1.5", "")),
        *(["--lr", value] for value in ("0", "-1", "nan", "inf", "abc")),
        *(["--epsilon", value] for value in ("0", "nan", "-0.1")),
        *(["--epochs", value] for value in ("0", "²", "full")),
        *(["--seed", value] for value in ("-1", "x", "9" * 30)),
        *(["--device", value] for value in ("tpu", "mps", "cuda:x", "cuda:99", "meta", "")),
        *(["--output", value] for value in ("nowhere/x.png", "x.txt", "", ".", "folder.png")),
        *(["--optimizer", value] for value in ("lbfgs", "SGD", "")),
        ["--optimizer", "adam", "--compare"],  # also where it is the default
        ["--batch-size", "16", "--compare"],
        ["--batch-size", "full", "--compare"],
        ["--lr", "0.01", "--compare"],
        ["--compare=all"],
        ["--unknown"],
        ["file"],
    ],
    ids=" ".join,
)
def test_bad_options(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        program.main(options)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m tribp: error: ")
    assert err.count("\n") == 1
    assert options[0].partition("=")[0] in err
    assert "--compare" in err or "--compare" not in options


def test_no_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        program.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("extra", program.EXTRAS)
def test_missing_extra(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    assert program.main(["--output", str(tmp_path / "a.png")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""  # nothing was begun
    assert captured.err.count("\n") == 1
    assert extra.partition(".")[0] in captured.err
    assert "pip install -e '.[demo]'" in captured.err
    assert not list(tmp_path.iterdir())


def test_kernels_that_cannot_run(
    demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(tribp.runtime, "interpreting", lambda: False)
    with tribp.use_backend("triton"):
        assert program.main(["--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "TRITON_INTERPRET=1" in captured.err


@pytest.fixture(params=["load", "epoch", "draw"])
def interrupted(
    request: pytest.FixtureRequest, few: None, demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The sentence due when Ctrl-C comes there: while loading, in the third epoch, while drawing."""
    owner, sentence = {
        "load": (demo.digits, "stopped\n"),
        "epoch": (demo.training.Training, "stopped after 2 of 15 epochs\n"),
        "draw": (demo.picture, "stopped\n"),
    }[request.param]
    original = getattr(owner, request.param)

    def planted(*args: Any) -> Any:
        if request.param != "epoch" or len(args[0].accuracies) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, request.param, planted)
    return sentence


def test_interrupt(interrupted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--output", str(tmp_path / "a.png")]) == 130
    assert capsys.readouterr().err == interrupted


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigint(demo: SimpleNamespace, tmp_path: Path) -> None:
    # A runner in the background may hand down an ignored SIGINT: the child takes Python's own handler.
    code = """if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from tribp.__main__ import main
        sys.exit(main(["--device", "cpu", "--epochs", "100000", "--output", sys.argv[1]]))
    """
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, bufsize=1) as child:
        try:
            assert child.stdout
            for line in child.stdout:
                if "per epoch" in line:  # training begins
                    break
            time.sleep(0.5)
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 130
    assert re.fullmatch(r"stopped( after \d+ of 100000 epochs)?\n", err), err
