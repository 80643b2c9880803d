"""python -m tests.executor --target sm_90 SCRIPT [ARGUMENTS …]: a script's CPU tensors run on the executed GPU.

Prints a line a kernel, and every problem. The exit status is the script's, or 1 if there was a problem.
"""

import argparse
import importlib.util
import os
import runpy
import sys
from pathlib import Path

TARGETS = ("sm_80", "sm_90")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.executor", description=__doc__)
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--copies", default="late", choices=["late", "early"], help="when asynchronous copies land")
    parser.add_argument("--schedule", default="lockstep", choices=["lockstep", "random"], help="of warps")
    parser.add_argument("--order", default="forward", choices=["forward", "backward", "random"], help="of programs")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def status_of(stop: SystemExit) -> int:
    """The exit status that Python would give: a sentence is printed, and means 1."""
    if stop.code is None or isinstance(stop.code, int):
        return int(stop.code or 0)
    print(stop.code, file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    parser = options()
    given = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed, and compiles the kernels: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("under TRITON_INTERPRET=1 Triton compiles nothing: unset it")
    if not given.script.is_file():
        parser.error(f"no such script: {given.script}")
    from . import executed

    settings = dict(copies=given.copies, schedule=given.schedule, order=given.order, seed=given.seed)
    before, sys.argv = sys.argv, [str(given.script), *given.arguments]
    sys.path.insert(0, str(given.script.resolve().parent))
    status = 0
    with executed(given.target, **settings) as report:
        try:
            runpy.run_path(str(given.script), run_name="__main__")
        except SystemExit as stop:
            status = status_of(stop)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        finally:
            sys.argv = before
            sys.path.pop(0)
    print(report.table())
    for problem in report.problems:
        print("PROBLEM", problem)
    return status or int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
