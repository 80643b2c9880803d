"""`TRIBP_AUTOTUNE=1`: at the first call of a kind, try the configs beside the heuristics', and keep the fastest.

A call is searched on its own tensors, one problem after the other, with the others' configs as they stand. Launches
write outputs and never read them, so a call can be repeated. Optimizer steps can't, and are left to `python -m bench
tune`. What was found is kept by Triton's own cache manager (TRITON_CACHE_DIR), beside the compiled kernels.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import triton
from torch import Tensor
from torch.compiler import is_compiling
from torch.cuda import is_current_stream_capturing
from triton.runtime.cache import CacheManager, get_cache_manager

from .. import dispatch
from ..kernels import common
from . import plan as plans
from . import stopwatch
from .buffer import device_of, layout_of
from .neighbors import neighbors

log = logging.getLogger("tribp.autotune")
C = TypeVar("C")

LIMIT = 60.0  # seconds a call may be searched; most of them go into compiling
# The clocks of a GPU, and with them all times, wander by about one per cent between two measurements. What is no faster
# than that is chance, and would cost another order of sums, and so other bits, for nothing.
GAIN = 0.02
AGAIN = 3  # times that the fastest and the first are measured again, in turn: of many, one is fastest by luck
# Relative error against the heuristics' results that other configs may show: both round, and add in another order. Of
# the norm, and twice that of the largest element: one wrong row in 65,536 is nothing to a norm.
TOLERANCE = {torch.float64: 4e-14, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Timer = Callable[[Callable[[], object]], float]


def perform(build: plans.Build, tensors: Sequence[Tensor | None], **facts: object) -> list[Tensor | None]:
    """Run the launches that `build(plan, *buffers, **facts)` adds, on the first tensor's device; returns the results.

    build: depends on the tensors' layouts and the facts alone. Its exceptions get the attribute `refused_by_plan`, for
    `unless_refused` of ops/shared.py. With TRIBP_AUTOTUNE=1 configs of a new call are searched first.
    """
    plan = plans.plan_of(build, tensors, facts)
    if tuner is not None:
        tuner.prepare(build, tensors, facts)
        plan = plans.plan_of(build, tensors, facts)  # with what was found
    with dispatch.on_device(plan.device):
        return plan.run(tensors)


# -- the search


@dataclass(frozen=True)
class SearchResult(Generic[C]):
    """The config to take, its time, and that of the heuristic's choice, in µs."""

    config: C
    time: float
    first_time: float


def search(
    first: C,
    neighbors_of: Callable[[C], Iterable[C]],
    measure: Callable[[C, int], float | None],
    out_of_time: Callable[[], bool] = lambda: False,
) -> SearchResult[C] | None:
    """The fastest config that single steps from `first` lead to, or `first` if none is faster by GAIN.

    measure: the time of a config, None if it is wrong or fails; the number says which repetition it is. out_of_time:
    whether to stop here. None if `first` can't be measured.
    """

    def timed(config: C, repetition: int) -> float:
        took = measure(config, repetition)
        return math.inf if took is None else took

    times = {first: timed(first, 0)}
    if times[first] == math.inf:
        return None
    best, gains = first, True
    while gains and not out_of_time():
        before = times[best]
        for other in neighbors_of(best):
            if other not in times and not out_of_time():
                times[other] = timed(other, 0)
        best = min(times, key=times.__getitem__)
        gains = times[best] < (1 - GAIN) * before
    if best == first:
        return SearchResult(first, times[first], times[first])
    pairs = [(timed(first, n), timed(best, n)) for n in range(1, AGAIN + 1)]
    before, after = map(statistics.median, zip(*pairs, strict=True))
    if max(map(max, pairs)) < math.inf and after < (1 - GAIN) * before:
        return SearchResult(best, after, before)
    return SearchResult(first, before, before)


class Trial:
    """One call whose configs are searched, on its own tensors; what it writes may hold NaN afterwards."""

    def __init__(self, build: plans.Build, tensors: Sequence[Tensor | None], facts: Mapping[str, object]) -> None:
        layouts = [layout_of(tensor) for tensor in tensors]
        self._call = build, plans.arch_of(layouts), layouts, facts
        self._tensors = tensors
        self._results: list[Tensor | None] = []
        self._expected: list[Tensor] = []

    def plan(self, configs: Mapping[Any, Any]) -> plans.Plan:
        return plans.build_plan(*self._call, configs)

    def problems(self) -> list[Any]:
        """Those of the call for which no config was found yet."""
        return [problem for problem in self.plan(plans.tuned).configs if problem not in plans.tuned]

    def time(self, configs: Mapping[Any, Any], timer: Timer) -> float | None:
        """In µs; None if the results differ, or the compiler or the driver gives up: a tile may be too large."""
        if not self._expected:
            self._results = self.plan(plans.tuned).run(self._tensors)
            self._expected = [result.clone() for result in self._results if result is not None]
        outputs = [result for result in self._results if result is not None]
        plan = self.plan(configs)
        for output in outputs:
            output.fill_(torch.nan)
        try:
            plan.run(self._tensors, self._results)
            if all(map(agrees, outputs, self._expected)):
                return timer(lambda: plan.run(self._tensors, self._results))
        except Exception as error:
            log.info("tribp: %s: %s", list(plan.configs.values()), error)
        return None


def agrees(result: Tensor, expected: Tensor) -> bool:
    """Whether results differ by rounding alone. Infinities and NaN must be where they were."""
    finite = expected.isfinite()
    if not torch.equal(finite, result.isfinite()):
        return False
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    a, b = (torch.where(finite, t, 0).to(wide) for t in (result, expected))
    difference, limit = a - b, TOLERANCE[expected.dtype]
    norm = difference.norm() <= limit * b.norm()
    return bool(norm) and bool(difference.abs().max() <= 2 * limit * b.abs().max())


class Tuner:
    """Searches calls that are new to it. All arguments are there for tests."""

    def __init__(
        self,
        # The median of several calls, each with a cold L2.
        timer: Timer = lambda action: statistics.median(stopwatch.device_times(action, 0.01)),
        on_gpu: Callable[[torch.device], bool] = lambda device: device.type == "cuda" and not dispatch.interpreting(),
        # No time for a search: a CUDA graph is captured, which must not wait, or the compiler looks on.
        busy: Callable[[], bool] = lambda: is_current_stream_capturing() or is_compiling(),
        gpu: Callable[[], str] = torch.cuda.get_device_name,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_gpu = on_gpu
        self._timer, self._busy, self._gpu, self._clock = timer, busy, gpu, clock
        self._seen: set[object] = set()
        self._lock = threading.Lock()  # two searches at once would time each other

    def prepare(self, build: plans.Build, tensors: Sequence[Tensor | None], facts: Mapping[str, object]) -> None:
        """Have configs for what a call asks, stored ones or new ones. A search writes what the call writes.

        A call without results is not searched: nothing would show that it computes something else. Whatever goes wrong
        in a search ends it, with a warning, and the heuristics choose.
        """
        layouts = [layout_of(tensor) for tensor in tensors]
        device = device_of(layouts)
        call = (build, *facts.items(), *layouts)
        if call in self._seen or not self.on_gpu(device):
            return
        with self._lock, dispatch.on_device(device):
            try:
                trial = Trial(build, tensors, facts)
                if trial.plan(plans.tuned).results:
                    self._load(trial)
                    if self._busy():
                        return
                    self._search(trial)
            except Exception as error:
                log.warning("tribp: the search for configs ended: %s: %s", type(error).__name__, error)
        self._seen.add(call)

    def _load(self, trial: Trial) -> None:
        # Again and again: a stored config may raise other problems.
        while stored := {p: config for p in trial.problems() if (config := load(p, self._gpu())) is not None}:
            self._use(stored)

    def _search(self, trial: Trial) -> None:
        end = self._clock() + LIMIT
        if problems := trial.problems():
            names = ", ".join(type(problem).__name__ for problem in problems)
            log.warning("tribp: TRIBP_AUTOTUNE is on: trying configs for %s, for up to %g s", names, LIMIT)
        while problems and self._clock() < end:
            config = self._fastest(trial, problems[0], end)
            self._use({problems[0]: config})
            log.warning("tribp: %s: %s", type(problems[0]).__name__, config.reason)
            store(problems[0], config, self._gpu())
            problems = trial.problems()  # another config may raise other problems

    def _fastest(self, trial: Trial, problem: Any, end: float) -> Any:
        """The config, with the times that speak for it. Raises RuntimeError if the heuristic's own config fails."""
        result = search(
            problem.choose(),
            lambda config: neighbors(problem, config),
            lambda config, _: trial.time({**plans.tuned, problem: config}, self._timer),
            lambda: self._clock() >= end,
        )
        if result is None:
            raise RuntimeError(f"the heuristic's own config fails: {problem}")
        said = f"the heuristic's choice {result.first_time:.1f} µs"
        if result.config == problem.choose():
            said = "and nothing beside it is faster"
        return replace(result.config, reason=f"measured on {problem.arch.name}: {result.time:.1f} µs, {said}")

    @staticmethod
    def _use(configs: Mapping[Any, Any]) -> None:
        plans.tuned.update(configs)
        plans.forget()


# -- what is kept for other processes

FILE = "tribp_config.json"


@cache
def sources() -> str:
    """A digest of what decides how fast configs are and which are legal: kernels, heuristics, and plans."""
    tribp = Path(__file__).parents[1]
    files = [tribp / "versions.py", tribp / "dispatch.py"]
    for folder in (Path(common.__file__).parent, tribp / "launch", tribp / "ops"):
        files += sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def conditions(gpu: str) -> dict[str, str]:
    """What measured configs hold for: for this and nothing else."""
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "sources": sources()}


def _cache_of(problem: Any, gpu: str) -> CacheManager:
    """Where Triton's cache keeps the config of a problem."""
    key = "\0".join([repr(problem), *conditions(gpu).values()])
    return get_cache_manager(hashlib.sha256(key.encode()).hexdigest())


def load(problem: Any, gpu: str) -> Any:
    """The stored config for a problem; None if there is none, or none that can be read; an unreadable one is logged."""
    path = _cache_of(problem, gpu).get_file(FILE)
    if path is None:
        return None
    try:
        return decode(json.loads(Path(path).read_text(encoding="utf-8")), problem)
    except (OSError, TypeError, ValueError) as error:
        log.warning("tribp: %s holds no config, and is ignored: %s", path, error)
        return None


def store(problem: Any, config: Any, gpu: str) -> None:
    """What can't be written costs a warning, never a call. Two processes may write: the last one's stays."""
    try:
        _cache_of(problem, gpu).put(json.dumps(dataclasses.asdict(config)), FILE, binary=False)
    except OSError as error:
        log.warning("tribp: a config that was found cannot be kept for the next run: %s", error)


def decode(fields: Any, problem: Any) -> Any:
    """The config of these fields. Raises TypeError or ValueError if they are no legal config for the problem."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in dict(fields).items()}
    config = type(problem.choose())(**values)
    if not problem.is_legal(config):
        raise ValueError(f"not legal for {problem}: {config}")
    return config


def is_switched_on(value: str) -> bool:
    """What the environment variable says. Raises ValueError for anything but 0 and 1."""
    if value not in ("", "0", "1"):
        raise ValueError(f"TRIBP_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


tuner = Tuner() if is_switched_on(os.environ.get("TRIBP_AUTOTUNE", "")) else None
