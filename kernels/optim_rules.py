"""What each optimizer does to an element: a pair of functions, named like its formula in `tribp/optim/reference.py`.

`…_scalars(h, step, HYPER, CONFIG)` forms what depends on the hyperparameters and the step alone: in float64, rounded
last (1 − float32(0.999) would be wrong by 1.3e-5). `h` is the group's row of hyperparameters and HYPER.<name> a column
of it, by the names that the class gives them.

The other one reads like the formula. It takes the parameter (already decayed), the gradient (scaled, clipped, signed,
decayed), three states, the rate, ε and the scalars `s`, and returns the parameter and the states. A state that a tensor
lacks arrives as 0, and each formula is written so that 0 gives the plain variant: groups with and without momentum,
amsgrad or centered share a launch.

Where a rule has states of one number (`Rule.scalar_states`), `…_scalars` takes two of them after the step, and returns
them behind the scalars: what the next step finds.
"""

import triton
import triton.language as tl

from .common import INTERPRETED, ptx, reciprocal


@triton.jit
def divide_exactly(a, b):
    """a / b, correctly rounded: in float32 Triton's own is wrong by up to 2 units in the last place."""
    if b.dtype == tl.float32:
        q = tl.div_rn(a, b)
    else:
        q = a / b
    return q


@triton.jit
def divide(a, b, CONFIG: tl.constexpr):
    """a / b, correctly rounded but where states are codes: these are off by far more than an approximate reciprocal.

    Counted: with `root`, 22 of the 114 instructions that Adam then takes an element. The reciprocal of a subnormal
    number would be infinite, and 0·∞ no 0: hence 2³².
    """
    if CONFIG.CODED and b.dtype == tl.float32:
        q = a * reciprocal(b * 4294967296.0, CONFIG.PTX) * 4294967296.0
    else:
        q = divide_exactly(a, b)
    return q


@triton.jit
def root(x, CONFIG: tl.constexpr):
    """√x, correctly rounded but where states are codes. Triton's own float32 root flushes subnormal numbers to 0."""
    if x.dtype == tl.float32 and CONFIG.CODED and CONFIG.PTX:
        y = tl.sqrt(x) if INTERPRETED else ptx("sqrt.approx.f32 $0, $1;", "=f,f", x)
    elif x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def denominator(square, eps, CONFIG: tl.constexpr):
    """√square + ε, or √(square + ε)."""
    if CONFIG.EPS_INSIDE:
        d = root(square + eps, CONFIG)
    else:
        d = root(square, CONFIG) + eps
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
def one_minus_power(beta, step):
    """1 − βᵗ in float64, for 0 ≤ β < 1, to the last places also where βᵗ is nearly 1.

    (1 − u)·log(βᵗ)/log(u) with u = βᵗ, rounded: the rounding of u cancels out (Kahan's way to compute exp(x) − 1).
    """
    exponent = step * tl.log2(beta)
    u = tl.exp2(exponent)
    return tl.where(u > 0.0, (1.0 - u) * exponent / tl.log2(tl.where(u > 0.0, u, 0.5)), 1.0)


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
    square_avg = alpha * square_avg + one_minus_alpha * g * g
    grad_avg += grad_avg_weight * (g - grad_avg)
    variance = tl.maximum(square_avg - grad_avg * grad_avg, 0.0, propagate_nan=tl.PropagateNan.ALL)
    buf = momentum * buf + divide(g, denominator(variance, eps, CONFIG), CONFIG)
    return p - lr * buf, square_avg, buf, grad_avg


@triton.jit
def adagrad_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    lr_decay = hyper(h, HYPER.lr_decay, CONFIG)
    return ((hyper(h, HYPER.lr, CONFIG) / (1.0 + (step - 1.0) * lr_decay)).to(CONFIG.ACC),)


@triton.jit
def adagrad(p, g, state_sum, unused1, unused2, lr, eps, s, CONFIG: tl.constexpr):
    """G ← G + g², θ ← θ − η/(1 + (t − 1)·decay) · g/(√G + ε)."""
    (decayed_lr,) = s
    state_sum += g * g
    return p - decayed_lr * divide(g, denominator(state_sum, eps, CONFIG), CONFIG), state_sum, unused1, unused2


@triton.jit
def adam_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    ACC: tl.constexpr = CONFIG.ACC
    beta1 = hyper(h, HYPER.beta1, CONFIG)
    beta2 = hyper(h, HYPER.beta2, CONFIG)
    step_size = hyper(h, HYPER.lr, CONFIG) / (1.0 - power(beta1, step))
    bias_correction2_rsqrt = 1.0 / tl.sqrt(1.0 - power(beta2, step))
    return (
        (1.0 - beta1).to(ACC),
        beta2.to(ACC),
        (1.0 - beta2).to(ACC),
        step_size.to(ACC),
        bias_correction2_rsqrt.to(ACC),
    )


@triton.jit
def adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, lr, eps, s, CONFIG: tl.constexpr):
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ).

    Kingma and Ba 2015. With amsgrad the largest v so far takes the place of v.
    """
    one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_rsqrt = s
    exp_avg += one_minus_beta1 * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    if CONFIG.EPS_INSIDE:
        d = root(max_exp_avg_sq * (bias_correction2_rsqrt * bias_correction2_rsqrt) + eps, CONFIG)
    else:
        d = root(max_exp_avg_sq, CONFIG) * bias_correction2_rsqrt + eps
    return p - step_size * divide(exp_avg, d, CONFIG), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def adadelta_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    rho = hyper(h, HYPER.rho, CONFIG)
    return rho.to(CONFIG.ACC), (1.0 - rho).to(CONFIG.ACC)


@triton.jit
def adadelta(p, g, square_avg, acc_delta, unused, lr, eps, s, CONFIG: tl.constexpr):
    """v ← ρ·v + (1 − ρ)·g², Δ = √(u + ε)/√(v + ε)·g, u ← ρ·u + (1 − ρ)·Δ², θ ← θ − η·Δ."""
    rho, one_minus_rho = s
    square_avg = rho * square_avg + one_minus_rho * g * g
    delta = divide(root(acc_delta + eps, CONFIG), root(square_avg + eps, CONFIG), CONFIG) * g
    acc_delta = rho * acc_delta + one_minus_rho * delta * delta
    return p - lr * delta, square_avg, acc_delta, unused


@triton.jit
def adamax_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    ACC: tl.constexpr = CONFIG.ACC
    beta1 = hyper(h, HYPER.beta1, CONFIG)
    step_size = hyper(h, HYPER.lr, CONFIG) / (1.0 - power(beta1, step))
    return (1.0 - beta1).to(ACC), hyper(h, HYPER.beta2, CONFIG).to(ACC), step_size.to(ACC)


@triton.jit
def adamax(p, g, exp_avg, exp_inf, unused, lr, eps, s, CONFIG: tl.constexpr):
    """m ← β₁·m + (1 − β₁)·g, u ← max(β₂·u, |g| + ε), θ ← θ − η/(1 − β₁ᵗ)·m/u."""
    one_minus_beta1, beta2, step_size = s
    exp_avg += one_minus_beta1 * (g - exp_avg)
    exp_inf = tl.maximum(beta2 * exp_inf, tl.abs(g) + eps, propagate_nan=tl.PropagateNan.ALL)
    return p - step_size * divide(exp_avg, exp_inf, CONFIG), exp_avg, exp_inf, unused


@triton.jit
def rprop_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    ACC: tl.constexpr = CONFIG.ACC
    etaminus = hyper(h, HYPER.etaminus, CONFIG)
    etaplus = hyper(h, HYPER.etaplus, CONFIG)
    step_size_min = hyper(h, HYPER.step_size_min, CONFIG)
    step_size_max = hyper(h, HYPER.step_size_max, CONFIG)
    return etaminus.to(ACC), etaplus.to(ACC), step_size_min.to(ACC), step_size_max.to(ACC)


@triton.jit
def rprop(p, g, prev, step_size, unused, lr, eps, s, CONFIG: tl.constexpr):
    """δ ← δ·η⁺ where g has the sign of the one before, δ·η⁻ where it has the other one, and then g ← 0; δ within its
    bounds; θ ← θ − δ·sign(g)."""
    etaminus, etaplus, step_size_min, step_size_max = s
    product = g * prev
    step_size *= tl.where(product > 0.0, etaplus, tl.where(product < 0.0, etaminus, 1.0))
    step_size = tl.minimum(tl.maximum(step_size, step_size_min), step_size_max)
    g = tl.where(product < 0.0, 0.0, g)
    sign = (g > 0.0).to(CONFIG.ACC) - (g < 0.0).to(CONFIG.ACC)  # of NaN it is 0, as torch's
    return p - sign * step_size, g, step_size, unused


@triton.jit
def nadam_scalars(h, step, mu_product, unused, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    """μ, this step's β₁ and the next one's, grows towards β₁; mu_product is the product of all so far."""
    ACC: tl.constexpr = CONFIG.ACC
    lr = hyper(h, HYPER.lr, CONFIG)
    beta1 = hyper(h, HYPER.beta1, CONFIG)
    beta2 = hyper(h, HYPER.beta2, CONFIG)
    momentum_decay = hyper(h, HYPER.momentum_decay, CONFIG)
    fades = tl.full((), 0.96, tl.float64)
    mu = beta1 * (1.0 - 0.5 * power(fades, step * momentum_decay))
    mu_next = beta1 * (1.0 - 0.5 * power(fades, (step + 1.0) * momentum_decay))
    mu_product *= mu.to(mu_product.dtype)  # rounded as in torch, which keeps it from step to step
    product = mu_product.to(tl.float64)
    grad_step_size = lr * (1.0 - mu) / (1.0 - product)
    avg_step_size = lr * mu_next / (1.0 - product * mu_next)
    bias_correction2_rsqrt = 1.0 / tl.sqrt(1.0 - power(beta2, step))
    scalars = (
        (1.0 - beta1).to(ACC), beta2.to(ACC), (1.0 - beta2).to(ACC), grad_step_size.to(ACC), avg_step_size.to(ACC),
        bias_correction2_rsqrt.to(ACC),
    )  # fmt: skip
    return scalars, mu_product, unused


@triton.jit
def nadam(p, g, exp_avg, exp_avg_sq, unused, lr, eps, s, CONFIG: tl.constexpr):
    """θ ← θ − η·((1 − μₜ)·g/(1 − Πμ) + μₜ₊₁·m/(1 − μₜ₊₁·Πμ))/(√v̂ + ε), with Adam's m and v."""
    one_minus_beta1, beta2, one_minus_beta2, grad_step_size, avg_step_size, bias_correction2_rsqrt = s
    exp_avg += one_minus_beta1 * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    if CONFIG.EPS_INSIDE:
        d = root(exp_avg_sq * (bias_correction2_rsqrt * bias_correction2_rsqrt) + eps, CONFIG)
    else:
        d = root(exp_avg_sq, CONFIG) * bias_correction2_rsqrt + eps
    return p - divide(grad_step_size * g + avg_step_size * exp_avg, d, CONFIG), exp_avg, exp_avg_sq, unused


@triton.jit
def radam_scalars(h, step, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    """ρₜ is the length of the average that v amounts to; above 5 its variance is known, and rectifies the step."""
    ACC: tl.constexpr = CONFIG.ACC
    beta1 = hyper(h, HYPER.beta1, CONFIG)
    beta2 = hyper(h, HYPER.beta2, CONFIG)
    bias_correction2 = one_minus_power(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho_t = rho_inf - 2.0 * step * (1.0 - bias_correction2) / bias_correction2
    rectified = rho_t > 5.0
    rho_t = tl.where(rectified, rho_t, 5.0)
    rho_inf = tl.where(rectified, rho_inf, 5.0)  # then rect = 1, which nobody asks for
    rect = tl.sqrt((rho_t - 4.0) * (rho_t - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t))
    step_size = hyper(h, HYPER.lr, CONFIG) / (1.0 - power(beta1, step))
    step_size *= tl.where(rectified, rect * tl.sqrt(bias_correction2), 1.0)
    return (1.0 - beta1).to(ACC), beta2.to(ACC), (1.0 - beta2).to(ACC), step_size.to(ACC), rectified


@triton.jit
def radam(p, g, exp_avg, exp_avg_sq, unused, lr, eps, s, CONFIG: tl.constexpr):
    """m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², θ ← θ − η·m̂·r·√(1 − β₂ᵗ)/(√v + ε); θ − η·m̂ while ρ ≤ 5."""
    one_minus_beta1, beta2, one_minus_beta2, step_size, rectified = s
    exp_avg += one_minus_beta1 * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    d = tl.where(rectified, denominator(exp_avg_sq, eps, CONFIG), 1.0)
    return p - step_size * divide(exp_avg, d, CONFIG), exp_avg, exp_avg_sq, unused


@triton.jit
def asgd_scalars(h, step, eta, mu, HYPER: tl.constexpr, CONFIG: tl.constexpr):
    """This step's rate and the weight of its average were formed by the step before."""
    ACC: tl.constexpr = CONFIG.ACC
    lr = hyper(h, HYPER.lr, CONFIG)
    lambd = hyper(h, HYPER.lambd, CONFIG)
    shrink = 1.0 - lambd * eta.to(tl.float64)
    decayed = tl.exp2(hyper(h, HYPER.alpha, CONFIG) * tl.log2(1.0 + lambd * lr * step))
    next_mu = 1.0 / tl.maximum(step - hyper(h, HYPER.t0, CONFIG), 1.0)
    return (eta.to(ACC), shrink.to(ACC), mu.to(ACC)), (lr / decayed).to(eta.dtype), next_mu.to(mu.dtype)


@triton.jit
def asgd(p, g, ax, unused1, unused2, lr, eps, s, CONFIG: tl.constexpr):
    """θ ← (1 − λ·ηₜ)·θ − ηₜ·g, a ← a + μₜ·(θ − a); ηₜ₊₁ = η/(1 + λ·η·t)^α, μₜ₊₁ = 1/max(1, t − t₀)."""
    eta, shrink, mu = s
    p = p * shrink - eta * g
    return p, tl.where(mu == 1.0, p, ax + mu * (p - ax)), unused1, unused2
