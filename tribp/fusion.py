"""Whole models: torch's layers exchanged for tribp's in place, and back."""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .dispatch import FLOATS
from .nn import Conv3x3, LinearSigmoid

__all__ = ["FusedSigmoid", "Left", "Replaced", "Report", "fuse", "unfuse"]

MODULE = frozenset(vars(nn.Module()))  # the attributes of every module
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
PARAMETERS = {"weight", "bias"}
FSDP = {"FSDPModule", "FullyShardedDataParallel"}  # by name: to import them takes long, and a torch with distributed
WORDS = {"same": (1, 1), "valid": (0, 0)}  # paddings
WORD = "_padding_word"  # attribute of a Conv3x3 made of a Conv2d whose padding was "same" or "valid"


class Replaced(NamedTuple):
    """What stood at a place of the model, and what stands there now."""

    name: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.name}: {self.was} → {self.now}"


class Left(NamedTuple):
    """What was left at a place of the model, and why."""

    name: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.module} left: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What `fuse` or `unfuse` did, in the order of `named_modules`; a module with several names stands under each.

    Names below a container that has several names itself are given once, by its first.
    """

    replaced: tuple[Replaced, ...] = ()
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        lines: list[object] = [f"{len(self.replaced)} replaced, {len(self.left)} left", *self.replaced, *self.left]
        return "\n".join(map(str, lines))


class FusedSigmoid(nn.Identity):
    """Stands where an `nn.Sigmoid` stood that the module before it computes now, and keeps it for `unfuse`.

    So no other module of the Sequential changes its index, and with it its keys in the state_dict.
    """

    sigmoid: nn.Sigmoid
    __jit_ignored_attributes__ = ("sigmoid",)  # torch.jit.script knows no module that is no child

    def __init__(self, sigmoid: nn.Sigmoid) -> None:
        super().__init__()
        vars(self)["sigmoid"] = sigmoid  # not as a child: whoever looks for the model's sigmoids must not find it
        self.training = sigmoid.training

    def extra_repr(self) -> str:
        return "computed by the module before"


def fuse(model: nn.Module) -> Report:
    """Put tribp's modules where torch's stand in `model`, in place; the report tells what was replaced, what left, why.

    - `nn.Linear` with the `nn.Sigmoid` directly behind it in an `nn.Sequential` becomes a `LinearSigmoid`;
    - every 3×3 `nn.Conv2d` that `Conv3x3` takes becomes one, with the `nn.Sigmoid` directly behind it in an
      `nn.Sequential`; a `Conv3x3` takes that in, too.

    The Parameters are the same objects, so that an optimizer built before goes on; mode, device, dtype, attributes that
    were set on a module, and the state_dict's keys are the same: a `FusedSigmoid`, which does nothing, keeps the
    Sigmoid's place. What stands at several places stands there again as one module; its sigmoid is taken in only if one
    follows at each of them. Left are modules with hooks, parametrizations or more parameters, subclasses, lazy and
    scripted modules, and what FSDP holds.

    Not seen is code that takes a Sequential apart: `self.layers[0](x)` now has the sigmoid applied.

    Raises:
        TypeError: model is no module.
    """
    plan = _Plan("fuse", model)
    for module, places in plan.modules:
        pairs = [place for place in places if isinstance(place.behind, nn.Sigmoid)]
        if isinstance(module, nn.Linear):
            if pairs:
                reason = plan.obstacle(module, nn.Linear) or _unreadable(module, 2) or _unpaired(places, nn.Sigmoid)
                if reason:
                    plan.leave(pairs, reason)
                else:
                    plan.replace(places, _linear_sigmoid(module), "Linear + Sigmoid", "LinearSigmoid")
        elif isinstance(module, nn.Conv2d):
            alone = _unpaired(places, nn.Sigmoid)
            made = plan.obstacle(module, nn.Conv2d) or _unreadable(module, 4) or _conv3x3(module, sigmoid=not alone)
            if isinstance(made, str):
                plan.leave(places, made)
            else:
                plan.replace(places, made, "Conv2d" if alone else "Conv2d + Sigmoid", "Conv3x3", not alone)
                if alone:
                    plan.leave_sigmoids(pairs, alone)
        elif isinstance(module, Conv3x3) and module.activation is None:
            alone = _unpaired(places, nn.Sigmoid)
            made = plan.obstacle(module, Conv3x3) or alone or _conv3x3(_conv2d(module), sigmoid=True)
            if not isinstance(made, str):
                plan.replace(places, made, "Conv3x3 + Sigmoid", "Conv3x3")
            elif made == alone:
                plan.leave_sigmoids(pairs, alone)
            else:
                plan.leave(pairs, made)
        elif _looks_like_conv3x3(module):
            plan.leave(places, f"it is a {_full_name(module)}, no torch.nn.Conv2d")
        elif isinstance(module, torch.jit.ScriptModule):
            plan.leave(places, "it is compiled by TorchScript")
    return plan.carry_out(_fused_sigmoid)


def unfuse(model: nn.Module) -> Report:
    """Put torch's modules where tribp's stand in `model`, in place: what `fuse` did is undone.

    Modules that a user wrote into the model become torch's too. One that computes a sigmoid and has no `FusedSigmoid`
    behind it becomes an `nn.Sequential` of two in its place: its keys in the state_dict then have a "0." more, as the
    report says. Everything else that `fuse` keeps is kept. Left are those that `fuse` would leave for hooks,
    parametrizations, more parameters, subclasses, and FSDP.

    Raises:
        TypeError: model is no module.
    """
    plan = _Plan("unfuse", model)
    for module, places in plan.modules:
        if isinstance(module, (LinearSigmoid, Conv3x3)):
            pair = any(isinstance(place.behind, FusedSigmoid) for place in places)
            reason = plan.obstacle(module, LinearSigmoid if isinstance(module, LinearSigmoid) else Conv3x3)
            if _computes_sigmoid(module) and pair:
                reason = reason or _unpaired(places, FusedSigmoid)
            if reason:
                plan.leave(places, reason)
                continue
            made: nn.Module = _linear(module) if isinstance(module, LinearSigmoid) else _conv2d(module)
            now = type(made).__name__
            if not _computes_sigmoid(module):
                plan.replace(places, made, type(module).__name__, now, pair=False)
            elif pair:
                plan.replace(places, made, type(module).__name__, f"{now} + Sigmoid")
            else:
                both = nn.Sequential(made, nn.Sigmoid()).train(module.training)
                plan.replace(
                    places, both, type(module).__name__, f"Sequential({now}, Sigmoid), keys with 0.", pair=False
                )
        elif isinstance(module, FusedSigmoid):
            orphans = [place for place in places if not _computes_sigmoid(place.before)]
            plan.leave(orphans, "no module that computes the sigmoid is before it")
    return plan.carry_out(_sigmoid_of)


class _Place(NamedTuple):
    """Where a module stands; in a Sequential or ModuleList also between which others."""

    parent: nn.Module | None
    key: str
    name: str
    module: nn.Module
    before: nn.Module | None = None
    behind: nn.Module | None = None
    behind_key: str = ""
    behind_name: str = ""


def _places(parent: nn.Module, prefix: str, seen: set[int]) -> Iterator[_Place]:
    """All places below `parent`, in the order of `named_modules`, but each place of a module that has several."""
    if id(parent) in seen or isinstance(parent, torch.jit.ScriptModule):
        return
    seen.add(id(parent))
    children = [(key, child) for key, child in parent._modules.items() if child is not None]
    row = [("", None), *children, ("", None)] if isinstance(parent, (nn.Sequential, nn.ModuleList)) else []
    for i, (key, child) in enumerate(children):
        (_, before), _, (behind_key, behind) = row[i : i + 3] or [("", None)] * 3
        yield _Place(parent, key, prefix + key, child, before, behind, behind_key, prefix + behind_key)
        yield from _places(child, f"{prefix}{key}.", seen)


class _Replacement(NamedTuple):
    place: _Place
    made: nn.Module
    pair: bool
    entry: Replaced


class _Plan:
    """What will be replaced: everything is decided and built before anything is changed."""

    def __init__(self, caller: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
        places = [_Place(None, "", "", model), *_places(model, "", set())]
        self.order = {place.name: i for i, place in enumerate(places)}
        grouped: dict[int, list[_Place]] = {}
        for place in places:
            grouped.setdefault(id(place.module), []).append(place)
        self.modules = [(group[0].module, group) for group in grouped.values()]
        modules = [module for module, _ in self.modules]
        self.sharded = {id(m) for top in modules if FSDP & _class_names(top) for m in top.modules()}
        self.compiled = {id(m._modules.get("_orig_mod")) for m in modules if "OptimizedModule" in _class_names(m)}
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
        return _obstacle("it", module, kind)

    def replace(self, places: Sequence[_Place], made: nn.Module, was: str, now: str, pair: bool = True) -> None:
        """A pair's second module, behind each place, gets a stand-in."""
        self.replacements += [_Replacement(place, made, pair, Replaced(place.name, was, now)) for place in places]

    def leave(self, places: Sequence[_Place], reason: str) -> None:
        self.left += [Left(place.name, type(place.module).__name__, reason) for place in places]

    def leave_sigmoids(self, places: Sequence[_Place], reason: str) -> None:
        """Report the Sigmoids behind modules that are replaced without them."""
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


def _obstacle(subject: str, module: nn.Module, kind: type[nn.Module]) -> str:
    """Why `module` is more than a module of this kind with its parameters and attributes; nothing if it is not."""
    if parametrize.is_parametrized(module):
        return f"{subject} is parametrized"
    if isinstance(module, LazyModuleMixin):
        return f"{subject} is lazy: run the model once before"
    if type(module) is not kind:
        return f"{subject} is a subclass of {kind.__name__}: {_full_name(module)}"
    for name in HOOKS:
        if getattr(module, name):
            return f"{subject} has {name.strip('_').replace('_', ' ')}"
    for name, value in vars(module).items():
        if name not in MODULE and value is not getattr(kind, name, value):
            return f"{subject} has a {name} of its own"  # forward, say; or what Module.compile leaves
    expected: set[str] = set() if issubclass(kind, (nn.Sigmoid, FusedSigmoid)) else PARAMETERS
    present = {*module._parameters, *module._buffers, *module._modules}
    for verb, names in (
        ("lacks the parameter", expected - present),
        ("has more than its parameters:", present - expected),
    ):
        if names:
            return f"{subject} {verb} {', '.join(sorted(names))}"
    return ""


def _unpaired(places: Sequence[_Place], kind: type[nn.Module]) -> str:
    """Why what stands at `places` does not, at each of them, run right before a module of this kind."""
    for place in places:
        if not isinstance(place.behind, kind):
            return f"no {'Sigmoid' if kind is nn.Sigmoid else 'place for a Sigmoid'} is behind {place.name}"
        reason = _obstacle(f"the {kind.__name__} at {place.behind_name}", place.behind, kind)
        if reason:
            return reason
        if not _runs_in_order(place.parent):
            return f"the {type(place.parent).__name__} around {place.name} need not run its modules in their order"
    return ""


def _runs_in_order(parent: nn.Module | None) -> bool:
    if not isinstance(parent, nn.Sequential) or "forward" in vars(parent):
        return False
    kind = type(parent)
    return kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__


def _unreadable(module: nn.Module, dimensions: int) -> str:
    """Why a kernel would not take the parameters, which users replace too; nothing if one would."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None and name == "bias":
            continue
        if type(parameter) is not nn.Parameter:  # of a tensor subclass, a Parameter has the subclass's type
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.layout != torch.strided:
            return f"its {name} is {str(parameter.layout).removeprefix('torch.')}"
        if parameter.dtype not in FLOATS:
            return f"its {name} is {str(parameter.dtype).removeprefix('torch.')}"
    assert weight is not None
    if weight.dim() != dimensions or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = " and ".join(str(tuple(p.shape)) for p in (weight, bias) if p is not None)
        return f"its parameters have the shapes {shapes}"
    if dimensions == 4 and weight.shape[2:] != (3, 3):
        return f"its kernel size is {tuple(weight.shape[2:])}"
    return ""


def _linear_sigmoid(linear: nn.Linear) -> LinearSigmoid:
    # On meta, here and below, a constructor allocates nothing and draws no random numbers.
    made = LinearSigmoid(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    _hand_over(linear, made)
    return made


def _linear(fused: LinearSigmoid) -> nn.Linear:
    made = nn.Linear(fused.in_features, fused.out_features, fused.bias is not None, device="meta")
    _hand_over(fused, made)
    return made


def _conv3x3(conv: nn.Conv2d, sigmoid: bool) -> Conv3x3 | str:
    """The module that computes what `conv` does, or why there is none."""
    if "activation" in vars(conv):
        return "it has an activation of its own"
    try:
        made = Conv3x3(
            conv.in_channels, conv.out_channels, conv.stride, conv.padding, conv.groups, conv.bias is not None,
            "sigmoid" if sigmoid else None, conv.padding_mode, device="meta", dilation=conv.dilation,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("Conv3x3: ").partition(";")[0]
    (vertical, horizontal), pads = made.padding, list(conv._reversed_padding_repeated_twice)
    if conv.padding_mode != "zeros" and pads != [horizontal, horizontal, vertical, vertical]:
        return f"its padding is {conv.padding}, but it pads by {pads}"  # set after construction, or given as (1,)
    # kernel_size, dilation and the others come along: whoever reads them of the model's convolutions still can.
    _hand_over(conv, made)
    if isinstance(conv.padding, str):
        vars(made)[WORD] = conv.padding
    return made


def _conv2d(fused: Conv3x3) -> nn.Conv2d:
    padding: str | tuple[int, int] = vars(fused).get(WORD, fused.padding)
    if isinstance(padding, str) and (fused.padding != WORDS[padding] or (padding == "same" and fused.stride != (1, 1))):
        padding = fused.padding  # changed since
    made = nn.Conv2d(
        fused.in_channels, fused.out_channels, 3, fused.stride, padding, 1, fused.groups, fused.bias is not None,
        fused.padding_mode, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    _hand_over(fused, made, without={"activation", WORD})
    return made


def _hand_over(old: nn.Module, new: nn.Module, without: Set[str] = frozenset()) -> None:
    """Give `new` the parameters, the mode, and the attributes of `old` that it does not have itself."""
    vars(new)["_parameters"] = old._parameters.copy()
    new.training = old.training
    vars(new).update({name: value for name, value in vars(old).items() if name not in without | vars(new).keys()})


def _fused_sigmoid(sigmoid: nn.Module) -> nn.Module:
    assert isinstance(sigmoid, nn.Sigmoid)
    return FusedSigmoid(sigmoid)


def _sigmoid_of(fused: nn.Module) -> nn.Module:
    assert isinstance(fused, FusedSigmoid)
    return fused.sigmoid.train(fused.training)


def _computes_sigmoid(module: nn.Module | None) -> bool:
    return isinstance(module, LinearSigmoid) or (isinstance(module, Conv3x3) and module.activation == "sigmoid")


def _looks_like_conv3x3(module: nn.Module) -> bool:
    """Whether it is a convolution of another kind, transposed or quantized, say."""
    options = vars(module)
    size = options.get("kernel_size")
    return isinstance(size, tuple) and size == (3, 3) and "in_channels" in options and not isinstance(module, Conv3x3)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _class_names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}
