"""The optimizers' formulas in plain torch: for tensors that no kernel takes, and as the kernels' documentation.

A formula takes a parameter p (already decayed), its gradient g (scaled, clipped, signed, decayed), its states, None for
one that is not used, lr, ε, the rule's own hyperparameters h, this step's number t, 1 for the first, and whether ε
stands inside the root. It returns p and the states anew, and may overwrite those that it was given, but not g. All
tensors have one type. Where a rule has states of one number (`Rule.scalar_states`), the formula takes them as well,
last and as they are kept, and returns these numbers last.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@functools.lru_cache(64)
def scalar(x: float, dtype: torch.dtype) -> Tensor:
    """A tensor of no dimensions. An operation makes one of a Python number: that takes 1 µs, as long as the operation.

    Not of `alpha` and `value`, nor of the arguments of `lerp` and `clamp`.
    """
    with _disable_current_modes():  # it is kept, and must be no FakeTensor
        return torch.tensor(x, dtype=dtype, device="cpu")


def _denominator(square: Tensor, eps: float, eps_inside: bool, correction: float = 1.0) -> Tensor:
    """√v̂ + ε or √(v̂ + ε), where v̂ is v divided by the correction."""
    if eps_inside:
        return torch.add(scalar(eps, square.dtype), square, alpha=1 / correction).sqrt_()
    return torch.add(scalar(eps, square.dtype), square.sqrt(), alpha=1 / math.sqrt(correction))


def _average_square_(square_avg: Tensor, g: Tensor, decay: float) -> Tensor:
    return square_avg.mul_(scalar(decay, g.dtype)).addcmul_(g, g, value=1 - decay)


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
        square = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1).clamp_min(0)  # leaves NaN as it is
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


class BetasHyper(NamedTuple):
    beta1: float
    beta2: float


def adam(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
    lr: float, eps: float, h: BetasHyper, t: float, eps_inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ)."""
    exp_avg = exp_avg + (1 - h.beta1) * (g - exp_avg)
    square = exp_avg_sq = h.beta2 * exp_avg_sq + (1 - h.beta2) * g * g
    if max_exp_avg_sq is not None:
        square = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    d = _denominator(square, eps, eps_inside, 1 - h.beta2**t)
    return p - lr / (1 - h.beta1**t) * exp_avg / d, exp_avg, exp_avg_sq, max_exp_avg_sq


class AdadeltaHyper(NamedTuple):
    rho: float


def adadelta(
    p: Tensor, g: Tensor, square_avg: Tensor, acc_delta: Tensor,
    lr: float, eps: float, h: AdadeltaHyper, t: float, eps_inside: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """v ← ρ·v + (1 − ρ)·g², Δ = √(u + ε)/√(v + ε)·g, u ← ρ·u + (1 − ρ)·Δ², θ ← θ − η·Δ."""
    _average_square_(square_avg, g, h.rho)
    delta = _denominator(acc_delta, eps, True).div_(_denominator(square_avg, eps, True)).mul_(g)
    return p.sub_(delta, alpha=lr), square_avg, _average_square_(acc_delta, delta, h.rho)


def adamax(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_inf: Tensor,
    lr: float, eps: float, h: BetasHyper, t: float, eps_inside: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """m ← β₁·m + (1 − β₁)·g, u ← max(β₂·u, |g| + ε), θ ← θ − η/(1 − β₁ᵗ)·m/u."""
    exp_avg.lerp_(g, 1 - h.beta1)
    torch.maximum(exp_inf.mul_(scalar(h.beta2, g.dtype)), g.abs().add_(scalar(eps, g.dtype)), out=exp_inf)
    return p.addcdiv_(exp_avg, exp_inf, value=-lr / (1 - h.beta1**t)), exp_avg, exp_inf


class RpropHyper(NamedTuple):
    etaminus: float
    etaplus: float
    step_size_min: float
    step_size_max: float


def rprop(
    p: Tensor, g: Tensor, prev: Tensor, step_size: Tensor,
    lr: float, eps: float, h: RpropHyper, t: float, eps_inside: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """δ ← δ·η⁺ where g has the sign of the one before, δ·η⁻ where it has the other one, and then g ← 0; δ within its
    bounds; θ ← θ − δ·sign(g)."""
    product, zero = prev.mul_(g), scalar(0.0, g.dtype)
    turned = product < zero
    shorter = torch.where(turned, step_size * scalar(h.etaminus, g.dtype), step_size)
    step_size = torch.where(product > zero, step_size * scalar(h.etaplus, g.dtype), shorter)
    step_size.clamp_(h.step_size_min, h.step_size_max)
    g = torch.where(turned, zero, g)
    return p.addcmul_(g.sign(), step_size, value=-1), g, step_size


class NAdamHyper(NamedTuple):
    beta1: float
    beta2: float
    momentum_decay: float


def nadam(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    lr: float, eps: float, h: NAdamHyper, t: float, eps_inside: bool, mu_product: Tensor,
) -> tuple[Tensor, Tensor, Tensor, float]:  # fmt: skip
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·((1 − μₜ)·g/(1 − Πμ) + μₜ₊₁·m/(1 − μₜ₊₁·Πμ))/(√v̂ + ε),
    where μₜ = β₁·(1 − 0.96^(t·ψ)/2), ψ is the momentum decay, and Πμ the product of all μ so far."""
    mu, mu_next = (h.beta1 * (1 - 0.5 * 0.96 ** (k * h.momentum_decay)) for k in (t, t + 1))
    product = float(mu_product * mu)  # rounded as it is kept
    exp_avg.lerp_(g, 1 - h.beta1)
    _average_square_(exp_avg_sq, g, h.beta2)
    d = _denominator(exp_avg_sq, eps, eps_inside, 1 - h.beta2**t)
    p.addcdiv_(g, d, value=-lr * (1 - mu) / (1 - product))
    p.addcdiv_(exp_avg, d, value=-lr * mu_next / (1 - product * mu_next))
    return p, exp_avg, exp_avg_sq, product


def radam(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    lr: float, eps: float, h: BetasHyper, t: float, eps_inside: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂·r·√(1 − β₂ᵗ)/(√v + ε); θ − η·m̂ while ρ ≤ 5,

    where ρ is the length of the average that v amounts to, and r = √((ρ − 4)(ρ − 2)·ρ∞/((ρ∞ − 4)(ρ∞ − 2)·ρ)).
    """
    exp_avg.lerp_(g, 1 - h.beta1)
    _average_square_(exp_avg_sq, g, h.beta2)
    lr = lr / (1 - h.beta1**t)
    decayed = h.beta2**t
    rho_inf = 2 / (1 - h.beta2) - 1
    rho_t = rho_inf - 2 * t * decayed / (1 - decayed)
    if rho_t <= 5:
        return p.sub_(exp_avg, alpha=lr), exp_avg, exp_avg_sq
    rect = math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))
    d = _denominator(exp_avg_sq, eps, eps_inside)
    return p.addcdiv_(exp_avg, d, value=-lr * rect * math.sqrt(1 - decayed)), exp_avg, exp_avg_sq


class ASGDHyper(NamedTuple):
    lambd: float
    alpha: float
    t0: float


def asgd(
    p: Tensor, g: Tensor, ax: Tensor, lr: float, eps: float, h: ASGDHyper, t: float, eps_inside: bool,
    eta: Tensor, mu: Tensor,
) -> tuple[Tensor, Tensor, float, float]:  # fmt: skip
    """θ ← (1 − λ·ηₜ)·θ − ηₜ·g, a ← a + μₜ·(θ − a); ηₜ₊₁ = η/(1 + λ·η·t)^α, μₜ₊₁ = 1/max(1, t − t₀)."""
    rate, weight = float(eta), float(mu)
    p.mul_(1 - h.lambd * rate)
    if weight == 1:
        ax.copy_(p.sub_(g, alpha=rate))
    else:
        ax.lerp_(p.sub_(g, alpha=rate), weight)
    return p, ax, lr / (1 + h.lambd * lr * t) ** h.alpha, 1 / max(1.0, t - h.t0)


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """To bfloat16, up or down with the probability that makes the mean right. random: bits, the last 16 are used."""
    bits = x.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = (bits + (random & 0xFFFF)) >> 16
    rounded = torch.where(x == x, rounded, 0x7FC0)
    return torch.where(rounded >= 1 << 15, rounded - (1 << 16), rounded).to(torch.int16).view(torch.bfloat16)


def random_bits(like: Tensor, key: int, first: int = 0) -> Tensor:
    """32 random bits, as int64, for each element, in the order that they have in memory: Wellons' "lowbias32" of its
    number and the key. first: the number of the first one."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: -strides[d])
    i = torch.arange(first, first + like.numel(), device=like.device).view([like.shape[d] for d in order])
    i = i.permute([order.index(d) for d in range(like.dim())])
    x = ((i & 0xFFFFFFFF) ^ key) + (i >> 32) * 0x9E3779B9 & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_keys(seed: int, step: int, stream: int) -> tuple[int, int]:
    """Of the random bits that round codes, and parameters, of one tensor in one step: the first two of the four 32-bit
    numbers of Philox4×32-10 (Salmon et al. 2011)."""

    def product(a: int, b: int) -> tuple[int, int]:
        return a * b >> 32, a * b & 0xFFFFFFFF

    c0, c1, c2, c3 = step, stream, 0, 0
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = product(c0, 0xD2511F53), product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1
