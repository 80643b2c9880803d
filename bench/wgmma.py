"""Whether Hopper's asynchronous products (wgmma) are right and asynchronous: read from SASS and PTX.

HGMMA, as disassembled, returns at once. `gsb0` on it closes a group, and `WARPGROUP.DEPBAR.LE gsb0, n` waits until at
most the n youngest groups are still running. Until its group has been waited for, an HGMMA reads its operands, also in
registers, of which ptxas keeps no account.

Only sm_90 is asked. mma.sync (HMMA), all that sm_80 has, has read its operands when it returns. sm_100's tcgen05.mma
takes none from registers and reports to mbarriers: there is no group to wait for and nothing that ptxas serializes.

What is not seen here: shared memory overwritten while a product reads it, missing fences, copies read before they have
arrived, mbarriers misused (all of these where PTX is executed, `tests/executor`), registers of a product's result.
"""

import re
from collections.abc import Iterator, Sequence

from .sass import Flow, Instruction

PRODUCT = "wgmma.mma_async"  # in PTX
WARNING = re.compile(r"\((C75\d\d)\) (.*?)(?= in the function| in function| in around|$)", re.MULTILINE)

# What is expected of a kernel with such products, and why; `faults` says by these names what is wrong.
EXPECTED = {
    "wgmma registers": "a product in flight still reads its operand: what it computes is undefined",
    "wgmma loop": "products that wait for one another leave the tensor cores idle",
    "ptxas": "ptxas had to serialize the products, or to put a wait of its own between them",
}


def faults(code: Sequence[Instruction], ptx: str, log: str, *, as_loaded: bool) -> dict[str, str]:
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
