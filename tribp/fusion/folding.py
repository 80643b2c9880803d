"""Batch norms that become part of the weight and bias of the layer before them, where those are frozen."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..dispatch import needs_operator, transform_active
from ..nn import is_watched

PLAIN_TYPE_NAMES = {"Parameter", "Tensor", "FakeTensor", "FunctionalTensor"}  # the latter stand for tensors in tracing


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
FOLDS = "_folds_into_layer"  # attribute of a batch norm that may


def is_folding(module: nn.Module) -> bool:
    """Whether a module is a batch norm that `fuse` was told to fold."""
    return type(module) in BATCH_NORMS and FOLDS in vars(module)


def can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether a batch norm in evaluation mode, behind a readable layer, only scales and shifts the layer's outputs."""
    if not isinstance(norm, BATCH_NORMS) or is_watched(norm):
        return False
    weight, tensors = layer._parameters.get("weight"), (*norm._parameters.values(), *norm._buffers.values())
    mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    complete = {"weight", "bias"} <= layer._parameters.keys() & norm._parameters.keys()  # none is another attribute
    if not complete or weight is None or mean is None or var is None:
        return False
    sizes = {tuple(t.shape) for t in tensors if t is not None and t.dim()}
    plain = all(t is None or (type(t).__name__ in PLAIN_TYPE_NAMES and t.device == weight.device) for t in tensors)
    return plain and sizes == {(weight.shape[0],)} and weight.dim() == (4 if isinstance(norm, nn.BatchNorm2d) else 2)


def folds_now(layer: nn.Module, norm: nn.Module, input: Tensor) -> bool:
    """Whether a batch norm that can be folded shall be for this input: in evaluation mode, its parameters frozen.

    Frozen, and not merely in `torch.no_grad`: torch's fused optimizers write parameters without counting a version, so
    that what is kept of trained ones could be old.
    """
    if norm.training or not isinstance(input, Tensor) or transform_active(input):
        return False
    if input.dim() != (4 if isinstance(norm, nn.BatchNorm2d) else 2):  # of other inputs it takes other channels
        return False
    if any(p is not None and p.requires_grad for m in (layer, norm) for p in m._parameters.values()):
        _known.pop(norm, None)
        return False
    return True


class _Known(NamedTuple):
    storages: Sequence[Any]  # weak references, of what it was made of: while they live, their memory is nobody else's
    state: list[object]
    weight: Tensor
    bias: Tensor


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes both.

    They are kept until one of the tensors that they are made of lies elsewhere, or torch counts that it was written to.
    """
    tensors = (layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    batches = norm.num_batches_tracked  # which a step of training counts; it writes the statistics without a word
    given = [t for t in (*tensors, batches) if t is not None]
    if needs_operator() or batches is None or any(t.is_inference() for t in given):  # which count no versions
        return _fold(*tensors, norm.eps)
    if layer.weight.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph shall fold what it finds at replay
        return _fold(*tensors, norm.eps)
    state = [norm.eps, batches._version]
    for t in tensors:
        state += [None] if t is None else [t.data_ptr(), t._version, t.dtype, t.shape, t.stride(), t.is_neg()]
    known = _known.get(norm)
    if known is None or known.state != state or any(storage.expired() for storage in known.storages):
        storages: list[Any] = [StorageWeakRef(t.untyped_storage()) for t in given]  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):  # or a later call could not save them for backward
            known = _known[norm] = _Known(storages, state, *_fold(*tensors, norm.eps))
    return known.weight, known.bias


def forget(norm: nn.Module) -> None:
    """Fold a batch norm no longer."""
    vars(norm).pop(FOLDS, None)
    _known.pop(norm, None)


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """In float64 until they are stored, where there is float64."""
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    with torch.no_grad():
        scale, shift = torch.rsqrt(var.to(wide) + eps), -mean.to(wide)
        if bias is not None:
            shift = bias.to(wide) + shift
        if gamma is not None:
            scale = scale * gamma
        shift = shift * scale
        if beta is not None:
            shift = shift + beta
        scaled = weight.to(wide) * scale.view(-1, *(1,) * (weight.dim() - 1))
        # in the layout of the old weight, channels last perhaps
        return torch.empty_like(weight).copy_(scaled), shift.to(weight.dtype)
