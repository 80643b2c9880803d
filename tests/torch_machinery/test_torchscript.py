"""`torch.jit.script` of tribp's modules: like `torch.jit.trace` it keeps torch's own operations."""

import io
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tribp

from ..conv3x3.cases import ieee as ieee

pytestmark = [
    pytest.mark.usefixtures("ieee"),  # torch's own convolutions round to TF32 on a GPU alone
    pytest.mark.filterwarnings("ignore"),  # torch says that TorchScript is deprecated
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch has no TorchScript on Python 3.14"),
]


def fused() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Sigmoid(), nn.Flatten(1), nn.Linear(36, 10), nn.Sigmoid())
    assert len(tribp.fuse(model).replaced) == 3
    return model


IMAGE = (2, 3, 5, 6)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: tribp.nn.LinearSigmoid(5, 4), (2, 5)),
    "linear without bias": (lambda: tribp.nn.LinearSigmoid(5, 4, bias=False), (2, 3, 5)),
    "conv": (lambda: tribp.nn.Conv3x3(3, 4, 2, 1), IMAGE),
    "conv with sigmoid": (lambda: tribp.nn.Conv3x3(3, 6, (2, 1), "valid", 3, activation="sigmoid"), IMAGE),
    "padded conv": (lambda: tribp.nn.Conv3x3(3, 4, 1, (2, 1), bias=False, padding_mode="reflect"), IMAGE[1:]),
    "model": (fused, IMAGE),
}


@pytest.mark.parametrize("name", MODULES)
def test_script(name: str, device: str) -> None:
    make, size = MODULES[name]
    module, x = make().to(device), torch.randn(size, device=device)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    y = scripted(x)
    torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in scripted.parameters())
