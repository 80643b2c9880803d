"""`python -m bench all`: what it does in which order, and that nothing is lost when it is cut off, hangs or fails."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import all as bench_all
from bench import operation, results, run
from bench.__main__ import main
from bench.all import Journal, Step, walk
from bench.options import Options, parse
from bench.timing import CpuMeter

from ..processes import ROOT, forked
from .test_run import NO_CUDA, linear, run_with, smoke

GPU = CpuMeter.name
with mock.patch.object(bench_all, "sanitizer", return_value="compute-sanitizer"):
    PLAN = bench_all.plan(Path("DIR"), smoke=False)


def python(name: str, program: str, limit: float = 30) -> Step:
    return Step(name, [sys.executable, "-c", program], limit)


# -- the plan ---------------------------------------------------------------------------------------------------------


def chosen(step: Step) -> list[tuple[str, Any]]:
    """The operation and the cases that a step of `bench run` measures."""
    options = parse([*step.command[3:]])
    return [(found.name, case) for found in options.operations for case in options.cases_of(found)]


def of_run(planned: Sequence[Step]) -> list[Step]:
    return [step for step in planned if list(step.command[1:4]) == ["-m", "bench", "run"]]


def position(part: str, last: bool = False) -> int:
    found = [n for n, step in enumerate(PLAN) if part in step.name]
    return found[-1 if last else 0]


def test_the_most_valuable_comes_first() -> None:
    order = ["tests optim", "optim: first 10", "memory", "compile", "tune", "the rest"]
    assert [position(part) for part in order] == sorted(position(part) for part in order)
    assert position("tests conv") < position("optim: first 10")
    assert position("conv: first 30") < position("memory")
    assert position("races", last=True) < position("compile")
    for name in operation.operations():
        assert f"{name}: tune" in [step.name for step in PLAN]
        assert {f"memory {name}", f"races {name}", f"tests {name}"} <= {step.name for step in PLAN}
    assert len({step.name for step in PLAN}) == len(PLAN)


def test_what_has_targets_is_measured_before_anything_slow_and_all_else_at_last() -> None:
    """torch.compile takes minutes a case: targets against it come behind the sanitizer. So do those of memory and of
    the number of launches, which every case has.
    """
    early = {(name, case.name) for step in of_run(PLAN[: position("memory")]) for name, case in chosen(step)}
    for found in operation.find():
        for row in results.unmeasured(found):
            wanted = [t for t in row["targets"] if not t["target"].endswith(("compile", "memory", "launches"))]
            assert not wanted or (found.name, row["case"]) in early, row["case"]
    assert all("--no-compile" in step.command for step in of_run(PLAN[: position("memory")]))
    compiled = [step for step in of_run(PLAN) if "--no-compile" not in step.command]
    for some in (compiled, [step for step in of_run(PLAN) if step not in compiled]):
        planned = {(name, case.name) for step in some for name, case in chosen(step)}
        assert planned == {(found.name, case.name) for found in operation.find() for case in found.cases}
    assert all(chosen(step) for step in of_run(PLAN))


def test_every_measurement_goes_on_where_it_was_cut_off() -> None:
    assert len(of_run(PLAN)) > 10
    for step in of_run(PLAN):
        assert "--missing" in step.command
        assert step.command[-2:] == ("--out", "DIR")
        assert step.resumes
    assert not any(step.resumes for step in PLAN if step not in of_run(PLAN))


COLLECT = """\
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import pytest
class Names:
    def pytest_collection_finish(self, session):
        self.found = [item.nodeid for item in session.items]
found = []
for words in json.loads(sys.argv[1]):
    names = Names()
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *words], plugins=[names])
    found.append(names.found)
print("\\n" + json.dumps(found))
"""


def test_the_tests_that_are_run_need_nothing_but_pytest() -> None:
    """On a GPU machine that has torch, triton, numpy and pytest; what else a test wants it skips without."""
    words = []
    for found in operation.find():
        words += [word for selection in found.tests for word in selection]
    files = {word for word in words if word.endswith(".py")}
    assert len(files) > 8
    for file in files:
        text = (ROOT / file).read_text()
        for extra in ("hypothesis", "expecttest", "mlxtend", "rich", "matplotlib"):
            assert not re.search(rf"^\s*(from|import) {extra}\b", text, re.M), f"{file} imports {extra}"


def test_every_selection_of_tests_meets_the_kernels() -> None:
    pytest.importorskip("triton")
    families = [found.tests for found in operation.find()]
    every = {step.name: step.command[6:] for step in PLAN}  # behind `python -m pytest -q -p no:cacheprovider`
    words = (
        [["-m", "gpu", *f.gpu] for f in families] + [[*f.checked] for f in families] + [[*f.smoke] for f in families]
    )
    words += [[*every["tests large"]], [*every["tests kernels"]]]
    done = forked("-c", COLLECT, json.dumps(words))
    assert done.returncode == 0, done.stderr
    *found, large, kernels = json.loads(done.stdout.splitlines()[-1])
    names = [{name.split("::")[1].split("[")[0] for name in one} for one in found]
    assert all(found)
    count = len(families)
    checked = dict(zip(operation.operations(), names[count : 2 * count], strict=True))
    conv, layers, optim = (checked[name] for name in ("conv", "linear", "optim"))
    assert {"test_nothing_waits_for_the_device", "test_gradscaler"} <= optim
    assert {"test_forward", "test_dgrad", "test_wgrad", "test_output_grad", "test_reduce_partials"} <= layers
    assert {"test_forward", "test_dgrad", "test_wgrad", "test_few_input_channels", "test_one_channel_a_group",
            "test_relayout"} <= conv  # fmt: skip
    for name in (
        "one_kernel",
        "captured",
        "fill_a_gpu",
        "31_elements",
    ):  # what the sanitizer cannot run, or not in time
        assert not any(name in test for one in checked.values() for test in one), name
    assert all(len(one) <= 120 for one in found[count : 2 * count])
    assert all(1 <= len(one) <= 15 for one in found[2 * count :])
    assert any("fill_a_gpu" in name for name in large)
    assert len(kernels) > 500


def test_the_sanitizer_is_found_beside_cuda_and_sees_every_tensors_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    program = executable(tmp_path / "bin" / "compute-sanitizer", "")
    planned = [step for step in bench_all.plan(tmp_path, False) if step.name.startswith(("memory", "races"))]
    assert len(planned) == 2 * len(operation.find())
    for step in planned:
        tool = "memcheck" if step.name.startswith("memory") else "racecheck"
        assert step.command[:5] == (str(program), "--tool", tool, "--error-exitcode", "99")
        assert step.command[5:8] == (sys.executable, "-m", "pytest")
        assert step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def executable(file: Path, lines: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!{sys.executable}\n{lines}")
    file.chmod(0o755)
    return file


# -- a walk under a clock of its own ----------------------------------------------------------------------------------


class World:
    """Steps take the time they are said to, on a clock that nothing else moves."""

    def __init__(self, folder: Path, **takes: float) -> None:
        self.folder, self.takes, self.now = folder, takes, 0.0
        self.begun: list[str] = []
        self.codes: dict[str, int] = {}

    def clock(self) -> float:
        return self.now

    def execute(self, step: Step, seconds: float, log: Path) -> int | None:
        self.begun.append(step.name)
        takes = self.takes[step.name]
        self.now += min(takes, seconds)
        if takes > seconds:
            return None
        return self.codes.get(step.name, 0)

    def walk(self, planned: Sequence[Step], seconds: float) -> tuple[list[str], dict[str, str]]:
        """What was begun, and what is known of every step."""
        self.begun = []
        with mock.patch.multiple(bench_all, execute=self.execute, monotonic=self.clock):
            walk(planned, Journal(self.folder, GPU), seconds + bench_all.RESERVE)
        stored = json.loads((self.folder / "steps.json").read_text())["steps"]
        return self.begun, {name: entry["status"] for name, entry in stored.items()}


def step(name: str, limit: float = 1000, **more: Any) -> Step:
    return Step(name, ["true"], limit, **more)


def test_what_the_budget_cuts_off_is_repeated(tmp_path: Path) -> None:
    """Also what takes longer than was thought, and does not go on where it was."""
    world = World(tmp_path, a=150, b=10)
    planned = [step("a"), step("b")]
    assert world.walk(planned, 100) == (["a"], {"a": "cut off"})
    assert world.now == 100, "no later than the budget"
    assert world.walk(planned, 200) == (["a", "b"], {"a": "done", "b": "done"})
    assert world.walk(planned, 200)[0] == []


def test_a_step_over_its_limit_has_failed_unless_it_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, hangs=1e9, long=300, b=10)
    planned = [step("hangs", 30), step("long", 40, resumes=True), step("b")]
    assert world.walk(planned, 1000) == (["hangs", "long", "b"], {"hangs": "failed", "long": "cut off", "b": "done"})
    assert world.now == 80
    world.takes["long"] = 30  # the rest of it
    assert world.walk(planned, 1000) == (["long"], {"hangs": "failed", "long": "done", "b": "done"})


def test_what_failed_is_tried_again_with_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, a=10, b=10)
    world.codes["a"] = 3
    planned = [step("a"), step("b")]
    monkeypatch.setattr(results, "commit", lambda: "1111111")
    monkeypatch.setattr(results, "digest", lambda: "1111111")
    assert world.walk(planned, 100) == (["a", "b"], {"a": "failed", "b": "done"})
    assert world.walk(planned, 100)[0] == []
    monkeypatch.setattr(results, "commit", lambda: "2222222")
    assert world.walk(planned, 100)[0] == [], "the results were committed, and no source is another"
    monkeypatch.setattr(results, "digest", lambda: "2222222")
    world.codes.clear()
    assert world.walk(planned, 100) == (["a"], {"a": "done", "b": "done"})
    commits = {name: entry["commit"] for name, entry in Journal(tmp_path, GPU).entries.items()}
    assert commits == {"a": "2222222", "b": "1111111"}


def test_a_call_that_is_killed_leaves_its_step_cut_off(tmp_path: Path) -> None:
    """By SIGKILL: nothing of ours runs after it."""

    class Killed(BaseException):
        pass

    def execute(step: Step, seconds: float, log: Path) -> int | None:
        stored = json.loads((tmp_path / "steps.json").read_text())["steps"]
        assert stored["a"]["status"] == "cut off"
        raise Killed

    with pytest.raises(Killed), mock.patch.object(bench_all, "execute", execute):
        walk([step("a")], Journal(tmp_path, GPU), 100)
    assert World(tmp_path, a=10).walk([step("a")], 100) == (["a"], {"a": "done"})


# -- processes --------------------------------------------------------------------------------------------------------


def given_plan(monkeypatch: pytest.MonkeyPatch, *planned: Step) -> None:
    monkeypatch.setattr(bench_all, "plan", lambda folder, smoke: list(planned))


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for a parent that will not ask for it."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


CHILD = """\
import os, signal, subprocess, sys, time
child = [sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)']
process = subprocess.Popen(child, stdout=subprocess.PIPE)
process.stdout.readline()
open(FILE, 'w').write(str(process.pid))
"""  # noqa: E501


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("leader", ["time.sleep(60)", "sys.exit()"], ids=["hangs", "leaves it behind"])
def test_a_step_is_stopped_with_its_children(leader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pid"
    given_plan(
        monkeypatch,
        python("hangs", CHILD.replace("FILE", repr(str(file))) + leader, limit=2 if "sleep" in leader else 30),
        python("after", "print('still here')"),
    )
    began = time.monotonic()
    code = bench_all.main(Options(budget=10, out=tmp_path, smoke=True))
    assert time.monotonic() - began < 15
    assert ended(int(file.read_text()))
    entries = Journal(tmp_path, GPU).entries
    assert entries["hangs"]["status"] == ("failed" if "sleep" in leader else "done")
    assert entries["after"]["status"] == "done"
    assert code == ("sleep" in leader)
    if "sleep" in leader:
        assert entries["hangs"]["note"] == "stopped: it took more than 2 s"


def test_a_failing_step_stops_no_other_and_shows_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given_plan(
        monkeypatch,
        python("first", "print('something'); raise SystemExit(3)"),
        Step("no such program", [str(tmp_path / "nowhere")], 30),
        python("killed", "import os; os.abort()"),
        python("last", "import os; print(os.environ.get('TRITON_INTERPRET'))"),
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # of the shell: a GPU's steps are not interpreted
    assert bench_all.main(Options(budget=10, out=tmp_path, smoke=True)) == 1
    entries = Journal(tmp_path, GPU).entries
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "first": "failed", "no such program": "failed", "killed": "failed", "last": "done",
    }  # fmt: skip
    assert entries["first"]["note"] == "exit code 3"
    assert entries["killed"]["note"] == "exit code -6"
    assert "nowhere" in entries["no such program"]["note"]
    printed = capsys.readouterr().out
    assert re.search(r"\n    something\n  failed, \d+ s: exit code 3\n", printed)
    log = (tmp_path / "log.txt").read_text()
    assert "something\n" in log
    assert "None\n" in log
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[1:]] == list(entries)
    assert re.fullmatch(r"(\d+) targets: 0 missed, \1 unmeasured, 0 met\.", printed.splitlines()[-1])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_stops_the_step_and_shows_what_there_is(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    # A shell's background jobs ignore SIGINT, and with it this process if one of them started it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, before))
    file = tmp_path / "pid"
    interrupt = f"import os, signal, time; open({str(file)!r}, 'w').write(str(os.getpid())); "
    interrupt += f"os.kill(os.getppid(), signal.{name}); time.sleep(60)"
    given_plan(monkeypatch, python("done", ""), python("interrupted", interrupt), python("never", ""))
    assert bench_all.main(Options(budget=10, out=tmp_path, smoke=True)) == 130
    assert ended(int(file.read_text()))
    entries = Journal(tmp_path, GPU).entries
    assert {name: entry["status"] for name, entry in entries.items()} == {"done": "done", "interrupted": "cut off"}
    assert entries["interrupted"]["note"] == "interrupted"
    printed = capsys.readouterr().out
    assert "| interrupted | cut off |" in printed
    assert "| never       | left    |" in printed
    file.unlink()
    given_plan(monkeypatch, python("done", "1/0"), python("interrupted", ""), python("never", ""))
    assert bench_all.main(Options(budget=10, out=tmp_path, smoke=True)) == 0, "goes on, and does nothing twice"


def test_a_budget_that_is_spent_leaves_everything_and_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given_plan(monkeypatch, python("long", "1/0"))
    assert bench_all.main(Options(budget=0.5, out=tmp_path, smoke=True)) == 0
    assert "| long | left   | 0 |  |" in capsys.readouterr().out


# -- the command ------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_wrongly_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["all"]) == 2
    assert capsys.readouterr().err.startswith("bench: all needs --out DIR")
    assert main(["all", "--out", str(tmp_path), "--only", "liner"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: there is no such step; there are: tests ")
    assert "tests conv, " in error
    Journal(tmp_path, GPU).write(step("a"), "done")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    assert main(["all", "--out", str(tmp_path)]) == 2
    sentence = f"bench: {tmp_path / 'steps.json'} holds results of {GPU}: give another --out\n"
    assert capsys.readouterr().err == sentence
    for budget in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            main(["all", "--budget", budget])
        assert "--budget" in capsys.readouterr().err


@NO_CUDA
def test_smoke_walks_through_under_the_interpreter_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One operation, and a compute-sanitizer that finds something."""
    pytest.importorskip("triton")
    note, out = tmp_path / "seen", tmp_path / "out"
    program = (
        f"import os, sys; open({str(note)!r}, 'w').write(' '.join([*sys.argv[1:], os.environ['TRITON_INTERPRET'], "
    )
    program += "os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']])); sys.exit(99)"
    executable(tmp_path / "bin" / "compute-sanitizer", program)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    words = ["all", "--smoke", "--out", str(out), "--only", "tests linear", "--only", "linear: first 20"]
    words += ["--only", "memory linear"]
    assert main(words) == 1
    entries = Journal(out, GPU).entries
    assert {name: (entry["status"], entry["note"]) for name, entry in entries.items()} == {
        "tests linear": ("done", ""),
        "linear: first 20": ("done", ""),
        "memory linear": ("failed", "exit code 99"),
    }
    assert note.read_text().startswith("--tool memcheck --error-exitcode 99")
    assert note.read_text().endswith(" 1 1")
    stored = json.loads((out / "linear.json").read_text())
    assert {row["case"] for row in stored["rows"]} == {"32x16x48 bfloat16"}
    assert any("forward" in setting for row in stored["rows"] for setting in row["settings"]), "no kernel was run"
    assert "4 passed" in (out / "log.txt").read_text()
    page = (out / "README.md").read_text()
    assert "smoke" in page.lower().splitlines()[0]
    assert "| memory linear" in page
    assert not [file for file in out.iterdir() if file.is_dir() or file.suffix == ".new"]
    dates = {name: entry["date"] for name, entry in entries.items()}
    capsys.readouterr()
    assert main(words) == 1
    assert {name: Journal(out, GPU).entries[name]["date"] for name in dates} == dates
    assert "bench run" not in capsys.readouterr().out


# -- what a measurement that goes on needs ----------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that are measured, without their kernels."""
    names: list[str] = []

    def measure(operation: Any, case: Any, *_: object) -> list[dict[str, Any]]:
        names.append(case.name)
        ours = {"status": "ok", "device_us": {"median": 1.0}}
        return [results.row(operation, case, "forward", {"tribp": ours}, 1e9, 1e9)]

    monkeypatch.setattr(run, "measure", measure)
    return names


def test_missing_measures_what_the_results_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = counted(monkeypatch)
    monkeypatch.setattr(results, "commit", lambda: "1111111")
    monkeypatch.setattr(results, "digest", lambda: "1111111")

    def again(**options: Any) -> list[str]:
        measured.clear()
        assert run.main(Options(operation=["linear"], smoke=True, out=tmp_path, **options)) == 0
        return list(measured)

    everything = [case.name for case in linear().smoke_cases]
    assert again(first=1, compile=False) == everything[:1]
    assert again(missing=True, compile=False) == everything[1:]
    assert again(missing=True, compile=False) == []
    assert again(missing=True, first=2) == everything[:2], "not beside torch.compile yet"
    assert again(missing=True, first=2, compile=False) == []
    assert again(missing=True) == everything[2:]
    assert again(first=1) == everything[:1], "all that is asked for, without --missing"
    monkeypatch.setattr(results, "commit", lambda: "2222222")
    assert again(missing=True, first=1) == [], "the results were committed, and no source is another"
    monkeypatch.setattr(results, "digest", lambda: "2222222")
    assert again(missing=True, first=1) == everything[:1]
    rows = json.loads((tmp_path / "linear.json").read_text())["rows"]
    assert {row["case"]: row["commit"] for row in rows} == dict.fromkeys(everything[1:], "1111111") | {
        everything[0]: "2222222"
    }


def test_what_is_wrong_stays_wrong_when_it_is_not_missing(tmp_path: Path) -> None:
    status, rows = smoke(linear(lambda x, w, b: torch.sigmoid(x @ w.t()) * 1.01), tmp_path, "16x16x32")
    assert status == 1
    assert {t["verdict"] for row in rows for t in row["targets"]} == {"unmeasured"}
    assert run_with(linear(), case=["16x16x32"], smoke=True, missing=True, out=tmp_path) == 1


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "linear.json"
    results.write(file, "old")
    write_text = Path.write_text

    def killed(path: Path, text: str, encoding: str) -> int:
        write_text(path, text[:2], encoding)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            results.write(file, "newer")
    assert file.read_text() == "old\n"
    results.write(file, "newer")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("linear.json", "newer\n")]


def test_code_is_told_apart_without_git_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "a.py"
    file.write_text("1")
    first = results.digest(tmp_path)
    assert results.digest(tmp_path) == first
    file.write_text("2")
    assert results.digest(tmp_path) != first
    file.write_text("1")
    file.rename(file.with_name("b.py"))
    assert results.digest(tmp_path) != first

    def no_git(*_: object, **__: object) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert results.commit() == results.digest()
    assert len(results.digest()) == 8

    def git(status: str) -> Any:
        def answer(words: Sequence[str], **_: object) -> Any:
            return subprocess.CompletedProcess(words, 0, stdout="abcdef0\n" if "rev-parse" in words else status)

        return answer

    monkeypatch.setattr(subprocess, "run", git(""))
    assert results.commit() == "abcdef0"
    monkeypatch.setattr(subprocess, "run", git(" M bench/run.py\n"))
    assert results.commit() == f"abcdef0+{results.digest()}"
