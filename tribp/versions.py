"""The versions of torch and triton that the tests were run with, and what the library does differently among them.

Importing this module imports neither: heuristics do without torch, and the fallback without triton.
"""

import copy
import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Version = tuple[int, int]

# The newest that the tests were run with. Newer ones are not refused: that would take a user's torch away.
NEWEST_TORCH: Version = (2, 15)
NEWEST_TRITON: Version = (3, 9)


def parse(version: str) -> Version:
    """Major and minor: "2.11.0+cpu" → (2, 11)."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"version must start with two numbers, got {version!r}")
    return int(match[1]), int(match[2])


@functools.cache
def triton_version() -> Version:
    """Of the installed triton, which is imported."""
    import triton

    return parse(triton.__version__)


def warn_if_untested() -> None:
    """Warn, in one line, if torch or triton is newer than any the tests were run with."""
    import torch

    installed = (("torch", parse(torch.__version__), NEWEST_TORCH), ("triton", triton_version(), NEWEST_TRITON))
    newer = [
        f"{name} {major}.{minor} (newest tested: {newest[0]}.{newest[1]})"
        for name, (major, minor), newest in installed
        if (major, minor) > newest
    ]
    if newer:
        message = f"tribp's kernels are untested with {' and '.join(newer)}"
        warnings.warn_explicit(message, UserWarning, "tribp", 0)  # `warn` would print a line of this file as well


def descriptor_unit(itemsize: int, interpreted: bool) -> int:
    """Elements that every stride of a tensor descriptor is a multiple of: 16 bytes, in Triton 3.5's interpreter 16."""
    return 16 if interpreted and triton_version() < (3, 6) else 16 // itemsize


def descriptors_round_to_tf32() -> bool:
    """Whether a host TensorDescriptor can round float32 to TF32 as it loads: `round_f32_to_tf32`, since Triton 3.7."""
    return triton_version() >= (3, 7)


def fences_copies() -> bool:
    """Whether wgmma sees what `cp.async` copied: Triton 3.7 puts the fence between them that PTX asks for.

    3.5 and 3.6 do not, https://github.com/triton-lang/triton/pull/10537.
    """
    return triton_version() >= (3, 7)


def keeps_shared_tiles() -> bool:
    """Whether shared memory keeps a tile until the last of a loop turn's wgmma products has read it.

    3.5 gives it a place too few, and the next copy lands in it: https://github.com/triton-lang/triton/issues/8554.
    """
    return triton_version() >= (3, 6)


class BareLauncher(NamedTuple):
    """Launches a compiled kernel with descriptors as the driver takes them."""

    run: Callable[..., object]
    encode: Callable[[Sequence[Any]], list[object]]  # what that is of TensorDescriptors: all of one launch's


def bare_launcher(compiled: Any) -> BareLauncher | None:
    """Triton's launcher beneath the function that makes descriptors anew at each launch, 2 µs for each.

    Triton has no name for it. None where that is not as it is from 3.5 to 3.9: then every launch makes them.
    """
    from triton.backends.nvidia import driver

    outer, metadata = compiled.run, getattr(compiled.metadata, "tensordesc_meta", None)
    make = getattr(driver, "make_tensordesc_arg", None)
    code = getattr(getattr(outer, "launch", None), "__code__", None)
    if not (isinstance(outer, driver.CudaLauncher) and make and code and metadata and all(metadata)):
        return None
    if "launcher" not in code.co_freevars:
        return None
    bare = copy.copy(outer)
    bare.launch = outer.launch.__closure__[code.co_freevars.index("launcher")].cell_contents
    unused = (None,) * (make.__code__.co_argcount - 2)  # 3.8 hands it the launch, too

    def encode(descriptors: Sequence[Any]) -> list[object]:
        pairs = zip(descriptors, metadata, strict=True)
        return [part for descriptor, says in pairs for part in make(descriptor, says, *unused)]

    return BareLauncher(bare, encode)


def check_interpreter() -> None:
    """Raise RuntimeError if Triton's interpreter can't work with the installed numpy: 3.5 and 3.6 with 2.4 and newer.

    https://github.com/triton-lang/triton/issues/9171. Otherwise each kernel would end with "only 0-dimensional arrays
    can be converted to Python scalars".
    """
    import numpy as np

    if triton_version() < (3, 7) and parse(np.__version__) >= (2, 4):
        major, minor = triton_version()
        raise RuntimeError(
            f"Triton {major}.{minor} interprets kernels with numpy before 2.4 only, and {np.__version__} is installed: "
            "pip install 'numpy<2.4', or unset TRITON_INTERPRET"
        )


def mend_interpreter() -> None:
    """Let a block of one comparison's result be a mask in Triton 3.9's interpreter.

    There `(n > 0)` has n's type and fills a block of that type, which 3.9's loads and stores refuse ("mask has
    unsupported dtype"); those before took any. May go when `block & (n > 0)` is a mask in the interpreter again.
    """
    if triton_version() < (3, 9):
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_splat(builder: object, block: Any, scalar: TensorHandle) -> TensorHandle:
        return TensorHandle(np.full(block.shape, scalar.data.flat[0], scalar.data.dtype), scalar.dtype.scalar)

    InterpreterBuilder.create_splat = create_splat
