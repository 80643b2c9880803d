"""Where Triton's versions differ in what they compile. Imports triton only when asked.

Each function names the first version without the gap. What depends on it may go when that is the oldest one supported.
"""

from functools import cache


@cache
def _version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def descriptors_round_to_tf32() -> bool:
    """Whether a host TensorDescriptor can round float32 to TF32 as it loads: `round_f32_to_tf32`, since Triton 3.7."""
    return _version() >= (3, 7)


def fences_copies() -> bool:
    """Whether wgmma sees what `cp.async` copied: Triton 3.7 puts the fence between them that PTX asks for.

    3.5 and 3.6 do not, https://github.com/triton-lang/triton/pull/10537. 3.5 besides gives such a tile a place too few
    in shared memory, https://github.com/triton-lang/triton/issues/8554.
    """
    return _version() >= (3, 7)
