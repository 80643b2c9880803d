"""RMSprop."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.rmsprop import RMSprop as TorchRMSprop
from torch.optim.rmsprop import rmsprop as torch_rmsprop
from typing_extensions import Unpack

from . import reference
from .layouts import PLAIN, as_reals
from .optimizer import Optimizer
from .options import ExtraOptions
from .rule import FusedTensors, Group, Prepare, Rule, check_fused, init_group


class RMSpropRule(Rule):
    formula = staticmethod(reference.rmsprop)
    options = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
    optional_states = ("momentum_buffer", "grad_avg")
    squares = ("square_avg",)
    needs_scratch = True

    def states(self, group: Group) -> tuple[str | None, ...]:
        momentum, centered = group["momentum"] > 0, group["centered"]
        return "square_avg", "momentum_buffer" if momentum else None, "grad_avg" if centered else None

    def uncoded(self, group: Group) -> tuple[str, ...]:
        return ("square_avg", "grad_avg") if group["centered"] else ()  # v − ḡ² of codes is 0 as often as not

    def hyper(self, group: Group) -> reference.RMSpropHyper:
        return reference.RMSpropHyper(group["alpha"], group["momentum"], float(group["centered"]))

    def fused_on_cpu(self, group: Group, dtype: torch.dtype) -> bool:
        return (
            dtype in (torch.float32, torch.float64)
            and self.states(group)[1:] == (None, None)
            and group["alpha"] < 1 - 4e-8
        )

    def fused_arguments(self, group: Group) -> Group:
        """Of Adam: torch has no fused RMSprop, but plain RMSprop is Adam late in its life, with β₁ = 0."""
        own = super().fused_arguments(group)
        shared = {name: own[name] for name in ("lr", "eps", "weight_decay", "maximize")}
        return {**shared, "beta1": 0.0, "beta2": own["alpha"], "amsgrad": False}

    def fused_update(self, arguments: Group, t: FusedTensors) -> None:
        torch._fused_adam_(t.params, t.grads, t.scratch, t.states[0], [], t.steps, **arguments)

    def torch_update(self, optimizer: torch.optim.Optimizer, group: Group, prepare: Prepare) -> None:
        check_fused(group)
        has_complex, lists = init_group(optimizer, group, 6)
        params, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
        grads = prepare(grads)
        if has_complex:
            grads = [grad.resolve_conj() for grad in grads]  # as pairs of reals they are seen below
        # Three times as fast on the CPU for many small tensors; large ones would double torch's memory.
        together = sum(p.numel() for p in params) <= 1 << 20 and len(set(map(id, params))) == len(params)
        together &= group["foreach"] is not False  # as those have it, in turn, that share memory
        if group["centered"] and not (group["differentiable"] or group["capturable"]):
            torch._foreach_add_(steps, 1)
            lists = [params, grads, square_avgs, grad_avgs, momentum_buffers]
            lists = [[as_reals(t) for t in tensors] for tensors in lists]
            for some in [slice(None)] if together else [slice(k, k + 1) for k in range(len(params))]:
                _centered(group, *(tensors[some] for tensors in lists))
            return
        foreach = group["foreach"]
        if foreach is None and not group["differentiable"] and together:
            foreach = all(type(p) in PLAIN and p.device.type == "cpu" for p in params) or None
        torch_rmsprop(
            params, grads, square_avgs, grad_avgs, momentum_buffers, steps, has_complex=has_complex, foreach=foreach,
            differentiable=group["differentiable"], capturable=group["capturable"], **self.arguments(group),
        )  # fmt: skip


def _centered(
    group: Group, params: list[Tensor], grads: list[Tensor] | tuple[Tensor, ...], square_avgs: list[Tensor],
    grad_avgs: list[Tensor], buffers: list[Tensor],
) -> None:  # fmt: skip
    """torch's update, but for the variance v − ḡ²: where rounding makes it negative torch has a NaN, and this 0."""
    if group["maximize"]:
        grads = torch._foreach_neg(grads)
    if group["weight_decay"]:
        grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    alpha, lr = group["alpha"], float(group["lr"])
    torch._foreach_mul_(square_avgs, alpha)
    torch._foreach_addcmul_(square_avgs, grads, grads, value=1 - alpha)
    torch._foreach_lerp_(grad_avgs, grads, 1 - alpha)
    variances = torch._foreach_addcmul(square_avgs, grad_avgs, grad_avgs, value=-1)
    torch._foreach_clamp_min_(variances, 0)
    torch._foreach_sqrt_(variances)
    torch._foreach_add_(variances, group["eps"])
    if group["momentum"] > 0:
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_addcdiv_(buffers, grads, variances)
        torch._foreach_add_(params, buffers, alpha=-lr)
    else:
        torch._foreach_addcdiv_(params, grads, variances, value=-lr)


class RMSprop(Optimizer, TorchRMSprop):
    """`torch.optim.RMSprop` in one kernel launch a step.

    v ← α·v + (1 − α)·g², θ ← θ − lr·g/(√v + ε): Hinton, lecture 6 of "Neural Networks for Machine Learning", 2012. With
    `centered` v − ḡ² takes the place of v (Graves, "Generating Sequences With Recurrent Neural Networks", 2013), and
    with `momentum` b ← μ·b + g/(√v + ε) takes the place of the fraction. Arguments, defaults and errors are torch's;
    tribp adds `fused` (True: the step does GradScaler's unscaling) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = RMSpropRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, fused=fused)):
            TorchRMSprop.__init__(
                self, params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize,
                differentiable,
            )  # fmt: skip
