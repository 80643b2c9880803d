"""An `nn.Sequential` that runs linear layers which follow each other as one."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..nn import Linear, LinearSigmoid, runs_forward_alone
from ..ops.mlp.op import mlp
from .modules import FusedActivation


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` in which linear layers that follow each other, also through Sequentials in it, are one `mlp`.

    Each layer stays where it is and complete, so that it can be called, taken out and replaced as before. Rows of them
    are looked for in each call: a layer or Sequential that has hooks by then, or another class, is called by itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            for module in self:
                input = module(input)
            return input
        else:  # TorchScript would compile what stands behind the branch
            for row in rows(flatten(self)):
                first, last = row[0], row[-1]
                if is_plain_layer(first) and is_plain_layer(last) and len(row) > 1:
                    weights, biases = [layer.weight for layer in row], [layer.bias for layer in row]
                    input = mlp(input, weights, biases, first.activation, last.activation)  # type: ignore[arg-type]
                else:
                    input = first(input)
            return input


def flatten(
    modules: Iterable[nn.Module], children: Callable[[nn.Sequential], Iterable[nn.Module]] = iter
) -> Iterator[nn.Module]:
    """Modules that run one after the other, a plain Sequential's `children` in its place."""
    for module in modules:
        if is_plain_sequential(module):
            yield from flatten(children(module), children)
        else:
            yield module


def rows(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Modules that run one after the other: layers that one `mlp` computes together, every other module alone.

    All layers of a row but the last have the same activation. Modules that do nothing are left out.
    """
    result: list[list[nn.Module]] = []
    for module in modules:
        if type(module) is FusedActivation and runs_forward_alone(module):
            continue
        row = result[-1] if result else []
        if is_plain_layer(module) and row and is_plain_layer(row[0]) and row[-1]._act == row[0]._act:
            row.append(module)
        else:
            result.append([module])
    return result


def is_plain_layer(module: nn.Module) -> TypeGuard[Linear]:
    """Whether a module is a linear layer of tribp's, of which nobody would miss that it is called."""
    return type(module) in (Linear, LinearSigmoid) and runs_forward_alone(module)


def is_plain_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module is a Sequential, no subclass, of which nobody would miss that it is called."""
    return type(module) in (nn.Sequential, FusedSequential) and runs_forward_alone(module)
