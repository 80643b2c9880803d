"""`python -m tribp --model cnn`: the convolutional network, its twin in plain torch, its checks, what it learns."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp import __main__ as program
from tribp.demo import checks, losses
from tribp.demo.methods import METHODS
from tribp.demo.models import MODELS, Model, in_plain_torch

from .cases import PNG, new_training

pytestmark = pytest.mark.usefixtures("one_thread")

CNN = MODELS["cnn"]


@pytest.fixture
def real(demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 5,000 digits, unpacked once."""
    monkeypatch.setattr(demo.digits, "mnist_data", lambda: mnist)


@pytest.fixture
def titles(demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The titles of every figure that is saved, drawn; each still is."""
    found: list[Any] = []
    original = demo.picture.Figure.savefig

    def planted(figure: Any, *args: Any, **named: Any) -> None:
        original(figure, *args, **named)
        found.append((figure.get_suptitle(), figure._suptitle.get_window_extent(), figure.bbox))

    monkeypatch.setattr(demo.picture.Figure, "savefig", planted)
    return found


def new_cnn(demo: SimpleNamespace, seed: int = 0, **changed: Any) -> Any:
    return new_training(demo, seed, **{"model": "cnn", "lr": CNN.rates["adam"]} | changed)


# The network


def test_layers() -> None:
    """Conv3x3(1→6, sigmoid), pooling, Conv3x3(6→16, sigmoid), pooling, LinearSigmoid layers: by functions of torch."""
    network = CNN.network(0.7, torch.Generator().manual_seed(0))
    assert sum(isinstance(layer, tribp.nn.Conv3x3) for layer in list(network)) == 2
    assert all(isinstance(layer, tribp.nn.LinearSigmoid) for layer in list(network)[-2:])
    w1, b1, w2, b2, w3, b3, w4, b4 = network.parameters()
    assert (w1.shape, w2.shape, w3.shape[1], w4.shape[0]) == ((6, 1, 3, 3), (16, 6, 3, 3), 16 * 5 * 5, 10)
    images = torch.rand(4, 784)
    x = images.view(4, 1, 28, 28)
    for weight, bias in ((w1, b1), (w2, b2)):
        x = F.max_pool2d(F.conv2d(x, weight, bias).sigmoid(), 2)
    x = F.linear(F.linear(x.flatten(1), w3, b3).sigmoid(), w4, b4).sigmoid()
    torch.testing.assert_close(network(images), x)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_weights_start_uniform(model: Model) -> None:
    network, again, other = (model.network(0.25, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    for p, q, r in zip(network.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)
    values = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert values.abs().max() <= 0.25
    torch.testing.assert_close(
        values.quantile(torch.linspace(0, 1, 5)), torch.linspace(-0.25, 0.25, 5), atol=0.01, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("cnn", nn.Conv2d, 2), ("mlp", nn.Linear, 2), ("mlp3", nn.ReLU, 2)]
)
def test_twin_is_torchs(name: str, kind: type, count: int) -> None:
    network = MODELS[name].network(MODELS[name].epsilon, torch.Generator().manual_seed(0))
    twin = in_plain_torch(network)
    assert not any(type(layer).__module__.startswith("tribp") for layer in twin.modules())
    assert sum(type(layer) is kind for layer in twin.modules()) == count
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
    images = torch.rand(4, 784)
    torch.testing.assert_close(twin(images), network(images))


def test_text_of_the_models() -> None:
    assert str(MODELS["mlp"]) == "LinearSigmoid 784-128-10"
    assert str(CNN) == (
        "Conv3x3(1→6, sigmoid), MaxPool2d(2), Conv3x3(6→16, sigmoid), MaxPool2d(2), LinearSigmoid 400-120-10"
    )
    assert str(MODELS["mlp3"]) == "MLP 784-256-64-10, relu, sigmoid"
    assert MODELS["mlp3"].parameters == 784 * 256 + 256 + 256 * 64 + 64 + 64 * 10 + 10
    assert MODELS["mlp"].parameters == 784 * 128 + 128 + 128 * 10 + 10
    assert CNN.parameters == 6 * 9 + 6 + 16 * 54 + 16 + 400 * 120 + 120 + 1200 + 10
    for model in MODELS.values():
        assert model.rates.keys() == METHODS.keys()


# The losses


def test_losses_by_formula() -> None:
    y, t = torch.tensor([[0.2, 0.9], [0.5, 0.25]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    squares = [0.5 * (0.04 + 0.01), 0.5 * (0.25 + 0.0625)]
    logarithms = [-torch.tensor(v).log().sum().item() for v in ([0.8, 0.9], [0.5, 0.75])]
    assert MODELS["mlp"].loss(y, t).item() == pytest.approx(sum(squares) / 2)
    assert CNN.loss(y, t).item() == pytest.approx(sum(logarithms) / 2)
    assert "½" in MODELS["mlp"].loss.formula
    assert "ln" in CNN.loss.formula


def test_loss_of_an_output_that_rounds_to_one() -> None:
    y = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = losses.cross_entropy(y, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert y.grad is not None
    assert loss.isfinite()
    assert y.grad.isfinite().all()


# The checks


def _planted(original: Any, what: str) -> Any:
    """conv3x3 with a mistake: a gradient that is off, or a kernel that is turned round as in mathematics."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 1.0001 * grad

    def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None = None, **named: Any) -> Tensor:
        if what == "turned":
            weight = weight.flip(2, 3)
        if what == "bias" and bias is not None:
            bias = Off.apply(bias)
        if what == "weight":
            weight = Off.apply(weight)
        if what == "input" and input.shape[1] > 1:
            input = Off.apply(input)
        y: Tensor = original(input, weight, bias, **named)
        return y

    return conv3x3


@pytest.mark.parametrize("what", ["bias", "weight", "input"])
def test_gradient_check_of_the_network(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    place = torch.device("cpu")
    assert checks.convolutional_gradient_difference(place) < checks.BOUND
    monkeypatch.setattr(checks, "conv3x3", _planted(tribp.conv3x3, what))
    assert checks.convolutional_gradient_difference(place) > 100 * checks.BOUND


def test_pooling_in_the_gradient_check_is_away_from_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps: list[float] = []
    original = F.max_pool2d

    def pooled(x: Tensor, size: int) -> Tensor:
        first, second = F.unfold(x.flatten(0, 1).unsqueeze(1), size, stride=size).topk(2, 1).values.unbind(1)
        gaps.append((first - second).min().item())
        return original(x, size)

    monkeypatch.setattr(F, "max_pool2d", pooled)
    checks.convolutional_gradient_difference(torch.device("cpu"))
    assert len(gaps) > 100
    assert min(gaps) > 1e-3 - 2 * checks.STEP


def test_convolution_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = checks.convolution(torch.device("cpu"))
    found = {row.name: row.found for row in rows}
    image = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    window = range(2)
    assert found["y"] == [sum(image[p + r][q] - image[p + r][q + 2] for r in range(3)) for p in window for q in window]
    for r in range(3):
        sums = [sum(image[p + r][q + t] for p in window for q in window) for t in range(3)]
        assert found[f"dS/dw, row {r + 1}"] == sums
    assert (1, 6, 30, 30) in found.values()
    assert all(row.right for row in rows)
    monkeypatch.setattr(checks, "conv3x3", _planted(tribp.conv3x3, "turned"))
    assert not all(row.right for row in checks.convolution(torch.device("cpu")))


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("conv3x3", _planted(tribp.conv3x3, "weight")),
        ("convolutional_gradient_difference", lambda device: 1.01 * checks.BOUND),
        ("convolution", lambda device: [checks.Check("shape", (1, 6, 32, 32), (1, 6, 30, 30))]),
        ("network_gradient_difference", lambda device: 1.01 * checks.BOUND),
    ],
)
def test_wrong_gradients_end_the_program(
    few: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    planted: Any,
) -> None:
    monkeypatch.setattr(checks, name, planted)
    assert program.main(["--model", "cnn", "--device", "cpu", "--output", str(tmp_path / "a.png")]) == 1
    captured = capsys.readouterr()
    assert "✗" in captured.out
    assert "Training" not in captured.out
    assert captured.err.count("\n") == 1
    assert "wrong" in captured.err


# The training


def test_training_beside_plain_torch(few: None, demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where rounding has not grown to anything, the two networks are one."""
    original = demo.digits.load

    def doubled(*args: Any) -> Any:
        data = original(*args)
        return dataclasses.replace(data, images=data.images.double(), held_out_images=data.held_out_images.double())

    monkeypatch.setattr(demo.digits, "load", doubled)
    torch.set_default_dtype(torch.float64)
    try:
        run = new_cnn(demo)
    finally:
        torch.set_default_dtype(torch.float32)
    before = [p.detach().clone() for p in run.tribp.layers.parameters()]
    for _ in range(3):
        run.epoch(lambda: None)
    for start, p, q in zip(before, run.tribp.layers.parameters(), run.plain.layers.parameters(), strict=True):
        assert p.dtype == torch.float64
        assert (p - start).abs().max() > 0.01
        assert (p - q).abs().max() < 1e-9
    assert run.losses[-1] < run.losses[0] / 2
    assert run.final_loss() == CNN.loss(run.tribp.layers(run.digits.images), run.targets).item()
    for learner in (run.tribp, run.plain):
        assert learner.gradients(run.digits.images, run.targets).item() == pytest.approx(run.final_loss())


@pytest.mark.parametrize(
    "name", [name if name in ("sgd", "adamw") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_optimizer_of_choice(
    few: None, titles: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options = ["--model", "cnn", "--device", "cpu", "--optimizer", name, "--epochs", "2"]
    picture = tmp_path / "p.png"
    assert program.main([*options, "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "✗" not in out
    assert out.count("✓") == 13 + 1 + 7
    for part in (
        f"{METHODS[name]}, learning rate {CNN.rates[name]:g}", METHODS[name].twin, "Training the CNN", str(CNN),
        f"{CNN.parameters:,} parameters", f"{CNN.loss.name} {CNN.loss.formula}", f"ε = {CNN.epsilon:g}",
        "shape of Conv3x3(1, 6)", "1, 6, 30, 30", "of 16, 7 per epoch; epochs: 2",
    ):  # fmt: skip
        assert part in out, part
    for row in ("backend +torch +torch", "device +cpu, 1 thread +cpu, 1 thread", r"time per step( +\d+\.\d{3} ms){2}"):
        assert re.search(rf"^ *{row} *$", out, re.MULTILINE), row
    match = re.search(r"difference of a parameter +(\S+)", out)
    assert match
    assert float(match[1]) < 1e-3
    assert re.fullmatch(r"held-out accuracy: \d+\.\d %", out.splitlines()[-1])
    assert picture.read_bytes().startswith(PNG)
    ((title, box, figure),) = titles
    for part in ("CNN", str(CNN), f"{CNN.parameters:,} parameters", METHODS[name].ours, f"ε = {CNN.epsilon:g}"):
        assert part in title, part
    assert 0 < box.x0 < box.x1 < figure.x1, "the title does not fit"


def test_the_other_model_says_so(
    few: None, titles: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--model", "mlp"], ["--compare", "--model", "mlp"]):
        assert program.main([*options, "--device", "cpu", "--epochs", "1", "--output", str(tmp_path / "p.png")]) == 0
        out, (title, *_) = capsys.readouterr().out, titles.pop()
        for text in (out, title):
            assert "MLP" in text
            assert "LinearSigmoid 784-128-10" in text
            assert "101,770 parameters" in text
            assert "CNN" not in text
            assert "onv" not in text


def test_the_loss_is_on_the_axis(few: None, demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(demo.picture.Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    for model, make in (("mlp", new_training), ("cnn", new_cnn)):
        run = make(demo)
        run.epoch(lambda: None)
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: len(data))
        demo.picture.draw(run, "", Path("unused.png"))
        label = figures.pop().axes[0].get_ylabel()
        assert MODELS[model].loss.formula in label
        assert MODELS[model].loss.name in label


def test_options_reach_the_training(
    few: None,
    demo: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs: list[Any] = []
    original = demo.picture.draw

    def drawn(run: Any, *rest: Any) -> None:
        runs.append(run)
        original(run, *rest)

    monkeypatch.setattr(demo.picture, "draw", drawn)
    options = "--model cnn --device cpu --batch-size full --epochs 1 --lr 0.125 --epsilon 0.25 --seed 3 --output"
    assert program.main([*options.split(), str(tmp_path / "p.svg")]) == 0
    out = capsys.readouterr().out
    for part in ("learning rate 0.125", "ε = 0.25, seed 3", "of 100, 1 per epoch; epochs: 1"):
        assert part in out, part
    assert (tmp_path / "p.svg").stat().st_size > 1000
    (run,) = runs  # what is trained is what is printed
    expected = new_cnn(demo, 3, batch_size=None, epochs=1, lr=0.125, epsilon=0.25)
    expected.epoch(lambda: None)
    assert run.losses == expected.losses
    assert run.held_out_accuracies == expected.held_out_accuracies
    assert [type(layer) for layer in run.tribp.layers] == [type(layer) for layer in CNN.layers()]


def test_interrupt(
    few: None,
    demo: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def planted(run: Any, advance: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.training.Training, "epoch", planted)
    assert program.main(["--model", "cnn", "--output", str(tmp_path / "a.png")]) == 130
    assert capsys.readouterr().err == "stopped after 0 of 15 epochs\n"
    assert not list(tmp_path.iterdir())


def test_learns(real: None, demo: SimpleNamespace) -> None:
    run = new_cnn(demo, compared_steps=0)
    for _ in range(3):
        run.epoch(lambda: None)
    assert run.held_out_accuracies[-1] > 85


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_95_percent(real: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    assert program.main(["--model", "cnn", "--seed", str(seed), "--output", str(tmp_path / "p.png")]) == 0
    match = re.search(r"^held-out accuracy: (\S+) %$", capsys.readouterr().out, re.MULTILINE)
    assert match
    assert float(match[1]) >= 95
