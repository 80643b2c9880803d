"""What the command line says, for all commands: a field of `Options` is an argument of the commands that it names."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tribp.launch.arch import ARCHS

from .operation import Operation, find, operations


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Make a parser of numbers above 0."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
        return value

    return number


def option(commands: str, help: str, default: Any = (), word: str = "", **how: Any) -> Any:
    """A field with this default that these commands have. word: as `add_argument` has it, if not the field's name.

    how: for `add_argument`; choices of each command by its name, where those differ.
    """
    return field(default=default, metadata={"commands": commands.split(), "word": word, "help": help, **how})


REPEATED: dict[str, Any] = dict(action="append")
GIVEN: dict[str, Any] = dict(default=False, action="store_true")
PATH: dict[str, Any] = dict(default=None, type=Path)
EXECUTED = ["sm_80", "sm_90"]  # whose code tests/executor executes
COUNT, MINUTES = positive(int), positive(float)


@dataclass(kw_only=True)
class Options(argparse.Namespace):
    """The arguments by their names, and their defaults. Of what is a sequence, none means all."""

    command: str = ""
    operation: Sequence[str] = option(
        "run tune static counts", f"of: {', '.join(operations())} (default: all)", word="operation", metavar="OP",
        nargs="*",
    )  # fmt: skip
    folder: Sequence[Path] = option(
        "report", "default: every folder in bench/results", word="folder", nargs="*", type=Path, metavar="DIR"
    )
    case: Sequence[str] = option(
        "run tune host static counts", "only cases whose name contains this; repeatable", **REPEATED
    )
    dtype: Sequence[str] = option(
        "run tune static", "only this type, such as bfloat16 or 'float32 tf32'; repeatable", **REPEATED
    )
    smoke: bool = option("run tune all host", "walk through on a CPU with tiny shapes", **GIVEN)
    out: Path | None = option("run tune all", "folder for results (smoke: a temporary one)", metavar="DIR", **PATH)  # noqa: RUF009
    json: Path | None = option("host static counts", "write what was found", metavar="FILE", **PATH)  # noqa: RUF009
    set: Sequence[str] = option(
        "run static counts", "a field of every config that has it, as num_warps=4 or Conv.block_i=256; repeatable",
        metavar="FIELD=VALUE", **REPEATED,
    )  # fmt: skip
    first: int | None = option("run", "only the first N of these, the most valuable", None, type=COUNT, metavar="N")
    missing: bool = option("run", "only what the results lack of the present code", **GIVEN)
    compile: bool = option(
        "run", "leave torch.compile out: it takes most of the time", True, "--no-compile",
        dest="compile", action="store_false",
    )  # fmt: skip
    budget: float | None = option(
        "tune all", "tune: stop after so long, shared equally by the operations (default: when all is done). "
        "all: end within so long (default: 60).", None, type=MINUTES, metavar="MINUTES",
    )  # fmt: skip
    only: Sequence[str] = option("all", "only steps whose name contains this; repeatable", metavar="STEP", **REPEATED)
    target: Sequence[str] = option(
        "static counts", "only this GPU; repeatable (counts, --model: sm_90)",
        choices={"static": list(ARCHS), "counts": EXECUTED}, **REPEATED,
    )  # fmt: skip
    all: bool = option("static", "every type at every shape, for all targets alike; many minutes", **GIVEN)
    model: bool = option("static", "predict the time of what `run` measures", **GIVEN)
    jobs: int = option("static", "processes (default: 2)", min(2, os.cpu_count() or 1), type=COUNT)
    direction: Sequence[str] = option("counts", "only this one; repeatable", **REPEATED)
    programs: int = option("counts", "executed of each launch (default: 4)", 4, type=COUNT)
    worst: int = option("counts", "list so many memory instructions that waste most", 0, type=int)

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
