"""What changes between steps: groups, absent gradients, memory that moves, states, hyperparameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tribp
import tribp.optim

from .cases import (
    CLASSES,
    LATE_ADAGRAD,
    LIVELY,
    NUMBERS,
    VARIANTS,
    Layout,
    Options,
    Twins,
    channels_last,
    each_class,
    genuine,
    lively,
    moved,
    ours,
    plain,
    shifted,
    transposed,
    transposed_if_2d,
    values,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- several groups, one launch

# Options that differ between groups, by class; every group also has its own lr, weight decay and sign.
GROUPS: dict[str, list[Options]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.7, "nesterov": True}],
    "Momentum": [{}, {"momentum": 0.5}],
    "RMSprop": [
        {}, {"momentum": 0.9}, {"centered": True, "alpha": 0.9}, {"momentum": 0.5, "centered": True, "eps": 1e-3},
    ],
    "Adagrad": [{}, {"lr_decay": 0.1}, {"eps": 1e-3}],
    "Adam": [
        {}, {"amsgrad": True}, {"betas": (0.5, 0.9)}, {"decoupled_weight_decay": True, "amsgrad": True, "eps": 1e-3},
    ],
    "AdamW": [{}, {"amsgrad": True, "betas": (0.5, 0.9)}],
    "Adadelta": [{}, {"rho": 0.5}, {"eps": 1e-3}],
    "Adamax": [{}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}],
    "NAdam": [{}, {"momentum_decay": 0.1}, {"decoupled_weight_decay": True, "eps": 1e-3}],
    "RAdam": [{}, {"betas": (0.5, 0.9)}, {"decoupled_weight_decay": True, "eps": 1e-3}],
    "Rprop": [{}, {"etas": (0.3, 1.7)}, {"step_sizes": (0.05, 0.1)}],
    "ASGD": [{}, {"lambd": 0.1, "t0": 0.0}, {"alpha": 0.5, "lambd": 0.2}],
}  # fmt: skip


def groups_of(name: str) -> list[Options]:
    differing = [
        {"lr": 0.1 / (k + 1), "weight_decay": 0.1 * k, "maximize": k % 2 == 1, **own}
        for k, own in enumerate(GROUPS[name])
    ]
    if name == "Momentum":
        differing[1]["dampening"] = differing[1]["momentum"]
    return differing


@pytest.mark.parametrize("name", CLASSES)
def test_groups_with_different_options_are_one_launch(name: str, kernels: str, launched: list[str]) -> None:
    groups = groups_of(name)
    twins = Twins(name, [(5,), (70,), (2, 3), ()] * 2, kernels, groups=groups)
    for t in range(3):
        twins.step()
        assert launched == ["multi_tensor_step"] * (t + 1)
    other = Twins(name, [(5,), (70,), (2, 3), ()] * 2, groups=groups[::-1])
    twins.genuine, twins.twins, twins.both[1] = other.genuine, other.twins, other.both[1]
    with pytest.raises(AssertionError):  # what is compared does differ between the groups
        twins.check()


@pytest.mark.parametrize("name", CLASSES)
def test_groups_with_different_options_on_the_fallback(name: str) -> None:
    with tribp.use_backend("torch"):
        twins = Twins(name, [(5,), (70,), (2, 3), ()] * 2, groups=groups_of(name))
        for _ in range(4):
            twins.step()


def test_a_launch_for_each_combination_of_types(kernels: str, launched: list[str]) -> None:
    params = [torch.ones(3, dtype=dtype, device=kernels) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    optimizer = tribp.optim.Adam([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert launched == ["multi_tensor_step"] * 2


@each_class
def test_gradients_that_come_late_vanish_and_come_back(name: str, device: str) -> None:
    """Four parameters, one of them empty; what has no gradient keeps its value, state and step."""
    twins = lively(name, device, shapes=[(5,), (3, 4), (0,), (70,)])
    for present in [(0,), (0, 1, 2), (1, 2), (0,), (0, 1, 2, 3), (3,), (0, 1, 2, 3)]:
        twins.step(*present)
    twins.give([None] * 4)  # none at all: nothing happens
    twins.each(lambda optimizer: optimizer.step())
    twins.check()
    if name not in ("SGD", "Momentum"):
        states = twins.ours.state_dict()["state"]
        assert [float(states[i]["step"]) for i in range(4)] == [5, 4, 4, 3], (
            "the empty tensor's counts like the others'"
        )


@each_class
def test_many_absences(name: str, device: str) -> None:
    """More patterns than a plan remembers, so that forgotten ones return."""
    twins = lively(name, device, shapes=[(2,)] * 4)
    for pattern in [*range(1, 13), 1, 5, 15]:
        twins.step(*(i for i in range(4) if pattern >> i & 1))


@each_class
def test_groups_added_while_training(name: str, device: str) -> None:
    if name == "Adagrad" and not LATE_ADAGRAD:
        pytest.skip("this torch's own Adagrad raises KeyError")
    twins = lively(name, device)
    twins.step()
    twins.add((2, 3), lr=0.05, weight_decay=0.3)
    twins.step()
    twins.add((), lr=0.2, maximize=True)
    twins.step(1, 3)
    twins.step()


@each_class
def test_parameters_that_move(name: str, device: str) -> None:
    """To other memory, and to memory laid out otherwise; the gradients follow, or don't."""
    twins = lively(name, device)
    twins.step()
    for change, layout in [(plain, plain), (shifted, plain), (transposed_if_2d, transposed_if_2d), (plain, plain)]:
        twins.each(moved(change))
        twins.give(twins.grads(), layout)
        twins.each(lambda optimizer: optimizer.step())
        twins.check()


@each_class
def test_gradients_that_change_their_layout(name: str, device: str) -> None:
    twins = lively(name, device, shapes=[(5,), (3, 4), (2, 3, 2, 2)])

    def by_channel(x: Tensor) -> Tensor:
        return channels_last(x) if x.dim() == 4 else transposed_if_2d(x)

    for layout in (plain, by_channel, shifted, plain, by_channel):
        twins.give(twins.grads(), layout)
        twins.each(lambda optimizer: optimizer.step())
        twins.check()


@each_class
def test_a_module_that_is_moved_and_converted(name: str, device: str) -> None:
    """channels_last in mid-training; `.double()` before it, the optimizer already made, as people do."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(2, 2)).to(device)
    twin = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(2, 2))
    twin.load_state_dict(model.state_dict())
    optimizer = ours(name, model.parameters(), **(NUMBERS[name] | LIVELY[name]))
    other = genuine(name, twin.parameters(), **(NUMBERS[name] | LIVELY[name]))
    model.double()
    twin.double()
    x = values((2, 2, 4, 4), torch.float64, 1)
    for t in range(4):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(x.to(device if m is model else "cpu")).square().sum().backward()
            o.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            # Adagrad made its sums in float32, before.
            bound = 1e-6 if name == "Adagrad" else 1e-12
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=bound, atol=bound)
        if t == 1:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            assert not next(model.parameters()).is_contiguous()


@each_class
def test_a_module_made_double_after_its_first_steps(name: str, device: str) -> None:
    """torch's Adam and RMSprop raise then; here float32 states go on being used, and are as accurate as they can be."""
    twins = lively(name, device, dtype=torch.float32)
    exact = lively(name, "cpu")
    for p, q in zip(exact.twins, twins.twins, strict=True):
        p.copy_(q)
    for t in range(4):
        grads = twins.grads()
        for p, q, g in zip(twins.params, exact.twins, grads, strict=True):
            assert g is not None
            p.grad, q.grad = g.to(p), g.double()
        twins.ours.step()
        exact.genuine.step()
        for p, q in zip(twins.params, exact.twins, strict=True):
            torch.testing.assert_close(p.cpu().double(), q, rtol=1e-5, atol=1e-5)
        if t == 1:
            for p in twins.params:
                p.grad = None
                p.data = p.data.double()


def first_state(optimizer: Any, of: int = 0) -> tuple[Options, str]:
    state = optimizer.state[optimizer.param_groups[0]["params"][of]]
    return state, next(key for key in state if key != "step")


@each_class
@pytest.mark.parametrize("way", ["replaced", "data", "transposed", "deleted", "in place"])
def test_states_that_are_changed_by_hand(name: str, way: str, device: str) -> None:
    """As offloading, surgery on checkpoints and resets do."""
    twins = lively(name, device)
    twins.step()
    twins.step()

    def change(optimizer: Any) -> None:
        state, key = first_state(optimizer, 1)
        value = state[key]
        if way == "replaced":
            state[key] = value * 2
        elif way == "transposed":
            state[key] = transposed(value * 2)
        elif way == "data":
            old = value.data
            value.data = old * 2
            old.fill_(torch.nan)
        elif way == "in place":
            value.mul_(2)
        else:
            optimizer.state.pop(optimizer.param_groups[0]["params"][1])

    if way == "deleted" and name == "Adagrad":
        pytest.skip("torch makes Adagrad's sums in its constructor, and can't make them again")
    twins.each(change)
    twins.step()
    twins.step()


@each_class
def test_hyperparameters_changed_by_hand(name: str, device: str) -> None:
    twins = lively(name, device)
    twins.step()
    changes: list[Options] = [{"lr": 0.01}, {"weight_decay": 0.5}, {"maximize": True}]
    changes.append({"lr": torch.tensor(0.3).double()})
    own: dict[str, list[Options]] = {
        "SGD": [{"momentum": 0}, {"momentum": 0.5, "dampening": 0.5}, {"dampening": 0, "nesterov": True}],
        "Momentum": [{"momentum": 0.5, "dampening": 0.5}],
        "RMSprop": [{"alpha": 0.5}, {"eps": 0.1}, {"momentum": 0.3}],
        "Adagrad": [{"lr_decay": 0.5}, {"eps": 0.1}],
        "Adadelta": [{"rho": 0.5}, {"eps": 0.1}],
        "Rprop": [{"etas": (0.4, 1.5)}, {"step_sizes": (0.2, 0.3)}],
        "ASGD": [{"lambd": 0.2}, {"alpha": 0.5}, {"t0": 2.0}],
    }
    for change in changes + own.get(name, [{"betas": (0.5, 0.7)}, {"eps": 0.1}]):
        for optimizer, _ in twins.both:
            optimizer.param_groups[0].update(change)
        twins.step()


@each_class
def test_groups_that_were_alike(name: str, device: str) -> None:
    """Groups with equal options may share a call, until one of them changes."""
    twins = lively(name, device, shapes=[(5,), (70,), (2, 3)], groups=[{}, {}, {}])
    twins.step()
    changes: list[tuple[int, Options]] = [(1, {"lr": 0.01}), (2, {"weight_decay": 0.5}), (0, {"maximize": True})]
    for number, change in changes:
        for optimizer, _ in twins.both:
            optimizer.param_groups[number].update(change)
        twins.step()


@each_class
def test_a_tensor_lr_changed_in_place(name: str, device: str) -> None:
    twins = lively(name, device, lr=torch.tensor(0.1, dtype=torch.float64))
    for factor in (1.0, 0.5, 3.0):
        for optimizer, _ in twins.both:
            optimizer.param_groups[0]["lr"].mul_(factor)
        twins.step()


def moves_momentum(optimizer: Any) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ExponentialLR": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=7, cycle_momentum=moves_momentum(optimizer)
    ),
    "CyclicLR": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.3, step_size_up=3, cycle_momentum=moves_momentum(optimizer)
    ),
}


@each_class
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(name: str, scheduler: str, device: str) -> None:
    """OneCycleLR and CyclicLR move momentum or β₁ too; Momentum's dampening follows, which torch's SGD is told."""
    twins = lively(name, device)
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer, _ in twins.both]
    momenta = set()
    for _ in range(6):
        if name == "Momentum":
            for group in twins.genuine.param_groups:
                group["dampening"] = group["momentum"]
        twins.step()
        for s in schedulers:
            s.step()
        group = twins.ours.param_groups[0]
        momenta.add(group.get("momentum", group.get("betas", (0,))[0]))
    assert len(momenta) > 1 or scheduler == "ExponentialLR" or not moves_momentum(twins.ours)


# ---- random sequences

OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.sets(st.integers(0, 5))),
    st.tuples(st.just("step"), st.just(frozenset(range(6)))),
    st.tuples(st.just("add"), st.sampled_from([(3,), (2, 3), (), (0,), (66,)])),
    st.tuples(st.just("lr"), st.sampled_from([0.0, 0.01, 0.3])),
    st.tuples(st.just("decay"), st.sampled_from([0.0, 0.2])),
    st.tuples(st.just("move"), st.sampled_from(["plain", "shifted", "transposed"])),
    st.tuples(st.just("layout"), st.sampled_from(["plain", "shifted", "transposed"])),
    st.tuples(st.just("load"), st.sampled_from(["own", "crossed"])),
    st.tuples(st.just("state"), st.integers(0, 5)),
    st.tuples(st.just("maximize"), st.booleans()),
)


SEQUENCES = st.lists(OPERATIONS, min_size=2, max_size=12)


WAYS: dict[str, Layout] = {"plain": plain, "shifted": shifted, "transposed": transposed_if_2d}


def follow(name: str, own: Options, sequence: list[tuple[str, Any]], device: str) -> None:
    """The same to ours and the genuine class; every step, they are compared."""
    twins = Twins(name, [(5,), (3, 4)], device, **own)
    layout: Layout = plain
    for what, how in [*sequence, ("step", range(6))]:
        if what == "step":
            present = [i for i in how if i < len(twins.params)]
            twins.give(twins.grads(*present) if present else [None] * len(twins.params), layout)
            twins.each(lambda optimizer: optimizer.step())
            twins.check()
        elif what == "add" and len(twins.params) < 6 and (name != "Adagrad" or LATE_ADAGRAD):
            twins.add(how)
        elif what == "move":
            twins.each(moved(WAYS[how]))
        elif what == "layout":
            layout = WAYS[how]
        elif what == "load":
            saved = [optimizer.state_dict() for optimizer, _ in twins.both]
            for (optimizer, _), state_dict in zip(twins.both, saved if how == "own" else saved[::-1], strict=True):
                optimizer.load_state_dict(state_dict)
                for state in optimizer.state.values():  # torch gives numbers the parameter's type, ours keeps theirs
                    state |= {key: state[key].float() for key in ("mu_product", "eta", "mu") if key in state}
        elif what == "state":
            for optimizer, params in twins.both:
                state = optimizer.state.get(params[how % len(params)], {})
                for key, value in list(state.items()):
                    if key != "step" and isinstance(value, Tensor):
                        state[key] = value * 2
        elif what in ("lr", "decay", "maximize"):
            key = {"decay": "weight_decay"}.get(what, what)
            for optimizer, _ in twins.both:
                optimizer.param_groups[-1][key] = how


@settings(max_examples=60, deadline=None)
@given(variant=st.sampled_from(VARIANTS), sequence=SEQUENCES)
def test_random_sequences_on_the_fallback(variant: tuple[str, Options], sequence: list[tuple[str, Any]]) -> None:
    with tribp.use_backend("torch"):
        follow(*variant, sequence, "cpu")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(variant=st.sampled_from(VARIANTS), sequence=SEQUENCES)
def test_random_sequences_on_the_kernels(
    variant: tuple[str, Options], sequence: list[tuple[str, Any]], kernels: str
) -> None:
    follow(*variant, sequence, kernels)


@each_class
def test_gradients_without_memory(name: str, device: str) -> None:
    """That of torch.sgn is zeros that lie nowhere, now and then, or from the first step on."""
    twins = Twins(name, device=device)
    for first in (True, False, True):
        twins.give(twins.grads())
        for _, params in twins.both:
            p = params[0 if first else 1]
            p.grad = torch._efficientzerotensor(p.shape, dtype=p.dtype, device=p.device)
        for optimizer, _ in twins.both:
            optimizer.step()
        twins.check()
