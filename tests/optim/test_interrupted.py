"""Ctrl-C, and other signals whose handlers raise: at each call of a Python function in turn."""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import tribp.optim

from ..processes import called
from .cases import LIVELY, NUMBERS, ours


class Stop(BaseException):
    """What a handler raises."""


def interrupted(action: Callable[[], object]) -> Iterator[int]:
    """Runs it again and again, stopped in its first call, its second, …: yields after each run, until one is whole."""
    for at in itertools.count(1):
        left = at

        def look(frame: FrameType, event: str, argument: object) -> None:
            nonlocal left
            # Not in generators: Python 3.10 has one that is stopped so, which no signal does, skip its `finally`.
            if event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR:
                left -= 1
                if left == 0:
                    sys.setprofile(None)
                    raise Stop

        sys.setprofile(look)
        try:
            action()
        except Stop:
            pass
        finally:
            sys.setprofile(None)
        torch.set_grad_enabled(True)  # torch's own steps leave it off, too
        yield at
        if left > 0:
            return


def first_step(name: str, **own: Any) -> None:
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    ours(name, params, **(NUMBERS[name] | LIVELY[name] | own)).step()


def stopped_first_steps() -> list[int]:
    """How often a first step, whose plan is built, was stopped."""
    first_step("Adam")  # the first of all imports torch's compiler
    runs = [("Adam", {}), ("RMSprop", {}), ("ASGD", {"ema_decay": 0.9})]
    return [sum(1 for _ in interrupted(lambda: first_step(name, **own))) for name, own in runs]  # noqa: B023


def test_no_first_step_ends_the_process() -> None:
    """What C++ asks Python in the midst of its work can be stopped, too: `torch.ScriptList` of a list crashes then."""
    assert min(called(stopped_first_steps)) > 300


def averaged() -> tuple[Any, list[Parameter]]:
    params = [Parameter(torch.ones(n)) for n in (3, 4, 5)]
    optimizer = tribp.optim.Adam(params, lr=0.1, ema_decay=0.5)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer, params


def test_weights_come_back_however_swap_ema_ends() -> None:
    optimizer, params = averaged()
    weights = [p.detach().clone() for p in params]

    def swap() -> None:
        with optimizer.swap_ema():
            pass

    runs = 0
    for runs in interrupted(swap):
        assert all(map(torch.equal, params, weights)), runs
        optimizer.state_dict()
    assert runs > 40


def test_weights_come_back_where_an_average_does_not_fit() -> None:
    optimizer, params = averaged()
    params[1].data = torch.ones(7)  # an embedding that was extended, say
    weights = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="size of tensor"), optimizer.swap_ema():
        pass
    assert all(map(torch.equal, params, weights))
    optimizer.state_dict()
