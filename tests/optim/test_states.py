"""States that others hold, exchange, share or put there, and what is left of steps that came to nothing."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
import tribp.optim

from .cases import LIVELY, Options, each_class, genuine, lively, ours

pytestmark = pytest.mark.usefixtures("one_thread")

LIBRARIES = (tribp.optim, torch.optim)


def parameters(device: str, count: int = 1) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(1, 2, 6, device=device).reshape(3, 2) * (k + 1)) for k in range(count)]


def step(optimizer: Any, *grads: Tensor) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.device)
    optimizer.step()


ONES = torch.ones(3, 2)
BY_TORCHS_CODE = {"expanded": torch.ones(1, 1).expand(3, 2), "sparse": ONES.to_sparse()}


@pytest.mark.parametrize("way", BY_TORCHS_CODE)
def test_a_state_that_was_held_while_torchs_code_ran_may_move(way: str, device: str) -> None:
    results = []
    for library in LIBRARIES:
        (p,) = parameters(device)
        optimizer = library.Adagrad([p], lr=0.1)
        step(optimizer, ONES)
        step(optimizer, BY_TORCHS_CODE[way])
        held = optimizer.state[p]["sum"]
        step(optimizer, ONES)
        step(optimizer, ONES)
        held.set_(torch.full((3, 2), 100.0, device=device))
        step(optimizer, ONES)
        results.append([p.detach(), held])
    torch.testing.assert_close(*results)


def test_a_state_that_was_held_since_a_skipped_first_step_may_move(device: str) -> None:
    results = []
    for library in LIBRARIES:
        (p,) = parameters(device)
        optimizer = library.Adam([p], lr=0.1, fused=True)
        optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), device=device)
        step(optimizer, ONES)
        optimizer.found_inf = torch.zeros((), device=device)
        held = optimizer.state[p]["exp_avg"]
        for _ in range(2):
            step(optimizer, ONES)
        held.set_(torch.full((3, 2), 9.0, device=device))
        step(optimizer, ONES)
        results.append([p.detach(), held])
    torch.testing.assert_close(*results)


@each_class
def test_states_that_two_parameters_exchange(name: str, device: str) -> None:
    """Put back in the other order, the states' values stand where they stood."""
    twins = lively(name, device, shapes=[(5,), (5,)])
    twins.step()
    twins.step()

    def exchange(optimizer: Any) -> None:
        p, q = optimizer.param_groups[0]["params"]
        of_p, of_q = optimizer.state.pop(p, None), optimizer.state.pop(q, None)
        if of_p is not None:
            optimizer.state[q], optimizer.state[p] = of_p, of_q

    twins.each(exchange)
    twins.step()


def test_two_optimizers_of_one_state(device: str) -> None:
    """What either has replaced, both see: also the one that did not make the last plan."""
    results = []
    for library in LIBRARIES:
        (p,) = parameters(device)
        one, two = library.Adam([p], lr=0.1), library.Adam([p], lr=0.1)
        two.state = one.state
        for optimizer in (one, two, one):
            step(optimizer, ONES)
        one.state[p]["exp_avg"] = torch.full((3, 2), 3.0, device=device)
        for optimizer in (one, two):
            step(optimizer, ONES)
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_a_copy_shares_states_with_the_original(device: str) -> None:
    results = []
    for library in LIBRARIES:
        (p,) = parameters(device)
        one = library.Adam([p], lr=0.1)
        step(one, ONES)
        two = copy.copy(one)
        for optimizer in (two, one, two):
            step(optimizer, ONES)
        assert two.state is one.state
        assert float(one.state[p]["step"]) == 4
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_what_a_user_keeps_in_the_state_stays_his(device: str) -> None:
    (p,) = parameters(device)
    optimizer = tribp.optim.SGD([p], lr=0.1, momentum=0.9)
    mine: Options = {"seen": 0}
    optimizer.state["mine"] = mine  # type: ignore[index]
    for _ in range(3):
        step(optimizer, ONES)
        mine["seen"] += 1
    assert optimizer.state["mine"] is mine  # type: ignore[index]


def test_a_held_counter_counts_over_a_new_plan(device: str) -> None:
    (p,) = parameters(device)
    optimizer = tribp.optim.Adam([p], lr=0.1)
    step(optimizer, ONES)
    counter = optimizer.state[p]["step"]
    optimizer.add_param_group({"params": parameters(device), "weight_decay": 0.1})
    step(optimizer, ONES, ONES)
    assert float(counter) == 2


@contextlib.contextmanager
def swap(optimizer: Any, params: dict[str, Tensor], saved: dict[str, Any]) -> Iterator[None]:
    """torch.optim.swap_in_optimizer_params_and_state of torch 2.13, for one group."""
    (group,), state = optimizer.param_groups, optimizer.state
    before, group["params"] = group["params"], list(params.values())
    optimizer.state = defaultdict(dict, {p: dict(saved["state"].get(i, {})) for i, p in enumerate(params.values())})
    yield
    group["params"], optimizer.state = before, state


@each_class
@pytest.mark.parametrize("count", [1, 2, 8])
def test_states_that_are_swapped_in_change_in_place(count: int, name: str, device: str) -> None:
    """Whoever gave them has the ones that count; the optimizer's own stay as they were."""
    results = []
    for make in (ours, genuine):
        params, others = parameters(device, count), parameters(device, count)
        optimizer: Any = make(name, params, lr=0.1, **LIVELY[name])
        step(optimizer, *[ONES] * count)
        step(optimizer, *[-2 * ONES] * count)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():  # a kernel counts on the device
            state |= {key: value.to(device) for key, value in state.items() if isinstance(value, Tensor)}
        swapping = getattr(torch.optim, "swap_in_optimizer_params_and_state", swap)
        with swapping(optimizer, {str(i): p for i, p in enumerate(others)}, saved):
            step(optimizer, *[3 * ONES] * count)
            step(optimizer, *[ONES / 2] * count)
        step(optimizer, *[ONES] * count)
        results.append([params, others, saved["state"], optimizer.state_dict()["state"]])
    torch.testing.assert_close(*results)


@each_class
def test_parameters_that_are_made_later(name: str, device: str) -> None:
    first, lazy = torch.nn.Linear(3, 2).to(device), torch.nn.LazyLinear(2).to(device)
    if name == "Adagrad":
        pytest.skip("torch's constructor makes Adagrad's sums, and can't make them of what is not there")
    optimizer, x = ours(name, [*first.parameters(), *lazy.parameters()], lr=0.1), torch.ones(4, 3, device=device)
    first(x).sum().backward()
    before = first.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, first.weight)
    lazy(first(x)).sum().backward()
    before = lazy.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, lazy.weight)


@pytest.mark.parametrize("options", [dict(momentum=0.9, dampening=0.5), dict(momentum=0.9)])
@pytest.mark.parametrize("way", [*BY_TORCHS_CODE, "plain"])
def test_a_skipped_first_step_leaves_no_begun_buffer(way: str, options: Options, device: str) -> None:
    """Whichever code takes the second one: the first buffer is the whole gradient, undamped."""
    found = []
    for skip in (True, False):
        (p,) = parameters(device)
        optimizer: Any = tribp.optim.SGD([p], lr=1.0, fused=True, **options)
        if skip:
            optimizer.found_inf = torch.ones((), device=device)
            step(optimizer, ONES)
            del optimizer.found_inf
        step(optimizer, BY_TORCHS_CODE.get(way, ONES))
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_first_step_that_fails_leaves_nothing_behind(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory was short for the second state. The same step again is the first one."""
    options: Options = dict(momentum=0.9, dampening=0.5) if name == "SGD" else {}
    params = parameters(device, 3)
    optimizer, expected = ours(name, params, lr=0.1, **options), parameters(device, 3)
    step(ours(name, expected, lr=0.1, **options), ONES, ONES, ONES)
    rule: Any = type(optimizer)._rule
    new_state, made = rule.new_state, []

    def failing(*arguments: Any) -> Tensor:
        made.append(arguments)
        if len(made) == 2:
            raise torch.OutOfMemoryError("of this test")
        return new_state(*arguments)  # type: ignore[no-any-return]

    with monkeypatch.context() as context:
        context.setattr(rule, "new_state", failing)
        with pytest.raises(torch.OutOfMemoryError):
            step(optimizer, ONES, ONES, ONES)
    assert not any(optimizer.state.values())
    step(optimizer, ONES, ONES, ONES)
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p, e)


@pytest.mark.parametrize("wide", [dict(state_dtype=torch.float64), dict(ema_decay=0.9)])
def test_rounding_to_bfloat16_beside_float64(wide: Options, device: str) -> None:
    p = torch.nn.Parameter(torch.ones(70, dtype=torch.bfloat16, device=device))
    optimizer = tribp.optim.Adam([p], lr=2.0**-10, stochastic_rounding=True, **wide)
    if "ema_decay" in wide:
        step(optimizer, torch.ones(70, dtype=torch.bfloat16))
        saved = optimizer.state_dict()
        saved["state"][0]["ema"] = saved["state"][0]["ema"].double()
        optimizer.load_state_dict(saved)
    for _ in range(3):
        step(optimizer, torch.ones(70, dtype=torch.bfloat16))
    numbers = p.detach().unique().tolist()
    assert 1 < len(numbers) <= 8
    assert all(0.97 < n <= 1 for n in numbers)


def test_the_norm_of_a_skipped_step(device: str) -> None:
    (p,) = parameters(device)
    optimizer: Any = tribp.optim.Adam([p], lr=0.1, fused=True, max_grad_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=device), torch.ones((), device=device)
    step(optimizer, ONES * torch.inf)
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == torch.inf


@pytest.mark.parametrize("options", [dict(weight_decay=0.1), dict(maximize=True), dict(centered=True, maximize=True)])
def test_rmsprop_of_conjugated_gradients(options: Options, device: str) -> None:
    found = []
    for conjugated in (False, True):
        p = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], device=device))
        optimizer = tribp.optim.RMSprop([p], lr=0.1, **options)
        grad = torch.tensor([0.5 + 1j, -1 + 2j])
        step(optimizer, grad.conj() if conjugated else grad.conj().resolve_conj())
        found.append(p.detach())
    torch.testing.assert_close(*found)
