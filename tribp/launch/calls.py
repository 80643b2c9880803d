"""Calls of an operation: their launches worked out once for tensors that lie alike, and then repeated. Imports triton.

Which kernels a call launches, on what grid, with which settings, descriptors and scratch memory, follows from how its
tensors lie (sizes, strides, types, whether addresses are multiples of 16 bytes) and from a few facts. Working it out
and letting Triton look at every argument again is most of what a call costs the host (`python -m bench host`).

What is set for Triton later (TRITON_DEBUG, instrumentation) holds for calls that are worked out after it.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from . import autotune, tuning

if TYPE_CHECKING:
    from .layout import Launch

REMEMBERED = 4096  # calls, of a few kilobytes each; the oldest is forgotten first


def perform(
    build: "Callable[..., Iterable[Launch]]",
    tensors: Mapping[str, Tensor | None],
    facts: Mapping[str, object],
    outputs: Sequence[str] = (),
) -> None:
    """Run the launches that `build(**tensors, **facts)` yields, or those it yielded for tensors that lay alike.

    outputs: the names of the tensors that the launches write. Launch settings are tuned by what these hold, and a call
    that declares none is not tuned.

    What `build` yields may depend on nothing else but the answers of launch rules. It takes memory from `scratch`
    alone: a launch on a tensor that is neither among `tensors` nor scratch (torch has copied something) keeps the call
    from being remembered.
    """
    lie = (build, *facts.values(), *map(_lie, tensors.values()))
    if (call := _calls.get((tuning.state(), lie))) is not None:
        call.repeat(tensors.values())
        return
    settled = autotune.tuner is None or autotune.tuner.prepare(lie, build, tensors, facts, outputs)
    state = tuning.state()
    recording = _recordings.current = _Recording(tensors.values())
    try:
        for launch in build(**tensors, **facts):
            recording.add(launch, launch.run())
    finally:
        _recordings.current = None
    if REMEMBERED and settled and (call := recording.call()) is not None:
        with _lock:
            if len(_calls) >= REMEMBERED:
                del _calls[next(iter(_calls))]
            _calls[state, lie] = call


def scratch(
    size: Sequence[int], dtype: torch.dtype, device: torch.device,
    layout: torch.memory_format = torch.contiguous_format, zero: bool = False,
) -> Tensor:  # fmt: skip
    """Memory for a launch to write and a later one to read; `zero`: of which launches write only a part."""
    tensor = torch.empty(tuple(size), dtype=dtype, device=device, memory_format=layout)
    if zero:
        tensor.zero_()
    if (recording := _recordings.current) is not None:
        recording.scratch.append((weakref.ref(tensor), Scratch(tensor.numel(), dtype, device, zero)))
    return tensor


def forget() -> None:
    """Work every call out anew: for whoever changes what `build` depends on, or wants to."""
    with _lock:
        _calls.clear()


def _lie(tensor: Tensor | None) -> object:
    """All that a launch can depend on, but for the numbers in the tensor."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.data_ptr() % 16


@dataclass(frozen=True)
class Scratch:
    """Memory that a call takes for itself. Kernels see an address and a type, so its shape is no matter."""

    numel: int
    dtype: torch.dtype
    device: torch.device
    zero: bool

    def allocate(self) -> Tensor:
        return (torch.zeros if self.zero else torch.empty)(self.numel, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Step:
    """A launch with its tensors left out. They are known by number: a call's own first, its scratch after them."""

    run: Callable[..., object]
    arguments: tuple[object, ...]
    tensors: Sequence[tuple[int, int]]  # the number of the argument, the number of the tensor
    descriptors: Sequence[tuple[int, int, Mapping[str, object]]]  # the same, and what the descriptor says besides

    @property
    def used(self) -> set[int]:
        return {number for _, number in self.tensors} | {number for _, number, _ in self.descriptors}

    def perform(self, memory: Sequence[Tensor | None]) -> None:
        arguments = list(self.arguments)
        for at, number in self.tensors:
            arguments[at] = memory[number]
        for at, number, rest in self.descriptors:
            # Its own constructor would check the shapes and strides again: 3 µs.
            descriptor = arguments[at] = object.__new__(TensorDescriptor)
            descriptor.__dict__.update(rest, base=memory[number])
        self.run(*arguments)


class Call:
    """The launches of one call. Scratch lives from the first launch that uses it to the last."""

    def __init__(self, given: int, scratch: Sequence[Scratch], steps: Sequence[Step]) -> None:
        self._room = (None,) * len(scratch)
        self._steps = []
        spans: dict[int, list[int]] = {}
        for n, step in enumerate(steps):
            for number in step.used:
                spans.setdefault(number, []).append(n)
        for n, step in enumerate(steps):
            first = [
                (number, scratch[number - given]) for number in step.used if number >= given and spans[number][0] == n
            ]
            last = [number for number in step.used if number >= given and spans[number][-1] == n]
            self._steps.append((first, step, last))

    def repeat(self, tensors: Iterable[Tensor | None]) -> None:
        memory = [*tensors, *self._room]
        for first, step, last in self._steps:
            for number, room in first:
                memory[number] = room.allocate()
            step.perform(memory)
            for number in last:
                memory[number] = None


class _Recording:
    """What a call does, without the tensors it does it to."""

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self.scratch: list[tuple[weakref.ref[Tensor], Scratch]] = []
        self._given = [None if tensor is None else weakref.ref(tensor) for tensor in tensors]
        present = [tensor for tensor in tensors if tensor is not None]
        # One tensor in two places: which of the two a launch means can't be seen.
        self._possible = len({id(tensor) for tensor in present}) == len(present)
        self._steps: list[Step] = []

    def add(self, launch: "Launch", compiled: object) -> None:
        tensors, descriptors = [], []
        arguments = list(launch.arguments)
        for at, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                tensors.append((at, self._number(argument)))
                arguments[at] = None
            elif isinstance(argument, TensorDescriptor):
                descriptors.append((at, self._number(argument.base), {**vars(argument), "base": None}))
                arguments[at] = None
        if isinstance(compiled, CompiledKernel):
            # It is what Triton would find again by its own look at all arguments; it wants the constants in their
            # places, and a grid of three axes.
            run: Callable[..., Any] = compiled[(*launch.grid, 1, 1)[:3]]
            arguments += [launch.constants[name] for name in launch.kernel.arg_names[len(arguments) :]]
        else:  # interpreted
            run = partial(launch.kernel[launch.grid], **launch.constants, **launch.options)
        self._steps.append(Step(run, tuple(arguments), tensors, descriptors))

    def call(self) -> Call | None:
        if not self._possible:
            return None
        return Call(len(self._given), [room for _, room in self.scratch], self._steps)

    def _number(self, tensor: Tensor) -> int:
        known = [*self._given, *(reference for reference, _ in self.scratch)]
        for number, reference in enumerate(known):
            if reference is not None and reference() is tensor:
                return number
        self._possible = False
        return -1


class _Recordings(threading.local):
    """The recording under way in this thread: autograd runs backward passes in threads of its own."""

    current: _Recording | None = None


_recordings = _Recordings()
_calls: dict[tuple[object, ...], Call] = {}
_lock = threading.Lock()  # of what is written to _calls
