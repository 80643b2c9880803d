"""`python -m bench all`: one step after another within a budget, each in a process of its own, all of it written down.

The most valuable come first, for it may be cut off at any time. `<out>/steps.json` says what became of each step and
`<out>/log.txt` holds what they printed, both as it happens. A second call with the same folder goes on where the first
was cut off.
"""

import contextlib
import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from . import report, results
from .operation import Operation, find
from .options import Options
from .results import markdown

BENCH = (sys.executable, "-m", "bench")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SHARE = 10  # cases that are measured in a step: of each operation some, before any has all
RESERVE = 30.0  # seconds of the budget that are kept for the report
TAIL = 12  # lines of a failed step's output that are shown
FOUND = 99  # compute-sanitizer's exit code for what it finds: pytest has others

# Seconds. On an H200 with 16 cores and a warm cache of kernels four cases took 12 to 32, and compute-sanitizer 16 to 83
# an operation, beside other processes. The rest are estimates: of repeated measurements, and of compilation.
CASES = 45.0  # to import torch, measure the ceilings, and have the first cases
MINUTE = 60.0


@dataclass(frozen=True)
class Step:
    """A command, as words, that is run in the root of the checkout.

    needs: seconds, about, without which it is not begun: all that it takes or, if it `resumes`, what brings some
    results. limit: seconds after which it is stopped. Where it resumes, it then goes on in the next call; anything else
    hangs, and has failed.
    """

    name: str
    command: Sequence[str]
    needs: float
    limit: float
    resumes: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    lacks: str = ""  # why it cannot be run here


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(out: Path, smoke: bool) -> list[Step]:
    """All steps; `out` is where they leave their results. smoke: tiny, for a CPU."""
    # smoke: the kernels by the interpreter, on the CPU even where there is a GPU.
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {}
    operations = find()

    def step(name: str, command: Sequence[str], needs: float, limit: float, **options: Any) -> Step:
        options["environment"] = environment | options.get("environment", {})
        return Step(name, command, 1 if smoke else needs, limit, **options)

    def run(name: str, operation: str, options: str, limit: float = 4 * MINUTE) -> Step:
        chosen = ["--smoke", "--first", "1"] if smoke else options.split()  # smoke has cases of its own
        command = [*BENCH, "run", operation, *chosen, "--missing", "--out", str(out)]
        return step(f"{operation}: {name}", command, CASES, limit, resumes=True)

    def tests(name: str, of: Operation, selection: Sequence[str], needs: float = MINUTE) -> Step:
        return step(f"tests {name}", [*PYTEST, *(of.tests.smoke if smoke else selection)], needs, 3 * needs)

    def sanitized(tool: str, kind: str, of: Operation) -> Step:
        program = sanitizer()
        checked = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
        command = [*checked, *PYTEST, *(of.tests.smoke if smoke else of.tests.checked)]
        # Without torch's cache every tensor is an allocation of its own, whose edges memcheck sees.
        options = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        lacks = "" if program else "compute-sanitizer is not installed"
        return step(f"{kind} {of.name}", command, 1.5 * MINUTE, 5 * MINUTE, environment=options, lacks=lacks)

    def tune(of: Operation) -> Step:
        minutes = 1 if smoke else 3
        chosen = ["--smoke"] if smoke else ["--dtype", of.cases[0].dtype_name]
        command = [*BENCH, "tune", of.name, *chosen, "--budget", str(minutes), "--out", str(out)]
        return step(f"{of.name}: tune", command, minutes * MINUTE + 20, 2 * minutes * MINUTE)

    # Each operation's first cases, then each one's next.
    rounds = itertools.zip_longest(*([(o.name, n) for n in shares(o)] for o in operations))
    in_turn = [share for one_each in rounds for share in one_each if share]
    large = ["-m", "gpu", *(word for o in operations for word in o.tests.large)]
    kernels = [word for o in operations for word in o.tests.kernels]
    host = [*BENCH, "host", *["--smoke"] * smoke, "--json", str(out / "host.json")]
    return [
        *(tests(o.name, o, ["-m", "gpu", *o.tests.gpu]) for o in operations),
        # What has targets, beside eager torch. Every result is checked against float64 before it is timed.
        *(run(f"first {n}", name, f"--first {n} --no-compile") for name, n in in_turn),
        *(sanitized(*tool, o) for tool in (("memcheck", "memory"), ("racecheck", "races")) for o in operations),
        # torch.compile takes minutes to tune a case.
        *(run(f"first {SHARE}, compile", o.name, f"--first {SHARE}", 10 * MINUTE) for o in operations),
        *(tune(o) for o in operations),
        step("host", host, 2 * MINUTE, 6 * MINUTE),
        tests("large", operations[0], large, 5 * MINUTE),
        *(run("the rest", o.name, "--no-compile", 30 * MINUTE) for o in operations),
        tests("kernels", operations[0], kernels, 10 * MINUTE),
        *(run("the rest, compile", o.name, "", 60 * MINUTE) for o in operations),
    ]


def shares(of: Operation) -> list[int]:
    """How many cases to have measured after one step, after two …: all that have a target but against torch.compile."""

    def is_judged(case: Any) -> bool:
        targets = [target for direction in of.directions for target in of.targets(case, direction)]
        return any(t.peer != "compile" and t.quantity in ("time", "bandwidth") for t in targets)

    last = max((n for n, case in enumerate(of.cases, 1) if is_judged(case)), default=1)
    return list(range(SHARE, last + SHARE, SHARE))


def sanitizer() -> str | None:
    """compute-sanitizer, which is on no PATH where CUDA's own folder is not."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"]]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


# -- the walk ---------------------------------------------------------------------------------------------------------


class Journal:
    """What became of the steps, in this call and in those before it."""

    def __init__(self, folder: Path, smoke: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log, self.smoke = folder / "steps.json", folder / "log.txt", smoke
        stored: dict[str, Any] = {"smoke": smoke, "steps": {}}
        if self.file.exists():
            stored = json.loads(self.file.read_text())
        if stored["smoke"] != smoke:
            raise ValueError(f"{folder} holds results {'of' if stored['smoke'] else 'that are not of'} a smoke test")
        self.code = {"commit": results.commit(), "sources": results.digest()}
        self.entries: dict[str, dict[str, Any]] = stored["steps"]

    def is_finished(self, step: Step) -> bool:
        """Whether there is nothing left to do: what failed is tried again once the code is another."""
        entry = self.entries.get(step.name, {"status": "left"})
        return entry["status"] == "done" or (
            entry["status"] == "failed" and bool(entry["sources"] == self.code["sources"])
        )

    def write(self, step: Step, status: str, seconds: float = 0.0, note: str = "") -> None:
        date = datetime.datetime.now().isoformat(timespec="seconds")
        self.entries[step.name] = {
            "status": status, "seconds": round(seconds, 1), "note": note, **self.code, "date": date,
            "command": " ".join(step.command),
        }  # fmt: skip
        results.write_json(self.file, {"smoke": self.smoke, "steps": self.entries})

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(text + "\n")

    def table(self, planned: Sequence[Step]) -> str:
        rows = []
        for step in planned:
            entry = self.entries.get(step.name, {"status": "left", "note": f"needs about {step.needs:.0f} s"})
            rows.append([step.name, entry["status"], f"{entry.get('seconds', 0):.0f}", entry["note"]])
        return markdown(["step", "status", "s", ""], rows)


def main(options: Options) -> int:
    """0; 1 if a step failed; 130 after Ctrl-C."""
    smoke, only = options.smoke, options.only
    if options.out is None and not smoke:
        raise ValueError("all needs --out DIR, the folder for its results; the same one again goes on with them")
    folder = (options.out or Path(tempfile.mkdtemp(prefix="tribp-bench-"))).resolve()
    everything = plan(folder, smoke)
    planned = [s for s in everything if not only or any(part in s.name for part in only)]
    if not planned:
        raise ValueError(f"there is no such step; there are: {', '.join(step.name for step in everything)}")
    journal, code = Journal(folder, smoke), 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: `timeout` sends it
    try:
        walk(planned, journal, 60 * (options.budget or 60))
    except KeyboardInterrupt:
        code = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    journal.say(f"\n{journal.table(planned)}\n\n{report.short(folder)}\nwritten to {folder}")
    report.write(folder)
    failed = any(journal.entries.get(step.name, {}).get("status") == "failed" for step in planned)
    return code or int(failed)


def execute(step: Step, seconds: float, log: Path) -> int | None:
    """The command's exit code; None if it was stopped after so many seconds. Its output is added to the log."""
    # A GPU's steps are not interpreted, whatever the shell says.
    inherited = {k: value for k, value in os.environ.items() if k not in ("TRITON_INTERPRET", "TRIBP_BACKEND")}
    with log.open("ab") as output:
        # A process group of its own, so that all it starts can be stopped, and no session of its own, which a machine
        # that ends this one would leave running.
        process = subprocess.Popen(
            step.command, cwd=results.CHECKOUT, env={**inherited, "PYTHONUNBUFFERED": "1", **step.environment},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of it, and children that outlive their parent
            process.wait()


def walk(planned: Sequence[Step], journal: Journal, seconds: float) -> None:
    """Every step that is not finished and for which there is time, in order."""
    end = monotonic() + seconds - RESERVE
    for n, step in enumerate(planned, 1):
        left = end - monotonic()
        place = f"[{n}/{len(planned)}] {step.name}"
        if journal.is_finished(step):
            continue
        if step.lacks:
            journal.write(step, "skipped", note=step.lacks)
        elif step.needs > left:
            journal.say(f"{place}: left, it needs about {step.needs:.0f} s")
        else:
            journal.say(f"{place}: {' '.join(step.command)}")
            attempt(step, journal, left)


def attempt(step: Step, journal: Journal, left: float) -> None:
    """One step, of which something is written before it begins and whatever happens."""
    journal.write(step, "cut off")  # so it was, should nothing else be written
    offset, started = journal.log.stat().st_size, monotonic()
    status, note = "cut off", "interrupted"
    try:
        status, note = outcome(step, left, execute(step, min(step.limit, left), journal.log))
    except OSError as error:
        status, note = "failed", str(error)
    finally:
        seconds = monotonic() - started
        journal.write(step, status, seconds, note)
    if status == "failed":
        tail = journal.log.read_bytes()[offset:].decode(errors="replace").splitlines()[-TAIL:]
        print("\n".join(f"    {line}" for line in tail))
    journal.say(f"  {status}, {seconds:.0f} s{': ' * bool(note)}{note}")


def outcome(step: Step, left: float, code: int | None) -> tuple[str, str]:
    """The status and a note. code: None if it was stopped when its limit, or what was left, was over."""
    if code == 0:
        return "done", ""
    if code is None and (step.resumes or step.limit > left):
        return "cut off", "the next call goes on"
    if code is None:
        return "failed", f"stopped: it took more than {step.limit:.0f} s"
    if code == FOUND and "--error-exitcode" in step.command:
        return "failed", "compute-sanitizer found errors"
    return "failed", f"killed by signal {-code}" if code < 0 else f"exit code {code}"
