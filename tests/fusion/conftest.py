"""On the CPU torch computes modules one by one. Tests of rows have them computed there, too, as they are on a GPU."""

import pytest

from tribp.fusion import rows


@pytest.fixture(autouse=True)
def rows_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.module.__name__.endswith("test_by_torch"):
        monkeypatch.setattr(rows, "_on_cpu", lambda input: False)
