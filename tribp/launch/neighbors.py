"""Configs worth trying in place of a given one: one step away, and legal.

A *problem* is a record of what a config is chosen for: shapes, types and the GPU. Its class says four things:

- `choose()`: the heuristic's config;
- `is_legal(config)`: whether kernels compute correctly with it, and what was seen to spill is left out;
- `adjusted(config)`: the config with what follows from its other fields brought in line (stages that memory holds, the
  box that belongs to a tile, whole splits);
- `steps()`: the fields to vary, and how.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

C = TypeVar("C")
Steps = Mapping[str, Callable[[Any], Iterator[Any]]]  # for a field's name: from its value to those beside it


class Problem(Protocol[C]):
    def choose(self) -> C: ...
    def steps(self) -> Steps: ...
    def adjusted(self, config: C) -> C: ...
    def is_legal(self, config: C) -> bool: ...


def neighbors(problem: Problem[C], config: C) -> list[C]:
    """In a fixed order, each once; `config` itself is none of them."""
    legal: dict[C, None] = {}
    for field, step in problem.steps().items():
        for value in step(getattr(config, field)):
            other = problem.adjusted(replace(config, **{field: value}))  # type: ignore[type-var]
            if other != config and problem.is_legal(other):
                legal[other] = None
    return list(legal)


def differs_by_steps(problem: Problem[C], config: C) -> bool:
    """Whether what no step varies is as the heuristic chooses it, but for the reason."""
    varied = {field: getattr(config, field) for field in (*problem.steps(), "reason")}
    return config == replace(problem.choose(), **varied)  # type: ignore[type-var]


def by_two(value: int) -> Iterator[int]:
    """Half of it, and twice."""
    if value > 1:
        yield value // 2
    yield value * 2


def by_one(value: int) -> Iterator[int]:
    yield value - 1
    yield value + 1


def toggled(value: bool) -> Iterator[bool]:
    yield not value


def all_registers(value: int | None) -> Iterator[int | None]:
    """With and without letting a thread take all registers there are."""
    yield None if value else 255
