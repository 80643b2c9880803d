"""Executes what Triton compiles for sm_80 and sm_90 with numpy, thread by thread, on a machine without a GPU.

    with executed("sm_80") as report:
        y = tribp.linear_sigmoid(x, w, b)  # CPU tensors
    report.check()  # raises if the kernels did anything of the list below
    print(report.table())

`python -m tests.executor` runs a script so, `pytest --execute sm_90` tests; `python -m bench counts` counts what the
benchmarks' cases cost.

Promised to be detected, each with mistakes planted in test_mistakes.py and test_compiled.py:

- accesses out of bounds: outside the launch's tensors (for kernels with tables of addresses: outside every tensor that
  is alive), in the gaps of a strided one, outside shared memory; also by tensor copies
- misaligned accesses
- reads of shared memory that nobody wrote
- races in shared memory between warps: reads and writes since the last barrier, different values in one place at once
- reads of what an asynchronous copy has yet to bring; copies and wgmma that are never committed or waited for
- operands of a wgmma that change in flight, in shared memory and in the registers of A; the source of a tensor store
- missing fences: wgmma.fence; fence.proxy.async between ordinary stores and what wgmma or a tensor copy reads
- mbarriers misused: none there, overwritten, too many arrivals, wrong byte counts, races with their users
- CTAs that race: two write one place, or one writes what another reads (unless atomics may order them)
- deadlock, endless loops, traps, integer division by zero
- shuffles, and instructions of whole warps or warpgroups, with threads missing
- descriptors and tensor maps that the hardware or the driver refuses

Not seen: races between the threads of a warp, the weak order of global memory, a wgmma.fence that is missing because an
accumulator was changed, timing, and what ptxas makes of the PTX (registers, SASS: `python -m bench static`). ex2.approx
and the like are exact here. float32 sums of tensor cores are formed exactly for one instruction and then cut, as GPUs
were measured to do; `truncate=False` rounds them.

Files: parse.py, ops*.py and mma.py (PTX, and what its instructions do), machine.py (threads, barriers, launches),
*_memory.py (what is known of every byte), wgmma.py, tensor_copies.py, mbarriers.py and engines.py (Hopper's units),
arguments.py (a launch's parameters; what differs between Triton's versions), run.py (`executed`).
"""

from .run import Report, executed

__all__ = ["Report", "executed"]
