"""The entry of `linear_sigmoid`: y = σ(x·wᵀ + b), x (M, K), w (N, K)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import tribp
from tribp.launch.arch import Arch

from .autograd import DIRECTIONS, DifferentiableProblem
from .registry import Case, KernelTests, KernelWork, Operation, StaticCase, Target, Work

if TYPE_CHECKING:
    from tribp.launch.plan import Launch

    from .expectations import Expectation

SQUARE, SQUARISH, TALL = (4096, 4096, 4096), (8192, 1024, 1024), (65536, 256, 784)
TINY, ODD = (64, 10, 128), (1000, 77, 333)
SHAPES = [SQUARE, TALL, SQUARISH, (65536, 1024, 256), (512, 128, 784), TINY, ODD]
SMALL = {(512, 128, 784), TINY, ODD}  # under 10 µs of work: a launch costs as much
PRECISIONS = [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True), (torch.float16, False)]

# Of bfloat16, what the model leaves room for: eager torch's kernels at the same ceilings, over tribp's with one launch
# for both sums of partial results. At 4096³ the products are nearly all, and take both as long.
REACHABLE: dict[tuple[int, ...], dict[str, float]] = {
    SQUARE: {"forward": 1.04, "backward": 0.98, "frozen input": 1.0},
    TALL: {"forward": 1.4, "backward": 1.12, "frozen input": 1.45},
    SQUARISH: {"forward": 1.2, "backward": 1.12, "frozen input": 1.45},
}


def cases() -> list[Case]:
    return [Case(shape, dtype, tf32, shape in SMALL) for dtype, tf32 in PRECISIONS for shape in SHAPES]


def smoke_cases() -> list[Case]:
    """A size that tiles evenly and an odd one; interpreted, a program costs 6 ms."""
    return [
        Case((32, 16, 48), torch.bfloat16, small=True),
        Case((33, 7, 19), torch.float16),
        Case((33, 7, 19), torch.float32),
        Case((16, 16, 32), torch.float32, tf32=True),
    ]


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w, b))


def problem(case: Case, device: torch.device) -> DifferentiableProblem:
    """Fresh inputs, scaled as a trained layer's are: z has a standard deviation near 1, so σ does not saturate."""
    m, n, k = case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).to(case.dtype)

    arguments = {"input": normal(m, k), "weight": normal(n, k) * k**-0.5, "bias": normal(n)}
    return DifferentiableProblem(arguments, normal(m, n), eager, scales, case.tf32)


def scales(arguments: Mapping[str, Tensor], output_grad: Tensor) -> dict[str, float]:
    """The bias's gradient sums rows of either sign, and can be as small as it likes."""
    y = eager(*arguments.values())
    return {"bias": float((output_grad * y * (1 - y)).norm(dim=0).norm())}


def work(case: Case, direction: str) -> Work:
    """Each input read once, each output written once; both directions are the two one after the other."""
    m, n, k = case.shape
    x, w, b, y = m * k, n * k, n, m * n
    forward = Work(x + w + b + y, 2 * m * n * k)
    backward = Work((y + y + x + w) + (x + w + b), 4 * m * n * k)
    elements = {
        "forward": forward,
        "backward": backward,
        "frozen input": Work((y + y + x) + (w + b), 2 * m * n * k),
        "both": Work(forward.bytes + backward.bytes, forward.operations + backward.operations),
    }[direction]
    return replace(elements, bytes=elements.bytes * case.dtype.itemsize)


def targets(case: Case, direction: str) -> list[Target]:
    """What was set for an H100: ratios of torch's time to tribp's."""
    found = [Target("eager", 1.0, "memory")] if direction == "both" else []
    if case.dtype == torch.bfloat16:
        found.append(Target("compile", 1.0))  # never slower
        ratio = REACHABLE.get(case.shape, {"forward": 1.0}).get(direction)
        found += [Target("eager", ratio)] if ratio else []
    named = case.shape in REACHABLE
    if case.dtype == torch.float32 and not case.tf32 and direction in ("forward", "backward") and named:
        found.append(Target("eager", 1.5))
    return found


def launches(
    case: Case, direction: str, arch: Arch, *, x_transposed: bool = False, w_transposed: bool = False
) -> "list[Launch]":
    """The launches of one direction, on tensors without memory."""
    from tribp.launch.plan import launches_of
    from tribp.ops.linear_sigmoid import plan

    def empty(*shape: int, transposed: bool = False) -> Tensor:
        tensor = torch.empty(shape[::-1] if transposed else shape, device="meta", dtype=case.dtype)
        return tensor.t() if transposed else tensor

    m, n, k = case.shape
    x, w = empty(m, k, transposed=x_transposed), empty(n, k, transposed=w_transposed)
    b, y, dx, dw, db = empty(n), empty(m, n), empty(m, k), empty(n, k), empty(n)
    if direction == "forward":
        return launches_of(plan.forward, arch, (x, w, b, y), tf32=case.tf32)
    wanted = {
        "backward": (dx, dw, db),
        "frozen input": (None, dw, db),
        "frozen weight": (dx, None, None),
        "bias only": (None, None, db),
        "without bias": (dx, dw, None),
    }[direction]
    return launches_of(plan.backward, arch, (empty(m, n), x, w, y, *wanted), tf32=case.tf32)


# What is compiled without a GPU: bf16 over the whole grid, the others where their rules differ from it.
EVEN = (1000, 78, 334)  # rows of an even length: 4-byte loads, the narrowest that pipeline
APART = ("forward", "backward", "frozen input", "frozen weight")
STATIC = [
    (torch.bfloat16, False, SHAPES, APART),
    (torch.bfloat16, False, [EVEN], ("forward", "backward")),
    (torch.float32, False, [SQUARISH, TINY, ODD], APART),
    (torch.float32, True, [SQUARISH], APART),
    (torch.float16, False, [ODD], ("forward", "backward")),
    (torch.float64, False, [SQUARISH, ODD], ("forward", "backward")),
]
LAYOUTS = ("x transposed", "w transposed")


def static_cases(arch: Arch, everything: bool) -> Iterator[StaticCase]:
    for dtype, tf32, shapes, directions in STATIC:
        if tf32 and arch.backend == "hip":
            continue  # gfx942 has no TF32: the same code again
        main = shapes is SHAPES
        for shape in [*SHAPES, EVEN] if everything else shapes:
            case = Case(shape, dtype, tf32)
            for direction in APART if everything else directions:
                yield from _static(case, direction, arch)
            if everything or (main and shape == SQUARE):
                yield from _static(case, "bias only", arch)
        if everything or main:
            for layout in LAYOUTS:
                for direction in ("forward", "backward"):
                    yield from _static(Case(SQUARISH, dtype, tf32), direction, arch, layout)


def _static(case: Case, direction: str, arch: Arch, layout: str = "") -> Iterator[StaticCase]:
    transposed = dict(x_transposed=layout == "x transposed", w_transposed=layout == "w transposed")
    name = ", ".join(part for part in (f"{case.name} {direction}", layout) if part)
    for launch in launches(case, direction, arch, **transposed):
        yield StaticCase(name, launch, expectations(launch, case, arch))


def expectations(launch: "Launch", case: Case, arch: Arch) -> "Sequence[Expectation]":
    """What the launch's machine code must show; no spills and enough shared memory are expected of every kernel."""
    from . import expectations as e

    constants, kernel = launch.named, launch.kernel.__name__
    found = []
    if kernel in ("forward", "dgrad", "wgrad"):
        found.append(e.PIPELINED)
        # Where dz is formed on load, it is the second operand.
        rows = constants["BLOCK_K" if constants.get("FUSE_DZ") else "BLOCK_N" if kernel == "wgrad" else "BLOCK_M"]
        assert isinstance(rows, int)
        rows = rows if launch.num_warps >= 4 else 0  # two warps, so that mma.sync multiplies
        if matrix := e.matrix_instructions(rows, case.dtype, arch):
            found.append(e.multiplies_with(*matrix[0], reason=matrix[1]))
        if (stores := wide_stores(launch, arch)) is not None:
            found.append(stores)
    elif kernel == "output_grad":
        if bytes_of(launch.arguments[1], constants["VEC"]) == 16:
            found.append(e.wide("loads", 128, "rows of dy and y are multiples of 16 bytes"))
            if constants["dz"] is not None:
                found.append(e.wide("stores", 128, "rows of dz are multiples of 16 bytes"))
    elif kernel == "reduce_partials" and all(
        bytes_of(launch.arguments[0], constants[v]) == 16 for v in ("VEC", "VEC2")
    ):
        found.append(e.wide("loads", 128, "rows of partial sums are multiples of 16 bytes"))
    return found


def wide_stores(launch: "Launch", arch: Arch) -> "Expectation | None":
    """How wide a product has to store its tile."""
    from .expectations import tile_stores, wide

    out, constants = launch.arguments[3], launch.named
    if constants.get("TMA_STORE"):
        return wide("stores", 128, "the descriptor's store writes whole lines")
    assert isinstance(out, Tensor)
    threads = launch.num_warps * (64 if arch.backend == "hip" else 32)
    sides = {"forward": "MN", "dgrad": "MK", "wgrad": "NK"}[launch.kernel.__name__]
    share = math.prod(int(str(constants[f"BLOCK_{side}"])) for side in sides) // threads  # of the tile, in elements
    return tile_stores(bytes_of(out, constants["VEC_STORE"]), bytes_of(out, share), out.dtype, arch)


def bytes_of(tensor: object, vec: object) -> int:
    assert isinstance(tensor, Tensor)
    assert isinstance(vec, int)
    return vec * tensor.element_size()


def kernel_work() -> KernelWork:
    from .work import LINEAR

    return LINEAR


OPERATION = Operation(
    name="linear",
    summary="tribp.linear_sigmoid against sigmoid(linear(…))",
    cases=cases(),
    smoke_cases=smoke_cases(),
    directions=DIRECTIONS,
    contenders={"tribp": tribp.linear_sigmoid, "eager": eager},
    problem=problem,
    work=work,
    targets=targets,
    launches=launches,
    static_cases=static_cases,
    tests=KernelTests(
        ["tests/test_linear_kernels.py", "tests/test_linear_sigmoid.py", "tests/test_torch_integration.py",
         "tests/test_plan.py", "tests/test_runtime.py", "-k", "not 31_elements"],
        ["tests/test_linear_kernels.py", "-k", "bfloat16 and not gpu"],
        ["tests/test_linear_kernels.py", "-k", "reduce_partials and bfloat16"],
    ),
    switches=("TMA", "PREFETCH", "PERSISTENT", "FUSE_DZ", "X_TRANSPOSED", "W_TRANSPOSED"),
    kernel_work=kernel_work,
)  # fmt: skip
