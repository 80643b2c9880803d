"""Adam and AdamW."""

import torch
from torch import Tensor
from torch.optim.adam import Adam as TorchAdam
from torch.optim.adam import adam as torch_adam
from torch.optim.adamw import AdamW as TorchAdamW
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FusedTensors, Group, Prepare, Rule, fused_argument, init_group


class AdamRule(Rule):
    formula = staticmethod(reference.adam)
    options = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
    optional_states = ("max_exp_avg_sq",)
    squares = ("exp_avg_sq", "max_exp_avg_sq")

    def states(self, group: Group) -> tuple[str | None, ...]:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None

    def hyper(self, group: Group) -> reference.BetasHyper:
        return reference.BetasHyper(*group["betas"])

    def fused_on_cpu(self, group: Group, dtype: torch.dtype) -> bool:
        return True

    def fused_update(self, arguments: Group, t: FusedTensors) -> None:
        run = torch._fused_adamw_ if arguments.get("decoupled_weight_decay") else torch._fused_adam_
        exp_avgs, exp_avg_sqs, *maxima = t.states
        run(
            t.params, t.grads, exp_avgs, exp_avg_sqs, maxima[0] if maxima else [], t.steps,
            lr=arguments["lr"], beta1=arguments["beta1"], beta2=arguments["beta2"], eps=arguments["eps"],
            weight_decay=arguments["weight_decay"], amsgrad=arguments["amsgrad"], maximize=arguments["maximize"],
        )  # fmt: skip

    def torch_update(self, optimizer: torch.optim.Optimizer, group: Group, prepare: Prepare) -> None:
        has_complex, (params, grads, exp_avgs, exp_avg_sqs, maxima, steps) = init_group(optimizer, group, 6)
        torch_adam(
            params, prepare(grads), exp_avgs, exp_avg_sqs, maxima, steps, has_complex=has_complex,
            foreach=group["foreach"], capturable=group["capturable"], differentiable=group["differentiable"],
            fused=fused_argument(group, steps), **self.arguments(group),
        )  # fmt: skip


class Adam(Optimizer, TorchAdam):
    """`torch.optim.Adam` in one kernel launch a step.

    m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − lr·m̂/(√v̂ + ε) with m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ):
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Arguments, defaults and errors are torch's; for
    the keyword arguments beyond them see `tribp.optim.ExtraOptions`.
    """

    _rule = AdamRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra)):
            TorchAdam.__init__(
                self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
                capturable=capturable, differentiable=differentiable, fused=fused,
                decoupled_weight_decay=decoupled_weight_decay,
            )  # fmt: skip


class AdamW(Adam, TorchAdamW):
    """`torch.optim.AdamW` in one kernel launch a step: Adam with θ ← θ − lr·λ·θ in place of an L2 penalty.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra)):
            TorchAdamW.__init__(
                self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
                capturable=capturable, differentiable=differentiable, fused=fused,
            )  # fmt: skip
