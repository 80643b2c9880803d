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
from tribp.optim import replacing

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


def loaded(**own: Any) -> tuple[Any, list[Parameter]]:
    """An optimizer that has just loaded a checkpoint: moments in float32, whatever its options say."""
    params = [Parameter(torch.ones(40)), Parameter(torch.ones(8, 2))]
    optimizer = tribp.optim.Adam(params, lr=0.1, **own)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer, params


def test_codes_outlive_a_step_that_is_refused() -> None:
    """States become codes before everything is checked, which is no reason to lose them."""
    optimizer, params = loaded(state_bits=8)
    params[1].grad = torch.ones(8, 2).to_sparse()
    with pytest.raises(RuntimeError, match="state_bits can't be combined with a sparse_coo gradient"):
        optimizer.step()
    params[1].grad = torch.ones(8, 2)
    optimizer.step()
    for state in optimizer.state_dict()["state"].values():
        assert state["step"] == 2
        torch.testing.assert_close(state["exp_avg"], torch.full_like(state["exp_avg"], 0.19), rtol=0.02, atol=0)


def test_a_captured_plan_ends_with_the_states_it_was_made_on(device: str) -> None:
    """It outlives a step that is refused, for a CUDA graph reads its tables, but not that codes became numbers."""
    params = [Parameter(torch.ones(40, device=device)), Parameter(torch.ones(8, 2, device=device))]
    optimizer: Any = tribp.optim.Adam(params, lr=0.1, state_bits=8, max_grad_norm=1e9)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    optimizer._plan.watch.captured = True
    optimizer.param_groups[0]["state_bits"] = None
    params[1].grad = torch.ones_like(params[1]).to_sparse()
    with pytest.raises(RuntimeError, match="max_grad_norm can't be combined"):
        optimizer.step()
    optimizer.param_groups[0]["state_bits"] = 8
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    for state in optimizer.state_dict()["state"].values():
        assert state["step"] == 3
        torch.testing.assert_close(state["exp_avg"], torch.full_like(state["exp_avg"], 0.271), rtol=0.02, atol=0)


def stopped_steps_on_codes() -> int:
    """A first step after a checkpoint, stopped wherever it can be; then a whole one."""
    optimizer, params = loaded(state_bits=8, master_bits=None)
    runs = 0
    for runs in interrupted(optimizer.step):
        optimizer.step()
        for state in optimizer.state_dict()["state"].values():
            moment = state["exp_avg"]
            assert moment.dtype == torch.float32, runs
            assert 0.18 < float(moment.min()) <= float(moment.max()) < 0.28, runs  # two or three steps
        optimizer, params[:] = loaded(state_bits=8)
    return runs


def test_codes_outlive_a_step_that_is_stopped() -> None:
    assert called(stopped_steps_on_codes) > 200


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("SGD", "Momentum", "Adagrad")])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_torch_refuses_updates_nothing(name: str, groups: int) -> None:
    """torch takes sparse gradients for SGD and Adagrad only."""
    sparse, dense = Parameter(torch.ones(4, 2)), Parameter(torch.ones(3))
    sparse.grad, dense.grad = torch.ones(4, 2).to_sparse(), torch.ones(3)
    lists: Any = [sparse, dense] if groups == 1 else [{"params": [sparse]}, {"params": [dense]}]
    optimizer: Any = ours(name, lists, **NUMBERS[name])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    sparse.grad = torch.ones(4, 2)
    optimizer.step()
    assert optimizer.state[dense]["step"] == 1


# Which code updates a momentum buffer: torch's fused kernel, the packed formula, or the formula one by one.
MOMENTA: dict[str, dict[str, Any]] = {
    "fused": {},
    "packed": {"dtype": torch.complex64},
    "by formula": {"state_dtype": torch.float64},
}


@pytest.mark.parametrize("code", MOMENTA)
def test_a_momentum_buffer_has_begun_when_it_was_written(code: str) -> None:
    """A first step that is stopped before leaves b = g to the next one, not the (1 − τ)·g of a second one."""
    own = dict(MOMENTA[code])
    dtype = own.pop("dtype", torch.float32)
    params: list[Parameter] = []
    optimizer: Any = None

    def begin() -> None:
        nonlocal optimizer
        params[:] = [Parameter(torch.ones(3, dtype=dtype)) for _ in range(6)]  # as many as are packed
        optimizer = tribp.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **own)
        for p in params:
            p.grad = torch.ones_like(p)

    begin()
    runs = 0
    for runs in interrupted(lambda: optimizer.step()):
        optimizer.step()
        for p in params:
            buffer = optimizer.state[p]["momentum_buffer"].real.tolist()
            assert buffer == pytest.approx([1.0] * 3) or buffer == pytest.approx([1.4] * 3), runs
        begin()
    assert runs > 100


def test_a_stopped_checkpoint_does_nothing_to_the_next() -> None:
    """Hooks that are there while torch loads or packs are hooks of that call alone."""
    first, second = Parameter(torch.ones(3, dtype=torch.bfloat16)), Parameter(torch.ones(2))
    optimizer: Any = None

    def checkpoint(moment: float, dtype: torch.dtype) -> dict[str, Any]:
        state = {name: torch.full((3,), moment, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        groups = tribp.optim.Adam([first]).state_dict()["param_groups"]
        return {"state": {0: {"step": torch.tensor(5.0), **state}}, "param_groups": groups}

    wide, narrow = checkpoint(0.1, torch.float32), checkpoint(0.7, torch.bfloat16)

    for action, arguments in (("load_state_dict", (wide,)), ("state_dict", ())):
        runs = 0
        optimizer = tribp.optim.Adam([first])
        for runs in interrupted(lambda: getattr(optimizer, action)(*arguments)):  # noqa: B023
            optimizer.load_state_dict(narrow)
            assert torch.equal(optimizer.state[first]["exp_avg"], narrow["state"][0]["exp_avg"]), runs
            optimizer.add_param_group({"params": [second]})
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer = tribp.optim.Adam([first])
        assert runs > 20


def test_a_stopped_patch_leaves_torchs_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = replacing._pairs

    def stopping() -> Iterator[Any]:
        monkeypatch.undo()
        yield from itertools.islice(pairs(), 3)
        raise Stop

    monkeypatch.setattr(replacing, "_pairs", stopping)
    with pytest.raises(Stop):
        tribp.optim.patch()
    assert tribp.optim.unpatch() == ()
