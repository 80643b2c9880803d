"""Puts tribp's optimizers in the place of torch's, for scripts that can't be edited."""

from collections.abc import Iterator

import torch

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .asgd import ASGD
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD

CLASSES: tuple[type[torch.optim.Optimizer], ...] = (
    SGD, RMSprop, Adagrad, Adam, AdamW, Adadelta, Adamax, NAdam, RAdam, Rprop, ASGD,
)  # fmt: skip


class Patch(tuple[str, ...]):
    """The names that a call of `patch` replaced; a `with` block puts them back at its end."""

    __slots__ = ()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: object) -> None:
        _put_back(self)


def patch() -> Patch:
    """Make `torch.optim.Adam` be `tribp.optim.Adam`, and so every class that tribp has, until `unpatch()`.

    What has been imported by name before (`from torch.optim import Adam`) stays torch's, and so do optimizers that were
    made before, which are no instances of the new classes. Returns the names that were replaced: not those that were
    replaced already, or that something else had put another class at. The end of a `with` block undoes it:

        with tribp.optim.patch():
            trainer = Trainer(model, optimizer="AdamW")
    """
    replaced: list[str] = []
    try:
        for name, torchs, ours in _pairs():
            if getattr(torch.optim, name) is torchs:
                replaced.append(name)
                setattr(torch.optim, name, ours)
    except BaseException:  # Ctrl-C: nobody has the names, to put them back
        _put_back(replaced)
        raise
    return Patch(replaced)


def unpatch() -> tuple[str, ...]:
    """Put torch's classes back; returns the names of those that were tribp's."""
    return _put_back([name for name, _, _ in _pairs()])


def _put_back(names: "Patch | list[str]") -> tuple[str, ...]:
    back = []
    for name, torchs, ours in _pairs():
        if name in names and getattr(torch.optim, name) is ours:
            setattr(torch.optim, name, torchs)
            back.append(name)
    return tuple(back)


def _pairs() -> Iterator[tuple[str, type, type]]:
    """A name in torch.optim, torch's class of that name, tribp's, which inherits from it."""
    for ours in CLASSES:
        for base in ours.__mro__:
            if base.__name__ == ours.__name__ and base.__module__.startswith("torch.optim."):
                yield ours.__name__, base, ours
