"""The command line: `python -m bench`."""

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tribp import dispatch
from tribp.launch.arch import ARCHS

from . import operation
from .options import Options

DESCRIPTION = """\
Measures tribp, from a checkout of its repository. For example:

  python -m bench run linear --dtype bfloat16 --case 8192x1024x1024
  python -m bench run --smoke      the same walk on a CPU with tiny shapes; its times mean nothing
  python -m bench all --budget 60 --out found   everything a GPU is wanted for; the same again goes on
  python -m bench tune linear --dtype bfloat16 --budget 20
  python -m bench host --case Adam
  python -m bench static --target sm_90 --dtype bfloat16 --json found.json
  python -m bench static linear --model         the time that a model of the GPU predicts from the machine code
"""

COMMANDS = {  # what each is in a line, and what it does
    "run": (
        "check and time operations on a CUDA GPU",
        "Checks every result against float64, times what is right, and writes bench/results/<gpu>/<op>.json after each "
        "case; `report` makes pages and pictures of it. Exits with 1 if a result is wrong, with 2 without CUDA.",
    ),
    "tune": (
        "time the configs beside every heuristic's choice on a CUDA GPU",
        "Of every problem in a case: times the heuristic's config and those one step away, goes on from the fastest, "
        "and checks every result against float64. Writes bench/results/<gpu>/tune-<op>.json after every config; a "
        "second run goes on where the first stopped. Exits with 1 if a heuristic's choice is wrong, with 2 without "
        "CUDA.",
    ),
    "all": (
        "everything a GPU is wanted for, unattended, within a budget of time",
        "GPU tests, measurements, compute-sanitizer where it is installed, torch.compile beside them, tuning of launch "
        "configs, and the long tail of cases: the most valuable first, each step in a process of its own. What was "
        "found is in DIR at once: steps.json, log.txt, <op>.json. With the same DIR it goes on: what is done is not "
        "done again, what failed only with other code. Writes the report and a table of the steps last. Exits with 1 "
        "if a step failed, with 2 without CUDA.",
    ),
    "report": (
        "the page and the pictures of stored results; no GPU needed",
        "Writes DIR/README.md (every target with what was measured, the missed first; the tables) and, with "
        "matplotlib, pictures, from the JSON in DIR alone. Without any results it prints the targets.",
    ),
    "host": (
        "what an optimizer's step costs the host; no GPU needed",
        "Times tribp's launch plan without the launch beside the bookkeeping of torch's fused Adam, and the step of "
        "CPU tensors beside torch's default one, in turns. Load on the machine falsifies it.",
    ),
    "static": (
        "compile every kernel for every target and check the machine code; no GPU needed",
        "Prints registers, spills, shared memory and instruction counts of every kernel, and what breaks an "
        "expectation: spills, missing matrix instructions, loads that are not pipelined, narrow stores, and on sm_90 "
        "products whose registers are overwritten while they run, or that wait for one another. Exits with 1 if "
        "anything does.",
    ),
    "counts": (
        "execute some programs of every kernel, and count what they cost each unit; no GPU needed",
        "Prints, for every launch of a case, the cycles of a multiprocessor that one program needs of its tensor "
        "cores, of shared memory, of its schedulers and of L2, beside the least that L2 could take; what binds, and "
        "how many times what tensor cores (or memory at its best) need. Exits with 1 if a kernel does what no order "
        "of events may do.",
    ),
}


def parse(arguments: list[str] | None = None) -> Options:
    """Defaults are those of the class, where none is given here."""
    main = argparse.ArgumentParser(
        prog="python -m bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=line, description=text, argument_default=argparse.SUPPRESS)
        for name, (line, text) in COMMANDS.items()
    }

    def option(names: str, word: str, help: str, **how: Any) -> None:
        for name in names.split():
            parsers[name].add_argument(word, help=help, **how)

    count, minutes = _positive(int), _positive(float)
    there = f"of: {', '.join(operation.operations())} (default: all)"
    option("run tune static counts", "operation", there, nargs="*", metavar="OP")
    option("report", "folder", "default: every folder in bench/results", nargs="*", type=Path, metavar="DIR")
    option("run tune host static counts", "--case", "only cases whose name contains this; repeatable", action="append")
    only = "only this type, such as bfloat16 or 'float32 tf32'; repeatable"
    option("run tune static", "--dtype", only, action="append")
    option("run tune all host", "--smoke", "walk through on a CPU with tiny shapes", action="store_true")
    option("run tune all", "--out", "folder for the results (smoke: a temporary one)", type=Path, metavar="DIR")
    option("host static counts", "--json", "write what was found", type=Path, metavar="FILE")
    option("run", "--first", "only the first N of these, the most valuable", type=count, metavar="N")
    option("run", "--missing", "only what the results lack of the present code", action="store_true")
    without = "leave torch.compile out: it takes most of the time"
    option("run", "--no-compile", without, action="store_false", dest="compile")
    budget = "stop after so long, in equal shares of the operations (default: when all is done)"
    option("tune", "--budget", budget, type=minutes, metavar="MINUTES")
    option(
        "all",
        "--budget",
        "it ends within (default: %(default)g)",
        type=minutes,
        default=60.0,
        metavar="MINUTES",
    )
    option("all", "--only", "only steps whose name contains this; repeatable", action="append", metavar="STEP")
    option("static", "--target", "only this GPU; repeatable", action="append", choices=list(ARCHS))
    option("static", "--all", "every type at every shape; several minutes", action="store_true")
    model = "predict the time of what `run` measures (default target: sm_90)"
    option("static", "--model", model, action="store_true")
    option("static", "--jobs", f"processes (default: {Options.jobs})", type=count)
    target = "the GPU (default: sm_90)"
    option("counts", "--target", target, nargs=1, default=["sm_90"], choices=["sm_80", "sm_90"])
    option("counts", "--direction", "only this one; repeatable", action="append")
    option("counts", "--programs", f"executed of each launch (default: {Options.programs})", type=count)
    option("counts", "--worst", "list so many memory instructions that waste most", type=int)
    return main.parse_args(arguments, Options())


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
        return value

    return number


def main(arguments: list[str] | None = None) -> int:
    """The exit status: of the command; 2 for what cannot be done, 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        return _perform(options)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _perform(options: Options) -> int:
    """What each command needs is asked for before its module is imported."""
    name = options.command
    operation.find(options.operation)
    if options.json and not options.json.parent.is_dir():
        raise ValueError(f"{options.json} cannot be written: there is no folder {options.json.parent}")
    if name in ("run", "tune", "all") and not options.smoke and not torch.cuda.is_available():
        raise ValueError(f"{name} needs CUDA, and torch finds no GPU here (--smoke walks through it on a CPU)")
    if name == "tune" and options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    if name in ("tune", "static", "counts") and not dispatch.has_triton():
        raise ValueError(f"{name} needs triton, which is not installed: pip install triton")
    if name in ("static", "counts") and dispatch.interpreting():
        raise ValueError(f"{name} compiles, and under TRITON_INTERPRET=1 nothing can be: unset it")
    module = {"static": "model.predict" if options.model else "compile"}.get(name, name)
    return int(importlib.import_module(f".{module}", __package__).main(options))


if __name__ == "__main__":
    raise SystemExit(main())
