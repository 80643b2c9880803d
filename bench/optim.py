"""The entry of `tribp.optim`: a step of every optimizer, on parameters of many shapes and types, beside its peers."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tribp import dispatch
from tribp.launch.arch import Arch

from . import results
from .meters import Meter
from .registry import KernelTests, KernelWork, StaticCase, Target
from .results import Row
from .step_cases import StepCase, cases, smoke_cases
from .step_jobs import Job, Make, Problem, contenders
from .tables import markdown

if TYPE_CHECKING:
    from .run import Ceilings, Options

PEERS = ("for-loop", "foreach", "fused", "compile", "apex", "bitsandbytes")


def targets(case: StepCase) -> list[Target]:
    """What was set for an H100."""
    found = [Target("", 1 if case.clip is None else 2, "launches")]
    bare = case.dtype == torch.float32 and not case.beyond and not case.scaler
    ruled = case.options == ({"momentum": 0.9} if case.optimizer == "SGD" else {})  # Momentum is SGD with momentum
    if bare and ruled and case.shapes_name == "1e8":
        # torch has no fused RMSprop; what torch.compile makes of it stands beside, without a target.
        peer = Target("eager", 2.3) if case.optimizer == "RMSprop" else Target("fused", 1.0)
        found += [Target("copy", 0.92, "bandwidth"), peer, Target("for-loop", 1.001, "held memory")]
    if bare and ruled and case.shapes_name.startswith("1000x") and case.optimizer != "RMSprop":
        found.append(Target("fused", 5.0))
    return found


def number(entries: Mapping[str, Row], name: str, small: bool) -> float | None:
    """A contender's time in µs: on the wall where launches set it, else on the device. "eager": the best of torch's."""
    if name == "eager":
        found = [t for peer in ("for-loop", "foreach", "fused") if (t := number(entries, peer, small)) is not None]
        return min(found, default=None)
    entry = entries.get(name, {})
    value = entry.get("wall_us") if small else entry.get("device_us", {}).get("median")
    return None if value is None else float(value)


def judge(target: Target, row: Row) -> Row:
    """The target as a sentence, what was found, and the verdict."""
    entries, ours = row["contenders"], row["contenders"]["tribp"]
    found: float | None
    if target.quantity == "launches":
        found = ours.get("launches")
        return results.verdict(f"{target.ratio:g} launches", found, found == target.ratio)  # none is not in a kernel
    if target.quantity == "held memory":
        held = [entries.get(name, {}).get("held_bytes") for name in ("tribp", target.peer)]
        found = held[0] / held[1] if all(held) else None
        what = f"≤ {target.ratio:g}x {target.peer} memory"
        return results.verdict(what, found, found is not None and found <= target.ratio)
    if target.quantity == "bandwidth":
        return results.judge(target, entries, row["floor_fraction"])
    found, what = row["ratios"].get(target.peer), f"≥ {target.ratio:.2f}x {target.peer}"
    return results.verdict(what, found, found is not None and found >= target.ratio)


TESTS = KernelTests(
    ["tests/test_optim_gpu.py"],
    ["tests/test_optim_gpu.py", "-k", "nothing_waits or gradscaler or other_backend"],
    ["tests/test_optim_plan.py", "-k", "a_plan_is_kept"],
)


@dataclass(frozen=True)
class Optimizers:
    name: str = "optim"
    summary: str = "a step of tribp.optim beside torch.optim's and other libraries'"
    peers: Sequence[str] = ("fused", "foreach", "compile")
    legend: str = (
        "Times are medians in µs: on the device with L2 flushed, or (wall) from the call until the device is done, "
        "with new gradients each step. Ratios are the other's time over tribp's. Of copy: bytes a step must move over "
        "the copy's rate, in parts of the time on the device."
    )

    tests: KernelTests = TESTS
    switches: Sequence[str] = (
        "grad_scale", "grad_norm", "EMA_TYPE", "ON_DEVICE", "EPS_INSIDE", "STOCHASTIC", "OPTIONAL", "STRIDED",
    )  # fmt: skip

    def kernel_work(self) -> KernelWork:
        return {}  # the model knows a step's kernels by the lengths of its tensors: `work.work_of`

    @property
    def cases(self) -> Sequence[StepCase]:
        return cases()

    @property
    def smoke_cases(self) -> Sequence[StepCase]:
        return smoke_cases()

    def unmeasured(self) -> list[Row]:
        return [row(case, {"tribp": {}}, 1.0) for case in self.cases]

    def static_cases(self, arch: Arch, everything: bool) -> Iterable[StaticCase]:
        from .step_kernels import static_cases

        return static_cases(arch, everything)

    def measure(self, case: StepCase, options: "Options", meter: Meter, ceilings: "Ceilings") -> list[Row]:
        compiled = "--no-compile" if not options.compile else "torch.compile takes minutes" if options.smoke else ""
        entries = measure(case, contenders(case, compiled), meter)
        return [row(case, entries, ceilings.bandwidth)]

    def table(self, rows: Sequence[Row]) -> str:
        header = ["case", "clock", "tribp", *PEERS, "vs fused", "of copy", "launches", "busy", "host", "graph",
                  "extra MB", "target", "verdict"]  # fmt: skip
        return markdown(header, [_line(r) for r in rows])


def measure(case: StepCase, makes: Mapping[str, Make | str], meter: Meter) -> dict[str, Row]:
    """An entry for each contender, in the order in which they are shown."""
    from .run import errors

    problem = Problem(case, meter.device)
    reference = None
    yardstick: dict[str, float] = {}  # errors of torch's for-loop
    entries: dict[str, Row] = {}
    for name in sorted(makes, key=lambda name: name != "for-loop"):
        make = makes[name]
        if not isinstance(make, str):
            make = lacking(case, name, meter) or make
        if isinstance(make, str):
            entries[name] = {"status": "skipped", "note": make}
            continue
        try:
            reference = reference or problem.reference()
            if name == "compile":
                torch._dynamo.reset()
            before = meter.allocated()
            job = Job(case, name, make, meter.device)
            found = errors(problem.results(job, reference), reference)
            if name == "for-loop":
                yardstick = found
            entry: Row = {"status": "ok", "errors": found}
            if wrong := problem.wrong(found, yardstick):
                entry |= {"status": "wrong", "note": wrong}
            else:
                job.gradients(0)
                entry |= timed(job, meter) | {"bytes": job.bytes()}
                if name == "tribp" and dispatch.backend_of(job.params[0]) == "triton":
                    entry["settings"] = settings(job)
                if before is not None:
                    entry["held_bytes"] = (meter.allocated() or 0) - before
                if case.small:
                    entry |= captured(case, name, make, meter)
        except Exception as error:  # a contender that fails must not take the others' numbers with it
            entry = {"status": "failed", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        job = None  # type: ignore[assignment]
        gc.collect()
        meter.release()
        entries[name] = entry
    return {name: entries[name] for name in makes}


def lacking(case: StepCase, name: str, meter: Meter) -> str:
    """Why a contender has too little memory, or nothing."""
    free = meter.free_bytes()
    copies = 5 + (3 if name in ("for-loop", "foreach") else 0)  # parameters, gradients, states; torch's temporaries
    needed = case.elements * case.dtype.itemsize * copies
    if free is None or needed <= free:
        return ""
    return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def timed(job: Job, meter: Meter) -> Row:
    entry: Row = {"device_us": asdict(meter.device_times(job.step)), "peak_bytes": meter.peak_bytes(job.step)}
    if (kernels := meter.kernels(job.step)) is not None:
        entry |= {"launches": kernels.count, "busy_us": kernels.busy_us}
    if job.case.small:
        entry["host_us"], entry["wall_us"] = meter.call_times(job.step, job.renew)
    return entry


def captured(case: StepCase, name: str, make: Make, meter: Meter) -> Row:
    """The step's time in a CUDA graph. One step a graph: that is how a training step is captured."""

    def prepare() -> Any:
        job = Job(case, name, make, meter.device, capturable=True)
        job.gradients(0)
        return job.step

    try:
        return {"graph_us": meter.graph_time(prepare, calls=1)}
    except Exception as error:  # what cannot be captured still has its other times
        return {"graph_note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def row(case: StepCase, entries: Mapping[str, Row], bandwidth: float) -> Row:
    moved = entries["tribp"].get("bytes")
    floor_us = None if moved is None else 1e6 * moved / bandwidth
    device_us = number(entries, "tribp", False)
    ours = number(entries, "tribp", case.small)
    theirs = {peer: number(entries, peer, case.small) for peer in (*PEERS, "eager")}
    found: Row = {
        "case": case.name,
        "direction": "step",
        "dtype": case.dtype_name,
        "elements": case.elements,
        "operations": case.operations,
        "clock": "wall" if case.small else "device",
        "bytes": moved,
        "floor_us": floor_us,
        "floor_fraction": floor_us / device_us if floor_us and device_us else None,
        "ratios": {peer: time / ours if ours and time is not None else None for peer, time in theirs.items()},
        "settings": entries["tribp"].pop("settings", []),
        "contenders": dict(entries),
    }
    verdicts = [judge(target, found) for target in targets(case)]
    return found | {"targets": results.settled(verdicts, entries["tribp"])}


def settings(job: Job) -> list[str]:
    """How tribp launches a step, which is done."""
    from tribp.launch import plan as plans
    from tribp.launch.plan import Launch

    from .compiled import describe

    launch, found = Launch.run, list[str]()

    def record(launched: Launch) -> object:
        found.append(f"{launched.kernel.__name__} {describe(launched)} {launched.grid[0]} programs")
        return launch(launched)

    plans.forget()
    with mock.patch.object(Launch, "run", record):
        job.step()
    return found


def _line(r: Row) -> list[str]:
    ours, small = r["contenders"]["tribp"], r["clock"] == "wall"

    def time(name: str) -> str:
        entry = r["contenders"].get(name, {})
        if entry.get("status") == "wrong":
            return f"wrong ({entry['note']})"
        return "failed" if entry.get("status") == "failed" else results.decimal(number(r["contenders"], name, small))

    extra = ours.get("peak_bytes")
    return [
        r["case"], r["clock"], *map(time, ("tribp", *PEERS)), results.times(r["ratios"]["fused"]),
        "–" if r["floor_fraction"] is None else f"{r['floor_fraction']:.0%}", str(ours.get("launches", "–")),
        *(results.decimal(ours.get(key)) for key in ("busy_us", "host_us", "graph_us")),
        "–" if extra is None else f"{extra / 1e6:.1f}",
        ", ".join(t["target"] for t in r["targets"]), ", ".join(t["verdict"] for t in r["targets"]),
    ]  # fmt: skip


OPERATION = Optimizers()
