"""From measurements to what is kept and shown: floors, ratios, targets; JSON and Markdown, written as they come."""

import datetime
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import pictures
from .meters import Meter
from .registry import Case, Measured, Named, Operation, Target, Work
from .tables import markdown

ROOT = Path(__file__).parent / "results"
SOURCES = ("kernels", "tribp", "bench")  # beside this folder: what a measurement depends on
Row = dict[str, Any]


def floor(work: Work, bandwidth: float, rate: float) -> tuple[float, str]:
    """The least time in µs that the work can take, and what sets it: "bytes" or "operations"."""
    by_bytes, by_operations = 1e6 * work.bytes / bandwidth, 1e6 * work.operations / rate
    return (by_bytes, "bytes") if by_bytes > by_operations else (by_operations, "operations")


def ratio(entries: Mapping[str, Row], peer: str, quantity: str = "time") -> float | None:
    """How many times as fast as the peer tribp is, or how many times less memory it takes; None if unmeasured."""

    def number(name: str) -> float | None:
        entry = entries.get(name, {})
        value = entry.get("device_us", {}).get("median") if quantity == "time" else entry.get("peak_bytes")
        return None if value is None else float(value)

    ours, theirs = number("tribp"), number(peer)
    return None if ours is None or theirs is None or ours == 0 else theirs / ours


def judge(target: Target, entries: Mapping[str, Row], copied: float | None = None) -> dict[str, Any]:
    """The target as a sentence and the verdict: "met", "missed", "unmeasured". copied: the share of the copy's rate."""
    if target.quantity == "bandwidth":
        return verdict(f"≥ {target.ratio:.0%} of copy", copied, copied is not None and copied >= target.ratio)
    found = ratio(entries, target.peer, target.quantity)
    what = "" if target.quantity == "time" else f" {target.quantity}"
    return verdict(f"≥ {target.ratio:.2f}x {target.peer}{what}", found, found is not None and found >= target.ratio)


def verdict(target: str, found: float | None, met: bool) -> dict[str, Any]:
    return {"target": target, "ratio": found, "verdict": "unmeasured" if found is None else "met" if met else "missed"}


def settled(verdicts: Sequence[dict[str, Any]], ours: Row) -> list[dict[str, Any]]:
    """The verdicts, given tribp's entry: what is wrong or fails meets no target."""
    if ours.get("status") not in ("wrong", "failed"):
        return list(verdicts)
    return [found | {"ratio": None, "verdict": "missed"} for found in verdicts]


def row(
    operation: Operation, case: Case, direction: str, entries: Mapping[str, Row],
    bandwidth: float, rate: float,
) -> Row:  # fmt: skip
    work = operation.work(case, direction)
    floor_us, bound_by = floor(work, bandwidth, rate)
    ours = entries["tribp"].get("device_us", {}).get("median")
    copied = 1e6 * work.bytes / bandwidth / ours if ours else None
    return {
        "case": case.name,
        "shape": list(case.shape),
        "dtype": case.dtype_name,
        "direction": direction,
        "bytes": work.bytes,
        "operations": work.operations,
        "floor_us": floor_us,
        "bound_by": bound_by,
        "floor_fraction": floor_us / ours if ours else None,
        "ratios": {peer: ratio(entries, peer) for peer in ("eager", "compile")},
        "memory_ratio": ratio(entries, "eager", "memory"),
        "targets": settled(
            [judge(target, entries, copied) for target in operation.targets(case, direction)], entries["tribp"]
        ),
        "settings": [],
        "contenders": dict(entries),
    }


class Store:
    """`<folder>/<operation>.{json,md,png}`, written anew after every case: a run that is cut off loses one at most.

    Rows of earlier runs stay until their case is measured again; each carries its date, commit and sources, and whether
    torch.compile was asked for.
    """

    def __init__(self, folder: Path, operation: Measured, meter: Meter, *, smoke: bool) -> None:
        self.operation = operation
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{operation.name}.json"
        self.smoke = smoke
        self.head: dict[str, Any] = {
            "operation": operation.name,
            "summary": operation.summary,
            "gpu": meter.name,
            "smoke": smoke,
            "versions": meter.versions(),
        }
        self.stamp = {"date": datetime.datetime.now().isoformat(timespec="minutes"), "commit": commit()}
        self.stamp["sources"] = digest()
        self.rows: list[Row] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def has(self, case: Named, *, compiled: bool) -> bool:
        """Whether the case has been measured with the present code, and beside torch.compile if that is wanted."""
        rows = self.rows_of([case])
        return bool(rows) and all(
            r["sources"] == self.stamp["sources"] and (r.get("compiled") or not compiled) for r in rows
        )

    def add(self, rows: Sequence[Row], *, bandwidth: float, rates: Mapping[str, float], compiled: bool) -> None:
        fresh = {(r["case"], r["direction"]) for r in rows}
        self.rows = [r for r in self.rows if (r["case"], r["direction"]) not in fresh]
        self.rows += [r | self.stamp | {"compiled": compiled} for r in rows]
        if self.smoke:
            for verdict in (target for r in self.rows for target in r["targets"]):
                verdict["verdict"] = "unmeasured"  # nothing follows from a CPU's clock
        self.head |= self.stamp | {"copy_bytes_per_second": bandwidth, "operations_per_second": dict(rates)}
        write(self.path, json.dumps(self.head | {"rows": self.rows}, indent=1))
        write(
            self.path.with_suffix(".md"),
            f"# {self.heading()}\n\n{self.conditions()}\n\n{self.operation.table(self.rows)}",
        )

    def rows_of(self, cases: Sequence[Named]) -> list[Row]:
        wanted = {case.name for case in cases}
        return [r for r in self.rows if r["case"] in wanted]

    def heading(self) -> str:
        return heading(self.head)

    def conditions(self) -> str:
        return f"{conditions(self.head)}\n\n{self.operation.legend}"

    def plot(self) -> Path | None:
        return pictures.bars(self.path.with_suffix(".png"), self.heading(), self.rows, self.operation.peers)


def heading(head: Mapping[str, Any]) -> str:
    mark = "smoke: walked through on a CPU, the times mean nothing; " if head["smoke"] else ""
    return f"{head['operation']} ({mark}{head['summary']}, {head['gpu']})"


def conditions(head: Mapping[str, Any]) -> str:
    """When, with what and under which ceilings the results that carry this head were measured."""
    found = [f"{name} {version}" for name, version in head["versions"].items()]
    rates = [f"{name} {rate / 1e12:.4g} TF/s" for name, rate in head["operations_per_second"].items()]
    products = f", products {', '.join(rates)}" if rates else ""
    return (
        f"{head['date']}, commit {head['commit']}; {', '.join(found)}. Measured in the same run: copy "
        f"{head['copy_bytes_per_second'] / 1e12:.3g} TB/s{products}."
    )


def table(rows: Sequence[Row]) -> str:
    header = ["case", "direction", "tribp", "eager", "compile", "vs eager", "vs compile", "of floor", "graph", "host",
              "memory", "target", "verdict"]  # fmt: skip
    return markdown(header, [_line(r) for r in rows])


def _line(r: Row) -> list[str]:
    ours = r["contenders"]["tribp"]
    return [
        r["case"], r["direction"], *(_time(r["contenders"].get(name, {})) for name in ("tribp", "eager", "compile")),
        times(r["ratios"]["eager"]), times(r["ratios"]["compile"]),
        "–" if r["floor_fraction"] is None else f"{r['floor_fraction']:.0%}",
        decimal(ours.get("graph_us")), decimal(ours.get("host_us")), times(r["memory_ratio"]),
        ", ".join(t["target"] for t in r["targets"]), ", ".join(t["verdict"] for t in r["targets"]),
    ]  # fmt: skip


def _time(entry: Row) -> str:
    if entry.get("status") == "wrong":
        return f"wrong ({entry['note']})"
    if entry.get("status") == "failed":
        return "failed"
    return decimal(entry.get("device_us", {}).get("median"))


def decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def write(path: Path, text: str) -> None:
    """All of the text, or what was there before: the process may be killed at any time."""
    new = path.with_name(path.name + ".new")
    new.write_text(text + "\n")
    os.replace(new, path)


def commit() -> str:
    """The checkout's commit; where sources differ from it, or git does not know it, with a digest of them."""
    changed = f"status --porcelain --untracked-files=no -- {' '.join(SOURCES)} :(exclude)bench/results"
    try:
        root = Path(__file__).parents[1]
        found = [
            subprocess.run(["git", *words.split()], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in ("rev-parse --short HEAD", changed)
        ]
    except (OSError, subprocess.CalledProcessError):
        return digest()
    return f"{found[0]}+{digest()}" if found[1] else found[0]


def digest(root: Path = Path(__file__).parents[1]) -> str:
    """Eight digits that tell one state of the sources from another; a commit of results changes none."""
    found = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (root / folder).rglob("*.py")):
        found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()[:8]
