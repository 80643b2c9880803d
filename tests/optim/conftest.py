"""Half of the classes stand for all where tests of what they share are interpreted; `-m slow` has the rest."""

from pathlib import Path

import pytest

from ..conftest import HAS_GPU
from .cases import CLASSES

# No state at first, one made at construction, two, one that is a number, one without a rate, three of every kind.
STANDING = {"SGD", "Adagrad", "Adam", "NAdam", "Rprop", "ASGD"}


@pytest.hookimpl(tryfirst=True)  # before the choice by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_GPU or item.path.parent != Path(__file__).parent or not isinstance(item, pytest.Function):
            continue
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        if chosen.get("device") == "triton" and chosen.get("name") in {*CLASSES} - STANDING:
            item.add_marker(pytest.mark.slow)
