"""What tests of several commands share: Python without the interpreter, and machine code by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.sass import Instruction, parse_sass

ROOT = Path(__file__).parents[2]


def python(*words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run Python with the compiler in place of the interpreter that the other tests use."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, **options)


def called(function: str) -> Any:
    """What a function of a test's module returns there: `test_static.plant`."""
    module, _, name = function.partition(".")
    code = f"import json; from tests.bench.{module} import {name} as call; print(json.dumps(call()))"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sass(*instructions: str) -> list[Instruction]:
    """Instructions at addresses 0, 0x10, … as nvdisasm prints them; `{n}` is the address of the n-th, from 0 on."""
    addresses = [f"0x{16 * n:x}" for n in range(len(instructions) + 1)]
    lines = [f"        /*{16 * n:04x}*/  {text.format(*addresses)} ;" for n, text in enumerate(instructions)]
    (code,) = parse_sass("\n".join(lines), [16 * len(lines)])
    return code
