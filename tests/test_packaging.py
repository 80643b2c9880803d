"""What is shipped, and which way imports run."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from .processes import ROOT, forked

# A module may import from its own floor and from the floors listed with it; nothing else of tribp's.
FLOORS = {
    "_checkout": set(),
    "versions": set(),
    "footprint": set(),
    "launch.arch": set(),
    "kernels": {"versions"},
    "dispatch": {"launch.arch", "kernels.common"},
    "launch": {"dispatch", "kernels", "versions"},
    "ops": {"dispatch", "kernels", "launch", "versions"},
    "export": {"dispatch", "ops"},
    "functional": {"ops"},
    "nn": {"ops"},
    "fusion": {"dispatch", "footprint", "nn", "ops"},
    "training": {"dispatch", "footprint", "fusion", "nn", "ops"},
    "optim": {"dispatch", "footprint", "kernels", "launch"},
    "demo": {"dispatch", "functional", "fusion", "nn", "optim", "training"},
}
PACKAGE_FILES = {"__init__", "__main__"}  # they gather the floors and import from any


def shipped() -> dict[str, Path]:
    """Module name within tribp → file, `kernels/` counted once."""
    files = {f"kernels.{p.stem}": p for p in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "tribp").rglob("*.py"):
        parts = path.relative_to(ROOT / "tribp").with_suffix("").parts
        if parts[0] != "kernels":
            files[".".join(parts)] = path
    return files


def imports(name: str, path: Path) -> set[str]:
    """What a file imports, anywhere in it: tribp's modules as `tribp.…`, the others by their top-level name."""
    found = set()
    package = ["tribp", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name if name.startswith("tribp") else name.split(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")] if node.level else []
            module = ".".join(p for p in base if p) if node.level else node.module or ""
            if module.startswith("tribp"):
                found |= {f"{module}.{a.name}" for a in node.names}
            else:
                found.add(module.split(".")[0])
    return found


def check_imports(name: str, found: set[str]) -> None:
    floor = name if name in FLOORS else name.split(".")[0]
    for module in found:
        if not module.startswith("tribp."):
            if floor in ("kernels", "launch.arch"):
                allowed = sys.stdlib_module_names | ({"triton"} if floor == "kernels" else set())
                assert module in allowed, f"{name} imports {module}"
            continue
        target = module.removeprefix("tribp.")
        assert any(target == ok or target.startswith(ok + ".") for ok in FLOORS[floor] | {floor}), (
            f"{name} imports {module}, which is no floor below it"
        )


def test_imports_run_downwards() -> None:
    files = shipped()
    assert len(files) > 8
    for name, path in files.items():
        if name.split(".")[0] not in PACKAGE_FILES:
            check_imports(name, imports(name, path))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("kernels.common", {"torch"}),
        ("launch.arch", {"triton"}),
        ("launch.arch", {"tribp.launch.matmul"}),
        ("dispatch", {"tribp.launch.plan"}),
        ("launch.matmul", {"tribp.ops.checks"}),
        ("ops.linear.reference", {"tribp.functional"}),
        ("ops.linear.op", {"tribp.functional.linear_sigmoid"}),
    ],
)
def test_an_upward_import_would_be_seen(name: str, found: set[str]) -> None:
    with pytest.raises(AssertionError):
        check_imports(name, found)


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest groups of modules that import each other, be it through others."""

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        waiting = [name]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    below = {name: reached(name) for name in graph}
    return {frozenset(m for m in below[name] if name in below[m]) for name in graph if name in below[name]}


def module_of(imported: str, files: dict[str, Path]) -> str | None:
    """The module of tribp's that `tribp.a.b.c` is, or that holds it."""
    parts = imported.split(".")[1:]
    for end in range(len(parts), -1, -1):
        for name in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if name in files:
                return name
    return None


def import_graph() -> dict[str, set[str]]:
    files = shipped()
    graph = {}
    for name, path in files.items():
        within = {module for module in imports(name, path) if module.split(".")[0] == "tribp"}
        graph[name] = {m for module in within if (m := module_of(module, files)) is not None} - {name}
    return graph


def test_no_modules_import_each_other() -> None:
    """Also where only type checkers import: who reads one of them would have to read the others."""
    graph = import_graph()
    assert graph["optim.optimizer"] >= {"optim.plan", "optim.rule"}
    assert circles(graph) == set()


def test_circles_would_be_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles(graph) == {frozenset("bc"), frozenset("ef")}


def test_required_top_level() -> None:
    for name in ("README.md", "pyproject.toml", "LICENSE", "tribp", "kernels", "tests", "bench", ".github", ".ci/run"):
        assert (ROOT / name).exists(), name
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module", params=["links", "no links"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed, as git checks it out: with symbolic links, or (its default on Windows) with files for them."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tribp", "kernels"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    link = folder / "tribp" / "kernels"
    if request.param == "no links" and link.is_symlink():
        target = link.readlink().as_posix()
        link.unlink()
        link.write_text(target)
    return folder


def build(tree: Path, kind: str, out: Path) -> Path:
    """A wheel or an sdist of what is in the tree, by the backend that pip would call, without the network."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import setuptools.build_meta as b, sys; print(b.build_{kind}(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (path,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in it."""
    return set(zipfile.ZipFile(build(tree, "wheel", tmp_path_factory.mktemp("wheel"))).namelist())


def test_wheel_holds_the_tree(wheel: set[str]) -> None:
    expected = {"tribp/" + name.replace(".", "/") + ".py" for name in shipped()} | {"tribp/py.typed"}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_wheel_of_the_sdist_is_the_same(tree: Path, wheel: set[str], tmp_path: Path) -> None:
    """Who installs the sdist has the kernels as well, though it has no link to them."""
    source = tmp_path / "source"
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.11.2
    shutil.unpack_archive(build(tree, "sdist", tmp_path), source, **safely)
    (unpacked,) = source.iterdir()
    assert set(zipfile.ZipFile(build(unpacked, "wheel", tmp_path)).namelist()) == wheel
    assert (unpacked / "LICENSE").exists()


def test_wheel_installs_no_top_level_kernels(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"tribp"}


FORGET_FOLDER = """
import os, site, sys
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.getcwd()]
"""
# The environment of these tests may hold a checkout itself, whose finder has the same name and was asked first.
FORGET_EDITABLE = """
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""


@pytest.mark.parametrize("installed", [True, False], ids=["pip install -e", "from the folder"])
def test_a_checkout_imports_its_own_kernels(installed: bool, tree: Path, tmp_path: Path) -> None:
    """Also where tribp is installed from elsewhere, as in the environment of these tests it can be."""
    if installed:
        zipfile.ZipFile(build(tree, "editable", tmp_path)).extractall(tmp_path)
        code = FORGET_EDITABLE + f"sys.path.insert(0, {str(tmp_path)!r}); site.addsitedir({str(tmp_path)!r})\n"
    else:
        code = f"sys.path.insert(0, {str(tree)!r})\n"
    code += """
import importlib.util, tribp
from tribp import kernels
print(tribp.__file__, importlib.util.find_spec("tribp.kernels.common").origin, *kernels.__path__, sep="\\n")
"""
    run = forked("-c", FORGET_FOLDER + code)
    assert run.returncode == 0, run.stderr
    assert [Path(line).resolve() for line in run.stdout.splitlines()] == [
        tree / "tribp" / "__init__.py", tree / "kernels" / "common.py", tree / "kernels",
    ]  # fmt: skip
