"""`python -m tribp --model mlp3`: three linear layers, as one `MLP`."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from tribp import __main__ as program
from tribp.demo import checks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_three_layers_learn(
    demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(demo.digits, "mnist_data", lambda: mnist)
    options = ["--model", "mlp3", "--device", "cpu", "--epochs", "3", "--output", str(tmp_path / "p.png")]
    assert program.main(options) == 0
    printed = capsys.readouterr().out
    assert "✗" not in printed
    assert "three layers that one backward pass crosses" in printed
    accuracy = re.search(r"held-out accuracy: ([\d.]+) %", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 85


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right, device = tribp.mlp, torch.device("cpu")
    assert checks.three_layer_gradient_difference(device) < checks.BOUND

    def planted(x: Tensor, *rest: Any) -> Tensor:
        return right(x + 1e-3 * (x - x.detach()), *rest)

    monkeypatch.setattr(checks, "mlp", planted)
    assert checks.three_layer_gradient_difference(device) > checks.BOUND
