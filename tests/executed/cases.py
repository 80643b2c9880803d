"""All cases that the executor runs, of every operation: those of `executed_cases.py` in a folder of tests.

QUICK: what every run of the tests executes. Shapes are small, and take the code of large ones.
QUICK_ON_HOPPER: what every run executes for sm_90 and only `-m slow` for sm_80, where these launch no form that those
do not, or are steps of optimizers, of which QUICK has one. `test_every_form_was_executed` holds both lists to what they
are for.
SLOW: what `-m slow` adds: the same ways of the kernels in other types and sizes. RANDOM: what draws a case.
"""

import importlib
import random
from collections.abc import Callable
from pathlib import Path

from .checks import Case

QUICK: dict[str, Case] = {}
QUICK_ON_HOPPER: dict[str, Case] = {}
SLOW: dict[str, Case] = {}
RANDOM: dict[str, Callable[[random.Random], Case]] = {}

for file in sorted(Path(__file__).parents[1].glob("*/executed_cases.py")):
    own = importlib.import_module(f"tests.{file.parent.name}.executed_cases")
    QUICK |= getattr(own, "QUICK", {})
    QUICK_ON_HOPPER |= getattr(own, "QUICK_ON_HOPPER", {})
    SLOW |= getattr(own, "SLOW", {})
    RANDOM |= getattr(own, "RANDOM", {})
