"""The tutorial's programs print the subject matter's values, by plain torch and by the kernels."""

import re
from pathlib import Path

import pytest
import torch

from .running import numbers, run

pytestmark = pytest.mark.usefixtures("one_thread", "device")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_convolution_shape() -> None:
    out = run("tutorial/convolution_shape.py")
    assert numbers(out, "input") == [1, 1, 32, 32]
    assert numbers(out, "output") == [1, 6, 30, 30]
    assert numbers(out, "weights") == [6, 1, 3, 3]
    assert numbers(out, "biases") == [6]


def test_moving_averages(folder: Path) -> None:
    out = run("tutorial/moving_averages.py")
    rows = [[float(cell) for cell in line.split()] for line in out.splitlines() if re.match(r" *\d+ ", line)]
    assert [row[0] for row in rows] == list(range(1, 31))
    days, ema = [row[1] for row in rows], [row[-1] for row in rows]
    sma = [row[2] for row in rows if len(row) == 4]
    assert max(days) - min(days) > 5
    assert sma == pytest.approx([sum(days[i : i + 5]) / 5 for i in range(26)], abs=1e-3)
    expected = days[:1]
    for day in days[1:]:
        expected.append(0.9 * expected[-1] + 0.1 * day)
    assert ema == pytest.approx(expected, abs=1e-3)
    assert 0 < numbers(out, "largest difference of EMA and momentum buffer")[0] < 1e-5
    if "no picture" not in out:
        assert (folder / "moving_averages.png").read_bytes().startswith(b"\x89PNG")


def test_chain_rule() -> None:
    out = run("tutorial/chain_rule.py")
    assert numbers(out, "y") == 2 * [0.731059]
    assert numbers(out, "dy/dw") == numbers(out, "dy/db") == 2 * [0.196612]


def test_network_2_2_1() -> None:
    out = run("tutorial/network_2_2_1.py")
    (sentence,) = re.findall(r"^  tribp  (.*)$", out, re.MULTILINE)
    for part in ("weight", "(1, 1)", "(1, 2)"):
        assert part in sentence
    expected = {
        "output": [0.990112],
        "loss": [0.120105],
        "dW1": [0.000187999, 0.00150399, 0.000307910, 0.00246328],  # in float32, right to 7e-6
        "dW2": [0.00405699, 0.00331059],
    }
    for name, values in expected.items():
        assert numbers(out, name) == pytest.approx(values, rel=1e-5, abs=0), name
    for name, weights in {"W1": [1.0, 2.0, 0.0, 1.0], "W2": [3.0, 3.0]}.items():
        gradient = numbers(out, f"d{name}")
        assert numbers(out, f"d{name} by hand") == pytest.approx(gradient, rel=1e-8, abs=0)
        stepped = [weight - 0.01 * dw for weight, dw in zip(weights, gradient, strict=True)]
        assert numbers(out, f"{name} after a step") == pytest.approx(stepped, rel=1e-8, abs=1e-13)
        assert stepped != pytest.approx(weights, rel=1e-8, abs=1e-13)


def test_values_of_torch() -> None:
    """The same network by torch's own layers: the values above are no invention of tribp's."""
    w1, w2 = (torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in ([[1.0, 2], [0, 1]], [[3.0, 3]]))
    output = (torch.tensor([[0.1, 0.8]], dtype=torch.float64) @ w1.T).sigmoid() @ w2.T
    (0.5 * (output.sigmoid() - 0.5).square().sum()).backward()
    out = run("tutorial/network_2_2_1.py")
    for name, w in (("dW1", w1), ("dW2", w2)):
        assert w.grad is not None
        assert numbers(out, name) == pytest.approx(w.grad.flatten().tolist(), rel=1e-8, abs=0)
