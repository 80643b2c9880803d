"""What torch and its users build around a step: hooks, closures, the profiler, the compiler, averaged models."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import tribp.optim
from tribp.optim import SGD, Adam, Momentum

from .ecosystem_cases import PAIRS, Options, close, every_pair, gradients, loss_of, model, weights

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


@pytest.mark.parametrize("how", ["hooks", "torch's own"])
@every_pair
def test_optimizer_in_backward(kind: Any, genuine: Any, how: str, device: str) -> None:
    """One optimizer a parameter, stepped by a hook as its gradient is ready: gradients never live together."""
    found = []
    for each in (kind, genuine):
        network = model(device)
        params = list(network.parameters())
        optimizers = {p: each([p], lr=0.1) for p in params}
        alive: list[int] = []

        def step(p: Tensor, optimizers: dict[Any, Any] = optimizers, params: Any = params, alive: Any = alive) -> None:
            alive.append(sum(q.grad is not None for q in params))
            optimizers[p].step()
            optimizers[p].zero_grad()

        if how == "hooks":
            for p in params:
                p.register_post_accumulate_grad_hook(step)
        else:
            from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

            _apply_optimizer_in_backward(each, params, {"lr": 0.1})
        for i in range(3):
            loss_of(network, i).backward()
        assert all(p.grad is None for p in params)
        assert alive == ([1] * 3 * len(params) if how == "hooks" else [])
        found.append(params)
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
