"""Kernel launches: on a plan's buffers (`Launch`), and repeated on tensors (`CachedLaunch`).

Of repeated ones Triton inspects the arguments once. Imports triton.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, cast

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import versions
from ..kernels import common
from .arch import Arch
from .buffer import Buffer

# Launches' descriptors, of some hundred bytes each; the one not used for longest is forgotten first.
MAX_DESCRIPTORS = 4096


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
    early: bool = False  # it may begin while the launch before ends

    @staticmethod
    def of(
        kernel: "triton.JITFunction[Any]", grid: tuple[int, ...], arguments: tuple[object, ...], constants: NamedTuple,
        config: Any, *, max_registers: int | None = None,
    ) -> "Launch":  # fmt: skip
        """Of a layer's kernel: constants are its CONFIG, config has warps and perhaps stages and registers."""
        stages, registers = getattr(config, "num_stages", 1), max_registers or getattr(config, "max_registers", None)
        return Launch(kernel, grid, arguments, {"CONFIG": constants}, config.num_warps, stages, registers)

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
        if self.early:
            options["launch_pdl"] = True  # programmatic dependent launch
        return options

    def for_arch(self, arch: Arch) -> "Launch":
        """The launch on such a GPU: early where that can be, if its kernel then waits for the launch before."""
        waits = arch.early_launches and common.await_previous.__name__ in self.kernel.fn.__code__.co_names
        return self._replace(early=waits)

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


Encode = Callable[[Sequence[Any]], list[object]]


class CachedLaunch:
    """A launch for any memory. After the first time Triton no longer inspects its arguments."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._descriptors = [argument for argument in launch.arguments if isinstance(argument, TensorDescriptor)]
        self._bases: list[int] = [descriptor.base.number for descriptor in self._descriptors]
        self._fill = _ArgumentPicker(launch, [1] * len(self._descriptors))
        self._compiled: CompiledKernel | None = None  # until Triton has inspected the arguments once
        self._repeat: Callable[[Sequence[Tensor | None]], object] | None = None

    def on(self, memory: Sequence[Tensor | None]) -> Launch:
        return self._launch._replace(arguments=self._named(self._filled(memory)))

    def _named(self, arguments: tuple[object, ...]) -> tuple[object, ...]:
        """The arguments with NamedTuples where the launch has them. A compiled kernel knows their fields by place."""
        pairs = cast(Any, zip(self._launch.arguments, arguments, strict=True))
        return tuple(given._make(filled) if _is_named(given) else filled for given, filled in pairs)

    def _filled(self, memory: Sequence[Tensor | None]) -> tuple[object, ...]:
        bases = [memory[number] for number in self._bases]
        return self._fill(memory, map(_based, self._descriptors, bases))

    def __call__(self, memory: Sequence[Tensor | None]) -> None:
        if self._repeat is None and self._compiled is None:
            compiled = self.on(memory).run()
            if isinstance(compiled, CompiledKernel):
                self._compiled = compiled
            else:
                self._repeat = self._interpreted
            return
        if self._repeat is None:  # not at once: of ever new sizes no launch is repeated
            self._repeat = self._prepare_repeat(self._compiled)
        self._repeat(memory)

    def _interpreted(self, memory: Sequence[Tensor | None]) -> None:
        launch = self._launch
        launch.kernel[launch.grid](*self._named(self._filled(memory)), **launch.constants, **launch.options)

    def _prepare_repeat(self, compiled: CompiledKernel) -> Callable[[Sequence[Tensor | None]], None]:
        """What launches this kernel on the current device. Triton would find it again by inspecting all arguments."""
        launch, bases = self._launch, self._bases
        x, y, z = (*launch.grid, 1, 1)[:3]
        # It wants the constants in their places.
        constants = [launch.constants[name] for name in launch.kernel.arg_names[len(launch.arguments) :]]
        bare = versions.bare_launcher(compiled) if self._descriptors else None
        run, fill = compiled.run, self._fill
        if bare is not None:
            run = bare.run
            fill = _ArgumentPicker(launch, [2 * len(descriptor.shape) + 1 for descriptor in self._descriptors])
        function, packed, hooks = compiled.function, compiled.packed_metadata, knobs.runtime
        device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream

        def repeat(memory: Sequence[Any]) -> None:
            if bare is None:
                arguments = self._filled(memory)
            else:
                addresses = [memory[number].data_ptr() for number in bases]
                arguments = fill(memory, encoded(self, bare.encode, *addresses))
            stream, metadata = stream_of(device), None
            enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
            if _is_hook(enter) or _is_hook(leave):  # a profiler's
                metadata = compiled.launch_metadata((x, y, z), stream, *arguments)
            else:  # to call none of them, and to tell it, takes 2 µs
                enter = leave = None
            run(x, y, z, stream, function, packed, metadata, enter, leave, *arguments, *constants)

        return repeat

    def descriptors_at(self, addresses: Sequence[int]) -> list[TensorDescriptor]:
        """The descriptors of memory at these addresses."""
        return list(map(_based, self._descriptors, map(_Address, addresses)))


@lru_cache(maxsize=MAX_DESCRIPTORS)
def encoded(launch: CachedLaunch, encode: Encode, *addresses: int) -> list[object]:
    """What the driver gets in place of descriptors; remembered: most tensors come back to where they were last step."""
    return encode(launch.descriptors_at(addresses))


class _ArgumentPicker:
    """Picks a launch's arguments out of one list, with plain tuples in place of NamedTuples.

    The list holds what is the same each time, the memory, what descriptors become (`lengths` arguments each), and the
    tuples made of these. Descriptors and tuples are counted from its end: how much memory a run has is not known here.
    """

    def __init__(self, launch: Launch, lengths: Sequence[int]) -> None:
        leaves = [leaf for argument in launch.arguments for leaf in _leaves(argument)]
        self._same = [leaf for leaf in leaves if not isinstance(leaf, (Buffer, TensorDescriptor))]
        self._tuples: list[Callable[[list[object]], object]] = []
        tuples = sum(isinstance(argument, tuple) for argument in launch.arguments)
        same, described = iter(range(len(self._same))), iter(range(-tuples - sum(lengths), -tuples))
        length = iter(lengths)

        def places(argument: Any) -> list[int]:
            if isinstance(argument, Buffer):
                return [len(self._same) + argument.number]
            if isinstance(argument, TensorDescriptor):
                return [next(described) for _ in range(next(length))]
            if isinstance(argument, tuple):
                self._tuples.append(_picker([place for leaf in argument for place in places(leaf)]))
                return [len(self._tuples) - 1 - tuples]
            return [next(same)]

        self._pick = _picker([place for argument in launch.arguments for place in places(argument)])

    def __call__(self, memory: Sequence[Tensor | None], descriptors: Iterable[object]) -> tuple[object, ...]:
        items = [*self._same, *memory, *descriptors]
        for pick in self._tuples:
            items.append(pick(items))
        return self._pick(items)


class _Address(NamedTuple):
    """All of a tensor that a descriptor is made of, besides what it says."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _based(descriptor: TensorDescriptor, base: object) -> TensorDescriptor:
    """The descriptor of other memory. Its own constructor would check the shapes and strides again: 3 µs."""
    other = object.__new__(TensorDescriptor)
    other.__dict__.update(vars(descriptor), base=base)
    return other


def _is_hook(hook: Any) -> bool:
    """Whether there is one: a function, or one in Triton's chain of them."""
    return bool(getattr(hook, "calls", hook))


def buffers_of(arguments: Iterable[object]) -> list[Buffer]:
    """Those that a launch's arguments are, hold, or describe."""
    leaves = [leaf for argument in arguments for leaf in _leaves(argument)]
    bases = [leaf.base if isinstance(leaf, TensorDescriptor) else leaf for leaf in leaves]
    return [base for base in bases if isinstance(base, Buffer)]


def _picker(places: Sequence[int]) -> Callable[[list[object]], tuple[object, ...]]:
    """`itemgetter`, which for one place would return no tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda items: tuple(items[place] for place in places)


def _leaves(argument: object) -> tuple[object, ...]:
    return argument if isinstance(argument, tuple) else (argument,)
