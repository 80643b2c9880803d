"""The documentation, run: the examples for users, the two pages that add something, and what the README must say."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from docs.hooks import INCLUDED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILE = re.compile(r"^`([\w./-]+)`( \(append\))?:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# The pages for users


@pytest.mark.parametrize("page", ["README.md", "docs/layers.md", "docs/optimizers.md", "docs/tuning.md"])
def test_examples(page: str) -> None:
    """Each block of Python runs by itself."""
    if page == "docs/tuning.md":
        pytest.importorskip("triton")
    blocks = [body for language, body in BLOCK.findall((ROOT / page).read_text()) if language == "python"]
    assert blocks
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(compile(block, page, "exec"), {})


def test_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for command in ("pip install -e '.[demo]' && python -m tribp\n", "pip install -e '.[test]' && python -m pytest\n"):
        assert f"```sh\n{command}```" in text


def test_readme_has_what_was_measured() -> None:
    """The ranges in its table are those of the stored rows."""

    def stored(name: str) -> Any:
        return json.loads((ROOT / f"bench/results/nvidia-h200/{name}.json").read_text(encoding="utf-8"))

    def rows(name: str) -> list[dict[str, Any]]:
        return stored(name)["rows"]  # type: ignore[no-any-return]

    def span(ratios: Iterable[float]) -> str:
        """The least and the largest, of two digits."""
        each = list(ratios)
        return f"{min(each):#.2g} to {max(each):#.2g} times"

    def in_graph(name: str) -> list[float]:
        both = [row["providers"] for row in rows(name) if row["providers"]["tribp"].get("graph_us")]
        return [each["eager"]["graph_us"] / each["tribp"]["graph_us"] for each in both]

    def large(name: str, *directions: str) -> list[float]:
        """Of the large shapes: small ones were timed in a CUDA graph, too."""
        each = [row for row in rows(name) if not row["providers"]["tribp"].get("graph_us")]
        return [row["ratios"]["eager"] for row in each if row["direction"] in directions]

    adam, sgd = rows("optim")[:2]
    # A step of Adam reads and writes seven times four bytes a parameter.
    rate = 28e8 / (1e-6 * adam["providers"]["tribp"]["device_us"]["median"]) / stored("optim")["copy_bytes_per_second"]
    shapes = len({row["case"] for row in rows("conv")})
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for words in (
        f"| {span(large('linear', 'forward', 'backward', 'both'))} as fast as eager torch (four large shapes) |",
        f"| {span(row['ratios']['eager'] for row in rows('conv'))} as fast as cuDNN ({shapes} shapes, channels_last) |",
        f"| {span(large('mlp', 'forward', 'backward'))} as fast as eager torch (three large ones)",
        f"128 rows in a CUDA graph: {span(in_graph('mlp'))} |",
        f"10⁸ float32: {100 * rate:.0f} % of a copy's rate; {span(row['ratios']['fused'] for row in (adam, sgd))} as",
        f"captured by hand in a CUDA graph {span(in_graph('train'))} as fast as eager torch (five float32 models,",
    ):
        assert words in text, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """They lead to files, to headings and to entries of the reference that exist."""
    prose = [line for line in re.sub(r"(?ms)^```.*?^```$", "", page.read_text()).splitlines()
             if not INCLUDED.fullmatch(line)]  # fmt: skip
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(prose)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), f"{page.name} leads to {target}"
        headings = re.findall(r"^(?:#+|:::) (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:tribp|kernels|tests|bench|docs)/[\w./-]+\.\w+)`", page.read_text())
    new = {path for path, _, _ in FILE.findall(page.read_text())}
    missing = [name for name in named if name not in new and not (ROOT / name).exists()]
    assert not missing, f"{page.name} names {missing}"


# The pages that add something, in a copy of the tree

NAMES = ("bench", "docs", "kernels", "tests", "tools", "tribp", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def files(page: str) -> list[tuple[str, str, str]]:
    """The page's files: path, whether to append to it, text."""
    found = FILE.findall((ROOT / "docs" / page).read_text())
    assert found
    return found


def copy(page: str, folder: Path) -> Path:
    """A copy of the tree, with the page's files in it. No file that was there is replaced, unless to append to it."""
    ignored = shutil.ignore_patterns("__pycache__", "results", "static")
    for name in NAMES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    for name, append, body in files(page):
        path = folder / name
        assert path.exists() == bool(append), name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write("\n\n" * bool(append) + body)
    return folder


def run(tree: Path, *command: str) -> str:
    """What a command of Python prints in the tree. Fails if the command does."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "TRIBP_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment | {"PYTHONPATH": str(tree)}, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-5000:]}"
    return done.stdout


def commands(page: str) -> list[list[str]]:
    """Those of the page that begin with `python`."""
    lines = [line for language, body in BLOCK.findall((ROOT / "docs" / page).read_text()) if language == "sh"
             for line in body.splitlines()]  # fmt: skip
    return [line.partition("#")[0].split()[1:] for line in lines if line.startswith("python ")]


OPERATION, OPTIMIZER = "write-an-operation.md", "write-an-optimizer.md"


@pytest.fixture(scope="module")
def operation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    return copy(OPERATION, tmp_path_factory.mktemp("operation"))


# More than half a minute, for what the tree's own operations show in every run.
SLOW = {"tune", "static", "tests/executed", "--smoke"}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(words, marks=[] if SLOW.isdisjoint(words) else pytest.mark.slow, id=" ".join(words))
        for words in commands(OPERATION)
    ],
)
def test_an_operation(command: list[str], operation: Path) -> None:
    """Every command of the page, with no file changed that was there before (`copy` sees to it).

    These run its tests, by the fallback, by the interpreter and with the tuner; the cases that are executed; the bench.
    """
    run(operation, *command)


@pytest.mark.slow
def test_an_operation_is_shipped_and_planned(operation: Path) -> None:
    """Tests of the wheel, of imports and of the bench hold with one operation more."""
    run(operation, "-m", "pytest", "-q", "tests/test_packaging.py", "-k", "wheel_holds_the_tree or downwards")
    files = [f"tests/bench/test_{name}.py" for name in ("all", "operation", "report", "run")]
    some = "every_selection or sanitizer or failing_step or asked_for or folder or missed or there_is"
    run(operation, "-m", "pytest", "-q", "-n", "0", *files, "-k", some)


@pytest.mark.parametrize("page", [OPERATION, OPTIMIZER])
def test_style(page: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    copy(page, tmp_path)
    for command in (["check"], ["format", "--check"]):
        run(tmp_path, "-m", "ruff", *command, *(name for name, _, _ in files(page)))


@pytest.mark.slow
@pytest.mark.parametrize("page", [OPERATION, OPTIMIZER])
def test_types(page: str, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    run(copy(page, tmp_path), "-m", "mypy")


def test_mistakes_to_plant_are_there_to_be_planted() -> None:
    page = (ROOT / "docs" / "checking-kernels.md").read_text()
    (before, file), *others = re.findall(r"^\$ sed -i 's/(.*?)/.*?/' (\S+)$", page, re.M)
    assert not others
    assert before in (ROOT / file).read_text()


def planted() -> list[str]:
    return re.findall(r"^sed -i '(s/.*?/.*?/)' kernels/bias_relu.py", (ROOT / "docs" / OPERATION).read_text(), re.M)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", planted())
def test_planted_mistakes_are_seen(mistake: str, operation: Path) -> None:
    kernel = operation / "kernels" / "bias_relu.py"
    source = kernel.read_text()
    try:
        subprocess.run(["sed", "-i", mistake, str(kernel)], check=True)
        assert kernel.read_text() != source
        with pytest.raises(AssertionError, match=r"\d failed"):
            run(operation, "-m", "pytest", "-q", "tests/bias_relu")
    finally:
        kernel.write_text(source)


@pytest.fixture(scope="module")
def optimizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    return copy(OPTIMIZER, tmp_path_factory.mktemp("optimizer"))


def test_an_optimizer(optimizer: Path) -> None:
    (command,) = commands(OPTIMIZER)
    assert " passed" in run(optimizer, *command)


def mistakes() -> list[str]:
    return re.findall(r"^sed -i '(s/.*?/.*?/)' kernels/optim_rules.py", (ROOT / "docs" / OPTIMIZER).read_text(), re.M)


@pytest.mark.parametrize("mistake", [pytest.param(m, marks=pytest.mark.slow if "lr" in m else ()) for m in mistakes()])
def test_mistakes_in_an_optimizer_are_seen(mistake: str, optimizer: Path) -> None:
    """By the kernel's tests, and by those alone."""
    kernels = optimizer / "kernels" / "optim_rules.py"
    source = kernels.read_text()
    try:
        subprocess.run(["sed", "-i", mistake, str(kernels)], check=True)
        assert kernels.read_text() != source
        with pytest.raises(AssertionError, match=r"\d failed, \d passed"):
            run(optimizer, *commands(OPTIMIZER)[0])
    finally:
        kernels.write_text(source)
