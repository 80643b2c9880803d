"""Adagrad."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adagrad import Adagrad as TorchAdagrad
from torch.optim.adagrad import adagrad as torch_adagrad
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import Beyond, Group, Optimizer
from .torch_buckets import Tensors, counter_dtype, torchs_fused
from .tracked_state import WatchedState


class Adagrad(Optimizer, TorchAdagrad):
    """`torch.optim.Adagrad` in one kernel launch a step.

    G ← G + g², θ ← θ − lr/(1 + (t − 1)·lr_decay) · g/(√G + ε): Duchi et al., "Adaptive Subgradient Methods for Online
    Learning and Stochastic Optimization", 2011. The form with ε inside the root is `eps_inside_sqrt=True`. Arguments,
    defaults and errors are torch's; `capturable` (CUDA graphs) is tribp's, and so are those in `tribp.optim.Beyond`.
    """

    _RULE = "adagrad"
    _KEYS = ("lr", "lr_decay", "eps", "weight_decay", "maximize")

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
        **beyond: Unpack[Beyond],
    ) -> None:
        self._switch_on(dict(beyond, capturable=capturable))
        TorchAdagrad.__init__(
            self, params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize=maximize,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._switched_on()
        for group in self.param_groups:
            for p in group["params"]:
                if not (group["fused"] or self.state[p]["step"].is_cpu):  # torch makes it on the default device
                    self.state[p]["step"] = self.state[p]["step"].new_zeros((), device="cpu")
                if group.get("state_dtype") and not p.is_complex():
                    self.state[p]["sum"] = self._new_state(p, "sum", group["state_dtype"])
        for p, state in self.state.items():
            self.state[p] = WatchedState(state)  # nobody has been given one yet

    def _names(self, group: Group) -> tuple[str | None, ...]:
        return "sum", None, None

    def _new_state(self, p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        value = self.defaults["initial_accumulator_value"]
        start = complex(value, value) if p.is_complex() else value
        return torch.full_like(p, start, dtype=dtype, memory_format=torch.preserve_format)

    def _own_values(self, group: Group) -> Sequence[float | Tensor]:
        return (group["lr_decay"],)

    def _fused_on_cpu(self, group: Group, dtype: torch.dtype) -> bool:
        return dtype != torch.float16  # in which torch's kernel rounds ε to 0

    def _fused_update(self, group: Group, t: Tensors) -> None:
        torch._fused_adagrad_(
            t.params, t.grads, t.states[0], t.steps, lr=group["lr"], lr_decay=group["lr_decay"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip

    def _torch_update(self, group: Group, prepare: Callable[[list[Tensor]], list[Tensor]]) -> None:
        for p in group["params"]:  # of groups that were added late: torch 2.11 makes no states for those
            if not self.state.get(p):
                self.state[p]["step"] = torch.zeros((), dtype=counter_dtype(bool(group["fused"])), device="cpu")
                self.state[p]["sum"] = self._new_state(p, "sum", p.dtype)
        (has_sparse_grad, has_complex), lists = self._gathered(group, 4)
        params, grads, sums, steps = lists
        torch_adagrad(
            params, prepare(grads), sums, steps, has_sparse_grad=has_sparse_grad, foreach=group["foreach"],
            differentiable=group["differentiable"], has_complex=has_complex, lr=group["lr"],
            weight_decay=group["weight_decay"], lr_decay=group["lr_decay"], eps=group["eps"],
            maximize=group["maximize"], fused=torchs_fused(group, steps),
        )  # fmt: skip
