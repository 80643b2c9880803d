"""`python -m bench static --model`: the time that the model predicts for what `bench run` measures. Needs no GPU."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tribp.launch.arch import ARCHS, Arch
from tribp.launch.plan import Launch

from ..compile import key_of, read_launches, spread
from ..expectations import Compiled
from ..operation import Operation, Work, describe, find
from ..results import floor, markdown, write_json
from ..run import selected
from .executed import Profile, profile
from .machines import MACHINES, Machine
from .time import Prediction, predict
from .work import work_of

Code = tuple[Compiled, Profile | None]  # no profile of what does not compile


@dataclass
class Entry:
    """One direction of one case."""

    operation: str
    case: Any
    direction: str
    launches: Sequence[Launch]
    work: Work
    floor_us: float
    predictions: list[Prediction] = field(default_factory=list)
    error: str = ""

    @property
    def us(self) -> float:
        return sum(p.us for p in self.predictions)


@dataclass(frozen=True)
class Selection:
    """What to predict. The processes of a pool make the same entries of it, in the same order."""

    operations: tuple[str, ...]
    target: str
    dtypes: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()  # only those whose name contains one of these

    def entries(self) -> list[Entry]:
        arch, machine = ARCHS[self.target], MACHINES[self.target]
        return [
            Entry(
                operation.name, case, direction, operation.launches(case, direction, arch),
                operation.work(case, direction), floor_us(operation, case, direction, machine),
            )
            for operation in find(self.operations)
            for case in operation.cases
            if selected(case, self.cases, self.dtypes)
            for direction in directions(operation, case)
        ]  # fmt: skip


def directions(operation: Operation, case: Any) -> list[str]:
    """Those with a target that a time or the launches can meet; "both" is a sum of others."""
    return [
        direction
        for direction in operation.directions
        if direction != "both"
        and any(target.quantity in ("time", "bandwidth", "launches") for target in operation.targets(case, direction))
    ]


def floor_us(operation: Operation, case: Any, direction: str, machine: Machine) -> float:
    """As `bench run` has it, with the machine's ceilings."""
    # float32 without TF32 is three products of it.
    bits, products = (16, 1) if case.dtype.itemsize == 2 else (32, 1 if case.tf32 else 3)
    rate = 2 * machine.macs[bits] * machine.processors * machine.clock * machine.reached / products
    return floor(operation.work(case, direction), machine.dram, rate if operation.products else None)[0]


def _compile(selection: Selection, part: slice) -> list[tuple[str, Code]]:
    arch = ARCHS[selection.target]
    kernels = list({key_of(x, arch): x for entry in selection.entries() for x in entry.launches}.items())[part]
    codes = read_launches([launch for _, launch in kernels], arch)
    return [
        (key, (compiled, profile(code) if code else None))
        for (key, _), (compiled, code) in zip(kernels, codes, strict=True)
    ]


def evaluate(selection: Selection, jobs: int) -> list[Entry]:
    """The selection's entries, with a prediction for each launch, or the reason why there is none."""
    codes = dict(spread(_compile, selection, jobs))
    entries = selection.entries()
    for entry in entries:
        _predict(entry, codes, ARCHS[selection.target], MACHINES[selection.target])
    return entries


def _predict(entry: Entry, codes: Mapping[str, Code], arch: Arch, machine: Machine) -> None:
    touched: set[int] = set()
    (operation,) = find([entry.operation])
    for launch in entry.launches:
        work, (code, executed) = work_of(operation, launch, entry.case), codes[key_of(launch, arch)]
        entry.error = code.error
        if executed is None:
            return
        how = dict(
            registers=code.registers, shared=code.shared_memory, num_warps=launch.num_warps, stages=launch.num_stages
        )
        try:
            entry.predictions.append(predict(machine, work, executed, **how, cached=frozenset(touched)))
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


def main(selections: Sequence[Selection], *, jobs: int, file: str) -> int:
    """Predict, print the tables, write the JSON; 1 if a kernel does not compile. Raises ValueError without a model."""
    for selection in selections:
        if selection.target not in MACHINES:
            raise ValueError(f"there is no model of {selection.target}; there is one of {', '.join(MACHINES)}")
    rows: list[dict[str, Any]] = []
    for selection in selections:
        started = time.perf_counter()
        entries = evaluate(selection, jobs)
        seconds, machine = time.perf_counter() - started, f"{MACHINES[selection.target].name} ({selection.target})"
        print(launch_table(entries), sum_table(entries), sep="\n\n")
        print(f"\nPredicted for {machine}, not measured; {len(entries)} entries in {seconds:.0f} s")
        rows += [{"target": selection.target, **as_row(e)} for e in entries]
    if file:
        write_json(Path(file), rows)
    return int(any(row["error"] for row in rows))


def as_row(e: Entry) -> dict[str, Any]:
    return {
        "operation": e.operation,
        "case": e.case.name,
        "direction": e.direction,
        "bytes": e.work.bytes,
        "operations": e.work.operations,
        "floor_us": e.floor_us,
        "predicted_us": e.us,
        "error": e.error,
        "launches": [
            {"kernel": x.kernel.__name__, "settings": describe(x), **asdict(p)}
            for x, p in zip(e.launches, e.predictions, strict=False)
        ],
    }
