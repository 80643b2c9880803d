"""What a call of a layer's function costs the host: the part of `python -m bench host` that is about calls.

tribp's calls go all the way to a driver that launches nothing (`no_gpu.py`), so what is left out is the driver's own
part of a launch. torch has no such seam: beside them stand torch's operators on CPU tensors so small that they compute
next to nothing. They show what dispatch and autograd cost torch, but not the launches of its CUDA kernels.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import tribp
from tribp.launch.arch import ARCHS

from .no_gpu import pretending

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
SAMPLE_US = 1e4


@dataclass(frozen=True)
class Calls:
    """One function of tribp's and one of torch's, on the same small tensors."""

    name: str
    ours: Function
    theirs: Function
    sizes: Sequence[tuple[int, ...]]
    backward: bool  # and all gradients
    targets: Sequence[object] = ()  # nobody set any

    @contextlib.contextmanager
    def start(self) -> "Iterator[Mapping[str, Calling]]":
        yield {
            "tribp": Calling(self.ours, self, pretended=True),
            "tribp, a first call": Calling(self.ours, self, pretended=True, anew=True),
            "torch, on the CPU": Calling(self.theirs, self, pretended=False),
        }


class Calling:
    """A function that is called again and again. anew: each call is worked out as if there had been none before."""

    def __init__(self, function: Function, calls: Calls, *, pretended: bool, anew: bool = False) -> None:
        self._function, self._pretended, self._anew = function, pretended, anew
        self._tensors = [torch.randn(size) for size in calls.sizes]
        if len(calls.sizes[0]) == 4:
            self._tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in self._tensors]
        for tensor in self._tensors:
            tensor.requires_grad_(calls.backward)
        self._grad = torch.randn_like(calls.theirs(*self._tensors), requires_grad=False) if calls.backward else None
        self._calls = 1
        for _ in range(3):
            once = self.sample()
        self._calls = max(1, min(1000, int(SAMPLE_US / once)))

    def sample(self) -> float:
        """µs a call."""
        if not self._pretended:
            return self._time()
        with pretending(ARCHS["sm_90"]):
            return self._time()

    def _time(self) -> float:
        from tribp.launch import plan as plans

        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # as `host.Running` does
        started = clock()
        for _ in range(self._calls):
            if self._anew:
                plans.forget()
            y = self._function(*self._tensors)
            if self._grad is not None:
                torch.autograd.grad(y, self._tensors, self._grad)
        return 1e6 * (clock() - started) / self._calls


def comparisons() -> list[Calls]:
    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x, w, b))

    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1)

    matrices = [(16, 16), (16, 16), (16,)]
    images = [(1, 16, 4, 4), (16, 16, 3, 3), (16,)]
    return [
        Calls(f"{name}, {'with gradients' if backward else 'forward'}", ours, theirs, sizes, backward)
        for name, ours, theirs, sizes in (
            ("linear_sigmoid", tribp.linear_sigmoid, linear, matrices),
            ("conv3x3", lambda x, w, b: tribp.conv3x3(x, w, b, padding=1), conv, images),
        )
        for backward in (False, True)
    ]
