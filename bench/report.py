"""`python -m bench report`: the page and the pictures of stored results; no GPU needed.

Writes DIR/README.md (every target with what was measured, the missed first; the tables) and, with matplotlib, pictures,
from the JSON in DIR alone. Without any results it prints the targets.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import host, operation, pictures, results
from .operation import Operation
from .options import Options
from .results import Row, markdown

Stored = Mapping[str, dict[str, Any]]  # what each operation's JSON holds, by the operation's name
ORDER = ("missed", "unmeasured", "met")
MADE_BY = "Made by `python -m bench report` from the JSON beside it."  # says that a page may be written anew


class Goal(NamedTuple):
    """A target, and what became of it: a line of the table."""

    operation: str
    case: str
    target: str
    measured: str
    verdict: str


def main(options: Options) -> int:
    """Write the page of every folder; without any folder, print the page of no results. 0."""
    for folder in options.folder:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    folders = options.folder or [folder for folder in sorted(results.ROOT.glob("*/")) if load(folder)]
    for folder in folders:
        print(write(folder))
    if not folders:
        print(f"nothing is measured yet\n\n{targets({})}")
    return 0


def write(folder: Path) -> str:
    """The folder's page and, with matplotlib, its pictures: each operation's bars against the peers and roofline.

    Returns where the page is, and how the targets stand.
    """
    stored, file = load(folder), folder / "README.md"
    if file.exists() and MADE_BY not in file.read_text(encoding="utf-8"):
        raise ValueError(f"{file} was not written by `bench report`: move it, or give another folder")
    for entry in operation.find():
        if held := stored.get(entry.name):
            heading, ceilings = results.heading(held), (held["copy_bytes_per_second"], held["operations_per_second"])
            pictures.bars(folder / f"{entry.name}.png", heading, held["rows"], entry.peers)
            pictures.roofline(folder / f"roofline-{entry.name}.png", heading, held["rows"], *ceilings)
    results.write(file, page(folder, stored))
    return f"{file}\n{summary(goals(stored))}"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    keys = dict.fromkeys(operation.operations(), results.KEYS) | {"host": host.KEYS}
    files = {name: folder / f"{name}.json" for name in keys}
    return {name: results.read_json(file, keys[name]) for name, file in files.items() if file.exists()}


# -- targets ----------------------------------------------------------------------------------------------------------


def goals(stored: Stored) -> list[Goal]:
    """All targets that were set, measured or not: the missed first, then what is unmeasured."""
    everything = {entry.name: results.unmeasured(entry) for entry in operation.find()} | {"host": host.unmeasured()}
    judged = []
    for name, rows in everything.items():
        held = stored.get(name, {"rows": [], "commit": ""})
        measured = {(place(row), t["target"]): (row, t) for row in held["rows"] for t in row["targets"]}
        for row in rows:
            for target in row["targets"]:
                measurement, target = measured.get((place(row), target["target"]), (row, target))
                status = measurement.get("providers", {}).get("tribp", {}).get("status")
                value = status if status in ("wrong", "failed") else figure(target)
                value += earlier(measurement, held)
                judged.append(Goal(name, place(row), target["target"], value, target["verdict"]))
    return sorted(judged, key=lambda goal: ORDER.index(goal.verdict))


def earlier(row: Row, head: Row) -> str:
    """The row's commit and versions where they are not those of the latest rows; "" for these."""
    commit = row.get("commit", head["commit"])
    others = [f"{name} {held}" for name, held in row.get("versions", {}).items() if held != head["versions"].get(name)]
    return (f" at {commit}" if commit != head["commit"] else "") + (f" with {', '.join(others)}" if others else "")


def place(row: Row) -> str:
    return f"{row['case']} {row.get('direction', '')}".strip()


def figure(target: Row) -> str:
    """Four digits: what just misses must not look as if it met."""
    value = target["ratio"]
    if value is None:
        return "–"
    if "%" in target["target"]:
        return f"{value:.1%}"
    return f"{value:g}" if "launches" in target["target"] else f"{value:.4g}x"


def targets(stored: Stored) -> str:
    everything = goals(stored)
    legend = "Ratios are the other's time over tribp's, or memory, unless the target names its own."
    return f"{summary(everything)} {legend}\n\n{markdown(Goal._fields, everything)}"


def summary(everything: Sequence[Goal]) -> str:
    counts = Counter(goal.verdict for goal in everything)
    return f"{len(everything)} targets: {', '.join(f'{counts[verdict]} {verdict}' for verdict in ORDER)}."


# -- the page ---------------------------------------------------------------------------------------------------------


def page(folder: Path, stored: Stored) -> str:
    gpus = sorted({held["gpu"] for held in stored.values() if "gpu" in held})
    mark = "Smoke test, the times mean nothing: " if any(held["smoke"] for held in stored.values()) else ""
    parts = [f"# {mark}{', '.join(gpus) or 'No GPU'}", MADE_BY, "## Targets", targets(stored)]
    for entry in operation.find():
        if entry.name in stored:
            parts += section(folder, entry, stored[entry.name])
    if "host" in stored:
        parts += host_section(folder, stored["host"])
    return "\n\n".join([*parts, *steps_section(folder)])


def shown(folder: Path) -> str:
    """The folder as a command in the checkout names it, or elsewhere by its name alone."""
    folder = folder.resolve()
    return str(folder.relative_to(results.CHECKOUT)) if folder.is_relative_to(results.CHECKOUT) else folder.name


def section(folder: Path, entry: Operation, held: dict[str, Any]) -> list[str]:
    pictures = [folder / f"{entry.name}.png", folder / f"roofline-{entry.name}.png"]
    kinds = Counter(kind for row in held["rows"] if (kind := earlier(row, held)))
    others = ", ".join(f"{rows}{kind}" for kind, rows in sorted(kinds.items()))
    return [
        f"## {entry.name}: {entry.summary}",
        f"{results.conditions(held)}\n\n{entry.legend}",
        f"To reproduce: `python -m bench run {entry.name} --out {shown(folder)}`",
        *(f"![{picture.stem}]({picture.name})" for picture in pictures if picture.exists()),
        *([f"Of {len(held['rows'])} rows, earlier: {others}."] if kinds else []),
        results.table(entry, held["rows"]),
    ]


def host_section(folder: Path, held: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    return [
        "## host: what an optimizer's step costs the host",
        f"Commit {held['commit']}; {held['cpus']} CPUs, load average {held['load']:.1f}; {versions}.",
        f"To reproduce: `python -m bench host --json {shown(folder)}/host.json`",
        host.table(held["rows"]),
    ]


def steps_section(folder: Path) -> list[str]:
    """What `bench all` did, if it was that."""
    file = folder / "steps.json"
    if not file.exists():
        return []
    entries = results.read_json(file, "steps")["steps"].items()
    rows = [[name, e["status"], f"{e['seconds']:.0f}", e["date"], e["commit"], e["note"]] for name, e in entries]
    return [
        "## Steps",
        f"`python -m bench all --out {shown(folder)}`; log.txt holds what they printed.",
        markdown(["step", "status", "s", "date", "commit", ""], rows),
    ]
