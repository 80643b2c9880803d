"""`python -m bench sweep`: the rules' launch settings against those around them, on the cases that are measured."""

import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tribp
from tribp import dispatch
from tribp.launch.finds import conditions
from tribp.launch.matmul import basis
from tribp.launch.search import Found, search
from tribp.launch.tuning import Question, encode, hearing, rules_answer
from tribp.launch.variants import variants

from . import results
from .operation import Operation
from .results import markdown
from .run import Options, errors, precision, sentence
from .timing import Call, CpuMeter, CudaMeter

SMOKE_VARIANTS = 2  # of each rule: interpreted, one takes a second


@dataclass(frozen=True)
class Subject:
    """A call whose settings are swept. `attempt` makes it: what is wrong with its results, if anything; and the call,
    to be timed. The settings are those that the rules give while it runs."""

    name: str
    attempt: Callable[[], tuple[str, Call]]


def main(operations: Sequence[Operation], options: Options, budget: float | None) -> int:
    """0; 1 if a rule's own settings are wrong or fail; 2 without CUDA. budget: minutes, or None."""
    if not options.smoke and not torch.cuda.is_available():
        print("bench sweep needs CUDA, and torch finds no GPU here (--smoke walks through it)", file=sys.stderr)
        return 2
    if options.smoke and not dispatch.interpreting():
        raise ValueError("sweep --smoke needs triton, and TRITON_INTERPRET=1 before kernels are imported")
    meter = CpuMeter() if options.smoke else CudaMeter()
    folder = options.out
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="tribp-sweep-")) if options.smoke else results.ROOT / meter.slug
    cases = {operation.name: options.cases_of(operation) for operation in operations}
    if not any(cases.values()):
        raise ValueError("there is no such case; `bench run` with the same words names those that are")
    end = time.monotonic() + (math.inf if budget is None else 60 * budget)
    good = True
    # Backward on this thread: what is on trial in one thread is not in another.
    with tribp.use_backend("triton"), torch.autograd.set_multithreading_enabled(False):
        for left, operation in zip(range(len(operations), 0, -1), operations, strict=True):
            now = time.monotonic()
            share = now + (end - now) / left  # what one leaves, the next ones have
            sweep = Sweep(operation, options, meter, folder, lambda share=share: time.monotonic() >= share)  # type: ignore[misc]
            sweep.run(valuable_first(operation, cases[operation.name]))
            print(f"\n{sweep.table()}\n")
            good &= sweep.good
    print(f"written to {folder}")
    return 0 if good else 1


def valuable_first(operation: Operation, cases: Sequence[Any]) -> list[Any]:
    """Those with targets before the others; among themselves as they are."""

    def has_targets(case: Any) -> bool:
        targets = [target for direction in operation.directions for target in operation.targets(case, direction)]
        return any(target.quantity != "launches" for target in targets)  # that is every step's

    return sorted(cases, key=lambda case: not has_targets(case))


class Sweep:
    """One operation's, kept in `<folder>/sweep-<operation>.json`: every time as soon as it is measured.

    Entries of an earlier run on the same GPU, versions and sources are not measured again.
    """

    def __init__(
        self, operation: Operation, options: Options, meter: CpuMeter, folder: Path, over: Callable[[], bool]
    ) -> None:
        self.operation, self.options, self.meter, self.over = operation, options, meter, over
        self.good = True
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"sweep-{operation.name}.json"
        self.head = {"operation": operation.name, "smoke": options.smoke, **conditions(meter.name)}
        self.stamp = {"commit": results.commit(), "versions": meter.versions()}
        self.entries: dict[str, dict[str, Any]] = {}  # by what is measured
        self.found: list[dict[str, Any]] = []
        self._resume()

    def _resume(self) -> None:
        if not self.path.exists():
            return
        before = json.loads(self.path.read_text())
        if all(before.get(key) == value for key, value in self.head.items()):
            self.entries = before["entries"]
        else:
            kept = self.path.with_suffix(".old.json")
            self.path.replace(kept)
            print(f"{self.path.name} is of another GPU, version or state of the sources; it is now {kept.name}")

    def run(self, cases: Sequence[Any]) -> None:
        swept: set[str] = set()
        for case in cases:
            if self.over():
                break
            for subject in subjects(self.operation, case, self.meter):
                with hearing() as heard:
                    subject.attempt()
                for question in heard.questions.values():
                    # Optimizers ask one rule about very different kernels; a layer's question says which it is.
                    what = subject.name if self.operation.name == "optim" else question.key
                    if what not in swept and not self.over():
                        swept.add(what)
                        self._question(subject, question)
            gc.collect()
            self.meter.release()

    def _question(self, subject: Subject, question: Question) -> None:
        first = rules_answer(question)
        found = search(
            first,
            lambda settings: self._around(question, settings, first),
            lambda settings, repetition: self._time(subject, question, settings, repetition),
            self.over,
        )
        if found is None:
            self.good = False
            print(f"{subject.name}: the rule's own settings are wrong or fail: {question.key}")
        else:
            self.found.append(line(subject, question, first, found))
        self._write()

    def _around(self, question: Question, settings: Any, first: Any) -> list[Any]:
        found = variants(question, settings)
        if self.options.smoke:
            return found[:SMOKE_VARIANTS] if settings == first else []
        return found

    def _time(self, subject: Subject, question: Question, settings: Any, repetition: int) -> float | None:
        """The median in µs, from the file if it is there; None for what is wrong or fails."""
        name = f"{subject.name} | {question.key} | {json.dumps(encode(settings))} | {repetition}"
        if name not in self.entries:
            entry: dict[str, Any]
            with hearing({question.key: settings}):
                try:
                    wrong, action = subject.attempt()
                    entry = {"wrong": wrong} if wrong else {"device_us": asdict(self.meter.device_times(action))}
                except Exception as error:  # variants may not compile, or not fit
                    entry = {"failed": sentence(error)}
            self.entries[name] = entry
            self._write()
        time = self.entries[name].get("device_us")
        return None if time is None else float(time["median"])

    def _write(self) -> None:
        content = self.head | self.stamp | {"found": self.found, "entries": self.entries}
        results.write(self.path, json.dumps(content, indent=1, ensure_ascii=False))

    def table(self) -> str:
        mark = " (smoke: the times mean nothing)" if self.options.smoke else ""
        header = ["case", "rule", "its basis", "its choice µs", "best µs", "gain", "what changed"]
        rows = [
            [f["case"], f["rule"], f["basis"], results.decimal(f["rule_us"]), results.decimal(f["best_us"]),
             f"{f['gain']:.1%}", f["changed"]]
            for f in self.found
        ]  # fmt: skip
        return f"sweep of {self.operation.name}, {self.meter.name}{mark}\n\n{markdown(header, rows)}"


def line(subject: Subject, question: Question, first: Any, found: Found[Any]) -> dict[str, Any]:
    before, after = encode(first), encode(found.settings)
    changed = [f"{name} {before[name]} → {after[name]}" for name in before if before[name] != after[name]]
    return {
        "case": subject.name,
        "rule": question.rule,
        "question": question.key,
        "basis": basis(first, question.facts["arch"]),
        "rule_us": found.first_time,
        "best_us": found.time,
        "gain": 1 - found.time / found.first_time if found.first_time else 0.0,
        "changed": ", ".join(changed) or "nothing",
        "settings": after,
    }


def subjects(operation: Operation, case: Any, meter: CpuMeter) -> Iterator[Subject]:
    """A case's calls: each direction."""
    with precision(case.tf32):
        problem = operation.problem(case, meter.device)
        reference = problem.reference()
        providers = operation.providers(case, "not swept")
        ours, baseline = providers["tribp"], providers[operation.baseline]
        for direction in operation.directions:
            if direction == "both":
                continue  # forward, then backward
            theirs = {} if isinstance(baseline, str) else errors(problem.results(baseline, direction), reference)

            def attempt(direction: str = direction, theirs: dict[str, float] = theirs) -> tuple[str, Call]:
                gc.collect()
                meter.release()
                found = errors(problem.results(ours, direction), reference)
                return problem.wrong(found, theirs), problem.action(ours, direction).call

            yield Subject(" ".join([case.name, direction]).removesuffix(" step"), attempt)
