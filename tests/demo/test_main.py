"""`python -m tribp`: the program, its options, its errors, its interruptions."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tribp
from tribp import __main__ as program
from tribp.demo import averages
from tribp.demo.methods import METHODS
from tribp.demo.models import MODELS

from ..processes import forked
from .cases import PNG, ROOT, new_training

pytestmark = pytest.mark.usefixtures("one_thread")


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
    run = new_training(demo)
    for _ in range(3):
        run.epoch(lambda: None)
    figures: list[Any] = []
    monkeypatch.setattr(demo.picture.Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    demo.picture.draw(run, "", tmp_path / "unused.png")
    loss, accuracy, weights, judged = figures[0].axes
    raw, ema, sma = ([list(xy) for xy in line.get_data()] for line in loss.get_lines())
    assert raw == [list(range(1, 22)), run.losses]
    assert ema == [list(range(1, 22)), averages.exponential(run.losses, 0.9)]
    assert sma == [list(range(7, 22)), averages.simple(run.losses, 7)]
    seen, held_out = (list(line.get_ydata()) for line in accuracy.get_lines())
    assert (seen, held_out) == (run.accuracies, run.held_out_accuracies)
    for axes in (loss, accuracy):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    units = demo.learned.first_weights(run.tribp.layers, 14)
    assert [image.get_array().tolist() for image in weights.images] == units.tolist()
    assert len(units) == 14
    some = demo.learned.judged(run, 7)
    assert [image.get_array().tolist() for image in judged.images] == [digit.image.tolist() for digit in some]
    assert [text.get_text() for text in judged.texts] == [str(digit) for digit in some]


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
    run = new_training(demo, method=method, lr=method.lr, compared_steps=0)
    for _ in range(3):
        run.epoch(lambda: None)
    assert run.held_out_accuracies[-1] > 75


# The command line


def test_program_through_the_kernels(
    few: None,
    demo: SimpleNamespace,
    kernels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo.models, "SIZES", (784, 16, 10))  # the interpreter is slow
    options = ["--device", kernels, "--batch-size", "full", "--epochs", "1", "--output", str(tmp_path / "k.png")]
    assert program.main(options) == 0
    out = capsys.readouterr().out
    assert re.search(r"backend +triton, interpreted +torch" if kernels == "cpu" else r"backend +triton +torch", out)
    match = re.search(r"difference of a parameter +(\S+)", out)
    assert match
    # Adam's first step moves a parameter by lr · g / (|g| + 1e-8): only where g is near 1e-8 may the two differ much.
    assert float(match[1]) < 1e-3


def test_help_teaches_and_imports_no_extra() -> None:
    code = """
        import sys
        from tribp.__main__ import main
        try:
            main(["--help"])
        finally:
            print("imported:", sorted({"matplotlib", "mlxtend", "rich"} & sys.modules.keys()))
    """
    done = forked("-c", code)
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout
    for option in ("device", "batch-size", "epochs", "lr", "epsilon", "seed", "output", "html"):
        assert re.search(rf"^  --{option} \w+", done.stdout, re.MULTILINE), option
    assert re.search(r"^  --optimizer \{sgd,momentum,adagrad,rmsprop,adam,adamw\}$", done.stdout, re.MULTILINE)
    assert re.search(r"^  --model \{mlp,mlp3,cnn\}$", done.stdout, re.MULTILINE)
    assert re.search(r"^  --compare  ", done.stdout, re.MULTILINE)
    assert done.stdout.count("(default:") == 9
    for model in MODELS.values():
        rates = ", ".join(f"{name} {model.rates[name]:g}" for name in METHODS)
        assert f"{model.name.lower()} {model.epsilon:g}" in done.stdout
        assert f"{model.name.lower()}: {rates}" in " ".join(done.stdout.split())
    for word in ("full", "stochastic", "mini-batch", "linearly to 0", "(default: adam)", "(default: mlp)"):
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
        *(["--html", value] for value in ("nowhere/x.html", "x.png", "", "folder.html")),
        *(["--optimizer", value] for value in ("lbfgs", "SGD", "")),
        ["--optimizer", "adam", "--compare"],  # also where it is the default
        ["--batch-size", "16", "--compare"],
        ["--batch-size", "full", "--compare"],
        ["--lr", "0.01", "--compare"],
        ["--model", "cnn", "--compare"],
        ["--model", "mlp3", "--compare"],
        ["--fused-step", "--compare"],
        ["--html", "x.html", "--compare"],
        *(["--model", value] for value in ("CNN", "rnn", "")),
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
    for name in ("folder.png", "folder.html"):
        (tmp_path / name).mkdir()
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
    monkeypatch.setattr(tribp.dispatch, "interpreting", lambda: False)
    with tribp.use_backend("triton"):
        assert program.main(["--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "TRITON_INTERPRET=1" in captured.err


def test_a_wrong_value_of_tribp_autotune() -> None:
    pytest.importorskip("triton")
    variables = {"TRIBP_BACKEND": "triton", "TRITON_INTERPRET": "1", "TRIBP_AUTOTUNE": "yes"}
    done = forked("-m", "tribp", "--device", "cpu", **variables)
    sentence = "python -m tribp: TRIBP_AUTOTUNE must be 0 or 1, got 'yes'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    """As `| head -1`: what is written later has nobody who reads it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tribp", "--device", "cpu", "--epochs", "1", "--output", str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


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


@pytest.mark.parametrize("name", ["_options", "_importable"])
def test_interrupt_before_it_begins(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While torch is asked for GPUs, and while what the demo needs is imported."""

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, name, interrupted)
    assert program.main([]) == 130
    assert capsys.readouterr().err == "stopped\n"


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
