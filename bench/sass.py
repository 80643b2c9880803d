"""Reading machine code: NVIDIA's SASS as `nvdisasm` prints it, AMD's assembly as LLVM prints it.

`parse_…` makes a list of instructions, `matrix_loops` finds the loops that multiply. What a check asks is put in four
classes that both makers have: matrix instructions, loads, copies that need no register on the way, and stores.
"""

import bisect
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

# UTCHMMA is tcgen05.mma as disassembled; HGMMA is wgmma, HMMA and DMMA are mma.sync.
MATRIX = {"HGMMA", "HMMA", "DMMA", "UTCHMMA", "v_mfma"}
COPIES = {"UTMALDG", "LDGSTS", "load_lds"}  # from global to shared memory, past the registers
LOADS = {"LDG", "load"}
SPILLS = {"LDL", "STL", "scratch"}
STORES = {"STG", "store"}
AWAIT = "ACQBULK"  # griddepcontrol.wait
ACCESSES = LOADS | STORES | COPIES | {"LD", "ST", "UTMASTG", "ATOM", "ATOMG", "RED", "REDG"}  # to global memory
COUNTED = MATRIX | COPIES | LOADS | STORES | SPILLS | {
    *(f"{name}.{bits}" for name in LOADS | STORES for bits in (64, 128)),
    "UTMASTG", "FFMA", "DFMA", "v_fma", "LDS", "STS", "MUFU.EX2", "MUFU.RCP", "FCHK", "v_exp", "v_rcp",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    name: str  # the instruction's class, as in COUNTED where it is counted: LDG.E.128.CONSTANT is LDG
    opcode: str  # as disassembled
    target: int | None = None  # index of the instruction a branch leads to
    falls_through: bool = True  # whether the next instruction can follow
    operands: str = ""  # as disassembled; of SASS alone
    cycles: int = 1  # before the warp may issue the next one, as ptxas says in the instruction; of SASS alone

    @property
    def bytes(self) -> int:
        """How many bytes a thread it moves, for loads and stores; AMD's that are narrower than four count as four."""
        width = re.search(r"\.(?:[US](8|16)|(64|128))\b|dwordx([2-4])", self.opcode)
        if not width:
            return 4
        return 4 * int(width[3]) if width[3] else int(width[1] or width[2]) // 8


@dataclass(frozen=True)
class Loop:
    """An innermost loop around matrix instructions."""

    matrix: int
    loads: int  # global loads and copies in its body
    loads_before: int  # those issued on the way to it: the prologue of a software pipeline
    loads_early: bool  # whether a load of the body comes before the body's last matrix instruction
    spills: int  # accesses to spilled registers in its body


SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
SASS_TARGET = re.compile(r"\b0x([0-9a-f]+)$")
AMD = re.compile(r"^\t([a-z]\w+)(?:\s+([^;]*))?")
AMD_LABEL = re.compile(r"^(\.L\w+):")


def parse_sass(text: str, ends: Sequence[int], binary: bytes = b"") -> list[list[Instruction]]:
    """The instructions of kernels that lie one after the other and end at these addresses, as nvdisasm prints them.

    binary: what was disassembled; without it every instruction has one cycle.
    """
    lines = [(int(match[1], 16), match) for line in text.splitlines() if (match := SASS.match(line))]
    kernels = []
    for _, group in itertools.groupby(lines, lambda line: bisect.bisect_right(ends, line[0])):
        mine = list(group)
        at = {address: n for n, (address, _) in enumerate(mine)}
        code = []
        for address, match in mine:
            predicated, opcode, operands = match[2] is not None, match[3], match[4].strip()
            name, goal = _name(opcode), None
            goes_on = predicated or name not in ("EXIT", "RET", "BRX")
            if name == "BRA":
                target = SASS_TARGET.search(operands)
                goal = at.get(int(target[1], 16)) if target else None
                # `BRA.U UP0, 0x1d0` is conditional as well as `@P0 BRA 0x1d0`.
                goes_on = predicated or not operands.startswith("0x")
            # The stall count: bits 105 to 108 of an instruction's 128, since Volta (arXiv 1804.06826).
            cycles = max(1, int.from_bytes(binary[address : address + 16], "little") >> 105 & 15)
            code.append(Instruction(name, opcode, goal, goes_on, operands, cycles))
        kernels.append(code)
    return kernels


def parse_amd(text: str) -> list[Instruction]:
    """The instructions of the one kernel in LLVM's assembly for AMD's GPUs."""
    lines: list[re.Match[str]] = []
    labels: dict[str, int] = {}  # the numbers of the instructions that they stand before
    for line in text.splitlines():
        if label := AMD_LABEL.match(line):
            labels[label[1]] = len(lines)
        elif match := AMD.match(line):
            lines.append(match)
    code = []
    for match in lines:
        opcode, operands = match[1], (match[2] or "").strip()
        target = labels.get(operands) if opcode.startswith(("s_branch", "s_cbranch")) else None
        code.append(Instruction(_name(opcode), opcode, target, opcode not in ("s_branch", "s_endpgm")))
    return code


def _name(opcode: str) -> str:
    if opcode.startswith(("buffer_load", "global_load", "flat_load")):
        return "load_lds" if opcode.endswith("_lds") else "load"
    if opcode.startswith(("buffer_store", "global_store", "flat_store")):
        return "store"
    for family in ("scratch", "v_mfma", "v_fma", "v_exp", "v_rcp"):
        if opcode.startswith(family):
            return family
    first, *modifiers = opcode.split(".")
    return f"{first}.{modifiers[0]}" if first == "MUFU" and modifiers else first


def count(code: Sequence[Instruction]) -> dict[str, int]:
    """How often each class of COUNTED occurs. LDG counts them all, LDG.128 those 16 bytes (128 bits) wide."""
    counts = Counter(i.name for i in code)
    counts.update(f"{i.name}.{8 * i.bytes}" for i in code)
    return {name: n for name, n in sorted(counts.items()) if name in COUNTED}


def unawaited(code: Sequence[Instruction]) -> str:
    """What accesses memory before the code waits for the launch before, or that it never does; "" where all is well."""
    for i in code:
        if i.name == AWAIT:
            return ""
        if i.name in ACCESSES:
            return f"{i.name} before {AWAIT}"
    return f"no {AWAIT}"


def matrix_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops that hold matrix instructions, in the order of the code.

    Where there are no such instructions at all, those with float64 multiplications: the form a product takes on a
    target whose tensor cores have no float64.
    """
    flow = Flow(code)
    names = MATRIX if any(i.name in MATRIX for i in code) else {"DFMA"}
    loops = []
    for head, loop in flow.loops_with(names).items():
        # As it runs: compilers like to lay a loop out from its middle.
        body = flow.instructions(sorted(loop, key=lambda block: (block.start < head.start, block.start)))
        multiplies = [n for n, i in enumerate(body) if i.name in names]
        loads = [n for n, i in enumerate(body) if i.name in COPIES | LOADS]
        loops.append(
            Loop(
                matrix=len(multiplies) if names is MATRIX else 0,
                loads=len(loads),
                loads_before=sum(i.name in COPIES | LOADS for i in flow.instructions(flow.leading_to(head))),
                loads_early=bool(loads) and loads[0] < multiplies[-1],
                spills=sum(i.name in SPILLS for i in body),
            )
        )
    return loops


class Flow:
    """The control flow between basic blocks, which are ranges of instruction numbers, and its natural loops."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        starts = {0} | {i.target for i in code if i.target is not None}
        starts |= {n + 1 for n, i in enumerate(code) if i.target is not None or not i.falls_through}
        edges = [*sorted(s for s in starts if s < len(code)), len(code)]
        at = {a: range(a, b) for a, b in itertools.pairwise(edges)}
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from(at.values())
        for block in at.values():
            last = code[block[-1]]
            nexts = [last.target, block.stop if last.falls_through else None]
            self.graph.add_edges_from((block, at[n]) for n in nexts if n in at)
        # A jump through a table (BRX), which is not in the code: it leads to whatever nothing else leads to.
        unreached = [block for block in at.values() if block.start and not self.graph.in_degree(block)]
        for block in at.values():
            if code[block[-1]].name == "BRX":
                self.graph.add_edges_from((block, other) for other in unreached)
        self.entry = at[0]
        above = nx.immediate_dominators(self.graph, self.entry)
        self._dominators = nx.DiGraph((over, block) for block, over in above.items() if block != self.entry)
        self._dominators.add_node(self.entry)
        reached = self._dominators.nodes
        self._back_edges = [(a, b) for a, b in self.graph.edges if b in reached and a in self.dominated(b)]

    def dominated(self, block: range) -> set[range]:
        """The block, and those that every path from the start reaches through it."""
        return {block, *nx.descendants(self._dominators, block)}

    def loops(self) -> dict[range, frozenset[range]]:
        """The natural loops, by their heads."""
        bodies: dict[range, frozenset[range]] = {}
        for tail, head in self._back_edges:
            inside = nx.restricted_view(self.graph, [], list(self.graph.in_edges(head)))  # the way up ends at the head
            bodies[head] = bodies.get(head, frozenset()) | {head, tail} | nx.ancestors(inside, tail)
        return dict(sorted(bodies.items(), key=lambda item: item[0].start))

    def loops_with(self, names: set[str]) -> dict[range, frozenset[range]]:
        """The innermost of the loops that hold such an instruction, by their heads."""
        holding = {h: loop for h, loop in self.loops().items() if any(i.name in names for i in self.instructions(loop))}
        return {h: loop for h, loop in holding.items() if not any(other < loop for other in holding.values())}

    def instructions(self, blocks: Iterable[range]) -> list[Instruction]:
        return [self.code[n] for block in blocks for n in block]

    def leading_to(self, head: range) -> set[range]:
        """The blocks on paths to a loop's head, not counting another turn of this or a loop around it."""
        above: set[range] = nx.ancestors(nx.restricted_view(self.graph, [], self._back_edges), head)
        return above
