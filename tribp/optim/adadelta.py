"""Adadelta."""

from torch import Tensor
from torch.optim.adadelta import Adadelta as TorchAdadelta
from torch.optim.adadelta import adadelta as torch_adadelta
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FunctionRule, Group


class AdadeltaRule(FunctionRule):
    formula = staticmethod(reference.adadelta)
    function = staticmethod(torch_adadelta)
    lists = ("square_avg", "acc_delta", "step")
    options = ("lr", "rho", "eps", "weight_decay", "maximize")
    adds_eps_to_root = False  # it is inside already

    def hyper(self, group: Group) -> reference.AdadeltaHyper:
        return reference.AdadeltaHyper(group["rho"])


class Adadelta(Optimizer, TorchAdadelta):
    """`torch.optim.Adadelta` in one kernel launch a step.

    v ← ρ·v + (1 − ρ)·g², Δ = √(u + ε)/√(v + ε)·g, u ← ρ·u + (1 − ρ)·Δ², θ ← θ − lr·Δ: Zeiler, "ADADELTA: An Adaptive
    Learning Rate Method", 2012. Arguments, defaults and errors are torch's; tribp adds `fused` (True: the step does
    GradScaler's unscaling) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = AdadeltaRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, fused=fused)):
            TorchAdadelta.__init__(
                self, params, lr, rho, eps, weight_decay, foreach, capturable=capturable, maximize=maximize,
                differentiable=differentiable,
            )  # fmt: skip
