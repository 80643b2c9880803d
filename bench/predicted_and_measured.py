"""The model's error: predictions beside what `python -m bench run` measured and wrote."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from . import registry, results
from .registry import Named
from .tables import markdown


class Predicted(Protocol):
    @property
    def operation(self) -> str: ...

    @property
    def case(self) -> Named: ...

    @property
    def direction(self) -> str: ...

    @property
    def us(self) -> float: ...


Measured = Mapping[tuple[str, str], float]  # median µs on the device, by case and direction


def files(machine: str, given: Path | None) -> list[Path]:
    """A file, or what `bench run` wrote into a folder; without one given, into those of this machine."""
    if given is not None and not given.is_dir():
        return [given]
    of_machine = (p for p in results.ROOT.glob("*/") if machine.split()[0].lower() in p.name.lower())
    folders = sorted(of_machine) if given is None else [given]
    return [path for folder in folders for name in registry.names() if (path := folder / f"{name}.json").exists()]


def read(paths: Iterable[Path]) -> Measured:
    found: dict[tuple[str, str], float] = {}
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            time = row["contenders"].get("tribp", {}).get("device_us", {}).get("median")
            if time:
                found[row["case"], row.get("direction", "step")] = float(time)
    return found


def report(predicted: Sequence[Predicted], machine: str, given: Path | None = None) -> str:
    """A table of predicted and measured times, then the ratio's median and spread; nothing where nothing is measured.

    The spread is the factor that two thirds of the ratios are within of their geometric mean: e to the standard
    deviation of their logarithms.
    """
    measured = read(files(machine, given))
    pairs = [(p, measured[p.case.name, p.direction]) for p in predicted if (p.case.name, p.direction) in measured]
    pairs = [(p, time) for p, time in pairs if p.us]
    if not pairs:
        return ""
    ratios = [time / p.us for p, time in pairs]
    table = markdown(
        ["case", "direction", "predicted µs", "measured µs", "measured / predicted"],
        [
            [p.case.name, p.direction, f"{p.us:.1f}", f"{time:.1f}", f"{ratio:.2f}x"]
            for (p, time), ratio in zip(pairs, ratios, strict=True)
        ],
    )
    spread = math.exp(statistics.pstdev([math.log(ratio) for ratio in ratios]))
    found = f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, spread ×{spread:.2f}"
    return f"{table}\n\nMeasured over predicted, {len(ratios)} of {len(predicted)}: {found}"
