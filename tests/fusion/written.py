"""Models whose forward is written into a file, since it is its source that `fuse` reads; and what tests ask of them."""

import copy
import importlib.util
import itertools
import pickle
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tribp
from tribp.fusion import Report

from .cases import changed

HEAD = """
import contextlib
import functools
import torch
import torch.nn.functional as F
import torch.nn.functional as _
from torch import nn
from torch.nn.functional import leaky_relu, relu as rectify
from torch.utils.checkpoint import checkpoint

ACT = F.relu

class Base(nn.Module):
    pass

class Net(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.fc = nn.Linear(6, 6)
        self.act = nn.Sigmoid()
        self.gelu = nn.GELU()
        self.fn = F.relu
        self.flag = True
        self.calls = 0
        self.slope = 0.2
"""
numbers = itertools.count()


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    names = []

    def make(forward: str, more: str = "") -> Any:
        """A Net whose forward has these lines, or is this whole definition; `more` stands behind it in the class."""
        names.append(f"fused_net_{next(numbers)}")
        if "def forward" not in forward:
            forward = "def forward(self, x):\n" + textwrap.indent(textwrap.dedent(forward).strip(), "    ")
        path = tmp_path / f"{names[-1]}.py"
        path.write_text(HEAD + textwrap.indent(forward, "    ") + "\n" + textwrap.indent(textwrap.dedent(more), "    "))
        spec = importlib.util.spec_from_file_location(names[-1], path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[names[-1]] = module
        spec.loader.exec_module(module)
        return module.Net()

    yield make
    for name in names:
        del sys.modules[name]


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients in both modes, with flags set and not."""
    values: list[Tensor] = []
    for training, flag in itertools.product((True, False), repeat=2):
        changed(model.train(training), flag=flag)
        torch.manual_seed(0)
        y = model(x)
        y = y[-1] if isinstance(y, tuple) else y
        values += [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)]
    return [torch.zeros(()) if value is None else value for value in values]


def check(model: Any, x: Tensor | None = None) -> Report:
    """Fuse and unfuse change nothing that can be seen; returns fuse's report."""
    x = torch.randn(3, 2, 6, 6) if x is None else x
    expected, kind, keys = run(model, x), type(model), list(model.state_dict())
    modules, state = list(model.modules()), torch.get_rng_state()
    report = tribp.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == keys
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert all(map(torch.equal, run(other, x), expected))
    assert tribp.fuse(model).replaced == ()
    tribp.unfuse(model)
    assert type(model) is kind
    assert all(map(torch.equal, run(model, x), expected))
    assert tribp.unfuse(model) == Report()
    return report


def same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
