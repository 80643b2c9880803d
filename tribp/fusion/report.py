"""What `fuse` and `unfuse` say they did."""

from dataclasses import dataclass
from typing import NamedTuple


class Replaced(NamedTuple):
    """What stood at a place of the model, and what stands there now."""

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
    """What `fuse` or `unfuse` did, in the order of `named_modules`; a module with several names stands under each.

    Names below a container that has several names itself are given once, by its first.
    """

    replaced: tuple[Replaced, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __str__(self) -> str:
        count = f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"
        return "\n".join(map(str, (count, *self.replaced, *self.skipped)))
