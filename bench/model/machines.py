"""What the model knows of a GPU: its rates, each with its source, and how many programs a multiprocessor holds.

"Assumed" is no source: those are the first to replace once there is such a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tribp.launch.arch import cdiv

WARP = 32
RESERVED_SHARED = 1024  # bytes of shared memory that CUDA keeps for each program (CUDA programming guide, 8.x on)


@dataclass(frozen=True)
class Machine:
    """One GPU. Rates "a cycle" are of one multiprocessor (SM)."""

    name: str
    processors: int
    clock: float  # Hz
    dram: float  # bytes/s that a copy reaches
    l2: float  # bytes/s out of L2, all SMs together
    l2_size: int  # bytes
    macs: Mapping[int, float]  # dense multiply-adds of tensor cores a cycle, by the bits of an operand; 32 is TF32
    reached: float  # the part of it that a large product reaches, which runs at a lower clock
    mma_sync: float  # the part of it that HMMA, mma.sync, reaches
    latency: float  # cycles of a load from device memory
    launch: float  # µs that a kernel takes of its own, with nothing to do
    shared: int = 228 * 1024  # bytes, of all programs of an SM
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    # The following are equal on 8.0, 9.0 and 10.0 (CUDA programming guide, "Arithmetic Instructions").
    issue: float = 4.0  # instructions of a warp: four schedulers, one each
    special: float = 16.0  # results of ex2, rcp, rsqrt …
    shared_bytes: float = 128.0  # to and from shared memory and L1: 32 banks of 4 bytes


MACHINES = {
    # A100 80 GB SXM, datasheet: 312 TF/s bf16 = 2 · 1024 · 108 · 1.41 GHz, 2.04 TB/s. L2: whitepaper, 5,120 bytes a
    # cycle. Latency: Luo et al., arXiv 2501.12084. The parts that are reached, and the launch: assumed, as on an H100.
    "sm_80": Machine(
        "A100 80 GB", 108, 1.41e9, 0.9 * 2.04e12, 5120 * 1.41e9, 40 << 20, {16: 1024, 32: 512, 64: 64},
        0.8, 1.0, 466, 2.0, shared=164 * 1024,
    ),
    # H200 SXM, datasheet: 989 TF/s bf16 = 2 · 2048 · 132 · 1.83 GHz. Measured by this project, 2026-11-26: 4.22 TB/s of
    # a large copy, 707 TF/s of a large product (cuBLAS, 8192³, on random numbers). L2: assumed, the A100's bytes a
    # cycle; 4096³, forward in 193 µs with tiles of 128×256, takes 8.5 TB/s. Latency, and mma.sync's 63 % of wgmma: Luo
    # et al.
    "sm_90": Machine(
        "H200", 132, 1.83e9, 4.22e12, 5120 * 1.83e9, 60 << 20, {16: 2048, 32: 1024, 64: 128}, 707 / 989, 0.63, 479, 2.0,
    ),
    # B200, datasheet: 2.25 PF/s bf16 = 2 · 4096 · 148 · 1.86 GHz, 8 TB/s. The rest is assumed: as an H200, with the L2
    # of two dies, and an mma.sync as fast as there.
    "sm_100": Machine(
        "B200", 148, 1.86e9, 0.9 * 8e12, 2 * 5120 * 1.86e9, 126 << 20, {16: 4096, 32: 2048, 64: 64}, 0.8, 0.31, 479, 2.0
    ),
}  # fmt: skip


class Occupancy(NamedTuple):
    programs: int  # resident on an SM at a time
    limit: str  # what there is no more of


def occupancy(machine: Machine, registers: int, shared: int, num_warps: int) -> Occupancy:
    """How many programs of `registers` a thread, `shared` bytes and `num_warps` an SM holds, and what limits them.

    As in NVIDIA's occupancy calculator: a warp's registers come in units of 256, each of the four schedulers has a
    quarter of the registers for its own warps, and shared memory comes in units of 128 bytes.
    """
    of_warp = 256 * cdiv(max(registers, 1) * WARP, 256)
    warps = 4 * (machine.registers // 4 // of_warp)
    limits = {
        "registers": warps // num_warps,
        "shared memory": machine.shared // (128 * cdiv(shared + RESERVED_SHARED, 128)),
        "warps": machine.warps // num_warps,
        "programs": machine.programs,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit)
