"""Rprop."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.rprop import Rprop as TorchRprop
from torch.optim.rprop import rprop as torch_rprop
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FunctionRule, Group, Number, full_state


class RpropRule(FunctionRule):
    formula = staticmethod(reference.rprop)
    function = staticmethod(torch_rprop)
    lists = ("prev", "step_size", "step")
    options = ("lr", "etas", "step_sizes", "maximize")
    adds_eps_to_root = False

    def hyper(self, group: Group) -> reference.RpropHyper:
        return reference.RpropHyper(*group["etas"], *group["step_sizes"])

    def decays(self, group: Group) -> tuple[Number, Number]:
        return 0.0, 0.0  # torch has none here, whatever a group holds

    def new_state(self, group: Group, p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return full_state(p, float(group["lr"]) if name == "step_size" else 0.0, dtype)

    def arguments(self, group: Group) -> Group:
        return {**self.hyper(group)._asdict(), "maximize": group["maximize"]}


class Rprop(Optimizer, TorchRprop):
    """`torch.optim.Rprop` in one kernel launch a step.

    Every element has a step size δ, lr at first, multiplied by η⁺ while its gradient keeps its sign and by η⁻ when that
    changes; θ ← θ − δ·sign(g), except where it has just changed: Riedmiller and Braun, "A direct adaptive method for
    faster backpropagation learning: the RPROP algorithm", 1993. Arguments, defaults and errors are torch's; tribp adds
    `fused` (True: the step does GradScaler's unscaling) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = RpropRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, fused=fused)):
            TorchRprop.__init__(
                self, params, lr, etas, step_sizes, capturable=capturable, foreach=foreach, maximize=maximize,
                differentiable=differentiable,
            )  # fmt: skip
