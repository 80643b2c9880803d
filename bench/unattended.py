"""`python -m bench all`: one step after another within a budget, each in a process of its own, all of it written down.

`<out>/steps.json` says what became of each step and `<out>/log.txt` holds what they printed, both as it happens. A
second call with the same folder goes on where the first was cut off.
"""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import report as pages
from . import results, steps
from .steps import Step
from .tables import markdown

ROOT = Path(__file__).parents[1]
RESERVE = 30.0  # seconds of the budget that are kept for the report
GRACE = 5.0  # seconds in which a step may end by itself when it is told to
TAIL = 12  # lines of a failed step's output that are shown
Execute = Callable[[Step, float, Path], "int | None"]


@dataclass(frozen=True)
class Options:
    budget: float  # minutes
    out: Path | None = None
    only: Sequence[str] = ()
    smoke: bool = False


class Journal:
    """What became of the steps, in this call and in those before it."""

    def __init__(self, folder: Path, smoke: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log = folder / "steps.json", folder / "log.txt"
        stored: dict[str, Any] = {"smoke": smoke, "steps": {}}
        if self.file.exists():
            stored = json.loads(self.file.read_text())
        if stored["smoke"] != smoke:
            raise ValueError(f"{folder} holds results {'of' if stored['smoke'] else 'that are not of'} a smoke test")
        self.smoke = smoke
        self.commit, self.sources = results.commit(), results.digest()
        self.entries: dict[str, dict[str, Any]] = stored["steps"]

    def settled(self, step: Step) -> bool:
        """Whether there is nothing left to do: what failed is tried again once the code is another."""
        entry = self.entries.get(step.name, {})
        return entry.get("status") == "done" or (entry.get("status") == "failed" and entry["sources"] == self.sources)

    def write(self, step: Step, status: str, seconds: float = 0.0, code: int | None = None, note: str = "") -> None:
        self.entries[step.name] = {
            "status": status, "seconds": round(seconds, 1), "code": code, "note": note, "commit": self.commit,
            "sources": self.sources,
            "date": datetime.datetime.now().isoformat(timespec="seconds"), "command": " ".join(step.command),
        }  # fmt: skip
        results.write(self.file, json.dumps({"smoke": self.smoke, "steps": self.entries}, indent=1))

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(text + "\n")

    def table(self, planned: Sequence[Step]) -> str:
        rows = []
        for step in planned:
            found = self.entries.get(step.name, {"status": "left", "note": f"needs about {step.needs:.0f} s"})
            rows.append([step.name, found["status"], f"{found.get('seconds', 0):.0f}", found["note"]])
        return markdown(["step", "status", "s", ""], rows)


def main(options: Options) -> int:
    """0; 1 if a step failed; 2 without CUDA; 130 after Ctrl-C."""
    if not options.smoke and not torch.cuda.is_available():
        print("bench all needs CUDA, and torch finds no GPU here (--smoke walks through it on a CPU)", file=sys.stderr)
        return 2
    if options.out is None and not options.smoke:
        raise ValueError("all needs --out DIR, the folder for its results; the same one again goes on with them")
    folder = (options.out or Path(tempfile.mkdtemp(prefix="tribp-bench-"))).resolve()
    planned = steps.named(steps.plan(folder, options.smoke), options.only)
    report = steps.report(folder)
    journal = Journal(folder, options.smoke)
    code = 0
    try:
        with terminated_as_interrupted():
            walk(planned, journal, 60 * options.budget)
            attempt(report, journal, RESERVE, execute, time.monotonic)  # always: there is more to tell every time
    except KeyboardInterrupt:
        code = 130
    planned.append(report)
    journal.say(f"\n{journal.table(planned)}\n\n{pages.short(folder)}\nwritten to {folder}")
    failed = any(journal.entries.get(step.name, {}).get("status") == "failed" for step in planned)
    return code or int(failed)


def execute(step: Step, seconds: float, log: Path) -> int | None:
    """The command's exit code; None if it was stopped after so many seconds. Its output is added to the log."""
    environment: Mapping[str, str] = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TRIBP_BACKEND")
    } | {"PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("ab") as output:
        # A process group of its own, so that all it starts can be stopped, and no session of its own, which a machine
        # that ends this one would leave running.
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a process and what it started; nothing happens where they have ended."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)  # what ignored it, and children that outlive their parent
    process.wait()


def walk(
    planned: Sequence[Step], journal: Journal, seconds: float, execute: Execute = execute,
    clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Every step that is not settled and for which there is time, in order."""
    started = clock()
    for n, step in enumerate(planned, 1):
        left = seconds - RESERVE - (clock() - started)
        place = f"[{n}/{len(planned)}] {step.name}"
        if journal.settled(step):
            continue
        if step.lacks:
            journal.write(step, "skipped", note=step.lacks)
        elif step.needs > left:
            journal.say(f"{place}: left, it needs about {step.needs:.0f} s")
        else:
            journal.say(f"{place}: {' '.join(step.command)}")
            attempt(step, journal, left, execute, clock)


def attempt(step: Step, journal: Journal, left: float, execute: Execute, clock: Callable[[], float]) -> None:
    """One step, of which something is written before it begins and whatever happens."""
    journal.write(step, "cut off")  # so it was, should nothing else be written
    offset = journal.log.stat().st_size if journal.log.exists() else 0
    started = clock()
    code: int | None = None
    try:
        code = execute(step, min(step.limit, left), journal.log)
    except KeyboardInterrupt:
        journal.write(step, "cut off", clock() - started, note="interrupted")
        raise
    except OSError as error:
        journal.write(step, "failed", note=str(error))
        return
    seconds = clock() - started
    if code == 0:
        journal.write(step, "done", seconds, code)
    elif code is not None:
        journal.write(step, "failed", seconds, code, verdict(step, code))
    elif step.resumes or step.limit > left:
        journal.write(step, "cut off", seconds, note="the next call goes on")
    else:
        journal.write(step, "failed", seconds, note=f"stopped: it took more than {step.limit:.0f} s")
    entry = journal.entries[step.name]
    if entry["status"] == "failed":
        tail = journal.log.read_bytes()[offset:].decode(errors="replace").splitlines()[-TAIL:]
        print("\n".join(f"    {line}" for line in tail))
    journal.say(f"  {entry['status']}, {seconds:.0f} s{': ' * bool(entry['note'])}{entry['note']}")


def verdict(step: Step, code: int) -> str:
    if code == steps.FOUND and "--error-exitcode" in step.command:
        return "compute-sanitizer found errors"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM stops the step too, like Ctrl-C: `timeout` sends it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
