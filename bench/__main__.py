"""The command line: `python -m bench`."""

import argparse
import os
import sys
from pathlib import Path

from tribp import runtime
from tribp.kernels.launch import ARCHS

from . import registry

DESCRIPTION = """\
Measures tribp, from a checkout of its repository.

  python -m bench run              every operation against torch, on a CUDA GPU
  python -m bench run linear --dtype bfloat16 --case 8192x1024x1024
  python -m bench run conv --case 64x64-64x56x56 --dtype bfloat16
  python -m bench run optim --case Adam --dtype float32
  python -m bench run --smoke      the same walk on a CPU with tiny shapes; its times mean nothing
  python -m bench sweep            the launch settings around every rule's choice, on a CUDA GPU
  python -m bench sweep linear --dtype bfloat16 --budget 20
  python -m bench host             what an optimizer's step costs the host; no GPU needed
  python -m bench static           every kernel compiled for every target and its machine code checked; no GPU needed
  python -m bench static --target sm_90 --dtype bfloat16 --json found.json
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
    run.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")

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
        type=float,
        metavar="MINUTES",
        help="stop after so long, in equal shares of the operations (default: when all is done)",
    )

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
        "an expectation: spills, missing matrix instructions, loads that are not pipelined, narrow stores. Exits with "
        "1 if anything does.",
    )
    _operations(static)
    static.add_argument("--target", action="append", choices=list(ARCHS), default=[], help="only this GPU; repeatable")
    static.add_argument("--dtype", action="append", default=[], help="only this type, such as bfloat16; repeatable")
    static.add_argument("--all", action="store_true", help="every type at every shape; several minutes")
    static.add_argument("--json", default="", metavar="FILE", help="write what was found")
    static.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    return main


def _selection(command: argparse.ArgumentParser) -> None:
    _operations(command)
    command.add_argument("--case", action="append", default=[], help="only cases whose name contains this; repeatable")
    command.add_argument(
        "--dtype", action="append", default=[], help="only this type, such as bfloat16 or 'float32 tf32'"
    )
    command.add_argument("--smoke", action="store_true", help="walk through on a CPU with tiny shapes")
    command.add_argument("--out", type=Path, help="folder for the results (smoke: a temporary one)")


def _operations(command: argparse.ArgumentParser) -> None:
    names = ", ".join(registry.names())
    command.add_argument(
        "operation", nargs="*", metavar="OP", help=f"operations to measure, of: {names} (default: all)"
    )


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        if given.command == "host":
            # Before kernels are imported: only the interpreter's plan for CPU tensors.
            os.environ["TRITON_INTERPRET"] = "1"
            from . import host

            return host.main(given.case, rounds=given.rounds, smoke=given.smoke, file=given.json)
        if given.command == "sweep" and given.smoke:
            os.environ["TRITON_INTERPRET"] = "1"  # likewise
        operations = registry.find(given.operation)
        if given.command == "static":
            if not runtime.has_triton():
                raise ValueError("static compiles with triton, which is not installed: pip install triton")
            from . import static

            return static.main(
                [operation.name for operation in operations],
                given.target or list(ARCHS),
                given.dtype,
                everything=given.all,
                jobs=given.jobs,
                file=given.json,
            )
        if given.command == "sweep":
            from . import run, sweep

            return sweep.main(
                operations, run.Options(given.case, given.dtype, given.smoke, out=given.out), given.budget
            )
        from . import run

        options = run.Options(given.case, given.dtype, given.smoke, not given.no_compile, given.out)
        return run.main(operations, options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
