"""The optimizers' formulas in plain torch: for tensors that no kernel takes, and as the kernels' documentation.

A formula takes a parameter p (already decayed), its gradient g (scaled, clipped, signed, decayed), its states, None for
one that is not used, lr, ε, the rule's own hyperparameters h, this step's number t, 1 for the first, and whether ε
stands inside the root. It returns p and the states anew. All tensors have one type.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _denominator(square: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return (square + eps).sqrt() if eps_inside else square.sqrt() + eps


class SGDHyper(NamedTuple):
    momentum: float
    dampening: float
    nesterov: float  # 0 or 1


def sgd(
    p: Tensor, g: Tensor, buf: Tensor | None, lr: float, eps: float, h: SGDHyper, t: float, eps_inside: bool
) -> tuple[Tensor, Tensor | None]:
    """b ← μ·b + (1 − τ)·g, the first time b ← g; θ ← θ − η·b, with Nesterov's θ ← θ − η·(g + μ·b)."""
    if buf is None:
        return p - lr * g, None
    buf = g if t == 1 else h.momentum * buf + (1 - h.dampening) * g
    return p - lr * (g + h.momentum * buf if h.nesterov else buf), buf


class RMSpropHyper(NamedTuple):
    alpha: float
    momentum: float
    centered: float  # 0 or 1


def rmsprop(
    p: Tensor, g: Tensor, square_avg: Tensor, buf: Tensor | None, grad_avg: Tensor | None,
    lr: float, eps: float, h: RMSpropHyper, t: float, eps_inside: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """v ← α·v + (1 − α)·g², ḡ ← α·ḡ + (1 − α)·g, b ← μ·b + g/(√(v − ḡ²) + ε), θ ← θ − η·b.

    v − ḡ² is a variance: where all gradients are alike rounding may make it negative, which counts as 0.
    """
    square = square_avg = h.alpha * square_avg + (1 - h.alpha) * g * g
    if grad_avg is not None:
        grad_avg = grad_avg + (1 - h.alpha) * (g - grad_avg)
        square = (square_avg - grad_avg * grad_avg).clamp_min(0)  # leaves NaN as it is
    update = g / _denominator(square, eps, eps_inside)
    if buf is not None:
        update = buf = h.momentum * buf + update
    return p - lr * update, square_avg, buf, grad_avg


class AdagradHyper(NamedTuple):
    lr_decay: float


def adagrad(
    p: Tensor, g: Tensor, state_sum: Tensor, lr: float, eps: float, h: AdagradHyper, t: float, eps_inside: bool
) -> tuple[Tensor, Tensor]:
    """G ← G + g², θ ← θ − η/(1 + (t − 1)·decay) · g/(√G + ε)."""
    state_sum = state_sum + g * g
    lr = lr / (1 + (t - 1) * h.lr_decay)
    return p - lr * g / _denominator(state_sum, eps, eps_inside), state_sum


class AdamHyper(NamedTuple):
    beta1: float
    beta2: float


def adam(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
    lr: float, eps: float, h: AdamHyper, t: float, eps_inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ)."""
    exp_avg = exp_avg + (1 - h.beta1) * (g - exp_avg)
    square = exp_avg_sq = h.beta2 * exp_avg_sq + (1 - h.beta2) * g * g
    if max_exp_avg_sq is not None:
        square = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    d = _denominator(square / (1 - h.beta2**t), eps, eps_inside)
    return p - lr / (1 - h.beta1**t) * exp_avg / d, exp_avg, exp_avg_sq, max_exp_avg_sq


def round_stochastically(x: Tensor, like: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """float32 → bfloat16, up or down with the probability that makes the mean right.

    The random numbers depend on the seed, the step, the element (as those of `like` lie in memory) and the stream.
    """
    strides = like.stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    i = torch.arange(x.numel(), device=x.device).view([x.shape[d] for d in order])
    i = i.permute([order.index(d) for d in range(x.dim())])
    random = philox(seed, (i & 0xFFFFFFFF, i >> 32, torch.full_like(i, step), torch.full_like(i, stream)))
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = (bits + (random & 0xFFFF)) >> 16
    rounded = torch.where(x == x, rounded, 0x7FC0)
    return torch.where(rounded >= 1 << 15, rounded - (1 << 16), rounded).to(torch.int16).view(torch.bfloat16)


def philox(seed: int, counter: Sequence[Tensor]) -> Tensor:
    """The first of the four 32-bit numbers of Philox4×32-10, as int64 (Salmon et al. 2011)."""

    def product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """The high and the low half of a 64-bit product, from parts that int64 holds."""
        low = (a & 0xFFFF) * b
        high = (a >> 16) * b + (low >> 16)
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = product(c0, 0xD2511F53), product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0
