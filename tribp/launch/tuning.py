"""What a rule is, and how a measurement takes the place of its answer. Standard library only.

A rule is a function from facts (shapes, a type, the GPU) to settings. Tuning replaces its answer to given facts, and
nothing else: for good, by a *find* (`learn`), or on trial for one thread, within `with hearing({key: settings})`. Both
know facts by a *question*'s key, a text that is the same in every process.

A rule's answer is remembered, so that asking again costs a look-up. Without finds and trials that is all there is.
"""

import dataclasses
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, update_wrapper
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Question:
    """A rule's name, and the facts it was asked about by the names of its parameters."""

    rule: str
    facts: Mapping[str, Any]
    key: str  # rule and facts as text


def _text(fact: object) -> str:
    """A fact as text; of a set, which has no order, in alphabetical order."""
    return "{" + ", ".join(map(repr, sorted(fact))) + "}" if isinstance(fact, frozenset) else repr(fact)


class Hearing:
    """What one thread asks within a `with` block, in the order of asking, and what it is told in place of answers."""

    _numbers = itertools.count(1)

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.questions: dict[str, Question] = {}
        self.number = next(self._numbers)
        self._told = told
        self._nested = False  # a rule that asks another one is one question

    def answer(self, question: Question, answer: Callable[[], Any]) -> Any:
        if self._nested:
            return answer()
        self.questions.setdefault(question.key, question)
        if question.key in self._told:
            return self._told[question.key]
        self._nested = True
        try:
            return answer()
        finally:
            self._nested = False


class Rule:
    """A pure function of hashable facts, whose return annotation is the class of its settings.

    `__call__` is a slot: a call goes straight to the look-up of what was answered before, and no line of Python stands
    between. While any thread holds a hearing, it goes through `_asked` instead.
    """

    __slots__ = ("__call__", "__dict__", "__weakref__", "_answered", "_signature", "function")

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self.function = function
        self._signature = inspect.signature(function)
        self._answered = lru_cache(maxsize=4096)(self._answer)
        self.heed(False)

    def heed(self, hearings: bool) -> None:
        self.__call__ = self._asked if hearings else self._answered

    def _answer(self, *facts: Any, **named: Any) -> Any:
        if _finds and (found := _finds.get(self._question(facts, named).key)) is not None:
            return found
        return self.function(*facts, **named)

    def _asked(self, *facts: Any, **named: Any) -> Any:
        hearing = _hearings.get(threading.get_ident())
        if hearing is None:
            return self._answered(*facts, **named)
        return hearing.answer(self._question(facts, named), lambda: self._answered(*facts, **named))

    def _question(self, facts: tuple[Any, ...], named: dict[str, Any]) -> Question:
        bound = self._signature.bind(*facts, **named)
        bound.apply_defaults()
        given = bound.arguments
        name = self.function.__name__
        return Question(name, given, f"{name}({', '.join(f'{k}={_text(v)}' for k, v in given.items())})")

    def forget(self) -> None:
        self._answered.cache_clear()


_rules: dict[str, Rule] = {}
_finds: dict[str, Any] = {}
_hearings: dict[int, Hearing] = {}  # by thread: what is on trial in one must not reach another
_lock = threading.Lock()
_generation = 0


def rule(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: the function as a rule. Raises ValueError if there is one of its name."""
    name = function.__name__
    if name in _rules:
        raise ValueError(f"there are two rules named {name}")
    _rules[name] = Rule(function)
    return cast(Callable[P, T], _rules[name])


def rules() -> list[str]:
    """The names of all rules of the modules that were imported."""
    return list(_rules)


def rules_answer(question: Question) -> Any:
    """What the rule itself says, whatever was found."""
    return _rules[question.rule].function(**question.facts)


@contextmanager
def hearing(told: Mapping[str, Any] | None = None) -> Iterator[Hearing]:
    """Within the block this thread's questions are recorded, and those whose keys are in `told` answered by it."""
    thread, heard = threading.get_ident(), Hearing(told or {})
    before = _hearings.get(thread)
    _hear(thread, heard)
    try:
        yield heard
    finally:
        _hear(thread, before)


def _hear(thread: int, hearing: Hearing | None) -> None:
    with _lock:
        if hearing is None:
            del _hearings[thread]
        else:
            _hearings[thread] = hearing
        for each in _rules.values():
            each.heed(bool(_hearings))


def learn(finds: Mapping[str, Any]) -> None:
    """From now on these are the answers to the questions of these keys, in every thread."""
    _finds.update(finds)
    _changed()


def forget() -> None:
    """From now on the rules answer every question themselves."""
    _finds.clear()
    _changed()


def _changed() -> None:
    global _generation
    _generation += 1
    for each in _rules.values():
        each.forget()


def known(key: str) -> bool:
    """Whether a find answers the question of this key."""
    return key in _finds


def state() -> tuple[int, int]:
    """What this thread's answers depend on besides the facts: they hold in one state alone.

    It changes with the finds, and every hearing is a state of its own.
    """
    heard = _hearings.get(threading.get_ident()) if _hearings else None
    return _generation, 0 if heard is None else heard.number


def encode(settings: Any) -> dict[str, Any]:
    """Settings as JSON has them."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def decode(key: str, fields: Mapping[str, Any]) -> Any:
    """Settings, as `encode` wrote them, for the question of this key. Raises ValueError for what cannot be such."""
    name = key.partition("(")[0]
    if name not in _rules:
        raise ValueError(f"there is no rule {name}")
    settings = _rules[name].function.__annotations__["return"]
    if not isinstance(fields, Mapping) or set(fields) != {field.name for field in dataclasses.fields(settings)}:
        raise ValueError(f"not the fields of {settings.__name__}: {fields}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if not all(_fits(given[field.name], field.type) for field in dataclasses.fields(settings)):
        raise ValueError(f"no settings of {settings.__name__}: {fields}")
    return settings(**given)


def _fits(value: object, kind: object) -> bool:
    """Whether a field of this type can have the value: a truth, a text, a count, several of them, or none."""
    if kind in (bool, str):
        return type(value) is kind
    if value is None:
        return kind == int | None
    counts = value if isinstance(value, tuple) else (value,)
    return isinstance(value, tuple) == (getattr(kind, "__origin__", None) is tuple) and all(
        type(n) is int and n >= 0 for n in counts
    )
