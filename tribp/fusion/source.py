"""Reads a method's source and makes the same method without some of its calls. It runs nothing."""

import __future__

import ast
import copy
import functools
import hashlib
import inspect
import linecache
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
SCOPES = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.comprehension)
# By these, a method reaches attributes without writing out their names.
INDIRECT = frozenset(
    {"getattr", "vars", "eval", "exec", "locals", "__dict__", "__getattr__", "__getattribute__", "_modules", "modules",
     "named_modules", "children", "named_children", "get_submodule"}
)  # fmt: skip
# What may be read of a Sequential: it takes no single module out.
WHOLE = frozenset(
    {"apply", "eval", "forward", "load_state_dict", "parameters", "requires_grad_", "state_dict", "to", "train",
     "training"}
)  # fmt: skip


class Use(NamedTuple):
    """A call whose first argument, or whose object, is another call's output, which nothing else takes."""

    call: ast.Call
    input: ast.expr  # the other call, or the variable that holds its output
    text: str  # the call, with _ for the input


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
            raise ValueError("its source is not what runs")
        tree = nodes.get((code.co_name, code.co_firstlineno))
        if tree is None:
            raise ValueError("its source is no def of its own")
        if not _can_be_written(tree):
            raise ValueError("its source cannot be written again")
        self.function, self.tree = function, tree
        self.nodes = list(ast.walk(tree))
        self.parent = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.arguments = [node.arg for node in self.nodes if isinstance(node, ast.arg)]
        first = [*tree.args.posonlyargs, *tree.args.args][:1]
        self.me = first[0].arg if first else ""
        self.tangled = any(type(node).__name__ in ("Try", "TryStar", "Global", "Nonlocal") for node in self.nodes)
        self.names = [node for node in self.nodes if isinstance(node, ast.Name)]
        self.stored = {node.id for node in self.names if not isinstance(node.ctx, ast.Load)}
        self.captured = {name for inner in _codes(code) for name in inner.co_cellvars}
        self.local = self.stored.union(*((*c.co_varnames, *c.co_freevars) for c in _codes(code)))

    def calls(self, attribute: str) -> list[ast.Call]:
        """Each `self.attribute(…)`."""
        return [n for n in self.nodes if isinstance(n, ast.Call) and self.own_attribute(n.func) == attribute]

    def own_attribute(self, node: ast.expr) -> str:
        """The name of an attribute of self, or nothing for another expression."""
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.me
        return node.attr if own and isinstance(node, ast.Attribute) else ""

    def only_calls(self, attribute: str, harmless: frozenset[str]) -> bool:
        """Whether all it does with an attribute of that name is to call self's, or to read what is harmless of it."""
        taken = [node for node in self._attributes(harmless) if node.attr == attribute]
        return self._is_clear(attribute) and len(taken) == len(self.calls(attribute))

    def only_runs(self, attribute: str, harmless: frozenset[str]) -> bool:
        """Whether it never takes a module out of self's Sequential of that name, but to read what is harmless of it.

        It may call it, run it in a loop `for layer in self.attribute: x = layer(x)`, and set another in its place.
        """
        taken = [node for node in self._parts(harmless) if node.attr == attribute and isinstance(node.ctx, ast.Load)]
        return self._is_clear(attribute) and all(map(self.own_attribute, taken)) and all(map(self._is_loop, taken))

    def _is_clear(self, attribute: str) -> bool:
        """Whether self is what it seems, and the attribute is taken by no string."""
        strings = [node for node in self.nodes if isinstance(node, ast.Constant) and node.value == attribute]
        return self.me not in self.stored and self.arguments.count(self.me) == 1 and not strings

    def foreign_attributes(self, harmless: frozenset[str]) -> set[str]:
        """The attributes that it takes from something else than self or a Python module, as only_calls has it."""
        return self._foreign(self._attributes(harmless))

    def foreign_parts(self, harmless: frozenset[str]) -> set[str]:
        """Those of them of which it may take a part, as only_runs has it."""
        return self._foreign(self._parts(harmless))

    def _foreign(self, attributes: Iterator[ast.Attribute]) -> set[str]:
        taken = [node for node in attributes if not self.own_attribute(node)]
        return {node.attr for node in taken if not isinstance(self.resolve(node.value), ModuleType)}

    def _attributes(self, harmless: frozenset[str]) -> Iterator[ast.Attribute]:
        for node in self.nodes:
            if isinstance(node, ast.Attribute):
                outer = self.parent[node]
                if not (isinstance(outer, ast.Attribute) and outer.attr in harmless):
                    yield node

    def _parts(self, harmless: frozenset[str]) -> Iterator[ast.Attribute]:
        """Attributes that are not called, nor asked whether they are there; nor is what they hold only read."""
        for node in self._attributes(WHOLE):
            outer = self.parent[node]
            called = isinstance(outer, ast.Call) and outer.func is node
            test = isinstance(outer, (ast.If, ast.IfExp)) and outer.test is node
            compared = isinstance(outer, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in outer.ops)
            read = self.parent[outer] if isinstance(outer, ast.Subscript) and outer.value is node else None
            if not (called or test or compared or (isinstance(read, ast.Attribute) and read.attr in harmless)):
                yield node

    def _is_loop(self, node: ast.expr) -> bool:
        """Whether it stands in `for layer in …: x = layer(x)`, and every layer of that name is called in such loops."""
        loop = self.parent[node]
        if not isinstance(loop, ast.For) or loop.iter is not node or not _runs_in_order(loop):
            return False
        (layer,) = (name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name))
        loads = [name for name in self.names if name.id == layer and isinstance(name.ctx, ast.Load)]
        called = {name for n in self.nodes if _runs_in_order(n) for name in ast.walk(n)}
        return layer not in self.captured and called.issuperset(loads)

    def indirect(self) -> str:
        """A name by which it may reach attributes without writing out theirs, if there is one."""
        attributes = (node.attr for node in self.nodes if isinstance(node, ast.Attribute))
        return next((name for name in (*attributes, *(n.id for n in self.names)) if name in INDIRECT), "")

    def use(self, node: ast.expr) -> Use | None:
        """The call that alone takes the value of `node`, at once or from the variable that holds it for one line."""
        outer = self.parent[node]
        held = self._only_load(outer) if isinstance(outer, ast.Assign) and outer.value is node else node
        return self._taken_by(held) if held else None

    def other_uses(self, node: ast.expr) -> list[Use]:
        """Calls that take the value of `node` from the variable that holds it, until that is set again."""
        assign = self.parent[node]
        variable = _variable(assign)
        if not variable or not isinstance(assign, ast.Assign):
            return []
        same = [name for name in self.names if name.id == variable and name.lineno > assign.lineno]
        end = min((name.lineno for name in same if isinstance(name.ctx, ast.Store)), default=self.tree.end_lineno or 0)
        return [use for name in same if name.lineno <= end and (use := self._taken_by(name))]

    def _taken_by(self, node: ast.expr) -> Use | None:
        outer = self.parent[node]
        method = outer if isinstance(outer, ast.Attribute) else None
        outer = self.parent[method] if method else outer
        if not isinstance(outer, ast.Call) or not (outer.func is method if method else outer.args[:1] == [node]):
            return None
        blank = ast.Name("_")
        function = ast.Attribute(blank, method.attr) if method else outer.func
        shown = ast.Call(function, outer.args if method else [blank, *outer.args[1:]], outer.keywords)
        return Use(outer, node, ast.unparse(shown))

    def _only_load(self, assign: ast.Assign) -> ast.Name | None:
        """Where the next line reads the variable that `assign` sets, if nothing else can."""
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
        elif isinstance(line, ast.Assign):
            set_again = _variable(line) == variable and len(uses) == 2
            gone = set_again or sum(name.id == variable for name in self.names) == 2
        else:
            gone = False
        return loads[0] if gone else None

    def resolve(self, node: ast.expr) -> object:
        """What a dotted name means, if it starts with a global and goes through modules."""
        if isinstance(node, ast.Name):
            return None if node.id in self.local else self.function.__globals__.get(node.id)
        value = self.resolve(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(value, node.attr, None) if isinstance(value, ModuleType) else None  # type: ignore[attr-defined]

    def without(self, uses: Mapping[ast.Call, ast.expr]) -> FunctionType:
        """The same method, in which each call that is a key has given way to its input."""
        tree = copy.deepcopy(self.tree)
        twin = dict(zip(ast.walk(self.tree), ast.walk(tree), strict=True))
        tree.decorator_list = []  # the old method is what they left as it was
        _Replace({twin[call]: twin[input] for call, input in uses.items()}).visit(tree)
        text = ast.unparse(tree) + "\n"
        filename = f"<tribp.fuse {self.function.__qualname__} {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
        # For tracebacks, and for torch.jit.script, which compiles what inspect reads.
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        (definition,) = ast.parse(text).body
        old = self.function
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        code = self._compile(definition, filename)
        closure = tuple(cells[name] for name in code.co_freevars)
        made = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
        functools.update_wrapper(made, old)
        del made.__wrapped__  # type: ignore[attr-defined]  # else inspect, and with it TorchScript, reads the old one
        made.__kwdefaults__ = old.__kwdefaults__
        return made

    def _compile(self, definition: ast.stmt, filename: str) -> CodeType:
        """The definition's code, with the free variables of the method and the private names of its class."""
        code = self.function.__code__
        free = ", ".join(name for name in code.co_freevars if name != "__class__")
        owner = self.function.__qualname__.split(".")[-2:][0]
        module = ast.parse(f"def enclosing({free}):\n class {owner if owner.isidentifier() else '_'}: pass")
        module.body[0].body[0].body = [definition]  # type: ignore[attr-defined]
        compiled: CodeType = compile(module, filename, "exec", code.co_flags & FUTURE, dont_inherit=True)
        for name in ("enclosing", owner if owner.isidentifier() else "_", code.co_name):
            constants: tuple[object, ...] = compiled.co_consts
            compiled = next(c for c in constants if isinstance(c, CodeType) and c.co_name == name)
        assert isinstance(compiled, CodeType)
        return compiled


@functools.lru_cache(maxsize=16)
def _parse(text: str, flags: int) -> tuple[dict[tuple[str, int], ast.FunctionDef], set[CodeType]]:
    """The functions of a file, by name and first line, and all code in it."""
    module = ast.parse(text)
    code = compile(module, "", "exec", flags, dont_inherit=True)
    nodes: dict[tuple[str, int], ast.FunctionDef] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            nodes[node.name, first] = node
    return nodes, set(_codes(code))


class _Replace(ast.NodeTransformer):
    def __init__(self, by: Mapping[ast.AST, ast.AST]) -> None:
        self.by = by

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return self.by.get(node, node)


def _can_be_written(tree: ast.FunctionDef) -> bool:
    """Whether unparse gives the same definition, which some f-strings keep it from in Python 3.11 and older."""
    try:
        return ast.dump(ast.parse(ast.unparse(tree)).body[0]) == ast.dump(tree)
    except (SyntaxError, ValueError):
        return False


def _variable(line: ast.AST) -> str:
    """The variable that a line sets, and nothing else; nothing for another line."""
    targets = line.targets if isinstance(line, ast.Assign) else []
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else ""


def _runs_in_order(loop: ast.AST) -> bool:
    """Whether it is `for layer in …: x = layer(x)`."""
    if not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Name) or loop.orelse or len(loop.body) != 1:
        return False
    variable, layer = _variable(loop.body[0]), loop.target.id
    return variable != layer and ast.unparse(loop.body[0]) == f"{variable} = {layer}({variable})"


def names_in(code: CodeType) -> set[object]:
    """Attributes, globals and strings that a function's code, and code within it, mentions."""
    constants = {constant for inner in _codes(code) for constant in inner.co_consts}
    names = {name for inner in _codes(code) for name in inner.co_names}
    return names.union(constants, *(constant for constant in constants if isinstance(constant, (tuple, frozenset))))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
