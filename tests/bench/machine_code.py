"""Machine code by hand."""

from bench.sass import Instruction, parse_sass


def sass(*instructions: str) -> list[Instruction]:
    """Instructions at addresses 0, 0x10, … as nvdisasm prints them; `{n}` is the address of the n-th, from 0 on."""
    addresses = [f"0x{16 * n:x}" for n in range(len(instructions) + 1)]
    lines = [f"        /*{16 * n:04x}*/  {text.format(*addresses)} ;" for n, text in enumerate(instructions)]
    (code,) = parse_sass("\n".join(lines), [16 * len(lines)])
    return code
