"""The command line: `python -m bench`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tribp import dispatch
from tribp.launch.arch import ARCHS

from . import operation

DESCRIPTION = """\
Measures tribp, from a checkout of its repository.

  python -m bench run              every operation against torch, on a CUDA GPU
  python -m bench run linear --dtype bfloat16 --case 8192x1024x1024
  python -m bench run conv --case 64x64-64x56x56 --dtype bfloat16
  python -m bench run optim --case Adam --dtype float32
  python -m bench run --smoke      the same walk on a CPU with tiny shapes; its times mean nothing
  python -m bench all --budget 60 --out found   everything a GPU is wanted for, unattended; again: goes on
  python -m bench report found     the page and the pictures of stored results; no GPU needed
  python -m bench tune             the configs beside every heuristic's choice, on a CUDA GPU
  python -m bench tune linear --dtype bfloat16 --budget 20
  python -m bench host             what an optimizer's step costs the host; no GPU needed
  python -m bench static           every kernel compiled for every target and its machine code checked; no GPU needed
  python -m bench static --target sm_90 --dtype bfloat16 --json found.json
  python -m bench counts conv --target sm_80  cycles that each unit needs, counted where compiled code is executed
  python -m bench static --model linear       the time that a model of the GPU predicts from the machine code
"""


EACH: dict[str, dict[str, Any]] = {  # what an option means in every command that has it
    "--case": dict(action="append", default=[], help="only cases whose name contains this; repeatable"),
    "--dtype": dict(action="append", default=[], help="only this type, such as bfloat16 or 'float32 tf32'; repeatable"),
    "--smoke": dict(action="store_true", help="walk through on a CPU with tiny shapes"),
    "--out": dict(type=Path, metavar="DIR", help="folder for the results (smoke: a temporary one)"),
    "--json": dict(default="", metavar="FILE", help="write what was found"),
}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str, *options: str, operations: bool = True) -> Any:
        added = commands.add_parser(name, help=help, description=description)
        if operations:
            names = ", ".join(operation.names())
            added.add_argument("operation", nargs="*", metavar="OP", help=f"of: {names} (default: all)")
        for option in options:
            added.add_argument(option, **EACH[option])
        return added.add_argument

    option = command(
        "run",
        "check and time operations on a CUDA GPU",
        "Checks every result against float64, times what is right, and writes bench/results/<gpu>/<op>.json and .md "
        "after each case, and with matplotlib a .png. Exits with 1 if a result is wrong, with 2 without CUDA.",
        "--case", "--dtype", "--smoke", "--out",
    )  # fmt: skip
    option("--first", type=_count, metavar="N", help="only the first N of these, the most valuable")
    option("--missing", action="store_true", help="only what the results lack of the present code")
    option("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    option("--no-picture", action="store_true", help="leave the picture to `report`")

    option = command(
        "tune",
        "time the configs beside every heuristic's choice on a CUDA GPU",
        "Of every problem in a case: times the heuristic's config and those one step away, goes on from the fastest, "
        "and checks every result against float64. Writes bench/results/<gpu>/tune-<op>.json after every config; a "
        "second run goes on where the first stopped. Exits with 1 if a heuristic's choice is wrong, with 2 without "
        "CUDA.",
        "--case", "--dtype", "--smoke", "--out",
    )  # fmt: skip
    budget = "stop after so long, in equal shares of the operations (default: when all is done)"
    option("--budget", type=_minutes, metavar="MINUTES", help=budget)

    option = command(
        "all",
        "everything a GPU is wanted for, unattended, within a budget of time",
        "GPU tests, measurements, compute-sanitizer where it is installed, torch.compile beside them, tuning of launch "
        "configs, and the long tail of cases: the most valuable first, each step in a process of its own. What was "
        "found is in DIR at once: steps.json, log.txt, <op>.json. With the same DIR it goes on: what is done is not "
        "done again, what failed only with other code. Writes the report and a table of the steps last. Exits with 1 "
        "if a step failed, with 2 without CUDA.",
        "--out", "--smoke",
        operations=False,
    )  # fmt: skip
    option("--budget", type=_minutes, default=60.0, metavar="MINUTES", help="it ends within (default: %(default)g)")
    only = "only steps whose name contains this; repeatable"
    option("--only", action="append", default=[], metavar="STEP", help=only)

    option = command(
        "report",
        "the page and the pictures of stored results; no GPU needed",
        "Writes DIR/README.md (every target with what was measured, the missed first; the tables) and, with "
        "matplotlib, pictures, from the JSON in DIR alone. Without any results it prints the targets.",
        operations=False,
    )
    option("folder", nargs="*", type=Path, metavar="DIR", help="default: every folder in bench/results")

    option = command(
        "host",
        "what an optimizer's step costs the host; no GPU needed",
        "Times tribp's launch plan without the launch beside the bookkeeping of torch's fused Adam, and the step of "
        "CPU tensors beside torch's default one, in turns. Load on the machine falsifies it.",
        "--case", "--smoke", "--json",
        operations=False,
    )  # fmt: skip
    option("--rounds", type=int, default=15, help="samples of each provider (default: %(default)s)")

    option = command(
        "static",
        "compile every kernel for every target and check the machine code; no GPU needed",
        "Prints registers, spills, shared memory and instruction counts of every kernel, and what breaks an "
        "expectation: spills, missing matrix instructions, loads that are not pipelined, narrow stores, and on sm_90 "
        "products whose operands are overwritten while they run, or that wait for one another. Exits with 1 if "
        "anything does.",
        "--dtype", "--json",
    )  # fmt: skip
    option("--target", action="append", choices=list(ARCHS), default=[], help="only this GPU; repeatable")
    option("--all", action="store_true", help="every type at every shape; several minutes")
    option("--model", action="store_true", help="predict the time of what `run` measures (default target: sm_90)")
    option("--case", action="append", default=[], help="with --model: as in `run`")
    option("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)")

    option = command(
        "counts",
        "execute some programs of every kernel, and count what they cost each unit; no GPU needed",
        "Prints, for every launch of a case, the cycles of a multiprocessor that one program needs of its tensor "
        "cores, of shared memory, of its schedulers and of L2, beside the least that L2 could take; what binds, and "
        "how many times what tensor cores (or memory at its best) need. Exits with 1 if a kernel does what no order "
        "of events may do.",
        "--case", "--json",
    )  # fmt: skip
    option("--target", default="sm_90", choices=["sm_80", "sm_90"])
    option("--direction", action="append", default=[], help="only this one; repeatable")
    option("--programs", type=_count, default=4, help="executed of each launch (default: %(default)s)")
    option("--worst", type=int, default=0, help="list so many memory instructions that waste most")
    return main


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, got {text}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be minutes, more than 0, got {text}")
    return number


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        return COMMANDS[given.command](given)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    from . import run

    options = run.Options(
        given.case, given.dtype, given.smoke, compile=not given.no_compile, first=given.first,
        missing=given.missing, picture=not given.no_picture, out=given.out,
    )  # fmt: skip
    return run.main(operation.find(given.operation), options)


def _tune(given: argparse.Namespace) -> int:
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    _need_triton(given)
    from . import run, tune

    options = run.Options(given.case, given.dtype, given.smoke, out=given.out)
    return tune.main(operation.find(given.operation), options, given.budget)


def _all(given: argparse.Namespace) -> int:
    from . import all

    return all.main(given.budget, given.out, given.only, given.smoke)


def _report(given: argparse.Namespace) -> int:
    from . import report

    return report.main(given.folder)


def _host(given: argparse.Namespace) -> int:
    from . import host

    return host.main(given.case, rounds=given.rounds, smoke=given.smoke, file=given.json)


def _static(given: argparse.Namespace) -> int:
    names = [chosen.name for chosen in operation.find(given.operation)]
    _need_triton(given, compiler=True)
    if given.model:
        from .model import predict

        targets = given.target or ["sm_90"]
        selections = [predict.Selection(tuple(names), t, tuple(given.dtype), tuple(given.case)) for t in targets]
        return predict.main(selections, jobs=given.jobs, file=given.json)
    from . import compile

    targets = given.target or list(ARCHS)
    return compile.main(names, targets, given.dtype, everything=given.all, jobs=given.jobs, file=given.json)


def _counts(given: argparse.Namespace) -> int:
    operations = operation.find(given.operation)
    _need_triton(given, compiler=True)
    from . import counts

    options = counts.Options(given.target, given.case, given.direction, given.programs, given.worst, given.json)
    return counts.main(operations, options)


def _need_triton(given: argparse.Namespace, compiler: bool = False) -> None:
    if not dispatch.has_triton():
        raise ValueError(f"{given.command} needs triton, which is not installed: pip install triton")
    if compiler and dispatch.interpreting():
        raise ValueError(f"{given.command} compiles, and under TRITON_INTERPRET=1 nothing can be: unset it")


COMMANDS = {
    "run": _run, "tune": _tune, "all": _all, "report": _report, "host": _host, "static": _static, "counts": _counts,
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
