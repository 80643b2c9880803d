"""Run as a program, with Triton compiling: are a repeated call's launches those that Triton itself would perform?"""

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import LazyDict
from triton.knobs import HookChain

import tribp
import tribp.optim
from bench.no_gpu import Described, pretending, pretending_cuda
from tribp.launch import launches
from tribp.launch import plan as plans
from tribp.launch.arch import ARCHS
from tribp.launch.buffer import Memory

BF16 = torch.bfloat16


def last(*size: int) -> Tensor:
    return torch.randn(size, dtype=BF16).to(memory_format=torch.channels_last)


def linear(k: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(64, k, dtype=dtype), torch.randn(32, k, dtype=dtype), torch.randn(32, dtype=dtype)]


def conv(**options: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return tribp.conv3x3(x, w, b, padding=1, **options)

    return call


# A kernel takes about a second to compile: each way to launch one once.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "linear": (tribp.linear_sigmoid, lambda: linear(64, BF16)),
    "odd linear": (tribp.linear_sigmoid, lambda: linear(33, torch.float32)),
    "dense, stride 2": (conv(stride=2, activation="sigmoid"), lambda: [last(2, 16, 8, 8), last(16, 16, 3, 3)]),
    "NCHW": (conv(), lambda: [torch.randn(2, 9, 8, 8), torch.randn(8, 9, 3, 3), torch.randn(8)]),
}

WITH_DESCRIPTORS = ("linear", "dense, stride 2", "NCHW")

Performed = list[object]


class Seen:
    """What the driver was told to perform. Memory is kept, so that no address stands for two tensors."""

    def __init__(self) -> None:
        self.launches: list[Performed] = []
        self._addresses: list[int] = []
        self._kept: list[object] = []
        self.told = 0

    def begin(self) -> None:
        self.launches, self._addresses, self._kept = [], [], []
        self.told = 0  # of how many launches hooks were told

    def allocate(self, memory: Memory, really: Callable[[Memory], Tensor] = Memory.allocate) -> Tensor:
        tensor = really(memory)
        self._kept.append(tensor)
        return tensor

    def performed(self, metadata: Any, grid: tuple[int, ...], arguments: tuple[object, ...]) -> None:
        self.launch(metadata.name, metadata.hash, grid, *arguments)

    def launch(self, *arguments: object) -> None:
        self.launches.append([self._comparable(a) for a in arguments])

    def _number(self, address: int) -> int:
        if address not in self._addresses:
            self._addresses.append(address)
        return self._addresses.index(address)

    def _comparable(self, argument: Any) -> object:
        """Tensors by the order in which they are met: their addresses differ from call to call."""
        if isinstance(argument, Tensor):
            self._kept.append(argument)
            return "tensor", self._number(argument.data_ptr()), argument.dtype
        if isinstance(argument, (tuple, list)):
            return tuple(map(self._comparable, argument))
        if isinstance(argument, (HookChain, LazyDict)):  # Triton tells even a chain of no hooks
            self.told += isinstance(argument, LazyDict)
            return None
        if isinstance(argument, Described):
            return "descriptor", self._number(argument.address), argument.says
        if hasattr(argument, "block_shape"):
            rest = {name: value for name, value in vars(argument).items() if name != "base"}
            return "descriptor", self._comparable(argument.base), rest
        return argument


def compare_steps(seen: Seen) -> int:
    """Optimizer steps, with a norm and without, under a GradScaler and not; returns how many launches were compared."""
    params = [torch.randn(n).requires_grad_() for n in (5, 100)]
    optimizer: Any = tribp.optim.Adam(params, fused=True, max_grad_norm=1.0, weight_decay=0.1)
    compared = 0

    def step() -> list[Performed]:
        for p in params:
            p.grad = torch.randn_like(p)
        seen.begin()
        optimizer.step()
        return seen.launches

    for scale in (None, torch.tensor(4.0), torch.rand(2)[1]):  # the last one's address is no multiple of 16
        optimizer.grad_scale, optimizer.found_inf = scale, None if scale is None else torch.tensor(0.0)
        step()
        (bucket,) = optimizer._plan.buckets
        known = len(bucket._plans)
        repeated = step()
        assert len(bucket._plans) == known, "the norm's launch and the step's are to be remembered"
        bucket._plans.clear()
        expected = step()
        assert repeated == expected, f"{scale}:\n{repeated}\n{expected}"
        compared += len(repeated)
    return compared


def main(target: str) -> int:
    seen = Seen()
    compared = 0
    arch = ARCHS[target]
    pretended = pretending_cuda(arch, seen.launch) if arch.backend == "cuda" else pretending(arch, seen.performed)
    with pretended, mock.patch.object(Memory, "allocate", lambda memory: seen.allocate(memory)):
        for name, (function, make) in CASES.items():
            first, second = ([t.requires_grad_() for t in make()] for _ in range(2))

            def perform(tensors: list[Tensor], function: Callable[..., Tensor] = function) -> list[Performed]:
                seen.begin()
                y = function(*tensors)
                torch.autograd.grad(y, tensors, torch.ones_like(y))
                return seen.launches

            perform(first)
            repeated = perform(second)
            assert plans.planned.cache_info().currsize == 2, f"{name}: forward and backward are to be remembered"
            assert not seen.told, name
            if arch.backend == "cuda":
                described = launches.encoded.cache_info().currsize
                assert bool(described) == (name in WITH_DESCRIPTORS), f"{name}: descriptors are to be remembered, too"
                with mock.patch.object(knobs.runtime, "launch_enter_hook", print):
                    assert len(perform(second)) == seen.told, f"{name}: a hook is to be told of each launch"
            plans.forget()
            expected = perform(second)
            plans.forget()
            assert repeated, name
            assert repeated == expected, f"{name}:\n{repeated}\n{expected}"
            compared += len(repeated)
        compared += compare_steps(seen)
    print(f"{compared} launches compared")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
