"""Plans: the launches of one call, worked out once for tensors of one layout and then repeated. Imports triton.

Which kernels a call launches, on what grid, with which config, descriptors and scratch memory, follows from the layout
of its tensors (sizes, strides, types, whether addresses are multiples of 16 bytes) and from a few facts. A *build*
function works that out on `Buffer`s, which have a layout but no memory:

    def build(plan: Plan, x: Buffer, w: Buffer, y: Buffer, *, tf32: bool) -> None:
        config = plan.config(ForwardProblem(…))
        partials = plan.scratch((4, 256), torch.float32)
        plan.launch(kernel, grid, (x, w, partials), Forward(BLOCK_M=config.block_i, …), config)
        plan.writes(y)

`perform` builds the plan of a call, or finds the one of an earlier call, and runs it on the call's tensors. To work a
plan out, and to let Triton inspect every argument again, is most of what a call costs the host (`python -m bench
host`). What is set for Triton later (TRITON_DEBUG, instrumentation) holds for plans that are built after it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, cast, overload

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import dispatch, versions
from ..kernels import common
from .arch import Arch
from .neighbors import Problem

REMEMBERED = 4096  # plans, of a few kilobytes each; the one not used for longest is forgotten first

versions.warn_if_untested()
if common.INTERPRETED:
    versions.mend_interpreter()

C = TypeVar("C")


class Layout(NamedTuple):
    """All that a launch can depend on of a tensor: all but the numbers in it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    misalignment: int  # of its address: the remainder by 16


@dataclass(frozen=True)
class Buffer:
    """Memory of a known layout, which each run of the plan has at another address.

    It answers what a tensor would, as far as launches ask. Triton's own binder takes it for a tensor, too: so a plan's
    kernels can be compiled with no tensor and no GPU.
    """

    number: int  # among the plan's buffers: the call's tensors come first, then its scratch memory
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @overload
    def stride(self) -> tuple[int, ...]: ...
    @overload
    def stride(self, dim: int) -> int: ...
    def stride(self, dim: int | None = None) -> tuple[int, ...] | int:
        return self.layout.strides if dim is None else self.layout.strides[dim]

    def numel(self) -> int:
        numel = 1
        for size in self.layout.shape:
            numel *= size
        return numel

    def element_size(self) -> int:
        return self.layout.dtype.itemsize

    def data_ptr(self) -> int:
        """An address that is aligned as the memory's will be."""
        return self.layout.misalignment

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        dense = dense_strides(self.shape, memory_format)
        lines = zip(self.shape, self.stride(), dense, strict=True)
        return all(size == 1 or stride == expected for size, stride, expected in lines)

    def transpose(self, a: int, b: int) -> "Buffer":
        """The same memory with two dimensions exchanged."""
        order = list(range(len(self.shape)))
        order[a], order[b] = b, a
        shape, strides = ([values[d] for d in order] for values in (self.shape, self.stride()))
        return Buffer(self.number, self.layout._replace(shape=tuple(shape), strides=tuple(strides)))


def dense_strides(
    shape: Sequence[int], memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    order = (1, 3, 2, 0) if memory_format == torch.channels_last else range(len(shape) - 1, -1, -1)
    strides, extent = [0] * len(shape), 1
    for d in order:
        strides[d] = extent
        extent *= shape[d]
    return tuple(strides)


class Launch(NamedTuple):
    """One kernel launch, complete: `run` performs it, `bench static` compiles it for a GPU that is not there.

    constants: the kernel's `constexpr` parameters; of a layer's kernel CONFIG alone, a NamedTuple.
    """

    kernel: "triton.JITFunction[Any]"
    grid: tuple[int, ...]
    arguments: tuple[object, ...]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Arguments by the names of the kernel's parameters, and `settings`.

        Of a NamedTuple also the fields, y_stride_n for y.stride_n; it itself is the first of them, a tensor.
        """
        arguments: Iterable[tuple[str, Any]] = zip(self.kernel.arg_names, self.arguments, strict=False)
        named: dict[str, Any] = {}
        for name, value in arguments:
            named |= {**_fields(value, f"{name}_"), name: value[0]} if _is_named(value) else {name: value}
        return named | self.settings

    @property
    def settings(self) -> dict[str, Any]:
        """The constants by name; in place of a config its fields, SRC_VEC for its SRC.VEC."""
        settings: dict[str, Any] = {}
        for name, value in self.constants.items():
            settings |= _fields(value, "") if _is_named(value) else {name: value}
        return settings

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides the kernel's own arguments."""
        # Triton 3.9 warns that a · b + c will be two roundings by default from 3.10 on.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers  # CUDA only: on AMD it is no option
        return options

    def run(self) -> object:
        """Returns the compiled kernel, or None where it was interpreted."""
        return self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def in_tuple(n: int) -> int:
    """A number in an argument that is a tuple, where Triton would specialize 1 and multiples of 16 (`from_tuple`)."""
    return 2 * n + 3


def _is_named(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _fields(config: Any, prefix: str) -> dict[str, Any]:
    """A config's fields by name, and those of a config within it."""
    fields: dict[str, Any] = {}
    for name, value in config._asdict().items():
        fields |= _fields(value, f"{prefix}{name}_") if _is_named(value) else {prefix + name: value}
    return fields


class Scratch(NamedTuple):
    """Memory that a call takes for itself. Kernels see an address and a type, so it has no shape."""

    numel: int
    dtype: torch.dtype
    zero: bool

    def allocate(self, device: torch.device) -> Tensor:
        return (torch.zeros if self.zero else torch.empty)(self.numel, dtype=self.dtype, device=device)


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
        self.configs: dict[Any, Any] = {}  # those that were used, by their problems
        self.outputs: list[int] = []  # numbers of the call's tensors that it writes
        self.steps: list[Launch | Copy] = []
        self._configs = {} if configs is None else configs
        self._scratch: list[Scratch] = []
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
        layout = Layout(tuple(shape), dense_strides(shape, memory_format), dtype, 0)
        buffer = Buffer(len(self.given) + len(self._scratch), layout)
        self._scratch.append(Scratch(buffer.numel(), dtype, zero))
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
        stages, registers = getattr(config, "num_stages", 1), max_registers or getattr(config, "max_registers", None)
        self.add(Launch(kernel, grid, arguments, {"CONFIG": constants}, config.num_warps, stages, registers))

    def add(self, launch: Launch) -> None:
        self.steps.append(launch)

    def writes(self, *outputs: Buffer | None) -> None:
        """Say which of the call's tensors the launches write. Without any, the call is not tuned."""
        self.outputs += [output.number for output in outputs if output is not None]

    # What others do with it.

    @property
    def launches(self) -> list[Launch]:
        """On buffers in place of tensors."""
        return [step for step in self.steps if isinstance(step, Launch)]

    def bound(self, tensors: Sequence[Tensor | None]) -> list[Launch]:
        """The launches on tensors that have the plan's layouts, with scratch memory for all of them at once."""
        device = next(tensor.device for tensor in tensors if tensor is not None)
        memory = [*tensors, *(scratch.allocate(device) for scratch in self._scratch)]
        return [CachedLaunch(launch).on(memory) for launch in self.launches]

    def run(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        """Perform the steps on tensors that have the plan's layouts. Scratch lives from its first use to its last."""
        if not self._ready:
            self._ready = list(self._prepared())
        memory: list[Tensor | None] = [*tensors, *(None for _ in self._scratch)]
        for step, first, last in self._ready:
            for number, scratch in first:
                memory[number] = scratch.allocate(device)
            step(memory)
            for number in last:
                memory[number] = None

    def _prepared(self) -> "Iterator[_Ready]":
        used = [_buffers(step) for step in self.steps]
        uses: dict[int, list[int]] = {}
        for n, numbers in enumerate(used):
            for number in numbers:
                uses.setdefault(number, []).append(n)
        given = len(self.given)
        for n, (step, numbers) in enumerate(zip(self.steps, used, strict=True)):
            own = [number for number in numbers if number >= given]
            first = [(number, self._scratch[number - given]) for number in own if uses[number][0] == n]
            last = [number for number in own if uses[number][-1] == n]
            yield _Ready(partial(_copy, step) if isinstance(step, Copy) else CachedLaunch(step), first, last)


class _Ready(NamedTuple):
    """A step, the scratch to allocate before it, and what to free after it."""

    step: Callable[[Sequence[Tensor | None]], object]
    first: Sequence[tuple[int, Scratch]]
    last: Sequence[int]


def _buffers(step: Launch | Copy) -> list[int]:
    """The numbers of the buffers that a step uses, each once."""
    arguments = [
        leaf for argument in (step if isinstance(step, Copy) else step.arguments) for leaf in _leaves(argument)
    ]
    bases = [argument.base if isinstance(argument, TensorDescriptor) else argument for argument in arguments]
    return list(dict.fromkeys(base.number for base in bases if isinstance(base, Buffer)))


def _copy(copy: Copy, memory: Sequence[Tensor | None]) -> None:
    target, source = (_view(memory, buffer) for buffer in (copy.target, copy.source))
    target.copy_(source)


def _view(memory: Sequence[Tensor | None], buffer: Buffer) -> Tensor:
    tensor = memory[buffer.number]
    assert tensor is not None
    return tensor.as_strided(buffer.shape, buffer.stride())


class CachedLaunch:
    """A launch for any memory. After the first time Triton no longer inspects its arguments.

    They are picked from one list: what is the same each time, then the memory, then descriptors and tuples, which are
    made of both.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        leaves = [leaf for argument in launch.arguments for leaf in _leaves(argument)]
        self._same = [leaf for leaf in leaves if not isinstance(leaf, (Buffer, TensorDescriptor))]
        self._descriptors: list[tuple[Mapping[str, object], int]] = []  # what it says, and the place of its tensor
        self._tuples: list[Callable[[list[object]], object]] = []
        same = iter(range(len(self._same)))
        tuples = sum(isinstance(argument, tuple) for argument in launch.arguments)
        descriptors = sum(isinstance(argument, TensorDescriptor) for argument in launch.arguments)

        def place(argument: Any) -> int:
            if isinstance(argument, Buffer):
                return len(self._same) + argument.number
            if isinstance(argument, TensorDescriptor):
                self._descriptors.append(({**vars(argument), "base": None}, place(argument.base)))
                return len(self._descriptors) - 1 - descriptors - tuples
            if isinstance(argument, tuple):
                self._tuples.append(_picker([*map(place, argument)]))
                return len(self._tuples) - 1 - tuples
            return next(same)

        self._pick = _picker([*map(place, launch.arguments)])
        # What takes the arguments and these constants behind them; None until Triton has inspected them once.
        self._repeat: Callable[..., object] | None = None
        self._constants: list[object] = []

    def on(self, memory: Sequence[Tensor | None]) -> Launch:
        return self._launch._replace(arguments=self._named(self._filled(memory)))

    def _named(self, arguments: tuple[object, ...]) -> tuple[object, ...]:
        """The arguments with NamedTuples where the launch has them. A compiled kernel knows their fields by place."""
        pairs = cast(Any, zip(self._launch.arguments, arguments, strict=True))
        return tuple(given._make(filled) if _is_named(given) else filled for given, filled in pairs)

    def _filled(self, memory: Sequence[Tensor | None]) -> tuple[object, ...]:
        """The arguments, with plain tuples in place of NamedTuples."""
        items = [*self._same, *memory]
        for says, place in self._descriptors:
            # Its own constructor would check the shapes and strides again: 3 µs.
            descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__.update(says, base=items[place])
            items.append(descriptor)
        for pick in self._tuples:
            items.append(pick(items))
        return self._pick(items)

    def __call__(self, memory: Sequence[Tensor | None]) -> None:
        if self._repeat is not None:
            self._repeat(*self._filled(memory), *self._constants)
            return
        launch = self.on(memory)
        compiled = launch.run()
        if isinstance(compiled, CompiledKernel):
            # It is what Triton would find again by inspecting all arguments; it wants the constants in their
            # places, and a grid of three axes.
            self._constants = [launch.constants[name] for name in launch.kernel.arg_names[len(launch.arguments) :]]
            self._repeat = compiled[(*launch.grid, 1, 1)[:3]]
        else:  # interpreted
            run = partial(launch.kernel[launch.grid], **launch.constants, **launch.options)
            self._repeat = lambda *arguments: run(*self._named(arguments))


def _picker(places: Sequence[int]) -> Callable[[list[object]], tuple[object, ...]]:
    """`itemgetter`, which for one place would return no tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda items: tuple(items[place] for place in places)


def _leaves(argument: object) -> tuple[object, ...]:
    return argument if isinstance(argument, tuple) else (argument,)


Build = Callable[..., None]


def perform(build: Build, tensors: Sequence[Tensor | None], device: torch.device, **facts: object) -> None:
    """Run the launches of `build(plan, *buffers, **facts)`: a pure function of the tensors' layouts and the facts."""
    planned(build, device, *map(layout_of, tensors), **facts).run(tensors, device)


@lru_cache(maxsize=REMEMBERED)
def planned(build: Build, device: torch.device, *layouts: tuple[Any, ...] | None, **facts: object) -> Plan:
    """The plan of all calls with these layouts and facts."""
    return build_plan(build, dispatch.arch_of(device.index), layouts, facts, tuned)


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
    return build_plan(build, arch, [layout_of(tensor) for tensor in tensors], facts, tuned).bound(tensors)


def layout_of(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """The fields of its `Layout`, as a plain tuple: every call asks for them, and to name them takes 0.2 µs."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


def forget() -> None:
    """Work every call out anew: for whoever changes what build functions depend on."""
    planned.cache_clear()


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
