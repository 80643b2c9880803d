"""The optimizers in a process that others set up: default devices and types, patched classes, wrappers, threads."""

import ast
import contextlib
import copy
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.utils._device import _device_constructors

import tribp
import tribp.optim
from tribp.optim import cpu_updates
from tribp.optim.adam import AdamRule

from ..processes import forked, with_torch
from .cases import (
    CLASSES,
    FUSED,
    LIVELY,
    NUMBERS,
    TORCHS,
    VARIANTS,
    Options,
    Twins,
    each_class,
    lively,
    ours,
    title,
    values,
)
from .test_torch_code import sparse_grad

# ---- default devices: "meta" stands in for "cuda" here, and any tensor on it by mistake is seen at once


def factories(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Call, bool]]:
    """The calls that make a tensor on the default device unless told otherwise; and whether within a function."""
    names = {constructor.__name__ for constructor in _device_constructors()}
    for node in ast.iter_child_nodes(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in names
        ):
            yield node, inside
        yield from factories(node, inside or isinstance(node, (ast.FunctionDef, ast.Lambda)))


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    """… and none at import, which may happen within anybody's `with torch.device(…)` or FakeTensorMode."""
    wrong, seen = [], 0
    for path in sorted(Path(tribp.__file__).parent.rglob("*.py")):
        for call, inside in factories(ast.parse(path.read_text(encoding="utf-8"))):
            seen += 1
            named = any(keyword.arg in ("device", None) for keyword in call.keywords)  # None: **options
            if not (named and inside):
                wrong.append(f"{path.name}:{call.lineno}")
    assert seen > 20
    assert wrong == []


@contextlib.contextmanager
def elsewhere(everywhere: bool) -> Iterator[None]:
    """The default device is "meta", in this block or in the whole process."""
    if not everywhere:
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("everywhere", [False, True], ids=["with", "set_default_device"])
@pytest.mark.parametrize("beyond", [{}, dict(ema_decay=0.9, max_grad_norm=1e9)], ids=["", "beyond"])
@each_class
def test_default_device(name: str, beyond: Options, everywhere: bool, device: str) -> None:
    """Made, stepped, saved and loaded while another device is the default; with late and with missing gradients."""
    twins = lively(name, device, shapes=[(5,), (3, 4), (70,)])
    for t, present in enumerate([(0, 1), (0,), (), ()]):
        twins.give(twins.grads(*present))
        twins.genuine.step()
        with elsewhere(everywhere):
            if t in (0, 3):
                before = twins.ours.state_dict() if t else None
                twins.ours = ours(name, twins.params, **(NUMBERS[name] | LIVELY[name]), **beyond)
                if before is not None:
                    twins.ours.load_state_dict(before)
            twins.ours.step()
    assert (twins.ours.grad_norm is not None) == bool(beyond)
    tensors = [t for state in twins.ours.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert {t.device.type for t in tensors} <= {"cpu", torch.device(device).type}
    for p, twin in zip(twins.params, twins.twins, strict=True):
        torch.testing.assert_close(p.cpu(), twin, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["SGD", "Momentum"])  # torch's Adagrad makes sparse tensors on the default device
def test_default_device_and_sparse_gradients(name: str, device: str) -> None:
    twins = Twins(name, [(6, 3)], device, groups=[{}])
    for rows in [(0, 2), (1,)]:
        twins.give([sparse_grad(6, *rows)], lambda g: g.clone())
        twins.genuine.step()
        with torch.device("meta"):
            twins.ours.step()
    torch.testing.assert_close(twins.params[0].cpu(), twins.twins[0], rtol=1e-12, atol=1e-13)


@each_class
def test_default_device_and_differentiable_steps(name: str) -> None:
    twins = lively(name, "cpu", differentiable=True)
    for _ in range(2):
        twins.give(twins.grads())
        twins.genuine.step()
        with torch.device("meta"):
            twins.ours.step()
        twins.check()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@each_class
def test_default_dtype(name: str, dtype: torch.dtype, fused: bool, device: str) -> None:
    """Numbers do not depend on it; the type of torch's counters does, and so does that of ours in a checkpoint."""
    torch.set_default_dtype(dtype)
    try:
        options: Options = dict(fused=True) if fused and name in FUSED else {}
        if name == "ASGD" and dtype.itemsize == 2:
            pytest.skip("torch rounds ASGD's rate to the default type before it keeps it in float32")
        twins = lively(name, device, **options)
        for _ in range(3):
            twins.step()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(os.name != "posix", reason="a process that has torch forks")
def test_imported_within() -> None:
    """A model's file that is imported late, in a block that makes tensors of another kind."""
    run = forked(
        "-c",
        f"""
        import contextlib, os, torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        @contextlib.contextmanager
        def half():
            torch.set_default_dtype(torch.float16)
            yield
            torch.set_default_dtype(torch.float32)
        for how in (torch.device("meta"), torch.inference_mode(), FakeTensorMode(), half()):
            if child := os.fork():
                assert os.waitpid(child, 0)[1] == 0, how
            else:
                break
        else:
            os._exit(0)
        with how:
            import tribp, tribp.optim
        for name in {TORCHS}:
            p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
            a, b = getattr(tribp.optim, name)([p], lr=0.1), getattr(torch.optim, name)([q], lr=0.1)
            for _ in range(3):
                p.grad, q.grad = torch.full((4,), 2.0), torch.full((4,), 2.0)
                a.step()
                b.step()
            torch.testing.assert_close(p, q)
            assert bool((p < 1).all()), name
        """,
    )
    assert run.returncode == 0, run.stderr


# ---- classes in torch's place


@pytest.fixture(params=["torch.optim", "and its modules"])
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """`torch.optim.Adam` is `tribp.optim.Adam`, and so is every class; the value is what was there."""
    genuine = {name: getattr(torch.optim, name) for name in TORCHS}
    for name, kind in genuine.items() if request.param != "torch.optim" else ():
        monkeypatch.setattr(sys.modules[kind.__module__], name, getattr(tribp.optim, name))
    with tribp.optim.patch() as replaced:
        assert set(replaced) == set(TORCHS)
        yield genuine
    assert {name: getattr(torch.optim, name) for name in TORCHS} == genuine


@pytest.mark.parametrize("name", TORCHS)
def test_a_script_whose_classes_are_patched(name: str, patched: dict[str, Any]) -> None:
    """It says torch.optim.Adam and is served; a subclass of that, copies and pickles too; torch's own class works."""
    kind = getattr(torch.optim, name)
    own = type("Own", (kind,), {})
    p, q, r = (Parameter(torch.ones(3)) for _ in range(3))
    a, b, c = kind([p], lr=0.1), patched[name]([q], lr=0.1), own([r], lr=0.1)
    assert type(a).__module__.startswith("tribp.")
    assert isinstance(a, kind)
    for _ in range(3):
        for optimizer, x in ((a, p), (b, q), (c, r)):
            x.grad = torch.tensor([1.0, -2.0, 3.0])
            optimizer.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(r, q)
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    for other in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert type(other) is kind


def test_a_patch_is_put_on_and_taken_off_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands at a name is replaced only where it is torch's class, and put back only where it is tribp's."""
    genuine, other = torch.optim.Adam, type("Adam", (torch.optim.Adam,), {})
    monkeypatch.setattr(torch.optim, "Adam", other)
    assert set(tribp.optim.patch()) == set(TORCHS) - {"Adam"}
    assert tribp.optim.patch() == ()
    with tribp.optim.patch():
        pass
    assert torch.optim.SGD is tribp.optim.SGD, "a block puts back what it has replaced"
    assert set(tribp.optim.unpatch()) == set(TORCHS) - {"Adam"}
    assert tribp.optim.unpatch() == ()
    assert torch.optim.Adam is other
    monkeypatch.setattr(torch.optim, "Adam", genuine)
    with tribp.optim.patch():
        tribp.optim.unpatch()
        assert torch.optim.Adam is genuine
    assert torch.optim.Adam is genuine


def test_momentum_in_the_place_of_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias under another name is no recursion either."""
    monkeypatch.setattr(torch.optim, "SGD", tribp.optim.Momentum)
    p = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.zeros(3))


# ---- wrappers


def wrapped(optimizer: Any) -> Any:
    """As Lightning and Fabric do it: a class made on the fly, whose instance takes over the attributes, once."""

    class Wrapper(type(optimizer)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k not in ("step", "state_dict")})
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    return Wrapper()


@each_class
@pytest.mark.parametrize("copied", [False, True], ids=["", "of a copy"])
def test_wrappers_see_what_the_optimizer_has(name: str, copied: bool, device: str) -> None:
    """Attributes that change after the wrapper was made: the norm of the gradients, the averages' being in place."""
    (p,) = params = [torch.ones(3, device=device)]
    optimizer: Any = ours(name, params, max_grad_norm=1.0, ema_decay=0.9)
    if copied:
        optimizer = pickle.loads(pickle.dumps(optimizer))
        (p,) = optimizer.param_groups[0]["params"]
    wrapper = wrapped(optimizer)
    before = wrapper.grad_norm
    assert before is None
    p.grad = torch.full_like(p, 5.0)
    wrapper.step()
    assert float(wrapper.grad_norm) == pytest.approx(75**0.5)
    assert wrapper.grad_norm is optimizer.grad_norm
    for one, other in ((wrapper, optimizer), (optimizer, wrapper)):
        with one.swap_ema():
            for forbidden in (one.step, other.step, one.state_dict, other.state_dict, other.swap_ema().__enter__):
                with pytest.raises(RuntimeError, match="swap_ema"):
                    forbidden()
    wrapper.step()
    assert tribp.optim.Adam.grad_norm is None  # of the class, there is none


# ---- copies, in this process and in others


def used(name: str, device: str) -> tuple[Any, list[Parameter]]:
    """An optimizer after two steps, of a late parameter too, and its parameters; their gradients are gone."""
    params = [Parameter(values(shape, torch.float64, 1).to(device)) for shape in ((5,), (3, 4))]
    optimizer = ours(name, params, **(NUMBERS[name] | LIVELY[name]), ema_decay=0.9)
    for t in range(2):
        step(optimizer, params[: t + 1], t)
    return optimizer, params


def step(optimizer: Any, params: list[Parameter], t: int) -> None:
    for p in params:
        p.grad = values(p.shape, p.dtype, 2 + t).to(p.device)
    optimizer.step()
    optimizer.zero_grad()


def after(optimizer: Any) -> list[Tensor]:
    """The parameters and states after two more steps, by this process."""
    params = optimizer.param_groups[0]["params"]
    for t in range(2):
        step(optimizer, params, 7 + t)
    states = [optimizer.state[p] for p in params]
    tensors = [*params, *(state[key] for state in states for key in sorted(state))]
    return [t.detach().clone() for t in tensors if isinstance(t, Tensor)]


def saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": saved,
}


@pytest.mark.parametrize("way", COPIES)
@each_class
def test_a_copy_steps_on(name: str, way: str, device: str) -> None:
    optimizer, _ = used(name, device)
    other = COPIES[way](optimizer)
    expected = after(optimizer)
    for a, b in zip(after(other), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def answer(optimizers: list[Any], requests: Any, answers: Any) -> None:
    """In a process of its own: what it was given when it started, then what comes through a queue."""
    answers.put([[t.tolist() for t in after(optimizer)] for optimizer in optimizers])
    while (optimizer := requests.get(timeout=120)) is not None:
        answers.put([t.tolist() for t in after(optimizer)])


def test_used_optimizers_sent_to_another_process(device: str) -> None:
    """Sent as an argument and through a queue, as torch's can be. What lies on the CPU is shared: expect before."""
    context = with_torch()
    requests, answers = context.Queue(), context.Queue()
    optimizers = [used(name, device)[0] for name in CLASSES]
    expected = [[t.tolist() for t in after(copy.deepcopy(optimizer))] for optimizer in optimizers]
    process = context.Process(target=answer, args=(optimizers, requests, answers), daemon=True)
    process.start()
    try:
        assert_near(answers.get(timeout=120), expected)
        for name in CLASSES:
            optimizer, _ = used(name, device)
            expected = [t.tolist() for t in after(copy.deepcopy(optimizer))]
            requests.put(optimizer)
            assert_near(answers.get(timeout=120), expected)
        requests.put(None)
        process.join(timeout=120)
        assert process.exitcode == 0
    finally:
        process.kill()


def assert_near(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b)
    else:
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-13)


def _count_elsewhere(params: Sequence[Tensor], optimizer: Any) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("way", ["inherited", "sent"])
def test_counters_in_shared_memory_stay_there(way: str) -> None:
    """Hogwild, A3C: workers share parameters and states. One after the other, so that the numbers are known."""
    found = []
    context: Any = multiprocessing.get_context("fork") if way == "inherited" else with_torch()
    for kind in (torch.optim.Adam, tribp.optim.Adam):
        params = [Parameter(torch.ones(4).share_memory_()) for _ in range(2)]
        optimizer: Any = kind(params, lr=0.1)
        for p in params:
            state = dict(step=torch.zeros(()), exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))
            optimizer.state[p].update({key: value.share_memory_() for key, value in state.items()})
        workers = 2 if way == "inherited" else 1  # which imports tribp
        for _ in range(workers):
            worker = context.Process(target=_count_elsewhere, args=(params, optimizer))
            worker.start()
            worker.join(timeout=120)
            assert worker.exitcode == 0
        _count_elsewhere(params, optimizer)
        found.append([params, [dict(optimizer.state[p]) for p in params]])
        assert float(optimizer.state[params[0]]["step"]) == workers + 1
    torch.testing.assert_close(found[1], found[0])


# ---- threads


def test_one_thread_is_a_matter_of_the_thread_that_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors take one; a thread that starts meanwhile has all of them, and so has this one afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[int] = []

    def update(*_: object) -> None:
        seen.append(torch.get_num_threads())
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        if len(seen) > 2:
            raise ZeroDivisionError

    monkeypatch.setattr(AdamRule, "fused_update", lambda *arguments: update(*arguments))
    try:
        p = torch.ones(17)
        p.grad = torch.ones(17)
        optimizer = tribp.optim.Adam([p])
        optimizer.step()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    own = 3 if cpu_updates.set_own_threads() is None else 1  # without OpenMP, all of them
    assert seen == [own, 3, own, 3]
    if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info():
        assert own == 1


# ---- tensors without memory


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_fake_tensors(variant: tuple[str, Options], fused: bool | None) -> None:
    """As torch's classes take them: for the memory that a run would need, say. Nothing fake outlives it."""
    name, own = variant
    if name == "ASGD":
        pytest.skip("torch's own reads its rate, which has no value here")
    with FakeTensorMode():
        p = Parameter(torch.ones(3, 4))
        optimizer = ours(name, [p], **(NUMBERS[name] | own), fused=fused)
        for _ in range(2):
            p.grad = torch.ones(3, 4)
            optimizer.step()
    assert isinstance(p, FakeTensor)
    twins = Twins(name, **own)
    twins.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_class
def test_meta_tensors(name: str, dtype: torch.dtype, device: str) -> None:
    """On either backend they do nothing without `fused`; with it they raise, as in torch's classes that have it."""
    if name == "ASGD":
        pytest.skip("torch's own reads its rate, which has no value here")
    p = Parameter(torch.ones(3, device="meta", dtype=dtype))
    p.grad = torch.ones_like(p)
    ours(name, [p]).step()
    theirs: Any = getattr(torch.optim, "Adam" if name not in FUSED else "SGD" if name == "Momentum" else name)
    with pytest.raises(RuntimeError) as expected:
        theirs([p], fused=True).step()
    with pytest.raises(RuntimeError) as found:
        ours(name, [p], fused=True).step()
    assert str(found.value) == str(expected.value)
