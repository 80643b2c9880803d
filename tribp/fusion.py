"""Whole models: torch's layers exchanged for tribp's in place, and back."""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .dispatch import FLOATS
from .nn import Conv3x3, Linear, LinearSigmoid
from .ops.activations import DEFAULTS, ActivationLike, activation_of

__all__ = ["FusedActivation", "FusedSigmoid", "Left", "Replaced", "Report", "fuse", "unfuse"]

MODULE = frozenset(vars(nn.Module()))  # the attributes of every module
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
PARAMETERS = {"weight", "bias"}
LAYERS = (nn.Linear, nn.Conv2d, LinearSigmoid, Linear, Conv3x3)  # a subclass before its base
FSDP = {"FSDPModule", "FullyShardedDataParallel"}  # by name: to import them takes long, and a torch with distributed
WORDS = {"same": (1, 1), "valid": (0, 0)}  # paddings
# torch's activations: what tribp calls them, and the attributes that are their numbers. A subclass before its base.
ACTIVATIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Sigmoid: ("sigmoid",),
    nn.Tanh: ("tanh",),
    nn.ReLU: ("relu",),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.Softplus: ("softplus", "beta", "threshold"),
    nn.Hardsigmoid: ("hardsigmoid",),
    nn.ReLU6: ("relu6",),
    nn.Hardtanh: ("hardtanh", "min_val", "max_val"),
}
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


class FusedActivation(nn.Identity):
    """Stands where an activation stood that the module before it computes now, and keeps it for `unfuse`.

    So no other module of the Sequential changes its index, and with it its keys in the state_dict.
    """

    original: nn.Module
    __jit_ignored_attributes__ = ("original",)  # torch.jit.script knows no module that is no child

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        vars(self)["original"] = original  # not as a child: whoever looks for the model's sigmoids must not find it
        self.training = original.training

    def extra_repr(self) -> str:
        return f"{type(self.original).__name__} computed by the module before"


FusedSigmoid = FusedActivation  # its name when it stood for sigmoids alone


def fuse(model: nn.Module) -> Report:
    """Put tribp's modules where torch's stand in `model`, in place; the report tells what was replaced, what left, why.

    - `nn.Linear` with an activation directly behind it in an `nn.Sequential` becomes a `Linear` with that activation,
      or a `LinearSigmoid`. Activations are `nn.Sigmoid`, `Tanh`, `ReLU`, `LeakyReLU`, `ELU`, `Softplus`,
      `Hardsigmoid`, `Hardtanh` and `ReLU6`, in place or not, with numbers that `tribp.linear` takes;
    - every 3×3 `nn.Conv2d` that `Conv3x3` takes becomes one, with the activation directly behind it in an
      `nn.Sequential`; a `Conv3x3` or a tribp `Linear` without one takes that in, too.

    The Parameters are the same objects, so that an optimizer built before goes on; mode, device, dtype, attributes that
    were set on a module, and the state_dict's keys are the same: a `FusedActivation`, which does nothing, keeps the
    activation's place. What stands at several places stands there again as one module; its activation is taken in only
    if the same follows at each of them. Left are modules with hooks, parametrizations or more parameters, subclasses,
    lazy and scripted modules, and what FSDP holds.

    Not seen is code that takes a Sequential apart: `self.layers[0](x)` now has the activation applied.

    Raises:
        TypeError: model is no module.
    """
    plan = _Plan("fuse", model)
    for module, places in plan.modules:
        done = isinstance(module, (Linear, Conv3x3)) and module.activation is not None
        if isinstance(module, LAYERS) and not done:
            _fuse_layer(plan, module, places)
        elif _looks_like_conv3x3(module):
            plan.leave(places, f"it is a {_full_name(module)}, no torch.nn.Conv2d")
        elif isinstance(module, torch.jit.ScriptModule):
            plan.leave(places, "it is compiled by TorchScript")
    return plan.carry_out(FusedActivation)


def _fuse_layer(plan: "_Plan", module: nn.Module, places: Sequence["_Place"]) -> None:
    """A convolution of torch's is replaced also without an activation, other layers with one alone."""
    kind = _kind(module)
    pairs = [place for place in places if _activation_kind(place.behind)]
    if not pairs and kind is not nn.Conv2d:
        return
    alone = _unpaired(places)
    activation = None if alone else _activation(places[0].behind)
    reason = plan.obstacle(module, kind)
    if not reason and kind in (nn.Linear, nn.Conv2d):
        reason = _unreadable(module, 2 if kind is nn.Linear else 4)
    if not reason and kind is not nn.Conv2d:
        reason = alone
    made = reason or _fused(module, activation)
    if isinstance(made, str):
        if kind in (Linear, Conv3x3) and made == alone:
            plan.leave_activations(pairs, alone)
        else:
            plan.leave(places if kind is nn.Conv2d else pairs, made)
        return
    was = kind.__name__ if alone else f"{kind.__name__} + {type(places[0].behind).__name__}"
    plan.replace(places, made, was, _name(made), not alone)
    if alone:
        plan.leave_activations(pairs, alone)


def unfuse(model: nn.Module) -> Report:
    """Put torch's modules where tribp's stand in `model`, in place: what `fuse` did is undone.

    Modules that a user wrote into the model become torch's too. One that computes an activation and has no
    `FusedActivation` behind it becomes an `nn.Sequential` of two in its place: its keys in the state_dict then have a
    "0." more, as the report says. Everything else that `fuse` keeps is kept. Left are those that `fuse` would leave for
    hooks, parametrizations, more parameters, subclasses, and FSDP.

    Raises:
        TypeError: model is no module.
    """
    plan = _Plan("unfuse", model)
    for module, places in plan.modules:
        if isinstance(module, (Linear, Conv3x3)):
            pair = any(_computes(module, place.behind) for place in places)
            reason = plan.obstacle(module, _kind(module)) or (_not_behind(module, places) if pair else "")
            if reason:
                plan.leave(places, reason)
                continue
            made: nn.Module = _conv2d(module) if isinstance(module, Conv3x3) else _linear(module)
            now = f"torch.nn.{type(made).__name__}" if isinstance(module, Linear) else type(made).__name__
            if module.activation is None:
                plan.replace(places, made, _name(module), now, pair=False)
            elif pair:
                behind = next(b for b in (place.behind for place in places) if isinstance(b, FusedActivation))
                plan.replace(places, made, _name(module), f"{type(made).__name__} + {type(behind.original).__name__}")
            else:
                second = _torch_activation(module.activation)
                both = nn.Sequential(made, second).train(module.training)
                now = f"Sequential({type(made).__name__}, {type(second).__name__}), keys with 0."
                plan.replace(places, both, _name(module), now, pair=False)
        elif isinstance(module, FusedActivation):
            orphans = [place for place in places if not _computes(place.before, module)]
            plan.leave(orphans, f"no module that computes the {type(module.original).__name__} is before it")
    return plan.carry_out(_original)


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

    def leave_activations(self, places: Sequence[_Place], reason: str) -> None:
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
    expected = PARAMETERS if kind in LAYERS else set()
    present = {*module._parameters, *module._buffers, *module._modules}
    for verb, names in (
        ("lacks the parameter", expected - present),
        ("has more than its parameters:", present - expected),
    ):
        if names:
            return f"{subject} {verb} {', '.join(sorted(names))}"
    return ""


def _kind(module: nn.Module) -> type[nn.Module]:
    """Of which kind of layer a module is, itself or as a subclass."""
    return next(kind for kind in LAYERS if isinstance(module, kind))


def _name(made: nn.Module) -> str:
    """The class, in a way that tells tribp's from torch's."""
    return "tribp.nn.Linear" if type(made) is Linear else type(made).__name__


def _activation_kind(module: nn.Module | None) -> type[nn.Module] | None:
    return next((kind for kind in ACTIVATIONS if isinstance(module, kind)), None)


def _activation(module: nn.Module | None) -> ActivationLike:
    """What tribp calls an activation of torch's."""
    kind = _activation_kind(module)
    assert kind is not None
    name, *attributes = ACTIVATIONS[kind]
    numbers = tuple(float(getattr(module, attribute)) for attribute in attributes)
    return name if numbers == tuple(DEFAULTS[name].values()) else (name, *numbers)


def _refused(subject: str, module: nn.Module) -> str:
    """Why tribp does not take an activation's numbers; nothing if it does."""
    try:
        activation_of(subject, _activation(module))
    except ValueError as error:
        return str(error)
    return ""


def _torch_activation(activation: ActivationLike) -> nn.Module:
    """The module of torch's that computes it."""
    name, *numbers = activation if isinstance(activation, tuple) else (activation,)
    kind = next(kind for kind, (known, *_) in ACTIVATIONS.items() if known == name)
    return kind(*numbers)


def _unpaired(places: Sequence[_Place]) -> str:
    """Why what stands at `places` does not, at each of them, run right before the same activation."""
    first = places[0]
    for place in places:
        kind = _activation_kind(place.behind)
        if place.behind is None or kind is None:
            return f"no activation is behind {place.name}"
        subject = f"the {kind.__name__} at {place.behind_name}"
        reason = _obstacle(subject, place.behind, kind) or _refused(subject, place.behind)
        if reason:
            return reason
        if _activation(place.behind) != _activation(first.behind):
            return f"one activation is behind {first.name}, another behind {place.name}"
        if not _runs_in_order(place.parent):
            return f"the {type(place.parent).__name__} around {place.name} need not run its modules in their order"
    return ""


def _computes(module: nn.Module | None, behind: nn.Module | None) -> bool:
    """Whether `behind` stands for an activation that `module` computes."""
    if not isinstance(module, (Linear, Conv3x3)) or not isinstance(behind, FusedActivation) or not module.activation:
        return False
    return activation_of("", module.activation) == activation_of("", _activation(behind.original))


def _not_behind(module: nn.Module, places: Sequence[_Place]) -> str:
    """Why what stands at `places` does not, at each of them, run right before what stands for its activation."""
    for place in places:
        if place.behind is None or not _computes(module, place.behind):
            return f"no place for its activation is behind {place.name}"
        reason = _obstacle(f"the FusedActivation at {place.behind_name}", place.behind, FusedActivation)
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


def _fused(module: nn.Module, activation: ActivationLike) -> nn.Module | str:
    """tribp's module that computes a layer and an activation, or why there is none."""
    if isinstance(module, (nn.Conv2d, Conv3x3)):
        return _conv3x3(_conv2d(module) if isinstance(module, Conv3x3) else module, activation)
    assert isinstance(module, (nn.Linear, Linear))
    # On meta, here and below, a constructor allocates nothing and draws no random numbers.
    sizes = (module.in_features, module.out_features, module.bias is not None)
    made = (
        LinearSigmoid(*sizes, device="meta") if activation == "sigmoid"
        else Linear(*sizes, device="meta", activation=activation)
    )  # fmt: skip
    _hand_over(module, made)
    return made


def _linear(fused: Linear) -> nn.Linear:
    made = nn.Linear(fused.in_features, fused.out_features, fused.bias is not None, device="meta")
    _hand_over(fused, made, without={"activation", "_act"})
    return made


def _conv3x3(conv: nn.Conv2d, activation: ActivationLike) -> Conv3x3 | str:
    """The module that computes what `conv` does, or why there is none."""
    if "activation" in vars(conv):
        return "it has an activation of its own"
    try:
        made = Conv3x3(
            conv.in_channels, conv.out_channels, conv.stride, conv.padding, conv.groups, conv.bias is not None,
            activation, conv.padding_mode, device="meta", dilation=conv.dilation,
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
    _hand_over(fused, made, without={"activation", "_act", WORD})
    return made


def _hand_over(old: nn.Module, new: nn.Module, without: Set[str] = frozenset()) -> None:
    """Give `new` the parameters, the mode, and the attributes of `old` that it does not have itself."""
    vars(new)["_parameters"] = old._parameters.copy()
    new.training = old.training
    vars(new).update({name: value for name, value in vars(old).items() if name not in without | vars(new).keys()})


def _original(fused: nn.Module) -> nn.Module:
    assert isinstance(fused, FusedActivation)
    return fused.original.train(fused.training)


def _looks_like_conv3x3(module: nn.Module) -> bool:
    """Whether it is a convolution of another kind, transposed or quantized, say."""
    options = vars(module)
    size = options.get("kernel_size")
    return isinstance(size, tuple) and size == (3, 3) and "in_channels" in options and not isinstance(module, Conv3x3)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _class_names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}
