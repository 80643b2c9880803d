"""RAdam."""

from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.radam import RAdam as TorchRAdam
from torch.optim.radam import radam as torch_radam
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FunctionRule, Group


class RAdamRule(FunctionRule):
    formula = staticmethod(reference.radam)
    function = staticmethod(torch_radam)
    lists = ("exp_avg", "exp_avg_sq", "step")
    options = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")

    def hyper(self, group: Group) -> reference.BetasHyper:
        return reference.BetasHyper(*group["betas"])


class RAdam(Optimizer, TorchRAdam):
    """`torch.optim.RAdam` in one kernel launch a step.

    Adam whose steps are scaled by r, which rectifies the variance of 1/√v; until that can be computed, steps follow the
    momentum alone: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020. With
    `decoupled_weight_decay` θ ← θ − lr·λ·θ in place of an L2 penalty. Arguments, defaults and errors are torch's; tribp
    adds `fused` (True: the step does GradScaler's unscaling) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = RAdamRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, fused=fused)):
            TorchRAdam.__init__(
                self, params, lr, betas, eps, weight_decay, decoupled_weight_decay, foreach=foreach,
                maximize=maximize, capturable=capturable, differentiable=differentiable,
            )  # fmt: skip
