"""What torch and its users build around an optimizer: schedulers, GradScaler, hooks, closures, the compiler, copies."""

import contextlib
import copy
import functools
import gc
import inspect
import io
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import tribp.optim
from tribp import runtime
from tribp.optim import SGD, Adagrad, Adam, AdamW, Momentum, RMSprop

from .test_runtime import WITHOUT_TRITON, python

Options = dict[str, Any]
PAIRS: list[tuple[type[Optimizer], type[Optimizer]]] = [
    (SGD, torch.optim.SGD),
    (RMSprop, torch.optim.RMSprop),
    (Adagrad, torch.optim.Adagrad),
    (Adam, torch.optim.Adam),
    (AdamW, torch.optim.AdamW),
]
every_pair = pytest.mark.parametrize(("kind", "genuine"), PAIRS, ids=lambda kind: str(kind.__module__.split(".")[0]))


def weights(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Parameter]:
    made = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(n, generator=made, dtype=torch.float64).to(device, dtype)) for n in (5, 3)]


def gradients(params: Sequence[Tensor], number: int) -> None:
    """Those of step `number`, the same every time."""
    made = torch.Generator().manual_seed(100 + number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=made, dtype=torch.float64).to(p.device, p.dtype)


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert_close(list(found), list(expected), rtol=1e-11, atol=1e-13)


def model(device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(device, torch.float64)


def loss_of(network: torch.nn.Module, number: int = 0) -> Tensor:
    p = next(network.parameters())
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(p.device, p.dtype)
    return network(x).square().sum()  # type: ignore[no-any-return]


# What it looks like.


@every_pair
def test_arguments_are_torchs(kind: type[Optimizer], genuine: type[Optimizer]) -> None:
    """Names, kinds, order, defaults; what is ours comes after them and by keyword."""
    found, expected = (inspect.signature(c).parameters for c in (kind, genuine))
    own = [p for p in found.values() if p.name not in expected]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in own)
    assert {p.name for p in own} <= {"capturable", "fused", "beyond"}
    assert [(p.name, p.kind, p.default) for p in found.values() if p.name in expected] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]
    assert list(inspect.signature(kind.step).parameters) == list(inspect.signature(genuine.step).parameters)


@every_pair
def test_it_is_one_of_torchs(kind: type[Optimizer], genuine: type[Optimizer]) -> None:
    """Lightning, accelerate and schedulers ask isinstance; people read the repr and set `defaults`."""
    a, b = kind(weights()), genuine(weights())  # type: ignore[call-arg]
    assert isinstance(a, genuine)
    assert repr(a) == repr(b)
    assert list(a.defaults.items()) == list(b.defaults.items())
    assert kind.__name__ == genuine.__name__


def test_relations_between_the_classes() -> None:
    assert issubclass(AdamW, Adam)  # as in torch
    assert isinstance(AdamW(weights()), torch.optim.AdamW)
    assert isinstance(Momentum(weights()), SGD)
    assert tribp.optim.RMSProp is RMSprop
    assert tribp.optim.AdaGrad is Adagrad


WRONG: list[tuple[str, Options]] = [
    ("Adam", dict(lr=-1.0)),
    ("Adam", dict(betas=(1.0, 0.9))),
    ("Adam", dict(betas=(0.9, -0.1))),
    ("Adam", dict(betas=(0.9, torch.tensor(0.9)))),
    ("Adam", dict(eps=-1.0)),
    ("Adam", dict(weight_decay=-1.0)),
    ("Adam", dict(fused=True, foreach=True)),
    ("Adam", dict(fused=True, differentiable=True)),
    ("Adam", dict(lr=torch.tensor(0.1), foreach=True)),
    ("Adam", dict(lr=torch.tensor([0.1, 0.2]))),
    ("Adam", dict(surprise=1)),
    ("AdamW", dict(lr=-1.0)),
    ("AdamW", dict(decoupled_weight_decay=True)),
    ("AdamW", dict(fused=True, foreach=True)),
    ("SGD", dict(lr=-1.0)),
    ("SGD", dict(momentum=-1.0)),
    ("SGD", dict(nesterov=True)),
    ("SGD", dict(nesterov=True, momentum=0.9, dampening=0.1)),
    ("SGD", dict(fused=True, foreach=True)),
    ("SGD", dict(fused=True, differentiable=True)),
    ("SGD", dict(surprise=1)),
    ("RMSprop", dict(lr=-1.0)),
    ("RMSprop", dict(alpha=-1.0)),
    ("RMSprop", dict(momentum=-1.0)),
    ("RMSprop", dict(eps=-1.0)),
    ("Adagrad", dict(lr=-1.0)),
    ("Adagrad", dict(lr_decay=-1.0)),
    ("Adagrad", dict(initial_accumulator_value=-1.0)),
    ("Adagrad", dict(fused=True, foreach=True)),
    ("Adagrad", dict(fused=True, differentiable=True)),
]


@pytest.mark.parametrize(("name", "options"), WRONG, ids=str)
def test_wrong_arguments_are_torchs_errors(name: str, options: Options) -> None:
    errors = []
    for library in (tribp.optim, torch.optim):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            getattr(library, name)(weights(), **options)
        errors.append((type(caught.value), str(caught.value).replace(f"{name}.__init__", name)))
    assert errors[0] == errors[1]


GROUPS: dict[str, Callable[[list[Parameter]], Any]] = {
    "none": lambda p: [],
    "a tensor": lambda p: p[0],
    "a number": lambda p: [1.0],
    "not a leaf": lambda p: [p[0] * 2],
    "a set": lambda p: [dict(params=set(p))],
    "in two groups": lambda p: [dict(params=p), dict(params=p[:1])],
    "half named": lambda p: [("a", p[0]), p[1]],
    "wrong lr": lambda p: [dict(params=p, lr=None), 3],
}


@pytest.mark.parametrize("which", GROUPS)
def test_wrong_groups_are_torchs_errors(which: str) -> None:
    """A parameter that two groups share would be updated twice."""
    errors = []
    for kind in (Adam, torch.optim.Adam):
        with pytest.raises((ValueError, TypeError)) as caught:
            kind(GROUPS[which](weights()))
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_groups_that_torch_only_warns_of() -> None:
    for kind in (Adam, torch.optim.Adam):
        (p,) = weights()[:1]
        with pytest.warns(UserWarning, match="duplicate parameters"):
            kind([p, p])


def test_named_parameters_make_groups() -> None:
    network = model()
    optimizer = Adam(network.named_parameters(), ema_decay=0.5)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in network.named_parameters()]
    loss_of(network).backward()
    optimizer.step()
    assert set(optimizer.state) == set(network.parameters())


# Schedulers.


def _lambda(epoch: int) -> float:
    return 0.5**epoch


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [_lambda, lambda epoch: 0.9]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.7),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.PolynomialLR(o)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("kind", "genuine"), [PAIRS[0], PAIRS[3]], ids=["SGD", "Adam"])
def test_schedulers(kind: Any, genuine: Any, schedule: str) -> None:
    """Every family; those that move the momentum, or Adam's β₁, too."""
    options: Options = dict(momentum=0.9) if kind is SGD else {}
    found = []
    for c in (kind, genuine):
        params = weights()
        optimizer = c([dict(params=params[:1]), dict(params=params[1:], lr=0.3)], lr=0.1, **options)
        scheduler = SCHEDULES[schedule](optimizer)
        for i in range(5):
            gradients(params, i)
            optimizer.step()
            scheduler.step()
        found.append((params, [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]))
    close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("schedule", ["OneCycleLR", "SequentialLR"])
def test_schedulers_on_both_backends(schedule: str, device: str) -> None:
    """The kernel reads the rate and β₁ from a table that must follow."""
    found = []
    for kind in (Adam, torch.optim.Adam):
        params = weights(device)
        groups: list[Options] = [dict(params=params[:1]), dict(params=params[1:], lr=0.3)]
        optimizer = kind(groups, lr=0.1)
        scheduler = SCHEDULES[schedule](optimizer)
        for i in range(4):
            gradients(params, i)
            optimizer.step()
            scheduler.step()
        found.append(params)
    close(*found)


def test_reduce_on_plateau_and_tensor_rates(device: str) -> None:
    found = []
    for kind in (Adam, torch.optim.Adam):
        params = weights(device)
        optimizer = kind(params, lr=torch.tensor(0.1, dtype=torch.float64))
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        for i in range(4):
            gradients(params, i)
            optimizer.step()
            scheduler.step(1.0)
        assert float(optimizer.param_groups[0]["lr"]) < 0.1
        found.append(params)
    close(*found)


def test_no_warning_that_schedulers_come_first() -> None:
    """Schedulers watch `step` on the instance, to warn when they are stepped before the optimizer."""
    import warnings

    optimizer = Adam(weights())
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    gradients(weights(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()


# Mixed precision.


@pytest.mark.parametrize("fused", [False, True])
@every_pair
def test_grad_scaler(kind: Any, genuine: Any, fused: bool, device: str) -> None:
    """Three steps, the second one with an infinity: skipped, the scale halved. Later also clipped after unscale_."""
    options: Options = dict(fused=True) if fused else {}
    found = []
    for c in (kind, genuine):
        if c is torch.optim.RMSprop:
            options = {}  # torch has no fused one
        network = model(device)
        optimizer = c(network.parameters(), lr=0.1, **options)
        scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=4.0, growth_interval=2)
        scales = []
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(network, i)).backward()
            if i == 1:
                next(network.parameters()).grad.view(-1)[1] = float("inf")  # type: ignore[union-attr]
            if i == 3:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            before = [p.detach().clone() for p in network.parameters()]
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            skipped = all(map(torch.equal, before, network.parameters()))
            assert skipped == (i == 1)
        found.append((list(network.parameters()), scales, [p.grad for p in network.parameters() if p.grad is not None]))
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    close(found[0][2], found[1][2])  # unscaled in place


@every_pair
def test_it_scales_exactly_when_told(kind: Any, genuine: Any) -> None:
    """Lightning refuses gradient clipping where the mark is, so a plain optimizer must not have it."""
    assert not getattr(kind(weights()), "_step_supports_amp_scaling", False)
    fused = kind(weights(), fused=True)
    assert fused._step_supports_amp_scaling is True
    assert getattr(copy.deepcopy(fused), "_step_supports_amp_scaling", False) is True
    if genuine not in (torch.optim.RMSprop, torch.optim.Adagrad):  # torch 2.11's Adagrad has none
        assert genuine(weights(), fused=True)._step_supports_amp_scaling is True


def test_the_mark_is_not_found_on_the_class() -> None:
    """GradScaler asks the instance or its class; a mark on the class would hold for every optimizer."""
    for kind, _ in PAIRS:
        assert not hasattr(kind, "_step_supports_amp_scaling")


# Hooks.


@pytest.fixture
def unhooked() -> Iterator[None]:
    """torch wraps the `step` of a class when it first constructs one; make that a matter of this test."""
    classes: list[Any] = [c for pair in PAIRS for c in pair] + [Momentum]
    kept = {c: c.__dict__["step"] for c in classes if "step" in c.__dict__}
    for c, step in kept.items():
        c.step = step.__wrapped__ if hasattr(step, "hooked") else step
    yield
    for c in classes:
        if c in kept:
            c.step = kept[c]
        elif "step" in c.__dict__:
            del c.step


@pytest.mark.parametrize("order", ["ours first", "torch's first", "ours alone"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Momentum", "RMSprop"])
@pytest.mark.usefixtures("unhooked")
def test_step_hooks_fire_once(name: str, order: str) -> None:
    """Also where ours goes down torch's own path (a sparse gradient), whatever was constructed before."""
    theirs = getattr(torch.optim, "SGD" if name == "Momentum" else name)
    seen: list[str] = []
    if order == "torch's first":
        theirs(weights())
    params = weights()
    optimizer = getattr(tribp.optim, name)(params, lr=0.1)
    if order == "ours first":
        theirs(weights())
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("global post")),
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append("pre")),
        optimizer.register_step_post_hook(lambda o, a, k: seen.append("post")),
    ]
    once = ["global pre", "pre", "post", "global post"]
    try:
        gradients(params, 0)
        optimizer.step()
        assert seen == once
        seen.clear()
        copy.deepcopy(optimizer).step()
        assert seen == ["global pre", "global post"]
        seen.clear()
        if name == "Momentum":
            params[0].grad = torch.ones(5, dtype=torch.float64).to_sparse()
            optimizer.step()
            assert seen == once
            seen.clear()
        handles[2].remove()
        optimizer.step()
        assert seen == ["global pre", "post", "global post"]
        gradients(genuine_params := weights(), 0)
        seen.clear()
        theirs(genuine_params).step()
        assert seen == ["global pre", "global post"]
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_may_change_what_the_step_does(device: str) -> None:
    """A pre-hook that scales gradients and the rate, a post-hook that projects: both in this step already."""
    found = []
    for kind in (Adam, torch.optim.Adam):
        params = weights(device)
        optimizer = kind(params, lr=0.1)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            optimizer.param_groups[0]["lr"] *= 0.5
            for p in optimizer.param_groups[0]["params"]:
                p.grad.mul_(2.0)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                for p in optimizer.param_groups[0]["params"]:
                    p.clamp_(-1, 1)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        for i in range(3):
            gradients(params, i)
            optimizer.step()
        found.append(params)
    close(*found)


def test_the_profiler_names_the_step(device: str) -> None:
    params = weights(device)
    optimizer = Adam(params)
    gradients(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert names.count("Optimizer.step#Adam.step") == 1
    assert names.count("Optimizer.zero_grad#Adam.zero_grad") == 1
    (event,) = (event for event in profile.key_averages() if event.key == "Optimizer.step#Adam.step")
    assert event.count == 1


# The loop around it.


def test_closures(device: str) -> None:
    """Its value is returned; it may compute gradients though the caller is in no_grad; it is called once."""
    for kind in (Adam, torch.optim.Adam):
        network = model(device)
        optimizer = kind(network.parameters())
        calls: list[bool] = []

        def closure(optimizer: Any = optimizer, network: Any = network, calls: list[bool] = calls) -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(network)
            loss.backward()
            return loss

        before = next(network.parameters()).detach().clone()
        with torch.no_grad():
            assert isinstance(optimizer.step(closure), Tensor)
            assert optimizer.step(closure=lambda: (closure(), "value")[1]) == "value"
            assert not torch.is_grad_enabled()
        assert calls == [True, True]
        assert not torch.equal(before, next(network.parameters()))
        assert optimizer.step() is None
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)


def test_under_inference_mode_of_no_one_and_grad_of_all(device: str) -> None:
    """A step leaves no graph behind: parameters stay leaves, gradients and states need none."""
    params = weights(device)
    optimizer = Adam(params, ema_decay=0.5, max_grad_norm=1.0)
    gradients(params, 0)
    with torch.enable_grad():
        optimizer.step()
    for p in params:
        assert p.is_leaf
        assert p.requires_grad
        assert not any(v.requires_grad for v in optimizer.state[p].values())
    assert optimizer.grad_norm is not None
    assert not optimizer.grad_norm.requires_grad


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [None, True])
def test_zero_grad(set_to_none: bool, fused: bool | None, device: str) -> None:
    """Gradients that are freed (new memory each step), and those that stay and are zeroed: a step with zeros is one."""
    found = []
    for kind in (Adam, torch.optim.Adam):
        network = model(device)
        optimizer = kind(network.parameters(), lr=0.1, fused=fused)
        for i in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            if i != 1:
                loss_of(network, i).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        for p in network.parameters():
            assert (p.grad is None) == set_to_none
            assert p.grad is None or not p.grad.any()
            assert optimizer.state[p]["step"] == (2 if set_to_none else 3)
        found.append(list(network.parameters()))
    close(*found)


def test_clipping_by_hand_and_in_the_step(device: str) -> None:
    """clip_grad_norm_ before a step, and max_grad_norm in it, are the same mathematics."""
    found = []
    for kind, by_hand in ((Adam, False), (Adam, True), (torch.optim.Adam, True)):
        network = model(device)
        options: Options = {} if by_hand else dict(max_grad_norm=0.5)
        optimizer = kind(network.parameters(), lr=0.1, **options)
        norms = []
        for i in range(3):
            optimizer.zero_grad()
            loss_of(network, i).backward()
            if by_hand:
                norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5))
            optimizer.step()
            if not by_hand:
                assert isinstance(optimizer, Adam)
                assert isinstance(optimizer.grad_norm, Tensor)
                norms.append(optimizer.grad_norm)
        found.append([*network.parameters(), *norms])
    close(found[0], found[1])
    close(found[1], found[2])


def test_accumulated_gradients(device: str) -> None:
    """Several backward passes a step: the gradient keeps its memory within a step and changes it between."""
    found = []
    for kind in (SGD, torch.optim.SGD):
        network = model(device)
        optimizer = kind(network.parameters(), lr=0.1, momentum=0.9)
        for i in range(3):
            for j in range(2):
                loss_of(network, 2 * i + j).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(list(network.parameters()))
    close(*found)


def test_optimizer_in_backward(device: str) -> None:
    """One optimizer a parameter, stepped by a hook as its gradient is ready: gradients never live together."""
    found = []
    for kind in (Adam, torch.optim.Adam):
        network = model(device)
        optimizers = {p: kind([p], lr=0.1) for p in network.parameters()}

        def step(p: Tensor, optimizers: dict[Any, Any] = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in network.parameters():
            p.register_post_accumulate_grad_hook(step)
        for i in range(2):
            loss_of(network, i).backward()
        assert all(p.grad is None for p in network.parameters())
        found.append(list(network.parameters()))
    close(*found)


@contextlib.contextmanager
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("what", ["the whole step", "optimizer.step"])
@pytest.mark.parametrize("kind", [Adam, Momentum])
def test_compiled_training_step(kind: Any, what: str, device: str) -> None:
    """Around forward, backward and step together, and around the step alone: what eager gives."""
    found = []
    for compiled in (True, False):
        network = model(device)
        optimizer = kind(network.parameters(), lr=0.1)

        def train(number: Tensor, optimizer: Any = optimizer, network: torch.nn.Module = network) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = network(number).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        def steps(optimizer: Any = optimizer) -> None:
            optimizer.step()

        with _fresh_compiler():
            run: Any = train if what == "the whole step" else steps
            run = torch.compile(run, backend="eager") if compiled else run
            for i in range(3):
                optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
                x = torch.full((2, 3), float(i + 1), dtype=torch.float64, device=device)
                if what == "the whole step":
                    run(x)
                else:
                    optimizer.zero_grad()
                    network(x).square().sum().backward()
                    run()
        assert all(optimizer.state[p].get("step", 3) == 3 for p in network.parameters())
        found.append(list(network.parameters()))
    close(*found)


def test_compiled_steps_fire_hooks_once() -> None:
    params, seen = weights(), []
    optimizer = Adam(params)
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(1))
    with _fresh_compiler():
        step = torch.compile(optimizer.step, backend="eager")
        for i in range(3):
            gradients(params, i)
            step()
    assert len(seen) == 3
    assert optimizer.state[params[0]]["step"] == 3


def test_averaged_models_follow(device: str) -> None:
    """AveragedModel and SWALR around our optimizer; and ema_decay does what AveragedModel's EMA does."""
    found = []
    for kind in (SGD, torch.optim.SGD):
        network = model(device)
        optimizer = kind(network.parameters(), lr=0.1, momentum=0.9)
        if isinstance(optimizer, SGD):
            for group in optimizer.param_groups:
                group["ema_decay"] = 0.75
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        swa, schedule = AveragedModel(network), SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for i in range(3):
            optimizer.zero_grad()
            loss_of(network, i).backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
            swa.update_parameters(network)
        found.append([*network.parameters(), *swa.module.parameters()])
        if isinstance(optimizer, SGD):
            with optimizer.swap_ema():
                close(list(network.parameters()), list(averaged.module.parameters()))
    close(*found)


# The state, which is everyone's.


def _state(optimizer: Optimizer) -> Any:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def _ones(optimizer: Optimizer) -> Tensor:
    return torch.ones_like(_state(optimizer)["exp_avg"])


def _swap(optimizer: Optimizer) -> None:
    torch.utils.swap_tensors(_state(optimizer)["exp_avg"], _ones(optimizer))


# Ways in which resetting, offloading or quantizing code changes a live optimizer's state.
EDITS: dict[str, Callable[[Any], object]] = {
    "replaced": lambda o: _state(o).__setitem__("exp_avg", _ones(o)),
    "updated": lambda o: _state(o).update(exp_avg=_ones(o)),
    "in place": lambda o: _state(o)["exp_avg"].mul_(2),
    "another memory": lambda o: setattr(_state(o)["exp_avg"], "data", _ones(o)),
    "another storage": lambda o: _state(o)["exp_avg"].set_(_ones(o)),
    "swapped": _swap,
    "step replaced": lambda o: _state(o).__setitem__("step", torch.tensor(7.0)),
    "step in place": lambda o: _state(o)["step"].zero_(),
    "cleared": lambda o: _state(o).clear(),
    "another dict": lambda o: o.state.__setitem__(next(iter(o.state)), {k: v.clone() for k, v in _state(o).items()}),
    "all cleared": lambda o: o.state.clear(),
    "one removed": lambda o: o.state.pop(next(iter(o.state))),
    "another state": lambda o: setattr(o, "state", defaultdict(dict)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_state_changed_by_others(edit: str, device: str) -> None:
    """The plan keeps the states' addresses: an unnoticed change would be lost, or freed memory written to."""
    found = []
    for kind in (Adam, torch.optim.Adam):
        params = weights(device)
        optimizer = kind(params, lr=0.1)
        for i in range(4):
            gradients(params, i)
            if i == 2:
                EDITS[edit](optimizer)
            optimizer.step()
        found.append([*params, *(state[key] for state in optimizer.state.values() for key in sorted(state))])
    close(*found)


def test_states_are_dicts_to_every_tool(device: str) -> None:
    """Copied, rebuilt by their type, walked as trees, saved on their own: as the dicts of torch's optimizers."""
    params = weights(device)
    optimizer = Adam(params)
    gradients(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    for other in (copy.copy(state), copy.deepcopy(state), {**state}, state | {}, state.copy()):
        assert list(other) == ["step", "exp_avg", "exp_avg_sq"]
        other["exp_avg"] = None  # a copy is no part of the optimizer
    gradients(params, 1)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("tool", ["type", "tree", "file"])
def test_states_in_generic_code(tool: str) -> None:
    """accelerate rebuilds mappings by `type(x)(…)`, pytrees ask for the very type dict, files for known types."""
    params = weights()
    optimizer = Adam(params)
    gradients(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    if tool == "type":
        found = type(state)({key: value.float() for key, value in state.items()})
    elif tool == "tree":
        found = tree_map_only(Tensor, lambda t: t.float(), state)
    else:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        found = {key: value.float() for key, value in torch.load(file, weights_only=True).items()}
    assert {key: value.dtype for key, value in found.items()} == dict.fromkeys(state, torch.float32)


# Subclasses.


class Counting(Adam):
    """A user's own: options of his own, a step that does something before and after."""

    def __init__(self, params: Any, *, mark: int = 0, **options: Any) -> None:
        super().__init__(params, **options)
        self.mark = mark
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.grad.mul_(0.5)
        return super().step(closure)


def test_a_users_subclass(device: str) -> None:
    params, genuine_params = weights(device), weights(device)
    optimizer, genuine = Counting(params, mark=3, lr=0.1), torch.optim.Adam(genuine_params, lr=0.1)
    for i in range(3):
        gradients(params, i)
        gradients(genuine_params, i)
        for p in genuine_params:
            assert p.grad is not None
            p.grad.mul_(0.5)
        optimizer.step()
        genuine.step()
    assert (optimizer.steps, optimizer.mark) == (3, 3)
    close(params, genuine_params)
    copied = copy.deepcopy(optimizer)
    assert type(copied) is Counting
    other = Counting(weights(device), lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.1


def test_a_wrapped_step(device: str) -> None:
    """Schedulers and accelerate replace `step` on the instance."""
    params = weights(device)
    optimizer = Adam(params)
    inner, calls = optimizer.step, []

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    optimizer.step = outer  # type: ignore[method-assign]
    gradients(params, 0)
    optimizer.step()
    assert calls == [1]
    assert optimizer.state[params[0]]["step"] == 1


# Living and dying.


@pytest.mark.parametrize("kind", [SGD, RMSprop, Adam])
def test_nothing_keeps_memory(kind: Any, device: str) -> None:
    """When model and optimizer are gone, so is all that they held: parameters, gradients, states, the plan."""
    network = model(device)
    options: Options = dict(ema_decay=0.5, max_grad_norm=1.0)
    optimizer = kind(network.parameters(), **options)
    for i in range(2):
        optimizer.zero_grad()
        loss_of(network, i).backward()
        optimizer.step()
    held = [network, optimizer, *network.parameters(), *(p.grad for p in network.parameters())]
    held += [v for state in optimizer.state.values() for v in state.values()]
    dead = [weakref.ref(x) for x in held]
    assert len(dead) > 12
    del network, optimizer, held
    gc.collect()
    assert [ref() for ref in dead if ref() is not None] == []


def test_gradients_are_freed_by_zero_grad(device: str) -> None:
    """The plan reads gradients; it may not keep them, or memory peaks at two sets of gradients."""
    params = weights(device)
    optimizer = Adam(params)
    for i in range(3):
        gradients(params, i)
        optimizer.step()
        if i == 0:
            continue  # those the plan was made from
        held = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in held] == [None, None]


def test_the_plan_does_not_keep_the_first_gradients(device: str) -> None:
    params = weights(device)
    optimizer = Adam(params)
    gradients(params, 0)
    optimizer.step()
    held = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_replaced_states_are_freed(device: str) -> None:
    params = weights(device)
    optimizer = Momentum(params)
    for i in range(2):
        gradients(params, i)
        optimizer.step()
    held = [weakref.ref(v) for state in optimizer.state.values() for v in state.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gradients(params, 2)
    optimizer.step()
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []


def test_two_threads(device: str) -> None:
    """Each with its own optimizer: what the two of them do one after the other."""
    if runtime.backend() == "triton" and runtime.interpreting():
        pytest.skip("Triton's interpreter patches its language for the time of a launch, in all threads")
    steps = 20

    def train(kind: Any, params: list[Parameter]) -> None:
        optimizer = kind(params, lr=0.1)
        for i in range(steps):
            gradients(params, i)
            optimizer.step()

    together, alone = [(k, weights(device)) for k in (Adam, SGD)], [(k, weights(device)) for k in (Adam, SGD)]
    threads = [threading.Thread(target=train, args=pair) for pair in together]
    for thread in threads:
        thread.start()
    for pair in alone:
        train(*pair)
    for thread in threads:
        thread.join()
    for (_, found), (_, expected) in zip(together, alone, strict=True):
        assert_close(found, expected, rtol=0, atol=0)


def test_importing_is_light() -> None:
    """Neither the compiler nor the distributed package nor triton: they take seconds, and most programs need none.

    torch itself imports its compiler when it first makes an optimizer. Ours may add nothing to that.
    """
    run = python(
        """
        import sys, torch
        heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "triton", "tribp.kernels.optim")
        def new(before):
            return [name for name in set(sys.modules) - before if name.startswith(heavy)]
        def train(library):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            library.optim.Adam([p]).step()
        before = set(sys.modules)
        import tribp.optim
        assert not new(before), new(before)
        train(torch)
        before = set(sys.modules)
        train(tribp)
        assert not new(before), new(before)
        """
    )
    assert run.returncode == 0, run.stderr


def test_works_without_triton_and_imported_late() -> None:
    """Also when torch has wrapped the steps of its classes already: a mark copied from them would silence our hooks."""
    run = python(
        WITHOUT_TRITON
        + """
    import torch
    for name in ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW"):
        getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(3))])
    import tribp.optim
    for name in ("SGD", "Momentum", "RMSprop", "Adagrad", "Adam", "AdamW"):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer, seen = getattr(tribp.optim, name)([p], ema_decay=0.5, max_grad_norm=1.0), []
        optimizer.register_step_post_hook(lambda *arguments: seen.append(1))
        optimizer.step()
        assert not torch.equal(p, torch.ones(3))
        assert seen == [1], (name, seen)
    assert "triton" not in sys.modules
    """
    )
    assert run.returncode == 0, run.stderr
