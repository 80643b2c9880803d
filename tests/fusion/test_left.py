"""Whole models: what `fuse` and `unfuse` leave, and the reason."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

import tribp
from tribp.fusion import FusedActivation, Left, Replaced, Report
from tribp.fusion.modules import activation_like
from tribp.nn import Conv3x3, LinearSigmoid

from .cases import changed, frozen, hooked, kinds, reasons, sigmoid_after

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
    "state_dict_post_hook": "it has state dict hooks",
    "state_dict_pre_hook": "it has state dict pre hooks",
    "load_state_dict_pre_hook": "it has load state dict pre hooks",
    "load_state_dict_post_hook": "it has load state dict post hooks",
}
OF_BOTH: list[tuple[str, Callable[[nn.Module], nn.Module], str]] = [
    *((kind, lambda m, kind=kind: hooked(m, kind), reason) for kind, reason in HOOKS.items()),
    ("weight_norm", parametrizations.weight_norm, "it is parametrized"),
    ("old weight_norm", nn.utils.weight_norm, "it has forward pre hooks"),
    ("pruned", lambda m: prune.l1_unstructured(m, "weight", 0.5), "it has forward pre hooks"),
    ("forward", lambda m: changed(m, forward=lambda x: x), "it has a forward of its own"),
    ("compile", compiled, "it has a _compiled_call_impl of its own"),
    ("buffer", buffered, "it has more than its parameters: mask"),
    ("child", lambda m: changed(m, lora=nn.Identity()), "it has more than its parameters: lora"),
    ("parameter", lambda m: changed(m, scale=nn.Parameter(torch.ones(1))), "it has more than its parameters: scale"),
    ("no weight", lambda m: without_parameter(m, "weight"), "it lacks the parameter weight"),
    ("no bias", lambda m: without_parameter(m, "bias"), "it lacks the parameter bias"),
    ("weight in a buffer", frozen, "it has a weight that is no parameter"),
    ("bias in a buffer", lambda m: frozen(m, "bias"), "it has a bias that is no parameter"),
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
LEFT_LINEAR: list[tuple[str, Callable[[], nn.Module], str]] = [
    *((f"{name} linear", lambda make=make: make(nn.Linear(2, 2)), reason) for name, make, reason in OF_BOTH),
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
    ("activation", lambda: changed(conv(), activation="relu"), "it has an activation of its own"),
    ("transposed", lambda: nn.ConvTranspose2d(2, 2, 3), "it is a torch.nn.modules.conv.ConvTranspose2d, no torch"),
    ("quantized", quantized, "it is a torch.ao.nn.quantized.modules.conv.Conv2d, no torch.nn.Conv2d"),
    ("one number", lambda: conv(padding=(1,), padding_mode="reflect"), "its padding is (1,), but it pads by [1, 1]"),
    (
        "padding set",
        lambda: changed(conv(padding_mode="circular"), padding=(1, 1)),
        "its padding is (1, 1), but it pads by [0, 0, 0, 0]",
    ),
]


@pytest.mark.filterwarnings("ignore")  # of what torch deprecates: weight_norm, TorchScript, quantization
@pytest.mark.parametrize(("make", "reason"), [case[1:] for case in LEFT_CONV], ids=[case[0] for case in LEFT_CONV])
def test_convolutions_that_are_left(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    for model in (sigmoid_after(module), nn.ModuleDict({"0": module})):
        (left,) = tribp.fuse(model).left
        assert (left.name, left.module) == ("0", type(module).__name__)
        assert left.reason.startswith(reason)
        assert next(model.children()) is module
    assert list(model.children()) == [module]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), [case[1:] for case in LEFT_LINEAR], ids=[case[0] for case in LEFT_LINEAR])
def test_linears_that_are_left(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    model = sigmoid_after(module)
    (left,) = tribp.fuse(model).left
    assert left.name == "0"
    assert left.reason.startswith(reason)
    assert model[0] is module
    assert type(model[1]) is nn.Sigmoid
    if not isinstance(module, torch.jit.ScriptModule):
        assert tribp.fuse(nn.Sequential(module)) == Report()  # not of interest without a Sigmoid


def test_what_is_not_of_interest() -> None:
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity(), nn.Sigmoid(), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 3),
        nn.MaxPool2d(3), nn.MaxPool2d((3, 3)), nn.Conv3d(2, 2, 3), nn.Linear(2, 2), nn.Dropout(), nn.Sigmoid(),
        nn.Sigmoid(), nn.Sequential(nn.Linear(2, 2)), nn.Sigmoid(), nn.GELU(), nn.Linear(2, 2),
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
    assert [tuple(entry) for entry in report.left] == [
        ("0", "Linear", "tribp computes no SiLU, which is behind it"),
        ("3", "Hardswish", "tribp computes no Hardswish"),
        ("7", "GELU", "tribp computes no GELU"),
        ("8", "Linear", "tribp computes no Mish, which is behind it"),
        ("11", "PReLU", "tribp computes no PReLU"),
        ("14", "Conv2d", "its kernel size is (5, 5)"),
    ]
    assert tribp.fuse(model) == Report((), report.left)
    others = Others()
    x = torch.randn(1, 2, 6, 6)
    y = others(x)
    report = tribp.fuse(others)
    assert [entry.name for entry in report.replaced] == ["conv"]
    assert [tuple(entry) for entry in report.left] == [
        ("fc", "Linear", "tribp computes no GELU, which is behind it"),
        ("out", "Linear", "tribp computes no LogSoftmax, which is behind it"),
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
    (lambda: buffered(nn.Sigmoid()), "has more than its parameters: mask"),
]


@pytest.mark.parametrize(("make", "reason"), SIGMOIDS, ids=[reason for _, reason in SIGMOIDS])
def test_sigmoids_that_are_left(make: Callable[[], nn.Module], reason: str) -> None:
    sigmoid = make()
    model = nn.Sequential(conv(padding=1), sigmoid, nn.Linear(4, 4), sigmoid)
    x = torch.randn(1, 2, 4, 4)
    y = model(x)
    report = tribp.fuse(model)
    assert report.replaced == (Replaced("0", "Conv2d", "Conv3x3"),)
    assert [(left.name, left.module) for left in report.left] == [("1", type(sigmoid).__name__), ("2", "Linear")]
    assert report.left[0].reason.startswith(f"the Sigmoid at 1 {reason}")
    assert report.left[1].reason.startswith(f"the Sigmoid at 3 {reason}")
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


class Iterated(nn.Sequential):
    def __iter__(self) -> Any:
        return reversed(list(self._modules.values()))


def backwards(*modules: nn.Module) -> nn.Module:
    model = nn.Sequential(*modules)
    return changed(model, forward=lambda x: model[0](model[1](x)))


@pytest.mark.parametrize("container", [Backwards, Iterated, backwards, lambda *modules: nn.ModuleList(modules)])
def test_containers_in_another_order(container: Callable[..., nn.Module]) -> None:
    model = container(nn.Linear(2, 2), nn.Sigmoid())
    (left,) = tribp.fuse(model).left
    assert left == Left("0", "Linear", f"the {type(model).__name__} around 0 need not run its modules in their order")
    model = container(conv(), nn.Sigmoid())
    report = tribp.fuse(model)
    assert report.replaced == (Replaced("0", "Conv2d", "Conv3x3"),)
    assert [(left.name, left.module) for left in report.left] == [("1", "Sigmoid")]
    assert kinds(model) == ["Conv3x3", "Sigmoid"]
    model = container(LinearSigmoid(2, 2), FusedActivation(nn.Sigmoid()))
    assert "need not run" in reasons(tribp.unfuse(model))["0"]
    model = container(Conv3x3(2, 2), nn.Sigmoid())
    assert tribp.unfuse(model).replaced == (Replaced("0", "Conv3x3", "Conv2d"),)


def test_a_sequential_subclass_in_order() -> None:
    model = Ordered(nn.Linear(2, 2), nn.Sigmoid())
    hooked(model)
    assert len(tribp.fuse(model).replaced) == 1
    assert kinds(model) == ["LinearSigmoid", "FusedActivation"]


def test_a_layer_in_several_places() -> None:
    """Its sigmoid is taken in only where one follows at each of them."""
    linear, act = nn.Linear(2, 2), nn.Sigmoid()
    model: Any = nn.Sequential(linear, nn.Sequential(linear, act), linear, act)
    report = tribp.fuse(model)
    assert report == Report((), tuple(Left(n, "Linear", "no activation is behind 0") for n in ("1.0", "2")))
    model = nn.Sequential(linear, act, nn.Sequential(linear, hooked(nn.Sigmoid())))
    expected = "the Sigmoid at 2.1 has forward hooks"
    assert reasons(tribp.fuse(model)) == {"0": expected, "2.0": expected}
    model = nn.Sequential(linear, act, nn.ModuleDict({"head": linear}))
    assert reasons(tribp.fuse(model)) == {"0": "no activation is behind 2.head"}
    model = nn.Sequential(linear, act, nn.Sequential(linear, act, nn.Sigmoid()), linear, nn.Sigmoid())
    x = torch.randn(3, 2)
    y = model(x)
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["", "0", "2.0", "3"]
    assert model[0] is model[2][0] is model[3]
    assert model[1] is model[2][1]
    assert type(model[2][2]) is nn.Sigmoid
    assert torch.equal(model(x), y)
    tribp.unfuse(model)
    assert model[0] is model[2][0] is model[3]
    assert model[1] is model[2][1] is act
    assert torch.equal(model(x), y)


def test_order_of_what_is_left() -> None:
    large = conv(kernel_size=5)
    assert list(reasons(tribp.fuse(nn.Sequential(large, conv(kernel_size=7), large)))) == ["0", "1", "2"]


def test_a_module_that_holds_its_parent() -> None:
    model = sigmoid_after(nn.Linear(2, 2))
    model.append(nn.Module())
    model[2].parent = model
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["0"]


def test_the_model_itself() -> None:
    for module in (conv(), Conv3x3(2, 2), LinearSigmoid(2, 2)):
        change = tribp.fuse if isinstance(module, nn.Conv2d) else tribp.unfuse
        (left,) = change(module).left
        assert (left.name, left.module) == ("", type(module).__name__)
        assert left.reason.startswith("it is the model itself")
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
        "1 replaced, 1 left\n0: Conv2d + Sigmoid → Conv3x3\n2: Conv2d left: its kernel size is (5, 5)"
    )
    assert str(tribp.unfuse(model)) == "1 replaced, 0 left\n0: Conv3x3 → Conv2d + Sigmoid"
    assert str(tribp.fuse(conv())).splitlines()[1].startswith("(the model): Conv2d left: ")


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
    assert report.left == ()
    assert report.replaced == (
        Replaced("0", "Conv3x3", "Conv2d"),
        Replaced("1", "Conv3x3", "Sequential(Conv2d, Sigmoid), keys with 0."),
        Replaced("4", "LinearSigmoid", "Sequential(Linear, Sigmoid), keys with 0."),
    )
    assert repr(model[0]) == repr(nn.Conv2d(2, 4, 3, 2, (1, 2), 1, 2, bias=False, padding_mode="reflect"))
    assert [type(m).__module__.partition(".")[0] for m in model.modules()] == ["torch"] * 10
    assert [m.training for m in model] == [True, True, True, True, False]
    torch.testing.assert_close(model(x), y)
    assert list(model.state_dict()) == ["0.weight", "1.0.weight", "1.0.bias", "4.0.weight", "4.0.bias"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert len(tribp.fuse(model).replaced) == 3
    torch.testing.assert_close(model(x), y)


def test_unfuse_leaves_what_fuse_would() -> None:
    class Mine(Conv3x3):
        pass

    model = nn.Sequential(
        hooked(LinearSigmoid(2, 2)), FusedActivation(nn.Sigmoid()),
        parametrizations.weight_norm(LinearSigmoid(2, 2)), FusedActivation(nn.Sigmoid()),
        LinearSigmoid(2, 2), hooked(FusedActivation(nn.Sigmoid())),
        buffered(Conv3x3(2, 2)), Mine(2, 2),
    )  # fmt: skip
    before = list(model.modules())
    report = tribp.unfuse(model)
    assert report.replaced == ()
    assert [reasons(report)[name][:25] for name in ("0", "2", "4", "6", "7")] == [
        "it has forward hooks", "it is parametrized", "the FusedActivation at 5 ", "it has more than its para",
        "it is a subclass of Conv3",
    ]  # fmt: skip
    assert list(model.modules()) == before


def test_a_fused_model_that_was_taken_apart() -> None:
    model = nn.Sequential(conv(), nn.Sigmoid(), nn.Linear(2, 2), nn.Sigmoid(), conv(), nn.Sigmoid())
    tribp.fuse(model)
    models: list[Any] = [nn.Sequential(*list(copy.deepcopy(model))[part]) for part in (slice(3), slice(3, 6), slice(6))]
    models[2][0].activation = None
    left = [reasons(tribp.unfuse(part)) for part in models]
    nothing_before = "no module that computes the Sigmoid is before it"
    assert left == [{}, {"0": nothing_before}, {"1": nothing_before}]
    assert list(map(kinds, models)) == [
        ["Conv2d", "Sigmoid", "Sequential"],
        ["FusedActivation", "Conv2d", "Sigmoid"],
        ["Conv2d", "FusedActivation", "Linear", "Sigmoid", "Conv2d", "Sigmoid"],
    ]


def test_a_sigmoid_behind_conv3x3() -> None:
    """One that a user wrote there; or that had a hook when the convolution was replaced."""
    model: Any = nn.Sequential(Conv3x3(2, 2, padding="same", padding_mode="circular"), nn.Sigmoid(), conv())
    sigmoid = hooked(nn.Sigmoid())
    model.append(sigmoid)
    model[0].tag = 1
    x = torch.randn(1, 2, 6, 6)
    y = model(x)
    assert [str(entry) for entry in tribp.fuse(model).replaced] == [
        "0: Conv3x3 + Sigmoid → Conv3x3",
        "2: Conv2d → Conv3x3",
    ]
    sigmoid._forward_hooks.clear()
    assert tribp.fuse(model) == Report((Replaced("2", "Conv3x3 + Sigmoid", "Conv3x3"),))
    assert kinds(model) == ["Conv3x3", "FusedActivation"] * 2
    assert model[0].tag == 1
    assert torch.equal(model(x), y)
    assert tribp.unfuse(model).left == ()
    assert torch.equal(model(x), y)
    model = sigmoid_after(hooked(Conv3x3(2, 2)))
    assert tribp.fuse(model) == Report((), (Left("0", "Conv3x3", "it has forward hooks"),))


class FSDPModule(nn.Module):
    """Bears the name of the class that `fully_shard` mixes into a module's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), nn.Sigmoid(), nn.Linear(2, 2), nn.Sigmoid())


def test_fsdp_and_wrappers_that_hold_a_module() -> None:
    sharded = FSDPModule()
    wrapped: Any = torch.compile(conv())
    model = nn.Sequential(sharded, sharded.body[0], nn.Sigmoid(), wrapped, nn.Sigmoid())
    report = tribp.fuse(model)
    assert report.replaced == ()
    assert reasons(report) == {
        **dict.fromkeys(("0.body.0", "0.body.2", "1"), "FSDP holds its parameters"),
        "3._orig_mod": "torch.compile has it, whatever stands in its place",
    }


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Sigmoid, nn.Tanh, nn.ReLU, lambda: nn.ReLU(inplace=True), nn.LeakyReLU, lambda: nn.LeakyReLU(0.3, True), nn.ELU,
    lambda: nn.ELU(0.5), nn.Softplus, lambda: nn.Softplus(2, 18), nn.Hardsigmoid, nn.Hardtanh,
    lambda: nn.Hardtanh(-2, 0.1, True), nn.ReLU6,
]  # fmt: skip


@pytest.mark.parametrize("make", ACTIVATIONS, ids=lambda make: str(make()))
def test_every_activation(make: Callable[[], nn.Module]) -> None:
    """Behind a layer of torch's and behind one of tribp's; in and out again, and where a user built the module."""
    act = make()
    layers = [conv(padding=1), Conv3x3(2, 2, padding=1), nn.Linear(4, 4), tribp.nn.Linear(4, 4)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, act)))
    x = torch.randn(2, 2, 4, 4)
    y = model(x)
    report = tribp.fuse(model)
    assert report.left == ()
    assert [entry.name for entry in report.replaced] == ["", "0", "2", "4", "6"]
    assert all(type(m) is FusedActivation for m in list(model)[1::2])
    assert model[1] is model[3] is model[5] is model[7]
    torch.testing.assert_close(model(x), y)
    assert tribp.fuse(model) == Report()
    copied = copy.deepcopy(model)
    assert tribp.unfuse(copied).left == ()
    torch.testing.assert_close(copied(x), y)
    assert tribp.unfuse(model).left == ()
    assert model[1] is act
    assert [type(m).__name__ for m in model][::2] == ["Conv2d", "Conv2d", "Linear", "Linear"]
    torch.testing.assert_close(model(x), y)
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
    assert report.replaced == (Replaced("0", "Conv2d", "Conv3x3"),)
    assert [(left.name, left.module) for left in report.left] == [("1", "LeakyReLU"), ("2", "Linear")]
    assert report.left[0].reason.startswith("the LeakyReLU at 1: negative_slope of leaky_relu must be at least 0")
    assert report.left[1].reason.startswith("the Softplus at 3: beta of softplus must be above 0 and its threshold")
    torch.testing.assert_close(model(x), y)


def test_a_layer_before_two_activations() -> None:
    linear = nn.Linear(2, 2)
    model = nn.Sequential(linear, nn.ReLU(), linear, nn.Tanh())
    expected = "one activation is behind 0, another behind 2"
    assert reasons(tribp.fuse(model)) == {"0": expected, "2": expected}


def test_an_activation_that_was_changed_after_fuse() -> None:
    """What stands behind no longer stands for it: unfuse keeps what the layer computes."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    tribp.fuse(model)
    model[0].activation = "tanh"
    x = torch.randn(3, 2)
    y = model(x)
    report = tribp.unfuse(model)
    assert reasons(report) == {"1": "no module that computes the ReLU is before it"}
    assert kinds(model) == ["Sequential", "FusedActivation"]
    torch.testing.assert_close(model(x), y)
