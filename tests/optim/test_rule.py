"""A new optimizer, of what docs/write-an-optimizer.md asks for and nothing else: by kernels and by its formula."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tribp.optim.optimizer import Optimizer
from tribp.optim.rule import Group, Rule

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from tribp.kernels import optim_rules  # noqa: E402
from tribp.kernels.optim_rules import hyper  # noqa: E402


class FiveHyper(NamedTuple):
    """More than any class has."""

    keep: float
    take: float
    of_state: float
    of_gradient: float
    of_step: float


def five(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, eps: float, h: FiveHyper, t: float, eps_inside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    m = h.keep * m + h.take * g
    v = torch.maximum(v, m.abs())
    return p - lr * (h.of_state * m + h.of_gradient * g + h.of_step * t * v), m, v


@triton.jit
def five_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):  # type: ignore[no-untyped-def]
    keep = hyper(h, HYPER.keep, CONFIG)
    take = hyper(h, HYPER.take, CONFIG)
    of_state = hyper(h, HYPER.of_state, CONFIG)
    of_gradient = hyper(h, HYPER.of_gradient, CONFIG)
    of_step = hyper(h, HYPER.of_step, CONFIG) * step
    ACC: tl.constexpr = CONFIG.ACC
    return keep.to(ACC), take.to(ACC), of_state.to(ACC), of_gradient.to(ACC), of_step.to(ACC)


@triton.jit
def five_on_device(p, g, m, v, unused, lr, eps, s, CONFIG: tl.constexpr):  # type: ignore[no-untyped-def]
    keep, take, of_state, of_gradient, of_step = s
    m = keep * m + take * g
    v = tl.maximum(v, tl.abs(m))
    return p - lr * (of_state * m + of_gradient * g + of_step * v), m, v, unused


class FiveRule(Rule):
    formula = staticmethod(five)
    options = ("lr", "weight_decay", "maximize", "five")

    def states(self, group: Group) -> tuple[str | None, ...]:
        return "m", "v"

    def hyper(self, group: Group) -> FiveHyper:
        return FiveHyper(*group["five"])


class Five(Optimizer):
    _rule = FiveRule

    def __init__(self, params: Any, lr: float, five: Sequence[float | Tensor], **extra: Any) -> None:
        with self._enabled(extra):
            torch.optim.Optimizer.__init__(self, params, dict(lr=lr, weight_decay=0.1, maximize=False, five=five))


@pytest.mark.parametrize("tensor", [False, True], ids=["numbers", "one tensor"])
def test_an_optimizer_of_its_own(tensor: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_rules, "five", five_on_device, raising=False)
    monkeypatch.setattr(optim_rules, "five_scalars", five_scalars, raising=False)
    numbers = FiveHyper(0.9, 0.3, 1.5, 0.25, 0.125)
    last = torch.tensor(numbers.of_step, dtype=torch.float64, device=device) if tensor else numbers.of_step
    params = [torch.linspace(-1, 1, n, device=device).requires_grad_() for n in (70, 5)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.2), strict=True)]
    optimizer = Five(groups, 0.0, (*numbers[:4], last), state_dtype=torch.float64)  # no option of torch's own code
    p, lr = params[1], 0.2
    x, m, v = p.detach().double(), *(torch.zeros(5, dtype=torch.float64, device=device) for _ in range(2))
    for t in (1, 2, 3):
        for q in params:
            q.grad = torch.cos(t + torch.arange(float(len(q)), device=device))
        g = torch.cos(t + torch.arange(5.0, device=device)).double()
        x, m, v = five(x, g + 0.1 * x, m, v, lr, 0.0, numbers, t, False)
        x = x.float().double()
        optimizer.step()
    state = optimizer.state[p]
    assert float(state["step"]) == 3
    for result, exact in zip((p, state["m"], state["v"]), (x, m, v), strict=True):
        torch.testing.assert_close(result.detach().double(), exact, rtol=1e-6, atol=1e-6)
