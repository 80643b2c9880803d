"""`python -m tribp --html`: what was learned, the graph of the network 2-2-1, and the page, also in a browser."""

import contextlib
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tribp import __main__ as program
from tribp.demo import graph

from ..conftest import use_few
from .cases import new_training

pytestmark = pytest.mark.usefixtures("one_thread")

VOID = {"img", "meta"}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


# What was learned


@pytest.mark.parametrize(("model", "shape"), [("mlp", (5, 28, 28)), ("mlp3", (5, 28, 28)), ("cnn", (5, 3, 3))])
def test_first_weights(few: None, demo: SimpleNamespace, model: str, shape: tuple[int, ...]) -> None:
    layers = new_training(demo, model=model).tribp.layers
    weight = next(layers.parameters())
    with torch.no_grad():
        weight.flatten(1)[3, 4] = -50.0  # of all, the largest
    found = demo.learned.first_weights(layers, 5)
    assert found.shape == shape
    assert found.flatten(1).abs().amax(1).tolist() == pytest.approx(5 * [1.0])
    expected = weight.detach().double().flatten(1)[3] / 50
    torch.testing.assert_close(found[0].flatten(), expected)


def test_judged(few: None, demo: SimpleNamespace) -> None:
    run = new_training(demo)
    run.tribp.layers[1].weight.data.zero_()
    run.tribp.layers[1].bias.data[:] = torch.arange(10) == 7  # whatever it sees, it says 7
    found = demo.learned.judged(run, 4)
    assert [digit.prediction for digit in found] == 8 * [7]
    assert [digit.right for digit in found] == 4 * [True] + 4 * [False]
    assert [str(digit) for digit in found] == 4 * ["7"] + [f"7, not {digit.label}" for digit in found[4:]]
    for digit in found:
        (place,) = (run.digits.held_out_images == digit.image.flatten()).all(1).nonzero()[:1].tolist()
        assert run.digits.held_out_labels[place] == digit.label


# The graph


def reference() -> dict[str, float]:
    """Its values and gradients by torch alone, every one a leaf or a result of one operation."""
    x, w, b, v, c, t = (
        torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
        for numbers in ([0.1, 0.8], [[1.0, 2.0], [0.0, 1.0]], [0.0, 0.0], [3.0, 3.0], 0.0, 0.5)
    )
    z = w @ x + b
    h = z.sigmoid()
    u = v @ h + c
    y = u.sigmoid()
    loss = 0.5 * (y - t) ** 2
    tensors = {"x": x, "w": w, "b": b, "z": z, "h": h, "v": v, "c": c, "u": u, "y": y}
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    found = {"t": 0.5, "E": loss.item()}
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        indices = {"w": ("₁₁", "₁₂", "₂₁", "₂₂")}.get(name, ("₁", "₂") if tensor.dim() else ("",))
        found |= zip((name + index for index in indices), tensor.flatten().tolist(), strict=True)
        found |= zip((f"∂E/∂{name}{index}" for index in indices), gradient.flatten().tolist(), strict=True)
    return found


def shown(text: str) -> dict[str, float]:
    """The numbers in the graph of a page, by their names."""
    (svg,) = re.findall(r'<svg class="graph".*?</svg>', text, re.DOTALL)
    lines = [html.unescape(line) for line in re.findall(r"<text [^>]*>([^<]*)</text>", svg)]
    found = {line.split(" = ")[0]: float(line.split(" = ")[-1]) for line in lines}
    assert len(found) == len(lines)
    return found


def test_graph_has_every_value(device: str) -> None:
    values, expected = graph.values(torch.device(device)), reference()
    assert values == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert values["y"] == pytest.approx(0.990112, abs=5e-7)
    assert values["E"] == pytest.approx(0.120105, abs=5e-7)
    assert shown(graph.svg(values)) == pytest.approx(expected, rel=1e-5, abs=0)


# The page


@pytest.fixture(scope="module")
def page(demo: SimpleNamespace, mnist: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run.html"
    options = ["--device", "cpu", "--epochs", "3", "--model", "cnn", "--html", str(path)]
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as out:
        use_few(demo, mnist, monkeypatch)
        assert program.main([*options, "--output", str(path.with_suffix(".png"))]) == 0
    assert f"Page: {path}\n" in out.getvalue()
    assert out.getvalue().splitlines()[-1].startswith("held-out accuracy: ")
    return path


class Parser(HTMLParser):
    """Elements must be closed in order; what they refer to is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append(value or "")
            assert not name.startswith("on"), name

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert not {"script", "link", "iframe", "object", "embed"} & set(parser.tags)
    assert all(ref.startswith(("data:image/png;base64,", "#")) for ref in parser.references)
    assert all(ref[1:] in parser.ids for ref in parser.references if ref.startswith("#"))
    style = "".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
    assert "@import" not in style
    outside = re.findall(r"\w+://[^\s\"'<)]+", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert outside == []
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_page_has_the_values(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for number in ("0.731059", "0.196612", "0.990112", "0.120105", "0.00405701, 0.00331061", "1, 6, 30, 30"):
        assert f">{number}<" in text, number
    assert "✗" not in text
    assert text.count("✓") == 3 + 8 + 7
    assert "weight must have shape (1, 2), (out_features, in_features)" in text
    assert shown(text) == pytest.approx(reference(), rel=1e-5, abs=0)
    assert text.count("<img ") > 6


def test_page_shows_a_wrong_value(few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's numbers are those of the library, not of the expectation."""
    original = graph.values

    def planted(device: torch.device) -> graph.Values:
        found = original(device)
        return found | {"∂E/∂v₂": -found["∂E/∂v₂"]}

    monkeypatch.setattr(graph, "values", planted)
    path = tmp_path / "planted.html"
    options = ["--device", "cpu", "--epochs", "1", "--html", str(path), "--output", str(tmp_path / "p.png")]
    assert program.main(options) == 0
    assert shown(path.read_text(encoding="utf-8")) != pytest.approx(reference(), rel=1e-5, abs=0)


# The page in a browser

LOOK = """<pre id="look"></pre><script>
const texts = [...document.querySelectorAll("svg.graph text")].map(e => [e, e.getBoundingClientRect()]);
const boxes = [...document.querySelectorAll("svg.graph rect")].map(e => e.getBoundingClientRect());
const meet = (a, b, by) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > by
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > by;
const inside = (a, b) => a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
const luminance = color => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const background = luminance(getComputedStyle(document.body).backgroundColor);
const contrast = e => {
  const style = getComputedStyle(e), own = luminance(e.closest("svg") ? style.fill : style.color);
  return (Math.max(own, background) + 0.05) / (Math.min(own, background) + 0.05);
};
const words = [...document.querySelectorAll("h1, h2, p, th, td, caption, code, span, figcaption, svg text")];
document.getElementById("look").textContent = JSON.stringify({
  background, texts: texts.length, words: words.length, contrast: Math.min(...words.map(contrast)),
  wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  overlapping: texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([, q]) => meet(p, q, 3))
    .map(([b]) => a.textContent + " / " + b.textContent)),
  crossing: texts.filter(([, p]) => boxes.some(b => meet(p, b, 1) && !inside(p, b))).map(([a]) => a.textContent),
  broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
});</script></body>"""


@pytest.mark.parametrize("width", [1280, 480])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_page_in_a_browser(page: Path, tmp_path: Path, scheme: str, width: int) -> None:
    """Nothing is wider than the window, no text of the graph hides another or leaves its box, all can be read."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    from matplotlib import image

    copy, picture = tmp_path / "look.html", tmp_path / "look.png"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", LOOK), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},2000",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", f"--user-data-dir={tmp_path / 'browser'}",
    ]  # fmt: skip

    def look(*options: str) -> str:
        return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True).stdout

    (found,) = re.findall(r'<pre id="look">(.*?)</pre>', look("--dump-dom", copy.as_uri()), re.DOTALL)
    seen: dict[str, Any] = json.loads(html.unescape(found))
    assert seen["texts"] == len(reference())
    assert seen["words"] > 100
    assert seen["background"] < 0.05 if scheme == "dark" else seen["background"] > 0.9
    assert seen["contrast"] > 4.5  # what WCAG asks of text
    assert seen["wider"] <= 0
    assert (seen["overlapping"], seen["crossing"], seen["broken"]) == ([], [], 0)

    look(f"--screenshot={picture}", page.as_uri())
    pixels = image.imread(picture)[..., :3]
    assert pixels.shape[1] == width
    drawn = (abs(pixels - pixels[0, 0]) > 0.1).any(-1).mean()
    assert 0.01 < drawn < 0.5, "something is drawn, and most is paper"
