"""Whole models: what `fuse` and `unfuse` leave, and the reason."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

import tribp
from tribp.fusion import Replaced, Report, Skipped
from tribp.fusion.activations import activation_like
from tribp.nn import Conv3x3, LinearSigmoid

from .cases import Called, changed, frozen, hooked, kinds, reasons, sigmoid_after

pytestmark = pytest.mark.usefixtures("one_thread")


class MyConv(nn.Conv2d):
    pass


class MyLinear(nn.Linear):
    pass


class MySigmoid(nn.Sigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def compiled(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def buffered(module: nn.Module) -> nn.Module:
    module.register_buffer("mask", torch.ones(1))
    return module


def without_parameter(module: nn.Module, name: str) -> nn.Module:
    parameter = module._parameters.pop(name)
    assert parameter is not None
    return changed(module, **{name: parameter.detach()})


def lost(module: nn.Module, name: str) -> nn.Module:
    del module._parameters[name]
    return module


def quantized() -> nn.Module:
    from torch.ao.nn.quantized import Conv2d

    return Conv2d(2, 2, 3)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(2, 2, **{"kernel_size": 3, **options})


HOOKS = {
    "forward_hook": "it has forward hooks",
    "forward_pre_hook": "it has forward pre hooks",
    "full_backward_hook": "it has backward hooks",
    "full_backward_pre_hook": "it has backward pre hooks",
}
OF_BOTH: list[tuple[str, Callable[[nn.Module], nn.Module], str]] = [
    ("weight_norm", parametrizations.weight_norm, "it is parametrized"),
    ("forward", lambda m: changed(m, forward=lambda x: x), "it has a forward of its own"),
    ("weight lost", lambda m: lost(m, "weight"), "it has no weight"),
    ("bias lost", lambda m: lost(m, "bias"), "it has no bias"),
    ("complex", lambda m: m.to(torch.complex64), "its weight is complex64"),
    ("double bias", lambda m: changed(m, bias=nn.Parameter(torch.ones(1, 2))), "its parameters have the shapes"),
    (
        "strange bias",
        lambda m: changed(m, bias=nn.Parameter(torch.ones(2, dtype=torch.complex64))),
        "its bias is complex64",
    ),
    (
        "wrapper",
        lambda m: changed(m, bias=nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))),
        "its bias is a TwoTensor",
    ),
    ("scripted", torch.jit.script, "it is compiled by TorchScript"),
    ("scripted whole", lambda m: torch.jit.script(nn.Sequential(m, nn.Sigmoid())), "it is compiled by TorchScript"),
]
# What only matters to what is computed with it, which a call by itself is not.
WATCHED: list[tuple[str, Callable[[nn.Module], nn.Module], str]] = [
    *((kind, lambda m, kind=kind: hooked(m, kind), reason) for kind, reason in HOOKS.items()),
    ("old weight_norm", nn.utils.weight_norm, "it has forward pre hooks"),
    ("pruned", lambda m: prune.l1_unstructured(m, "weight", 0.5), "it has forward pre hooks"),
    ("compile", compiled, "it was compiled by itself"),
]
# What does not matter.
MORE: list[tuple[str, Callable[[nn.Module], nn.Module]]] = [
    *((kind, lambda m, kind=kind: hooked(m, kind)) for kind in (
        "state_dict_post_hook", "state_dict_pre_hook", "load_state_dict_pre_hook", "load_state_dict_post_hook",
    )),
    ("weight in a buffer", frozen),
    ("bias in a buffer", lambda m: frozen(m, "bias")),
    ("weight as an attribute", lambda m: without_parameter(m, "weight")),  # as DataParallel and FSDP have it
    ("bias as an attribute", lambda m: without_parameter(m, "bias")),
    ("buffer", buffered),
    ("child", lambda m: changed(m, lora=nn.Identity())),
    ("parameter", lambda m: changed(m, scale=nn.Parameter(torch.ones(1)))),
    ("activation", lambda m: changed(m, activation="relu")),
]  # fmt: skip
LEFT_LINEAR: list[tuple[str, Callable[[], nn.Module], str]] = [
    *((f"{name} linear", lambda make=make: make(nn.Linear(2, 2)), reason) for name, make, reason in OF_BOTH + WATCHED),
    ("linear subclass", lambda: MyLinear(2, 2), "it is a subclass of Linear: "),
    ("lazy linear", lambda: nn.LazyLinear(2), "it is lazy"),
    (
        "sparse linear",
        lambda: changed(nn.Linear(2, 2), weight=nn.Parameter(torch.eye(2).to_sparse())),
        "its weight is sparse_coo",
    ),
]
LEFT_CONV: list[tuple[str, Callable[[], nn.Module], str]] = [
    *((name, lambda make=make: make(conv()), reason) for name, make, reason in OF_BOTH),
    ("subclass", lambda: MyConv(2, 2, 3), "it is a subclass of Conv2d: "),
    ("lazy", lambda: nn.LazyConv2d(2, 3), "it is lazy"),
    ("5 × 5", lambda: conv(kernel_size=5), "its kernel size is (5, 5)"),
    ("1 × 3", lambda: conv(kernel_size=(1, 3)), "its kernel size is (1, 3)"),
    (
        "another weight",
        lambda: changed(conv(), weight=nn.Parameter(torch.ones(2, 2, 5, 5))),
        "its kernel size is (5, 5)",
    ),
    ("dilation", lambda: conv(dilation=2), "dilation must be 1, got (2, 2)"),
    ("dilation of one side", lambda: conv(dilation=(1, 2)), "dilation must be 1, got (1, 2)"),
    ("stride", lambda: conv(stride=3), "stride must be 1 or 2, or a pair of these, got (3, 3)"),
    ("transposed", lambda: nn.ConvTranspose2d(2, 2, 3), "it is a torch.nn.modules.conv.ConvTranspose2d, no torch"),
    ("quantized", quantized, "it is a torch.ao.nn.quantized.modules.conv.Conv2d, no torch.nn.Conv2d"),
]


@pytest.mark.filterwarnings("ignore")  # of what torch deprecates: weight_norm, TorchScript, quantization
@pytest.mark.parametrize(("make", "reason"), [case[1:] for case in LEFT_CONV], ids=[case[0] for case in LEFT_CONV])
def test_convolutions_that_are_skipped(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    for model in (sigmoid_after(module), nn.ModuleDict({"0": module})):
        (skipped,) = tribp.fuse(model).skipped
        assert (skipped.name, skipped.module) == ("0", type(module).__name__)
        assert skipped.reason.startswith(reason)
        assert next(model.children()) is module
    assert list(model.children()) == [module]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in WATCHED], ids=[case[0] for case in WATCHED])
def test_convolutions_that_are_taken_alone(change: Callable[[nn.Module], nn.Module], reason: str) -> None:
    module = change(conv())
    model = sigmoid_after(module)
    report = tribp.fuse(model)
    assert report.replaced == (Replaced("0", "Conv2d", "conv3x3"),)
    assert reasons(report) == {"1": reason.replace("it ", "the Conv2d at 0 ", 1)}
    with Called() as called:
        model(torch.randn(1, 2, 4, 4))
    assert called.names == ["conv3x3"]


@pytest.mark.parametrize(("name", "change"), MORE, ids=[case[0] for case in MORE])
@pytest.mark.parametrize(
    "make", [conv, lambda: nn.Linear(4, 4), lambda: Conv3x3(2, 2), lambda: tribp.nn.Linear(4, 4)],
    ids=["conv", "linear", "tribp's conv", "tribp's linear"],
)  # fmt: skip
def test_what_does_not_matter(
    make: Callable[[], nn.Module], name: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    layer = make()
    if name == "activation" and hasattr(layer, "activation"):
        pytest.skip("it is its own")
    model, x = sigmoid_after(change(layer)), torch.randn(1, 2, 4, 4)
    y = model(x)
    assert tribp.fuse(model).skipped == ()
    with Called() as called:
        assert torch.equal(model(x), y)
    assert called.activations == ["sigmoid"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), [case[1:] for case in LEFT_LINEAR], ids=[case[0] for case in LEFT_LINEAR])
def test_linears_that_are_skipped(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    model = sigmoid_after(module)
    (skipped,) = tribp.fuse(model).skipped
    assert skipped.name == "0"
    assert skipped.reason.startswith(reason)
    assert model[0] is module
    assert type(model[1]) is nn.Sigmoid
    if not isinstance(module, torch.jit.ScriptModule):
        assert tribp.fuse(nn.Sequential(module)) == Report()  # not of interest without a Sigmoid


@pytest.mark.parametrize(("layer", "size"), [(nn.Linear(4, 2), (3, 4)), (nn.Conv2d(4, 2, 3), (1, 4, 5, 5))], ids=str)
@pytest.mark.parametrize("length", [1, 3])
def test_a_bias_of_another_length_is_for_torch_to_take_or_refuse(
    layer: nn.Module, size: tuple[int, ...], length: int
) -> None:
    models: list[Any] = [nn.Sequential(copy.deepcopy(layer), nn.ReLU()) for _ in range(2)]
    plain, fused = models
    tribp.fuse(fused)
    for model in models:
        model[0].bias = nn.Parameter(torch.full((length,), 2.0))
        model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    try:
        expected = plain(torch.ones(size))
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fused(torch.ones(size))
    else:
        torch.testing.assert_close(fused(torch.ones(size)), expected)


@pytest.mark.parametrize("parametrization", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_convolution_parametrized_after_fuse(parametrization: Callable[[nn.Module], nn.Module]) -> None:
    """Its weight is computed once a call: spectral_norm iterates each time, and keeps what it comes to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU())
    plain, x = copy.deepcopy(model), torch.randn(1, 2, 6, 6)
    tribp.fuse(model)
    for m in (model, plain):
        torch.manual_seed(1)
        parametrization(m[0])
    for _ in range(3):
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


def test_another_weight_than_the_layers() -> None:
    """What `_conv_forward` is given counts, be it of another size."""
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU())
    x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 1, 1)
    tribp.fuse(model)
    torch.testing.assert_close(model[0]._conv_forward(x, w, None), F.conv2d(x, w))


def test_what_is_not_of_interest() -> None:
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity(), nn.Sigmoid(), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 3),
        nn.MaxPool2d(3), nn.MaxPool2d((3, 3)), nn.Conv3d(2, 2, 3), nn.Linear(2, 2), nn.Dropout(), nn.Sigmoid(),
        nn.Sigmoid(), nn.Sequential(nn.Linear(2, 2)), nn.Identity(), nn.GELU(), nn.Linear(2, 2),
    )  # fmt: skip
    before = list(model.modules())
    assert tribp.fuse(model) == Report()
    assert list(model.modules()) == before
    assert tribp.unfuse(model) == Report()
    assert list(model.modules()) == before


class Others(nn.Module):
    """Applies activations that tribp does not compute, as a module and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out, self.act = conv(), nn.Linear(4, 4), nn.Linear(4, 2), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = F.gelu(self.fc(x), approximate="tanh")
        return F.log_softmax(self.out(x), dim=-1)


def test_activations_of_torch_alone() -> None:
    """The layer is named, or, where it is one of tribp's, the activation; a row of layers is one still."""
    model = nn.Sequential(
        nn.Linear(4, 4), nn.SiLU(), conv(padding=1), nn.Hardswish(),
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), hooked(nn.Linear(4, 4)), nn.Mish(),
        tribp.nn.Linear(4, 4), nn.PReLU(), tribp.nn.Linear(4, 4, activation="tanh"), nn.Softmax(-1),
        conv(kernel_size=5), nn.GELU(),
    )  # fmt: skip
    report = tribp.fuse(model)
    assert [entry.name for entry in report.replaced] == ["", "2", "4", "6"]
    assert [tuple(entry) for entry in report.skipped] == [
        ("0", "Linear", "tribp computes no SiLU, which follows it"),
        ("3", "Hardswish", "tribp computes no Hardswish"),
        ("7", "GELU", "tribp computes no GELU"),
        ("8", "Linear", "tribp computes no Mish, which follows it"),
        ("11", "PReLU", "tribp computes no PReLU"),
        ("14", "Conv2d", "its kernel size is (5, 5)"),
    ]
    assert tribp.fuse(model) == Report((), report.skipped)
    others = Others()
    x = torch.randn(1, 2, 6, 6)
    y = others(x)
    report = tribp.fuse(others)
    assert [entry.name for entry in report.replaced] == ["conv"]
    assert [tuple(entry) for entry in report.skipped] == [
        ("fc", "Linear", "tribp computes no GELU, which follows it"),
        ("out", "Linear", "tribp computes no LogSoftmax, which follows it"),
        ("act", "GELU", "tribp computes no GELU"),
    ]
    assert type(others) is Others
    torch.testing.assert_close(others(x), y)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("make", [LinearSigmoid, tribp.nn.Linear, Conv3x3])
def test_unfuse_leaves_what_is_no_parameter(make: Callable[..., nn.Module], name: str) -> None:
    layer = frozen(make(2, 2), name)
    model = nn.Sequential(layer)
    assert reasons(tribp.unfuse(model)) == {"0": f"it has a {name} that is no parameter"}
    assert model[0] is layer


SIGMOIDS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: hooked(nn.Sigmoid()), "has forward hooks"),
    (lambda: hooked(nn.Sigmoid(), "full_backward_hook"), "has backward hooks"),
    (MySigmoid, "is a subclass of Sigmoid: "),
    (lambda: changed(nn.Sigmoid(), forward=torch.tanh), "has a forward of its own"),
]


@pytest.mark.parametrize(("make", "reason"), SIGMOIDS, ids=[reason for _, reason in SIGMOIDS])
def test_sigmoids_that_are_skipped(make: Callable[[], nn.Module], reason: str) -> None:
    sigmoid = make()
    model = nn.Sequential(conv(padding=1), sigmoid, nn.Linear(4, 4), sigmoid)
    x = torch.randn(1, 2, 4, 4)
    y = model(x)
    report = tribp.fuse(model)
    assert report.replaced == (Replaced("0", "Conv2d", "conv3x3"),)
    assert [entry[:2] for entry in report.skipped] == [("1", type(sigmoid).__name__), ("2", "Linear")]
    assert report.skipped[0].reason.startswith(f"the Sigmoid at 1 {reason}")
    assert report.skipped[1].reason.startswith(f"the Sigmoid at 3 {reason}")
    assert model[1] is model[3] is sigmoid
    assert torch.equal(model(x), y)


class Ordered(nn.Sequential):
    """Adds a method, and leaves forward alone."""

    def features(self, x: Tensor) -> Tensor:
        return self(x)  # type: ignore[no-any-return]


class Backwards(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for module in reversed(list(self)):
            input = module(input)
        return input


class OwnForward(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self[0](input))


def test_a_sequential_whose_forward_is_not_read() -> None:
    model = nn.Sequential(OwnForward(nn.Linear(2, 2)), conv())
    reason = "the OwnForward around it may not run its modules in order"
    assert reasons(tribp.fuse(model)) == {"0.0": reason}


class Iterated(nn.Sequential):
    def __iter__(self) -> Any:
        return reversed(list(self._modules.values()))


def backwards(*modules: nn.Module) -> nn.Module:
    model = nn.Sequential(*modules)
    return changed(model, forward=lambda x: model[0](model[1](x)))


@pytest.mark.parametrize("container", [Backwards, Iterated, backwards, lambda *modules: nn.ModuleList(modules)])
def test_containers_in_another_order(container: Callable[..., nn.Module]) -> None:
    model = container(nn.Linear(2, 2), nn.Sigmoid())
    reason = f"the {type(model).__name__} around it may not run its modules in order"
    if isinstance(model, nn.ModuleList):
        reason = "forward does not run the ModuleList around it in order"
    assert tribp.fuse(model) == Report((), (Skipped("0", "Linear", reason),))
    model = container(conv(), nn.Sigmoid())
    report = tribp.fuse(model)
    assert report == Report((Replaced("0", "Conv2d", "conv3x3"),), (Skipped("1", "Sigmoid", reason),))
    assert kinds(model) == ["FusedConv2d", "Sigmoid"]
    assert tribp.unfuse(model).replaced == (Replaced("0", "FusedConv2d", "Conv2d"),)


class Doubled(nn.Sequential):
    def __call__(self, *inputs: Any) -> Any:
        return 2 * super().__call__(*inputs)


def test_a_sequential_with_a_call_of_its_own() -> None:
    model, x = nn.Sequential(Doubled(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    y = model(x)
    report = tribp.fuse(model)
    assert torch.equal(model(x), y)
    assert reasons(report) == {"0.0": "the Doubled around it may not run its modules in order"}


class Alike(nn.Module):
    """All of them are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def test_modules_that_are_equal() -> None:
    model = nn.Sequential(Alike(), Alike())
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["0.body", "0.body.0", "1.body", "1.body.0"]
    assert len(tribp.unfuse(model).replaced) == 2


def test_a_sequential_subclass_in_order() -> None:
    model = Ordered(nn.Linear(2, 2), nn.Sigmoid())
    hooked(model)
    x = torch.randn(3, 2)
    y = model(x)
    report = tribp.fuse(model)
    assert [str(entry) for entry in report.replaced] == [
        "(the model): Ordered -> fused Ordered",
        "0: Linear + Sigmoid -> linear",
    ]
    for other in (model, copy.deepcopy(model)):
        with Called() as called:
            assert torch.equal(other.features(x), y)
        assert called.activations == ["sigmoid"]
        assert isinstance(other, Ordered)
    assert [str(entry) for entry in tribp.unfuse(model).replaced] == ["(the model): fused Ordered -> Ordered"]
    assert type(model) is Ordered


def test_a_layer_in_several_places() -> None:
    """At each it runs with what is behind it there."""
    linear, act = nn.Linear(2, 2), nn.Sigmoid()
    model: Any = nn.Sequential(linear, nn.Sequential(linear, act), nn.Sequential(linear, hooked(nn.Sigmoid())))
    model.extend([linear, nn.Tanh(), nn.ModuleDict({"head": linear})])
    del model[5]
    x = torch.randn(3, 2)
    y = model(x)
    report = tribp.fuse(model)
    assert [entry.name for entry in report.replaced] == ["", "1", "1.0", "2.0", "3"]
    assert reasons(report) == {"2.1": "the Sigmoid at 2.1 has forward hooks"}
    with Called() as called:
        assert torch.equal(model(x), y)
    assert (called.names, called.activations) == (["mlp", "linear"], ["sigmoid", None, "tanh"])
    assert model[0] is model[1][0] is model[3] is linear


def test_order_of_what_is_skipped() -> None:
    large = conv(kernel_size=5)
    assert list(reasons(tribp.fuse(nn.Sequential(large, conv(kernel_size=7), large)))) == ["0", "1", "2"]


def test_a_module_that_holds_its_parent() -> None:
    model = sigmoid_after(nn.Linear(2, 2))
    model.append(nn.Module())
    model[2].parent = model
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["", "0", "2.parent"]


def test_the_model_itself() -> None:
    model, x = conv(), torch.randn(1, 2, 4, 4)
    y = model(x)
    assert tribp.fuse(model).replaced == (Replaced("", "Conv2d", "conv3x3"),)
    assert torch.equal(model(x), y)
    assert tribp.unfuse(model).replaced == (Replaced("", "FusedConv2d", "Conv2d"),)
    for module in (Conv3x3(2, 2), LinearSigmoid(2, 2)):
        (skipped,) = tribp.unfuse(module).skipped
        assert (skipped.name, skipped.module) == ("", type(module).__name__)
        assert skipped.reason.startswith("it is the model itself")
    assert tribp.fuse(nn.Linear(2, 2)) == Report()


@pytest.mark.parametrize("change", [tribp.fuse, tribp.unfuse])
@pytest.mark.parametrize("model", [None, nn.Linear, [nn.Linear(2, 2)]])
def test_no_model(change: Callable[[Any], Report], model: object) -> None:
    with pytest.raises(
        TypeError, match=rf"{change.__name__}: model must be a torch.nn.Module, got {type(model).__name__}"
    ):
        change(model)


def test_the_report_can_be_read() -> None:
    model = nn.Sequential(conv(), nn.Sigmoid(), conv(kernel_size=5))
    assert str(tribp.fuse(model)) == (
        "1 of 1 layers run by tribp, 1 skipped\n(the model): Sequential -> FusedSequential\n"
        "0: Conv2d + Sigmoid -> conv3x3\n"
        "2: Conv2d skipped: its kernel size is (5, 5)"
    )
    assert str(tribp.unfuse(model)) == (
        "2 changed, 0 skipped\n(the model): FusedSequential -> Sequential\n0: FusedConv2d -> Conv2d"
    )
    assert str(tribp.fuse(conv(kernel_size=1))).splitlines()[1].startswith("(the model): Conv2d skipped: ")


def test_modules_that_a_user_built() -> None:
    """unfuse makes them torch's, and where a sigmoid has no place of its own a Sequential of two."""
    model = nn.Sequential(
        Conv3x3(2, 4, 2, (1, 2), 2, bias=False, padding_mode="reflect"),
        Conv3x3(4, 4, padding="same", activation="sigmoid"), nn.Identity(), nn.Flatten(), LinearSigmoid(60, 3),
    )  # fmt: skip
    model[4].eval()
    x, parameters = torch.randn(2, 2, 6, 8), list(model.parameters())
    y = model(x)
    report = tribp.unfuse(model)
    assert report.skipped == ()
    assert report.replaced == (
        Replaced("0", "Conv3x3", "torch.nn.Conv2d"),
        Replaced("1", "Conv3x3", "Sequential(Conv2d, Sigmoid), keys with 0."),
        Replaced("4", "LinearSigmoid", "Sequential(Linear, Sigmoid), keys with 0."),
    )
    assert repr(model[0]) == repr(nn.Conv2d(2, 4, 3, 2, (1, 2), 1, 2, bias=False, padding_mode="reflect"))
    assert [type(m).__module__.partition(".")[0] for m in model.modules()] == ["torch"] * 10
    assert [m.training for m in model] == [True, True, True, True, False]
    torch.testing.assert_close(model(x), y)
    assert list(model.state_dict()) == ["0.weight", "1.0.weight", "1.0.bias", "4.0.weight", "4.0.bias"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert len(tribp.fuse(model).replaced) == 5
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("output_activation", [("leaky_relu", 0.2), None], ids=str)
def test_perceptrons_that_a_user_built(activation: Any, output_activation: Any) -> None:
    model: Any = nn.Sequential(tribp.nn.MLP([4, 6, 5, 3], activation, output_activation)).eval()
    x, keys = torch.randn(2, 4), list(model.state_dict())
    y = model(x)
    report = tribp.unfuse(model)
    between, last = ("ReLU" if activation else "Identity"), ", LeakyReLU" * (output_activation is not None)
    assert report.replaced[0].now == f"Sequential(Linear, {between}, Linear, {between}, Linear{last})"
    assert report.skipped == ()
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch"}
    assert {m.training for m in model.modules()} == {False}
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), y)
    tribp.fuse(model)
    assert torch.equal(model(x), y)


def test_perceptrons_that_unfuse_leaves() -> None:
    """Whole: their layers by themselves would be computed one by one. One layer that is skipped is called instead."""
    mlp = tribp.nn.MLP([4, 6, 3])
    assert reasons(tribp.unfuse(mlp)) == {"": "it is the model itself: no module that could hold another is around it"}
    assert {type(layer) for layer in mlp.layers} == {tribp.nn.Linear}
    hooked(mlp)
    assert list(reasons(tribp.unfuse(nn.Sequential(mlp)))) == ["0"]
    assert {type(layer) for layer in mlp.layers} == {tribp.nn.Linear}
    model: Any = nn.Sequential(tribp.nn.MLP([4, 6, 3]))
    hooked(model[0].layers[1]).eval()
    x = torch.randn(2, 4)
    y = model(x)
    assert list(reasons(tribp.unfuse(model))) == ["0.2"]
    assert kinds(model[0]) == ["Linear", "Sigmoid", "Linear"]
    assert [m.training for m in model[0]] == [True, True, False]
    torch.testing.assert_close(model(x), y)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.gate = nn.Linear(4, 4), nn.ReLU(), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.fc(x))
        return y * self.gate


def test_unfuse_names_what_something_was_derived_from() -> None:
    model = Gated()
    tribp.fuse(model)
    nn.utils.parametrize.register_parametrization(model, "gate", nn.Softplus())
    assert reasons(tribp.unfuse(model)) == {"": "it is parametrized"}
    nn.utils.parametrize.remove_parametrizations(model, "gate")
    assert [entry.now for entry in tribp.unfuse(model).replaced] == ["Gated"]


def test_unfuse_leaves_what_is_more() -> None:
    class Mine(Conv3x3):
        pass

    model = nn.Sequential(
        hooked(LinearSigmoid(2, 2)), parametrizations.weight_norm(LinearSigmoid(2, 2)), buffered(Conv3x3(2, 2)),
        Mine(2, 2), hooked(Conv3x3(2, 2), "state_dict_post_hook"), compiled(LinearSigmoid(2, 2)),
    )  # fmt: skip
    before = list(model.modules())
    report = tribp.unfuse(model)
    assert report.replaced == ()
    assert [reasons(report)[str(n)][:25] for n in range(6)] == [
        "it has forward hooks", "it is parametrized", "it has more than its para", "it is a subclass of Conv3",
        "it has state dict hooks", "it was compiled by itself",
    ]  # fmt: skip
    assert list(model.modules()) == before


def test_tribps_layers_before_torchs_activations() -> None:
    """Which users wrote; also one that had a hook at first."""
    model: Any = nn.Sequential(Conv3x3(2, 2, padding="same", padding_mode="circular"), nn.Sigmoid(), conv())
    sigmoid = hooked(nn.Sigmoid())
    model.append(sigmoid)
    x = torch.randn(1, 2, 6, 6)
    y = model(x)
    assert [str(entry) for entry in tribp.fuse(model).replaced] == [
        "(the model): Sequential -> FusedSequential",
        "0: Conv3x3 + Sigmoid -> conv3x3",
        "2: Conv2d -> conv3x3",
    ]
    for activations in (["sigmoid", None], ["sigmoid", "sigmoid"]):
        with Called() as called:
            assert torch.equal(model(x), y)
        assert called.activations == activations
        sigmoid._forward_hooks.clear()
    assert kinds(model) == ["Conv3x3", "Sigmoid", "FusedConv2d", "Sigmoid"]
    assert [entry.now for entry in tribp.unfuse(model).replaced] == ["Sequential", "torch.nn.Conv2d", "Conv2d"]
    assert torch.equal(model(x), y)
    model = sigmoid_after(hooked(Conv3x3(2, 2)))
    assert reasons(tribp.fuse(model)) == {"1": "the Conv3x3 at 0 has forward hooks"}


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Sigmoid, nn.Tanh, nn.ReLU, lambda: nn.ReLU(inplace=True), nn.LeakyReLU, lambda: nn.LeakyReLU(0.3, True), nn.ELU,
    lambda: nn.ELU(0.5), nn.Softplus, lambda: nn.Softplus(2, 18), nn.Hardsigmoid, nn.Hardtanh,
    lambda: nn.Hardtanh(-2, 0.1, True), nn.ReLU6,
]  # fmt: skip


@pytest.mark.parametrize("make", ACTIVATIONS, ids=lambda make: str(make()))
def test_every_activation(make: Callable[[], nn.Module]) -> None:
    """Behind a layer of torch's and behind one of tribp's; and where a user built the module."""
    act = make()
    layers = [conv(padding=1), Conv3x3(2, 2, padding=1), nn.Linear(4, 4), tribp.nn.Linear(4, 4)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, act)), nn.MaxPool2d(2))
    x = torch.randn(2, 2, 4, 4)
    y = model(x)
    report = tribp.fuse(model)
    assert report.skipped == ()
    assert [entry.name for entry in report.replaced] == ["", "0", "2", "4", "6"]
    like = activation_like(act)
    for other in (model, copy.deepcopy(model)):
        with Called() as called:
            torch.testing.assert_close(other(x), y)
        assert (called.names, called.activations) == (["conv3x3", "conv3x3", "mlp"], [like] * 4)
    alone = nn.Sequential(tribp.nn.Linear(4, 3, activation=activation_like(act)))
    y = alone(x)
    assert [entry.was for entry in tribp.unfuse(alone).replaced] == ["tribp.nn.Linear"]
    assert isinstance(alone[0], nn.Sequential)
    torch.testing.assert_close(alone(x), y)


def test_numbers_that_are_not_taken() -> None:
    model = nn.Sequential(conv(padding=1), nn.LeakyReLU(-0.1), nn.Linear(4, 4), nn.Softplus(1, 3))
    x = torch.randn(2, 2, 4, 4)
    y = model(x)
    report = tribp.fuse(model)
    assert report.replaced == (Replaced("0", "Conv2d", "conv3x3"),)
    assert [(skipped.name, skipped.module) for skipped in report.skipped] == [("1", "LeakyReLU"), ("2", "Linear")]
    assert report.skipped[0].reason.startswith("the LeakyReLU at 1: negative_slope of leaky_relu must be at least 0")
    assert report.skipped[1].reason.startswith("the Softplus at 3: beta of softplus must be above 0 and its threshold")
    torch.testing.assert_close(model(x), y)
