"""Activations: y = act(z), and dz = dy·act′(z) from the output alone. No other kernel knows one from another.

Each is a pair of functions: its value, from z in the accumulator's type; its gradient, from dy and y in that type. To
add one, write the pair, name it in `activate` and `gradient`, and give it torch's side in `tribp/ops/activations.py`.

ACT, wherever it stands, is an `Activation` of that file: a name, None for none, and up to two numbers. Where an
activation has a kink its gradient is torch's: that of the side where torch's `<` or `<=` puts it. A gradient of dy = 0
and y = 0 is 0: so are the parts of tiles that lie outside a matrix.

Compiled: Triton's −x is 0 − x, an instruction; x·(−1) is a sign that the next instruction takes along.
"""

import ctypes
import math

import triton
import triton.language as tl

from .common import INTERPRETED, accumulator, ptx, reciprocal

Act = tuple[str | None, float, float]  # an `Activation`, which device code does not import

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2_approx(x):
    """2ˣ by the special-function unit: within 2 units in the last place, results below 2⁻¹²⁶ flushed to 0."""
    return tl.exp2(x) if INTERPRETED else ptx("ex2.approx.ftz.f32 $0, $1;", "=f,f", x)


@triton.jit
def number(VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """VALUE in DTYPE. As it is, a number that is compared with a float64 would be rounded to float32 before."""
    return tl.full((), VALUE, DTYPE)


@triton.constexpr_function
def to_float32(value):
    return ctypes.c_float(value).value


@triton.jit
def exp(x, FACTOR: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """e^(FACTOR·x), of which a result in DTYPE is made.

    2ᵗ is wrong by the error of t times ln 2: t = x·(FACTOR·log₂e) rounded is nothing to a 16-bit result, but 5e-6 of a
    float32 one at t = −115. For that one the low half of the product, and of the constant, are carried along. So would
    FACTOR·x, formed before, have to be: hence it is an argument.
    """
    if PTX and x.dtype == tl.float32:
        HIGH: tl.constexpr = to_float32(FACTOR * LOG2_E)
        LOW: tl.constexpr = FACTOR * LOG2_E - HIGH
        t = x * HIGH
        e = exp2_approx(t)
        if DTYPE == tl.float32:
            low = tl.fma(x, HIGH, -t) + x * LOW
            e = tl.where(tl.abs(t) < 126.0, tl.fma(e, low * LN_2, e), e)  # outside, e is 0 or ∞ and low may be NaN
    else:
        e = tl.exp(x * FACTOR)
    return e


@triton.jit
def expm1_negative(x, PTX: tl.constexpr):
    """eˣ − 1 of x ≤ 0, without the cancellation near 0: there x·(1 + x/2·(1 + x/3·(1 + …)))."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8  # the next is below half a unit in the last place at −½
    series = x * (1.0 / TERMS) + 1.0
    for k in tl.static_range(TERMS - 1, 1, -1):
        series = series * (x * (1.0 / k)) + 1.0
    # Without the low half of x·log₂e, as for a 16-bit result: beside 1 an error of eˣ does not show.
    return tl.where(x > -0.5, x * series, exp(x, 1.0, tl.float16, PTX) - 1.0)


@triton.jit
def log1p_fraction(x):
    """log(1 + x) of 0 ≤ x ≤ 1: 2·artanh(s) = 2·(s + s³/3 + s⁵/5 + …) with s = x / (2 + x) ≤ ⅓."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    s = x / (2.0 + x)
    square = s * s
    series = square * (1.0 / (2 * TERMS + 1)) + 1.0 / (2 * TERMS - 1)
    for k in tl.static_range(TERMS - 2, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return 2.0 * s * series


@triton.jit
def sigmoid(z, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """σ(z) = 1 / (1 + e⁻ᶻ). With PTX a float32 `z` costs four instructions; a division that is IEEE's cost twelve."""
    return reciprocal(1.0 + exp(z, -1.0, DTYPE, PTX), PTX)


@triton.jit
def sigmoid_gradient(dy, y):
    """dy·y·(1 − y). 1 − y is exact for y ≥ ½; y − y² would cancel there."""
    return dy * ((1.0 - y) * y)


@triton.jit
def tanh(z, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """tanh z = ±(1 − e⁻²ᵃ) / (1 + e⁻²ᵃ), a = |z|. For 16 bits 2·σ(2z) − 1, and near 0 z − z³/3."""
    if DTYPE == tl.float16 or DTYPE == tl.bfloat16:
        near = z * (1.0 - z * z * (1.0 / 3.0))
        result = tl.where(tl.abs(z) < 0.0625, near, 2.0 * sigmoid(2.0 * z, DTYPE, PTX) - 1.0)
    else:
        m = expm1_negative(-2.0 * tl.abs(z), PTX)
        negative = m * reciprocal(2.0 + m, PTX)
        result = tl.where(z < 0.0, negative, negative * -1.0)
    return result


@triton.jit
def tanh_gradient(dy, y):
    """dy·(1 − y²)."""
    return dy * ((1.0 - y) * (1.0 + y))


@triton.jit
def relu(z):
    """max(z, 0); NaN of NaN."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_gradient(dy, y):
    return tl.where(y <= 0.0, 0.0, dy)


@triton.jit
def leaky_relu(z, SLOPE: tl.constexpr):
    return tl.where(z > 0.0, z, z * SLOPE)


@triton.jit
def leaky_relu_gradient(dy, y, SLOPE: tl.constexpr):
    return tl.where(y > 0.0, dy, dy * SLOPE)


@triton.jit
def elu(z, ALPHA: tl.constexpr, PTX: tl.constexpr):
    """z, and α·(eᶻ − 1) of z < 0."""
    return tl.where(z < 0.0, ALPHA * expm1_negative(z, PTX), z)


@triton.jit
def elu_gradient(dy, y, ALPHA: tl.constexpr):
    """dy, and dy·(y + α) of y ≤ 0: α·eᶻ = y + α."""
    return tl.where(y <= 0.0, dy * (y + ALPHA), dy)


@triton.jit
def softplus(z, BETA: tl.constexpr, THRESHOLD: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """log(1 + eᵗ) / β = (max(t, 0) + log(1 + e⁻ᵃ)) / β with t = β·z and a = |t|; z itself where t > THRESHOLD."""
    t = z * BETA
    value = tl.maximum(t, 0.0) + log1p_fraction(exp(tl.abs(z), -BETA, DTYPE, PTX))
    return tl.where(t > number(THRESHOLD, t.dtype), z, value * (1.0 / BETA))


@triton.constexpr_function
def output_at_threshold(threshold):
    """A little above β·y at β·z = threshold, which is log(1 + eᵗʰʳᵉˢʰᵒˡᵈ): more than it may be rounded to."""
    return max(threshold, 0.0) + 1.001 * math.log1p(math.exp(-abs(threshold)))


@triton.jit
def softplus_gradient(dy, y, BETA: tl.constexpr, THRESHOLD: tl.constexpr):
    """dy·σ(β·z) = dy·(1 − e⁻ᵝʸ), and dy beyond the threshold, as in torch at the threshold itself.

    In float64 a z that is nearer to it, on its upper side, counts as below: wrong by e⁻ᵗʰʳᵉˢʰᵒˡᵈ.
    """
    t = y * BETA
    ABOVE: tl.constexpr = output_at_threshold(THRESHOLD)
    return tl.where(t > number(ABOVE, t.dtype), dy, dy * (expm1_negative(t * -1.0, False) * -1.0))


@triton.jit
def hardsigmoid(z):
    """min(max(z + 3, 0), 6) / 6."""
    return hardtanh(z + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def hardsigmoid_gradient(dy, y):
    """dy/6, and 0 where y as stored is 0 or 1: so also of a z inside of −3 and 3, so near that y rounds to its end."""
    return tl.where((y > 0.0) & (y < 1.0), dy * (1.0 / 6.0), 0.0)


@triton.jit
def hardtanh(z, LOW: tl.constexpr, HIGH: tl.constexpr):
    """min(max(z, LOW), HIGH); NaN of NaN."""
    low = number(LOW, z.dtype)
    high = number(HIGH, z.dtype)
    return tl.where(z < low, low, tl.where(z > high, high, z))


@triton.jit
def hardtanh_gradient(dy, y, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.where((y <= number(LOW, y.dtype)) | (y >= number(HIGH, y.dtype)), 0.0, dy)


@triton.jit
def activate(z, ACT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """act(z), to be rounded to DTYPE."""
    NAME: tl.constexpr = ACT.name
    A: tl.constexpr = ACT.a
    B: tl.constexpr = ACT.b
    if NAME == "sigmoid":
        z = sigmoid(z, DTYPE, PTX)
    elif NAME == "tanh":
        z = tanh(z, DTYPE, PTX)
    elif NAME == "relu":
        z = relu(z)
    elif NAME == "leaky_relu":
        z = leaky_relu(z, A)
    elif NAME == "elu":
        z = elu(z, A, PTX)
    elif NAME == "softplus":
        z = softplus(z, A, B, DTYPE, PTX)
    elif NAME == "hardsigmoid":
        z = hardsigmoid(z)
    elif NAME == "hardtanh":
        z = hardtanh(z, A, B)
    else:
        tl.static_assert(NAME is None)
    return z


@triton.jit
def gradient(dy, y, ACT: tl.constexpr):
    """dz = dy·act′(z), in the accumulator's type, from dy and y as they are stored."""
    NAME: tl.constexpr = ACT.name
    A: tl.constexpr = ACT.a
    B: tl.constexpr = ACT.b
    ACC: tl.constexpr = accumulator(y.dtype)
    dy = dy.to(ACC)
    y = y.to(ACC)
    if NAME == "sigmoid":
        dy = sigmoid_gradient(dy, y)
    elif NAME == "tanh":
        dy = tanh_gradient(dy, y)
    elif NAME == "relu":
        dy = relu_gradient(dy, y)
    elif NAME == "leaky_relu":
        dy = leaky_relu_gradient(dy, y, A)
    elif NAME == "elu":
        dy = elu_gradient(dy, y, A)
    elif NAME == "softplus":
        dy = softplus_gradient(dy, y, A, B)
    elif NAME == "hardsigmoid":
        dy = hardsigmoid_gradient(dy, y)
    elif NAME == "hardtanh":
        dy = hardtanh_gradient(dy, y, A, B)
    else:
        tl.static_assert(NAME is None)
    return dy
