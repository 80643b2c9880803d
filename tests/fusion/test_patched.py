"""Methods of torch's classes, or of a single layer, that a tool has replaced: before `fuse`, or after it."""

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp import dispatch

from ..processes import forked
from .cases import reasons

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4)
)
NORM = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
METHODS = [
    (EVERYTHING, nn.Linear, "forward"),
    (EVERYTHING, nn.Conv2d, "forward"),
    (EVERYTHING, nn.Conv2d, "_conv_forward"),
    (EVERYTHING, nn.ReLU, "forward"),
    (EVERYTHING, nn.Tanh, "forward"),
    (EVERYTHING, nn.Sequential, "forward"),
    (NORM, nn.BatchNorm2d, "forward"),
]
each_moment = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])


@each_moment
@pytest.mark.parametrize(("model", "kind", "method"), METHODS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_methods_of_classes(
    before: bool, model: nn.Module, kind: type[nn.Module], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tools for LoRA or few bits replace them, for all the layers of a program."""
    ours, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    before or tribp.fuse(ours, fold_batchnorm=True)
    old: Callable[..., Tensor] = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *inputs: old(self, *inputs) + 0.5)
    report = tribp.fuse(ours, fold_batchnorm=True)
    assert torch.equal(ours(x), model(x))
    if before and kind in (nn.Linear, nn.Conv2d):
        assert any("a class that was given another forward" in reason for reason in reasons(report).values())
    monkeypatch.undo()
    tribp.fuse(ours, fold_batchnorm=True)
    torch.testing.assert_close(ours(x), model(x))


FUNCTIONS = [
    (EVERYTHING, F, "linear"), (EVERYTHING, F, "conv2d"), (EVERYTHING, F, "relu"), (EVERYTHING, torch, "tanh"),
    (EVERYTHING, torch, "relu"), (NORM, F, "batch_norm"), (NORM, torch, "batch_norm"),
]  # fmt: skip


@each_moment
@pytest.mark.parametrize(("model", "library", "name"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_functions_that_modules_call(
    before: bool, model: nn.Module, library: Any, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tools that count operations replace them."""
    model, x = copy.deepcopy(model).to(device), torch.randn(2, 3, 8, 8, device=device)
    ours = copy.deepcopy(model)
    before or tribp.fuse(ours, fold_batchnorm=True)
    old: Callable[..., Tensor] = getattr(library, name)
    plain = model(x)
    monkeypatch.setattr(library, name, lambda *arguments, **named: old(*arguments, **named) + 0.5)
    tribp.fuse(ours, fold_batchnorm=True)
    by_kernels = 2e-3 * (dispatch.backend() == "triton")  # whose convolutions take TF32
    torch.testing.assert_close(ours(x), model(x), rtol=0, atol=by_kernels)
    assert not torch.allclose(ours(x), plain, rtol=0, atol=2e-3)
    monkeypatch.undo()
    tribp.fuse(ours, fold_batchnorm=True)
    torch.testing.assert_close(ours(x), plain, rtol=1e-5, atol=by_kernels + 1e-6)


class Calls(nn.Module):
    """Its forward calls activations as functions, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = relu6(self.second(x))
        x = self.third(x).tanh()
        return x


relu6 = F.relu6


@pytest.mark.parametrize(
    ("owner", "name"), [(F, "relu"), (sys.modules[__name__], "relu6"), (Tensor, "tanh")], ids=["F", "global", "method"]
)
def test_functions_that_a_forward_calls(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls()
    ours, x = copy.deepcopy(model), torch.randn(2, 5)
    assert sum(" + " in entry.was for entry in tribp.fuse(ours).replaced) == 3
    torch.testing.assert_close(ours(x), model(x))
    old: Callable[..., Tensor] = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda x: old(x) + 0.5)
    assert torch.equal(ours(x), model(x))
    tribp.unfuse(ours)
    tribp.fuse(ours)
    assert torch.equal(ours(x), model(x))
    if owner is not Tensor:  # a name that is gone
        monkeypatch.delattr(owner, name)
        for m in (model, ours):
            with pytest.raises((AttributeError, NameError), match=name):
                m(x)


def test_methods_that_were_replaced_before_the_import() -> None:
    """A class of another name in torch's place, too, and one whose forward is no function."""
    code = """
        import torch
        from torch import nn
        class MyLinear(nn.Linear):
            def forward(self, x): return super(MyLinear, self).forward(x) + 1
        class Chosen(nn.Module):
            forward = property(lambda self: torch.relu)
        old = nn.Conv2d._conv_forward
        nn.Linear, nn.Chosen, nn.Conv2d._conv_forward = MyLinear, Chosen, lambda *inputs: old(*inputs) + 1
        import tribp
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4), nn.ReLU())
        x = torch.randn(2, 3, 5, 5)
        y = model(x)
        tribp.fuse(model)
        assert torch.equal(model(x), y)
    """
    done = forked("-c", code)
    assert done.returncode == 0, done.stderr


def meets(conv: nn.Conv2d) -> None:
    """As everybody writes it for images whose edges meet."""

    def _conv_forward(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)

    conv._conv_forward = types.MethodType(_conv_forward, conv)  # type: ignore[method-assign]


@each_moment
def test_the_convolution_of_one_layer(before: bool) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    ours, x = copy.deepcopy(model), torch.randn(1, 3, 8, 8)
    meets(model[0])
    before or tribp.fuse(ours)
    meets(ours[0])
    report = tribp.fuse(ours)
    assert torch.equal(ours(x), model(x))
    assert not before or reasons(report) == {"0": "it has a forward of its own"}


@pytest.mark.parametrize(
    ("owner", "name", "reason"),
    [
        (nn.Linear, "forward", "a Linear has hooks, or a forward of its own"),
        (F, "linear", "something else stands in the place of torch's linear"),
        (F, "relu", "something else stands in the place of torch's relu"),
    ],
    ids=["method", "linear", "relu"],
)
def test_a_training_step(owner: Any, name: str, reason: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).to(kernels)
    step = tribp.train_step(model, torch.optim.SGD(model.parameters()), "mse_loss")
    batch = torch.randn(6, 5, device=kernels), torch.randn(6, 3, device=kernels)
    reasons = []
    for _ in range(2):
        step(*batch)
        reasons.append(step.reason)
    old: Callable[..., Tensor] = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **named: old(*arguments, **named) + 0.5)
    expected = F.mse_loss(model(batch[0]), batch[1])
    torch.testing.assert_close(step(*batch), expected.detach())
    assert [*reasons, step.reason] == [None, None, reason]
