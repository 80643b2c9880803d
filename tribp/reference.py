"""The library's mathematics in plain torch: the fallback where no kernel runs, and the tests' oracle."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """σ(input · weightᵀ + bias)."""
    return torch.sigmoid(F.linear(input, weight, bias))


def as_matrix(tensor: Tensor) -> Tensor:
    """`tensor`, its leading dimensions in one; `reshape(-1, n)` cannot tell how many rows of no columns there are."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def linear_sigmoid_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, each where `needs` says so, from the output alone; differentiable again.

    dz = dy·y·(1 − y), dx = dz·W, dW = dzᵀ·x, db = Σ_rows dz. `input` is needed for dW only, `weight` for dx only.
    """
    dz = torch.ops.aten.sigmoid_backward(grad, output)
    rows = as_matrix(dz)
    dx = dw = db = None
    if needs[0]:
        assert weight is not None
        dx = dz @ weight
    if needs[1]:
        assert input is not None
        dw = rows.t() @ as_matrix(input)
    if needs[2]:
        db = rows.sum(0)
    return dx, dw, db


class Window(NamedTuple):
    """How the 3×3 window of a convolution moves: (height, width) pairs, and how many groups the channels fall into."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of this height and width; below 1 if it is too small."""
        (sh, sw), (ph, pw) = self.stride, self.padding
        return (height + 2 * ph - 3) // sh + 1, (width + 2 * pw - 3) // sw + 1


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, activation: str | None) -> Tensor:
    """input ⋆ weight + bias, then σ where `activation` is "sigmoid". input: (N, C, H, W)."""
    if _onednn_errs(input, input.shape, window):
        x, w, b = map(_widened, (input, weight, bias))
        with torch.autocast("cpu", enabled=False):
            return conv3x3(x, w, b, window, activation).to(input.dtype)
    stride, padding, groups = window
    output = F.conv2d(_regular(input, weight, groups), weight, bias, stride, padding, groups=groups)
    return torch.sigmoid(output) if activation == "sigmoid" else output


def channels_last(tensor: Tensor) -> bool:
    """Whether torch takes a 4-dimensional tensor for channels_last: by its strides, as c10/core/MemoryFormat.h has it.

    It need not be dense; strides that would fit both ways count as contiguous.
    """
    size, stride = tensor.shape, tensor.stride()
    least = 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or stride[1] == 0 or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * size[d]
    return True


def _onednn_errs(tensor: Tensor, input_size: Sequence[int], window: Window) -> bool:
    """Whether torch would read memory that nobody wrote: in bfloat16 of stride 2, for a result one column wide.

    oneDNN does with AVX-512 and AMX in torch 2.13 and 2.15. https://github.com/pytorch/pytorch/issues/169688: stride 3.
    """
    narrow = tensor.dtype == torch.bfloat16 and window.stride[1] == 2 and tensor.device.type == "cpu"
    return narrow and window.output_size(*input_size[2:])[1] == 1


def _widened(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.float()


def _regular(input: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`input`, copied where torch would compute a wrong gradient of the weight from it on the CPU.

    Of a grouped convolution in channels_last order it reads the strides of dimensions of length 1, which can be any:
    https://github.com/pytorch/pytorch/issues/190773.
    """
    if groups == 1 or 1 not in input.shape or input.device.type != "cpu" or not channels_last(weight):
        return input
    expected, odd = 1, False
    for d in (1, 3, 2, 0):
        size, stride = input.shape[d], input.stride(d)
        if size > 1 and stride != expected:
            return input  # torch copies it
        odd = odd or stride != expected
        expected *= size
    return input.clone(memory_format=torch.channels_last) if odd else input


def conv3x3_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format that torch gives a convolution's output and the gradient of its input."""
    if input.is_cuda and input.dtype == torch.float64:
        return torch.contiguous_format  # as cuDNN's are
    last = channels_last(input) or channels_last(weight)
    return torch.channels_last if last else torch.contiguous_format


def conv3x3_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None,
    input_size: Sequence[int], window: Window, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so; differentiable again.

    `output`, given if the activation is a sigmoid, is all that dz = dy·y·(1 − y) takes. `input` is needed for the
    weight's gradient only, `weight` for the input's only.
    """
    if _onednn_errs(grad, input_size, window):
        dy, x, w, y = map(_widened, (grad, input, weight, output))
        grads = conv3x3_backward(dy, x, w, y, input_size, window, needs)
        dx, dw, db = (None if t is None else t.to(grad.dtype) for t in grads)
        return dx, dw, db
    stride, padding, groups = window
    dz = grad if output is None else torch.ops.aten.sigmoid_backward(grad, output)
    n, c = dz.shape[1], input_size[1] // groups
    dx = dw = db = None
    if needs[0] or needs[1]:
        # Whichever is not needed is asked for its shape alone.
        x = input if input is not None else dz.new_empty(1).expand(tuple(input_size))
        w = weight if weight is not None else dz.new_empty(1).expand(n, c, 3, 3)
        x = _regular(x, w, groups)
        mask = [needs[0], needs[1], False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dz, x, w, None, stride, padding, (1, 1), False, (0, 0), groups, mask
        )
    if needs[2]:
        db = dz.sum((0, 2, 3))
    return dx, dw, db


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
