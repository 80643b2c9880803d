"""Whether Hopper's asynchronous products (wgmma) are right and asynchronous: read from SASS, PTX and TTGIR.

HGMMA, as disassembled, returns at once. `gsb0` on it closes a group, and `WARPGROUP.DEPBAR.LE gsb0, n` waits until at
most the n youngest groups are still running. Until its group has been waited for, an HGMMA reads its operands: in
registers, of which ptxas keeps no account, or in shared memory, where Triton's pipeliner has to leave enough places.

Only sm_90 is asked. mma.sync (HMMA), all that sm_80 has, has read its operands when it returns. sm_100's tcgen05.mma
takes none from registers and reports to mbarriers: there is no group to wait for and nothing that ptxas serializes.

What is not seen here: missing fences, copies read before they have arrived, mbarriers misused (all of these where PTX
is executed, `tests/executor`), registers of a product's result.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .sass import Flow, Instruction

PRODUCT = "wgmma.mma_async"  # in PTX
WARNING = re.compile(r"\((C75\d\d)\) (.*?)(?= in the function| in function| in around|$)", re.MULTILINE)

# What is expected of a kernel with such products, and why; `faults` says by these names what is wrong.
EXPECTED = {
    "wgmma registers": "a product in flight still reads its operand: what it computes is undefined",
    "wgmma memory": "a product in flight still reads its operand: what it computes is undefined",
    "wgmma loop": "products that wait for one another leave the tensor cores idle",
    "ptxas": "ptxas had to serialize the products, or to put a wait of its own between them",
}


def faults(code: Sequence[Instruction], ptx: str, ttgir: str, log: str, *, as_loaded: bool) -> dict[str, str]:
    """What is wrong with a kernel's products, by the names in EXPECTED. log: what ptxas said.

    as_loaded: both operands of its loop are multiplied as they were loaded, so that groups can run beside each other.
    """
    if PRODUCT not in ptx:
        return {}
    sentences = {}
    if pairs := refilled(code):
        product, other = (code[n] for n in pairs[0])
        sentences["wgmma registers"] = (
            f"{len({h for h, _ in pairs})} products have registers written while they may run, "
            f"first {product.opcode} {product.operands} by {other.opcode} {other.operands}"
        )
    if tiles := overwritten(ttgir):
        sentences["wgmma memory"] = "; ".join(tiles)
    if (as_loaded or keeps_running(ptx)) and (loops := waiting_loops(code)):
        sentences["wgmma loop"] = f"no two groups run at once in a loop of {max(loops)} products"
    if warnings := dict(WARNING.findall(log)):
        sentences["ptxas"] = "; ".join(f"{number} {text.strip()}" for number, text in warnings.items())
    return sentences


# -- SASS: groups in flight -------------------------------------------------------------------------------------------

REGISTER = re.compile(r"R(\d+)(?!\w)")
WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
READ = 4  # registers of operand A: 64 rows of 32 bytes in 128 threads
NO_RESULT = {"BAR", "BRX", "CALL", "HGMMA", "JMX", "NANOSLEEP", "RET", "WARPSYNC"}  # whose first register is read
BEHIND_PREDICATE = {"ATOM", "ATOMG", "ATOMS", "SHFL"}  # the register that is written stands second

Flight = dict[int, int]  # the HGMMAs that may be in flight, and the least number of groups closed since each was issued


def in_flight(code: Sequence[Instruction]) -> Iterator[tuple[int, Flight]]:
    """Each instruction that can be reached, and the products that may run when it is issued, on any path."""
    flow = Flow(code)
    before: dict[range, Flight] = {flow.entry: {}}
    todo = [flow.entry]
    while todo:
        block = todo.pop()
        running = before[block]
        for n in block:
            running = _after(n, code[n], running)
        for successor in flow.graph.successors(block):
            there = before.get(successor)
            joined = running
            if there is not None:
                joined = {h: min(closed[h] for closed in (there, running) if h in closed) for h in there | running}
            if joined != there:
                before[successor] = joined
                todo.append(successor)
    for block, running in before.items():
        for n in block:
            yield n, running
            running = _after(n, code[n], running)


def _after(n: int, i: Instruction, running: Flight) -> Flight:
    if i.name == "HGMMA":
        running = running | {n: 0}
        return {h: closed + 1 for h, closed in running.items()} if "gsb0" in i.operands else running
    if i.opcode.startswith("WARPGROUP.DEPBAR") and (wait := WAIT.search(i.operands)):
        return {h: closed for h, closed in running.items() if closed <= int(wait[1], 16)}
    return running


def refilled(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Pairs of numbers: an HGMMA, and an instruction that may write registers of its operand A while it runs."""
    pairs = set()
    for n, running in in_flight(code):
        registers = set(written(code[n]))
        pairs |= {(h, n) for h in running if registers.intersection(operand_registers(code[h]))}
    return sorted(pairs)


def operand_registers(product: Instruction) -> range:
    """Those that an HGMMA reads operand A from; none where it lies in shared memory."""
    a = REGISTER.fullmatch(product.operands.split(",")[1].strip())
    return range(int(a[1]), int(a[1]) + READ) if a else range(0)


def written(i: Instruction) -> range:
    """The registers that an instruction writes, an HGMMA's own result aside."""
    operands = [operand.strip() for operand in i.operands.split(",")]
    first = REGISTER.match(operands[1] if i.name in BEHIND_PREDICATE and len(operands) > 1 else operands[0])
    return range(0) if first is None or i.name in NO_RESULT else range(int(first[1]), int(first[1]) + _width(i))


def _width(i: Instruction) -> int:
    words = i.opcode.split(".")
    if i.name == "LDSM":
        return int(words[-1]) if words[-1] in ("2", "4") else 1
    if i.name in ("HMMA", "IMMA", "DMMA") or "128" in words:
        return 4
    wide = i.name in ("DADD", "DFMA", "DMUL") or (i.name == "CS2R" and "32" not in words)
    wide |= i.name in ("F2F", "F2I", "I2F") and words[1] in ("F64", "S64", "U64")
    return 2 if wide or {"64", "WIDE"} & set(words) else 1


def waiting_loops(code: Sequence[Instruction]) -> list[int]:
    """How many HGMMAs the innermost loops hold in which none is issued while a closed group of the loop is running."""
    loops = [
        {n for block in loop for n in block if code[n].name == "HGMMA"}
        for loop in Flow(code).loops_with({"HGMMA"}).values()
    ]
    beside = [
        (n, h) for n, running in in_flight(code) if code[n].name == "HGMMA" for h, closed in running.items() if closed
    ]
    return [len(loop) for loop in loops if not any(n in loop and h in loop for n, h in beside)]


# -- PTX --------------------------------------------------------------------------------------------------------------


def keeps_running(ptx: str) -> bool:
    """Whether the program asks for a group that goes on running behind a wait.

    It does not where Triton has not pipelined the products themselves: with one stage, in a single step, with operands
    that pass through registers or are written to shared memory in the same turn (dz formed on load). There a wait for
    all groups is Triton's own, and costs time alone.
    """
    return re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", ptx) is not None


# -- TTGIR: places in shared memory -----------------------------------------------------------------------------------

LINE = re.compile(r'\s*(?:%(\w+)(?::\d+)? = )?"?([a-z]\w*\.[\w.]+)"?(.*)')
VALUE = re.compile(r"%(\w+)")
SHAPE = re.compile(r"memdesc<((?:\d+x)+)")
TURNS = 16  # more than any ring has places


@dataclass(frozen=True, eq=False)
class Operation:
    """A line of TTGIR."""

    name: str
    values: "tuple[Operation | None, ...]"  # what made its operands; None for arguments of the kernel and of loops
    text: str  # what stands behind the name
    loops: tuple[int, ...]  # those around it, the outermost first, by the numbers of the lines they begin in


def parse_ttgir(text: str) -> list[Operation]:
    code: list[Operation] = []
    made: dict[str, Operation | None] = {}  # regions side by side repeat names: the last one is meant
    regions: list[int] = []  # around this line: where a loop begins, −1 for any other
    for number, line in enumerate(text.splitlines()):
        if line.lstrip().startswith("}"):
            regions.pop()
        if match := LINE.match(line):
            result, name, rest = match.groups()
            loops = tuple(region for region in regions if region >= 0)
            operation = Operation(name, tuple(made.get(value) for value in VALUE.findall(rest)), rest, loops)
            code.append(operation)
            if result:
                made[result] = operation
        if line.endswith("{"):
            regions.append(number if " scf.for " in line else -1)
    return code


def overwritten(ttgir: str) -> list[str]:
    """Shared memory that a loop fills again while a product which reads it may run, in words.

    Triton gives each operand of a pipelined loop a ring of places. A turn reads one, and fills the one which lies as
    many further on as were filled before the loop. The loop is played, with the groups that its waits leave running.
    """
    code = parse_ttgir(ttgir)
    sentences = []
    for loop in dict.fromkeys(o.loops for o in code if o.name == "ttng.warp_group_dot" and o.loops):
        body = [o for o in code if o.loops[: len(loop)] == loop]
        before = [o for o in code[: code.index(body[0])] if o.loops == loop[: len(o.loops)]]
        for memory in dict.fromkeys(m for o in body for m in _read(o)):
            ahead = sum(memory in _filled(o) for o in before)
            views = [o for o in body if o.name == "ttg.memdesc_index" and _memory(o) is memory]
            shape = [int(size) for size in SHAPE.findall(memory.text)[-1].split("x")[:-1]]
            places = shape.pop(0) if views else 1
            if _collides(body, memory, places, ahead):
                tile = "×".join(map(str, shape))
                sentences.append(f"a tile of {tile} has {places} places, {ahead} filled ahead of the one in use")
    return sentences


def _memory(value: Operation | None) -> Operation | None:
    """The allocation that a view of shared memory is part of."""
    while value is not None and value.name.startswith("ttg.memdesc_"):
        value = value.values[0]
    return value if value is not None and value.name == "ttg.local_alloc" else None


def _read(operation: Operation) -> list[Operation]:
    """The allocations that a product reads; none for operands in registers."""
    operands = operation.values if operation.name == "ttng.warp_group_dot" else ()
    return [memory for value in operands if (memory := _memory(value)) is not None]


def _filled(operation: Operation) -> list[Operation | None]:
    """The allocations that an operation writes."""
    if operation.name == "ttg.local_alloc":
        return [operation] if operation.values else []
    copies = ("ttg.async_copy_global_to_local", "ttg.local_store", "ttng.async_tma_")
    return [_memory(value) for value in operation.values] if operation.name.startswith(copies) else []


def _collides(body: Sequence[Operation], memory: Operation, places: int, ahead: int) -> bool:
    running: list[set[int]] = []  # the places that each group reads, the oldest first
    for turn in range(TURNS):
        for operation in body:
            if operation.name == "ttng.warp_group_dot":
                running.append({turn % places} if memory in _read(operation) else set())
                if "isAsync = true" not in operation.text:
                    running = []
            elif wait := re.search(r"pendings = (\d+)", operation.text):
                running = running[-int(wait[1]) :] if int(wait[1]) else []
            elif memory in _filled(operation) and any((turn + ahead) % places in group for group in running):
                return True
    return False
