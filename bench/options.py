"""What the command line says, for all commands."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .operation import Operation, find


class Options(argparse.Namespace):
    """The arguments by their names, and their defaults. Of what is a sequence, none means all."""

    command = ""
    operation: Sequence[str] = ()
    folder: Sequence[Path] = ()
    case: Sequence[str] = ()  # parts of names
    dtype: Sequence[str] = ()
    direction: Sequence[str] = ()
    target: Sequence[str] = ()
    only: Sequence[str] = ()  # parts of steps' names
    smoke = False
    out: Path | None = None
    json: Path | None = None
    first: int | None = None  # of each operation, only so many of these cases
    missing = False  # leave out what the results hold already, measured with the present code
    compile = True
    budget: float | None = None  # minutes
    all = False
    model = False
    jobs = min(2, os.cpu_count() or 1)
    programs = 4
    worst = 0

    @property
    def operations(self) -> list[Operation]:
        return find(self.operation)

    def selects(self, case: Any) -> bool:
        """Whether its name contains one of the parts, and its type is one of these."""
        named = not self.case or any(part in case.name for part in self.case)
        return named and (not self.dtype or case.dtype_name in self.dtype)

    def cases_of(self, operation: Operation) -> list[Any]:
        cases = operation.smoke_cases if self.smoke else operation.cases
        return [case for case in cases if self.selects(case)][: self.first]

    def cases_of_each(self) -> list[tuple[Operation, list[Any]]]:
        """The operations that have such cases, with them. Raises ValueError if there is none."""
        each = [(operation, cases) for operation in self.operations if (cases := self.cases_of(operation))]
        if not each:
            there = Options(smoke=self.smoke)
            names = (f"{o.name}: {', '.join(case.name for case in there.cases_of(o))}" for o in self.operations)
            raise ValueError(f"there is no such case; there are of {'; of '.join(names)}")
        return each
