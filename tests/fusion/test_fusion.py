"""Whole models: `fuse` replaces what it says and nothing else, `unfuse` goes back; and torch around fused models."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tribp
from tribp.fusion import Report, Skipped

from ..processes import python
from .cases import MODELS, Called, compile_anew, image, kinds, reasons, sigmoid_after

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE_CONVS = ["inc", "down1.1", "down2.1", "up1.conv", "up2.conv"]
REPLACED = {
    "lenet": {
        "Conv2d + Sigmoid -> conv3x3": ["0.0", "0.3"],
        "Linear + Sigmoid -> mlp": ["2.0", "2.2"],
        "Linear -> mlp": ["2.4"],
        "Sequential -> FusedSequential": ["0", "2"],
    },
    "resnet": {
        "Conv2d -> conv3x3": [f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2)],
    },
    "resnet18": {
        "Conv2d -> conv3x3": [f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)],
    },
    "nested": {
        "Gate -> fused Gate": ["gate", "again"],
        "Conv2d -> conv3x3": ["conv"],
        "Conv2d + Sigmoid -> conv3x3": ["gate.convs.0", "body.0", "tail.0", "tail.2"],
        "Linear + Sigmoid -> mlp": ["gate.heads.a.0", "gate.heads.a.2.0", "head.0", "head.2"],
        "Sequential -> FusedSequential": ["gate.heads.a", "gate.heads.a.2", "body", "tail", "head"],
    },
    "vgg": {
        "Conv2d + ReLU -> conv3x3": [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 23, 25, 27)],
        "Linear + ReLU -> linear": ["classifier.0"],
        "Linear + ReLU -> mlp": ["classifier.3"],
        "Linear -> mlp": ["classifier.5"],
        "Sequential -> FusedSequential": ["features", "classifier"],
    },
    "functional_lenet": {
        "FunctionalLeNet -> fused FunctionalLeNet": [""],
        "Conv2d + ReLU -> conv3x3": ["conv1"],
        "Conv2d + Tanh -> conv3x3": ["conv2"],
        "Linear + LeakyReLU -> linear": ["fc1"],
        "Linear + Sigmoid -> mlp": ["fc2"],
        "Linear -> mlp": ["fc3"],
    },
    "unet": {
        "DoubleConv -> fused DoubleConv": DOUBLE_CONVS,
        "Conv2d + ReLU6 -> conv3x3": [f"{block}.conv1" for block in DOUBLE_CONVS],
        "Conv2d + ReLU -> conv3x3": [f"{block}.conv2" for block in DOUBLE_CONVS],
    },
}
SKIPPED = {
    "lenet": [("0.6", "Conv2d", "its kernel size is (5, 5)")],
    "resnet": [
        ("stem", "Conv2d", "its kernel size is (7, 7)"),
        ("layer2.0.downsample.0", "Conv2d", "its kernel size is (1, 1)"),
    ],
    "resnet18": [
        ("conv1", "Conv2d", "its kernel size is (7, 7)"),
        *((f"layer{i}.0.downsample.0", "Conv2d", "its kernel size is (1, 1)") for i in (2, 3, 4)),
    ],
    "nested": [("gate.convs.1", "Conv2d", "its kernel size is (1, 3)")],
    "vgg": [],
    "functional_lenet": [],
    "unet": [("outc", "Conv2d", "its kernel size is (1, 1)")],
}


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


def attributes(model: nn.Module) -> list[tuple[int, dict[str, object]]]:
    """Every module, and the attributes of each."""
    return [(id(module), dict(vars(module))) for module in model.modules()]


def test_report_of_a_model(name: str, model: nn.Module) -> None:
    report = tribp.fuse(model)
    expected = [(place, *change.split(" -> ")) for change, places in REPLACED[name].items() for place in places]
    assert sorted(report.replaced) == sorted(expected)
    order = [place for place, _ in model.named_modules(remove_duplicate=False)]
    assert [entry.name for entry in report.replaced] == sorted((e.name for e in report.replaced), key=order.index)
    assert list(report.skipped) == [Skipped(*skipped) for skipped in SKIPPED[name]]
    assert str(report).isascii(), "any terminal's encoding has it"


# How many linear layers and 3×3 convolutions tribp's functions run, and how many there are. The others are linear
# layers without an activation.
TAKEN = {
    "lenet": (5, 5), "resnet": (8, 9), "nested": (8, 9), "vgg": (16, 16), "resnet18": (16, 17),
    "functional_lenet": (5, 5), "unet": (10, 10),
}  # fmt: skip


def test_how_many_layers_are_taken(name: str, model: nn.Module) -> None:
    for _ in range(2):
        report = tribp.fuse(model)
        assert (report.taken, report.layers) == TAKEN[name]
        assert str(report).startswith("{} of {} layers run by tribp, ".format(*TAKEN[name]))
    undone = tribp.unfuse(model)
    assert str(undone).startswith(f"{len(undone.replaced)} changed, 0 skipped")


def test_which_layers_are_counted() -> None:
    """Each once, tribp's own and those that only a batch norm joins, too."""
    both = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.ModuleDict({"one": both, "two": both, "own": tribp.nn.MLP([4, 4, 4]), "alone": nn.Linear(4, 4)})
    model["norm"] = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)
    model["convs"] = nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, dilation=2), nn.Conv2d(2, 2, 1)])
    for fold, taken in ((False, 4), (True, 5)):
        report = tribp.fuse(model, fold_batchnorm=fold)
        assert (report.taken, report.layers) == (taken, 7)
    assert str(tribp.fuse(nn.Sequential(nn.Flatten()))) == "0 changed, 0 skipped"


def test_nothing_else_changes_and_everything_comes_back(name: str, model: nn.Module) -> None:
    x = image()
    expected = run(model, x)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before, repr_before, attributes_before = seen(model), repr(model), attributes(model)
    kinds_before = [type(module) for module in model.modules()]
    tribp.fuse(model)
    assert seen(model) == before
    assert [type(module) for module in model.modules()] != kinds_before
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds_before, strict=True))
    assert attributes(model) == attributes_before
    assert same(run(model, x), expected)
    report = tribp.unfuse(model)
    assert seen(model) == before
    assert repr(model) == repr_before
    assert attributes(model) == attributes_before
    assert [type(module) for module in model.modules()] == kinds_before
    assert same(run(model, x), expected)
    changed = {(name, was) for name, now, was in report.replaced if now != "FusedConv2d"}
    assert changed == {(p, c.split(" -> ")[0]) for c, ps in REPLACED[name].items() for p in ps if "used" in c}
    assert report.skipped == ()


def test_twice_changes_nothing(name: str, model: nn.Module) -> None:
    first = tribp.fuse(model)
    kinds = [type(module) for module in model.modules()]
    second = tribp.fuse(model)
    assert second == Report((), first.skipped)
    assert [type(module) for module in model.modules()] == kinds
    tribp.unfuse(model)
    assert tribp.unfuse(model) == Report()


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
    assert [type(m) for m in other.modules()] == [type(m) for m in MODELS[name]().modules()]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, dtype=dtype), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2, dtype=dtype))
    model.append(nn.Sigmoid())
    x = torch.randn(3, 1, 4, 4, dtype=dtype)
    y = model(x)
    with torch.device("meta"):  # that nothing is built on
        tribp.fuse(model)
    assert kinds(model) == ["FusedConv2d", "Sigmoid", "Flatten", "Linear", "Sigmoid"]
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, "cpu")}
    assert torch.equal(model(x), y)
    with torch.device("meta"):
        tribp.unfuse(model)
    assert torch.equal(model(x), y)


def test_models_without_memory() -> None:
    with torch.device("meta"):
        model = MODELS["lenet"]()
    assert len(tribp.fuse(model).replaced) == 7
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
    (replaced,) = [entry for entry in tribp.fuse(model).replaced if entry.name]
    assert replaced.was == ("Conv2d + Sigmoid" if activation else "Conv2d")
    with Called() as called:
        found = run(model, x)
    assert called.names == ["conv3x3"]
    assert called.activations == ["sigmoid" if activation else None]
    assert same(found, expected)
    tribp.unfuse(model)
    assert repr(model) == before
    assert same(run(model, x), expected)


def test_options_that_are_changed_after_fuse() -> None:
    """They count in the next call, those too that tribp does not take."""
    plain: Any = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=p) for p in ("same", "same", "valid", 0)), nn.ReLU())
    model: Any = copy.deepcopy(plain)
    tribp.fuse(model)
    for m in (model, plain):
        m[0].padding, m[1].stride, m[2].padding_mode, m[3].dilation = (2, 2), (2, 2), "reflect", (2, 2)
        m[1].padding = (1, 1)
    x = torch.randn(1, 1, 19, 19)
    assert torch.equal(model(x), plain(x))
    for value in ([2, 2], 2, (3, 3)):
        for m in (model, plain):
            m[0].stride = value
        assert torch.equal(model[:1](x), plain[:1](x))
    empty, x = nn.Sequential(nn.Conv2d(0, 4, 3, padding=1), nn.ReLU()), torch.randn(1, 0, 5, 5)
    y = empty(x)
    tribp.fuse(empty)
    assert torch.equal(empty(x), y)


def test_a_layer_is_itself_wherever_it_is_called() -> None:
    """Also one that is called by hand, sliced off or moved."""
    for layer, x in ((nn.Linear(2, 2), torch.randn(3, 2)), (nn.Conv2d(2, 2, 3), torch.randn(1, 2, 4, 4))):
        model: Any = sigmoid_after(layer)
        y, z = layer(x), model(x)
        tribp.fuse(model)
        assert model[0] is layer
        assert all(torch.equal(part(x), y) for part in (layer, model[0], model[:1], nn.Sequential(model[0])))
        assert torch.equal(nn.Sequential(*model)(x), z)


def test_a_weight_put_in_by_hand() -> None:
    """`in_channels` no longer says what the weight takes, and torch does not mind."""
    model: Any = sigmoid_after(nn.Conv2d(3, 2, 3))
    model[0].weight = nn.Parameter(model[0].weight.detach().sum(1, keepdim=True))
    x = torch.randn(2, 1, 5, 5)
    y = model(x)
    assert len(tribp.fuse(model).replaced) == 2
    assert torch.equal(model(x), y)
    assert model[0].in_channels == 3


@pytest.mark.filterwarnings("ignore")
def test_ddp_and_fully_shard(process_group: None) -> None:
    """Before `fuse`: what DDP holds is taken, what FSDP holds is skipped."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = MODELS["lenet"](), image()
    plain, sharded = copy.deepcopy(model), copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert {entry.name.split(".")[0] for entry in tribp.fuse(wrapped).replaced} == {"module"}
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    report = tribp.fuse(sharded)
    assert report.replaced == ()
    assert set(reasons(report).values()) == {"its weight is a DTensor"}
    for m in (wrapped, plain, sharded):
        m(x).sum().backward()
    grads = [[getattr(p.grad, "_local_tensor", p.grad) for p in m.parameters()] for m in (model, plain, sharded)]
    for found in grads:
        assert same(found, grads[1])  # type: ignore[arg-type]


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
            compile_anew()
            torch.testing.assert_close(wrapped(x), y)

    assert "tribp.conv3x3" in targets(run)


def test_nothing_is_printed() -> None:
    code = """
import torch, tribp
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
tribp.fuse(model)
model(torch.ones(1, 2)).sum().backward()
"""
    done = python("-W", "error", "-c", code)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


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
