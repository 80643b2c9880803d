"""Decides what computes a call: the backend of a tensor, its GPU, and who watches operators.

Operators are watched by the compiler, transforms, modes and autocast.

`auto` (the default): Triton kernels for tensors on GPUs that they suit, plain torch for everything else. Set
`TRIBP_BACKEND` to `auto`, `triton` or `torch`, or use `tribp.use_backend`. Importing this module asks no GPU anything.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from .launch.arch import INTERPRETER, Arch

BACKENDS = ("auto", "triton", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what kernels take


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_backend = _checked(os.environ.get("TRIBP_BACKEND") or "auto", "TRIBP_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the `with` block, run every tribp operation on backend `name`: "auto", "triton" or "torch".

    Like torch's own backend flags it applies to the whole process, not to one thread. A backward pass uses the backend
    that its forward pass used. Within a compiled function it breaks the graph. Raises ValueError for another name.
    """
    global _backend
    if dynamo_compiling():  # a graph runs when the block, which would be traced away, is over
        torch._dynamo.graph_break()
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


def backend_of(tensor: Tensor) -> str:
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
    """Whether kernels compile well for a GPU: for NVIDIA's from sm_80 on, for AMD's with matrix cores for all types.

    Compiled: none spills on gfx90a, gfx942 and gfx950; 19 of 156 do on gfx1100. On older ones of that family (gfx1010)
    kernels of Triton are reported to write nothing, and to say nothing. Those GPUs run torch's code.
    """
    arch = arch_of(index)
    if arch.backend == "hip":
        return arch.name in ("gfx90a", "gfx942", "gfx950")
    return arch.backend == "interpreter" or arch.capability >= 80


def _driver_version() -> int:
    """CUDA's newest version that the driver knows, 12030 for 12.3; torch does not say."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int()
    with contextlib.suppress(OSError):  # it has another name here
        ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version))
    return version.value


@functools.cache
def _arch_of(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        number = int("".join(c for c in name if c.isdigit()) or 0)
        return Arch("hip", number, properties.multi_processor_count, 64 * 1024, name)
    capability = 10 * properties.major + properties.minor
    memory = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)  # 99 KB: what every GPU since sm_80 has
    early = capability >= 90 and _driver_version() >= 12030  # CUDA graphs take early launches since 12.3
    return Arch("cuda", capability, properties.multi_processor_count, memory, f"sm_{capability}", early)


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
    """torch.float32 → "float32": as heuristics and error messages write it."""
    return str(dtype).removeprefix("torch.")


_NO_GUARD = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A guard that makes this the current device; free where it already is, or where there is none."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(device)


# -- the compiler, transforms, dispatch modes, autocast

compiler, dynamo_compiling = torch.compiler, torch.compiler.is_dynamo_compiling
dispatch_modes = torch._C._len_torch_dispatch_stack
_PLAIN = (Tensor, torch.nn.Parameter)


def needs_operator() -> bool:
    """Whether something looks on that sees operators but not kernel launches: the compiler, export, a dispatch mode."""
    # Not torch.compiler.is_compiling(): it asks for TorchScript too, and would double the time of a call of this.
    return dynamo_compiling() or compiler._is_compiling_flag or dispatch_modes() > 0


def kernels_cannot_see(*tensors: Tensor | None) -> bool:
    """Whether kernels must not get these tensors, which torch then computes with.

    So it is inside torch.func, in forward mode, for tensor subclasses, and under `torch.jit.trace` and ONNX's exporter,
    which knows torch's operators alone. A kernel would read the memory behind a wrapper, and return a result without
    its tangent, batch or trace. Of a negative view (`z.conj().imag`) it would miss the sign; a zero tensor (`sgn`'s
    gradient) has no memory.
    """
    if _any_transform():
        return True
    if torch.compiler.is_compiling():
        # Dynamo knows the tensors' own types; elsewhere fake tensors stand for them, which the operators take.
        others = dynamo_compiling() and any(t is not None and type(t) not in _PLAIN for t in tensors)
        return others or torch.onnx.is_in_onnx_export()
    for t in tensors:  # noqa: SIM110 (a generator takes 0.3 µs more)
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or t._is_zerotensor()):
            return True
    return False


def kernels_cannot_read(*tensors: Tensor | None) -> bool:
    """As `kernels_cannot_see`, or for sparse, mkldnn and nested tensors, which no strides describe.

    `kernels_compute` need not ask: the plan refuses such tensors.
    """
    strided = all(t is None or (t.layout is torch.strided and not t.is_nested) for t in tensors)
    return not strided or kernels_cannot_see(*tensors)


def implementation_for(input: Tensor, *parameters: Tensor | None) -> str:
    """Which code computes a call: the "kernels", "torch", or the registered "operator".

    The compiler and dispatch modes see operators, not kernel launches. Under a dispatch mode, what torch computes
    without it stays torch's: the same tensors are saved for backward, which a checkpoint counts.
    """
    if kernels_cannot_read(input, *parameters):
        return "torch"
    if dynamo_compiling() or compiler._is_compiling_flag:
        return "operator"
    if backend_of(input) != "triton":
        return "torch"
    return "operator" if dispatch_modes() else "kernels"


def shows_call(*tensors: object) -> bool:
    """Whether the call itself is shown to a `__torch_function__`: of a mode, or of an object that is no tensor.

    A subclass of tensors knows torch's functions, not ours: it is shown those that compute the call.
    """
    if not has_torch_function_variadic(*tensors):
        return False
    return torch._C._len_torch_function_stack() > 0 or not all(t is None or isinstance(t, Tensor) for t in tensors)


def unwrap_dead(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors. Of one that outlived its transform, what it wraps: the wrapper itself has no memory."""
    return unwrap_dead_wrappers(tensors)


def transform_active(grad: Tensor) -> bool:
    """Whether a transform runs, or the older vmap behind `is_grads_batched=True`, whose gradients are marked alone."""
    return _any_transform() or (not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad))


def _any_transform() -> bool:
    """Inside torch.func, in forward mode, or under jit.trace."""
    functorch, tracing = torch._C._are_functorch_transforms_active(), torch._C._get_tracing_state()
    return bool(functorch or tracing or forward_ad._current_level >= 0)


# What `torch.compiler.assume_constant_result` does, which imports the whole compiler. Dynamo guards all three itself.
_any_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasting(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch has no autocast on meta, and raises


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A guard that ends autocast; free where there is none."""
    return torch.autocast(device_type, enabled=False) if autocasting(device_type) else contextlib.nullcontext()


def autocast_of(device_type: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A guard that brings back, later, the autocast that there is now."""
    if autocasting(device_type):
        return functools.partial(torch.autocast, device_type, torch.get_autocast_dtype(device_type))
    return functools.partial(without_autocast, device_type)


def autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to torch's linear: everything but float64 in the autocast dtype."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def plain_cpu_call(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain CPU tensors of one of our types, with no compiler or override about.

    Then torch's own operators compute the call, or raise, and the checks can be skipped. What those would not refuse
    (a weight on the meta device, some biases of another type) is asked here. A question takes 40 ns, a function for
    some of them 60 more.
    """
    return (
        not (has_torch_function_variadic(input, weight, bias) or dynamo_compiling())
        and not compiler._is_compiling_flag
        and _backend != "triton"  # of a tensor on the CPU `backend_of` asks no more
        and input.is_cpu
        and weight.is_cpu
        and (dtype := input.dtype) in FLOATS
        and (bias is None or bias.dtype is dtype)
    )


def kernels_compute(input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernels compute a call, or its plan refuses it, so that nothing need be checked before."""
    return (
        not has_torch_function_variadic(input, *parameters)
        and not needs_operator()
        and not kernels_cannot_see(input, *parameters)  # a fake tensor may name a GPU that is not there
        and backend_of(input) == "triton"
        and not autocasting(input.device.type)
    )


def backward_by_torch(grad: Tensor, by_operator: bool) -> bool:
    """Whether the gradients are left to torch's operations.

    For whoever differentiates them again (create_graph=True), where torch asks for many at once
    (is_grads_batched=True), and (operators see to it themselves) for gradients that are no plain memory.
    """
    if torch.is_grad_enabled() or transform_active(grad):
        return True
    return not by_operator and (kernels_cannot_see(grad) or grad.layout is not torch.strided)
