"""Adamax."""

from torch import Tensor
from torch.optim.adamax import Adamax as TorchAdamax
from torch.optim.adamax import adamax as torch_adamax
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FunctionRule, Group


class AdamaxRule(FunctionRule):
    formula = staticmethod(reference.adamax)
    function = staticmethod(torch_adamax)
    lists = ("exp_avg", "exp_inf", "step")
    options = ("lr", "betas", "eps", "weight_decay", "maximize")
    adds_eps_to_root = False

    def hyper(self, group: Group) -> reference.BetasHyper:
        return reference.BetasHyper(*group["betas"])


class Adamax(Optimizer, TorchAdamax):
    """`torch.optim.Adamax` in one kernel launch a step.

    m ← β₁·m + (1 − β₁)·g, u ← max(β₂·u, |g| + ε), θ ← θ − lr/(1 − β₁ᵗ)·m/u: Kingma and Ba, "Adam: A Method for
    Stochastic Optimization", 2015, section 7.1. Arguments, defaults and errors are torch's; tribp adds `fused` (True:
    the step does GradScaler's unscaling) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = AdamaxRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, fused=fused)):
            TorchAdamax.__init__(
                self, params, lr, betas, eps, weight_decay, foreach, maximize=maximize,
                differentiable=differentiable, capturable=capturable,
            )  # fmt: skip
