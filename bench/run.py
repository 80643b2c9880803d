"""`python -m bench run`: check each contender, time those that are right, and write it all down as it goes."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tribp
from tribp import dispatch

from . import results
from .meters import CpuMeter, CudaMeter, Meter
from .registry import Case, Measured, Named, Operation, Problem, Reference

# torch.compile at its best, less its own CUDA graphs: they copy their inputs first and cannot repeat a backward pass,
# and what a graph saves is measured in one of ours (`Meter.graph_time`), for every contender alike.
COMPILE_MODE = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Options:
    cases: Sequence[str] = ()  # parts of case names; none: all
    dtypes: Sequence[str] = ()
    smoke: bool = False
    compile: bool = True
    first: int | None = None  # of each operation, only so many of these cases
    missing: bool = False  # leave out what the results hold already, measured with the present code
    picture: bool = True
    out: Path | None = None


def main(operations: Sequence[Measured], options: Options) -> int:
    """0; 1 if a result was wrong or tribp failed; 2 without CUDA."""
    if not options.smoke and not torch.cuda.is_available():
        print("bench run needs CUDA, and torch finds no GPU here (--smoke walks through it on a CPU)", file=sys.stderr)
        return 2
    cases = {operation.name: chosen(operation, options) for operation in operations}
    if not any(cases.values()):
        there = (f"{o.name}: {', '.join(case.name for case in existing(o, options))}" for o in operations)
        raise ValueError(f"there is no such case; there are of {'; of '.join(there)}")
    meter: Meter = CpuMeter() if options.smoke else CudaMeter()
    folder = options.out
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="tribp-bench-")) if options.smoke else results.ROOT / meter.slug
    good = True
    with tribp.use_backend("triton" if dispatch.interpreting() else "auto"):
        ceilings = Ceilings(meter)
        for operation in operations:
            if cases[operation.name]:
                good &= run(operation, cases[operation.name], options, meter, ceilings, folder)
    print(f"written to {folder}")
    return 0 if good else 1


class Ceilings:
    """The rates that floors are computed from, measured in this run, each when it is first asked for."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.bandwidth = meter.copy_bandwidth()
        self.rates: dict[str, float] = {}

    def rate(self, case: Case) -> float:
        """Operations a second for products of the case's type and precision."""
        own = self._measured(case.dtype, case.tf32)
        if case.dtype == torch.float32 and not case.tf32:
            # Three TF32 products keep float32's accuracy: whichever way is faster is the ceiling.
            own = max(own, self._measured(case.dtype, True) / 3)
        return own

    def _measured(self, dtype: torch.dtype, tf32: bool) -> float:
        name = Case((), dtype, tf32).dtype_name
        if name not in self.rates:
            with precision(tf32):
                self.rates[name] = self._meter.matrix_rate(dtype)
        return self.rates[name]


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """float32 products and convolutions of all contenders in TF32, or in full precision whatever the environment says.

    torch's defaults differ between the two: convolutions are in TF32 unless they are told otherwise.
    """
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """cuDNN times its algorithms at the first call of every shape, and takes the fastest: torch at its best."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def existing(operation: Measured, options: Options) -> Sequence[Any]:
    return operation.smoke_cases if options.smoke else operation.cases


def chosen(operation: Measured, options: Options) -> Sequence[Any]:
    return [case for case in existing(operation, options) if selected(case, options)][: options.first]


def run(
    operation: Measured, cases: Sequence[Any], options: Options, meter: Meter, ceilings: Ceilings, folder: Path
) -> bool:
    """Measure these cases of one operation; whether all results were right."""
    store = results.Store(folder, operation, meter, smoke=options.smoke)
    todo = [case for case in cases if not (options.missing and store.has(case, compiled=options.compile))]
    for case in todo:
        print(f"{operation.name} {case.name}", flush=True)
        rows = operation.measure(case, options, meter, ceilings)
        store.add(rows, bandwidth=ceilings.bandwidth, rates=ceilings.rates, compiled=options.compile)
    rows = store.rows_of(cases)
    if todo:
        if options.picture:
            store.plot()
        print(f"\n{store.heading()}\n\n{store.conditions()}\n\n{operation.table(rows)}\n")
    else:
        print(f"{operation.name}: nothing is missing")
    wrong = any(entry["status"] == "wrong" for row in rows for entry in row["contenders"].values())
    return not wrong and all(row["contenders"]["tribp"]["status"] == "ok" for row in rows)


def selected(case: Named, options: Options) -> bool:
    return (not options.cases or any(part in case.name for part in options.cases)) and (
        not options.dtypes or case.dtype_name in options.dtypes
    )


def contenders(operation: Operation, options: Options) -> dict[str, Callable[..., Any] | str]:
    """The functions to compare, by name; in place of one that is left out, a sentence that says why."""
    found: dict[str, Callable[..., Any] | str] = dict(operation.contenders)
    if options.smoke:
        found["compile"] = "skipped: torch.compile takes minutes to tune, on a GPU only"
    elif not options.compile:
        found["compile"] = "skipped: --no-compile"
    else:
        # Anew for every case: dynamic shapes would be slower, and a cached one could be another case's. The backward
        # pass is timed on a retained graph, which buffers donated to it would forbid.
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False
        found["compile"] = torch.compile(operation.contenders["eager"], mode=COMPILE_MODE, dynamic=False)
    return found


def measure(
    operation: Operation, case: Case, options: Options, meter: Meter, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """A row for each direction of one case."""
    with precision(case.tf32), tuned():
        return _measure(operation, case, options, meter, ceilings)


def _measure(
    operation: Operation, case: Case, options: Options, meter: Meter, ceilings: Ceilings
) -> list[dict[str, Any]]:
    functions = contenders(operation, options)
    try:
        problem = operation.problem(case, meter.device)
        reference = problem.reference()
    except torch.OutOfMemoryError:  # it must not end the run
        note = "the inputs and their float64 results need more memory than the device has"
        functions = dict.fromkeys(functions, note)
        reference = {}
    rows = []
    for direction in operation.directions:
        yardstick: dict[str, float] = {}  # torch's own errors
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(functions, key=lambda name: name != "eager"):
            function = functions[name]
            if isinstance(function, str):
                entries[name] = {"status": "skipped", "note": function}
                continue
            try:
                found = errors(problem.results(function, direction), reference)
                if name == "eager":
                    yardstick = found
                entry: dict[str, Any] = {"status": "ok", "errors": found}
                if wrong := too_far(found, yardstick, problem, case):
                    entry |= {"status": "wrong", "note": wrong}
                else:
                    entry |= timed(function, problem, direction, case, meter)
            except Exception as error:  # a contender that fails must not take the others' numbers with it
                entry = {"status": "failed", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            entries[name] = entry
        row = results.row(operation, case, direction, entries, ceilings.bandwidth, ceilings.rate(case))
        if dispatch.has_triton():
            row["settings"] = list(operation.settings(case, direction, dispatch.arch_of(meter.device.index)))
        rows.append(row)
    return rows


def errors(found: Mapping[str, Tensor], reference: Mapping[str, Reference]) -> dict[str, float]:
    """The relative error of each result; NaN where there is one."""
    return {
        name: float((value.double() - reference[name].value).norm()) / max(reference[name].scale, 1e-300)
        for name, value in found.items()
    }


def too_far(found: Mapping[str, float], yardstick: Mapping[str, float], problem: Problem, case: Case) -> str:
    """What is wrong with results of these errors, or nothing."""
    for name, error in found.items():
        limit, both = problem.tolerance(name)
        # Half a unit in the operands' last place on top: where torch happens to be exact, or (on a CPU) does not round
        # to the TF32 that is allowed, twice its error is nothing.
        twice = 2 * yardstick.get(name, 0.0) + (2**-10 if case.tf32 else torch.finfo(case.dtype).eps) / 2
        bound = min(limit, twice) if both else max(limit, twice)
        if not error <= bound:
            return f"{name}: relative error {error:.2e}, allowed {bound:.2e}"
    return ""


def timed(function: Callable[..., Any], problem: Problem, direction: str, case: Case, meter: Meter) -> dict[str, Any]:
    action = problem.action(function, direction)
    entry: dict[str, Any] = {"device_us": asdict(meter.device_times(action))}
    if case.small:
        entry["host_us"] = meter.host_time(action)
        try:
            entry["graph_us"] = meter.graph_time(lambda: problem.action(function, direction))
        except RuntimeError as error:  # what cannot be captured still has its other times
            entry["graph_note"] = str(error).splitlines()[0]
    if direction == "both":
        entry["peak_bytes"] = meter.peak_bytes(action)
    return entry
