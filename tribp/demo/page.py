"""One self-contained page: the worked examples, the graph of the network 2-2-1, the curves, and what was learned."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from . import graph, learned, picture
from .checks import Check, mark, written
from .training import Training

# matplotlib writes colours into the picture; this one stands for the page's own.
TEXT_COLOR = "#012345"

STYLE = """\
:root { color-scheme: light dark; --background: #ffffff; --text: #1f2328; --faint: #d0d7de; --gradient: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --background: #14181d; --text: #e6edf3; --faint: #3d444d; --gradient: #ff9b91; }
}
body { background: var(--background); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1200px; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5rem 0 1.5rem; }
caption { font-weight: bold; text-align: left; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--faint); padding: 0.2rem 1rem 0.2rem 0; text-align: left; }
svg { display: block; height: auto; width: 100%; }
.graph { min-width: 1000px; }
.graph text { fill: var(--text); font: 13px system-ui, sans-serif; paint-order: stroke; stroke: var(--background);
  stroke-width: 5px; }
.graph text.gradient { fill: var(--gradient); }
.graph rect, .graph path { fill: var(--background); stroke: var(--text); }
.curves svg { max-width: 900px; min-width: 640px; }
.images { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 0.5rem 0; padding: 0; }
.images figure { margin: 0; text-align: center; }
.images img { display: block; height: 64px; image-rendering: pixelated; width: 64px; }
.wrong { color: var(--gradient); }
"""


def write(
    path: Path, heading: str, facts: Mapping[str, str], examples: Mapping[str, Sequence[Check]], refusal: str,
    values: graph.Values, training: Training,
) -> None:  # fmt: skip
    """Write the page of a run to `path`.

    facts: what was trained, and how it went. examples: each with its checks. refusal: of the tutorial's weight.
    values: of the network 2-2-1.
    """
    parts = [
        "<h2>Worked examples</h2>",
        *(_example(title, checks) for title, checks in examples.items()),
        "<p>The weight [[3.0]] of the tutorial's second layer made its program crash. What tribp says to it:</p>",
        f"<p><code>{escape(refusal)}</code></p>",
        "<h2>The network 2-2-1</h2>",
        "<p>Forward from left to right: each value. Backward: "
        '<span class="wrong">the gradient of the loss E by it</span>.</p>',
        f'<div class="wide">{graph.svg(values)}</div>',
        "<h2>Training</h2>",
        _table("", [(name, fact) for name, fact in facts.items()]),
        f'<div class="wide curves">{_curves(training)}</div>',
        "<h2>What was learned</h2>",
        "<p>The first layer's weights, unit by unit: blue positive, red negative.</p>",
        _images([(image, "", True) for image in learned.first_weights(training.tribp.layers, picture.MOST_UNITS)],
                picture.WEIGHTS_COLORS, (-1, 1)),
        "<p>Held-out digits, and what the network says:</p>",
        _images([(digit.image, str(digit), digit.right) for digit in learned.judged(training, picture.MOST_DIGITS)],
                "gray_r", (0, 1)),
    ]  # fmt: skip
    text = "\n".join(parts)
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(heading)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{escape(heading)}</h1>\n{text}\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _example(title: str, checks: Sequence[Check]) -> str:
    rows = [(check.name, written(check.found), written(check.expected), mark(check.right)) for check in checks]
    return _table(title, rows, ("", "found", "expected", ""))


def _table(caption: str, rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
    if heads:
        lines.append("<tr>" + "".join(f'<th scope="col">{escape(head)}</th>' for head in heads) + "</tr>")
    for name, *cells in rows:
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{row}</tr>')
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _curves(training: Training) -> str:
    """Loss and accuracy as SVG, its text as text, in the page's colours."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({**dict.fromkeys(names, TEXT_COLOR), "svg.fonttype": "none", "svg.hashsalt": "tribp"}):
        figure = Figure(figsize=(9, 8), layout="constrained")
        loss, accuracy = figure.subplots(2, 1)
        picture.curves(training, loss, accuracy)
        for axes in (loss, accuracy):
            axes.patch.set_visible(False)
            axes.get_legend().get_frame().set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    text = file.getvalue()
    return text[text.index("<svg") :].replace(TEXT_COLOR, "currentColor")


METADATA = ("Creator", "Date", "Format", "Type")  # left out: they say nothing of the run


def _images(images: Sequence[tuple[Tensor, str, bool]], colors: str, limits: tuple[float, float]) -> str:
    """Images in a row, each with a caption and whether it is right."""
    parts = []
    for image, caption, right in images:
        file = io.BytesIO()
        imsave(file, image.numpy(), vmin=limits[0], vmax=limits[1], cmap=colors, format="png")
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        kind = "" if right else ' class="wrong"'
        below = f"<figcaption{kind}>{escape(caption)}</figcaption>" if caption else ""
        parts.append(f'<figure><img src="{source}" alt="{escape(caption) or "weights of a unit"}">{below}</figure>')
    return f'<div class="images">{"".join(parts)}</div>'
