"""The operators `tribp::linear_sigmoid` and `tribp::linear_sigmoid_backward`, and the branch between backends.

`forward` and `backward` are what eager mode calls; the registered operators wrap them for the compiler, for export and
for dispatch modes, where a bare kernel launch could not be seen. They cost 20 µs more a call, so eager avoids them.
`tribp.functional` gives the derivative of the first; the second has none, and autograd through it raises.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from ... import dispatch, reference
from ...modes import without_autocast
from ...reference import as_matrix

Needs = tuple[bool, bool, bool]
LONGEST = 2**31 - 256  # a tile is at most 256 long

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """σ(input·weightᵀ + bias), contiguous. input: (*, K), weight: (N, K), bias: (N,); all of one dtype and device."""
    n = weight.shape[0]
    if backend == "torch" or not _fits(input, weight):
        return reference.linear_sigmoid(input, weight, bias)
    calls, kernels = _launching()

    output = torch.empty((*input.shape[:-1], n), dtype=input.dtype, device=input.device)
    tensors = dict(x=as_matrix(input), w=weight, b=bias, y=as_matrix(output))
    with dispatch.on_device(input):
        calls.perform(kernels.forward, tensors, _facts(input), outputs=("y",))
    return output


def backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: Needs, backend: str
) -> Grads:
    """Gradients of input, weight and bias, each where `needs` says so.

    `input` is read only for the weight's gradient and `weight` only for the input's, and may be None otherwise.
    """
    if backend == "torch" or not _fits(output, input, weight):
        return reference.linear_sigmoid_backward(grad, input, weight, output, needs)
    calls, kernels = _launching()

    n = output.shape[-1]
    x = as_matrix(input) if input is not None else None
    dx = dw = db = None
    if needs[0]:
        assert weight is not None
        dx = torch.empty((*output.shape[:-1], weight.shape[1]), dtype=output.dtype, device=output.device)
    if needs[1]:
        assert x is not None
        dw = torch.empty((n, x.shape[1]), dtype=output.dtype, device=output.device)
    if needs[2]:
        db = torch.empty(n, dtype=output.dtype, device=output.device)
    tensors = dict(
        dy=as_matrix(grad), x=x, w=weight, y=as_matrix(output.contiguous()),
        dx=as_matrix(dx) if dx is not None else None, dw=dw, db=db,
    )  # fmt: skip
    with dispatch.on_device(output):
        calls.perform(kernels.backward, tensors, _facts(output), outputs=("dx", "dw", "db"))
    return dx, dw, db


@functools.cache
def _launching() -> tuple[Any, Any]:
    """What imports triton, imported where kernels are to run: once, for an import statement takes 0.5 µs each time."""
    from ...launch import calls
    from . import plan

    return calls, plan


def _facts(tensor: Tensor) -> dict[str, object]:
    """What launches depend on besides the tensors."""
    tf32 = tensor.dtype == torch.float32 and dispatch.tf32_allowed()
    return dict(arch=dispatch.arch_of(tensor.device.index), tf32=tf32)


def _fits(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these: none of them empty, and no dimension too long for the int32 start of a tile."""
    for t in tensors:
        if t is None or 0 < (numel := t.numel()) <= LONGEST:  # then no dimension is longer
            continue
        if numel == 0 or max(numel // t.shape[-1], t.shape[-1]) > LONGEST:
            return False
    return True


@torch.library.custom_op("tribp::linear_sigmoid", mutates_args=())
def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast(input.device.type):  # the result has the type of the arguments, as the compiler was told
        return forward(input, weight, bias, dispatch.backend_of(input))


@linear_sigmoid.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@register_decomposition(torch.ops.tribp.linear_sigmoid.default)
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For ONNX and other exporters, which know torch's operators alone and look for this."""
    return reference.linear_sigmoid(input, weight, bias)


@torch.library.custom_op("tribp::linear_sigmoid_backward", mutates_args=())
def linear_sigmoid_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that `needs` asks for, in the order input, weight, bias."""
    wanted = (needs[0], needs[1], needs[2])
    with without_autocast(grad.device.type):
        grads = backward(grad, input, weight, output, wanted, dispatch.backend_of(output))
    return [grad for grad in grads if grad is not None]


@linear_sigmoid_backward.register_fake
def _(grad: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    grads = []
    n = output.shape[-1]
    if needs[0]:
        assert weight is not None
        grads.append(output.new_empty((*output.shape[:-1], weight.shape[1])))
    if needs[1]:
        assert input is not None
        grads.append(output.new_empty((n, input.shape[-1])))
    if needs[2]:
        grads.append(output.new_empty((n,)))
    return grads
