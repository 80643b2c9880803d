"""The tests that every target's file runs: `test_sm_80.py`, `test_sm_90.py`.

Each case is computed by executed code: what Triton compiled for the target, thread by thread. It fails if a result is
further from float64's than rounding explains, or if the code did something that no order of events may do: read what
nobody wrote, write what another reads, leave its tensors, let go of what tensor cores still need.
"""

import random
from collections.abc import Iterator

import pytest

from tribp import versions

from ..optim.executed_cases import Beyond, Rule
from .cases import QUICK, QUICK_ON_HOPPER, RANDOM, SLOW
from .process import Executor

CASES = QUICK | QUICK_ON_HOPPER | SLOW

# Other events that the hardware may bring about: copies land at once, warps and programs run in any order.
EVENTS: dict[str, dict[str, object]] = {
    "copies early": dict(copies="early"),
    "any order": dict(copies="early", schedule="random", order="random", seed=1),
}
# Executed for sm_90 alone, but for one case: of 18 steps compiled for both, all differ in griddepcontrol.wait, 2 in a
# min with a max.
SAME_ON_HOPPER = {"optim"}
ONE_VALUE = {"PTX"}  # switches that have one value on every NVIDIA GPU
ONE_VALUE_BEFORE_HOPPER = {
    "conv3x3.dgrad.TMA", "conv3x3.dgrad.W_TRANSPOSED", "conv3x3.forward.TMA", "conv3x3.wgrad.TMA",
    "conv3x3_few_channels.few_channels_dgrad.TMA",
    "linear.dgrad.FUSE_DZ", "linear.dgrad.TMA", "linear.dgrad.TMA_STORE",
    "linear.forward.PERSISTENT", "linear.forward.TMA", "linear.forward.TMA_STORE",
    "linear.wgrad.FUSE_DZ", "linear.wgrad.TMA", "linear.wgrad.db",
    "linear.wgrad.dz_out",
}  # fmt: skip


@pytest.fixture(scope="module")
def gpu(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Executes for the target of the file that asks."""
    pytest.importorskip("triton")
    with Executor(request.module.TARGET) as executor:
        yield executor


def report(problems: list[str]) -> None:
    """Fails with the problems alone: where in Python a case was started says nothing."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def quick(target: str) -> list[str]:
    return [*QUICK, *(QUICK_ON_HOPPER if target == "sm_90" else ())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_case:
        at_once = quick(metafunc.module.TARGET)
        names = [pytest.param(name, marks=[] if name in at_once else pytest.mark.slow) for name in CASES]
        metafunc.parametrize("name", names)


def test_case(name: str, gpu: Executor) -> None:
    report(gpu.problems(CASES[name]))


def test_every_form_was_executed(gpu: Executor, request: pytest.FixtureRequest) -> None:
    """By the cases above: every kernel, each compile-time switch on and off, each axis of a grid longer than 1.

    For sm_80 every kernel but the optimizers'.
    """
    if gpu.cases < len(quick(request.module.TARGET)):
        pytest.skip("only some of the cases were run")
    alone = {"conv3x3.wgrad.X_FIRST"}  # before Hopper
    alone |= set() if versions.keeps_shared_tiles() else {"conv3x3.wgrad.TMA"}  # by products of 16 bits, on sm_90
    passed_over: set[str] = set()
    if request.module.TARGET == "sm_80":
        alone, passed_over = ONE_VALUE_BEFORE_HOPPER, SAME_ON_HOPPER
    forms = {form for form in gpu.forms if form[0].partition(".")[0] not in passed_over}
    every = {kernel for kernel in gpu.kernels() if kernel.partition(".")[0] not in passed_over}
    missing = [f"no case launches {kernel}" for kernel in every - {form[0] for form in forms}]
    for kernel, switch, value in sorted(forms):
        lone = switch in ONE_VALUE or f"{kernel}.{switch}" in alone
        lone |= switch.startswith("program_id") and value
        if not lone and (kernel, switch, not value) not in forms:
            missing.append(f"no case launches {kernel} with {switch} {not value}")
    report(missing)


@pytest.mark.slow
@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("name", CASES)
def test_other_events(name: str, events: str, gpu: Executor) -> None:
    report(gpu.problems(CASES[name], **EVENTS[events]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("family", RANDOM)
def test_random_case(family: str, seed: int, gpu: Executor) -> None:
    chance = random.Random(f"{family} {seed}")
    case = RANDOM[family](chance)
    problems = gpu.problems(case, **chance.choice([{}, *EVENTS.values()]))
    report([repr(case), *problems] if problems else [])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in quick("sm_90") if not isinstance(CASES[name], (Rule, Beyond))])
def test_every_setting_that_tuning_tries(name: str, gpu: Executor) -> None:
    report(gpu.problems_of_variants(CASES[name]))
