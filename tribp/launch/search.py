"""The search for faster settings: by single steps, each to the fastest neighbour. Standard library only."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")

# The clocks of a GPU, and with them all times, wander by about one per cent between two measurements. What is no faster
# than that is chance, and would cost another order of sums, and so other bits, for nothing.
GAIN = 0.02
AGAIN = 3  # times that the fastest and the first are measured again, in turn: of many, one is fastest by luck


@dataclass(frozen=True)
class Found(Generic[S]):
    """The settings to take, their time, and the time of those that the search began with."""

    settings: S
    time: float
    first_time: float


def search(
    first: S,
    around: Callable[[S], Iterable[S]],
    measure: Callable[[S, int], float | None],
    over: Callable[[], bool] = lambda: False,
) -> Found[S] | None:
    """The fastest settings that single steps from `first` lead to, or `first` if none is faster by GAIN.

    measure: the time of settings, None if they are wrong or fail; the number says which repetition it is. over: whether
    to stop here. None if `first` can't be measured.
    """
    start = measure(first, 0)
    if start is None:
        return None
    times: dict[S, float | None] = {first: start}
    best, fastest = first, start
    while True:
        here = fastest
        for candidate in around(best):
            if candidate in times or over():
                continue
            times[candidate] = measure(candidate, 0)
        for candidate, time in times.items():
            if time is not None and time < fastest:
                best, fastest = candidate, time
        if not fastest < (1 - GAIN) * here or over():
            break
    if best == first:
        return Found(first, start, start)
    pairs = [(measure(first, n), measure(best, n)) for n in range(1, AGAIN + 1)]
    before, after = (
        statistics.median([t for t in side if t is not None] or [0.0]) for side in zip(*pairs, strict=True)
    )
    if all(None not in pair for pair in pairs) and after < (1 - GAIN) * before:
        return Found(best, after, before)
    return Found(first, before, before)
