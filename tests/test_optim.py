"""The optimizers' numbers: beside the genuine classes, the spec's formulas, and what tribp offers beyond torch.

On the fallback every option meets every other one; on the kernels, which the interpreter runs slowly, every pair does.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tribp
import tribp.optim

from .conftest import HAS_GPU
from .optim_cases import (
    CLASSES,
    COMMON,
    DTYPES,
    LATE_ADAGRAD,
    LAYOUTS,
    NUMBERS,
    VARIANTS,
    Layout,
    Options,
    Trial,
    Twins,
    channels_last,
    common,
    gaps,
    genuine,
    ours,
    plain,
    shifted,
    title,
    transposed,
    values,
)  # fmt: skip

Case = tuple[tuple[float, bool, bool], torch.dtype, str]
EVERY = list(itertools.product(COMMON, DTYPES, LAYOUTS))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The tensors are tiny; on a busy machine waking a second thread costs a thousand times what it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trial(variant: tuple[str, Options], cases: Sequence[Case], steps: int, device: str) -> None:
    """All cases in one optimizer, a group for each of the common options, new gradient tensors at each step."""
    name, own = variant
    cases = sorted(cases, key=lambda case: COMMON.index(case[0]))
    groups = []
    for options, members in itertools.groupby(cases, key=lambda case: case[0]):
        params = [
            LAYOUTS[layout][1](values(LAYOUTS[layout][0], dtype, 1, layout, options).to(device))
            for _, dtype, layout in members
        ]
        groups.append((common(name, *options), params))
    run = Trial(name, own, groups)
    for t in range(steps):
        run.step([
            LAYOUTS[layout][2](values(LAYOUTS[layout][0], dtype, 2 + t, layout, options).to(device))
            for options, dtype, layout in cases
        ])  # fmt: skip
    run.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_every_option_type_and_layout(variant: tuple[str, Options], dtype: torch.dtype) -> None:
    with tribp.use_backend("torch"):
        trial(variant, [case for case in EVERY if case[1] == dtype], 3, "cpu")


def paired() -> list[list[Case]]:
    """For each variant every layout once, with types and common options dealt so that every pair of two axes meets."""
    return [
        [(COMMON[(3 * i + v) % len(COMMON)], DTYPES[(i + v) % len(DTYPES)], name) for i, name in enumerate(LAYOUTS)]
        for v in range(len(VARIANTS))
    ]


def test_the_pairs_are_covered() -> None:
    rows = [(v, *case) for v, cases in enumerate(paired()) for case in cases]
    axes: list[list[Any]] = [list(range(len(VARIANTS))), COMMON, DTYPES, list(LAYOUTS)]
    for a, b in itertools.combinations(range(4), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(axes[a], axes[b]))


@pytest.mark.parametrize("number", [
    # To a kernel Momentum is SGD with dampening, and AdamW is Adam with another weight decay.
    pytest.param(v, id=title(variant), marks=[pytest.mark.slow] if variant[0] in ("Momentum", "AdamW") else [])
    for v, variant in enumerate(VARIANTS)
])  # fmt: skip
def test_kernels_on_every_pair(number: int, kernels: str) -> None:
    trial(VARIANTS[number], paired()[number], 5, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_kernels_on_every_option_type_and_layout(
    variant: tuple[str, Options], dtype: torch.dtype, kernels: str
) -> None:
    trial(variant, [case for case in EVERY if case[1] == dtype], 5, kernels)


@pytest.mark.parametrize("name", CLASSES)
def test_kernels_for_20_steps(name: str, kernels: str) -> None:
    """Moments long past their start, in the types and at the β that lose most."""
    last = [variant for variant in VARIANTS if variant[0] == name][-1]
    cases = [(COMMON[4], torch.float32, "block and rest"), (COMMON[4], torch.bfloat16, "gaps, contiguous gradient")]
    trial(last, cases, 20, kernels)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's, and meant
@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e200])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if len(v[1]) in (0, 2)], ids=title)
def test_gradients_that_are_not_finite(variant: tuple[str, Options], bad: float, device: str) -> None:
    """Spoil what they spoil in torch (1e200: only the squares overflow), and nothing once that is put right."""
    name, own = variant
    if bad == 1e200 and "centered" in own:
        pytest.skip(
            "∞ − ḡ², and whether that overflows too, depends on whether torch's processor fuses the two operations"
        )
    twins = Twins(name, device=device, **own)
    twins.step()
    before = [copied(optimizer, params) for optimizer, params in twins.both]
    grads = twins.grads()
    assert grads[1] is not None
    grads[1][0, :2] = bad
    twins.give(grads)
    twins.each(lambda optimizer: optimizer.step())
    twins.check()
    twins.step()
    for (optimizer, params), (weights, states) in zip(twins.both, before, strict=True):
        for p, weight, state in zip(params, weights, states, strict=True):
            p.copy_(weight)
            for key, value in state.items():
                optimizer.state[p][key].copy_(value)
    twins.step()
    assert all(bool(p.isfinite().all()) for p in twins.params)


def copied(optimizer: Any, params: Sequence[Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    states = [{k: v.clone() for k, v in optimizer.state.get(p, {}).items() if v is not None} for p in params]
    return [p.clone() for p in params], states


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


# ---- what happens while training

# With momentum and the like: their states are what late gradients and new groups can get wrong.
LIVELY: dict[str, Options] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "Momentum": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
}
each_class = pytest.mark.parametrize("name", CLASSES)


def lively(name: str, device: str, **options: Any) -> Twins:
    return Twins(name, device=device, **{**LIVELY[name], **options})


@each_class
def test_gradients_that_come_late_vanish_and_come_back(name: str, device: str) -> None:
    """Four parameters, one of them empty; what has no gradient keeps its value, state and step."""
    twins = lively(name, device, shapes=[(5,), (3, 4), (0,), (70,)])
    for present in [(0,), (0, 1, 2), (1, 2), (0,), (0, 1, 2, 3), (3,), (0, 1, 2, 3)]:
        twins.step(*present)
    twins.give([None] * 4)  # none at all: nothing happens
    twins.each(lambda optimizer: optimizer.step())
    twins.check()
    if name in ("RMSprop", "Adagrad", "Adam", "AdamW"):
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


def moved(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """`p.data = …`, with the old memory overwritten: a stale pointer reads or writes what nobody looks at."""

    def apply(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                old = p.data
                p.data = change(old)
                old.fill_(torch.nan)

    return apply


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


def transposed_if_2d(x: Tensor) -> Tensor:
    return transposed(x) if x.dim() == 2 else plain(x)


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


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ExponentialLR": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=7, cycle_momentum="Adagrad" not in type(optimizer).__name__
    ),
    "CyclicLR": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.3, step_size_up=3, cycle_momentum="Adagrad" not in type(optimizer).__name__
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
    assert len(momenta) > 1 or scheduler == "ExponentialLR" or name == "Adagrad"


# ---- GradScaler, and what torch's fused classes get wrong

FUSED = [name for name in CLASSES if name != "RMSprop"]  # those whose torch class has fused=True at all


def scaled_step(optimizer: Any, scale: float, found_inf: float) -> None:
    """What `GradScaler.step` does with an optimizer whose `_step_supports_amp_scaling` is true."""
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.grad_scale = torch.tensor(scale, device=device)
    optimizer.found_inf = torch.tensor(found_inf, device=device)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def snapshot(optimizer: Any) -> list[Tensor]:
    state_dict = optimizer.state_dict()["state"]
    tensors = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [t.cpu().clone() for t in [*tensors, *(v for s in state_dict.values() for v in s.values() if v is not None)]]


def assert_unchanged(optimizer: Any, before: list[Tensor]) -> None:
    """To the last bit: parameters, states and counters."""
    after = snapshot(optimizer)
    assert len(after) == len(before), "states came or went"
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)


@each_class
def test_unscaling_and_skipping_in_the_step(name: str, device: str) -> None:
    twins = lively(name, device, mine={"fused": True})
    for scale, found_inf in [(8.0, 0.0), (4.0, 1.0), (4.0, 2.0), (0.5, 0.0)]:
        grads = twins.grads()
        twins.give(grads)
        for p in twins.params:
            assert p.grad is not None
            p.grad *= scale
        before = snapshot(twins.ours)
        scaled_step(twins.ours, scale, found_inf)
        if found_inf:
            assert_unchanged(twins.ours, before)
            continue
        twins.genuine.step()
        twins.check()
        for p, g in zip(twins.params, grads, strict=True):  # what gradient clipping or logging reads afterwards
            assert p.grad is not None
            assert g is not None
            assert torch.equal(p.grad.cpu(), g), "the unscaled gradient is written back"


@each_class
@pytest.mark.parametrize("fused", [True, False])
def test_torchs_grad_scaler(name: str, fused: bool, device: str) -> None:
    """With an infinity in the first step, where nothing has begun yet, and in a later one."""
    twins = lively(name, device, dtype=torch.float32, mine={"fused": fused})
    scalers = [torch.amp.GradScaler(where, 4.0, growth_interval=2) for where in (device, "cpu")]
    assert getattr(twins.ours, "_step_supports_amp_scaling", False) == fused, "as torch: Lightning and GradScaler ask"
    for t in range(6):
        grads = twins.grads()
        for (optimizer, params), scaler in zip(twins.both, scalers, strict=True):
            loss = torch.zeros((), device=params[0].device)
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                assert g is not None
                factor = torch.inf if t in (0, 3) and i == 1 else 1.0
                p.grad = None
                p.requires_grad_()
                loss = loss + (p * g.to(p)).sum() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if t:  # the first, skipped step has made states, as torch's fused one makes them, or has not
            twins.check(1e-5, 1e-6)
        assert scalers[0].get_scale() == scalers[1].get_scale()


def test_bug_1_an_infinity_in_the_first_step_leaves_no_garbage_in_the_buffer(device: str) -> None:
    """torch: a skipped first step leaves the momentum buffer as `empty_like` made it, and the second step reads it."""
    twins = Twins("SGD", device=device, momentum=0.9, dampening=0.5, mine={"fused": True})
    twins.give(twins.grads())
    scaled_step(twins.ours, 2.0, 1.0)
    twins.check()
    twins.step()  # its first buffer is the whole gradient, undamped
    twins.step()


@pytest.mark.parametrize("name", FUSED)
def test_bug_2_a_first_gradient_that_comes_late(name: str, device: str) -> None:
    """torch: TypeError, for the list of buffers has a None in it."""
    twins = lively(name, device, mine={"fused": True})
    twins.step(0)
    twins.step(0, 1)
    twins.step(1)


@each_class
@pytest.mark.parametrize("found_inf", [2.0, 3.0, 0.5, math.inf, math.nan])
def test_bug_3_found_inf_is_any_number_but_0(name: str, found_inf: float, device: str) -> None:
    """torch compares with 1; it is a sum over devices, and where it is 2 the parameters become NaN."""
    twins = lively(name, device, mine={"fused": True})
    twins.step()
    before = snapshot(twins.ours)
    twins.give([torch.full_like(p, torch.inf) for p in twins.twins])
    scaled_step(twins.ours, 2.0, found_inf)
    assert_unchanged(twins.ours, before)
    twins.step()


@pytest.mark.parametrize("name", FUSED)
def test_bug_4_strided_parameters(name: str, device: str) -> None:
    """torch: wrong without a word on the CPU, an error on CUDA."""
    twins = lively(name, device, shapes=[(3, 4), (2, 3, 2, 2)], mine={"fused": True})
    twins.params[0].data = transposed(twins.params[0])
    twins.params[1].data = channels_last(twins.params[1])
    for _ in range(2):
        twins.step()  # with contiguous gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 257])
def test_bug_5_sgd_in_16_bits_skips_no_vector(size: int, dtype: torch.dtype, device: str) -> None:
    """torch: whole vectors of the parameter keep their old values (pytorch #191763)."""
    p = torch.zeros(size, dtype=dtype, device=device)
    optimizer = tribp.optim.SGD([p], lr=0.5, momentum=0.5, fused=True)
    for expected in (-0.5, -1.25):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, expected))


# ---- beyond torch


@each_class
def test_average_of_the_parameters(name: str, device: str) -> None:
    """v₁ = x₁, then v ← d·v + (1 − d)·x; a parameter's average begins with its own first step."""
    twins = lively(name, device, shapes=[(5,), (3, 4), (70,)], mine={"ema_decay": 0.9})
    averages: list[Tensor | None] = [None] * 3
    for present in [(0,), (0, 1), (1,), (0, 1), (0, 1)]:
        twins.give(twins.grads(*present))
        twins.each(lambda optimizer: optimizer.step())
        for i in present:
            x, v = twins.params[i].detach().cpu().clone(), averages[i]
            averages[i] = x if v is None else 0.9 * v + 0.1 * x
    optimizer = twins.ours
    weights = [p.detach().cpu().clone() for p in twins.params]
    for p, twin in zip(twins.params, twins.twins, strict=True):
        torch.testing.assert_close(p.cpu(), twin)
    assert averages[2] is None
    averages[2] = weights[2]  # no step, no average: swap_ema() leaves it alone

    def evaluate() -> None:
        with optimizer.swap_ema():
            for p, average in zip(twins.params, averages, strict=True):
                torch.testing.assert_close(p.cpu(), average, rtol=1e-12, atol=1e-14)
            for forbidden in (optimizer.step, optimizer.state_dict, optimizer.swap_ema().__enter__):
                with pytest.raises(RuntimeError, match="swap_ema"):
                    forbidden()
            raise ZeroDivisionError  # evaluation may fail; the weights come back

    with pytest.raises(ZeroDivisionError):
        evaluate()
    for p, weight in zip(twins.params, weights, strict=True):
        assert torch.equal(p.cpu(), weight)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_average_is_kept_in_float32(dtype: torch.dtype, device: str) -> None:
    """Of the parameters as they are stored. A β of 0.999 moves a bfloat16 average by less than its last place."""
    p = values((70,), dtype, 1).to(device)
    optimizer = tribp.optim.SGD([p], lr=0.3, ema_decay=0.999)
    exact = p.cpu().double()
    for t in range(4):
        p.grad = values((70,), dtype, 2 + t).to(device)
        optimizer.step()
        x = p.cpu().double()
        exact = x if t == 0 else 0.999 * exact + 0.001 * x
    average = optimizer.state[p]["ema"].cpu()
    assert average.dtype == torch.float32
    # Four roundings; an average of what the parameters were before rounding is 100 times as far away in bfloat16.
    torch.testing.assert_close(average.double(), exact, rtol=3e-7, atol=3e-7)


def test_no_average_no_swap() -> None:
    with pytest.raises(RuntimeError, match="ema_decay"), tribp.optim.SGD([torch.ones(2)]).swap_ema():
        pass


@each_class
@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping(name: str, limit: float, device: str) -> None:
    """`clip_grad_norm_`, then the genuine step; a limit that bites and one that doesn't, also on late gradients."""
    twins = lively(name, device, shapes=[(5,), (70,), (3, 4), ()], mine={"max_grad_norm": limit})
    for present in [(0, 1, 3), (), (0, 1, 2, 3)]:
        grads = twins.grads(*present)
        twins.give(grads)
        norm = torch.nn.utils.clip_grad_norm_(twins.twins, limit)
        twins.each(lambda optimizer: optimizer.step())
        twins.check()
        assert twins.ours.grad_norm.dtype == torch.float64, "also of 16-bit gradients: it can be beyond their range"
        torch.testing.assert_close(twins.ours.grad_norm.cpu(), norm, rtol=1e-12, atol=0)
        for p, g in zip(twins.params, grads, strict=True):
            assert g is None or (p.grad is not None and torch.equal(p.grad.cpu(), g)), "gradients are only read"


def test_clipping_unlike_layouts_and_types(kernels: str, launched: list[str]) -> None:
    """One norm over everything; one launch more for each combination of types."""
    kinds: list[tuple[torch.dtype, Layout]] = [
        (torch.float32, transposed), (torch.float32, gaps), (torch.float16, shifted), (torch.complex64, plain),
    ]  # fmt: skip
    params = [torch.zeros(70, 3, dtype=dtype, device=kernels) for dtype, _ in kinds]
    optimizer = tribp.optim.SGD(params, lr=1.0, max_grad_norm=1.0)
    for i, (p, (_, layout)) in enumerate(zip(params, kinds, strict=True)):
        p.grad = layout(values(p.shape, p.dtype, 5, i).to(kernels))
    norm = math.sqrt(sum(float(p.grad.abs().double().square().sum()) for p in params if p.grad is not None))
    optimizer.step()
    assert sorted(launched) == ["gradient_norm"] * 2 + ["multi_tensor_step"] * 2
    assert optimizer.grad_norm is not None
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
    for p in params:
        assert p.grad is not None
        expected = -p.grad.cpu().to(torch.complex128) / norm
        bound = 2 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.cpu().to(torch.complex128), expected, rtol=bound, atol=1e-7)


def test_clipping_takes_two_launches(kernels: str, launched: list[str]) -> None:
    twins = lively("Adam", kernels, groups=[{}, {"lr": 0.2}], mine={"max_grad_norm": 1.0})
    twins.give(twins.grads())
    twins.ours.step()
    assert launched == ["gradient_norm", "multi_tensor_step"]


def test_a_norm_that_is_not_a_number_spoils_every_parameter(device: str) -> None:
    """As clip_grad_norm_ has it: what went wrong is seen at once, not in one tensor that nobody looks at."""
    params = [torch.zeros(3, device=device) for _ in range(2)]
    optimizer = tribp.optim.SGD(params, max_grad_norm=1.0)
    params[0].grad, params[1].grad = torch.tensor([1.0, math.nan, 1.0], device=device), torch.ones(3, device=device)
    optimizer.step()
    assert all(bool(p.isnan().all()) for p in params)


@each_class
def test_clipping_what_is_unscaled(name: str, device: str) -> None:
    twins = lively(name, device, mine={"max_grad_norm": 0.5, "fused": True})
    for _ in range(2):
        grads = twins.grads()
        twins.give(grads)
        norm = torch.nn.utils.clip_grad_norm_(twins.twins, 0.5)
        for p in twins.params:
            assert p.grad is not None
            p.grad *= 16
        scaled_step(twins.ours, 16.0, 0.0)
        twins.genuine.step()
        twins.check()
        torch.testing.assert_close(twins.ours.grad_norm.cpu(), norm, rtol=1e-12, atol=0)
        for p, g in zip(twins.params, grads, strict=True):
            assert p.grad is not None
            assert g is not None
            assert torch.equal(p.grad.cpu(), g), "unscaled, not clipped"


@each_class
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=str)
def test_wide_moments_of_narrow_parameters(name: str, state_dtype: torch.dtype, device: str) -> None:
    """The moments are those of a float64 run, in their own precision; the parameters are rounded once a step."""
    own = {k: v for k, v in LIVELY[name].items() if k != "weight_decay"}  # else rounded parameters reach the moments
    p = values((70,), torch.bfloat16, 1).to(device)
    exact = p.cpu().double()
    optimizer = ours(name, [p], **(NUMBERS[name] | own), state_dtype=state_dtype)
    twin = genuine(name, [exact], **(NUMBERS[name] | own))
    for t in range(4):
        g = values((70,), torch.bfloat16, 2 + t)
        p.grad, exact.grad = g.to(device), g.double()
        before = exact.clone()
        start = p.cpu().double()
        optimizer.step()
        twin.step()
        # A step from where ours stood, in float64, and half a unit (2⁻⁸ of the larger neighbour) for the rounding.
        wanted = start + (exact - before)
        torch.testing.assert_close(p.cpu().double(), wanted, rtol=2**-8, atol=1e-6)
    state, other = optimizer.state[p], twin.state[exact]
    for key in other:
        if key != "step" and other[key] is not None:
            assert state[key].dtype == state_dtype
            bound = 1e-6 if state_dtype == torch.float32 else 1e-12
            worst = bound * float(other[key].abs().max())  # where terms cancel
            torch.testing.assert_close(state[key].cpu().double(), other[key], rtol=bound, atol=worst)


def rounded(device: str, seed: int, name: str = "Adam", layout: Layout = plain, **options: Any) -> list[Tensor]:
    """Three stochastically rounded steps of a few bfloat16 parameters; the float32 one beside them is not."""
    backend = "triton" if device == "triton" else "torch"
    place = "cuda" if HAS_GPU and device == "triton" else "cpu"
    params = [
        layout(values((6, 11), dtype, 1, i).to(place))
        for i, dtype in enumerate([torch.bfloat16, torch.float32, torch.bfloat16])
    ]
    options = NUMBERS[name] | {"lr": 2.0**-9, "stochastic_rounding": True, "seed": seed} | options
    with tribp.use_backend(backend):
        optimizer = ours(name, params, **options)
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = layout(values(p.shape, p.dtype, 2 + t, i).to(place))
            optimizer.step()
    return [p.cpu() for p in params]


@each_class
def test_stochastic_rounding_is_the_same_on_kernels_and_fallback(name: str, kernels: str) -> None:
    for a, b in zip(rounded("triton", 5, name), rounded("torch", 5, name), strict=True):
        if a.dtype == torch.bfloat16:
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [transposed, shifted], ids=["transposed", "misaligned"])
def test_stochastic_rounding_does_not_depend_on_the_layout_of_the_launch(layout: Layout, kernels: str) -> None:
    """The numbers depend on the element; kernels and fallback agree which one that is."""
    for a, b in zip(rounded("triton", 5, "SGD", layout), rounded("torch", 5, "SGD", layout), strict=True):
        if a.dtype == torch.bfloat16:
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_stochastic_rounding_follows_its_seed(backend: str, kernels: str) -> None:
    first, again, other = rounded(backend, 5), rounded(backend, 5), rounded(backend, 2**63 - 6)
    nearest = rounded(backend, 5, stochastic_rounding=False)
    for i in range(3):
        assert torch.equal(first[i], again[i])
        assert torch.equal(first[i], other[i]) == (first[i].dtype == torch.float32), "only bfloat16 is rounded so"
        assert torch.equal(first[i], nearest[i]) == (first[i].dtype == torch.float32)


def test_stochastic_rounding_is_right_on_average(device: str) -> None:
    """Updates far below the last place, from both sides of a power of two; nearest rounding would lose them all.

    Each element goes up with probability f, so the sum of n of them, in units, is n·f ± √(n·f·(1 − f)). The bound is
    4.5 of these; truncation, rounding to nearest and a probability of half of f are all more than 8 away.
    """
    n = 512
    for start, step, unit in [(1.0, 2.0**-9, 2.0**-7), (-1.5, 2.0**-10, 2.0**-7)]:
        params = [torch.full((n,), start, dtype=torch.bfloat16, device=device) for _ in range(2)]
        exact = float(params[0][0])
        optimizer = tribp.optim.SGD(params, lr=1.0, stochastic_rounding=True, seed=3)
        for p in params:
            p.grad = torch.full_like(p, -step)
        optimizer.step()
        ups = [(p.double().cpu() - exact) / unit for p in params]
        f = float(torch.tensor(-step).bfloat16()) / -unit
        for up in ups:
            assert set(up.tolist()) == {0.0, 1.0}
            assert abs(float(up.sum()) - n * f) < 4.5 * math.sqrt(n * f * (1 - f))
        assert not torch.equal(*ups), "every parameter has numbers of its own"
        # Neighbours are independent: how often two of them go up together.
        together = float((ups[0][1:] * ups[0][:-1]).sum())
        assert abs(together - n * f * f) < 6 * math.sqrt(n) * f


def test_stochastic_rounding_has_new_numbers_every_step(device: str) -> None:
    p = torch.ones(128, dtype=torch.bfloat16, device=device)
    optimizer = tribp.optim.SGD([p], lr=1.0, stochastic_rounding=True)
    seen = []
    for _ in range(3):
        p.fill_(1.0)
        p.grad = torch.full_like(p, -(2.0**-8))
        optimizer.step()
        seen.append(p.cpu().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_stochastic_rounding_keeps_what_is_not_a_number(device: str) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0])
    p = special.to(device, torch.bfloat16)
    optimizer = tribp.optim.SGD([p], lr=1.0, stochastic_rounding=True)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.cpu().float().nan_to_num(7.0), special.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adam", "AdamW"])
def test_epsilon_inside_the_root(name: str, device: str) -> None:
    """Beside numpy; with ε as large as the moments, so that its place matters."""
    x, lr, eps = values((70,), torch.float64, 1), 0.1, 0.5
    p = x.to(device)
    optimizer = ours(name, [p], lr=lr, eps=eps, eps_inside_sqrt=True, weight_decay=0.0)
    w, m, v = x.numpy().copy(), np.zeros(70), np.zeros(70)
    for t in range(1, 4):
        g = values((70,), torch.float64, 2 + t)
        p.grad = g.to(device)
        optimizer.step()
        d = g.numpy()
        if name == "RMSprop":
            v = 0.99 * v + 0.01 * d**2
            w = w - lr * d / np.sqrt(v + eps)
        elif name == "Adagrad":
            v = v + d**2
            w = w - lr * d / np.sqrt(v + eps)
        else:
            m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d**2
            w = w - lr * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t) + eps)
        np.testing.assert_allclose(p.cpu().numpy(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ema_decay": 1.0}, ValueError, "ema_decay"),
        ({"ema_decay": -0.1}, ValueError, "ema_decay"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm"),
        ({"state_dtype": torch.int32}, ValueError, "state_dtype"),
        ({"state_dtype": torch.complex64}, ValueError, "state_dtype"),
        ({"state_dtype": "float32"}, ValueError, "state_dtype"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
        ({"lr": -1.0}, ValueError, "lr|learning rate"),
    ],
)
@each_class
def test_options_that_make_no_sense(name: str, options: Options, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ours(name, [torch.ones(2)], **options)
    if "ema_decay" in options or "state_dtype" in options:  # in one group, too
        with pytest.raises(error, match=match):
            ours(name, [{"params": [torch.ones(2)], **options}])


def test_options_that_a_class_has_not() -> None:
    for name in ("SGD", "Momentum"):
        with pytest.raises(TypeError, match="eps_inside_sqrt"):
            ours(name, [torch.ones(2)], eps_inside_sqrt=True)
    for beta in (1.0, -0.1):
        with pytest.raises(ValueError, match="beta"):
            tribp.optim.Momentum([torch.ones(2)], beta=beta)


def test_one_norm_has_one_limit(device: str) -> None:
    p, q = torch.ones(2, device=device, requires_grad=True), torch.ones(2, device=device, requires_grad=True)
    optimizer = tribp.optim.SGD([{"params": [p], "max_grad_norm": 1.0}, {"params": [q], "max_grad_norm": 2.0}])
    (p + q).sum().backward()
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()


# ---- what only torch's own code takes


def sparse_grad(size: int, *rows: int) -> Tensor:
    indices = torch.tensor([rows])
    return torch.sparse_coo_tensor(
        indices, values((len(rows), 3), torch.float64, 9, rows), (size, 3), check_invariants=True
    )


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adagrad"])
@pytest.mark.parametrize("plain_sgd", [True, False], ids=["", "momentum"])
def test_sparse_beside_dense_gradients(name: str, plain_sgd: bool, device: str) -> None:
    """Two embeddings and a dense tensor in one step, hooks firing once; then the embeddings get dense gradients."""
    own: Options = {"momentum": 0.0 if plain_sgd else 0.5} if name == "SGD" else {}
    twins = Twins(name, [(6, 3), (5,), (4, 3)], device, **own)
    calls: list[str] = []
    twins.ours.register_step_pre_hook(lambda *_: calls.append("before"))
    twins.ours.register_step_post_hook(lambda *_: calls.append("after"))
    for t, rows in enumerate([(0, 2), (2, 2, 5), (1,)]):  # (2, 2): not coalesced
        dense = values((5,), torch.float64, 3, t)
        grads = [sparse_grad(6, *rows), dense, sparse_grad(4, 0, 3)]
        twins.give(grads, lambda g: g.clone())
        twins.each(lambda optimizer: optimizer.step())
        twins_check_dense(twins)
        assert calls == ["before", "after"] * (t + 1)
    if name == "Adagrad" or own == {"momentum": 0.0}:  # torch can't add a dense gradient to a sparse buffer
        twins.step()


def twins_check_dense(twins: Twins) -> None:
    """`check`, for buffers that are sparse too: those that torch's SGD makes of sparse first gradients."""
    for optimizer, _ in twins.both:
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.is_sparse:
                    state[key] = value.coalesce()
    for p, twin in zip(twins.params, twins.twins, strict=True):
        torch.testing.assert_close(p.cpu(), twin, rtol=1e-12, atol=1e-13)
    for p, twin in zip(twins.params, twins.twins, strict=True):
        state, other = twins.ours.state.get(p, {}), twins.genuine.state.get(twin, {})
        for key in other:
            if isinstance(other[key], Tensor):
                torch.testing.assert_close(state[key].cpu(), other[key], rtol=1e-12, atol=1e-13)


def test_a_dense_gradient_after_sparse_ones_is_the_kernels_again(kernels: str, launched: list[str]) -> None:
    p = torch.ones(6, 3, dtype=torch.float64, device=kernels)
    optimizer = tribp.optim.Adagrad([p])
    for _ in range(2):
        p.grad = sparse_grad(6, 1).to(kernels)
        optimizer.step()
    assert launched == []
    for t in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert launched == ["multi_tensor_step"] * (t + 1)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_sparse_gradients_that_torch_refuses(name: str, device: str) -> None:
    errors = []
    for make in (ours, genuine):
        p = torch.ones(6, 3, dtype=torch.float64, device=device)
        p.grad = sparse_grad(6, 1).to(device)
        with pytest.raises(RuntimeError, match="sparse") as error:
            make(name, [p]).step()
        errors.append(str(error.value))
        assert torch.equal(p, torch.ones_like(p))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 1.0}, {"state_dtype": torch.float32}, {"stochastic_rounding": True}, {"eps_inside_sqrt": True}],
    ids=str,
)
def test_sparse_gradients_and_options_beyond_torch(options: Options, device: str) -> None:
    """No silent difference: the option can't be had, and the error names both."""
    p = torch.ones(6, 3, dtype=torch.float64, device=device)
    optimizer = tribp.optim.Adagrad([p], **options)
    p.grad = sparse_grad(6, 1).to(device)
    with pytest.raises(RuntimeError, match=f"{next(iter(options))}.*sparse"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


def test_an_average_of_a_sparsely_updated_embedding(device: str) -> None:
    p = torch.ones(6, 3, dtype=torch.float64, device=device)
    optimizer = tribp.optim.SGD([p], lr=0.5, ema_decay=0.5)
    average = None
    for rows in [(1, 2), (2, 3)]:
        p.grad = sparse_grad(6, *rows).to(device)
        optimizer.step()
        average = p.clone() if average is None else 0.5 * average + 0.5 * p
    torch.testing.assert_close(optimizer.state[p]["ema"], average)


@each_class
def test_differentiable(name: str, device: str) -> None:
    """Derivatives of what two steps lead to: by the start, the gradients and, in Adam, the learning rate."""

    def derivatives(make: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        lr: Any = torch.tensor(0.1, dtype=torch.float64, requires_grad=True) if name.startswith("Adam") else 0.1
        start = values((5,), torch.float64, 1).requires_grad_()
        gradients = [values((5,), torch.float64, 2 + t).requires_grad_() for t in range(2)]
        p = start.clone()
        own = {key: value for key, value in LIVELY[name].items() if key not in ("amsgrad", "centered")}  # not in torch
        optimizer = make(name, [p], **(NUMBERS[name] | own | {"lr": lr}), differentiable=True)
        if name == "Adagrad":
            optimizer.state[p]["sum"] = torch.full_like(p, 0.2)
        for g in gradients:
            p.grad = g
            optimizer.step()
        inputs = [start, *gradients, *([lr] if name.startswith("Adam") else [])]
        return p.detach(), *torch.autograd.grad(p.square().sum(), inputs, allow_unused=True)

    found, expected = derivatives(ours), derivatives(genuine)
    assert [t is None for t in found] == [t is None for t in expected]  # torch's SGD detaches its first buffer
    assert sum(t is not None for t in found) >= 3
    for a, b in zip(found, expected, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@each_class
def test_hooks_and_closures(name: str, device: str) -> None:
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = ours(name, [p])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 3
    assert calls == ["before", "closure", "after"]
    assert optimizer.step() is None
    assert bool((p < 1).all())


def test_nothing_is_written_between_the_elements(device: str) -> None:
    """Of a parameter with gaps, and of one that is a part of a larger tensor."""
    whole = torch.full((4, 7), 9.0, device=device)
    params = [whole[:, :6:2], whole[1, 1:5:2]]
    expected = whole.clone()
    optimizer = tribp.optim.SGD(params, lr=1.0)
    for p, q in zip(params, [expected[:, :6:2], expected[1, 1:5:2]], strict=True):
        p.grad = torch.ones_like(p)
        q -= 1
    optimizer.step()
    assert torch.equal(whole, expected)


# ---- the spec


def spec_step(name: str, w: Any, state: Any, g: Any, t: int, lr: float, beta: float) -> tuple[Any, Any]:
    """The table of `spec.md`, line by line. state: (first, second) moment."""
    m, v = state
    if name == "SGD":
        return w - lr * g, state
    if name == "Momentum":
        m = g if t == 1 else beta * m + (1 - beta) * g
        return w - lr * m, (m, v)
    if name == "AdaGrad":
        v = v + g**2
        return w - lr * g / np.sqrt(v + 1e-8), (m, v)
    if name == "RMSProp":
        v = beta * v + (1 - beta) * g**2
        return w - lr * g / (np.sqrt(v) + 1e-8), (m, v)
    m, v = beta * m + (1 - beta) * g, 0.999 * v + 0.001 * g**2
    return w - lr * (m / (1 - beta**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), (m, v)


SPEC: dict[str, Options] = {
    "SGD": {},
    "Momentum": {"beta": 0.9},
    "AdaGrad": {"eps": 1e-8, "eps_inside_sqrt": True},
    "RMSProp": {"alpha": 0.9},
    "Adam": {},
}


@pytest.mark.parametrize("name", SPEC)
def test_the_specs_formulas(name: str, device: str) -> None:
    x = values((70,), torch.float64, 1)
    p, w, state = x.to(device), x.numpy().copy(), (np.zeros(70), np.zeros(70))
    optimizer = ours(name, [p], lr=0.1, ema_decay=0.9, **SPEC[name])
    average = w
    for t in range(1, 6):
        g = values((70,), torch.float64, 1 + t)
        p.grad = g.to(device)
        optimizer.step()
        w, state = spec_step(name, w, state, g.numpy(), t, 0.1, 0.9)
        average = w if t == 1 else 0.9 * average + 0.1 * w
        np.testing.assert_allclose(p.cpu().numpy(), w, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(optimizer.state[p]["ema"].cpu().numpy(), average, rtol=1e-12, atol=1e-14)


def test_momentum_is_an_average_from_the_first_gradient_on(device: str) -> None:
    """v₁ = g₁: of equal gradients the average is that gradient, with no start-up and no bias correction."""
    p = torch.zeros(3, device=device)
    optimizer = tribp.optim.Momentum([p], lr=1.0, beta=0.875)
    for t in range(1, 4):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, -float(t)))


# ---- torch's own configurations

TORCHS = ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW")


def optim_db(name: str) -> Any:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls is getattr(torch.optim, name))


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_configurations(name: str, device: str) -> None:
    inputs = optim_db(name).optim_inputs_func(device="cpu")
    assert len(inputs) >= 5
    for configuration in inputs:
        options = dict(configuration.kwargs)
        if options.get("capturable"):
            continue  # torch allows it on accelerators only
        default = getattr(torch.optim, name)([torch.ones(1)]).defaults["lr"]
        twins = Twins(name, [(3,), (2, 2)], device, **({"lr": default} | options))
        for t in range(3):
            twins.give(twins.grads())
            twins.each(lambda optimizer: optimizer.step())
            # Tensors hold their numbers in float32, and torch computes with them there.
            loose = any(isinstance(v, (Tensor, tuple)) for v in options.values())
            assert twins.time == t + 1
            twins.check(*((1e-5, 1e-6) if loose else (1e-12, 1e-13)))


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_errors(name: str) -> None:
    """What torch refuses is refused, in its words."""
    seen = 0
    for case in optim_db(name).optim_error_inputs_func(device="cpu", dtype=torch.float32):
        configuration = case.optimizer_error_input
        for make in (ours, lambda name, params, **options: getattr(torch.optim, name)(params, **options)):
            warns = issubclass(case.error_type, Warning)
            with (pytest.warns if warns else pytest.raises)(case.error_type, match=case.error_regex):
                optimizer = make(name, configuration.params, **configuration.kwargs)
                optimizer.step()
        seen += 1
    assert seen >= 4


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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(variant=st.sampled_from(VARIANTS), sequence=SEQUENCES)
def test_random_sequences_on_the_kernels(
    variant: tuple[str, Options], sequence: list[tuple[str, Any]], kernels: str
) -> None:
    follow(*variant, sequence, kernels)


# ---- numbers are not part of a kernel


@each_class
def test_no_number_recompiles(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 100 steps, with every hyperparameter changing, one kernel: what Triton compiles by is looked at here.

    That is the constexprs, which arguments are None, the types, and of integers whether they are 1 or divisible by 16:
    no integer changes at all.
    """
    from tribp.ops.launching import Launch

    seen = set()

    def note(launch: Launch) -> None:
        specialized = [
            argument if isinstance(argument, int)
            else (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else type(argument)
            for argument in launch.arguments
        ]  # fmt: skip
        constants = map(str, launch.constants.items())
        seen.add((launch.kernel.__name__, launch.num_warps, *map(str, specialized), *constants))

    monkeypatch.setattr(Launch, "run", note)
    params = [torch.ones(5, device=kernels), torch.ones(100, device=kernels)]
    optimizer = ours(name, params, **(NUMBERS[name] | LIVELY[name]), max_grad_norm=1.0, ema_decay=0.9)
    for t in range(1, 101):
        group = optimizer.param_groups[0]
        for key, value in group.items():
            if key == "betas":
                group[key] = (0.9 - 0.001 * t, 0.999 - 0.001 * t)
            elif isinstance(value, float) and key != "max_grad_norm" and key != "ema_decay":
                group[key] = 0.9 / t
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert {row[0] for row in seen} == {"gradient_norm", "multi_tensor_step"}
    assert len(seen) == 2, seen
