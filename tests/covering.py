"""Which combinations of many options are tested every time, and which under `-m slow`."""

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import pytest
import torch
from _pytest.mark import ParameterSet

T = TypeVar("T")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def turn(choices: Sequence[T], *values: object) -> T:
    """One of the choices for each combination of values, every one having its turn: what makes a cover pairwise."""
    return choices[zlib.crc32(repr(values).encode()) % len(choices)]


def name(value: object) -> str:
    return getattr(value, "__name__", str(value))


def cover(*axes: Iterable[object], quick: Callable[..., bool]) -> list[ParameterSet]:
    """The product of all axes; what is not `quick` runs under `-m slow`."""
    return [
        pytest.param(*values, marks=() if quick(*values) else pytest.mark.slow, id="-".join(map(name, values)))
        for values in itertools.product(*axes)
    ]
