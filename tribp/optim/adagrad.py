"""Adagrad."""

import torch
from torch import Tensor
from torch.optim.adagrad import Adagrad as TorchAdagrad
from torch.optim.adagrad import adagrad as torch_adagrad
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import reference
from .codes import RESIDUAL
from .optimizer import Optimizer
from .options import ExtraOptions, compresses, keeps_residual
from .rule import FusedTensors, Group, Prepare, Rule, counter_dtype, full_state, fused_argument, init_group
from .tracked_state import WatchedState


class AdagradRule(Rule):
    formula = staticmethod(reference.adagrad)
    options = ("lr", "lr_decay", "eps", "weight_decay", "maximize")
    squares = ("sum",)

    def states(self, group: Group) -> tuple[str | None, ...]:
        return ("sum",)

    def new_state(self, group: Group, p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return full_state(p, self.defaults["initial_accumulator_value"], dtype)

    def hyper(self, group: Group) -> reference.AdagradHyper:
        return reference.AdagradHyper(group["lr_decay"])

    def fused_on_cpu(self, group: Group, dtype: torch.dtype) -> bool:
        return dtype != torch.float16  # in which torch's kernel rounds ε to 0

    def fused_update(self, arguments: Group, t: FusedTensors) -> None:
        torch._fused_adagrad_(t.params, t.grads, t.states[0], t.steps, **arguments)

    def torch_update(self, optimizer: torch.optim.Optimizer, group: Group, prepare: Prepare) -> None:
        for p in group["params"]:  # of groups that were added late: torch 2.11 makes no states for those
            if not optimizer.state.get(p):
                optimizer.state[p]["step"] = torch.zeros((), dtype=counter_dtype(bool(group["fused"])), device="cpu")
                optimizer.state[p]["sum"] = self.new_state(group, p, "sum", p.dtype)
        (has_sparse_grad, has_complex), (params, grads, sums, steps) = init_group(optimizer, group, 4)
        torch_adagrad(
            params, prepare(grads), sums, steps, has_sparse_grad=has_sparse_grad, has_complex=has_complex,
            foreach=group["foreach"], differentiable=group["differentiable"], fused=fused_argument(group, steps),
            **self.arguments(group),
        )  # fmt: skip


class Adagrad(Optimizer, TorchAdagrad):
    """`torch.optim.Adagrad` in one kernel launch a step.

    G ← G + g², θ ← θ − lr/(1 + (t − 1)·lr_decay) · g/(√G + ε): Duchi et al., "Adaptive Subgradient Methods for Online
    Learning and Stochastic Optimization", 2011. The form with ε inside the root is `eps_inside_sqrt=True`. Arguments,
    defaults and errors are torch's; tribp adds `capturable` (CUDA graphs) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = AdagradRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, capturable=capturable)):
            TorchAdagrad.__init__(
                self, params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize=maximize,
                differentiable=differentiable, fused=fused,
            )  # fmt: skip
        rule = self._rule(self.defaults)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not (group["fused"] or state["step"].is_cpu):  # torch makes it on the default device
                    state["step"] = state["step"].new_zeros((), device="cpu")
                # What a checkpoint holds, in its types: torch.distributed.checkpoint loads what a new optimizer has.
                dtype = torch.float32 if compresses(group, p) else group.get("state_dtype")
                if dtype and not p.is_complex():
                    state["sum"] = rule.new_state(group, p, "sum", dtype)
                if keeps_residual(group, p):
                    state[RESIDUAL] = torch.zeros_like(p, dtype=torch.int8)
                if group.get("ema_decay"):
                    state["ema"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                    state["ema_step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for p, state in self.state.items():
            self.state[p] = WatchedState(state)  # nobody has been given one yet
