"""Linear layers that follow each other in a Sequential: `fuse` makes one `tribp.mlp` of them."""

import copy
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import tribp
from tribp.fusion import FusedSequential, Replaced, Report
from tribp.fusion.rows import flatten, row_at

from .cases import Called, compile_anew, done_to_both, hooked, kinds, reasons
from .test_fusion import run, same, targets

WRONG = {
    "linear": (nn.Sequential(nn.Linear(5, 4), nn.ReLU()), torch.ones(2, 6)),
    "type": (nn.Sequential(nn.Linear(5, 4), nn.ReLU()), torch.ones(2, 5, dtype=torch.float64)),
    "layers": (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), torch.ones(2, 6)),
    "the second": (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(3, 4), nn.Tanh()), torch.ones(2, 5)),
    "convolution": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.ones(1, 2, 5, 5)),
    "no activation": (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.ones(1, 3, 5, 5, dtype=torch.int32)),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron(*activations: Callable[[], nn.Module], bias: bool = True) -> Any:
    """Layers of 5 features, with these activations; and a last one without."""
    layers: list[nn.Module] = []
    for act in activations:
        layers += [nn.Linear(5, 5, bias), act()]
    return nn.Sequential(*layers, nn.Linear(5, 3, bias))


def in_blocks(model: Any) -> Any:
    """The same modules with a Sequential around each layer and its activation."""
    return nn.Sequential(*(nn.Sequential(*model[n : n + 2]) for n in range(0, len(model) - 1, 2)), model[-1])


def in_depth(model: Any) -> Any:
    """The same modules, each layer a Sequential deeper, and the last by itself in two."""
    block = nn.Sequential()
    for n in range(0, len(model) - 1, 2):
        block = nn.Sequential(block, *model[n : n + 2])
    return nn.Sequential(block, nn.Sequential(nn.Sequential(model[-1])))


def modules_of(model: nn.Module) -> list[nn.Module]:
    """In the order of the flat form."""
    return [module for module in model.modules() if not isinstance(module, nn.Sequential)]


@pytest.fixture(params=[lambda model: model, in_blocks, in_depth], ids=["flat", "blocks", "deep"])
def layout(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return request.param  # type: ignore[no-any-return]


def lengths(model: Any, input: Tensor | None = None) -> list[int]:
    """How many layers, or other modules, run together."""
    modules, start, result = flatten(model), 0, []
    while start < len(modules):
        row = row_at(modules, start, input)
        result.append(len(row) or 1)
        start = row[-1].stop if row else start + 1
    return result


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_one_mlp_and_back(bias: bool, x: Tensor) -> None:
    model = perceptron(nn.ReLU, nn.ReLU, bias=bias)
    expected, before, keys = run(model, x), repr(model), list(model.state_dict())
    report = tribp.fuse(model)
    assert str(report).splitlines() == [
        "3 of 3 layers run by tribp, 0 skipped",
        "(the model): Sequential -> FusedSequential",
        "0: Linear + ReLU -> mlp",
        "2: Linear + ReLU -> mlp",
        "4: Linear -> mlp",
    ]
    assert lengths(model) == [3]
    assert same(run(model, x), expected)
    assert list(model.state_dict()) == keys
    assert tribp.fuse(model).replaced == ()
    report = tribp.unfuse(model)
    assert str(report).splitlines()[1] == "(the model): FusedSequential -> Sequential"
    assert repr(model) == before
    assert list(model.state_dict()) == keys
    assert same(run(model, x), expected)


def test_rows_through_sequentials(layout: Callable[[Any], Any], x: Tensor) -> None:
    """What is there of torch's stays at its index; every Sequential that has a part of the row has it by itself."""
    model = layout(perceptron(nn.ReLU, lambda: nn.ReLU(inplace=True)))
    expected, before, keys = run(model, x), repr(model), list(model.state_dict())
    parameters = list(map(id, model.parameters()))
    containers = [m for m in model.modules() if isinstance(m, nn.Sequential)]
    indices = [list(container._modules) for container in containers]
    parts = [container(x) for container in containers]
    report = tribp.fuse(model)
    assert report.skipped == ()
    assert lengths(model) == [3]
    assert same(run(model, x), expected)
    assert [m for m in model.modules() if isinstance(m, nn.Sequential)] == containers
    assert [list(container._modules) for container in containers] == indices
    assert [list(container) for container in containers] == [list(c.children()) for c in containers]
    assert same([container(x) for container in containers], parts)
    assert (list(model.state_dict()), list(map(id, model.parameters()))) == (keys, parameters)
    assert not any(m.training for m in model.eval().modules())
    assert all(m.training for m in model.train().modules())
    assert tribp.fuse(model) == Report()
    assert all(entry.was == "FusedSequential" for entry in tribp.unfuse(model).replaced)
    assert repr(model) == before
    assert same(run(model, x), expected)


def test_report_of_nested_sequentials() -> None:
    """A Sequential changes where something runs through its children; one that lies in a child is the child's own."""
    model: Any = in_blocks(perceptron(nn.ReLU, nn.ReLU))
    assert str(tribp.fuse(model)).splitlines() == [
        "3 of 3 layers run by tribp, 0 skipped",
        "(the model): Sequential -> FusedSequential",
        "0: Sequential -> FusedSequential",
        "0.0: Linear + ReLU -> mlp",
        "1: Sequential -> FusedSequential",
        "1.0: Linear + ReLU -> mlp",
        "2: Linear -> mlp",
    ]
    inner = perceptron(nn.ReLU)
    model = nn.Sequential(nn.Sequential(inner, nn.Dropout()), nn.Sequential(nn.Linear(3, 3)))
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["0.0", "0.0.0", "0.0.2"]
    model = nn.Sequential(perceptron(nn.ReLU, nn.ReLU)[:4], nn.Linear(5, 3))
    expected = ["", "0", "0.0", "0.2", "1"]  # two of the row lie in the first child
    assert [entry.name for entry in tribp.fuse(model).replaced] == expected


def test_backward_crosses_the_layers(kernels: str, launched: list[str], layout: Callable[[Any], Any]) -> None:
    model = layout(perceptron(nn.ReLU, nn.ReLU)).to(kernels)
    x = torch.randn(70, 5, device=kernels)
    expected = run(model, x)
    tribp.fuse(model)
    launched.clear()
    found = run(model, x)
    assert launched[:3] == ["forward"] * 3
    assert [name for name in launched[3:] if name != "reduce_partials"] == ["backward", "backward", "wgrad"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_every_layer_keeps_its_activation(device: str) -> None:
    """Different ones end a row; so does what is no layer."""
    acts: list[Any] = [
        nn.Tanh,
        nn.Tanh,
        nn.Sigmoid,
        nn.Sigmoid,
        nn.ReLU,
        lambda: nn.LeakyReLU(0.2),
        lambda: nn.LeakyReLU(0.3),
    ]
    model = perceptron(*acts).to(device, torch.float64)
    model.insert(10, nn.LayerNorm(5))
    model.to(device, torch.float64)
    x = torch.randn(6, 5, device=device, dtype=torch.float64)
    expected = run(model, x)
    tribp.fuse(model)
    assert lengths(model) == [3, 2, 1, 2, 1]
    for a, b in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_order_matters(x: Tensor) -> None:
    """Layers of one shape, and activations whose places could be exchanged."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Softplus())
    expected = run(model, x)
    tribp.fuse(model)
    assert lengths(model) == [3]
    assert same(run(model, x), expected)


def test_one_layer_is_no_row(x: Tensor) -> None:
    for model in (
        nn.Sequential(nn.Linear(5, 5), nn.ReLU()),
        nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 5)),
        nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), nn.Dropout(), nn.Linear(5, 5)),
    ):
        tribp.fuse(model)
        with Called() as called:
            model(x)
        assert called.names == ["linear"]


def test_layers_that_a_user_wrote(x: Tensor) -> None:
    model: Any = nn.Sequential(tribp.nn.Linear(5, 5, activation="elu"), tribp.nn.LinearSigmoid(5, 2))
    expected = run(model, x)
    assert tribp.fuse(model).replaced == (
        Replaced("", "Sequential", "FusedSequential"),
        Replaced("0", "tribp.nn.Linear", "mlp"),
        Replaced("1", "LinearSigmoid", "mlp"),
    )
    assert lengths(model) == [2]
    assert same(run(model, x), expected)
    tribp.unfuse(model)
    assert kinds(model) == ["Sequential", "Sequential"]


class LoRA(nn.Module):
    """What adapters put around a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def moved(model: Any) -> None:
    layer = model[2]
    del model[2]
    model.append(nn.Linear(3, 5))
    model.append(layer)


MEDDLING: list[tuple[str, Callable[[Any], object]]] = [
    *((kind, lambda m, kind=kind: hooked(m[2], kind)) for kind in ("forward_hook", "forward_pre_hook")),
    *((kind, lambda m, kind=kind: hooked(m[2], kind)) for kind in ("full_backward_hook", "full_backward_pre_hook")),
    ("hook that changes", lambda m: m[2].register_forward_hook(lambda m, i, y: y + 1)),
    ("hook behind", lambda m: hooked(m[1])),
    ("forward", lambda m: setattr(m[2], "forward", lambda x: 2 * x)),
    ("pruned", lambda m: prune.l1_unstructured(m[2], "weight", 0.5)),
    ("parametrized", lambda m: parametrizations.weight_norm(m[2])),
    ("compiled", lambda m: m[2].compile(backend="eager")),
    ("replaced", lambda m: m.__setitem__(2, nn.Linear(5, 5))),
    ("replaced by another kind", lambda m: m.__setitem__(2, nn.LayerNorm(5))),
    ("head replaced", lambda m: m.__setitem__(4, nn.Linear(5, 2))),
    ("wrapped", lambda m: m.__setitem__(2, LoRA(m[2]))),
    ("activation replaced", lambda m: m.__setitem__(1, nn.GELU())),
    ("activation replaced by another", lambda m: m.__setitem__(1, nn.ReLU())),
    ("numbers changed", lambda m: m.__setitem__(3, nn.Softplus(1, 3))),
    ("activation removed", lambda m: m.__delitem__(1)),
    ("layer removed", lambda m: m.__delitem__(2)),
    ("inserted", lambda m: m.insert(2, nn.LayerNorm(5))),
    ("inserted before the activation", lambda m: m.insert(1, nn.LayerNorm(5))),
    ("exchanged", lambda m: m._modules.update({"1": m[2], "2": m[1]})),
    ("moved", moved),
    ("other parameters", lambda m: setattr(m[2], "weight", nn.Parameter(torch.eye(5)))),
    ("no bias", lambda m: setattr(m[2], "bias", None)),
    ("class", lambda m: setattr(m[2], "__class__", type("Mine", (nn.Linear,), {"forward": lambda self, x: 2 * x}))),
]


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(model(x.requires_grad_()).square().sum(), [*model.parameters(), x], allow_unused=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("meddle", [f for _, f in MEDDLING], ids=[name for name, _ in MEDDLING])
def test_what_is_done_to_a_layer_after_fuse(meddle: Callable[[Any], object], x: Tensor) -> None:
    """It does what it would have done before; what runs together still is looked for anew."""
    model = perceptron(nn.Tanh, nn.Tanh)
    plain = done_to_both(meddle, model)
    assert torch.equal(model(x), plain(x))
    for a, b in zip(*(gradients(m, x) for m in (model, plain)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    tribp.unfuse(model)
    assert torch.equal(model(x), plain(x))


class Doubling(nn.Sequential):
    def forward(self, input: Any) -> Any:
        return 2 * super().forward(input)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "meddle",
    [
        *(lambda m, kind=kind: hooked(m, kind) for kind in ("forward_hook", "forward_pre_hook")),
        *(lambda m, kind=kind: hooked(m, kind) for kind in ("full_backward_hook", "full_backward_pre_hook")),
        lambda m: setattr(m, "forward", lambda x: torch.zeros(6, 5)),
        lambda m: setattr(m, "__class__", Doubling),
        lambda m: m.compile(backend="eager"),
        lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
        lambda m: parametrizations.weight_norm(m[0]),
        lambda m: m.__setitem__(1, nn.Softmax(-1)),
        lambda m: m.insert(0, nn.Dropout(0.0)),
    ],
    ids=[
        *("hook", "pre hook", "backward hook", "backward pre hook", "forward", "class", "compiled"),
        *("pruned", "parametrized", "activation replaced", "inserted"),
    ],
)
def test_what_is_done_to_an_inner_sequential(meddle: Callable[[Any], object], x: Tensor) -> None:
    """It then runs by itself, or what is in it does; before `fuse`, and after."""
    for fused_first in (False, True):
        torch.manual_seed(0)
        model = in_blocks(perceptron(nn.Tanh, nn.Tanh, nn.Tanh))
        for change in (tribp.fuse, lambda m: meddle(m[1])) if fused_first else (lambda m: meddle(m[1]), tribp.fuse):
            change(model)
        assert max(lengths(model)) in (2, 3), "of four layers"
        y = x
        for module in list(model):
            y = module(y)
        assert torch.equal(model(x), y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", [0, 2, 4])
def test_what_was_done_to_an_inner_layer_before(where: int, x: Tensor) -> None:
    """It is skipped, and says why; the others go on."""
    made: list[tuple[Callable[[nn.Module], object], str]] = [
        (hooked, "it has forward hooks"),
        (parametrizations.weight_norm, "it is parametrized"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "it has forward pre hooks"),
        (lambda m: setattr(m, "__class__", type("Mine", (nn.Linear,), {})), "it is a subclass of Linear: "),
        (lambda m: m.to(torch.complex64), "its weight is complex64"),
    ]
    for change, reason in made:
        model = perceptron(nn.Tanh, nn.Tanh)
        change(model[where])
        expected = run(model, x) if "complex" not in reason else []
        skipped = reasons(tribp.fuse(model))
        assert list(skipped) == ([] if where == 4 else [str(where)])  # the last one has no activation
        assert all(found.startswith(reason) for found in skipped.values())
        assert lengths(model) == ([1, 1, 2] if where == 0 else [1, 1, 1, 1] if where == 2 else [2, 1])
        if expected:
            assert same(run(model, x), expected)


def test_hooks_see_every_call(x: Tensor) -> None:
    """Of a layer, of what stands behind one, of the container, and of all modules there are."""
    model = perceptron(nn.Tanh)
    tribp.fuse(model)
    seen: list[nn.Module] = []
    for module in (model, model[0], model[1], model[2]):
        handle = module.register_forward_hook(lambda m, i, o: seen.append(m))
        model(x)
        handle.remove()
        assert seen == [module]
        seen.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    model(x)
    handle.remove()
    assert seen == [model[0], model[1], model[2], model]


def test_hooks_see_every_call_of_an_inner_sequential(x: Tensor) -> None:
    """With the intermediate result, and in the order of the calls."""
    model = in_depth(perceptron(nn.Tanh, nn.Tanh))
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[module] = output.detach()

    def seen() -> list[Tensor]:
        outputs.clear()
        handle = nn.modules.module.register_module_forward_hook(keep)
        model(x)
        handle.remove()
        return [output for module, output in outputs.items() if isinstance(module, nn.Sequential)]

    expected = seen()
    tribp.fuse(model)
    assert same(seen(), expected)
    assert len(outputs) == len(list(model.modules()))
    for inner in (m for m in model.modules() if isinstance(m, nn.Sequential)):
        outputs.clear()
        handle = inner.register_forward_hook(keep)
        model(x)
        handle.remove()
        assert list(outputs) == [inner]
    assert lengths(model) == [3]


class Ordered(nn.Sequential):
    pass


class Indexing(nn.Module):
    """Takes the layers by their index, and one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(nn.Tanh, nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        body: Any = self.body
        first = body[1](body[0](x))
        for layer in body:
            x = layer(x)
        return body[2:](first) + x + body(torch.cat([first] * 2))[:6]  # type: ignore[no-any-return]


class Twice(nn.Sequential):
    def forward(self, input: Any) -> Any:
        return super().forward(super().forward(input))


def test_containers_of_other_classes(x: Tensor) -> None:
    model: Any = Ordered(*perceptron(nn.ReLU))
    expected = run(model, x)
    assert tribp.fuse(model).skipped == ()
    assert isinstance(model, Ordered)
    with Called() as called:
        assert same(run(model, x), expected)
    assert called.names == ["mlp"]
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), Ordered(nn.Linear(5, 5), nn.ReLU()))
    tribp.fuse(model)
    assert lengths(model) == [2]
    model = Twice(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    expected = run(model, x)
    assert tribp.fuse(model).replaced == ()
    assert same(run(model, x), expected)
    model = Indexing()
    expected = run(model, x)
    assert tribp.fuse(model).skipped == ()
    with Called() as called:
        assert same(run(model, x), expected)
    assert called.names == ["mlp", "mlp"], "of the slice and of the whole: what code calls one by one is torch's"


def test_slices_and_changes_of_a_fused_container(x: Tensor) -> None:
    model = perceptron(nn.Tanh, nn.Tanh)
    parts = [model(x), model[:2](x), model[2:](x), nn.Sequential(*model[2:4])(x)]
    tribp.fuse(model)
    now = [model(x), model[:2](x), model[2:](x), nn.Sequential(*model[2:4])(x)]
    assert all(map(torch.equal, parts, now))
    assert lengths(model[2:]) == [2]
    model.append(nn.Tanh())
    with Called() as called:
        assert torch.equal(model(x), torch.tanh(parts[0]))
    assert called.activations == ["tanh", "tanh"]
    del model[5]
    assert torch.equal(model(x), parts[0])


def test_shared_sequentials(x: Tensor) -> None:
    """One block at two places of a row, and another whose output is read besides."""
    block = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    model: Any = nn.Sequential(block, nn.Sequential(block, nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 5))
    expected = run(model, x)
    report = tribp.fuse(model)
    assert [entry.name for entry in report.replaced] == ["", "0", "0.0", "1", "1.0", "1.1", "2"]
    assert model[0] is model[1][0]
    assert lengths(model) == [4]
    assert same(run(model, x), expected)
    tribp.unfuse(model)
    assert same(run(model, x), expected)

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(block, nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
            self.first = block

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.first(x)  # type: ignore[no-any-return]

    model = Reading()
    expected = run(model, x)
    tribp.fuse(model)
    assert lengths(model.body) == [2]
    assert same(run(model, x), expected)


def test_shared_layers_and_weights(x: Tensor) -> None:
    layer = nn.Linear(5, 5)
    model: Any = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    model[4].weight = layer.weight
    expected = run(model, x)
    tribp.fuse(model)
    assert model[0] is model[2]
    assert lengths(model) == [3]
    assert same(run(model, x), expected)
    tribp.unfuse(model)
    assert model[0] is model[2]
    last = nn.Linear(5, 5)  # behind a layer here, before an activation there
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), last, nn.Sequential(last, nn.Tanh()))
    expected = run(model, x)
    assert tribp.fuse(model).skipped == ()
    assert lengths(model) == [2, 1]
    assert same(run(model, x), expected)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), last, nn.GELU(), last)
    assert [entry.name for entry in tribp.fuse(model).replaced] == ["", "0", "2"]
    assert model[2] is model[4]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(how: str, layout: Callable[[Any], Any], x: Tensor) -> None:
    model: Any = nn.Sequential(OrderedDict(body=layout(perceptron(nn.ReLU, nn.ReLU)), drop=nn.Dropout(0.0)))
    tribp.fuse(model)
    expected = run(model, x)
    other: Any
    if how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(other.body) is FusedSequential
    assert lengths(other.body) == [3]
    assert same(run(other, x), expected)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert same(run(model, x), expected)


def test_modes_types_and_frozen_layers(device: str, layout: Callable[[Any], Any]) -> None:
    model = layout(perceptron(nn.Tanh, nn.Tanh)).to(device)
    tribp.fuse(model)
    assert not any(m.training for m in model.eval().modules())
    assert all(m.training for m in model.train().modules())
    model.to(torch.float64)
    plain = copy.deepcopy(model)
    tribp.unfuse(plain)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    for frozen in ([0], [0, 2], [4], [2], [0, 2, 4]):
        found = []
        for m in (model, plain):
            m.requires_grad_(True)
            for n in frozen:
                modules_of(m)[n].requires_grad_(False)
            y = m(x)
            assert y.requires_grad == (len(frozen) < 3)
            found.append(run(m, x) if len(frozen) < 3 else [y])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_wrapped_in_ddp_and_fsdp_after_fuse(process_group: None, layout: Callable[[Any], Any], x: Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    models: list[Any] = [layout(perceptron(nn.Tanh, nn.Tanh)) for _ in range(4)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
        tribp.fuse(model)
    expected = run(models[0], x)
    wrapped = nn.parallel.DistributedDataParallel(models[1])
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(models[2], mesh=mesh)
    for layer in models[3]:
        fully_shard(layer, mesh=mesh)
    fully_shard(models[3], mesh=mesh)
    models[1:2] = [wrapped]
    for model in models[1:]:
        y = model(x)
        y.square().sum().backward()
        grads = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
        assert same([y.detach(), *grads], [expected[0].detach(), *expected[1:]])
    with Called() as called:
        models[2](x)
    assert called.names == ["mlp"]


def test_compiled_exported_traced_and_called_with_other_weights(layout: Callable[[Any], Any], x: Tensor) -> None:
    torch.compiler.reset()
    model = layout(perceptron(nn.Tanh, nn.Tanh))
    expected = run(model, x)

    def compiled(backend: Any) -> None:
        """Before `fuse`, and after it, which the wrapper notices."""
        wrapped: Any = torch.compile(model, backend=backend, fullgraph=True)
        for fused in (False, True):
            for a, b in zip(run(wrapped, x), expected, strict=True):
                torch.testing.assert_close(a, b)
            if not fused:
                tribp.fuse(model)
                compile_anew()

    assert targets(compiled).count("tribp.mlp") == 1
    y = expected[0].detach()
    program = torch.export.export(model, (x,))
    assert "tribp.mlp.default" in {str(node.target) for node in program.graph.nodes}
    assert list(program.state_dict) == list(model.state_dict())
    torch.testing.assert_close(program.module()(x).detach(), y)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op != "get_attr"][1] is tribp.mlp
    assert torch.equal(traced(x), y)
    assert torch.equal(torch.func.functional_call(model, dict(model.state_dict()), (x,)), y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch has no TorchScript on Python 3.14")
def test_torchscript(layout: Callable[[Any], Any], x: Tensor) -> None:
    model = layout(perceptron(nn.Tanh, nn.Tanh))
    y = model(x)
    tribp.fuse(model)
    for module in (torch.jit.script(model), torch.jit.trace(model, x)):
        torch.testing.assert_close(module(x), y)
        assert list(module.state_dict()) == list(model.state_dict())


def test_rows_through_folded_batch_norms(x: Tensor) -> None:
    """While they are folded; while they train they are called."""
    model: Any = nn.Sequential(
        nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)
    )
    model.eval()
    y, before = model(x), repr(model)
    tribp.fuse(model, fold_batchnorm=True)
    assert lengths(model, x) == [1, 1, 1, 2]
    assert torch.equal(model(x), y)
    model.requires_grad_(False)
    assert lengths(model, x) == [3]
    torch.testing.assert_close(model(x), y)
    model.train()
    assert lengths(model, x) == [1, 1, 1, 2]
    model.eval()
    tribp.unfuse(model)
    assert repr(model) == before
    assert torch.equal(model(x), y)


def test_what_hooks_raise_is_raised(kernels: str) -> None:
    """Torch's modules compute what tribp's checks refuse, and nothing else a second time."""
    model, packed = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).to(kernels), []
    tribp.fuse(model)

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        if len(packed) == 2:
            raise ValueError("no room")
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(ValueError, match="no room"):
        model(torch.ones(2, 5, device=kernels))
    assert len(packed) == 2


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_raises_what_torch_raises(case: str, device: str) -> None:
    model, x = copy.deepcopy(WRONG[case][0]).to(device), WRONG[case][1].to(device)
    raised = []
    for fuse in (False, True):
        if fuse:
            assert tribp.fuse(model).replaced
        with pytest.raises(RuntimeError) as error:
            model(x)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]
