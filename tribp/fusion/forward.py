"""What a module's own `forward` calls one after the other, and classes whose `forward` has `run` call it.

Nothing is run and nothing traced: the source tells which calls take nothing but each other's output, and the new
`forward` is the old one with `run((self.conv, self.act), x)` in the place of `self.act(self.conv(x))`. So branches,
flags, counters and modes mean what they did, and what the attributes hold is looked at when they are called.
"""

import ast
import builtins
import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from types import FunctionType, MethodDescriptorType
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..nn import Linear
from ..ops.activations import DEFAULTS
from .activations import ACTIVATIONS, OTHER_ACTIVATIONS, activation_kind, torchs
from .rows import (
    Applied,
    FusedSequential,
    Step,
    is_plain_sequential,
    row_at,
    run,
)
from .source import EVERY, IS_SCRIPTING, RUN, Called, Instead, Source, Use, call_of_run, codes, shown

Site = tuple[str, ...]  # calls that take each other's output, as `shown`; or a loop
SITES = "_tribp_sites"  # of a class that was made here: the class it was made of, and its sites
# What a class may define that need not work in a class derived from it.
NOT_DERIVABLE = {
    "__reduce__", "__reduce_ex__", "__getnewargs_ex__", "__deepcopy__", "__copy__", "__init_subclass__", "__class__",
}  # fmt: skip
# Functions that say the same of a derived class.
HARMLESS = {"isinstance", "issubclass", "repr", "str", "print"}
ITERATIONS = (nn.Sequential.__iter__, nn.ModuleList.__iter__)
KINDS = {name: kind for kind, (name, *_) in ACTIVATIONS.items()}
KINDS |= {name: kind for kind, name in OTHER_ACTIVATIONS.items()}
METHODS = {
    ending: (name, method)
    for name in DEFAULTS
    for ending in (name, name + "_")
    if isinstance(method := getattr(Tensor, ending, None), MethodDescriptorType)  # else another's, in its place
}
FUNCTIONS = {
    function: name
    for name in KINDS
    for library in (torch, F)
    for spelling in (name, name + "_")
    if hasattr(library, spelling) and (function := torchs(library, spelling)) is not None
}


class Link(NamedTuple):
    """A call that takes nothing but another call's output."""

    call: ast.Call
    input: ast.expr
    called: Called | None = None  # nothing for a function
    activation: Applied | None = None
    doubt: str = ""  # why it cannot be taken together with what is before it

    @property
    def text(self) -> str:
        return shown(self.call, self.input)


class Line(NamedTuple):
    """Modules of which the code calls one after the other, by their names."""

    names: Sequence[str]
    modules: Sequence[Step]
    site: Site = ()  # in a forward
    doubt: str = ""  # why they cannot run together


def lines_of(module: nn.Module, prefix: str, norms: bool) -> list[Line]:
    """What a module's forward calls one after the other; with a site, where some of it can run together.

    prefix: of its children's names. norms: as for `row_at`. Raises ValueError with the reason if there is no source.
    """
    kind = made_of(module)
    source = read_forward(kind)
    every = [_links(source, call) for call in source.calls()]
    inner = {link.call for links in every for link in links[1:]}
    outer = [links for links in every if links[0].call not in inner]
    lines = [line for links in outer for line in _lines(source, module, prefix, links, norms)]
    for call in source.calls():
        lines += _lines_in_doubt(source, module, kind, prefix, call)
    for loop in source.loops():
        key = source.own_attribute(loop.iter)
        row = _child(module, key)
        if isinstance(row, (nn.Sequential, nn.ModuleList)) and type(row).__iter__ in ITERATIONS:
            named = [*named_flatten(f"{prefix}{key}.", row)]
            lines.append(Line([n for n, _ in named], [m for _, m in named], (f"for {key}",), underivable(module)))
    return lines


def unread_layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Linear, str]]:
    """Linear layers of which a module's forward does not tell what is applied to their output, and why it does not."""
    kind = made_of(module)
    source = read_forward(kind)
    called: set[str] = set()
    for call in source.calls():
        layers = _called(module, prefix, source.called(call))
        called |= {name for name, _ in layers}
        use = source.use(call)
        for other in [use] if use else source.other_uses(call):
            if not _is_read(source, module, other):
                reason = f"what {other.text} in {kind.__name__}.forward does with its output is not known"
                yield from ((name, layer, reason) for name, layer in layers if isinstance(layer, nn.Linear))
    for loop in source.loops():
        key = source.own_attribute(loop.iter)
        called |= {name for name, _ in _called(module, prefix, Called(key, EVERY))}
    for key, child in module._modules.items():
        for name, layer in _linears(prefix + key, child):
            if name not in called and (reason := _used(source, kind, key)):
                yield name, layer, reason


def _used(source: Source, kind: type[nn.Module], key: str) -> str:
    """How the methods of a class use a child whose calls cannot be read; nothing if none does."""
    if source.uses_whole(key):
        return f"{kind.__name__}.forward uses it in another way than to call it with one argument"
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            if isinstance(function, FunctionType) and name not in ("__init__", "forward"):
                other = read(function)
                if isinstance(other, Source) and other.uses_whole(key):
                    return f"{kind.__name__}.{name} uses it, and only forward is read"
    return ""


def _linears(name: str, module: nn.Module | None) -> Iterator[tuple[str, nn.Linear]]:
    """The module if it is a linear layer, or those in it if it is a list or dictionary, with their names."""
    if isinstance(module, nn.Linear):
        yield name, module
    elif isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for key, child in module._modules.items():
            yield from _linears(f"{name}.{key}", child)


def _is_read(source: Source, module: nn.Module, use: Use) -> bool:
    """Whether it is known what a call does: it calls a child, a tensor's method, or a function of torch or Python."""
    if called := source.called(use.call):
        return _child(module, called.attribute) is not None
    function = use.call.func
    if isinstance(function, ast.Attribute) and function.value is use.input:
        return True
    meant = source.resolve(function)
    if isinstance(function, ast.Name) and function.id not in source.local:
        meant = meant or getattr(builtins, function.id, None)
    if not callable(meant) or meant in FUNCTIONS:
        return _function(source, use) is not None
    return (getattr(meant, "__module__", None) or "torch").partition(".")[0] in ("torch", "builtins")


def named_flatten(prefix: str, modules: nn.Module) -> Iterator[tuple[str, Step]]:
    """What `flatten` makes of a module's children, with the name of each."""
    for key, module in modules._modules.items():
        if is_plain_sequential(module):
            yield from named_flatten(f"{prefix}{key}.", module)
        elif module is not None:
            yield prefix + key, module


def _lines(source: Source, module: nn.Module, prefix: str, links: Sequence[Link], norms: bool) -> Iterator[Line]:
    """A line ends where what is called is no module; there are several where a link calls one of several modules."""
    start = 0
    while start < len(links):
        choices: list[Sequence[tuple[str, Step]]] = []
        for link in links[start:]:
            choice: Sequence[tuple[str, Step]] = _called(module, prefix, link.called)
            if link.activation and choices:
                choice = [(choices[-1][0][0], link.activation)]
            if not choice:
                break
            choices.append(choice)
        stop = start + len(choices)
        for n in range(max(map(len, choices), default=0)):
            calls = [choice[min(n, len(choice) - 1)] for choice in choices]
            yield _line(module, calls, links[start:stop], norms)
        start = max(stop, start + 1)


def _called(module: nn.Module, prefix: str, called: Called | None) -> list[tuple[str, nn.Module]]:
    """The modules that a call may call, by their names."""
    child = None if called is None else _child(module, called.attribute)
    if called is None or child is None:
        return []
    name = prefix + called.attribute
    if not called.key:
        return [(name, child)]
    children = [(f"{name}.{key}", m) for key, m in child._modules.items() if m and called.key in (key, EVERY)]
    return children if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else []


def _line(module: nn.Module, calls: Sequence[tuple[str, Step]], links: Sequence[Link], norms: bool) -> Line:
    """From the first link to the last that something else joins."""
    names: list[str] = []
    modules: list[Step] = []
    where: list[int] = []  # the link of each module
    for n, (name, called) in enumerate(calls):
        named: list[tuple[str, Step]] = [(name, called)]
        if is_plain_sequential(called):
            named = list(named_flatten(f"{name}.", called))
        names += [name for name, _ in named]
        modules += [module for _, module in named]
        where += [n] * len(named)
    ends = joined(modules, where, norms)
    doubt = underivable(module)
    site = tuple(link.text for link in links[min(ends) : max(ends) + 1]) if ends and not doubt else ()
    return Line(names, modules, site, doubt)


def joined(modules: Sequence[Step], where: Sequence[int], norms: bool) -> set[int]:
    """Where rows of modules begin and end that cross from one place to another; `where` has each module's place."""
    ends: set[int] = set()
    start = 0
    while start < len(modules):
        row = row_at(modules, start, None, norms)
        stop = row[-1].stop if row else start + 1
        if where[stop - 1] > where[start]:
            ends |= {where[start], where[stop - 1]}
        start = stop
    return ends


def _lines_in_doubt(
    source: Source, module: nn.Module, kind: type[nn.Module], prefix: str, call: ast.Call
) -> Iterator[Line]:
    """Activations that take a call's output, which something else takes, too, or whose arguments are not known."""
    name = source.own_attribute(call.func)
    layer = _child(module, name)
    use = source.use(call)
    uses = [use] if use else source.other_uses(call)
    for link in (_link(source, use) for use in uses):
        key = link.called.attribute if link and link.called else ""
        called = None if link is None else link.activation or _child(module, key)
        doubt = "" if link is None else link.doubt
        if not use:
            doubt = f"{kind.__name__}.forward may do something else with what {name} returns"
        if layer is not None and link is not None and called is not None and doubt:
            yield Line([prefix + name, prefix + (key or name)], [layer, called], doubt=doubt)
            break


def _links(source: Source, call: ast.Call) -> list[Link]:
    """A call of what an attribute of self holds, and the calls that take its output and each other's."""
    links = [Link(call, call.args[0], source.called(call))]
    while (use := source.use(links[-1].call)) and (link := _link(source, use)) and not link.doubt:
        links.append(link)
    return links


def _link(source: Source, use: Use) -> Link | None:
    called = source.called(use.call)
    if called and use.call.args[0] is use.input:
        return Link(use.call, use.input, called)
    name = _function(source, use)
    if name is None:
        return None
    module = KINDS[name]()
    try:
        if name not in DEFAULTS:
            raise ValueError(f"tribp computes no {name}")
        numbers = _numbers(name, use)
        in_place = numbers.pop("inplace", ast.unparse(use.call.func).endswith("_"))
        module = KINDS[name](**numbers)
        module.inplace = in_place
    except ValueError as error:
        return Link(use.call, use.input, None, Applied(module, module), str(error))
    return Link(use.call, use.input, None, Applied(module, *source.applied(use)))


def _function(source: Source, use: Use) -> str | None:
    """The activation that a function or a method of the output is."""
    function = use.call.func
    if isinstance(function, ast.Attribute) and function.value is use.input:
        name, method = METHODS.get(function.attr, (None, None))
        return name if name and getattr(Tensor, function.attr) is method else None
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
        numbers[key] = number
    low, high = ({**DEFAULTS["hardtanh"], **numbers}[bound] for bound in DEFAULTS["hardtanh"])
    if low >= high:  # which the module does not take
        raise ValueError(f"{use.text} has bounds in the wrong order")
    return numbers


def _child(module: nn.Module, key: str) -> nn.Module | None:
    """The child that `self.key` is, if nothing comes before it."""
    return None if key in vars(module) or hasattr(type(module), key) else module._modules.get(key)


def underivable(module: nn.Module) -> str:
    """Why a module cannot get a class derived from its own; nothing if it can."""
    kind = made_of(module)
    if "forward" in vars(module):
        return f"the {kind.__name__} around it has a forward of its own"
    bases = [base for base in kind.__mro__ if base not in (nn.Module, Generic, object)]
    own = {attribute for base in bases for attribute in vars(base)} & NOT_DERIVABLE
    if own or type(kind) is not type:
        return f"{kind.__name__} has a {min(own, default='metaclass')} of its own"
    if parametrize.is_parametrized(module) or isinstance(module, LazyModuleMixin):
        return f"the {kind.__name__} around it is parametrized or lazy, and may change its class"
    reasons = (f"{f.__qualname__} {said}" for f, of_class in _methods(bases) if (said := _by_class(f, of_class)))
    return next(reasons, "")


def _methods(bases: Sequence[type]) -> Iterator[tuple[FunctionType, bool]]:
    """The methods and properties that these classes define, torch's own aside, and whether each is a classmethod."""
    for base in bases:
        if not base.__module__.startswith("torch."):
            for value in vars(base).values():
                of_class = isinstance(value, classmethod)
                function = value.__func__ if of_class else value.fget if isinstance(value, property) else value
                if isinstance(function, FunctionType):
                    yield function, of_class


def _by_class(function: FunctionType, of_class: bool) -> str:
    """What a method does by self's class that is something else in a derived class; nothing if it does no such thing.

    `super(type(self), self)` is the method itself again, `type(self).calls += 1` counts for the derived class alone,
    and no dict of classes has that.
    """
    names = {name for code in codes(function.__code__) for name in code.co_names}
    asks = not names.isdisjoint(("type", "__class__"))
    if not of_class and not asks:
        return ""
    source = read(function)
    if isinstance(source, str):
        return "calls super of type(self)" if asks and "super" in names else ""
    own = {source.me} if of_class else {f"type({source.me})", f"{source.me}.__class__"}
    for node in source.nodes:
        if not isinstance(node, (ast.Name, ast.Call, ast.Attribute)) or ast.unparse(node) not in own:
            continue
        outer = source.parent[node]
        called = ast.unparse(outer.func) if isinstance(outer, ast.Call) and outer.func is not node else ""
        stored = isinstance(outer, ast.Attribute) and not isinstance(outer.ctx, ast.Load)
        if called == "super":
            return "calls super of type(self)"
        if of_class:  # in others it is a class's name for itself, whose attributes it may set for all
            if stored and isinstance(source.parent[outer], ast.AugAssign):
                return "sets an attribute of type(self)"
        elif stored or called in ("setattr", "delattr"):
            return "sets an attribute of type(self)"
        elif _is_looked_up(outer, node) or (called and called not in HARMLESS):
            return "depends on type(self)"
    return ""


def _is_looked_up(outer: ast.AST, kind: ast.expr) -> bool:
    """Whether a class is sought among others, or gets another name, by which it may be."""
    if isinstance(outer, ast.Compare):  # not by `is`, which the documentation warns of
        return any(isinstance(operator, (ast.In, ast.NotIn)) for operator in outer.ops)
    return isinstance(outer, (ast.Subscript, ast.Dict)) or (isinstance(outer, ast.Assign) and outer.value is kind)


def read_forward(kind: type[nn.Module]) -> Source:
    """The source of a class's forward; raises ValueError with the reason if there is none."""
    function = inspect.getattr_static(kind, "forward")
    if not isinstance(function, FunctionType):
        raise ValueError("forward is no Python function")
    if hasattr(function, "__wrapped__"):
        raise ValueError("forward is decorated")
    source = read(function)
    if isinstance(source, str):
        raise ValueError(source)
    return source


@functools.lru_cache(maxsize=64)
def read(function: FunctionType) -> Source | str:
    """The source of a function, or why there is none; remembered while `fuse` runs."""
    try:
        return Source(function)
    except ValueError as error:
        return str(error)


def made_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `class_for`."""
    kind: type[nn.Module] = vars(type(module)).get(SITES, (type(module), ()))[0]
    return kind


def made_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class made here that this one was derived from, by a parametrization or `fully_shard`, say."""
    return next((base for base in kind.__mro__[1:] if SITES in vars(base)), None)


def shown_name(kind: type[nn.Module]) -> str:
    """A class, in a way that tells tribp's from torch's, and those that were made here from what they were made of."""
    return f"fused {kind.__name__}" if SITES in vars(kind) else "tribp.nn.Linear" if kind is Linear else kind.__name__


def sites_of(module: nn.Module) -> Set[Site]:
    """Where the forward of a module has `run`."""
    return frozenset(vars(type(module)).get(SITES, (None, ()))[1])


def class_for(module: nn.Module, sites: Set[Site]) -> type[nn.Module]:
    """The class for a module whose forward shall have `run` at these sites."""
    kind = made_of(module)
    return _derived(kind, tuple(sorted(sites))) if sites else kind


def class_in_order(kind: type[nn.Sequential]) -> type[nn.Sequential]:
    """The class for a Sequential that shall `run` its modules."""
    return FusedSequential if kind is nn.Sequential else _derived(kind, ())  # type: ignore[return-value]


# So that modules of one class stay modules of one class.
_classes: weakref.WeakValueDictionary[object, type[nn.Module]] = weakref.WeakValueDictionary()


def _derived(kind: type[nn.Module], sites: tuple[Site, ...]) -> type[nn.Module]:
    """The class made of this one whose forward has `run` at these sites; without any it is a Sequential's."""
    forward = inspect.getattr_static(kind, "forward") if sites else FusedSequential.forward
    made = _classes.get((kind, forward, sites))
    if made is None:
        space = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        space |= {"forward": _running(read_forward(kind), sites) if sites else forward}
        space |= {"__reduce_ex__": _reduce, SITES: (kind, sites)}
        made = _classes.setdefault((kind, forward, sites), type(kind.__name__, (kind,), space))  # another thread's
    return made


def _running(source: Source, sites: Sequence[Site]) -> FunctionType:
    """The forward with `run` at these sites, as far as it still has them."""
    runs: list[list[Link]] = []
    for call in source.calls():
        links = _links(source, call)
        texts = tuple(link.text for link in links)
        lengths = [len(site) for site in sites if site == texts[: len(site)]]
        if lengths:
            runs.append(links[: max(lengths)])
    instead: dict[ast.AST, Instead] = {}
    values: dict[str, object] = {RUN: run, IS_SCRIPTING: torch.jit.is_scripting}  # type: ignore[attr-defined]
    taken: set[ast.Call] = set()
    for links in sorted(runs, key=len, reverse=True):  # a part of a longer one is done with it
        if taken.isdisjoint(link.call for link in links):
            taken.update(link.call for link in links)
            instead |= _instead_of_links(links, values)
    for loop in source.loops():
        if (f"for {source.own_attribute(loop.iter)}",) in sites:
            instead[loop] = _instead_of_loop(loop)
    return source.running(instead, values)


def _instead_of_links(links: Sequence[Link], values: dict[str, object]) -> Mapping[ast.AST, Instead]:
    """The last call becomes that of `run`; a variable that held an output holds what the first call takes."""
    modules: list[ast.expr] = []
    instead: dict[ast.AST, Instead] = {}
    base = links[0].input
    for before, link in zip((None, *links), links, strict=False):
        if before and link.input is not before.call:
            instead[before.call] = Instead(base, lambda input: input)
            base = link.input
        if link.activation:
            name = f"_tribp_activation_{len(values)}"
            values[name] = link.activation
            modules.append(ast.Name(name, ast.Load()))
        else:
            modules.append(link.call.func)
    together = ast.Tuple(modules, ast.Load())
    instead[links[-1].call] = Instead(base, lambda input: call_of_run(together, input))
    return instead


def _instead_of_loop(loop: ast.For) -> Instead:
    """`x = run(self.layers, x)` of `for layer in self.layers: x = layer(x)`."""
    (assign,) = loop.body
    assert isinstance(assign, ast.Assign)
    assert isinstance(assign.value, ast.Call)
    targets = assign.targets
    return Instead(assign.value.args[0], lambda input: ast.Assign(targets, call_of_run(loop.iter, input)))


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """By what pickle finds: the class that a program defines, and where its forward shall have `run`."""
    made = vars(type(module)).get(SITES)
    if made is None:  # a class derived from one of these
        return object.__reduce_ex__(module, protocol)
    reduced = object.__reduce_ex__(module, max(protocol, 2))
    assert isinstance(reduced, tuple)
    return _restore, (*made, *reduced[1][1:]), *reduced[2:]


def _restore(kind: type[nn.Module], sites: tuple[Site, ...], *arguments: object) -> nn.Module:
    made: type[nn.Module] = kind
    with contextlib.suppress(ValueError):  # where there is no source, it does what it did before `fuse`
        made = _derived(kind, sites)
    return made.__new__(made, *arguments)


def activation_of_torch(module: nn.Module) -> type[nn.Module] | None:
    """Which activation of torch's a module is, whether tribp computes it or not."""
    other = next((kind for kind in OTHER_ACTIVATIONS if isinstance(module, kind)), None)
    return activation_kind(module) or other
