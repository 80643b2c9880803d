"""What a table of results looks like: bars against each peer, and a roofline. Nothing is drawn without matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
MOST_BARS, MOST_POINTS = 80, 40  # of what can still be read; the tables have the rest
COLORS = ("#4477aa", "#ccbb44", "#aa3377", "#228833", "#66ccee", "#ee6677")


def figure_of(width: float, height: float) -> Any:
    """A figure that draws into files alone; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def shown(rows: Sequence[Row], most: int) -> list[Row]:
    """Those with targets if there are any, and no more than `most`."""
    return ([r for r in rows if r["targets"]] or list(rows))[:most]


def bars(path: Path, title: str, rows: Sequence[Row], peers: Sequence[str]) -> None:
    """The ratio of each peer's time to tribp's; of peers that were measured."""
    peers = [peer for peer in peers if any(r["ratios"].get(peer) is not None for r in rows)]
    rows = shown([r for r in rows if any(r["ratios"].get(peer) is not None for peer in peers)], MOST_BARS)[::-1]
    figure = figure_of(9, 1.5 + 0.28 * len(rows))
    if figure is None or not rows:
        return
    axes, width = figure.subplots(), 0.8 / len(peers)
    for n, (peer, color) in enumerate(zip(peers, COLORS, strict=False)):
        heights = [r["ratios"].get(peer) or 0.0 for r in rows]
        at = [i + 0.4 - (n + 0.5) * width for i in range(len(rows))]
        axes.barh(at, heights, width, label=f"{peer} / tribp", color=color)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{r['case']} {r['direction']}" for r in rows], fontsize=7)
    axes.set_xlabel("time of torch / time of tribp: more is better")
    axes.set_title(title.replace(" (", "\n(", 1), fontsize=8, loc="left")
    axes.legend()
    figure.savefig(path, dpi=110)


class Point(NamedTuple):
    name: str
    dtype: str
    intensity: float  # operations a byte
    rate: float  # operations a second


def points(rows: Sequence[Row]) -> list[Point]:
    """What the roofline shows."""
    drawn = []
    for r in shown([r for r in rows if r["providers"]["tribp"].get("device_us")], MOST_POINTS):
        us = r["providers"]["tribp"]["device_us"]["median"]
        name = f"{r['case']} {r['direction']}"
        drawn.append(Point(name, r["dtype"], r["operations"] / r["bytes"], 1e6 * r["operations"] / us))
    return drawn


def roofline(path: Path, title: str, rows: Sequence[Row], bandwidth: float, rates: Mapping[str, float]) -> None:
    """Every row as a numbered point of its type's color, under the ceilings that were measured: the copy's bytes a
    second, and every type's operations a second.
    """
    drawn = points(rows)
    figure = figure_of(11, max(5, 0.17 * len(drawn)))
    if figure is None or not drawn:
        return
    axes = figure.subplots()
    knees = {name: rate / bandwidth for name, rate in rates.items()}
    at = [*(point.intensity for point in drawn), *knees.values()]
    low, high = min(at) / 3, max(at) * 3
    colors = dict(zip(rates, COLORS, strict=False))
    for name, color in colors.items():
        heights = [low * bandwidth, rates[name], rates[name]]
        axes.plot([low, knees[name], high], heights, color=color, linewidth=1, label=name)
    if not rates:
        axes.plot([low, high], [low * bandwidth, high * bandwidth], color=COLORS[0], linewidth=1, label="copy")
    for n, point in enumerate(drawn, 1):
        color, place = colors.get(point.dtype, "black"), (point.intensity, point.rate)
        axes.plot(*place, ".", color=color, markersize=4)
        axes.annotate(str(n), place, fontsize=7, color=color, xytext=(2, 2), textcoords="offset points")
        axes.plot([], [], " ", label=f"{n}  {point.name}")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    axes.set_title(title.replace(" (", "\n(", 1), fontsize=8, loc="left")
    figure.legend(loc="outside right upper", fontsize=6, handlelength=1.2)
    figure.savefig(path, dpi=110)
