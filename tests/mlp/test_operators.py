"""`tribp::mlp` and `tribp::mlp_backward`, where they ask for the operation's own arguments.

What torch builds around any operation is in tests/torch_machinery.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tribp

from ..torch_machinery.cases import Seen, assert_same_gradients
from .test_function import draw, ours, theirs

pytestmark = pytest.mark.usefixtures("one_thread")

TANH, SIGMOID, NOTHING = ("tanh", 0.0, 0.0), ("sigmoid", 0.0, 0.0), (None, 0.0, 0.0)


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    torch.compiler.reset()


@pytest.fixture
def inputs(device: str) -> list[Tensor]:
    """x, and weight and bias of three layers."""
    return draw((5, 4, 6, 3), 7, torch.float64, device)


@pytest.mark.parametrize("grad", ["no gradients", "gradients"])
def test_opcheck(grad: str, inputs: list[Tensor]) -> None:
    """All that torch checks of an operator: schema, autograd's registration, fake tensors, the compiler's graphs."""
    from tribp.ops.mlp import op as ops

    x, w0, b0, w1, b1, w2, b2 = (t.detach().requires_grad_(grad == "gradients") for t in inputs)
    every = [True, True, True]
    forward: list[tuple[object, ...]] = [
        (x, [w0, w1, w2], [b0, b1, b2], every, *TANH, *SIGMOID),
        (x.detach(), [w0, w1.detach(), w2], [b0, b2], [True, False, True], "leaky_relu", 0.2, 0.0, *NOTHING),
        (x.detach().t().contiguous().t(), [w0.detach(), w1], [], [False, False], *NOTHING, *TANH),
        (torch.stack([x, x]).transpose(0, 1), [w0, w1, w2], [b0], [True, False, False], *TANH, *SIGMOID),
        (x[:0], [w0, w1, w2], [b0, b1, b2], every, *TANH, *SIGMOID),
        (x, [w0], [b0], [True], *NOTHING, *SIGMOID),
    ]
    for arguments in forward:
        torch.library.opcheck(ops.operator, arguments)
    if grad == "gradients":
        return
    h0, h1, y = ops.operator(*forward[0])
    dy = torch.randn_like(y)
    wide = torch.randn(7, 2, 3, device=x.device, dtype=x.dtype).transpose(0, 1)
    leading = [t.expand(2, *t.shape) for t in (x, h0, h1, y)]
    backward: list[tuple[object, ...]] = [
        (dy, x, [h0, h1], y, w0, [w1, w2], *TANH, *SIGMOID, [True] * 7),
        (y[:, :1].expand_as(y), None, [h0, h1], y, w0, [w1, w2], *TANH, *SIGMOID, [True] + [False] * 6),
        (dy, x, [h0, h1], None, None, [w1, w2], *TANH, *NOTHING, [False, True, False, True, False, True, False]),
        (dy, None, [h0, h1], None, None, [w1, w2], *TANH, *NOTHING, [False] * 4 + [True, False, False]),
        (dy, h1, [], y, None, [], *TANH, *SIGMOID, [False, True, True]),
        (wide, leading[0], leading[1:3], leading[3], w0, [w1, w2], *TANH, *SIGMOID, [True] * 7),
        (dy[:0], x[:0], [h0[:0], h1[:0]], y[:0], w0, [w1, w2], *TANH, *SIGMOID, [True] * 7),
    ]
    for arguments in backward:
        torch.library.opcheck(ops.backward_operator, arguments)


@pytest.mark.parametrize("wanted", ["x", "0", "1", "2", "x0", "02", "x12", "b", "xb", "x012b"])
def test_compiled_with_every_combination_of_gradients(wanted: str, inputs: list[Tensor]) -> None:
    """x: the input's; a digit: a layer's weight's; b: the biases'. The last layer has none."""
    inputs = inputs[:-1]
    for tensor, name in zip(inputs, ["x", "0", "b", "1", "b", "2"], strict=True):
        tensor.requires_grad_(name in wanted)
    x, w0, b0, w1, b1, w2 = inputs
    compiled = torch.compile(tribp.mlp, fullgraph=True, backend="aot_eager")
    y = compiled(x, [w0, w1, w2], [b0, b1, None], "tanh", "sigmoid")
    expected = torch.sigmoid(F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, w0, b0)), w1, b1)), w2))
    with Seen() as seen:
        assert_same_gradients(y, expected, [t for t in inputs if t.requires_grad])
    assert [name for name in seen.names if "tribp" in name] == ["tribp.mlp_backward.default"]


def test_inner_outputs_are_for_backward_alone(inputs: list[Tensor]) -> None:
    x, *layers = inputs
    outputs = torch.ops.tribp.mlp(x, layers[::2], layers[1::2], [True] * 3, *TANH, *SIGMOID)
    assert [y.requires_grad for y in outputs] == [False, False, True]
    assert_same_gradients(outputs[-1], theirs("tanh", "sigmoid", *inputs), inputs)


def test_biases_that_are_missing_keep_their_places(inputs: list[Tensor]) -> None:
    """Of the last layer's bias alone backward reads nothing but that layer's output."""
    x, w0, _, w1, _, w2, b2 = (t.detach() for t in inputs)
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    b2.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = torch.ops.tribp.mlp(x, [w0, w1, w2], [b2], [False, False, True], *TANH, *SIGMOID)[-1]
    assert kept == [(7, 3)]
    (grad,) = torch.autograd.grad(y.sum(), b2)
    torch.testing.assert_close(grad, (y * (1 - y)).sum(0).detach())


def test_without_gradients_no_output_is_held(kernels: str) -> None:
    """The layers are operators by themselves then."""
    inputs = draw((5, 4, 6, 3), 7, torch.float64, kernels)
    with torch.no_grad(), Seen() as seen:
        y = ours("tanh", None, *inputs)
    assert [name for name in seen.names if "tribp" in name] == ["tribp.linear.default"] * 3
    torch.testing.assert_close(y, theirs("tanh", None, *inputs).detach())


@pytest.mark.parametrize("ci", [False, True], ids=["", "CI"])
def test_compile_with_inductor(ci: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole training step, shapes that change, without gradients; and where CI is set, where Inductor asks more."""
    monkeypatch.setenv("CI", "1" if ci else "")
    module = tribp.nn.MLP([5, 8, 4, 3], "relu", "softplus", dtype=torch.float64, device=device)
    compiled = torch.compile(module, fullgraph=True)
    for rows in (6, 3, 9):
        x = torch.randn(rows, 5, dtype=torch.float64, device=device)
        loss, expected = compiled(x).square().sum(), module(x).square().sum()
        with Seen() as seen:
            grads = torch.autograd.grad(loss, list(module.parameters()))
        assert [name for name in seen.names if "tribp" in name] in ([], ["tribp.mlp_backward.default"])
        torch.testing.assert_close(loss, expected)
        for a, b in zip(grads, torch.autograd.grad(expected, list(module.parameters())), strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))


def test_compile_under_autocast(device: str) -> None:
    inputs = draw((5, 4, 6, 3), 7, torch.float32, device)

    def step(*inputs: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return ours("tanh", "sigmoid", *inputs)

    y = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, step(*inputs))
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, inputs, dy) for t in (y, step(*inputs))), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_export_with_a_dynamic_batch(device: str) -> None:
    module = tribp.nn.MLP([5, 4, 3], ("leaky_relu", 0.2), bias=False, device=device)
    module.layers[0].requires_grad_(False)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (torch.randn(6, 5, device=device),), dynamic_shapes=dynamic)
    assert "tribp.mlp.default" in {str(node.target) for node in program.graph.nodes}
    x = torch.randn(9, 5, device=device)
    plain = program.run_decompositions(tribp.decompositions())
    assert not [node for node in plain.graph.nodes if "tribp" in str(node.target)]
    for exported in (program, plain):
        torch.testing.assert_close(exported.module()(x), module(x))


def test_flops(inputs: list[Tensor]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, *layers = inputs
    for frozen in ([], [x], [x, *layers[:2]], [x, layers[0]]):
        counted = []
        tensors = [t.detach().requires_grad_(not any(t is f for f in frozen)) for t in inputs]
        for function in (ours, theirs):
            with FlopCounterMode(display=False) as counter:
                function("tanh", "sigmoid", *tensors).sum().backward()
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


def test_a_compiled_step_launches_what_an_eager_one_does(kernels: str, launched: list[str]) -> None:
    """Its backward crosses the layers, too."""
    inputs = draw((16, 32, 32, 8), 70, torch.float32, kernels)
    found = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        launched.clear()
        y = function("sigmoid", "sigmoid", *inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))
        found.append([*launched])
    assert found[0] == found[1]
    assert found[0].count("dgrad") == found[0].count("wgrad") == 2
    assert found[0].count("backward") == 1


def test_compiled_with_sizes_of_one_and_none(device: str) -> None:
    for sizes, rows in (((5, 1, 3), 4), ((5, 4, 3), 1), ((5, 4, 3), 0)):
        inputs = draw(sizes, rows, torch.float64, device)
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")("elu", None, *inputs)
        assert_same_gradients(y, theirs("elu", None, *inputs), inputs)
