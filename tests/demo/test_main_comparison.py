"""`python -m tribp --compare`: every method once, one picture, one table."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tribp
from tribp import __main__ as program
from tribp.demo import averages
from tribp.demo.methods import COMPARED, METHODS

from .cases import PNG, TWINS, new_training

pytestmark = pytest.mark.usefixtures("one_thread")


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
    alone = new_training(demo, 3, method=METHODS["adamw"], epochs=4, epsilon=0.2)
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
