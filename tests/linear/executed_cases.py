"""`linear` where compiled code is executed: cases, and how far off their results may be."""

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import tribp

from ..executed.checks import (
    BRAIN,
    DOUBLE,
    HALF,
    SINGLE,
    Case,
    Gradients,
    Layout,
    Rounding,
    differences,
    gradients,
    output_bound,
    require_gradients,
)
from ..optim import cases as lies
from ..oracle import ACTIVATIONS, Activation, derivative
from ..oracle import Linear as Oracle


def expanded(t: Tensor) -> Tensor:
    """As `y.sum().backward()` leaves a gradient."""
    return t.detach().flatten()[:1].reshape(1, 1).expand(t.shape)


def shifted_columns(t: Tensor) -> Tensor:
    return lies.shifted(t.t()).t()


class Linear(NamedTuple):
    size: tuple[int, int, int]  # M, N, K
    dtype: torch.dtype = BRAIN
    x: Layout = lies.plain
    w: Layout = lies.plain
    dy: Layout = lies.plain
    needs: str = "xwb"  # whose gradients
    bias: bool = True
    activation: Activation = "sigmoid"
    tf32: bool = False
    processors: int = 2

    def wrong(self) -> list[str]:
        m, n, k = self.size
        # A cut operand is too small: the errors of terms that are all positive do not cancel.
        draw = torch.rand if self.tf32 else torch.randn
        x = self.x(draw(m, k, dtype=DOUBLE).to(self.dtype))
        w = self.w((draw(n, k, dtype=DOUBLE) / (k if self.tf32 else k**0.5)).to(self.dtype))
        b = draw(n, dtype=DOUBLE).to(self.dtype) if self.bias else None
        dy = self.dy(draw(m, n, dtype=DOUBLE).to(self.dtype))
        inputs = require_gradients(self.needs, x, w, b)
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        y = tribp.linear(x, w, b, self.activation)
        found = gradients(y, inputs, dy)

        rounding = Rounding(self.dtype, self.tf32)
        oracle = Oracle(x, w, b, self.activation)
        size = oracle.x.square() @ oracle.w.square().t()
        size = (size if b is None else size + b.detach().double().square()).sqrt()
        error = rounding.sum_of(k) * size
        wrong = differences("y", y, oracle.y, output_bound(rounding, oracle.y, error, self.activation))
        dx, dw, db, terms = oracle.gradients(dy, y)
        dz = (dy.double() * derivative(y.detach().double(), self.activation, self.dtype)).square()
        exact = Gradients(
            (dx, rounding.sum_of(n, rounded=True) * (dz @ oracle.w.square()).sqrt()),
            (dw, rounding.sum_of(m, rounded=True) * (dz.t() @ oracle.x.square()).sqrt()),
            (db, Rounding(self.dtype).sum_of(m) * terms),
        )
        return wrong + exact.differences(found, rounding)


# Parameters are constants of the compiled code: values of their own stand for the usual ones.
KINDS: list[Activation] = ["tanh", "relu", "hardsigmoid", *(act for act in ACTIVATIONS if isinstance(act, tuple))]

QUICK: dict[str, Case] = {
    "linear, whole tiles": Linear((136, 264, 200)),
    "linear, odd pitch": Linear((70, 77, 65), x=lies.transposed),
    "linear, even pitch": Linear((72, 42, 78), HALF, w=lies.transposed),
    "linear, misaligned": Linear((40, 24, 72), x=lies.shifted, w=shifted_columns, dy=lies.gaps, bias=False),
    "linear, float32": Linear((136, 72, 104), SINGLE),
    "linear, tf32": Linear((72, 72, 136), SINGLE, tf32=True),
    "linear, frozen weight": Linear((72, 136, 72), needs="xb", dy=expanded),
    "linear, split sum": Linear((1100, 40, 72), HALF, needs="wb"),
    "linear, few parts of dw, more of db": Linear((300, 77, 36), needs="wb", processors=8),
    "linear, y in parts": Linear((24, 18, 4200), needs="", processors=8),
    "linear, y in parts, no bias": Linear((24, 17, 4200), HALF, needs="", bias=False, processors=8),
    "linear, dx in parts": Linear((24, 4200, 18), needs="x", activation=None, processors=8),
}
QUICK_ON_HOPPER: dict[str, Case] = {
    "linear, float64": Linear((72, 40, 56), DOUBLE),
    "linear, columns": Linear((136, 72, 136), HALF, lies.transposed, lies.transposed),
    "linear, persistent": Linear((136, 264, 1032), needs="", processors=1),
    "linear, odd pitch, short sums": Linear((40, 7, 9)),
    "linear, split sum behind dx": Linear((1100, 40, 72), HALF),
    "linear, dx alone": Linear((136, 72, 72), needs="x"),
    "linear, wide dx": Linear((136, 72, 200), needs="x", processors=1),
    "linear, tall dx": Linear((250, 72, 360), needs="x", processors=1),
    "linear, db alone": Linear((136, 72, 24), needs="b"),
    "linear, no activation": Linear((136, 72, 72), activation=None),
    "linear, no activation, dy expanded": Linear((70, 40, 72), activation=None, dy=expanded),
    **{
        f"linear, {activation} {str(dtype)[6:]}": Linear((40, 24, 72), dtype, activation=activation)
        for activation, dtype in zip(KINDS, itertools.cycle((SINGLE, BRAIN, HALF)), strict=False)
    },
}

DTYPES = (HALF, BRAIN, SINGLE, DOUBLE)
SLOW: dict[str, Case] = {
    "linear, large y in parts": Linear((120, 120, 8200), needs="", processors=8),
    "linear, large dx in parts": Linear((120, 8200, 120), HALF, needs="x", activation=None, processors=8),
    "linear, tf32 columns": Linear((72, 136, 72), SINGLE, lies.transposed, lies.transposed, tf32=True),
    "linear, odd pitch, wide tiles": Linear((136, 137, 97), HALF),
    "linear, no activation, db alone": Linear((70, 40, 72), HALF, needs="b", activation=None),
    "linear, one row": Linear((1, 40, 72)),
    "linear, one column": Linear((72, 1, 72), HALF),
    "linear, one term": Linear((33, 17, 1), SINGLE),
    "linear, many rows": Linear((4099, 10, 40)),
    "linear, long sum": Linear((136, 136, 2056), needs="xw"),
    **{
        f"linear, {activation}, {str(dtype)[6:]}": Linear((72, 136, 104), dtype, activation=activation)
        for activation, dtype in itertools.product(ACTIVATIONS, DTYPES)
    },
    **{
        f"linear, {str(dtype)[6:]}, x {x.__name__}, w {w.__name__}, dy {dy.__name__}": Linear(
            (136, 72, 88), dtype, x, w, dy
        )
        for dtype, (x, w, dy) in itertools.product(
            DTYPES,
            [
                (lies.plain, lies.transposed, lies.transposed),
                (lies.transposed, lies.plain, lies.shifted),
                (lies.gaps, shifted_columns, lies.plain),
            ],
        )
    },
}  # fmt: skip


def random_linear(chance: random.Random) -> Case:
    m, n, k = (chance.choice([1, 2, 7, 16, 31, 40, 64, 72, 100, 129, 200]) for _ in range(3))
    return Linear(
        (m, n, k),
        chance.choice(DTYPES),
        x=chance.choice([lies.plain, lies.transposed, lies.gaps, lies.shifted]),
        w=chance.choice([lies.plain, lies.transposed, lies.gaps, lies.shifted]),
        dy=chance.choice([lies.plain, lies.transposed, lies.shifted, expanded]),
        needs="".join(letter for letter in "xwb" if chance.random() < 0.8),
        bias=chance.random() < 0.7,
        activation=chance.choice(ACTIVATIONS),
        processors=chance.choice([1, 2, 8, 108]),
    )


RANDOM: dict[str, Callable[[random.Random], Case]] = {"linear": random_linear}
