"""What a warp executes: the instructions of a kernel, by how often they run.

A compiled kernel has main loops, where its work is done: the innermost loops around matrix instructions, or in a kernel
without any, those with the widest loads. `profile` adds the instructions up by level: level 0 the bodies of the main
loops, 1 what else is in the loops around them, and so on; the last level runs once. How often a level runs is not in
the code, but follows from the launch (`work.py`). Other loops count as one turn: they wait at barriers, take the
exceptional way, or are the last program's alone.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields

import networkx as nx

from ..sass import MATRIX, Flow, Instruction
from ..wgmma import in_flight

GLOBAL = {"LDG", "LDGSTS"}
THROUGH_SHARED = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL"}
WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x\d+")


@dataclass(frozen=True)
class Tally:
    """Counts of one warp. Bytes are what it moves if no lane is masked."""

    instructions: float = 0.0
    special: float = 0.0  # instructions of the special-function unit
    shared_bytes: float = 0.0  # to and from shared memory and L1
    loaded: float = 0.0  # bytes from global memory, by threads
    cycles: float = 0.0  # of one warp alone, if it waits for nothing but what ptxas spaces out
    idle: float = 0.0  # those of them with no asynchronous product in flight, which is at a standstill then

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Tally":
        return Tally(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Profile:
    levels: tuple[Tally, ...]  # of one run of each; the first: one turn of every main loop, the last: what runs once
    main_loops: int
    matrix: str = ""  # the matrix instruction: HGMMA, HMMA …
    beside: Tally = Tally()  # what a program runs that multiplies nothing, beside others that do


def tally(code: Sequence[Instruction], numbers: Iterable[int], busy: Collection[int]) -> Tally:
    """Of the instructions of these numbers; busy: of those that are issued while a product is in flight."""
    return sum((_one(code[n], n in busy) for n in numbers if code[n].name != "NOP"), Tally())


def _one(i: Instruction, busy: bool) -> Tally:
    shared = 0.0
    if match := WGMMA.match(i.opcode):
        # Four warps issue one together. Both operands come from shared memory: rows of 32 bytes, m + n of them.
        shared = 32 * (int(match[1]) + int(match[2])) / 4
    elif i.name in THROUGH_SHARED:
        shared = 32 * i.bytes
    loaded = 32 * i.bytes if i.name in GLOBAL else 0
    return Tally(1, i.name.startswith("MUFU"), shared, loaded, i.cycles, 0 if busy else i.cycles)


def profile(code: Sequence[Instruction]) -> Profile:
    flow = Flow(code)
    loops = flow.loops()
    matrix = next((i.name for i in code if i.name in MATRIX), "")
    main = list(flow.loops_with(MATRIX).values()) if matrix else _widest(flow)
    narrow = set() if matrix else _narrow_ways(flow, main)
    around = {block: {head for head, loop in loops.items() if block in loop} for block in flow.graph}
    of_main = {head for head, loop in loops.items() if any(inner <= loop for inner in main)}
    depth = max((len(around[next(iter(loop))] & of_main) for loop in main), default=0)
    levels: list[list[int]] = [[] for _ in range(depth + 1)]
    heads = [min(loop, key=lambda block: block.start) for loop in main]
    with_main = set(heads).union(*(nx.ancestors(flow.graph, h) | nx.descendants(flow.graph, h) for h in heads))
    beside: list[int] = []
    for block in flow.graph.nodes - narrow:
        if matrix and main and block not in with_main:
            beside += block
        elif any(block in loop for loop in main):
            levels[0] += block
        else:
            levels[depth - min(len(around[block] & of_main), max(depth - 1, 0))] += block
    busy: Collection[int] = range(len(code))
    if matrix == "HGMMA":
        busy = {n for n, running in in_flight(code) if running or code[n].name == "HGMMA"}
    return Profile(tuple(tally(code, level, busy) for level in levels), len(main), matrix, tally(code, beside, busy))


def _loads(flow: Flow, blocks: Iterable[range]) -> set[int]:
    """How wide the loads from global memory are."""
    return {i.bytes for i in flow.instructions(blocks) if i.name in GLOBAL}


def _widest(flow: Flow) -> list[frozenset[range]]:
    """The innermost loops whose loads are as wide as any loop's: what the last program adds up is narrower."""
    loops = list(flow.loops_with(GLOBAL).values())
    widths = [max(_loads(flow, loop)) for loop in loops]
    return [loop for loop, size in zip(loops, widths, strict=True) if size == max(widths)]


def _narrow_ways(flow: Flow, main: Sequence[frozenset[range]]) -> set[range]:
    """The blocks of main loops that only data takes which is not aligned.

    Ways part at a branch of which one side has 16-byte loads and the other narrow ones; a side is what it dominates.
    """
    narrow: set[range] = set()
    for loop in main:
        for block in loop:
            nexts = [n for n in flow.graph.successors(block) if n in loop and flow.graph.in_degree(n) == 1]
            for a, b in itertools.permutations([flow.dominated(side) & loop for side in nexts], 2):
                if 16 in _loads(flow, a) and max(_loads(flow, b), default=16) < 16:
                    narrow |= b
    return narrow
