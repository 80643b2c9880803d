"""`python -m bench tune`: time the configs beside every heuristic's choice on a CUDA GPU.

Of every problem in a case: times the heuristic's config and those one step away, goes on from the fastest, and checks
every result against float64. Writes bench/results/<gpu>/tune-<op>-<digest>.json after every config; a second run goes
on where the first stopped. Exits with 1 if a heuristic's choice is wrong, with 2 without CUDA.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tribp
from tribp import dispatch
from tribp.launch import plan as plans
from tribp.launch.autotune import SearchResult, conditions, search
from tribp.launch.configs import basis
from tribp.launch.neighbors import neighbors

from . import results
from .operation import Operation, precision
from .options import Options
from .results import markdown
from .run import complaint, meter_and_folder, relative_errors, sentence
from .timing import Call, CpuMeter

SECONDS = 0.03  # that a config is measured for
SMOKE_NEIGHBORS = 2  # of each problem: interpreted, one takes a second

Attempt = Callable[[], tuple[str, Call]]  # what is wrong with its results, if anything; and the call, to be timed


class Asked(dict[Any, Any]):
    """No configs; by its keys, the problems for which one was asked."""

    def get(self, problem: Any, default: Any = None) -> Any:
        self[problem] = default
        return default


def main(options: Options) -> int:
    """0; 1 if a heuristic's own config is wrong or fails."""
    if options.smoke and not dispatch.interpreting():
        raise ValueError("tune --smoke needs triton, and TRITON_INTERPRET=1 before kernels are imported")
    each = options.cases_of_each()
    meter, folder = meter_and_folder(options)
    end = time.monotonic() + (math.inf if options.budget is None else 60 * options.budget)
    good = True
    with tribp.use_backend("triton"):
        for n, (operation, cases) in enumerate(each):
            now = time.monotonic()
            share = (end - now) / (len(each) - n)  # what one leaves, the next ones have
            tuning = Tuning(operation, options, meter, folder, now + share)
            tuning.run(cases)
            print(f"\n{tuning.table()}\n")
            good &= tuning.good
    print(f"written to {folder}")
    return int(not good)


class Tuning:
    """One operation's, kept in `<folder>/tune-<operation>-<digest>.json`: every time as soon as it is measured.

    The digest is of GPU, versions and sources: what was measured with the same ones is not measured again, and what was
    measured with others stays in files of its own.
    """

    def __init__(self, operation: Operation, options: Options, meter: CpuMeter, folder: Path, end: float) -> None:
        self.operation, self.options, self.meter, self.end = operation, options, meter, end
        self.good = True
        results.open_folder(folder, meter.name)
        self.head = {"operation": operation.name, "smoke": options.smoke, **conditions(meter.name)}
        digest = hashlib.sha256(json.dumps(self.head).encode()).hexdigest()[:8]
        self.path = folder / f"tune-{operation.name}-{digest}.json"
        self.stamp = {"commit": results.commit(), "versions": meter.versions()}
        self.found: list[dict[str, Any]] = []
        self.entries: dict[str, dict[str, Any]] = {}  # by what is measured
        if self.path.exists():
            self.entries = results.read_json(self.path, "entries")["entries"]

    def over(self) -> bool:
        return time.monotonic() >= self.end

    def run(self, cases: Sequence[Any]) -> None:
        tuned: set[str] = set()
        for case in cases:
            if self.over():
                break
            for name, attempt in subjects(self.operation, case, self.meter):
                with plans.using(Asked()) as asked:
                    attempt()
                for problem in asked:
                    # Optimizers ask alike for very different kernels; a layer's problem says which it is.
                    what = name if self.operation.name == "optim" else repr(problem)
                    if what not in tuned and not self.over():
                        tuned.add(what)
                        self._problem(name, attempt, problem)
            self.meter.release()

    def _problem(self, name: str, attempt: Attempt, problem: Any) -> None:
        first = problem.choose()

        def around(config: Any) -> list[Any]:
            most = None if not self.options.smoke else SMOKE_NEIGHBORS if config == first else 0
            return neighbors(problem, config)[:most]

        def measure(config: Any, repetition: int) -> float | None:
            """The median in µs, from the file if it is there; None for what is wrong or fails."""
            key = f"{name} | {problem} | {json.dumps(asdict(config))} | {repetition}"
            if key not in self.entries:
                with plans.using({problem: config}):
                    try:
                        wrong, call = attempt()
                        took = None if wrong else self.meter.device_times(call, SECONDS)
                        self.entries[key] = {"wrong": wrong} if wrong else {"device_us": took}
                    except Exception as error:  # a config may not compile, or not fit
                        self.entries[key] = {"failed": sentence(error)}
                self._write()
            time: float | None = self.entries[key].get("device_us", {}).get("median")
            return time

        best = search(first, around, measure, self.over)
        if best is None:
            self.good = False
            print(f"{name}: the heuristic's own config is wrong or fails: {problem}")
        else:
            self.found.append(line(name, problem, first, best))
        self._write()

    def _write(self) -> None:
        results.write_json(self.path, self.head | self.stamp | {"found": self.found, "entries": self.entries})

    def table(self) -> str:
        mark = " (smoke: the times mean nothing)" if self.options.smoke else ""
        header = ["case", "problem", "its basis", "its choice µs", "best µs", "gain", "what changed"]
        rows = [
            [f["case"], f["kind"], f["basis"], results.decimal(f["first_us"]), results.decimal(f["best_us"]),
             f"{f['gain']:.1%}", f["changed"]]
            for f in self.found
        ]  # fmt: skip
        return f"configs of {self.operation.name}, {self.meter.name}{mark}\n\n{markdown(header, rows)}"


def line(case: str, problem: Any, first: Any, found: SearchResult[Any]) -> dict[str, Any]:
    before, after = asdict(first), asdict(found.config)
    changed = [f"{name} {before[name]} → {after[name]}" for name in before if before[name] != after[name]]
    return {
        "case": case,
        "kind": type(problem).__name__.removesuffix("Problem"),
        "problem": repr(problem),
        "basis": basis(first, problem.arch),
        "first_us": found.first_time,
        "best_us": found.time,
        "gain": 1 - found.time / found.first_time if found.first_time else 0.0,
        "changed": ", ".join(changed) or "nothing",
        "config": after,
    }


def subjects(operation: Operation, case: Any, meter: CpuMeter) -> Iterator[tuple[str, Attempt]]:
    """A case's calls by name, one a direction. The configs are those that plans use while it runs."""
    with precision(case.tf32):
        workload = operation.workload(case, meter.device)
        providers = operation.providers(case, "not tuned")
        ours, baseline = providers["tribp"], providers[operation.baseline]
        for direction in operation.directions:
            if direction == "both":
                continue  # forward, then backward
            theirs = {} if isinstance(baseline, str) else relative_errors(workload, baseline, direction)

            def attempt(direction: str = direction, theirs: dict[str, float] = theirs) -> tuple[str, Call]:
                meter.release()
                wrong = complaint(workload, relative_errors(workload, ours, direction), theirs)
                return wrong, workload.action(ours, direction).call

            yield f"{case.name} {direction}".removesuffix(" step"), attempt
