"""Plans: the launches of one call, worked out once for tensors of one layout and then repeated. Imports triton.

Which kernels a call launches, on what grid, with which config, descriptors and scratch memory, follows from the layout
of its tensors (sizes, strides, types, whether addresses are multiples of 16 bytes) and from a few facts. A *build*
function works that out on `Buffer`s, which have a layout but no memory:

    def build(plan: Plan, x: Buffer, w: Buffer, *, tf32: bool) -> None:
        config = plan.config(ForwardProblem(…))
        y, partials = plan.output((8, 256), x.dtype), plan.scratch((4, 256), torch.float32)
        plan.launch(kernel, grid, (x, w, partials, y), Forward(BLOCK_M=config.block_i, …), config)
        plan.returns(y)

It checks the layouts, too: what it raises is raised at each such call, and calls of a layout that is known are not
checked again. `plan_of` builds the plan of a call, or finds the one of an earlier call; `autotune.perform`, which all
calls go through, runs it on the call's tensors. To work a plan out, and to let Triton inspect every argument again, is
most of what a call costs the host (`python -m bench host`). What is set for Triton later (TRITON_DEBUG,
instrumentation) holds for plans that are built after it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from .. import dispatch, versions
from ..kernels import common
from . import launches
from .arch import Arch
from .buffer import Buffer, Layout, Memory, dense_strides, device_of, layout_of
from .launches import CachedLaunch, Launch, buffers_of
from .neighbors import Problem

MAX_PLANS = 4096  # plans, of a few kilobytes each; the one not used for longest is forgotten first

versions.warn_if_untested()
if common.INTERPRETED:
    versions.check_interpreter()
    versions.mend_interpreter()

C = TypeVar("C")


class Copy(NamedTuple):
    """Not a launch of ours: torch copies a tensor that no kernel can read as it is."""

    source: Buffer
    target: Buffer


class Plan:
    """The launches of one call.

    configs: for some problems, the configs to use in place of the heuristics' choices.
    """

    def __init__(
        self, arch: Arch, layouts: Sequence[tuple[Any, ...] | None], configs: Mapping[Any, Any] | None = None
    ) -> None:
        self.arch = arch
        self.given = [None if layout is None else Buffer(n, Layout(*layout)) for n, layout in enumerate(layouts)]
        self.device = device_of(layouts)
        self.configs: dict[Any, Any] = {}  # those that were used, by their problems
        self.results: list[int | None] = []  # numbers of the buffers that the call returns
        self.steps: list[Launch | Copy] = []
        self._configs = {} if configs is None else configs
        self._memory: list[Memory] = []  # behind the given buffers
        self._outputs: list[tuple[int, Memory]] = []
        self._ready: list[_Ready] = []

    # What build functions call.

    def config(self, problem: Problem[C]) -> C:
        """The config for a problem: the one that was given, or the heuristic's choice."""
        if problem not in self.configs:
            self.configs[problem] = self._configs.get(problem) or problem.choose()
        chosen: C = self.configs[problem]
        return chosen

    def scratch(
        self, shape: Sequence[int], dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format, zero: bool = False,
    ) -> Buffer:  # fmt: skip
        """Memory for a launch to write and a later one to read; `zero`: of which launches write only a part."""
        layout = Layout(tuple(shape), dense_strides(shape, memory_format), dtype, 0, self.device)
        self._memory.append(Memory(layout, zero))
        return Buffer(len(self.given) + len(self._memory) - 1, layout)

    def output(
        self, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Buffer:
        """Memory for what the call returns."""
        buffer = self.scratch(shape, dtype, memory_format)
        self._outputs.append((buffer.number, self._memory[-1]))
        return buffer

    def contiguous(self, buffer: Buffer, memory_format: torch.memory_format = torch.contiguous_format) -> Buffer:
        """The buffer if it is contiguous, else a copy that is."""
        if buffer.is_contiguous(memory_format=memory_format):
            return buffer
        copy = self.scratch(buffer.shape, buffer.dtype, memory_format)
        self.steps.append(Copy(buffer, copy))
        return copy

    def launch(
        self, kernel: "triton.JITFunction[Any]", grid: tuple[int, ...], arguments: tuple[object, ...],
        constants: NamedTuple, config: Any, *, max_registers: int | None = None,
    ) -> None:  # fmt: skip
        """Launch a kernel. constants: its CONFIG, all that is fixed at compile time. config: with warps and stages."""
        self.add(Launch.of(kernel, grid, arguments, constants, config, max_registers=max_registers))

    def add(self, launch: Launch) -> None:
        self.steps.append(launch.for_arch(self.arch))

    def returns(self, *results: Buffer | None) -> None:
        """Say what the launches write: outputs, or tensors of the call. Without any, the call is not tuned."""
        self.results += [None if result is None else result.number for result in results]

    # What others do with it.

    @property
    def launches(self) -> list[Launch]:
        """On buffers in place of tensors."""
        return [step for step in self.steps if isinstance(step, Launch)]

    def memory(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Tensors that have the plan's layouts, and behind them all that the call allocates, at once."""
        return [*tensors, *(memory.allocate() for memory in self._memory)]

    def bound(self, memory: Sequence[Tensor | None]) -> list[Launch]:
        """The launches on such memory."""
        return [CachedLaunch(launch).on(memory) for launch in self.launches]

    def returned(self, memory: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What the call returns, of such memory."""
        return [None if number is None else memory[number] for number in self.results]

    def run(self, tensors: Sequence[Tensor | None], into: Sequence[Tensor | None] | None = None) -> list[Tensor | None]:
        """Perform the steps on tensors that have the plan's layouts; returns the results.

        Scratch lives from its first use to its last. into: results of an earlier run, to be written anew.
        """
        if not self._ready:
            self._ready = list(self._prepared())
        memory: list[Tensor | None] = [*tensors, *[None] * len(self._memory)]
        if into is None:
            for number, output in self._outputs:
                memory[number] = output.allocate()
        else:
            for result, tensor in zip(self.results, into, strict=True):
                if result is not None:
                    memory[result] = tensor
        for step, first, last in self._ready:
            for number, scratch in first:
                memory[number] = scratch.allocate()
            step(memory)
            for number in last:
                memory[number] = None
        return self.returned(memory)

    def _prepared(self) -> "Iterator[_Ready]":
        used = [_used(step) for step in self.steps]
        uses: dict[int, list[int]] = {}
        for n, numbers in enumerate(used):
            for number in numbers:
                uses.setdefault(number, []).append(n)
        given, outputs = len(self.given), dict(self._outputs)
        for n, (step, numbers) in enumerate(zip(self.steps, used, strict=True)):
            own = [number for number in numbers if number >= given and number not in outputs]
            first = [(number, self._memory[number - given]) for number in own if uses[number][0] == n]
            last = [number for number in own if uses[number][-1] == n]
            yield _Ready(partial(_copy, step) if isinstance(step, Copy) else CachedLaunch(step), first, last)


class _Ready(NamedTuple):
    """A step, the scratch to allocate before it, and what to free after it."""

    step: Callable[[Sequence[Tensor | None]], object]
    first: Sequence[tuple[int, Memory]]
    last: Sequence[int]


def _used(step: Launch | Copy) -> list[int]:
    """The numbers of the buffers that a step uses, each once."""
    buffers = buffers_of(step.arguments) if isinstance(step, Launch) else step
    return list(dict.fromkeys(buffer.number for buffer in buffers))


def _copy(copy: Copy, memory: Sequence[Tensor | None]) -> None:
    target, source = (_view(memory, buffer) for buffer in (copy.target, copy.source))
    target.copy_(source)


def _view(memory: Sequence[Tensor | None], buffer: Buffer) -> Tensor:
    tensor = memory[buffer.number]
    assert tensor is not None
    return tensor.as_strided(buffer.shape, buffer.stride())


Build = Callable[..., None]


def plan_of(build: Build, tensors: Sequence[Tensor | None], facts: Mapping[str, object]) -> Plan:
    """The plan of a call: what `build` makes of it, or made of an earlier one."""
    try:
        return planned(build, *map(layout_of, tensors), **facts)
    except Exception as error:
        error.refused_by_plan = True  # type: ignore[attr-defined]
        raise


@lru_cache(maxsize=MAX_PLANS)
def planned(build: Build, *layouts: tuple[Any, ...] | None, **facts: object) -> Plan:
    """The plan of all calls with these layouts and facts."""
    return build_plan(build, arch_of(layouts), layouts, facts, tuned)


def arch_of(layouts: Iterable[tuple[Any, ...] | None]) -> Arch:
    return dispatch.arch_of(device_of(layouts).index)


def build_plan(
    build: Build, arch: Arch, layouts: Sequence[tuple[Any, ...] | None], facts: Mapping[str, object],
    configs: Mapping[Any, Any] | None = None,
) -> Plan:  # fmt: skip
    """A new plan. configs: as for `Plan`."""
    plan = Plan(arch, layouts, configs)
    build(plan, *plan.given, **facts)
    return plan


def launches_of(build: Build, arch: Arch, tensors: Sequence[Tensor | None], **facts: object) -> list[Launch]:
    """What a call with these tensors would launch on a machine that need not be there; they may be `meta` tensors."""
    plan = build_plan(build, arch, [layout_of(tensor) for tensor in tensors], facts, tuned)
    return plan.bound(plan.memory(tensors))


def forget() -> None:
    """Work every call out anew: for whoever changes what build functions depend on."""
    planned.cache_clear()
    launches.encoded.cache_clear()


tuned: dict[Any, Any] = {}  # configs by their problems, that were measured to be faster than the heuristics' choices


@contextmanager
def using(configs: dict[Any, Any]) -> Iterator[Any]:
    """Within the block plans are made with these configs in place of the tuned ones: for the bench and the tests."""
    global tuned
    before, tuned = tuned, configs
    forget()
    try:
        yield configs
    finally:
        tuned = before
        forget()


def config_for(problem: Problem[C]) -> C:
    """The tuned config for a problem, or the heuristic's choice."""
    config: C = tuned.get(problem) or problem.choose()
    return config
