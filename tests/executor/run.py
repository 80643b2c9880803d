"""A GPU made of Python: within `executed(target)`, what Triton compiles for CPU tensors is run, checked and counted.

    with executed("sm_80") as report:
        y = tribp.linear_sigmoid(x, w, b)
    report.check()  # raises if the kernels did what compute-sanitizer would report
    print(report.table())

It must run with a tribp checkout as the current directory (it uses its bench.no_gpu).
"""

import contextlib
import gc
import struct
from collections.abc import Iterator
from unittest import mock

import torch

from .hopper import tensor_map
from .machine import Options, launch, program
from .memory import Counts, GlobalMemory, Problems

_reports: "list[Report]" = []  # of the blocks that are entered, the innermost last
_compiled: dict[str, object] = {}  # triton's CompiledKernel by its hash


class Report:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.problems = Problems()
        self.launches: list[Counts] = []
        self.kept: list[torch.Tensor] = []
        self.memory = GlobalMemory()

    def allow(self, *tensors: torch.Tensor) -> None:
        """Memory that kernels may touch besides their arguments and what is alive in Python."""
        self.kept += tensors

    def check(self) -> None:
        if self.problems:
            raise AssertionError("\n".join(map(str, self.problems)))

    def table(self) -> str:
        from .table import table

        return table(self.launches)


@contextlib.contextmanager
def executed(
    target: str = "sm_80", options: Options | None = None, poison: bool = True, auto: str = "triton", **settings
) -> Iterator[Report]:
    """CPU tensors run on the executed GPU. settings: those of `Options`. poison: new memory holds NaN.

    auto: where CPU tensors go if no backend was chosen.
    """
    from bench.no_gpu import pretending
    from tribp import runtime
    from tribp.kernels.launch import ARCHS
    from triton.compiler import CompiledKernel

    options = options or Options(**settings)
    report = Report(options)
    was = CompiledKernel._init_handles

    def remember(self) -> None:
        _compiled[self.metadata.hash] = self
        was(self)

    def performed(metadata, grid, arguments) -> None:
        # Triton keeps the launcher, and with it this function, of the first block that launched a kernel.
        perform(_compiled[metadata.hash], grid, arguments, _reports[-1])

    _compile_anew_for(target)
    with contextlib.ExitStack() as stack:
        _reports.append(report)
        stack.callback(_reports.remove, report)
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", remember))
        if poison:
            stack.enter_context(poisoned())
        stack.enter_context(pretending(ARCHS[target], performed))
        backend_of = lambda tensor: auto if runtime.backend() == "auto" else runtime.backend()
        stack.enter_context(mock.patch.object(runtime, "backend_of", backend_of))
        yield report


_targets: list[str] = []


def _compile_anew_for(target: str) -> None:
    """Triton asks once for the target, and keeps what it compiled for device 0."""
    if _targets and _targets[-1] != target:
        from tribp.ops import calls
        from triton.runtime.jit import JITFunction

        calls.forget()
        for thing in gc.get_objects():
            if type(thing) is JITFunction:
                thing.device_caches.clear()
    _targets.append(target)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or a large number, not by chance what a test expects."""

    def filled(function):
        def fill(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel():
                with torch.no_grad():
                    if tensor.is_floating_point() or tensor.is_complex():
                        tensor.fill_(float("nan"))
            return tensor

        return fill

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", filled(torch.empty_strided)),
        mock.patch.object(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty)),
    ):
        yield


def perform(kernel, grid, arguments, report: Report) -> None:
    """One launch of a compiled kernel (triton's CompiledKernel)."""
    memory = report.memory
    memory.start_launch()
    memory.searching = False
    for tensor in report.kept:
        memory.allow(tensor)
    values: list[tuple[str, object]] = []
    meta = list(getattr(kernel.metadata, "tensordesc_meta", None) or [])
    for kind, argument in zip(kernel.src.signature.values(), arguments, strict=True):
        _flatten(kind, argument, values, meta)
    text = kernel.asm["ptx"]
    prog = program(text)
    params = prog.kernel.params
    room = bytearray(max((p.offset + p.size for p in params), default=0))
    tables: dict[int, object] = {}
    for param, (kind, value) in zip(params, values):  # the last two are scratch memory, and 0
        if kind == "map":
            tables[param.offset], base = value
            memory.allow(base)
            continue
        if isinstance(value, torch.Tensor):
            memory.allow(value)
            memory.searching |= value.dtype == torch.int64  # a table of addresses
            value = value.data_ptr()
        room[param.offset : param.offset + param.size] = _pack(kind, value, param.size)
    if len(values) + 2 != len(params):
        raise RuntimeError(f"{kernel.name}: {len(values)} values for {len(params)} parameters")
    settings = f"w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}"
    counts = launch(
        text,
        (*grid, 1, 1)[:3],
        bytes(room),
        kernel.metadata.shared,
        memory,
        report.problems,
        report.options,
        tables,
        settings,
    )
    counts.settings = f"{settings} grid {'×'.join(str(g) for g in grid if g != 1) or 1}"
    report.launches.append(counts)


def _flatten(kind, argument, values: list, meta: list) -> None:
    if isinstance(kind, tuple):
        for k, a in zip(kind, argument, strict=True):
            _flatten(k, a, values, meta)
    elif kind == "constexpr":
        return
    elif isinstance(kind, str) and kind.startswith("tensordesc"):
        if meta:
            values.append(("map", (tensor_map(argument, meta.pop(0)), argument.base)))
        else:  # taken apart: the kernel computes addresses
            values.append(("*", argument.base))
            values += [("i64", n) for n in (*argument.shape, *argument.strides)]
            values += [("i1", argument.padding == "nan"), ("i1", argument.round_f32_to_tf32)]
        values += [("i32", n) for n in argument.shape] + [("i64", n) for n in argument.strides]
    else:
        values.append((kind, argument))


_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "fp16": "<e"}


def _pack(kind: str, value, size: int) -> bytes:
    if kind in _FLOATS:
        return struct.pack(_FLOATS[kind], value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
