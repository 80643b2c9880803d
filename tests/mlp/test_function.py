"""`tribp.mlp` and `tribp.nn.MLP` against layers of torch's, on the fallback and on the kernels."""

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import tribp
from tribp import dispatch

from ..covering import DTYPES, turn
from ..oracle import ACTIVATIONS, Activation, assert_close, exactly

SIZES = [(17, 33, 9), (16, 32, 8, 24), (33, 7), (8, 40, 40, 40, 3), (5, 1, 64)]


def draw(sizes: Sequence[int], rows: int, dtype: torch.dtype, device: str, bias: bool = True) -> list[Tensor]:
    """x, and weight (and bias) of each layer."""
    tensors = [torch.randn(rows, sizes[0], dtype=torch.float64)]
    for k, n in itertools.pairwise(sizes):
        tensors += [torch.randn(n, k, dtype=torch.float64) / k**0.5, *[torch.randn(n, dtype=torch.float64)] * bias]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def ours(activation: Activation, last: Activation, x: Tensor, *layers: Tensor) -> Tensor:
    biases = [t for t in layers if t.dim() == 1]
    return tribp.mlp(x, [t for t in layers if t.dim() == 2], biases or None, activation, last)


def theirs(activation: Activation, last: Activation, x: Tensor, *layers: Tensor) -> Tensor:
    weights, biases = ([t for t in layers if t.dim() == d] for d in (2, 1))
    for n, w in enumerate(weights):
        x = exactly(F.linear(x, w, biases[n] if biases else None), activation if n + 1 < len(weights) else last)
    return x


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_matches_torch(activation: Activation, sizes: tuple[int, ...], device: str) -> None:
    """Within twice the error of torch's layers against float64; kinks are met at the same z only in float64."""
    kinked = isinstance(activation, (str, tuple)) and any(name in str(activation) for name in ("hard", "relu"))
    dtype = torch.float64 if kinked else turn(DTYPES, str(activation), str(sizes))
    last = turn([None, "tanh", "sigmoid"], str(sizes), str(activation))
    inputs = draw(sizes, 37, dtype, device, bias=activation != "tanh")
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    y, expected, true = (f(activation, last, *t) for f, t in ((ours, inputs), (theirs, inputs), (theirs, exact)))
    assert y.is_contiguous()
    dy = torch.randn(y.shape, dtype=torch.float64).to(device, dtype)
    sixth = 1e-7 * (activation == "hardsigmoid")  # torch's ⅙ is a float32
    assert_close(y, true.detach(), expected, tolerance=2 * len(sizes) * torch.finfo(dtype).eps + 2e-14 + sixth)
    pairs = ((y, inputs, dy), (expected, inputs, dy), (true, exact, dy.double().cpu()))
    grads = [torch.autograd.grad(output, tensors, gradient) for output, tensors, gradient in pairs]
    # A layer's bias has a gradient of terms like its weight's, of which more can cancel.
    sizes_of = [float(value.abs().max()) for value in grads[2]]
    for n, (found, torchs, value) in enumerate(zip(*grads, strict=True)):
        of_weight = sizes_of[n - 1] if value.dim() == 1 else 0.0
        scale = max(sizes_of[n], of_weight) * torch.ones_like(value)
        tolerance = 40 * torch.finfo(dtype).eps + sixth
        # elu's derivative is y + α, which has the error of a rounded y: where a layer is one feature, all of it.
        assert_close(found, value, None if "elu" in str(activation) else torchs, scale, tolerance)


@pytest.mark.parametrize("wanted", ["x", "0", "1", "2", "x0", "02", "x12", "b", "xb", "x012b"])
def test_every_combination_of_required_gradients(wanted: str, device: str) -> None:
    """x: the input's; a digit: a layer's weight's; b: the biases'."""
    inputs = draw((8, 24, 16, 5), 30, torch.float64, device)
    names = ["x", "0", "b", "1", "b", "2", "b"]
    for tensor, name in zip(inputs, names, strict=True):
        tensor.requires_grad_(name in wanted)
    needed = [t for t in inputs if t.requires_grad]
    y, expected = ours("sigmoid", "tanh", *inputs), theirs("sigmoid", "tanh", *inputs)
    dy = torch.randn_like(y)
    for found, value in zip(torch.autograd.grad(y, needed, dy), torch.autograd.grad(expected, needed, dy), strict=True):
        torch.testing.assert_close(found, value)


def test_no_pass_over_memory_but_the_last_layers(kernels: str, launched: list[str]) -> None:
    """A product and a product a layer, one launch if it has few outputs; sums go with a product of the layer below."""
    x, *layers = draw((16, 32, 32, 8), 70, torch.float32, kernels)
    x.requires_grad_(False)
    y = ours("sigmoid", "sigmoid", x, *layers)
    assert launched == ["forward"] * 3
    launched.clear()
    torch.autograd.grad(y, layers, torch.randn_like(y))
    assert launched == ["backward", "wgrad", "dgrad", "wgrad", "reduce_partials"]
    weights = [t for t in layers if t.dim() == 2]
    y = ours("relu", None, x, *(t if t.dim() == 2 else t.detach() for t in layers))
    launched.clear()
    torch.autograd.grad(y, weights, torch.randn_like(y))
    assert "output_grad" not in launched
    y = ours("relu", None, x, *(t.detach() for t in layers[:-1]), layers[-1])
    launched.clear()
    torch.autograd.grad(y, layers[-1], torch.randn_like(y))
    assert set(launched) <= {"output_grad", "reduce_partials"}, "nothing below is asked for"


@pytest.mark.parametrize("rows", [1, 0, 129])
def test_rows(rows: int, device: str) -> None:
    inputs = draw((6, 5, 4), rows, torch.float64, device)
    y, expected = ours("elu", None, *inputs), theirs("elu", None, *inputs)
    torch.testing.assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad(t.sum(), inputs) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_leading_dimensions_and_layouts(device: str) -> None:
    x, *layers = draw((6, 8, 4), 24, torch.float64, device)
    leading = x.detach().reshape(2, 3, 4, 6).transpose(0, 2).requires_grad_()
    layers[0] = layers[0].detach().t().contiguous().t().requires_grad_()
    y, expected = ours("tanh", "relu", leading, *layers), theirs("tanh", "relu", leading, *layers)
    assert y.shape == (4, 3, 2, 4)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y).transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(*(torch.autograd.grad(t, [leading, *layers], dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck(device: str) -> None:
    inputs = draw((3, 5, 4, 2), 4, torch.float64, device)
    torch.autograd.gradcheck(lambda *t: ours("sigmoid", "tanh", *t), inputs, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *t: ours("sigmoid", "tanh", *t), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(dtype: torch.dtype, device: str) -> None:
    """Every sum is at most 256, which bfloat16 holds: ReLU's outputs and all gradients are right to the last bit."""
    made = torch.Generator().manual_seed(0)
    shapes = [(12, 16), (8, 16), (8,), (3, 8), (3,)]
    exact = [torch.randint(-1, 2, shape, generator=made).double().requires_grad_() for shape in shapes]
    inputs = [t.detach().to(device, dtype).requires_grad_() for t in exact]
    y, expected = ours("relu", "relu", *inputs), theirs("relu", "relu", *exact)
    assert torch.equal(y.double().cpu(), expected)
    dy = torch.randint(-1, 2, y.shape, generator=made)
    grads = torch.autograd.grad(y, inputs, dy.to(device, dtype)), torch.autograd.grad(expected, exact, dy.double())
    for a, b in zip(*grads, strict=True):
        assert 0 < b.abs().max() <= 256
        assert torch.equal(a.double().cpu(), b)


def test_batched_gradients(device: str) -> None:
    inputs = draw((3, 5, 4), 6, torch.float64, device)
    y, expected = ours("tanh", None, *inputs), theirs("tanh", None, *inputs)
    dy = torch.randn(5, *y.shape, device=device, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(t, inputs, dy, is_grads_batched=True) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_repeat_runs_are_equal_to_the_bit(device: str) -> None:
    inputs = draw((16, 40, 24), 200, torch.float16, device)

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours("sigmoid", None, *inputs).float().square().sum(), inputs)

    first, second = once(), once()
    assert all(map(torch.equal, first, second))


def test_checkpoint_and_autocast(device: str) -> None:
    inputs = draw((8, 16, 4), 12, torch.float32, device)
    with torch.autocast(device.split(":")[0], torch.bfloat16):
        y = ours("sigmoid", None, *inputs)
        again = checkpoint(lambda *t: ours("sigmoid", None, *t), *inputs, use_reentrant=False)
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, inputs, dy) for t in (y, again)), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_kept_is_freed_with_the_backward_pass(checkpointed: bool, device: str) -> None:
    """Or, where somebody else keeps it, is not kept at all: the input's memory counts."""
    x, *parameters = draw((8, 16, 4), 12, torch.float32, device)
    kept: list[Any] = []

    def call(x: Tensor) -> Tensor:
        inner = x * 1
        kept.append(weakref.ref(inner))
        return ours("relu", None, inner, *parameters)

    y = checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
    assert (kept[0]() is None) == checkpointed
    y.sum().backward()
    assert kept[0]() is None


@pytest.mark.filterwarnings("ignore")
def test_what_sees_operators_alone(device: str) -> None:
    layer, x = tribp.nn.MLP((5, 4, 3), "relu", "tanh").to(device), torch.randn(6, 5, device=device)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(layer, (x,))
    assert "tribp.mlp.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)
    one = torch.func.vmap(layer)(x)
    torch.testing.assert_close(one, expected)


def test_module_is_the_sequential_it_stands_for(device: str) -> None:
    torch.manual_seed(1)
    theirs = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softplus()).to(
        device
    )
    after = torch.rand(1)
    torch.manual_seed(1)
    ours = tribp.nn.MLP([5, 4, 6, 3], "tanh", "softplus").to(device)
    assert torch.equal(torch.rand(1), after), "the same random numbers are drawn"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    other = tribp.nn.MLP([5, 4, 6, 3], "tanh", "softplus").to(device)
    other.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 5, device=device)
    for layer in (ours, other, copy.deepcopy(ours)):
        torch.testing.assert_close(layer(x), theirs(x))
    optimizer = tribp.optim.SGD(ours.parameters(), 0.1)
    before = ours(x).square().sum()
    before.backward()
    optimizer.step()
    assert float(ours(x).square().sum()) < float(before)
    assert "sizes=(5, 4, 6, 3), activation='tanh', output_activation='softplus'" in str(ours)
    assert not any(p.requires_grad for p in tribp.nn.MLP([2, 1], bias=False).requires_grad_(False).parameters())
    assert tribp.fuse(nn.Sequential(ours)).replaced == ()


def test_parameters_from_generators_under_a_mode(device: str) -> None:
    layers = [torch.nn.Linear(3, 3).to(device) for _ in range(2)]
    x = torch.randn(2, 3, device=device)
    weights: Any = (layer.weight for layer in layers)
    biases: Any = (layer.bias for layer in layers)
    with torch.device(device):
        y = tribp.mlp(x, weights, biases)
    torch.testing.assert_close(y, layers[1](torch.sigmoid(layers[0](x))))


def test_errors(device: str) -> None:
    x, w0, b0, w1, _ = draw((5, 4, 3), 2, torch.float32, device)
    cases: list[tuple[type[Exception], str, list[object]]] = [
        (ValueError, "biases must be one for each of 2 weights, got 1", [x, [w0, w1], [b0]]),
        (ValueError, "weights must be at least one, got none", [x, []]),
        (ValueError, "weights must be at least one, got none", [x, [], [b0]]),
        (ValueError, r"layer 1: weight must have shape \(4, 4\)", [x, [w0, w0]]),
        (ValueError, r"layer 1: bias must have shape \(3,\)", [x, [w0, w1], [b0, b0]]),
        (TypeError, r"weights\[1\] must be a tensor, got int", [x, [w0, 3]]),
        (TypeError, "layer 1: weight must have input's dtype float32, got float64", [x, [w0, w1.double()]]),
        (ValueError, ": activation must be None, one of", [x, [w0], None, "swish"]),
        (ValueError, ": output_activation must be None, one of", [x, [w0], None, "relu", "swish"]),
        (ValueError, "input must have shape", [x[0, 0], [w0]]),
        (TypeError, "weights must be a list of tensors, got Tensor", [x, w0]),
        (TypeError, "biases must be a list of tensors and None, or None, got int", [x, [w0], 3]),
    ]
    for kind, words, arguments in cases:
        with pytest.raises(kind, match=f"^mlp.*{words}"):
            tribp.mlp(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^MLP: sizes must be at least two"):
        tribp.nn.MLP([3])
    with pytest.raises(ValueError, match=r"^MLP: sizes must be at least 0, got \(-1, 2\)$"):
        tribp.nn.MLP([-1, 2])
    for wrong in (5, [5, 2.5], np.array(3), torch.tensor([3.0, 4.0]), "34"):
        with pytest.raises(TypeError, match=r"^MLP: sizes must be a sequence of whole numbers"):
            tribp.nn.MLP(wrong)  # type: ignore[arg-type]
    sizes: Any = [np.prod((2, 3)), 2]
    assert tribp.nn.MLP(sizes).sizes == (6, 2), "numpy's whole numbers, as nn.Linear takes them"
    assert tribp.nn.MLP(size for size in (3, 4)).sizes == (3, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^MLP: activation must be"):
        tribp.nn.MLP([3, 4], "swish")
    with pytest.raises(ValueError, match=r"^MLP: output_activation must be"):
        tribp.nn.MLP([3, 4], "relu", "swish")
    with pytest.raises(
        TypeError, match=r"^MLP: bias must be True or False, got 'tanh'; an activation goes into activation="
    ):
        tribp.nn.MLP([3, 4], "relu", None, "tanh")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_large_network_in_a_graph(dtype: torch.dtype, kernels: str) -> None:
    """Splits, many rows of tiles and persistent programs; captured, and replayed with other numbers."""
    inputs = draw((784, 256, 136, 10), 20_000, dtype, kernels)
    dy = torch.randn(20_000, 10, device=kernels, dtype=dtype)
    torch.autograd.grad(ours("sigmoid", "tanh", *inputs), inputs, dy)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours("sigmoid", "tanh", *inputs)
        found = torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    true = theirs("sigmoid", "tanh", *exact)
    torchs = torch.autograd.grad(theirs("sigmoid", "tanh", *inputs), inputs, dy)
    for one, other, value in zip(found, torchs, torch.autograd.grad(true, exact, dy.double()), strict=True):
        assert_close(one, value.cpu(), other, tolerance=40 * torch.finfo(dtype).eps)


def test_sums_of_many_rows_of_tiles_have_a_launch_of_their_own() -> None:
    """The db below has 512 parts, which wait for the end; dw's sums, and all of 128 parts, go with a dgrad."""
    pytest.importorskip("triton")
    from bench import mlp
    from bench.operation import Case
    from tribp.launch.arch import ARCHS

    def names(shape: tuple[int, ...]) -> list[str]:
        launches = mlp.OPERATION.launches(Case(shape, torch.bfloat16), "backward", ARCHS["sm_90"])
        return [launch.kernel.__name__ for launch in launches]

    layer = ["wgrad", "dgrad"]
    assert names((65536, 784, 256, 10)) == ["backward", *layer, "reduce_partials"]
    assert names((65536, 784, 256, 80)) == [*layer, *layer, "reduce_partials"]
    assert names((8192, 1024, 1024, 1024)) == ["output_grad", *layer, *layer]
    # A long sum in parts: what adds them up makes the dz below.
    assert names((32, 1024, 1024, 21841))[:5] == ["output_grad", "wgrad", "forward", "output_grad", "wgrad"]


def test_saved_tensors_may_come_back_in_any_layout(device: str) -> None:
    """Hooks on saved tensors (offloading, compression) return what they like."""
    inputs = draw((8, 24, 16, 5), 30, torch.float64, device)

    def turned(t: Tensor) -> Tensor:
        return t.t().contiguous() if t.dim() == 2 else t

    with torch.autograd.graph.saved_tensors_hooks(turned, lambda t: t.t() if t.dim() == 2 else t):
        y = ours("tanh", "tanh", *inputs)
    expected = theirs("tanh", "tanh", *inputs)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, inputs, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_keeps_what_backward_reads_and_no_more(kernels: str) -> None:
    x, w0, b0, w1, b1, w2, b2 = draw((8, 24, 16, 5), 30, torch.float32, kernels)
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    def call(*frozen: Tensor, last: Activation = None) -> list[tuple[int, ...]]:
        kept.clear()
        layers = [t.detach() if any(t is f for f in frozen) else t for t in (x, w0, b0, w1, b1, w2, b2)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ours("tanh", last, *layers)
        return sorted(kept)

    assert call() == sorted([(30, 8), (30, 24), (30, 16), (24, 8), (16, 24), (5, 16)])
    assert call(last="relu") == sorted([(30, 8), (30, 24), (30, 16), (30, 5), (24, 8), (16, 24), (5, 16)])
    assert call(x) == sorted([(30, 8), (30, 24), (30, 16), (16, 24), (5, 16)]), "no weight of the lowest layer"
    assert call(x, w0, b0, w1, b1) == [(30, 16)], "of a head alone its input"
    assert call(x, w0) == sorted([(30, 24), (30, 16), (16, 24), (5, 16)]), "of a bias alone no input"


def test_what_may_be_changed_before_backward(device: str) -> None:
    """As in torch: an output without activation, biases; not what backward reads."""
    inputs = draw((8, 16, 4), 12, torch.float64, device)
    y, expected = ours("tanh", None, *inputs), theirs("tanh", None, *inputs)
    y.mul_(2)
    grads = torch.autograd.grad(expected.mul(2).square().sum(), inputs)
    with torch.no_grad():
        inputs[2].add_(1)
    for a, b in zip(torch.autograd.grad(y.square().sum(), inputs), grads, strict=True):
        torch.testing.assert_close(a, b)
    y = ours("tanh", "tanh", *inputs)
    with torch.no_grad():
        inputs[3].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("last", [None, "sigmoid"], ids=str)
@pytest.mark.parametrize("frozen", [[], [0], [1], [0, 1], [0, 1, 2], [3], [5]], ids=str)
def test_what_may_be_changed_before_a_second_derivative(frozen: list[int], last: Activation, device: str) -> None:
    """What torch lets be changed: biases, the lowest weight of a frozen input, the input of a frozen lowest weight."""
    drawn = draw((5, 6, 4, 3), 4, torch.float64, device)

    def derivatives(function: Callable[..., Tensor], changed: int) -> tuple[Tensor | None, ...]:
        inputs = [t.detach().clone().requires_grad_(n not in frozen) for n, t in enumerate(drawn)]
        needed = [t for t in inputs if t.requires_grad]
        y = function("tanh", last, *inputs)
        with torch.no_grad():
            inputs[changed].add_(1)
        grads = torch.autograd.grad(y.square().sum(), needed, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), needed, create_graph=True)
        third = torch.autograd.grad(second[-1].square().sum(), needed, allow_unused=True)
        return *grads, *second, *third

    raised = 0
    for changed in range(len(drawn)):
        try:
            expected = derivatives(theirs, changed)
        except RuntimeError:
            raised += 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                derivatives(ours, changed)
        else:
            for a, b in zip(derivatives(ours, changed), expected, strict=True):
                torch.testing.assert_close(a, b)
    assert 0 < raised < len(drawn)


@pytest.mark.parametrize(("changed", "frozen"), [(2, []), (4, []), (0, [1]), (1, [0])], ids=str)
def test_a_change_that_has_a_derivative_is_no_part_of_a_second(changed: int, frozen: list[int], device: str) -> None:
    """Of what is no leaf, after the call. By kernels it is an error: the second derivative would go through it."""
    drawn = draw((5, 6, 3), 4, torch.float64, device)

    def derivatives(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_(n not in frozen) for n, t in enumerate(drawn)]
        inputs = [t * 1 if t.requires_grad else t for t in leaves]
        needed = [t for t in leaves if t.requires_grad]
        y = function("tanh", "sigmoid", *inputs)
        inputs[changed].mul_(3)
        first = torch.autograd.grad(y.square().sum(), needed, create_graph=True)
        return *first, *torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), needed)

    if dispatch.backend_of(drawn[0]) == "triton":
        with pytest.raises(RuntimeError, match="changed in place"):
            derivatives(ours)
        return
    for a, b in zip(derivatives(ours), derivatives(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_what_may_be_changed_after_a_first_derivative(device: str) -> None:
    """The lowest weight of a frozen input: the second derivative does not read it either."""
    drawn = draw((5, 6, 3), 4, torch.float64, device)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = [t.detach().clone().requires_grad_(n > 0) for n, t in enumerate(drawn)]
        grads = torch.autograd.grad(function("tanh", "sigmoid", *inputs).square().sum(), inputs[1:], create_graph=True)
        with torch.no_grad():
            inputs[1].add_(1)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), inputs[1:])

    for a, b in zip(second(ours), second(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_inference_tensors(device: str) -> None:
    """As torch takes them: where backward does not read them. Features of a frozen backbone, say."""
    with torch.inference_mode():
        x, b = torch.randn(4, 5, device=device), torch.zeros(6, device=device)
    model = tribp.nn.MLP([5, 6, 3]).to(device)
    model.layers[0].weight.requires_grad_(False)
    model(x).sum().backward()
    assert model.layers[0].bias.grad is not None
    x, w = x.clone(), torch.randn(6, 5, device=device, requires_grad=True)
    (dw,) = torch.autograd.grad(tribp.mlp(x, [w], [b], output_activation="tanh").sum(), w, create_graph=True)
    (expected,) = torch.autograd.grad(tribp.linear(x, w).tanh().sum(), w)
    torch.testing.assert_close(dw, expected)


def test_frozen_layers_and_second_derivatives(device: str) -> None:
    inputs = draw((5, 6, 4, 3), 4, torch.float64, device)
    for frozen in ([0], [0, 1, 2], [0, 1, 2, 3, 4], [1, 3], [0, 1]):
        tensors = [t.detach().requires_grad_(n not in frozen) for n, t in enumerate(inputs)]
        needed = [t for t in tensors if t.requires_grad]
        found = []
        for function in (ours, theirs):
            (first, *_) = torch.autograd.grad(
                function("tanh", "sigmoid", *tensors).square().sum(), needed, create_graph=True
            )
            found.append(torch.autograd.grad(first.square().sum(), needed, allow_unused=True))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_modes_around_backward_see_operators(kernels: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from ..torch_machinery.cases import Seen

    inputs = draw((8, 16, 4), 12, torch.float64, kernels)
    counted = []
    for function in (ours, theirs):
        y = function("tanh", None, *inputs)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.sum(), inputs, retain_graph=True)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
    y = ours("tanh", None, *inputs)
    with Seen() as seen:
        grads = torch.autograd.grad(y.sum(), inputs)
    assert [name for name in seen.names if "tribp" in name] == ["tribp.mlp_backward.default"]
    expected = torch.autograd.grad(theirs("tanh", None, *inputs).sum(), inputs)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_were_replaced_tied_or_hooked(device: str) -> None:
    """They are called then, as a Sequential would."""
    x = torch.randn(6, 8, device=device)

    def same(module: tribp.nn.MLP) -> bool:
        y = x
        for n, layer in enumerate(module.layers):
            y = torch.tanh(F.linear(y, layer.weight, layer.bias)) if n < 2 else F.linear(y, layer.weight, layer.bias)  # type: ignore[arg-type]
        return torch.allclose(module(x), y, atol=1e-6)

    module = tribp.nn.MLP([8, 8, 8, 8], "tanh").to(device)
    setattr(module, "4", getattr(module, "2"))
    assert len(module.layers) == 3
    assert same(module)
    setattr(module, "2", nn.Linear(8, 8).to(device))
    assert same(module)
    module = tribp.nn.MLP([8, 8, 8, 8], "tanh").to(device)
    calls: list[nn.Module] = []
    handle = module.layers[0].register_forward_hook(lambda m, i, o: calls.append(m))
    assert same(module)
    assert calls == [module.layers[0]]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: calls.append(m))
    assert same(module)
    handle.remove()
    assert calls[1:] == [*module.layers, module], "a hook on every module"
    prune.l1_unstructured(module.layers[0], "weight", 0.5)
    for _ in range(2):
        module(x).sum().backward()
    assert same(module)
    model = nn.Sequential(tribp.nn.MLP([8, 5, 3], "relu").to(device))
    y = model(x)
    assert len(tribp.unfuse(model).replaced) == 3
    torch.testing.assert_close(model(x), y)

    class WithMore(tribp.nn.MLP):
        def __init__(self) -> None:
            super().__init__([8, 4], "relu")
            self.aux = tribp.nn.Linear(3, 3)

    assert WithMore().to(device)(x).shape == (6, 4)
