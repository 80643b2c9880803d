"""What kernels cost, counted where their compiled code is executed: no GPU is needed, and nothing is timed."""

from collections.abc import Callable

from tests.executor import executed


def cost(call: Callable[[], object], target: str = "sm_80") -> str:
    """The kernels that a call on CPU tensors launches on a GPU of this kind, a line each, and what their warps execute.

    Instructions are those of the PTX, of one warp on average. Bytes are what warps ask for, each byte once a warp.
    """
    with executed(target) as report:
        call()
    report.check()
    if not report.launches:
        return "no kernel was launched"
    rows: list[tuple[str, ...]] = [("kernel", "programs", "warps", "instructions/warp", "bytes read", "bytes written")]
    kinds = []
    for counts in report.launches:
        per_warp = {kind: n / counts.warps for kind, n in counts.instructions.most_common(6)}
        kinds.append(f"{counts.kernel}: " + "; ".join(f"{n:.0f} {kind}" for kind, n in per_warp.items()))
        numbers = counts.grid, counts.warps, counts.instructions.total() / counts.warps, *(
            sum(t.distinct * t.requests / max(t.sampled, 1) for t in counts.traffic.values()
                if (t.space, t.what) == ("global", what)) for what in ("load", "store")
        )  # fmt: skip
        rows.append((counts.kernel, *(f"{n:,.0f}" for n in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", "of a warp's instructions:", *kinds])
