"""A GPU that is not there: calls on CPU tensors go all the way to the driver, which launches nothing.

What such a call takes is what a call costs the host, less the driver's own part. Kernels are really compiled for the
GPU that is pretended; results are never written.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tribp import dispatch
from tribp.launch.arch import ARCHS, Arch

Performed = Callable[[Any, tuple[int, ...], tuple[object, ...]], object]  # compiled kernel's metadata, grid, arguments


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
        with (
            dispatch.use_backend("triton"),
            mock.patch.object(dispatch, "backend_of", always("triton")),
            mock.patch.object(dispatch, "arch_of", always(arch)),
        ):
            yield
    finally:
        driver._active = before


def pretending_h100() -> contextlib.AbstractContextManager[object]:
    return pretending(ARCHS["sm_90"])


def always(value: object) -> Callable[..., object]:
    """A function that returns the value. A Mock does too, and takes 15 µs."""
    return lambda *_: value


def _driver(arch: Arch, performed: Performed) -> Any:
    from triton.backends.compiler import GPUTarget

    target: Any = arch.capability if arch.backend == "cuda" else arch.name

    class Launcher:
        def __init__(self, source: object, metadata: object) -> None:
            self._metadata = metadata

        def __call__(self, x: int, y: int, z: int, stream: int, function: object, packed: object, *rest: Any) -> None:
            _launch_metadata, _enter_hook, _exit_hook, *arguments = rest
            performed(self._metadata, (x, y, z), tuple(arguments))

    class Utils:
        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
            # Module (none: Triton 3.9 would unload it), function, registers, spills, threads a program may have.
            return None, 0, 0, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": arch.shared_memory, "multiprocessor_count": arch.processors}

    class Driver:
        launcher_cls = Launcher
        utils = Utils()

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget(arch.backend, target, 64 if arch.backend == "hip" else 32)

    return Driver()
