"""Layers and activations that a module's own forward calls: what is taken and what is left, and that all else stays.

Each forward is written into a file of its own, since it is its source that `fuse` reads.
"""

import copy
import gc
import importlib.util
import inspect
import io
import itertools
import linecache
import pickle
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tribp
from tribp.fusion import Left, Replaced, Report

from .cases import Called, FunctionalLeNet, TorchvisionBlock, changed, done_to_both, hooked, image, reasons

pytestmark = pytest.mark.usefixtures("one_thread")

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
    assert report.left == ()
    assert [entry.name for entry in report.replaced if " + " in entry.was] == sorted(layers.split(), key="conv fc".find)
    model = net(forward)
    tribp.fuse(model)
    with Called() as called:
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
        "(the model): Net → fused Net",
        "conv: Conv2d → conv3x3",
        "fc: Linear + ReLU → mlp",
        "second: Linear + ReLU → mlp",
        "third: Linear → mlp",
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
def test_what_is_left(net: Callable[..., Any], case: str) -> None:
    forward, reason = ALONE[case]
    report = check(net(forward))
    assert report.replaced == (Replaced("conv", "Conv2d", "conv3x3"),)
    for left in report.left:
        assert reason
        assert left.reason.startswith(reason)
    assert len(report.left) == (reason is not None)


# Methods beside forward, whose line is `return F.relu(self.conv(x))`.
BESIDE = {
    "calls": "def other(self, x):\n    return self.conv(x)",
    "names": "def other(self, x):\n    return getattr(self, 'conv')(x)",
    "property": "@property\ndef first(self):\n    return self.conv",
    "decorated": "@torch.no_grad()\ndef other(self, x):\n    return self.conv(x)",
    "cached property": "@functools.cached_property\ndef first(self):\n    return self.conv",
    "function of init": (
        "def __init__(self):\n    Base.__init__(self)\n"
        "    self.conv = nn.Conv2d(2, 2, 3)\n    self.later = lambda: self.conv"
    ),
    "getattr": "def __getattr__(self, name):\n    return super().__getattr__(name)",
}


@pytest.mark.parametrize("case", BESIDE)
def test_other_methods(net: Callable[..., Any], case: str) -> None:
    """They find the layers as they were."""
    model, x = net("return F.relu(self.conv(x))", BESIDE[case]), torch.randn(2, 2, 5, 5)
    expected = model(x), model.conv(x)
    assert tribp.fuse(model) == Report(
        (Replaced("", "Net", "fused Net"), Replaced("conv", "Conv2d + ReLU", "conv3x3")), ()
    )
    assert same((model(x), model.conv(x)), expected)
    for name in ("other", "first", "later"):
        if hasattr(model, name):
            found = getattr(model, name)
            found = found if isinstance(found, nn.Module) else found(x) if name == "other" else found()
            assert torch.equal(found if isinstance(found, Tensor) else found(x), expected[1])


@pytest.mark.parametrize("name", ["__reduce__", "__deepcopy__", "__init_subclass__"])
def test_classes_from_which_none_can_be_derived(net: Callable[..., Any], name: str) -> None:
    model = net("return F.relu(self.conv(x))", f"def {name}(self, *args):\n    return super().{name}(*args)")
    report = tribp.fuse(model)
    assert report.replaced == (Replaced("conv", "Conv2d", "conv3x3"),)
    assert report.left == (Left("conv", "ReLU", f"Net has a {name} of its own"),)


def test_a_base_whose_forward_is_called(net: Callable[..., Any]) -> None:
    base = type(net("return F.relu(self.conv(x))"))

    class Derived(base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + self.act(self.conv(x))

    model, x = Derived(), torch.randn(2, 2, 5, 5)
    y = model(x)
    assert tribp.fuse(model).left == ()
    assert torch.equal(model(x), y)


def same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


INSTANCES: list[tuple[Callable[[Any], object], str, str]] = [
    (lambda m: hooked(m.act), "act", "the Sigmoid at act has forward hooks"),
    (lambda m: hooked(m.act, "full_backward_hook"), "act", "the Sigmoid at act has backward hooks"),
    (lambda m: hooked(m.conv), "act", "the Conv2d at conv has forward hooks"),
    (lambda m: changed(m, conv=nn.utils.parametrizations.weight_norm(m.conv)), "conv", "it is parametrized"),
    (lambda m: changed(m, forward=type(m).forward.__get__(m)), "act", "the Net around it has a forward of its own"),
    (lambda m: changed(m, act=type("Mine", (nn.Sigmoid,), {})()), "act", "the Sigmoid at act is a subclass of Sigmoid"),
]


@pytest.mark.parametrize(("change", "name", "reason"), INSTANCES, ids=[reason for *_, reason in INSTANCES])
def test_instances_that_are_left(
    net: Callable[..., Any], change: Callable[[Any], object], name: str, reason: str
) -> None:
    model, x = net("return self.act(self.conv(x))"), torch.randn(2, 2, 5, 5)
    change(model)
    y, kind = model(x), type(model)
    left = reasons(tribp.fuse(model))
    assert list(left) == [name]
    assert left[name].startswith(reason)
    assert type(model) is kind
    assert torch.equal(model(x), y)


def test_a_function_stays_a_function(net: Callable[..., Any]) -> None:
    """Where a row falls apart: in place as it was, seen by no hook, traced by torch.fx."""
    model, x = (
        net("y = F.relu(self.fc(x), inplace=True)\nreturn y + torch.sigmoid(self.conv(x))"),
        torch.randn(2, 2, 6, 6),
    )
    plain = copy.deepcopy(model)
    tribp.fuse(model)
    kept: list[list[Tensor]] = [[], []]
    for m, outputs in zip((model, plain), kept, strict=True):
        m.fc.register_forward_hook(lambda m, i, y, outputs=outputs: outputs.append(y))
        m.conv.register_forward_hook(lambda m, i, y, outputs=outputs: outputs.append(y))
    assert torch.equal(model(x), plain(x))
    assert same(*kept)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), plain(x))
    seen: list[list[type]] = []
    for m in (model, plain):
        seen.append([])
        handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen[-1].append(type(m)))
        m(x)
        handle.remove()
    assert len(seen[0]) == len(seen[1])
    assert all(map(issubclass, *seen))
    for m in (model, plain):
        m.fc = nn.Identity()
    assert torch.equal(model(x.clone()), plain(x.clone()))


def test_a_module_that_keeps_what_is_set(net: Callable[..., Any]) -> None:
    more = """
    frozen = False
    def __setattr__(self, name, value):
        if self.frozen:
            raise AttributeError("frozen")
        super().__setattr__(name, value)
    """
    model = net("return F.relu(self.conv(x))", more)
    type(model).frozen = True
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["", "conv"]
    assert [entry.name for entry in tribp.unfuse(model).replaced] == ["", "conv"]


@pytest.mark.parametrize("kind", ["self.__class__", "type(self)"])
def test_a_method_that_asks_for_super_of_its_class(net: Callable[..., Any], kind: str) -> None:
    """Which in a derived class would be the method itself again, without end."""
    more = f"def train(self, mode=True):\n    super({kind}, self).train(mode)\n    return self"
    model = net("return F.relu(self.conv(x))", more)
    assert reasons(tribp.fuse(model)) == {"conv": "Net.train asks for super of self's class"}
    model.eval()


def test_buffers_that_torch_fx_sees(net: Callable[..., Any]) -> None:
    """What layers make of them is traced with their parameters, not kept as a constant."""
    model, x = net("return self.fc(x) + F.relu(self.conv(self.image)) + self.seq(self.image)"), torch.randn(2, 2, 6, 6)
    model.register_buffer("image", torch.randn(2, 2, 6, 6))
    model.seq = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tribp.fuse(model)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(traced(x), model(x))


def test_a_decorated_forward(net: Callable[..., Any]) -> None:
    model = net("@torch.no_grad()\ndef forward(self, x):\n    return F.relu(self.conv(x))")
    assert reasons(tribp.fuse(model)) == {
        "": "what its forward applies to its layers is not known: forward is decorated"
    }


def test_pickles_where_there_is_no_source(net: Callable[..., Any]) -> None:
    model, x = net("return F.relu(self.conv(x))"), torch.randn(2, 2, 5, 5)
    y = model(x)
    tribp.fuse(model)
    data, path = pickle.dumps(model), Path(inspect.getfile(type(model)))
    path.unlink()
    linecache.checkcache(str(path))
    kind: Any = type(model).__mro__[1]
    del model
    gc.collect()
    other: Any = pickle.loads(data)
    assert type(other) is kind
    assert torch.equal(other(x), y)


def test_classes_are_not_kept(net: Callable[..., Any]) -> None:
    model = net("return F.relu(self.conv(x))")
    tribp.fuse(model)
    kinds = [weakref.ref(kind) for kind in type(model).__mro__[:2]]
    del model
    name = next(name for name in sys.modules if name.startswith("fused_net_"))
    vars(sys.modules[name]).clear()
    for _ in range(2):  # what was derived, and what it was derived from
        gc.collect()
    assert [kind() for kind in kinds] == [None, None]


def test_private_names_of_a_function_that_becomes_a_method(net: Callable[..., Any]) -> None:
    model = net("return x")
    module: Any = sys.modules[type(model).__module__]
    path = Path(inspect.getfile(type(model)))
    path.write_text(
        path.read_text() + "\ndef outer(self, x):\n    self.__n = 2\n    return F.relu(self.conv(x)) * self.__n\n"
    )
    spec = importlib.util.spec_from_file_location(module.__name__, path)
    assert spec is not None
    assert spec.loader is not None
    linecache.checkcache(str(path))
    spec.loader.exec_module(module)
    module.Net.forward = module.outer
    check(module.Net())


MEDDLING: dict[str, Callable[[Any], object]] = {
    "another layer": lambda m: changed(m, conv=nn.Conv2d(2, 3, 3)),
    "a layer of another kind": lambda m: changed(m, conv=nn.Conv2d(2, 2, 1)),
    "wrapped": lambda m: changed(m, conv=nn.Sequential(m.conv, nn.Softplus())),
    "another activation": lambda m: changed(m, act=nn.Tanh()),
    "one that tribp does not compute": lambda m: changed(m, act=nn.GELU()),
    "no module": lambda m: vars(m).update(act=m._modules.pop("act").forward),
    "hooked": lambda m: m.conv.register_forward_hook(lambda m, i, y: y + 1),
    "hooked activation": lambda m: m.act.register_forward_hook(lambda m, i, y: y + 1),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    "a property before it": lambda m: vars(m).update(conv=lambda x: -x),
    "an attribute that holds forward": lambda m: changed(m, impl=m.forward),
    "another name": lambda m: changed(m, again=m.conv),
}


@pytest.mark.parametrize("meddle", MEDDLING.values(), ids=MEDDLING)
def test_what_is_done_after_fuse(net: Callable[..., Any], meddle: Callable[[Any], object]) -> None:
    model, x = net("return self.act(self.conv(x))"), torch.randn(2, 2, 5, 5)
    plain = done_to_both(meddle, model)
    assert torch.equal(model(x), plain(x))
    tribp.unfuse(model)
    assert torch.equal(model(x), plain(x))


def test_a_layer_in_forward_and_in_a_sequential(net: Callable[..., Any]) -> None:
    model: Any = nn.ModuleDict({"a": net("return F.relu(self.conv(x))")})
    model["b"] = nn.Sequential(model["a"].conv, nn.Tanh())
    x = torch.randn(2, 2, 5, 5)
    expected = model["a"](x), model["b"](x)
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["a", "a.conv", "b", "b.0"]
    with Called() as called:
        assert same((model["a"](x), model["b"](x)), expected)
    assert called.activations == ["relu", "tanh"]


def test_a_module_whose_layer_another_calls(net: Callable[..., Any]) -> None:
    """A decoder that runs its encoder's layers by hand, say."""
    model = net("x = self.inner.conv(x)\nx = F.linear(x, self.fc.weight)\nreturn self.inner.act(x) + self.inner(x)")
    model.inner = net("return self.act(self.fc(self.act(self.conv(x))))")
    assert check(model).left == ()


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
    assert check(model).left == ()
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
        "layers.0: Linear + ReLU → mlp", "layers.2: Linear + ReLU → mlp", "layers.4: Linear → mlp"
    ]  # fmt: skip
    assert report.left == ()


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
    with Called() as called:
        model(torch.randn(3, 2, 6, 6))
    assert len(called.names) == calls


def test_two_of_one_class(net: Callable[..., Any]) -> None:
    """They stay of one class where the same was taken, and each has its own where not."""
    first = net("return self.act(self.conv(x))")
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    hooked(third.conv)
    model, x = nn.Sequential(first, second, third), torch.randn(2, 2, 5, 5)
    y = model(x)
    tribp.fuse(model)
    assert type(first) is type(second) is not type(third)
    assert torch.equal(model(x), y)


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


def test_source_that_cannot_be_read(net: Callable[..., Any]) -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Net(nn.Module):\n def forward(self, x):\n  return self.fc(x).relu()", space)
    model = space["Net"]()
    model.fc = nn.Linear(2, 2)
    unknown = "what its forward applies to its layers is not known: "
    assert tribp.fuse(model) == Report((), (Left("", "Net", unknown + "its source cannot be read"),))
    model = net("return F.relu(self.conv(x))")
    path = inspect.getfile(type(model))
    Path(path).write_text(Path(path).read_text().replace("F.relu(self.conv(x))", "self.conv(x).relu()  # edited"))
    linecache.checkcache(path)
    report = tribp.fuse(model)
    assert report.left == (Left("", "Net", unknown + "its source is not what runs"),)
    assert report.replaced == (Replaced("conv", "Conv2d", "conv3x3"),)
    model = net("return self.conv(x)")
    type(model).forward = staticmethod(lambda x: x)
    assert reasons(tribp.fuse(model)) == {"": unknown + "forward is no Python function"}


@pytest.mark.parametrize("unparse", [lambda tree: "def f(): ...", lambda tree: "def"])
def test_source_that_cannot_be_written(
    net: Callable[..., Any], unparse: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net("return F.relu(self.conv(x))")
    monkeypatch.setattr("ast.unparse", unparse)
    assert reasons(tribp.fuse(model)) == {
        "": "what its forward applies to its layers is not known: its source cannot be written again"
    }


def test_a_program_that_has_another_forward(net: Callable[..., Any]) -> None:
    """A pickle loads, and does what forward does then."""
    model, x = net("return F.relu(self.conv(x))"), torch.randn(2, 2, 5, 5)
    tribp.fuse(model)
    data = pickle.dumps(model)
    kind: Any = type(model).__mro__[1]
    for line, expected in (("return torch.tanh(self.conv(x))", model.conv(x).tanh()), ("return x", x)):
        kind.forward = type(net(line)).forward
        assert torch.equal(pickle.loads(data)(x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["fx", "script", "trace", "export", "compile"])
def test_torch_around_a_fused_forward(how: str) -> None:
    """None of them reads the forward that applies the activations a second time: those of a sigmoid would be seen."""
    torch.compiler.reset()
    model, x = FunctionalLeNet().eval().requires_grad_(False), image()
    y = model(x)
    assert len(tribp.fuse(model).replaced) == 6
    ways: dict[str, Callable[[], Any]] = {
        "fx": lambda: torch.fx.symbolic_trace(model),
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, x),
        "export": lambda: torch.export.export(model, (x,)).module(),
        "compile": lambda: torch.compile(model, fullgraph=True, backend="aot_eager"),
    }
    torch.testing.assert_close(ways[how]()(x), y)


def test_compiled_before_fuse() -> None:
    """The wrapper notices, and compiles again."""
    torch.compiler.reset()
    model, x = FunctionalLeNet().eval().requires_grad_(False), image()
    wrapped: Any = torch.compile(model, backend="eager")
    y = wrapped(x)
    for change in (tribp.fuse, tribp.unfuse):
        assert change(wrapped).replaced
        torch.testing.assert_close(wrapped(x), y)


def test_saved_and_loaded_whole() -> None:
    model, x, file = TorchvisionNet().eval(), torch.randn(2, 2, 5, 5), io.BytesIO()
    y = model(x)
    assert [str(entry) for entry in tribp.fuse(model).replaced][1:] == ["conv: Conv2d + ReLU → conv3x3"]
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert type(other) is type(model)
    assert torch.equal(other(x), y)
    tribp.unfuse(other)
    assert type(other) is TorchvisionNet
    assert torch.equal(other(x), y)


class TorchvisionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))  # type: ignore[no-any-return]


def test_every_protocol_of_pickle() -> None:
    model, x = TorchvisionNet(), torch.randn(2, 2, 5, 5)
    y = model(x)
    tribp.fuse(model)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert torch.equal(pickle.loads(pickle.dumps(model, protocol))(x), y)


def test_traceback_and_help() -> None:
    model = TorchvisionNet()
    tribp.fuse(model)
    line = "return _tribp_run((self.conv, self.relu), x)"
    assert line in inspect.getsource(model.forward)
    with pytest.raises(ValueError, match="weight must have shape") as error:
        model(torch.randn(2, 3, 5, 5))
    assert any(line in str(entry.statement) for entry in error.traceback)


def test_replicas_of_data_parallel() -> None:
    """A replica has the class of its module, and its parameters as attributes."""
    for model, x in (
        (TorchvisionNet(), torch.randn(2, 2, 5, 5)),
        (nn.Sequential(nn.Linear(5, 5), nn.ReLU()), torch.randn(2, 5)),
    ):
        y = model(x)
        tribp.fuse(model)
        replica: Any = model._replicate_for_data_parallel()
        for name, child in model.named_children():
            twin = replica._modules[name] = child._replicate_for_data_parallel()
            for key, p in child.named_parameters():
                setattr(twin, key, p.detach().requires_grad_())
        with Called() as called:
            assert torch.equal(replica(x), y)
        assert called.activations == ["relu"]


def test_batch_norm_between() -> None:
    model = TorchvisionBlock(2, 2, 1).eval()
    assert tribp.fuse(model) == Report(tuple(Replaced(f"conv{i}", "Conv2d", "conv3x3") for i in (1, 2)))
    assert type(model) is TorchvisionBlock
