"""Hyperparameters that change between steps: in place, or replaced by others; each group follows its own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tribp

from .cases import LIVELY, NUMBERS, Options, Twins, each_class, lively

pytestmark = pytest.mark.usefixtures("one_thread")

# Those that torch reads as numbers at every step. momentum and β₂ stay on their side of what makes states.
TENSORS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "Momentum": {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.05, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 0.1},
    "Adam": {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1},
    "AdamW": {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1},
    "Adadelta": {"lr": 0.5, "eps": 0.1, "weight_decay": 0.1},
    "Adamax": {"lr": 0.1},
    "NAdam": {"lr": 0.1, "momentum_decay": 0.1},
    "RAdam": {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1},
    "Rprop": {"lr": 0.1},
    "ASGD": {"lr": 0.1, "lambd": 0.1},
}
EACH = [(name, key) for name, keys in TENSORS.items() for key in keys]


def tensor(value: float) -> torch.Tensor:
    """Of a number that float32 holds: in which type torch computes with it makes no difference then."""
    return torch.tensor(value, dtype=torch.float32).double()


def give(twins: Twins, number: int, **options: Any) -> None:
    """A group's options, each optimizer its own copies."""
    for optimizer, _ in twins.both:
        group = optimizer.param_groups[number]
        for key, value in options.items():
            group[key] = value.clone() if isinstance(value, torch.Tensor) else value
            if twins.name == "Momentum" and key == "momentum":
                group["dampening"] = group[key]


def three_groups(name: str, device: str, **options: Any) -> Twins:
    return lively(name, device, shapes=[(5,), (3, 4), (70,)], groups=[{}, {}, {}], **options)


@pytest.mark.parametrize(("name", "key"), EACH)
def test_equal_tensors_that_part(name: str, key: str, device: str) -> None:
    """Three groups with a tensor of the same value each: one is changed in place, and then another."""
    twins = three_groups(name, device)
    for number in range(3):
        give(twins, number, **{key: tensor(TENSORS[name][key])})
    twins.step()
    for number, factor in ((1, 0.5), (2, 0.25), (1, 1.5)):
        for optimizer, _ in twins.both:
            optimizer.param_groups[number][key].mul_(factor)
        twins.step()


@pytest.mark.parametrize(("name", "key"), EACH)
def test_numbers_become_equal_tensors_and_back(name: str, key: str, device: str) -> None:
    """What replaces a number may be equal to it; it is what counts from then on."""
    twins = three_groups(name, device)
    value = float(tensor(TENSORS[name][key]))
    for number in range(3):
        give(twins, number, **{key: value})
    twins.step()
    give(twins, 1, **{key: tensor(value)})
    twins.step()
    for optimizer, _ in twins.both:
        optimizer.param_groups[1][key].mul_(0.5)
    twins.step()
    give(twins, 1, **{key: value})
    twins.step()
    give(twins, 2, **{key: np.float64(value / 2)})
    twins.step()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_tensor_that_groups_share(name: str, device: str) -> None:
    twins = three_groups(name, device)
    for optimizer, _ in twins.both:
        shared = tensor(0.1)
        for group in optimizer.param_groups:
            group["lr"] = shared
    twins.step()
    for optimizer, _ in twins.both:
        optimizer.param_groups[0]["lr"].mul_(0.5)
    twins.step()
    assert len(twins.ours._plan.buckets) == 1, "one tensor is one rate: the groups share a call"


NUMBERS_OF_OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", dict(momentum=0.9, nesterov=1, maximize=np.True_)),
    ("SGD", dict(lr=np.array(0.25), momentum=np.float64(0.5), maximize=0)),
    ("SGD", dict(lr=1, weight_decay=1)),
    ("SGD", dict(maximize=1, lr=np.array(0.25))),  # of one tensor: without the fused kernel
    ("Adam", dict(amsgrad=1, lr=np.array(0.25), betas=(np.float64(0.5), np.float64(0.75)))),
    ("AdamW", dict(amsgrad=np.False_, lr=np.array(0.25), maximize=1)),
    ("RMSprop", dict(maximize=1, lr=np.array(0.25))),
    ("Adagrad", dict(maximize=0, lr=np.array(0.25))),
    ("NAdam", dict(maximize=1, decoupled_weight_decay=1, lr=np.array(0.25))),
]


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("case", NUMBERS_OF_OTHERS, ids=lambda case: case[0])
def test_numbers_of_other_kinds(case: tuple[str, dict[str, Any]], count: int, device: str) -> None:
    """Flags that are 1, as argparse and YAML give them, numbers of numpy's: torch's loop takes them all."""
    name, options = case
    twins = Twins(name, [(3,)] * count, device, **options)
    for _ in range(3):
        twins.step()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_in_a_list(name: str, device: str) -> None:
    """And tensors as betas, and lists of the same numbers in several groups."""
    twins = three_groups(name, device)
    for number in range(3):
        for optimizer, _ in twins.both:
            optimizer.param_groups[number]["betas"] = [0.875, 0.75]
    twins.step()
    for number, place, value in ((1, 0, 0.5), (2, 1, 0.5), (0, 0, 0.25)):
        for optimizer, _ in twins.both:
            optimizer.param_groups[number]["betas"][place] = value
        twins.step()
    for optimizer, _ in twins.both:
        optimizer.param_groups[1]["betas"] = (tensor(0.5), tensor(0.75))
        optimizer.param_groups[2]["betas"] = (tensor(0.5), tensor(0.75))
    twins.step()
    for optimizer, _ in twins.both:
        optimizer.param_groups[1]["betas"][0].mul_(0.5)
        optimizer.param_groups[2]["betas"][1].mul_(0.5)
    twins.step()


SWITCHES: dict[str, list[Options]] = {
    "SGD": [{"nesterov": True, "dampening": 0}, {"dampening": 0.5, "nesterov": False}],
    "Momentum": [],
    "RMSprop": [{"centered": False}, {"centered": True}],
    "Adagrad": [],
    "Adam": [{"amsgrad": False}, {"amsgrad": True}, {"decoupled_weight_decay": True}],
    "AdamW": [],
    "Adadelta": [],
    "Adamax": [],
    "NAdam": [{"decoupled_weight_decay": True}],
    "RAdam": [{"decoupled_weight_decay": True}],
    "Rprop": [],
    "ASGD": [],
}


@each_class
def test_switches_turned_while_training(name: str, device: str) -> None:
    """In one group of three that shared a call; where torch makes states in the first step only, they are there."""
    twins = three_groups(name, device)
    twins.step()
    common: list[Options] = [
        {"maximize": True}, {"foreach": True}, {"foreach": None, "maximize": False}, {"differentiable": True},
        {"differentiable": False, "foreach": False},
        {"weight_decay": 0.3}, {"weight_decay": 0}, {"lr": 0},
    ]  # fmt: skip
    if name == "ASGD":  # whose rates torch forms in float32 then
        common.remove({"foreach": True})
    for change in common + SWITCHES[name]:
        for optimizer, _ in twins.both:
            wanted = dict(change)
            if optimizer is twins.genuine:
                wanted = {k: v for k, v in wanted.items() if k != "foreach"}
            optimizer.param_groups[1].update(wanted)
        twins.step()


def test_a_switch_that_is_a_tensor_turns_in_place(device: str) -> None:
    """Momentum of 0 has no buffer; a tensor of 0 may become more."""
    twins = three_groups("SGD", device, momentum=0.0, weight_decay=0.0)
    for number in range(3):
        give(twins, number, momentum=tensor(0.0))
    twins.step()
    for optimizer, _ in twins.both:
        optimizer.param_groups[1]["momentum"].fill_(0.5)
    twins.step()
    twins.step()


def test_alpha_that_becomes_one(device: str) -> None:
    """RMSprop on the CPU is torch's fused Adam late in its life, which 1 − αᵗ must be 1 for."""
    twins = Twins("RMSprop", device=device, alpha=0.5)
    twins.step()
    give(twins, 0, alpha=1.0)
    twins.step()
    give(twins, 0, alpha=tensor(0.5))
    twins.step()
    for optimizer, _ in twins.both:
        optimizer.param_groups[0]["alpha"].fill_(1.0)
    twins.step()


def test_options_that_come_and_go(device: str) -> None:
    """As schedulers add `initial_lr`; a key that is replaced by another one."""
    twins = lively("Adam", device)
    twins.step()
    for optimizer, _ in twins.both:
        group = optimizer.param_groups[0]
        group["initial_lr"] = 1.0
        twins_lr = group.pop("lr")
        group["lr"] = twins_lr / 2
    twins.step()
    for optimizer, _ in twins.both:
        del optimizer.param_groups[0]["initial_lr"]
        optimizer.param_groups[0]["name"] = "all"
    twins.step()


@pytest.mark.parametrize("wrong", [torch.zeros(0), torch.ones(2)], ids=["none", "two"])
def test_tensors_that_are_no_numbers(wrong: torch.Tensor, device: str) -> None:
    twins = lively("Adam", device)
    twins.step()
    before = twins.params[0].clone()
    twins.ours.param_groups[0]["lr"] = wrong.to(device)
    twins.give(twins.grads())
    with pytest.raises((RuntimeError, ValueError)):
        twins.ours.step()
    assert torch.equal(twins.params[0], before)


# ---- random sequences

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["number", "tensor", "in place", "shared", "step"]),
        st.integers(0, 2),
        st.integers(0, 4),
        st.sampled_from([0.25, 0.5, 0.75]),
    ),
    min_size=2,
    max_size=10,
)


def follow(name: str, changes: list[tuple[str, int, int, float]], device: str) -> None:
    twins = three_groups(name, device, **{k: v for k, v in NUMBERS[name].items() if k == "lr"})
    keys = list(TENSORS[name])
    for what, number, which, value in [*changes, ("step", 0, 0, 0.0)]:
        key = keys[which % len(keys)]
        if what == "tensor" and key == "momentum_decay":
            # μ's product is a float32 number, which torch's loop multiplies by a number rounded to float32, but by a
            # tensor in float64: the last places differ.
            twins.rtol = twins.atol = 1e-6
        if what == "number":
            give(twins, number, **{key: value})
        elif what == "tensor":
            give(twins, number, **{key: tensor(value)})
        elif what == "step":
            twins.step()
        else:
            for optimizer, _ in twins.both:
                groups = optimizer.param_groups
                if what == "shared":
                    give_to, taken = groups[number], groups[(number + 1) % 3]
                    give_to[key] = taken[key]
                    if name == "Momentum" and key == "momentum":
                        give_to["dampening"] = give_to[key]
                elif isinstance(groups[number][key], torch.Tensor):
                    groups[number][key].fill_(value)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(LIVELY)), changes=CHANGES)
@example("NAdam", [("tensor", 0, 1, 0.5), ("step", 0, 0, 0.25), ("step", 0, 0, 0.25), ("step", 0, 0, 0.25)])
def test_random_changes_on_the_fallback(name: str, changes: list[tuple[str, int, int, float]]) -> None:
    with tribp.use_backend("torch"):
        follow(name, changes, "cpu")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(LIVELY)), changes=CHANGES)
def test_random_changes_on_the_kernels(name: str, changes: list[tuple[str, int, int, float]], kernels: str) -> None:
    follow(name, changes, kernels)
