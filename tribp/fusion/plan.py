"""Where modules stand, and what will be put in their places."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .forward import (
    HARMLESS,
    Behind,
    Site,
    behind_calls,
    class_with_changed_sites,
    parts_from_outside,
    reached_from_outside,
    taken_apart,
)
from .modules import LAYERS, FoldedBatchNorm, obstacle
from .report import Left, Replaced, Report
from .sequential import FusedSequential

FSDP = {"FSDPModule", "FullyShardedDataParallel"}  # by name: to import them takes long, and a torch with distributed

ROWS = (nn.Sequential, nn.ModuleList)
_ANY_ORDER = "the {} around {} need not run its modules in their order"


class Place(NamedTuple):
    """Where a module stands, and between which others it runs; once for each call by its parent's own forward."""

    parent: nn.Module | None
    key: str
    name: str
    module: nn.Module
    before: nn.Module | None = None
    behind: nn.Module | None = None
    behind_key: str = ""
    behind_name: str = ""
    site: Site = ()  # in the parent's forward
    doubt: str = ""  # why `behind` need not be what happens to each output


def places_below(
    parent: nn.Module,
    prefix: str,
    seen: set[int],
    reached: Mapping[str, str],
    doubts: Mapping[int, str],
    harmless: frozenset[str],
) -> Iterator[Place]:
    """All places below `parent`, in the order of `named_modules`, but each place of a module that has several.

    `reached` is what `reached_from_outside` says of the whole model, `doubts` what `doubts_about_rows` does.
    """
    if id(parent) in seen or isinstance(parent, torch.jit.ScriptModule):
        return
    seen.add(id(parent))
    children = [(key, child) for key, child in parent._modules.items() if child is not None]
    row = isinstance(parent, ROWS)
    nothing: tuple[str, nn.Module | None] = ("", None)
    for i, (key, child) in enumerate(children):
        name = prefix + key
        if row:
            _, before = next((c for c in reversed(children[:i]) if not isinstance(c[1], FoldedBatchNorm)), nothing)
            behind_key, behind = next((c for c in children[i + 1 :] if not isinstance(c[1], FoldedBatchNorm)), nothing)
            order = "" if runs_in_order(parent) else _ANY_ORDER.format(type(parent).__name__, name)
            doubt = order or doubts.get(id(parent), "")
            yield Place(parent, key, name, child, before, behind, behind_key, prefix + behind_key, doubt=doubt)
        else:
            calls = (behind_calls(parent, key, reached, harmless) if isinstance(child, LAYERS) else []) or [Behind()]
            for behind, behind_key, site, doubt in calls:
                behind_name = prefix + behind_key if behind_key else name
                yield Place(parent, key, name, child, None, behind, behind_key, behind_name, site, doubt)
        yield from places_below(child, f"{name}.", seen, reached, doubts, harmless)


def doubts_about_rows(model: nn.Module, harmless: frozenset[str]) -> dict[int, str]:
    """Why modules of Sequentials may run otherwise than in their order, by the identity of the Sequential.

    The code of the module that holds one decides, also about Sequentials inside it.
    """
    parts = parts_from_outside(model, harmless)
    doubts: dict[int, str] = {}
    for holder in model.modules():
        rows = {} if isinstance(holder, ROWS) else holder._modules
        for key, row in rows.items():
            doubt = taken_apart(holder, key, parts, harmless) if isinstance(row, nn.Sequential) else ""
            if doubt and row is not None:
                doubts |= dict.fromkeys(map(id, _rows_in(row, set())), doubt)
    return doubts


def _rows_in(row: nn.Module, seen: set[nn.Module]) -> set[nn.Module]:
    """The row, and those directly inside it, and inside them."""
    if isinstance(row, ROWS) and row not in seen:
        seen.add(row)
        for child in row.children():
            _rows_in(child, seen)
    return seen


class Plan:
    """What will be replaced: everything is decided and built before anything is changed."""

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        stand_in: Callable[[nn.Module], nn.Module],
        harmless: frozenset[str] = HARMLESS,
    ) -> None:
        """stand_in: makes what will stand in the place of a pair's second module.

        harmless: what any code of the model may read of a layer that shall change.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
        self.harmless, self.reached = harmless, reached_from_outside(model, harmless)
        doubts = doubts_about_rows(model, harmless)
        places = [Place(None, "", "", model), *places_below(model, "", set(), self.reached, doubts, harmless)]
        self.order = {place.name: i for i, place in enumerate(places)}
        self.places: dict[int, list[Place]] = {}  # by the module's identity
        for place in places:
            self.places.setdefault(id(place.module), []).append(place)
        self.modules = [(group[0].module, group) for group in self.places.values()]
        modules = [module for module, _ in self.modules]
        self.sharded = {id(m) for top in modules if FSDP & class_names(top) for m in top.modules()}
        self.compiled = {id(m._modules.get("_orig_mod")) for m in modules if "OptimizedModule" in class_names(m)}
        self.root = model
        self.stand_in = stand_in
        self.stand_ins: dict[int, nn.Module] = {}  # what stands behind several places stays one module too
        self.children: dict[int, tuple[nn.Module, dict[str, nn.Module]]] = {}  # new ones, by their parent's identity
        self.sites: dict[int, tuple[nn.Module, set[Site]]] = {}  # where a parent's forward will be another
        self.classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self.replaced: list[Replaced] = []
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
        for place in places:
            parent, behind = place.parent, place.behind
            assert parent is not None
            _, children = self.children.setdefault(id(parent), (parent, {}))
            children[place.key] = made
            if pair and place.site:
                self.sites.setdefault(id(parent), (parent, set()))[1].add(place.site)
            elif pair:
                assert behind is not None
                if id(behind) not in self.stand_ins:
                    self.stand_ins[id(behind)] = self.stand_in(behind)
                children[place.behind_key] = self.stand_ins[id(behind)]
            self.replaced.append(Replaced(place.name, was, now))

    def change_class(self, places: Sequence[Place], kind: type[nn.Module]) -> None:
        """What stands at `places` stays, as a module of another class."""
        module = places[0].module
        self.classes.append((module, kind))
        self.replaced += [Replaced(place.name, type(module).__name__, kind.__name__) for place in places]

    def children_of(self, parent: nn.Module) -> list[nn.Module]:
        """A module's children as they will be."""
        _, new = self.children.get(id(parent), (parent, {}))
        return [child for child in {**parent._modules, **new}.values() if child is not None]

    def leave(self, places: Sequence[Place], reason: str) -> None:
        """Report what stands at `places` as left; nothing if there is no reason."""
        if not reason:
            return
        self.left += [Left(place.name, type(place.module).__name__, reason) for place in places]

    def leave_activations(self, places: Sequence[Place], reason: str) -> None:
        """Report the activations behind modules that are replaced without them."""
        self.left += [Left(place.behind_name, type(place.behind).__name__, reason) for place in places]

    def carry_out(self) -> Report:
        self.classes += [(parent, class_with_changed_sites(parent, sites)) for parent, sites in self.sites.values()]
        for parent, children in self.children.values():
            parent._modules.update(children)  # setattr may mean something else to the parent
        for module, kind in self.classes:
            module.__class__ = kind
        replaced = dict.fromkeys(self.replaced)  # once for several calls
        return Report(tuple(sorted(replaced, key=self._rank)), tuple(sorted(dict.fromkeys(self.left), key=self._rank)))

    def _rank(self, entry: Replaced | Left) -> int:
        return self.order[entry.name]


def runs_in_order(parent: nn.Module | None) -> bool:
    if not isinstance(parent, nn.Sequential) or "forward" in vars(parent):
        return False
    kind = type(parent)
    return kind.forward in (nn.Sequential.forward, FusedSequential.forward) and kind.__iter__ is nn.Sequential.__iter__


def class_names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}
