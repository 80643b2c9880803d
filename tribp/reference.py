"""The optimizers' mathematics in plain torch: the fallback where no kernel runs, and the tests' oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The optimizers. `values`: lr, ε, ±1 (−1 to maximize), the weight decay added to the gradient, the one that shrinks the
# parameter, two that do not matter here, then the rule's own, as `kernels/optim.py` has them; t: this step's number, 1
# for the first. All tensors have one type; a state that is not used is None. Nothing is changed in place.

Moments = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _decayed(p: Tensor, g: Tensor, values: Sequence[float]) -> tuple[Tensor, Tensor]:
    lr, _, sign, decay, shrinking = values[:5]
    g = sign * g
    return p * (1 - lr * shrinking), g + decay * p if decay else g


def _denominator(square: Tensor, eps: float, inside: bool) -> Tensor:
    return (square + eps).sqrt() if inside else square.sqrt() + eps


def sgd(
    p: Tensor, g: Tensor, buf: Tensor | None, _1: None, _2: None, values: Sequence[float], t: float, eps_inside: bool
) -> Moments:
    """b ← μ·b + (1 − τ)·g, the first time b ← g; θ ← θ − η·b, with Nesterov's θ ← θ − η·(g + μ·b)."""
    momentum, dampening, nesterov = values[7:10]
    p, g = _decayed(p, g, values)
    if buf is None:
        return p - values[0] * g, None, None, None
    buf = g if t == 1 else momentum * buf + (1 - dampening) * g
    return p - values[0] * (g + momentum * buf if nesterov else buf), buf, None, None


def rmsprop(
    p: Tensor, g: Tensor, square_avg: Tensor, buf: Tensor | None, grad_avg: Tensor | None,
    values: Sequence[float], t: float, eps_inside: bool,
) -> Moments:  # fmt: skip
    """v ← α·v + (1 − α)·g², ḡ ← α·ḡ + (1 − α)·g, b ← μ·b + g/(√(v − ḡ²) + ε), θ ← θ − η·b.

    v − ḡ² is a variance: where all gradients are alike rounding may make it negative, which counts as 0.
    """
    alpha, momentum, _ = values[7:10]
    p, g = _decayed(p, g, values)
    square_avg = alpha * square_avg + (1 - alpha) * g * g
    square = square_avg
    if grad_avg is not None:
        grad_avg = grad_avg + (1 - alpha) * (g - grad_avg)
        square = (square_avg - grad_avg * grad_avg).clamp_min(0)  # leaves NaN as it is
    update = g / _denominator(square, values[1], eps_inside)
    if buf is not None:
        update = buf = momentum * buf + update
    return p - values[0] * update, square_avg, buf, grad_avg


def adagrad(
    p: Tensor, g: Tensor, state_sum: Tensor, _1: None, _2: None, values: Sequence[float], t: float, eps_inside: bool
) -> Moments:
    """G ← G + g², θ ← θ − η/(1 + (t − 1)·decay) · g/(√G + ε)."""
    p, g = _decayed(p, g, values)
    state_sum = state_sum + g * g
    lr = values[0] / (1 + (t - 1) * values[7])
    return p - lr * g / _denominator(state_sum, values[1], eps_inside), state_sum, None, None


def adam(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
    values: Sequence[float], t: float, eps_inside: bool,
) -> Moments:  # fmt: skip
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ)."""
    beta1, beta2 = values[7:9]
    p, g = _decayed(p, g, values)
    exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
    square = exp_avg_sq
    if max_exp_avg_sq is not None:
        square = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    d = _denominator(square / (1 - beta2**t), values[1], eps_inside)
    return p - values[0] / (1 - beta1**t) * exp_avg / d, exp_avg, exp_avg_sq, max_exp_avg_sq


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
