"""What runs on by itself: cp.async, tensor copies, mbarriers, wgmma; and the fences that order it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import mbarriers
from .arrays import UNSIGNED, Array, log2
from .engines import Engines
from .findings import RefusedError
from .ops import PARAM_WINDOW, Act, op, reader
from .ops_memory import address_reader, global_places, note_readers, note_shared_write, shared_places
from .parse import Instruction, Reg, Vector
from .tensor_copies import TensorCopies
from .wgmma import Wgmma

if TYPE_CHECKING:
    from .machine import Machine, Program

# cp.async. What is on its way lands at the wait (or, early, at once and again at the wait).


class Copies:
    """Of all threads of a machine: how many groups each has committed, and what is on its way."""

    def __init__(self, m: Machine) -> None:
        self.committed = np.zeros(m.T, dtype=np.int64)
        # Threads, the group of each, places in shared memory, values, unit.
        self.pending: list[tuple[Array, Array, Array, Array, int]] = []

    def land(self, m: Machine, done: Array, newest: Array) -> None:
        """All copies of the threads `done` in groups up to `newest` (of every thread)."""
        left = []
        for threads, groups, flat, values, unit in self.pending:
            now = done[threads] & (groups <= newest[threads])
            if now.any():
                note_shared_write(m, threads[now], flat[now], unit)
                m.shared.store(flat[now], values[now], unit)
                threads, groups, flat, values = (x[~now] for x in (threads, groups, flat, values))
            if len(threads):
                left.append((threads, groups, flat, values, unit))
        self.pending = left

    def finish(self) -> None:
        """Nobody reads what has not landed."""


@op("cp")
def _cp(i: Instruction, program: Program) -> Act:
    if i.has("bulk"):
        return _bulk(i, program)
    if i.parts[1] != "async" or i.has("mbarrier"):
        raise i.unknown()
    if i.has("commit_group"):

        def commit(m: Machine, active: Array | None) -> None:
            copies = m.unit(Copies)
            copies.committed = copies.committed + (1 if active is None else active.astype(np.int64))

        return commit
    if i.has("wait_group", "wait_all"):
        still = i.operands[0].value if i.has("wait_group") else None

        def wait(m: Machine, active: Array | None) -> None:
            copies = m.unit(Copies)
            done = np.ones(m.T, np.bool_) if active is None else active
            copies.land(m, done, np.full(m.T, 1 << 60) if still is None else copies.committed - 1 - still)

        return wait
    return _copy(i, program)


def _copy(i: Instruction, program: Program) -> Act:
    to, source, amount, *others = i.operands
    size = amount.value
    if len(others) > 1 or size not in (4, 8, 16):
        raise i.unknown()
    into, place = address_reader(to, program), address_reader(source, program)
    given = reader(others[0], "u32", program) if others else None

    def copy(m: Machine, active: Array | None) -> None:
        threads = m.threads(active)
        to = into(m)[threads]
        m.traffic(i, "shared", "store", threads, to, size)
        threads, flat = shared_places(m, "cp.async", threads, to, size)
        addresses = np.broadcast_to(place(m), m.T)[threads]
        asked = np.broadcast_to(np.asarray(size if given is None else given(m), np.int64), m.T)[threads]
        if ((asked == 0) | (asked == size)).all():
            unit = min(size, 8)
            data = _fetch(m, i, threads, addresses, asked == size, size, unit)
        else:  # some bytes, and zeros for the others
            unit = 1
            data = [_fetch(m, i, threads, addresses + k, asked > k, 1, 1)[0] for k in range(size)]
        copies = m.unit(Copies)
        for k, values in enumerate(data):
            part = flat + k * unit
            note_shared_write(m, threads, part, unit)
            if m.options.copies == "early":
                m.shared.data[unit][part >> log2(unit)] = values
            m.shared.in_flight(part, unit)
            copies.pending.append((threads, copies.committed[threads], part, values, unit))

    return copy


def _fetch(
    m: Machine, i: Instruction, threads: Array, addresses: Array, some: Array, size: int, unit: int
) -> list[Array]:
    """What some of the threads read, in units; zeros for the others, and for what may not be read."""
    data = [np.zeros(len(threads), UNSIGNED[unit]) for _ in range(size // unit)]
    if some.any():
        good, at, ranges = global_places(m, i, "load", threads[some], addresses[some], size)
        note_readers(m, good, at, ranges)
        where = np.flatnonzero(some)
        where = where if len(good) == len(where) else where[np.isin(threads[some], good)]
        for k, values in enumerate(data):
            values[where] = m.memory.load(at + k * unit, unit)
    return data


# Tensor copies.


def _of_each(m: Machine, active: Array | None, *values: Array) -> Iterator[tuple[int, list[int]]]:
    """Every active thread, and its values."""
    wide = [np.broadcast_to(v, m.T) for v in values]
    for thread in m.threads(active).tolist():
        yield thread, [int(v[thread]) for v in wide]


def _bulk(i: Instruction, program: Program) -> Act:
    what = i.opcode.removeprefix("cp.async.bulk.")
    if what == "commit_group":

        def commit(m: Machine, active: Array | None) -> None:
            for thread, copies in _storing(m, active):
                copies.commit(thread)

        return commit
    if what in ("wait_group", "wait_group.read"):
        pending = i.operands[0].value

        def wait(m: Machine, active: Array | None) -> None:
            for thread, copies in _storing(m, active):
                copies.wait(thread, pending, what.endswith("read"))

        return wait
    store = ".global.shared::cta.bulk_group" in i.opcode
    load = ".global.mbarrier::complete_tx::bytes" in i.opcode and i.opcode.endswith("::bytes")
    if not what.startswith("tensor.") or not (store or load) or "im2col" in what:
        raise i.unknown()
    tensor, shared, *barrier = i.operands if store else (i.operands[1], i.operands[0], i.operands[2])
    reads = [address_reader(operand, program) for operand in (tensor, shared, *barrier)]
    reads += [reader(coordinate, "u32", program) for coordinate in tensor.coordinates]

    def copy(m: Machine, active: Array | None) -> None:
        engines = m.unit(Engines)
        for thread, (param, at, *others) in _of_each(m, active, *(read(m) for read in reads)):
            cta = int(m.cta[thread])
            copies, proxy = engines.copies[cta], engines.proxies[cta]
            if (tensor := m.maps.get(param - PARAM_WINDOW)) is None:
                raise RefusedError(f"a tensor copy with a map at {param:#x}, where no parameter is one")
            engines.thread, proxy.tag = thread, int(m.warp_tag[thread])
            m.counts.copied += tensor.box_bytes
            if store:
                copies.store(thread % m.per_cta, tensor, others, at, f"line {i.line}")
            else:
                engines.touch(thread, others[0], False)
                copies.load(tensor, others[1:], at, others[0], f"line {i.line}")
            proxy.tag = m.shared.MANY

    return copy


def _storing(m: Machine, active: Array | None) -> Iterator[tuple[int, TensorCopies]]:
    """The active threads that have issued tensor stores, by their number in the CTA."""
    engines = m.unit(Engines)
    for c, copies in enumerate(engines.copies):
        for number in {*copies.open, *copies.groups}:
            engines.thread = c * m.per_cta + number
            if active is None or active[engines.thread]:
                yield number, copies


# mbarriers.

_Step = Callable[..., object]


def _expect_and_arrive(smem: Array, address: int, nbytes: int) -> None:
    mbarriers.expect_bytes(smem, address, nbytes)
    mbarriers.arrive(smem, address)


_MBARRIER: dict[str, tuple[_Step, bool]] = {  # what it does; whether a register for the state comes first
    "init": (mbarriers.init, False),
    "inval": (mbarriers.invalidate, False),
    "arrive": (mbarriers.arrive, True),
    "arrive.expect_tx": (_expect_and_arrive, True),
    "expect_tx": (mbarriers.expect_bytes, False),
}


@op("mbarrier")
def _mbarrier(i: Instruction, program: Program) -> Act:
    what = i.opcode.removeprefix("mbarrier.").removesuffix(".b64").replace(".shared::cta", "").replace(".shared", "")
    if what in ("try_wait.parity", "test_wait.parity"):
        target, barrier, phase = i.operands[:3]
        at, parity = address_reader(barrier, program), reader(phase, "u32", program)

        def poll(m: Machine, active: Array | None) -> None:
            m.set(target, m.unit(Engines).poll(at(m), parity(m), active), active)

        return poll
    step, has_state = _MBARRIER[what]
    barrier, *counts = i.operands[has_state:]
    reads = [address_reader(barrier, program), *(reader(count, "u32", program) for count in counts)]

    def act(m: Machine, active: Array | None) -> None:
        engines = m.unit(Engines)
        for thread, (address, *count) in _of_each(m, active, *(read(m) for read in reads)):
            engines.touch(thread, address, what in ("init", "inval"))
            step(engines.smem[int(m.cta[thread])], address, *count)

    return act


@op("fence")
def _fence(i: Instruction, program: Program) -> Act:
    """fence.proxy.async shows ordinary stores to the units; all that others order runs in order here."""

    def act(m: Machine, active: Array | None) -> None:
        if (fences := m.shared.fences) is None or not i.opcode.startswith("fence.proxy.async"):
            return
        threads = m.threads(active)
        for cta in np.unique(m.cta[threads]):
            fences.fence(m.shared.part(int(cta)), np.unique(m.warp_tag[threads[m.cta[threads] == cta]]))

    return act


# wgmma.


@op("wgmma")
def _wgmma(i: Instruction, program: Program) -> Act:
    if i.opcode == "wgmma.fence.sync.aligned":
        return lambda m, active: m.unit(Engines).fence(active)
    if i.opcode == "wgmma.commit_group.sync.aligned":
        return lambda m, active: m.unit(Engines).commit(active)
    if i.opcode == "wgmma.wait_group.sync.aligned":
        pending = i.operands[0].value
        return lambda m, active: m.unit(Engines).wait(pending, active)
    form = Wgmma.parse(i.opcode)
    d, a, b, accumulate, *scales = i.operands

    def number(operand: Any) -> Callable[[Machine], Array]:
        """Signed: scales are 1 and -1."""
        return reader(operand, "pred" if isinstance(operand, Reg) else "s32", program)

    in_registers = isinstance(a, Vector)
    reads = [reader(b, "u64", program), *(number(operand) for operand in (accumulate, *scales))]
    reads += [] if in_registers else [reader(a, "u64", program)]
    dest = tuple(reg.index for reg in d.items)
    a_registers = tuple(reg.index for reg in a.items) if in_registers else ()
    return lambda m, active: m.unit(Engines).mma(form, i, dest, a_registers, reads, active)
