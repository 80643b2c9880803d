"""The examples run, and print what their docstrings say."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .running import EXAMPLES, ROOT, numbers, run

pytestmark = pytest.mark.usefixtures("one_thread")


def listed() -> list[str]:
    files = [*EXAMPLES.rglob("*.py"), *EXAMPLES.glob("*.ipynb")]
    return sorted(str(path.relative_to(EXAMPLES)) for path in files)


def test_the_list_is_whole() -> None:
    linked = re.findall(r"^\| \[(.*?)\]\((.*?)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert all(name == target for name, target in linked)
    assert sorted(name for name, _ in linked) == listed()


def test_each_has_a_test() -> None:
    tests = "".join((Path(__file__).parent / f"test_{name}.py").read_text() for name in ("examples", "tutorial"))
    assert [name for name in listed() if f'"{name}"' not in tests] == []


def test_swap_optimizer() -> None:
    out = run("swap_optimizer.py")
    losses = [float(loss) for loss in re.findall(r": loss (\S+)", out)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1
    assert numbers(out, "largest difference of a parameter from 150 steps by torch")[0] < 1e-5


def test_fuse_model() -> None:
    out = run("fuse_model.py")
    assert "5 of 5 layers run by tribp, 0 skipped" in out
    assert "2.first: Conv2d + ReLU -> conv3x3" in out
    assert numbers(out, "largest difference of an output")[0] < 1e-5
    assert "same keys of the state_dict: True" in out
    first, second = (float(loss) for loss in re.findall(r": loss (\S+)", out))
    assert second < first
    assert numbers(out, "tribp's modules after unfuse") == [0]


def test_train_step_mlp() -> None:
    out = run("train_step_mlp.py")
    assert ("the fused step" if torch.cuda.is_available() else "Triton's kernels do not run here") in out
    (first,), (last,) = numbers(out, "first loss"), numbers(out, "last loss")
    assert 0.9 < first < 1.3
    assert last < 0.3
    assert numbers(out, "recognized")[0] > 95


def run_or_skip(name: str) -> str:
    """What an example prints; skipped with its own sentence where a package that it needs is missing."""
    try:
        return run(name)
    except SystemExit as stop:
        sentence = str(stop)
    match = re.fullmatch(r"(\w+) is missing: pip install [\w ]+", sentence)
    assert match, sentence
    assert importlib.util.find_spec(match[1]) is None
    pytest.skip(sentence)


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("hf_trainer.py", "accelerate transformers"),
        ("lightning_trainer.py", "lightning"),
        ("accelerate_loop.py", "accelerate"),
    ],
)
def test_a_missing_package_is_named(name: str, packages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = packages.split()[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"^{package} is missing: pip install {packages}$"):
        run(name)


def test_hf_trainer() -> None:
    out = run_or_skip("hf_trainer.py")
    assert numbers(out, "accuracy before")[0] < 70
    assert numbers(out, "accuracy after")[0] > 95
    assert numbers(out, "norm of the last gradients")[0] > 0


def test_lightning_trainer() -> None:
    assert numbers(run_or_skip("lightning_trainer.py"), "recognized")[0] > 95


def test_accelerate_loop() -> None:
    out = run_or_skip("accelerate_loop.py")
    assert numbers(out, "first loss")[0] > 0.9
    assert numbers(out, "last loss")[0] < 0.2
    assert numbers(out, "batches")[0] == 2 * numbers(out, "steps")[0] == 360


@pytest.mark.slow  # three processes that import everything: the workflow's job of the examples has it
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)
def test_fsdp2_checkpoint() -> None:
    """In a process of its own: the two that it starts import the file they are from."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "fsdp2_checkpoint.py")], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout, "shard of process 0 of the first weight") == [17, 16, 33, 16]
    assert len(numbers(done.stdout, "2 processes")) == len(numbers(done.stdout, "1 process")) == 3
    assert numbers(done.stdout, "largest difference of a parameter")[0] < 1e-6


def test_amp_grad_scaler() -> None:
    out = run("amp_grad_scaler.py")
    assert "type of the output: torch.float16" in out
    made, steps = numbers(out, "steps made")
    assert steps == 100
    assert 80 < made < 100
    assert numbers(out, "scale")[0] == 2 ** (24 - (100 - made))  # halved by every step that was skipped
    assert numbers(out, "last loss")[0] < 0.1 * numbers(out, "first loss")[0]


def test_cuda_graph() -> None:
    out = run("cuda_graph.py")
    gpu = torch.cuda.is_available()
    assert ("a graph of the step was replayed" if gpu else "no CUDA device, and so no graph") in out
    assert numbers(out, "last loss")[0] < 0.1 * numbers(out, "first loss")[0]
    assert numbers(out, "rate") == pytest.approx([3e-3 * 0.99**100], rel=1e-3)


def test_ema_weights() -> None:
    out = run("ema_weights.py")
    (last,) = numbers(out, "error with the last weights")
    assert numbers(out, "error with the last weights, again") == [last]
    assert numbers(out, "error with their average")[0] < last / 3


def test_clip_gradients() -> None:
    out = run("clip_gradients.py")
    pairs = re.findall(r"in the step (\S+), by clip_grad_norm_ (\S+)", out)
    assert len(pairs) == 3
    for norm, expected in pairs:
        assert float(norm) == pytest.approx(float(expected), rel=1e-4)
        assert float(norm) > 1
    assert numbers(out, "largest difference of a parameter")[0] < 1e-6


def test_bf16_stochastic_rounding() -> None:
    out = run("bf16_stochastic_rounding.py")
    assert numbers(out, "float32") == pytest.approx([0.8], abs=1e-4)
    assert numbers(out, "bfloat16, to nearest") == [1.0]
    assert numbers(out, "bfloat16, stochastic") == pytest.approx([0.8], abs=2e-3)


@pytest.mark.slow
def test_eight_bit_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["", "1", "3"])
    out = run("eight_bit_states.py")
    ways = ["float32", "float32, moments of 8 bits", "24 bits, moments of 8 bits"]
    found = [numbers(out, way)[-2:] for way in ways]
    assert [size for size, _ in found] == [16, 10.25, 7.25]
    assert all(loss == pytest.approx(found[0][1], abs=0.05) and loss < 4.5 for _, loss in found)  # ln 128 is 4.9


# The notebook


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((EXAMPLES / "course.ipynb").read_text())["cells"]
    return found


def test_the_notebook_is_kept_without_outputs() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebooks_cells(capsys: pytest.CaptureFixture[str]) -> None:
    """They check their own values; by plain Python, for where no Jupyter is."""
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"course.ipynb, cell {number}", "exec"), names)
    out = capsys.readouterr().out
    for part in ("y = 0.731059", "dy/dw = 0.196612", "output 0.990112, loss 0.120105", "got (1, 1)"):
        assert part in out, part


def test_the_notebook_in_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `one_thread`
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "course.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    texts = [o["text"] for cell in notebook.cells for o in cell.get("outputs", []) if o["output_type"] == "stream"]
    assert "recognized: 9" in "".join(texts)
