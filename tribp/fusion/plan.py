"""Where modules stand, and what will be put in their places."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .modules import obstacle
from .report import Left, Replaced, Report

FSDP = {"FSDPModule", "FullyShardedDataParallel"}  # by name: to import them takes long, and a torch with distributed


class Place(NamedTuple):
    """Where a module stands; in a Sequential or ModuleList also between which others."""

    parent: nn.Module | None
    key: str
    name: str
    module: nn.Module
    before: nn.Module | None = None
    behind: nn.Module | None = None
    behind_key: str = ""
    behind_name: str = ""


def places_below(parent: nn.Module, prefix: str, seen: set[int]) -> Iterator[Place]:
    """All places below `parent`, in the order of `named_modules`, but each place of a module that has several."""
    if id(parent) in seen or isinstance(parent, torch.jit.ScriptModule):
        return
    seen.add(id(parent))
    children = [(key, child) for key, child in parent._modules.items() if child is not None]
    row = [("", None), *children, ("", None)] if isinstance(parent, (nn.Sequential, nn.ModuleList)) else []
    for i, (key, child) in enumerate(children):
        (_, before), _, (behind_key, behind) = row[i : i + 3] or [("", None)] * 3
        yield Place(parent, key, prefix + key, child, before, behind, behind_key, prefix + behind_key)
        yield from places_below(child, f"{prefix}{key}.", seen)


class _Replacement(NamedTuple):
    place: Place
    made: nn.Module
    pair: bool
    entry: Replaced


class Plan:
    """What will be replaced: everything is decided and built before anything is changed."""

    def __init__(self, caller: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
        places = [Place(None, "", "", model), *places_below(model, "", set())]
        self.order = {place.name: i for i, place in enumerate(places)}
        grouped: dict[int, list[Place]] = {}
        for place in places:
            grouped.setdefault(id(place.module), []).append(place)
        self.modules = [(group[0].module, group) for group in grouped.values()]
        modules = [module for module, _ in self.modules]
        self.sharded = {id(m) for top in modules if FSDP & class_names(top) for m in top.modules()}
        self.compiled = {id(m._modules.get("_orig_mod")) for m in modules if "OptimizedModule" in class_names(m)}
        self.root = model
        self.replacements: list[_Replacement] = []
        self.left: list[Left] = []

    def obstacle(self, module: nn.Module, kind: type[nn.Module]) -> str:
        """Why `module` cannot be replaced as one of exactly this kind; nothing if it can."""
        if module is self.root:
            return "it is the model itself: no module that could hold another is around it"
        if id(module) in self.sharded:
            return "FSDP holds its parameters"
        if id(module) in self.compiled:
            return "torch.compile has it, whatever stands in its place"
        return obstacle("it", module, kind)

    def replace(self, places: Sequence[Place], made: nn.Module, was: str, now: str, pair: bool = True) -> None:
        """A pair's second module, behind each place, gets a stand-in."""
        self.replacements += [_Replacement(place, made, pair, Replaced(place.name, was, now)) for place in places]

    def leave(self, places: Sequence[Place], reason: str) -> None:
        self.left += [Left(place.name, type(place.module).__name__, reason) for place in places]

    def leave_activations(self, places: Sequence[Place], reason: str) -> None:
        """Report the activations behind modules that are replaced without them."""
        self.left += [Left(place.behind_name, type(place.behind).__name__, reason) for place in places]

    def carry_out(self, stand_in: Callable[[nn.Module], nn.Module]) -> Report:
        stand_ins: dict[int, nn.Module] = {}  # what stands behind several places stays one module too
        for place, made, pair, _ in self.replacements:
            assert place.parent is not None
            place.parent._modules[place.key] = made  # setattr may mean something else to the parent
            if pair:
                assert place.behind is not None
                if id(place.behind) not in stand_ins:
                    stand_ins[id(place.behind)] = stand_in(place.behind)
                place.parent._modules[place.behind_key] = stand_ins[id(place.behind)]
        replaced = sorted((entry for *_, entry in self.replacements), key=lambda entry: self.order[entry.name])
        return Report(tuple(replaced), tuple(sorted(self.left, key=lambda entry: self.order[entry.name])))


def runs_in_order(parent: nn.Module | None) -> bool:
    if not isinstance(parent, nn.Sequential) or "forward" in vars(parent):
        return False
    kind = type(parent)
    return kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__


def class_names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}
