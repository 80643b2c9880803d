"""`python -m bench run`: check and time operations on a CUDA GPU.

Checks every result against float64, times what is right, and writes bench/results/<gpu>/<op>.json after each case;
`report` makes pages and pictures of it. Exits with 1 if a result is wrong, with 2 without CUDA.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tribp
from tribp import dispatch

from . import results
from .operation import Operation, Workload, describe, precision
from .options import Options
from .results import Row
from .timing import CpuMeter, CudaMeter

# Up to so many times what is allowed a peer's result is called inexact, and timed all the same. torch's fused Adam has
# an exp_avg_sq that is 1.3e-5 off on CUDA, of 5e-6 that are allowed: it forms 1 − β₂ in float32.
INEXACT = 16.0

Errors = dict[str, float]  # relative ones, by the names of the results


def main(options: Options) -> int:
    """0; 1 if tribp failed or one of its results was wrong."""
    each = options.cases_of_each()
    meter, folder = meter_and_folder(options)
    with tribp.use_backend("triton" if dispatch.interpreting() else "auto"):
        good = [run(operation, cases, options, meter, folder) for operation, cases in each]
    print(f"written to {folder}")
    return int(not all(good))


def meter_and_folder(options: Options) -> tuple[CpuMeter, Path]:
    """What measures, and where its results go."""
    if options.smoke:
        return CpuMeter(), options.out or Path(tempfile.mkdtemp(prefix="tribp-bench-"))
    meter = CudaMeter()
    return meter, options.out or results.ROOT / meter.slug


def run(operation: Operation, cases: Sequence[Any], options: Options, meter: CpuMeter, folder: Path) -> bool:
    """Measure these cases of one operation; whether all results were right."""
    store = results.Store(folder, operation, meter, smoke=options.smoke, settings=options.set)
    todo = [case for case in cases if not (options.missing and store.has(case, compiled=options.compile))]
    for case in todo:
        print(f"{operation.name} {case.name}", flush=True)
        rows = measure(operation, case, options, meter)
        store.add(rows, bandwidth=meter.bandwidth, rates=meter.rates, compiled=options.compile)
    rows = store.rows_of(cases)
    if todo:
        heading, conditions = results.heading(store.head), results.conditions(store.head)
        table = results.table(operation, rows)
        print(f"\n{heading}\n\n{conditions}\n\n{operation.legend}\n\n{table}\n")
    else:
        print(f"{operation.name}: nothing is missing")
    return all(row["providers"]["tribp"]["status"] == "ok" for row in rows)


def measure(operation: Operation, case: Any, options: Options, meter: CpuMeter) -> list[Row]:
    """A row for each direction of one case."""
    bandwidth = meter.bandwidth  # measured before the first case fills the memory
    without_compile = "" if options.compile else "skipped: --no-compile"
    if options.smoke:
        without_compile = "skipped: torch.compile takes minutes to tune, on a GPU only"
    if not without_compile:
        # Anew for every case: dynamic shapes would be slower, and a cached one could be another case's. The backward
        # pass is timed on a retained graph, which buffers donated to it would forbid.
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False
    providers = operation.providers(case, without_compile)
    with precision(case.tf32):
        torch.manual_seed(0)  # the same inputs in every run: of some, torch too is wrong in bfloat16
        try:
            workload = operation.workload(case, meter.device)
            _ = workload.reference  # computed while nothing else fills the memory
        except torch.OutOfMemoryError:  # it must not end the run
            note = "the inputs and their float64 results need more memory than the device has"
            providers = dict.fromkeys(providers, note)
        rows = []
        for direction in operation.directions:
            entries: dict[str, Row] = {}
            for name in sorted(providers, key=lambda name: name != operation.baseline):
                baseline = entries.get(operation.baseline, {}).get("errors", {})
                provider = providers[name]
                entries[name] = (
                    {"status": "skipped", "note": provider}
                    if isinstance(provider, str)
                    else attempt(operation, case, direction, workload, provider, name, baseline, meter)
                )
            entries = {name: entries[name] for name in providers}
            rate = meter.rate(case) if operation.products else None
            row = results.row(operation, case, direction, entries, bandwidth, rate)
            if dispatch.has_triton() and entries["tribp"]["status"] in ("ok", "wrong"):
                launches = operation.launches(case, direction, dispatch.arch_of(meter.device.index))
                row["settings"] = [f"{x.kernel.__name__} {describe(x)}" for x in launches]
            rows.append(row)
    return rows


def attempt(
    operation: Operation, case: Any, direction: str, workload: Workload, provider: Any, name: str,
    baseline: Errors, meter: CpuMeter,
) -> Row:  # fmt: skip
    """One provider's results, checked, and its times if they are right. baseline: the errors of torch's own.

    A peer need not be as exact as tribp has to be: see INEXACT.
    """
    try:
        errors = relative_errors(workload, provider, direction)
        verdict: Row = {"status": "ok", "errors": errors}
        if wrong := complaint(workload, errors, baseline):
            verdict |= {"status": "wrong", "note": wrong}
            if name == "tribp" or complaint(workload, errors, baseline, INEXACT):
                return verdict
            verdict["status"] = "inexact"
        return verdict | timed(operation, case, direction, workload, provider, meter)
    except torch.OutOfMemoryError:
        return {"status": "skipped", "note": "needs more memory than is free"}
    except Exception as error:  # a provider that fails must not take the others' numbers with it
        return {"status": "failed", "note": sentence(error)}
    finally:
        meter.release()


def sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def relative_errors(workload: Workload, provider: Any, direction: str) -> Errors:
    """Of each result; NaN where there is one."""
    errors, reference = {}, workload.reference
    for name, value in workload.results(provider, direction).items():
        exact = reference[name]
        errors[name] = float((value.double() - exact.value).norm()) / max(exact.scale, 1e-300)
    return errors


def complaint(workload: Workload, errors: Errors, baseline: Errors, leniency: float = 1.0) -> str:
    """What is wrong with results of these errors, or nothing. leniency: how many times what is allowed."""
    for name, error in errors.items():
        if not error <= (allowed := leniency * workload.allowed(name, baseline.get(name, 0.0))):
            return f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
    return ""


def timed(operation: Operation, case: Any, direction: str, workload: Workload, provider: Any, meter: CpuMeter) -> Row:
    """Times in µs, memory, and of small cases also what the host and a CUDA graph take."""
    before = meter.allocated()
    action = workload.action(provider, direction)
    entry: Row = {"device_us": meter.device_times(action.call), "peak_bytes": meter.peak_bytes(action.call)}
    quantities = {target.quantity for target in operation.targets(case, direction)}
    if "launches" in quantities and (kernels := meter.kernels(action.call)) is not None:
        entry["launches"], entry["busy_us"] = kernels
    if case.small:
        entry["host_us"], entry["wall_us"] = meter.call_times(action)
    if before is not None:
        entry["held_bytes"] = (meter.allocated() or 0) - before
    if case.small:
        try:
            entry["graph_us"] = meter.graph_time(
                lambda: workload.action(provider, direction, captured=True), operation.graph_calls
            )
        except Exception as error:  # what cannot be captured still has its other times
            entry["graph_note"] = sentence(error)
    return entry
