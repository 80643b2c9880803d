"""What changes between two calls of a training step: the second is that of a step made after the change."""

import contextlib
import copy
import gc
import pickle
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations

import tribp
from tribp.training import TrainStep

SIZES = (6, 8, 3)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Halved(nn.Parameter):
    """A parameter of a class of its own."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1)), nn.Identity(), nn.Linear(8, 3))


def perceptron() -> tribp.nn.MLP:
    torch.manual_seed(0)
    return tribp.nn.MLP(SIZES, "tanh", "sigmoid")


def with_own_activations() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(tribp.nn.Linear(6, 8, activation=("leaky_relu", 0.1)), tribp.nn.LinearSigmoid(8, 3))


def with_a_tensor_for_a_number() -> nn.Module:
    model: Any = network()
    model[0][1].negative_slope = torch.tensor(0.1)
    return model  # type: ignore[no-any-return]


def with_a_weight_in_a_buffer() -> nn.Module:
    model: Any = network()
    weight = model[0][0].weight.data
    del model[0][0].weight
    model[0][0].register_buffer("weight", weight)
    return model  # type: ignore[no-any-return]


def in_an_ordered_dict() -> nn.Module:
    model = square()
    vars(model)["_modules"] = OrderedDict(model._modules)
    return model


def in_a_user_dict() -> nn.Module:
    model: Any = network()
    vars(model[0][0])["_parameters"] = UserDict(model[0][0]._parameters)
    return model  # type: ignore[no-any-return]


def with_sizes_in_a_list() -> nn.Module:
    torch.manual_seed(0)
    model: Any = tribp.nn.MLP((6, 3, 3), "tanh")
    model.sizes = list(model.sizes)
    return model  # type: ignore[no-any-return]


class Hiding(nn.Sequential):
    """Of which `modules` tells nothing."""

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        yield self


def hidden() -> nn.Module:
    return Hiding(*network())


def with_a_script() -> nn.Module:
    model: Any = network()
    model[0][0].teacher = torch.jit.script(nn.Linear(2, 2))
    return model  # type: ignore[no-any-return]


def square() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))


def with_an_empty_one() -> nn.Sequential:
    return nn.Sequential(*network(), nn.Sequential())


Change = Callable[[Any], object]


def set_on(get: Callable[[Any], Any], name: str, value: Any) -> Change:
    """value: or a function that makes one."""
    made = callable(value) and not isinstance(value, type)
    return lambda model: setattr(get(model), name, value() if made else value)


def first(model: Any) -> Any:
    return model[0][0]


def parameter(*size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, torch.Size(size).numel()).view(size).to(dtype))


def replace_child(model: Any) -> None:
    model[0][1] = nn.Tanh()


def update_children(model: Any) -> None:
    model[0]._modules.update({"1": nn.ReLU()})


def double_precision(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data.double()


def gradients_in_double_precision(model: Any) -> None:
    model.zero_grad()
    first(model).weight.grad_dtype = torch.float64  # before torch 2.10 a note of the user's


def wider(model: Any) -> None:
    """Parameters that are the same objects, of another shape."""
    model[0][0].weight.data, model[0][0].bias.data = parameter(10, 6).data, parameter(10).data
    model[2].weight.data = parameter(3, 10).data


CHANGES: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "a hook": (network, lambda m: first(m).register_forward_hook(lambda *a: a[2] * 2)),
    "a hook before": (network, lambda m: m[0][1].register_forward_pre_hook(lambda m, a: (a[0] * 2,))),
    "a hook of a Sequential": (network, lambda m: m[0].register_forward_hook(lambda *a: a[2] * 2)),
    "a hook of the model": (network, lambda m: m.register_full_backward_hook(lambda m, i, o: (i[0],))),
    "a hook of all modules": (network, lambda m: modules.register_module_forward_hook(lambda *a: a[2] * 2)),
    "a forward": (network, set_on(first, "forward", lambda: torch.nn.Linear(6, 8).forward)),
    "another class": (network, set_on(first, "__class__", Doubled)),
    "a number": (network, set_on(lambda m: m[0][1], "negative_slope", 0.5)),
    "a number in the dict": (network, lambda m: vars(m[0][1]).update(negative_slope=0.5)),
    "another dict": (network, lambda m: setattr(m[0][1], "__dict__", {**vars(m[0][1]), "negative_slope": 0.5})),
    "a weight in a buffer": (with_a_weight_in_a_buffer, set_on(first, "weight", lambda: torch.ones(8, 6))),
    "children in another order": (in_an_ordered_dict, lambda m: [m._modules.move_to_end(key) for key in "02"]),
    "a number beside a dict of another class": (in_a_user_dict, set_on(lambda m: m[0][1], "negative_slope", 0.5)),
    "sizes in place": (with_sizes_in_a_list, lambda m: m.sizes.pop()),
    "a number that a subclass hides": (hidden, set_on(lambda m: m[0][1], "negative_slope", 0.5)),
    "a number beside a script": (with_a_script, set_on(lambda m: m[0][1], "negative_slope", 0.5)),
    "a tensor for a number": (network, set_on(lambda m: m[0][1], "negative_slope", torch.tensor(0.5))),
    "a tensor for a number, in place": (with_a_tensor_for_a_number, lambda m: m[0][1].negative_slope.fill_(0.5)),
    "another activation": (network, replace_child),
    "another activation by update": (network, update_children),
    "an activation more": (network, lambda m: m.append(nn.Sigmoid())),
    "a layer more": (network, lambda m: m[0].append(nn.Linear(8, 8))),
    "a layer less": (network, lambda m: m[0].pop(1)),
    "into the empty one": (with_an_empty_one, lambda m: m[3].append(nn.Sigmoid())),
    "into the empty one by update": (with_an_empty_one, lambda m: m[3]._modules.update({"0": nn.Sigmoid()})),
    "a weight": (network, set_on(first, "weight", lambda: parameter(8, 6))),
    "a weight in the dict": (network, lambda m: first(m)._parameters.update(weight=parameter(8, 6))),
    "no bias": (network, set_on(first, "bias", None)),
    "a weight normed": (network, lambda m: parametrizations.weight_norm(first(m))),
    "a frozen weight": (network, lambda m: first(m).weight.requires_grad_(False)),
    "all but one frozen": (network, lambda m: m.requires_grad_(False)[2].bias.requires_grad_()),
    "memory": (network, lambda m: setattr(first(m).weight, "data", parameter(8, 6).data)),
    "strides": (network, lambda m: setattr(first(m).weight, "data", parameter(6, 8).data.t())),
    "types": (network, double_precision),
    "shapes": (network, wider),
    "a hook of a parameter": (network, lambda m: first(m).weight.register_hook(lambda g: 2 * g)),
    "a hook after accumulation": (network, lambda m: first(m).bias.register_post_accumulate_grad_hook(lambda p: p)),
    "gradients of another type": (network, gradients_in_double_precision),
    "a shared parameter": (network, lambda m: m[0].insert(2, m[0][0]) and m[0].pop(0)),
    "a weight that is computed in place": (
        network, lambda m: first(m).weight.requires_grad_(False).mul_(torch.ones((), requires_grad=True))
    ),
    "the weight of another layer": (square, lambda m: setattr(m[1], "weight", m[0].weight)),
    "a class of a parameter": (network, lambda m: setattr(first(m).weight, "__class__", Halved)),
    "an activation of the MLP": (perceptron, set_on(lambda m: m, "activation", "relu")),
    "the last activation": (perceptron, set_on(lambda m: m, "output_activation", None)),
    "a layer of the MLP": (perceptron, lambda m: setattr(m, "0", nn.Linear(6, 8))),
    "a layer's activation": (perceptron, set_on(lambda m: m.layers[0], "activation", "relu")),
    "a hook of the MLP": (perceptron, lambda m: m.register_forward_hook(lambda *a: a[2] * 2)),
    "an own layer's activation": (with_own_activations, set_on(lambda m: m[0], "activation", ("leaky_relu", 0.5))),
    "training off": (network, lambda m: m.eval()),
}  # fmt: skip


class Observed:
    """A model that is trained, and what a call of a step does to it."""

    def __init__(self, make: Callable[[], nn.Module], device: str) -> None:
        self.model = make().to(device)
        self.optimizer = tribp.optim.SGD(self.model.parameters(), lr=0.1)
        self.device = device

    def step(self) -> TrainStep:
        return tribp.train_step(self.model, self.optimizer, "mse_loss")

    def after(self, step: TrainStep, batch: tuple[Tensor, Tensor]) -> list[Any]:
        loss = step(*(t.to(self.device) for t in batch))
        state = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in self.model.parameters()]
        return [step.reason, loss, state]


def batch(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, t = torch.linspace(-1, 1, rows * 6), torch.linspace(0, 1, rows * 3)
    return x.view(rows, 6).to(dtype), t.view(rows, 3).to(dtype)


def second(
    make: Callable[[], nn.Module], change: Change, device: str, then: tuple[Tensor, Tensor], is_used: bool
) -> list[Any]:
    """What the call after a change does, of the step that was used before it, or of one that is made after it."""
    observed = Observed(make, device)
    step = observed.step()
    assert observed.after(step, batch())[0] is None
    torch.manual_seed(1)
    with mock.patch.dict(modules._global_forward_hooks):
        change(observed.model)
        return observed.after(step if is_used else observed.step(), then)


def assert_same(a: list[Any], b: list[Any]) -> None:
    assert a[0] == b[0]
    torch.testing.assert_close(a[1:], b[1:], rtol=0, atol=0)


def unchanged(model: nn.Module) -> None:
    pass


@pytest.mark.parametrize("name", CHANGES)
def test_a_used_step_sees_what_a_new_one_sees(name: str, kernels: str) -> None:
    make, change = CHANGES[name]
    then = batch(dtype=torch.float64 if name == "types" else torch.float32)
    new = second(make, change, kernels, then, is_used=False)
    assert_same(second(make, change, kernels, then, is_used=True), new)
    if name != "training off":  # which changes nothing; any other, not seen, would be found above
        with pytest.raises(AssertionError):
            assert_same(second(make, unchanged, kernels, batch(), is_used=True), new)


@pytest.mark.parametrize("rows", [5, 7])
@pytest.mark.parametrize("what", ["strides", "types", "gradients wanted", "none"])
def test_another_batch(what: str, rows: int, kernels: str) -> None:
    x, t = batch(rows, torch.float64 if what == "types" else torch.float32)
    if what == "strides":
        x, t = x.t().contiguous().t(), t.t().contiguous().t()
    elif what == "gradients wanted":
        x.requires_grad_()
    used, new = (
        second(network, double_precision if what == "types" else unchanged, kernels, (x, t), is_used)
        for is_used in (True, False)
    )
    assert_same(used, new)
    assert (new[0] is not None) == (what == "gradients wanted")


def test_a_class_given_another_forward(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[Any] = [nn.Linear, nn.LeakyReLU, nn.Sequential]
    for kind in kinds:
        observed = Observed(network, kernels)
        step = observed.step()
        assert observed.after(step, batch())[0] is None
        with monkeypatch.context() as patch:
            forward = kind.forward
            patch.setattr(kind, "forward", lambda self, input, forward=forward: 2 * forward(self, input))
            reasons = [observed.after(s, batch())[0] for s in (step, observed.step())]
            assert reasons[0] == reasons[1]
        assert observed.after(step, batch())[0] is None


@pytest.mark.parametrize("name", ["memory", "strides", "shapes", "a frozen weight", "the weight of another layer"])
def test_without_torchs_guards(name: str, kernels: str) -> None:
    """They are no public interface."""
    make, change = CHANGES[name]
    with mock.patch("torch._C._dynamo.guards.TensorGuards", side_effect=TypeError):
        new, used = (second(make, change, kernels, batch(), is_used) for is_used in (False, True))
    assert_same(used, new)


def test_another_loss(kernels: str) -> None:
    observed = Observed(network, kernels)
    step = observed.step()
    assert observed.after(step, batch())[0] is None
    step.loss = "cross_entropy"  # of probabilities, then
    assert observed.after(step, batch())[0] == "the target has another shape"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (nn.LeakyReLU, "negative_slope", property(lambda module: 0.9)),
        (nn.Sequential, "__call__", lambda module, input: nn.Module.__call__(module, input)),
        (nn.Linear, "weight", property(lambda module: 2 * module._parameters["weight"])),
        (nn.Linear, "__getattr__", lambda module, name: 2 * nn.Module.__getattr__(module, name)),  # type: ignore[operator]
    ],
)
def test_what_a_class_is_given(kind: type, name: str, value: object, kernels: str) -> None:
    found = []
    for is_used in (True, False):
        observed = Observed(network, kernels)
        step = observed.step()
        observed.after(step, batch())
        with mock.patch.object(kind, name, value, create=True):
            step = step if is_used else observed.step()
            loss = step(*(t.to(kernels) for t in batch()))
        found.append([step.reason, loss])
    assert_same(*found)


def test_nested_tensors_end_no_process(kernels: str) -> None:
    """torch's guards do, of strided ones."""
    observed = Observed(network, kernels)
    step = observed.step()
    observed.after(step, batch())
    nested = [torch.nested.nested_tensor([torch.ones(2, n), torch.ones(3, n)], device=kernels) for n in (6, 3)]
    with contextlib.suppress(RuntimeError):
        step(*nested)
    assert step.reason == "kernels do not run under torch.compile, modes and transforms, or on such tensors"


def test_nothing_of_before_is_held(kernels: str) -> None:
    observed = Observed(network, kernels)
    step, model = observed.step(), observed.model
    observed.after(step, batch())
    old = weakref.ref(model[0]), weakref.ref(model[0][0].weight)  # type: ignore[index]
    model[0] = nn.Sequential(nn.Linear(6, 8), nn.GELU()).to(kernels)  # type: ignore[operator]
    step.optimizer = observed.optimizer = tribp.optim.SGD(model.parameters(), lr=0.1)
    step(*(t.to(kernels) for t in batch()))
    gc.collect()
    assert [reference() for reference in old] == [None, None]


def test_a_copy_reads_its_own_model(kernels: str) -> None:
    observed = Observed(network, kernels)
    step = observed.step()
    observed.after(step, batch())
    twin = copy.deepcopy(step)
    twin.model[0][1].negative_slope = 0.9  # type: ignore[index]
    pickle.loads(pickle.dumps(step))
    before = [p.clone() for p in observed.model.parameters()]
    losses = [float(s(*(t.to(kernels) for t in batch()))) for s in (twin, twin, step)]
    assert losses[0] != losses[2]
    assert not torch.equal(before[0], next(observed.model.parameters())), "the original goes on with its own"
