"""How long the device works on a call: for autotuning and for the bench."""

import statistics
import time
from collections.abc import Callable

import torch

CYCLES = 3e9  # a second, of a clock faster than any: a sleep lasts at least as long as it is meant to
SLACK = 1e-4  # seconds that the host may be late


def device_times(call: Callable[[], object], seconds: float) -> list[float]:
    """µs between two events around the call, on the current CUDA device, measured for about so many seconds.

    The time of kernels alone, however slow the host launches them: the device sleeps until all of them are queued.
    `triton.testing.do_bench` keeps it busy with 256 MB of zeros instead, which take 60 µs; what the host takes beyond
    is measured as well (on an H200 a backward pass of 104 µs took 181). L2 is filled by reading: it holds none of the
    call's tensors then, and nothing that must be written back first. Of more launches than CUDA queues (about a
    thousand) the rest is timed as the host makes them.
    """
    cold = torch.zeros(torch.cuda.get_device_properties().L2_cache_size // 2, device="cuda")  # twice L2's size
    total = torch.empty((), device="cuda")
    hosts, wholes = [], []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        wholes.append(time.perf_counter() - started)
    host, whole = (statistics.median(times[3:]) for times in (hosts, wholes))  # the first compile, and warm up
    asleep = 2 * host + SLACK
    samples = []
    for _ in range(min(300, max(5, int(seconds / (asleep + whole))))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.sum(cold, 0, out=total)
        torch.cuda._sleep(int(asleep * CYCLES))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        samples.append((start, end))
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in samples]
