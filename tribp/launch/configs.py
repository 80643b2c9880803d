"""What configs of all kernels share: what a reason says, whole blocks and splits, and what a GPU's threads allow.

Every config carries the `reason` it was chosen for, and the reason begins with what it rests on (`basis`):

- "derived": arithmetic on bytes and operations;
- "compiled": the machine code of all of ARCHS, read for registers, spills and shared memory (`python -m bench static`);
- "measured on sm_90": timed on that GPU (`python -m bench tune`, or TRIBP_AUTOTUNE=1); on any other one, derived.
"""

from typing import Any, Protocol

from .arch import ARCHS, ITEMSIZE, Arch, cdiv, power_of_2

BASES = ("derived", "compiled", "measured")
REASON_INTERPRETED = "derived: interpreted, a program takes 6 ms whatever its size"
MAX_TILE = 256  # of a tile's sides, and of a descriptor's
WORKSPACE = 32 << 20  # bytes that partial results may always take; cuDNN's algorithms ask for as much and more
SECOND_AXIS = 65_535  # programs along a grid's second axis


class Config(Protocol):
    """What all configs have."""

    @property
    def reason(self) -> str: ...


def basis(config: Config, arch: Arch) -> str:
    """What a config rests on, on this machine: one of BASES. Raises ValueError if its reason doesn't say."""
    said, colon, _ = config.reason.partition(": ")
    word, _, where = said.partition(" on ")
    if not colon or word not in BASES or (word == "measured") != bool(where):
        raise ValueError(f"a reason begins with one of {', '.join(BASES)}, measured with where: {config.reason!r}")
    holds = {"derived": True, "compiled": arch.name in ARCHS, "measured": arch.name in where.split(", ")}
    return word if holds[word] else "derived"


def fit_block(block: int, size: int) -> int:
    """The block, halved while half of it still covers `size`; a matrix instruction needs 16."""
    return max(16, min(block, power_of_2(size)))


def rows_per_split(m: int, splits: int, block: int) -> int:
    """How many of m rows each split has, in whole blocks; the last one has what is left."""
    return cdiv(cdiv(m, splits), block) * block


def whole_splits(m: int, splits: int, block: int) -> int:
    """As many splits of m rows as are asked for, or fewer: each has whole blocks of them, and none is left without."""
    return cdiv(m, rows_per_split(m, splits, block))


def most_parts(elements: int, dtype: str, spare: int = 0) -> int:
    """Partial results of so many elements that there is room for, in the type that sums are formed in; at least one.

    spare: bytes that they may take if that is more than WORKSPACE.
    """
    return max(1, max(spare, WORKSPACE) // (max(4, ITEMSIZE[dtype]) * elements))


def register_limit(arch: Arch) -> int | None:
    """The limit that makes ptxas take what it needs; compiled, it rounds down to a step of occupancy, and spills."""
    return 255 if arch.backend == "cuda" else None


def registers(elements: int, dtype: str, num_warps: int, arch: Arch) -> int:
    """Registers a thread, for a result of so many elements in the accumulator's type; the interpreter has no end."""
    if arch.backend == "interpreter":
        return 0
    threads = num_warps * (64 if arch.backend == "hip" else 32)
    return elements * (2 if dtype == "float64" else 1) // threads


def is_compilable(config: Any) -> bool:
    """Whether sides of tiles and warps are powers of two, as Triton takes them, and registers as many as ptxas takes.

    Compiled: below 28 it refuses every product, below 90 and 146 some large ones of sm_90 and sm_100.
    """
    sizes = [value for field, value in vars(config).items() if field.startswith("block") or field == "num_warps"]
    limit = getattr(config, "max_registers", None)
    return all(size > 0 and size & (size - 1) == 0 for size in sizes) and (limit is None or 28 <= limit <= 255)


def legal_threads(config: Any, arch: Arch, *, wgmma: bool = True, tile: int = 0) -> bool:
    """Whether the config compiles, and warps and registers are as the GPU has them.

    wgmma: whether tensor cores may be wgmma's, which need four warps. tile: elements of a product's result; a small one
    is not worth more than four.
    """
    if not is_compilable(config):
        return False
    if arch.backend == "interpreter":
        return bool(config.num_warps == 1 and config.max_registers is None)
    least, most = 4 if arch.has_tma and wgmma else 2, 4 if 0 < tile < 64 * 64 else 8
    return least <= config.num_warps <= most and (config.max_registers is None or arch.backend == "cuda")
