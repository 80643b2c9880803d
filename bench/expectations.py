"""What machine code must show. A check looks at one compiled kernel and says what is wrong, or None."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tribp.launch.arch import Arch

from .sass import COPIES, LOADS, MATRIX, STORES, Loop
from .wgmma import EXPECTED

if TYPE_CHECKING:
    from tribp.launch.launches import Launch as Launch
else:
    Launch = Any  # the module imports triton, which `bench run` can do without


@dataclass(frozen=True)
class Compiled:
    """What the checks and the table need to know of one compiled kernel."""

    shared_limit: int
    registers: int = 0
    spilled: int = 0  # bytes a thread that go to local memory (NVIDIA: stores; AMD: scratch memory)
    shared_memory: int = 0
    instructions: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    loops: tuple[Loop, ...] = ()  # the innermost ones around matrix instructions
    wgmma: Mapping[str, str] = field(default_factory=dict)  # what is wrong with asynchronous products: `wgmma.faults`
    unawaited: str = ""  # what accesses memory before a kernel that is launched early has waited
    error: str = ""  # what the compiler said, if it gave up


class Expectation(NamedTuple):
    """A check, and why this kernel has to pass it."""

    name: str
    check: Callable[[Compiled], str | None]
    reason: str


def _spills(code: Compiled) -> str | None:
    inside = sum(loop.spills for loop in code.loops)
    return f"{code.spilled} bytes a thread, {inside} accesses in the loop" if code.spilled else None


def _shared_memory(code: Compiled) -> str | None:
    over = code.shared_memory > code.shared_limit
    return f"needs {code.shared_memory} bytes of shared memory, has {code.shared_limit}" if over else None


def _pipelined(code: Compiled) -> str | None:
    """Loads run ahead: each multiplying loop issues loads, and so does the code on the way into it.

    The second half is the evidence. A loop that loads a tile, waits and multiplies has copies in its body as well, but
    none before it. Where loads pass through registers (prefetch by hand), the body must besides issue the next ones
    before its last multiplication, or they overlap with nothing.
    """
    if not code.loops:
        return "no loop multiplies"
    for loop in code.loops:
        if not loop.loads:
            return "a loop multiplies without loading"
        if not loop.loads_before:
            return f"{loop.loads} loads in the loop and none ahead of it"
        if not loop.loads_early and not COPIES & code.counts.keys():
            return "the loop loads only after its last multiplication"
    return None


def accesses(code: Compiled, kind: str, *widths: str) -> int:
    """How many "loads" or "stores" are of these widths: ".128" is 16 bytes, "" any."""
    names = LOADS if kind == "loads" else STORES
    return sum(code.counts.get(name + width, 0) for name in names for width in widths)


NO_SPILLS = Expectation("spills", _spills, "a spilled register costs a trip through memory in the loop")
SHARED_MEMORY = Expectation("shared memory", _shared_memory, "a launch that needs more is refused")
AWAITED = Expectation(
    "the launch before", lambda code: code.unawaited or None, "what it writes may not be there, or still be read"
)
ALWAYS = (NO_SPILLS, SHARED_MEMORY, AWAITED)
ASYNCHRONOUS = tuple(
    Expectation(name, lambda code, name=name: code.wgmma.get(name), reason)  # type: ignore[misc]
    for name, reason in EXPECTED.items()
)
PIPELINED = Expectation("pipelined", _pipelined, "otherwise every step waits for global memory")


def always(arch: Arch) -> Sequence[Expectation]:
    """What every kernel has to keep on this target."""
    return (*ALWAYS, *ASYNCHRONOUS) if arch.has_wgmma else ALWAYS


def wide(kind: str, bits: int, reason: str) -> Expectation:
    """At least half of the "loads" or "stores" are so wide; the rest are vectors, a bias or its gradient."""

    def check(code: Compiled) -> str | None:
        if kind == "stores" and code.counts.get("UTMASTG"):
            return None
        share = accesses(code, kind, *(f".{n}" for n in (64, 128) if n >= bits)) / max(1, accesses(code, kind, ""))
        return None if share >= 0.5 else f"{share:.0%} of the {kind} are {bits // 8} bytes wide"

    return Expectation(f"wide {kind}", check, reason)


def vectors(loads: int, stores: int, reason: str) -> Expectation:
    """At least so many loads and stores are 16 bytes wide, whatever else there is: another path may be narrow."""

    def check(code: Compiled) -> str | None:
        seen = accesses(code, "loads", ".128"), accesses(code, "stores", ".128")
        if seen[0] >= loads and seen[1] >= stores:
            return None
        return f"{seen[0]} loads and {seen[1]} stores are 16 bytes wide, of {loads} and {stores}"

    return Expectation("vectors", check, reason)


def multiplies_with(*instructions: str, reason: str) -> Expectation:
    """The multiplying loops use one of these matrix instructions."""
    assert set(instructions) <= MATRIX

    def check(code: Compiled) -> str | None:
        if not set(instructions) & code.counts.keys():
            return f"no {' or '.join(instructions)} instruction"
        inside = any(loop.matrix for loop in code.loops)
        return None if inside else "matrix instructions, but outside every loop"

    return Expectation("matrix instructions", check, reason)


def product(rows: int, dtype: torch.dtype, launch: Launch, arch: Arch) -> Iterator[Expectation]:
    """A product's loop is on tensor cores. rows: of the first operand's tile."""
    # Two warps go to mma.sync.
    if matrix := matrix_instructions(rows if launch.num_warps >= 4 else 0, dtype, arch):
        yield multiplies_with(*matrix[0], reason=matrix[1])


def partial_sums(launch: Launch) -> Iterator[Expectation]:
    """Of `reduce_partials`, and of `output`."""
    if all(row_bytes(launch, "partials", vec) == 16 for vec in ("VEC", "VEC2") if vec in launch.settings):
        yield wide("loads", 128, "rows of partial sums are multiples of 16 bytes")


def matrix_instructions(rows: int, dtype: torch.dtype, arch: Arch) -> tuple[Sequence[str], str] | None:
    """Which matrix instructions a product may use whose tile has so many rows, and why those."""
    if arch.backend == "hip":
        return ["v_mfma"], "gfx942 multiplies every float type on its matrix cores"
    if dtype == torch.float64:
        if arch.capability >= 100:
            return None  # sm_100 has no float64 tensor core that Triton reaches: DFMA
        return ["DMMA"], "float64 has tensor cores on sm_80 and sm_90"
    if arch.capability < 90:
        return ["HMMA"], "mma.sync is what sm_80 has; without it a product runs at a sixteenth of the rate"
    own = "HGMMA" if arch.capability < 100 else "UTCHMMA"
    if dtype.itemsize == 2 and rows >= 64:
        return [own], "wgmma and tcgen05 take tiles of 64 rows and more; mma.sync has about half their rate"
    return [own, "HMMA"], "a tile under 64 rows, or float32 operands that lie the wrong way round, go to mma.sync"


def tile_stores(launch: Launch, out: str, sides: Sequence[str], arch: Arch) -> Iterator[Expectation]:
    """How wide a product has to store a tile of the argument `out`, whose sides have these names."""
    dtype = launch.named[out].dtype
    share = size(launch.named, *sides) * dtype.itemsize // threads(launch, arch)  # bytes that a thread holds
    if row_bytes(launch, out, "VEC_STORE") < 16 or share < 32:
        return  # rows that are no multiple of 16 bytes, or a tile too small to be worth rearranging
    if arch.backend == "cuda":
        yield wide("stores", 128, "rows are multiples of 16 bytes")
    # The matrix cores spread a row of float64 over the lanes, and Triton stores it as it lies.
    elif dtype != torch.float64:
        yield wide("stores", 8 * min(16, 4 * dtype.itemsize), "the matrix cores leave four neighbours in a thread")


# -- a launch's sizes -------------------------------------------------------------------------------------------------


def size(given: Mapping[str, Any], *names: str) -> int:
    return math.prod(given[name] for name in names)


def threads(launch: Launch, arch: Arch) -> int:
    return launch.num_warps * (64 if arch.backend == "hip" else 32)


def row_bytes(launch: Launch, argument: str, vec: str) -> int:
    """Bytes of so many elements of an argument as the constant `vec` says lie side by side."""
    tensor = launch.named[argument]
    assert isinstance(tensor, Tensor)
    return int(launch.named[vec]) * tensor.element_size()


def is_whole(given: Mapping[str, Any], dtype: torch.dtype, *names: str) -> bool:
    """Whether each of these numbers of elements makes 16 bytes; one that a kernel has not does."""
    return all(given[name] * dtype.itemsize == 16 for name in names if given.get(name) is not None)


def broken(code: Compiled, expectations: Iterable[Expectation]) -> list[str]:
    """One sentence for each expectation that does not hold, with its reason."""
    if code.error:
        return [f"does not compile: {code.error}"]
    return [f"{name}: {wrong} ({reason})" for name, check, reason in expectations if (wrong := check(code)) is not None]
