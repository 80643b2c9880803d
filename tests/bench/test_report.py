"""`python -m bench report`: every target is on the page, whatever was measured, the missed first."""

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import host, operation, pictures, report, results
from bench.__main__ import main
from bench.timing import CpuMeter

from ..processes import python

MATPLOTLIB = bool(importlib.util.find_spec("matplotlib"))
Row = dict[str, Any]


class Gpu(CpuMeter):
    name = "GPU X"

    def versions(self) -> dict[str, str]:
        return {"torch": "2.11", "driver": "580"}


def entry(us: float, **more: Any) -> Row:
    return {"status": "ok", "device_us": {"median": us, "p20": us, "p80": us}, **more}


def case_of(operation: Any, name: str) -> Any:
    return next(case for case in operation.cases if case.name == name)


def store(folder: Path, name: str, smoke: bool = False) -> results.Store:
    (found,) = operation.find([name])
    return results.Store(folder, found, Gpu(), smoke=smoke)


def linear(folder: Path, name: str, direction: str, smoke: bool = False, commit: str = "", **entries: Row) -> None:
    """Store a row of linear."""
    kept = store(folder, "linear", smoke)
    if commit:
        kept.stamp["commit"] = commit
    before = [r for r in kept.rows if (r["case"], r["direction"]) != (name, direction)]
    kept.rows = []
    found = results.row(kept.operation, case_of(kept.operation, name), direction, entries, 3e12, 8e14)
    kept.rows = before
    kept.add([found], bandwidth=3e12, rates={"bfloat16": 8e14}, compiled=True)


def optim(folder: Path, name: str, **entries: Row) -> None:
    kept = store(folder, "optim")
    found = results.row(kept.operation, case_of(kept.operation, name), "step", entries, 3e12, None)
    kept.add([found], bandwidth=3e12, rates={}, compiled=True)


def rows_of(page: str) -> list[list[str]]:
    """The cells of the first table."""
    lines = page.split("## Targets")[-1].split("\n##")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


SQUARE, TALL = "4096x4096x4096 bfloat16", "65536x256x784 bfloat16"
SOME = {  # a target of each kind
    ("linear", f"{SQUARE} forward", "≥ 1.04x eager"), ("linear", f"{TALL} both", "≥ 1.00x eager memory"),
    ("conv", "64x384-384x56x56:384 bfloat16 NHWC bias dgrad", "≥ 80% of copy"),
    ("optim", "Adam max_grad_norm=1.0 1e8 float32 step", "2 launches"),
    ("optim", "Adagrad 1e8 float32 step", "≤ 1.001x for-loop memory"),
    ("host", "Adam plan, 1000x8", "fused / plan ≥ 10"),
}  # fmt: skip


def test_every_target_is_a_row_without_any_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path / "nothing")
    assert main(["report"]) == 0
    header, *rows = rows_of(capsys.readouterr().out)
    assert header == ["operation", "case", "target", "measured", "verdict"]
    assert {tuple(row[3:]) for row in rows} == {("–", "unmeasured")}
    there = [tuple(row[:3]) for row in rows]
    assert len(there) == len(set(there))
    assert set(there) >= SOME
    set_for = Counter(name for name, _, _ in there)
    for found in operation.find():
        assert set_for[found.name] == sum(len(found.targets(case, d)) for case in found.cases for d in found.directions)
    assert not (tmp_path / "nothing").exists(), "no folder of a GPU that nothing ran on"


def test_the_missed_come_first_and_then_what_is_unmeasured(tmp_path: Path) -> None:
    linear(tmp_path, SQUARE, "forward", tribp=entry(100), eager=entry(104), compile=entry(99.96))
    linear(tmp_path, TALL, "forward", tribp=entry(100), eager=entry(141))
    optim(tmp_path, "Adam 1e8 float32", tribp=entry(1020, launches=2), fused=entry(1021))
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    _, *rows = rows_of(page)
    verdicts = [row[-1] for row in rows]
    assert verdicts == sorted(verdicts, key=["missed", "unmeasured", "met"].index)
    assert set(verdicts) == {"missed", "unmeasured", "met"}
    known = {(row[1], row[2]): row[3:] for row in rows}
    assert known[f"{SQUARE} forward", "≥ 1.04x eager"] == ["1.04x", "met"]
    assert known[f"{SQUARE} forward", "≥ 1.00x compile"] == ["0.9996x", "missed"]
    assert known[f"{TALL} forward", "≥ 1.40x eager"] == ["1.41x", "met"]
    assert known[f"{TALL} forward", "≥ 1.00x compile"] == ["–", "unmeasured"]
    assert known["Adam 1e8 float32 step", "≥ 92% of copy"] == ["91.5%", "missed"]
    assert known["Adam 1e8 float32 step", "1 launches"] == ["2", "missed"]
    assert known["Adam 1e8 float32 step", "≥ 1.00x fused"] == ["1.001x", "met"]
    counted = re.search(r"(\d+) targets: 3 missed, (\d+) unmeasured, 3 met\.", page)
    assert counted
    assert int(counted[1]) == 6 + int(counted[2]) >= 290
    assert {tuple(row[:3]) for row in rows} >= SOME
    assert [tuple(row[:4]) for row in rows[:3]] == [
        ("linear", f"{SQUARE} forward", "≥ 1.00x compile", "0.9996x"),
        ("optim", "Adam 1e8 float32 step", "1 launches", "2"),
        ("optim", "Adam 1e8 float32 step", "≥ 92% of copy", "91.5%"),
    ]


def test_no_launch_is_not_one_launch(tmp_path: Path) -> None:
    """A profiler that saw nothing, or a step that went torch's way."""
    optim(tmp_path, "Adam 1e8 float32", tribp=entry(1000, launches=0))
    found = {(g.case, g.target): (g.measured, g.verdict) for g in report.goals(report.load(tmp_path))}
    assert found["Adam 1e8 float32 step", "1 launches"] == ("0", "missed")


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_what_is_wrong_or_fails_misses_its_targets(status: str, tmp_path: Path) -> None:
    bad = {"status": status, "note": "why"}
    linear(tmp_path, SQUARE, "forward", tribp=bad, eager=entry(100), compile=entry(99))
    optim(tmp_path, "Adam 1e8 float32", tribp=bad, fused=entry(1021))
    found = report.goals(report.load(tmp_path))
    assert [(g.measured, g.verdict) for g in found[:6]] == [(status, "missed")] * 6
    assert {g.verdict for g in found[6:]} == {"unmeasured"}
    assert main(["report", str(tmp_path)]) == 0
    table = (tmp_path / "README.md").read_text().split("## linear")[1]
    assert "missed" in table


def test_rows_of_another_commit_say_so(tmp_path: Path) -> None:
    linear(tmp_path, TALL, "forward", commit="1111111", tribp=entry(100), eager=entry(141))
    linear(tmp_path, SQUARE, "forward", commit="2222222", tribp=entry(100), eager=entry(104))
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    known = {(row[1], row[2]): row[3] for row in rows_of(page)}
    assert known[f"{TALL} forward", "≥ 1.40x eager"] == "1.41x at 1111111"
    assert known[f"{SQUARE} forward", "≥ 1.04x eager"] == "1.04x"
    assert "Of 2 rows, earlier: 1 at 1111111." in page


def test_rows_of_other_versions_say_so_and_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear(tmp_path, TALL, "forward", commit="1111111", tribp=entry(100), eager=entry(141))
    file = tmp_path / "linear.json"
    held = json.loads(file.read_text())
    del held["rows"][0]["versions"]  # those of the file, as it was written once
    file.write_text(json.dumps(held))
    (entry_of_linear,) = operation.find(["linear"])
    tall, square = case_of(entry_of_linear, TALL), case_of(entry_of_linear, SQUARE)
    assert store(tmp_path, "linear").has(tall, compiled=True)
    monkeypatch.setattr(Gpu, "versions", lambda meter: {"torch": "2.13", "driver": "580"})
    linear(tmp_path, SQUARE, "forward", commit="1111111", tribp=entry(100), eager=entry(104))
    stored = store(tmp_path, "linear")
    assert (stored.has(tall, compiled=True), stored.has(square, compiled=True)) == (False, True)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    known = {(row[1], row[2]): row[3] for row in rows_of(page)}
    assert known[f"{TALL} forward", "≥ 1.40x eager"] == "1.41x with torch 2.11"
    assert known[f"{SQUARE} forward", "≥ 1.04x eager"] == "1.04x"
    assert "Of 2 rows, earlier: 1 with torch 2.11." in page


def test_what_the_host_took_is_on_the_page(tmp_path: Path) -> None:
    comparison = next(host.plans(False))
    judged = [host.judge(t, {"plan": 30, "fused bookkeeping": 100, "fused": 400}) for t in comparison.targets]
    row = {"case": comparison.name, "host_us": {"plan": {"median": 30}}, "targets": judged}
    head = {"smoke": False, "commit": "1111111", "cpus": 2, "load": 0.5, "versions": {"torch": "2.11"}}
    results.write(tmp_path / "host.json", json.dumps(head | {"rows": [row]}))
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    known = {(row[1], row[2]): row[3:] for row in rows_of(page)}
    assert known["Adam plan, 1000x8", "fused bookkeeping / plan ≥ 4"] == ["3.333x", "missed"]
    assert known["Adam plan, 1000x8", "fused / plan ≥ 10"] == ["13.33x", "met"]
    assert "2 CPUs" in page
    assert "bench host --json" in page


def test_a_smoke_test_meets_and_misses_nothing(tmp_path: Path) -> None:
    linear(tmp_path, SQUARE, "forward", smoke=True, tribp={"status": "wrong", "note": ""}, eager=entry(100))
    linear(tmp_path, TALL, "forward", smoke=True, tribp=entry(1), eager=entry(100))
    assert {g.verdict for g in report.goals(report.load(tmp_path))} == {"unmeasured"}
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text().startswith("# Smoke test")


def test_the_page_tells_what_was_measured_and_how_to_do_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gpu-x"
    linear(folder, SQUARE, "forward", tribp=entry(150), eager=entry(200))
    stored = {"smoke": False, "steps": {"memory linear": {"status": "done", "seconds": 61.2, "date": "2026-11-23",
              "commit": "1111111", "note": ""}}}  # fmt: skip
    results.write(folder / "steps.json", json.dumps(stored))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(results, "ROOT", tmp_path)  # the folders of all GPUs
    assert main(["report"]) == 0
    assert str(folder / "README.md") in capsys.readouterr().out
    assert not (tmp_path / "empty" / "README.md").exists()
    page = (folder / "README.md").read_text()
    assert page.startswith("# GPU X\n")
    for part in (
        "torch 2.11, driver 580", "copy 3 TB/s, products bfloat16 800 TF/s", "`python -m bench run linear --out gpu-x`",
        f"| {SQUARE} | forward", "L2 flushed", "| memory linear | done", "| 61 | 2026-11-23", results.commit(),
    ):  # fmt: skip
        assert part in page, part
    assert ("![linear](linear.png)" in page) == ("![roofline-linear](roofline-linear.png)" in page) == MATPLOTLIB


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"bench: there is no folder {tmp_path / 'nowhere'}\n"
    assert main(["report", str(tmp_path)]) == 0
    assert re.search(r"(\d+) targets: 0 missed, \1 unmeasured", (tmp_path / "README.md").read_text())


@pytest.mark.parametrize("folder", sorted(results.ROOT.glob("*/")), ids=lambda folder: folder.name)
def test_the_stored_page_is_what_report_writes(folder: Path) -> None:
    written = report.page(folder, report.load(folder)) + "\n"
    assert (folder / "README.md").read_text(encoding="utf-8") == written


def test_a_readme_of_somebody_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DIR may be taken for the folder to write to."""
    (tmp_path / "README.md").write_text("# My project\n")
    assert main(["report", str(tmp_path)]) == 2
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert "was not written by `bench report`" in capsys.readouterr().err


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C", PYTHONIOENCODING="utf-8").items():
        monkeypatch.setenv(name, value)
    commands = (f"all --only mlp: --budget 0.1 --smoke --out {tmp_path}", f"report {tmp_path}")
    code = "import sys; from bench.__main__ import main; sys.exit(any(main(line.split()) for line in sys.argv[1:]))"
    done = python("-c", code, *commands)
    assert done.returncode == 0, done.stderr
    assert "≥ 1.40x eager" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ['{"rows": [', "[]", "{}"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linear.json", ["report"]),
        ("host.json", ["report"]),
        ("steps.json", ["report"]),
        ("linear.json", ["run", "linear", "--smoke", "--out"]),
        ("steps.json", ["all", "--smoke", "--out"]),
    ],
)
def test_a_damaged_file_is_named(
    name: str, words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main([*words, str(tmp_path)]) == 2
    reason = "cannot be read: " if "[" in text[1:] else "is not what the bench writes: "
    assert capsys.readouterr().err.startswith(f"bench: {tmp_path / name} {reason}")


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path) -> Callable[[], set[str]]:
    """The pictures that a report of some results leaves."""

    def draw() -> set[str]:
        linear(tmp_path, SQUARE, "forward", tribp=entry(150), eager=entry(200))
        optim(tmp_path, "Adam 1e8 float32", tribp=entry(1020), fused=entry(1021))
        assert main(["report", str(tmp_path)]) == 0
        return {file.stem for file in tmp_path.glob("*.png") if file.read_bytes().startswith(b"\x89PNG")}

    return draw


def test_pictures_are_drawn(measured: Callable[[], set[str]]) -> None:
    pytest.importorskip("matplotlib")
    assert measured() == {"linear", "roofline-linear", "optim", "roofline-optim"}


def test_without_matplotlib_there_is_a_page_and_no_picture(
    measured: Callable[[], set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert measured() == set()
    assert ".png" not in (tmp_path / "README.md").read_text()


def test_points_lie_at_operations_a_byte_and_a_second(tmp_path: Path) -> None:
    linear(tmp_path, SQUARE, "forward", tribp=entry(200), eager=entry(200))
    linear(tmp_path, TALL, "forward", tribp={"status": "failed", "note": ""}, eager=entry(200))
    optim(tmp_path, "Adagrad 1e8 float32", tribp=entry(1000))
    stored = report.load(tmp_path)
    n = 4096
    (point,) = pictures.points(stored["linear"]["rows"])
    assert (point.name, point.dtype) == (f"{SQUARE} forward", "bfloat16")
    assert point.intensity == pytest.approx(2 * n**3 / (2 * (3 * n * n + n)))
    assert point.rate == pytest.approx(2 * n**3 / 200e-6)
    (point,) = pictures.points(stored["optim"]["rows"])
    assert point.intensity == pytest.approx(7 / 20)
    assert point.rate == pytest.approx(7 * 10**8 / 1e-3)


def test_the_roof_is_the_lower_of_both_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    linear(tmp_path, SQUARE, "forward", tribp=entry(200), eager=entry(200))
    rows = report.load(tmp_path)["linear"]["rows"]
    kept: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, dpi: kept.append(figure))
    pictures.roofline(tmp_path / "a.png", "title", rows, 3e12, {"bfloat16": 8e14, "slow": 1e9})
    lines = {line.get_label(): line.get_xydata().tolist() for line in kept[0].axes[0].lines}
    assert lines["bfloat16"][1] == [8e14 / 3e12, 8e14]
    for name, rate in {"bfloat16": 8e14, "slow": 1e9}.items():
        assert [y for _, y in lines[name]] == pytest.approx([min(rate, 3e12 * x) for x, _ in lines[name]])


def test_bars_show_what_has_targets_and_no_more_than_can_be_read() -> None:
    rows = [{"targets": [1] if n % 2 else [], "n": n} for n in range(10)]
    assert [row["n"] for row in pictures.shown(rows, 4)] == [1, 3, 5, 7]
    assert [row["n"] for row in pictures.shown(rows[::2], 9)] == [0, 2, 4, 6, 8]
