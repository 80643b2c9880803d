"""A model that torch trains is trained after `fuse`, too, where code changes the output of an activation in place."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tribp

from .cases import MODELS, WAYS, Called, hooked, image
from .written import net as net

pytestmark = pytest.mark.usefixtures("one_thread", "interpreter")

KEPT = "where no gradient is wanted: what follows may change the output in place"
# Of these torch's backward needs the input; of the others the output, which then nothing may change.
INPUT_KEPT: list[Callable[[], nn.Module]] = [
    nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Hardsigmoid, nn.Hardtanh, nn.ReLU6,
    lambda: nn.Hardsigmoid(inplace=True), lambda: nn.Hardtanh(inplace=True), lambda: nn.ReLU6(inplace=True),
]  # fmt: skip
OUTPUT_KEPT: list[Callable[[], nn.Module]] = [
    nn.Sigmoid, nn.Tanh, nn.ReLU,
    lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(inplace=True), lambda: nn.ELU(inplace=True),
]  # fmt: skip


class Adds(nn.Module):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x


def grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def assert_trains(model: nn.Module, x: Tensor) -> list[object]:
    """With torch's gradients; returns the activations that ran with a layer in training."""
    model, x = model.double(), x.double()
    plain = copy.deepcopy(model)
    tribp.fuse(model)
    with Called() as called:
        found = grads(model, x)
    torch.testing.assert_close(found, grads(plain, x))
    with torch.no_grad():
        torch.manual_seed(0)
        y = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, plain(x))
    return [activation for activation in called.activations if activation]


@pytest.mark.parametrize("make", INPUT_KEPT, ids=lambda make: str(make()))
def test_an_activation_of_which_torch_keeps_the_input(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 4), make(), nn.Dropout(0.5, inplace=True))
    report = tribp.fuse(copy.deepcopy(model))
    kind = type(model[1]).__name__
    assert [entry.now for entry in report.replaced][1:] == ["mlp", f"mlp, with the {kind} {KEPT}"]
    assert len(assert_trains(model, torch.randn(3, 4))) == 1


@pytest.mark.parametrize("make", OUTPUT_KEPT, ids=lambda make: str(make()))
def test_an_activation_of_which_torch_keeps_the_output(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(), Adds())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(model, torch.randn(3, 4))
    (_, pair) = tribp.fuse(model).replaced
    assert pair.now == "linear"


# What stands behind the activation, and whether the activation is computed with the layer in training.
BEHIND: dict[str, tuple[Callable[[], list[nn.Module]], bool]] = {
    "nothing": (list, False),
    "a layer": (lambda: [nn.Conv2d(3, 2, 1)], True),
    "a pool": (lambda: [nn.MaxPool2d(2)], True),
    "a norm": (lambda: [nn.BatchNorm2d(3)], True),
    "an activation": (lambda: [nn.GELU()], True),
    "an activation in place": (lambda: [nn.ELU(inplace=True)], False),
    "a view": (lambda: [nn.Flatten(), nn.ReLU(inplace=True)], False),
    "a view that a layer reads": (lambda: [nn.Flatten(), nn.Dropout(0.0), nn.Linear(48, 2)], True),
    "the same value": (lambda: [nn.Identity(), nn.Dropout(0.0, inplace=True)], False),
    "a Sequential": (lambda: [nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, 4))], False),
    "another module": (lambda: [Adds()], False),
    "a hook": (lambda: [hooked(nn.MaxPool2d(2))], False),
}


@pytest.mark.parametrize("case", BEHIND)
@pytest.mark.parametrize("inner", [False, True], ids=["beside", "in a Sequential"])
def test_what_is_behind_in_a_sequential(case: str, inner: bool) -> None:
    make, taken = BEHIND[case]
    pair = [nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU()]
    model = nn.Sequential(*([nn.Sequential(*pair)] if inner else pair), *make())
    report = tribp.fuse(copy.deepcopy(model))
    (now,) = (entry.now for entry in report.replaced if entry.was == "Conv2d + LeakyReLU")
    assert now == "conv3x3" + ("" if taken else f", with the LeakyReLU {KEPT}")
    assert assert_trains(model, torch.randn(2, 2, 4, 4)) == ["leaky_relu"] * taken


def test_a_module_that_is_inserted_later() -> None:
    """Decided in each call."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 4))
    tribp.fuse(model)
    model.insert(2, nn.Dropout(0.5, inplace=True))
    assert assert_trains(model, torch.randn(3, 4)) == []


# What forward does, and how often an activation is computed with a layer in training.
FORWARDS = {
    "adds": ("y = self.leaky(self.conv(x))\ny += x\nreturn y", 0),
    "adds later": ("y = self.leaky(self.conv(x))\nz = y * 2\ny += x\nreturn y + z", 0),
    "a method": ("return F.elu(self.conv(x)).mul_(2)", 0),
    "a method of a view": ("return F.elu(self.conv(x)).flatten(1).mul_(2)", 0),
    "a method in the next line": ("y = F.softplus(self.conv(x))\ny.add_(x)\nreturn y", 0),
    "a function": ("return F.dropout(F.hardtanh(self.conv(x)), 0.5, True, inplace=True)", 0),
    "a function in place": ("return torch.relu_(F.hardsigmoid(self.conv(x)))", 0),
    "in place by its arguments": ("return F.relu(F.relu6(self.conv(x)), True)", 0),
    "another module": ("return self.drop(self.leaky(self.conv(x)))", 0),
    "another module in the next line": ("x = self.leaky(self.conv(x))\nx = self.drop(x)\nreturn x", 0),
    "an element": ("y = self.leaky(self.conv(x))\ny[0] = 1\nreturn y", 0),
    "a helper": ("return self.more(self.leaky(self.conv(x)))", 0),
    "another name": ("y = z = self.leaky(self.conv(x))\nz += 1\nreturn y", 0),
    "an attribute": ("self.y = self.leaky(self.conv(x))\nself.y += 1\nreturn self.y", 0),
    "another argument": ("y = self.leaky(self.conv(x))\nreturn F.conv2d(x, y)", 0),
    "a plus": ("y = +self.leaky(self.conv(x))\ny += x\nreturn y", 0),
    "returned": ("return self.leaky(self.conv(x))", 0),
    "of a Sequential": ("y = self.seq(x)\ny += x\nreturn y", 0),
    "a sum": ("return x + self.leaky(self.conv(x))", 1),
    "a sum in the next line": ("y = self.leaky(self.conv(x))\nreturn y + x", 1),
    "read twice": ("y = self.leaky(self.conv(x))\nz = y * 2\nreturn F.max_pool2d(y, 2).sum() + z", 1),
    "a layer": ("return self.fc(self.leaky(self.conv(x)))", 1),
    "a layer in the next line": ("x = self.leaky(self.conv(x))\nx = self.fc(x)\nreturn x", 1),
    "a pool": ("x = self.leaky(self.conv(x))\nx = F.max_pool2d(x, 2)\nreturn x", 1),
    "a layer behind a Sequential": ("return self.fc(self.seq(x))", 1),
    "two layers": ("return self.conv(F.leaky_relu(self.fc(F.leaky_relu(self.conv(x)))))", 2),
    "in place": ("return F.leaky_relu(self.conv(x), inplace=True)", 1),
    "in place by its name": ("return F.elu_(self.conv(x))", 1),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_what_a_forward_does_with_the_output(net: Callable[..., Any], case: str) -> None:
    forward, taken = FORWARDS[case]
    model = net(forward, "def more(self, x):\n    x += 1\n    return x\n")
    model.leaky, model.drop = nn.LeakyReLU(), nn.Dropout(0.5, inplace=True)
    model.seq = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Softplus())
    for layer in {"conv", "fc", "seq"} - {word for word in ("conv", "fc", "seq") if f"self.{word}(" in forward}:
        delattr(model, layer)
    (*_, last) = (entry for entry in tribp.fuse(copy.deepcopy(model)).replaced if " + " in entry.was)
    assert last.now.endswith(KEPT) == (not taken)
    assert len(assert_trains(model, torch.randn(2, 2, 6, 6))) == taken


# How many activations a model's layers are computed with in training; that of a row counts once.
ACTIVATIONS = {
    "lenet": 3, "resnet": 0, "nested": 11, "vgg": 15, "resnet18": 0, "functional_lenet": 4, "unet": 10,
}  # fmt: skip


def test_a_bias_alone_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(), nn.Dropout(1.0, inplace=True)).double()
    model[0].weight.requires_grad_(False)
    tribp.fuse(model)
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(model[0].bias.grad, torch.zeros(4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", ["adds", "a pool", "a layer in the next line"])
def test_torch_around_it(net: Callable[..., Any], case: str, how: str) -> None:
    torch.compiler.reset()
    model, x = net(FORWARDS[case][0]).double(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    model.leaky = nn.LeakyReLU()
    for layer in {"conv", "fc"} - {word for word in ("conv", "fc") if f"self.{word}(" in FORWARDS[case][0]}:
        delattr(model, layer)
    expected = grads(copy.deepcopy(model), x)
    tribp.fuse(model)
    torch.testing.assert_close(grads(WAYS[how](model, x), x), expected)


def test_frozen_layers_run_with_their_activation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU()).requires_grad_(False)
    tribp.fuse(model)
    x = torch.randn(3, 4)
    for needs, activations in ((False, ["leaky_relu"]), (True, [])):
        with Called() as called:
            model(x.requires_grad_(needs))
        assert called.activations == activations


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    assert len(assert_trains(MODELS[name](), image())) == ACTIVATIONS[name]
