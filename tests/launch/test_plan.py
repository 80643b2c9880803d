"""Plans are made once for tensors of one layout: that a repeated plan does what a new one would have done."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp

from ..conv3x3.cases import CASES, DENSE, WAYS, Case
from ..conv3x3.cases import ieee as ieee

pytest.importorskip("triton")

import triton
import triton.language as tl

from bench.operation import find
from tribp.kernels import common
from tribp.launch import plan as plans
from tribp.launch.arch import ARCHS, INTERPRETER
from tribp.launch.autotune import perform
from tribp.launch.buffer import Buffer, Layout, Memory, dense_strides, layout_of
from tribp.launch.launches import CachedLaunch, Launch
from tribp.launch.layout import matrix
from tribp.launch.plan import Plan
from tribp.ops.activations import Activation
from tribp.ops.linear import plan as linear_plan

from ..processes import forked

Make = Callable[[str], list[Tensor | None]]
Compute = Callable[..., list[Tensor]]


@pytest.fixture
def built(kernels: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been launched by plans that were made, and not repeated."""
    found: list[str] = []
    run = Launch.run

    def record(launch: Launch) -> object:
        found.append(launch.kernel.__name__)
        return run(launch)

    monkeypatch.setattr(Launch, "run", record)
    return found


def linear(*tensors: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of all that require one."""
    x, w, b = tensors
    assert x is not None
    assert w is not None
    return with_gradients(tribp.linear_sigmoid(x, w, b), tensors)


def with_gradients(y: Tensor, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    grad = torch.empty_like(y, requires_grad=False)  # in y's memory format
    grad.copy_(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    return [y.detach(), *(torch.autograd.grad(y, wanted, grad) if wanted else ())]


def matrices(k: int, dtype: torch.dtype = torch.float32, bias: bool = True, frozen: str = "", turned: str = "") -> Make:
    def make(device: str) -> list[Tensor | None]:
        sizes = dict(x=(40, k), w=(9, k), b=(9,))
        found: dict[str, Tensor | None] = {}
        for name, size in sizes.items():
            value = torch.randn(size, dtype=dtype, device=device)
            value = value.t().contiguous().t() if name in turned else value
            found[name] = value.requires_grad_(name not in frozen)
        return [found["x"], found["w"], found["b"] if bias else None]

    return make


LINEAR: dict[str, Make] = {
    "descriptors": matrices(16),
    "odd": matrices(17, torch.bfloat16),
    "frozen input": matrices(33, frozen="x"),
    "frozen weight": matrices(16, frozen="wb", bias=False),
    "bias alone": matrices(16, frozen="xw"),
    "nothing asked": matrices(16, frozen="xwb"),
    "transposed": matrices(20, torch.float16, turned="xw"),
}


def check_repeats(compute: Compute, make: Make, device: str, built: list[str]) -> None:
    """The second call repeats the first on other numbers; the third is worked out anew, on those of the second."""
    compute(*make(device))
    assert built, "the first call launched nothing"
    others = make(device)
    built.clear()
    repeated = compute(*others)
    assert not built, "the second call was not repeated"
    plans.forget()
    expected = compute(*others)
    assert built
    for got, wanted in zip(repeated, expected, strict=True):
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()


@pytest.mark.parametrize("name", LINEAR)
def test_linear_calls_repeat(name: str, kernels: str, built: list[str]) -> None:
    check_repeats(linear, LINEAR[name], kernels, built)


def images(case: Case, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Make:
    def make(device: str) -> list[Tensor | None]:
        x, w, b = case.make(dtype, device)
        return [layout(x).requires_grad_(), layout(w).requires_grad_(), None if b is None else b.requires_grad_()]

    return make


ODD = Case((2, 11, 3, 4), 9, padding=(1, 1))  # x, w and dz go through scratch with padding, some of it zeros
CONVOLUTIONS = [*WAYS.items(), ("odd", ODD), *(pytest.param(*item, marks=pytest.mark.slow) for item in CASES.items())]


@pytest.mark.parametrize("layout", DENSE[:2], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("name", "case"), CONVOLUTIONS)
def test_convolutions_repeat(
    name: str, case: Case, layout: Callable[[Tensor], Tensor], kernels: str, built: list[str]
) -> None:

    def compute(*tensors: Tensor | None) -> list[Tensor]:
        x, w, b = tensors
        assert x is not None
        assert w is not None
        return with_gradients(case.ours(x, w, b), tensors)

    check_repeats(compute, images(case, layout, torch.float32), kernels, built)


# -- what is another call ---------------------------------------------------------------------------------------------


def other_shape(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x[:39], w


def other_stride(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x, x], 1)[:, :16], w


def other_address(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x), w


def other_type(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.half(), w.half()


@pytest.mark.parametrize("change", [other_shape, other_stride, other_address, other_type])
def test_tensors_that_lie_otherwise_are_another_call(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], kernels: str, built: list[str]
) -> None:
    x, w = torch.randn(40, 16, device=kernels), torch.randn(9, 16, device=kernels)
    tribp.linear_sigmoid(x, w)
    built.clear()
    x, w = change(x, w)
    y = tribp.linear_sigmoid(x, w)
    assert built == ["forward"]
    tolerance = 1e-3 if x.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(y, torch.sigmoid(x.float() @ w.float().t()).to(y.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("ieee")
def test_other_facts_are_another_call(kernels: str, built: list[str]) -> None:
    x, w = (t.to(kernels) for t in (torch.randn(1, 8, 5, 4), torch.randn(4, 8, 3, 3)))
    ways: list[dict[str, Any]] = [{}, {"padding": 1}, {"padding": 1, "stride": 2}, {"activation": "sigmoid"}]
    for options in ways:
        built.clear()
        y = tribp.conv3x3(x, w, **options)
        assert built[-1] == "forward"
        sigmoid = options.pop("activation", None)
        expected = torch.nn.functional.conv2d(x, w, **options)
        torch.testing.assert_close(y, torch.sigmoid(expected) if sigmoid else expected, rtol=1e-3, atol=1e-3)


def test_a_bias_or_none_are_two_calls(kernels: str) -> None:
    x, w = torch.rand(40, 16, device=kernels), torch.rand(9, 16, device=kernels) / 16  # no output is 1
    without = tribp.linear_sigmoid(x, w)
    with_bias = tribp.linear_sigmoid(x, w, torch.full((9,), 3.0, device=kernels))
    assert (with_bias > without).all()
    assert torch.equal(tribp.linear_sigmoid(x, w), without)


def test_other_configs_are_another_plan(kernels: str, built: list[str]) -> None:
    """A tuned config takes the heuristic's place once the plans are made anew."""
    x, w = torch.randn(40, 64, device=kernels), torch.randn(16, 64, device=kernels)
    expected = tribp.linear_sigmoid(x, w)
    layouts = [layout_of(t) for t in (x, w, None)]
    ((problem, config),) = plans.planned(
        linear_plan.forward, *layouts, activation=Activation("sigmoid"), tf32=False
    ).configs.items()
    with plans.using({problem: replace(config, block_j=16)}):
        built.clear()
        torch.testing.assert_close(tribp.linear_sigmoid(x, w), expected)
        assert built == ["forward"]
        plan = plans.planned(linear_plan.forward, *layouts, activation=Activation("sigmoid"), tf32=False)
        assert [launch.named["BLOCK_N"] for launch in plan.launches] == [16]


# -- what is repeated with care


def test_a_copy_that_torch_made_is_made_again(kernels: str, built: list[str]) -> None:
    """Rows and columns both apart: torch copies; a repeated call must not multiply by the first call's numbers."""
    w = torch.randn(9, 16, device=kernels)
    for _ in range(3):
        x = torch.randn(40, 32, device=kernels)[:, ::2]
        torch.testing.assert_close(tribp.linear_sigmoid(x, w), torch.sigmoid(x @ w.t()))
    assert built == ["forward"]


def test_a_view_is_copied_as_the_view_it_is() -> None:
    """dx in TF32 wants the input channels first, of a weight that may have to be copied."""
    src = torch.randn(6, 4, 3, 6)[..., ::2]
    out = torch.empty(4, 6, 3, 3)

    def build(plan: Plan, src: Buffer, out: Buffer) -> None:
        plan.add(Launch(Copy, (1,), (plan.contiguous(src.transpose(0, 1)), out.transpose(0, 1)), {}, 1))

    for _ in range(2):
        perform(build, (src, out))
        assert torch.equal(out, src.transpose(0, 1))
        src = torch.randn(6, 4, 3, 6)[..., ::2]


def test_an_expanded_bias_is_copied_again(kernels: str) -> None:
    x, w = torch.randn(40, 16, device=kernels), torch.randn(9, 16, device=kernels)
    for value in (0.5, -2.0):
        bias = torch.tensor([value], device=kernels)
        torch.testing.assert_close(tribp.linear_sigmoid(x, w, bias), torch.sigmoid(x @ w.t() + value))


def test_one_tensor_in_two_places(kernels: str, built: list[str]) -> None:
    """Another call has two tensors there: a launch means a place, not a tensor."""
    same = torch.randn(16, 16, device=kernels)
    torch.testing.assert_close(tribp.linear_sigmoid(same, same), torch.sigmoid(same @ same.t()))
    x, w = torch.randn(16, 16, device=kernels), torch.randn(16, 16, device=kernels)
    torch.testing.assert_close(tribp.linear_sigmoid(x, w), torch.sigmoid(x @ w.t()))
    assert built == ["forward"]


def test_a_launch_that_fails_leaves_nothing_behind(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(40, 16, device=kernels), torch.randn(9, 16, device=kernels)

    def fail(launch: Launch) -> None:
        raise RuntimeError("out of resources")

    with monkeypatch.context() as patched:
        patched.setattr(Launch, "run", fail)
        with pytest.raises(RuntimeError, match="out of resources"):
            tribp.linear_sigmoid(x, w)
    torch.testing.assert_close(tribp.linear_sigmoid(x, w), torch.sigmoid(x @ w.t()))


def test_what_is_refused_is_refused_each_time(kernels: str) -> None:
    """Layouts are checked where a plan is made, which must not be remembered."""
    x, w, b = (torch.randn(size, device=kernels) for size in ((4, 16), (8, 16), (8,)))
    images, filters = torch.randn(2, 8, 5, 5, device=kernels), torch.randn(8, 8, 3, 3, device=kernels)
    wrong: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: tribp.linear_sigmoid(x, w[:, :8], b), ValueError, "linear_sigmoid: weight must have shape"),
        (lambda: tribp.linear(x, w, b[:7]), ValueError, "linear: bias must have shape"),
        (lambda: tribp.linear(x, w.half(), b), TypeError, "linear: weight must have input's dtype"),
        (lambda: tribp.linear(x, w.to("meta"), b), ValueError, "linear: weight must be on input's device"),
        (lambda: tribp.mlp(x, [w, w], [b, b]), ValueError, "mlp, layer 1: weight must have shape"),
        (lambda: tribp.mlp(x, [w, None]), TypeError, r"mlp: weights\[1\] must be a tensor"),  # type: ignore[list-item]
        (lambda: tribp.conv3x3(images, filters[:, :4]), ValueError, "conv3x3: weight must have shape"),
        (
            lambda: torch.ops.tribp.conv3x3(images[0], filters, None, [1, 1], [0, 0], 1),
            ValueError,
            "conv3x3: input must",
        ),
        (lambda: tribp.conv3x3(images[..., :2], filters), ValueError, "conv3x3: input must have"),
        (lambda: tribp.conv3x3(images, filters, stride=(True, 1)), TypeError, "conv3x3: stride must be"),
    ]
    for call, error, says in wrong * 2:
        with pytest.raises(error, match=says):
            call()
        assert tribp.linear_sigmoid(x, w, b).shape == (4, 8)
        assert tribp.conv3x3(images, filters, stride=1).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_what_hooks_and_kernels_raise_is_not_tried_again(
    requires_grad: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a plan refuses is checked for a better sentence: a hook of the caller's must not run twice."""
    x, w = torch.randn(4, 16, device=kernels), torch.randn(8, 16, device=kernels, requires_grad=requires_grad)
    called: list[object] = []

    def fail(*arguments: object) -> Any:
        called.append(arguments)
        raise RuntimeError("mine")

    if not requires_grad:
        monkeypatch.setattr(Launch, "run", fail)
    calls = (lambda: tribp.linear(x, w), lambda: tribp.linear_sigmoid(x, w), lambda: tribp.mlp(x, [w]))
    for call in calls:
        called.clear()
        with torch.autograd.graph.saved_tensors_hooks(fail, fail), pytest.raises(RuntimeError, match="mine"):
            call()
        assert len(called) == 1


# -- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_keeps_a_call_s_tensors(kernels: str) -> None:
    for _ in range(2):
        x, w = torch.randn(40, 16, device=kernels), torch.randn(9, 16, device=kernels)
        y = tribp.linear_sigmoid(x, w)
        seen = [weakref.ref(t) for t in (x, w, y)]
        del x, w, y
        assert [reference() for reference in seen] == [None, None, None]


def test_scratch_lives_no_longer_than_its_launches(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a new call takes and frees it; the peak of two at a time is that of a new call."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    allocate = Memory.allocate

    def count(scratch: Memory) -> Tensor:
        nonlocal most
        tensor = allocate(scratch)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(Memory, "allocate", count)

    def build(plan: Plan, a: Buffer, b: Buffer) -> None:
        for source, target in ((a, b), (b, a)):
            middle = plan.scratch((4,), torch.float32)
            plan.add(Launch(Copy, (1,), (source, middle), {}, 1))
            plan.add(Launch(Copy, (1,), (middle, target), {}, 1))

    for _ in range(3):
        a, b = torch.ones(4), torch.zeros(4)
        perform(build, (a, b))
        assert torch.equal(b, torch.ones(4))
    assert len(alive) == 6
    assert most == 1


class _Copy:
    """A kernel that is none."""

    __name__ = "copy"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda source, target, **options: target.copy_(source.view(target.shape))


Copy: Any = _Copy()


def test_zeros_are_zero_again() -> None:
    def build(plan: Plan, a: Buffer) -> None:
        padded = plan.scratch((4,), torch.float32, zero=True)
        plan.add(Launch(Copy, (1,), (padded, a), {}, 1))

    for _ in range(3):
        a = torch.ones(4)
        perform(build, (a,))
        assert torch.equal(a, torch.zeros(4))


def test_no_more_plans_are_kept_than_that(kernels: str, monkeypatch: pytest.MonkeyPatch, built: list[str]) -> None:
    monkeypatch.setattr(plans, "planned", lru_cache(maxsize=2)(plans.planned.__wrapped__))
    w = torch.randn(9, 16, device=kernels)

    def call(rows: int) -> bool:
        built.clear()
        tribp.linear_sigmoid(torch.randn(rows, 16, device=kernels), w)
        return not built

    assert [call(rows) for rows in (3, 4, 3, 5, 3, 4)] == [False, False, True, False, True, False]


def test_threads_share_a_plan() -> None:
    """Backward passes run in threads of their own; scratch of one run must not be taken for another's."""
    together = threading.Barrier(2, timeout=60)

    class Slow:
        __name__ = "slow"

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def copy(source: Tensor, target: Tensor, **options: object) -> None:
                together.wait()
                target.copy_(source)
                together.wait()

            return copy

    slow: Any = Slow()

    def build(plan: Plan, a: Buffer, b: Buffer) -> None:
        middle = plan.scratch((4,), torch.float32)
        plan.add(Launch(slow, (1,), (a, middle), {}, 1))
        plan.add(Launch(slow, (1,), (middle, b), {}, 1))

    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        for value in (number, 10 * number):
            a, b = torch.full((4,), float(value)), torch.zeros(4)
            perform(build, (a, b))
            found[value] = b

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {value: float(b[0]) for value, b in found.items()} == {1: 1, 2: 2, 10: 10, 20: 20}


# -- buffers ----------------------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Tensor] = {
    "contiguous": torch.empty(2, 3, 4, 5),
    "channels last": torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "both": torch.empty(2, 1, 4, 5),
    "one pixel": torch.empty(2, 3, 1, 1),
    "neither": torch.empty(2, 3, 4, 10)[..., ::2],
    "odd stride of one": torch.empty(2, 3, 4, 5)[:, :1],
    "exchanged": torch.empty(3, 2, 4, 5).transpose(0, 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_buffer_answers_as_its_tensor(name: str) -> None:
    tensor = LAYOUTS[name]
    (buffer,) = Plan(INTERPRETER, [layout_of(tensor)]).given
    assert buffer is not None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert buffer.is_contiguous(memory_format) == tensor.is_contiguous(memory_format=memory_format)
        dense = torch.empty(tensor.shape, memory_format=memory_format)
        assert dense_strides(tensor.shape, memory_format) == dense.stride()
    other = tensor.transpose(0, 1)
    assert (buffer.transpose(0, 1).shape, buffer.transpose(0, 1).stride()) == (other.shape, other.stride())
    assert (buffer.numel(), buffer.element_size(), buffer.dtype) == (tensor.numel(), 4, torch.float32)
    assert [buffer.stride(d) for d in range(4)] == list(tensor.stride())
    assert buffer.data_ptr() % 16 == tensor.data_ptr() % 16


ROWS: dict[str, Tensor] = {
    "vector": torch.empty(8),
    "strided vector": torch.empty(16)[::2],
    "matrix": torch.empty(3, 8),
    "contiguous": torch.empty(2, 3, 8),
    "columns first": torch.empty(2, 8, 3).transpose(1, 2),
    "rows apart": torch.empty(2, 3, 10)[..., :8],
    "blocks apart": torch.empty(2, 4, 8)[:, :3],
    "exchanged": torch.empty(3, 2, 8).transpose(0, 1),
    "expanded": torch.empty(8).expand(2, 3, 8),
    "expanded blocks": torch.empty(3, 8).expand(2, 3, 8),
    "odd stride of one": torch.empty(2, 4, 8)[:, :1],
    "ones": torch.empty(4, 6, 8)[:1, :1],
    "four": torch.empty(2, 3, 4, 10)[..., :5],
    "four, the middle apart": torch.empty(2, 6, 4, 5)[:, ::2],
}


@pytest.mark.parametrize("name", ROWS)
def test_leading_dimensions_are_one_where_torch_has_a_view(name: str) -> None:
    tensor = ROWS[name]
    expected = tensor.reshape(-1, tensor.shape[-1])
    plan = Plan(INTERPRETER, [layout_of(tensor)])
    (given,) = plan.given
    assert given is not None
    found = matrix(plan, given)
    assert found.shape == expected.shape
    is_view = expected.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert (found.number == given.number) == is_view == (not plan.steps)
    for d in (0, 1):
        assert expected.shape[d] == 1 or found.stride(d) == expected.stride(d)


# -- compiled kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_repeated_calls_hand_the_driver_what_triton_would(target: str) -> None:
    """Compiled, with a driver that performs nothing: kernel, grid and arguments are those of a new call."""
    done = forked("-m", "tests.launch.repeated_calls", target)
    assert done.returncode == 0, done.stderr
    assert "compared" in done.stdout


@pytest.mark.parametrize("target", ARCHS)
def test_launches_begin_early_where_their_kernels_wait(target: str) -> None:
    """All of ours do. One that would not, and began before what it reads is written, must begin after it."""
    arch = ARCHS[target]
    for operation in find():
        for direction in operation.directions:
            for launch in operation.launches(operation.cases[0], direction, arch):
                assert launch.early == (target in ("sm_90", "sm_100")), launch.kernel.__name__
                assert ("launch_pdl" in launch.options) == launch.early

    @triton.jit
    def hasty(x) -> None:  # type: ignore[no-untyped-def]
        tl.store(x, 1.0)

    assert not Launch(hasty, (1,), (), {}, 1).for_arch(arch).early


@pytest.mark.gpu
def test_a_graph_repeats_a_repeated_call() -> None:
    x, w, b = torch.randn(64, 128, device="cuda"), torch.randn(32, 128, device="cuda"), torch.randn(32, device="cuda")
    w.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        y = tribp.linear_sigmoid(x, w, b)
        (dw,) = torch.autograd.grad(y, [w], y.detach())
        return y.detach(), dw

    stream: Any = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    plans.forget()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_tuples_of_any_length_are_filled(length: int) -> None:
    """Each place of an argument that is a tuple: memory, numbers, None."""
    buffers = [Buffer(n, Layout((2,), (1,), torch.float32, 0, torch.device("cpu"))) for n in range(3)]
    many = (*buffers[:length], 5, None)[: length + (length > 1) * 2]
    launch = Launch(common.reduce_partials, (1,), (buffers[2], many, 7, ()), {}, 4)
    memory = [torch.full((2,), float(n)) for n in range(3)]
    found = CachedLaunch(launch).on(memory).arguments
    assert found == (memory[2], (*memory[:length], 5, None)[: len(many)], 7, ())
