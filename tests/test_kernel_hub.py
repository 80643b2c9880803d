"""`tools/kernel_hub.py`: the layout of the kernel hub, loaded as the hub loads it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lay_out(folder: Path | str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "kernel_hub.py"), str(folder)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tribp"
    done = lay_out(folder)
    assert done.returncode == 0, done.stderr
    return folder


def run(code: str, *arguments: str) -> str:
    """What a fresh Python prints that runs `code`, with this tree importable, and the kernels interpreted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layout(hub: Path) -> None:
    assert sorted(path.name for path in hub.iterdir()) == ["LICENSE", "README.md", "build", "build.toml", "torch-ext"]
    package = hub / "torch-ext" / "tribp"
    assert not any(path.is_symlink() for path in hub.rglob("*"))
    shipped = {path.relative_to(ROOT / "tribp").as_posix() for path in (ROOT / "tribp").rglob("*.py")}
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected = {name for name in shipped | kernels if not name.startswith("demo/")} - {"__main__.py"}
    assert {path.relative_to(package).as_posix() for path in package.rglob("*.py")} == expected
    ids = set()
    for backend in ("cpu", "cuda", "rocm"):
        variant = hub / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
        files = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
        assert files == {*metadata["digest"]["files"], "metadata.json"}
    assert len(ids) == 3


def test_only_torch_and_triton_are_imported(hub: Path) -> None:
    """And what torch itself needs; nothing by the name tribp, which may be another version."""
    for path in (hub / "torch-ext").rglob("*.py"):
        allowed = sys.stdlib_module_names | {"torch", "triton", "typing_extensions"}
        if path.name == "versions.py":
            allowed |= {"numpy"}  # where Triton's interpreter runs, which needs it itself
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--no-such-option", 2)])
def test_an_option_is_no_folder(word: str, status: int, tmp_path: Path) -> None:
    done = lay_out(word, cwd=tmp_path)
    assert done.returncode == status
    assert "usage: kernel_hub.py [-h] FOLDER" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_refused(hub: Path) -> None:
    before = (hub / "build.toml").read_bytes()
    done = lay_out(hub)
    assert done.returncode == 1
    assert done.stderr == f"kernel_hub.py: {hub} is not empty\n"
    assert (hub / "build.toml").read_bytes() == before


BESIDE = """
import importlib.util, json, sys
import torch, tribp

def load(variant):
    name = json.load(open(f"{variant}/metadata.json"))["id"]
    spec = importlib.util.spec_from_file_location(name, f"{variant}/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

hub, other = map(load, sys.argv[1:])
for library in (tribp, hub, other):
    x, weight, bias = torch.ones(1, 1), torch.full((1, 1), 0.5, requires_grad=True), torch.full((1,), 0.5)
    for backend in ("torch", "triton"):
        with library.use_backend(backend):
            y = library.linear_sigmoid(x, weight, bias)
            (dw,) = torch.autograd.grad(y, weight)
        print(f"{y.item():.6f} {dw.item():.6f}")
    y = getattr(torch.ops, library.__name__).linear(x, weight, bias, "sigmoid", 0.0, 0.0)
    print(f"{y.item():.6f}")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sigmoid(), torch.nn.Linear(2, 1))
    library.fuse(model)
    optimizer = library.optim.Adam(model.parameters())
    library.train_step(model, optimizer, "mse_loss")(torch.ones(1, 2), torch.ones(1, 1))
    assert type(model).__module__.startswith(library.__name__)
    assert len(library.decompositions()) == 4
assert len({id(library.linear) for library in (tribp, hub, other)}) == 3
"""


@pytest.mark.slow  # the workflow's job of the examples has it
def test_versions_beside_each_other(hub: Path) -> None:
    """The library that is installed and two of the hub's, each by its own name, with its own operators."""
    pytest.importorskip("triton")
    out = run(BESIDE, *(str(hub / "build" / f"torch-{backend}") for backend in ("cpu", "cuda")))
    assert out.splitlines() == 3 * ["0.731059 0.196612", "0.731059 0.196612", "0.731059"]


BY_KERNELS = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

hub = Path(sys.argv[1])
variant = hub / "build" / sys.argv[2]
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
assert str(metadata.name) == "tribp"
assert {str(backend).lower() for backend in Build.open(hub).general.backends} == {"cpu", "cuda", "rocm"}

library = get_local_kernel(hub)
assert library.__name__ == metadata.id
assert "tribp" not in sys.modules
layer = library.nn.LinearSigmoid(3, 2)
layer(torch.ones(4, 3)).sum().backward()
library.optim.SGD(layer.parameters(), lr=0.1).step()
print(Path(library.__file__).parent)
"""


def test_loads_as_kernels_does(hub: Path) -> None:
    # Not "kernels": without the package, that is this tree's folder.
    pytest.importorskip("kernels.load", reason="Hugging Face's package kernels is not installed")
    import torch

    variant = "torch-rocm" if torch.version.hip else "torch-cuda" if torch.version.cuda else "torch-cpu"
    assert run(BY_KERNELS, str(hub), variant).strip() == str(hub / "build" / variant)
