"""What `fuse` and `unfuse` say they did."""

from dataclasses import dataclass, field
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
    layers: how many linear layers and 3×3 convolutions the model has, after `fuse`. taken: how many of these tribp's
    functions run now, those of an earlier `fuse` among them. Reports that differ in these alone are equal.
    """

    replaced: tuple[Replaced, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    taken: int = field(default=0, compare=False)
    layers: int = field(default=0, compare=False)

    def __str__(self) -> str:
        count = f"{self.taken} of {self.layers} layers run by tribp" if self.layers else f"{len(self.replaced)} changed"
        count += f", {len(self.skipped)} skipped"
        return "\n".join(map(str, (count, *self.replaced, *self.skipped)))
