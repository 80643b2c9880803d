"""Activations behind `linear` and `conv3x3`, on the fallback and on the kernels, against torch's layers."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp import dispatch
from tribp.ops.activations import Activation as Known
from tribp.ops.activations import activation_of, as_stored, gradient

from ..covering import DTYPES, turn
from ..oracle import ACTIVATIONS, Activation, Conv3x3, Linear, activated, assert_close, grads

Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def linear(activation: Activation) -> tuple[Function, Function, list[tuple[int, ...]]]:
    """Ours, torch's, the sizes of what they take."""
    return (
        lambda x, w, b: tribp.linear(x, w, b, activation),
        lambda x, w, b: activated(F.linear(x, w, b), activation),
        [(33, 17), (7, 17), (7,)],
    )


def conv(activation: Activation, *, c: int = 5, o: int = 6, groups: int = 1) -> tuple[Any, Any, list[tuple[int, ...]]]:
    return (
        lambda x, w, b: tribp.conv3x3(x, w, b, padding=1, groups=groups, activation=activation),
        lambda x, w, b: activated(F.conv2d(x, w, b, padding=1, groups=groups), activation),
        [(2, c, 4, 5), (o, c // groups, 3, 3), (o,)],
    )


LAYERS: dict[str, Callable[[Activation], tuple[Any, Any, list[tuple[int, ...]]]]] = {
    "linear": linear,
    "few channels": lambda activation: conv(activation, c=3),
    "dense": lambda activation: conv(activation, c=8, o=8),
    "depthwise": lambda activation: conv(activation, c=6, groups=6),
}


def draw(sizes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    x, w, b = (torch.randn(size, dtype=torch.float64) for size in sizes)
    w = w / w[0].numel() ** 0.5
    return [t.to(device, dtype).requires_grad_() for t in (x, w, b)]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_matches_float64(activation: Activation, layer: str, device: str) -> None:
    dtype = turn(DTYPES, str(activation), layer)
    ours, theirs, sizes = LAYERS[layer](activation)
    inputs = draw(sizes, dtype, device)
    y, expected = ours(*inputs), theirs(*inputs)
    dy = torch.randn(y.shape, device=device).to(dtype)
    x, w, b = inputs
    if layer == "linear":
        exact: Linear | Conv3x3 = Linear(x, w, b, activation)
    else:
        exact = Conv3x3(x, w, b, (1, 1), (1, 1), x.shape[1] // w.shape[1], activation)
    assert_close(y, exact.y, expected)
    found = grads(y, inputs, dy)
    if dispatch.backend_of(y) == "torch":  # which differentiates from z
        for result, value in zip(found, grads(expected, inputs, dy), strict=True):
            torch.testing.assert_close(result, value)
        return
    dx, dw, db, terms = exact.gradients(dy, y)
    assert_close(found[0], dx)
    assert_close(found[1], dw)
    assert_close(found[2], db, scale=terms)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradcheck(activation: Activation, device: str) -> None:
    """Through the kernels in float64, and a second time through torch's operations."""
    ours, _, ((_, k), *sizes) = linear(activation)
    inputs = draw([(3, k), *sizes], torch.float64, device)
    torch.autograd.gradcheck(ours, inputs, fast_mode=True)
    if activation != "hardsigmoid" or dispatch.backend_of(inputs[0]) == "triton":  # torch has no second derivative
        torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", ("leaky_relu", 0.5), "hardtanh", "relu6", None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(activation: Activation, dtype: torch.dtype, device: str) -> None:
    """Every sum is one, so a result is torch's to the bit."""
    if activation == "leaky_relu":
        activation = ("leaky_relu", 0.25)
    x, w, b = (torch.randint(-2, 3, size).to(device, dtype).requires_grad_() for size in [(37, 9), (21, 9), (21,)])
    y, expected = tribp.linear(x, w, b, activation), activated(F.linear(x, w, b), activation)
    assert torch.equal(y, expected)
    dy = torch.randint(-2, 3, y.shape).to(device, dtype)
    for ours, theirs in zip(grads(y, [x, w, b], dy), grads(expected, [x, w, b], dy), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_torchs_operations_agree_with_autograd(activation: Activation, dtype: torch.dtype) -> None:
    """Backward from the output, as the fallback of compiled graphs computes it."""
    z = torch.linspace(-8, 8, 999, dtype=torch.float64).to(dtype).requires_grad_()
    y, dy = activated(z, activation), torch.randn(999).to(dtype)
    found = gradient(dy, y.detach(), activation_of("test", activation))
    (expected,) = torch.autograd.grad(y, z, dy) if activation else (dy,)
    # elu's derivative is y + α: what y lost when it was rounded is lost of it, too.
    units = max(4 * torch.finfo(dtype).eps, 1e-7 * (activation == "hardsigmoid"))  # whose ⅙ is a float32 in torch
    torch.testing.assert_close(found, expected, rtol=units, atol=2 * units)


def test_bounds_are_found_as_they_are_stored() -> None:
    for dtype in DTYPES:
        _, *bounds = as_stored(Known("hardtanh", -0.3, 0.1), dtype)
        assert bounds == torch.tensor([-0.3, 0.1], dtype=torch.float64).to(dtype).tolist()
    assert as_stored(Known("hardtanh", float("-inf"), 3.0), torch.bfloat16) == Known("hardtanh", float("-inf"), 3.0)
    assert as_stored(Known("elu", 0.7), torch.bfloat16).a == float(torch.tensor(0.7, dtype=torch.bfloat16))
    assert as_stored(Known("leaky_relu", 0.1), torch.bfloat16).a == 0.1
    numbers = [1e-6, 1e-9, 3e-41, 65519.0, 65520.0, 1e39, -1e39, 1 + 2**-11 + 2**-40, 2.0**-133, 3.3895e38, math.inf]
    for dtype in DTYPES:
        for number in numbers:
            by_torch = torch.tensor(number, dtype=torch.float64)
            by_torch = by_torch.float().to(dtype) if dtype != torch.float64 else by_torch
            assert as_stored(Known("hardtanh", -number, number), dtype)[1:] == (-float(by_torch), float(by_torch))


@pytest.mark.parametrize("layer", LAYERS)
def test_keeps_no_output_without_activation(layer: str, kernels: str) -> None:
    ours, _, sizes = LAYERS[layer](None)
    y = ours(*draw(sizes, torch.float32, kernels))
    assert y.data_ptr() not in {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}


def test_dy_is_read_where_it_lies(kernels: str, launched: list[str]) -> None:
    """Without an activation dz is dy: nothing is written, unless no kernel can read dy."""
    x, w, b = draw([(33, 17), (24, 17), (24,)], torch.float32, kernels)
    y = tribp.linear(x, w)
    launched.clear()
    torch.autograd.grad(y, (x, w), torch.randn_like(y), retain_graph=True)
    assert launched == ["wgrad", "dgrad"]
    launched.clear()
    torch.autograd.grad(y, (x, w), torch.randn_like(y[:1]).expand_as(y), retain_graph=True)
    assert launched == ["output_grad", "wgrad", "dgrad"], "an expanded dy has no rows"
    launched.clear()
    torch.autograd.grad(tribp.linear(x, w, b), b, torch.randn_like(y))
    assert launched[:2] == ["forward", "output_grad"]


WRONG: list[tuple[object, list[str]]] = [
    ("gelu", ["None, one of 'sigmoid'", "'relu6'", "got 'gelu'"]),
    (torch.relu, ["None, one of 'sigmoid'", "relu"]),
    (nn.ReLU(), ["None, one of 'sigmoid'", "ReLU()"]),
    ((), ["None, one of", "got ()"]),
    (("relu", 1.0), ["relu takes no numbers, got 1.0"]),
    (("leaky_relu", "steep"), ["leaky_relu takes negative_slope, each a Python int or float, got 'steep'"]),
    (("elu", 1.0, 2.0), ["elu takes alpha, each a Python int or float, got 1.0, 2.0"]),
    (("leaky_relu", -0.1), ["negative_slope of leaky_relu must be at least 0", "-0.1"]),
    (("elu", float("nan")), ["alpha of elu must be at least 0", "nan"]),
    (("elu", math.inf), ["alpha of elu must be a finite float32, got inf"]),
    (("leaky_relu", math.inf), ["negative_slope of leaky_relu must be a finite float32, got inf"]),
    (("leaky_relu", 1e39), ["negative_slope of leaky_relu must be a finite float32, got 1e+39"]),
    (("softplus", 1e39), ["beta of softplus must be a finite float32, got 1e+39"]),
    (["elu", 0.5], ["or a tuple of a name and its numbers", "got ['elu', 0.5]"]),
    (("elu", 10**400), ["elu takes alpha, each a Python int or float, got 1000"]),
    (("softplus", 0), ["beta of softplus must be above 0", "got 0.0 and 20.0"]),
    (("softplus", 1, 3), ["threshold at least 17, got 1.0 and 3.0"]),
    (("hardtanh", 2, 1), ["bounds of hardtanh must be numbers, min_val not above max_val", "got 2.0 and 1.0"]),
    (("hardtanh", math.nan, 1), ["bounds of hardtanh must be numbers", "got nan and 1.0"]),
]


@pytest.mark.parametrize(("activation", "words"), WRONG, ids=[str(words[-1]) for _, words in WRONG])
def test_wrong_activations(activation: Any, words: list[str]) -> None:
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    calls: dict[str, Callable[[], object]] = {
        "linear": lambda: tribp.linear(x, w, None, activation),
        "conv3x3": lambda: tribp.conv3x3(torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3), activation=activation),
        "Linear": lambda: tribp.nn.Linear(4, 2, activation=activation),
        "Conv3x3": lambda: tribp.nn.Conv3x3(4, 2, activation=activation),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: .*" + ".*".join(map(re.escape, words))):
            call()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_modules(activation: Activation, device: str) -> None:
    """As torch's layer and function: parameters, state_dict, a copy, TorchScript, what it prints."""
    torch.manual_seed(0)
    theirs, x = nn.Linear(5, 3).to(device), torch.randn(4, 5, device=device)
    torch.manual_seed(0)
    ours = tribp.nn.Linear(5, 3, activation=activation).to(device)
    assert torch.equal(ours.weight, theirs.weight)
    expected = activated(theirs(x), activation)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(copy.deepcopy(ours)(x), expected)
    torch.testing.assert_close(torch.jit.script(ours)(x), expected)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), expected)
    assert ("activation" in str(ours)) == (activation is not None)
    images = torch.randn(1, 2, 4, 4, device=device)
    layer = tribp.nn.Conv3x3(2, 3, activation=activation).to(device)
    expected = activated(F.conv2d(images, layer.weight, layer.bias), activation)
    torch.testing.assert_close(layer(images), expected)
    torch.testing.assert_close(torch.jit.script(layer)(images), expected)


@pytest.mark.filterwarnings("ignore")
def test_an_activation_that_is_changed_later_counts() -> None:
    layer, x = tribp.nn.Linear(5, 3), torch.randn(4, 5)
    layer.activation = "relu"
    expected = torch.relu(F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.jit.script(layer)(x), expected)
    with pytest.raises(ValueError, match=r"^Linear: activation must be .* got ReLU\(\)"):
        layer.activation = nn.ReLU()  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elu_is_flat_where_it_is_flat(dtype: torch.dtype, device: str) -> None:
    """α is no number of float16's or bfloat16's, and y there is α as it is stored."""
    x = torch.tensor([[-800.0], [-1e4], [1.0]], device=device, dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    (dx,) = torch.autograd.grad(tribp.linear(x, one, None, ("elu", 0.7)).sum(), x)
    assert dx.flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("layer", [*LAYERS, "mlp"])
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (("elu", 66000.0), torch.float16),
        (("elu", 3.4e38), torch.bfloat16),
        (("leaky_relu", 3.4e38), torch.float32),
        (("softplus", 3.4e38), torch.float32),
        (("hardtanh", 0.0, math.inf), torch.float32),
    ],
    ids=str,
)
def test_large_numbers_of_activations_reach_no_other_row(
    activation: Any, dtype: torch.dtype, layer: str, device: str
) -> None:
    """Rows that a tile has beyond the tensor have gradients of 0, which no number may turn into NaN."""
    ours, theirs, sizes = LAYERS["linear" if layer == "mlp" else layer](activation)
    if layer == "mlp":
        ours = lambda x, w, b: tribp.mlp(x, [w, torch.eye(7).to(w)], [b, None], activation)  # noqa: E731
    inputs = [t.detach().abs().requires_grad_() for t in draw(sizes, dtype, device)]  # so that each z is positive
    found, expected = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (ours, theirs))
    for ours_grad, torchs_grad in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_grad, torchs_grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("activation", ["relu", ("softplus", 2.0), None], ids=str)
def test_compiled_graphs(activation: Activation, device: str) -> None:
    ours, _, sizes = LAYERS["linear"](activation)
    inputs = draw(sizes, torch.float64, device)
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(y, ours(*inputs))
    dy = torch.randn_like(y)
    for one, other in zip(grads(y, inputs, dy), grads(ours(*inputs), inputs, dy), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("needs", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
@pytest.mark.parametrize("dy", ["rows", "columns", "expanded", "one number", "odd"])
def test_gradients_without_activation(dy: str, needs: str, kernels: str) -> None:
    """dz is dy, where kernels can read it; else it is written first, and then lies as no y does."""
    n = 7 if dy in ("odd", "expanded") else 8
    x, w, b = draw([(33, 16), (n, 16), (n,)], torch.float32, kernels)
    shapes: dict[str, Callable[[], Tensor]] = {
        "columns": lambda: torch.randn(n, 33).t(),
        "expanded": lambda: torch.randn(1, n).expand(33, n),
        "one number": lambda: torch.randn(1, 1).expand(33, n),
    }
    grad = shapes.get(dy, lambda: torch.randn(33, n))().to(kernels)
    inputs = [t for name, t in (("x", x), ("w", w), ("b", b)) if name in needs]
    ours, theirs = tribp.linear(x, w, b), F.linear(x, w, b)
    for result, expected in zip(grads(ours, inputs, grad), grads(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [*LAYERS, "mlp"])
def test_nothing_passes_where_an_output_is_at_a_rounded_bound(layer: str, dtype: torch.dtype, kernels: str) -> None:
    """0.1 and 0.3 lie on either side of what float16 and bfloat16 make of them."""
    for bounds in ((-0.3, 0.1), (-0.1, 0.3)):
        activation = ("hardtanh", *bounds)
        if layer == "mlp":
            x, w, b = draw([(20, 8), (16, 8), (16,)], dtype, kernels)
            hidden = tribp.linear(x, w, b, activation)  # a product with 1 in TF32's parts loses their last bits
            y = tribp.mlp(x, [w, torch.eye(16, dtype=dtype, device=kernels)], [b, None], activation)
        else:
            ours, _, sizes = LAYERS[layer](activation)
            x, w, b = draw(sizes, dtype, kernels)
            hidden = y = ours(x, w, b)
        stored = torch.tensor(bounds, dtype=torch.float64).to(dtype).double()
        inside = (hidden.double() > stored[0]) & (hidden.double() < stored[1])
        (db,) = torch.autograd.grad(y, b, torch.ones_like(y))
        assert 0 < int(inside.sum()) < inside.numel()
        assert torch.equal(db.double(), inside.double().sum([d for d in range(y.dim()) if d != 1]))
