"""`python -m bench counts`: execute some programs of every kernel, and count what they cost each unit; no GPU needed.

For every launch that the library makes for a case a few programs are executed (`tests/executor`), and each unit of a
multiprocessor (tensor cores, shared memory, schedulers, L2) is given the cycles that one program needs of it alone: the
largest binds. Beside it stand the least that L2 could take, and how many times what tensor cores (or memory at its
best) need. The peaks are those of A100 (sm_80) and H100 (sm_90). Exits with 1 if a kernel does what no order of events
may do.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tribp.launch.arch import ARCHS

from .operation import Operation, describe
from .options import Options
from .results import markdown, write_json

if TYPE_CHECKING:
    from tests.executor.findings import Counts
    from tests.executor.run import Report

BALANCED = 1.25  # no unit needs so many times what the bounding one does

Storages = dict[int, tuple[torch.Tensor, torch.Tensor]]


def main(options: Options) -> int:
    """Print a table and, if there were any, the executor's problems; 1 then. Raises ValueError where no case is."""
    from tests.executor.table import details

    directions = [d for d in dict.fromkeys(d for o in options.operations for d in o.directions) if d != "both"]
    if unknown := [direction for direction in options.direction if direction not in directions]:
        raise ValueError(f"--direction must be one of {', '.join(directions)}, got {unknown[0]}")
    rows, problems = [], []
    for operation in options.operations:
        # A whole name means this case alone, where others' names contain it.
        cases = [case for case in operation.cases if case.name in options.case] or options.cases_of(operation)
        for case, direction in itertools.product(cases, operation.directions):
            if direction == "both" or (options.direction and direction not in options.direction):
                continue
            report = _executed(operation, case, direction, options)
            rows += [{"case": case.name, "direction": direction} | row(counts) for counts in report.launches]
            problems += [f"{case.name} {direction}: {problem}" for problem in report.problems]
            if options.worst:
                print(f"== {case.name} {direction}")
                for counts in report.launches:
                    print(details(counts, options.worst), flush=True)
    if not rows:
        raise ValueError("no case has such a name, or none of its operation such a direction")
    print(table(rows))
    for problem in problems:
        print("PROBLEM", problem)
    if options.json:
        write_json(options.json, rows)
    return int(bool(problems))


def _executed(operation: Operation, case: Any, direction: str, options: Options) -> "Report":
    import triton

    from tests.executor.machine import Options as Executing
    from tests.executor.run import Report, executed

    from .compile import source_of, target_of

    target = (options.target or ["sm_90"])[-1]
    if operation.call:
        with executed(target, ctas=options.programs) as report:
            operation.call(case)
        return report
    report, arch, storages = Report(target, Executing(ctas=options.programs)), ARCHS[target], Storages()
    for launch in operation.launches(case, direction, arch):
        source, how = source_of(launch, arch)
        compiled = triton.compile(source, target=target_of(arch), options=how)
        given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        report.perform(compiled, launch.grid, tuple(_materialized(given.get(x), storages) for x in source.signature))
        report.launches[-1].settings = describe(launch)
    return report


def _materialized(value: Any, storages: Storages) -> Any:
    """A tensor without memory as one of zeros; a descriptor or a tuple of such."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, tuple):
        return tuple(_materialized(item, storages) for item in value)
    if isinstance(value, TensorDescriptor):
        new = object.__new__(TensorDescriptor)
        new.__dict__.update(vars(value), base=_materialized(value.base, storages))
        return new
    if not isinstance(value, torch.Tensor) or value.device.type != "meta":
        return value
    storage = value.untyped_storage()
    if storage._cdata not in storages:
        room = torch.zeros(storage.nbytes() + 64, dtype=torch.uint8)
        at = -room.data_ptr() % 64
        storages[storage._cdata] = (room[at : at + storage.nbytes()], value)  # the value keeps the storage, and its key
    flat = storages[storage._cdata][0].view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset() + flat.storage_offset())


def row(counts: "Counts") -> dict[str, Any]:
    """Of one launch: SM cycles that a program needs of each unit, and the traffic beside the least that would do."""
    from tests.executor.table import cycles

    needed = cycles(counts)
    units = {name: needed[name] for name in ("tensor", "shared", "issue", "L2")}
    binds = max(units, key=lambda name: units[name])
    meant = needed["tensor"] or needed["ideal"]  # where memory bounds: what it would take at its best
    return {
        "kernel": counts.kernel, "settings": counts.settings, "programs": counts.grid,
        **{name: round(value) for name, value in needed.items()},
        "binds": binds, "over": units[binds] / meant if meant else 0.0,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = ("case", "direction", "kernel", "settings", "programs", "tensor", "shared", "issue", "L2", "ideal", "binds")
    balanced = ["yes" if row["over"] <= BALANCED else f"{row['over']:.2f}×" for row in rows]
    lines = [[*(row[name] for name in names), verdict] for row, verdict in zip(rows, balanced, strict=True)]
    return markdown([*names, "balanced"], lines)
