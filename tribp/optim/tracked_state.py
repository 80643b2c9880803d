"""A parameter's state that says when it is changed, or looked at; and states that are made all, or not at all."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch.utils import _pytree

peek: Callable[..., Any] = dict.get  # a look at a state that it does not note


class WatchedState(dict[str, Any]):
    """A dict that notes every change of what it holds, and that somebody has been given it: who has a tensor can
    give it other memory, and no tensor tells. A plan is built on the tensors in it.

    Looking through the states of 1,000 parameters at every step would cost 0.12 ms, and 0.5 at all that can change
    about their memory; being told costs nothing. Its copies are plain dicts.

    changes, accesses: lists that all states of an optimizer share. `peek` is for those who change no memory.
    """

    __slots__ = ("accesses", "changes")

    def __init__(
        self, state: Iterable[Any] = (), changes: list[object] | None = None, accesses: list[object] | None = None
    ) -> None:
        super().__init__(state)
        self.changes = [] if changes is None else changes
        self.accesses = [] if accesses is None else accesses

    def __setitem__(self, key: str, value: Any) -> None:
        if peek(self, key, self) is not value:
            self.changes.append(key)
            self._look()  # whoever has put it there has it
            super().__setitem__(key, value)

    def _look(self) -> None:
        if not self.accesses:
            self.accesses.append(True)

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())  # torch.load(weights_only=True) knows it


@contextlib.contextmanager
def all_or_none(states: MutableMapping[Any, Any]) -> Iterator[None]:
    """If the `with` block raises, remove the states that it has made: another try would take them for begun."""
    before = {p: set(dict.keys(state)) for p, state in states.items() if isinstance(state, dict)}
    try:
        yield
    except BaseException:
        for p, state in [*states.items()]:
            if p not in before:
                del states[p]
            elif isinstance(state, dict):
                for name in set(dict.keys(state)) - before[p]:
                    del state[name]
        raise


def _noted(name: str, changes: bool) -> Callable[..., Any]:
    method = getattr(dict, name)

    def noted(self: WatchedState, *args: Any, **kwargs: Any) -> Any:
        if changes:
            self.changes.append(name)
        self._look()
        return method(self, *args, **kwargs)

    noted.__name__ = name
    return noted


for _name in ("__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(WatchedState, _name, _noted(_name, True))
# With a method of its own in place of dict's `__iter__`, `dict(state)` and `{**state}` read by key.
for _name in ("__getitem__", "__iter__", "get", "items", "values"):
    setattr(WatchedState, _name, _noted(_name, False))

# To `tree_map` only registered types are more than leaves.
_pytree.register_pytree_node(
    WatchedState,
    lambda state: (list(state.values()), list(state)),
    lambda values, keys: dict(zip(keys or (), values, strict=True)),
    serialized_type_name=f"{__name__}.WatchedState",
)
