"""`tribp.conv3x3`'s numbers, on the fallback and on the kernels: against float64, and exact where they can be."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tribp

from ..covering import DTYPES, cover, name, turn
from ..oracle import TOLERANCE, assert_close
from .cases import CASES, DENSE, LAYOUTS, WAYS, Case, Layout, grad_of
from .cases import ieee as ieee

pytestmark = pytest.mark.usefixtures("ieee", "one_thread")


def check(case: Case, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> None:
    """Output and gradients of tribp against float64, and against torch's own error."""
    inputs = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    y, theirs = case.ours(*inputs), case.theirs(*inputs)
    found, their_grads = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(theirs, inputs, dy)

    exact = case.exact(*inputs)
    assert y.dtype == x.dtype
    assert_close(y, exact.y, theirs)
    *values, terms = exact.gradients(dy, y)
    # Each gradient is held against float64 on the y it was given; torch's y is rounded elsewhere.
    *their_values, _ = exact.gradients(dy, theirs)
    for i, (result, torchs) in enumerate(zip(found, their_grads, strict=True)):
        assert result.dtype == x.dtype
        torchs = torchs + (values[i] - their_values[i]).to(torchs)
        assert_close(result, values[i], torchs, scale=terms if i == 2 else None)


@pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    cover(
        CASES, DENSE[:2], DTYPES,
        quick=lambda case, layout, dtype: dtype == turn(DTYPES, case) and layout == turn(DENSE[:2], case),
    ),
)  # fmt: skip
def test_matches_float64(case: str, layout: Layout, dtype: torch.dtype, device: str) -> None:
    x, w, b = CASES[case].make(dtype, device)
    check(CASES[case], layout(x), w, b, layout(grad_of(CASES[case], x, w)))


@pytest.mark.parametrize("first", range(len(LAYOUTS)), ids=[name(layout) for layout in LAYOUTS])
def test_layouts(first: int, device: str) -> None:
    """Input, weight and gradient each in every layout."""
    way = WAYS[turn(list(WAYS), first)]
    x, w, b = way.make(turn(DTYPES, first), device)
    x_layout, w_layout, dy_layout = (LAYOUTS[(first + shift) % len(LAYOUTS)] for shift in (0, 5, 9))
    check(way, x_layout(x), w_layout(w), b, dy_layout(grad_of(way, x, w)))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("argument", ["input", "weight", "grad"])
def test_each_layout_in_each_place(argument: str, layout: Layout, way: str, device: str) -> None:
    case = WAYS[way]
    for dtype in DTYPES:
        x, w, b = case.make(dtype, device)
        dy = grad_of(case, x, w)
        if argument == "input":
            x = layout(x)
        elif argument == "weight":
            w = layout(w)
        else:
            dy = layout(dy)
        check(case, x, w, b, dy)


def test_unbatched(device: str) -> None:
    case = WAYS["dense"]
    x, w, b = (t.requires_grad_() for t in case.make(torch.float64, device) if t is not None)
    y = case.ours(x[0], w, b)
    torch.testing.assert_close(y, case.theirs(x[0], w, b))
    dy = torch.randn_like(y)
    found, expected = (torch.autograd.grad(v, (x, w, b), dy) for v in (y, case.theirs(x[0], w, b)))
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("way", WAYS)
def test_no_images(way: str, device: str) -> None:
    case = WAYS[way]._replace(size=(0, *WAYS[way].size[1:]))
    x, w, b = (t.requires_grad_() for t in case.make(torch.float32, device) if t is not None)
    y = case.ours(x, w, b)
    assert y.shape == case.theirs(x, w, b).shape
    for grad, tensor in zip(torch.autograd.grad(y.sum(), (x, w, b)), (x, w, b), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


# ---- to the bit


@pytest.mark.parametrize(
    ("case", "dtype"),
    cover(
        dict.fromkeys([*WAYS, *CASES]), DTYPES,
        quick=lambda case, dtype: case in WAYS and dtype in (turn(DTYPES, case), turn(DTYPES[::-1], case)),
    ),
)  # fmt: skip
def test_small_integers_are_exact(case: str, dtype: torch.dtype, device: str) -> None:
    """Sums of small integers have no rounding but that of the result."""
    chosen = (CASES | WAYS)[case]._replace(bias=True, activation=None)
    x, w, b = (
        torch.randint(-2, 3, t.shape, device=device).to(dtype).requires_grad_()
        for t in chosen.make(dtype, device)
        if t is not None
    )
    y = chosen.ours(x, w, b)
    exact = chosen.exact(x, w, b)
    assert torch.equal(y.cpu(), exact.y.to(dtype))
    dy = torch.randint(-2, 3, y.shape, device=device).to(dtype)
    for result, value in zip(torch.autograd.grad(y, (x, w, b), dy), exact.gradients(dy, y), strict=False):
        assert torch.equal(result.cpu(), value.to(dtype))


@pytest.mark.parametrize(
    ("way", "dtype"), cover(WAYS, DTYPES, quick=lambda way, dtype: dtype == turn(DTYPES[1:] + DTYPES[:1], way))
)
def test_small_integers_through_a_sigmoid(way: str, dtype: torch.dtype, device: str) -> None:
    """Where z is 0 and y exactly ½, dz = dy/4 is exact, and its sums are."""
    case = WAYS[way]._replace(activation="sigmoid")
    x, w, b = (t.requires_grad_() for t in case.make(dtype, device) if t is not None)
    with torch.no_grad():
        x.copy_(torch.randint(-2, 3, x.shape, device=device))
        for t in (w, b):
            t.zero_()
    y = case.ours(x, w, b)
    assert torch.equal(y, torch.full_like(y, 0.5))
    dy = 4 * torch.randint(-1, 2, y.shape, device=device).to(dtype)
    _, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    exact = case.exact(x, w, b).gradients(dy, y)
    assert torch.equal(dw.cpu(), exact[1].to(dtype))
    assert torch.equal(db.cpu(), exact[2].to(dtype))


@pytest.mark.parametrize(
    "case", ["far padding", *(pytest.param(c, marks=pytest.mark.slow) for c in ("image", "many pixels"))]
)
def test_repeat_runs_are_equal_to_the_bit(case: str, device: str) -> None:
    x, w, _ = (t if t is None else t.requires_grad_() for t in CASES[case].make(torch.float32, device))
    assert x is not None
    assert w is not None
    dy = grad_of(CASES[case], x, w)
    runs = []
    for _ in range(2):
        y = CASES[case].ours(x, w)
        runs.append((y, *torch.autograd.grad(y, (x, w), dy)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


# ---- what is asked for, and no more

NEEDS = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]


@pytest.mark.parametrize(
    ("way", "needs"), cover(WAYS, NEEDS, quick=lambda way, needs: way == "dense" or sum(needs) == 1)
)
def test_every_combination_of_required_gradients(way: str, needs: tuple[bool, bool, bool], device: str) -> None:
    case = WAYS[way]._replace(activation=turn([None, "sigmoid"], way, needs))
    inputs = [
        t.requires_grad_(need) for t, need in zip(case.make(torch.float64, device), needs, strict=True) if t is not None
    ]
    y = case.ours(*inputs)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    theirs = case.theirs(*inputs)
    asked = [t for t in inputs if t.requires_grad]
    dy = torch.randn_like(y)
    for ours, torchs in zip(*(torch.autograd.grad(v, asked, dy) for v in (y, theirs)), strict=True):
        torch.testing.assert_close(ours, torchs)


def saved(device: str, activation: str | None, *needs: bool) -> list[str]:
    """What a forward pass keeps for its backward pass."""
    names = {(2, 3, 5, 6): "x", (4, 3, 3, 3): "w", (2, 4, 3, 4): "y", (4,): "b"}
    kept: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(names[tuple(tensor.shape)])
        return tensor

    tensors = Case((2, 3, 5, 6), 4).make(torch.float32, device)
    x, w, b = (t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True) if t is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tribp.conv3x3(x, w, b, activation=activation)
    return sorted(kept)


def test_keeps_what_the_gradients_need(kernels: str) -> None:
    assert saved(kernels, None, True, True, True) == ["w", "x"]
    assert saved(kernels, "sigmoid", True, True, True) == ["w", "x", "y"]
    assert saved(kernels, "sigmoid", False, True, True) == ["x", "y"]
    assert saved(kernels, "sigmoid", True, False, False) == ["w", "y"], "a frozen weight must not keep the input"
    assert saved(kernels, None, True, False, True) == ["w"]
    assert saved(kernels, None, False, True, False) == ["x"]
    assert saved(kernels, "sigmoid", False, False, True) == ["y"]
    assert saved(kernels, None, False, False, True) == []


def test_backward_runs_what_is_asked_for_and_no_more(kernels: str, launched: list[str]) -> None:
    for way, case in WAYS.items():
        tensors = [t for t in case._replace(size=(1, *case.size[1:])).make(torch.float32, kernels) if t is not None]
        for i, forbidden in enumerate(("wgrad", "dgrad", "grad")):
            inputs = [t.detach().requires_grad_(i == k) for k, t in enumerate(tensors)]
            y = case.ours(*inputs)
            launched.clear()
            torch.autograd.grad(y.sum(), inputs[i])
            assert launched, way
            products = [kernel for kernel in launched if kernel.endswith(("dgrad", "wgrad"))]
            assert not [kernel for kernel in products if kernel.endswith(forbidden)], (way, launched)


def test_dimensions_too_long_for_a_tile_go_through_torch(
    kernels: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tribp.ops import checks

    monkeypatch.setattr(checks, "MAX_SIZE", 16)
    for size, out in (
        ((17, 2, 3, 3), 4),
        ((1, 17, 3, 3), 4),
        ((1, 2, 17, 3), 4),
        ((1, 2, 3, 17), 4),
        ((1, 2, 3, 3), 17),
    ):
        case = Case(size, out)
        x, w, b = case.make(torch.float32, kernels)
        check(case, x, w, b, grad_of(case, x, w))
    assert not launched
    case = Case((16, 2, 3, 3), 16)
    x, w, b = case.make(torch.float32, kernels)
    check(case, x, w, b, grad_of(case, x, w))
    assert launched


def test_output_changed_in_place_is_noticed(device: str) -> None:
    case = WAYS["small"]
    x, w, b = (t.requires_grad_() for t in case.make(torch.float32, device) if t is not None)
    y = case.ours(x, w, b)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    plain = case._replace(activation=None)
    y = plain.ours(x, w, b)
    y.relu_()  # without an activation nobody needs it
    y.sum().backward()
    theirs = plain.theirs(x, w, b).relu()
    for tensor, torchs in zip((x, w, b), torch.autograd.grad(theirs.sum(), (x, w, b)), strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, torchs)


TINY = {
    "dense": Case((1, 2, 3, 4), 2, padding=(1, 0), activation="sigmoid"),
    "strided": Case((1, 2, 4, 3), 2, (2, 1), (1, 1)),
    "depthwise": Case((1, 2, 3, 3), 4, (1, 2), (1, 1), groups=2, activation="sigmoid"),
}


@pytest.mark.parametrize(
    "tiny", ["dense", *(pytest.param(t, marks=pytest.mark.slow) for t in ("strided", "depthwise"))]
)
def test_gradcheck(tiny: str, device: str) -> None:
    case = TINY[tiny]
    inputs = [t.requires_grad_() for t in case.make(torch.float64, device) if t is not None]
    # Along one direction instead of each element: every evaluation of a kernel costs the interpreter dear.
    assert torch.autograd.gradcheck(lambda *t: case.ours(*t), inputs, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
@pytest.mark.parametrize("tiny", TINY)
def test_gradgradcheck(tiny: str, needs: tuple[bool, bool, bool], device: str) -> None:
    case = TINY[tiny]
    inputs = [
        t.requires_grad_(need) for t, need in zip(case.make(torch.float64, device), needs, strict=True) if t is not None
    ]
    assert torch.autograd.gradgradcheck(lambda *t: case.ours(*t), inputs, fast_mode=True)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
@pytest.mark.parametrize("tiny", TINY)
def test_double_backward_is_torchs(tiny: str, needs: tuple[bool, bool, bool], device: str) -> None:
    case = TINY[tiny]
    inputs = [
        t.requires_grad_(need) for t, need in zip(case.make(torch.float64, device), needs, strict=True) if t is not None
    ]
    asked = [t for t in inputs if t.requires_grad]
    dy = grad_of(case, *inputs[:2]).requires_grad_()
    weights = [torch.randn_like(t) for t in asked]
    found = []
    for y in (case.ours(*inputs), case.theirs(*inputs)):
        grads = torch.autograd.grad(y, asked, dy, create_graph=True)
        penalty = sum((g * weight).square().sum() for g, weight in zip(grads, weights, strict=True))
        assert isinstance(penalty, Tensor)
        found.append(torch.autograd.grad(penalty, [*asked, dy], allow_unused=True))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


# ---- any of it


@st.composite
def any_case(draw: Any) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 3, 7]))
    one_each = groups > 1 and draw(st.booleans())
    c = 1 if one_each else draw(st.integers(1, 4 if groups > 1 else 16))
    o = draw(st.integers(1, 3 if one_each else 16 // groups))
    stride = draw(st.tuples(*[st.sampled_from([1, 2])] * 2))
    padding = draw(st.tuples(*[st.sampled_from([0, 1, 1, 3])] * 2))
    h, w = (draw(st.integers(max(1, 3 - 2 * pad), 5)) for pad in padding)
    size = (draw(st.integers(1, 2)), c * groups, h, w)
    activation = draw(st.sampled_from([None, "sigmoid"]))
    return Case(size, o * groups, stride, padding, groups, activation, bias=draw(st.booleans()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=any_case(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    needs=st.sampled_from(NEEDS[1:]),
    seed=st.integers(0, 2**32),
)
def test_any_shape_layout_and_type(
    case: Case, dtype: torch.dtype, layouts: tuple[Layout, ...], needs: tuple[bool, bool, bool], seed: int, kernels: str
) -> None:
    torch.manual_seed(seed)
    x, w, b = case.make(dtype, kernels)
    x, w = (layout(t).detach().requires_grad_(need) for layout, t, need in zip(layouts, (x, w), needs, strict=False))
    b = None if b is None else b.requires_grad_(needs[2])
    y = case.ours(x, w, b)
    exact = case.exact(x, w, b)
    # Few terms of either sign may cancel; then it is their size that rounding is relative to.
    sizes = case._replace(activation=None).exact(x.abs(), w.abs(), None if b is None else b.abs())
    bound = max(TOLERANCE[dtype], 1.01 * torch.finfo(dtype).eps)  # of few elements each may be rounded twice, alike
    assert_close(y, exact.y, scale=None if case.activation else sizes.y, tolerance=bound)
    inputs = [t for t in (x, w, b) if t is not None and t.requires_grad]
    if not inputs:
        return
    dy = layouts[2](grad_of(case, x, w))
    dz = dy.double() * y.double() * (1 - y.double()) if case.activation else dy
    terms = sizes.gradients(dz.abs(), y)
    found = iter(torch.autograd.grad(y, inputs, dy))
    for tensor, value, size in zip((x, w, b), exact.gradients(dy, y), terms, strict=False):
        if tensor is not None and tensor.requires_grad:
            assert_close(next(found), value, scale=size, tolerance=bound)
