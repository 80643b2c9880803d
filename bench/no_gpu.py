"""A GPU that is not there: calls on CPU tensors go all the way to the driver, which launches nothing.

What such a call takes is what a call costs the host, less the driver's own part. Kernels are really compiled for the
GPU that is pretended; results are never written.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor

from tribp import dispatch
from tribp.launch.arch import ARCHS, Arch

from .expectations import Launch

Pretended = contextlib.AbstractContextManager[None]
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
def recording(arch: Arch) -> Iterator[list[Launch]]:
    """Within the `with` block no plan runs; what is yielded receives what each would launch on `arch`.

    Tensors may be on any device, `meta` too.
    """
    from tribp.launch import plan as plans

    launches: list[Launch] = []

    def record(plan: plans.Plan, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        memory = plan.memory(tensors)
        launches.extend(plan.bound(memory))
        return plan.returned(memory)

    # The same configs, but plans are forgotten: which GPU they are for is no part of what they are remembered by.
    with running_on(arch), plans.using(plans.tuned), mock.patch.object(plans.Plan, "run", record):
        yield launches


def pretending(arch: Arch, performed: Performed = lambda metadata, grid, arguments: None) -> Pretended:
    """Within the `with` block CPU tensors run on Triton, for `arch`. `performed` is told of each launch.

    Raises RuntimeError under TRITON_INTERPRET=1, where Triton compiles nothing.
    """
    if dispatch.interpreting():
        raise RuntimeError("a GPU can't be pretended under TRITON_INTERPRET=1: unset it")

    def launcher(source: object, metadata: object) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: object, packed: object, *rest: Any) -> None:
            _launch_metadata, _enter_hook, _exit_hook, *arguments = rest
            performed(metadata, (x, y, z), tuple(arguments))

        return launch

    return _driving(arch, launcher)


@contextlib.contextmanager
def pretending_cuda(arch: Arch, launch: Callable[..., object] = lambda *arguments: None) -> Iterator[None]:
    """`pretending` with Triton's own launcher for CUDA, whose Python calls `launch` where it would call the driver.

    A kernel's function is its name, a descriptor what it would have been made of.
    """
    from triton.backends.nvidia import driver as cuda

    module = SimpleNamespace(launch=launch)  # what Triton 3.5 and 3.6 compile for every signature
    functions = dict(
        launch=launch, build_signature_metadata=always(b""), fill_tma_descriptor=Described,
        fill_tma_descriptor_tiled=Described,
    )  # fmt: skip
    with (
        mock.patch.object(cuda, "library_dirs", return_value=[]),
        mock.patch.object(cuda, "compile_module_from_src", return_value=module, create=True),
        mock.patch.object(cuda, "PyKernelArg", SimpleNamespace, create=True),
        _driving(arch, cuda.CudaLauncher, **functions),
    ):
        yield


pretending_h100 = functools.partial(pretending_cuda, ARCHS["sm_90"])


@contextlib.contextmanager
def pretending_h100_anew() -> Iterator[None]:
    """And every call is worked out as if there had been none; those of others stay remembered."""
    from tribp.launch import plan
    from tribp.optim.triton_bucket import TritonBucket

    perform, forgetful = TritonBucket._perform, functools.lru_cache(maxsize=0)(plan.planned.__wrapped__)

    def perform_anew(bucket: TritonBucket, *arguments: Any, **facts: Any) -> None:
        bucket._plans.clear()
        perform(bucket, *arguments, **facts)

    with (
        pretending_h100(),
        mock.patch.object(plan, "planned", forgetful),
        mock.patch.object(TritonBucket, "_perform", perform_anew),
    ):
        yield


class Described:
    """A descriptor that no GPU reads."""

    def __init__(self, address: int, *says: object) -> None:
        self.address, self.says = address, says


@contextlib.contextmanager
def _driving(arch: Arch, launcher: object, **functions: Any) -> Iterator[None]:
    """Within the `with` block tensors run on Triton, with a driver of which only these functions do anything."""
    from triton.runtime import driver

    from .compile import target_of

    utils = SimpleNamespace(
        # Module (none: Triton 3.9 would unload it), function, registers, spills, threads a program may have.
        load_binary=lambda name, *binary: (None, name, 0, 0, 1024),
        get_device_properties=always({"max_shared_mem": arch.shared_memory, "multiprocessor_count": arch.processors}),
        **functions,
    )
    active = SimpleNamespace(
        launcher_cls=launcher,
        utils=utils,
        get_current_device=always(0),
        get_current_stream=always(0),
        get_current_target=always(target_of(arch)),
    )
    with running_on(arch), mock.patch.object(driver, "_active", active):
        yield


def always(value: object) -> Callable[..., object]:
    """A function that returns the value. A Mock does too, and takes 15 µs."""
    return lambda *_: value
