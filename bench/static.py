"""`python -m bench static`: every kernel compiled for every target, and its machine code checked. Needs no GPU."""

import dataclasses
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tribp import dispatch
from tribp.launch.arch import ARCHS, Arch

from . import registry
from .compiled import Compiled, compile_launches, key_of
from .expectations import Expectation, always, broken
from .machine_code import MATRIX
from .registry import StaticCase
from .tables import markdown


@dataclass
class Kernel:
    """A kernel that one or several cases launch, and everything that is expected of it."""

    operation: str
    arch: Arch
    cases: list[StaticCase] = field(default_factory=list)

    @property
    def expectations(self) -> list[Expectation]:
        named = {e.name: e for case in self.cases for e in case.expectations}
        return [*always(self.arch), *named.values()]


@functools.cache
def collect(operation: str, target: str, dtypes: tuple[str, ...], everything: bool) -> list[Kernel]:
    """The different kernels of an operation on a target, in a fixed order: the processes of the pool count on it."""
    arch = ARCHS[target]
    kernels: dict[str, Kernel] = {}
    for case in registry.find([operation])[0].static_cases(arch, everything):
        if not dtypes or case.name.split()[1] in dtypes:
            kernels.setdefault(key_of(case.launch, arch), Kernel(operation, arch)).cases.append(case)
    return list(kernels.values())


Job = tuple[str, str, tuple[str, ...], bool, int, int]


def _compile(job: Job) -> list[Compiled]:
    """Every `step`-th kernel of a selection, from `first` on."""
    *selection, first, step = job
    kernels = collect(*selection)[first::step]
    return compile_launches([kernel.cases[0].launch for kernel in kernels], ARCHS[job[1]])


def measure(
    operations: Sequence[str], targets: Sequence[str], dtypes: Sequence[str] = (), *, everything: bool, jobs: int
) -> list[dict[str, object]]:
    """A row for each kernel and target: what the machine code holds, what was expected of it, what is broken."""
    selections = [(name, target, tuple(dtypes), everything) for name in operations for target in targets]
    todo: list[Job] = [(*selection, first, jobs) for selection in selections for first in range(jobs)]
    if jobs > 1:
        # spawn: the compiler's threads do not survive a fork.
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = list(pool.map(_compile, todo))
    else:
        done = [_compile(job) for job in todo]
    compiled = {job: iter(codes) for job, codes in zip(todo, done, strict=True)}
    return [
        row(kernel, next(compiled[(*selection, n % jobs, jobs)]))
        for selection in selections
        for n, kernel in enumerate(collect(*selection))
    ]


def row(kernel: Kernel, code: Compiled) -> dict[str, object]:
    expectations = kernel.expectations
    return {
        "operation": kernel.operation,
        "cases": list(dict.fromkeys(case.name for case in kernel.cases)),
        "dtype": kernel.cases[0].name.split()[1],
        **dataclasses.asdict(code),
        "expected": {e.name: e.reason for e in expectations},
        "broken": broken(code, expectations),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    header = ["target", "kernel", "dtype", "settings", "regs", "spill", "shared KB", "matrix", "load", "16 B",
              "async", "store", "16 B", "exp2", "instrs", "first case", "ok"]  # fmt: skip
    return markdown(header, [_line(r) for r in rows])


def _line(r: dict[str, object]) -> list[object]:
    counts = r["counts"]
    cases = r["cases"]
    assert isinstance(counts, dict)
    assert isinstance(cases, list)
    assert isinstance(r["shared_memory"], int)

    def count(*names: str) -> int:
        return sum(counts.get(name, 0) for name in names)

    matrix = " ".join(f"{counts[name]} {name}" for name in sorted(MATRIX & counts.keys()))
    return [
        r["target"], r["kernel"], r["dtype"], r["settings"], r["registers"], r["spilled"],
        f"{r['shared_memory'] / 1024:.0f}", matrix, count("LDG", "load"), count("LDG.128", "load.128"),
        count("UTMALDG", "LDGSTS", "load_lds"), count("STG", "store", "UTMASTG"), count("STG.128", "store.128"),
        count("MUFU.EX2", "v_exp"), r["instructions"], f"{cases[0]}{f' +{len(cases) - 1}' if cases[1:] else ''}",
        "no" if r["broken"] else "yes",
    ]  # fmt: skip


def main(
    operations: Sequence[str], targets: Sequence[str], dtypes: Sequence[str], *, everything: bool, jobs: int, file: str
) -> int:
    """Compile, print the table and what is broken, write the JSON; 1 if anything is broken."""
    if dispatch.interpreting():
        print("bench static compiles, and under TRITON_INTERPRET=1 nothing can be: unset it", file=sys.stderr)
        return 2
    started = time.perf_counter()
    rows = measure(operations, targets, dtypes, everything=everything, jobs=jobs)
    print(table(rows))
    failures = [(r, sentence) for r in rows for sentence in _sentences(r)]
    print(
        f"\n{len(rows)} kernels compiled in {time.perf_counter() - started:.0f} s, {len(failures)} broken expectations"
    )
    for r, sentence in failures:
        print(f"- {r['target']} {r['kernel']} {r['settings']} [{_first(r)}]: {r['registers']} registers; {sentence}")
    if file:
        Path(file).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failures else 0


def _sentences(r: dict[str, object]) -> list[str]:
    assert isinstance(r["broken"], list)
    return r["broken"]


def _first(r: dict[str, object]) -> str:
    assert isinstance(r["cases"], list)
    return str(r["cases"][0])
