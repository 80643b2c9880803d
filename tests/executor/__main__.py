"""python -m ptx ops linear|conv|optim [--cases N] [--target sm_80] …: differential cases on the executed GPU.

Run it with a tribp checkout as the current directory and the folder of this package on PYTHONPATH. The last line is
`N passed, N failed`; the exit status is 1 if anything failed or the kernels did what compute-sanitizer would report.
"""

import argparse
import os
import runpy
import sys
import time
from pathlib import Path

CASES = Path(__file__).with_name("op_cases.py")


def main() -> int:
    parser = argparse.ArgumentParser(prog="ptx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="differential cases, random shapes and layouts")
    ops.add_argument("operation", choices=["linear", "conv", "optim"])
    ops.add_argument("--cases", type=int, default=60)
    ops.add_argument("--seed", type=int, default=20261123)
    ops.add_argument("--target", default="sm_80")
    ops.add_argument("--copies", default="late", choices=["late", "early"])
    ops.add_argument("--schedule", default="lockstep", choices=["lockstep", "random"])
    ops.add_argument("--order", default="forward", choices=["forward", "backward", "random"])
    ops.add_argument("--tf32", action="store_true", help="leave torch's default: convolutions may round to TF32")
    ops.add_argument("--details", action="store_true")
    ops.add_argument("-v", action="store_true")
    count = commands.add_parser("counts", help="what the benchmarks' cases cost: instructions, sectors, bank conflicts")
    count.add_argument("operation", choices=["linear", "conv"])
    count.add_argument("--target", default="sm_80")
    count.add_argument("--case", default="", help="a part of the case's name")
    count.add_argument("--direction", action="append", default=[])
    count.add_argument("--ctas", type=int, default=4, help="of each launch")
    count.add_argument("--worst", type=int, default=8, help="memory instructions to list")
    given = parser.parse_args()

    sys.path.insert(0, os.getcwd())
    if given.command == "counts":
        from . import counts

        counts.main(given.operation, given.target, given.case, given.direction, given.ctas, given.worst)
        return 0
    import torch

    from .run import executed
    from .table import details

    torch.set_num_threads(1)
    if not given.tf32:  # the cases compare with float32's own error
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    started = time.perf_counter()
    with executed(
        given.target, copies=given.copies, schedule=given.schedule, order=given.order, seed=given.seed
    ) as report:
        if given.operation == "optim":
            from .optim_cases import run

            failed = run(given.cases, given.seed, report)
        else:
            argv = sys.argv
            sys.argv = [
                str(CASES),
                given.operation,
                "--backend",
                "triton",
                "--cases",
                str(given.cases),
                "--seed",
                str(given.seed),
            ]
            sys.argv += ["-v"] if given.v else []
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                failed = False
            except SystemExit as stop:
                failed = bool(stop.code)
            finally:
                sys.argv = argv
    print(report.table())
    if given.details:
        for counts in report.launches:
            print(details(counts))
    for problem in report.problems:
        print("PROBLEM", problem)
    seconds = sum(c.seconds for c in report.launches)
    print(
        f"{len(report.launches)} launches, {seconds:.0f} s of emulation in {time.perf_counter() - started:.0f} s, {len(report.problems)} problems"
    )
    return int(failed or bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
