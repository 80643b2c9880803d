"""A parameter's state that says when it is changed, or looked at; and states that are made all, or not at all."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from typing import Any
from weakref import WeakMethod

from torch.utils import _pytree

peek: Callable[..., Any] = dict.get  # a look at a state that it does not note


class Notes:
    """What the states of an optimizer's parameters tell: that one was changed, or given to somebody."""

    __slots__ = ("accessed", "changed", "entries", "on_change")

    def __init__(self, entries: Collection[str] | None = None) -> None:
        """entries: the keys that count; whatever else users keep there may come and go. None: all do."""
        self.entries = entries
        self.changed = self.accessed = False
        self.on_change: WeakMethod[Callable[[], object]] | None = None  # called at the first one

    def change(self, key: str | None = None) -> None:
        """key: of what was changed; None where that may be anything."""
        if key is None or self.entries is None or key in self.entries:
            self.accessed = True  # whoever has put it there has it
            first, self.changed = not self.changed, True
            called = self.on_change() if first and self.on_change is not None else None
            if called is not None:
                called()


class WatchedState(dict[str, Any]):
    """A dict that notes every change of what it holds, and that somebody has been given it: who has a tensor can
    give it other memory, and no tensor tells. A plan is built on the tensors in it.

    Looking through the states of 1,000 parameters at every step would cost 0.12 ms, and 0.5 at all that can change
    about their memory; being told costs nothing. Its copies are plain dicts.

    notes: all states of an optimizer share them. `peek` is for those who change no memory.
    """

    __slots__ = ("notes",)

    def __init__(self, state: Iterable[Any] = (), notes: Notes | None = None) -> None:
        super().__init__(state)
        self.notes = Notes() if notes is None else notes

    def __setitem__(self, key: str, value: Any) -> None:
        if peek(self, key, self) is not value:
            super().__setitem__(key, value)
            self.notes.change(key)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other  # of two dicts, the one on the right may say of which class

    __copy__ = dict.copy

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


def _noted(name: str, changes: bool, by_key: bool = False) -> Callable[..., Any]:
    """A method of dict's that is noted. by_key: its first argument says which entry it changes."""
    method = getattr(dict, name)

    def noted(self: WatchedState, *args: Any, **kwargs: Any) -> Any:
        self.notes.accessed = True
        try:
            return method(self, *args, **kwargs)
        finally:
            if changes:
                self.notes.change(args[0] if by_key and args else None)

    noted.__name__ = name
    return noted


for _name in ("__ior__", "clear", "popitem", "update"):
    setattr(WatchedState, _name, _noted(_name, True))
for _name in ("__delitem__", "pop", "setdefault"):
    setattr(WatchedState, _name, _noted(_name, True, by_key=True))
# With a method of its own in place of dict's `__iter__`, whatever copies it (`dict(state)`, `|`, `copy`) reads by key.
for _name in ("__getitem__", "__iter__", "get", "items", "values"):
    setattr(WatchedState, _name, _noted(_name, False))

# To `tree_map` only registered types are more than leaves.
_pytree.register_pytree_node(
    WatchedState,
    lambda state: (list(state.values()), list(state)),
    lambda values, keys: dict(zip(keys or (), values, strict=True)),
    serialized_type_name=f"{__name__}.WatchedState",
)
