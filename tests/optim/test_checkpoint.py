"""Checkpoints of the optimizers: torch's, key for key; loaded both ways; and nothing of them lost on the way."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer
from torch.testing import assert_close

from tribp.optim import ASGD, SGD, Adagrad, Adam, AdamW, Momentum, RAdam, RMSprop

from .checkpoint_cases import (
    FEW,
    State,
    a_few,
    every_case,
    groups,
    moments,
    ours,
    parameters,
    same_parameters,
    same_state_dict,
    theirs,
    through_file,
    train,
    weights,
)


@every_case
def test_state_dicts_are_torchs_and_load_both_ways(case: str, device: str) -> None:
    """Keys and their order, types, devices, values, from before the first step on; and training goes on unchanged."""
    if device == "cuda" and case == "adagrad fused":
        pytest.skip("torch's fused Adagrad takes no CUDA tensors")
    a, b = ours(case, groups(weights(device))), theirs(case, groups(weights(device)))
    for steps in ([], [0], [1, 2]):
        train(a, steps)
        train(b, steps)
        same_state_dict(a.state_dict(), b.state_dict())
    # The checkpoint holds the moments, the parameters come from the other run: it must fit both.
    resumed_a = ours(case, groups(copy.deepcopy(parameters(b))))
    resumed_b = theirs(case, groups(copy.deepcopy(parameters(a))))
    resumed_a.load_state_dict(through_file(b.state_dict()))
    resumed_b.load_state_dict(through_file(a.state_dict()))
    # torch brings them to the parameters' type and device, and goes on there.
    for state, original in zip(resumed_b.state.values(), b.state.values(), strict=True):
        state |= {key: state[key].to(original[key]) for key in ("mu_product", "eta", "mu") if key in state}
    same_state_dict(resumed_a.state_dict(), b.state_dict())
    for optimizer in (a, b, resumed_a, resumed_b):
        train(optimizer, range(3, 5))
    for optimizer in (a, resumed_a, resumed_b):
        same_parameters(optimizer, b)
    same_state_dict(resumed_a.state_dict(), resumed_b.state_dict())


def by_file(optimizer: Optimizer, case: str) -> Optimizer:
    resumed = ours(case, groups(copy.deepcopy(parameters(optimizer))))
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    return resumed


WAYS: dict[str, Callable[[Optimizer, str], Optimizer]] = {
    "file": by_file,
    "pickle": lambda optimizer, case: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": lambda optimizer, case: copy.deepcopy(optimizer),
    "whole file": lambda optimizer, case: whole_file(optimizer),
}


def whole_file(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
@a_few
def test_resuming_gives_the_same_bits(case: str, way: str, device: str) -> None:
    """… and neither run touches the other, whichever is first."""
    straight = ours(case, groups(weights(device)))
    train(straight, range(4))
    original = ours(case, groups(weights(device)))
    train(original, range(2))
    copied = WAYS[way](original, case)
    same_state_dict(copied.state_dict(), original.state_dict())
    train(copied, range(2, 3))
    train(original, range(2, 4))
    train(copied, range(3, 4))
    same_parameters(original, straight, exactly=True)
    same_parameters(copied, straight, exactly=True)


@pytest.mark.parametrize("kind", [SGD, Momentum, RMSprop, Adagrad, Adam, ASGD])
def test_random_rounding_resumes(kind: Any, device: str) -> None:
    """The random numbers depend on the step, which the checkpoint must therefore tell: the same bits after resuming."""
    found = []
    for stop in (False, True):
        params = weights(device, torch.bfloat16)
        options: State = dict(lr=1e-3, stochastic_rounding=True, seed=3)
        optimizer = kind(params, **options)
        train(optimizer, range(2))
        if stop:
            saved, optimizer = through_file(optimizer.state_dict()), kind(params, **options)
            optimizer.load_state_dict(saved)
        train(optimizer, range(2, 4))
        found.append(params)
    assert_close(*found, rtol=0, atol=0)


def test_a_copy_goes_with_the_copy_of_its_model(device: str) -> None:
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = Adam(model.parameters(), lr=0.1)
    train(optimizer, range(2))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    before = model.weight.detach().clone()
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    train(optimizer2, range(2, 3))
    assert torch.equal(model.weight, before)
    assert not torch.equal(model2.weight, before)


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "whole file"])
def test_copies_keep_what_was_switched_on(way: str) -> None:
    """Options, the marks of `fused`, and their hold on groups that come later."""
    options: State = dict(ema_decay=0.5, max_grad_norm=1.0, state_dtype=torch.float32, capturable=True, fused=True)
    original = SGD(weights("cpu", torch.bfloat16), stochastic_rounding=True, seed=3, **options)
    copied = WAYS[way](original, "")
    assert type(copied) is SGD
    assert copied._step_supports_amp_scaling
    copied.add_param_group(dict(params=[Parameter(torch.ones(2))]))
    for group in copied.param_groups:
        assert options.items() <= group.items()
        assert group["stochastic_rounding"]
        assert group["seed"] == 3
    assert not hasattr(WAYS[way](Adam(weights("cpu")), ""), "_step_supports_amp_scaling")


@pytest.mark.parametrize("case", [*FEW, "adam"])
def test_a_live_checkpoint_is_not_shared(case: str, device: str) -> None:
    """torch's load_state_dict uses the very tensors it is given: two runs would change each other's moments."""
    straight, first = ours(case, groups(weights(device))), ours(case, groups(weights(device)))
    train(straight, range(4))
    train(first, range(2))
    second = ours(case, groups(copy.deepcopy(parameters(first))))
    given = first.state_dict()
    second.load_state_dict(given)
    held = {id(v): v for optimizer in (first, second) for s in optimizer.state.values() for v in s.values()}
    assert len({v.data_ptr() for v in held.values()}) == len(held)
    kept = copy.deepcopy(given)
    train(second, range(2, 4))
    assert_close(given, kept, rtol=0, atol=0)
    train(first, range(2, 4))
    same_parameters(first, straight, exactly=True)
    same_parameters(second, straight, exactly=True)


@pytest.mark.parametrize("case", ["sgd momentum", "rmsprop everything", "adagrad", "adam amsgrad"])
def test_a_loaded_state_keeps_its_type(case: str, device: str) -> None:
    """float32 moments of bfloat16 parameters: torch cuts them to bfloat16 without a word (pytorch #43706)."""
    wide = theirs(case, groups(weights(device, torch.float32)))
    train(wide, range(3))
    saved = wide.state_dict()
    narrow = ours(case, groups(weights(device, torch.bfloat16)))
    narrow.load_state_dict(saved)

    assert_close(moments(narrow), moments(wide), rtol=0, atol=0)  # types too
    train(narrow, range(3, 5))
    assert {v.dtype for v in moments(narrow)} == {torch.float32}
    train(wide, range(3, 5))
    if case != "adagrad":  # its first moments are those of the parameters
        again = ours(case, groups(weights(device, torch.bfloat16)))
        again.load_state_dict(through_file(narrow.state_dict()))
        assert_close(moments(again), moments(narrow), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["sgd momentum", "rmsprop everything", "adagrad", "adam amsgrad"])
def test_state_dtype_decides_the_type_of_a_loaded_state(case: str, device: str) -> None:
    """… unless the checkpoint has that option itself, whose value then holds, as every option's does."""
    wide = theirs(case, groups(weights(device, torch.float32)))
    train(wide, range(3))
    saved = wide.state_dict()
    cut = ours(case, groups(weights(device, torch.bfloat16)), state_dtype=torch.bfloat16)
    cut.load_state_dict(saved)
    train(cut, range(3, 4))
    assert {v.dtype for v in moments(cut)} == {torch.bfloat16}
    widened = ours(case, groups(weights(device, torch.bfloat16)), state_dtype=torch.float32)
    widened.load_state_dict(cut.state_dict())
    assert {v.dtype for v in moments(widened)} == {torch.bfloat16}  # the checkpoint's own option
    for group in (checkpoint := cut.state_dict())["param_groups"]:
        del group["state_dtype"]
    widened = ours(case, groups(weights(device, torch.bfloat16)), state_dtype=torch.float32)
    widened.load_state_dict(checkpoint)
    train(widened, range(3, 4))
    assert {v.dtype for v in moments(widened)} == {torch.float32}


# What is beyond torch, by class: its options and values that are not the default.
COMMON: State = dict(ema_decay=0.9, max_grad_norm=1.0, state_dtype=torch.float32, stochastic_rounding=True, seed=5)


BEYOND: list[tuple[type[Optimizer], State]] = [
    (SGD, COMMON | dict(capturable=True)),
    (Momentum, COMMON | dict(capturable=True)),
    (Adagrad, COMMON | dict(capturable=True, eps_inside_sqrt=True)),
    (RMSprop, COMMON | dict(fused=True, eps_inside_sqrt=True)),
    (Adam, COMMON | dict(eps_inside_sqrt=True)),
    (AdamW, COMMON | dict(eps_inside_sqrt=True)),
    (RAdam, COMMON | dict(fused=True, eps_inside_sqrt=True)),
    (ASGD, COMMON | dict(fused=True)),
]


@pytest.mark.parametrize(("kind", "options"), BEYOND, ids=lambda value: getattr(value, "__name__", ""))
def test_options_beyond_torchs(kind: type[Optimizer], options: State) -> None:
    """In the state_dict only when on; still on after torch's checkpoint, which does not know them, was loaded."""
    name = "SGD" if kind is Momentum else kind.__name__
    torchs: Optimizer = getattr(torch.optim, name)(groups(weights("cpu")))
    known = {key for group in torchs.state_dict()["param_groups"] for key in group}
    for option, value in options.items():
        optimizer = kind(groups(weights("cpu")), **{option: value})
        for group in optimizer.state_dict()["param_groups"]:
            assert group.keys() - known == {option} - known
            assert group[option] == value
        optimizer.load_state_dict(torchs.state_dict())
        assert [group[option] for group in optimizer.param_groups] == [value, value], option
        off = {"stochastic_rounding": False, "eps_inside_sqrt": False, "capturable": False, "seed": 0}.get(option)
        nothing: State = {option: off}
        written = kind(groups(weights("cpu")), **nothing).state_dict()["param_groups"]
        assert all(group.keys() == known for group in written), option
    plain = kind(groups(weights("cpu")))  # type: ignore[call-arg]
    assert {key for group in plain.state_dict()["param_groups"] for key in group} == known


def test_options_of_one_group_alone(device: str) -> None:
    params = weights(device, torch.bfloat16)
    made: list[State] = [
        dict(params=params[:1]),
        dict(params=params[1:], ema_decay=0.5, state_dtype=torch.float32),
    ]
    optimizer = Adam(made)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    assert "ema_decay" not in saved["param_groups"][0]
    assert "ema" not in saved["state"][0]
    assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert saved["state"][1]["ema"].dtype == torch.float32
    assert saved["state"][1]["exp_avg"].dtype == torch.float32
    genuine = torch.optim.Adam(groups([torch.zeros_like(p) for p in params]))
    genuine.param_groups[0]["params"], genuine.param_groups[1]["params"] = params[:1], params[1:]
    optimizer.load_state_dict(genuine.state_dict())
    assert [group.get("ema_decay") for group in optimizer.param_groups] == [None, 0.5]
    assert [group.get("state_dtype") for group in optimizer.param_groups] == [None, torch.float32]


def test_options_in_a_checkpoint_are_loaded() -> None:
    """As torch does it with every option: the checkpoint's values hold."""
    saved = through_file(Adam(weights("cpu"), ema_decay=0.75, seed=3, eps_inside_sqrt=True).state_dict())
    optimizer = Adam(weights("cpu"), ema_decay=0.5, max_grad_norm=2.0)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["ema_decay"], group["max_grad_norm"], group["seed"]) == (0.75, 2.0, 3)
    assert group["eps_inside_sqrt"]


def test_loaded_options_hold_in_the_next_step(device: str) -> None:
    """Neither the plan nor the groups remember what was before the loading."""
    a = ours("adam", groups(weights(device)))
    train(a, range(2))
    saved = a.state_dict()
    for group in saved["param_groups"]:
        group |= dict(lr=0.5, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)
    b = theirs("adam", groups(copy.deepcopy(parameters(a))))
    b.load_state_dict(copy.deepcopy(saved))
    a.load_state_dict(saved)
    train(a, range(2, 4))
    train(b, range(2, 4))
    same_parameters(a, b)
