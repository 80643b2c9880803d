"""What `python -m tribp` consists of: checks, averages, digits, training beside plain torch."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from tribp import __main__ as program
from tribp.demo import averages, checks
from tribp.demo.methods import METHODS

from .cases import TWINS, new_training

pytestmark = pytest.mark.usefixtures("one_thread")


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
    if device == "cpu" and tribp.dispatch.backend_of(torch.empty(0)) == "torch":  # the interpreter takes seconds
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


def test_training_beside_plain_torch(few: None, demo: SimpleNamespace) -> None:
    run = new_training(demo)
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


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_beside_its_twin(few: None, demo: SimpleNamespace, name: str) -> None:
    assert METHODS.keys() == TWINS.keys()
    method, (ours, theirs, group, their_group) = METHODS[name], TWINS[name]
    run = new_training(demo, method=method, lr=method.lr)
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
        run = new_training(demo, method=method, lr=method.lr)
        run.epoch(lambda: None)
        assert run.difference > 1e-4, name


def test_training_without_plain_torch(few: None, demo: SimpleNamespace) -> None:
    run, beside = new_training(demo, compared_steps=0), new_training(demo)
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
    run = new_training(demo)
    with torch.no_grad():
        run.plain.layers[2].bias[3] += 0.5
    run.epoch(lambda: None)
    assert 0.3 < run.difference < 0.7


def test_accuracy_counts(few: None, demo: SimpleNamespace) -> None:
    run = new_training(demo)
    run.tribp.layers[1].weight.data.zero_()
    run.tribp.layers[1].bias.data[:] = torch.arange(10) == 7  # whatever it sees, it says 7
    assert run.accuracy(run.digits.images, run.digits.labels) == 10


def test_same_seed_same_numbers(few: None, demo: SimpleNamespace) -> None:
    runs = [new_training(demo, seed) for seed in (0, 0, 1)]
    for run in runs:
        run.epoch(lambda: None)
    assert runs[0].losses == runs[1].losses != runs[2].losses


@pytest.mark.parametrize(("batch_size", "steps"), [(None, 1), (1, 100), (64, 2), (1000, 1)])
def test_batch_sizes(few: None, demo: SimpleNamespace, batch_size: int | None, steps: int) -> None:
    run = new_training(demo, batch_size=batch_size)
    run.epoch(lambda: None)
    assert len(run.losses) == run.steps_per_epoch == steps
