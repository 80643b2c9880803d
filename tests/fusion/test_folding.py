"""`fuse(model, fold_batchnorm=True)`: what is folded and when, what is skipped, and that every tensor stays."""

import contextlib
import copy
import gc
import pickle
import unittest.mock
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import tribp
from tribp.fusion import Replaced, Report
from tribp.fusion.folding import folded
from tribp.nn import Conv3x3, Linear

from .cases import MODELS, Called, ResNet18, changed, hooked, image, reasons
from .cases import frozen as buffered

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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Its parameters want no gradient."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    for p in wanting:
        p.requires_grad_(False)
    yield
    for p in wanting:
        p.requires_grad_(True)


def folds(model: nn.Module, x: Tensor) -> int:
    """How many batch norms are part of a layer in a call."""
    with unittest.mock.patch("tribp.fusion.rows.folded", wraps=folded) as seen:
        model(x)
    return seen.call_count


def check(model: Any, x: Tensor) -> Report:
    """Fold and unfold; returns fuse's report."""
    y, before, shown = model(x), tensors(model), repr(model)
    values, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    report = tribp.fuse(model, fold_batchnorm=True)
    norms = sum("BatchNorm" in entry.was for entry in report.replaced)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == keys
        assert torch.equal(other(x), y), "gradients are wanted"
        with frozen(other):
            assert folds(other, x) == norms
            torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-5)
    assert tribp.fuse(model, fold_batchnorm=True).replaced == ()
    assert tribp.unfuse(model).skipped == ()
    assert tensors(model) == before
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert repr(model) == shown
    with torch.no_grad():
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
    model: Any = prepared(ResNet18()).requires_grad_(False)
    report = tribp.fuse(model, fold_batchnorm=True)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    downsamples = [f"layer{i}.0.downsample" for i in (2, 3, 4)]
    assert sorted(map(str, report.replaced)) == sorted(
        [f"{block}: TorchvisionBlock -> fused TorchvisionBlock" for block in blocks]
        + [f"{downsample}: Sequential -> FusedSequential" for downsample in downsamples]
        + [f"{downsample}.0: Conv2d + BatchNorm2d -> conv2d" for downsample in downsamples]
        + ["(the model): ResNet18 -> fused ResNet18", "conv1: Conv2d + BatchNorm2d -> conv2d"]
        + [f"{block}.conv1: Conv2d + BatchNorm2d + ReLU -> conv3x3" for block in blocks]
        + [f"{block}.conv2: Conv2d + BatchNorm2d -> conv3x3" for block in blocks]
    )
    with frozen(model), Called() as called:
        model(image())
    assert called.activations == ["relu", None] * 8


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
    x, y = (torch.relu(model.conv1(x)), None) if how == "fx" else (x, y)
    torch.testing.assert_close(made(x), model.layer1[0](x) if y is None else y, rtol=1e-4, atol=1e-5)


def test_compiled_graphs_fold_what_they_are_given() -> None:
    """They keep nothing: another weight counts in the next call."""
    torch.compiler.reset()
    model, x = prepared(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU())), torch.randn(2, 2, 5, 5)
    tribp.fuse(model.requires_grad_(False), fold_batchnorm=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), copy.deepcopy(model).requires_grad_(True)(x).detach())
        model[0].weight.data.mul_(2)
        model[1].running_mean.add_(1)


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
    assert f" + {type(norm).__name__}" in report.replaced[1].was
    with frozen(model), Called() as called:
        assert folds(model, x) == 1
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    taken = getattr(layer, "kernel_size", None) != (1, 1)
    assert [act is not None for act in called.activations] == [activation is not None] * (2 * taken)
    tribp.unfuse(model)
    assert model[1] is norm
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(dtype))
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    x = torch.randn(2, 2, 6, 6, dtype=dtype)
    y = model(x)
    tribp.fuse(model, fold_batchnorm=True)
    weight, bias = folded(model[0], model[1])
    assert (weight.dtype, bias.dtype) == (dtype, dtype)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
    with frozen(model):
        torch.testing.assert_close(model(x), y, rtol=tolerance, atol=tolerance)


def network() -> Any:
    return prepared(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))


def test_in_training_the_batch_norm_runs() -> None:
    """And it may be fused then; statistics, gradients and outputs are torch's."""
    model, x = network().train(), torch.randn(2, 2, 5, 5)
    plain = copy.deepcopy(model)
    tribp.fuse(model, fold_batchnorm=True)
    for m in (model, plain):
        m(x).square().sum().backward()
    assert all(map(torch.equal, model.buffers(), plain.buffers()))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    with frozen(model):
        assert folds(model, x) == 0
        model[1].eval()
        assert folds(model, x) == 1
    with torch.no_grad():
        assert folds(model, x) == 0, "what is trained may be written without a count"
    assert str(tribp.fuse(network(), fold_batchnorm=True)).splitlines()[2] == (
        "0: Conv2d + BatchNorm2d + ReLU -> conv3x3 once frozen, in evaluation mode"
    )


def test_gradients_are_none_the_worse() -> None:
    """Where a parameter of the two wants one, nothing is folded; an input's passes through the folded layer."""
    model, x = network(), torch.randn(2, 2, 5, 5, requires_grad=True)
    plain = copy.deepcopy(model)
    tribp.fuse(model, fold_batchnorm=True)
    for trained in ("0.weight", "0.bias", "1.weight", "1.bias", ""):
        for m in (model, plain):
            for name, p in m.named_parameters():
                p.requires_grad_(name == trained)
        assert folds(model, x) == (not trained)
        wanted = [(m.get_parameter(trained) if trained else x) for m in (model, plain)]
        grads = [torch.autograd.grad(m(x).sum(), w)[0] for m, w in zip((model, plain), wanted, strict=True)]
        torch.testing.assert_close(*grads)


def trained_by_fused(model: Any) -> None:
    """Which writes parameters, and no version is counted."""
    model.requires_grad_(True)
    with torch.enable_grad():
        model(torch.linspace(-9, 9, 100).view(2, 2, 5, 5)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters())
    torch.optim.SGD(model.parameters(), 0.1, fused=True).step()
    model.requires_grad_(False)


CHANGES: dict[str, Callable[[Any], object]] = {
    "weight": lambda m: m[0].weight.mul_(2),
    "bias": lambda m: m[0].bias.zero_(),
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 2, 3, 3), False)),
    "weight as an attribute": lambda m: vars(m[0]).update(weight=torch.ones(2, 2, 3, 3)),
    "two other weights": lambda m: [m[0].weight.set_(torch.full((2, 2, 3, 3), v)) for v in (1.0, 2.0)],
    "turned": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.transpose(2, 3), False)),
    "negative": lambda m: setattr(m[0], "weight", nn.Parameter(torch._neg_view(m[0].weight), False)),
    "a step of a fused optimizer": trained_by_fused,
    "there and back": lambda m: m[0].to(torch.float8_e5m2).to(torch.float32),
    "data of the weight": lambda m: setattr(m[0].weight, "data", torch.ones(2, 2, 3, 3)),
    "mean": lambda m: m[1].running_mean.add_(1),
    "variance": lambda m: m[1].running_var.mul_(3),
    "another variance": lambda m: m[1]._buffers.update(running_var=torch.ones(2)),
    "gamma": lambda m: m[1].weight.neg_(),
    "beta": lambda m: m[1].bias.neg_(),
    "no gamma": lambda m: setattr(m[1], "weight", None),
    "eps": lambda m: setattr(m[1], "eps", 2.0),
    "checkpoint": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "dtype": lambda m: m.double(),
    "no bias": lambda m: setattr(m[0], "bias", None),
    "statistics": lambda m: m.train()(torch.ones(2, 2, 5, 5)),
    "another layer": lambda m: m.__setitem__(0, nn.Conv2d(2, 2, 1)),
    "another norm": lambda m: m.__setitem__(1, nn.BatchNorm2d(2).eval()),
    "hook": lambda m: m[1].register_forward_hook(lambda m, i, y: y + 1),
    "activation between": lambda m: m.insert(1, nn.Tanh()),
    "no statistics": lambda m: m[1]._buffers.update(running_mean=None, running_var=None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_counts_in_the_next_call(change: Callable[[Any], object]) -> None:
    model, x = network().requires_grad_(False), torch.randn(2, 2, 5, 5)
    plain = copy.deepcopy(model)
    tribp.fuse(model, fold_batchnorm=True)
    with torch.no_grad():
        assert folds(model, x) == 1
        with torch.random.fork_rng():
            change(model)
        change(plain)
        for m in (model, plain):
            m.eval()
        x = x.to(next(model.parameters()).dtype)
        expected = plain(x)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_folded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in each call; nor of a model that is gone."""
    from tribp.fusion import folding

    made = unittest.mock.Mock(wraps=folding._fold)
    monkeypatch.setattr(folding, "_fold", made)
    model, x = network().requires_grad_(False), torch.randn(2, 2, 5, 5)
    tribp.fuse(model, fold_batchnorm=True)
    y = model(x)
    assert torch.equal(model(x), y)
    assert made.call_count == 1
    norm = weakref.ref(model[1])
    assert norm() in folding._known
    del model
    gc.collect()
    assert norm() is None
    with torch.inference_mode():
        model = network().requires_grad_(False)
        tribp.fuse(model, fold_batchnorm=True)
        assert folds(model, x) == folds(model, x) == 1
    assert made.call_count == 3


def test_folded_first_in_inference_mode() -> None:
    """What is kept serves a call that backward will pass: a frozen network within a loss."""
    model, x = network().requires_grad_(False), torch.randn(2, 2, 5, 5, requires_grad=True)
    plain = copy.deepcopy(model)
    tribp.fuse(model, fold_batchnorm=True)
    with torch.inference_mode():
        model(x)
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, plain)]
    torch.testing.assert_close(*grads)


def test_a_model_that_moves_leaves_nothing_behind() -> None:
    model, x = network().requires_grad_(False), torch.randn(2, 2, 5, 5)
    tribp.fuse(model, fold_batchnorm=True)
    expected = model(x)
    held: list[Any] = [StorageWeakRef(t.untyped_storage()) for t in (model[0].weight, model[1].running_var)]
    model.double()
    gc.collect()
    assert [ref.expired() for ref in held] == [True, True]
    torch.testing.assert_close(model(x.double()), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_folds_at_every_replay() -> None:
    model, x = network().cuda().requires_grad_(False), torch.randn(2, 2, 5, 5, device="cuda")
    plain = copy.deepcopy(model)
    tribp.fuse(model, fold_batchnorm=True)
    for _ in range(3):
        model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    for m in (model, plain):
        m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()})
    model(x)  # what was kept is made anew
    graph.replay()
    torch.testing.assert_close(y, plain(x), rtol=1e-2, atol=1e-2)


def test_batches_that_are_not_counted() -> None:
    model, x = network().requires_grad_(False), torch.randn(2, 2, 5, 5)
    model[1].num_batches_tracked = None
    tribp.fuse(model, fold_batchnorm=True)
    for _ in range(2):
        plain = copy.deepcopy(model)
        tribp.unfuse(plain)
        torch.testing.assert_close(model(x), plain(x))
        model.train()(x)
        model.eval()


def test_under_transforms() -> None:
    """And with tensors that are attributes, whose gradients are another's."""
    model, x = network().requires_grad_(False), torch.randn(2, 2, 5, 5)
    weights = torch.stack([model[0].weight, 2 * model[0].weight])

    def ensemble(m: nn.Module) -> Any:
        return torch.func.vmap(lambda w: torch.func.functional_call(m, {"0.weight": w}, (x,)))(weights)

    def tangent(m: nn.Module) -> Any:
        call = lambda w: torch.func.functional_call(m, {"0.weight": w}, (x,))  # noqa: E731
        return torch.func.jvp(call, (weights[0],), (weights[1],))[1]

    expected = ensemble(model), tangent(model)
    tribp.fuse(model, fold_batchnorm=True)
    for found, value in zip((ensemble(model), tangent(model)), expected, strict=True):
        torch.testing.assert_close(found, value)
    gamma = torch.ones(2, requires_grad=True)
    del model[1].weight
    model[1].weight = 2 * gamma
    assert model(x).requires_grad


def test_of_other_dimensions_it_is_another_function() -> None:
    model, x = prepared(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), torch.randn(2, 4, 3)
    with frozen(model):
        y = model(x)
        tribp.fuse(model, fold_batchnorm=True)
        assert torch.equal(model(x), y)
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).requires_grad_(False)
    tribp.fuse(model, fold_batchnorm=True)
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.randn(3, 4, 4))


class MyNorm(nn.BatchNorm2d):
    pass


def trained(norm: nn.Module, name: str) -> nn.Module:
    """The batch norm with a statistic that has become a parameter."""
    statistic = norm._buffers.pop(name)
    assert statistic is not None
    norm.register_parameter(name, nn.Parameter(statistic))
    return norm


UNFIT = "its tensors do not fit"
SKIPPED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.BatchNorm2d(2, track_running_stats=False), UNFIT),
    (lambda: hooked(nn.BatchNorm2d(2)), "it has forward hooks"),
    (lambda: MyNorm(2), "it is a subclass of BatchNorm2d: "),
    (lambda: nn.BatchNorm1d(2), UNFIT),
    (lambda: changed(nn.BatchNorm2d(2), forward=F.relu), "it has a forward of its own"),
    (lambda: nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(2), "weight", nn.Identity()), "it is param"),
    (lambda: nn.BatchNorm2d(3), UNFIT),
    (lambda: trained(nn.BatchNorm2d(2), "running_var"), UNFIT),
    (lambda: nn.BatchNorm2d(2, device="meta"), UNFIT),
]


@pytest.mark.parametrize(("make", "reason"), SKIPPED)
def test_norms_that_are_skipped(make: Callable[[], nn.Module], reason: str) -> None:
    norm = make().eval()
    model = nn.Sequential(nn.Conv2d(2, 2, 3), norm, nn.ReLU()).eval()
    report = tribp.fuse(model, fold_batchnorm=True)
    assert report.replaced == (Replaced("0", "Conv2d", "conv3x3"),)
    assert reasons(report)["1"].startswith(reason)
    assert model[1] is norm


def test_layers_that_are_skipped() -> None:
    for layer in (hooked(nn.Conv2d(2, 2, 3)), buffered(nn.Conv2d(2, 2, 3)), type("Mine", (nn.Conv2d,), {})(2, 2, 3)):
        model = prepared(nn.Sequential(layer, nn.BatchNorm2d(2)))
        assert {"0", "1"} & reasons(tribp.fuse(model, fold_batchnorm=True)).keys()
        assert type(model[1]) is nn.BatchNorm2d
    model = prepared(nn.Sequential(Conv3x3(2, 2, activation="relu"), nn.BatchNorm2d(2)))
    assert tribp.fuse(model, fold_batchnorm=True) == Report()


def test_what_is_shared_is_folded_at_each_place() -> None:
    norm, layer = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)
    x = torch.randn(2, 2, 5, 5)
    for modules in ([layer, norm, layer, nn.BatchNorm2d(2)], [layer, norm, nn.Conv2d(2, 2, 3, padding=1), norm]):
        model = prepared(nn.Sequential(*modules))
        check(model, x)
        tribp.fuse(model, fold_batchnorm=True)
        with frozen(model):
            assert folds(model, x) == 2
        tribp.unfuse(model)


class Taps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x := layer(x) for layer in self.features]


def test_a_sequential_whose_outputs_are_read_between() -> None:
    model, x = prepared(Taps()), torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        y = model(x)
        tribp.fuse(model, fold_batchnorm=True)
        assert all(map(torch.equal, model(x), y))


def test_two_batch_norms_in_a_row() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.ReLU()))
    report = check(model, torch.randn(2, 2, 5, 5))
    assert report.skipped == ()
    assert [entry.was for entry in report.replaced] == ["Sequential", "Conv2d + BatchNorm2d"]


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


@pytest.mark.parametrize("how", [kind.__name__ for kind in InForward.__subclasses__()])
def test_in_a_forward(how: str) -> None:
    model, x = prepared(InForward(how)), torch.randn(2, 2, 5, 5)
    report = check(model, x)
    assert set(reasons(report).values()) <= {"Used.forward may do something else with what conv returns"}
    tribp.fuse(model, fold_batchnorm=True)
    with frozen(model):
        assert folds(model, x) == {"NormTwice": 2, "Used": 0}.get(how, 1)
    if how == "Plain":
        assert list(map(str, report.replaced)) == [
            "(the model): Plain -> fused Plain",
            "conv: Conv2d + BatchNorm2d + ReLU -> conv3x3 once frozen, in evaluation mode",
            "second: Conv2d -> conv3x3",
        ]


def test_fused_before() -> None:
    """To fold as well is one more call."""
    model, x = prepared(InForward("Plain")), torch.randn(2, 2, 5, 5)
    with frozen(model):
        y = model(x)
        assert len(tribp.fuse(model).replaced) == 2
        assert folds(model, x) == 0
        assert len(tribp.fuse(model, fold_batchnorm=True).replaced) == 2
        assert folds(model, x) == 1
        torch.testing.assert_close(model(x), y)
