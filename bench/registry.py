"""The operations that are measured, and what an operation must provide to be among them.

To add one: a file beside `linear.py` that ends in `OPERATION = Operation(…)`, and a line in `_MODULES` below. What is
no differentiable function provides `Measured` itself, as `optim.py` does.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tribp.dispatch import dtype_name
from tribp.launch.arch import Arch

if TYPE_CHECKING:  # both import triton, which `run` can do without
    from tribp.launch.plan import Launch

    from .expectations import Expectation
    from .meters import Meter
    from .results import Row
    from .run import Ceilings, Options

# From a kernel to a function of a launch's arguments and constants by name, and of its grid: parts of `LaunchWork`.
KernelWork = Mapping[Any, Callable[[Mapping[str, Any], tuple[int, ...]], dict[str, Any]]]

_MODULES = {"linear": "bench.linear", "conv": "bench.conv", "optim": "bench.optim"}


@dataclass(frozen=True)
class KernelTests:
    """The tests of one operation's kernels: files, and pytest's -k.

    compute-sanitizer slows kernels down 10 to 50 times and instruments each when it is loaded, so that a test costs a
    second or two: some forty tests of bfloat16, in which every kernel and form is met, should take a minute
    (unmeasured). Left out: what the profiler counts (both tools want the same interface), graphs (capture needs the
    caching allocator), and what fills a GPU.
    """

    gpu: Sequence[str]  # the GPU's own tests, those of huge tensors and of many shapes aside
    checked: Sequence[str]  # for compute-sanitizer
    smoke: Sequence[str]


class Named(Protocol):
    """A case, as far as all commands know it."""

    @property
    def name(self) -> str: ...

    @property
    def dtype_name(self) -> str: ...


class Measured(Protocol):
    """What `run` and `static` need to know of an entry: `Operation` is that for differentiable functions."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def cases(self) -> Sequence[Any]:
        """`Named` ones, the most valuable first: a run may be cut off."""

    @property
    def smoke_cases(self) -> Sequence[Any]: ...

    @property
    def peers(self) -> Sequence[str]:
        """Whose ratios the picture shows."""

    @property
    def legend(self) -> str:
        """What the table's numbers are."""

    @property
    def tests(self) -> KernelTests:
        """What `bench all` runs on a GPU, and under compute-sanitizer."""

    @property
    def switches(self) -> Sequence[str]:
        """Arguments and constants of the kernels that settings show by name where they are on."""

    def kernel_work(self) -> "KernelWork":
        """What a launch of each of its kernels does, for the model; imports triton."""

    def unmeasured(self) -> "list[Row]":
        """Rows of all cases and directions as `measure` makes them, with nothing in them measured."""

    def static_cases(self, arch: Arch, everything: bool, /) -> "Iterable[StaticCase]":
        """Those for a target; `everything`: all there are, not a selection."""

    def measure(self, case: Any, options: "Options", meter: "Meter", ceilings: "Ceilings") -> "list[Row]":
        """One case, measured."""

    def table(self, rows: "Sequence[Row]") -> str: ...


@dataclass(frozen=True)
class Case:
    """One thing to measure: a shape (what its numbers mean is the operation's business), a type, a precision."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tf32: bool = False
    small: bool = False  # launch-bound: also timed under a CUDA graph, and on the host

    @property
    def dtype_name(self) -> str:
        name = dtype_name(self.dtype)
        return f"{name} tf32" if self.tf32 else name

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype_name}"


@dataclass(frozen=True)
class Work:
    """The least that must be done: bytes read and written once, and multiplications and additions of `dtype`."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Reference:
    """A float64 result, and the size its error is measured against (the norm of a sum's terms, where it can cancel)."""

    value: Tensor
    scale: float


@dataclass(frozen=True)
class Target:
    """tribp is to be `ratio` times as fast as `peer` ("eager", "compile" …), or to use that much less memory.

    Of what memory bounds also: the part of the copy's bandwidth. Of an optimizer's step also: how many launches, and
    what part of the peer's memory between steps, it may take.
    """

    peer: str
    ratio: float
    quantity: str = "time"  # or "memory", "bandwidth", "launches", "held memory"


class Problem(Protocol):
    """One case with fresh random inputs. A contender is given as the function it runs."""

    def reference(self) -> Mapping[str, Reference]:
        """The float64 results, by name."""

    def results(self, function: Callable[..., Any], direction: str) -> Mapping[str, Tensor]:
        """What the contender computes in this direction, by the names of the reference."""

    def action(self, function: Callable[..., Any], direction: str) -> Callable[[], object]:
        """The same as a call to be timed. Preparations (the forward pass of a backward) run now, on this stream."""

    def tolerance(self, name: str) -> tuple[float, bool]:
        """The largest relative error, and whether twice the error of torch is the stricter or the laxer bound."""


@dataclass(frozen=True)
class StaticCase:
    """A launch to compile for a GPU that is not there, and what must be seen in its machine code."""

    name: str
    launch: "Launch"
    expectations: "Sequence[Expectation]"


@dataclass(frozen=True)
class Operation:
    name: str
    summary: str
    cases: Sequence[Case]  # the most valuable first: a run may be cut off
    smoke_cases: Sequence[Case]
    directions: Sequence[str]
    contenders: Mapping[str, Callable[..., Any]]  # "tribp" and "eager"; "compile" is made of "eager"
    problem: Callable[[Any, torch.device], Problem]  # of one of the cases, as the next three
    work: Callable[[Any, str], Work]
    targets: Callable[[Any, str], Sequence[Target]]
    launches: Callable[[Any, str, Arch], "Sequence[Launch]"]  # tribp's, on tensors without memory, but not of "both"
    static_cases: Callable[[Arch, bool], Iterable[StaticCase]]  # for a target; True: all there are, not a selection
    tests: KernelTests
    switches: Sequence[str]  # arguments and constants of kernels that settings show where they are on
    kernel_work: Callable[[], KernelWork]  # of each of its kernels, for the model

    peers = ("eager", "compile")
    legend: str = (
        "Times are medians in µs on the device, L2 flushed. Ratios are the other's time over tribp's. The floor is "
        "bytes over the copy's rate, or operations over the product's, whichever is more."
    )

    def settings(self, case: Case, direction: str, arch: Arch) -> list[str]:
        """How tribp launches it, for the record."""
        from .compiled import describe

        return [f"{x.kernel.__name__} {describe(x)}" for x in self.all_launches(case, direction, arch)]

    def all_launches(self, case: Case, direction: str, arch: Arch) -> "list[Launch]":
        """The launches of any direction, "both" among them."""
        parts = ["forward", "backward"] if direction == "both" else [direction]
        return [launch for part in parts for launch in self.launches(case, part, arch)]

    def measure(self, case: Case, options: "Options", meter: "Meter", ceilings: "Ceilings") -> "list[Row]":
        from .run import measure

        return measure(self, case, options, meter, ceilings)

    def unmeasured(self) -> "list[Row]":
        from .results import row

        nothing: dict[str, Any] = {"tribp": {}}
        return [row(self, case, way, nothing, 1.0, 1.0) for case in self.cases for way in self.directions]

    def table(self, rows: "Sequence[Row]") -> str:
        from .results import table

        return table(rows)


def names() -> list[str]:
    return list(_MODULES)


def find(wanted: Sequence[str]) -> list[Measured]:
    """The operations of these names, or all of them.

    Raises ValueError for a name that does not exist, and TypeError for an operation that lacks part of `Measured`.
    """
    for name in wanted:
        if name not in _MODULES:
            raise ValueError(f"no operation is called {name!r}; there are: {', '.join(_MODULES)}")
    return [_registered(_MODULES[name]) for name in wanted or _MODULES]


def _registered(module: str) -> Measured:
    operation: Measured = importlib.import_module(module).OPERATION
    lacking = [name for name in vars(Measured) if not name.startswith("_") and not hasattr(operation, name)]
    if lacking:
        raise TypeError(f"{module}.OPERATION must have all of bench.registry.Measured, and lacks {', '.join(lacking)}")
    return operation


def switches() -> list[str]:
    """Those of all operations, each once."""
    return list(dict.fromkeys(switch for operation in find([]) for switch in operation.switches))
