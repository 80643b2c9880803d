"""SGD, and Momentum, its form with a moving average of the gradients."""

from itertools import compress

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import SGD as TorchSGD  # noqa: N811 (a class)
from torch.optim.sgd import sgd as torch_sgd
from typing_extensions import Unpack

from . import reference
from .optimizer import Optimizer
from .options import ExtraOptions, enable_options, satisfy
from .rule import FusedTensors, Group, Prepare, Rule, init_group


class SGDRule(Rule):
    formula = staticmethod(reference.sgd)
    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    optional_states = ("momentum_buffer",)
    squares = ()
    counts_steps = False
    adds_eps_to_root = False

    def states(self, group: Group) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] != 0 else None,)

    def hyper(self, group: Group) -> reference.SGDHyper:
        return reference.SGDHyper(group["momentum"], group["dampening"], float(group["nesterov"]))

    def fused_on_cpu(self, group: Group, dtype: torch.dtype) -> bool:
        # In 16 bits torch's kernel skips whole vectors (pytorch #191763).
        return dtype in (torch.float32, torch.float64)

    def fused_update(self, arguments: Group, t: FusedTensors) -> None:
        if len(t.params) == 1 and not t.states and not arguments["weight_decay"]:
            # Measured on two cores, 1 to 16 M elements: faster than the fused kernel. For 1,000 tensors of 8 that one
            # takes a third of torch._foreach_add_'s time, for large ones as long.
            lr = float(arguments["lr"])
            t.params[0].add_(t.grads[0], alpha=lr if arguments["maximize"] else -lr)
            return

        def update(chosen: list[bool] | None, first: bool) -> None:
            params, grads, *states = (
                x if chosen is None else list(compress(x, chosen)) for x in (t.params, t.grads, *t.states)
            )
            if params:
                torch._fused_sgd_(params, grads, states[0] if states else [], is_first_step=first, **arguments)

        if t.fresh is None:
            update(None, False)
        else:
            update(t.fresh, True)
            update([not fresh for fresh in t.fresh], False)

    def torch_update(self, optimizer: torch.optim.Optimizer, group: Group, prepare: Prepare) -> None:
        has_sparse_grad, (params, grads, buffers) = init_group(optimizer, group, 3)
        torch_sgd(
            params, prepare(grads), buffers, has_sparse_grad=has_sparse_grad, foreach=group["foreach"],
            **self.arguments(group),
        )  # fmt: skip
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                optimizer.state[p]["momentum_buffer"] = buffer


class SGD(Optimizer, TorchSGD):
    """`torch.optim.SGD` in one kernel launch a step.

    b ← μ·b + (1 − τ)·g (the first time b ← g), θ ← θ − lr·b, or Nesterov's θ ← θ − lr·(g + μ·b): Sutskever et al., "On
    the importance of initialization and momentum in deep learning", 2013, in torch's form. Arguments, defaults and
    errors are torch's; tribp adds `capturable` (CUDA graphs) and those in `tribp.optim.ExtraOptions`.
    """

    _rule = SGDRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        with self._enabled(dict(extra, capturable=capturable)):
            TorchSGD.__init__(
                self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach,
                differentiable=differentiable, fused=fused,
            )  # fmt: skip


class Momentum(SGD):
    """Gradient descent along the exponential moving average of the gradients.

    v₁ = g₁, v ← β·v + (1 − β)·g, θ ← θ − lr·v: `torch.optim.SGD(momentum=β, dampening=β)`, whose checkpoints it shares.
    The dampening follows the momentum, also where a scheduler (OneCycleLR) moves that.

    beta: β in [0, 1). The other arguments are SGD's. Raises ValueError for a beta outside.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        if not satisfy(lambda: 0.0 <= beta < 1.0):
            raise ValueError(f"beta must be a number in [0, 1), got {beta!r}")
        enable_options({**extra}, "Momentum")  # or SGD would take its own for an option
        super().__init__(
            params, lr, beta, beta, weight_decay, maximize=maximize, foreach=foreach, differentiable=differentiable,
            fused=fused, capturable=capturable, **extra,
        )  # fmt: skip

    def _before_step(self) -> None:
        for group in self.param_groups:
            group["dampening"] = group["momentum"]
