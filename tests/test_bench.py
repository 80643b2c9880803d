"""`python -m bench run`: what it refuses, what it writes, and that a wrong result gets no time."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from bench import registry, results, run
from bench.__main__ import main
from bench.meters import CpuMeter, Times, percentile, summary
from bench.registry import Case, Operation, Target, Work
from bench.run import Ceilings, Options
from bench.tables import markdown

ROOT = Path(__file__).parent.parent
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")


def smoke(operation: Operation, out: Path, *cases: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status and the rows of a walk through the harness."""
    status = run.main([operation], Options(cases=cases, smoke=True, out=out))
    return status, json.loads((out / f"{operation.name}.json").read_text())["rows"]


def linear(tribps: Callable[..., Tensor] | None = None) -> Operation:
    """The linear operation, tribp's contender replaced if one is given."""
    (operation,) = registry.find(["linear"])
    contenders = dict(operation.contenders)
    return dataclasses.replace(operation, contenders=contenders | ({"tribp": tribps} if tribps else {}))


@NO_CUDA
def test_without_cuda_run_says_so_and_exits_with_2() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "CUDA" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_smoke_walks_through_all_cases_and_directions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = smoke(linear(), tmp_path)
    assert status == 0
    operation = linear()
    expected = [(case.name, direction) for case in operation.smoke_cases for direction in operation.directions]
    assert [(row["case"], row["direction"]) for row in rows] == expected
    for row in rows:
        assert row["contenders"]["tribp"]["status"] == "ok"
        assert row["contenders"]["tribp"]["device_us"]["median"] > 0
        assert row["contenders"]["compile"]["status"] == "skipped"
        assert row["floor_us"] > 0
        assert {target["verdict"] for target in row["targets"]} <= {"unmeasured"}, "a CPU's clock meets no target"
    if importlib.util.find_spec("triton"):
        assert any("forward" in setting for row in rows for setting in row["settings"])
    text = (tmp_path / "linear.md").read_text()
    assert "smoke" in text.splitlines()[0]
    assert text.count("\n| ") == len(rows) + 1
    assert (tmp_path / "linear.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    assert "smoke" in capsys.readouterr().out


@NO_CUDA
def test_smoke_runs_the_kernels_under_the_interpreter(tmp_path: Path, launched: list[str]) -> None:
    smoke(linear(), tmp_path, "16x16x32")
    assert {"forward", "dgrad", "wgrad"} <= set(launched)


def one_percent_off(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return tribp.linear_sigmoid(x, w, b) * 1.01


def not_a_number(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return tribp.linear_sigmoid(x, w, b) + math.nan


def wrong_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Right forward, and a bias gradient that is off."""
    return tribp.linear_sigmoid(x, w, b) + (0.1 * b - 0.1 * b.detach())


@pytest.mark.parametrize(
    ("contender", "directions"),
    [
        (one_percent_off, {"forward", "backward", "frozen input", "both"}),
        (not_a_number, {"forward", "both"}),
        (wrong_gradient, {"backward", "frozen input", "both"}),
    ],
)
def test_a_wrong_result_is_called_wrong_and_gets_no_time(
    contender: Callable[..., Tensor], directions: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = smoke(linear(contender), tmp_path, "16x16x32 float32")
    assert status == 1
    assert {row["direction"] for row in rows if row["contenders"]["tribp"]["status"] == "wrong"} == directions
    for row in rows:
        entry = row["contenders"]["tribp"]
        assert ("device_us" in entry) == (row["direction"] not in directions)
        if row["direction"] in directions:
            assert "relative error" in entry["note"]
            assert row["ratios"]["eager"] is None
            assert row["floor_fraction"] is None
    printed = capsys.readouterr().out
    assert printed.count("wrong (") == len(directions)


def test_a_contender_that_raises_leaves_the_others_their_times(tmp_path: Path) -> None:
    def broken(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    status, rows = smoke(linear(broken), tmp_path, "16x16x32")
    assert status == 1
    assert all(row["contenders"]["tribp"]["note"] == "RuntimeError: no such kernel" for row in rows)
    assert all(row["contenders"]["eager"]["device_us"]["median"] > 0 for row in rows)


def test_results_of_an_earlier_run_stay_until_measured_again(tmp_path: Path) -> None:
    only = dataclasses.replace(linear(), directions=["forward"])
    smoke(only, tmp_path, "16x16x32", "33x7x19 float16")
    _, rows = smoke(only, tmp_path, "16x16x32")
    assert [row["case"] for row in rows] == ["33x7x19 float16", "16x16x32 float32 tf32"]
    assert all(row["date"] and row["commit"] for row in rows)


@pytest.mark.gpu
def test_run_on_a_gpu(tmp_path: Path) -> None:
    options = Options(cases=["64x10x128", "1000x77x333"], dtypes=["bfloat16"], compile=False, out=tmp_path)
    assert run.main([linear()], options) == 0
    rows = json.loads((tmp_path / "linear.json").read_text())["rows"]
    assert all(row["contenders"]["tribp"]["graph_us"] > 0 for row in rows)
    assert all(row["contenders"]["tribp"]["peak_bytes"] for row in rows if row["direction"] == "both")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "liner"], "bench: no operation is called 'liner'; there are: linear"),
        (["run", "--smoke", "--case", "9x9"], "bench: linear has no such case; there are: 32x16x48 bfloat16, "),
    ],
)
def test_errors_are_one_line_that_lists_what_there_is(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(sentence)
    assert error.count("\n") == 1


def test_help_teaches_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "python -m bench run --smoke" in text
    assert "python -m bench static" in text


def test_percentiles() -> None:
    assert summary([5, 1, 4, 2, 3]) == Times(median=3, p20=1.8, p80=4.2)
    assert percentile([7.0], 0.2) == 7
    assert percentile([1, 2], 0.5) == 1.5


def test_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert results.floor(Work(bytes=2048, operations=512), bandwidth=1e9, rate=1e9) == (2.048, "bytes")
    assert results.floor(Work(bytes=2048, operations=4096), bandwidth=1e9, rate=1e9) == (4.096, "operations")


def test_work_of_linear_counts_every_matrix_once() -> None:
    operation, case = linear(), Case((2, 3, 5), torch.bfloat16)
    x, w, b, y, product = 10, 15, 3, 6, 2 * 2 * 3 * 5
    assert operation.work(case, "forward") == Work(2 * (x + w + b + y), product)
    assert operation.work(case, "backward") == Work(2 * (y + y + x + w + x + w + b), 2 * product)
    assert operation.work(case, "frozen input") == Work(2 * (y + y + x + w + b), product)
    assert operation.work(case, "both") == Work(2 * (3 * x + 3 * w + 2 * b + 3 * y), 3 * product)


ENTRIES: dict[str, dict[str, Any]] = {
    "tribp": {"device_us": {"median": 100.0}, "peak_bytes": 50},
    "eager": {"device_us": {"median": 130.0}, "peak_bytes": 40},
    "compile": {"status": "skipped"},
}


@pytest.mark.parametrize(
    ("target", "ratio", "verdict"),
    [
        (Target("eager", 1.3), 1.3, "met"),
        (Target("eager", 1.31), 1.3, "missed"),
        (Target("compile", 1.0), None, "unmeasured"),
        (Target("eager", 1.0, "memory"), 0.8, "missed"),
    ],
)
def test_targets_are_judged_by_the_ratio_of_the_peer_to_tribp(
    target: Target, ratio: float | None, verdict: str
) -> None:
    judged = results.judge(target, ENTRIES)
    assert judged["ratio"] == ratio
    assert judged["verdict"] == verdict


def test_targets_of_linear_are_those_that_were_set() -> None:
    operation = linear()

    def ratios(shape: tuple[int, int, int], direction: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
        return {t.peer: t.ratio for t in operation.targets(Case(shape, dtype), direction) if t.quantity == "time"}

    square, squarish, tall = (4096, 4096, 4096), (8192, 1024, 1024), (65536, 256, 784)
    assert ratios(square, "forward") == {"compile": 1.0, "eager": 1.0}
    assert ratios(squarish, "forward") == ratios(tall, "forward") == {"compile": 1.0, "eager": 1.3}
    assert ratios(square, "backward") == {"compile": 1.0, "eager": 1.05}
    assert ratios(tall, "backward") == ratios(squarish, "backward") == {"compile": 1.0, "eager": 1.15}
    assert ratios(square, "frozen input") == {"compile": 1.0, "eager": 1.5}
    assert ratios((64, 10, 128), "forward") == {"compile": 1.0, "eager": 1.0}
    assert ratios(square, "forward", torch.float32) == {"eager": 1.5}


def test_float32_ceiling_is_three_tf32_products_where_those_are_faster() -> None:
    class Meter(CpuMeter):
        def matrix_rate(self, dtype: torch.dtype) -> float:
            return 450e12 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 50e12

    before = torch.backends.cuda.matmul.fp32_precision
    ceilings = Ceilings(Meter())
    assert ceilings.rate(Case((), torch.float32)) == 150e12
    assert ceilings.rate(Case((), torch.float32, tf32=True)) == 450e12
    assert ceilings.rates == {"float32": 50e12, "float32 tf32": 450e12}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_precision_holds_inside_and_is_given_back() -> None:
    matmul = torch.backends.cuda.matmul
    with run.precision(True):
        assert matmul.fp32_precision == "tf32"
        with run.precision(False):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"


def test_directions_want_the_gradients_they_say() -> None:
    operation = linear()
    problem = operation.problem(Case((3, 4, 5), torch.float32), torch.device("cpu"))
    found = {direction: set(problem.results(tribp.linear_sigmoid, direction)) for direction in operation.directions}
    grads = {"weight.grad", "bias.grad"}
    assert found == {
        "forward": {"output"},
        "backward": {"input.grad", *grads},
        "frozen input": grads,
        "both": {"output", "input.grad", *grads},
    }
    for direction in operation.directions:
        action = problem.action(tribp.linear_sigmoid, direction)
        action()
        action()  # the graph is kept


def test_every_file_of_bench_can_be_read_in_one_go() -> None:
    for file in (ROOT / "bench").glob("*.py"):
        assert len(file.read_text().splitlines()) < 400, file.name


def test_tables_are_aligned_markdown() -> None:
    assert markdown(["name", "µs"], [["a|b", 1.5], ["c", None]]).splitlines() == [
        "| name |  µs |",
        "|------|----:|",
        "| a\\|b | 1.5 |",
        "| c    |     |",
    ]


def test_static_refuses_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "static"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
