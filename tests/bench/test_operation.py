"""A third operation: all that the commands of `python -m bench` know of one stands in its file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import all as bench_all
from bench import linear, operation, results
from bench.model import predict
from bench.model.machines import MACHINES
from bench.model.work import work_of
from bench.operation import Case, KernelTests, Operation, Target, Work, describe
from bench.options import Options
from tribp.launch.arch import ARCHS
from tribp.launch.launches import Launch

CASE = Case((8, 8, 8), torch.bfloat16)


class Kernel:
    __name__ = "turn"
    arg_names = ("x", "MIRRORED", "CHANNELS_LAST")


def launch() -> Launch:
    kernel: Any = Kernel()
    constants = dict(MIRRORED=True, LAST=False)
    return Launch(kernel, (5,), (torch.empty(100, device="meta"),), constants, num_warps=4)


THIRD: Operation = replace(
    linear.OPERATION,
    name="third",
    cases=[CASE],
    directions=("around", "both"),
    work=lambda case, direction: Work(1e9, 0),
    targets=lambda case, direction: [Target("eager", 1.0)],
    tests=KernelTests(["tests/third.py"], ["tests/third.py", "-k", "few"], ["tests/third.py", "-k", "one"]),
    kernel_work={"turn": lambda given, grid, case: dict(turns=grid[0] * given["MIRRORED"])},
)


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operation.operations(), "third", THIRD)


def test_a_file_of_the_folder_is_enough() -> None:
    assert {"conv", "linear", "optim"} <= set(operation.operations())
    folder = Path(operation.__file__).parent
    others = [file for file in folder.rglob("*.py") if "\nOPERATION = " not in file.read_text()]
    assert len(others) > 15
    for file in others:
        text = file.read_text()
        named = [name for name in ("linear", "conv3x3", "optim") if f"from .{name} import" in text]
        assert not named or file.name == "host_layers.py", f"{file.name} knows of {named}"


def test_launches_are_those_of_the_direction_with_its_precision() -> None:
    def launches(name: str, case: Case, direction: str) -> list[Launch]:
        return operation.find([name])[0].launches(case, direction, ARCHS["sm_90"])

    def kernels(name: str, case: Case, direction: str) -> list[str]:
        return [launch.kernel.__name__ for launch in launches(name, case, direction)]

    case = linear.LinearCase((64, 32, 48), torch.float32)
    backward = kernels("linear", case, "backward")
    assert kernels("linear", case, "forward") == ["forward"]
    assert "forward" not in backward
    assert {"wgrad", "dgrad"} <= set(backward)
    assert kernels("linear", case, "both") == ["forward", *backward]
    assert "dgrad" not in kernels("linear", case, "wgrad only")
    assert kernels("train", Case((16, 784, 128, 10), torch.float32), "step") == ["train_rows", "train_weights"]
    for tf32 in (False, True):
        (launch,) = launches("linear", linear.LinearCase((64, 32, 48), torch.float32, tf32), "forward")
        assert (launch.named["PRECISION"] == "tf32x3") == (not tf32)


def test_the_cases_with_targets_come_first() -> None:
    """Whatever is measured or tuned may be cut off. Every step has a target of launches, every layer one of memory."""
    for entry in operation.find():
        judged = [
            any(t.quantity not in ("launches", "memory") for d in entry.directions for t in entry.targets(case, d))
            for case in entry.cases
        ]
        assert any(judged), entry.name
        assert judged == sorted(judged, reverse=True), entry.name


def test_it_is_predicted_as_itself(third: None) -> None:
    assert predict.directions(THIRD, CASE) == ["around"]
    assert predict.floor_us(THIRD, CASE, "around", MACHINES["sm_90"]) == pytest.approx(1e15 / MACHINES["sm_90"].dram)
    (found,) = predict.selected(Options(operation=["third"]))
    assert found == (ARCHS["sm_90"], THIRD, CASE, "around")


def test_its_tests_and_measurements_are_planned(third: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_all, "sanitizer", lambda: "compute-sanitizer")
    plan = {step.name: step for step in bench_all.plan(Path("DIR"), smoke=False)}
    assert list(plan["tests third"].command[-3:]) == ["-m", "gpu", "tests/third.py"]
    for name in ("memory third", "races third"):
        assert list(plan[name].command[-3:]) == ["tests/third.py", "-k", "few"]
    runs = ("first 10", "first 10, compile", "tune", "the rest", "the rest, compile")
    assert {f"third: {name}" for name in runs} <= set(plan)
    assert list(plan["third: first 10"].command[-7:-2]) == ["third", "--first", "10", "--no-compile", "--missing"]
    smoke = {step.name: step for step in bench_all.plan(Path("DIR"), smoke=True)}
    assert smoke["tests third"].command[-1] == smoke["races third"].command[-1] == "one"


def test_its_targets_and_its_table_are_shown(third: None) -> None:
    rows = results.unmeasured(THIRD)
    assert [(row["direction"], row["targets"][0]["verdict"]) for row in rows] == [("around", "unmeasured"),
                                                                                  ("both", "unmeasured")]  # fmt: skip
    assert results.table(THIRD, rows).count(CASE.name) == 2


def test_the_model_knows_its_kernels() -> None:
    work = work_of(THIRD, launch(), CASE)
    assert (work.programs, work.turns, work.bytes) == (5, 5, 400)


def test_a_kernel_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="the kernel_work of linear does not tell what a launch of turn does"):
        work_of(linear.OPERATION, launch(), CASE)


def test_its_settings_show_what_is_switched_on(third: None) -> None:
    assert describe(launch()).split() == ["w4", "s1", "mirrored"]
