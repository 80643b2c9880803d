"""Options beyond torch's: averages, clipping, wide moments, stochastic rounding, ε inside the root."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tribp
import tribp.optim

from ..conftest import HAS_GPU
from .cases import (
    DTYPES,
    FUSED,
    LAYOUTS,
    LIVELY,
    NUMBERS,
    Layout,
    Options,
    each_class,
    gaps,
    genuine,
    lively,
    ours,
    plain,
    shifted,
    transposed,
    values,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


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


@each_class
def test_an_average_that_is_turned_off_stays(name: str, device: str) -> None:
    """While another group's goes on, and until it is turned on again."""
    a, b = (torch.nn.Parameter(torch.ones(5, device=device)) for _ in range(2))
    optimizer = ours(name, [{"params": [a]}, {"params": [b]}], lr=0.1, ema_decay=0.75)

    def step(*decays: float | None) -> list[tuple[Tensor, float]]:
        for p, group, decay in zip((a, b), optimizer.param_groups, decays, strict=True):
            p.grad, group["ema_decay"] = torch.ones_like(p), decay
        optimizer.step()
        return [(state["ema"].clone(), float(state["ema_step"])) for state in (optimizer.state[p] for p in (a, b))]

    (average, count), _ = step(0.75, 0.75)
    for decays in ((None, 0.75), (None, None)):
        (now, counted), (other, _) = step(*decays)
        assert torch.equal(now, average)
        assert counted == count == 1
        assert not torch.equal(other, average)
    (now, counted), _ = step(0.75, None)
    torch.testing.assert_close(now, 0.75 * average + 0.25 * a.detach())
    assert counted == 2


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


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
@pytest.mark.parametrize("as_tensor", [False, True], ids=["", "lr is a tensor"])
@each_class
def test_states_that_are_made_for_a_checkpoint_begin_no_average(name: str, as_tensor: bool, device: str) -> None:
    """torch.distributed.checkpoint makes a new optimizer's states by a step at rate 0, which torch's counters count."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    network = torch.nn.Linear(3, 2, device=device)
    twin = torch.nn.Linear(3, 2, device=device)
    lr = torch.tensor(0.5) if as_tensor else 0.5
    optimizer = ours(
        name, [{"params": [network.weight]}, {"params": [network.bias], "ema_decay": None}], lr=lr, ema_decay=0.75
    )
    theirs = genuine(name, twin.parameters(), lr=lr)
    states: list[Any] = [get_optimizer_state_dict(*pair)["state"] for pair in ((network, optimizer), (twin, theirs))]
    ours_, torchs = (state.get("bias", {}) for state in states)
    assert (list(ours_), ours_.get("step")) == (list(torchs), torchs.get("step"))
    weight = network.weight.detach().clone()
    with optimizer.swap_ema():
        assert torch.equal(network.weight, weight)
    average = None
    for _ in range(3):
        network(torch.ones(1, 3, device=device)).sum().backward()
        optimizer.step()
        x = network.weight.detach()
        average = x.clone() if average is None else 0.75 * average + 0.25 * x
    torch.testing.assert_close(optimizer.state[network.weight]["ema"], average)
    assert "ema" not in optimizer.state[network.bias]


@each_class
def test_a_first_step_at_rate_0_begins_an_average(name: str, device: str) -> None:
    """Warming up from 0 is training: gradients are not 0."""
    if name == "ASGD":
        pytest.skip("its second rate is made of the first lr")
    p = torch.ones(3, device=device)
    optimizer = ours(name, [p], lr=0.0, ema_decay=0.75)
    for lr in (0.0, 0.5):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert not torch.equal(p, torch.ones_like(p))
    torch.testing.assert_close(optimizer.state[p]["ema"], 0.75 + 0.25 * p)


def test_a_swap_takes_a_module() -> None:
    optimizer = tribp.optim.SGD([torch.ones(2)], ema_decay=0.9)
    with pytest.raises(TypeError, match=r"swap_ema: model must be a torch\.nn\.Module, got int"):
        optimizer.swap_ema(3).__enter__()  # type: ignore[arg-type]


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
        if key not in optimizer._rule.scalars() and other[key] is not None:
            assert state[key].dtype == state_dtype
            if key == "ax":
                continue  # an average of the parameters, which were rounded
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


def steps_of_every_layout(name: str, dtypes: list[torch.dtype], device: str, **options: Any) -> list[Tensor]:
    """Two steps of tensors of these types that lie, and whose gradients lie, in every way."""
    cases = [(layout, dtype) for layout in LAYOUTS.values() for dtype in dtypes]
    params = [of_param(values(shape, dtype, 1).to(device)) for (shape, of_param, _), dtype in cases]
    optimizer = ours(name, params, **NUMBERS[name] | LIVELY[name] | options)
    for t in (2, 3):
        for p, ((shape, _, of_grad), dtype) in zip(params, cases, strict=True):
            p.grad = of_grad(values(shape, dtype, t).to(device))
        optimizer.step()
    return params


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_stochastic_rounding_in_every_layout(name: str, kernels: str) -> None:
    options: Options = {"stochastic_rounding": True, "weight_decay": 0.0}
    mine = steps_of_every_layout(name, [torch.bfloat16], kernels, **options)
    with tribp.use_backend("torch"):
        others = steps_of_every_layout(name, [torch.bfloat16], "cpu", **options)
    for layout, a, b in zip(LAYOUTS, mine, others, strict=True):
        assert torch.equal(a.cpu(), b), layout


@pytest.mark.parametrize("name", [*FUSED, "RMSprop", "NAdam"])
def test_other_types_than_bfloat16_are_rounded_to_nearest(name: str, device: str) -> None:
    """In every layout, also where torch's own code updates them: the option asks nothing of them."""
    dtypes = [dtype for dtype in DTYPES if dtype != torch.bfloat16]
    with_it = steps_of_every_layout(name, dtypes, device, stochastic_rounding=True)
    for a, b in zip(with_it, steps_of_every_layout(name, dtypes, device), strict=True):
        assert torch.equal(a, b)


@each_class
def test_a_state_dtype_leaves_complex_states_alone(name: str, device: str) -> None:
    """They stay complex: a moment of a complex parameter is no real number."""
    params = steps_of_every_layout(name, [torch.complex64], device, state_dtype=torch.float64)
    for a, b in zip(params, steps_of_every_layout(name, [torch.complex64], device), strict=True):
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


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam"])
def test_epsilon_inside_the_root(name: str, device: str) -> None:
    """Beside numpy; with ε as large as the moments, so that its place matters."""
    x, lr, eps = values((70,), torch.float64, 1), 0.1, 0.5
    p = x.to(device)
    optimizer = ours(name, [p], lr=lr, eps=eps, eps_inside_sqrt=True, weight_decay=0.0)
    w, m, v = x.numpy().copy(), np.zeros(70), np.zeros(70)
    product = np.float32(1)
    for t in range(1, 9 if name == "RAdam" else 4):  # whose root comes with the sixth step
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
            mean, root = m / (1 - 0.9**t), np.sqrt(v / (1 - 0.999**t) + eps)
            if name == "NAdam":
                mu, after = (0.9 * (1 - 0.96 ** (k * 4e-3) / 2) for k in (t, t + 1))
                product *= np.float32(mu)
                mean = (1 - mu) * d / (1 - float(product)) + after * m / (1 - float(product) * after)
            elif name == "RAdam":
                length = 1999 - 2 * t * 0.999**t / (1 - 0.999**t)
                r = np.sqrt(max(length - 4, 0) * (length - 2) * 1999 / (1995 * 1997 * length))
                root = np.sqrt(v + eps) / (r * np.sqrt(1 - 0.999**t)) if length > 5 else np.ones(70)
            w = w - lr * np.asarray(mean / root)
        np.testing.assert_allclose(p.cpu().numpy(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ema_decay": 1.0}, ValueError, "ema_decay"),
        ({"ema_decay": -0.1}, ValueError, "ema_decay"),
        ({"ema_decay": "0.9"}, ValueError, r"ema_decay must be a number in \[0, 1\), got '0\.9'"),
        *[
            ({"max_grad_norm": norm}, ValueError, "max_grad_norm must be a positive number, got")
            for norm in ("1", True, np.array([1.0, 2.0]), torch.ones(2))
        ],
        ({"stochastic_rounding": "no"}, ValueError, "stochastic_rounding must be True or False, got 'no'"),
        ({"state_bits": np.array([8, 8])}, ValueError, "state_bits must be 8 or None, got array"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm"),
        ({"state_dtype": torch.int32}, ValueError, "state_dtype"),
        ({"state_dtype": torch.complex64}, ValueError, "state_dtype"),
        ({"state_dtype": "float32"}, ValueError, "state_dtype"),
        *[({"seed": seed}, ValueError, "seed") for seed in (1.5, 3.0, "1", True, None, 2**64, -(2**63) - 1)],
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


def test_a_seed_of_numpys(device: str) -> None:
    """Any whole number, as torch.manual_seed takes it; it is kept as Python's."""
    found: list[Tensor] = []
    seeds: list[Any] = [3, np.int64(3)]
    for seed, in_group in itertools.product(seeds, [False, True]):
        p = torch.ones(40, dtype=torch.bfloat16, device=device)
        p.grad = torch.full_like(p, 2.0**-10)
        group, rest = ({"params": [p], "seed": seed}, {}) if in_group else ({"params": [p]}, {"seed": seed})
        optimizer = ours("SGD", [group], lr=1.0, stochastic_rounding=True, **rest)
        optimizer.step()
        assert type(optimizer.param_groups[0]["seed"]) is int
        found.append(p)
    assert all(torch.equal(p, found[0]) for p in found)


def test_options_that_a_class_has_not() -> None:
    for name in ("SGD", "Momentum"):
        with pytest.raises(TypeError, match="eps_inside_sqrt"):
            ours(name, [torch.ones(2)], eps_inside_sqrt=True)
    with pytest.raises(ValueError, match="AdamW: eps_inside_sqrt must be True or False, got 'no'"):
        ours("AdamW", [torch.ones(2)], eps_inside_sqrt="no")
    for beta in (1.0, -0.1, None, "0.9"):
        with pytest.raises(ValueError, match=r"beta must be a number in \[0, 1\), got"):
            tribp.optim.Momentum([torch.ones(2)], beta=beta)  # type: ignore[arg-type]
    for name in ("momentum", "dampening", "nesterov", "weigth_decay"):  # SGD's, and nobody's
        with pytest.raises(TypeError, match=rf"^Momentum\(\) got an unexpected keyword argument '{name}'$"):
            tribp.optim.Momentum([torch.ones(2)], **{name: True})  # type: ignore[arg-type]


def test_one_norm_has_one_limit(device: str) -> None:
    p, q = torch.ones(2, device=device, requires_grad=True), torch.ones(2, device=device, requires_grad=True)
    optimizer = tribp.optim.SGD([{"params": [p], "max_grad_norm": 1.0}, {"params": [q], "max_grad_norm": 2.0}])
    (p + q).sum().backward()
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()
