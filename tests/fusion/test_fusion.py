"""Whole models: `fuse` replaces what it says and nothing else, `unfuse` goes back; and torch around fused models."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tribp
from tribp.fusion import Left, Report
from tribp.nn import Conv3x3

from .cases import MODELS, image, kinds, reasons, sigmoid_after

pytestmark = pytest.mark.usefixtures("one_thread")

REPLACED = {
    "lenet": {
        "Conv2d + Sigmoid → Conv3x3": ["0.0", "0.3"],
        "Linear + Sigmoid → LinearSigmoid": ["2.0", "2.2"],
        "torch.nn.Linear → tribp.nn.Linear": ["2.4"],
        "Sequential → FusedSequential": ["2"],
    },
    "resnet": {
        "Conv2d → Conv3x3": [f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2)],
    },
    "nested": {
        "Conv2d → Conv3x3": ["gate.convs.0", "conv", "body.0"],
        "Conv2d + Sigmoid → Conv3x3": ["tail.0", "tail.2"],
        "Linear + Sigmoid → LinearSigmoid": ["gate.heads.a.0", "gate.heads.a.2.0", "head.0", "head.2"],
        "Sequential → FusedSequential": ["gate.heads.a", "head"],
    },
    "vgg": {
        "Conv2d + ReLU → Conv3x3": [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 23, 25, 27)],
        "Linear + ReLU → tribp.nn.Linear": ["classifier.0", "classifier.3"],
        "torch.nn.Linear → tribp.nn.Linear": ["classifier.5"],
        "Sequential → FusedSequential": ["classifier"],
    },
    "functional_lenet": {
        "Conv2d + ReLU → Conv3x3": ["conv1"],
        "Conv2d + Tanh → Conv3x3": ["conv2"],
        "Linear + LeakyReLU → tribp.nn.Linear": ["fc1"],
        "Linear + Sigmoid → LinearSigmoid": ["fc2"],
    },
    "unet": {
        "Conv2d + ReLU6 → Conv3x3": [f"{block}.conv1" for block in ("inc", "down", "up2")],
        "Conv2d + ReLU → Conv3x3": [f"{block}.conv2" for block in ("inc", "down", "up2")],
    },
}
REPLACED["resnet18"] = REPLACED["resnet"]
LEFT = {
    "lenet": [("0.6", "Conv2d", "its kernel size is (5, 5)")],
    "resnet": [
        ("stem", "Conv2d", "its kernel size is (7, 7)"),
        ("layer2.0.downsample.0", "Conv2d", "its kernel size is (1, 1)"),
    ],
    "nested": [
        ("gate.convs.1", "Conv2d", "its kernel size is (1, 3)"),
        ("body.1", "Sigmoid", "no activation is behind conv"),
    ],
    "vgg": [],
    "functional_lenet": [],
    "unet": [("outc", "Conv2d", "its kernel size is (1, 1)")],
}
LEFT["resnet18"] = LEFT["resnet"]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> nn.Module:
    return MODELS[name]()


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and every gradient."""
    y = model(x)
    weights = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), weights)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def seen(model: nn.Module) -> dict[str, object]:
    """Everything about a model that fuse must not change, with the identity of every Parameter."""
    state = model.state_dict()
    return {
        "keys": list(state),
        "metadata": getattr(state, "_metadata"),  # noqa: B009
        "parameters": [(name, id(p), id(p.grad), p.requires_grad) for name, p in model.named_parameters()],
        "with ties": [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        "modes": [(name, module.training) for name, module in model.named_modules(remove_duplicate=False)],
        "random": torch.get_rng_state().tolist(),
    }


def attributes(model: nn.Module) -> list[tuple[type, dict[str, object]]]:
    """The class and the attributes of every module, children by their identity where they hold nothing else."""
    plain = [{k: v for k, v in vars(m).items() if k not in ("_modules", "_parameters")} for m in model.modules()]
    sigmoids = [{k: id(m) for k, m in p._modules.items() if isinstance(m, nn.Sigmoid)} for p in model.modules()]
    return [(type(m), {**p, **s}) for m, p, s in zip(model.modules(), plain, sigmoids, strict=True)]


def test_report_of_a_model(name: str, model: nn.Module) -> None:
    report = tribp.fuse(model)
    expected = [(place, *change.split(" → ")) for change, places in REPLACED[name].items() for place in places]
    assert sorted(report.replaced) == sorted(expected)
    order = [place for place, _ in model.named_modules(remove_duplicate=False)]
    assert [entry.name for entry in report.replaced] == sorted((e.name for e in report.replaced), key=order.index)
    assert list(report.left) == [Left(*left) for left in LEFT[name]]
    for place, _, now in report.replaced:
        assert type(model.get_submodule(place)).__name__ == now.rpartition(".")[2]


def test_nothing_else_changes_and_everything_comes_back(name: str, model: nn.Module) -> None:
    x = image()
    expected = run(model, x)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before, repr_before, attributes_before = seen(model), repr(model), attributes(model)
    tribp.fuse(model)
    assert seen(model) == before
    assert repr(model) != repr_before
    assert same(run(model, x), expected)
    report = tribp.unfuse(model)
    assert seen(model) == before
    assert repr(model) == repr_before
    assert attributes(model) == attributes_before
    assert same(run(model, x), expected)
    assert {f"{now} → {was}" for _, was, now in report.replaced} == set(REPLACED[name])
    assert report.left == ()


def test_twice_changes_nothing(name: str, model: nn.Module) -> None:
    first = tribp.fuse(model)
    modules = list(model.modules())
    second = tribp.fuse(model)
    assert second == Report((), first.left)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    tribp.unfuse(model)
    modules = list(model.modules())
    assert tribp.unfuse(model) == Report()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_checkpoints_load_both_ways(name: str, model: nn.Module) -> None:
    x, other = image(), MODELS[name]()
    expected = run(model, x)
    tribp.fuse(other)
    other.load_state_dict(model.state_dict())
    assert same(run(other, x)[:1], expected[:1])
    plain = MODELS[name]()
    plain.load_state_dict(other.state_dict())
    assert same(run(plain, x), expected)


def test_an_optimizer_built_before_goes_on(name: str, model: nn.Module) -> None:
    plain, x = copy.deepcopy(model), image()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, plain)]
    for step in range(3):
        if step == 1:
            tribp.fuse(model)
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_of_a_fused_model(how: str, name: str, model: nn.Module) -> None:
    x = image()
    expected, before, keys = run(model, x), repr(model), list(model.state_dict())
    tribp.fuse(model)
    if how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert same(run(other, x), expected)
    tribp.unfuse(other)
    assert repr(other) == before
    assert list(other.state_dict()) == keys
    assert same(run(other, x), expected)
    assert "FusedActivation" not in repr(other)


def test_ties_stay() -> None:
    model: Any = MODELS["nested"]()
    for change in (tribp.fuse, tribp.unfuse):
        act = model.gate.act
        change(model)
        assert model.again is model.gate
        assert model.body[0] is model.conv
        assert model.body[1] is model.gate.act is act
        assert model.head[0].weight is model.head[2].weight
        assert model.tail[1] is model.tail[3] is model.head[1] is model.gate.heads["a"][1]
        assert (model.tail[1] is act) == (change is tribp.unfuse)
        assert model.head[3] is not model.head[1]


def test_after_fuse_mode_and_dtype_follow() -> None:
    model = sigmoid_after(nn.Linear(4, 3))
    tribp.fuse(model)
    model.eval().to(torch.float64).requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64)
    y = model(x)
    tribp.unfuse(model)
    assert [m.training for m in model.modules()] == [False] * 3
    assert torch.equal(model(x), y)
    assert not any(p.requires_grad for p in model.parameters())


def test_mode_of_each_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3).eval(), nn.Sigmoid(), nn.Linear(3, 3), nn.Sigmoid().eval())
    modes = [False, True, True, False]
    for change in (tribp.fuse, tribp.unfuse):
        change(model)
        assert [m.training for m in model] == modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, dtype=dtype), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2, dtype=dtype))
    model.append(nn.Sigmoid())
    x = torch.randn(3, 1, 4, 4, dtype=dtype)
    y = model(x)
    with torch.device("meta"):  # that nothing is built on
        tribp.fuse(model)
    assert kinds(model) == ["Conv3x3", "FusedActivation", "Flatten", "LinearSigmoid", "FusedActivation"]
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, "cpu")}
    assert torch.equal(model(x), y)
    with torch.device("meta"):
        tribp.unfuse(model)
    assert torch.equal(model(x), y)


def test_models_without_memory() -> None:
    with torch.device("meta"):
        model = MODELS["lenet"]()
    assert len(tribp.fuse(model).replaced) == 6
    assert {p.device.type for p in model.parameters()} == {"meta"}


OPTIONS: list[dict[str, Any]] = [
    dict(padding="same"),
    dict(padding="same", padding_mode="reflect"),
    dict(padding="valid", stride=2),
    dict(padding=2, padding_mode="circular", bias=False),
    dict(padding=(1, 2), padding_mode="replicate", stride=(2, 1)),
    dict(padding=(2, 1), padding_mode="reflect", groups=2),
    dict(padding=(0, 3), stride=[1, 2], groups=4),
    dict(padding=(1,), stride=(2,)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("activation", [False, True])
def test_options_of_a_convolution(options: dict[str, Any], activation: bool) -> None:
    conv = nn.Conv2d(4, 8, 3, **options)
    model = sigmoid_after(conv) if activation else nn.Sequential(conv, nn.GELU())
    x, before = torch.randn(2, 4, 7, 6), repr(model)
    expected = run(model, x)
    tribp.fuse(model)
    assert isinstance(model[0], Conv3x3)
    assert model[0].activation == ("sigmoid" if activation else None)
    assert model[0].kernel_size == (3, 3)  # which a model's own code may read
    assert same(run(model, x), expected)
    tribp.unfuse(model)
    if 1 not in (len(o) for o in options.values() if isinstance(o, tuple)):  # (1,) comes back as (1, 1)
        assert repr(model) == before
        assert attributes(model)[1] == attributes(nn.Sequential(conv))[1]
    assert same(run(model, x), expected)


def test_padding_that_was_changed_after_fuse() -> None:
    model: Any = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=p) for p in ("same", "same", "valid")))
    tribp.fuse(model)
    model[0].padding, model[1].stride, model[2].padding_mode = (2, 2), (2, 2), "reflect"
    x = torch.randn(1, 1, 9, 9)
    y = model(x)
    tribp.unfuse(model)
    assert [conv.padding for conv in model] == [(2, 2), (1, 1), "valid"]
    assert torch.equal(model(x), y)


def test_attributes_go_along() -> None:
    for module in (nn.Linear(3, 3), nn.Conv2d(1, 1, 3)):
        model: Any = sigmoid_after(module)
        model[0].tag, model[1].tag = "mine", "the sigmoid's"
        tribp.fuse(model)
        assert model[0].tag == "mine"
        model[0].later = 1
        tribp.unfuse(model)
        assert (model[0].tag, model[0].later, model[1].tag) == ("mine", 1, "the sigmoid's")
        assert not hasattr(model[0], "activation")


def test_a_layer_that_is_kept_elsewhere() -> None:
    """The layer that stood in the model computes what it did, and goes its own way from there."""
    linear, x = nn.Linear(2, 2), torch.randn(3, 2)
    model: Any = sigmoid_after(linear)
    y, weight = linear(x), linear.weight
    tribp.fuse(model)
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert linear.weight is weight
    assert torch.equal(linear(x), y)


def test_a_weight_put_in_by_hand() -> None:
    """`in_channels` no longer says what the weight takes, and torch does not mind."""
    model: Any = sigmoid_after(nn.Conv2d(3, 2, 3))
    model[0].weight = nn.Parameter(model[0].weight.detach().sum(1, keepdim=True))
    x = torch.randn(2, 1, 5, 5)
    y = model(x)
    assert len(tribp.fuse(model).replaced) == 1
    assert torch.equal(model(x), y)
    assert model[0].in_channels == 3


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_ddp_and_fully_shard(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = MODELS["lenet"](), image()
    plain = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert {entry.name.split(".")[0] for entry in tribp.fuse(wrapped).replaced} == {"module"}
    for m in (wrapped, plain):
        m(x).sum().backward()
    grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (model, plain)]
    assert len(grads[0]) == len(grads[1]) == len(list(model.parameters()))
    assert all(map(torch.equal, *grads))
    fully_shard(plain, mesh=init_device_mesh("cpu", (1,)))
    report = tribp.fuse(plain)
    assert report.replaced == ()
    assert set(reasons(report).values()) == {"FSDP holds its parameters"}


def targets(run: Callable[[Callable[..., Any]], Any]) -> str:
    """What the graphs call that torch.compile makes."""
    found: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        inner = [m.graph for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        found.extend(str(node.target) for graph in inner for node in graph.nodes)
        return aot_eager(graph, inputs)

    run(backend)
    return " ".join(found)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_whole(name: str) -> None:
    torch.compiler.reset()
    model, x = MODELS[name](), image()
    model.eval()
    y = model(x)
    tribp.fuse(model)

    def run(backend: Callable[..., Any]) -> None:
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), y)

    found = targets(run)
    assert "tribp.conv3x3" in found
    assert ("tribp.linear" in found) == (name not in ("resnet", "resnet18", "unet"))


def test_fused_after_compile() -> None:
    """The wrapper notices, and compiles again."""
    torch.compiler.reset()
    model, x = MODELS["lenet"](), image()

    def run(backend: Callable[..., Any]) -> None:
        wrapped: Any = torch.compile(model, backend=backend)
        with torch.no_grad():
            y = wrapped(x)
            assert {entry.name.split(".")[0] for entry in tribp.fuse(wrapped).replaced} == {"_orig_mod"}
            torch.testing.assert_close(wrapped(x), y)

    assert "tribp.conv3x3" in targets(run)


def test_symbolic_trace() -> None:
    model, x = MODELS["lenet"](), image()
    y = model(x)
    tribp.fuse(model)
    traced = torch.fx.symbolic_trace(model)
    assert {tribp.conv3x3, tribp.mlp} <= {node.target for node in traced.graph.nodes}
    assert torch.equal(traced(x), y)
    plain = torch.fx.symbolic_trace(MODELS["resnet"]())  # whose convolutions can be replaced in turn
    y = plain.eval()(x)
    assert len(tribp.fuse(plain).replaced) == 8
    assert torch.equal(plain(x), y)
