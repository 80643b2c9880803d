"""How things are measured: on a CUDA GPU, and (only so that the harness can be walked through) on a CPU."""

import gc
import json
import math
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tribp.launch.timing import device_times

Action = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Of repeated measurements, in µs."""

    median: float
    p20: float
    p80: float


def summary(times: Sequence[float]) -> Times:
    return Times(*(percentile(times, q) for q in (0.5, 0.2, 0.8)))


def percentile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Kernels:
    count: int
    busy_us: float  # their durations added up, caches warm


def kernels_of(trace: Mapping[str, Any]) -> Kernels:
    """The kernels in a trace as torch.profiler exports it; copies and fills are none."""
    found = [e["dur"] for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    return Kernels(len(found), float(sum(found)))


class Meter(Protocol):
    device: torch.device
    name: str  # of the GPU
    slug: str  # the same, fit for a folder

    def versions(self) -> dict[str, str]: ...

    def device_times(self, action: Action) -> Times:
        """Time on the device, caches cold."""

    def graph_time(self, prepare: Callable[[], Action], calls: int = 20) -> float | None:
        """µs a call inside a replayed CUDA graph, caches warm. `prepare` runs on the stream that is captured."""

    def host_time(self, action: Action) -> float:
        """µs a call takes the host, not waiting for the device."""

    def call_times(self, action: Action, before: Action) -> tuple[float, float]:
        """µs until a call returns, and until the device is done with it. `before` comes before each, untimed."""

    def kernels(self, action: Action) -> "Kernels | None":
        """What a call launches, as the profiler sees it."""

    def allocated(self) -> int | None:
        """Bytes of tensors on the device."""

    def free_bytes(self) -> int | None:
        """Memory that is left on the device."""

    def release(self) -> None:
        """Give back memory that nothing uses."""

    def peak_bytes(self, action: Action) -> int | None:
        """The most memory allocated during the call beyond what was before it."""

    def copy_bandwidth(self) -> float:
        """Bytes a second, read plus written, of a large copy."""

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of torch's own large matrix product, at the current precision setting."""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def host_time(action: Action, wait: Action, calls: int, rounds: int = 5) -> float:
    action()
    wait()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            action()
        times.append((time.perf_counter() - started) / calls)
        wait()
    return 1e6 * statistics.median(times)


def call_times(action: Action, before: Action, wait: Action, rounds: int) -> tuple[float, float]:
    returned, done = [], []
    for _ in range(rounds):
        before()
        wait()
        started = time.perf_counter()
        action()
        returned.append(time.perf_counter() - started)
        wait()
        done.append(time.perf_counter() - started)
    return 1e6 * statistics.median(returned), 1e6 * statistics.median(done)


class CudaMeter:
    WARM_UP_MS, BUDGET_MS = 25.0, 150.0

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        # Larger than any L2 (126 MB on a B200), and long enough to write: some 0.3 ms, derived from 3 TB/s.
        self._flush = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)

    def versions(self) -> dict[str, str]:
        runtime = torch.version.cuda or f"HIP {torch.version.hip}"
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            driver = ""
        return versions() | {"cuda": runtime, "driver": driver or "unknown"}

    def device_times(self, action: Action) -> Times:
        estimate = max(statistics.median(self._times(action, 5)), 1.0)
        for _ in range(min(200, int(1e3 * self.WARM_UP_MS / estimate))):
            action()
        return summary(self._times(action, max(20, min(500, int(1e3 * self.BUDGET_MS / estimate)))))

    def _times(self, action: Action, repetitions: int) -> list[float]:
        return device_times(action, repetitions, self._flush)

    def graph_time(self, prepare: Callable[[], Action], calls: int = 20) -> float | None:
        # Backward runs on the stream its forward ran on, so both must be on the one that is captured.
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            action = prepare()
            for _ in range(3):
                action()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(calls):
                    action()
        torch.cuda.synchronize()
        return statistics.median(self._times(graph.replay, 30)) / calls

    def host_time(self, action: Action) -> float:
        # 100 calls stay under the 1,024 launches that fit in the queue.
        return host_time(action, torch.cuda.synchronize, calls=100)

    def call_times(self, action: Action, before: Action) -> tuple[float, float]:
        return call_times(action, before, torch.cuda.synchronize, rounds=30)

    def kernels(self, action: Action) -> Kernels | None:
        action()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            action()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            return kernels_of(json.loads(file.read_text()))

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated()

    def free_bytes(self) -> int | None:
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        torch.cuda.empty_cache()

    def peak_bytes(self, action: Action) -> int | None:
        action()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> float:
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / (1e-6 * self.device_times(lambda: target.copy_(source)).median)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        n = 8192
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        return 2 * n**3 / (1e-6 * self.device_times(lambda: torch.mm(a, b)).median)


class CpuMeter:
    """Walks the same way with a wall clock. Its numbers mean nothing, and are marked so."""

    device = torch.device("cpu")
    name = "CPU, smoke test"
    slug = "smoke"

    def versions(self) -> dict[str, str]:
        return versions()

    def device_times(self, action: Action) -> Times:
        started = time.perf_counter()
        action()
        return summary([1e6 * (time.perf_counter() - started)])

    def graph_time(self, prepare: Callable[[], Action], calls: int = 20) -> float | None:
        prepare()
        return None

    def host_time(self, action: Action) -> float:
        return host_time(action, lambda: None, calls=1, rounds=1)

    def call_times(self, action: Action, before: Action) -> tuple[float, float]:
        return call_times(action, before, lambda: None, rounds=1)

    def kernels(self, action: Action) -> Kernels | None:
        return None

    def allocated(self) -> int | None:
        return None

    def free_bytes(self) -> int | None:
        return None

    def release(self) -> None:
        pass

    def peak_bytes(self, action: Action) -> int | None:
        action()
        return None

    def copy_bandwidth(self) -> float:
        source = torch.zeros(1 << 20, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * source.numel() / (1e-6 * self.device_times(lambda: target.copy_(source)).median)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        a = torch.ones(64, 64, dtype=dtype)
        return 2 * 64**3 / (1e-6 * self.device_times(lambda: torch.mm(a, a)).median)
