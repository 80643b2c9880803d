"""float64 results to compare with, and how far from them a result may be."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Relative Frobenius error against float64, and never more than twice torch's own (`assert_close`). Each is what one
# rounding to the type costs (half a unit in the last place: 6e-8, 5e-4, 4e-3), with room for rounding twice, not for
# a lost term: one product of a hundred left out is 1e-1 / √100 = 1e-2.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
TF32_TOLERANCE = 1e-3


def matrix(rows: int, cols: int, dtype: torch.dtype, device: str, transposed: bool = False) -> Tensor:
    """Random numbers, in rows or (transposed) in columns."""
    values = torch.randn((cols, rows) if transposed else (rows, cols), dtype=torch.float64).to(device, dtype)
    return values.t() if transposed else values


def error(result: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """‖result − exact‖ / ‖exact‖, or relative to `scale`, the size of the terms of a sum that can cancel, if more."""
    assert result.shape == exact.shape
    size = exact.norm() if scale is None else torch.maximum(exact.norm(), scale.norm())
    return float((result.detach().double().cpu() - exact).norm() / size.clamp_min(1e-300))


def assert_close(
    result: Tensor,
    exact: Tensor,
    torchs: Tensor | None = None,
    scale: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """`result` is within its type's tolerance of `exact`, and not more than twice as far as torch's own result.

    Two units in the last place over the root of the number of elements, n, are granted on top. Rounding errors are
    random and independent, so their norm over that of n values is off its mean by some 1/√n: torch's one number may
    happen to be exact, where twice its error is nothing. Drawn 20,000 times and more, three roundings stay within the
    bound of one in 99.99 % for every n up to 1,024; what has lost two bits, four times the error of one rounding, is
    over it from 100 elements on. From 64 on a quarter of a unit remains, for a GPU's own exp and division. In float64
    the exact value is torch's own, so there is nothing to compare.
    """
    bound = tolerance or TOLERANCE[result.dtype]
    ours = error(result, exact, scale)
    assert ours <= bound, f"error {ours:.2e} is over {bound:.0e}"
    if torchs is not None and result.dtype != torch.float64:
        luck = 2 / min(max(result.numel(), 1), 64) ** 0.5
        allowed = 2 * error(torchs, exact, scale) + luck * torch.finfo(result.dtype).eps
        assert ours <= allowed, f"error {ours:.2e} is over twice torch's: {allowed:.2e}"


Activation = str | tuple[Any, ...] | None
# As users give them, with torch's numbers and with others; bounds that bfloat16 rounds up and down.
ACTIVATIONS: list[Activation] = [
    None, "sigmoid", "tanh", "relu", "leaky_relu", ("leaky_relu", 0.3), "elu", ("elu", 0.7), "softplus",
    ("softplus", 2.5, 18), "hardsigmoid", "hardtanh", ("hardtanh", -0.3, 0.1), "relu6",
]  # fmt: skip


def activated(z: Tensor, activation: Activation) -> Tensor:
    """torch's function of that name."""
    name, *numbers = activation if isinstance(activation, tuple) else (activation,)
    return z if name is None else getattr(torch if name in ("sigmoid", "tanh", "relu") else F, name)(z, *numbers)


def exactly(z: Tensor, activation: Activation) -> Tensor:
    """The same in float64, where torch's hardsigmoid multiplies by float32's ⅙."""
    return (z + 3).clamp(0, 6) / 6 if activation == "hardsigmoid" else activated(z, activation)


def derivative(y: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """act′ in float64 from outputs that were stored as `dtype`."""
    name, *given = activation if isinstance(activation, tuple) else (activation,)
    a, b = (
        *given,
        *{"leaky_relu": (0.01,), "elu": (1,), "softplus": (1, 20), "hardtanh": (-1, 1)}.get(name, ()),
        0,
        0,
    )[:2]
    if name == "elu":  # an output at −α is −α rounded
        a = float(torch.tensor(float(a), dtype=torch.float64).to(dtype))
    if name in ("hardtanh", "relu6"):
        bounds = torch.tensor([0, 6] if name == "relu6" else [a, b], dtype=torch.float64).to(dtype).double()
        return torch.logical_and(y > bounds[0], y < bounds[1]).double()
    one = torch.ones_like(y)
    forms: dict[str | None, Callable[[], Tensor]] = {
        None: lambda: one,
        "sigmoid": lambda: y * (1 - y),
        "tanh": lambda: (1 - y) * (1 + y),
        "relu": lambda: (y > 0).double(),
        "leaky_relu": lambda: torch.where(y > 0, one, a * one),
        "elu": lambda: torch.where(y > 0, one, y + a),
        "softplus": lambda: torch.where(y * a > b, one, -torch.expm1(-a * y)),
        "hardsigmoid": lambda: ((y > 0) & (y < 1)).double() / 6,
    }
    return forms[name]()


class Linear:
    """y = act(x·wᵀ + b) and its gradients in float64, each from the inputs the library's own kernel has."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, activation: Activation = None) -> None:
        self.activation = activation
        self.x, self.w = x.detach().double().cpu(), w.detach().double().cpu()
        z = self.x @ self.w.t()
        self.y = exactly(z if b is None else z + b.detach().double().cpu(), activation)

    def gradients(self, dy: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dx, dw, db and the size of db's terms, for the output `y` as it was rounded: backward has no other."""
        dz = dy.detach().double().cpu() * derivative(y.detach().double().cpu(), self.activation, y.dtype)
        rows = dz.reshape(-1, dz.shape[-1])
        return dz @ self.w, rows.t() @ self.x.reshape(-1, self.x.shape[-1]), rows.sum(0), rows.norm(dim=0)


class LinearSigmoid(Linear):
    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None) -> None:
        super().__init__(x, w, b, "sigmoid")


class Conv3x3:
    """y = act(x ⋆ w + b) and its gradients in float64, tap by tap; x: (N, C, H, W), stride and padding pairs."""

    def __init__(
        self, x: Tensor, w: Tensor, b: Tensor | None = None, stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0), groups: int = 1, activation: Activation = None,
    ) -> None:  # fmt: skip
        x, w = x.detach().double().cpu(), w.detach().double().cpu()
        self.stride, self.padding, self.groups, self.activation = stride, padding, groups, activation
        self.x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).unflatten(1, (groups, w.shape[1]))
        self.w = [w[..., r, t].unflatten(0, (groups, -1)) for r in range(3) for t in range(3)]
        z = sum(torch.einsum("ngchw,goc->ngohw", *pair) for pair in zip(self.taps(self.x), self.w, strict=True))
        assert isinstance(z, Tensor)
        z = z.flatten(1, 2)
        z = z if b is None else z + b.detach().double().cpu()[:, None, None]
        self.y = exactly(z, activation)

    def taps(self, padded: Tensor) -> Iterator[Tensor]:
        """Of every tap what it sees of the padded image: views as large as the output."""
        (high, wide), (sh, sw) = padded.shape[-2:], self.stride
        return (padded[..., r : high - 2 + r : sh, t : wide - 2 + t : sw] for r in range(3) for t in range(3))

    def gradients(self, dy: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dx, dw, db and the size of db's terms, for the output `y` as it was rounded: backward has no other."""
        dz = dy.detach().double().cpu() * derivative(y.detach().double().cpu(), self.activation, y.dtype)
        by_group = dz.unflatten(1, (self.groups, dz.shape[1] // self.groups))
        dx, dw = torch.zeros_like(self.x), []
        for seen, target, w in zip(self.taps(self.x), self.taps(dx), self.w, strict=True):
            target += torch.einsum("ngohw,goc->ngchw", by_group, w)
            dw.append(torch.einsum("ngohw,ngchw->goc", by_group, seen).flatten(0, 1))
        (ph, pw), (high, wide) = self.padding, dx.shape[-2:]
        dx = dx.flatten(1, 2)[..., ph : high - ph, pw : wide - pw]
        terms = dz.transpose(0, 1).flatten(1).norm(dim=1)
        return dx, torch.stack(dw, -1).unflatten(-1, (3, 3)), dz.sum((0, 2, 3)), terms


def grads(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy, retain_graph=True)
