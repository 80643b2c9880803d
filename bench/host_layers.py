"""What layers cost the host: the part of `python -m bench host` that is about calls, repeated ones and the first.

`python -m bench.host_layers "the demo's MLP"` is a first training step, forward and backward of one of STEPS, in a
process of its own: Triton keeps what it has compiled, in the process and in a folder. Kernels are compiled for an H100,
not launched.
"""

import contextlib
import copy
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp.demo import models
from tribp.dispatch import plain_cpu_call
from tribp.launch.arch import ARCHS
from tribp.ops.train_step import graphs

from .conv3x3 import ConvCase
from .no_gpu import always, pretending, pretending_h100, pretending_h100_anew
from .timing import Comparison, Conditions, Repeated, Samples

Started = AbstractContextManager[Samples]
# -- calls, repeated --------------------------------------------------------------------------------------------------

Function = Callable[..., Tensor]


def calls(ours: Function, theirs: Function, sizes: Sequence[tuple[int, ...]], backward: bool) -> Started:
    """One function of tribp's and one of torch's, on the same small tensors. backward: and all gradients.

    tribp's calls go through Triton's own launcher to a driver that launches nothing (`no_gpu.py`): what is left out is
    the part of a launch that is in C. torch has no such seam: beside them stand torch's operators on small CPU tensors,
    which compute next to nothing. They show what dispatch and autograd cost torch, but not its CUDA launches.
    """

    def repeated(function: Function, conditions: Conditions) -> Repeated:
        tensors = [torch.randn(size) for size in sizes]
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        for tensor in tensors:
            tensor.requires_grad_(backward)
        grad = torch.randn_like(theirs(*tensors), requires_grad=False) if backward else None

        def call() -> None:
            y = function(*tensors)
            if grad is not None:
                torch.autograd.grad(y, tensors, grad)

        return Repeated(call, conditions)

    providers = {
        "tribp": repeated(ours, pretending_h100),
        "tribp, a first call": repeated(ours, pretending_h100_anew),
        "torch, on the CPU": repeated(theirs, contextlib.nullcontext),
    }
    return contextlib.nullcontext({name: provider.sample for name, provider in providers.items()})


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w, b))


FUNCTIONS: dict[str, tuple[Function, Function, Sequence[tuple[int, ...]]]] = {
    "linear_sigmoid": (tribp.linear_sigmoid, linear, [(16, 16), (16, 16), (16,)]),
    "conv3x3": (
        partial(tribp.conv3x3, padding=1),
        partial(F.conv2d, padding=1),
        [(1, 16, 4, 4), (16, 16, 3, 3), (16,)],
    ),
}


def on_cpu(ours: Function, theirs: Function, sizes: Sequence[tuple[int, ...]]) -> Started:
    """A small call on the CPU, without gradients: torch's operators compute it, once they are known to be able to."""
    x, w, b = (torch.randn(size) for size in sizes)
    calls: dict[str, Callable[[], object]] = {
        "tribp": lambda: ours(x, w, b),
        "torch": lambda: theirs(x, w, b),
        "torch, asked first": lambda: plain_cpu_call(x, w, b) and theirs(x, w, b),
    }
    return contextlib.nullcontext({name: Repeated(call, contextlib.nullcontext).sample for name, call in calls.items()})


def fused(backward: bool) -> Started:
    """A small model of torch's on the CPU, and what `tribp.fuse` makes of it. backward: and all gradients."""
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    plain = nn.Sequential(*layers).requires_grad_(backward)
    taken, x, grad = copy.deepcopy(plain), torch.randn(1, 8), torch.ones(1, 8)
    tribp.fuse(taken)

    def call(model: nn.Module) -> None:
        y = model(x)
        if backward:
            torch.autograd.grad(y, list(model.parameters()), grad)

    models = {"tribp": taken, "torch": plain}
    return contextlib.nullcontext(
        {name: Repeated(partial(call, model), contextlib.nullcontext).sample for name, model in models.items()}
    )


@contextlib.contextmanager
def replaying_h100() -> Iterator[None]:
    """As `pretending_h100`, with graphs that replay nothing."""
    obstacle = graphs.obstacle

    def capture(captured: graphs.CapturedStep, step: graphs.StepFunction) -> None:
        captured._loss = step(*captured._batch)
        captured._graph = SimpleNamespace(replay=always(None))  # type: ignore[assignment]

    with (
        pretending_h100(),
        mock.patch.object(graphs, "obstacle", lambda optimizer, device: obstacle(optimizer, torch.device("cuda"))),
        mock.patch.object(graphs.CapturedStep, "capture", capture),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", always(False)),
    ):
        yield


def train_steps() -> Started:
    """A training step of a small perceptron, in three launches and replayed; torch's separate steps as in `calls`."""
    torch.manual_seed(0)
    batch, sizes = (torch.randn(16, 16), torch.randn(16, 4)), (16, 16, 4)

    def repeated(conditions: Conditions, cuda_graph: bool) -> Repeated:
        model = tribp.nn.MLP(sizes, "sigmoid", "sigmoid")
        adam = tribp.optim.Adam(model.parameters(), capturable=True)
        step = tribp.train_step(model, adam, "mse_loss", cuda_graph=cuda_graph)
        with conditions():
            for _ in range(3):
                step(*batch)
        assert step.reason is None, step.reason
        assert (step.graph_reason is None) == cuda_graph, step.graph_reason
        return Repeated(partial(step, *batch), conditions)

    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Sigmoid(), nn.Linear(*sizes[1:]), nn.Sigmoid())
    adam = torch.optim.Adam(model.parameters())

    def separate() -> None:
        adam.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        adam.step()

    providers = {
        "tribp": repeated(pretending_h100, False),
        "tribp, replayed": repeated(replaying_h100, True),
        "torch, on the CPU": Repeated(separate, contextlib.nullcontext),
    }
    return contextlib.nullcontext({name: provider.sample for name, provider in providers.items()})


# -- the first training step ------------------------------------------------------------------------------------------

BATCH = 64


def resnet18(batch: int, dtype: torch.dtype, *, last: bool) -> list[ConvCase]:
    """The 3×3 convolutions of a ResNet-18 for images of 224²: without bias, for a BatchNorm follows each."""
    layer = partial(ConvCase, dtype=dtype, last=last, bias=False)
    layers = 4 * [layer((batch, 64, 64, 56, 56))]
    for (c, before), (o, after) in itertools.pairwise([(64, 56), (128, 28), (256, 14), (512, 7)]):
        layers += [layer((batch, c, o, before, before), stride=2), *3 * [layer((batch, o, o, after, after))]]
    return layers


def step_of_model(name: str) -> Callable[[], object]:
    layers = models.MODELS[name].layers()
    images, grad = torch.rand(BATCH, models.SIZES[0]), torch.rand(BATCH, models.CLASSES)
    return lambda: layers(images).backward(grad)


def step_of_convolutions(dtype: torch.dtype, last: bool) -> Callable[[], object]:
    layout = torch.channels_last if last else torch.contiguous_format

    def step() -> None:
        for case in resnet18(BATCH, dtype, last=last):
            x, w, dy = (torch.empty(size, dtype=dtype).to(memory_format=layout) for size in case.sizes)
            y = tribp.conv3x3(x.requires_grad_(), w.requires_grad_(), stride=case.stride, padding=1)
            torch.autograd.grad(y, (x, w), dy)

    return step


STEPS: Mapping[str, Callable[[], Callable[[], object]]] = {
    "the demo's MLP": lambda: step_of_model("mlp"),
    "the demo's CNN": lambda: step_of_model("cnn"),
    "ResNet-18's convolutions": lambda: step_of_convolutions(torch.float32, False),
    "ResNet-18's convolutions, bfloat16, channels_last": lambda: step_of_convolutions(torch.bfloat16, True),
}


def first_step(of: str) -> Started:
    """Measured once, for a sample takes seconds. of: one of STEPS."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.host_layers", of]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        kernels = len(list(Path(cache).rglob("*.cubin")))
    us, launches = json.loads(done.stdout)
    return contextlib.nullcontext({f"tribp, {launches} launches of {kernels} kernels": lambda: us})


def comparisons() -> Iterator[Comparison]:
    whats = ((False, "forward"), (True, "with gradients"))
    for name, functions in FUNCTIONS.items():
        for backward, what in whats:
            yield Comparison(f"{name}, {what}", partial(calls, *functions, backward))
    for name, what, sizes in (
        ("linear_sigmoid", "1x10x128", [(1, 128), (10, 128), (10,)]),
        ("conv3x3", "1 to 6 channels, 32²", [(1, 1, 32, 32), (6, 1, 3, 3), (6,)]),
    ):
        yield Comparison(f"{name} on the CPU, {what}", partial(on_cpu, *FUNCTIONS[name][:2], sizes))
    for backward, what in whats:
        yield Comparison(f"fuse on the CPU, {what}", partial(fused, backward))
    yield Comparison("train_step", train_steps)
    for of in STEPS:
        yield Comparison(f"first step, {of}", partial(first_step, of))


def time_step(name: str) -> tuple[float, int]:
    """µs of processor time, of this process and of the assembler it has called, on any core; launches."""
    launches: list[Any] = []
    step = STEPS[name]()
    for operation in ("conv3x3", "linear"):  # what is imported with the first call is not compiled
        importlib.import_module(f"tribp.ops.{operation}.plan")
    with pretending(ARCHS["sm_90"], lambda metadata, grid, arguments: launches.append(grid)):
        started = sum(os.times()[:4])
        step()
        return 1e6 * (sum(os.times()[:4]) - started), len(launches)


if __name__ == "__main__":
    print(json.dumps(time_step(sys.argv[1])))
