"""mbarriers (PTX ISA 9.7.13.15): their state is in the shared memory where the program put them: overwriting it shows.

The state is opaque in the ISA. Here: bit 0 the parity of the phase under way, 1–20 pending arrivals, 21–40 expected
arrivals, 41–62 bytes still to come (two's complement), 63 initialized. `smem` is one CTA's shared memory, as bytes.
"""

import struct
from dataclasses import dataclass

from .arrays import Array
from .findings import RefusedError

_COUNT = (1 << 20) - 1
_BYTES = 1 << 22
_INVALID = (1 << 64) - 1


@dataclass
class Mbarrier:
    """The state of one. Raises RefusedError where there is none."""

    smem: Array
    address: int
    parity: int = 0
    pending: int = 0
    expected: int = 0
    coming: int = 0  # bytes

    @classmethod
    def at(cls, smem: Array, address: int) -> "Mbarrier":
        _check_place(address)
        (bits,) = struct.unpack_from("<Q", smem, address)
        if not bits >> 63 or bits == _INVALID:
            raise RefusedError(
                f"no mbarrier at {address:#x}: never initialized, invalidated, or overwritten ({bits:#x})"
            )
        coming = bits >> 41 & (_BYTES - 1)
        coming -= _BYTES if coming >= _BYTES // 2 else 0
        return cls(smem, address, bits & 1, bits >> 1 & _COUNT, bits >> 21 & _COUNT, coming)

    def put(self) -> None:
        if not -(1 << 20) < self.coming < 1 << 20:
            raise RefusedError(f"mbarrier at {self.address:#x}: {self.coming} bytes to come, out of range")
        if self.pending == 0 and self.coming == 0:  # the phase is complete: 9.7.13.15.5
            self.parity, self.pending = self.parity ^ 1, self.expected
        bits = 1 << 63 | (self.coming & (_BYTES - 1)) << 41 | self.expected << 21 | self.pending << 1 | self.parity
        struct.pack_into("<Q", self.smem, self.address, bits)

    def __str__(self) -> str:
        return (
            f"mbarrier at {self.address:#x}: phase of parity {self.parity}, {self.pending} of {self.expected} "
            f"arrivals, {self.coming} bytes to come"
        )


def _check_place(address: int) -> None:
    if address % 8:
        raise RefusedError(f"mbarrier at {address:#x}: not a multiple of 8")


def init(smem: Array, address: int, count: int) -> None:
    _check_place(address)
    if not 0 < count <= _COUNT:
        raise RefusedError(f"mbarrier.init at {address:#x} with count {count}")
    Mbarrier(smem, address, pending=count, expected=count).put()


def invalidate(smem: Array, address: int) -> None:
    Mbarrier.at(smem, address)
    struct.pack_into("<Q", smem, address, _INVALID)


def arrive(smem: Array, address: int, count: int = 1) -> None:
    barrier = Mbarrier.at(smem, address)
    if count > barrier.pending:
        raise RefusedError(f"mbarrier at {address:#x}: {count} arrivals where {barrier.pending} are pending")
    barrier.pending -= count
    barrier.put()


def expect_bytes(smem: Array, address: int, nbytes: int) -> None:
    """Of a copy that is to come; negative ones have come. Completes the phase if no arrival is pending."""
    barrier = Mbarrier.at(smem, address)
    barrier.coming += nbytes
    barrier.put()


def passed(smem: Array, address: int, parity: int) -> bool:
    """test_wait.parity: whether the phase of this parity is complete, which the one under way is not."""
    return Mbarrier.at(smem, address).parity != parity & 1
