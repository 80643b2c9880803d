"""A model that torch trains is trained after `fuse`, too, where code changes the output of an activation in place."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tribp

from .cases import MODELS, WAYS, Called, image
from .written import net as net

pytestmark = pytest.mark.usefixtures("one_thread", "interpreter")

# Of these torch's backward needs the input; of the others the output, which then nothing may change.
INPUT_KEPT: list[Callable[[], nn.Module]] = [
    nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Hardsigmoid, nn.Hardtanh, nn.ReLU6,
    lambda: nn.Hardsigmoid(inplace=True), lambda: nn.Hardtanh(inplace=True), lambda: nn.ReLU6(inplace=True),
]  # fmt: skip
OUTPUT_KEPT: list[Callable[[], nn.Module]] = [
    nn.Sigmoid, nn.Tanh, nn.ReLU,
    lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(inplace=True), lambda: nn.ELU(inplace=True),
]  # fmt: skip


class Changes(nn.Conv2d):
    """Changes its input before it reads it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mul_(2))


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].mul_(2),))
    return module


class Adds(nn.Module):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x


def grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def assert_trains(model: nn.Module, x: Tensor) -> tuple[list[object], list[str]]:
    """With torch's gradients.

    Returns the activations that ran with a layer in training, and what backward computed again.
    """
    model, x = model.double(), x.double()
    plain = copy.deepcopy(model)
    tribp.fuse(model)
    torch.manual_seed(0)
    with Called() as called:
        y = model(x)
    with Called() as again:
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    torch.testing.assert_close(list(found), grads(plain, x))
    with torch.no_grad():
        torch.manual_seed(0)
        y = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, plain(x))
    return [activation for activation in called.activations if activation], again.names


@pytest.mark.parametrize("make", INPUT_KEPT, ids=lambda make: str(make()))
def test_an_activation_of_which_torch_keeps_the_input(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 4), make(), nn.Dropout(0.5, inplace=True))
    activations, again = assert_trains(model, torch.randn(3, 4))
    assert (len(activations), again) == (2, ["mlp"])
    activations, again = assert_trains(model[:4], torch.randn(3, 4))
    assert (len(activations), again) == (2, [])


@pytest.mark.parametrize("make", OUTPUT_KEPT, ids=lambda make: str(make()))
def test_an_activation_of_which_torch_keeps_the_output(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(), Adds())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(model, torch.randn(3, 4))
    (_, pair) = tribp.fuse(model).replaced
    assert pair.now == "linear"


# What stands behind the activation, and whether that changes the output.
BEHIND: dict[str, tuple[Callable[[], list[nn.Module]], bool]] = {
    "nothing": (list, False),
    "a layer": (lambda: [nn.Conv2d(3, 2, 1)], False),
    "a pool": (lambda: [nn.MaxPool2d(2)], False),
    "a layer that changes it": (lambda: [Changes(3, 2, 1)], True),
    "a layer whose hook does": (lambda: [with_hook(nn.Conv2d(3, 2, 1))], True),
    "a view": (lambda: [nn.Flatten()], False),
    "an activation in place": (lambda: [nn.ELU(inplace=True)], True),
    "a view that is changed": (lambda: [nn.Flatten(), nn.ReLU(inplace=True)], True),
    "the same value": (lambda: [nn.Identity(), nn.Dropout(0.5, inplace=True)], True),
    "a Sequential": (lambda: [nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, 4))], True),
    "another module": (lambda: [Adds()], True),
}


@pytest.mark.parametrize("case", BEHIND)
@pytest.mark.parametrize("inner", [False, True], ids=["beside", "in a Sequential"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_what_is_behind_in_a_sequential(case: str, inner: bool, channels_last: bool) -> None:
    make, changes = BEHIND[case]
    pair = [nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU()]
    model = nn.Sequential(*([nn.Sequential(*pair)] if inner else pair), *make())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    taken, again = assert_trains(model, torch.randn(2, 2, 4, 4).to(memory_format=layout))
    changes &= not (channels_last and "view" in case)  # a copy then
    assert (taken, again) == (["leaky_relu"], ["conv3x3"] * changes)


def test_a_module_that_is_inserted_later() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 4))
    tribp.fuse(model)
    model.insert(2, nn.Dropout(0.5, inplace=True))
    assert assert_trains(model, torch.randn(3, 4)) == (["softplus"], ["linear"])


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4)], ids=str)
def test_inputs_of_other_dimensions(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ELU(), Adds())
    assert assert_trains(model, torch.randn(shape)) == (["elu"], ["linear"])
    monkeypatch.setattr("tribp.ops.conv3x3.reference.conv3x3_backward", None)  # the kernels take what is computed
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ELU(), Adds())
    assert assert_trains(model, torch.randn(2, 5, 5)) == (["elu"], ["conv3x3"])


# What forward does, and how many rows backward computes again.
FORWARDS = {
    "adds": ("y = self.leaky(self.conv(x))\ny += x\nreturn y", 1),
    "a method of a view": ("return F.elu(self.conv(x)).flatten(1).mul_(2)", 1),
    "a function": ("return F.dropout(F.hardtanh(self.conv(x)), 0.5, True, inplace=True)", 1),
    "an element": ("y = self.leaky(self.conv(x))\ny[0] = 1\nreturn y", 1),
    "a helper": ("return self.more(self.leaky(self.conv(x)))", 1),
    "of a Sequential": ("y = self.seq(x)\ny += x\nreturn y", 1),
    "both of two": ("return self.fc(F.softplus(self.conv(x)).add_(1)).relu_().add(F.relu6(self.conv(x)).mul_(2))", 2),
    "returned": ("return self.leaky(self.conv(x))", 0),
    "read twice": ("y = self.leaky(self.conv(x))\nz = y * 2\nreturn F.max_pool2d(y, 2).sum() + z", 0),
    "a layer": ("return self.fc(self.leaky(self.conv(x)))", 0),
    "in place": ("return F.leaky_relu(self.conv(x), inplace=True)", 0),
}


def written(net: Callable[..., Any], case: str) -> Any:
    """A model with the layers that its forward calls."""
    forward, _ = FORWARDS[case]
    model = net(forward, "def more(self, x):\n    x += 1\n    return x\n")
    model.leaky = nn.LeakyReLU()
    model.seq = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Softplus())
    for layer in ("conv", "fc", "seq"):
        if f"self.{layer}(" not in forward:
            delattr(model, layer)
    return model


@pytest.mark.parametrize("case", FORWARDS)
def test_what_a_forward_does_with_the_output(net: Callable[..., Any], case: str) -> None:
    _, again = assert_trains(written(net, case), torch.randn(2, 2, 6, 6))
    assert again == ["conv3x3"] * FORWARDS[case][1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("case", ["adds", "read twice", "a layer"])
def test_torch_around_it(net: Callable[..., Any], case: str, how: str) -> None:
    torch.compiler.reset()
    model, x = written(net, case).double(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = grads(copy.deepcopy(model), x)
    tribp.fuse(model)
    torch.testing.assert_close(grads(WAYS[how](model, x), x), expected)


def test_a_compiled_model_whose_output_is_changed() -> None:
    """Outside of its graph. Inside, an activation runs with its layer where another layer is next."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.LeakyReLU(), nn.Conv2d(2, 2, 3), nn.ELU()).double()
    plain, x = copy.deepcopy(model), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    tribp.fuse(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).add_(1).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(plain(x).add_(1).square().sum(), list(plain.parameters())))
    nodes = [str(node.args) for node in torch.export.export(model, (x,)).graph.nodes if "tribp" in str(node.target)]
    assert len(nodes) == 2
    assert ["leaky_relu" in nodes[0], "elu" in nodes[1]] == [True, False]


def pair(*behind: nn.Module) -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(), *behind).double()


def batch(requires_grad: bool = False) -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=requires_grad)


def test_a_bias_alone_is_trained() -> None:
    model = pair(nn.Dropout(1.0, inplace=True))
    model[0].weight.requires_grad_(False)
    tribp.fuse(model)
    with torch.inference_mode():
        x = batch()
    model(x).sum().backward()
    torch.testing.assert_close(model[0].bias.grad, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("frozen", ["all", "the first", "the second"])
def test_frozen_layers(frozen: str) -> None:
    """torch does not keep the input of a frozen layer, which may be changed with the output."""
    norm = nn.BatchNorm1d(4).double().eval()
    norm.running_mean.normal_()  # type: ignore[union-attr]
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ELU(), nn.Linear(4, 4), norm, nn.ELU()).double()
    for n, module in enumerate(model):
        module.requires_grad_({"all": False, "the first": n > 1, "the second": n < 2}[frozen])
    plain, x = copy.deepcopy(model), batch(True)
    tribp.fuse(model, fold_batchnorm=True)
    with Called() as called:
        model(x)
    assert len([activation for activation in called.activations if activation]) == (2 if frozen == "the second" else 1)

    def gradients(m: nn.Module) -> Any:
        h = x * 1
        y = m(h)
        y += 1
        if frozen != "the second":
            h += y
        return torch.autograd.grad((y * h).sum(), [x, *(p for p in m.parameters() if p.requires_grad)])

    torch.testing.assert_close(gradients(model), gradients(plain))
    if frozen == "the second":  # where the folded weight would be another now
        y = model(x)
        y += 1
        norm.running_mean.add_(1)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# Where hooks of others keep what is saved, or none are allowed, the activation runs by itself.
HOOKS = {
    "on the CPU": lambda model, x: _within(torch.autograd.graph.save_on_cpu(), model, x),
    "none": lambda model, x: _within(torch.autograd.graph.disable_saved_tensors_hooks("none"), model, x),
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
}


def _within(context: Any, model: nn.Module, x: Tensor) -> Tensor:
    with context:
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", HOOKS)
def test_hooks_of_others(how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ELU(), nn.Linear(4, 4), nn.ELU(), Adds()).double()
    plain, x = copy.deepcopy(model), batch(True)
    tribp.fuse(model)
    found, expected = (HOOKS[how](m, x).square().sum() for m in (model, plain))
    with Called() as called:
        HOOKS[how](model, x)
    assert (called.names, called.activations) == (["mlp"], ["elu", None])
    given = [(x, *m.parameters()) for m in (model, plain)]
    torch.testing.assert_close(torch.autograd.grad(found, given[0]), torch.autograd.grad(expected, given[1]))


def test_under_autocast() -> None:
    """What is computed again, after the block, or in one that began later, has the same bits."""
    model, x = pair().float(), batch().float()
    tribp.fuse(model)
    for forward in (True, False):
        found = []
        for change in (torch.Tensor.add, torch.Tensor.add_):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                y = model(x)
                assert y.dtype == (torch.bfloat16 if forward else torch.float32)
                loss = change(y, 1).square().sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=not forward):
                found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("layers", [1, 3])
def test_second_derivatives(layers: int) -> None:
    model: Any = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(4, 4), nn.Softplus())), Adds()).double()
    plain, x = copy.deepcopy(model), batch(True)
    tribp.fuse(model)
    with Called() as called:
        model(x)
    assert called.names == ["linear" if layers == 1 else "mlp"]

    def second(m: nn.Module) -> list[Tensor]:
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *m.parameters()]))

    torch.testing.assert_close(second(model), second(plain))


def test_backward_twice() -> None:
    model = pair(Adds())
    tribp.fuse(model)
    loss, weight = model(batch()).square().sum(), model[0].weight
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("compiled_autograd", [False, True])
@pytest.mark.parametrize("behind", [nn.Identity, Adds])
def test_a_compiled_backward_of_what_ran_eagerly(behind: Callable[[], nn.Module], compiled_autograd: bool) -> None:
    """It does not take one tensor for another, though a graph knows of no version that a tensor had before."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.ELU(), behind(), nn.Linear(4, 4), nn.LeakyReLU(), behind()).double()
    plain, x = copy.deepcopy(model), torch.randn(4, 4, dtype=torch.float64)
    tribp.fuse(model)
    loss, compiled = model(x).square().sum(), functools.partial(torch.compile, backend="aot_eager")
    if compiled_autograd:
        from torch._dynamo.compiled_autograd import _enable

        with _enable(compiled()):
            loss.backward()
    else:
        compiled(lambda: loss.backward())()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads(plain, x))


def test_what_backward_cannot_compute_again() -> None:
    """torch, too, raises an error if what it needs was changed; not if that was the weight under a frozen input."""
    for behind, x in ((nn.Identity(), batch(True)), (Adds(), batch())):
        model = pair(behind)
        tribp.fuse(model)
        loss = model(x).sum()
        with torch.no_grad():
            model[0].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    model = pair()
    tribp.fuse(model)
    loss = model(batch()).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    loss.backward()


def test_nothing_outlives_the_graph() -> None:
    model = pair()
    tribp.fuse(model)
    gc.disable()
    try:
        x, y = batch(), model(batch(True))
        kept = [weakref.ref(x), weakref.ref(y), weakref.ref(y.grad_fn)]
        del x, y
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


# How many activations a model's layers are computed with in training; that of a row counts once.
ACTIVATIONS = {
    "lenet": 3, "resnet": 0, "nested": 11, "vgg": 15, "resnet18": 0, "functional_lenet": 4, "unet": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    activations, again = assert_trains(MODELS[name](), image())
    assert (len(activations), again) == (ACTIVATIONS[name], [])
