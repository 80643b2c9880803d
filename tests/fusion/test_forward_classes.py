"""The class that a module gets whose forward is another: of what, on what it depends, and what is done to it after."""

import copy
import gc
import importlib.util
import inspect
import io
import linecache
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

import tribp
from tribp.fusion import Replaced, Report, Skipped, forward

from .cases import Called, changed, done_to_both, hooked, reasons
from .written import check, same
from .written import net as net

pytestmark = pytest.mark.usefixtures("one_thread")

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
    assert report.skipped == (Skipped("conv", "ReLU", f"Net has a {name} of its own"),)


def test_a_base_whose_forward_is_called(net: Callable[..., Any]) -> None:
    base = type(net("return F.relu(self.conv(x))"))

    class Derived(base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + self.act(self.conv(x))

    model, x = Derived(), torch.randn(2, 2, 5, 5)
    y = model(x)
    assert tribp.fuse(model).skipped == ()
    assert torch.equal(model(x), y)


INSTANCES: list[tuple[Callable[[Any], object], str, str]] = [
    (lambda m: hooked(m.act), "act", "the Sigmoid at act has forward hooks"),
    (lambda m: hooked(m.act, "full_backward_hook"), "act", "the Sigmoid at act has backward hooks"),
    (lambda m: hooked(m.conv), "act", "the Conv2d at conv has forward hooks"),
    (lambda m: changed(m, conv=nn.utils.parametrizations.weight_norm(m.conv)), "conv", "it is parametrized"),
    (lambda m: changed(m, forward=type(m).forward.__get__(m)), "act", "the Net around it has a forward of its own"),
    (lambda m: changed(m, act=type("Mine", (nn.Sigmoid,), {})()), "act", "the Sigmoid at act is a subclass of Sigmoid"),
]


@pytest.mark.parametrize(("change", "name", "reason"), INSTANCES, ids=[reason for *_, reason in INSTANCES])
def test_instances_that_are_skipped(
    net: Callable[..., Any], change: Callable[[Any], object], name: str, reason: str
) -> None:
    model, x = net("return self.act(self.conv(x))"), torch.randn(2, 2, 5, 5)
    change(model)
    y, kind = model(x), type(model)
    skipped = reasons(tribp.fuse(model))
    assert list(skipped) == [name]
    assert skipped[name].startswith(reason)
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
    assert reasons(tribp.fuse(model)) == {"conv": "Net.train calls super of type(self)"}
    model.eval()


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("def count(self):\n    type(self).calls += 1", "count sets an attribute of type(self)"),
        ("def count(self):\n    setattr(self.__class__, 'calls', 1)", "count sets an attribute of type(self)"),
        ("@classmethod\ndef count(cls):\n    cls.calls += 1", "count sets an attribute of type(self)"),
        ("@classmethod\ndef make(cls):\n    return super(cls, cls).make()", "make calls super of type(self)"),
        ("def found(self):\n    return {Net: 1}[type(self)]", "found depends on type(self)"),
        ("def found(self):\n    return {Net: 1}.get(type(self), 2)", "found depends on type(self)"),
        ("def found(self):\n    return self.__class__ in (Net,)", "found depends on type(self)"),
        ("@property\ndef found(self):\n    kind = type(self)\n    return kind.calls", "found depends on type(self)"),
        ("def found(self):\n    return [type(self) not in (Net,) for _ in 'a']", "found depends on type(self)"),
        ("def found(self):\n    return type(self) is Net", ""),
        ("@classmethod\ndef register(cls, name):\n    cls.calls = name\n    return {cls: name}[cls]", ""),
        ("@staticmethod\ndef found(x):\n    return type(x).__name__", ""),
        ("def shown(self):\n    return f'{type(self).__name__} {type(self).calls} {isinstance(self, type(self))}'", ""),
    ],
)
def test_methods_to_which_the_class_matters(net: Callable[..., Any], method: str, says: str) -> None:
    model = net("return F.relu(self.conv(x))", f"calls = 0\n{method}")
    assert reasons(tribp.fuse(model)) == ({"conv": f"Net.{says}"} if says else {}), method


T = TypeVar("T")


class Typed(nn.Module, Generic[T]):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


def test_generic_classes() -> None:
    model = Typed[int]()
    assert check(model, torch.randn(2, 3)).skipped == ()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters")
def test_a_forward_with_type_parameters(net: Callable[..., Any]) -> None:
    model = net("def forward[T](self, x: T) -> T:\n    return F.relu(self.conv(x))")
    (reason,) = reasons(tribp.fuse(model)).values()
    assert reason.endswith("it has type parameters")


def test_private_names(net: Callable[..., Any]) -> None:
    head = "def __init__(self):\n    Base.__init__(self)\n    self.__mine = nn.Conv2d(2, 2, 3)\n"
    model = net("return F.relu(self.__mine(x))", head)
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["", "_Net__mine"]
    check(net("return F.relu(self.__mine(x))", head))


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
    assert check(model).skipped == ()


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


def test_two_of_one_class_in_two_threads(net: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other thread's is made while this one's is on its way."""
    model = net("return self.act(self.conv(x))")
    other = copy.deepcopy(model)
    running = forward._running

    def late(*arguments: Any) -> Any:
        monkeypatch.undo()
        tribp.fuse(other)
        return running(*arguments)

    monkeypatch.setattr(forward, "_running", late)
    tribp.fuse(model)
    assert type(model) is type(other)


def test_source_that_cannot_be_read(net: Callable[..., Any]) -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Net(nn.Module):\n def forward(self, x):\n  return self.fc(x).relu()", space)
    model = space["Net"]()
    model.fc = nn.Linear(2, 2)
    unknown = "what its forward applies to its layers is not known: "
    assert tribp.fuse(model) == Report((), (Skipped("", "Net", unknown + "its source cannot be read"),))
    model = net("return F.relu(self.conv(x))")
    path = inspect.getfile(type(model))
    Path(path).write_text(Path(path).read_text().replace("F.relu(self.conv(x))", "self.conv(x).relu()  # edited"))
    linecache.checkcache(path)
    report = tribp.fuse(model)
    assert report.skipped == (Skipped("", "Net", unknown + "its source is not the code that runs"),)
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
        "": "what its forward applies to its layers is not known: its source cannot be reproduced from its syntax tree"
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


def test_saved_and_loaded_whole() -> None:
    model, x, file = TorchvisionNet().eval(), torch.randn(2, 2, 5, 5), io.BytesIO()
    y = model(x)
    assert [str(entry) for entry in tribp.fuse(model).replaced][1:] == ["conv: Conv2d + ReLU -> conv3x3"]
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
    with pytest.raises(RuntimeError, match="expected input") as error:
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
