"""What torch builds around `tribp.conv3x3`, where it asks for the operation's own arguments, and streams.

What it builds around any operation is in test_torch_machinery.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tribp
from tribp.ops.activations import NONE, Activation, activation_of
from tribp.versions import parse

from ..torch_machinery.cases import CONV, Function, assert_same_gradients, images
from .cases import WAYS, Case, last, one_pixel, sliced_last
from .cases import ieee as ieee

pytestmark = pytest.mark.usefixtures("ieee", "one_thread")


@pytest.fixture
def tensors(device: str) -> list[Tensor]:
    torch.compiler.reset()
    return [t.requires_grad_() for t in images(device)]


# ---- the compiler


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_compile_with_some_gradients(needs: tuple[bool, bool, bool], tensors: list[Tensor]) -> None:
    inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    y = torch.compile(lambda *t: CONV.ours(*t), fullgraph=True, backend="aot_eager")(*inputs)
    assert_same_gradients(y, CONV.theirs(*inputs), [t for t in inputs if t.requires_grad])


def test_compile_with_inductor(device: str) -> None:
    """A whole training step, shapes that change, without gradients, unbatched."""
    torch.compiler.reset()
    layer = tribp.nn.Conv3x3(3, 4, 2, 1, activation="sigmoid", dtype=torch.float64, device=device)
    case = Case((1, 3, 3, 3), 4, (2, 2), (1, 1), activation="sigmoid")
    compiled = torch.compile(layer, fullgraph=True)
    for size in ((2, 3, 3, 4), (1, 3, 4, 3), (3, 3, 5, 4), (3, 4, 4)):
        x = torch.randn(*size, dtype=torch.float64, device=device)
        assert_same_gradients(compiled(x), case.theirs(x, layer.weight, layer.bias), list(layer.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("layout", [last, sliced_last], ids=["channels_last", "sliced"])
def test_compiled_graphs_see_the_strides_of_eager(layout: Callable[[Tensor], Tensor], device: str) -> None:
    """Were the operator's strides not what the compiler was told, what follows it would read the wrong elements."""
    torch.compiler.reset()
    case = Case((2, 3, 3, 4), 4, padding=(1, 1))
    x, w, b = case.make(torch.float32, device)
    x = layout(x).detach().requires_grad_()

    def after(f: Function) -> Function:
        return lambda x, w, b: (f(x, w, b).relu() * 2).flatten(1).cumsum(1)

    compiled = torch.compile(after(lambda *t: case.ours(*t)), fullgraph=True)
    assert_same_gradients(compiled(x, w, b), after(case.theirs)(x, w, b), [x])
    plain = torch.compile(lambda *t: case.ours(*t), fullgraph=True)(x, w, b)
    assert plain.stride() == case.theirs(x, w, b).stride()
    (dx,) = torch.autograd.grad(plain.sum(), x)
    assert dx.stride() == torch.autograd.grad(case.theirs(x, w, b).sum(), x)[0].stride()


def test_compile_under_autocast(device: str) -> None:
    torch.compiler.reset()
    x, w, b = (t.requires_grad_() for t in CONV.make(torch.float32, device) if t is not None)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return CONV.ours(x, w, b)

    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, step(x, w, b))
    assert {g.dtype for g in torch.autograd.grad(y.sum(), (x, w, b))} == {torch.float32}


@pytest.mark.parametrize("static", [True, False], ids=["dynamic batch", "dynamic size"])
def test_export(static: bool, device: str) -> None:
    layer = tribp.nn.Conv3x3(3, 4, padding=1, activation="sigmoid", device=device)
    sizes = {0: torch.export.Dim("batch")}
    if not static:
        sizes |= {2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    program = torch.export.export(layer, (torch.randn(2, 3, 3, 4, device=device),), dynamic_shapes=(sizes,))
    assert "tribp.conv3x3.default" in {str(node.target) for node in program.graph.nodes}
    x = torch.randn(3, 3, 3, 4, device=device) if static else torch.randn(1, 3, 5, 3, device=device)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_exported_sizes_are_as_free_as_torchs(stride: int, groups: int, named: bool, strict: bool) -> None:
    """No size of the images becomes tied to the channels, nor height to width."""
    if strict and not named and parse(torch.__version__) < (2, 11):
        pytest.skip("what torch 2.9 exports of its own Conv2d raises NameError")
    ranges = []
    for kind in (tribp.nn.Conv3x3, partial(torch.nn.Conv2d, kernel_size=3)):
        layer = kind(16, 16, stride=stride, padding=1, groups=groups)
        sizes: dict[int, Any] = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
        if named:
            sizes = {0: torch.export.Dim("n"), **{d: torch.export.Dim(f"side{d}", min=8, max=512) for d in (2, 3)}}
        x = torch.randn(2, 16, 20, 24)
        program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=strict)
        larger = torch.randn(3, 16, 64, 9)
        torch.testing.assert_close(program.module()(larger), layer(larger))
        ranges.append(sorted((r.lower, r.upper) for r in program.range_constraints.values()))
    assert ranges[0] == ranges[1]


def test_what_a_mode_raises_of_one_group_is_raised_at_once(device: str) -> None:
    """Where torch computes what has no groups, at once; nothing is computed again."""
    convolutions = 0

    class Budget(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal convolutions
            if "conv" in str(function):
                convolutions += 1
                if convolutions == 1:
                    raise RuntimeError("over budget")
            return function(*args, **(kwargs or {}))

    x, w = torch.randn(1, 2, 4, 4, device=device), torch.randn(3, 2, 3, 3, device=device)
    with Budget(), pytest.raises(RuntimeError, match="over budget"):
        tribp.conv3x3(x, w, activation="relu")
    assert convolutions == 1


# ---- the operators


@pytest.mark.parametrize("grad", ["no gradients", "gradients"])
@pytest.mark.parametrize("way", ["small", *(pytest.param(w, marks=pytest.mark.slow) for w in WAYS if w != "small")])
def test_opcheck(way: str, grad: str, device: str) -> None:
    """All that torch checks of an operator: schema, autograd's registration, fake tensors, the compiler's graphs."""
    from tribp.ops.conv3x3 import op as ops

    case = WAYS[way]
    x, w, b = (None if t is None else t.requires_grad_(grad == "gradients") for t in case.make(torch.float64, device))
    assert x is not None
    assert w is not None
    rest = (list(case.stride), list(case.padding), case.groups)
    act = activation_of("test", case.activation)
    cases: list[tuple[Any, tuple[object, ...]]] = [(ops.operator, (last(x), w, b, *rest, case.activation))]
    thorough = device == "cuda" or way == "small"
    if thorough:
        cases += [
            (ops.operator, (x, last(w), None, *rest, None)),
            (ops.operator, (x.detach(), w, b, *rest, None)),
            (ops.operator, (x, w.detach(), b, *rest, case.activation)),
            (ops.operator, (x[:0], w, b, *rest, case.activation)),
        ]
    if grad == "no gradients":
        y = ops.operator(x, w, b, *rest, case.activation)
        saved, size = y if case.activation else None, list(x.shape)
        cases += [(ops.backward_operator, (y, x, w, saved, size, *rest, *act, [True, True, True], False, True))]
        if thorough:
            cases += [
                (
                    ops.backward_operator,
                    (one_pixel(y), None, w, y, size, *rest, *Activation("sigmoid"), [True, False, False], True, False),
                ),
                (ops.backward_operator, (y, x, None, None, size, *rest, *NONE, [False, True, True], False, False)),
                (ops.backward_operator, (y, None, None, None, size, *rest, *NONE, [False, False, True], False, False)),
            ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments)


def test_symbolic_trace_keeps_the_function() -> None:
    module = torch.fx.symbolic_trace(torch.nn.Sequential(tribp.nn.Conv3x3(3, 4, 2, 1, activation="sigmoid")))
    (node,) = [node for node in module.graph.nodes if node.target is tribp.conv3x3]
    assert node.args[3:] == ((2, 2), (1, 1), 1, "sigmoid")


# ---- tensors that are no plain memory


def test_torch_function_sees_the_options(tensors: list[Tensor]) -> None:
    seen: list[tuple[Any, ...]] = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is tribp.conv3x3:
                seen.append((*args[3:], kwargs))
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.testing.assert_close(CONV.ours(*tensors), CONV.theirs(*tensors))
    assert seen == [((2, 1), (1, 1), 2, "sigmoid", {"dilation": 1})]


def test_functional_call(tensors: list[Tensor]) -> None:
    x, w, b = tensors
    layer = tribp.nn.Conv3x3(4, 6, (2, 1), 1, 2, activation="sigmoid", device=x.device, dtype=x.dtype)
    assert_same_gradients(
        torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)), CONV.theirs(*tensors), tensors
    )


# ---- what only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_cuda_graph_replays(way: str, kernels: str) -> None:
    case = WAYS[way]._replace(size=(8, WAYS[way].size[1], 14, 14))
    x, w, b = (t.requires_grad_() for t in case.make(torch.float32, kernels) if t is not None)
    dy = torch.randn_like(case.theirs(x, w, b))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(case.ours(x, w, b), (x, w, b), dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.ours(x, w, b)
        found = torch.autograd.grad(y, (x, w, b), dy)
    with torch.no_grad():
        for t in (x, w, b, dy):
            t.normal_()
    graph.replay()
    expected = case.theirs(x, w, b)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for mine, torchs in zip(found, torch.autograd.grad(expected, (x, w, b), dy), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_runs_on_the_current_stream(way: str, kernels: str) -> None:
    """Forward and backward wait for what the stream does before them: an input that arrives late."""
    case = WAYS[way]._replace(size=(64, WAYS[way].size[1], 64, 64))
    x, w, b = case.make(torch.float32, kernels)
    y = case.theirs(x.requires_grad_(), w, b)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late, late_dy = torch.zeros_like(x), torch.zeros_like(dy)
        torch.cuda._sleep(20_000_000)
        late.copy_(x.detach())
        found = case.ours(late.requires_grad_(), w, b)
        torch.cuda._sleep(20_000_000)
        late_dy.copy_(dy)
        (found_dx,) = torch.autograd.grad(found, late, late_dy)
    stream.synchronize()
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_dx, dx, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device() -> None:
    for case in WAYS.values():
        x, w, b = (t.requires_grad_() for t in case.make(torch.float32, "cuda:1") if t is not None)
        y, expected = case.ours(x, w, b), case.theirs(x, w, b)
        assert y.device == x.device
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        dy = torch.randn_like(y)
        grads = (torch.autograd.grad(v, (x, w, b), dy) for v in (y, expected))
        for mine, torchs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cuda:1"):
        tribp.conv3x3(x, w.detach().to("cuda:0"))
