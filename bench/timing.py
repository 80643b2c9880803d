"""How things are timed: on a CUDA GPU, and (only so that the bench can be walked through) on a CPU."""

import contextlib
import functools
import gc
import json
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tribp import dispatch
from tribp.launch import stopwatch

from .operation import Action, Case, precision

Call = Callable[[], object]
Conditions = Callable[[], contextlib.AbstractContextManager[object]]
SAMPLE_US = 1e4  # calls that take less are repeated within a sample

Times = dict[str, float]  # of repeated measurements, in µs: "median", "p20", "p80"


def summary(times: Sequence[float]) -> Times:
    quantiles = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([*quantiles.values()], dtype=torch.float64))
    return dict(zip(quantiles, values.tolist(), strict=True))


def versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if dispatch.has_triton():
        import triton

        versions["triton"] = triton.__version__
    return versions


def kernels_of(trace: Mapping[str, Any]) -> tuple[int, float]:
    """The number of kernels in a trace as torch.profiler exports it, and their µs; copies and fills are none."""
    durations = [e["dur"] for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    return len(durations), float(sum(durations))


class Repeated:
    """A call that is made again and again. `before` comes before each, and is not timed."""

    def __init__(self, call: Call, conditions: Conditions, before: Call | None = None) -> None:
        self._call, self._conditions, self._before, self._calls = call, conditions, before, 1
        for _ in range(3):
            once = self.sample()
        self._calls = max(1, min(1000, int(SAMPLE_US / once)))

    def sample(self) -> float:
        """µs a call: of processor time, if one thread works.

        Long calls are interrupted by other processes more often than short ones.
        """
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        times = []
        with self._conditions():
            if self._before is None:
                started = clock()
                for _ in range(self._calls):
                    self._call()
                return 1e6 * (clock() - started) / self._calls
            for _ in range(self._calls):
                self._before()
                started = clock()
                self._call()
                times.append(clock() - started)
        return 1e6 * statistics.median(times)


Samples = Mapping[str, Callable[[], float]]  # by provider, what measures once: µs of a step or a call


class HostTarget(NamedTuple):
    """`over`'s time is to be at least `limit` times `under`'s."""

    over: str
    under: str
    limit: float


class Comparison(NamedTuple):
    """Providers that are timed in turns, within the block that `start` opens."""

    name: str
    start: Callable[[], contextlib.AbstractContextManager[Samples]]
    targets: Sequence[HostTarget] = ()


class CpuMeter:
    """A wall clock. Its numbers mean nothing, and are marked so."""

    name = "CPU, smoke test"
    rounds = 1  # of calls whose return is timed
    copied = 1 << 20  # bytes, for the copy's rate
    side = 64  # of the matrices whose product's rate is measured
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}  # operations a second of large products, by type: those that were asked for

    def versions(self) -> dict[str, str]:
        return versions()

    def device_times(self, call: Call, seconds: float = 0.15) -> Times:
        """µs on the device, caches cold, measured for about so long."""
        started = time.perf_counter()
        call()
        return summary([1e6 * (time.perf_counter() - started)])

    def graph_time(self, prepare: Callable[[], Action], calls: int) -> float | None:
        """µs a call inside a replayed CUDA graph of so many. `prepare` runs on the stream that is captured."""
        prepare()
        return None

    def wait(self) -> None:
        """Until the device has done all that it was given."""

    def call_times(self, action: Action) -> tuple[float, float]:
        """µs until a call returns, and until the device is done with it."""
        returned, done = [], []
        for _ in range(self.rounds):
            action.before()
            self.wait()
            started = time.perf_counter()
            action.call()
            returned.append(time.perf_counter() - started)
            self.wait()
            done.append(time.perf_counter() - started)
        return 1e6 * statistics.median(returned), 1e6 * statistics.median(done)

    def kernels(self, call: Call) -> tuple[int, float] | None:
        """How many kernels a call launches, and the µs they take together, caches warm."""
        return None

    def allocated(self) -> int | None:
        """Bytes of tensors on the device."""
        return None

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory allocated during the call beyond what was before it."""
        return None

    def release(self) -> None:
        """Give back memory that nothing uses."""

    # The ceilings that floors are computed from, each measured when it is first asked for.

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes a second, read plus written, of a large copy."""
        source = torch.empty(self.copied, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * self.copied / (1e-6 * self.device_times(lambda: target.copy_(source))["median"])

    def rate(self, case: Any) -> float:
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
                self.rates[name] = self.matrix_rate(dtype)
        return self.rates[name]

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of torch's own large matrix product, at the current precision setting."""
        a, b = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
        return 2 * self.side**3 / (1e-6 * self.device_times(lambda: torch.mm(a, b))["median"])


class CudaMeter(CpuMeter):
    rounds, copied, side = 30, 1 << 30, 8192

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def versions(self) -> dict[str, str]:
        runtime = torch.version.cuda or f"HIP {torch.version.hip}"
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            driver = ""
        return versions() | {"cuda": runtime, "driver": driver or "unknown"}

    def device_times(self, call: Call, seconds: float = 0.15) -> Times:
        return summary(stopwatch.device_times(call, seconds))

    def graph_time(self, prepare: Callable[[], Action], calls: int) -> float | None:
        # Not triton.testing.do_bench_cudagraph: it captures on another stream than the one it first calls on, and
        # backward runs on the stream that its forward ran on.
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            action = prepare()
            for _ in range(3):
                action.call()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(calls):
                    action.call()
        torch.cuda.synchronize()
        return self.device_times(graph.replay)["median"] / calls

    def wait(self) -> None:
        torch.cuda.synchronize()

    def kernels(self, call: Call) -> tuple[int, float] | None:
        call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            return kernels_of(json.loads(file.read_text(encoding="utf-8")))

    def allocated(self) -> int | None:
        """As they were asked for. Measured: the allocator rounds some blocks up to 2 MB, by which torch's own for-loop
        and foreach step differ by 0.1 %."""
        return self._requested("current")

    def _requested(self, when: str) -> int:
        return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def peak_bytes(self, call: Call) -> int | None:
        call()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = self._requested("current")
        call()
        torch.cuda.synchronize()
        return self._requested("peak") - before
