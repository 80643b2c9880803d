"""`TRIBP_AUTOTUNE=1` without a GPU: calls run by the interpreter, and a timer that reads the launches' configs."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from tribp import dispatch
from tribp.launch import autotune
from tribp.launch import plan as plans
from tribp.launch.arch import ARCHS, INTERPRETER
from tribp.launch.autotune import FILE, GAIN, Tuner, agrees, decode, load, search, store
from tribp.launch.buffer import Buffer
from tribp.launch.configs import basis
from tribp.launch.launches import CachedLaunch, Launch
from tribp.launch.matmul import MatmulConfig
from tribp.launch.plan import Plan
from tribp.launch.reduce_config import ReduceProblem
from tribp.ops.activations import Activation
from tribp.ops.linear import plan as linear_plan
from tribp.ops.linear.config import ForwardProblem

from ..oracle import LinearSigmoid, assert_close
from ..processes import forked
from .config_cases import problems

GPU = "Some GPU 80GB"
PROBLEM = ForwardProblem(20, 16, 64, "float32", "ieee", INTERPRETER, 4, True)


class Machine:
    """Runs launches, and times them by their configs: `cost` of each, and what a test does to one before it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cost: Callable[[Mapping[str, Any]], float] = lambda named: 1000.0 / named["BLOCK_K"]
        self.spoil: Callable[[Launch], bool] = lambda launch: False  # whether not to run it
        self.timed: list[list[Mapping[str, Any]]] = []
        self._running: list[Mapping[str, Any]] = []
        run = CachedLaunch.__call__

        def watched(repeated: CachedLaunch, memory: Any) -> None:
            launch = repeated.on(memory)
            self._running.append(launch.settings)
            if not self.spoil(launch):
                run(repeated, memory)

        monkeypatch.setattr(CachedLaunch, "__call__", watched)

    def __call__(self, action: Callable[[], object]) -> float:
        self._running = []
        action()
        self.timed.append(self._running[:])
        return sum(map(self.cost, self.timed[-1]))

    @property
    def last(self) -> Mapping[str, Any]:
        return self._running[-1]

    def tuner(self, **more: Any) -> Tuner:
        fixed: dict[str, Any] = dict(
            timer=self, on_gpu=lambda device: True, busy=lambda: False, gpu=lambda: GPU
        )  # fmt: skip
        return Tuner(**fixed | more)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Triton's cache, empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def machine(interpreter: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Autotuning is on, with a cache of its own."""
    found = Machine(monkeypatch)
    monkeypatch.setattr(autotune, "tuner", found.tuner())
    yield found
    plans.tuned.clear()
    plans.forget()


def restart(machine: Machine, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """As in another process."""
    plans.tuned.clear()
    plans.forget()
    machine.timed.clear()
    monkeypatch.setattr(autotune, "tuner", machine.tuner(**more))


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(20, 64), torch.randn(16, 64) / 8


def forward() -> Tensor:
    x, w = inputs()
    y = tribp.linear_sigmoid(x, w)
    assert_close(y, LinearSigmoid(x, w, None).y)
    return y


def config() -> MatmulConfig:
    return plans.config_for(PROBLEM)


def cached(folder: Path) -> Path:
    (file,) = folder.rglob(FILE)
    return file


def test_the_fastest_is_found_and_used_from_the_same_call_on(machine: Machine) -> None:
    chosen = config()
    forward()
    assert config().block_l == 64 == 2 * chosen.block_l
    assert basis(config(), INTERPRETER) == "measured"
    assert "15.6 µs, the heuristic's choice 31.2 µs" in config().reason
    assert machine.last["BLOCK_K"] == 64, "the call itself is made with what was found"
    searched = len(machine.timed)
    assert searched > 4
    forward()
    assert len(machine.timed) == searched, "a second call is not searched"


def test_backward_is_searched_until_no_problem_is_new(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where descriptors would form dz on load, a pass of its own is made the faster way: it has problems of its own.

    Of what is stored, too.
    """
    machine.cost = lambda named: 5.0 if named.get("FUSE_DZ") else 1.0 + named.get("BLOCK", 0) / 4096
    x, w, dy = torch.randn(33, 16).requires_grad_(), torch.randn(24, 16).requires_grad_(), torch.randn(33, 24)
    y = tribp.linear_sigmoid(x, w)
    found = torch.autograd.grad(y, [x, w], dy)
    for grad, exact in zip(found, LinearSigmoid(x, w, None).gradients(dy, y), strict=False):
        assert_close(grad, exact)
    kinds = {type(problem).__name__ for problem in plans.tuned}
    assert kinds == {"ForwardProblem", "WgradProblem", "DgradProblem", "OutputGradProblem"}
    assert not any(getattr(config, "fuse_dz", False) for config in plans.tuned.values())
    assert [p.may_fuse for p in plans.tuned if type(p).__name__ == "DgradProblem"] == [False]
    tuned = dict(plans.tuned)
    restart(machine, monkeypatch, busy=lambda: True)
    torch.autograd.grad(tribp.linear_sigmoid(x, w), [x, w], dy)
    assert plans.tuned == tuned


def test_what_was_found_is_read_by_another_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    y = forward()
    found = config()
    assert json.loads(cached(cache).read_text())["block_l"] == 64
    restart(machine, monkeypatch)
    assert config() != found
    assert torch.equal(forward(), y)
    assert config() == found
    assert not machine.timed
    code = (
        "import torch, tribp\n"
        "from tribp.launch import autotune, plan\n"
        "assert autotune.tuner is not None\n"
        f"autotune.tuner = autotune.Tuner(on_gpu=lambda device: True, busy=lambda: True, gpu=lambda: {GPU!r})\n"
        "with tribp.use_backend('triton'):\n"
        "    tribp.linear_sigmoid(torch.randn(20, 64), torch.randn(16, 64))\n"
        "print(*[config.block_l for config in plan.tuned.values()])"
    )
    done = forked("-c", code, TRIBP_AUTOTUNE="1", TRITON_INTERPRET="1")
    assert done.stdout.split() == ["64"], done.stderr


def test_what_was_searched_in_vain_is_not_searched_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cost = lambda named: 10.0
    chosen = config()
    forward()
    assert replace(config(), reason=chosen.reason) == chosen
    assert "nothing beside it is faster" in config().reason
    restart(machine, monkeypatch)
    forward()
    assert not machine.timed


@pytest.mark.parametrize("what", ["torch", "triton", "sources", "gpu"])
def test_other_conditions_are_searched_anew(
    what: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    forward()
    if what == "gpu":
        restart(machine, monkeypatch, gpu=lambda: "Another GPU")
    else:
        if what == "sources":
            monkeypatch.setattr(autotune, "sources", lambda: "others")
        else:
            monkeypatch.setattr(getattr(autotune, what), "__version__", "0.1")
        restart(machine, monkeypatch)
    forward()
    assert machine.timed, "searched anew"
    assert len(list(cache.rglob(FILE))) == 2


def test_sources_are_those_of_kernels_heuristics_and_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_bytes = Path.read_bytes

    def recorded(path: Path) -> bytes:
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    autotune.sources.cache_clear()
    autotune.sources()
    assert {
        "linear.py",
        "matmul.py",
        "tiles.py",
        "config.py",
        "common.py",
        "layout.py",
        "plan.py",
        "versions.py",
    } <= set(read)


# -- what is stored


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no JSON": lambda fields: "{",
    "a list": lambda fields: [],
    "no field": lambda fields: {name: value for name, value in fields.items() if name != "block_i"},
    "another field": lambda fields: fields | {"unknown": 1},
    "a text": lambda fields: fields | {"block_i": "wide"},
    "illegal": lambda fields: fields | {"block_i": 8},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_broken_file_leaves_the_call_to_a_search(
    change: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    forward()
    content = CHANGES[change](json.loads(cached(cache).read_text()))
    cached(cache).write_text(content if isinstance(content, str) else json.dumps(content))
    restart(machine, monkeypatch)
    caplog.clear()
    forward()
    forward()
    assert config().block_l == 64
    told = [("ignored" in record.message) for record in caplog.records]
    assert told == [True, False, False], "and the search's two sentences"
    restart(machine, monkeypatch)
    forward()
    assert not machine.timed, "the broken file was replaced"


def test_what_cannot_be_written_costs_a_warning(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError("no space left")

    from triton.runtime.cache import FileCacheManager

    monkeypatch.setattr(FileCacheManager, "put", full)
    forward()
    assert config().block_l == 64
    assert len([record for record in caplog.records if "cannot be kept" in record.message]) == 1


@pytest.mark.parametrize("name", [*ARCHS, "interpreter"])
def test_every_config_survives_the_cache(name: str, cache: Path) -> None:
    seen: set[type] = set()
    for problem in problems({**ARCHS, "interpreter": INTERPRETER}[name]):
        chosen = problem.choose()
        assert decode(json.loads(json.dumps(asdict(chosen))), problem) == chosen
        if type(problem) not in seen:
            seen.add(type(problem))
            assert load(problem, GPU) is None
            store(problem, chosen, GPU)
            assert load(problem, GPU) == chosen


@pytest.mark.parametrize("change", [{"block": -1}, {"block": {}}, {"unknown": 1}, {"num_warps": ...}], ids=str)
def test_what_is_no_config_is_refused(change: dict[str, Any]) -> None:
    problem = ReduceProblem(5, 5, ARCHS["sm_90"])
    fields = {**asdict(problem.choose()), **change}
    with pytest.raises((TypeError, ValueError), match=r"not legal|not supported|unexpected|missing"):
        decode({name: value for name, value in fields.items() if value is not ...}, problem)


# -- configs that must not be kept


def wrong_row(launch: Launch) -> bool:
    launch.kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)
    launch.arguments[3].base[-1] += 0.1  # type: ignore[attr-defined]
    return True


def raises(launch: Launch) -> bool:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("spoil", [wrong_row, lambda launch: True, raises], ids=["wrong", "nothing written", "fails"])
def test_a_config_that_computes_something_else_is_not_kept(spoil: Callable[[Launch], bool], machine: Machine) -> None:
    machine.spoil = lambda launch: launch.named["BLOCK_K"] == 64 and spoil(launch)
    forward()
    assert machine.timed
    assert all(named["BLOCK_K"] != 64 for call in machine.timed for named in call), "it is not even timed"
    assert config().block_l == 32


def made_up(plan: Plan, given: Buffer, matrix: Buffer, out: Buffer, *, declared: bool) -> None:
    """An operation whose tensors have names of its own."""
    linear_plan.forward_layer(plan, given, matrix, None, out, activation=Activation("sigmoid"), tf32=False)
    if declared:
        plan.returns(out)


def perform_made_up(declared: bool) -> Tensor:
    given, matrix = inputs()
    out = torch.full((20, 16), torch.nan)
    autotune.perform(made_up, (given, matrix, out), declared=declared)
    return out


def sevens(launch: Launch) -> bool:
    launch.arguments[3].base.fill_(7)  # type: ignore[attr-defined]
    return True


@pytest.mark.parametrize("declared", [True, False])
def test_an_operation_declares_what_it_writes(declared: bool, machine: Machine, cache: Path) -> None:
    """Of a call that declares nothing nobody could see that another config computes something else."""
    machine.spoil = lambda launch: launch.named["BLOCK_K"] == 64 and sevens(launch)
    assert_close(perform_made_up(declared), LinearSigmoid(*inputs(), None).y)
    assert bool(machine.timed) == declared
    assert config().block_l == 32
    assert len(list(cache.rglob(FILE))) == declared


def test_a_heuristic_that_fails_is_told_of_and_not_stored(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.cost = lambda named: 1 / 0
    forward()
    assert any("the search for configs ended" in record.message for record in caplog.records)
    assert not plans.tuned
    searched = len(machine.timed)
    forward()
    assert len(machine.timed) == searched, "not again and again"


def test_one_wrong_row_of_many_is_seen() -> None:
    exact = torch.rand(65536, 16).to(torch.bfloat16)
    assert agrees(exact.clone(), exact)
    assert agrees((exact.float() * (1 + torch.randn(65536, 16) * 0.002)).to(torch.bfloat16), exact)
    wrong = exact.clone()
    wrong[-1] = 0
    assert not agrees(wrong, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_agreement_is_that_of_rounding(dtype: torch.dtype) -> None:
    exact = torch.randn(300, 20, dtype=torch.float64)
    rounded = exact.to(dtype)
    eps = torch.finfo(dtype).eps
    assert agrees((exact * (1 + eps * (torch.rand(300, 20) - 0.5))).to(dtype), rounded)
    assert not agrees((exact * (1 + 400 * eps)).to(dtype), rounded)


def test_infinities_and_nan_must_be_where_they_were() -> None:
    exact = torch.tensor([1.0, torch.inf, torch.nan, 2.0])
    assert agrees(exact.clone(), exact)
    assert not agrees(torch.tensor([torch.nan, torch.inf, torch.nan, 2.0]), exact)
    assert not agrees(torch.tensor([1.0, 1.0, torch.nan, 2.0]), exact)


# -- when there is no search


def test_off_by_default(kernels: str) -> None:
    assert autotune.tuner is None


def test_on_the_cpu_nothing_happens(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    monkeypatch.setattr(autotune, "tuner", Tuner(timer=machine))
    forward()
    assert not machine.timed
    assert not list(cache.rglob(FILE))
    assert not caplog.records


def test_only_on_a_gpu_and_not_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner()
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert tuner.on_gpu(torch.device("cuda", 0))
    assert not tuner.on_gpu(torch.device("cpu"))
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert not tuner.on_gpu(torch.device("cuda", 0))


@pytest.mark.parametrize("who", ["capture", "compiler"])
def test_no_search_in_a_graphs_capture_but_what_is_stored_holds(
    who: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "is_current_stream_capturing", lambda: who == "capture")
    monkeypatch.setattr(autotune, "is_compiling", lambda: who == "compiler")
    busy = Tuner()._busy
    restart(machine, monkeypatch, busy=busy)
    forward()
    assert not machine.timed
    assert config().block_l == 32
    monkeypatch.setattr(autotune, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "is_compiling", lambda: False)
    forward()
    assert machine.timed, "what was met in a capture is searched outside"
    monkeypatch.setattr(autotune, "is_current_stream_capturing", lambda: True)
    restart(machine, monkeypatch, busy=busy)
    forward()
    assert not machine.timed
    assert config().block_l == 64


@pytest.mark.parametrize(("value", "on"), [("", False), ("0", False), ("1", True)])
def test_the_variable_is_0_or_1(value: str, on: bool) -> None:
    assert autotune.is_switched_on(value) == on
    with pytest.raises(ValueError, match="TRIBP_AUTOTUNE must be 0 or 1, got 'yes'"):
        autotune.is_switched_on("yes")


# -- how a search goes


def test_two_searches_take_the_same_steps(machine: Machine, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    forward()
    first = list(machine.timed)
    cached(cache).unlink()
    restart(machine, monkeypatch)
    forward()
    assert machine.timed == first


def test_a_search_has_an_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes a quarter of what a search may take."""
    now = iter(range(10**6))
    restart(machine, monkeypatch, clock=lambda: next(now) * autotune.LIMIT / 4)
    forward()
    assert len({json.dumps(call, default=str) for call in machine.timed}) <= 4


def test_a_search_says_what_it_does(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tribp.autotune"):
        forward()
    said, kept = [record.message for record in caplog.records]
    assert "TRIBP_AUTOTUNE" in said
    assert "ForwardProblem" in said
    assert kept.startswith("tribp: ForwardProblem: measured on")


def test_a_call_that_is_refused_is_not_searched(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    x, w = inputs()
    with caplog.at_level(logging.WARNING, "tribp.autotune"), pytest.raises(TypeError, match="linear_sigmoid: weight"):
        tribp.linear_sigmoid(x, w.double())
    assert not caplog.records


def test_another_layout_is_another_search(machine: Machine) -> None:
    forward()
    searched = len(machine.timed)
    x, w = inputs()
    wide = torch.randn(20, 66)[:, :64].copy_(x)
    tribp.linear_sigmoid(wide, w)
    assert len(machine.timed) > searched
    assert len(plans.tuned) == 2


def test_the_call_is_made_after_the_search(machine: Machine) -> None:
    """The search leaves what a call writes to the call: NaN if nobody wrote it."""
    assert_close(perform_made_up(True), LinearSigmoid(*inputs(), None).y)
    assert machine.timed


def walk(times: Mapping[int, float], **more: Any) -> Any:
    """From 8, by steps of one."""
    return search(8, lambda n: [n - 1, n + 1], lambda n, _: times.get(n), **more)


def test_the_search_goes_on_from_the_fastest_neighbor() -> None:
    found = walk({8: 10.0, 7: 11.0, 9: 9.0, 10: 8.0, 11: 7.0, 12: 7.5})
    assert (found.config, found.time, found.first_time) == (11, 7.0, 10.0)


def test_less_than_the_gain_is_chance() -> None:
    assert walk({8: 10.0, 9: 10.0 * (1 - GAIN / 2)}).config == 8
    assert walk({8: 10.0, 9: 10.0 * (1 - 2 * GAIN)}).config == 9
    assert walk({8: 10.0, 9: 10.0 * (1 - GAIN / 2), 10: 1.0}).config == 8, "and is not gone on from"


def test_what_was_fast_once_is_measured_again() -> None:
    found = search(8, lambda n: [9], lambda n, repetition: 5.0 if n == 9 and repetition == 0 else 10.0)
    assert found is not None
    assert (found.config, found.time) == (8, 10.0)


def test_what_fails_the_second_time_is_not_kept() -> None:
    found = search(8, lambda n: [9], lambda n, again: 10.0 if n == 8 else None if again == 2 else 5.0)
    assert found is not None
    assert found.config == 8


def test_what_cannot_be_measured_is_left_out() -> None:
    assert walk({8: 10.0, 9: 5.0}).config == 9
    assert walk({9: 5.0}) is None


def test_a_search_ends_when_it_is_over() -> None:
    measured: list[int] = []

    def measure(n: int, _: int) -> float:
        measured.append(n)
        return 0.5**n

    found = search(8, lambda n: [n + 1], measure, lambda: len(measured) >= 4)
    assert found is not None
    assert set(measured) == {8, 9, 10, 11}
    assert found.config == 11
