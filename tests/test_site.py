"""The site: the course's form, its code and its translation, the reference, and the built pages."""

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs.hooks import INCLUDED, source

from .test_docs import ROOT, run

COURSE = ROOT / "docs" / "course"
PAGES = sorted(page for page in COURSE.glob("*.md") if not page.name.endswith(".zh.md"))
LESSONS = [page for page in PAGES if page.stem not in ("index", "network")]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPS = {
    "": ["The formula", "The reference", "The kernel", "The test", "The cost"],
    ".zh": ["公式", "参考实现", "内核", "测试", "代价"],
}


def translation(page: Path) -> Path:
    return page.with_suffix(".zh.md")


def headings(text: str, level: str = "#+") -> list[str]:
    return re.findall(rf"^({level} .+)$", FENCE.sub("", text), re.MULTILINE)


def inclusions(text: str) -> list[str]:
    """The links that stand for code, without what they are called."""
    return [line.partition("](")[2] for line in text.splitlines() if INCLUDED.fullmatch(line)]


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
@pytest.mark.parametrize("language", STEPS)
def test_five_steps(page: Path, language: str) -> None:
    """The same five on every page, code of the tree behind each of the middle three, and numbers in the last."""
    text = page.with_suffix(f"{language}.md").read_text()
    assert headings(text, "##") == [f"## {step}" for step in STEPS[language]]
    formula, reference, kernel, test, cost = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert "$$" in formula
    assert inclusions(reference)
    assert any("/kernels/" in link for link in inclusions(kernel))
    assert any("/tests/" in link for link in inclusions(test))
    assert FENCE.search(cost)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_included_exists(page: Path) -> None:
    for line in page.read_text().splitlines():
        if match := INCLUDED.fullmatch(line):
            path, name, first, last = match.groups()
            number, code = source(str((COURSE / path).resolve().relative_to(ROOT)), name, first, last)
            assert code
            assert number > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_translations_are_equal(page: Path) -> None:
    """In their headings' levels, their code, their formulas, what they include and where they lead."""
    ours, theirs = page.read_text(), translation(page).read_text()
    for part in (
        lambda text: [heading.partition(" ")[0] for heading in headings(text)],
        FENCE.findall,
        inclusions,
        lambda text: set(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", FENCE.sub("", text), re.DOTALL)),
        lambda text: sorted(re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text))),
    ):
        assert part(ours) == part(theirs)
    assert re.search(r"[一-鿿]", theirs)


def test_no_translation_is_left_over() -> None:
    assert sorted(COURSE.glob("*.zh.md")) == [translation(page) for page in PAGES]


# What the site shows


def test_reference_has_every_public_name() -> None:
    """Of what is tribp's own; not the modules, nor other spellings and deprecated names."""
    import tribp

    written = [
        name for page in (ROOT / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: (.+)$", page.read_text(), re.MULTILINE)
    ]  # fmt: skip
    public = {
        f"{place}.{name}"
        for place, module in (("tribp", tribp), ("tribp.nn", tribp.nn), ("tribp.optim", tribp.optim))
        for name in module.__all__
        if (thing := getattr(module, name)) is not None
        and getattr(thing, "__module__", "").startswith("tribp")
        and thing.__name__ == name
    }
    assert len(written) == len(set(written))
    assert set(written) == public


RUN = """
import contextlib, io, pathlib, re, sys
for page in map(pathlib.Path, sys.argv[1:]):
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in re.findall(r"^```python exec.*?\\n(.*?)^```$", page.read_text(), re.M | re.S):
            exec(compile(block, str(page), "exec"), names)
"""


COUNTED = """
import torch, tribp, tribp.optim
from docs.course.cost import cost
p = torch.zeros(4096, requires_grad=True)
p.grad = torch.ones(4096)
name, *numbers = cost(tribp.optim.SGD([p], lr=0.5).step).splitlines()[1].split()
programs, warps, instructions, read, written = (int(number.replace(",", "")) for number in numbers)
assert (p == -0.5).all() and name == "multi_tensor_step" and programs == 8
assert 8 * 4096 <= read < 1.1 * 8 * 4096 and 4 * 4096 <= written < 4 * 4096 + 64, (read, written)
assert 100 < instructions < 1000
assert cost(lambda: None) == "no kernel was launched"
"""


@pytest.mark.slow  # the site's build runs it, too
def test_code_of_the_course_runs() -> None:
    """Where Triton compiles, which it does not beside its interpreter: in a process of its own.

    And what it says an SGD step costs: it reads parameter and gradient, and its tables; it writes the parameter, and
    counters.
    """
    pytest.importorskip("triton")
    pytest.importorskip("numpy")
    run(ROOT, "-c", RUN + COUNTED, *map(str, PAGES))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without warnings."""
    for module in ("latex2mathml", "markdown_exec", "material", "mkdocs_static_i18n", "mkdocstrings_handlers.python"):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    run(ROOT, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder))
    return folder


class Page(HTMLParser):
    """What a page links to, what it loads, what can be linked to, and its text without code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self._tags: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value is not None}
        self.ids.add(values.get("id", ""))
        self._tags.append(tag)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])

    def handle_endtag(self, tag: str) -> None:
        while self._tags and self._tags.pop() != tag:  # some are never closed
            pass

    def handle_data(self, data: str) -> None:
        if not {"code", "script", "style"} & set(self._tags):
            self.text += data


def test_site(site: Path) -> None:
    """Every page has its links, and loads nothing from elsewhere."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 2 * len(PAGES)
    for path, page in pages.items():
        for target in page.links + page.loaded:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                assert target in page.links, f"{path} loads {target}"
                continue
            place = site if parts.path.startswith("/") else path.parent
            linked = (place / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            linked = linked / "index.html" if linked.is_dir() else linked
            assert linked.exists(), f"{path} leads to {target}"
            if parts.fragment and linked in pages:
                assert unquote(parts.fragment) in pages[linked].ids, f"{path} leads to {target}"
        assert "$" not in page.text, f"{path} has a formula that is no MathML"
