"""What torch builds around `tribp.linear_sigmoid`, where it asks for the operation's own arguments, and streams.

What it builds around any operation is in test_torch_machinery.py.
"""

import pytest
import torch
from torch import Tensor

import tribp
from tribp.ops.activations import NONE, Activation

from .cases import eager_linear as theirs
from .cases import matrices


@pytest.fixture
def tensors(device: str) -> list[Tensor]:
    torch.compiler.reset()
    return [t.requires_grad_() for t in matrices(device)]


def test_compile_with_inductor(tensors: list[Tensor]) -> None:
    """A whole training step, shapes that change, without gradients, under autocast."""
    layer = tribp.nn.LinearSigmoid(5, 4, dtype=torch.float64, device=tensors[0].device)
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (6, 3, 9):
        x = torch.randn(rows, 5, dtype=torch.float64, device=tensors[0].device)
        loss, expected = compiled(x).square().sum(), theirs(x, layer.weight, layer.bias).square().sum()
        torch.testing.assert_close(loss, expected)
        grads = (torch.autograd.grad(value, list(layer.parameters())) for value in (loss, expected))
        for ours, torchs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, torchs)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


def test_compile_under_autocast(device: str) -> None:
    x, w = torch.randn(6, 5, device=device), torch.randn(4, 5, device=device, requires_grad=True)

    def step(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return tribp.linear_sigmoid(x, w)

    y = torch.compile(step, fullgraph=True)(x, w)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, step(x, w))
    (grad,) = torch.autograd.grad(y.sum(), w)
    assert grad.dtype == torch.float32


def test_export(device: str) -> None:
    layer = tribp.nn.LinearSigmoid(5, 4, device=device)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(6, 5, device=device),), dynamic_shapes=({0: batch},))
    assert "tribp.linear.default" in {str(node.target) for node in program.graph.nodes}
    x = torch.randn(9, 5, device=device)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("grad", ["no gradients", "gradients"])
def test_opcheck(grad: str, tensors: list[Tensor]) -> None:
    """All that torch checks of an operator: schema, autograd's registration, fake tensors, the compiler's graphs."""
    from tribp.ops.linear import op as ops

    x, w, b = (t.detach().requires_grad_(grad == "gradients") for t in tensors)
    forward: list[tuple[object, ...]] = [
        (x, w, b, "sigmoid", 0.0, 0.0),
        (x.detach(), w, b),
        (x, w.detach(), None, "elu", 2.0, 0.0),
        (x.detach().t().contiguous().t(), w, None, "sigmoid"),
        (torch.stack([x, x]).transpose(0, 1), w, b, "relu"),
        (x[:0], w, b, "sigmoid"),
    ]
    for arguments in forward:
        torch.library.opcheck(ops.operator, arguments)
    x, w, b = (t.detach() for t in tensors)
    y, act = ops.operator(x, w, b, "sigmoid"), Activation("sigmoid")
    backward: list[tuple[object, ...]] = [
        (y, x, w, y, *act, [True, True, True]),
        (y[:, :1].expand_as(y), None, w, y, *act, [True, False, False]),
        (y, x, None, None, *NONE, [False, True, True]),
        (y, None, None, y, *act, [False, False, True]),
    ]
    if grad == "no gradients":
        for arguments in backward:
            torch.library.opcheck(ops.backward_operator, arguments)


def test_symbolic_trace_keeps_the_function() -> None:
    module = torch.fx.symbolic_trace(torch.nn.Sequential(tribp.nn.LinearSigmoid(5, 4)))
    assert tribp.linear in {node.target for node in module.graph.nodes}


def test_functional_call(tensors: list[Tensor]) -> None:
    x, w, b = tensors
    layer = tribp.nn.LinearSigmoid(5, 4, device=x.device, dtype=x.dtype)
    torch.testing.assert_close(torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)), theirs(x, w, b))


@pytest.mark.gpu
def test_cuda_graph_replays(kernels: str) -> None:
    x, w, b = (torch.randn(*s, device=kernels, requires_grad=True) for s in ((64, 48), (32, 48), (32,)))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(tribp.linear_sigmoid(x, w, b).sum(), (x, w, b))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tribp.linear_sigmoid(x, w, b)
        found = torch.autograd.grad(y.sum(), (x, w, b))
    with torch.no_grad():
        x.normal_()
    graph.replay()
    torch.testing.assert_close(y, theirs(x, w, b), rtol=1e-5, atol=1e-5)
    for ours, torchs in zip(found, torch.autograd.grad(theirs(x, w, b).sum(), (x, w, b)), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_runs_on_the_current_stream(kernels: str) -> None:
    x, w = torch.randn(4096, 4096, device=kernels), torch.randn(512, 4096, device=kernels) / 64
    expected = theirs(x, w)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = tribp.linear_sigmoid(late, w)
    stream.synchronize()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device() -> None:
    x, w = torch.randn(64, 48, device="cuda:1", requires_grad=True), torch.randn(32, 48, device="cuda:1")
    y = tribp.linear_sigmoid(x, w)
    assert y.device == x.device
    torch.testing.assert_close(y, theirs(x, w), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    with pytest.raises(ValueError, match="cuda:1"):
        tribp.linear_sigmoid(x, w.to("cuda:0"))
