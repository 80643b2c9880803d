"""A GPU made of Python: within `executed(target)`, what Triton compiles for CPU tensors is run, checked and counted."""

import contextlib
import functools
import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from .arguments import packed, values_of
from .findings import Counts, Problems
from .global_memory import GlobalMemory
from .machine import Options, launch, program
from .table import table

TARGETS = ("sm_80", "sm_90")
_reports: "list[Report]" = []  # of the blocks that are entered, the innermost last
_compiled: dict[str, Any] = {}  # triton's CompiledKernel by its hash
_cached = ""  # the target that Triton's caches are of


def why_not() -> str:
    """Why nothing can be executed here, if so."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, and compiles the kernels: pip install triton"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "under TRITON_INTERPRET=1 Triton compiles nothing: unset it"
    return ""


class Report:
    """What the kernels in the block did: `problems` and, of each launch, what was counted."""

    def __init__(self, target: str, options: Options) -> None:
        self.target, self.options = target, options
        self.problems = Problems()
        self.launches: list[Counts] = []
        self.memory = GlobalMemory()
        self._allowed: list[torch.Tensor] = []

    def allow(self, *tensors: torch.Tensor) -> None:
        """Memory that kernels may touch besides their arguments."""
        self._allowed += tensors

    def check(self) -> None:
        """Raise AssertionError, with a line for each, if there were problems."""
        if self.problems:
            raise AssertionError("\n".join(map(str, self.problems)))

    def table(self) -> str:
        """A line a kernel and setting: how often it was launched, and what that cost."""
        return table(self.launches)

    def perform(self, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """One launch of a compiled kernel (triton's CompiledKernel)."""
        memory = self.memory
        memory.start_launch()
        values = values_of(compiled, arguments)
        tensors = [value[1] if kind == "map" else value for kind, value in values]
        for tensor in [*self._allowed, *(t for t in tensors if isinstance(t, torch.Tensor))]:
            memory.allow(tensor)
        # A table of addresses: any tensor that is alive may be meant.
        memory.searching = any(isinstance(t, torch.Tensor) and t.dtype == torch.int64 for t in tensors)
        text, metadata = compiled.asm["ptx"], compiled.metadata
        params, maps = packed(program(text).kernel, values)
        x, y, z = (*grid, 1, 1)[:3]
        counts = launch(text, (x, y, z), params, metadata.shared, memory, self.problems, self.options, maps)
        sizes = "×".join(str(g) for g in grid if g != 1) or 1
        counts.settings = f"w{metadata.num_warps} s{metadata.num_stages} grid {sizes}"
        self.launches.append(counts)


@contextlib.contextmanager
def executed(target: str = "sm_80", *, auto: str = "triton", poison: bool = True, **settings: Any) -> Iterator[Report]:
    """Within the `with` block kernels on CPU tensors run on the executed GPU.

    target: "sm_80" or "sm_90". auto: the backend of CPU tensors where none was chosen. poison: what torch.empty and its
    like return holds NaN. settings: fields of `Options`, such as copies="early", schedule="random", order="random",
    seed. Raises ValueError for another target or setting, RuntimeError under TRITON_INTERPRET=1.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(repr, TARGETS))}, got {target!r}")
    report = Report(target, Options(**settings))
    with contextlib.ExitStack() as stack:
        if poison:
            stack.enter_context(poisoned())
        stack.enter_context(_pretending(target, auto))
        stack.callback(lambda: _compile_for(_reports[-1].target) if _reports else None)
        _compile_for(target)
        _reports.append(report)
        stack.callback(_reports.remove, report)
        yield report


@contextlib.contextmanager
def _pretending(target: str, auto: str) -> Iterator[None]:
    """A GPU that hands each launch to the innermost block's report.

    PTX is what is executed: no machine code is made of it (a fifth of the time that Triton takes to compile). The hash
    keeps such kernels apart from others in Triton's cache.
    """
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import CompiledKernel

    from bench.no_gpu import pretending
    from tribp import dispatch
    from tribp.launch.arch import ARCHS

    load = CompiledKernel._init_handles

    def remember(self: Any) -> None:
        _compiled[self.metadata.hash] = self
        load(self)

    def performed(metadata: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        # Triton keeps the launcher, and with it this function, of the first block that launched a kernel.
        _reports[-1].perform(_compiled[metadata.hash], grid, arguments)

    def backend_of(tensor: torch.Tensor) -> str:
        return auto if dispatch.backend() == "auto" else dispatch.backend()

    chosen = dispatch.backend()
    with (
        mock.patch.object(CUDABackend, "make_cubin", return_value=b"executed"),
        mock.patch.object(CUDABackend, "hash", lambda self: f"executed-{self.target.arch}"),
        mock.patch.object(CompiledKernel, "_init_handles", remember),
        pretending(ARCHS[target], performed),
        dispatch.use_backend("triton" if (chosen, auto) == ("auto", "triton") else chosen),
        mock.patch.object(dispatch, "backend_of", backend_of),
    ):
        yield


def _compile_for(target: str) -> None:
    """Triton asks once for the target, and keeps what it compiled for device 0."""
    global _cached
    if _cached not in ("", target):
        from triton.runtime.jit import JITFunction

        from tribp.launch import plan as plans

        plans.forget()
        for thing in gc.get_objects():
            if type(thing) is JITFunction:
                thing.device_caches.clear()
    _cached = target


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New floating-point memory holds NaN, and not by chance what a test expects."""

    def filled(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def fill(*args: Any, **kwargs: Any) -> Any:
            tensor = function(*args, **kwargs)
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel():
                with torch.no_grad():
                    if tensor.is_floating_point() or tensor.is_complex():
                        tensor.fill_(float("nan"))
            return tensor

        return fill

    makers = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    with contextlib.ExitStack() as stack:
        for owner, name in makers:
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield
