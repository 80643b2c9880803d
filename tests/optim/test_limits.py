"""The optimizers where arithmetic ends: variances that rounding makes negative, an ε that float16 does not hold."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp.optim

from . import cases
from .cases import DTYPES, NUMBERS, VARIANTS, Options, channels_last, gaps, ours, plain, shifted, title, values

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- centered RMSprop divides by the root of v − ḡ²: a variance, and 0 where all gradients were alike


def number(x: float, like: Tensor) -> Any:
    return complex(x, x) if like.is_complex() else x


def centered(params: list[Tensor], **options: Any) -> Any:
    """An optimizer whose moments a gradient of 1 makes v = 0.91 and ḡ = 1, so that v − ḡ² < 0. Parameters are 1."""
    optimizer = tribp.optim.RMSprop(params, lr=0.25, alpha=0.9, eps=0.25, centered=True, **options)
    for p in params:
        p.grad = torch.full_like(p, number(1, p))
    optimizer.step()
    for p in params:
        p.fill_(number(1, p))
        for name, value in dict(square_avg=0.9, grad_avg=1.0, momentum_buffer=0.0).items():
            if name in optimizer.state[p]:
                optimizer.state[p][name].fill_(number(value, p))
    return optimizer


CENTERED: dict[str, Options] = {
    "": {},
    "momentum": {"momentum": 0.5},
    "eps_inside_sqrt": {"eps_inside_sqrt": True},
    "state_dtype": {"state_dtype": torch.float64},
    "momentum and eps_inside_sqrt": {"momentum": 0.5, "eps_inside_sqrt": True},
}


def check_the_step(p: Tensor, options: Options) -> None:
    """θ ← θ − η·g/ε with η = ε = 1/4, or θ − η·g/√ε."""
    step = 0.5 if options.get("eps_inside_sqrt") else 1.0
    assert torch.equal(p, torch.full_like(p, number(1 - step, p))), p.dtype


@pytest.mark.parametrize("options", CENTERED)
def test_a_variance_is_never_negative(options: str, device: str) -> None:
    params = [torch.ones(3, dtype=dtype, device=device) for dtype in DTYPES]
    optimizer = centered(params, **CENTERED[options])
    optimizer.step()
    for p in params:
        check_the_step(p, CENTERED[options])


@pytest.mark.parametrize("options", ["", "momentum"])
def test_a_variance_of_a_large_tensor_is_never_negative(options: str) -> None:
    """The fallback takes such ones one by one."""
    params = [torch.ones((1 << 19) + 1) for _ in range(2)]
    centered(params, **CENTERED[options]).step()
    for p in params:
        check_the_step(p, CENTERED[options])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's, and meant
@pytest.mark.parametrize("options", CENTERED)
def test_a_variance_that_is_not_a_number_is_seen(options: str, device: str) -> None:
    """0 for what is negative, not for what went wrong."""
    params = [torch.ones(3, dtype=dtype, device=device) for dtype in DTYPES if not dtype.is_complex]
    optimizer = centered(params, **CENTERED[options])
    for p in params:
        p.grad = torch.tensor([math.nan, math.inf, 1.0], dtype=p.dtype, device=device)
    optimizer.step()
    for p in params:
        assert p.isnan().tolist() == [True, True, False], p.dtype


@pytest.mark.parametrize("count", [1, 8])
def test_a_variance_beyond_float32(count: int) -> None:
    """∞ − ḡ² is ∞ where ḡ² alone would be ∞ too: parameters stay, as torch's do."""
    params = [torch.ones(3) for _ in range(count)]
    for p in params:
        p.grad = torch.full_like(p, 1e25)
    optimizer = ours("RMSprop", params, centered=True)
    for _ in range(2):
        optimizer.step()
    for p in params:
        assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("foreach", [None, False])
def test_a_constant_gradient(foreach: bool | None) -> None:
    """α = 0.9: from some step on rounding makes the variances of half the parameters negative."""
    p, g = torch.zeros(512), values((512,), torch.float32, 1)
    optimizer = tribp.optim.RMSprop([p], lr=1e-3, alpha=0.9, centered=True, foreach=foreach)
    for _ in range(300):
        p.grad = g.clone()
        optimizer.step()
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("name", cases.TORCHS)
def test_a_rate_without_end(name: str) -> None:
    """Where nothing decays, ∞ · 0 decays nothing."""
    p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    for make, param in ((ours, p), (cases.genuine, q)):
        optimizer = make(name, [param], lr=math.inf)
        for sign in (1, -1):
            param.grad = sign * torch.tensor([0.5, -0.5, 0.25])
            optimizer.step()
    assert torch.equal(p.isnan(), q.isnan())
    assert torch.equal(p.nan_to_num(0), q.nan_to_num(0))


# ---- 1e-8 is 0 in float16

LAYOUTS = [(plain, plain), (gaps, gaps), (plain, gaps), (shifted, plain), (channels_last, channels_last)]


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_gradients_of_zero_in_16_bits(variant: tuple[str, Options], device: str) -> None:
    """… move nothing, with torch's own ε; of 70 elements, some are in torch's vectors and some behind them."""
    name, own = variant
    cases = [(dtype, *layouts) for dtype in (torch.float16, torch.bfloat16) for layouts in LAYOUTS]
    params = [of_p(torch.ones(2, 5, 7, 1, dtype=dtype, device=device)) for dtype, of_p, _ in cases]
    decay: Options = {"AdamW": {"weight_decay": 0.0}, "ASGD": {"lambd": 0.0}}.get(name, {})
    optimizer = ours(name, params, **{"lr": NUMBERS[name]["lr"], **own, **decay})
    for _ in range(2):
        for p, (dtype, _, of_g) in zip(params, cases, strict=True):
            p.grad = of_g(torch.zeros(2, 5, 7, 1, dtype=dtype, device=device))
        optimizer.step()
    for p, case in zip(params, cases, strict=True):
        assert torch.equal(p, torch.ones_like(p)), case


# ---- what autograd keeps of parameters


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Rprop"])
def test_a_graph_from_before_a_step_is_refused(name: str, count: int, device: str) -> None:
    """It would be differentiated at the new parameters. (10 small ones: torch's code is not what updates them.)"""
    params = [torch.nn.Parameter(torch.ones(2, device=device)) for _ in range(count)]
    optimizer = getattr(tribp.optim, name)(params, lr=0.1)
    for _ in range(2):
        loss = torch.stack([p.square().sum() for p in params]).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "ASGD"])
def test_whole_numbers_are_torchs_business(name: str) -> None:
    """Also beside enough small tensors that those are updated together."""
    p = torch.nn.Parameter(torch.full((3,), 100), requires_grad=False)
    p.grad = torch.ones_like(p)
    others = [torch.nn.Parameter(torch.ones(2)) for _ in range(8)]
    refusals: list[str] = []
    for module in (torch.optim, tribp.optim):
        try:
            getattr(module, name)([p, *others], lr=0.1).step()
        except RuntimeError as error:
            refusals.append(str(error).splitlines()[0])
    assert len(set(refusals)) == 1
    assert len(refusals) == 2
