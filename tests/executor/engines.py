"""The asynchronous units of a machine's CTAs: wgmma queues and tensor copies, and what they see of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import mbarriers
from .arrays import UNSIGNED, Array
from .findings import RefusedError, StoppedError
from .ops_memory import note_readers, note_writers
from .parse import Instruction
from .tensor_copies import POISON, TensorCopies
from .wgmma import WARPGROUP, Product, Wgmma, WgmmaQueue

if TYPE_CHECKING:
    from .machine import Machine

PATIENCE = 20_000  # polls of mbarriers, one after the other in vain
SHARED_MEMORY = 227 * 1024  # bytes that a CTA may have on sm_90; a descriptor's 18 bits of address end at 256 KB


class AsyncProxy:
    """What SharedMemory knows of the bytes that a CTA's asynchronous units read and write, in chunks of 16 bytes."""

    def __init__(self, engines: Engines, cta: int) -> None:
        self.engines, self.cta, self.shared = engines, cta, engines.machine.shared
        self.tag = self.shared.MANY  # whose accesses these are: all warps', unless a thread issued them

    def _flat(self, chunks: Array) -> tuple[Array, Array]:
        flat = np.concatenate([chunks, chunks + 8]) + self.cta * self.shared.pitch
        return flat, np.full(len(flat), self.tag, np.uint8)

    def coming(self, chunks: Array) -> None:
        flat, tags = self._flat(chunks)
        shared = self.shared
        if shared.races:
            for bad, what in zip(shared.note_write(flat, 8, tags), ("written", "read"), strict=True):
                if bad is not None:
                    self.engines.say("race", f"a tensor load overwrites what another warp has {what} since the barrier")
        shared.in_flight(flat, 8)

    def arrived(self, chunks: Array) -> None:
        self.shared.arrived(self._flat(chunks)[0], 8)

    def reads(self, chunks: Array) -> str:
        flat, tags = self._flat(chunks)
        shared = self.shared
        if shared.unset(flat, 8) is not None:
            return "what a copy has yet to bring" if shared.coming(flat, 8).any() else "what nobody has written"
        if shared.races and shared.note_read(flat, 8, tags) is not None:
            return "what another warp has written since the barrier"
        if shared.fences is not None and shared.fences.unfenced(flat, 8):
            return "what was stored without fence.proxy.async since"
        return ""


class CheckedRows:
    """Global memory, as tensor copies read and write it."""

    def __init__(self, engines: Engines) -> None:
        self.engines, self.machine = engines, engines.machine

    def _places(self, addresses: Array, nbytes: int, what: str) -> tuple[Array, Array, int]:
        """Which rows may be touched, the places of their pieces, and the bytes of a piece."""
        _, inside = self.machine.memory.check(addresses, nbytes)
        if not inside.all():
            detail = f"a tensor {what} of {nbytes} bytes at {int(addresses[~inside][0]):#x} leaves the tensors"
            self.engines.say("out of bounds", detail, int((~inside).sum()))
        unit = next(n for n in (8, 4, 2, 1) if nbytes % n == 0 and not (addresses % n).any())
        return inside, (addresses[inside][:, None] + np.arange(0, nbytes, unit)).ravel(), unit

    def _note(self, note: Callable[..., None], pieces: Array, *size: int) -> None:
        if len(pieces):
            ranges, _ = self.machine.memory.check(pieces, 1)
            note(self.machine, np.full(len(pieces), self.engines.thread), pieces, ranges, *size)

    def gather(self, addresses: Array, nbytes: int) -> Array:
        inside, pieces, unit = self._places(addresses, nbytes, "load")
        self._note(note_readers, pieces)
        rows = np.full((len(addresses), nbytes), POISON, np.uint8)
        rows[inside] = self.machine.memory.load(pieces, unit).view(np.uint8).reshape(-1, nbytes)
        return rows

    def scatter(self, addresses: Array, rows: Array) -> None:
        inside, pieces, unit = self._places(addresses, rows.shape[1], "store")
        self._note(note_writers, pieces, unit)
        values = np.ascontiguousarray(rows[inside]).view(UNSIGNED[unit]).ravel()
        self.machine.memory.store(pieces, values, unit)


class Engines:
    """The units of all CTAs. `thread` is the one whose instruction is under way, for reports."""

    def __init__(self, machine: Machine) -> None:
        self.machine, shared = machine, machine.shared
        if shared.size > SHARED_MEMORY:
            raise RefusedError(f"{shared.size} bytes of shared memory; a CTA may have {SHARED_MEMORY}")
        self.thread = self.polls = 0
        self.fenced: dict[int, list[Array | None]] = {}  # by warpgroup: all registers at its last wgmma.fence
        self.smem = [shared.bytes[shared.part(c)] for c in range(machine.C)]
        self.proxies = [AsyncProxy(self, c) for c in range(machine.C)]
        late, rows = machine.options.copies == "late", CheckedRows(self)
        each = list(zip(self.smem, self.proxies, strict=True))
        self.copies = [TensorCopies(smem, rows, self._asynchrony, proxy, late) for smem, proxy in each]
        self.queues = [
            WgmmaQueue(smem, self._asynchrony, proxy, late, machine.options.truncate)
            for smem, proxy in each
            for _ in range(machine.per_cta // WARPGROUP)
        ]

    def say(self, kind: str, sentence: str, count: int = 1) -> None:
        self.machine.problem(kind, self.thread, sentence, count=count)

    def _asynchrony(self, sentence: str) -> None:
        self.say("asynchrony", sentence)

    def finish(self) -> None:
        for queue in self.queues:
            queue.finish()
        for copies in self.copies:
            copies.finish()

    # wgmma.

    def fence(self, active: Array | None) -> None:
        """wgmma.fence"""
        registers = list(self.machine.regs)
        for g in self.warpgroups(active):
            self.queues[g].fence()
            self.fenced[g] = registers

    def commit(self, active: Array | None) -> None:
        """wgmma.commit_group"""
        for g in self.warpgroups(active):
            self.queues[g].commit()

    def _check_fenced(self, g: int, numbers: Sequence[int], where: str) -> None:
        """Whether the registers of A hold what they held at the warpgroup's last wgmma.fence."""
        then, now = self.fenced.get(g, self.machine.regs), self.machine.regs
        part = part_of(g)
        for n in numbers:
            old, new = then[n], now[n]
            if old is not new and (old is None or new is None or not np.array_equal(old[part], new[part])):
                self._asynchrony(f"{where}: the registers with operand A were changed without a wgmma.fence since")

    def warpgroups(self, active: Array | None) -> list[int]:
        numbers: list[int] = self.machine.groups(active, WARPGROUP, "warpgroup").tolist()
        return numbers

    def registers(self, numbers: Sequence[int]) -> Array:
        """(registers, threads); of those that were never written, zeros."""
        missing = np.zeros(self.machine.T, np.uint32)
        return np.stack([missing if (v := self.machine.regs[n]) is None else v for n in numbers])

    def _of_warpgroup(self, g: int, numbers: Sequence[int]) -> Array:
        return self.registers(numbers)[:, part_of(g)]

    def _assign(self, numbers: Sequence[int], of_group: dict[int, Array]) -> None:
        """New values of the registers, (registers, 128), in some warpgroups."""
        values = self.registers(numbers)
        active = np.zeros(self.machine.T, np.bool_)
        for g, new in of_group.items():
            values[:, part_of(g)] = new
            active[part_of(g)] = True
        for n, value in zip(numbers, values, strict=True):
            self.machine.set(self.machine.kernel.registers[n], value, None if active.all() else active)

    def mma(
        self, form: Wgmma, i: Instruction, dest: tuple[int, ...], a_registers: tuple[int, ...],
        reads: Sequence[Callable[[Machine], Array]], active: Array | None,
    ) -> None:  # fmt: skip
        """reads: B's descriptor, whether to accumulate, the signs of A and B, which are transposed; A's descriptor."""
        d, left = self.registers(dest), self.registers(a_registers) if a_registers else None
        values = [np.broadcast_to(read(self.machine), self.machine.T) for read in reads]
        results = {}
        for g in self.warpgroups(active):
            self.thread, part = g * WARPGROUP, part_of(g)
            b, accumulate, sign_a, sign_b, *more = (self._uniform(v[part]) for v in values)
            a = more.pop() if left is None else np.ascontiguousarray(left[:, part])
            self._check_fenced(g, a_registers, f"line {i.line}")
            trans_a, trans_b = [0] * (2 - len(more)) + more
            product = Product(
                form, dest, a, b, (trans_a, trans_b), -1 if sign_a != sign_b else 1, f"line {i.line}", a_registers
            )
            results[g] = self.queues[g].issue(product, np.ascontiguousarray(d[:, part]), bool(accumulate))
        self._assign(dest, results)
        self.machine.counts.matrix[i.opcode] += len(results)
        in_memory = form.n if a_registers else form.n + 64
        self.machine.counts.operands += len(results) * in_memory * form.k * form.itemsize

    def _uniform(self, values: Array) -> int:
        if (values != values[0]).any():
            self.say("divergence", "an operand of a wgmma differs between the warpgroup's threads")
        return int(values[0])

    def wait(self, pending: int, active: Array | None) -> None:
        """wgmma.wait_group"""
        results: dict[Any, dict[int, Array]] = {}
        for g in self.warpgroups(active):
            self.thread = g * WARPGROUP
            for dest, d in self.queues[g].wait(pending, functools.partial(self._of_warpgroup, g)):
                results.setdefault(dest, {})[g] = d
        for numbers, of_group in results.items():
            self._assign(numbers, of_group)

    # mbarriers.

    def touch(self, thread: int, address: int, write: bool) -> None:
        """A thread initializes or invalidates an mbarrier, or uses it: barriers must lie between these."""
        shared, self.thread = self.machine.shared, thread
        if address % 8 or not shared.races:
            return
        flat = np.array([self.machine.cta[thread] * shared.pitch + address])
        tag = self.machine.warp_tag[thread : thread + 1]
        if write and any(bad is not None for bad in shared.note_write(flat, 8, tag)):
            self.say("race", "changes an mbarrier that another warp has used since the barrier")
        if not write and shared.note_read(flat, 8, tag) is not None:
            self.say("race", "uses an mbarrier that another warp has changed since the barrier")

    def poll(self, address: Array, parity: Array, active: Array | None) -> Array:
        """mbarrier.try_wait.parity: the predicate of every thread."""
        machine = self.machine
        threads = machine.threads(active)
        done = np.zeros(machine.T, np.bool_)
        cta, address, parity = (np.broadcast_to(v, machine.T)[threads] for v in (machine.cta, address, parity & 1))
        key = cta.astype(np.int64) << 33 | address.astype(np.int64) << 1 | parity
        for value in np.unique(key).tolist():
            here, at = threads[key == value], value >> 1 & 0xFFFFFFFF
            for thread in here[np.unique(here >> 5, return_index=True)[1]].tolist():
                self.touch(thread, at, False)
            done[here] = self.copies[value >> 33].try_wait(at, value & 1)
        self.polls = 0 if done.any() else self.polls + 1
        if self.polls > PATIENCE:
            barrier = mbarriers.Mbarrier.at(self.smem[int(cta[0])], int(address[0]))
            raise StoppedError(f"nobody completes the phase: {barrier}")
        return done


def part_of(group: int) -> slice:
    """The threads of a warpgroup."""
    return slice(group * WARPGROUP, (group + 1) * WARPGROUP)
