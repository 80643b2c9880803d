"""NAdam."""

from torch import Tensor
from torch.optim.nadam import NAdam as TorchNAdam
from torch.optim.nadam import nadam as torch_nadam
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FunctionRule, Group


class NAdamRule(FunctionRule):
    formula = staticmethod(reference.nadam)
    function = staticmethod(torch_nadam)
    lists = ("exp_avg", "exp_avg_sq", "mu_product", "step")
    options = ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "maximize")
    scalar_states = ("mu_product",)

    def hyper(self, group: Group) -> reference.NAdamHyper:
        beta1, beta2 = group["betas"]
        return reference.NAdamHyper(beta1, beta2, group["momentum_decay"])


class NAdam(Optimizer, TorchNAdam):
    """`torch.optim.NAdam` in one kernel launch a step.

    Adam with Nesterov's momentum: θ ← θ − lr·((1 − μₜ)·g/(1 − Πμ) + μₜ₊₁·m/(1 − μₜ₊₁·Πμ))/(√v̂ + ε), where μₜ = β₁·(1 −
    0.96^(t·momentum_decay)/2) and Πμ is the product of all so far: Dozat, "Incorporating Nesterov Momentum into Adam",
    2016. With `decoupled_weight_decay` θ ← θ − lr·λ·θ in place of an L2 penalty. Arguments, defaults and errors are
    torch's; tribp adds `fused` (True: the step does GradScaler's unscaling) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = NAdamRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            TorchNAdam.__init__(
                self, params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, foreach=foreach,
                maximize=maximize, capturable=capturable, differentiable=differentiable,
            )  # fmt: skip
