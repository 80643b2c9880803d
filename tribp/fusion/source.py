"""Reads a method's source and makes the same method with some of its calls made as one. It runs nothing."""

import __future__

import ast
import copy
import functools
import hashlib
import inspect
import linecache
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor

FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
SCOPES = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.comprehension)
EVERY = "*"
TANGLING = tuple(
    getattr(ast, name) for name in ("Try", "TryStar", "Global", "Nonlocal", "NamedExpr") if hasattr(ast, name)
)
# What an index may be made of that stands in another order after: nothing that it does can be seen.
INDEX = (ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
RUN, IS_SCRIPTING, INPUT = "_tribp_run", "_tribp_is_scripting", "_tribp_input"  # what a method that was made here calls


class Use(NamedTuple):
    """A call whose first argument, or whose object, is another call's output, which nothing else takes."""

    call: ast.Call
    input: ast.expr  # the other call, or the variable that holds its output
    text: str  # the call, with _ for the input


class Called(NamedTuple):
    """What an attribute of self holds."""

    attribute: str
    key: str = ""  # of one of its children; EVERY for one that is not known


class Source:
    """A method's definition, of which it is certain that it is what runs.

    Raises:
        ValueError: there is none, or another; the message says why.
    """

    def __init__(self, function: FunctionType) -> None:
        code = function.__code__
        try:
            # of the code: of a function, inspect would look through decorators
            nodes, compiled = _parse("".join(inspect.findsource(code)[0]), code.co_flags & FUTURE)
        except (OSError, TypeError, SyntaxError, ValueError) as error:
            raise ValueError("its source cannot be read") from error
        if code not in compiled:
            raise ValueError("its source is not the code that runs")
        tree = nodes.get((code.co_name, code.co_firstlineno))
        if tree is None:
            raise ValueError("it is not defined by a def statement of its own")
        if getattr(tree, "type_params", ()):  # which stand in a scope of their own
            raise ValueError("it has type parameters")
        if not _can_be_written(tree):
            raise ValueError("its source cannot be reproduced from its syntax tree")
        self.function, self.tree = function, tree
        owner = ["_", *function.__qualname__.split(".")][-2]
        if owner == "<locals>" and any(isinstance(n, ast.Attribute) and _is_private(n.attr) for n in ast.walk(tree)):
            raise ValueError("it is defined within a function and uses private names (__…)")
        self.owner = owner if owner.isidentifier() else "_"  # the class that it was written in; or what mangles nothing
        self.nodes = list(ast.walk(tree))
        self.parent = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        first = [*tree.args.posonlyargs, *tree.args.args][:1]
        self.me = first[0].arg if first else ""
        self.names = [node for node in self.nodes if isinstance(node, ast.Name)]
        # Where a variable may be read without its name, or after an exception.
        self.tangled = any(isinstance(node, TANGLING) for node in self.nodes)
        words = {node.id for node in self.names} | {n.attr for n in self.nodes if isinstance(n, ast.Attribute)}
        self.tangled |= not words.isdisjoint(("locals", "vars", "dir", "eval", "exec", "suppress"))
        self.stored = {node.id for node in self.names if not isinstance(node.ctx, ast.Load)}
        self.captured = {name for inner in codes(code) for name in inner.co_cellvars}
        self.elements = dict(self._elements())
        self.local = self.stored.union(*((*c.co_varnames, *c.co_freevars) for c in codes(code)))

    def calls(self) -> list[ast.Call]:
        """Each call, of one argument, of what an attribute of self holds."""
        return [node for node in self.nodes if isinstance(node, ast.Call) and self.called(node)]

    def called(self, call: ast.Call) -> Called | None:
        """What a call of one argument calls, if an attribute of self holds it."""
        if len(call.args) != 1 or isinstance(call.args[0], ast.Starred) or call.keywords:
            return None
        function = call.func
        if name := self.own_attribute(function):
            return Called(name)
        if isinstance(function, ast.Subscript) and (name := self.own_attribute(function.value)):
            if not all(isinstance(node, INDEX) for node in ast.walk(function.slice)):
                return None
            index = function.slice.value if isinstance(function.slice, ast.Constant) else None
            return Called(name, EVERY if index is None else str(index))
        if isinstance(function, ast.Name) and (name := self.elements.get(function.id, "")):
            return Called(name, EVERY)
        return None

    def _elements(self) -> Iterator[tuple[str, str]]:
        """Variables that a loop sets, and the attribute of self whose elements they are."""
        for node in self.nodes:
            if not isinstance(node, (ast.For, ast.comprehension)):
                continue
            within, targets = [node.iter], [node.target]
            if isinstance(node.iter, ast.Call) and isinstance(node.target, ast.Tuple):
                match ast.unparse(node.iter.func):
                    case "enumerate":
                        within, targets = node.iter.args[:1], node.target.elts[1:]
                    case "zip":
                        within, targets = node.iter.args, node.target.elts
            for source, target in zip(within, targets, strict=False):
                source = source.value if isinstance(source, ast.Subscript) else source  # a slice
                if isinstance(target, ast.Name) and (name := self.own_attribute(source)):
                    yield target.id, name

    def own_attribute(self, node: ast.expr) -> str:
        """The name of an attribute of self, or nothing for another expression."""
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.me):
            return ""
        owner = self.owner.lstrip("_")
        return f"_{owner}{node.attr}" if owner and _is_private(node.attr) else node.attr

    def uses_whole(self, attribute: str) -> bool:
        """Whether the method uses what an attribute of self holds, and not an attribute of that alone."""
        own = (node for node in self.nodes if isinstance(node, ast.Attribute) and self.own_attribute(node) == attribute)
        return any(isinstance(node.ctx, ast.Load) and not isinstance(self.parent[node], ast.Attribute) for node in own)

    def loops(self) -> list[ast.For]:
        """Each `for layer in self.attribute: x = layer(x)` whose layer nothing else reads."""
        loops = [node for node in self.nodes if _runs_in_order(node) and isinstance(node, ast.For)]
        called = {name for loop in loops for name in ast.walk(loop)}
        result = []
        for loop in loops:
            (layer,) = (name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name))
            loads = [name for name in self.names if name.id == layer and isinstance(name.ctx, ast.Load)]
            alone = layer not in self.captured and called.issuperset(loads) and not self.tangled
            if self.own_attribute(loop.iter) and alone:
                result.append(loop)
        return result

    def use(self, node: ast.expr) -> Use | None:
        """The call that alone takes the value of `node`, at once or from the variable that holds it for one line."""
        outer = self.parent[node]
        held = self._only_load(outer) if _variable(outer) else node
        return self._taken_by(held) if held else None

    def other_uses(self, node: ast.expr) -> list[Use]:
        """Calls that take the value of `node` from the variable that holds it, until that is set again."""
        assign = self.parent[node]
        variable = _variable(assign)
        if not variable or not isinstance(assign, ast.stmt):
            return []
        same = [name for name in self.names if name.id == variable and _place(name) > _end(assign)]
        stores = [(name, self.parent[name]) for name in same if isinstance(name.ctx, ast.Store)]
        setting = (outer if isinstance(outer, ast.stmt) else name for name, outer in stores)
        end = min(map(_end, setting), default=_end(self.tree))
        return [use for name in same if _place(name) <= end and (use := self._taken_by(name))]

    def _taken_by(self, node: ast.expr) -> Use | None:
        outer = self.parent[node]
        method = outer if isinstance(outer, ast.Attribute) else None
        outer = self.parent[method] if method else outer
        if not isinstance(outer, ast.Call) or not (outer.func is method if method else outer.args[:1] == [node]):
            return None
        return Use(outer, node, shown(outer, node))

    def _only_load(self, assign: ast.AST) -> ast.Name | None:
        """Where the next line reads the variable that `assign` sets, if nothing else can, and nothing is done before.

        What was assigned may then be computed there, too.
        """
        if isinstance(self.parent[assign], ast.ClassDef):  # whose variables are attributes
            return None
        block = next(b for _, b in ast.iter_fields(self.parent[assign]) if isinstance(b, list) and assign in b)
        following = block[block.index(assign) + 1 :][:1]
        variable = _variable(assign)
        if not variable or not following or self.tangled or variable in self.captured:
            return None
        (line,) = following
        inside = list(ast.walk(line))
        uses = [node for node in inside if isinstance(node, ast.Name) and node.id == variable]
        loads = [node for node in uses if isinstance(node.ctx, ast.Load)]
        if len(loads) != 1 or any(isinstance(node, SCOPES) for node in inside):
            return None
        if isinstance(line, ast.Return):
            gone = len(uses) == 1
        elif isinstance(line, (ast.Assign, ast.AnnAssign)):
            set_again = _variable(line) == variable and len(uses) == 2
            gone = set_again or sum(name.id == variable for name in self.names) == 2  # there, and here
        else:
            gone = False
        return loads[0] if gone and self._is_first(loads[0]) else None

    def _is_first(self, node: ast.expr) -> bool:
        """Whether a line evaluates `node` before anything else but names and attributes of names."""
        outer = self.parent[node]
        if isinstance(outer, ast.stmt):
            return getattr(outer, "value", None) is node
        if isinstance(outer, ast.Call):
            first = outer.func is node or (outer.args[:1] == [node] and _is_dotted(outer.func))
        elif isinstance(outer, (ast.Attribute, ast.Subscript)):
            first = outer.value is node
        elif isinstance(outer, (ast.BinOp, ast.Compare)):
            first = outer.left is node
        elif isinstance(outer, (ast.Tuple, ast.List)):
            first = outer.elts[0] is node
        else:
            first = isinstance(outer, ast.UnaryOp)
        return first and isinstance(outer, ast.expr) and self._is_first(outer)

    def resolve(self, node: ast.expr) -> object:
        """What a dotted name means, if it starts with a global and goes through modules."""
        if isinstance(node, ast.Name):
            return None if node.id in self.local else self.function.__globals__.get(node.id)
        value = self.resolve(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(value, node.attr, None) if isinstance(value, ModuleType) else None  # type: ignore[attr-defined]

    def applied(self, use: Use) -> tuple[Callable[[Any], Any], Callable[[], object]]:
        """A call of a global, or of a tensor's method, as a function of its input; and what looks up what it calls."""
        called, names = use.call.func, self.function.__globals__
        if isinstance(called, ast.Attribute) and called.value is use.input:
            look_up: Callable[[], object] = functools.partial(getattr, Tensor, called.attr)
        else:
            look_up = self._evaluated(f"lambda: {ast.unparse(called)}", names)
        return self._evaluated(f"lambda {INPUT}: {shown(use.call, use.input, INPUT)}", names), look_up

    def _evaluated(self, text: str, names: dict[str, Any]) -> FunctionType:
        code = compile(text, "<tribp.fuse>", "eval", self.function.__code__.co_flags & FUTURE)
        made: FunctionType = eval(code, names)
        return made

    def running(self, instead: Mapping[ast.AST, "Instead"], values: Mapping[str, object]) -> FunctionType:
        """The same method, with others in the place of some calls and loops.

        Under TorchScript it does what it did. values: what names mean that those use.
        """
        made = copy.deepcopy(self.tree)
        twin: dict[ast.AST, Any] = dict(zip(ast.walk(self.tree), ast.walk(made), strict=True))
        _Replace({twin[node]: new._replace(input=twin[new.input]) for node, new in instead.items()}).visit(made)
        made.decorator_list = []  # the old method is what they left as it was
        if not any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in self.nodes):  # which a function has once
            first = int(ast.get_docstring(made, clean=False) is not None)
            scripting = ast.If(ast.Call(ast.Name(IS_SCRIPTING), [], []), self.tree.body[first:], made.body[first:])
            made.body[first:] = [scripting] if scripting.body else []
        text = ast.unparse(ast.fix_missing_locations(made)) + "\n"
        filename = f"<tribp.fuse {self.function.__qualname__} {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
        # For tracebacks, and for torch.jit.script, which compiles what inspect reads.
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        (definition,) = ast.parse(text).body
        return self._function(definition, filename, values)

    def _function(self, definition: ast.stmt, filename: str, values: Mapping[str, object]) -> FunctionType:
        """The definition as a function with all that is the method's, and with further free variables."""
        old = self.function
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        cells |= {name: CellType(value) for name, value in values.items()}
        code = self._compile(definition, filename, [*cells])
        closure = tuple(cells[name] for name in code.co_freevars)
        made = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
        functools.update_wrapper(made, old)
        del made.__wrapped__  # type: ignore[attr-defined]  # else inspect, and with it TorchScript, reads the old one
        vars(made).update({name: value for name, value in vars(old).items() if name == "__wrapped__"})
        made.__kwdefaults__ = old.__kwdefaults__
        return made

    def _compile(self, definition: ast.stmt, filename: str, free_variables: Sequence[str]) -> CodeType:
        """The definition's code, with these free variables and the private names of the method's class."""
        code = self.function.__code__
        free = ", ".join(name for name in free_variables if name != "__class__")
        owner = self.owner
        known = "" if owner in free_variables else f"global {owner}; "  # what the method means by its class's name
        module = ast.parse(f"def enclosing({free}):\n {known}pass\n class {owner}: pass")
        module.body[0].body[-1].body = [definition]  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled: CodeType = compile(module, filename, "exec", code.co_flags & FUTURE, dont_inherit=True)
        for name in ("enclosing", owner, code.co_name):
            constants: tuple[object, ...] = compiled.co_consts
            compiled = next(c for c in constants if isinstance(c, CodeType) and c.co_name == name)
        assert isinstance(compiled, CodeType)
        return compiled


@functools.lru_cache(maxsize=16)
def _parse(text: str, flags: int) -> tuple[dict[tuple[str, int], ast.FunctionDef], set[CodeType]]:
    """The functions of a file, by name and first line, and all code in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python has given them when it compiled the file
        module = ast.parse(text)
        code = compile(module, "", "exec", flags, dont_inherit=True)
    nodes: dict[tuple[str, int], ast.FunctionDef] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            nodes[node.name, first] = node
    return nodes, set(codes(code))


class Instead(NamedTuple):
    """What takes the place of a call, or of a loop: made of the expression that it takes as its input."""

    input: ast.expr
    made_of: Callable[[ast.expr], ast.AST]


def call_of_run(modules: ast.expr, input: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(RUN), [modules, input], [])


class _Replace(ast.NodeTransformer):
    def __init__(self, by: Mapping[ast.AST, Instead]) -> None:
        self.by = by

    def visit(self, node: ast.AST) -> Any:
        instead = self.by.get(node)
        return self.generic_visit(node) if instead is None else instead.made_of(self.visit(instead.input))


def shown(call: ast.Call, input: ast.expr, name: str = "_") -> str:
    """A call, with a name for its input, which is its first argument or, of a method, its object."""
    blank = ast.Name(name)
    if isinstance(call.func, ast.Attribute) and call.func.value is input:
        return ast.unparse(ast.Call(ast.Attribute(blank, call.func.attr), call.args, call.keywords))
    return ast.unparse(ast.Call(call.func, [blank, *call.args[1:]], call.keywords))


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _is_dotted(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_dotted(node.value))


def _can_be_written(tree: ast.FunctionDef) -> bool:
    """Whether unparse gives the same definition, which some f-strings keep it from in Python 3.11 and older."""
    try:
        return ast.dump(ast.parse(ast.unparse(tree)).body[0]) == ast.dump(tree)
    except (SyntaxError, ValueError):
        return False


def _place(node: ast.AST) -> tuple[int, int]:
    """Where the source of a node begins."""
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def _variable(line: ast.AST) -> str:
    """The variable that a line sets, and nothing else; nothing for another line."""
    targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else ""


def _runs_in_order(loop: ast.AST) -> bool:
    """Whether it is `for layer in …: x = layer(x)`."""
    if not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Name) or loop.orelse or len(loop.body) != 1:
        return False
    variable, layer = _variable(loop.body[0]), loop.target.id
    return variable != layer and ast.unparse(loop.body[0]) == f"{variable} = {layer}({variable})"


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)
