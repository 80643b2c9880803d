"""What each optimizer does to an element: a pair of functions, named like its formula in `tribp/optim/reference.py`.

`…_scalars(h, step, HYPER, CONFIG)` forms what depends on the hyperparameters and the step alone: in float64, rounded
last (1 − float32(0.999) would be wrong by 1.3e-5). `h` is the group's row of hyperparameters and HYPER.<name> a column
of it, by the names that the class gives them.

The other one reads like the formula. It takes the parameter (already decayed), the gradient (scaled, clipped, signed,
decayed), three states, the rate, ε and the scalars `s`, and returns the parameter and the states. A state that a tensor
lacks arrives as 0, and each formula is written so that 0 gives the plain variant: groups with and without momentum,
amsgrad or centered share a launch.
"""

import triton
import triton.language as tl


@triton.jit
def root(x):
    """√x, correctly rounded: Triton's own float32 root is approximate and flushes subnormal numbers to 0."""
    if x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: in float32 Triton's own is wrong by up to 2 units in the last place."""
    if b.dtype == tl.float32:
        q = tl.div_rn(a, b)
    else:
        q = a / b
    return q


@triton.jit
def denominator(square, eps, CONFIG: tl.constexpr):
    """√square + ε, or √(square + ε)."""
    if CONFIG.EPS_INSIDE:
        d = root(square + eps)
    else:
        d = root(square) + eps
    return d


@triton.jit
def hyper(h, column, CONFIG: tl.constexpr):
    """A hyperparameter, in float64. Its second word, where not 0, is the address of a tensor on the device that holds
    it: float32, or float64 if the lowest bit is set."""
    value = tl.load(h + 2 * column).to(tl.float64, bitcast=True)
    if CONFIG.ON_DEVICE:
        at = tl.load(h + 2 * column + 1)
        if at != 0:
            if at % 2 == 0:
                value = tl.load(at.to(tl.pointer_type(tl.float32))).to(tl.float64)
            else:
                value = tl.load((at - 1).to(tl.pointer_type(tl.float64)))
    return value


@triton.jit
def power(beta, step):
    """βᵗ in float64, for 0 ≤ β < 1."""
    return tl.exp2(step * tl.log2(beta))


@triton.jit
def sgd_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    momentum = hyper(h, HYPER.momentum, CONFIG)
    dampening = hyper(h, HYPER.dampening, CONFIG)
    nesterov = hyper(h, HYPER.nesterov, CONFIG)
    return momentum.to(CONFIG.ACC), (1.0 - dampening).to(CONFIG.ACC), nesterov != 0.0, step == 1.0


@triton.jit
def sgd(p, g, buf, unused1, unused2, lr, eps, s, CONFIG: tl.constexpr):
    """b ← μ·b + (1 − τ)·g, the first time b ← g; θ ← θ − η·b, with Nesterov's θ ← θ − η·(g + μ·b)."""
    momentum, undamped, nesterov, first = s
    buf = tl.where(first | (momentum == 0.0), g, momentum * buf + undamped * g)
    return p - lr * tl.where(nesterov, g + momentum * buf, buf), buf, unused1, unused2


@triton.jit
def rmsprop_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    ACC: tl.constexpr = CONFIG.ACC
    alpha = hyper(h, HYPER.alpha, CONFIG)
    momentum = hyper(h, HYPER.momentum, CONFIG)
    centered = hyper(h, HYPER.centered, CONFIG)  # 0 or 1
    return alpha.to(ACC), (1.0 - alpha).to(ACC), momentum.to(ACC), (centered * (1.0 - alpha)).to(ACC)


@triton.jit
def rmsprop(p, g, square_avg, buf, grad_avg, lr, eps, s, CONFIG: tl.constexpr):
    """v ← α·v + (1 − α)·g², ḡ ← α·ḡ + (1 − α)·g, b ← μ·b + g/(√(v − ḡ²) + ε), θ ← θ − η·b.

    v − ḡ² is a variance: where all gradients are alike rounding may make it negative, which counts as 0.
    """
    alpha, one_minus_alpha, momentum, grad_avg_weight = s
    square_avg = alpha * square_avg + one_minus_alpha * (g * g)
    grad_avg += grad_avg_weight * (g - grad_avg)
    variance = tl.maximum(square_avg - grad_avg * grad_avg, 0.0, propagate_nan=tl.PropagateNan.ALL)
    buf = momentum * buf + divide(g, denominator(variance, eps, CONFIG))
    return p - lr * buf, square_avg, buf, grad_avg


@triton.jit
def adagrad_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    lr_decay = hyper(h, HYPER.lr_decay, CONFIG)
    return (hyper(h, HYPER.lr, CONFIG) / (1.0 + (step - 1.0) * lr_decay)).to(CONFIG.ACC), lr_decay


@triton.jit
def adagrad(p, g, state_sum, unused1, unused2, lr, eps, s, CONFIG: tl.constexpr):
    """G ← G + g², θ ← θ − η/(1 + (t − 1)·decay) · g/(√G + ε)."""
    decayed_lr, _ = s
    state_sum += g * g
    return p - decayed_lr * divide(g, denominator(state_sum, eps, CONFIG)), state_sum, unused1, unused2


@triton.jit
def adam_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    ACC: tl.constexpr = CONFIG.ACC
    beta1 = hyper(h, HYPER.beta1, CONFIG)
    beta2 = hyper(h, HYPER.beta2, CONFIG)
    step_size = hyper(h, HYPER.lr, CONFIG) / (1.0 - power(beta1, step))
    corrects_root = 1.0 / tl.sqrt(1.0 - power(beta2, step))
    return (1.0 - beta1).to(ACC), beta2.to(ACC), (1.0 - beta2).to(ACC), step_size.to(ACC), corrects_root.to(ACC)


@triton.jit
def adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, lr, eps, s, CONFIG: tl.constexpr):
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ).

    Kingma and Ba 2015. With amsgrad the largest v so far takes the place of v.
    """
    one_minus_beta1, beta2, one_minus_beta2, step_size, corrects_root = s
    exp_avg += one_minus_beta1 * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (g * g)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    if CONFIG.EPS_INSIDE:
        d = root(max_exp_avg_sq * (corrects_root * corrects_root) + eps)
    else:
        d = root(max_exp_avg_sq) * corrects_root + eps
    return p - step_size * divide(exp_avg, d), exp_avg, exp_avg_sq, max_exp_avg_sq
