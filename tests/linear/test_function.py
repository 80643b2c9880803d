"""`tribp.linear_sigmoid` as its users see it, on the fallback and on the kernels (`device` runs each test on both)."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import tribp
from tribp.ops.activations import DEFAULTS, activate, activation_of

from ..oracle import TF32_TOLERANCE, LinearSigmoid, assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Dimensions that are 1, prime, multiples of 16 and not, on either side of a tile's edge (the interpreter's are 32).
SHAPES = [(1, 1, 1), (33, 7, 17), (64, 32, 48), (40, 65, 24), (1, 31, 70), (65, 1, 33), (70, 32, 16)]


def make(
    m: int, n: int, k: int, dtype: torch.dtype, device: str, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(m, k, dtype=torch.float64).to(device, dtype).requires_grad_()
    w = (torch.randn(n, k, dtype=torch.float64) / k**0.5).to(device, dtype).requires_grad_()
    b = torch.randn(n, dtype=torch.float64).to(device, dtype).requires_grad_() if bias else None
    return x, w, b


def check(x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, tolerance: float | None = None) -> None:
    """Output and gradients of tribp against float64, and against torch's own error."""
    inputs = [t for t in (x, w, b) if t is not None]
    y = tribp.linear_sigmoid(x, w, b)
    found = torch.autograd.grad(y, inputs, dy)
    theirs = torch.sigmoid(F.linear(x, w, b))
    their_grads = torch.autograd.grad(theirs, inputs, dy)

    exact = LinearSigmoid(x, w, b)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert_close(y, exact.y, theirs, tolerance=tolerance)
    dx, dw, db, terms = exact.gradients(dy, y)
    their_exact = exact.gradients(dy, theirs)
    for result, torchs, value, torch_value in zip(found, their_grads, (dx, dw), their_exact, strict=False):
        # Each is held against float64 on the y it was given; torch's y is rounded elsewhere.
        assert_close(result, value, torchs + (value - torch_value).to(torchs), tolerance=tolerance)
    if b is not None:
        assert_close(found[2], db, their_grads[2] + (db - their_exact[2]).to(their_grads[2]), scale=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    m, n, k = shape
    x, w, b = make(m, n, k, dtype, device, bias=(m + n) % 3 != 0)
    check(x, w, b, torch.randn(m, n, device=device).to(dtype))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...], device: str) -> None:
    x = torch.randn(*leading, 6, device=device, requires_grad=True)
    w = torch.randn(4, 6, device=device, requires_grad=True)
    b = torch.randn(4, device=device, requires_grad=True)
    y = tribp.linear_sigmoid(x, w, b)
    assert y.shape == (*leading, 4)
    check(x, w, b, torch.randn(*leading, 4, device=device))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_zero_sized(m: int, n: int, k: int, device: str) -> None:
    x, w, b = (torch.randn(*s, device=device, requires_grad=True) for s in ((m, k), (n, k), (n,)))
    y = tribp.linear_sigmoid(x, w, b)
    torch.testing.assert_close(y, torch.sigmoid(F.linear(x, w, b)))
    for grad, tensor in zip(torch.autograd.grad(y.sum(), (x, w, b)), (x, w, b), strict=True):
        assert grad.shape == tensor.shape
        assert torch.isfinite(grad).all()


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def every_other(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]


def offset(t: Tensor) -> Tensor:
    """Columns 1 … of a wider matrix: an address that is a multiple of nothing."""
    return F.pad(t, (1, 0), value=torch.nan)[..., 1:]


def expanded_rows(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def expanded(t: Tensor) -> Tensor:
    return t[:1, :1].expand_as(t)


LAYOUTS = [transposed, every_other, offset, expanded_rows, expanded]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("argument", ["input", "weight", "grad"])
def test_layouts(argument: str, layout: object, dtype: torch.dtype, device: str) -> None:
    assert callable(layout)
    x, w, dy = (torch.randn(*s, device=device).to(dtype) for s in ((40, 24), (36, 24), (40, 36)))
    if argument == "input":
        x = layout(x)
    elif argument == "weight":
        w = layout(w)
    else:
        dy = layout(dy)
    b = torch.randn(36, device=device).to(dtype).requires_grad_()
    check(x.detach().requires_grad_(), w.detach().requires_grad_(), b, dy)


def test_input_that_is_no_matrix_in_memory(device: str) -> None:
    x = torch.randn(3, 4, 5, device=device).permute(2, 0, 1).requires_grad_()
    w, b = torch.randn(6, 4, device=device, requires_grad=True), torch.randn(6, device=device, requires_grad=True)
    check(x, w, b, torch.randn(5, 3, 6, device=device))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_one_bias_for_all(shape: tuple[int, ...], device: str) -> None:
    x, w = torch.randn(5, 3, device=device), torch.randn(4, 3, device=device)
    b = torch.randn(shape, device=device, requires_grad=True)
    y = tribp.linear_sigmoid(x, w, b)
    theirs = torch.sigmoid(x @ w.t() + b)
    torch.testing.assert_close(y, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), b)[0] for v in (y, theirs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*encountered in")  # numpy's, of the interpreter
def test_extreme_values(dtype: torch.dtype, device: str) -> None:
    """Saturation, infinities and NaN: where torch's sigmoid ends up, and no NaN made of an infinity times zero."""
    z = torch.tensor([-torch.inf, -200.0, -90.0, -80.0, -20.0, 0.0, 20.0, 90.0, 200.0, torch.inf, torch.nan])
    z, one = z.to(dtype), torch.ones(1, 1, dtype=dtype, device=device)
    y = tribp.linear_sigmoid(z.unsqueeze(1).to(device), one).cpu().squeeze(1)
    # Relative to each value, not to the largest: the tail counts. What float32 or the type itself has no normal number
    # for may be flushed to zero.
    limits = torch.finfo(dtype)
    smallest = max(limits.tiny, 1.2e-38 if dtype != torch.float64 else 0)
    torch.testing.assert_close(
        y.double(), torch.sigmoid(z.double()), rtol=4 * limits.eps, atol=smallest, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(dtype: torch.dtype, device: str) -> None:
    """Sums of small integers have no rounding: dw and dx of a y that is exactly ½ are exact in every type."""
    m, n, k = 37, 35, 41
    x = torch.randint(-2, 3, (m, k), device=device).to(dtype).requires_grad_()
    w = torch.zeros(n, k, device=device, dtype=dtype, requires_grad=True)
    b = torch.zeros(n, device=device, dtype=dtype, requires_grad=True)
    dy = (4 * torch.randint(-1, 2, (m, n), device=device)).to(dtype)  # dz = dy/4: −1, 0, 1
    y = tribp.linear_sigmoid(x, w, b)
    assert torch.equal(y, torch.full_like(y, 0.5))
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    dz = dy.double() / 4
    assert torch.equal(dw.double(), dz.t() @ x.double())
    assert torch.equal(db.double(), dz.sum(0))
    assert not dx.any()

    w = torch.randint(-2, 3, (n, k), device=device).to(dtype)
    v = torch.zeros(m, k, device=device, dtype=dtype, requires_grad=True)
    (dv,) = torch.autograd.grad(tribp.linear_sigmoid(v, w), v, dy)
    assert torch.equal(dv.double(), dz @ w.double())


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_every_combination_of_required_gradients(needs: tuple[int, int, int], device: str) -> None:
    m, n, k = 40, 24, 33
    tensors = make(m, n, k, torch.float64, device)
    dy = torch.randn(m, n, device=device, dtype=torch.float64)
    full = torch.autograd.grad(tribp.linear_sigmoid(*tensors), [t for t in tensors if t is not None], dy)
    inputs = [t.detach().requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True) if t is not None]
    y = tribp.linear_sigmoid(*inputs)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.backward(dy)
    for tensor, need, expected in zip(inputs, needs, full, strict=True):
        if need:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


def saved(device: str, *needs: bool) -> set[tuple[int, ...]]:
    """The shapes that a forward pass keeps for its backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    shapes = ((5, 3), (4, 3), (4,))
    x, w, b = (torch.randn(s, device=device).requires_grad_(need) for s, need in zip(shapes, needs, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tribp.linear_sigmoid(x, w, b)
    return {tuple(t.shape) for t in kept}


def test_keeps_the_output_and_what_the_gradients_need(kernels: str) -> None:
    assert saved(kernels, True, True, True) == {(5, 3), (4, 3), (5, 4)}
    assert saved(kernels, False, True, True) == {(5, 3), (5, 4)}
    assert saved(kernels, True, False, False) == {(4, 3), (5, 4)}, "a frozen weight must not keep the input"
    assert saved(kernels, False, False, True) == {(5, 4)}


def test_backward_runs_what_is_asked_for_and_no_more(kernels: str, launched: list[str]) -> None:
    x, w, b = make(64, 16, 32, torch.float32, kernels)
    assert b is not None
    torch.autograd.grad(tribp.linear_sigmoid(x, w.detach(), b.detach()).sum(), x)
    assert "dgrad" in launched
    assert "wgrad" not in launched
    launched.clear()
    torch.autograd.grad(tribp.linear_sigmoid(x.detach(), w, b).sum(), (w, b))
    assert "wgrad" in launched
    assert "dgrad" not in launched


def test_dimensions_too_long_for_a_tile_go_through_torch(
    kernels: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tribp.ops import checks

    monkeypatch.setattr(checks, "MAX_SIZE", 16)
    x, w, b = make(17, 4, 8, torch.float32, kernels)
    check(x, w, b, torch.randn(17, 4, device=kernels))
    assert not launched
    x, w, b = make(16, 4, 8, torch.float32, kernels)
    check(x, w, b, torch.randn(16, 4, device=kernels))
    assert launched


def test_output_changed_in_place_is_noticed(device: str) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = tribp.linear_sigmoid(x, torch.randn(2, 4, device=device))
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_repeat_runs_are_equal_to_the_bit(device: str) -> None:
    x, w, b = make(300, 17, 33, torch.float32, device)
    assert b is not None
    dy = torch.randn(300, 17, device=device)
    runs = []
    for _ in range(2):
        y = tribp.linear_sigmoid(x, w, b)
        runs.append((y, *torch.autograd.grad(y, (x, w, b), dy)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_gradcheck(device: str) -> None:
    assert torch.autograd.gradcheck(tribp.linear_sigmoid, make(5, 4, 3, torch.float64, device))  # type: ignore[arg-type]


def test_double_backward(device: str) -> None:
    assert torch.autograd.gradgradcheck(tribp.linear_sigmoid, make(4, 3, 2, torch.float64, device))  # type: ignore[arg-type]


def test_batched_gradients(device: str) -> None:
    """`is_grads_batched` wraps what comes back in a tensor that has no memory to read."""
    inputs = [t for t in make(4, 3, 2, torch.float64, device) if t is not None]
    batch = torch.randn(5, 4, 3, dtype=torch.float64, device=device)
    y, theirs = tribp.linear_sigmoid(*inputs), torch.sigmoid(F.linear(*inputs))
    found, expected = (torch.autograd.grad(v, inputs, batch, is_grads_batched=True) for v in (y, theirs))
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs)


# ---- precision settings


@pytest.fixture
def precision_restored() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("way", ["old", "new", "set_float32_matmul_precision"])
@pytest.mark.usefixtures("precision_restored")
def test_tf32_setting_is_read_whichever_way_it_is_set(way: str) -> None:
    from tribp import dispatch

    assert not dispatch.tf32_allowed()
    for allowed in (True, False):
        if way == "old":
            torch.backends.cuda.matmul.allow_tf32 = allowed
        elif way == "new":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.set_float32_matmul_precision("high" if allowed else "highest")
        assert dispatch.tf32_allowed() == allowed


@pytest.mark.gpu
@pytest.mark.usefixtures("precision_restored")
def test_tf32_is_used_exactly_where_allowed(kernels: str) -> None:
    x, w, b = make(512, 256, 1024, torch.float32, kernels)
    exact = LinearSigmoid(x, w, b)
    assert_close(tribp.linear_sigmoid(x, w, b), exact.y)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    y = tribp.linear_sigmoid(x, w, b)
    assert_close(y, exact.y, tolerance=TF32_TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(y, exact.y)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    x, w, b = make(8, 6, 4, torch.float32, device)
    assert b is not None
    with torch.autocast(torch.device(device).type, dtype):
        y = tribp.linear_sigmoid(x, w, b)
        theirs = torch.sigmoid(F.linear(x, w, b))
    assert y.dtype == theirs.dtype == dtype
    torch.testing.assert_close(y, theirs)
    dy = torch.randn_like(y)
    for ours, torchs in zip(
        torch.autograd.grad(y, (x, w, b), dy), torch.autograd.grad(theirs, (x, w, b), dy), strict=True
    ):
        assert ours.dtype == torchs.dtype == torch.float32
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone(device: str) -> None:
    x, w, b = make(3, 2, 4, torch.float64, device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert tribp.linear_sigmoid(x, w, b).dtype == torch.float64


WIDE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (tribp.linear, (2, 8), (8, 8)),
    "conv3x3": (tribp.conv3x3, (2, 8, 5, 5), (8, 8, 3, 3)),
    "mlp": (lambda x, w, b, activation: tribp.mlp(x, [w, w], [b, b], "relu", activation), (2, 8), (8, 8)),
}


@pytest.mark.parametrize("activation", [None, *DEFAULTS])
@pytest.mark.parametrize("function", WIDE)
def test_cudas_autocast_computes_softplus_in_float32(
    function: str, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rounded output of the layer, and returns float32. As torch.export sees it: there need be no GPU."""
    call, size, weight_size = WIDE[function]
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            x, w, b = (torch.empty(s, device="cuda") for s in (size, weight_size, (8,)))
            y = call(x, w, b, activation=activation)
            z = torch.empty_like(y, dtype=torch.bfloat16)
            expected = z if activation is None else activate(z, *activation_of("", activation))
            assert y.dtype == expected.dtype == (torch.float32 if activation == "softplus" else torch.bfloat16)
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.gpu
@pytest.mark.parametrize("function", WIDE)
def test_softplus_under_autocast_on_a_gpu(function: str) -> None:
    call, size, weight_size = WIDE[function]
    inputs = [torch.randn(s, device="cuda", requires_grad=True) for s in (size, weight_size, (8,))]
    with torch.autocast("cuda", torch.bfloat16):
        y, z = call(*inputs, activation="softplus"), call(*inputs, activation=None)
        expected = F.softplus(z)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    for a, b in zip(*(torch.autograd.grad(t.sum(), inputs) for t in (y, expected)), strict=True):
        assert torch.equal(a, b)


def test_nested_tensors(device: str) -> None:
    """Strided ones, that is, which torch's linear takes; they have no sizes to look at."""
    _, w, b = make(1, 2, 4, torch.float32, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], device=device)
    expected = F.relu(F.linear(x, w, b))
    for found in (tribp.linear(x, w, b, "relu"), tribp.mlp(x, [w], [b], output_activation="relu")):
        for y, z in zip(found.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(y, z)


# ---- errors: one line that names the argument, what was given and what is needed


def raises(error: type[Exception], *words: str, **arguments: object) -> None:
    with pytest.raises(error) as caught:
        tribp.linear_sigmoid(**arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_the_tutorials_weight() -> None:
    raises(ValueError, "weight", "(1, 1)", "(1, 2)", input=torch.ones(1, 2), weight=torch.tensor([[3.0]]))


def test_bad_shapes() -> None:
    x, w = torch.ones(4, 3), torch.ones(2, 3)
    raises(ValueError, "input", "()", input=torch.ones(()), weight=w)
    raises(ValueError, "weight", "(2, 3)", "(4, 3)", "(2, 5)", input=x, weight=torch.ones(2, 5))
    raises(ValueError, "weight", "(out_features, 3)", "(3,)", input=x, weight=torch.ones(3))
    raises(ValueError, "weight", "(1, 2, 3)", input=x, weight=torch.ones(1, 2, 3))
    raises(ValueError, "bias", "(2,)", "(3,)", input=x, weight=w, bias=torch.ones(3))
    raises(ValueError, "bias", "(2,)", "(2, 1)", input=x, weight=w, bias=torch.ones(2, 1))


def test_bad_dtypes() -> None:
    x, w = torch.ones(4, 3), torch.ones(2, 3)
    raises(TypeError, "weight", "float32", "float64", input=x, weight=w.double())
    raises(TypeError, "bias", "float32", "bfloat16", input=x, weight=w, bias=torch.ones(2).bfloat16())
    raises(TypeError, "bias", "float64", input=x[None].mT.contiguous().mT, weight=w, bias=torch.ones(2).double())
    raises(TypeError, "bias", "float64", input=x[None], weight=w, bias=torch.ones(()).double())  # torch takes these two
    raises(TypeError, "input", "int64", input=x.long(), weight=w.long())
    raises(TypeError, "weight", "complex64", input=x, weight=w.to(torch.complex64))
    raises(TypeError, "input", "list", input=[[1.0]], weight=w)
    raises(TypeError, "weight", "NoneType", input=x, weight=None)


def test_bad_devices() -> None:
    x, w = torch.ones(4, 3), torch.ones(2, 3)
    raises(ValueError, "weight", "cpu", "meta", input=x, weight=w.to("meta"))
    raises(ValueError, "bias", "cpu", "meta", input=x, weight=w, bias=torch.ones(2, device="meta"))


# ---- the module


def test_module_is_interchangeable_with_linear(device: str) -> None:
    ours, theirs = tribp.nn.LinearSigmoid(6, 4, device=device), nn.Linear(6, 4, device=device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, device=device)
    torch.testing.assert_close(ours(x), torch.sigmoid(theirs(x)))
    ours.load_state_dict(nn.Linear(6, 4).state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_module_starts_as_linear_does(bias: bool) -> None:
    torch.manual_seed(3)
    ours = tribp.nn.LinearSigmoid(5, 7, bias, dtype=torch.float64)
    after = torch.rand(1)
    torch.manual_seed(3)
    theirs = nn.Linear(5, 7, bias, dtype=torch.float64)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(torch.rand(1), after), "the same random numbers are drawn"
    assert (ours.bias is None) == (theirs.bias is None)
    if ours.bias is not None:
        assert torch.equal(ours.bias, theirs.bias)
    assert repr(ours) == repr(theirs).replace("Linear", "LinearSigmoid").replace(")", ", activation='sigmoid')")


def test_sizes_of_the_module() -> None:
    with pytest.raises(ValueError, match=r"^Linear: in_features must be at least 0, got -1$"):
        tribp.nn.Linear(-1, 2)
    with pytest.raises(ValueError, match=r"^LinearSigmoid: out_features must be at least 0, got -2$"):
        tribp.nn.LinearSigmoid(1, -2)
    with pytest.raises(TypeError, match=r"^Linear: out_features must be a whole number, got 2\.0$"):
        tribp.nn.Linear(1, 2.0)  # type: ignore[arg-type]
    for wrong in (np.array([3, 4]), torch.tensor(3.0)):
        with pytest.raises(TypeError, match=r"^Linear: in_features must be a whole number, got (array|tensor)"):
            tribp.nn.Linear(wrong, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [tribp.nn.Linear, tribp.nn.LinearSigmoid])
def test_an_activation_is_not_taken_for_bias(layer: Any) -> None:
    for activation in ("relu", ("leaky_relu", 0.2)):
        with pytest.raises(TypeError) as caught:
            layer(4, 3, activation)
        said = f"{layer.__name__}: bias must be True or False, got {activation!r}; an activation goes into activation="
        assert str(caught.value).startswith(said)
    assert [layer(4, 3, bias).bias is None for bias in (1, 0, None, np.True_, np.False_)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_module_on_meta_device() -> None:
    layer = tribp.nn.LinearSigmoid(3, 2, device="meta")
    assert layer(torch.ones(4, 3, device="meta")).shape == (4, 2)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.ones(4, 3))).all()
