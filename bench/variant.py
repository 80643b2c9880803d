"""`--set`: configs with some fields other than the heuristics', to see what they would cost or how fast they are."""

import ast
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any


@contextlib.contextmanager
def variant(settings: Sequence[str]) -> Iterator[None]:
    """Within the block every config has these settings, where it has such fields: "num_warps=4", "Conv.box=(8, 1, 8)".

    What follows from them follows (`adjusted`). Raises ValueError for what is no setting, fits no config that was asked
    for, or makes an illegal one.
    """
    if not settings:
        yield
        return
    from tribp.launch import plan as plans

    with plans.using(_Configs(settings)) as configs:
        yield
    if configs.unused:
        raise ValueError(f"--set {' --set '.join(configs.unused)}: no config that was asked for has such a field")


class _Configs(dict[Any, Any]):
    """The heuristics', with these settings."""

    def __init__(self, settings: Sequence[str]) -> None:
        super().__init__()
        self.unused = dict.fromkeys(settings)

        def parsed(setting: str) -> tuple[str, str, str, Any]:
            name, equals, value = setting.partition("=")
            kind, _, field = name.rpartition(".")
            try:
                return setting, kind, field, ast.literal_eval(value if equals else "")
            except (SyntaxError, ValueError):
                raise ValueError(f"--set takes FIELD=VALUE or KIND.FIELD=VALUE, got {setting!r}") from None

        self._settings = list(map(parsed, settings))

    def get(self, problem: Any, default: Any = None) -> Any:
        kind, config = type(problem).__name__.removesuffix("Problem"), problem.choose()
        names = {field.name for field in fields(config)}
        mine = [(setting, field, value) for setting, of, field, value in self._settings if of in ("", kind)]
        changes = {field: value for _, field, value in mine if field in names}
        if not changes:
            return config
        for setting, field, _ in mine:
            if field in names:
                self.unused.pop(setting, None)
        changed = problem.adjusted(replace(config, **changes))
        if not problem.is_legal(changed):
            raise ValueError(f"--set: {kind} can't be {changed}")
        return changed
