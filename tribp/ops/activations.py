"""Activations as torch computes them; `tribp/kernels/activations.py` has the kernels' side.

Those are taken whose derivative follows from the output y, so that y is all that backward keeps.
"""

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

dispatch_modes = torch._C._len_torch_dispatch_stack


class Activation(NamedTuple):
    """One activation with its numbers, both of which are 0 where it has none."""

    name: str | None  # None: there is no activation
    a: float = 0.0  # the slope of leaky_relu, α of elu, β of softplus, the lower bound of hardtanh
    b: float = 0.0  # the threshold of softplus, the upper bound of hardtanh

    @property
    def costly(self) -> bool:
        """Whether its value takes more registers than a sigmoid's."""
        return self.name in ("tanh", "elu", "softplus")


NONE = Activation(None)
LARGEST = torch.finfo(torch.float32).max
# By what users call them: what torch's function takes besides its input, with torch's defaults.
DEFAULTS: dict[str, dict[str, float]] = {
    "sigmoid": {},
    "tanh": {},
    "relu": {},
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "hardsigmoid": {},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "relu6": {},
}
NAMED = {name: Activation(name, *numbers.values()) for name, numbers in DEFAULTS.items()}
NAMED["relu6"] = Activation("hardtanh", 0.0, 6.0)
ActivationLike = str | tuple[str | float, ...] | None  # as users give one


def activation_of(caller: str, activation: ActivationLike, argument: str = "activation") -> Activation:
    """What `activation` means: None, a name, or a tuple of a name and numbers, in the order of torch's function.

    Raises ValueError, in the name of `caller` and its argument, for what is not known.
    """
    if activation is None:
        return NONE
    name, *numbers = activation if isinstance(activation, tuple) and activation else (activation,)
    if not isinstance(name, str) or name not in NAMED:
        known = f"None, one of {', '.join(map(repr, NAMED))}, or a tuple of a name and its numbers"
        raise ValueError(f"{caller}: {argument} must be {known}, got {activation!r}")
    return _with_numbers(caller, name, numbers) if numbers else NAMED[name]


def _with_numbers(caller: str, name: str, numbers: Sequence[Any]) -> Activation:
    names, usual = list(DEFAULTS[name]), list(DEFAULTS[name].values())
    plain = all(type(number) is float or (type(number) is int and abs(number) < 2**1000) for number in numbers)
    if len(numbers) > len(names) or not plain:
        takes = " and ".join(names) + ", each a Python int or float" if names else "no numbers"
        raise ValueError(f"{caller}: {name} takes {takes}, got {', '.join(map(repr, numbers))}")
    values = [float(number) for number in numbers] + usual[len(numbers) :]
    a, b = [*values, 0.0][:2]
    if name in ("leaky_relu", "elu") and not a >= 0:
        raise ValueError(f"{caller}: {names[0]} of {name} must be at least 0, else two z have one output, got {a}")
    if name in ("leaky_relu", "elu", "softplus") and a > LARGEST:
        # Gradients of 0 would become 0·∞.
        raise ValueError(f"{caller}: {names[0]} of {name} must be a finite float32, got {a}")
    if name == "softplus" and not (a > 0 and b >= 17):
        # Beyond the threshold softplus is z itself, and between it and log(1 + e^threshold) y comes of two z: the
        # derivative is wrong there by e^-threshold, which from 17 on is nothing to a float32.
        raise ValueError(f"{caller}: beta of softplus must be above 0 and its threshold at least 17, got {a} and {b}")
    if name == "hardtanh" and not a <= b:
        raise ValueError(f"{caller}: bounds of hardtanh must be numbers, min_val not above max_val, got {a} and {b}")
    return Activation(name, a, b)


def as_stored(activation: Activation, dtype: torch.dtype) -> Activation:
    """The activation with the numbers that outputs of this dtype reach, for backward to find an output at its end.

    Those are the bounds of hardtanh, and −α of elu, which stays finite: a gradient of 0 times ∞ would be NaN.
    """
    name, a, b = activation
    if name == "elu":
        return Activation(name, min(_stored(a, dtype), torch.finfo(dtype).max), b)
    return Activation(name, _stored(a, dtype), _stored(b, dtype)) if name == "hardtanh" else activation


def _stored(x: float, dtype: torch.dtype) -> float:
    """What a kernel stores of x: rounded to float32, then to the dtype. Not by torch, which may be tracing."""
    if dtype == torch.float64:
        return x
    try:
        (x,) = struct.unpack("f", struct.pack("f", x))
        if dtype == torch.float16:
            (x,) = struct.unpack("e", struct.pack("e", x))
    except OverflowError:
        return math.copysign(math.inf, x)
    if dtype == torch.bfloat16 and math.isfinite(x):
        (bits,) = struct.unpack("I", struct.pack("f", x))
        (x,) = struct.unpack("f", struct.pack("I", min(bits + 0x7FFF + (bits >> 16 & 1), 2**32 - 1) & 0xFFFF0000))
    return float(x)


def activate(z: Tensor, name: str | None, a: float, b: float) -> Tensor:
    """act(z) of an `Activation`'s parts; TorchScript compiles it, too."""
    if name is None:
        return z
    if name == "sigmoid":
        z = torch.sigmoid(z)
    elif name == "tanh":
        z = torch.tanh(z)
    elif name == "relu":
        z = torch.relu(z)
    elif name == "leaky_relu":
        z = F.leaky_relu(z, a)
    elif name == "elu":
        z = F.elu(z, a)
    elif name == "softplus":
        z = F.softplus(z, a, b)
    elif name == "hardsigmoid":
        z = F.hardsigmoid(z)
    elif name == "hardtanh":
        z = F.hardtanh(z, a, b)
    return z


IN_PLACE: dict[str | None, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid_, "tanh": torch.tanh_, "relu": torch.relu_
}  # fmt: skip


def activate_(z: Tensor, activation: Activation) -> Tensor:
    """act(z) of a tensor that nobody else has: in its place, except where autograd would copy a view of it first.

    Nor while torch.jit.trace looks on: it traces again without gradients, and must find the same operations. Nor under
    a dispatch mode, which may keep z. Nor of a subclass: a DTensor may be a summand in each process, which torch 2.9
    changes where it lies.
    """
    in_place = activation.name in IN_PLACE and type(z) is Tensor and not z.requires_grad
    if not in_place or torch._C._get_tracing_state() is not None or dispatch_modes():
        return activate(z, *activation)
    return IN_PLACE[activation.name](z)


def gradient(dy: Tensor, y: Tensor, activation: Activation) -> Tensor:
    """dz = dy·act′ from y = act(z); differentiable again."""
    name, a, b = as_stored(activation, y.dtype)
    aten = torch.ops.aten
    if name == "sigmoid":
        dy = aten.sigmoid_backward(dy, y)
    elif name == "tanh":
        dy = aten.tanh_backward(dy, y)
    elif name == "relu":
        dy = aten.threshold_backward(dy, y, 0)
    elif name == "leaky_relu":
        dy = aten.leaky_relu_backward(dy, y, a, True)
    elif name == "elu":
        dy = aten.elu_backward(dy, a, 1, 1, True, y)
    elif name == "softplus":  # dy·σ(β·z), and y = log(1 + eᵝᶻ) / β
        above = max(b, 0.0) + 1.001 * math.log1p(math.exp(-abs(b)))  # a little more than y·β at the threshold itself
        dy = torch.where(y * a > above, dy, -dy * torch.expm1(-a * y))
    elif name == "hardsigmoid":
        dy = torch.where((y > 0) & (y < 1), dy / 6, 0)
    elif name == "hardtanh":
        dy = aten.hardtanh_backward(dy, y, a, b)
    return dy
