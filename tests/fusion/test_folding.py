"""`fuse(model, fold_batchnorm=True)`: what is folded, what is left, and that `unfuse` brings the same tensors back."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp.fusion import FoldedBatchNorm, FusedActivation, Left, Replaced, Report
from tribp.nn import Conv3x3, Linear

from .cases import MODELS, ResNet18, changed, frozen, hooked, image, kinds, reasons

pytestmark = pytest.mark.usefixtures("one_thread")


def prepared(model: Any) -> Any:
    """In eval mode, with statistics and affine parameters that are none of the initial ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def tensors(model: nn.Module) -> dict[str, int]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: id(tensor) for name, tensor in named}


def check(model: Any, x: Tensor) -> Report:
    """Fold and unfold; returns fuse's report."""
    y, before, shown = model(x), tensors(model), repr(model)
    values, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    grads = [p.requires_grad for p in model.parameters()]
    report = tribp.fuse(model, fold_batchnorm=True)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-5)
        if other is not model:
            tribp.unfuse(other)
            assert repr(other) == shown
            assert list(other.state_dict()) == keys
            assert torch.equal(other(x), y)
    assert tribp.fuse(model, fold_batchnorm=True).replaced == ()
    assert tribp.unfuse(model).left == ()
    assert tensors(model) == before
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert repr(model) == shown
    assert torch.equal(model(x), y)
    assert tribp.unfuse(model) == Report()
    return report


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = prepared(MODELS[name]())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    report = check(model, image())
    folded = [entry for entry in report.replaced if "BatchNorm" in entry.was]
    assert len(folded) == (0 if name == "unet" else norms)  # whose batch norms are behind the activations


def test_a_resnet_is_taken_whole() -> None:
    model: Any = prepared(ResNet18())
    report = tribp.fuse(model, fold_batchnorm=True)
    blocks = [f"layer{i}.{j}" for i in (1, 2) for j in (0, 1)]
    assert sorted(map(str, report.replaced)) == sorted(
        [f"{block}.conv{i}: Conv2d + BatchNorm2d → Conv2d" for block in blocks for i in (1, 2)]
        + ["layer2.0.downsample.0: Conv2d + BatchNorm2d → Conv2d"]
        + [f"{block}.conv1: Conv2d + ReLU → Conv3x3" for block in blocks]
        + [f"{block}.conv2: Conv2d → Conv3x3" for block in blocks]
    )
    assert not any("bn" in key or "running" in key for key in model.state_dict())
    block = model.layer1[0]
    assert (block.conv1.activation, block.conv2.activation) == ("relu", None)
    assert type(block.bn1) is FoldedBatchNorm
    assert isinstance(block.relu, nn.ReLU)  # which the sum still needs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace", "fx", "export", "compile"])
def test_torch_around_a_folded_model(how: str) -> None:
    torch.compiler.reset()
    model, x = prepared(ResNet18()).requires_grad_(False), image()
    y = model(x)
    tribp.fuse(model, fold_batchnorm=True)
    ways: dict[str, Callable[[], Any]] = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, x),
        "fx": lambda: torch.fx.symbolic_trace(model.layer1[0]),
        "export": lambda: torch.export.export(model, (x,)).module(),
        "compile": lambda: torch.compile(model, fullgraph=True, backend="aot_eager"),
    }
    made = ways[how]()
    x, y = (torch.relu(model.stem(x)), None) if how == "fx" else (x, y)
    torch.testing.assert_close(made(x), model.layer1[0](x) if y is None else y, rtol=1e-4, atol=1e-5)


LAYERS: list[tuple[str, Callable[[], list[nn.Module]], tuple[int, ...]]] = [
    ("conv 3×3", lambda: [nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4)], (2, 2, 6, 6)),
    ("conv 1×1 without bias", lambda: [nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4)], (2, 2, 6, 6)),
    ("groups", lambda: [nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)], (2, 4, 6, 6)),
    ("circular", lambda: [nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)], (2, 2, 6, 6)),
    ("without affine", lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)], (2, 2, 6, 6)),
    ("eps", lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.5, momentum=None)], (2, 2, 6, 6)),
    ("linear", lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4)], (5, 3)),
    ("linear without bias", lambda: [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False)], (5, 3)),
    ("tribp's", lambda: [Conv3x3(2, 4), nn.BatchNorm2d(4)], (2, 2, 6, 6)),
    ("tribp's linear", lambda: [Linear(3, 4), nn.BatchNorm1d(4)], (5, 3)),
]  # fmt: skip


@pytest.mark.parametrize("activation", [None, nn.ReLU, lambda: nn.LeakyReLU(0.2)])
@pytest.mark.parametrize(("make", "shape"), [case[1:] for case in LAYERS], ids=[case[0] for case in LAYERS])
def test_layers_in_a_sequential(
    make: Callable[[], list[nn.Module]], shape: tuple[int, ...], activation: Callable[[], nn.Module] | None
) -> None:
    layer, norm = make()
    model = prepared(nn.Sequential(layer, norm, *([activation()] if activation else []), nn.Flatten()))
    x = torch.randn(shape)
    y = model(x)
    report = tribp.fuse(model, fold_batchnorm=True)
    assert report.replaced[0].was.endswith(f" + {type(norm).__name__}")
    assert kinds(model)[1] == "FoldedBatchNorm"
    taken = isinstance(model[0], (Conv3x3, Linear)) and model[0].activation is not None
    assert taken == (activation is not None and getattr(layer, "kernel_size", None) != (1, 1))
    assert (type(model[2]) is FusedActivation) == taken
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    tribp.unfuse(model)
    if "tribp" not in type(layer).__module__:
        assert type(model[0]) is type(layer)
    assert model[1] is norm
    assert model[0].weight is layer.weight
    assert model[0].bias is layer.bias
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(dtype))
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    x = torch.randn(2, 2, 6, 6, dtype=dtype)
    y = model(x)
    tribp.fuse(model, fold_batchnorm=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(model(x), y, rtol=tolerance, atol=tolerance)


def test_training_mode_is_refused() -> None:
    for model in (MODELS["resnet"](), changed(prepared(MODELS["resnet"]()), training=True)):
        modules = list(model.modules())
        with pytest.raises(ValueError, match="fold_batchnorm=True needs a model in eval mode, but the model is in"):
            tribp.fuse(model, fold_batchnorm=True)
        assert list(model.modules()) == modules
    model = prepared(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)))
    model[1].train()
    with pytest.raises(ValueError, match="but the BatchNorm2d at 1 is in training mode"):
        tribp.fuse(model, fold_batchnorm=True)


def test_training_a_folded_model_is_refused() -> None:
    model, x = prepared(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU())), torch.randn(2, 2, 5, 5)
    y = model(x)
    tribp.fuse(model, fold_batchnorm=True)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"a folded batch norm cannot train: call tribp.unfuse\(model\) before"):
        model.train()(x)
    tribp.unfuse(model)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(x), y)


def test_other_dimensions_are_refused() -> None:
    """A BatchNorm1d on three dimensions is another function; so is what torch refuses of a BatchNorm2d."""
    model = prepared(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    tribp.fuse(model, fold_batchnorm=True)
    with pytest.raises(RuntimeError, match="a folded batch norm takes 2 dimensions, got 3"):
        model(torch.randn(2, 4, 3))
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    tribp.fuse(model, fold_batchnorm=True)
    with pytest.raises(RuntimeError, match="a folded batch norm takes 4 dimensions, got 3"):
        model(torch.randn(3, 4, 4))


class MyNorm(nn.BatchNorm2d):
    pass


def trained(norm: nn.Module, name: str) -> nn.Module:
    """The batch norm with a statistic that has become a parameter."""
    statistic = norm._buffers.pop(name)
    assert statistic is not None
    norm.register_parameter(name, nn.Parameter(statistic))
    return norm


LEFT: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.BatchNorm2d(2, track_running_stats=False), "it has no running statistics"),
    (lambda: hooked(nn.BatchNorm2d(2)), "it has forward hooks"),
    (lambda: MyNorm(2), "it is a subclass of BatchNorm2d: "),
    (lambda: nn.BatchNorm1d(2), "it is no BatchNorm2d"),
    (lambda: changed(nn.BatchNorm2d(2), forward=F.relu), "it has a forward of its own"),
    (lambda: nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(2), "weight", nn.Identity()), "it is param"),
    (lambda: nn.BatchNorm2d(3), "its weight has the shape (3,), the layer's weight (2, 2, 3, 3)"),
    (lambda: frozen(nn.BatchNorm2d(2)), "it has a weight that is no parameter"),
    (lambda: trained(nn.BatchNorm2d(2), "running_var"), "it has a running_var that is no buffer"),
    (lambda: nn.BatchNorm2d(2, device="meta"), "its weight is on meta, the layer's weight on cpu"),
]


@pytest.mark.parametrize(("make", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_norms_that_are_left(make: Callable[[], nn.Module], reason: str) -> None:
    norm = make().eval()
    model = nn.Sequential(nn.Conv2d(2, 2, 3), norm, nn.ReLU()).eval()
    report = tribp.fuse(model, fold_batchnorm=True)
    assert report.replaced == (Replaced("0", "Conv2d", "Conv3x3"),)
    assert reasons(report)["1"].startswith(reason)
    assert model[1] is norm


def test_layers_that_are_left() -> None:
    for layer in (hooked(nn.Conv2d(2, 2, 3)), frozen(nn.Conv2d(2, 2, 3)), type("Mine", (nn.Conv2d,), {})(2, 2, 3)):
        model = prepared(nn.Sequential(layer, nn.BatchNorm2d(2)))
        assert "1" in reasons(tribp.fuse(model, fold_batchnorm=True))
        assert model[0] is layer
    norm, layer = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)
    shared = "it or the layer before it stands at several places, or is called several times"
    for modules in ([layer, norm, layer, nn.BatchNorm2d(2)], [layer, norm, nn.Conv2d(2, 2, 3), norm]):
        model = prepared(nn.Sequential(*modules))
        report = tribp.fuse(model, fold_batchnorm=True)
        assert set(report.left) == {Left(name, "BatchNorm2d", shared) for name in ("1", "3")}
    model = prepared(nn.Sequential(Conv3x3(2, 2, activation="relu"), nn.BatchNorm2d(2)))
    assert tribp.fuse(model, fold_batchnorm=True) == Report()


class Taps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x := layer(x) for layer in self.features]


def test_a_sequential_whose_outputs_are_read_between() -> None:
    model, x = prepared(Taps()), torch.randn(2, 2, 5, 5)
    y = model(x)
    report = tribp.fuse(model, fold_batchnorm=True)
    assert reasons(report) == {"features.1": "Taps.forward does something else with features than to call it"}
    torch.testing.assert_close(model(x), y)


def test_two_batch_norms_in_a_row() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.ReLU()))
    assert len(tribp.fuse(model, fold_batchnorm=True).replaced) == 2
    left = tribp.fuse(model, fold_batchnorm=True).left
    assert left == (Left("2", "BatchNorm2d", "another batch norm is folded into the layer before it"),)


class InForward(nn.Module):
    """Whose forward is `how` of those below."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.second = (
            nn.Conv2d(2, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.Conv2d(2, 2, 3, padding=1),
        )
        self.__class__ = {kind.__name__: kind for kind in InForward.__subclasses__()}[how]


class Plain(InForward):
    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.conv(x))
        return F.relu(x)


class Used(InForward):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y


class NormTwice(InForward):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn(self.second(x))


class LayerTwice(InForward):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.conv(x)


class WeightRead(InForward):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.conv.weight.sum()


class NormRead(InForward):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn.running_mean.sum()  # type: ignore[union-attr]


class OtherMethod(InForward):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))

    def penalty(self) -> Tensor:
        return self.conv.weight.square().sum()


@pytest.mark.parametrize(
    ("how", "reason"),
    {
        "Plain": "",
        "Used": "Used.forward may do something else with what conv returns",
        "NormTwice": "NormTwice.forward calls it several times",
        "LayerTwice": "it or the layer before it stands at several places, or is called several times",
        "WeightRead": "WeightRead.forward does something else with conv, too",
        "NormRead": "NormRead.forward does something else with bn, too",
        "OtherMethod": "OtherMethod.penalty mentions conv, too",
    }.items(),
)
def test_in_a_forward(how: str, reason: str) -> None:
    report = check(prepared(InForward(how)), torch.randn(2, 2, 5, 5))
    assert report.left == ((Left("bn", "BatchNorm2d", reason),) if reason else ()) or how == "NormTwice"
    assert set(reasons(report).values()) == ({reason} if reason else set())
    if not reason:
        assert list(map(str, report.replaced)) == [
            "conv: Conv2d + BatchNorm2d → Conv2d",
            "conv: Conv2d + ReLU → Conv3x3",
            "second: Conv2d → Conv3x3",
        ]


def test_moved_while_folded() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(2, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU()))
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(model).double()(x)
    before = tensors(model)
    tribp.fuse(model, fold_batchnorm=True)
    assert list(model.double().state_dict()) == ["0.weight", "0.bias"]
    tribp.unfuse(model)
    assert {name: tensors(model)[name] for name, _ in model.named_parameters()} == {
        name: before[name] for name, _ in model.named_parameters()
    }
    assert torch.equal(model(x), expected)


def test_unfuse_of_what_was_changed_after_folding() -> None:
    def make() -> Any:
        model = prepared(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))
        tribp.fuse(model, fold_batchnorm=True)
        return model

    model, x = make(), torch.randn(2, 2, 5, 5)
    y = model(x)
    hooked(model[0])
    assert reasons(tribp.unfuse(model)) == {"0": "it has forward hooks", "1": "the layer at 0 has forward hooks"}
    assert torch.equal(model(x), y)
    model = make()
    y = model(x)
    hooked(model[2])
    assert reasons(tribp.unfuse(model)) == {
        "0": "the FusedActivation at 2 has forward hooks",
        "1": "the layer at 0 computes an activation",
    }
    assert torch.equal(model(x), y)
    model = make()
    y = model(x)
    model[2] = nn.Identity()
    report = tribp.unfuse(model)
    assert reasons(report) == {"1": "the layer that it was folded into is not beside it"}
    torch.testing.assert_close(model(x), y)
    model = make()
    model[0].weight = nn.Parameter(torch.ones(2, 2, 3, 3))
    assert reasons(tribp.unfuse(model)) == {"1": "the layer that it was folded into is not beside it"}
