"""What a module's own `forward` applies to the output of a layer, and classes whose `forward` leaves that to the layer.

Nothing is run and nothing traced: the source tells what is applied on every path, and the new `forward` is the old one
without those calls. So branches, flags, counters and modes mean what they did.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Set
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..ops.activations import DEFAULTS
from ..ops.shared import NAMESPACE
from .modules import (
    ACTIVATIONS,
    BATCH_NORMS,
    LAYERS,
    OTHER_ACTIVATIONS,
    PARAMETERS,
    FoldedBatchNorm,
    FusedActivation,
    activation_kind,
    is_other_activation,
)
from .source import Source, Use, names_in

Site = tuple[str, ...]  # the attribute that is a layer, and what is applied to its output, as `Use.text`
Foreign = Callable[[Source, frozenset[str]], set[str]]  # which of its attributes a method takes from others than self
SITES = "_tribp_sites"  # of a class that was made here: the class it was made of, and its sites
HARMLESS = frozenset(PARAMETERS)  # to read of a layer
# What a class may define that need not work in a class derived from it.
OWN = {
    "__reduce__",
    "__reduce_ex__",
    "__getnewargs_ex__",
    "__deepcopy__",
    "__copy__",
    "__getattr__",
    "__getattribute__",
}
OWN |= {"__init_subclass__"}
KINDS = {name: kind for kind, (name, *_) in ACTIVATIONS.items()}
KINDS |= {name: kind for kind, name in OTHER_ACTIVATIONS.items()}
METHODS = {ending: name for name in DEFAULTS for ending in (name, name + "_") if hasattr(Tensor, ending)}
FUNCTIONS = {
    getattr(library, spelling): name
    for name in KINDS
    for library in (torch, F)
    for spelling in (name, name + "_")
    if hasattr(library, spelling)
}


class Behind(NamedTuple):
    """What takes the output of one call of a layer."""

    module: nn.Module | None = None  # an activation, for a function the module that computes the same; or a batch norm
    key: str = ""  # the module's name among the children; nothing for a function
    site: Site = ()
    doubt: str = ""  # why the call need not be all that happens to the layer's output


def behind_calls(module: nn.Module, key: str, reached: Mapping[str, str], harmless: frozenset[str]) -> list[Behind]:
    """What takes the output at each call of the child `key` in the module's forward; nothing where that is not known.

    `reached` is what `reached_from_outside` says of the whole model.
    """
    kind, sites = class_and_sites(module)
    try:
        source = read_forward(kind)
    except ValueError:
        return []
    calls = [_behind(source, module, key, call) for call in source.calls(key)]
    if not any(behind.module for behind in calls):
        return []
    doubt = doubt_about(module, key, reached, harmless)
    calls = [behind._replace(doubt=behind.doubt or doubt) for behind in calls]
    return [b._replace(module=FusedActivation(b.module)) if b.module and b.site in sites else b for b in calls]


def doubt_about(module: nn.Module, key: str, reached: Mapping[str, str], harmless: frozenset[str]) -> str:
    """Why something else may happen to the child `key` than its calls in forward; nothing if nothing else can."""
    kind, _ = class_and_sites(module)
    outside = f"{reached[key]} takes a {key} from another module" if key in reached else ""
    return _doubt(read_forward(kind), module, kind, key, harmless) or outside


def taken_apart(module: nn.Module, key: str, parts: Mapping[str, str], harmless: frozenset[str]) -> str:
    """Why the modules of the Sequential that is the child `key` may run otherwise than in their order; nothing if not.

    Only code that can be read is looked at. `parts` is what `parts_from_outside` says of the whole model.
    """
    for function in _functions(class_and_sites(module)[0]):
        source = _read(function) if key in _names_later(function) else ""
        if isinstance(source, Source) and not source.only_runs(key, harmless):
            return f"{function.__qualname__} does something else with {key} than to call it"
    return f"{parts[key]} takes a {key} from another module" if key in parts else ""


def calls_once(module: nn.Module, key: str) -> bool:
    return len(read_forward(class_and_sites(module)[0]).calls(key)) == 1


def unread_forward(module: nn.Module) -> str:
    """Why it is not known what a module applies to the layers that it holds itself; nothing if it is known."""
    kind, _ = class_and_sites(module)
    if isinstance(module, (nn.Sequential, nn.ModuleList)) or not any(isinstance(m, LAYERS) for m in module.children()):
        return ""
    try:
        read_forward(kind)
    except ValueError as error:
        return f"what its forward applies to its layers is not known: {error}"
    return ""


def read_forward(kind: type[nn.Module]) -> Source:
    """The source of a class's forward; raises ValueError with the reason if there is none."""
    function = inspect.getattr_static(kind, "forward")
    if not isinstance(function, FunctionType):
        raise ValueError("forward is no Python function")
    source = _read(function)
    if isinstance(source, str):
        raise ValueError(source)
    return source


@functools.cache
def _read(function: FunctionType) -> Source | str:
    try:
        return Source(function)
    except ValueError as error:
        return str(error)


def _behind(source: Source, module: nn.Module, key: str, call: ast.Call) -> Behind:
    use = source.use(call)
    site: Site = (key,)
    while use and isinstance(_child(module, source.own_attribute(use.call.func)), FoldedBatchNorm):
        site = (*site, use.text)
        use = source.use(use.call)
    if use:
        return _activation(source, module, site, use)
    others = (_activation(source, module, site, use) for use in source.other_uses(call))
    doubt = f"{type(module).__name__}.forward may do something else with what {key} returns"
    return next((behind._replace(doubt=doubt) for behind in others if behind.module), Behind())


def _activation(source: Source, module: nn.Module, site: Site, use: Use) -> Behind:
    """What a call is that takes the layer's output, if it is an activation or a batch norm."""
    site = (*site, use.text)
    child = source.own_attribute(use.call.func)
    if child:
        activation = _child(module, child)
        alone = len(use.call.args) == 1 and not use.call.keywords
        known = activation_kind(activation) or is_other_activation(activation) or isinstance(activation, BATCH_NORMS)
        return Behind(activation, child, site) if alone and known else Behind()
    name = _function(source, use)
    if name is None:
        return Behind()
    if name not in DEFAULTS:
        return Behind(KINDS[name](), "", site)
    try:
        return Behind(KINDS[name](**_numbers(name, use)), "", site)
    except ValueError as error:
        return Behind(KINDS[name](), "", site, str(error))


def _function(source: Source, use: Use) -> str | None:
    """The activation that a function or a method of the output is."""
    function = use.call.func
    if isinstance(function, ast.Attribute) and function.value is use.input:
        return METHODS.get(function.attr)
    meant = source.resolve(function)
    spelled = ast.unparse(function).rpartition(".")[2]
    # A global with a name of its own is a setting, which may change.
    return FUNCTIONS.get(meant) if callable(meant) and getattr(meant, "__name__", "") == spelled else None


def _numbers(name: str, use: Use) -> dict[str, Any]:
    """The numbers of a call, by the names that the function and the module both have for them."""
    names, numbers = (*DEFAULTS[name], "inplace"), {}
    method = isinstance(use.call.func, ast.Attribute) and use.call.func.value is use.input
    given = [*zip(names, use.call.args[not method :], strict=False), *((k.arg, k.value) for k in use.call.keywords)]
    for key, value in given:
        try:
            number = ast.literal_eval(value)
        except ValueError:
            number = None
        if key not in names or type(number) not in ((bool,) if key == "inplace" else (int, float)):
            raise ValueError(f"the arguments of {use.text} are not written out as numbers")
        if key in DEFAULTS[name]:
            numbers[key] = number
    low, high = ({**DEFAULTS["hardtanh"], **numbers}[bound] for bound in DEFAULTS["hardtanh"])
    if low >= high:  # which the module does not take
        raise ValueError(f"{use.text} has bounds in the wrong order")
    return numbers


def _child(module: nn.Module, key: str) -> nn.Module | None:
    """The child that `self.key` is, if nothing comes before it."""
    return None if key in vars(module) or hasattr(type(module), key) else module._modules.get(key)


def _doubt(source: Source, module: nn.Module, kind: type[nn.Module], key: str, harmless: frozenset[str]) -> str:
    """Why something else than its calls in forward may happen to a layer, or why forward cannot be another."""
    name = kind.__name__
    if "forward" in vars(module):
        return f"the {name} around it has a forward of its own"
    if _child(module, key) is None:
        return f"{name} has another attribute {key}"
    own = {attribute for base in _bases(kind) for attribute in vars(base)} & OWN
    if own or type(kind) is not type:
        return f"{name} has a {min(own, default='metaclass')} of its own"
    if parametrize.is_parametrized(module) or isinstance(module, LazyModuleMixin):
        return f"the {name} around it is parametrized or lazy, and may change its class"
    if not source.only_calls(key, harmless):
        return f"{name}.forward does something else with {key}, too"
    if source.indirect():
        return f"{name}.forward uses {source.indirect()}, which may reach {key}"
    if any(getattr(value, "__func__", None) is source.function for value in vars(module).values()):
        return f"the {name} around it holds its forward in an attribute"
    for function in _functions(kind):
        if function is source.function or key not in _names_later(function):
            continue
        other = _read(function)
        if isinstance(other, str) or other.calls(key) or not other.only_calls(key, harmless):
            return f"{function.__qualname__} mentions {key}, too"
    return ""


def reached_from_outside(model: nn.Module, harmless: frozenset[str]) -> dict[str, str]:
    """Attributes that methods of the model's classes take from other objects than self, and a method for each."""
    return _from_outside(model, Source.foreign_attributes, harmless)


def parts_from_outside(model: nn.Module, harmless: frozenset[str]) -> dict[str, str]:
    """Attributes of which methods of the model's classes take a part, as reached_from_outside has it."""
    return _from_outside(model, Source.foreign_parts, harmless)


def _from_outside(model: nn.Module, foreign: Foreign, harmless: frozenset[str]) -> dict[str, str]:
    reached: dict[str, str] = {}
    for module in model.modules():
        reached |= _reaches(class_and_sites(module)[0], foreign, harmless)  # type: ignore[arg-type]
    return reached


@functools.cache
def _reaches(kind: type[nn.Module], foreign: Foreign, harmless: frozenset[str]) -> dict[str, str]:
    reached: dict[str, str] = {}
    for function in () if kind.__module__.startswith(("torch.", f"{NAMESPACE}.")) else _functions(kind):
        source, names = _read(function), _names_later(function)
        if isinstance(source, Source):
            names = names & foreign(source, harmless)
        elif foreign is Source.foreign_parts:
            continue
        reached |= {str(name): function.__qualname__ for name in names}
    return reached


def _names_later(function: FunctionType) -> set[object]:
    """What a method mentions that may run after the module was made: of __init__, the functions in it."""
    codes = [function.__code__]
    if function.__name__ == "__init__":
        codes = [constant for constant in function.__code__.co_consts if isinstance(constant, CodeType)]
    return set().union(*map(names_in, codes))


def _bases(kind: type) -> Iterator[type]:
    return (base for base in kind.__mro__ if base not in (nn.Module, object))


def _functions(kind: type) -> Iterator[FunctionType]:
    """All functions that a class and its bases define, as they were before decorators."""
    for base in _bases(kind):
        for value in vars(base).values():
            wrapped = (getattr(value, name, None) for name in ("fget", "func", "__func__"))  # properties and the like
            value = inspect.unwrap(next((function for function in wrapped if function is not None), value))
            if isinstance(value, FunctionType):
                yield value


def class_and_sites(module: nn.Module) -> tuple[type[nn.Module], Set[Site]]:
    """The class that a module had before `class_with_changed_sites`, and what its forward lacks."""
    kind, sites = vars(type(module)).get(SITES, (type(module), ()))
    return kind, frozenset(sites)


def class_with_changed_sites(module: nn.Module, sites: Set[Site]) -> type[nn.Module]:
    """The class for a module whose forward shall leave out what it applies at these sites, or apply it again."""
    kind, present = class_and_sites(module)
    return _class_without(kind, present ^ sites)


def _class_without(kind: type[nn.Module], sites: Set[Site]) -> type[nn.Module]:
    """The class with a forward that leaves out what it applies at these sites.

    Raises:
        ValueError: its forward has no such sites, or has others.
    """
    forward: Any = inspect.getattr_static(kind, "forward")
    return _derived(kind, forward, tuple(sorted(sites))) if sites else kind  # type: ignore[arg-type]


@functools.cache  # so that modules of one class stay modules of one class
def _derived(kind: type[nn.Module], forward: FunctionType, sites: tuple[Site, ...]) -> type[nn.Module]:
    source = read_forward(kind)
    uses: dict[ast.Call, ast.expr] = {}
    seen: set[Site] = set()
    for key in sorted({site[0] for site in sites}):
        for call in source.calls(key):
            use = source.use(call)
            site: Site = (key,)
            while use and (site := (*site, use.text)) not in sites:
                use = source.use(use.call)
            if use is None:
                raise ValueError(f"{kind.__qualname__}.forward has another call of {key} than {sites}")
            uses[use.call] = use.input
            seen.add(site)
    if seen != set(sites):
        raise ValueError(f"{kind.__qualname__}.forward lacks some of {sites}")
    space = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    space |= {"forward": source.without(uses), "__reduce_ex__": _reduce, SITES: (kind, sites)}
    return type(kind.__name__, (kind,), space)


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """By what pickle finds: the class that a program defines, and what its forward shall lack."""
    made_of = vars(type(module)).get(SITES)
    if made_of is None:  # a class derived from one of these
        return object.__reduce_ex__(module, protocol)
    made = object.__reduce_ex__(module, max(protocol, 2))
    assert isinstance(made, tuple)
    return _restore, (*made_of, *made[1][1:]), *made[2:]


def _restore(kind: type[nn.Module], sites: tuple[Site, ...], *arguments: object) -> nn.Module:
    made = _class_without(kind, frozenset(sites))
    return made.__new__(made, *arguments)
