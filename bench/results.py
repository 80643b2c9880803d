"""From measurements to what is kept and shown: floors, ratios, targets; JSON and Markdown, written as they come."""

import datetime
import hashlib
import json
import operator
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .operation import Operation, Target, Work
from .timing import CpuMeter

CHECKOUT = Path(__file__).parents[1]
ROOT = CHECKOUT / "bench" / "results"
SOURCES = ("kernels", "tribp", "bench")  # beside this folder: what a measurement depends on
Row = dict[str, Any]


# -- one case, one direction ------------------------------------------------------------------------------------------


def floor(work: Work, bandwidth: float, rate: float | None) -> tuple[float, str]:
    """The least time in µs that the work can take, and what sets it: "bytes" or "operations"; rate None: bytes."""
    by_bytes, by_operations = 1e6 * work.bytes / bandwidth, 1e6 * work.operations / rate if rate else 0.0
    return (by_bytes, "bytes") if by_bytes > by_operations else (by_operations, "operations")


def row(
    operation: Operation, case: Any, direction: str, entries: Mapping[str, Row], bandwidth: float, rate: float | None
) -> Row:
    """What was measured of each provider (`entries`), and what follows from it."""
    work = operation.work(case, direction)
    floor_us, bound_by = floor(work, bandwidth, rate)
    device_us = number(entries, "tribp", "device_us")
    clock = operation.small_clock if case.small else "device"
    row: Row = {
        "case": case.name,
        "dtype": case.dtype_name,
        "direction": direction,
        "bytes": work.bytes,
        "operations": work.operations,
        "floor_us": floor_us,
        "bound_by": bound_by,
        "floor_fraction": floor_us / device_us if device_us else None,
        "copy_fraction": 1e6 * work.bytes / bandwidth / device_us if device_us else None,
        "clock": clock,
        "ratios": ratios(operation, entries, f"{clock}_us"),
        "settings": [],
        "providers": dict(entries),
    }
    verdicts = [judge(target, row) for target in operation.targets(case, direction)]
    if entries["tribp"].get("status") in ("wrong", "failed"):  # it meets no target
        verdicts = [verdict | {"ratio": None, "verdict": "missed"} for verdict in verdicts]
    return row | {"targets": verdicts}


def unmeasured(operation: Operation) -> list[Row]:
    """Rows of all cases and directions, with nothing in them measured."""
    return [row(operation, case, d, {"tribp": {}}, 1.0, None) for case in operation.cases for d in operation.directions]


def number(entries: Mapping[str, Row], name: str, quantity: str) -> float | None:
    """What was measured of a provider, the median of a time; None if nothing was."""
    value = entries.get(name, {}).get(quantity)
    value = value.get("median") if isinstance(value, dict) else value
    return None if value is None else float(value)


def over(a: float | None, b: float | None) -> float | None:
    """a / b, or None where one of them is unmeasured, or b nothing."""
    return None if a is None or not b else a / b


def ratios(operation: Operation, entries: Mapping[str, Row], clock: str) -> dict[str, float | None]:
    """How many times as fast as each peer tribp is, None if unmeasured; and as the fastest of several."""
    ours = number(entries, "tribp", clock)
    ratios = {peer: over(number(entries, peer, clock), ours) for peer in operation.peers}
    for name, peers in operation.best_of.items():
        ratios[name] = min((ratio for peer in peers if (ratio := ratios[peer]) is not None), default=None)
    return ratios


def judge(target: Target, row: Row) -> Row:
    """The target as a sentence, what was measured, and the verdict: "met", "missed", "unmeasured"."""
    entries, peer, limit = row["providers"], target.peer, target.ratio
    if target.quantity == "bandwidth":
        return verdict(f"≥ {limit:.0%} of copy", row["copy_fraction"], limit)
    if target.quantity == "launches":  # none is not in a kernel
        return verdict(f"{limit:g} launches", number(entries, "tribp", "launches"), limit, operator.eq)
    if target.quantity == "held memory":
        held = over(number(entries, "tribp", "held_bytes"), number(entries, peer, "held_bytes"))
        return verdict(f"≤ {limit:g}x {peer} memory", held, limit, operator.le)
    if target.quantity == "memory":
        return verdict(f"≥ {limit:.2f}x {peer} memory", memory_ratio(row, peer), limit)
    return verdict(f"≥ {limit:.2f}x {peer}", row["ratios"][peer], limit)


def memory_ratio(row: Row, peer: str) -> float | None:
    """The most memory that the peer's call allocates over that of tribp's."""
    return over(number(row["providers"], peer, "peak_bytes"), number(row["providers"], "tribp", "peak_bytes"))


def verdict(target: str, value: float | None, limit: float, met: Callable[[Any, Any], bool] = operator.ge) -> Row:
    judged = "unmeasured" if value is None else "met" if met(value, limit) else "missed"
    return {"target": target, "ratio": value, "verdict": judged}


# -- tables -----------------------------------------------------------------------------------------------------------


NUMBER = re.compile(r"–|([-+]?\d[\d.]*(e[-+]?\d+)?|nan|inf)?[ x%]*")  # or nothing


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A padded Markdown table: the same characters on a terminal, in a log and in a results file.

    Columns whose cells are all numbers, or empty, are set flush right.
    """
    cells = [[("" if value is None else str(value)).replace("|", "\\|") for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, cells)])


def decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _ours(quantity: str) -> Callable[[Row], str]:
    return lambda row: decimal(number(row["providers"], "tribp", quantity))


# The columns that an operation can name besides providers (their times) and "vs" one (its time over tribp's).
COLUMNS: Mapping[str, Callable[[Row], object]] = {
    "case": lambda row: row["case"],
    "direction": lambda row: row["direction"],
    "clock": lambda row: row["clock"],
    "of floor": lambda row: "–" if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%}",
    "graph": _ours("graph_us"),
    "host": _ours("host_us"),
    "busy": _ours("busy_us"),
    "launches": lambda row: row["providers"]["tribp"].get("launches", "–"),
    "memory": lambda row: times(memory_ratio(row, "eager")),
    "extra MB": lambda row: decimal(over(number(row["providers"], "tribp", "peak_bytes"), 1e6)),
    "target": lambda row: ", ".join(target["target"] for target in row["targets"]),
    "verdict": lambda row: ", ".join(target["verdict"] for target in row["targets"]),
}


def table(operation: Operation, rows: Sequence[Row]) -> str:
    versus = [f"vs {peer}" for peer in operation.peers]
    usual = ["case", "direction", "tribp", *operation.peers, *versus, "of floor", "graph", "host", "memory"]
    header = [*(operation.columns or usual), "target", "verdict"]
    return markdown(header, [[_cell(row, column) for column in header] for row in rows])


def _cell(row: Row, column: str) -> object:
    if column in COLUMNS:
        return COLUMNS[column](row)
    if column.startswith("vs "):
        return times(row["ratios"].get(column.removeprefix("vs ")))  # a stored row may be older than the provider
    entry = row["providers"].get(column, {})
    if entry.get("status") == "wrong":
        return f"wrong ({entry['note']})"
    if entry.get("status") == "failed":
        return "failed"
    time = decimal(number(row["providers"], column, f"{row['clock']}_us"))
    return f"{time} (inexact)" if entry.get("status") == "inexact" else time


# -- files ------------------------------------------------------------------------------------------------------------


KEYS = "operation summary gpu smoke versions date commit copy_bytes_per_second operations_per_second rows"


class Store:
    """`<folder>/<operation>.json`, written anew after every case: a run that is cut off loses one at most.

    `settings`, of `--set`, are part of the name: those times are not of the library's own configs.
    Rows of earlier runs stay until their case is measured again; each carries its date, commit, sources and versions,
    and whether torch.compile was asked for.
    """

    def __init__(
        self, folder: Path, operation: Operation, meter: CpuMeter, *, smoke: bool, settings: Sequence[str] = ()
    ) -> None:
        self.operation, name = operation, " --set ".join([operation.name, *settings])
        open_folder(folder, meter.name)
        self.path = folder / f"{name}.json"
        self.head: dict[str, Any] = {
            "operation": name, "summary": operation.summary, "gpu": meter.name, "smoke": smoke,
        }  # fmt: skip
        date = datetime.datetime.now().isoformat(timespec="minutes")
        self.stamp = {"date": date, "commit": commit(), "sources": digest(), "versions": meter.versions()}
        self.rows: list[Row] = []
        if self.path.exists():
            stored = read_json(self.path, KEYS)
            self.rows = [{"versions": stored["versions"]} | row for row in stored["rows"]]

    def has(self, case: Any, *, compiled: bool) -> bool:
        """Whether the case has been measured with this code and these versions, and beside torch.compile if wanted."""
        rows = self.rows_of([case])
        present = all(r[key] == self.stamp[key] for r in rows for key in ("sources", "versions"))
        return bool(rows) and present and all(r.get("compiled") or not compiled for r in rows)

    def add(self, rows: Sequence[Row], *, bandwidth: float, rates: Mapping[str, float], compiled: bool) -> None:
        fresh = {(r["case"], r["direction"]) for r in rows}
        self.rows = [r for r in self.rows if (r["case"], r["direction"]) not in fresh]
        self.rows += [r | self.stamp | {"compiled": compiled} for r in rows]
        if self.head["smoke"]:
            for target in (target for r in self.rows for target in r["targets"]):
                target["verdict"] = "unmeasured"  # nothing follows from a CPU's clock
        self.head |= self.stamp | {"copy_bytes_per_second": bandwidth, "operations_per_second": dict(rates)}
        write_json(self.path, self.head | {"rows": self.rows})

    def rows_of(self, cases: Sequence[Any]) -> list[Row]:
        names = {case.name for case in cases}
        return [r for r in self.rows if r["case"] in names]


def heading(head: Mapping[str, Any]) -> str:
    mark = "smoke: walked through on a CPU, the times mean nothing; " if head["smoke"] else ""
    return f"{head['operation']} ({mark}{head['summary']}, {head['gpu']})"


def conditions(head: Mapping[str, Any]) -> str:
    """When, with what and under which ceilings the results that carry this head were measured."""
    versions = [f"{name} {version}" for name, version in head["versions"].items()]
    rates = [f"{name} {rate / 1e12:.4g} TF/s" for name, rate in head["operations_per_second"].items()]
    products = f", products {', '.join(rates)}" if rates else ""
    return (
        f"{head['date']}, commit {head['commit']}; {', '.join(versions)}. Measured in the same run: copy "
        f"{head['copy_bytes_per_second'] / 1e12:.3g} TB/s{products}."
    )


def open_folder(folder: Path, gpu: str) -> None:
    """Make the folder, or raise ValueError if it holds results of another GPU. A smoke test's are of the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*.json")):
        stored = read_json(file)
        if isinstance(stored, dict) and stored.get("gpu", gpu) != gpu:
            raise ValueError(f"{file} holds results of {stored['gpu']}: give another --out")


def write(path: Path, text: str) -> None:
    """All of the text, or what was there before: the process may be killed at any time."""
    new = path.with_name(path.name + ".new")
    new.write_text(text + "\n", encoding="utf-8")
    os.replace(new, path)


def read_json(path: Path, keys: str = "") -> Any:
    """What the file holds. Raises ValueError if that is no JSON, or no object with these keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if keys and not (isinstance(content, dict) and content.keys() >= set(keys.split())):
        raise ValueError(f"{path} is not what the bench writes: an object with {keys}")
    return content


def write_json(path: Path, content: object) -> None:
    write(path, json.dumps(content, indent=1, ensure_ascii=False))


def commit() -> str:
    """The checkout's commit; where sources differ from it, or git does not know it, with a digest of them."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES, ":(exclude)bench/results")
        return git("rev-parse", "--short", "HEAD") + (f"+{digest()}" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return digest()


def digest(root: Path = CHECKOUT) -> str:
    """Eight digits that tell one state of the sources from another; a commit of results changes none."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (root / folder).rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]
