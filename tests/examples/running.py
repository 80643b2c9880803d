"""How the tests run an example, and read what it prints."""

import contextlib
import io
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def run(name: str) -> str:
    """What the file prints when Python runs it, in this process: importing torch anew would take seconds for each."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return out.getvalue()


def numbers(out: str, name: str) -> list[float]:
    """Those of the lines that begin with `name`, and of the further rows below such a line."""
    lines = re.findall(rf"^( *){re.escape(name)}(?:: |  )(.*\n(?:\1 {{9,}}.*\n)*)", out, re.MULTILINE)
    assert lines, f"{name} is not printed:\n{out}"
    return [float(number) for _, line in lines for number in NUMBER.findall(line)]
