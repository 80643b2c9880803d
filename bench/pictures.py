"""What a table of results looks like: bars against each peer, and a roofline. Nothing is drawn without matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MOST_BARS, MOST_POINTS = 80, 40  # of what can still be read; the tables have the rest
COLORS = ("#4477aa", "#ccbb44", "#aa3377", "#228833", "#66ccee", "#ee6677")


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; None where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    return plt


def shown(rows: Sequence[Row], most: int) -> list[Row]:
    """Those with targets if there are any, and no more than `most`."""
    return ([r for r in rows if r["targets"]] or list(rows))[:most]


def bars(path: Path, title: str, rows: Sequence[Row], peers: Sequence[str]) -> Path | None:
    """The ratio of each peer's time to tribp's."""
    plt = pyplot()
    rows = shown([r for r in rows if any(r["ratios"].get(peer) is not None for peer in peers)], MOST_BARS)[::-1]
    if plt is None or not rows:
        return None
    width = 0.8 / len(peers)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
    for n, (peer, color) in enumerate(zip(peers, COLORS, strict=False)):
        heights = [r["ratios"].get(peer) or 0.0 for r in rows]
        at = [i + 0.4 - (n + 0.5) * width for i in range(len(rows))]
        axes.barh(at, heights, width, label=f"{peer} / tribp", color=color)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{r['case']} {r['direction']}" for r in rows], fontsize=7)
    axes.set_xlabel("time of torch / time of tribp: more is better")
    axes.set_title(title.replace(" (", "\n(", 1), fontsize=8, loc="left")
    axes.legend()
    return saved(plt, figure, path)


def points(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """What the roofline shows: a name, operations a byte, operations a second."""
    found = []
    for r in shown([r for r in rows if r["contenders"]["tribp"].get("device_us")], MOST_POINTS):
        us = r["contenders"]["tribp"]["device_us"]["median"]
        found.append((f"{r['case']} {r['direction']}", r["operations"] / r["bytes"], 1e6 * r["operations"] / us))
    return found


def roofline(path: Path, title: str, rows: Sequence[Row], bandwidth: float, rates: Mapping[str, float]) -> Path | None:
    """Every row as a numbered point under the ceilings that were measured: bytes a second, operations a second."""
    plt, found = pyplot(), points(rows)
    if plt is None or not found:
        return None
    figure, axes = plt.subplots(figsize=(11, max(5, 0.17 * len(found))), layout="constrained")
    low, high = min(x for _, x, _ in found) / 3, max(x for _, x, _ in found) * 10
    for (name, rate), color in zip(rates.items(), COLORS, strict=False):
        at = sorted([low, min(max(low, rate / bandwidth), high), high])
        axes.plot(at, [min(x * bandwidth, rate) for x in at], color=color, linewidth=1, label=name)
    if not rates:
        axes.plot([low, high], [low * bandwidth, high * bandwidth], color=COLORS[0], linewidth=1, label="copy")
    for n, (name, x, y) in enumerate(found, 1):
        axes.plot(x, y, ".", color="black", markersize=3)
        axes.annotate(str(n), (x, y), fontsize=7, xytext=(2, 2), textcoords="offset points")
        axes.plot([], [], " ", label=f"{n}  {name}")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    axes.set_title(title.replace(" (", "\n(", 1), fontsize=8, loc="left")
    figure.legend(loc="outside right upper", fontsize=6, handlelength=1.2)
    return saved(plt, figure, path)


def saved(plt: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
