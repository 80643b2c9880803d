"""From measurements to what is kept and shown: floors, ratios, targets; JSON, Markdown, a picture."""

import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .meters import Meter
from .registry import Case, Measured, Named, Operation, Target, Work
from .tables import markdown

ROOT = Path(__file__).parent / "results"
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
        "targets": [judge(target, entries, copied) for target in operation.targets(case, direction)],
        "settings": [],
        "contenders": dict(entries),
    }


class Store:
    """`<folder>/<operation>.{json,md,png}`, written anew after every case: a run that is cut off loses one at most.

    Rows of earlier runs stay until their case is measured again; each carries its date and commit.
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
        self.rows: list[Row] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def add(self, rows: Sequence[Row], *, bandwidth: float, rates: Mapping[str, float]) -> None:
        fresh = {(r["case"], r["direction"]) for r in rows}
        self.rows = [r for r in self.rows if (r["case"], r["direction"]) not in fresh]
        self.rows += [r | self.stamp for r in rows]
        if self.smoke:
            for verdict in (target for r in self.rows for target in r["targets"]):
                verdict["verdict"] = "unmeasured"  # nothing follows from a CPU's clock
        self.head |= self.stamp | {"copy_bytes_per_second": bandwidth, "operations_per_second": dict(rates)}
        self.path.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(
            f"# {self.heading()}\n\n{self.conditions()}\n\n{self.operation.table(self.rows)}\n"
        )

    def rows_of(self, cases: Sequence[Named]) -> list[Row]:
        wanted = {case.name for case in cases}
        return [r for r in self.rows if r["case"] in wanted]

    def heading(self) -> str:
        mark = "smoke: walked through on a CPU, the times mean nothing; " if self.smoke else ""
        return f"{self.head['operation']} ({mark}{self.head['summary']}, {self.head['gpu']})"

    def conditions(self) -> str:
        found = [f"{name} {version}" for name, version in self.head["versions"].items()]
        rates = [f"{name} {rate / 1e12:.4g} TF/s" for name, rate in self.head["operations_per_second"].items()]
        products = f", products {', '.join(rates)}" if rates else ""
        return (
            f"{self.head['date']}, commit {self.head['commit']}; {', '.join(found)}. Measured in the same run: copy "
            f"{self.head['copy_bytes_per_second'] / 1e12:.3g} TB/s{products}.\n\n"
            f"{self.operation.legend}"
        )

    def plot(self) -> Path | None:
        """The ratios as bars; nothing where matplotlib is missing."""
        try:
            import matplotlib

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            return None
        peers = self.operation.peers
        rows = [r for r in self.rows if any(r["ratios"].get(peer) is not None for peer in peers)][::-1]
        width = 0.8 / len(peers)
        figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
        for n, (peer, color) in enumerate(zip(peers, ("#4477aa", "#ccbb44", "#aa3377"), strict=False)):
            heights = [r["ratios"].get(peer) or 0.0 for r in rows]
            at = [i + 0.4 - (n + 0.5) * width for i in range(len(rows))]
            axes.barh(at, heights, width, label=f"{peer} / tribp", color=color)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [f"{r['case']} {r['direction']}" for r in rows], fontsize=7)
        axes.set_xlabel("time of torch / time of tribp: more is better")
        axes.set_title(self.heading().replace(" (", "\n(", 1), fontsize=8, loc="left")
        axes.legend()
        path = self.path.with_suffix(".png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return path


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


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it."""
    try:
        here = Path(__file__).parent
        found = [
            subprocess.run(["git", *words.split()], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in ("rev-parse --short HEAD", "status --porcelain --untracked-files=no")
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("+" if found[1] else "")
