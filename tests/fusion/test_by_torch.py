"""Where torch computes, a fused model calls its modules one by one, as it did before."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tribp
from tribp.fusion import rows

from .cases import MODELS, image

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows:
    """How many rows were run together."""

    def __init__(self) -> None:
        self.run = 0

    def __enter__(self) -> "Rows":
        real = rows._run_row

        def counted(row: Any, input: Tensor) -> Tensor:
            self.run += 1
            return real(row, input)

        self._patch = mock.patch.object(rows, "_run_row", counted)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 4)), nn.ReLU(inplace=True))


def with_norm() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model(image())
    return model.eval().requires_grad_(False)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and every gradient."""
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_torchs_to_the_bit(name: str) -> None:
    plain = MODELS[name]()
    model = copy.deepcopy(plain)
    tribp.fuse(model)
    x = image()
    with Rows() as found:
        ours, theirs = (run(m, x) for m in (model, plain))
    assert all(map(torch.equal, ours, theirs))
    assert found.run == 0


def test_hooks_and_replaced_modules_are_called() -> None:
    model: Any = perceptron()
    x = torch.randn(3, 6)
    tribp.fuse(model)
    seen: list[str] = []
    model[1][0].register_forward_hook(lambda *_: seen.append("relu"))
    model[1][1] = nn.Linear(5, 4, bias=False)
    expected = torch.relu(model[1][1](torch.relu(model[0](x))))
    assert torch.equal(model(x), expected)
    assert seen == ["relu"]


def test_a_fake_gpu_is_not_asked_for() -> None:
    """A fake tensor may name one that is not there."""
    model, mode = perceptron().requires_grad_(False), FakeTensorMode(allow_non_fake_inputs=True)
    tribp.fuse(model)

    def fake(*size: int) -> Tensor:
        return FakeTensor(mode, torch.empty(size, device="meta"), torch.device("cuda:0"))

    parameters, x = {name: fake(*p.shape) for name, p in model.named_parameters()}, fake(3, 6)
    with mode, mock.patch("tribp.dispatch.interpreting", return_value=False):
        y = torch.func.functional_call(model, parameters, (x,))
    assert (y.shape, y.device.type) == ((3, 4), "cuda")


@pytest.mark.usefixtures("interpreter")
def test_kernels_run_rows() -> None:
    model, x = perceptron(), torch.randn(3, 6)
    expected = model(x)
    tribp.fuse(model)
    with Rows() as found:
        torch.testing.assert_close(model(x), expected)
    assert found.run == 1


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_folded_norms_are_folded_everywhere(backend: str) -> None:
    model, x = with_norm(), image()
    expected = model(x)
    tribp.fuse(model, fold_batchnorm=True)
    with tribp.use_backend(backend), Rows() as found:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert found.run == 1


@pytest.mark.parametrize("fold", [False, True])
def test_a_graph_may_run_elsewhere(fold: bool) -> None:
    """What is exported on the CPU has tribp's operators, which choose where they run."""
    model = with_norm() if fold else perceptron()
    x = image() if fold else torch.randn(3, 6)
    expected = model(x)
    tribp.fuse(model, fold_batchnorm=fold)
    program = torch.export.export(model, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("tribp.") for name in called), called
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)


def test_a_traced_model_is_torchs() -> None:
    model, x = perceptron(), torch.randn(3, 6)
    expected = model(x)
    tribp.fuse(model)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    assert torch.equal(torch.func.vmap(model)(x), expected)


@pytest.mark.parametrize("wrong", [None, 3, [[1.0]], torch.ones(2, 5), torch.ones(2, 6, dtype=torch.int64)], ids=repr)
def test_wrong_inputs_raise_as_torch_does(wrong: Any) -> None:
    plain = perceptron()
    model = copy.deepcopy(plain)
    tribp.fuse(model)
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        plain(wrong)
    with pytest.raises((theirs.type, TypeError, ValueError)):
        model(wrong)


class To(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input.to("meta")


@pytest.mark.skipif(not tribp.dispatch.has_triton(), reason="needs triton")
def test_a_backend_that_is_not_asked_says_nothing() -> None:
    """No row starts on the CPU tensor, which Triton could not run."""
    moving = nn.Sequential(To(), nn.Linear(6, 6, device="meta"), nn.ReLU())
    hooked = perceptron()
    for module in (hooked[0], hooked[1][0], hooked[1][1]):  # type: ignore[index]
        module.register_forward_hook(lambda *_: None)
    for model in (moving, hooked):
        tribp.fuse(model)
        with mock.patch("tribp.dispatch.interpreting", return_value=False), tribp.use_backend("triton"):
            assert len(model(torch.ones(2, 6))) == 2


def test_each_layer_is_asked_anew() -> None:
    """What moves to a GPU within a model is computed there."""
    model, x = perceptron(), torch.randn(3, 6)
    model.insert(0, nn.Identity())
    tribp.fuse(model)
    with Rows() as found, mock.patch.object(rows, "_on_cpu", side_effect=[True, False]):
        model(x)
    assert found.run == 1


def test_a_backend_that_cannot_run_says_so() -> None:
    model = perceptron()
    tribp.fuse(model)
    with mock.patch("tribp.dispatch.interpreting", return_value=False), tribp.use_backend("triton"):
        if tribp.dispatch.has_triton():
            with pytest.raises(RuntimeError, match="asked for on a cpu tensor"):
                model(torch.ones(2, 6))
