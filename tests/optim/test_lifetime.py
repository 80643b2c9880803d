"""An optimizer's life among others: states edited from outside, subclasses, memory, threads, imports."""

import copy
import functools
import gc
import importlib
import io
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import (
    Optimizer,
)
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from tribp import dispatch
from tribp.optim import SGD, Adam, Momentum, NAdam, RMSprop
from tribp.optim.adam import AdamRule

from ..processes import forked
from ..test_dispatch import WITHOUT_TRITON
from .cases import CLASSES
from .ecosystem_cases import Options, close, gradients, loss_of, model, weights

# The state, which is everyone's.


def _state(optimizer: Optimizer) -> Any:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def _ones(optimizer: Optimizer) -> Tensor:
    return torch.ones_like(_state(optimizer)["exp_avg"])


def _swap(optimizer: Optimizer) -> None:
    torch.utils.swap_tensors(_state(optimizer)["exp_avg"], _ones(optimizer))


# Ways in which resetting, offloading or quantizing code changes a live optimizer's state.
EDITS: dict[str, Callable[[Any], object]] = {
    "step in other memory": lambda o: setattr(_state(o)["step"], "data", torch.full_like(_state(o)["step"], 7)),
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
        # A kernel counts on the device, torch on the CPU.
        found.append([*params, *(state[key].to(device) for state in optimizer.state.values() for key in sorted(state))])
    close(*found)


def test_states_are_dicts_to_every_tool(device: str) -> None:
    """Copied, rebuilt by their type, walked as trees, saved on their own: as the dicts of torch's optimizers."""
    params = weights(device)
    optimizer = Adam(params)
    gradients(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    others = copy.copy(state), copy.deepcopy(state), {**state}, state | {}, {} | state, state.copy(), dict(state)
    assert {*map(type, others)} == {dict}
    assert type(state | OrderedDict()) is type(dict(state) | OrderedDict()) is OrderedDict
    for other in others:
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


@pytest.mark.parametrize("kind", [SGD, Momentum, Adam, NAdam])
def test_states_moved_away_are_freed(kind: Any, device: str) -> None:
    """At once, not with the next step: what offloads them between steps does it to have their memory."""
    params = weights(device)
    optimizer = kind(params, **({"momentum": 0.9} if kind is SGD else {}))
    for i in range(2):
        gradients(params, i)
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    held = [weakref.ref(v.untyped_storage()) for state in states for v in state.values() if v.dim()]
    assert held
    for state in states:
        for key, value in state.items():
            state[key] = value.clone()
    del value
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []
    before = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    gradients(params, 2)
    optimizer.step()
    again = kind(before[0], **({"momentum": 0.9} if kind is SGD else {}))
    again.load_state_dict(before[1])
    gradients(before[0], 2)
    again.step()
    assert_close(params, before[0])


@pytest.mark.parametrize("reset", [lambda o: o.state.clear(), lambda o: setattr(o, "state", defaultdict(dict))])
def test_states_thrown_away_are_gone_before_others_are_made(
    reset: Callable[[Any], object], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the first step after a reset would need twice the memory."""
    params = weights(device)
    optimizer = Adam(params)
    for i in range(2):
        gradients(params, i)
        optimizer.step()
    held = [weakref.ref(optimizer.state[p]["exp_avg"].untyped_storage()) for p in params]
    alive: list[int] = []
    made = AdamRule.new_state

    def make(*arguments: Any) -> Tensor:
        alive.append(sum(ref() is not None for ref in held))
        return made(*arguments)

    monkeypatch.setattr(AdamRule, "new_state", make)
    reset(optimizer)
    optimizer.step()
    assert alive == [0] * 2 * len(params)


def test_two_threads(device: str) -> None:
    """Each with its own optimizer: what the two of them do one after the other."""
    if dispatch.backend() == "triton" and dispatch.interpreting():
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
    run = forked(
        "-c",
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
        """,
    )
    assert run.returncode == 0, run.stderr


def test_works_without_triton_and_imported_late() -> None:
    """Also when torch has wrapped the steps of its classes already: a mark copied from them would silence our hooks."""
    run = forked(
        "-c",
        WITHOUT_TRITON
        + f"\n    CLASSES = {CLASSES}"
        + """
    import torch
    for name in set(CLASSES) - {"Momentum"}:
        getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(3))])
    import tribp.optim
    for name in CLASSES:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer, seen = getattr(tribp.optim, name)([p], ema_decay=0.5, max_grad_norm=1.0), []
        optimizer.register_step_post_hook(lambda *arguments: seen.append(1))
        optimizer.step()
        assert not torch.equal(p, torch.ones(3))
        assert seen == [1], (name, seen)
    assert "triton" not in sys.modules
    """,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["lr_scheduler", "swa_utils"])
def test_submodules_of_torchs_are_imported_by_name(name: str) -> None:
    """As in `from tribp.optim.lr_scheduler import StepLR`."""
    assert importlib.import_module(f"tribp.optim.{name}") is getattr(torch.optim, name)
