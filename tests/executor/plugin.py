"""Runs a test suite of the library on the executed GPU: python -m pytest -p ptx.plugin --emulate sm_80 tests/…

Tests that ask for the kernels get them compiled, in place of Triton's interpreter. A test fails too if its kernels did
what compute-sanitizer would report.
"""

import os

import pytest

REPORTS: list = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", default="sm_80")
    parser.addoption("--copies", default="late", choices=["late", "early"])
    parser.addoption("--schedule", default="lockstep", choices=["lockstep", "random"])


def pytest_sessionstart(session: pytest.Session) -> None:
    """conftest.py has chosen the interpreter: not here."""
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    from .run import executed

    option = item.config.option
    with executed(option.emulate, auto="torch", poison=False, copies=option.copies, schedule=option.schedule) as report:
        item.stash[_REPORT] = report
        yield
    REPORTS.extend(report.launches)


_REPORT = pytest.StashKey()


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    outcome = yield
    report = pyfuncitem.stash.get(_REPORT, None)
    if report is not None and report.problems and outcome.excinfo is None:
        outcome.force_exception(AssertionError("\n".join(map(str, report.problems))))


def pytest_terminal_summary(terminalreporter) -> None:
    from collections import Counter

    runs = Counter(c.kernel for c in REPORTS)
    seconds = sum(c.seconds for c in REPORTS)
    terminalreporter.write_line(f"executed: {sum(runs.values())} launches in {seconds:.0f} s: {dict(runs)}")
