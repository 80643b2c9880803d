"""The time of a launch from its machine code and its sizes: arithmetic only.

A program runs in two phases that follow each other: its main loops, and what is outside of them. In each, the
busiest of these sets the time, in cycles of a multiprocessor (SM):

    tensor cores    multiply-adds over their rate, as far as a large product reaches it
    issue           instructions × warps over four a cycle
    special         ex2, rcp, rsqrt … : 16 results a cycle
    shared memory   bytes through shared memory and L1, operands of wgmma and descriptors' tiles too: 128 a cycle

A program that is alone takes longer where its warps cannot keep a unit busy: a phase lasts at least as long as ptxas
spaces one warp's instructions, and a loop as long as its products and all that a warp does while none is in flight. To
this it adds latency: of the loads before and after the loop that wait for one another, and in the loop, where its turns
wait for memory longer than they compute, with `stages - 1` turns in flight. With n programs on the busiest SM, of which
R are resident at a time,

    SM time = max(n · the busiest unit over both phases, ⌈n / R⌉ · time of a program alone)

so that one program's epilogue overlaps another's loop only if both are resident. Programs behind them that add up
partial results start where the last round leaves room, and then in rounds of their own. The prediction is

    launch + max(SM time, bytes once over a copy's rate, bytes loaded and stored over L2's rate, and latency once)

Tensors that an earlier launch of the same direction touched, and that half of L2 holds, come from there.

Left out: data that is not aligned (it would add under 9 % to steps of 6 to 11 µs, and to nothing else); how often L2 is
hit besides; conflicts of DRAM pages and of banks; clocks that fall under load other than what `reached` knows; waiting
for shared memory, special functions and barriers; the lower rate of integers and float64; the tail of the last wave,
beyond n; the start of a program. All but the hits add time: expect measurements above the prediction, and compare
ratios.
"""

import math
from dataclasses import dataclass

from .executed import Profile, Tally
from .machines import WARP, Machine, occupancy
from .work import LaunchWork


@dataclass(frozen=True)
class Prediction:
    us: float
    floor_us: float  # bytes once, or the multiply-adds of all programs
    limited_by: str
    resident: int  # programs on an SM
    resident_limit: str
    waves: float  # programs over those that are resident on the whole GPU
    terms: dict[str, float]  # µs, before the launch's own


def predict(
    machine: Machine, work: LaunchWork, profile: Profile, *, registers: int, shared: int, num_warps: int, stages: int,
    cached: frozenset[int] = frozenset(),
) -> Prediction:  # fmt: skip
    """cached: the tensors of `work` that come out of L2."""
    resident, limit = occupancy(machine, registers, shared, num_warps)
    if not resident:
        raise ValueError(f"an SM holds no program of {registers} registers a thread, {num_warps} warps, {shared} bytes")
    busiest = math.ceil(work.programs / machine.processors)
    loop, outside, turns = executed(work, profile, num_warps)
    macs_outside = work.macs if not loop.instructions else 0
    loop_units = units(machine, loop, work.macs - macs_outside, work.bits, profile.matrix, num_warps)
    loop_units["shared memory"] += work.copied / machine.shared_bytes
    outside_units = units(machine, outside, macs_outside, work.bits, profile.matrix, num_warps)

    loop_latency = turns * machine.latency / max(1, stages - 1)
    waits = work.chain * math.prod(work.outer) * machine.latency
    in_loop = max(*loop_units.values(), loop.cycles, loop_units["tensor cores"] + loop.idle, loop_latency)
    alone = in_loop + max(*outside_units.values(), outside.cycles) + waits

    # Programs behind the others start on what those leave free.
    behind = profile.beside * (work.turns_behind / work.paths_behind)
    behind_units = units(machine, behind, 0, work.bits, profile.matrix, num_warps)
    alone_behind = max(*behind_units.values(), behind.cycles) + work.turns_behind * machine.latency
    slots, rounds = machine.processors * resident, math.ceil(busiest / resident)
    free = (rounds * slots - work.programs) * (alone // alone_behind if work.behind else 0)
    left = math.ceil(max(0, work.behind - free) / slots)

    us = 1e6 / machine.clock
    dram = sum(size for tensor, size in work.tensors.items() if tensor not in cached)
    terms = {
        name: us * (busiest * (loop_units[name] + outside_units[name]) + work.behind / machine.processors * also)
        for name, also in behind_units.items()
    }
    in_turn, waiting_beside = rounds * alone + left * alone_behind, work.turns_beside * machine.latency
    terms["alone"] = us * max(in_turn, waiting_beside)
    once = us * work.chain * machine.latency
    terms["memory"] = 1e6 * dram / machine.dram + once
    terms["L2"] = 1e6 * (work.l2 or work.bytes) / machine.l2 + once
    slowest = max(terms, key=lambda name: terms[name])
    latency = waits + max(0.0, loop_latency - max(loop_units.values()))
    if terms[slowest] < machine.launch:
        limited = "launch"
    elif slowest == "alone":
        limited = "latency" if latency > alone / 2 or waiting_beside > in_turn else "phases"
    else:
        limited = slowest
    operations = work.programs * work.macs / (machine.macs[work.bits] * machine.reached * machine.processors)
    return Prediction(
        us=machine.launch + terms[slowest],
        floor_us=max(1e6 * dram / machine.dram, us * operations),
        limited_by=limited,
        resident=resident,
        resident_limit=limit,
        waves=work.programs / (machine.processors * resident),
        terms=terms,
    )


def executed(work: LaunchWork, profile: Profile, num_warps: int) -> tuple[Tally, Tally, float]:
    """What a warp of the busiest program executes in main loops and outside, and how many turns follow each other."""
    loops, body = profile.main_loops, profile.levels[0]
    if not loops:
        return Tally(), body, 0.0
    total = work.turns * math.prod(work.outer)
    # Where there are several, each is one way of several, or they follow each other where a loop around was unrolled. A
    # product's own loop, with barriers in it, is never unrolled; another's may be, and what it loads says how far.
    steps = float(loops)
    if not work.macs and work.step and body.loaded:
        steps = max(1, min(round(num_warps * body.loaded / work.step), total))
    turns = total / steps
    outside = profile.levels[-1]
    for k, level in enumerate(profile.levels[1:-1]):
        around = math.prod(work.outer[: len(work.outer) - k])
        outside += level * (around if k else around / loops)
    return body * turns, outside, turns * loops


def units(machine: Machine, tally: Tally, macs: float, bits: int, matrix: str, num_warps: int) -> dict[str, float]:
    """Cycles of an SM that each of its units takes for one program."""
    rate = machine.macs[bits] * machine.reached * (machine.mma_sync if matrix in ("HMMA", "DMMA") else 1)
    return {
        "tensor cores": macs / rate,
        "issue": tally.instructions * num_warps / machine.issue,
        "special": tally.special * num_warps * WARP / machine.special,
        "shared memory": tally.shared_bytes * num_warps / machine.shared_bytes,
    }
