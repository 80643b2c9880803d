"""`TRIBP_AUTOTUNE=1` without a GPU: calls run by the interpreter, and a timer that reads the launches' settings."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from tribp import dispatch
from tribp.launch import autotune, calls, finds, tuning
from tribp.launch.arch import INTERPRETER
from tribp.launch.autotune import Tuner, agrees
from tribp.launch.finds import cache_folder
from tribp.launch.layout import Launch
from tribp.launch.linear_sigmoid import choose_forward
from tribp.launch.matmul import Product, basis
from tribp.launch.tuning import Question
from tribp.launch.variants import variants

from .oracle import LinearSigmoid, assert_close

ROOT = Path(__file__).parents[1]
GPU = "Some GPU 80GB"


class Machine:
    """Runs launches, and times them by their settings: `cost` of each, and what a test does to one before it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cost: Callable[[Mapping[str, Any]], float] = lambda constants: 1000.0 / constants["BLOCK_K"]
        self.spoil: Callable[[Launch], bool] = lambda launch: False  # whether not to run it
        self.timed: list[list[Mapping[str, Any]]] = []
        self._running: list[Mapping[str, Any]] = []
        run = Launch.run

        def watched(launch: Launch) -> None:
            self._running.append(dict(launch.constants))
            if not self.spoil(launch):
                run(launch)

        monkeypatch.setattr(Launch, "run", watched)

    def __call__(self, action: Callable[[], object]) -> float:
        self._running = []
        action()
        self.timed.append(self._running[:])
        return sum(map(self.cost, self.timed[-1]))

    def tuner(self, **more: Any) -> Tuner:
        fixed: dict[str, Any] = dict(
            timer=lambda: self, on_gpu=lambda tensors: True, busy=lambda: False, gpu=lambda: GPU
        )
        return Tuner(**fixed | more)


@pytest.fixture
def machine(kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """Autotuning is on, with a folder of its own."""
    monkeypatch.setenv("TRIBP_CACHE_DIR", str(tmp_path / "cache"))
    found = Machine(monkeypatch)
    monkeypatch.setattr(autotune, "tuner", found.tuner())
    yield found
    tuning.forget()


def restart(machine: Machine, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """As in another process."""
    tuning.forget()
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


def settings() -> Product:
    return choose_forward(20, 16, 64, "float32", "ieee", INTERPRETER, vec=4, tma=True)


def cached() -> Path:
    (file,) = cache_folder().glob("*.json")
    return file


def test_the_fastest_is_found_and_used_from_the_same_call_on(machine: Machine) -> None:
    rule = settings()
    forward()
    assert settings().block_l == 64 == 2 * rule.block_l
    assert basis(settings(), INTERPRETER) == "measured"
    assert "15.6 µs, the rule's choice 31.2 µs" in settings().reason
    (call,) = [machine._running[-1]]
    assert call["BLOCK_K"] == 64, "the call itself is made with what was found"
    searched = len(machine.timed)
    assert searched > 4
    forward()
    assert len(machine.timed) == searched, "a second call is not searched"


def test_backward_is_searched_rule_by_rule_until_none_is_new(machine: Machine) -> None:
    """Where descriptors would form dz on load, a pass of its own is made the faster way: other rules are asked then."""
    machine.cost = lambda constants: 5.0 if constants.get("FUSE_DZ") else 1.0 + constants.get("BLOCK", 0) / 4096
    x, w, dy = torch.randn(33, 16).requires_grad_(), torch.randn(16, 16).requires_grad_(), torch.randn(33, 16)
    y = tribp.linear_sigmoid(x, w)
    found = torch.autograd.grad(y, [x, w], dy)
    for grad, exact in zip(found, LinearSigmoid(x, w, None).gradients(dy, y), strict=False):
        assert_close(grad, exact)
    rules = {key.partition("(")[0] for key in tuning._finds}
    assert rules == {"choose_forward", "choose_wgrad", "choose_dgrad", "choose_pass"}
    assert not any(s.fuse_dz for s in tuning._finds.values() if isinstance(s, Product))
    told = [key for key in tuning._finds if key.startswith("choose_dgrad")]
    assert ["may_fuse=False" in key for key in told] == [True]


def test_finds_are_stored_and_read_by_another_process(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    y = forward()
    found = settings()
    content = json.loads(cached().read_text())
    assert content["gpu"] == GPU
    assert content["torch"] == torch.__version__
    assert list(content["finds"]) == [key for key in content["finds"] if key.startswith("choose_forward(m=20, n=16")]
    restart(machine, monkeypatch)
    assert settings() != found
    assert torch.equal(forward(), y)
    assert settings() == found
    assert not machine.timed
    code = (
        "import torch, tribp\n"
        "from tribp.launch import autotune\n"
        "from tribp.launch.arch import INTERPRETER\n"
        "from tribp.launch.linear_sigmoid import choose_forward\n"
        "assert autotune.tuner is not None\n"
        f"autotune.tuner = autotune.Tuner(on_gpu=lambda tensors: True, busy=lambda: True, gpu=lambda: {GPU!r})\n"
        "with tribp.use_backend('triton'):\n"
        "    tribp.linear_sigmoid(torch.randn(20, 64), torch.randn(16, 64))\n"
        "print(choose_forward(20, 16, 64, 'float32', 'ieee', INTERPRETER, vec=4, tma=True).block_l)"
    )
    environment = os.environ | {"TRIBP_AUTOTUNE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["64"], done.stderr


def test_what_was_searched_in_vain_is_not_searched_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cost = lambda constants: 10.0
    rule = settings()
    forward()
    assert replace(settings(), reason=rule.reason) == rule
    assert "nothing around it is faster" in settings().reason
    restart(machine, monkeypatch)
    forward()
    assert not machine.timed


@pytest.mark.parametrize("what", ["torch", "triton", "sources", "gpu"])
def test_finds_of_other_conditions_are_ignored(what: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward()
    written = cached()
    if what == "gpu":
        restart(machine, monkeypatch, gpu=lambda: "Another GPU")
    else:
        if what == "sources":
            monkeypatch.setattr(finds, "sources", lambda: "others")
        else:
            monkeypatch.setattr(getattr(finds, what), "__version__", "0.1")
        restart(machine, monkeypatch)
    forward()
    assert machine.timed, "searched anew"
    assert len(list(written.parent.glob("*.json"))) == 2


def test_a_broken_file_leaves_calls_to_search(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward()
    cached().write_text("{")
    restart(machine, monkeypatch)
    caplog.clear()
    forward()
    forward()
    assert settings().block_l == 64
    assert [("ignored" in record.message) for record in caplog.records] == [True, False], "and the search's sentence"


def test_a_folder_that_cannot_be_written_costs_a_warning(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIBP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    forward()
    assert settings().block_l == 64
    assert len([record for record in caplog.records if "cannot be kept" in record.message]) == 1


# -- variants that must not be kept


def wrong_row(launch: Launch) -> bool:
    launch.kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)
    launch.arguments[3].base[-1] += 0.1  # type: ignore[attr-defined]
    return True


def too_large(launch: Launch) -> bool:
    raise RuntimeError("out of resources: shared memory")


@pytest.mark.parametrize("spoil", [wrong_row, too_large, lambda launch: True], ids=["wrong", "fails", "writes nothing"])
def test_what_is_wrong_or_fails_is_never_kept(spoil: Callable[[Launch], bool], machine: Machine) -> None:
    """The fastest by far, and not right."""
    machine.spoil = lambda launch: launch.named["BLOCK_K"] == 64 and spoil(launch)
    forward()
    assert all(constants["BLOCK_K"] != 64 for call in machine.timed for constants in call), "it is not even timed"
    assert settings().block_l == 32
    assert '"block_l": 64' not in cached().read_text()


# An operation of its own: the tensors are named otherwise than the library's.


def made_up(given: Tensor, matrix: Tensor, out: Tensor) -> Any:
    from tribp.ops.linear_sigmoid import plan

    return plan.forward(given, matrix, None, out, INTERPRETER, False)


def perform_made_up(outputs: tuple[str, ...]) -> Tensor:
    given, matrix = inputs()
    out = torch.full((20, 16), torch.nan)
    calls.perform(made_up, dict(given=given, matrix=matrix, out=out), {}, outputs)
    return out


def sevens(launch: Launch) -> bool:
    launch.arguments[3].base.fill_(7)  # type: ignore[attr-defined]
    return True


def test_an_operation_declares_what_it_writes(machine: Machine) -> None:
    machine.spoil = lambda launch: launch.named["BLOCK_K"] == 64 and sevens(launch)
    given, matrix = inputs()
    assert_close(perform_made_up(("out",)), LinearSigmoid(given, matrix, None).y)
    assert machine.timed
    assert settings().block_l == 32


def test_a_call_that_declares_no_output_is_not_tuned(machine: Machine) -> None:
    machine.spoil = lambda launch: launch.named["BLOCK_K"] == 64 and sevens(launch)
    given, matrix = inputs()
    assert_close(perform_made_up(()), LinearSigmoid(given, matrix, None).y)
    assert not machine.timed
    assert not cache_folder().exists()


def test_an_output_that_is_none_of_the_tensors_is_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match=r"names of the call's tensors \(given, matrix, out\), got 'y'"):
        perform_made_up(("y",))


def test_a_rule_that_fails_is_told_of_and_not_stored(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cost = lambda constants: 1 / 0
    forward()
    assert any("the search for launch settings ended" in record.message for record in caplog.records)
    assert not tuning._finds
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


def test_off_by_default_and_not_one_question_more(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert autotune.tuner is None
    built: list[str] = []
    from tribp.ops.linear_sigmoid import plan

    build = plan.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        built.append("forward")
        return build(*arguments, **named)

    monkeypatch.setattr(plan, "forward", counted)
    monkeypatch.setattr(tuning.Rule, "_question", None)  # a key is formed of no facts
    tuning.forget()
    forward()
    assert built == ["forward"]


def test_on_the_cpu_nothing_happens(machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(autotune, "tuner", Tuner(timer=lambda: machine))
    forward()
    assert not machine.timed
    assert not cache_folder().exists()
    assert not caplog.records


def test_without_a_home_the_rules_answer(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise OSError("set TRIBP_CACHE_DIR")

    monkeypatch.setattr(autotune, "cache_folder", homeless)
    forward()
    forward()
    assert not machine.timed
    assert [record.getMessage().partition("ended: ")[2] for record in caplog.records] == [
        "OSError: set TRIBP_CACHE_DIR"
    ]


@pytest.mark.parametrize("who", ["capture", "compiler"])
def test_no_search_in_a_graphs_capture_but_finds_hold(
    who: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "is_current_stream_capturing", lambda: who == "capture")
    monkeypatch.setattr(autotune, "is_compiling", lambda: who == "compiler")
    restart(machine, monkeypatch, busy=autotune.busy)
    forward()
    assert not machine.timed
    assert settings().block_l == 32
    monkeypatch.setattr(autotune, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "is_compiling", lambda: False)
    forward()
    assert machine.timed, "what was met in a capture is searched outside"
    monkeypatch.setattr(autotune, "is_current_stream_capturing", lambda: True)
    restart(machine, monkeypatch, busy=autotune.busy)
    forward()
    assert not machine.timed
    assert settings().block_l == 64


def test_only_tensors_on_a_gpu_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        is_cuda = True

    there: Any = {"x": Cuda(), "b": None}
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert autotune.on_gpu(there)
    assert not autotune.on_gpu({"x": torch.zeros(1), "b": None})
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert not autotune.on_gpu(there)


@pytest.mark.parametrize(("value", "on"), [("", False), ("0", False), ("1", True)])
def test_the_variable_is_0_or_1(value: str, on: bool) -> None:
    assert autotune.wanted(value) == on
    with pytest.raises(ValueError, match="TRIBP_AUTOTUNE must be 0 or 1, got 'yes'"):
        autotune.wanted("yes")


# -- how a search goes


def test_two_searches_take_the_same_steps(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward()
    first = list(machine.timed)
    cached().unlink()
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
    (said,) = [record.message for record in caplog.records]
    assert "TRIBP_AUTOTUNE" in said
    assert "choose_forward" in said
    assert str(cached()) in said


def test_all_that_a_call_depends_on_makes_it_another(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie differently in memory are other facts, and another search."""
    forward()
    searched = len(machine.timed)
    x, w = inputs()
    wide = torch.randn(20, 66)[:, :64].copy_(x)
    tribp.linear_sigmoid(wide, w)
    assert len(machine.timed) > searched
    assert len(tuning._finds) == 2


def test_perform_runs_what_it_builds_after_the_search(machine: Machine) -> None:
    """The search leaves the outputs to the call: NaN if nobody wrote them."""
    x, w = inputs()
    y = torch.full((20, 16), torch.nan)
    from tribp.ops.linear_sigmoid import plan

    tensors, facts = dict(x=x, w=w, b=None, y=y), dict(arch=INTERPRETER, tf32=False)
    calls.perform(plan.forward, tensors, facts, outputs=("y",))
    assert_close(y, LinearSigmoid(x, w, None).y)


def test_variants_are_asked_for_the_question_at_hand(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def recorded(question: Question, settings: Any) -> list[Any]:
        asked.append(question.rule)
        return variants(question, settings)

    monkeypatch.setattr(autotune, "variants", recorded)
    forward()
    assert set(asked) == {"choose_forward"}
