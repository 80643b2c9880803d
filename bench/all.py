"""`python -m bench all`: everything a GPU is wanted for, unattended, within a budget of time.

GPU tests, measurements, compute-sanitizer where it is installed, torch.compile beside them, tuning of launch configs,
and the long tail of cases: the most valuable first, for it may be cut off at any time, each step in a process of its
own. What was found is in DIR at once: steps.json says what became of each step, log.txt holds what they printed, and
<op>.json the measurements. With the same DIR it goes on, on the same GPU: what is done is not done again, what failed
only with other code. Writes the report and a table of the steps last. Exits with 1 if a step failed, with 2 without
CUDA.
"""

import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from . import report, results
from .operation import Operation, find
from .options import Options
from .results import markdown
from .timing import CpuMeter

BENCH = (sys.executable, "-m", "bench")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SHARE = 10  # cases that are measured in a step: of each operation some, before any has all
RESERVE = 30.0  # seconds of the budget that are kept for the report
TAIL = 12  # lines of a failed step's output that are shown
TOOLS = {"memory": "memcheck", "races": "racecheck"}  # of compute-sanitizer


class Step(NamedTuple):
    """A command that is run in the root of the checkout.

    limit: seconds after which it is stopped. Where it resumes, it then goes on in the next call; anything else hangs,
    and has failed.
    """

    name: str
    command: Sequence[str]
    limit: float
    resumes: bool = False
    environment: Mapping[str, str] = {}


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(out: Path, smoke: bool) -> list[Step]:
    """All steps; `out` is where they leave their results. smoke: tiny, for a CPU."""
    # smoke: the kernels by the interpreter, on the CPU even where there is a GPU.
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {}
    operations, program = find(), sanitizer()

    def step(name: str, *command: str, minutes: float, resumes: bool = False, **variables: str) -> Step:
        return Step(name, command, 60 * minutes, resumes, environment | variables)

    def run(of: Operation, name: str, *options: str, minutes: float = 4) -> Step:
        chosen = ("--smoke", "--first", "1") if smoke else options  # smoke has cases of its own
        words = ("run", of.name, *chosen, "--missing", "--out", str(out))
        return step(f"{of.name}: {name}", *BENCH, *words, minutes=minutes, resumes=True)

    def tests(name: str, of: Operation, *selection: str, minutes: float = 3) -> Step:
        return step(f"tests {name}", *PYTEST, *(of.tests.smoke if smoke else selection), minutes=minutes)

    def sanitized(kind: str, of: Operation) -> Step:
        command: list[str] = [str(program), "--tool", TOOLS[kind], "--error-exitcode", "99", *PYTEST]
        command += of.tests.smoke if smoke else of.tests.checked
        # Without torch's cache every tensor is an allocation of its own, whose edges memcheck sees.
        return step(f"{kind} {of.name}", *command, minutes=5, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def tune(of: Operation) -> Step:
        chosen = ["--smoke", "--budget", "1"] if smoke else ["--dtype", of.cases[0].dtype_name, "--budget", "3"]
        return step(f"{of.name}: tune", *BENCH, "tune", of.name, *chosen, "--out", str(out), minutes=6)

    most = max(map(judged, operations))
    large = [word for o in operations for word in o.tests.large]
    kernels = [word for o in operations for word in o.tests.kernels]
    return [
        *(tests(o.name, o, "-m", "gpu", *o.tests.gpu) for o in operations),
        # What has targets, beside eager torch. Every result is checked against float64 before it is timed.
        *(
            run(o, f"first {n}", "--first", str(n), "--no-compile")
            for n in range(SHARE, most + SHARE, SHARE) for o in operations if n < judged(o) + SHARE
        ),
        *(sanitized(kind, o) for kind in TOOLS if program for o in operations),
        # torch.compile takes minutes to tune a case.
        *(run(o, f"first {SHARE}, compile", "--first", str(SHARE), minutes=10) for o in operations),
        *(tune(o) for o in operations),
        step("host", *BENCH, "host", *["--smoke"] * smoke, "--json", str(out / "host.json"), minutes=6),
        tests("large", operations[0], "-m", "gpu", *large, minutes=15),
        *(run(o, "the rest", "--no-compile", minutes=30) for o in operations),
        tests("kernels", operations[0], *kernels, minutes=30),
        *(run(o, "the rest, compile", minutes=60) for o in operations),
    ]  # fmt: skip


def judged(of: Operation) -> int:
    """The first cases that have all of the targets but those against torch.compile."""
    cases = enumerate(of.cases, 1)
    targets = ((n, target) for n, case in cases for d in of.directions for target in of.targets(case, d))
    return max((n for n, t in targets if t.peer != "compile" and t.quantity in ("time", "bandwidth")), default=1)


def sanitizer() -> str | None:
    """compute-sanitizer, which is on no PATH where CUDA's own folder is not."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"]]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


# -- the walk ---------------------------------------------------------------------------------------------------------


class Journal:
    """What became of the steps, in this call and in those before it."""

    def __init__(self, folder: Path, gpu: str) -> None:
        results.open_folder(folder, gpu)
        self.file, self.log, self.gpu = folder / "steps.json", folder / "log.txt", gpu
        self.code = {"commit": results.commit(), "sources": results.digest()}
        self.entries: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.entries = results.read_json(self.file, "gpu steps")["steps"]

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
        results.write_json(self.file, {"gpu": self.gpu, "steps": self.entries})

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def table(self, planned: Sequence[Step]) -> str:
        left = {"status": "left", "seconds": 0, "note": ""}
        entries = [(step.name, self.entries.get(step.name, left)) for step in planned]
        rows = [[name, entry["status"], f"{entry['seconds']:.0f}", entry["note"]] for name, entry in entries]
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
    journal, code = Journal(folder, CpuMeter.name if smoke else torch.cuda.get_device_name()), 0
    if not sanitizer():
        journal.say("compute-sanitizer is not installed: its steps are left out")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: `timeout` sends it
    try:
        walk(planned, journal, 60 * (options.budget or 60))
    except KeyboardInterrupt:
        code = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    journal.say(f"\n{journal.table(planned)}\n")
    journal.say(report.write(folder))
    failed = any(journal.entries.get(step.name, {}).get("status") == "failed" for step in planned)
    return code or int(failed)


def walk(planned: Sequence[Step], journal: Journal, seconds: float) -> None:
    """Every step that is not finished, in order, as long as there is time."""
    end = monotonic() + seconds - RESERVE
    for n, step in enumerate(planned, 1):
        left = end - monotonic()
        if left > 0 and not journal.is_finished(step):
            journal.say(f"[{n}/{len(planned)}] {step.name}: {' '.join(step.command)}")
            attempt(step, journal, left)


def attempt(step: Step, journal: Journal, left: float) -> None:
    """One step, of which something is written before it begins and whatever happens."""
    journal.write(step, "cut off")  # so it was, should nothing else be written
    offset, started = journal.log.stat().st_size, monotonic()
    status, note = "cut off", "interrupted"
    try:
        code = execute(step, min(step.limit, left), journal.log)
        if code is not None:
            status, note = ("failed", f"exit code {code}") if code else ("done", "")
        elif step.resumes or step.limit > left:
            note = "the next call goes on"
        else:
            status, note = "failed", f"stopped: it took more than {step.limit:.0f} s"
    except OSError as error:
        status, note = "failed", str(error)
    finally:
        seconds = monotonic() - started
        journal.write(step, status, seconds, note)
    if status == "failed":
        tail = journal.log.read_bytes()[offset:].decode(errors="replace").splitlines()[-TAIL:]
        print("\n".join(f"    {line}" for line in tail))
    journal.say(f"  {status}, {seconds:.0f} s{': ' * bool(note)}{note}")


def execute(step: Step, seconds: float, log: Path) -> int | None:
    """The command's exit code, minus a signal's number; None if it was stopped after so many seconds.

    Its output is added to the log.
    """
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
