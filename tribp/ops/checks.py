"""Argument checks that operations share. Every error names the argument, what was expected and what was given."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..dispatch import FLOATS, dtype_name

P = ParamSpec("P")
T = TypeVar("T")

MAX_SIZE = 2**31 - 256  # of a dimension: the start of a tile, which is at most 256 long, is an int32


class Described(Protocol):
    """What checks ask: a tensor, or a plan's buffer, which has a layout but no memory."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def dim(self) -> int: ...
    def numel(self) -> int: ...


class Strided(Described, Protocol):
    def stride(self) -> Sequence[int]: ...


def matrices_fit(*tensors: Described | None) -> bool:
    """Whether kernels can take these, leading dimensions in one: none is empty, or too long for a tile's start."""
    return _fit(tensors, lambda t: max(t.numel() // t.shape[-1], t.shape[-1]))


def images_fit(*tensors: Described | None) -> bool:
    """As `matrices_fit`, each dimension by itself."""
    return _fit(tensors, lambda t: max(t.shape))


def saved_fit(
    grad: Described, input: Described | None, outputs: Sequence[Described | None], weights: Sequence[Described | None]
) -> bool:
    """Whether what autograd gives back of linear layers is what it was given: hooks may return anything.

    The last output has the gradient's shape. Any tensor may be None where it is not read.
    """
    *hidden, output = outputs
    tensors = [t for t in (input, *outputs, *weights) if t is not None]
    rows = [t for t in (input, *hidden, output) if t is not None]
    if any(t.dtype != grad.dtype for t in tensors) or any(t.shape[:-1] != grad.shape[:-1] for t in rows):
        return False
    sizes = [None if t is None else t.shape[-1] for t in (input, *hidden)] + [grad.shape[-1]]
    layers = zip(weights, sizes, sizes[1:], strict=False)
    linked = all(w is None or (w.dim() == 2 and w.shape[0] == n and k in (None, w.shape[1])) for w, k, n in layers)
    return linked and (output is None or output.shape == grad.shape)


def _fit(tensors: Sequence[Described | None], longest: Callable[[Described], int]) -> bool:
    for t in tensors:
        if t is None or 0 < (numel := t.numel()) <= MAX_SIZE:  # then no dimension is longer
            continue
        if numel == 0 or longest(t) > MAX_SIZE:
            return False
    return True


def is_whole(value: object) -> bool:
    """Whether it stands for one whole number, as numpy's do; arrays and tensors of any kind have the method."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def refusing(check: Callable[P, T]) -> Callable[P, T]:
    """The check, whose exceptions get the attribute `refused_by_check`: they come before anything is computed."""

    @functools.wraps(check)
    def marking(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return check(*arguments, **named)
        except (TypeError, ValueError) as error:
            if not is_compiling():  # which takes exceptions for what they are, without attributes
                error.refused_by_check = True  # type: ignore[union-attr]
            raise

    return marking


@refusing
def check_tensors(function: str, *optional: str, **tensors: Tensor | None) -> None:
    """optional: names of those that may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")


def check_devices(function: str, input: Described, **others: Described | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{function}: {name} must be on input's device {input.device}, got {tensor.device}")


@refusing
def check_dtypes(function: str, input: Described, **others: Described | None) -> None:
    if input.dtype not in FLOATS:
        others = {"input": input}
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(
                f"{function}: {name} must be float16, bfloat16, float32 or float64, got {dtype_name(tensor.dtype)}"
            )
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"{function}: {name} must have input's dtype {dtype_name(input.dtype)}, got {dtype_name(tensor.dtype)}"
            )
