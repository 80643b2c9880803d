"""python -m tests.executor --target sm_90 SCRIPT [ARGUMENTS …]: a script's CPU tensors run on the executed GPU.

Prints a line a kernel, and every problem. The exit status is the script's, or 1 if there was a problem.
"""

import argparse
import runpy
import sys
import traceback
from pathlib import Path

from .machine import CHOICES
from .run import TARGETS, executed, why_not


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.executor", description=__doc__)
    parser.add_argument("--target", required=True, choices=TARGETS)
    for name, (choices, says) in CHOICES.items():
        parser.add_argument(f"--{name}", default=choices[0], choices=choices, help=says)
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def run_script(script: Path, arguments: list[str]) -> int:
    """Run it as Python would; the exit status."""
    before, sys.argv = sys.argv, [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return int(stop.code or 0)
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
        sys.path.pop(0)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = options()
    given = parser.parse_args(argv)
    if why := why_not():
        parser.error(why)
    if not given.script.is_file():
        parser.error(f"no such script: {given.script}")
    settings = {name: getattr(given, name) for name in (*CHOICES, "seed")}
    with executed(given.target, **settings) as report:
        status = run_script(given.script, given.arguments)
    print(report.table() if report.launches else "no kernel was launched")
    for problem in report.problems:
        print("PROBLEM", problem)
    return status or int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
