"""The command line of `python -m bench`: a field of `Options` is an argument of the commands that it names."""

import argparse
import ast
import dataclasses
import importlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tribp import dispatch
from tribp.launch.arch import ARCHS

from .operation import Operation, find, operations
from .variant import variant

DESCRIPTION = """\
Measures tribp, from a checkout of its repository. For example:

  python -m bench run linear --dtype bfloat16 --case 8192x1024x1024
  python -m bench run --smoke      the same walk on a CPU with tiny shapes; its times mean nothing
  python -m bench all --budget 60 --out found   everything a GPU is wanted for; the same again goes on
  python -m bench tune linear --dtype bfloat16 --budget 20
  python -m bench host --case Adam
  python -m bench static --target sm_90 --dtype bfloat16 --json found.json
  python -m bench static linear --model         the time that a model of the GPU predicts from the machine code
  python -m bench counts linear --case "8192x1024x1024 bfloat16" --set Forward.num_stages=2    what others would cost
"""

# By name, the module: the first line of its docstring is the command in a line, all of it its --help.
COMMANDS = dict(run="run", tune="tune", all="all", report="report", host="host", static="compile", counts="counts")


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


def described(module: str) -> tuple[str, str]:
    """What a command is in a line, and what it does: from its module, which is not imported and may need triton."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))) or ""
    first, _, description = text.partition("\n\n")
    return first.partition(": ")[2].rstrip("."), description.replace("%", "%%")


def parse(arguments: list[str] | None = None) -> Options:
    main = argparse.ArgumentParser(
        prog="python -m bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, module in COMMANDS.items():
        line, text = described(module)
        parsers[name] = commands.add_parser(name, help=line, description=text, argument_default=argparse.SUPPRESS)
    for entry in dataclasses.fields(Options):
        how = dict(entry.metadata)
        word = how.pop("word", "") or f"--{entry.name}"
        for name in how.pop("commands", ()):
            choices = how.get("choices")
            own = {"choices": choices[name]} if isinstance(choices, dict) else {}
            parsers[name].add_argument(word, **how | own)
    return main.parse_args(arguments, Options())


def perform(arguments: list[str] | None) -> int:
    """The exit status. What each command needs is asked for before its module is imported."""
    options = parse(arguments)
    name = options.command
    find(options.operation)
    if options.json:
        _try_to_write(options.json)
    if options.out and options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got {options.out}")
    if name in ("run", "tune", "all") and not options.smoke and not torch.cuda.is_available():
        raise ValueError(f"{name} needs CUDA, and torch finds no GPU here (--smoke walks through it on a CPU)")
    if name == "tune" and options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    if name in ("tune", "static", "counts") and not dispatch.has_triton():
        raise ValueError(f"{name} needs triton, which is not installed: pip install triton")
    if name in ("static", "counts") and dispatch.interpreting():
        raise ValueError(f"{name} compiles, and under TRITON_INTERPRET=1 nothing can be: unset it")
    module = "model.predict" if options.model else COMMANDS[name]
    with variant(options.set):
        return int(importlib.import_module(f".{module}", __package__).main(options))


def _try_to_write(path: Path) -> None:
    """Raise what would be raised when everything is measured."""
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    tempfile.TemporaryFile(dir=path.parent).close()
