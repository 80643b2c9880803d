"""What the executed cases of the optimizers cover."""

import itertools
from typing import Any

import pytest

from . import executed_cases as executed
from .cases import COMMON, DTYPES, VARIANTS, title


def rows(cases: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of every rule's case and each of its layouts: the variant, the type, the common options, the layout."""
    return [
        (title((case.name, case.own)), case.dtype, common, layout)
        for case in cases.values()
        if isinstance(case, executed.Rule)
        for common, layout in zip(case.common(), case.layouts, strict=True)
    ]


def pairs(of: list[tuple[Any, ...]], a: int, b: int) -> set[tuple[Any, Any]]:
    return {(row[a], row[b]) for row in of}


def test_every_pair_of_layouts_and_common_options_is_executed_by_default() -> None:
    met = rows(executed.QUICK_ON_HOPPER)
    assert pairs(met, 2, 3) == set(itertools.product(COMMON, executed.SHAPES))


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(range(4), 2)))
def test_every_pair_is_executed(a: int, b: int) -> None:
    axes: list[list[Any]] = [list(map(title, VARIANTS)), DTYPES, COMMON, list(executed.SHAPES)]
    assert set(itertools.product(axes[a], axes[b])) <= pairs(rows(executed.SLOW), a, b)
