"""The command line: `python -m bench`."""

import argparse
import dataclasses
import importlib
import os
import sys

import torch

from tribp import dispatch

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
    main = argparse.ArgumentParser(
        prog="python -m bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=line, description=text, argument_default=argparse.SUPPRESS)
        for name, (line, text) in COMMANDS.items()
    }
    for field in dataclasses.fields(Options):
        how = dict(field.metadata)
        word = how.pop("word", "") or f"--{field.name}"
        for name in how.pop("commands", ()):
            parsers[name].add_argument(word, **how)
    return main.parse_args(arguments, Options())


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
