"""Layers and activations that a module's own forward calls: what runs together, and what is skipped."""

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tribp
from tribp.fusion import Replaced, Report

from .cases import WAYS, Called, FunctionalLeNet, TorchvisionBlock, changed, image
from .written import check
from .written import net as net

pytestmark = pytest.mark.usefixtures("one_thread")

# What forward does, and which layers are taken with an activation.
TAKEN = {
    "module": ("return self.act(self.conv(x))", "conv"),
    "function": ("return F.relu(self.conv(x))", "conv"),
    "torch's": ("return torch.sigmoid(self.conv(x))", "conv"),
    "whole name": ("return torch.nn.functional.relu6(self.conv(x))", "conv"),
    "underscore": ("return _.relu(self.conv(x))", "conv"),
    "imported": ("return leaky_relu(self.conv(x))", "conv"),
    "method": ("return self.conv(x).relu()", "conv"),
    "method in place": ("return self.conv(x).tanh_()", "conv"),
    "function in place": ("return F.relu_(self.conv(x))", "conv"),
    "in place": ("return F.relu(self.conv(x), inplace=True)", "conv"),
    "numbers": ("return F.leaky_relu(self.fc(x), 0.2, True)", "fc"),
    "named numbers": ("return F.hardtanh(self.fc(x), max_val=0.3, min_val=-0.25)", "fc"),
    "two": ("return self.act(self.fc(self.act(self.conv(x))))", "conv fc"),
    "lines": ("x = self.conv(x)\nx = F.relu(x)\nreturn x", "conv"),
    "lines with another name": ("y = self.conv(x)\nz = F.relu(y)\nreturn z + x", "conv"),
    "lines to return": ("x = self.conv(x)\nreturn self.act(x)", "conv"),
    "lines, inside": ("x = self.conv(x)\nx = x.relu() + 1\nreturn x", "conv"),
    "branch": ("if self.flag:\n    return F.relu(self.conv(x))\nreturn x * self.fc.weight.sum()", "conv"),
    "branch on data": (
        "x = torch.tanh(self.fc(x))\nif x.sum() > 0:\n    x = -x\nreturn self.act(self.conv(x))",
        "fc conv",
    ),
    "counter": ("self.calls += 1\nreturn self.act(self.conv(x)) * self.calls.bit_length().__class__(2)", "conv"),
    "mode": ("x = F.dropout(F.relu(self.conv(x)), 0.5, self.training)\nreturn x * self.slope", "conv"),
    "loop": ("for _ in range(3):\n    x = self.act(self.conv(x))\nreturn x", "conv"),
    "twice": ("return F.relu(self.conv(F.relu(self.conv(x))))", "conv"),
    "twice, with two forms": ("y = self.act(self.conv(x))\nx = self.conv(x)\nreturn torch.sigmoid(x) + y", "conv"),
    "also used alone": ("x = self.act(self.conv(x))\nreturn self.act(x * 2)", "conv"),
    "the weight is read": ("x = x.to(self.conv.weight.dtype)\nreturn self.act(self.conv(x))", "conv"),
    "arguments": ("def forward(this, x, *more, scale=2.0, **others):\n    return scale * F.relu(this.conv(x))", "conv"),
    "super": ("y = super().extra_repr()\nreturn self.act(self.conv(x)) * len(__class__.__name__ + y)", "conv"),
    "private": ("self.__n = 2\nreturn self.act(self.conv(x)) * self.__n", "conv"),
    "inner function": (
        "def inner(x):\n    return F.relu(self.conv(x))\nreturn checkpoint(inner, x, use_reentrant=False)",
        "conv",
    ),
    "one of two": ("return F.relu(self.conv(x)) + self.conv(x)", "conv"),
    "two activations": ("return F.relu(self.conv(x)) + self.act(self.conv(x))", "conv"),
    "two numbers": ("return F.leaky_relu(self.conv(x)) + F.leaky_relu(self.conv(x), 0.2)", "conv"),
    "another name": ("y = F.relu(self.conv(x))\nself_ = self\nreturn y + self_.conv(x)", "conv"),
    "passed on": ("y = F.relu(self.conv(x))\nreturn y + checkpoint(self.conv, x, use_reentrant=False)", "conv"),
    "forward of it": ("return F.relu(self.conv(x)) + self.conv.forward(x)", "conv"),
    "getattr": ("return F.relu(self.conv(x)) + getattr(self, 'co' + 'nv')(x)", "conv"),
    "children": ("return F.relu(self.conv(x)) + next(self.children())(x)", "conv"),
    "_modules": ("return F.relu(self.conv(x)) + self._modules['co' + 'nv'](x)", "conv"),
    "self is another": ("y = self\nself = y\nreturn F.relu(self.conv(x))", "conv"),
    "global": ("global y\ny = F.relu(self.conv(x))\nz = F.relu(y)\nreturn z", "conv"),
    "an empty line": ("y = self.conv(x)\n\n# and then\ny = y.relu()\nreturn y", "conv"),
    "three lines": ("y = self.conv(x)\ny = F.relu(y)\ny = self.fc(y)\ny = F.relu(y)\nreturn y", "conv fc"),
    "what is between": ("return F.relu(self.fc(self.gelu(F.relu(self.conv(x)))))", "conv fc"),
    "in an input": ("return F.relu(self.conv(x + F.relu(self.fc(x)) + self.act(self.fc(x))))", "conv fc"),
    "a tuple": ("y, z = F.relu(self.conv(x)), self.act(self.fc(x))\nreturn y + z", "conv fc"),
    "yields": ("def some():\n    yield F.relu(self.conv(x))\nreturn next(some())", "conv"),
    "its own class": (
        "Net.total = getattr(Net, 'total', 0) + 1\nreturn F.relu(self.conv(x)) * (type(self) is not Base)",
        "conv",
    ),
    "annotated variable": ("y: torch.Tensor = self.conv(x)\ny = F.relu(y)\nreturn y", "conv"),
    "arguments of others": ("return F.relu(self.fc(F.gelu(F.relu(self.conv(x)), approximate='tanh')))", "conv fc"),
    "softmax in between": ("return F.relu(self.fc(F.softmax(F.relu(self.conv(x)), dim=1)))", "conv fc"),
    "its own method before": (
        "def forward(self, x):\n    x = self.half(x)\n    x = F.relu(self.conv(x))\n    return x\n"
        "def half(self, x):\n    return x / 2",
        "conv",
    ),
    "a function in an attribute, in between": ("return F.relu(self.fc(self.fn(F.relu(self.conv(x)))))", "conv fc"),
    "nothing but functions before": ("return F.relu(self.conv(F.relu(self.fn(x))))", "conv"),
    "first of two": ("y = self.conv(x)\nreturn F.relu(y) + x.mul(2)", "conv"),
    "annotated": (
        "def forward(self, x: 'Missing') -> 'Missing':\n    '''Say.'''\n    return F.relu(self.conv(x))",
        "conv",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(net: Callable[..., Any], case: str) -> None:
    forward, layers = TAKEN[case]
    report = check(net(forward))
    assert report.skipped == ()
    assert [entry.name for entry in report.replaced if " + " in entry.was] == sorted(layers.split(), key="conv fc".find)
    model = net(forward)
    tribp.fuse(model)
    with Called() as called, torch.no_grad():
        model(torch.randn(3, 2, 6, 6))
    assert len([act for act in called.activations if act]) >= len(layers.split())


def test_layers_in_a_row(net: Callable[..., Any]) -> None:
    """One `mlp`; and where the same layers stand in a longer row and in a shorter one."""
    model = net(
        """
        y = F.relu(self.fc(x))
        y = F.relu(self.second(y))
        return self.third(y) + F.relu(self.fc(F.relu(self.second(x))))
        """
    )
    model.second, model.third = nn.Linear(6, 6), nn.Linear(6, 6)
    report = check(model)
    assert [str(entry) for entry in report.replaced] == [
        "(the model): Net -> fused Net",
        "conv: Conv2d -> conv3x3",
        "fc: Linear + ReLU -> mlp",
        "second: Linear + ReLU -> mlp",
        "third: Linear -> mlp",
    ]
    tribp.fuse(model)
    with Called() as called:
        model(torch.randn(3, 2, 6, 6))
    assert called.names == ["mlp", "mlp"]


# What forward does, and why the convolution is taken alone; None where no activation is behind it.
ALONE = {
    "another module": ("return self.gelu(self.conv(x))", "tribp computes no GELU"),
    "nothing": ("return self.act(self.gelu(self.conv(x)))", "tribp computes no GELU"),
    "an attribute": ("return self.fn(self.conv(x))", None),
    "a setting": ("return ACT(self.conv(x))", None),
    "renamed": ("return rectify(self.conv(x))", None),
    "a local": ("F = torch\nreturn F.relu(self.conv(x))", None),
    "an import": ("import torch as F\nreturn F.relu(self.conv(x))", None),
    "in a with": (
        "with torch.no_grad():\n    y = self.conv(x)\nreturn F.relu(y) + self.conv(x)",
        "Net.forward may do something else",
    ),
    "used after": (
        "y = self.conv(x)\nreturn F.relu(y) + y",
        "Net.forward may do something else with what conv returns",
    ),
    "used later": ("y = self.conv(x)\nz = F.relu(y)\nreturn y + z", "Net.forward may do something else with what"),
    "used before": ("y = self.conv(x)\nz = y * 2\nz = z + F.relu(y)\nreturn z", "Net.forward may do something else"),
    "in place": ("y = self.conv(x)\nself.act(y)\nreturn F.relu_(y)", "Net.forward may do something else with"),
    "on one path": (
        "y = self.conv(x)\nif self.flag:\n    y = F.relu(y)\nreturn y",
        "Net.forward may do something else",
    ),
    "not first": ("y = self.conv(x)\nreturn x.mul(2) + F.relu(y)", "Net.forward may do something else"),
    "not always": (
        "y = self.conv(x)\nz = F.relu(y) if self.flag else x * self.conv.weight.sum()\nreturn z",
        "Net.forward may do something else",
    ),
    "suppressed": (
        "with contextlib.suppress(TypeError):\n    y = self.conv(x)\n    y = F.relu(y)\nreturn y",
        "Net.forward may do something else",
    ),
    "locals": ("y = self.conv(x)\nz = F.relu(y)\nreturn z + locals()['y']", "Net.forward may do something else"),
    "variables of a class": (
        "class Inner:\n    y = self.conv(x)\n    z = F.relu(y)\nreturn Inner.y + Inner.z",
        "Net.forward may do something else",
    ),
    "a lambda later": (
        "x = self.conv(x)\nf = lambda: F.relu(x)\nx = x + 1\nreturn f()",
        "Net.forward may do something",
    ),
    "its own x": (
        "y = self.conv(x)\nf = lambda y: F.relu(y)\nreturn f(x * self.conv.weight.sum())",
        "Net.forward may do",
    ),
    "a comprehension": ("y = self.conv(x)\ny = [F.relu(y) for _ in '12']\nreturn y[0] + y[1]", "Net.forward may do"),
    "try": ("try:\n    y = self.conv(x)\n    return F.relu(y)\nfinally:\n    y = None", "Net.forward may do something"),
    "nonlocal": (
        "y = self.conv(x)\nz = F.relu(y)\ndef f():\n    return y\nreturn z + f()",
        "Net.forward may do something",
    ),
    "a closure": (
        "f = lambda: x\nx = self.conv(x)\nx = F.relu(x) + f()\nreturn x",
        "Net.forward may do something else",
    ),
    "a number in a variable": (
        "return F.leaky_relu(self.conv(x), self.slope)",
        "the arguments of F.leaky_relu(_, self",
    ),
    "in place by a flag": ("return F.relu(self.conv(x), self.flag)", "the arguments of F.relu(_, self.flag) are not"),
    "a negative slope": (
        "return F.leaky_relu(self.conv(x), -0.2)",
        "the LeakyReLU at conv: negative_slope of leaky_relu",
    ),
    "a low threshold": ("return F.softplus(self.conv(x), 1, 5)", "the Softplus at conv: beta of softplus must be"),
    "bounds": ("return F.hardtanh(self.conv(x), 1, 1)", "F.hardtanh(_, 1, 1) has bounds in the wrong order"),
    "global": ("global y\ny = self.conv(x)\nz = F.relu(y)\nreturn z", "Net.forward may do something else"),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_is_skipped(net: Callable[..., Any], case: str) -> None:
    forward, reason = ALONE[case]
    report = check(net(forward))
    assert report.replaced == (Replaced("conv", "Conv2d", "conv3x3"),)
    for skipped in report.skipped:
        assert reason
        assert skipped.reason.startswith(reason)
    assert len(report.skipped) == (reason is not None)


# What a class does with a linear layer, and why it is not known what is behind that; None where nothing is lost.
UNREAD = {
    "two in a line": ("h = self.fc(x); y = F.relu(h); return h + y", "Net.forward may do something else with"),
    "on both paths": (
        "h = self.fc(x); return F.relu(h) if self.flag else F.relu(h) * 2", "Net.forward may do something else with"
    ),
    "set again in a line": ("h = self.fc(x); h = x + h; return F.relu(h)", None),
    "set by a comprehension": ("h = self.fc(x)\nh = [F.relu(h) for h in [h]]\nreturn h[0]", "Net.forward may do"),
    "set by with": ("h = self.fc(x)\nwith contextlib.nullcontext(h) as h:\n    return F.relu(h)", "what contextlib.n"),
    "an attribute": ("return self.fn(self.fc(x))", "what self.fn(_) in Net.forward does with its output is not known"),
    "a setting": ("return ACT(self.fc(x))", "what ACT(_) in Net.forward does"),
    "renamed": ("return rectify(self.fc(x))", "what rectify(_) in Net.forward does"),
    "a local": ("relu = torch.relu\nreturn relu(self.fc(x))", "what relu(_) in Net.forward does"),
    "a local in the next line": ("relu = torch.relu\nx = self.fc(x)\nreturn relu(x)", "what relu(_) in Net.forward"),
    "its own method": (
        "def forward(self, x):\n    return self.half(self.fc(x))\ndef half(self, x):\n    return F.relu(x) / 2",
        "what self.half(_) in Net.forward does",
    ),
    "by its name": ("return F.relu(self.fc(input=x))", "Net.forward uses it in another way than to call it with one"),
    "more arguments": ("return F.relu(self.fc(*[x]))", "Net.forward uses it in another way than to call it with one"),
    "passed on": ("return F.relu(checkpoint(self.fc, x, use_reentrant=False))", "Net.forward uses it in another way"),
    "in another method": (
        "def forward(self, x):\n    return self.block(x)\ndef block(self, x):\n    return F.relu(self.fc(x))",
        "Net.block uses it, and only forward is read",
    ),
    "a list from behind": (
        "for layer in reversed(self.layers):\n    x = F.relu(layer(x))\nreturn x", "Net.forward uses it in another way"
    ),
    "its weight": ("return F.relu(F.linear(x, self.fc.weight))", None),
    "torch's function": ("return F.normalize(self.fc(x))", None),
    "Python's function": ("return sum(self.fc(x))", None),
    "a method of the output": ("return self.fc(x).clamp(min=0)", None),
    "another module": ("return F.relu(self.norm(self.fc(x)))", None),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_linear_layers_that_are_not_read(net: Callable[..., Any], case: str) -> None:
    """Each has a line in the report if there may be an activation behind it."""
    forward, reason = UNREAD[case]
    model = net(forward)
    del model.conv
    model.norm, model.layers = nn.LayerNorm(6), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    names = ["layers.0", "layers.1"] if "layers" in forward else ["fc"]
    report = check(model, torch.randn(3, 6))
    assert report.replaced == ()
    assert [(skipped.name, skipped.module) for skipped in report.skipped] == [(n, "Linear") for n in names if reason]
    assert all(skipped.reason.startswith(str(reason)) for skipped in report.skipped)


# What forward does with a Sequential of a layer and its activation, which are taken together.
WHOLE = {
    "called": "return self.seq(x)",
    "a loop": "for layer in self.seq:\n    x = layer(x)\nreturn x",
    "two loops": "for layer in self.seq:\n    x = layer(x)\nfor layer in self.seq:\n    x = layer(x)\nreturn x",
    "asked for": "if self.seq is not None:\n    x = self.seq(x)\nreturn self.seq(x) if self.seq else x",
    "the weight is read": "return self.seq(x.to(self.seq[0].weight.dtype))",
    "modes": "self.seq.train(self.training)\nreturn self.seq.forward(x)",
}
# What else, which takes its modules as they are.
APART = {
    "indices": "y = self.seq[0](x)\nreturn self.seq[1](y) - y",
    "called, and an index": "return self.seq(x) + self.seq[0](x)",
    "a slice": "return self.seq[:1](x)",
    "outputs that are kept": "y = []\nfor layer in self.seq:\n    x = layer(x)\n    y.append(x)\nreturn y[0] + y[1]",
    "outputs with numbers": (
        "for n, layer in enumerate(self.seq):\n    x = layer(x)\n    if n == 0:\n        y = x\nreturn x + y"
    ),
    "another input": "y = self.fc(x)\nfor layer in self.seq:\n    x = layer(y)\nreturn x",
    "what a loop leaves": "for layer in self.seq:\n    x = layer(x)\nreturn x + layer(x - 1)",
    "what a loop leaves, later": "for layer in self.seq:\n    x = layer(x)\nreturn x + (lambda: layer)()(x - 1)",
    "a closure": "f = lambda: layer(x)\nfor layer in self.seq:\n    x = layer(x)\nreturn x + f()",
    "another Sequential": "return nn.Sequential(self.seq[0], nn.Tanh())(x)",
    "a list": "first, second = [*self.seq]\nreturn second(first(x)) + first(x)",
    "another name": "seq = self.seq\nreturn seq[1](seq[0](x)) + seq[0](x)",
    "getattr": "return getattr(self, 'seq')[0](x)",
    "_modules": "return self.seq._modules['0'](x)",
}


@pytest.mark.parametrize("case", [*WHOLE, *APART])
def test_a_sequential_that_forward_uses(net: Callable[..., Any], case: str) -> None:
    model = net((WHOLE | APART)[case])
    model.seq = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    assert check(model).skipped == ()
    tribp.fuse(model)
    with Called() as called:
        model(torch.randn(3, 2, 6, 6))
    whole = case in WHOLE or case.startswith("called")
    assert called.activations == ["relu"] * (len(called.names) if whole else 0)
    assert whole == bool(called.names)


def test_a_loop_over_a_list(net: Callable[..., Any]) -> None:
    model = net("for layer in self.layers:\n    x = layer(x)\nreturn x")
    model.layers = nn.ModuleList([nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)])
    report = check(model)
    assert [str(entry) for entry in report.replaced][2:] == [
        "layers.0: Linear + ReLU -> mlp", "layers.2: Linear + ReLU -> mlp", "layers.4: Linear -> mlp"
    ]  # fmt: skip
    assert report.skipped == ()


# What forward calls of lists, and how often tribp's functions run then.
OF_LISTS = {
    "loop": ("for layer in self.layers:\n    x = F.relu(layer(x))\nreturn x", 3),
    "lines in a loop": ("for layer in self.layers:\n    x = layer(x)\n    x = F.relu(x)\nreturn x", 3),
    "slice": ("for layer in self.layers[:-1]:\n    x = F.relu(layer(x))\nreturn self.layers[-1](x)", 2),
    "numbers": (
        "for i, layer in enumerate(self.layers):\n    x = layer(x) if i == 2 else self.act(layer(x))\nreturn x", 2
    ),
    "two lists": ("for layer, act in zip(self.layers, self.acts):\n    x = act(layer(x))\nreturn x", 2),
    "comprehension": ("return sum([F.relu(layer(x)) for layer in self.layers])", 3),
    "index": ("return self.layers[1](F.relu(self.layers[0](x)))", 1),
    "index that is computed": (
        "for i in range(3):\n    x = self.acts[i](self.layers[2 - i](x))\nreturn x", 2
    ),
    "dictionary": ("return self.named['act'](self.named['fc'](x))", 1),
    "another in between": (
        "y = self.fc(x)\nfor layer in self.layers:\n    layer = self.gelu\n    x = F.relu(layer(x))\nreturn x + y", 0
    ),
    "one of a Sequential": ("return F.relu(self.seq[0](x)) + self.seq(x)", 2),
    "index with an effect": (
        "rest = [0, 1, 2]\nreturn self.layers[rest.pop()](torch.relu(self.layers[rest.pop()](x)))", 0
    ),
    "walrus": ("i = 0\ny = self.layers[i](x * (i := 1))\nreturn F.relu(y)", 0),
    "in a try": (
        "try:\n    for layer in self.layers:\n        x = layer(x)\nfinally:\n    pass\nreturn x", 0
    ),
    "any attribute": ("for layer in self.parts:\n    x = F.relu(layer(x))\nreturn x", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_LISTS)
def test_lists(net: Callable[..., Any], case: str) -> None:
    forward, calls = OF_LISTS[case]
    model = net(forward)
    model.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    model.acts = nn.ModuleList([nn.Tanh(), nn.GELU(), nn.Tanh()])
    model.named = nn.ModuleDict({"fc": nn.Linear(6, 6), "act": nn.ReLU()})
    model.seq = nn.Sequential(nn.Linear(6, 6), nn.Softplus())
    model.parts = list(model.layers)
    check(model)
    tribp.fuse(model)
    with Called() as called, torch.no_grad():
        model(torch.randn(3, 2, 6, 6))
    assert len(called.names) == calls


def test_what_is_set_later_counts(net: Callable[..., Any]) -> None:
    """Nothing of forward is fixed but the activations that are taken."""
    model = net(
        """
        x = self.act(self.conv(x))
        if self.flag:
            x = F.dropout(x, self.slope, self.training)
        return self.gelu(x)
        """
    )
    plain = copy.deepcopy(model)
    tribp.fuse(model)
    x = torch.randn(2, 2, 5, 5)
    changes = {"flag": False, "slope": 0.7, "gelu": nn.Tanh(), "training": False}
    for name, value in [("flag", True), *changes.items()]:
        values = []
        for m in (model, plain):
            torch.manual_seed(0)
            values.append(changed(m, **{name: value})(x))
        assert torch.equal(*values)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", WAYS)
def test_torch_around_a_fused_forward(how: str) -> None:
    """None of them reads the forward that applies the activations a second time: those of a sigmoid would be seen."""
    torch.compiler.reset()
    model, x = FunctionalLeNet().eval().requires_grad_(False), image()
    y = model(x)
    assert len(tribp.fuse(model).replaced) == 6
    torch.testing.assert_close(WAYS[how](model, x)(x), y)


def test_compiled_before_fuse() -> None:
    """The wrapper notices, and compiles again."""
    torch.compiler.reset()
    model, x = FunctionalLeNet().eval().requires_grad_(False), image()
    wrapped: Any = torch.compile(model, backend="eager")
    y = wrapped(x)
    for change in (tribp.fuse, tribp.unfuse):
        assert change(wrapped).replaced
        torch.testing.assert_close(wrapped(x), y)


def test_batch_norm_between() -> None:
    model = TorchvisionBlock(2, 2, 1).eval()
    assert tribp.fuse(model) == Report(tuple(Replaced(f"conv{i}", "Conv2d", "conv3x3") for i in (1, 2)))
    assert type(model) is TorchvisionBlock


def test_warnings_of_a_users_file_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python, when it compiled the file."""
    body = "def forward(self, x):\n        return torch.relu(self.fc(x))"
    text = f"""import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)
    {body}
def other(n): return n is 1
"""
    (tmp_path / "net_that_warns.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = importlib.import_module("net_that_warns").Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tribp.fuse(model).replaced
