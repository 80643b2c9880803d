"""The command line: `python -m bench`."""

import argparse
import os
import sys
from pathlib import Path

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
  python -m bench sweep            the launch settings around every rule's choice, on a CUDA GPU
  python -m bench sweep linear --dtype bfloat16 --budget 20
  python -m bench host             what an optimizer's step costs the host; no GPU needed
  python -m bench static           every kernel compiled for every target and its machine code checked; no GPU needed
  python -m bench static --target sm_90 --dtype bfloat16 --json found.json
  python -m bench counts conv --target sm_80  cycles that each unit needs, counted where compiled code is executed
  python -m bench static --model linear       the time that a model of the GPU predicts from the machine code
"""


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="check and time operations on a CUDA GPU",
        description="Checks every result against float64, times what is right, and writes "
        "bench/results/<gpu>/<op>.json and .md after each case, and with matplotlib a .png. Exits with 1 if a result "
        "is wrong, with 2 without CUDA.",
    )
    _selection(run)
    run.add_argument("--first", type=_count, metavar="N", help="only the first N of these, the most valuable")
    run.add_argument("--missing", action="store_true", help="only what the results lack of the present code")
    run.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    run.add_argument("--no-picture", action="store_true", help="leave the picture to `report`")

    sweep = commands.add_parser(
        "sweep",
        help="time the launch settings around every rule's choice on a CUDA GPU",
        description="Of every rule that a case asks: times its choice and what is one step away, goes on from the "
        "fastest, and checks every result against float64. Writes bench/results/<gpu>/sweep-<op>.json after every "
        "variant; a second run goes on where the first stopped. Exits with 1 if a rule's own choice is wrong, with 2 "
        "without CUDA.",
    )
    _selection(sweep)
    sweep.add_argument(
        "--budget",
        type=_minutes,
        metavar="MINUTES",
        help="stop after so long, in equal shares of the operations (default: when all is done)",
    )

    everything = commands.add_parser(
        "all",
        help="everything a GPU is wanted for, unattended, within a budget of time",
        description="GPU tests, measurements, compute-sanitizer where it is installed, torch.compile beside them, "
        "sweeps of launch settings, and the long tail of cases: the most valuable first, each step in a process of its "
        "own. What was found is in DIR at once: steps.json, log.txt, <op>.json. With the same DIR it goes on: what is "
        "done is not done again, what failed only with other code. Writes the report and a table of the steps last. "
        "Exits with 1 if a step failed, with 2 without CUDA.",
    )
    everything.add_argument(
        "--budget", type=_minutes, default=60.0, metavar="MINUTES", help="it ends within (default: %(default)g)"
    )
    everything.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (smoke: a temporary one)")
    everything.add_argument(
        "--only", action="append", default=[], metavar="STEP", help="only steps whose name contains this; repeatable"
    )
    everything.add_argument("--smoke", action="store_true", help="walk through on a CPU with tiny shapes")

    report = commands.add_parser(
        "report",
        help="the page and the pictures of stored results; no GPU needed",
        description="Writes DIR/README.md (every target with what was measured, the missed first; the tables) and, "
        "with matplotlib, pictures, from the JSON in DIR alone. Without any results it prints the targets.",
    )
    report.add_argument("folder", nargs="*", type=Path, metavar="DIR", help="default: every folder in bench/results")

    host = commands.add_parser(
        "host",
        help="what an optimizer's step costs the host; no GPU needed",
        description="Times tribp's launch plan without the launch beside the bookkeeping of torch's fused Adam, and "
        "the step of CPU tensors beside torch's default one, in turns. Load on the machine falsifies it.",
    )
    host.add_argument("--case", action="append", default=[], help="only cases whose name contains this; repeatable")
    host.add_argument("--rounds", type=int, default=15, help="samples of each contender (default: %(default)s)")
    host.add_argument("--smoke", action="store_true", help="walk through with tiny sizes")
    host.add_argument("--json", default="", metavar="FILE", help="write what was found")

    static = commands.add_parser(
        "static",
        help="compile every kernel for every target and check the machine code; no GPU needed",
        description="Prints registers, spills, shared memory and instruction counts of every kernel, and what breaks "
        "an expectation: spills, missing matrix instructions, loads that are not pipelined, narrow stores, and on "
        "sm_90 products whose operands are overwritten while they run, or that wait for one another. Exits with 1 if "
        "anything does.",
    )
    _operations(static)
    static.add_argument("--target", action="append", choices=list(ARCHS), default=[], help="only this GPU; repeatable")
    static.add_argument("--dtype", action="append", default=[], help="only this type, such as bfloat16; repeatable")
    static.add_argument("--all", action="store_true", help="every type at every shape; several minutes")
    static.add_argument(
        "--model", action="store_true", help="predict the time of what `run` measures (default target: sm_90)"
    )
    static.add_argument("--case", action="append", default=[], help="with --model: as in `run`")
    static.add_argument("--json", default="", metavar="FILE", help="write what was found")
    static.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )

    counts = commands.add_parser(
        "counts",
        help="execute some programs of every kernel, and count what they cost each unit; no GPU needed",
        description="Prints, for every launch of a case, the cycles of a multiprocessor that one program needs of its "
        "tensor cores, of shared memory, of its schedulers and of L2, beside the least that L2 could take; what binds, "
        "and how many times what tensor cores (or memory at its best) need. Exits with 1 if a kernel does what no "
        "order of events may do.",
    )
    _operations(counts)
    counts.add_argument("--target", default="sm_90", choices=["sm_80", "sm_90"])
    counts.add_argument("--case", action="append", default=[], help="only cases whose name contains this; repeatable")
    counts.add_argument("--direction", action="append", default=[], help="only this one; repeatable")
    counts.add_argument("--programs", type=_count, default=4, help="executed of each launch (default: %(default)s)")
    counts.add_argument("--worst", type=int, default=0, help="list so many memory instructions that waste most")
    counts.add_argument("--json", default="", metavar="FILE", help="write what was found")
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


def _selection(command: argparse.ArgumentParser) -> None:
    _operations(command)
    command.add_argument("--case", action="append", default=[], help="only cases whose name contains this; repeatable")
    command.add_argument(
        "--dtype", action="append", default=[], help="only this type, such as bfloat16 or 'float32 tf32'"
    )
    command.add_argument("--smoke", action="store_true", help="walk through on a CPU with tiny shapes")
    command.add_argument("--out", type=Path, help="folder for the results (smoke: a temporary one)")


def _operations(command: argparse.ArgumentParser) -> None:
    names = ", ".join(operation.names())
    command.add_argument(
        "operation", nargs="*", metavar="OP", help=f"operations to measure, of: {names} (default: all)"
    )


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


def _sweep(given: argparse.Namespace) -> int:
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    operations = operation.find(given.operation)
    _need_triton(given.command)
    from . import run, tune

    return tune.main(operations, run.Options(given.case, given.dtype, given.smoke, out=given.out), given.budget)


def _all(given: argparse.Namespace) -> int:
    from . import all

    return all.main(all.Options(given.budget, given.out, given.only, given.smoke))


def _report(given: argparse.Namespace) -> int:
    from . import report

    return report.main(given.folder)


def _host(given: argparse.Namespace) -> int:
    from . import host

    return host.main(given.case, rounds=given.rounds, smoke=given.smoke, file=given.json)


def _static(given: argparse.Namespace) -> int:
    names = [found.name for found in operation.find(given.operation)]
    _need_triton(given.command)
    _need_compiler("static compiles, and under TRITON_INTERPRET=1 nothing can be")
    if given.model:
        return _model(given, names)
    from . import compile

    targets = given.target or list(ARCHS)
    return compile.main(names, targets, given.dtype, everything=given.all, jobs=given.jobs, file=given.json)


def _model(given: argparse.Namespace, names: list[str]) -> int:
    from .model import predict
    from .model.machines import MACHINES

    for target in given.target or ["sm_90"]:
        if target not in MACHINES:
            raise ValueError(f"there is no model of {target}; there is one of {', '.join(MACHINES)}")
        selection = predict.Selection(tuple(names), target, tuple(given.dtype), tuple(given.case))
        if status := predict.main(selection, jobs=given.jobs, file=given.json):
            return status
    return 0


def _counts(given: argparse.Namespace) -> int:
    operation.find(given.operation)
    _need_triton(given.command)
    _need_compiler("counts executes compiled kernels, and under TRITON_INTERPRET=1 there are none")
    from . import counts

    return counts.main(
        given.operation,
        counts.Options(given.target, given.case, given.direction, given.programs, given.worst, given.json),
    )


def _need_triton(command: str) -> None:
    if not dispatch.has_triton():
        raise ValueError(f"{command} needs triton, which is not installed: pip install triton")


def _need_compiler(reason: str) -> None:
    if dispatch.interpreting():
        raise ValueError(f"{reason}: unset it")


COMMANDS = {
    "run": _run, "sweep": _sweep, "all": _all, "report": _report, "host": _host, "static": _static, "counts": _counts,
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
