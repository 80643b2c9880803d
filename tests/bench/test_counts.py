"""`python -m bench counts`: what the executor counts, as a row for each launch, and what binds."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import counts
from bench.__main__ import main
from bench.operation import Operation
from bench.options import Options, parse

from ..executor.findings import Counts, Traffic
from ..processes import forked


def made(**more: object) -> Counts:
    """8 programs of 4 warps, of 100 instructions a warp, that load 1,024 sectors where 512 would do."""
    load = Traffic("global", "load", "", requests=16, sampled=8, parts=512, ideal=256)
    shared = Traffic("shared", "load", "", requests=32, sampled=32, parts=640, ideal=320)
    traffic = {(0, "global", "load"): load, (1, "shared", "load"): shared}
    return Counts("kernel", "w4", 32, 8, 80, Counter(fma=3200), traffic=traffic, **more)  # type: ignore[arg-type]


def test_cycles_by_hand() -> None:
    found = counts.row(made())
    assert (found["programs"], found["issue"], found["tensor"]) == (80, 100, 0)
    assert found["shared"] == 640 / 8
    assert (found["L2"], found["ideal"]) == (1024 / 2 / 8, 512 / 2 / 8)
    assert (found["binds"], found["over"]) == ("issue", 100 / 32)
    # 16×8×16 multiply-adds: 2 cycles of all tensor cores on an A100; 64×64×16: 32 on an H100.
    sm_80 = counts.row(made(matrix=Counter({"mma m16n8k16 bf16": 8 * 60})))
    assert (sm_80["tensor"], sm_80["binds"]) == (120, "tensor")
    sm_90 = counts.row(made(matrix=Counter({"wgmma m64n64k16.bf16": 8 * 3})))
    assert (sm_90["tensor"], sm_90["binds"], round(sm_90["over"], 3)) == (96, "issue", round(100 / 96, 3))


def test_what_passes_without_a_thread_counts_too() -> None:
    """12,800 bytes of tensor copies a program: 100 cycles of shared memory, 200 of L2; 6,400 that wgmma reads: 50."""
    before, found = counts.row(made()), counts.row(made(copied=8 * 12_800, operands=8 * 6_400))
    assert found["shared"] == before["shared"] + 150
    assert (found["L2"], found["ideal"]) == (before["L2"] + 200, before["ideal"] + 200)


def test_the_table_says_what_is_balanced() -> None:
    rows = [{"case": "c", "direction": "d"} | counts.row(made(matrix=Counter({"mma m16n8k16 bf16": 8 * n})))
            for n in (60, 30)]  # fmt: skip
    lines = counts.table(rows).splitlines()[2:]
    assert "yes" in lines[0]
    assert "1.67×" in lines[1], "issue needs 100 cycles where tensor cores need 60"


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("64x10x128 bfloat16", ["64x10x128 bfloat16"]),  # and not with an activation behind
        ("64x10x128 bfloat16 r", ["64x10x128 bfloat16 relu"]),
        ("64x10x128 bf", ["64x10x128 bfloat16", "64x10x128 bfloat16 relu"]),
    ],
)
def test_a_case_is_taken_by_its_name_or_by_a_part_of_it(
    word: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[str] = []

    def execute(operation: Operation, case: Any, direction: str, options: Options) -> SimpleNamespace:
        executed.append(case.name)
        return SimpleNamespace(launches=[made()], problems=[])

    monkeypatch.setattr(counts, "_executed", execute)
    assert counts.main(parse(["counts", "linear", "--case", word, "--direction", "forward"])) == 0
    assert executed == names


@pytest.mark.parametrize(
    ("words", "kernels"),
    [
        (["linear", "--target", "sm_80", "--case", "64x10x128 bfloat16", "--direction", "forward"], ["forward"]),
        (
            ["optim", "--case", "RMSprop 1000x8 ", "--case", "Adagrad 1000x8 ", "--worst", "1"],
            ["multi_tensor_step"] * 2,
        ),
    ],
)
def test_launches_are_counted(words: list[str], kernels: list[str], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "found.json"
    done = forked("-m", "bench", "counts", *words, "--programs", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert [row["kernel"] for row in rows] == kernels
    assert all(row["issue"] > 0 and row["ideal"] > 0 for row in rows)
    assert all((row["tensor"] > 0) == (row["kernel"] == "forward") for row in rows)
    assert sum(line.startswith("| ") for line in done.stdout.splitlines()) == len(rows) + 1


def test_what_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^--direction must be one of forward, backward, wgrad only, got foo$"):
        counts.main(Options(operation=["linear"], direction=["forward", "foo"]))
    with pytest.raises(SystemExit):
        main(["counts", "--help"])
    assert "--target {sm_80,sm_90}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["static", "--help"])
    assert "--target {sm_80,sm_90,sm_100,gfx942}" in " ".join(capsys.readouterr().out.split())


def test_a_name_that_no_case_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no case"):
        counts.main(Options(operation=["linear"], target=["sm_90"], case=["no such case"]))
