"""The wrapper around `step`: whatever listens to torch's steps listens to ours, and pays for it alone."""

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.profiler import record_function
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

import tribp.optim
from tribp.optim import Adam, Momentum, hooked

from .ecosystem_cases import PAIRS, close, gradients, weights

on_cpu = functools.partial(profile, activities=[ProfilerActivity.CPU])
KINDS = [*(kind for pair in PAIRS for kind in pair), Momentum]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__.split('.')[0]} {kind.__name__}")


def ready(kind: Any) -> Optimizer:
    params = weights()
    gradients(params, 0)
    optimizer: Optimizer = kind(params)
    return optimizer


def shown(profiled: profile, kind: type) -> list[Any]:
    """Of a profile's events, the steps; each must be what `record_function` makes."""
    events = [event for event in profiled.events() or () if event.key == f"Optimizer.step#{kind.__name__}.step"]
    assert all(event.is_user_annotation for event in events)
    return events


@every_kind
def test_a_profiler_sees_every_step(kind: Any) -> None:
    optimizer = ready(kind)
    with on_cpu() as profiled:
        optimizer.step()
        with pytest.raises(ZeroDivisionError) as caught:
            optimizer.step(lambda: 1 / 0)
        torch.hypot(torch.ones(2), torch.ones(2))
    (after,) = (event for event in profiled.events() or () if event.key == "aten::hypot")
    first, second = shown(profiled, kind)
    assert first.cpu_children
    assert first.time_range.end <= second.time_range.start
    assert caught.tb is not None  # whoever keeps the error keeps the frames of the step, which has ended all the same
    assert second.time_range.end <= after.time_range.start


@every_kind
def test_observers_that_count_as_no_profiler(kind: Any, tmp_path: Path) -> None:
    """`torch.autograd._profiler_enabled` is False for both."""
    optimizer = ready(kind)
    observer = ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    observer.start()
    optimizer.step()
    observer.stop()
    observer.unregister_callback()
    names = [node["name"] for node in json.loads((tmp_path / "trace.json").read_text())["nodes"]]
    assert names.count(f"Optimizer.step#{kind.__name__}.step") == 1

    options = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with on_cpu(experimental_config=options) as profiled:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
    assert len(shown(profiled, kind)) == 1


@every_kind
def test_the_memory_profiler_finds_parameters_and_states(kind: Any) -> None:
    """It looks for the frame of a function that does nothing."""
    optimizer = ready(kind)
    with on_cpu(with_stack=True, profile_memory=True, record_shapes=True) as profiled:
        optimizer.step()
    assert profiled.profiler is not None
    found = []
    events: list[Any] = list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        found += [getattr(event.extra_fields, "optimizer", None)]
    (seen,) = filter(None, found)
    assert len(seen.parameters) == 2


@every_kind
def test_hooks_as_they_come_and_go(kind: Any) -> None:
    """Registered after the first step, on the optimizer or for all, before or during a step; and removed again."""
    optimizer, other, heard = ready(kind), ready(kind), []

    def hear(name: str) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: heard.append((name, args, kwargs))

    optimizer.step()
    for register in (
        optimizer.register_step_pre_hook, optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook, register_optimizer_step_post_hook,
    ):  # fmt: skip
        closure, handle = (lambda: 0.5), register(hear("hook"))
        try:
            assert optimizer.step(closure) == 0.5
            assert optimizer.step(closure=closure) == 0.5
            assert heard == [("hook", (optimizer, closure), {}), ("hook", (optimizer,), {"closure": closure})]
            other.step()
            everyones = register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
            assert len(heard) == (3 if everyones else 2)
        finally:
            handle.remove()
        heard.clear()
        optimizer.step()
        assert not heard
    optimizer.step(lambda: optimizer.register_step_post_hook(hear("late")))  # type: ignore[arg-type, return-value]
    assert [name for name, _, _ in heard] == ["late"]


@every_kind
def test_a_hook_may_replace_the_arguments(kind: Any) -> None:
    optimizer = ready(kind)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((*args, lambda: 2.0), kwargs))
    assert optimizer.step() == 2.0
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="new_args, new_kwargs"):
        optimizer.step()


@pytest.mark.parametrize("base", [Adam, torch.optim.Adam], ids=["tribp", "torch"])
def test_a_class_with_a_step_of_its_own(base: Any) -> None:
    class Own(base):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            return "own", super().step(closure)

    heard: list[int] = []
    optimizer = ready(Own)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: heard.append(1))
    assert optimizer.step() == ("own", None)
    assert heard
    with on_cpu() as profiled:
        optimizer.step()
    assert shown(profiled, Own)


def test_without_hooks_torchs_costly_range_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Noted(record_function):
        def __init__(self, name: str, args: str | None = None) -> None:
            opened.append(name)
            super().__init__(name, args)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", Noted)
    for ours, theirs in PAIRS:
        ready(ours).step()
        assert not opened
        ready(theirs).step()
        assert len(opened) == 1
        opened.clear()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.autograd, "_record_function_with_args_enter"),
        (torch.autograd, "_record_function_with_args_exit"),
        (torch.optim.Optimizer.profile_hook_step.__globals__, "_global_optimizer_pre_hooks"),
    ],
    ids=["enter", "exit", "hooks"],
)
def test_a_torch_without_what_it_rests_on(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is torch's wrapper."""
    torchs = object()
    monkeypatch.setattr(torch.optim.Optimizer, "profile_hook_step", lambda func: torchs)
    assert hooked.wrap(len) is not torchs
    if isinstance(owner, dict):
        monkeypatch.delitem(owner, name)
    else:
        monkeypatch.delattr(owner, name)
    assert hooked.wrap(len) is torchs


def test_the_same_numbers_with_and_without_listeners() -> None:
    found = []
    for listening in (False, True):
        params = weights()
        optimizer = tribp.optim.AdamW(params, lr=0.1)
        if listening:
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: None)
        for i in range(3):
            gradients(params, i)
            optimizer.step()
        found.append(params)
    close(*found)
