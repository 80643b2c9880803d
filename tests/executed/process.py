"""Runs cases on executed code, in a process of its own: the tests' interprets kernels, which Triton decides once."""

import concurrent.futures
import contextlib
import gc
import importlib
import multiprocessing
import os
import pkgutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

from ..processes import with_torch

if TYPE_CHECKING:
    from .checks import Case

Form = tuple[str, str, bool]  # a kernel, one of its compile-time switches, how that stood


class Executor:
    """A process that executes for one target. Use it as a context manager."""

    def __init__(self, target: str) -> None:
        self.cases = 0  # so far, and the forms of all their launches
        self.forms: set[Form] = set()
        self._pool = concurrent.futures.ProcessPoolExecutor(1, with_torch(), _start, (target,))

    def __enter__(self) -> "Executor":
        self._pool.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.__exit__(*exception)

    def problems(self, case: "Case", **settings: Any) -> list[str]:
        """What is wrong with a case, in plain words; settings are those of `tests.executor.executed`."""
        problems, forms = self._pool.submit(_problems, case, settings).result()
        self.cases += 1
        self.forms |= forms
        return problems

    def kernels(self) -> set[str]:
        """The names of all kernels there are."""
        return self._pool.submit(_kernels).result()

    def problems_of_variants(self, case: "Case") -> list[str]:
        """What is wrong with any launch setting that tuning would try for the case, each in place of the rules'."""
        return self._pool.submit(_problems_of_variants, case).result()


# ---- in the other process

_target = ""


def _start(target: str) -> None:
    global _target
    _target = target
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from tests.executed import cases  # noqa: F401
    from tests.executor import executed  # noqa: F401

    torch.set_num_threads(1)
    _end_with_parent()


def _end_with_parent() -> None:
    """Called in a child, which would wait for work for ever behind a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _problems(case: "Case", settings: dict[str, Any]) -> tuple[list[str], set[Form]]:
    import torch

    from tests.executor import executed
    from tribp.launch import plan as plans
    from tribp.launch.arch import ARCHS

    torch.manual_seed(0)
    plans.forget()
    gc.collect()
    gc.freeze()  # half a million objects and more, among which the executor would look for tensors
    few = replace(ARCHS[_target], processors=case.processors)
    with mock.patch.dict(ARCHS, {_target: few}), _recorded() as forms, executed(_target, **settings) as report:
        wrong = case.wrong()
    return [*map(str, report.problems), *wrong], forms


@contextlib.contextmanager
def _recorded() -> Iterator[set[Form]]:
    """The switches of all launches, arguments that may be None among them, and on which axes of its grid a kernel has
    several programs.
    """
    from tribp.launch.launches import Launch

    forms: set[Form] = set()
    run = Launch.run

    def record(launch: Launch) -> object:
        switches = {key: value for key, value in launch.settings.items() if isinstance(value, bool)}
        for name, argument in zip(launch.kernel.arg_names, launch.arguments, strict=False):
            if f"if {name} is not None" in launch.kernel.src:
                switches[name] = argument is not None
        switches |= {f"program_id({axis}) > 0": length > 1 for axis, length in enumerate(launch.grid)}
        forms.update((_name(launch.kernel), key, value) for key, value in switches.items())
        return run(launch)

    with mock.patch.object(Launch, "run", record):
        yield forms


def _name(kernel: Any) -> str:
    """A kernel's file and name."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def _kernels() -> set[str]:
    """Device functions that ask for the number of their program are kernels."""
    from triton.runtime.jit import JITFunction

    import tribp.kernels

    names = set()
    for module in pkgutil.iter_modules(tribp.kernels.__path__):
        for thing in vars(importlib.import_module(f"tribp.kernels.{module.name}")).values():
            if isinstance(thing, JITFunction) and "program_id(" in thing.src:
                names.add(_name(thing))
    return names


def _problems_of_variants(case: "Case") -> list[str]:
    from tribp.launch import plan as plans
    from tribp.launch.neighbors import neighbors

    with plans.using(_Asked()) as asked:
        wrong, _ = _problems(case, {})
    for problem in asked.problems:
        for config in neighbors(problem, problem.choose()):
            with plans.using({problem: config}):
                found, _ = _problems(case, {})
            wrong += [f"{problem} with {config}: {what}" for what in found]
    return wrong


class _Asked(dict[Any, Any]):
    """Configs, none, which were asked for."""

    def __init__(self) -> None:
        self.problems: dict[Any, None] = {}

    def get(self, problem: Any, default: Any = None) -> Any:
        self.problems[problem] = None
        return default
