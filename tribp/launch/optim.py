"""The config of an optimizer's step, and what its kernels are compiled for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .arch import Arch, power_of_2
from .configs import REASON_INTERPRETED, legal_threads, register_limit
from .neighbors import Steps, by_two

SMALL_STEP = 1 << 22  # elements of float32, up to which blocks of 512 were the faster ones


class StepConfig(NamedTuple):
    """What `multi_tensor_step` is compiled for. Types are Triton's; None: no tensor of the launch has that buffer."""

    PARAM_TYPE: Any
    GRAD_TYPE: Any
    STATE0_TYPE: Any
    STATE1_TYPE: Any
    STATE2_TYPE: Any
    EMA_TYPE: Any
    SCALAR_TYPE: Any  # of the rule's states of one number a tensor
    ACC: Any  # the type that updates are computed in
    ON_DEVICE: bool  # some hyperparameters are tensors on the device
    EPS_INSIDE: bool  # √(v + ε) in place of √v + ε
    STOCHASTIC: bool  # round parameters at random
    CODED: bool  # some states are codes of 8 bits
    PTX: bool  # the target takes PTX; AMD's do not
    RESIDUAL: bool  # parameters have 8 bits more
    OPTIONAL: bool  # some tensors lack a buffer that others have
    LAYOUT_DIMS: int  # of the rows of sizes and strides; 0: no tensor's parts differ in layout
    BLOCK: int  # elements


class NormConfig(NamedTuple):
    """What `gradient_norm` is compiled for."""

    GRAD_TYPE: Any
    LAYOUT_DIMS: int
    BLOCK: int
    LAST: bool  # the last launch of this norm: it adds up the partial results of all


@dataclass(frozen=True)
class MultiTensorConfig:
    """Of a pass over many tensors (`kernels/optim.py`): a program takes `chunk_blocks` blocks of one tensor."""

    block: int
    chunk_blocks: int
    num_warps: int
    reason: str
    max_registers: int | None = None

    @property
    def chunk(self) -> int:
        return self.block * self.chunk_blocks


class MultiTensorProblem(NamedTuple):
    """The optimizer step, and the pass over the gradients before it, of `elements` numbers in all."""

    elements: int
    types: tuple[str, ...]  # of the parameters, gradients and states, each once, in alphabetical order
    strided: bool  # some of them do not have the layout of the others
    arch: Arch

    def steps(self) -> Steps:
        return dict(chunk_blocks=by_two, block=by_two, num_warps=by_two)

    def choose(self) -> MultiTensorConfig:
        elements, types, strided, arch = self
        if arch.backend == "interpreter":
            return MultiTensorConfig(64, 2, 1, REASON_INTERPRETED)
        half, warps, most = bool({"float16", "bfloat16"} & set(types)), 4, 8
        narrow = half or "int8" in types
        if "float64" in types:
            block, reason = 512, "derived: 4 elements a thread: two 16-byte accesses to each operand"
        elif arch.backend == "hip":
            block = 2048 if half else 1024
            reason = "derived: 8 elements a thread: a 16-byte access to each 16-bit operand"
        elif strided:
            # Compiled: the addresses of 8 elements a thread leave no registers if all is on (44 bytes).
            block, reason = 512, "compiled: 4 elements a thread: strided addresses take many registers"
        elif narrow or elements <= SMALL_STEP:
            # µs: 1,000 tensors of 512: 21 with blocks of 1,024, 13; Adam's states of 8 bits, 1e8: 588, 562; bfloat16's
            # of float32: 579, 561; 1,000 tensors of 4,096, a program for every tensor and for every 1,024: 37, 48.
            block, warps, reason = 512, 2, "measured on sm_90: 8 elements a thread; smaller blocks end sooner"
            most = 16 if narrow else 8
        else:
            block, reason = 1024, "measured on sm_90: 8 elements a thread; blocks of 512 are 1 % slower"
        # A program reads three tables, one after the other, before its first element. Many blocks share that, but never
        # so many that a processor gets fewer than 8 programs.
        blocks = min(most, power_of_2(max(1, elements // (block * 8 * arch.processors))))
        # Compiled: left to itself, ptxas holds float64 to a step of occupancy, and Adagrad spills 8 bytes for it. So
        # does Triton 3.7's with strided codes if all is on: 4 bytes for 128 registers.
        holds = "float64" in types or (strided and "int8" in types)
        limit = register_limit(arch) if holds else None
        return MultiTensorConfig(block, blocks, warps, reason, limit)

    def adjusted(self, config: MultiTensorConfig) -> MultiTensorConfig:
        return config

    def is_legal(self, config: MultiTensorConfig) -> bool:
        least = 32 if self.arch.backend == "interpreter" else 256
        sizes = 1 <= config.chunk_blocks <= 32 and least <= config.block <= 4096
        return sizes and legal_threads(config, self.arch, wgmma=False)
