"""`python -m bench static --model`: the time that the model predicts for what `bench run` measures. Needs no GPU."""

import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tribp.launch.arch import ARCHS, Arch
from tribp.launch.plan import Launch

from . import candidates, registry
from .compiled import describe, key_of, read_launches
from .executed import Profile, profile
from .machines import MACHINES, Machine
from .model import Prediction, predict
from .predicted_and_measured import report
from .registry import Case, Operation, Work
from .results import floor
from .step_cases import StepCase
from .step_kernels import Variant
from .step_kernels import launches as step_launches
from .tables import markdown
from .work import work_of


@dataclass
class Entry:
    """One direction of one case, launched by the rules or (candidate, variant) otherwise."""

    operation: str
    case: Case | StepCase
    direction: str
    launches: list[Launch]
    work: Work
    floor_us: float
    candidate: str = ""
    variant: str = ""
    predictions: list[Prediction] = field(default_factory=list)
    error: str = ""

    @property
    def lengths(self) -> Sequence[int]:
        return lengths(self.case) if isinstance(self.case, StepCase) else ()

    @property
    def us(self) -> float:
        return sum(p.us for p in self.predictions)

    @property
    def sm_us(self) -> float:
        return sum(p.sm_us for p in self.predictions)


@dataclass(frozen=True)
class Selection:
    """What to predict. The processes of a pool make the same entries of it, in the same order."""

    operations: tuple[str, ...]
    target: str
    dtypes: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()  # only those whose name contains one of these
    candidates: bool = False

    def entries(self) -> list[Entry]:
        return self._candidates() if self.candidates else self._cases()

    def _cases(self) -> list[Entry]:
        return [
            self._entry(name, case, direction)
            for name in self.operations
            for case in registry.find([name])[0].cases
            if self._wanted(case)
            for direction in directions(name, case)
        ]

    def _candidates(self) -> list[Entry]:
        """Each after the rules' own choice for its case; that comes once."""
        found: dict[tuple[str, str], Entry] = {}
        for n, c in enumerate(candidates.ALL):
            if c.operation in self.operations and self._wanted(c.case):
                found.setdefault((c.case.name, c.direction), self._entry(c.operation, c.case, c.direction))
                with c.changed():
                    changed = self._entry(c.operation, c.case, c.direction)
                changed.candidate, changed.variant = c.name, c.variant
                changed.launches = [x.with_settings(**c.constants) for x in changed.launches]
                found[str(n), ""] = changed
        return list(found.values())

    def _wanted(self, case: Case | StepCase) -> bool:
        return (not self.dtypes or case.dtype_name in self.dtypes) and (
            not self.cases or any(part in case.name for part in self.cases)
        )

    def _entry(self, operation: str, case: Case | StepCase, direction: str) -> Entry:
        arch, machine = ARCHS[self.target], MACHINES[self.target]
        launches = launches_of(operation, case, direction, arch)
        return Entry(operation, case, direction, launches, *floor_of(operation, case, direction, launches, machine))


def directions(operation: str, case: Case | StepCase) -> list[str]:
    """Those with a target, for time or for bandwidth."""
    if isinstance(case, StepCase):
        return ["step"]
    of = differentiable(operation)
    return [
        direction
        for direction in of.directions
        if direction != "both"  # a sum of others
        and any(target.quantity in ("time", "bandwidth") for target in of.targets(case, direction))
    ]


def lengths(case: StepCase) -> list[int]:
    """Elements of each tensor."""
    return [math.prod(shape) for shape in case.shapes]


def launches_of(operation: str, case: Case | StepCase, direction: str, arch: Arch) -> list[Launch]:
    if isinstance(case, StepCase):
        from tribp import optim

        options = {**case.options, **case.beyond} | ({"fused": True} if case.scaler else {})
        variant = Variant(case.name, getattr(optim, case.optimizer), options, scaler=case.scaler)
        return step_launches(variant, case.dtype, arch, lengths(case), case.grouped)
    return differentiable(operation).all_launches(case, direction, arch)


def differentiable(operation: str) -> Operation:
    """The operation of this name. Raises ValueError if it is an entry of another kind."""
    (entry,) = registry.find([operation])
    if not isinstance(entry, Operation):
        raise ValueError(f"the model predicts a registry.Operation and optimizers' steps, and {operation} is neither")
    return entry


def floor_of(
    operation: str, case: Case | StepCase, direction: str, launches: Sequence[Launch], machine: Machine
) -> tuple[Work, float]:
    """The least work, and its time in µs, as `bench run` has it, with the machine's ceilings.

    Of an optimizer: the bytes of its launches.
    """
    if isinstance(case, StepCase):
        moved = sum(work_of(launch, lengths(case)).bytes for launch in launches)
        return Work(moved, 0), 1e6 * moved / machine.dram
    # float32 without TF32 is three products of it.
    bits, products = (16, 1) if case.dtype.itemsize == 2 else (32, 1 if case.tf32 else 3)
    rate = 2 * machine.macs[bits] * machine.processors * machine.clock * machine.reached / products
    work = differentiable(operation).work(case, direction)
    return work, floor(work, machine.dram, rate)[0]


@dataclass(frozen=True)
class Code:
    """What the model needs of a compiled kernel."""

    profile: Profile
    registers: int
    shared: int


def _compile(job: tuple[Selection, int, int]) -> dict[str, Code | str]:
    """Every `step`-th of a selection's kernels, from `first` on; what the compiler said where it gave up."""
    selection, first, step = job
    arch = ARCHS[selection.target]
    kernels = {key_of(x, arch): x for entry in selection.entries() for x in entry.launches}
    mine = dict(list(kernels.items())[first::step])
    return {
        key: compiled.error or Code(profile(code), compiled.registers, compiled.shared_memory)
        for key, (compiled, code) in zip(mine, read_launches(list(mine.values()), arch), strict=True)
    }


def evaluate(selection: Selection, jobs: int) -> list[Entry]:
    """The selection's entries, with a prediction for each launch, or the reason why there is none."""
    todo = [(selection, first, jobs) for first in range(jobs)]
    if jobs > 1:
        # spawn: the compiler's threads do not survive a fork.
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = list(pool.map(_compile, todo))
    else:
        done = [_compile(job) for job in todo]
    codes = {key: code for part in done for key, code in part.items()}
    arch, machine = ARCHS[selection.target], MACHINES[selection.target]
    entries = selection.entries()
    for entry in entries:
        _predict(entry, codes, arch, machine)
    return entries


def _predict(entry: Entry, codes: dict[str, Code | str], arch: Arch, machine: Machine) -> None:
    touched: set[int] = set()
    for launch in entry.launches:
        code, work = codes[key_of(launch, arch)], work_of(launch, entry.lengths)
        if isinstance(code, str):
            entry.error = code
            return
        how = dict(registers=code.registers, shared=code.shared, num_warps=launch.num_warps, stages=launch.num_stages)
        try:
            entry.predictions.append(predict(machine, work, code.profile, **how, cached=frozenset(touched)))
        except ValueError as error:  # larger than an SM
            entry.error = str(error)
            return
        touched |= {tensor for tensor, size in work.tensors.items() if size <= machine.l2_size / 2}


def launch_table(entries: Sequence[Entry]) -> str:
    header = ["case", "direction", "kernel", "settings", "floor µs", "predicted µs", "limited by", "programs an SM",
              "waves"]  # fmt: skip
    return markdown(
        header,
        [
            [e.case.name, e.direction, x.kernel.__name__, describe(x), f"{p.floor_us:.1f}", f"{p.us:.1f}",
             p.limited_by, f"{p.resident} ({p.resident_limit})", f"{p.waves:.2f}"]
            for e in entries if not e.error for x, p in zip(e.launches, e.predictions, strict=True)
        ],
    )  # fmt: skip


def sum_table(entries: Sequence[Entry]) -> str:
    header = ["case", "direction", "MB", "GFLOP", "launches", "floor µs", "predicted µs", "floor of it",
              "mostly limited by"]  # fmt: skip
    rows: list[list[object]] = []
    for e in entries:
        work = f"{e.work.bytes / 1e6:.1f}", f"{e.work.operations / 1e9:.1f}"
        start = [e.case.name, e.direction, *work, len(e.launches), f"{e.floor_us:.1f}"]
        if e.error:
            rows.append([*start, "", "", e.error])
            continue
        longest = max(e.predictions, key=lambda p: p.us)
        rows.append([*start, f"{e.us:.1f}", f"{e.floor_us / e.us:.0%}", longest.limited_by])
    return markdown(header, rows)


def ranking(entries: Sequence[Entry]) -> str:
    """The candidates, those first that the model expects most of; equal ones by what the SMs take of it."""
    rules = {(e.case.name, e.direction): e for e in entries if not e.candidate}
    header = ["candidate", "case", "direction", "alternative", "rule µs", "alternative µs", "gain",
              "of it SMs", "limited by"]  # fmt: skip

    def gain(e: Entry) -> float:
        return rules[e.case.name, e.direction].us / e.us - 1

    def order(e: Entry) -> tuple[float, float]:
        if e.error:
            return -math.inf, 0
        return round(gain(e), 3), rules[e.case.name, e.direction].sm_us / e.sm_us

    rows: list[list[object]] = []
    for e in sorted((e for e in entries if e.candidate), key=order, reverse=True):
        rule = rules[e.case.name, e.direction]
        start = [e.candidate, e.case.name, e.direction, e.variant, f"{rule.us:.1f}"]
        if e.error:
            rows.append([*start, "", "", "", e.error])
            continue
        limits = [max(x.predictions, key=lambda p: p.us).limited_by for x in (rule, e)]
        times = f"{e.us:.1f}", f"{gain(e):+.1%}", f"{rule.sm_us:.1f} → {e.sm_us:.1f}"
        rows.append([*start, *times, " → ".join(dict.fromkeys(limits))])
    return markdown(header, rows)


def main(selection: Selection, *, jobs: int, file: str, measured: Path | None) -> int:
    """Predict, print the tables, write the JSON; 1 if a kernel of the rules' choice does not compile."""
    started = time.perf_counter()
    machine = MACHINES[selection.target]
    entries = evaluate(selection, jobs)
    if selection.candidates:
        print(ranking(entries))
        print("\nNot in the model:")
        for unseen in candidates.UNSEEN:
            print(f"- {unseen.name}: {unseen.reason}")
    else:
        print(launch_table(entries), sum_table(entries), sep="\n\n")
        if text := report(entries, machine.name, measured):
            print("", text, sep="\n")
    seconds = time.perf_counter() - started
    print(
        f"\nPredicted for {machine.name} ({selection.target}), not measured; {len(entries)} entries in {seconds:.0f} s"
    )
    if file:
        Path(file).write_text(json.dumps([as_row(e) for e in entries], indent=1) + "\n")
    return int(any(e.error and not e.candidate for e in entries))


def as_row(e: Entry) -> dict[str, Any]:
    return {
        "operation": e.operation,
        "case": e.case.name,
        "direction": e.direction,
        "candidate": e.candidate,
        "variant": e.variant,
        "bytes": e.work.bytes,
        "operations": e.work.operations,
        "floor_us": e.floor_us,
        "predicted_us": e.us,
        "sm_us": e.sm_us,
        "error": e.error,
        "launches": [
            {"kernel": x.kernel.__name__, "settings": describe(x), **asdict(p)}
            for x, p in zip(e.launches, e.predictions, strict=False)
        ],
    }
