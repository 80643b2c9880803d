"""Checkpoints at the edges: hooks, old and wrong ones, schedulers, averages, files."""

import copy
import io
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import tribp.optim
from tribp.optim import SGD, Adam, Momentum

from .checkpoint_cases import (
    State,
    a_few,
    groups,
    ours,
    parameters,
    same_parameters,
    same_state_dict,
    theirs,
    through_file,
    train,
    weights,
)

# Hooks.


def test_load_hooks_run_in_order_and_have_their_say() -> None:
    """Ours take part for one call only: between the user's last pre-hook and first post-hook."""
    a = Adam(weights("cpu", torch.bfloat16), ema_decay=0.5)
    train(a, range(2))
    b = Adam(weights("cpu", torch.bfloat16), max_grad_norm=3.0)
    seen: list[str] = []
    wide = torch.full((3, 4), 0.1, dtype=torch.float32)

    def replace(optimizer: Optimizer, state_dict: State) -> State:
        seen.append("replace")
        states = {**state_dict["state"], 0: dict(state_dict["state"][0], exp_avg=wide)}
        return dict(state_dict, state=states)

    def change(optimizer: Optimizer, state_dict: State) -> None:
        seen.append("change")
        assert state_dict["state"][0]["exp_avg"] is wide
        state_dict["param_groups"] = [dict(group, lr=0.25) for group in state_dict["param_groups"]]

    def first(optimizer: Optimizer) -> None:
        seen.append("first")
        assert torch.equal(optimizer.state[parameters(optimizer)[0]]["exp_avg"], wide)
        assert optimizer.param_groups[0]["max_grad_norm"] == 3.0
        optimizer.param_groups[0]["weight_decay"] = 0.125

    b.register_load_state_dict_pre_hook(change)
    b.register_load_state_dict_pre_hook(replace, prepend=True)
    b.register_load_state_dict_post_hook(lambda optimizer: seen.append("second"))
    b.register_load_state_dict_post_hook(first, prepend=True)
    counts = [len(b._optimizer_load_state_dict_pre_hooks), len(b._optimizer_load_state_dict_post_hooks)]
    b.load_state_dict(a.state_dict())
    assert seen == ["replace", "change", "first", "second"]
    (group,) = b.param_groups
    assert (group["lr"], group["weight_decay"], group["ema_decay"]) == (0.25, 0.125, 0.5)
    assert b.state[parameters(b)[0]]["exp_avg"] is not wide
    assert [len(b._optimizer_load_state_dict_pre_hooks), len(b._optimizer_load_state_dict_post_hooks)] == counts


def test_state_dict_hooks_run_in_order_and_have_their_say(device: str) -> None:
    for kind in (torch.optim.Adam, Adam):
        optimizer = kind(weights(device), lr=0.1)
        train(optimizer, range(2))
        seen: list[str] = []

        def alter(optimizer: Optimizer, state_dict: State, seen: list[str] = seen) -> None:
            seen.append("alter")
            step = state_dict["state"][0]["step"]
            assert (step.device.type, step.item(), step.untyped_storage().nbytes()) == ("cpu", 2.0, 4)
            state_dict["state"] = {n: dict(s, mark=torch.ones(1)) for n, s in state_dict["state"].items()}
            state_dict["mark"] = 1

        def renew(optimizer: Optimizer, state_dict: State, seen: list[str] = seen) -> State:
            seen.append("renew")
            return dict(state_dict, renewed=True, param_groups=[dict(g, lr=7.0) for g in state_dict["param_groups"]])

        def before(optimizer: Optimizer, seen: list[str] = seen) -> None:
            seen.append("pre")

        optimizer.register_state_dict_pre_hook(before)
        optimizer.register_state_dict_post_hook(renew)
        optimizer.register_state_dict_post_hook(alter, prepend=True)
        saved = optimizer.state_dict()
        assert seen == ["pre", "alter", "renew"]
        assert list(saved) == ["state", "param_groups", "mark", "renewed"]
        assert all(torch.equal(state["mark"], torch.ones(1)) for state in saved["state"].values())
        assert saved["param_groups"][0]["lr"] == 7.0
        assert "mark" not in optimizer.state[parameters(optimizer)[0]]


def test_a_state_dict_hook_may_pack_everything() -> None:
    """A hook's result need not look like a checkpoint any more."""
    optimizer = Adam(weights("cpu"))
    train(optimizer, range(1))

    def pack(optimizer: Optimizer, state_dict: State) -> State:
        return {"packed": state_dict}

    optimizer.register_state_dict_post_hook(pack)
    assert list(optimizer.state_dict()) == ["packed"]
    assert list(optimizer.state_dict()["packed"]["state"][0]) == ["step", "exp_avg", "exp_avg_sq"]


# Other checkpoints.


@pytest.mark.parametrize("step", [3, 3.0])
@pytest.mark.parametrize("case", ["adam", "rmsprop", "adagrad"])
def test_steps_that_are_numbers(case: str, step: float, device: str) -> None:
    """As torch wrote them before 1.12."""
    a, b = ours(case, groups(weights(device))), theirs(case, groups(weights(device)))
    train(b, range(3))
    saved = b.state_dict()
    for number, state in saved["state"].items():
        saved["state"][number] = dict(state, step=step)
    resumed_b = theirs(case, groups(weights(device)))
    for optimizer in (a, resumed_b):
        optimizer.load_state_dict(copy.deepcopy(saved))
    same_state_dict(a.state_dict(), resumed_b.state_dict())
    for optimizer in (a, resumed_b):
        train(optimizer, range(3, 5))
    same_parameters(a, resumed_b)
    same_state_dict(a.state_dict(), resumed_b.state_dict())


@pytest.mark.parametrize("case", ["sgd", "sgd momentum", "momentum"])
def test_momentum_buffers_that_are_none(case: str, device: str) -> None:
    """As older SGDs wrote them, also without momentum: the first gradient is then the buffer, undamped."""
    pair = ours(case, groups(weights(device))), theirs(case, groups(weights(device)))
    for optimizer in pair:
        saved = optimizer.state_dict()
        saved["state"] = {number: {"momentum_buffer": None} for number in range(4)}
        optimizer.load_state_dict(saved)
        train(optimizer, range(3))
    same_parameters(*pair)
    found, expected = (optimizer.state_dict() for optimizer in pair)
    same_state_dict(  # torch keeps the None of parameters it did not touch
        *(
            dict(s, state={n: t for n, t in s["state"].items() if t["momentum_buffer"] is not None})
            for s in (found, expected)
        )
    )


def test_a_checkpoint_with_other_options(device: str) -> None:
    """Moments for more than the group now uses, and for less: amsgrad switched on, momentum off."""
    plain, ams = theirs("adam", groups(weights(device))), theirs("adam amsgrad", groups(weights(device)))
    train(plain, range(2))
    train(ams, range(2))
    for saved in (plain.state_dict(), ams.state_dict()):
        pair = ours("adam", groups(weights(device))), theirs("adam", groups(weights(device)))
        for optimizer in pair:
            checkpoint = copy.deepcopy(saved)
            for group in checkpoint["param_groups"]:
                group["amsgrad"] = False
            optimizer.load_state_dict(checkpoint)
            train(optimizer, range(2, 4))
        same_parameters(*pair)
        same_state_dict(pair[0].state_dict(), pair[1].state_dict())


def _wrong(case: str) -> list[State]:
    saved = ours(case, groups(weights("cpu"))).state_dict()
    first, second = saved["param_groups"]
    return [
        dict(saved, param_groups=[first]),
        dict(saved, param_groups=[first, dict(second, params=[2])]),
        {"state": {}},
    ]


@pytest.mark.parametrize("which", range(3), ids=["groups", "parameters", "no groups"])
def test_a_checkpoint_of_another_model(which: str, device: str) -> None:
    """torch's error, and everything as it was: the hooks, the state, the run."""
    saved = _wrong("adam")[int(which)]
    a, b = ours("adam", groups(weights(device))), theirs("adam", groups(weights(device)))
    errors = []
    for optimizer in (a, b):
        train(optimizer, range(2))
        with pytest.raises((ValueError, KeyError)) as caught:
            optimizer.load_state_dict(saved)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert not a._optimizer_load_state_dict_pre_hooks
    assert not a._optimizer_load_state_dict_post_hooks
    train(a, range(2, 4))
    train(b, range(2, 4))
    same_parameters(a, b)


def test_state_that_belongs_to_no_parameter(device: str) -> None:
    """torch copies such entries as they are."""
    a = ours("adam", groups(weights(device)))
    train(a, range(2))
    notes: State = {"note": {"answer": 42}, "none": None, "step": {"step": torch.ones(3)[0]}}
    a.state.update(notes)  # type: ignore[arg-type]
    saved = through_file(a.state_dict())
    assert {key: saved["state"][key] for key in notes} == notes
    b = ours("adam", groups(copy.deepcopy(parameters(a))))
    b.load_state_dict(saved)
    assert {key: b.state[key] for key in notes} == notes  # type: ignore[index]
    for optimizer in (a, b):
        train(optimizer, range(2, 4))
    same_parameters(a, b, exactly=True)


@a_few
def test_loading_into_a_run_that_has_other_state(case: str, device: str) -> None:
    """A jump back in time: nothing of the abandoned steps is left, in plan, counters or buffers."""
    straight, other = ours(case, groups(weights(device))), ours(case, groups(weights(device)))
    train(straight, range(2))
    saved, at = copy.deepcopy(straight.state_dict()), copy.deepcopy(parameters(straight))
    train(straight, range(2, 4))
    train(other, range(1, 4))
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(parameters(other), at, strict=True):
            p.copy_(value)
    train(other, range(2, 4))
    same_parameters(other, straight, exactly=True)


def test_a_fresh_checkpoint_begins_anew(device: str) -> None:
    """Loading a checkpoint without state: the next momentum step is a first one again."""
    pair = ours("momentum", groups(weights(device))), theirs("momentum", groups(weights(device)))
    for optimizer in pair:
        fresh = copy.deepcopy(optimizer.state_dict())
        train(optimizer, range(3))
        optimizer.load_state_dict(fresh)
        train(optimizer, range(3, 5))
    same_parameters(*pair)


def test_scheduler_and_optimizer_resume_together(device: str) -> None:
    """The scheduler's own state_dict, and the optimizer's, which knows the current rate."""

    def make(params: Sequence[Tensor]) -> tuple[Optimizer, Any]:
        optimizer = Momentum(groups(params), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=8)

    straight, schedule = make(weights(device))
    for i in range(6):
        train(straight, [i])
        schedule.step()
    first, its_schedule = make(weights(device))
    for i in range(3):
        train(first, [i])
        its_schedule.step()
    resumed, resumed_schedule = make(copy.deepcopy(parameters(first)))
    resumed.load_state_dict(through_file(first.state_dict()))
    resumed_schedule.load_state_dict(through_file(its_schedule.state_dict()))
    for i in range(3, 6):
        train(resumed, [i])
        resumed_schedule.step()
    same_parameters(resumed, straight, exactly=True)
    for key in ("lr", "momentum", "dampening", "initial_lr", "max_momentum"):
        assert resumed.param_groups[0][key] == straight.param_groups[0][key]


def test_averages_are_saved_and_go_on(device: str) -> None:
    """v₁ = x₁, then v ← d·v + (1 − d)·x, across a checkpoint; a checkpoint without any starts them."""
    params, decay = weights(device, torch.float32), 0.75
    optimizer = Adam(groups(params), lr=0.1, ema_decay=decay)
    train(optimizer, range(2))
    resumed = Adam(groups(copy.deepcopy(params)), lr=0.1, ema_decay=decay)
    saved = through_file(optimizer.state_dict())
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq", "ema", "ema_step"]
    assert saved["state"][0]["ema_step"].device.type == "cpu"
    resumed.load_state_dict(saved)
    for k, p in enumerate(parameters(resumed)[:3]):
        assert torch.equal(resumed.state[p]["ema"], optimizer.state[params[k]]["ema"])
    average = [resumed.state[p]["ema"].double() for p in parameters(resumed)[:3]]
    for i in range(2, 4):
        train(resumed, [i])
        average = [
            decay * v + (1 - decay) * p.detach().double() for v, p in zip(average, parameters(resumed)[:3], strict=True)
        ]
    with resumed.swap_ema():
        assert_close([p.detach().double() for p in parameters(resumed)[:3]], average, rtol=1e-6, atol=1e-7)
    # torch's class carries them along unused, and its checkpoint gives them back.
    genuine = torch.optim.Adam(groups(copy.deepcopy(params)), lr=0.1)
    genuine.load_state_dict(through_file(optimizer.state_dict()))
    train(genuine, range(2, 3))
    assert "ema" in genuine.state_dict()["state"][0]
    # And a checkpoint of torch's has none: the next step begins them.
    fresh = torch.optim.Adam(groups(copy.deepcopy(params)), lr=0.1)
    train(fresh, range(2))
    late = Adam(groups(copy.deepcopy(params)), lr=0.1, ema_decay=decay)
    train(late, range(2))
    late.load_state_dict(fresh.state_dict())
    train(late, range(2, 3))
    for p in parameters(late)[:3]:
        assert torch.equal(late.state[p]["ema"], p)


def test_checkpoints_from_several_threads() -> None:
    """An asynchronous saver's, and another's: neither trips over the other's hooks."""
    optimizer = Adam([Parameter(torch.ones(2)) for _ in range(20)])
    train(optimizer, range(2))
    expected = optimizer.state_dict()["state"]

    def save(_: int) -> bool:
        found = optimizer.state_dict()["state"]
        return found.keys() == expected.keys() and torch.equal(found[0]["exp_avg"], expected[0]["exp_avg"])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(save, range(400)))


def test_hooks_may_wait_for_another_optimizers() -> None:
    """As ranks that are threads do, in a collective."""
    both = threading.Barrier(2, timeout=20)

    def save(_: int) -> int:
        optimizer = Adam([Parameter(torch.ones(2))])

        def meet(*_: Any) -> None:
            both.wait()

        optimizer.register_state_dict_post_hook(meet)
        return len(optimizer.state_dict()["param_groups"])

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(save, range(2))) == [1, 1]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam"])
def test_a_checkpoint_of_another_class(name: str, device: str) -> None:
    """torch misses a state with the first step; so do we, rather than begin it beside a step count of long ago."""
    params = weights(device)
    saved = torch.optim.Adamax(params)
    train(saved, range(2))
    optimizer: Any = getattr(tribp.optim, name)(params)
    optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(KeyError, match="exp_avg_sq"):
        train(optimizer, range(2, 3))


def test_an_option_may_add_a_state_late(device: str) -> None:
    params = weights(device)
    optimizer = Adam(params)
    train(optimizer, range(2))
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, range(2, 3))
    assert "max_exp_avg_sq" in optimizer.state[params[0]]


def test_narrow_states_become_as_wide_as_their_parameters(device: str) -> None:
    """In bfloat16 a moment of float32 gradients would stand still: 0.999·v rounds to v."""
    params = weights(device, torch.float32)
    a = Adam(params)
    train(a, range(2))
    saved = tree_map_only(Tensor, lambda t: t.bfloat16() if t.dim() else t, a.state_dict())
    b, kept = Adam(params), Adam(params, state_dtype=torch.bfloat16)
    for optimizer, dtype in ((b, torch.float32), (kept, torch.bfloat16)):
        optimizer.load_state_dict(saved)
        assert optimizer.state[params[0]]["exp_avg"].dtype == dtype


def test_nothing_is_saved_half_swapped() -> None:
    optimizer = Adam(weights("cpu"), ema_decay=0.5)
    train(optimizer, range(2))
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="swap_ema"):
        optimizer.state_dict()
    optimizer.state_dict()


@pytest.mark.parametrize("case", ["sgd momentum", "rmsprop everything", "adagrad", "adam amsgrad", "adam"])
def test_files_are_no_larger_than_torchs(case: str, device: str) -> None:
    """torch.save writes whole storages: a counter that is a view of all counters would drag them along."""
    shapes = [(2,)] * 12
    sizes = []
    for make in (ours, theirs):
        optimizer = make(case, [Parameter(torch.ones(shape, device=device)) for shape in shapes])
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
        for written in (optimizer.state_dict(), optimizer):
            file = io.BytesIO()
            torch.save(written, file)
            sizes.append(file.getbuffer().nbytes)
        for state in optimizer.state_dict()["state"].values():
            assert all(v.untyped_storage().nbytes() == v.nbytes for v in state.values())
        one = copy.deepcopy(optimizer.state_dict()["state"][0])
        assert all(v.untyped_storage().nbytes() == v.nbytes for v in one.values())
    assert sizes[0] <= sizes[2] + 256
    assert sizes[1] <= sizes[3] + 1024


def test_a_written_checkpoint_stays_what_it_was(device: str) -> None:
    """Counters in an earlier state_dict do not run on with… what torch shares, it may share; what it copies, not.

    torch's state_dict holds the live tensors, ours too; so a caller copies. A deep copy must then be complete.
    """
    optimizer = Adam(weights(device))
    train(optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    train(optimizer, range(2, 4))
    assert kept["state"][0]["step"].item() == 2.0
    assert optimizer.state_dict()["state"][0]["step"].item() == 4.0


def test_a_step_that_was_skipped_leaves_no_buffer(device: str) -> None:
    """GradScaler finds an infinity in the first step: no momentum has begun then, and none may be saved as if."""
    options: State = dict(lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    expected = torch.optim.SGD(weights(device), **options)
    train(expected, range(2))
    optimizer = SGD(weights(device), **options)
    for p in parameters(optimizer)[:3]:
        p.grad = torch.full_like(p, float("inf"))
    optimizer.grad_scale = torch.tensor(2.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    assert optimizer.state_dict()["state"] == {}
    resumed = SGD(weights(device), **options)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for run in (resumed, copy.deepcopy(optimizer), optimizer):
        train(run, range(2))
        same_parameters(run, expected)


def test_groups_and_lr_tensors_are_not_shared(device: str) -> None:
    rate = torch.tensor(0.1)
    a = Adam(weights(device), lr=rate)
    train(a, range(1))
    b = Adam(weights(device), lr=torch.tensor(0.5))
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["lr"] == 0.1
    assert b.param_groups[0]["lr"] is not a.param_groups[0]["lr"]
    rate.fill_(0.25)
    assert b.param_groups[0]["lr"] == torch.tensor(0.1)


def test_named_parameters_go_through_checkpoints() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    optimizers = [kind(model.named_parameters(), lr=0.1) for kind in (Adam, torch.optim.Adam)]
    for optimizer in optimizers:
        train(optimizer, range(2))
    saved = [through_file(optimizer.state_dict()) for optimizer in optimizers]
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    assert saved[0]["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    unnamed = Adam(model.parameters())
    unnamed.load_state_dict(saved[1])
    assert unnamed.param_groups[0]["param_names"] == saved[1]["param_groups"][0]["param_names"]
    assert list(itertools.chain(unnamed.state_dict()["param_groups"][0])) == list(saved[1]["param_groups"][0])
