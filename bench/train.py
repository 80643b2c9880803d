"""`tribp.train_step`: forward, loss, backward and update of a small perceptron. A shape is as that of `mlp`."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp.launch.arch import Arch, cdiv
from tribp.training import train_step

from . import linear
from .expectations import PIPELINED, Expectation, Launch, size
from .model import work as model
from .operation import TOLERANCE, Action, Case, Given, KernelTests, Operation, Reference, Target, Work, best_compiled

DIGITS, DIGITS3 = (784, 128, 10), (784, 256, 64, 10)
BF16, FP32 = torch.bfloat16, torch.float32
LR = 1e-3


def cases() -> list[Case]:
    shapes = [*((rows, *DIGITS) for rows in (16, 128)), (128, *DIGITS3), (1, 2, 2, 1), (1024, 64, 64, 10)]
    return [Case(shape, dtype, small=True) for dtype in (FP32, BF16) for shape in shapes]


Step = Callable[[Tensor, Tensor], Tensor]
Make = Callable[..., Step]  # of a model, and options of Adam


def ours(net: nn.Module, **options: Any) -> Step:
    return train_step(net, tribp.optim.Adam(net.parameters(), lr=LR, **options), "cross_entropy")


def replayed(net: nn.Module, **options: Any) -> Step:
    adam = tribp.optim.Adam(net.parameters(), lr=LR, **{**options, "capturable": True})
    return train_step(net, adam, "cross_entropy", cuda_graph=True)


def ordinary(optimizer: Any, prepared: Callable[[nn.Module], Any] = lambda net: net) -> Make:
    """Separate steps: a model's forward, torch's loss and backward, an optimizer's step."""

    def make(net: nn.Module, **options: Any) -> Step:
        adam, run = optimizer(net.parameters(), lr=LR, **options), prepared(net)

        def step(x: Tensor, target: Tensor) -> Tensor:
            adam.zero_grad()
            loss = F.cross_entropy(run(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            return loss.detach()

        return step

    return make


def fused(net: nn.Module) -> nn.Module:
    tribp.fuse(net)
    return net


def providers(case: Case, without_compile: str) -> Mapping[str, Any]:
    """replayed: by a CUDA graph that the step makes. separate: tribp's layers and optimizer, without the fused step."""
    return {
        "tribp": ours,
        "replayed": replayed,
        "eager": ordinary(torch.optim.Adam),
        "separate": ordinary(tribp.optim.Adam, fused),
        "compile": without_compile or ordinary(torch.optim.Adam, best_compiled),
    }


@dataclass
class TrainWorkload:
    """A step's loss and gradients, of torch's layers with ReLU between them.

    Not the parameters: Adam divides a gradient by its size, and a change says little of it.
    """

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        rows, *sizes = self.case.shape
        layers = [layer for k, n in itertools.pairwise(sizes) for layer in (nn.Linear(k, n), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1]).to(self.device, self.case.dtype)
        self.x = self.case.normal(self.device, rows, sizes[0])
        self.target = torch.randint(sizes[-1], (rows,), device=self.device)

    @functools.cached_property
    def reference(self) -> Mapping[str, Reference]:
        exact = copy.deepcopy(self.net).double()
        values = self._results(ordinary(torch.optim.SGD), exact, self.x.double())
        return {name: Reference(value, float(value.norm())) for name, value in values.items()}

    def results(self, make: Make, direction: str) -> Mapping[str, Tensor]:
        return self._results(make, copy.deepcopy(self.net), self.x)

    def _results(self, make: Make, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        loss = make(net)(x, self.target)
        grads = {f"{name}.grad": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        return {"loss": loss} | grads

    def action(self, make: Make, direction: str, *, captured: bool = False) -> Action:
        step = make(copy.deepcopy(self.net), **{"capturable": True} if captured else {})
        for _ in range(2):  # the second call may capture what the third replays
            step(self.x, self.target)
        return Action(lambda: step(self.x, self.target))

    def allowed(self, name: str, baseline: float) -> float:
        """As for a gradient of a layer, with a rounding more each layer."""
        return max((len(self.case.shape) - 1) * TOLERANCE[self.case.dtype], 2 * baseline)


def work(case: Case, direction: str) -> Work:
    """Parameters and Adam's states read and written once, their gradients written and read; the input read once."""
    rows, *sizes = case.shape
    weights = sum(k * n for k, n in itertools.pairwise(sizes))
    parameters = weights + sum(sizes[1:])
    return Work((8 * parameters + rows * sizes[0]) * case.dtype.itemsize, 3 * 2 * rows * weights)


def targets(case: Case, direction: str) -> list[Target]:
    """By launches: 3 or 4 of some 20 of eager torch's."""
    return [Target("eager", 2.0), Target("compile", 1.0)] if case.dtype == FP32 else []


def compiled(everything: bool) -> Iterator[tuple[Case, Sequence[str]]]:
    odd, float64 = (33, 77, 45, 7), torch.float64
    some = [Case((128, *DIGITS3), FP32), Case(odd, BF16), Case((128, *DIGITS), float64)]
    others = [Case(odd, float64), *cases()] if everything else []
    yield from ((case, ["step"]) for case in [*some, *others])


def expectations(launch: Launch, case: Case, arch: Arch) -> Iterator[Expectation]:
    if launch.kernel.__name__ == "forward":
        yield from linear.expectations(launch, case, arch)
        return
    rows = launch.kernel.__name__ == "train_rows"
    few_turns = rows and (launch.named["FIRST"] or case.shape[1] < 512)
    # Rows of 16-bit numbers with an odd pitch are not loaded ahead, and loops of few turns are unrolled: of 13 turns
    # for sm_80, in whose machine code each turn loads the tile of a later one.
    if min(case.shape[1:]) % 2 == 0 and not few_turns:
        may_unroll = rows and not arch.has_tma
        yield PIPELINED._replace(check=lambda code: None if may_unroll and not code.loops else PIPELINED.check(code))


def rows_work(given: Given, grid: tuple[int, ...], case: Case) -> dict[str, Any]:
    """Every layer's product forward from FIRST on, and all but the first's backward, one after the other."""
    pairs = [*itertools.pairwise(given["SIZES"])]
    products = [*pairs[given["FIRST"] :], *((n, k) for k, n in pairs[1:])]
    turns = sum(cdiv(length, given["BLOCK_L"]) for length, _ in products)
    macs = sum(length * width for length, width in products) * given["BLOCK_M"]
    return model.product(given, "x", turns, macs / turns) | dict(chain=len(products))


def weights_work(given: Given, grid: tuple[int, ...], case: Case) -> dict[str, Any]:
    turns = cdiv(given["M"], given["BLOCK_ROWS"])
    return model.product(given, "x", turns, size(given, "BLOCK_ROWS", "BLOCK_N", "BLOCK_K"))


OPERATION = Operation(
    name="train",
    summary="tribp.train_step against separate steps",
    cases=cases(),
    smoke_cases=[Case((33, 16, 24, 8), BF16, small=True), Case((20, 7, 19, 5), FP32)],
    directions=("step",),
    peers=("eager", "replayed", "separate", "compile"),
    providers=providers,
    workload=TrainWorkload,
    work=work,
    targets=targets,
    compiled=compiled,
    expectations=expectations,
    kernel_work={**linear.OPERATION.kernel_work, "train_rows": rows_work, "train_weights": weights_work},
    tests=KernelTests(["tests/training"], ["tests/training", "-k", "matches_torch"], ["tests/training", "-k", "spec"]),
    of_others=("multi_tensor_step",),
    columns=(
        "case", "clock", "tribp", "replayed", "eager", "separate", "compile", "vs eager", "launches", "host", "graph",
    ),
    graph_calls=1,
)  # fmt: skip
