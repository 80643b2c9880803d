"""What `fuse` and `unfuse` say they did."""

from dataclasses import dataclass
from typing import NamedTuple


class Replaced(NamedTuple):
    """What computed at a place of the model, and what does now: another class, or one function for several modules."""

    name: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.was} -> {self.now}"


class Skipped(NamedTuple):
    """What was skipped at a place of the model, and why."""

    name: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.module} skipped: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What `fuse` or `unfuse` did, in the order of `named_modules`; a module with several names is listed under each.

    replaced: what computes otherwise than before. `fuse` leaves every module in its place, and only changes classes.
    Names below a container that has several names itself are given once, by its first.
    """

    replaced: tuple[Replaced, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __str__(self) -> str:
        count = f"{len(self.replaced)} changed, {len(self.skipped)} skipped"
        return "\n".join(map(str, (count, *self.replaced, *self.skipped)))
