"""`tribp.train_step` against the separate steps by torch, on the fallback and on the kernels."""

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp import dispatch
from tribp.training import LOSSES, REDUCTIONS, TrainStep

from ..covering import DTYPES, cover, turn
from ..oracle import ACTIVATIONS, Activation, assert_close

SIZES = [(33, 77, 45, 7), (784, 128, 10), (2, 2, 1), (16, 5), (1030, 128, 16, 3)]


def network(sizes: tuple[int, ...], activation: Activation, last: Activation, bias: bool = True) -> nn.Module:
    return tribp.nn.MLP(sizes, activation, last, bias, dtype=torch.float64)


def draw(sizes: tuple[int, ...], rows: int, loss: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, sizes[0], dtype=torch.float64)
    if loss != "cross_entropy":
        return x, torch.rand(rows, sizes[-1], dtype=torch.float64)
    target = torch.randint(0, sizes[-1], (rows,))
    target[rows // 2] = -100  # ignored
    return x, target


def grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def step_of(model: nn.Module, loss: Any, reduction: str | None = None, optimizer: Any = torch.optim.SGD) -> TrainStep:
    return tribp.train_step(model, optimizer(model.parameters(), lr=0.1), loss, reduction)


def _first(loss: str, reduction: str, sizes: tuple[int, ...]) -> bool:
    """Every pair of two of these, once or twice."""
    return ([*LOSSES].index(loss) + REDUCTIONS.index(reduction) + SIZES.index(sizes)) % len(REDUCTIONS) == 0


@pytest.mark.parametrize(("loss", "reduction", "sizes"), cover(LOSSES, REDUCTIONS, SIZES, quick=_first))
def test_matches_torch(loss: str, reduction: str, sizes: tuple[int, ...], kernels: str) -> None:
    """Loss and gradients: against float64, within a few times the error of torch's separate steps."""
    activation: Activation = turn(ACTIVATIONS, loss, reduction, str(sizes))
    kinked = any(name in str(activation) for name in ("hard", "relu"))
    dtype = torch.float64 if kinked else turn(DTYPES, loss, reduction, str(sizes))
    last: Activation = (
        "sigmoid" if loss == "binary_cross_entropy" else turn([None, "tanh"], str(activation), str(sizes))
    )
    true = network(sizes, activation, last, bias=reduction != "sum")
    ours, theirs = (copy.deepcopy(true).to(kernels, dtype) for _ in range(2))
    true.load_state_dict(ours.state_dict())  # of the rounded weights
    x, target = draw(sizes, 37, loss)
    x = x.to(dtype)
    rounded = target.to(dtype) if target.is_floating_point() else target
    exact = rounded.double() if target.is_floating_point() else target
    step = step_of(ours, loss, reduction)
    value = step(x.to(kernels), rounded.to(kernels))
    assert step.reason is None
    with tribp.use_backend("torch"):
        theirs_value = step_of(theirs, loss, reduction)(x.to(kernels), rounded.to(kernels))
        true_value = step_of(true, loss, reduction)(x.double(), exact)
    unit = torch.finfo(dtype).eps
    sixth = 4e-7 * (activation == "hardsigmoid")  # torch's ⅙ is a float32
    assert value.dtype == dtype
    assert_close(value, true_value, theirs_value, tolerance=8 * unit * (1 + abs(float(true_value))) + sixth)
    for p, q, r in zip(ours.parameters(), theirs.parameters(), true.parameters(), strict=True):
        scale = grad(r).abs().max() * torch.ones_like(r)
        torchs = grad(q) if q.numel() > 16 else None  # the error of a few numbers is a matter of luck
        assert_close(grad(p), grad(r), torchs, scale=scale, tolerance=len(sizes) * 20 * unit + sixth)


def test_spec(kernels: str) -> None:
    """The worked network 2-2-1."""
    hidden, out = tribp.nn.LinearSigmoid(2, 2, dtype=torch.float64), nn.Linear(2, 1).double()
    model = nn.Sequential(hidden, out, nn.Sigmoid())
    with torch.no_grad():
        for p, start in zip(model.parameters(), ([[1, 2], [0, 1]], [0, 0], [[3, 3]], [0]), strict=True):
            p.copy_(torch.tensor(start, dtype=p.dtype))
    model = model.to(kernels)
    step = tribp.train_step(model, tribp.optim.SGD(model.parameters(), lr=0.01), "half_squared_error", "sum")
    x, target = (torch.tensor(t, dtype=torch.float64, device=kernels) for t in ([[0.1, 0.8]], [[0.5]]))
    loss = step(x, target)
    assert step.reason is None
    assert float(loss) == pytest.approx(0.120105, rel=1e-5)
    for weight, value in zip(
        (hidden.weight, out.weight),
        ([[0.000187999, 0.00150399], [0.000307910, 0.00246328]], [[0.00405699, 0.00331059]]),
        strict=True,
    ):
        torch.testing.assert_close(grad(weight).cpu(), torch.tensor(value, dtype=torch.float64), rtol=1e-5, atol=0)
        assert not torch.equal(weight, weight.round())  # it was updated


@pytest.mark.parametrize(
    "optimizer", [tribp.optim.Adam, tribp.optim.SGD, torch.optim.RMSprop], ids=lambda o: str(o)[8:-2]
)
def test_trains_as_separate_steps_do(optimizer: Any, device: str) -> None:
    """Over batches of two sizes, with a schedule and a hook on the step."""
    model = network((12, 20, 4), "tanh", None).to(device)
    twin = copy.deepcopy(model)
    ours, theirs = (optimizer(m.parameters(), lr=0.05) for m in (model, twin))
    called: list[int] = []
    ours.register_step_post_hook(lambda *_: called.append(1))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2) for o in (ours, theirs)]
    step = tribp.train_step(model, ours, "cross_entropy")
    for n in range(5):
        x, target = (t.to(device) for t in draw((12, 20, 4), 24 - 7 * (n % 2), "cross_entropy"))
        loss = step(x, target)
        theirs.zero_grad()
        expected = F.cross_entropy(twin(x), target)
        expected.backward()
        theirs.step()
        torch.testing.assert_close(loss, expected.detach())
        for schedule in schedules:
            schedule.step()
    assert len(called) == 5
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_rows_that_count_nowhere(kernels: str) -> None:
    """All ignored: the mean of nothing, without a gradient. No class: NaN, where torch stops the program."""
    model = network((8, 6, 3), "relu", None).to(kernels)
    step = step_of(model, "cross_entropy")
    x = torch.randn(5, 8, dtype=torch.float64, device=kernels)
    assert step(x, torch.full((5,), -100, device=kernels)).isnan()
    assert step.reason is None
    for p in model.parameters():
        assert torch.equal(grad(p), torch.zeros_like(p))
    for none in (3, -1, 2**40):
        assert step(x, torch.full((5,), none, device=kernels)).isnan()
        for p in model.parameters():
            assert torch.equal(grad(p), torch.zeros_like(p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [(-0.3, 0.1), (-0.1, 0.3)], ids=str)
def test_nothing_passes_where_an_output_is_at_a_rounded_bound(
    bounds: tuple[float, float], dtype: torch.dtype, kernels: str
) -> None:
    """0.1 and 0.3 lie on either side of what float16 and bfloat16 make of them."""
    model = network((8, 6, 3), ("hardtanh", *bounds), ("hardtanh", *bounds)).to(kernels, dtype)
    x, target = (4 * t.to(kernels, dtype) for t in draw((8, 3), 20, "mse_loss"))
    twin = copy.deepcopy(model).double()
    step = step_of(model, "mse_loss", "sum")
    step(x, target)
    assert step.reason is None
    F.mse_loss(twin(x.double()), target.double(), reduction="sum").backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(grad(ours).double(), grad(theirs), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("target_outside", [1.5, -0.25, float("nan")])
def test_targets_that_are_no_probability(target_outside: float, kernels: str) -> None:
    """The loss is NaN, where torch raises; they leave no gradient."""
    model = network((8, 6, 3), "tanh", "sigmoid").to(kernels)
    x, target = (t.to(kernels) for t in draw((8, 3), 6, "binary_cross_entropy"))
    twin = copy.deepcopy(model)
    target[4, 1] = target_outside
    step = step_of(model, "binary_cross_entropy")
    assert step(x, target).isnan()
    assert step.reason is None
    y = twin(x)
    inside = torch.arange(18, device=kernels).reshape(6, 3) != 13
    F.binary_cross_entropy(y[inside], target[inside], reduction="sum").div(18).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(grad(ours), grad(theirs))


@pytest.mark.parametrize("outside", [-0.25, 1.5, -1e-30, 1e200, -1e200])
def test_outputs_that_are_no_probability(outside: float, kernels: str) -> None:
    """The loss is NaN, where torch raises; they leave no gradient. One that is NaN leaves NaN."""
    model = nn.Linear(3, 3, dtype=torch.float64).to(kernels)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.zero_()
    x, target = (t.to(kernels) for t in draw((3, 3), 6, "binary_cross_entropy"))
    x = torch.rand_like(x)
    x[4, 1] = outside
    twin = copy.deepcopy(model)
    step = step_of(model, "binary_cross_entropy")
    assert step(torch.full_like(x, outside), target).isnan()
    assert step.reason is None
    assert all(map(torch.equal, model.parameters(), twin.parameters())), "nothing moves"
    assert step(x, target).isnan()
    inside = torch.arange(18, device=kernels).reshape(6, 3) != 13
    F.binary_cross_entropy(twin(x)[inside], target[inside], reduction="sum").div(18).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(grad(ours), grad(theirs))
    x[4, 1] = float("nan")
    assert step(x, target).isnan()
    assert grad(model.bias).isnan().all()


def test_gradients_are_what_backward_leaves(kernels: str) -> None:
    """In the tensors of the last step; none for what is frozen, and none left on what is not in the model."""
    model, other = network((8, 6, 3), "relu", None).to(kernels), nn.Parameter(torch.ones(2, device=kernels))
    step = tribp.train_step(model, torch.optim.SGD([*model.parameters(), other], lr=0.1), "mse_loss")
    x, target = (t.to(kernels) for t in draw((8, 6, 3), 9, "mse_loss"))
    frozen = next(model.parameters()).requires_grad_(False)
    other.grad, frozen.grad, before = torch.ones_like(other), torch.ones_like(frozen), frozen.clone()
    step(x, target)
    assert step.reason is None
    assert [p.grad is None for p in (other, frozen)] == [True, True]
    assert torch.equal(frozen, before)
    trained = [p for p in model.parameters() if p is not frozen]
    grads = [p.grad for p in trained]
    assert None not in grads
    step(x, target)
    assert all(p.grad is grad for p, grad in zip(trained, grads, strict=True))


def replaced(model: Any, layer: nn.Module) -> Any:
    model.add_module("0", layer.double())
    return model


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


LARGE = ((8, 256), *((256, 256),) * 5, (256, 3))
REASONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hooks": (lambda m: (hooked(m.layers[0]), m)[1], "hooks"),
    "hooks of a block": (lambda m: nn.Sequential(nn.Sequential(hooked(nn.Sequential(m)))), "Sequential has hooks"),
    "parameter hooks": (lambda m: (next(m.parameters()).register_hook(lambda g: None), m)[1], "hooks"),
    "after accumulation": (
        lambda m: (next(m.parameters()).register_post_accumulate_grad_hook(lambda p: None), m)[1],
        "hooks",
    ),
    "subclass": (lambda m: nn.Sequential(m, type("Mine", (nn.Linear,), {})(3, 3).double()), "Mine"),
    "replaced": (lambda m: replaced(m, nn.Sequential(nn.Linear(8, 6))), "replaced"),
    "left out": (lambda m: nn.Sequential(nn.Linear(8, 6).double(), replaced(m, nn.Identity())), "replaced"),
    "dropout": (lambda m: nn.Sequential(m, nn.Dropout(0.0)), "Dropout"),
    "flattens all": (lambda m: nn.Sequential(nn.Flatten(0, 0), m), "Flatten(start_dim=0, end_dim=0)"),
    "activation first": (lambda m: nn.Sequential(nn.Tanh(), m), "behind no linear layer"),
    "shared": (lambda m: nn.Sequential(nn.Linear(8, 8).double(), *[nn.Linear(8, 8).double()] * 2, m), "share"),
    "wide": (lambda m: nn.Sequential(nn.Linear(8, 300).double(), nn.Linear(300, 8).double(), m), "300 float64 outputs"),
    "deep": (lambda m: nn.Sequential(*(nn.Linear(8, 8).double() for _ in range(8)), m), "layers, more than 8"),
    "large": (lambda m: nn.Sequential(*(nn.Linear(*s).float() for s in LARGE)), "bytes"),
}


@pytest.mark.parametrize("name", REASONS)
def test_says_why_and_takes_the_ordinary_way(name: str, kernels: str) -> None:
    change, words = REASONS[name]
    model = change(network((8, 6, 3), "tanh", None)).to(kernels)
    twin = copy.deepcopy(model)
    width = next(p.shape[1] for p in model.parameters())
    x, target = (t.to(kernels, next(model.parameters()).dtype) for t in draw((width, 3), 6, "mse_loss"))
    step = step_of(model, "mse_loss")
    loss = step(x, target)
    assert words in str(step.reason)
    assert repr(step).endswith(f": {step.reason}")
    expected = F.mse_loss(twin(x), target)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


FLATTENING: dict[str, Callable[[Any], nn.Module]] = {
    "first": lambda m: nn.Sequential(nn.Flatten(), m),
    "behind others": lambda m: nn.Sequential(nn.Identity(), nn.Sequential(nn.Flatten(), nn.Flatten()), *m.layers),
    "of rows": lambda m: nn.Sequential(nn.Flatten(), m, nn.Flatten()),
}


@pytest.mark.parametrize("given", ["3 dimensions", "4 dimensions", "channels last", "rows"])
@pytest.mark.parametrize("name", FLATTENING)
def test_flattens(name: str, given: str, kernels: str) -> None:
    """As models of images begin."""
    model = FLATTENING[name](network((12, 6, 3), "tanh", None)).to(kernels)
    twin = copy.deepcopy(model)
    x, target = (t.to(kernels) for t in draw((12, 3), 5, "mse_loss"))
    if given != "rows":
        x = x.view(5, 3, 4) if given == "3 dimensions" else x.view(5, 3, 2, 2)
    if given == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    step = step_of(model, "mse_loss")
    for _ in range(2):
        loss = step(x, target)
        assert step.reason is None
        twin.zero_grad()
        expected = F.mse_loss(twin(x), target)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
            with torch.no_grad():
                q.copy_(p)


def test_flattens_what_it_is_told_to(kernels: str) -> None:
    """Dimensions that change between two steps; and none of an input that layers took as it was."""
    flatten = nn.Flatten()
    model = nn.Sequential(flatten, network((12, 6, 3), "tanh", None)).to(kernels)
    x, target = (t.to(kernels) for t in draw((12, 3), 5, "mse_loss"))
    step = step_of(model, "mse_loss")
    step(x, target)
    assert str(step.reason) == "None"
    flatten.start_dim = 0
    with pytest.raises(ValueError, match=r"\(5, 12\)|60"):
        step(x, target)
    assert step.reason == "it has a Flatten(start_dim=0, end_dim=-1)"
    late = nn.Sequential(nn.Linear(4, 4), nn.Flatten(1), nn.Linear(4, 3)).double().to(kernels)
    step = step_of(late, "mse_loss")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        step(x.view(5, 3, 4), target)
    assert "two dimensions" in str(step.reason)


def test_no_layer(kernels: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, device=kernels)
    step = tribp.train_step(nn.Sequential(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "mse_loss")
    with pytest.raises(RuntimeError, match="grad"):
        step(x, x)
    assert step.reason == "it has no linear layer"


def test_tensors_that_kernels_do_not_take(kernels: str) -> None:
    model = network((8, 6, 3), "tanh", None).to(kernels)
    x, target = (t.to(kernels) for t in draw((8, 3), 6, "mse_loss"))
    step = step_of(model, "mse_loss")
    with pytest.warns(UserWarning, match="target size"):
        step(x, target[:1])
    assert "shape" in str(step.reason)
    step(x.unflatten(0, (2, 3)), target.unflatten(0, (2, 3)))
    assert "two dimensions" in str(step.reason)
    step(x.repeat(200, 1), target.repeat(200, 1))
    assert "1200 rows" in str(step.reason)
    with torch.autocast(x.device.type, torch.bfloat16):
        step(x, target)
    assert "autocast" in str(step.reason)
    with pytest.raises(ValueError, match=r"weight must have shape \(6, 5\)"):
        step(x[:, :5], target)
    with pytest.raises(TypeError, match="float32"):
        step(x.float(), target)
    step = tribp.train_step(model, step.optimizer, lambda y, t: (y - t).square().mean())
    step(x, target)
    assert "function" in str(step.reason)
    expected = step_of(copy.deepcopy(model), "mse_loss")(x, target)
    torch.testing.assert_close(step_of(model, "mse_loss")(x.to_sparse(), target), expected)


def changed(loss: nn.Module, **attributes: Any) -> nn.Module:
    vars(loss).update(attributes)
    return loss


def with_hook(loss: nn.Module) -> nn.Module:
    loss.register_forward_hook(lambda module, given, value: 10 * value)
    return loss


@pytest.mark.parametrize(
    ("loss", "known"),
    {
        "module": (nn.CrossEntropyLoss(), True),
        "sum": (nn.CrossEntropyLoss(reduction="sum"), True),
        "function": (F.cross_entropy, True),
        "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), False),
        "weighted": (nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64)), False),
        "another ignored": (nn.CrossEntropyLoss(ignore_index=1), False),
        "own forward": (changed(nn.CrossEntropyLoss(), forward=lambda y, t: y.square().sum()), False),
        "hook": (with_hook(nn.CrossEntropyLoss()), False),
        "other": (nn.NLLLoss(), False),
    }.values(),
    ids=itertools.count(),
)
def test_losses_of_torch(loss: Any, known: bool, kernels: str) -> None:
    model = network((8, 6, 3), "tanh", None).to(kernels)
    twin = copy.deepcopy(model)
    if isinstance(loss, nn.Module):
        loss.to(kernels)
    x, target = (t.to(kernels) for t in draw((8, 3), 6, "cross_entropy"))
    target = target.clamp(min=0)
    step = step_of(model, loss)
    value = step(x, target)
    assert (step.reason is None) == known
    torch.testing.assert_close(value, loss(twin(x), target).detach())
    if isinstance(loss, nn.CrossEntropyLoss) and known:
        loss.label_smoothing = 0.5  # looked at in every call
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(step(x, target), loss(twin(x), target).detach())
        assert step.reason is not None


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.BCELoss])
def test_a_reduction_that_torchs_modules_do_not_have(kind: Any, kernels: str) -> None:
    model = network((8, 6, 3), "tanh", "sigmoid").to(kernels)
    x, target = (t.to(kernels) for t in draw((8, 3), 6, "binary_cross_entropy"))
    with pytest.raises(ValueError, match="batchmean is not a valid value for reduction"):
        step_of(model, kind(reduction="batchmean"))(x, target)


@pytest.mark.parametrize("note", ["relu", "gelu", F.relu])
def test_a_note_on_a_layer_of_torchs(note: Any, kernels: str) -> None:
    """An attribute that nn.Linear's forward never reads: `calculate_gain(layer.activation)` may."""
    layer: Any = nn.Linear(4, 5)
    layer.activation = note
    model = nn.Sequential(layer, nn.Linear(5, 3)).to(kernels)
    x, target = torch.randn(6, 4, device=kernels), torch.randn(6, 3, device=kernels)
    expected = F.mse_loss(model(x), target)
    step = tribp.train_step(model, torch.optim.SGD(model.parameters(), 0.0), "mse_loss")
    torch.testing.assert_close(step(x, target), expected.detach())
    assert step.reason is None


class Tenfold(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 10 if function is F.linear else result


def test_who_looks_on_at_torchs_functions(kernels: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to(kernels)
    x, target = torch.randn(6, 4, device=kernels), torch.randn(6, 3, device=kernels)
    step = tribp.train_step(model, torch.optim.SGD(model.parameters(), 0.0), "mse_loss")
    with Tenfold():
        expected = F.mse_loss(model(x), target)
        torch.testing.assert_close(step(x, target), expected.detach())
        assert "mode" in str(step.reason)
    with warnings.catch_warnings(), torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan"):
        step(x * float("nan"), target)
    with torch.device(kernels):  # torch's own mode, which torch.set_default_device leaves on
        step(x, target)
        assert step.reason is None


@dataclasses.dataclass
class Huber:
    """As dataclasses are, without a hash."""

    delta: float = 1.0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target, delta=self.delta)


def test_a_loss_without_a_hash() -> None:
    model, x, target = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    expected = Huber()(model(x), target)
    step = tribp.train_step(model, torch.optim.SGD(model.parameters(), 0.1), Huber())
    assert torch.equal(step(x, target), expected)


def test_a_layer_that_grows(kernels: str) -> None:
    """Its gradient has no room where the last one was."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double().to(kernels)
    step = step_of(model, "cross_entropy")
    x, target = (t.to(kernels) for t in draw((5, 3), 7, "cross_entropy"))
    step(x, target)
    for p, shape in zip(model.parameters(), ((100, 5), (100,), (3, 100), (3,)), strict=True):
        p.data = torch.randn(shape, dtype=torch.float64, device=kernels)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    value = step(x, target)
    assert step.reason is None
    expected = F.cross_entropy(twin(x), target)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(grad(p), grad(q))


def test_gradients_of_others_stay(kernels: str) -> None:
    """None that the step did not write is written anew; autograd is told of those that are."""
    model = network((8, 6, 3), "relu", None).to(kernels)
    x, target = (t.to(kernels) for t in draw((8, 6, 3), 9, "mse_loss"))
    F.mse_loss(model(x), target).backward(create_graph=True)
    p = next(model.parameters())
    theirs = grad(p)
    before = theirs.detach().clone()
    step = step_of(model, "mse_loss")
    step(x, target)
    assert torch.equal(theirs, before)
    assert not grad(p).requires_grad
    w = torch.ones_like(p, requires_grad=True)
    kept = (grad(p) * w).sum()
    step(x, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_optimizers_with_ways_of_their_own(kernels: str) -> None:
    model = network((8, 6, 3), "relu", None).to(kernels)
    x, target = (t.to(kernels) for t in draw((8, 6, 3), 9, "mse_loss"))
    step = tribp.train_step(model, torch.optim.SGD([next(model.parameters())], lr=0.1), "mse_loss")
    step(x, target)
    assert "not the optimizer's" in str(step.reason)
    own = type("Own", (torch.optim.SGD,), {"zero_grad": lambda self, set_to_none=True: None})
    step = step_of(model, "mse_loss", optimizer=own)
    step(x, target)
    assert "zero_grad of its own" in str(step.reason)
    step = step_of(model.requires_grad_(False), "mse_loss")
    with pytest.raises(RuntimeError, match="does not require grad"):
        step(x, target)


def test_refuses() -> None:
    model = network((8, 3), None, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="model must be"):
        tribp.train_step(None, optimizer, "mse_loss")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be"):
        tribp.train_step(model, None, "mse_loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mse_loss"):
        tribp.train_step(model, optimizer, "l1")
    for loss, reduction in (("mse_loss", "none"), (F.mse_loss, "sum"), (nn.MSELoss(), "sum")):
        with pytest.raises(ValueError, match="batchmean"):
            tribp.train_step(model, optimizer, loss, reduction)
    for wrong in (nn.MSELoss, [1], None):
        with pytest.raises(TypeError, match="loss must be"):
            tribp.train_step(model, optimizer, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS"):
        tribp.train_step(model, torch.optim.LBFGS(model.parameters()), "mse_loss")


def test_fused_models(kernels: str) -> None:
    """What `fuse` makes of torch's layers is the same perceptron."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3))
    model = model.double().to(kernels)
    x, target = (t.to(kernels) for t in draw((8, 3), 6, "mse_loss"))
    losses = []
    for fused in (False, True):
        if fused:
            tribp.fuse(model)
        step = tribp.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), "mse_loss")
        losses.append(step(x, target))
        assert step.reason is None
    torch.testing.assert_close(*losses)


def test_launches(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tribp.launch.launches import CachedLaunch

    names: list[str] = []
    run = CachedLaunch.__call__

    def recorded(self: Any, memory: Any) -> None:
        names.append(self._launch.kernel.__name__)
        run(self, memory)

    monkeypatch.setattr(CachedLaunch, "__call__", recorded)
    model = network((8, 6, 3), "tanh", None).to(kernels)
    step = step_of(model, "mse_loss", optimizer=tribp.optim.Adam)
    step(*(t.to(kernels) for t in draw((8, 3), 6, "mse_loss")))
    assert dispatch.backend() == "triton"
    assert names == ["train_rows", "train_weights", "multi_tensor_step"]


@pytest.mark.gpu
def test_a_cuda_graph_replays_steps() -> None:
    """What is captured is launches alone: gradients stay where they are, and the loss where the graph put it.

    The twin is not `capturable`: then torch forms 1 − βᵗ in float32, whatever the parameters' type.
    """
    model = network((12, 20, 4), "tanh", None).cuda()
    twin = copy.deepcopy(model)
    ours, theirs = (tribp.optim.Adam(m.parameters(), lr=0.05, capturable=m is model) for m in (model, twin))
    step, separate = (tribp.train_step(*pair, "cross_entropy") for pair in ((model, ours), (twin, theirs)))
    x, target = (t.cuda() for t in draw((12, 20, 4), 24, "cross_entropy"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(x, target)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            loss = step(x, target)
    assert step.reason is None
    separate(x, target)
    for _ in range(3):
        fresh, other = draw((12, 20, 4), 24, "cross_entropy")
        x.copy_(fresh)
        target.copy_(other)
        graph.replay()
        with tribp.use_backend("torch"):
            expected = separate(x, target)
        torch.testing.assert_close(loss, expected)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
