"""What torch builds around an operation: the compiler, export, torch.func, forward mode, dispatch modes, subclasses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import tribp

from .torch_cases import Seen

Function = Callable[..., Tensor]


def theirs(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.sigmoid(F.linear(x, w, b))


@pytest.fixture
def tensors(device: str) -> list[Tensor]:
    torch.compiler.reset()
    return [torch.randn(*s, device=device, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (4, 5), (4,))]


def test_compile_is_one_graph_of_our_operators(tensors: list[Tensor]) -> None:
    compiled = torch.compile(tribp.linear_sigmoid, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(theirs(*tensors).square().sum(), tensors)
    y = compiled(*tensors)
    with Seen() as seen:
        found = torch.autograd.grad(y.square().sum(), tensors)
    assert "tribp.linear_sigmoid_backward.default" in seen.names
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs)


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


def test_compiled_double_backward_raises(tensors: list[Tensor]) -> None:
    y = torch.compile(tribp.linear_sigmoid, fullgraph=True, backend="aot_eager")(*tensors)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), tensors[1])


def test_export(device: str) -> None:
    layer = tribp.nn.LinearSigmoid(5, 4, device=device)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(6, 5, device=device),), dynamic_shapes=({0: batch},))
    assert "tribp.linear_sigmoid.default" in {str(node.target) for node in program.graph.nodes}
    x = torch.randn(9, 5, device=device)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_opcheck(tensors: list[Tensor]) -> None:
    from tribp.ops import linear_sigmoid as ops

    x, w, b = (t.detach() for t in tensors)
    y = ops.linear_sigmoid(x, w, b)
    cases: list[tuple[Any, tuple[object, ...]]] = [
        (ops.linear_sigmoid, (x, w, b)),
        (ops.linear_sigmoid, (x.t().contiguous().t(), w, None)),
        (ops.linear_sigmoid, (torch.stack([x, x]).transpose(0, 1), w, b)),
        (ops.linear_sigmoid, (x[:0], w, b)),
        (ops.linear_sigmoid_backward, (y, x, w, y, [True, True, True])),
        (ops.linear_sigmoid_backward, (y[:, :1].expand_as(y), None, w, y, [True, False, False])),
        (ops.linear_sigmoid_backward, (y, x, None, y, [False, True, True])),
        (ops.linear_sigmoid_backward, (y, None, None, y, [False, False, True])),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments)


def test_bare_operator_has_no_silent_gradient(tensors: list[Tensor]) -> None:
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.tribp.linear_sigmoid(*tensors).sum().backward()


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: lambda x, w, b: torch.func.grad(lambda w: f(x, w, b).square().sum())(w),
    "grad of grad": lambda f: (
        lambda x, w, b: torch.func.grad(lambda x: torch.func.grad(lambda w: f(x, w, b).square().sum())(w).sum())(x)
    ),
    "vmap": lambda f: lambda x, w, b: torch.func.vmap(lambda x: f(x, w, b))(x),
    "vmap over weights": lambda f: lambda x, w, b: torch.func.vmap(lambda w: f(x, w, b))(torch.stack([w, 2 * w])),
    "jvp": lambda f: lambda x, w, b: torch.func.jvp(lambda w: f(x, w, b), (w,), (w,))[1],
    "jacrev": lambda f: lambda x, w, b: torch.func.jacrev(lambda b: f(x, w, b))(b),
    "hessian": lambda f: lambda x, w, b: torch.func.hessian(lambda b: f(x, w, b).sum())(b),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform: str, compiled: bool, tensors: list[Tensor]) -> None:
    tensors = [t.detach() for t in tensors]
    apply = TRANSFORMS[transform]
    ours = apply(tribp.linear_sigmoid)
    if compiled:
        ours = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(ours(*tensors), apply(theirs)(*tensors))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad: bool, tensors: list[Tensor]) -> None:
    x, w, b = (t.detach().requires_grad_(requires_grad) for t in tensors)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        ours, torchs = (forward_ad.unpack_dual(f(dual, w, b)).tangent for f in (tribp.linear_sigmoid, theirs))
    assert ours is not None
    torch.testing.assert_close(ours, torchs)


def test_dispatch_modes_see_the_operators(tensors: list[Tensor]) -> None:
    with Seen() as seen:
        tribp.linear_sigmoid(*tensors).sum().backward()
    assert {"tribp.linear_sigmoid.default", "tribp.linear_sigmoid_backward.default"} <= set(seen.names)


@pytest.mark.filterwarnings("ignore")  # jit.trace warns that it is deprecated, and of every shape it is shown
def test_make_fx_and_jit_trace_record_the_computation(tensors: list[Tensor]) -> None:
    tensors = [t.detach() for t in tensors]
    others = [torch.randn_like(t) for t in tensors]
    for traced in (make_fx(tribp.linear_sigmoid)(*tensors), torch.jit.trace(tribp.linear_sigmoid, tuple(tensors))):
        torch.testing.assert_close(traced(*others), theirs(*others))


def test_symbolic_trace_keeps_the_function() -> None:
    module = torch.fx.symbolic_trace(torch.nn.Sequential(tribp.nn.LinearSigmoid(5, 4)))
    assert tribp.linear_sigmoid in {node.target for node in module.graph.nodes}


def test_tensor_subclasses_are_not_read_as_memory(tensors: list[Tensor]) -> None:
    class Doubled(torch.Tensor):
        """Means twice what its memory says: a kernel that read the memory would be wrong."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            values = [2 * a.as_subclass(Tensor) if isinstance(a, Doubled) else a for a in args]
            return func(*values, **(kwargs or {}))

    x, w, b = (t.detach() for t in tensors)
    y = tribp.linear_sigmoid(x.as_subclass(Doubled), w, b)
    torch.testing.assert_close(y, theirs(2 * x, w, b))


def test_wrapper_subclasses_go_through_torch(tensors: list[Tensor]) -> None:
    x, w, b = (t.detach() for t in tensors)
    y = tribp.linear_sigmoid(TwoTensor(x, 2 * x), w, b)
    assert isinstance(y, TwoTensor)
    torch.testing.assert_close(y.a, theirs(x, w, b))
    torch.testing.assert_close(y.b, theirs(2 * x, w, b))


def test_checkpointing(tensors: list[Tensor]) -> None:
    y = checkpoint(tribp.linear_sigmoid, *tensors, use_reentrant=False)
    expected = torch.autograd.grad(theirs(*tensors).sum(), tensors)
    for ours, torchs in zip(torch.autograd.grad(y.sum(), tensors), expected, strict=True):
        torch.testing.assert_close(ours, torchs)


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
    x, w = torch.randn(4096, 4096, device=kernels), torch.randn(512, 4096, device=kernels)
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
