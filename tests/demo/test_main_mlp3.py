"""`python -m tribp --model mlp3`: three linear layers, as one `MLP`."""

import copy
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
from tribp.demo.models import MODELS
from tribp.demo.training import Learner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_three_layers_learn(
    demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(demo.digits, "mnist_data", lambda: mnist)
    options = ["--model", "mlp3", "--fused-step", "--device", "cpu", "--epochs", "3"]
    options += ["--output", str(tmp_path / "p.png")]
    assert program.main(options) == 0
    printed = capsys.readouterr().out
    assert "✗" not in printed
    assert "three layers that one backward pass crosses" in printed
    assert "The step is not fused: Triton's kernels do not run here." in printed
    accuracy = re.search(r"held-out accuracy: ([\d.]+) %", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 85


def test_fused_steps_learn_the_same(kernels: str) -> None:
    model = MODELS["mlp"]
    layers = model.network(model.epsilon, torch.Generator().manual_seed(0)).to(kernels)
    ours, separate = (
        Learner(own, tribp.optim.SGD(own.parameters(), lr=1.0), model.loss, 10, fused)
        for own, fused in ((layers, True), (copy.deepcopy(layers), False))
    )
    for _ in range(2):
        images, targets = (torch.rand(8, n, device=kernels) for n in (784, 10))
        found = ours.step(images, targets)
        with tribp.use_backend("torch"):
            torch.testing.assert_close(found, separate.step(images, targets))
    assert ours.fused is not None
    assert ours.fused.reason is None
    for p, q in zip(layers.parameters(), separate.layers.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right, device = tribp.mlp, torch.device("cpu")
    assert checks.three_layer_gradient_difference(device) < checks.BOUND

    def planted(x: Tensor, *rest: Any) -> Tensor:
        return right(x + 1e-3 * (x - x.detach()), *rest)

    monkeypatch.setattr(checks, "mlp", planted)
    assert checks.three_layer_gradient_difference(device) > checks.BOUND
