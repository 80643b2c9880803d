"""Who looks on while torch runs: the compiler, a transform, a dispatch mode, autocast; and what that asks of us."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

compiler, dynamo_compiling = torch.compiler, torch.compiler.is_dynamo_compiling
dispatch_modes = torch._C._len_torch_dispatch_stack
_PLAIN = (Tensor, torch.nn.Parameter)


def dispatching() -> bool:
    """Whether something looks on that sees operators but not kernel launches: the compiler, export, a dispatch mode."""
    # Not torch.compiler.is_compiling(): it asks for TorchScript too, and would double the time of a call of this.
    return dynamo_compiling() or compiler._is_compiling_flag or dispatch_modes() > 0


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch must compute by itself: inside torch.func, in forward mode, under jit.trace, for tensor subclasses.

    A kernel would read the memory behind a wrapped tensor and return a result without its tangent, batch or trace; of
    a negative view (`z.conj().imag`) the numbers before their sign is turned.
    """
    if _transforming():
        return True
    if torch.compiler.is_compiling():  # fake tensors are subclasses too, and the operators take them
        return False
    for t in tensors:  # noqa: SIM110 (a generator takes 0.3 µs more)
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return True
    return False


def transforming(grad: Tensor) -> bool:
    """Whether a transform runs, or the older vmap behind `is_grads_batched=True`, whose gradients are marked alone."""
    return _transforming() or (not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad))


def _constant_while_compiling(predicate: Callable[[], bool]) -> Callable[[], bool]:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler for setting this one mark."""
    predicate._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return predicate


@_constant_while_compiling  # and guarded: Dynamo has guards of its own on all three
def _transforming() -> bool:
    """Inside torch.func, in forward mode, or under jit.trace."""
    functorch, tracing = torch._C._are_functorch_transforms_active(), torch._C._get_tracing_state()
    return bool(functorch or tracing or forward_ad._current_level >= 0)


def autocasting(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch has no autocast on meta, and raises


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A guard that ends autocast; free where there is none."""
    return torch.autocast(device_type, enabled=False) if autocasting(device_type) else nullcontext()


def autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to torch's linear: everything but float64 in the autocast dtype."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
