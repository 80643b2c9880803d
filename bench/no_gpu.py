"""A GPU that is not there: calls on CPU tensors go all the way to the driver, which launches nothing.

What such a call takes is what a call costs the host, less the driver's own part. Kernels are really compiled for the
GPU that is pretended; results are never written.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from tribp import dispatch
from tribp.launch.arch import ARCHS, Arch

if TYPE_CHECKING:
    from tribp.launch.plan import Launch

Performed = Callable[[Any, tuple[int, ...], tuple[object, ...]], object]  # compiled kernel's metadata, grid, arguments


@contextlib.contextmanager
def running_on(arch: Arch) -> Iterator[None]:
    """Within the `with` block every tensor is one that Triton runs, on `arch`."""
    with (
        dispatch.use_backend("triton"),
        mock.patch.object(dispatch, "backend_of", always("triton")),
        mock.patch.object(dispatch, "arch_of", always(arch)),
    ):
        yield


@contextlib.contextmanager
def recording(arch: Arch) -> "Iterator[list[Launch]]":
    """Within the `with` block no plan runs; what is yielded receives what each would launch on `arch`.

    Tensors may be on any device, `meta` too.
    """
    from tribp.launch import plan as plans

    launches: list[Launch] = []

    def record(plan: plans.Plan, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        launches.extend(plan.bound(tensors))

    plans.forget()  # which GPU they are for is no part of what they are remembered by
    try:
        with running_on(arch), mock.patch.object(plans.Plan, "run", record):
            yield launches
    finally:
        plans.forget()


@contextlib.contextmanager
def pretending(arch: Arch, performed: Performed = lambda metadata, grid, arguments: None) -> Iterator[None]:
    """Within the `with` block CPU tensors run on Triton, for `arch`. `performed` is told of each launch.

    Raises RuntimeError under TRITON_INTERPRET=1, where Triton compiles nothing.
    """
    from triton.runtime import driver

    if dispatch.interpreting():
        raise RuntimeError("a GPU can't be pretended under TRITON_INTERPRET=1: unset it")
    before = driver._active
    driver.set_active(_driver(arch, performed))
    try:
        with running_on(arch):
            yield
    finally:
        driver._active = before


pretending_h100 = functools.partial(pretending, ARCHS["sm_90"])


def always(value: object) -> Callable[..., object]:
    """A function that returns the value. A Mock does too, and takes 15 µs."""
    return lambda *_: value


def _driver(arch: Arch, performed: Performed) -> Any:
    from .compile import target_of

    def launcher(source: object, metadata: object) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: object, packed: object, *rest: Any) -> None:
            _launch_metadata, _enter_hook, _exit_hook, *arguments = rest
            performed(metadata, (x, y, z), tuple(arguments))

        return launch

    utils = SimpleNamespace(
        # Module (none: Triton 3.9 would unload it), function, registers, spills, threads a program may have.
        load_binary=always((None, 0, 0, 0, 1024)),
        get_device_properties=always({"max_shared_mem": arch.shared_memory, "multiprocessor_count": arch.processors}),
    )
    return SimpleNamespace(
        launcher_cls=launcher,
        utils=utils,
        get_current_device=always(0),
        get_current_stream=always(0),
        get_current_target=always(target_of(arch)),
    )
