"""Which backend runs a tensor, and on what machine.

`auto` (the default): Triton kernels for CUDA and ROCm tensors, plain torch for everything else. Set `TRIBP_BACKEND` to
`auto`, `triton` or `torch`, or use `tribp.use_backend`. Importing this module asks no GPU anything.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch

from .launch.arch import INTERPRETER, Arch

BACKENDS = ("auto", "triton", "torch")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_backend = _checked(os.environ.get("TRIBP_BACKEND") or "auto", "TRIBP_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the `with` block, run every tribp operation on backend `name`: "auto", "triton" or "torch".

    Like torch's own backend flags it holds for the whole process, not for a thread. A backward pass uses the backend
    its forward pass used. Raises ValueError for another name.
    """
    global _backend
    before, _backend = _backend, _checked(name, "backend")
    try:
        yield
    finally:
        _backend = before


def backend() -> str:
    """The backend that was chosen: "auto", "triton" or "torch"."""
    return _backend


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were first imported)."""
    if not has_triton():
        return False
    from .kernels import common

    return bool(common.INTERPRETED)


def backend_of(tensor: torch.Tensor) -> str:
    """The backend that runs operations on `tensor`: "triton" or "torch".

    Raises RuntimeError if the Triton backend was asked for and cannot run this tensor.
    """
    if _backend == "torch":
        return "torch"
    if _backend == "auto":
        return "triton" if tensor.is_cuda and has_triton() and _supported(tensor.device.index) else "torch"
    if tensor.is_meta:
        return "torch"  # shapes alone: no kernel has anything to read
    if not has_triton():
        raise RuntimeError("the Triton backend was asked for, but triton is not installed: pip install triton")
    if not (tensor.is_cuda or (tensor.is_cpu and interpreting())):
        raise RuntimeError(
            f"the Triton backend was asked for on a {tensor.device.type} tensor: it takes CUDA and ROCm tensors, and "
            "CPU tensors only in Triton's interpreter (set TRITON_INTERPRET=1 before tribp is imported)"
        )
    return "triton"


def _supported(index: int) -> bool:
    """Triton compiles for AMD's matrix-core GPUs and for NVIDIA's from sm_80 on; older ones go torch's way."""
    arch = arch_of(index)
    return arch.backend != "cuda" or arch.capability >= 80


@functools.cache
def _arch_of(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        number = int("".join(c for c in name if c.isdigit()) or 0)
        return Arch("hip", number, properties.multi_processor_count, 64 * 1024, name)
    capability = 10 * properties.major + properties.minor
    memory = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)  # 99 KB: what every GPU since sm_80 has
    return Arch("cuda", capability, properties.multi_processor_count, memory, f"sm_{capability}")


def arch_of(index: int | None) -> Arch:
    """The machine behind CUDA device `index`; the interpreter for None, or where that is what runs the kernels."""
    return INTERPRETER if index is None or interpreting() else _arch_of(index)


def tf32_allowed(convolution: bool = False) -> bool:
    """Whether torch lets float32 products, or convolutions, round their operands to TF32.

    `fp32_precision` reflects both ways of setting it; reading `allow_tf32` raises once the newer one was used. torch's
    defaults differ: products keep float32, convolutions do not.
    """
    setting = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return bool(setting.fp32_precision == "tf32")


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 → "float32": as launch rules and error messages write it."""
    return str(dtype).removeprefix("torch.")


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """A guard that makes the tensor's device the current one; free where it already is, or where there is none."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
