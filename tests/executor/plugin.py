"""pytest's option --execute TARGET: tests run the kernels compiled, on the executed GPU, and fail for its problems."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from .findings import Counts
from .machine import CHOICES
from .run import TARGETS, Report, executed, why_not

_REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("executor", "compiled kernels, executed without a GPU: tests/executor")
    group.addoption("--execute", choices=TARGETS, help="run the kernels as compiled for this GPU, and check them")
    for name, (choices, says) in CHOICES.items():
        group.addoption(f"--{name}", default=choices[0], choices=choices, help=f"with --execute: {says}")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.execute:
        if why := why_not():
            raise pytest.UsageError(f"--execute: {why}")
        config.pluginmanager.register(Executing(config.option), "executing")


class Executing:
    """Every test within its own `executed` block. A CPU tensor's backend is torch where a test chose none."""

    def __init__(self, option: Any) -> None:
        self.target = option.execute
        self.settings = {name: getattr(option, name) for name in CHOICES}
        self.launches: list[Counts] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        with executed(self.target, auto="torch", poison=False, **self.settings) as report:
            item.stash[_REPORT] = report
            try:
                return (yield)
            finally:
                self.launches += report.launches

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield
        item.stash[_REPORT].check()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Of this process: with -n the tests run in others."""
        if self.launches:
            runs = Counter(counts.kernel for counts in self.launches)
            seconds = sum(counts.seconds for counts in self.launches)
            kernels = ", ".join(f"{name} {n}" for name, n in sorted(runs.items()))
            terminalreporter.write_line(f"executed {len(self.launches)} launches in {seconds:.0f} s: {kernels}")
