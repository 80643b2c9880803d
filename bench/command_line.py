"""The command line of `python -m bench`."""

import argparse
import ast
import dataclasses
import importlib
import os
import tempfile
from pathlib import Path

import torch

from tribp import dispatch

from . import operation
from .options import Options
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
    for field in dataclasses.fields(Options):
        how = dict(field.metadata)
        word = how.pop("word", "") or f"--{field.name}"
        for name in how.pop("commands", ()):
            choices = how.get("choices")
            own = {"choices": choices[name]} if isinstance(choices, dict) else {}
            parsers[name].add_argument(word, **how | own)
    return main.parse_args(arguments, Options())


def perform(arguments: list[str] | None) -> int:
    """The exit status. What each command needs is asked for before its module is imported."""
    options = parse(arguments)
    name = options.command
    operation.find(options.operation)
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
