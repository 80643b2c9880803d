"""What the operations' functions and derivatives share."""

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from .activations import Activation

Needs = tuple[bool, bool, bool]  # of input, weight and bias
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]

T = TypeVar("T")

# Of the registered operators: "tribp", or the name by which the kernel hub imports this version of the package.
NAMESPACE = __name__.partition(".")[0]
# What comes of wrong arguments. Other exceptions end a computation that is to end: torch.utils.checkpoint's do.
REFUSALS = (AttributeError, RuntimeError, TypeError, ValueError)


def unless_refused(by_kernels: Callable[..., Tensor], *arguments: object) -> Tensor | None:
    """The kernels' result; None if the call's plan refuses it: the checks know a better sentence.

    Nothing was begun then. What hooks and kernels raise is the caller's.
    """
    try:
        return by_kernels(*arguments)
    except REFUSALS as error:
        if getattr(error, "refused_by_plan", False):
            return None
        raise


def scatter(present: Sequence[bool], values: Iterable[T]) -> list[T | None]:
    """The values, each in its place, and None where there is none: gradients that an operator returned, say."""
    remaining = iter(values)
    return [next(remaining) if here else None for here in present]


def autocast_activates(device_type: str, activation: Activation) -> bool:
    """Whether autocast has an activation computed in float32, of what the layer has rounded, as CUDA's has softplus."""
    return activation.name == "softplus" and device_type == "cuda" and dispatch.autocasting(device_type)


def autocast_all(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast would hand them to torch's own operator; None stays None."""
    return tuple(None if tensor is None else dispatch.autocast(tensor) for tensor in tensors)


def uses_tf32(tensor: Tensor, convolution: bool = False) -> bool:
    return tensor.dtype == torch.float32 and dispatch.tf32_allowed(convolution)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError where an operator, whose derivative has no forward mode, would lose a tangent."""
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise NotImplementedError(
            f"{NAMESPACE}'s operators have forward mode under torch.func only; in an exported program, "
            "run_decompositions(tribp.decompositions()) replaces them by torch's operations"
        )


def _has_tangent(tensor: Tensor | None) -> bool:
    unpack: Any = forward_ad.unpack_dual  # untyped
    try:
        return tensor is not None and unpack(tensor).tangent is not None
    except RuntimeError:  # it can't be asked where a graph that AOTAutograd made runs
        return False


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without what it asks of torch.func: 3 µs of a call's 24.

    `unwrap_dead` and `kernels_compute` know.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


@functools.cache
def import_plan(operation: str) -> tuple[Any, Any]:
    """`perform` and the operation's plan.py, which import triton, imported where kernels are to run.

    Once: an import statement takes 0.5 µs each time.
    """
    from ..launch.autotune import perform

    return perform, importlib.import_module(f".{operation}.plan", __package__)
