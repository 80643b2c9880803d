"""What mkdocs.yml adds to MkDocs: pages and code taken from the tree, and formulas as MathML.

- A line that is nothing but a link out of `docs/` becomes what it leads to: a Markdown file or, with `#name`, the
  function or class of that name in a Python file. The link's title `"first … last"` takes of its lines those from the
  first that holds `first` to the next that holds `last`. On GitHub it is a link to the file.
- Other links to Markdown files outside `docs/` lead to the pages that consist of these files; of links to programs only
  the name stays.
- `$…$` and `$$…$$` become MathML, which browsers draw by themselves.

What is missing raises an exception, and the build fails.
"""

import ast
import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the pages' own code imports `tests` and `docs`

# Files outside docs/, and the pages that consist of them.
PAGES = {
    "README.md": "docs/index.md",
    "CHANGELOG.md": "docs/changelog.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "examples/README.md": "docs/examples.md",
    "bench/TUNING.md": "docs/tuning-log.md",
}
INCLUDED = re.compile(r'\[[^\]]+\]\(((?:\.\./)+[\w./-]+)(?:#([\w.]+))?(?: "(.+?) … (.+?)")?\)')
PROGRAM = re.compile(r"\[([^\]]+)\]\([\w./-]+\.(?:py|ipynb)\)")
LINK = re.compile(r"(?<=\]\()([\w./-]+\.md)(?=[)#])")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))
    return "\n".join(_line(line, folder) for line in markdown.splitlines())


def _line(line: str, folder: str) -> str:
    """A line of a page in this folder of the tree."""
    match = INCLUDED.fullmatch(line)
    if match is None:
        return _with_links(line, folder, folder)
    path, name, first, last = match.groups()
    path = posixpath.normpath(posixpath.join(folder, path))
    if name is None:
        return _with_links((ROOT / path).read_text(), posixpath.dirname(path), folder)
    number, code = source(path, name, first, last)
    return f'```python title="{path}" linenums="{number}"\n{code}\n```'


def _with_links(markdown: str, home: str, folder: str) -> str:
    """Markdown whose links to other Markdown files start from the folder `home`, for a page in `folder`."""

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(home, match[1]))
        return posixpath.relpath(PAGES.get(target, target), folder)

    return LINK.sub(moved, PROGRAM.sub(r"`\1`", markdown))


def source(path: str, name: str, first: str | None = None, last: str | None = None) -> tuple[int, str]:
    """A definition in a Python file, or some of its lines: the number of the first, and the text.

    Raises ValueError if there is not one of that name, or no line that holds `first` or `last`.
    """
    lines = (ROOT / path).read_text().splitlines()
    node: Any = ast.parse("\n".join(lines))
    for part in name.split("."):
        kinds = ast.FunctionDef, ast.ClassDef
        named = [n for n in ast.walk(node) if isinstance(n, kinds) and n.name == part]
        if len(named) != 1:
            raise ValueError(f"{path} has {len(named)} definitions of {part}")
        node = named[0]
    start, end = min(d.lineno for d in (node, *node.decorator_list)) - 1, node.end_lineno
    if first is not None and last is not None:
        start = _line_with(first, lines, start, end)
        end = _line_with(last, lines, start, end) + 1
    indent = min(len(line) - len(line.lstrip()) for line in lines[start:end] if line)
    return start + 1, "\n".join(line[indent:] for line in lines[start:end])


def _line_with(text: str, lines: list[str], start: int, end: int) -> int:
    for i in range(start, end):
        if text in lines[i]:
            return i
    raise ValueError(f"no line holds {text!r} between lines {start + 1} and {end}")


def on_page_content(html: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    import latex2mathml.converter  # here: tests read pages without it

    display = "block" if match[1] == "div" else "inline"
    markup: str = latex2mathml.converter.convert(html.unescape(match[2]), display=display)
    if "\\" in markup:  # a command that it does not know
        raise ValueError(f"no MathML for {match[2]}")
    return markup
