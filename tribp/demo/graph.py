"""The computation graph of the network 2-2-1 as SVG: every value on the way forward, every gradient on the way back."""

from typing import NamedTuple

import torch

from ..functional import linear
from .checks import two_two_one_network
from .losses import half_squared_error

Values = dict[str, float]  # by the names below, those of gradients with "∂E/∂" before them
Line = tuple[str, str]  # "value" or "gradient", and the text
# x, z, h: the input, and the sums and outputs of the hidden units; u, y: the sum and output of the output unit; E: the
# loss. w, b and v, c: weights and biases of the two layers.
X, B, Z, H, V = (("x₁", "x₂"), ("b₁", "b₂"), ("z₁", "z₂"), ("h₁", "h₂"), ("v₁", "v₂"))
W = (("w₁₁", "w₁₂"), ("w₂₁", "w₂₂"))  # to a hidden unit, from an input
FORMULAS = {
    **{z: f"{w[0]} x₁ + {w[1]} x₂ + {b}" for z, w, b in zip(Z, W, B, strict=True)},
    **{h: f"σ({z})" for h, z in zip(H, Z, strict=True)},
    "u": "v₁ h₁ + v₂ h₂ + c", "y": "σ(u)", "E": "½ (y − t)²",
}  # fmt: skip

WIDTH, HEIGHT, LINE, PADDING = 1280, 340, 19, 9


def values(device: torch.device) -> Values:
    """Every value and gradient of the network, computed by the library in float64."""
    first, second, x, target = two_two_one_network(device)
    x.requires_grad_()
    hidden = first(x)
    output = second(hidden)
    for tensor in (hidden, output):
        tensor.retain_grad()
    loss = half_squared_error(output, target)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():  # these two the layers do not keep
        z, u = linear(x, first.weight, first.bias), linear(hidden, second.weight, second.bias)
    assert first.bias is not None
    assert second.bias is not None
    dz, du = first.bias.grad, second.bias.grad  # of one row, a sum's gradient is that of the bias in it
    tensors = [
        (X, x, x.grad), ((*W[0], *W[1]), first.weight, first.weight.grad), (B, first.bias, dz), (Z, z, dz),
        (H, hidden, hidden.grad), (V, second.weight, second.weight.grad), (("c",), second.bias, du), (("u",), u, du),
        (("y",), output, output.grad), (("t",), target, None), (("E",), loss, None),
    ]  # fmt: skip
    values: Values = {}
    for names, value, gradient in tensors:
        values |= zip(names, value.flatten().tolist(), strict=True)
        if gradient is not None:
            values |= zip((f"∂E/∂{name}" for name in names), gradient.flatten().tolist(), strict=True)
    return values


class Box(NamedTuple):
    """A node: where its left edge and its middle are, and its lines of text with the class of each."""

    left: float
    middle: float
    width: float
    lines: list[Line]

    @property
    def right(self) -> float:
        return self.left + self.width


def svg(values: Values) -> str:
    """The graph as an element of a page, in the page's colours: `currentColor`, and gradients in `--gradient`."""

    def lines(*names: str) -> list[Line]:
        return [line for name in names for line in _lines(name, values)]

    rows = (75.0, 265.0)
    inputs = [Box(10, y, 165, lines(name)) for name, y in zip(X, rows, strict=True)]
    hidden = [Box(385, y, 245, lines(*names)) for *names, y in zip(B, Z, H, rows, strict=True)]
    output = Box(800, HEIGHT / 2, 235, lines("c", "u", "y"))
    loss = Box(1070, HEIGHT / 2, 200, lines("t", "E"))
    # An input's line to its own hidden unit is labelled in the middle; those that cross, near their beginning.
    edges = [(inputs[i], hidden[j], lines(W[j][i]), 0.5 if i == j else 0.3) for j in range(2) for i in range(2)]
    edges += [(box, output, lines(name), 0.5) for box, name in zip(hidden, V, strict=True)]
    parts = [_arrow(start, end) for start, end, *_ in edges] + [_arrow(output, loss)]
    parts += [_box(box) for box in (*inputs, *hidden, output, loss)]
    parts += [_label(*edge) for edge in edges]
    return "\n".join(
        [
            f'<svg class="graph" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="graph-title">',
            '<title id="graph-title">The network 2-2-1: each value, and the gradient of the loss by it</title>',
            *parts,
            "</svg>",
        ]
    )


def _lines(name: str, values: Values) -> list[Line]:
    """A value, with the formula it comes from, and its gradient."""
    parts = [name, *([FORMULAS[name]] if name in FORMULAS else []), f"{values[name]:.6g}"]
    lines = [("value", " = ".join(parts))]
    if (gradient := f"∂E/∂{name}") in values:
        lines.append(("gradient", f"{gradient} = {values[gradient]:.6g}"))
    return lines


def _box(box: Box) -> str:
    height = LINE * len(box.lines) + PADDING
    top = box.middle - height / 2
    shape = f'<rect x="{box.left:g}" y="{top:g}" width="{box.width:g}" height="{height:g}" rx="6"/>'
    return shape + _texts(box.left + PADDING, top + LINE, box.lines, "start")


def _arrow(start: Box, end: Box) -> str:
    return f'<path d="M{start.right:g} {start.middle:g}L{end.left:g} {end.middle:g}"/>'


def _label(start: Box, end: Box, lines: list[Line], share: float) -> str:
    """The lines of a weight, on its arrow at `share` of the length."""
    x = start.right + share * (end.left - start.right)
    y = start.middle + share * (end.middle - start.middle)
    return _texts(x, y, lines, "middle")


def _texts(x: float, y: float, lines: list[Line], anchor: str) -> str:
    return "".join(
        f'<text class="{kind}" x="{x:g}" y="{y + LINE * i:g}" text-anchor="{anchor}">{line}</text>'
        for i, (kind, line) in enumerate(lines)
    )
