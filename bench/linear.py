"""`linear`: y = act(x·wᵀ + b), x (M, K), w (N, K)."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tribp
from tribp.launch.arch import Arch, cdiv
from tribp.ops.activations import activate, activation_of

from . import expectations as expect
from .expectations import Expectation, Launch, size
from .model import work as model
from .operation import Case, DifferentiableWorkload, Given, KernelTests, Operation, Target, Work, functions, layer_work

SQUARE, SQUARISH, TALL = (4096, 4096, 4096), (8192, 1024, 1024), (65536, 256, 784)
TINY, ODD = (64, 10, 128), (1000, 77, 333)
WIDER, DIGITS = (65536, 1024, 256), (512, 128, 784)
SHAPES: list[tuple[int, ...]] = [SQUARE, TALL, SQUARISH, WIDER, DIGITS, TINY, ODD]
# Few tiles, long sums: a transformer's feed-forward layer of 512 and 2,048 tokens, the first of VGG-16's classifier, a
# language model's head for 256 tokens (its dx in parts), and a layer of a small network for digits (its y in parts).
MIDDLE = [(512, 768, 3072), (2048, 768, 3072), (64, 4096, 25088), (256, 32000, 512), (64, 128, 9216)]
# The layers of `mlp`'s cases that are not among these, one by one: what a backward pass across them is compared with.
LAYERS = [(65536, 10, 256), (262144, 64, 64), (262144, 16, 64), (128, 256, 784), (128, 64, 256), (128, 10, 64)]
SMALL = {DIGITS, TINY, ODD, *LAYERS[3:]}  # under 10 µs of work: a launch costs as much
PRECISIONS = [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True), (torch.float16, False)]

# Of bfloat16, what the model leaves room for: eager torch's kernels at the same ceilings, over tribp's with one launch
# for both sums of partial results. At 4096³ the products are nearly all, and take both as long. At 8192×1024×1024 with
# wgrad only, L2 allows 1.37 by the model (TUNING.md): tiles of 128×256 read dy and y four times and x eight times.
REACHABLE: dict[tuple[int, ...], dict[str, float]] = {
    SQUARE: {"forward": 1.04, "backward": 0.98, "wgrad only": 1.0},
    TALL: {"forward": 1.4, "backward": 1.12, "wgrad only": 1.45},
    SQUARISH: {"forward": 1.2, "backward": 1.12, "wgrad only": 1.33},
}


@dataclass(frozen=True)
class LinearCase(Case):
    """Of the sigmoid, where nothing else is said."""

    activation: str = "sigmoid"
    transposed: str = ""  # "x" or "w", whose columns are contiguous then

    @property
    def name(self) -> str:
        activation = [self.activation] if self.activation != "sigmoid" else []
        layout = [f"{self.transposed} transposed"] if self.transposed else []
        return " ".join([super().name, *activation, *layout])


def cases() -> list[LinearCase]:
    """And ReLU, which cuBLASLt has as an epilogue: see `cublaslt`."""
    first, *others = [
        [LinearCase(shape, dtype, tf32, shape in SMALL) for shape in SHAPES] for dtype, tf32 in PRECISIONS
    ]
    middle = [LinearCase(shape, torch.bfloat16, activation="relu") for shape in MIDDLE]
    layers = [LinearCase(shape, torch.bfloat16, small=shape in SMALL) for shape in LAYERS]
    relu = [replace(case, activation="relu") for case in first]
    return [*first, *relu, *middle, *layers, *itertools.chain(*others)]


# A size that tiles evenly and an odd one; interpreted, a program costs 6 ms.
SMOKE_CASES = [
    LinearCase((32, 16, 48), torch.bfloat16, small=True),
    LinearCase((33, 7, 19), torch.float16, activation="relu"),
    LinearCase((33, 7, 19), torch.float32),
    LinearCase((16, 16, 32), torch.float32, tf32=True),
]


def eager(x: Tensor, w: Tensor, b: Tensor, *, activation: str | None) -> Tensor:
    return activate(F.linear(x, w, b), *activation_of("bench", activation))


class _CublasLt(torch.autograd.Function):
    """relu(x·wᵀ + b) by one launch of cuBLASLt, the gradients by the operations that eager torch has for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = torch._addmm_activation(b, x, w.t())
        ctx.save_for_backward(x, w, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, w, y), (needs_x, needs_w, needs_b) = ctx.saved_tensors, ctx.needs_input_grad
        dz = torch.ops.aten.threshold_backward(dy, y, 0)
        return dz @ w if needs_x else None, dz.t() @ x if needs_w else None, dz.sum(0) if needs_b else None


def cublaslt(x: Tensor, w: Tensor, b: Tensor, *, activation: str | None) -> Tensor:
    """`eager` with cuBLASLt's epilogue: what torch has nearest to a fused layer, though `F.linear` does not call it."""
    y: Tensor = _CublasLt.apply(x, w, b)  # type: ignore[no-untyped-call]
    return y


def providers(case: LinearCase, without: str) -> Mapping[str, Any]:
    fused = (
        cublaslt if case.activation == "relu" else "skipped: torch calls cuBLASLt's epilogue for ReLU and GELU alone"
    )
    return {**functions(tribp.linear, eager)(case, without), "cublaslt": fused}


def workload(case: LinearCase, device: torch.device) -> DifferentiableWorkload:
    """Fresh inputs, scaled as a trained layer's are: z has a standard deviation near 1, so σ does not saturate."""
    m, n, k = case.shape
    normal, options = partial(case.normal, device), {"activation": case.activation}
    x = normal(k, m).t() if case.transposed == "x" else normal(m, k)
    w = normal(k, n, std=k**-0.5).t() if case.transposed == "w" else normal(n, k, std=k**-0.5)
    arguments = {"input": x, "weight": w, "bias": normal(n)}
    return DifferentiableWorkload(arguments, normal(m, n), eager, case.tf32, options)


def work(case: Case, direction: str) -> Work:
    m, n, k = case.shape
    return layer_work(case, direction, x=m * k, w=n * k, b=n, y=m * n, dz=2 * m * n, operations=2 * m * n * k)


def targets(case: Case, direction: str) -> list[Target]:
    """What was set for an H100: ratios of torch's time to tribp's."""
    targets = [Target("eager", 1.0, "memory")] if direction == "both" else []
    if case.dtype == torch.bfloat16:
        targets.append(Target("compile", 1.0))  # never slower
        ratio = REACHABLE.get(case.shape, {"forward": 1.0}).get(direction)
        targets += [Target("eager", ratio)] if ratio else []
    elif direction in ("forward", "backward") and case.dtype_name == "float32" and case.shape in REACHABLE:
        targets.append(Target("eager", 1.5))
    return targets


# What is compiled without a GPU: bf16 over the whole grid, the others where their rules differ from it.
EVEN = (1000, 78, 334)  # rows of an even length: 4-byte loads, the narrowest that pipeline
APART = ("forward", "backward", "wgrad only", "dgrad only")
Shapes = Sequence[tuple[int, ...]]
COMPILED: dict[tuple[torch.dtype, bool], tuple[Shapes, tuple[str, ...]]] = {
    (torch.bfloat16, False): ([SQUARE, TALL, SQUARISH, ODD], APART),
    (torch.float32, False): ([SQUARISH, ODD], APART),
    (torch.float32, True): ([SQUARISH], APART),
    (torch.float16, False): ([ODD], ("forward", "backward")),
    (torch.float64, False): ([SQUARISH], ("forward", "backward")),
}


def compiled(everything: bool) -> Iterator[tuple[LinearCase, Sequence[str]]]:
    for (dtype, tf32), (some, directions) in COMPILED.items():
        main = dtype == torch.bfloat16
        for shape in [*SHAPES, *MIDDLE, EVEN] if everything else some:
            bias_only = ["bias only"] if everything or (main and shape == SQUARE) else []
            yield LinearCase(shape, dtype, tf32), [*(APART if everything else directions), *bias_only]
        if main and not everything:
            yield LinearCase(MIDDLE[-2], dtype, tf32), ("dgrad only",)
            yield LinearCase(MIDDLE[-1], dtype, tf32), ("forward",)
        if everything or main:
            for side in "xw":
                yield LinearCase(SQUARISH, dtype, tf32, transposed=side), ("forward", "backward")
            # Softplus takes most instructions, and these next to it.
            for activation in ("relu", "tanh", "elu", "softplus") if everything else ("softplus",):
                yield LinearCase(SQUARISH, dtype, tf32, activation=activation), ("forward", "backward")


def expectations(launch: Launch, case: Case, arch: Arch) -> Iterator[Expectation]:
    given, kernel = launch.named, launch.kernel.__name__
    if kernel in ("forward", "dgrad", "wgrad"):
        yield expect.PIPELINED
        # Where dz is formed on load, it is the second operand.
        rows = "BLOCK_K" if given.get("FUSE_DZ") else "BLOCK_N" if kernel == "wgrad" else "BLOCK_M"
        yield from expect.product(given[rows], case.dtype, launch, arch)
        out, sides = {"forward": ("y", "MN"), "dgrad": ("dx", "MK"), "wgrad": ("dw", "NK")}[kernel]
        if given.get("TMA_STORE"):
            yield expect.wide("stores", 128, "the descriptor's store writes whole lines")
        else:
            yield from expect.tile_stores(launch, out, [f"BLOCK_{side}" for side in sides], arch)
    elif kernel == "backward":
        yield expect.PIPELINED
        yield from expect.product(given["BLOCK_M"], case.dtype, launch, arch)
        yield from expect.tile_stores(launch, "dx", ["BLOCK_M", "BLOCK_K"], arch)
    elif kernel == "output_grad" and expect.row_bytes(launch, "y", "VEC") == 16:
        yield expect.wide("loads", 128, "rows of dy and y are multiples of 16 bytes")
        if given["dz"] is not None:
            yield expect.wide("stores", 128, "rows of dz are multiples of 16 bytes")
    elif kernel in ("output", "reduce_partials"):
        yield from expect.partial_sums(launch)


# -- what a launch does -----------------------------------------------------------------------------------------------


def product_work(given: Given, grid: tuple[int, ...], case: Any, operand: str, out: str, sides: str) -> dict[str, Any]:
    """Of a product whose result has tiles of the first two sides, and whose sum runs over the third."""
    (height, rows), (width, cols), (length, _) = (_tiles(given, side) for side in sides)
    block, itemsize, wgrad = f"BLOCK_{sides[2]}", model.itemsize(given, operand), out == "dw"
    outer = (cdiv(rows * cols, grid[0]),) if given.get("PERSISTENT") else ()
    share = given["rows_per_split"] if wgrad else given["columns_per_split"] if out == "y" else length
    steps = cdiv(share, given[block])
    work = model.product(given, operand, steps, size(given, "BLOCK_M", "BLOCK_N", "BLOCK_K"), outer)
    if not wgrad and given["PREFETCH"]:  # by hand: what is left of the sum comes before the loop
        work |= dict(turns=share // given[block])
    read = 2 if given.get("FUSE_DZ") else 1  # dy and y, or one tensor
    loaded = itemsize * length * (read * height * cols + width * rows)
    if given.get("lower_y") is not None:  # dgrad's epilogue
        loaded += itemsize * height * width
    stored = math.prod(grid[1:]) * height * width * model.itemsize(given, out)
    if given.get("dz_out") is not None:
        stored += length * height * itemsize
    if out == "y" and given["b"] is not None:
        work |= dict(chain=2)
    return work | model.traffic(given, loaded, stored, math.prod(grid))


def _tiles(given: Given, side: str) -> tuple[int, int]:
    """A side's length, and how many tiles it has."""
    return given[side], cdiv(given[side], given[f"BLOCK_{side}"])


def backward_work(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    """Two products a turn."""
    (rows, splits), itemsize = (given["M"], cdiv(given["M"], given["rows_per_split"])), model.itemsize(given, "x")
    (length, columns), outputs = _tiles(given, "K"), given["N"]
    turns = cdiv(given["rows_per_split"], given["BLOCK_M"])
    work = model.product(given, "x", turns, 2 * size(given, "BLOCK_M", "BLOCK_N", "BLOCK_K"))
    read = 1 if given["y"] is None else 2  # dy and y, or one tensor
    loaded = itemsize * (rows * length + columns * read * rows * outputs + splits * outputs * length)
    stored = itemsize * rows * length + splits * outputs * length * model.itemsize(given, "dw")
    return work | model.traffic(given, loaded, stored, grid[0])


def output_grad_work(given: Given, grid: tuple[int, ...], case: Any) -> dict[str, Any]:
    turns = cdiv(given["rows_per_program"], given["BLOCK_M"]) * (given["parts"] or 1)
    return dict(turns=turns, step=2 * size(given, "BLOCK_M", "BLOCK_N") * model.itemsize(given, "y"), chain=0)


OPERATION = Operation(
    name="linear",
    summary="tribp.linear against act(linear(…))",
    cases=cases(),
    smoke_cases=SMOKE_CASES,
    directions=("forward", "backward", "wgrad only", "both"),
    providers=providers,
    peers=("eager", "cublaslt", "compile"),
    workload=workload,
    work=work,
    targets=targets,
    compiled=compiled,
    expectations=expectations,
    kernel_work={
        "forward": partial(product_work, operand="x", out="y", sides="MNK"),
        "dgrad": partial(product_work, operand="dx", out="dx", sides="MKN"),
        "wgrad": partial(product_work, operand="x", out="dw", sides="NKM"),
        "backward": backward_work,
        "output_grad": output_grad_work,
        "output": model.output,
        "reduce_partials": model.reduce_partials,
    },
    tests=KernelTests(
        ["tests/linear/test_kernels.py", "tests/linear/test_function.py",
         "tests/torch_machinery/test_integration.py", "tests/launch/test_plan.py", "tests/test_dispatch.py",
         "-k", "not 31_elements"],
        ["tests/linear/test_kernels.py", "-k", "bfloat16 and not gpu"],
        ["tests/linear/test_kernels.py", "-k", "reduce_partials and bfloat16"],
        large=["tests/linear/test_kernels.py"],
        kernels=["tests/linear/test_kernels.py"],
    ),
)  # fmt: skip
