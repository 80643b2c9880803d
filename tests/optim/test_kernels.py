"""The optimizers' numbers: beside the genuine classes, the spec's formulas, torch's own configurations.

On the fallback every option meets every other one; on the kernels, which the interpreter runs slowly, every pair does.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tribp
import tribp.optim

from .cases import (
    CLASSES,
    COMMON,
    DTYPES,
    LAYOUTS,
    LIVELY,
    NUMBERS,
    TORCHS,
    VARIANTS,
    Options,
    Trial,
    Twins,
    common,
    each_class,
    ours,
    title,
    values,
)  # fmt: skip

Case = tuple[tuple[float, bool, bool], torch.dtype, str]


EVERY = list(itertools.product(COMMON, DTYPES, LAYOUTS))


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adadelta"])
def test_squares_beyond_float32(name: str, device: str) -> None:
    """(1 − β)·g² is finite where g² is not, and no denormal number sooner than it need be."""
    gradient = torch.tensor([3e19, -3e19, 3e-21, 1.0], device=device)
    states = []
    for module in (torch.optim, tribp.optim):
        p = torch.zeros(4, device=device)
        p.grad = gradient.clone()
        optimizer = getattr(module, name)([p], lr=1e-3)
        optimizer.step()
        square = optimizer.state[p]["square_avg" if name in ("RMSprop", "Adadelta") else "exp_avg_sq"]
        assert bool(p.isfinite().all())
        assert bool(square.isfinite().all())
        states.append((square, p))
    compared = 1 if name == "NAdam" else 2  # torch's v̂ overflows there, and its step is 0
    torch.testing.assert_close(*(state[:compared] for state in states), rtol=1e-5, atol=0)


def copied(optimizer: Any, params: Sequence[Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    states = [{k: v.clone() for k, v in optimizer.state.get(p, {}).items() if v is not None} for p in params]
    return [p.clone() for p in params], states


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


# ---- numbers are not part of a kernel


@each_class
def test_no_number_recompiles(name: str, kernels: str, every_launch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 100 steps, with every hyperparameter changing, one kernel: what Triton compiles by is looked at here.

    That is the constexprs, which arguments are None, the types, and of integers whether they are 1 or divisible by 16:
    no integer changes at all.
    """
    from tribp.launch.launches import Launch

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
