"""`--set`: configs with some fields other than the heuristics', to see what they would cost or how fast they are."""

import ast
import contextlib
import importlib
import pkgutil
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """kind: of problem; "": of any whose config has the field."""

    text: str
    kind: str
    field: str
    value: Any


@contextlib.contextmanager
def variant(settings: Sequence[str]) -> Iterator[None]:
    """Within the block every config has these settings, where it has such fields: "num_warps=4", "Conv.box=(8, 1, 8)".

    What follows from them follows (`adjusted`). Raises ValueError for what is no setting, at once; and inside of the
    block where a config could not be used, or would not keep the value.
    """
    if not settings:
        yield
        return
    from tribp.launch import plan as plans

    configs = configs_by_kind()
    with plans.using(_Configs([parsed(text, configs) for text in settings])) as used:
        yield
    if used.idle:
        raise ValueError(f"--set {' --set '.join(used.idle)}: nothing that was asked for has such a config")


def configs_by_kind() -> dict[str, type[Any]]:
    """The class of its configs for each kind of problem: those that `choose()` makes."""
    import tribp.launch
    import tribp.ops

    configs = {}
    for package in (tribp.launch, tribp.ops):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name.rpartition(".")[2].startswith(("config", "optim", "reduce")):
                for name, kind in vars(importlib.import_module(module.name)).items():
                    if name.endswith("Problem") and hasattr(kind, "choose"):
                        configs[name.removesuffix("Problem")] = typing.get_type_hints(kind.choose)["return"]
    return configs


def parsed(text: str, configs: dict[str, type[Any]]) -> Setting:
    """Raises ValueError, saying what there is, where no config of this kind has such a field, or such a value."""
    name, equals, literal = text.partition("=")
    kind, _, field = name.rpartition(".")
    if not equals:
        raise ValueError(f"--set takes FIELD=VALUE or KIND.FIELD=VALUE, got {text!r}")
    try:
        value = ast.literal_eval(literal)
    except (SyntaxError, ValueError):
        kinds = "a number, True, False, None or a tuple"
        raise ValueError(f"--set {text}: {field} must be {kinds}, got {literal!r}") from None
    if kind and kind not in configs:
        raise ValueError(f"--set {text}: there is no kind {kind!r}; there are {', '.join(sorted(configs))}")
    asked = [configs[kind]] if kind else list(configs.values())
    types: dict[str, Any] = {each.name: each.type for config in asked for each in fields(config)}
    types.pop("reason", None)
    if field not in types:
        raise ValueError(f"--set {text}: there is no field {field!r}; there are {', '.join(sorted(types))}")
    if not _is_of(value, types[field]):
        called = types[field].__name__ if types[field] in (int, bool) else types[field]
        raise ValueError(f"--set {text}: {field} must be {called}, numbers above 0, got {value!r}")
    return Setting(text, kind, field, value)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether the value has the type that a config's field is declared with; numbers must be above 0."""
    members = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        same = isinstance(value, tuple) and len(value) == len(members)
        return same and all(map(_is_of, value, members))
    if members:
        return any(_is_of(value, member) for member in members)
    return type(value) is kind and (kind is not int or value > 0)


class _Configs(dict[Any, Any]):
    """The heuristics', with these settings."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        super().__init__()
        self._settings = settings
        self.idle = [setting.text for setting in settings]  # that no config has had so far

    def get(self, problem: Any, default: Any = None) -> Any:
        kind, config = type(problem).__name__.removesuffix("Problem"), problem.choose()
        names = {field.name for field in fields(config)}
        mine = [setting for setting in self._settings if setting.kind in ("", kind) and setting.field in names]
        if not mine:
            return config
        self.idle = [text for text in self.idle if all(text != setting.text for setting in mine)]
        # Kernels of this kind may not read what no step varies: it stays as it is, and the setting is refused below.
        free = {*problem.steps(), "max_registers"}
        changed = problem.adjusted(replace(config, **{each.field: each.value for each in mine if each.field in free}))
        for text, _, field, value in mine:
            if (possible := getattr(changed, field)) != value:
                raise ValueError(f"--set {text}: {field} can be {possible!r} beside the others, for {problem}")
        if not problem.is_legal(changed):
            whole = ", ".join(f"{field.name}={getattr(changed, field.name)}" for field in fields(changed)[:5])
            raise ValueError(
                f"--set {' --set '.join(each.text for each in mine)}: no kernel is made with {whole}, for it could "
                f"not run, or would not keep its tiles in registers and shared memory, for {problem}"
            )
        return changed
