"""Time on the device, for who measures: `TRIBP_AUTOTUNE=1` and the benchmarks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def device_times(action: Callable[[], object], repetitions: int, flush: Tensor) -> list[float]:
    """µs that each of several calls takes on the current CUDA stream.

    `flush`, which is larger than L2, is written before each: so caches are cold, and meanwhile the host has queued the
    call, so that its own time does not show.
    """
    new_event: Callable[..., Any] = torch.cuda.Event  # torch leaves its constructor untyped
    events = [(new_event(enable_timing=True), new_event(enable_timing=True)) for _ in range(repetitions)]
    for start, end in events:
        flush.zero_()
        start.record()
        action()
        end.record()
    torch.cuda.current_stream().synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]
