"""What a launch is found to have done wrong, and what it cost."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from .arrays import Array, distinct

SAMPLES = 1024  # requests of a memory instruction whose sectors or bank conflicts are counted; others are like them


class StoppedError(Exception):
    """The kernel can't go on."""


class RefusedError(Exception):
    """A program asks for what the hardware refuses."""


@dataclass
class Problem:
    kind: str
    kernel: str
    where: str
    thread: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} in {self.kernel}, {self.where}; {self.thread}; {self.detail} (×{self.count})"


class Problems(list[Problem]):
    """Each sentence about an instruction once, with how often it was true."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Problem] = {}

    def add(
        self, kind: str, kernel: str, where: str, thread: str, detail: str, values: Sequence[int] = (), count: int = 1
    ) -> None:
        """detail: with braces for the values, which alone do not make another problem."""
        key = (kind, kernel, where, detail)
        if key in self._known:
            self._known[key].count += count
        else:
            self._known[key] = Problem(kind, kernel, where, thread, detail.format(*values) if values else detail, count)
            self.append(self._known[key])


@dataclass
class Traffic:
    """What one memory instruction moved. Sectors and wavefronts are of the sampled requests."""

    space: str
    what: str
    where: str
    requests: int = 0  # warps that executed it with a thread that took part
    threads: int = 0
    bytes: int = 0
    runs: int = 0
    sampled: int = 0  # requests
    parts: int = 0  # 32-byte sectors (global) or wavefronts (shared) of these
    ideal: int = 0  # the fewest that would hold the same bytes
    distinct: int = 0  # bytes of these, each once a warp
    asked: int = 0  # bytes of these, each time

    def add(self, threads: Array, addresses: Array, size: int, warps: int | None) -> None:
        """One run of the instruction. warps: how many take part, if it is known."""
        numbers = threads >> 5
        n = int(np.count_nonzero(np.diff(numbers))) + (len(numbers) > 0) if warps is None else warps
        self.requests += n
        self.threads += len(threads)
        self.bytes += len(threads) * size
        self.runs += 1
        if self.sampled >= SAMPLES or not len(threads):
            return
        self.sampled += n
        self.asked += len(threads) * size
        if self.space == "global":
            parts, ideal, once = sectors(numbers, addresses, size)
            self.distinct += once
        else:
            parts, ideal = wavefronts(threads, addresses, size)
        self.parts += parts
        self.ideal += ideal

    def __add__(self, other: "Traffic") -> "Traffic":
        numbers = [f.name for f in fields(self) if f.name not in ("space", "what", "where")]
        sums = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return Traffic(self.space, self.what, self.where, **sums)


def sectors(warps: Array, addresses: Array, size: int) -> tuple[int, int, int]:
    """32-byte sectors that the warps' requests touch, the fewest that would do, and the distinct bytes."""
    key = warps.astype(np.int64) << 47
    touched = len(distinct(key + (addresses >> 5)))
    places = distinct(key + addresses)
    per_warp = np.bincount((places >> 47).astype(np.int64))
    return touched, int((-(-per_warp * size // 32)).sum()), len(places) * size


def wavefronts(threads: Array, addresses: Array, size: int) -> tuple[int, int]:
    """Passes that shared memory's 32 banks of 4 bytes take for the requests, and the fewest that would do.

    8 bytes a thread go by half warps, 16 by quarters.
    """
    shift = 5 if size <= 4 else 4 if size == 8 else 3
    group = threads.astype(np.int64) >> shift
    words = (addresses >> 2).astype(np.int64)
    if size > 4:
        group = np.repeat(group, size // 4)
        words = (words[:, None] + np.arange(size // 4)).ravel()
    unique = distinct((group << 32) | words)
    counts = np.bincount((unique >> 32) * 32 + (unique & 31))
    counts = np.pad(counts, (0, -len(counts) % 32)).reshape(-1, 32).max(1)
    return int(counts.sum()), int((counts > 0).sum())


@dataclass
class Counts:
    """Of one launch."""

    kernel: str
    settings: str = ""
    warps: int = 0
    ctas: int = 0  # that were run
    grid: int = 0  # of the whole launch
    instructions: Counter[str] = field(default_factory=Counter)  # by class, summed over warps
    divergent: int = 0  # instructions of warps of which some threads had gone another way
    matrix: Counter[str] = field(default_factory=Counter)
    operands: int = 0  # bytes of shared memory that wgmma read
    copied: int = 0  # bytes of tensor copies, either way
    barriers: int = 0
    traffic: dict[tuple[int, str, str], Traffic] = field(default_factory=dict)  # by instruction, space, what
    seconds: float = 0.0
    shared_bytes: int = 0

    def total(self, space: str, what: str | None = None) -> Traffic:
        mine = (t for t in self.traffic.values() if t.space == space and what in (None, t.what))
        return sum(mine, Traffic(space, what or "", ""))
