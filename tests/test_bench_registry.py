"""A third operation: all that the commands of `python -m bench` know of one stands with its registration."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bench import linear, predict, registry, steps
from bench.compiled import describe
from bench.machines import MACHINES
from bench.registry import Case, KernelTests, Operation, Target, Work
from bench.work import work_of
from tribp.launch.arch import ARCHS
from tribp.launch.plan import Launch

CASE = Case((8, 8, 8), torch.bfloat16)
SM_90 = ARCHS["sm_90"]


class Kernel:
    __name__ = "turn"
    arg_names = ("x", "MIRRORED", "LAST")


KERNEL: Any = Kernel()


def launch(kernel: Any = KERNEL) -> Launch:
    constants = dict(MIRRORED=True, LAST=False)
    return Launch(kernel, (5,), (torch.empty(100, device="meta"),), constants, num_warps=4)


THIRD: Operation = replace(
    linear.OPERATION,
    name="third",
    directions=("around", "both"),
    work=lambda case, direction: Work(1e9, 0),
    targets=lambda case, direction: [Target("eager", 1.0)],
    launches=lambda case, direction, arch: [launch()],
    tests=KernelTests(["tests/third.py"], ["tests/third.py", "-k", "few"], ["tests/third.py", "-k", "one"]),
    switches=("MIRRORED", "LAST"),
    kernel_work=lambda: {KERNEL: lambda given, grid: dict(turns=grid[0] * given["MIRRORED"])},
)


def register(operation: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("third_operation")
    module.OPERATION = operation
    monkeypatch.setitem(sys.modules, "third_operation", module)
    monkeypatch.setitem(registry._MODULES, "third", "third_operation")


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    register(THIRD, monkeypatch)


def test_it_is_predicted_as_itself(third: None) -> None:
    """Its cases are of the type that linear's are."""
    assert predict.directions("third", CASE) == ["around"]
    assert [x.kernel for x in predict.launches_of("third", CASE, "around", SM_90)] == [KERNEL]
    work, us = predict.floor_of("third", CASE, "around", [], MACHINES["sm_90"])
    assert work.bytes == 1e9
    assert us == pytest.approx(1e15 / MACHINES["sm_90"].dram)
    selection = predict.Selection(("third",), "sm_90", cases=(linear.OPERATION.cases[0].name,))
    (entry, *_) = selection.entries()
    assert (entry.operation, entry.launches[0].kernel, entry.work.bytes) == ("third", KERNEL, 1e9)


def test_its_tests_and_the_sanitizers_are_planned(third: None) -> None:
    plan = {step.name: step for step in steps.plan(Path("DIR"), smoke=False)}
    assert list(plan["tests third"].command[-3:]) == ["-m", "gpu", "tests/third.py"]
    for name in ("memory third", "races third"):
        assert list(plan[name].command[-3:]) == ["tests/third.py", "-k", "few"]
    smoke = {step.name: step for step in steps.plan(Path("DIR"), smoke=True)}
    assert smoke["tests third"].command[-1] == smoke["races third"].command[-1] == "one"


def test_the_model_knows_its_kernels(third: None) -> None:
    work = work_of(launch())
    assert (work.programs, work.turns, work.bytes) == (5, 5, 400)


def test_a_kernel_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="no operation's kernel_work tells what a launch of turn does"):
        work_of(launch())


def test_its_settings_show_what_is_switched_on(third: None) -> None:
    assert describe(launch()).split() == ["w4", "s1", "mirrored"]


@pytest.mark.parametrize("fact", ["tests", "switches", "kernel_work", "legend"])
def test_a_registration_that_lacks_something_is_refused(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in vars(registry.Measured) if not name.startswith("_")]
    rest = {name: getattr(THIRD, name) for name in names if name != fact}
    register(SimpleNamespace(**rest), monkeypatch)
    with pytest.raises(TypeError, match=rf"third_operation.OPERATION .* lacks {fact}$"):
        registry.find(["third"])


def test_an_entry_of_another_kind_has_no_model() -> None:
    with pytest.raises(ValueError, match="optim is neither"):
        predict.launches_of("optim", CASE, "forward", SM_90)
