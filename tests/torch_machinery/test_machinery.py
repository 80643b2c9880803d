"""What torch builds around any operation: the compiler, torch.func, forward mode, tracing, dispatch modes, subclasses.

What asks for an operation's own arguments is in test_torch_integration.py and test_conv3x3_integration.py.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import tribp
from tribp.versions import parse

from ..conv3x3.cases import ieee as ieee
from .cases import OPERATIONS, Function, Operation, Seen, assert_same_gradients

pytestmark = pytest.mark.usefixtures("ieee", "one_thread")


@pytest.fixture(params=OPERATIONS, ids=str)
def operation(request: pytest.FixtureRequest) -> Operation:
    torch.compiler.reset()
    found: Operation = request.param
    return found


@pytest.fixture
def tensors(operation: Operation, device: str) -> list[Tensor]:
    return [t.requires_grad_() for t in operation.make(device)]


@pytest.fixture
def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, AttributeError])
def test_what_a_hook_raises_is_raised(operation: Operation, tensors: list[Tensor], error: type[Exception]) -> None:
    """At once: nothing is computed again, by which a hook that raises a single time would be passed over."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        if len(seen) == 1:
            raise error("out of memory for what is saved")
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, pytest.raises(error, match="out of memory for what is saved"):
        operation.ours(*tensors)
    assert len(seen) == 1


# -- the compiler -----------------------------------------------------------------------------------------------------


def test_compile_is_one_graph_of_our_operators(operation: Operation, tensors: list[Tensor]) -> None:
    y = torch.compile(operation.ours, fullgraph=True, backend="aot_eager")(*tensors)
    with Seen() as seen:
        assert_same_gradients(y, operation.theirs(*tensors), tensors)
    assert f"tribp.{operation.operator}_backward.default" in seen.names


def test_compiled_double_backward_raises(operation: Operation, tensors: list[Tensor]) -> None:
    y = torch.compile(operation.ours, fullgraph=True, backend="aot_eager")(*tensors)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), tensors[1])


def test_compiled_autograd_of_an_eager_forward(operation: Operation, tensors: list[Tensor]) -> None:
    """The compiler looks on in the backward pass alone."""
    y, expected = operation.ours(*tensors), operation.theirs(*tensors)
    dy = torch.randn_like(y)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, fullgraph=True, backend="aot_eager")):
        y.backward(dy)
    for tensor, torchs in zip(tensors, torch.autograd.grad(expected, tensors, dy), strict=True):
        torch.testing.assert_close(tensor.grad, torchs)


@pytest.mark.filterwarnings("ignore")  # jit.trace warns that it is deprecated, and of every shape it is shown
def test_make_fx_and_jit_trace_record_the_computation(operation: Operation, detached: list[Tensor]) -> None:
    others = [torch.randn_like(t) for t in detached]
    for traced in (make_fx(operation.ours)(*detached), torch.jit.trace(operation.ours, tuple(detached))):
        torch.testing.assert_close(traced(*others), operation.theirs(*others))


def test_dispatch_modes_see_the_operators(
    operation: Operation, tensors: list[Tensor], request: pytest.FixtureRequest
) -> None:
    """Of the kernels; where torch computes a call, its own."""
    with Seen() as seen:
        operation.ours(*tensors).sum().backward()
    ours = [f"tribp.{operation.operator}{kind}.default" for kind in ("", "_backward")]
    kernels = request.node.callspec.params["device"] == "triton"
    assert [name for name in seen.names if "tribp" in name] == (ours if kernels else [])


def test_dispatch_modes_may_keep_what_they_see(operation: Operation, detached: list[Tensor]) -> None:
    """What an activation is given, without gradients, is not overwritten by it."""
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeper(Seen):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = super().__torch_dispatch__(func, types, args, kwargs)
            kept.extend((t, t.clone()) for t in (output,) if isinstance(t, Tensor))
            return output

    with torch.no_grad(), Keeper():
        operation.ours(*detached)
    assert kept
    assert all(torch.equal(*pair) for pair in kept)


# -- the operators as such, and graphs that hold them ------------------------------------------------------------------

LINEAR, CONV, MLP = OPERATIONS
NEEDS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (False, True, True)]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_operators_have_derivatives(needs: tuple[bool, ...], operation: Operation, detached: list[Tensor]) -> None:
    tensors = [t.requires_grad_(need) for t, need in zip(detached, needs, strict=True)]
    inputs = [t for t in tensors if t.requires_grad]
    y, expected = operation.bare(*tensors), operation.theirs(*tensors)
    with Seen() as seen:
        assert_same_gradients(y, expected, inputs)
    assert f"tribp.{operation.operator}_backward.default" in seen.names


def test_operators_can_be_differentiated_twice(operation: Operation, tensors: list[Tensor]) -> None:
    dy = torch.randn_like(operation.theirs(*tensors))
    found = []
    for f in (operation.bare, operation.theirs):
        grads = torch.autograd.grad(f(*tensors), tensors, dy, create_graph=True)
        found.append([*grads, *torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), tensors)])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_a_batch_of_gradients_of_an_operator(operation: Operation, tensors: list[Tensor]) -> None:
    y, expected = operation.bare(*tensors), operation.theirs(*tensors)
    batch = torch.randn(3, *y.shape, device=y.device, dtype=y.dtype)
    grads = (torch.autograd.grad(v, tensors, batch, is_grads_batched=True) for v in (y, expected))
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_autocast_does_not_change_an_operator(operation: Operation, tensors: list[Tensor]) -> None:
    """The compiler and export were told that the result has the arguments' type."""
    tensors = [t.detach().float().requires_grad_() for t in tensors]
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        y = operation.bare(*tensors)
        grads = torch.autograd.grad(y.sum(), tensors)
    assert {t.dtype for t in (y, *grads)} == {torch.float32}
    torch.testing.assert_close(y, operation.theirs(*tensors))


class Net(torch.nn.Module):
    def __init__(self, function: Function, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, self.weight, self.bias)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_exported_modules_train(compiled: bool, operation: Operation, detached: list[Tensor]) -> None:
    x, w, b = detached
    net = Net(operation.ours, w, b)
    program = torch.export.export(net, (x,))
    assert f"tribp.{operation.operator}.default" in {str(node.target) for node in program.graph.nodes}
    module = program.module()
    parameters = [dict(module.named_parameters())[name] for name in ("weight", "bias")]
    y = torch.compile(module, backend="aot_eager")(x) if compiled else module(x)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, parameters, dy)
    expected = torch.autograd.grad(operation.theirs(x, net.weight, net.bias), list(net.parameters()), dy)
    for ours, torchs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_exported_programs_decompose(operation: Operation, detached: list[Tensor]) -> None:
    x, w, b = detached
    program = torch.export.export(Net(operation.ours, w, b), (x,))
    plain = program.run_decompositions(tribp.decompositions())
    assert [node for node in plain.graph.nodes if "tribp" in str(node.target)] == []
    torch.testing.assert_close(plain.module()(x), operation.theirs(x, w, b))


def test_all_operators_with_a_forward_decompose() -> None:
    named = {str(operator) for operator in tribp.decompositions()}
    operators = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tribp::")}
    assert named == {name.replace("::", ".") + ".default" for name in operators if not name.endswith("_backward")}


def test_ci_compiles_our_operators(
    operation: Operation, detached: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There Inductor refuses operators that torch's table of decompositions knows."""
    monkeypatch.setenv("CI", "1")
    compiled = torch.compile(operation.ours, fullgraph=True)
    torch.testing.assert_close(compiled(*detached), operation.theirs(*detached))


@pytest.mark.parametrize("device", ["torch"], indirect=True)  # what is exported is the same by kernels
@pytest.mark.parametrize("exported", [False, True], ids=["", "exported"])
def test_onnx(exported: bool, operation: Operation, detached: list[Tensor]) -> None:
    pytest.importorskip("onnxscript")
    x, w, b = (t.float() for t in detached)
    net = Net(operation.ours, w, b)
    model = torch.export.export(net, (x,)).run_decompositions(tribp.decompositions()) if exported else net
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    kinds = {node.op_type for node in program.model.graph}
    assert "Sigmoid" in kinds
    assert kinds & {"Conv", "Gemm", "MatMul"}


def test_gradients_of_gradient_operators_raise(operation: Operation, tensors: list[Tensor]) -> None:
    """They have no derivative, and must not seem to have one."""
    x, w, b = tensors
    y = operation.theirs(x, w, b).detach()
    needs = [True, True, True]
    if operation is LINEAR:
        found = torch.ops.tribp.linear_backward(y, x, w, y, "sigmoid", 0.0, 0.0, needs)
    elif operation is MLP:
        found = torch.ops.tribp.mlp_backward(
            y, x, [y], y, w, [w], "tanh", 0.0, 0.0, "sigmoid", 0.0, 0.0, [True, True, True, True, True]
        )
    else:
        found = torch.ops.tribp.conv3x3_backward(
            y, x, w, y, list(x.shape), [2, 1], [1, 1], 2, "sigmoid", 0.0, 0.0, needs, False, False
        )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        found[0].sum().backward()


# -- transforms -------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: lambda x, w, b: torch.func.grad(lambda w: f(x, w, b).square().sum())(w),
    "grad of grad": lambda f: (
        lambda x, w, b: torch.func.grad(lambda x: torch.func.grad(lambda w: f(x, w, b).square().sum())(w).sum())(x)
    ),
    "vmap": lambda f: lambda x, w, b: torch.func.vmap(lambda x: f(x, w, b))(x),
    "vmap of batches": lambda f: lambda x, w, b: torch.func.vmap(lambda x: f(x, w, b))(torch.stack([x, 2 * x])),
    "vmap over weights": lambda f: lambda x, w, b: torch.func.vmap(lambda w: f(x, w, b))(torch.stack([w, 2 * w])),
    "per-sample gradients": lambda f: (
        lambda x, w, b: torch.func.vmap(torch.func.grad(lambda w, x: f(x, w, b).sum()), (None, 0))(w, x)
    ),
    "jvp": lambda f: lambda x, w, b: torch.func.jvp(lambda w: f(x, w, b), (w,), (w,))[1],
    "jacrev": lambda f: lambda x, w, b: torch.func.jacrev(lambda b: f(x, w, b))(b),
    "hessian": lambda f: lambda x, w, b: torch.func.hessian(lambda b: f(x, w, b).sum())(b),
}


STANDING = (LINEAR, "triton")  # for the others, when compiled
WAYS = [
    pytest.param(operation, compiled, device, marks=[pytest.mark.slow] * (compiled and (operation, device) != STANDING))
    for operation in (LINEAR, CONV)
    for compiled in (False, True)
    for device in ("torch", "triton")
]


@pytest.mark.parametrize(("operation", "compiled", "device"), WAYS, indirect=["operation", "device"], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform: str, compiled: bool, operation: Operation, detached: list[Tensor]) -> None:
    apply = TRANSFORMS[transform]
    ours = apply(operation.ours)
    if compiled:
        ours = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(ours(*detached), apply(operation.theirs)(*detached))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_operators_under_torch_func(transform: str, operation: Operation, detached: list[Tensor]) -> None:
    """As an exported module calls them, with parameters that need no gradient."""
    if operation is CONV and transform in ("vmap", "per-sample gradients"):
        pytest.skip("the operator takes batches of images alone")
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(operation.bare)(*detached), apply(operation.theirs)(*detached))


def test_an_operator_loses_no_tangent(operation: Operation, detached: list[Tensor]) -> None:
    x, *others = detached
    with forward_ad.dual_level():
        assert torch.equal(operation.bare(x, *others), operation.bare(*detached))
        with pytest.raises(NotImplementedError, match="decompositions"):
            operation.bare(forward_ad.make_dual(x, x), *others)
        compiled = torch.compile(operation.bare, backend="aot_eager")
        assert torch.equal(compiled(x, *others), operation.bare(*detached))


def test_zeros_without_memory(operation: Operation, tensors: list[Tensor]) -> None:
    """The gradient of torch.sgn: a tensor that kernels cannot read."""
    for f in (operation.ours, operation.bare):
        for grad in torch.autograd.grad(torch.sgn(f(*tensors)).sum(), tensors):
            assert torch.equal(grad, torch.zeros_like(grad))
    x, *others = (t.detach() for t in tensors)
    zero = torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)
    torch.testing.assert_close(operation.ours(zero, *others), operation.theirs(torch.zeros_like(x), *others))


EXCHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "type": lambda t: t.half(),
    "rows": lambda t: t[: len(t) // 2].clone(),
    "columns": lambda t: t[:, 1:],
}


@pytest.mark.parametrize("what", EXCHANGED)
def test_hooks_that_give_back_another_tensor(what: str, operation: Operation, tensors: list[Tensor]) -> None:
    """torch's code refuses it, each in its own words; kernels would read past its end."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, EXCHANGED[what]):
        y = operation.ours(*tensors)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y.square().sum(), tensors)


def test_a_fake_tensor_may_be_on_a_gpu_that_is_not_there(operation: Operation) -> None:
    with FakeTensorMode():
        fakes = [torch.empty(t.shape, device="cuda") for t in operation.make("cpu")]
    y = operation.ours(*fakes)
    assert (y.device.type, y.shape) == ("cuda", operation.theirs(*operation.make("cpu")).shape)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_a_transform_left_behind(requires_grad: bool, operation: Operation, detached: list[Tensor]) -> None:
    """A tensor of torch.func that outlived it wraps memory, and has none."""
    left: list[Tensor] = []
    for t in detached[:2]:
        torch.func.grad(lambda x: left.append(x) or x.sum())(t)  # type: ignore[func-returns-value]
    b = detached[2].requires_grad_(requires_grad)
    y, expected = operation.ours(*left, b), operation.theirs(*detached)
    torch.testing.assert_close(y, expected)
    if requires_grad:
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), b) for v in (y, expected)))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad: bool, operation: Operation, detached: list[Tensor]) -> None:
    x, w, b = (t.requires_grad_(requires_grad) for t in detached)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        ours, torchs = (forward_ad.unpack_dual(f(dual, w, b)).tangent for f in (operation.ours, operation.theirs))
    assert ours is not None
    torch.testing.assert_close(ours, torchs)


def test_a_batch_of_gradients(operation: Operation, tensors: list[Tensor]) -> None:
    """`is_grads_batched`, and `torch.autograd.functional.jacobian(vectorize=True)` on top of it."""
    y, expected = operation.ours(*tensors), operation.theirs(*tensors)
    batch = torch.randn(3, *y.shape, device=y.device, dtype=y.dtype)
    for inputs in (tensors, tensors[:1], tensors[2:]):
        grads = (torch.autograd.grad(v, inputs, batch, True, is_grads_batched=True) for v in (y, expected))
        for ours, torchs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, torchs)
    x, w, b = (t.detach() for t in tensors)
    jacobians = (
        torch.autograd.functional.jacobian(lambda b, f=f: f(x, w, b), b, vectorize=True)
        for f in (operation.ours, operation.theirs)
    )
    torch.testing.assert_close(*jacobians)


def test_checkpointing(operation: Operation, tensors: list[Tensor]) -> None:
    y = checkpoint(operation.ours, *tensors, use_reentrant=False)
    assert_same_gradients(y, operation.theirs(*tensors), tensors)


@pytest.mark.parametrize("around", ["forward", "backward"])
def test_a_mode_around_one_pass_of_a_checkpoint(around: str, operation: Operation, tensors: list[Tensor]) -> None:
    """What is computed again saves what was saved, in the same order: a checkpoint compares them."""

    def seen(where: str) -> contextlib.AbstractContextManager[object]:
        return Seen() if where == around else contextlib.nullcontext()

    with seen("forward"):
        y = checkpoint(operation.ours, *tensors, use_reentrant=False)
    expected = operation.theirs(*tensors)
    dy = torch.randn_like(expected)
    with seen("backward"):
        grads = torch.autograd.grad(y, tensors, dy)
    for ours, torchs in zip(grads, torch.autograd.grad(expected, tensors, dy), strict=True):
        torch.testing.assert_close(ours, torchs)


def test_compiled_autograd_of_a_reentrant_checkpoint(operation: Operation, tensors: list[Tensor]) -> None:
    """What is computed again is traced, and so the operator, whose derivative Dynamo then reads."""
    if operation.name == "mlp" and parse(torch.__version__) < (2, 13):
        pytest.skip("compiled autograd takes no operator of lists of tensors")
    y, expected = checkpoint(operation.ours, *tensors, use_reentrant=True), operation.theirs(*tensors)
    dy = torch.randn_like(expected)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        y.backward(dy)
    for tensor, torchs in zip(tensors, torch.autograd.grad(expected, tensors, dy), strict=True):
        torch.testing.assert_close(tensor.grad, torchs)


# -- tensors that are no plain memory ---------------------------------------------------------------------------------


def test_tensor_subclasses_are_not_read_as_memory(operation: Operation, detached: list[Tensor]) -> None:
    class Doubled(torch.Tensor):
        """Means twice what its memory says: a kernel that read the memory would be wrong."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            values = [2 * a.as_subclass(Tensor) if isinstance(a, Doubled) else a for a in args]
            return func(*values, **(kwargs or {}))

    x, w, b = detached
    torch.testing.assert_close(operation.ours(x.as_subclass(Doubled), w, b), operation.theirs(2 * x, w, b))


class Scaled(torch.Tensor):
    """A third of what it means, to torch's products alone: as weights in few bits have a scale."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.linear, torch.nn.functional.conv2d):
            args = [3 * a.as_subclass(Tensor) if isinstance(a, Scaled) else a for a in args]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("place", [0, 1, 2], ids=["input", "weight", "bias"])
def test_subclasses_are_shown_the_functions_that_they_know(
    place: int, operation: Operation, detached: list[Tensor]
) -> None:
    scaled = [(t / 3).as_subclass(Scaled) if n == place else t for n, t in enumerate(detached)]
    found, expected = (f(*scaled).as_subclass(Tensor) for f in (operation.ours, operation.theirs))
    torch.testing.assert_close(found, expected)
    if operation.name != "mlp":  # whose second layer is given what the first made of it, again a subclass
        torch.testing.assert_close(found, operation.theirs(*detached))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_subclasses_are_not_changed_in_place(activation: str, device: str) -> None:
    """A DTensor may be a summand in each process, which torch 2.9 changes where it lies."""
    names = []

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, w = torch.randn(3, 4, device=device).as_subclass(Named), torch.randn(5, 4, device=device)
    tribp.linear(x, w, None, activation)
    tribp.mlp(x, [w], activation=None, output_activation=activation)
    tribp.conv3x3(x.expand(1, 1, 3, 4), torch.randn(1, 1, 3, 3, device=device), activation=activation)
    assert names.count(activation) == 3
    assert f"{activation}_" not in names


def test_compile_of_dtensors(process_group: None, operation: Operation) -> None:
    """Their rules know torch's functions."""
    if operation.name == "conv3x3" and parse(torch.__version__) < (2, 11):
        pytest.skip("torch 2.9 has no rule for such a convolution")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    tensors = [distribute_tensor(t, mesh).requires_grad_() for t in operation.make("cpu")]
    y = torch.compile(operation.ours, fullgraph=True, backend="aot_eager")(*tensors)
    assert_same_gradients(y, operation.theirs(*tensors), tensors)


def test_wrapper_subclasses_go_through_torch(operation: Operation, detached: list[Tensor]) -> None:
    x, w, b = detached
    y = operation.ours(TwoTensor(x, 2 * x), w, b)
    assert isinstance(y, TwoTensor)
    torch.testing.assert_close(y.a, operation.theirs(x, w, b))
    torch.testing.assert_close(y.b, operation.theirs(2 * x, w, b))


@pytest.mark.parametrize("place", [0, 1, 2], ids=["input", "weight", "bias"])
def test_negative_views_are_negative(place: int, operation: Operation, tensors: list[Tensor]) -> None:
    """`z.conj().imag` is the imaginary part before its sign is turned, and a mark that says so."""
    turned = [torch._neg_view(t) if n == place else t for n, t in enumerate(tensors)]
    minus = [-t if n == place else t for n, t in enumerate(tensors)]
    y, expected = operation.ours(*turned), operation.theirs(*minus)
    assert_same_gradients(y, expected, tensors)
    dy = torch.randn_like(expected)
    grads = torch.autograd.grad(operation.ours(*tensors), tensors, torch._neg_view(dy))
    for ours, torchs in zip(grads, torch.autograd.grad(operation.theirs(*tensors), tensors, -dy), strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_sparse_tensors_go_through_torch(activation: Any, layout: torch.layout, device: str) -> None:
    x, w, dy = torch.randn(6, 5, device=device), torch.randn(5, 5, device=device), torch.randn(6, 5, device=device)
    layers = {
        "linear": lambda x, w: tribp.linear(x, w, activation=activation),
        "mlp": lambda x, w: tribp.mlp(x, [w, w], activation=activation, output_activation=activation),
    }
    for ours in layers.values():
        expected = ours(x, w)
        torch.testing.assert_close(ours(x.to_sparse(layout=layout), w), expected)
        torch.testing.assert_close(ours(x, w.to_sparse(layout=layout)), expected)
    if layout is torch.sparse_coo and activation is None:
        for ours in layers.values():
            inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
            found = torch.autograd.grad(ours(*inputs), inputs, dy.to_sparse())
            for ours_grad, dense_grad in zip(found, torch.autograd.grad(ours(*inputs), inputs, dy), strict=True):
                torch.testing.assert_close(ours_grad, dense_grad)


def test_mkldnn_tensors_go_through_torch(kernels: str) -> None:
    if kernels != "cpu":
        pytest.skip("they are on the CPU alone")
    x, w, image, filters = torch.randn(6, 5), torch.randn(5, 5), torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    y = tribp.linear(x.to_mkldnn(), w.to_mkldnn())
    torch.testing.assert_close(y.to_dense(), tribp.linear(x, w))
    y = tribp.conv3x3(image.to_mkldnn(), filters.to_mkldnn())
    torch.testing.assert_close(y.to_dense(), tribp.conv3x3(image, filters))
