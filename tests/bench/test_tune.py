"""`python -m bench tune`: what is timed, in which order, what is kept, and that a wrong config gets no time."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.__main__ import main
from bench.options import Options
from bench.timing import CpuMeter, Times
from tribp.launch import autotune
from tribp.launch import plan as plans
from tribp.launch.arch import INTERPRETER
from tribp.launch.launches import Launch
from tribp.ops.linear.config import ForwardProblem

SMOKE = ["tune", "linear", "--smoke", "--case", "16x16x32"]


@pytest.fixture
def timed(every_launch: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the meter is given to time: the configs of its launches. The more of the sum a step takes, the faster."""
    found: list[str] = []
    steps: list[int] = []
    run = Launch.run

    def watched(launch: Launch) -> None:
        constants = launch.settings
        found[-1:] = [f"{found[-1]} {launch.kernel.__name__} {constants}"] if found else []
        steps.append(int(str(constants.get("BLOCK_K", 1))))
        run(launch)

    def device_times(meter: CpuMeter, action: Callable[[], object], seconds: float) -> Times:
        found.append("")
        steps.clear()
        action()
        time = 1000.0 / sum(steps)
        return dict(median=time, p20=time, p80=time)

    monkeypatch.setattr(Launch, "run", watched)
    monkeypatch.setattr(CpuMeter, "device_times", device_times)
    return found


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first direction: the others cost the interpreter seconds, and go the same way."""
    subjects = tune.subjects
    monkeypatch.setattr(tune, "subjects", lambda *given: itertools.islice(subjects(*given), 1))


def read(folder: Path, name: str = "linear") -> dict[str, Any]:
    (file,) = folder.glob(f"tune-{name}-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def command(folder: Path, *more: str) -> int:
    return main([*SMOKE, "--out", str(folder), *more])


def test_every_problem_of_a_case_is_tuned(tmp_path: Path, timed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path) == 0
    content = read(tmp_path)
    assert content["smoke"] is True
    assert content["versions"]["torch"] == torch.__version__
    assert [line["kind"] for line in content["found"]] == ["Forward", "Backward", "Wgrad"]
    forward = content["found"][0]
    assert forward["case"] == "16x16x32 float32 tf32 forward"
    assert forward["basis"] == "derived"
    assert forward["first_us"] == 1000 / 32
    for line in content["found"]:
        keys = [key for key in content["entries"] if f"{line['case']} | {line['problem']} | " in key]
        assert len(keys) >= 2, "the heuristic's choice and what is beside it"
        assert all("device_us" in content["entries"][key] for key in keys)
    said = capsys.readouterr().out
    assert all(f"| {line['kind']} " in said for line in content["found"])
    assert "times mean nothing" in said
    assert said.rstrip().endswith(f"written to {tmp_path}")


@pytest.mark.usefixtures("forward")
def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path, timed: list[str]) -> None:
    command(tmp_path)
    before, measured = read(tmp_path), len(timed)
    timed.clear()
    content = read(tmp_path)
    last = list(content["entries"])[-2:]
    for key in last:
        del content["entries"][key]
    next(tmp_path.iterdir()).write_text(json.dumps(content))
    assert command(tmp_path) == 0
    assert len(timed) == 2 < measured
    assert read(tmp_path) == before


@pytest.mark.usefixtures("forward")
def test_every_time_is_written_as_soon_as_it_is_measured(
    tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device_times = CpuMeter.device_times

    def cut_off(meter: CpuMeter, action: Callable[[], object], seconds: float) -> Times:
        if len(timed) == 2:
            raise KeyboardInterrupt
        return device_times(meter, action, seconds)

    monkeypatch.setattr(CpuMeter, "device_times", cut_off)
    assert command(tmp_path) == 130
    assert len(read(tmp_path)["entries"]) == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("forward")
def test_times_of_other_sources_stay_and_are_gone_on_with(
    tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    for sources in ("one", "other", "third", "one", "other"):
        monkeypatch.setattr(autotune, "sources", lambda sources=sources: sources)
        timed.clear()
        assert command(tmp_path) == 0
        measured.append(bool(timed))
    assert measured == [True, True, True, False, False]
    assert {json.loads(file.read_text())["sources"] for file in tmp_path.iterdir()} == {"one", "other", "third"}


def test_a_budget_ends_it(tmp_path: Path, timed: list[str]) -> None:
    assert command(tmp_path, "--budget", "1e-9") == 0
    assert not timed
    assert not list(tmp_path.iterdir())


def test_operations_share_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks the clock, which stands still, when its share is over; what is not used is left to the others."""
    now, ends = 1000.0, []

    def measured(self: tune.Tuning, cases: Any) -> None:
        nonlocal now
        start = now
        while not self.over():
            now += 1.0
        ends.append(now - start)
        now = start + (6.0 if len(ends) == 1 else ends[-1])

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(tune.Tuning, "run", measured)
    options = Options(operation=["linear", "conv", "optim"], smoke=True, out=tmp_path, budget=0.5)
    assert tune.main(options) == 0
    assert ends == [10.0, 12.0, 12.0]


def test_no_such_case_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "linear", "--smoke", "--case", "nothing", "--out", str(tmp_path)]) == 2
    assert "no such case" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["wrong", "fails"])
@pytest.mark.usefixtures("forward")
def test_a_config_that_is_wrong_gets_no_time(
    how: str, tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of forward the first one, a step of half the length."""
    run = Launch.run

    def spoiled(launch: Launch) -> None:
        run(launch)
        if launch.kernel.__name__ == "forward" and launch.named["BLOCK_K"] == 16:
            if how == "fails":
                raise RuntimeError("out of resources")
            launch.arguments[3].base[0] += 0.01  # type: ignore[attr-defined]

    monkeypatch.setattr(Launch, "run", spoiled)
    assert command(tmp_path) == 0
    entries = [entry for key, entry in read(tmp_path)["entries"].items() if '"block_l": 16' in key and "forward" in key]
    assert entries
    for entry in entries:
        assert "device_us" not in entry
        assert ("relative error" in entry["wrong"]) if how == "wrong" else ("out of resources" in entry["failed"])


@pytest.mark.usefixtures("forward")
def test_a_heuristic_that_is_wrong_ends_with_1(
    tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Launch.run

    def spoiled(launch: Launch) -> None:
        run(launch)
        if launch.kernel.__name__ == "forward":
            launch.arguments[3].base[0] += 0.01  # type: ignore[attr-defined]

    monkeypatch.setattr(Launch, "run", spoiled)
    assert command(tmp_path) == 1
    assert "the heuristic's own config is wrong or fails: ForwardProblem" in capsys.readouterr().out


@pytest.mark.usefixtures("forward")
def test_what_was_faster_is_shown_and_no_choice_has_changed(
    tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "SMOKE_NEIGHBORS", 9)
    problem = ForwardProblem(32, 16, 48, "bfloat16", "ieee", INTERPRETER, vec=8, tma=True)
    chosen = problem.choose()
    assert main(["tune", "linear", "--smoke", "--case", "32x16x48", "--out", str(tmp_path)]) == 0
    forward = read(tmp_path)["found"][0]
    assert forward["changed"] == "block_l 32 → 64"
    assert forward["gain"] == 0.5
    assert forward["config"]["block_l"] == 64
    assert "| Forward | derived   |          31.2 |    15.6 | 50.0% | block_l 32 → 64" in capsys.readouterr().out
    assert plans.config_for(problem) == chosen


@pytest.mark.usefixtures("forward")
def test_optimizers_and_convolutions_are_tuned(tmp_path: Path, timed: list[str]) -> None:
    out = ["--smoke", "--out", str(tmp_path)]
    assert main(["tune", "optim", "conv", "--case", "Adagrad", "--case", "1x8-8x3x5:8", *out]) == 0
    step, depthwise = read(tmp_path, "optim"), read(tmp_path, "conv")
    assert [line["kind"] for line in step["found"]] == ["MultiTensor"]
    assert {json.loads(key.split(" | ")[2])["chunk_blocks"] for key in step["entries"]} == {1, 2, 4}
    assert [line["kind"] for line in depthwise["found"]] == ["Depthwise"]
