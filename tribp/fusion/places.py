"""Where modules stand, and why one cannot be taken for what it seems."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..nn import FORWARDS
from .rows import convolves_as_torch

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # which a call runs


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules in the order of `named_modules`, with each name of a module that has several.

    What is below a module with several names is given once, by its first.
    """
    yield "", model
    yield from _below(model, "", set())


def _below(parent: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(parent) in seen or isinstance(parent, torch.jit.ScriptModule):
        return
    seen.add(id(parent))
    for key, child in parent._modules.items():
        if child is not None:
            yield prefix + key, child
            yield from _below(child, f"{prefix}{key}.", seen)


def another(subject: str, module: nn.Module, *kinds: type[nn.Module]) -> str:
    """Why a module's forward need not be that of one of these kinds; nothing if it is."""
    if parametrize.is_parametrized(module):
        return f"{subject} is parametrized"
    if isinstance(module, LazyModuleMixin):
        return f"{subject} is lazy: run the model once before"
    if type(module) not in kinds:
        return f"{subject} is a subclass of {kinds[0].__name__}: {full_name(module)}"
    if not {"forward", "_conv_forward"}.isdisjoint(vars(module)):
        return f"{subject} has a forward of its own"
    kind = type(module)
    torchs = convolves_as_torch(module) if isinstance(module, nn.Conv2d) else True
    given = not torchs or kind.forward is not FORWARDS.get(kind, kind.forward)
    return f"{subject} has a class that was given another forward" if given else ""


def watched(subject: str, module: nn.Module) -> str:
    """Why somebody would miss that a module is called; nothing if nobody would."""
    if module._compiled_call_impl is not None:
        return f"{subject} was compiled by itself"
    names = (name.strip("_").replace("_", " ") for name in CALL_HOOKS if getattr(module, name))
    return next((f"{subject} has {name}" for name in names), "")


def full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
