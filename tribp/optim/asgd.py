"""ASGD."""

from torch import Tensor
from torch.optim.asgd import ASGD as TorchASGD  # noqa: N811 (a class)
from torch.optim.asgd import asgd as torch_asgd
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FunctionRule, Group


class ASGDRule(FunctionRule):
    formula = staticmethod(reference.asgd)
    function = staticmethod(torch_asgd)
    lists = ("ax", "mu", "eta", "step")
    options = ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize")
    adds_eps_to_root = False
    piece = 1 << 20  # of three passes over memory, caches save less than smaller pieces cost
    scalar_states = ("eta", "mu")

    @classmethod
    def scalars_on_device(cls, group: Group) -> bool:
        return True

    def hyper(self, group: Group) -> reference.ASGDHyper:
        return reference.ASGDHyper(group["lambd"], group["alpha"], group["t0"])

    def new_scalar(self, group: Group, name: str) -> float:
        return float(group["lr"]) if name == "eta" else 1.0


class ASGD(Optimizer, TorchASGD):
    """`torch.optim.ASGD` in one kernel launch a step.

    θ ← (1 − λ·ηₜ)·θ − ηₜ·g with ηₜ₊₁ = lr/(1 + λ·lr·t)^α, and in `state[p]["ax"]` the average of θ from step t₀ on:
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992. Arguments, defaults and errors
    are torch's; tribp adds `fused` (True: the step does GradScaler's unscaling) and those in
    `tribp.optim.ExtraOptions`.
    """

    _rule = ASGDRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, fused=fused)):
            TorchASGD.__init__(
                self, params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable,
            )  # fmt: skip
