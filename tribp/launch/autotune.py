"""`TRIBP_AUTOTUNE=1`: at the first call of a kind, try the launch settings around the rules', and keep the fastest.

A call is searched as a whole, on its own tensors: the rules that it asks are tried one after the other, in the order of
asking, with the others as they stand. Launches write outputs and never read them, so a call can be repeated. Optimizer
steps can't, and are left to `python -m bench sweep`.
"""

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.cuda import is_current_stream_capturing

from .. import dispatch
from .arch import Arch
from .finds import Store, cache_folder
from .search import Found, search
from .timing import device_times
from .tuning import Question, hearing, known, learn, rules_answer
from .variants import variants

log = logging.getLogger("tribp.autotune")

LIMIT = 60.0  # seconds a call may be searched; most of them go into compiling
# Relative error against the rules' results that variants may show: both round, and add in another order. Of the norm,
# and twice that of the largest element: one wrong row in 65,536 is nothing to a norm.
TOLERANCE = {torch.float64: 4e-14, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Tensors = Mapping[str, Tensor | None]


class Launched(Protocol):
    def run(self) -> object: ...


Build = Callable[..., Iterable[Launched]]


class DeviceTimer:
    """Times calls on the current CUDA device: the median of several, in µs, each with a cold L2."""

    WARM_UP, LEAST, MOST, BUDGET_US = 3, 7, 50, 5_000.0

    def __init__(self) -> None:
        size = max(1 << 28, 2 * torch.cuda.get_device_properties().L2_cache_size)
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __call__(self, action: Callable[[], object]) -> float:
        for _ in range(self.WARM_UP):
            action()
        estimate = max(1.0, statistics.median(self._times(action, self.WARM_UP)))
        return statistics.median(self._times(action, max(self.LEAST, min(self.MOST, int(self.BUDGET_US / estimate)))))

    def _times(self, action: Callable[[], object], repetitions: int) -> list[float]:
        return device_times(action, repetitions, self._flush)


def on_gpu(tensors: Tensors) -> bool:
    """Whether there is device time to save. On the CPU, and in the interpreter, nothing is searched or read."""
    return not dispatch.interpreting() and any(t is not None and t.is_cuda for t in tensors.values())


def busy() -> bool:
    """Whether this is no time for a search: a CUDA graph is captured, which must not wait, or the compiler looks on."""
    return is_current_stream_capturing() or is_compiling()


class Tuner:
    """Searches calls that are new to it. `timer` makes what times a call; all arguments are there for tests."""

    def __init__(
        self,
        timer: Callable[[], Callable[[Callable[[], object]], float]] = DeviceTimer,
        on_gpu: Callable[[Tensors], bool] = on_gpu,
        busy: Callable[[], bool] = busy,
        gpu: Callable[[], str] = torch.cuda.get_device_name,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timer, self._on_gpu, self._busy, self._gpu, self._clock = timer, on_gpu, busy, gpu, clock
        self._seen: set[object] = set()
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()  # two searches at once would time each other

    def prepare(
        self, call: object, build: Build, tensors: Tensors, facts: Mapping[str, Any], outputs: Sequence[str]
    ) -> bool:
        """Before `build(**tensors, **facts)` is run: have the finds for what it asks, stored ones or new ones.

        call: what all calls have in common that ask the same. outputs: the names of those tensors that it writes; a
        call without any is not searched, for nothing would show that a variant computes something else. Returns False
        if a search is still to come, because now is no time for it. Raises ValueError if an output is none of the
        tensors.
        A search writes the call's outputs. Whatever goes wrong in it ends it, with a warning, and the rules answer.
        """
        if call in self._seen or not self._on_gpu(tensors) or not (written := outputs_of(tensors, outputs)):
            return True
        with self._lock:
            try:
                store = self._store()
                if self._busy():
                    return False
                self._search(build, tensors, facts, written, store)
            except Exception as error:
                log.warning("tribp: the search for launch settings ended: %s: %s", type(error).__name__, error)
        self._seen.add(call)
        return True

    def _store(self) -> Store:
        gpu = self._gpu()
        if gpu not in self._stores:
            self._stores[gpu] = store = Store(cache_folder(), gpu)
            learn({key: settings for key, settings in store.load().items() if not known(key)})
        return self._stores[gpu]

    def _search(
        self, build: Build, tensors: Tensors, facts: Mapping[str, Any], outputs: Sequence[Tensor], store: Store
    ) -> None:
        def call(told: Mapping[str, Any]) -> None:
            with hearing(told):
                run(build(**tensors, **facts))

        def ask() -> list[Question]:
            """What the call asks that nobody has searched. Building it is enough to know."""
            with hearing() as heard:
                list(build(**tensors, **facts))
            return [question for question in heard.questions.values() if not known(question.key)]

        if not (questions := ask()):
            return
        log.warning(
            "tribp: TRIBP_AUTOTUNE is on: trying launch settings of %s, for up to %g s; found ones are kept in %s",
            ", ".join(question.rule for question in questions), LIMIT, store.path,
        )  # fmt: skip
        end = self._clock() + LIMIT
        call({})
        expected = [output.clone() for output in outputs]
        timer = self._timer()

        def measure(question: Question, settings: Any) -> float | None:
            told = {question.key: settings}
            for output in outputs:
                output.fill_(torch.nan)
            try:
                call(told)
                if not all(map(agrees, outputs, expected)):
                    return None
                with hearing(told):
                    launches = list(build(**tensors, **facts))
                return timer(lambda: run(launches))
            except Exception as error:  # the compiler, or the driver: too large, or not to be compiled
                log.info("tribp: %s: %s", settings, error)
                return None

        while questions and self._clock() < end:
            question = questions[0]
            found = search(
                rules_answer(question),
                lambda settings, question=question: variants(question, settings),  # type: ignore[misc]
                lambda settings, _, question=question: measure(question, settings),  # type: ignore[misc]
                lambda: self._clock() >= end,
            )
            if found is None:
                raise RuntimeError(f"the rule's own settings fail: {question.key}")
            finds = {question.key: marked(found, question)}
            learn(finds)
            store.add(finds)
            questions = ask()  # other settings may ask other rules


def run(launches: Iterable[Launched]) -> None:
    """Each as it comes: they may allocate in between."""
    for launch in launches:
        launch.run()


def outputs_of(tensors: Tensors, names: Sequence[str]) -> list[Tensor]:
    """The tensors of these names, without those that the call leaves out.

    Raises ValueError if a name is none of theirs.
    """
    if unknown := [name for name in names if name not in tensors]:
        raise ValueError(f"outputs must be names of the call's tensors ({', '.join(tensors)}), got {unknown[0]!r}")
    return [tensor for name in names if (tensor := tensors[name]) is not None]


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether results differ by rounding alone. Infinities and NaN must be where they were."""
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    a, b = (torch.where(finite, t, 0).to(wide) for t in (found, expected))
    difference, limit = a - b, TOLERANCE[expected.dtype]
    norm = difference.norm() <= limit * b.norm()
    return bool(norm) and bool(difference.abs().max() <= 2 * limit * b.abs().max())


def marked(found: Found[Any], question: Question) -> Any:
    """The settings with the reason that they were found for."""
    arch: Arch = question.facts["arch"]
    if found.settings == rules_answer(question):
        said = f"{found.time:.1f} µs, and nothing around it is faster"
    else:
        said = f"{found.time:.1f} µs, the rule's choice {found.first_time:.1f} µs"
    return replace(found.settings, reason=f"measured on {arch.name}: {said}")


def wanted(value: str) -> bool:
    """What the environment variable says. Raises ValueError for anything but 0 and 1."""
    if value not in ("", "0", "1"):
        raise ValueError(f"TRIBP_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


# What `perform` asks before it builds a call's launches; None: the rules answer.
tuner = Tuner() if wanted(os.environ.get("TRIBP_AUTOTUNE", "")) else None
