"""`python -m bench static --model`: the time that the model predicts for what `bench run` measures. Needs no GPU."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tribp.launch.arch import ARCHS, Arch

from ..compile import collect, key_of, read_all
from ..expectations import Compiled
from ..operation import Operation, describe
from ..options import Options
from ..results import Row, floor, markdown, write_json
from .executed import Profile, profile
from .machines import MACHINES, Machine
from .time import predict
from .work import work_of

Profiled = tuple[Compiled, Profile | None]  # no profile of what does not compile


def selected(options: Options) -> Iterator[tuple[Arch, Operation, Any, str]]:
    """What to predict: every target, operation, case and direction."""
    for target in options.target or ["sm_90"]:
        for operation, cases in options.cases_of_each():
            for case in cases:
                yield from ((ARCHS[target], operation, case, direction) for direction in directions(operation, case))


def directions(operation: Operation, case: Any) -> list[str]:
    """Those with a target that a time or the launches can meet; "both" is a sum of others."""
    quantities = {d: {target.quantity for target in operation.targets(case, d)} for d in operation.directions}
    return [d for d, some in quantities.items() if d != "both" and some & {"time", "bandwidth", "launches"}]


def floor_us(operation: Operation, case: Any, direction: str, machine: Machine) -> float:
    """As `bench run` has it, with the machine's ceilings."""
    # float32 without TF32 is three products of it.
    bits, products = (16, 1) if case.dtype.itemsize == 2 else (32, 1 if case.tf32 else 3)
    rate = 2 * machine.macs[bits] * machine.processors * machine.clock * machine.reached / products
    return floor(operation.work(case, direction), machine.dram, rate if operation.products else None)[0]


def predicted(arch: Arch, operation: Operation, case: Any, direction: str, codes: Mapping[str, Profiled]) -> Row:
    """A direction of a case, with a prediction for each of its launches, or the reason why there is none."""
    machine, least = MACHINES[arch.name], operation.work(case, direction)
    launches: list[Row] = []
    error = ""
    touched: set[int] = set()
    for launch in operation.launches(case, direction, arch):
        work, (code, executed) = work_of(operation, launch, case), codes[key_of(operation, launch, arch)]
        error = code.error
        if executed is None:
            break
        try:
            prediction = predict(
                machine, work, executed, registers=code.registers, shared=code.shared_memory,
                num_warps=launch.num_warps, stages=launch.num_stages, cached=frozenset(touched),
            )  # fmt: skip
        except ValueError as too_large:
            error = str(too_large)
            break
        described = {"kernel": launch.kernel.__name__, "settings": describe(launch), "bytes": work.bytes}
        launches.append({**described, **asdict(prediction)})
        touched |= {tensor for tensor, size in work.tensors.items() if size <= machine.l2_size / 2}
    return {
        "target": arch.name, "operation": operation.name, "case": case.name, "direction": direction,
        "bytes": least.bytes, "operations": least.operations,
        "floor_us": floor_us(operation, case, direction, machine),
        "predicted_us": sum(x["us"] for x in launches), "error": error, "launches": launches,
    }  # fmt: skip


def launch_table(rows: Sequence[Row]) -> str:
    header = ["case", "direction", "kernel", "settings", "floor µs", "predicted µs", "limited by", "programs an SM",
              "waves"]  # fmt: skip
    lines = [
        [r["case"], r["direction"], x["kernel"], x["settings"], f"{x['floor_us']:.1f}", f"{x['us']:.1f}",
         x["limited_by"], f"{x['resident']} ({x['resident_limit']})", f"{x['waves']:.2f}"]
        for r in rows if not r["error"] for x in r["launches"]
    ]  # fmt: skip
    return markdown(header, lines)


def sum_table(rows: Sequence[Row]) -> str:
    """Least MB: each input read once, each output written once. Moved MB: each launch's tensors once."""
    header = ["case", "direction", "least MB", "moved MB", "GFLOP", "launches", "floor µs", "predicted µs",
              "floor of it", "mostly limited by"]  # fmt: skip
    lines = []
    for r in rows:
        moved, last = "", ["", "", r["error"]]
        if not r["error"]:
            moved = f"{sum(x['bytes'] for x in r['launches']) / 1e6:.1f}"
            longest = max(r["launches"], key=lambda x: x["us"])
            last = [f"{r['predicted_us']:.1f}", f"{r['floor_us'] / r['predicted_us']:.0%}", longest["limited_by"]]
        lines.append(
            [r["case"], r["direction"], f"{r['bytes'] / 1e6:.1f}", moved, f"{r['operations'] / 1e9:.1f}",
             len(r["launches"]), f"{r['floor_us']:.1f}", *last]
        )  # fmt: skip
    return markdown(header, lines)


def main(options: Options) -> int:
    """Predict, print the tables, write the JSON; 1 if a kernel does not compile. Raises ValueError without a model."""
    targets = options.target or ["sm_90"]
    for target in targets:
        if target not in MACHINES:
            raise ValueError(f"there is no model of {target}; there is one of {', '.join(MACHINES)}")
    started = time.perf_counter()
    kernels = read_all(collect(selected(options)))
    codes = {key: (compiled, profile(code) if code else None) for key, (compiled, code) in kernels}
    rows = [predicted(*each, codes) for each in selected(options)]
    for target in targets:
        own = [row for row in rows if row["target"] == target]
        print(launch_table(own), sum_table(own), sep="\n\n")
        seconds, machine = time.perf_counter() - started, f"{MACHINES[target].name} ({target})"
        print(f"\nPredicted for {machine}, not measured; {len(own)} entries in {seconds:.0f} s")
    if options.json:
        write_json(options.json, rows)
    return int(any(row["error"] for row in rows))
