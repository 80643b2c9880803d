"""No lane of a convolution kernel, masked or not, points outside its tensor (pytorch #186440 read 16 GiB away).

The interpreter shows each address before the mask is applied.
"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import tribp
from tribp import dispatch
from tribp.launch.launches import Launch

from ..covering import turn
from .cases import CASES, Case

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="addresses are seen by the interpreter alone")


@triton.jit
def unclamped(x, out, rows, cols, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads rows × cols with a mask, and forms the addresses of what it masks all the same."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i * cols, mask=i < rows, other=0.0)
    tl.store(out + tl.where(i < rows, i, 0), value, mask=i < rows)


class Watch:
    """The memory of the launch that runs, and the lanes that pointed elsewhere."""

    def __init__(self) -> None:
        self.memory: list[tuple[int, int]] = []
        self.strays: list[str] = []
        self.lanes = 0
        self.descriptors = 0  # in one of theirs: they clamp by themselves

    def allow(self, arguments: tuple[object, ...]) -> None:
        single = [item for a in arguments for item in (a if isinstance(a, tuple) else [a])]
        tensors = [getattr(a, "base", a) for a in single]  # a descriptor's tensor
        self.memory = []
        for t in tensors:
            if isinstance(t, Tensor):
                extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
                self.memory.append((t.data_ptr(), t.data_ptr() + extent * t.element_size()))

    def look(self, addresses: Any, what: str) -> None:
        if self.descriptors:
            return
        self.lanes += addresses.size
        inside = sum((addresses >= first) & (addresses < end) for first, end in self.memory)
        if not inside.all():
            self.strays.append(f"{(~inside.astype(bool)).sum()} lanes of {what}")


@pytest.fixture
def watch(kernels: str, every_launch: None, monkeypatch: pytest.MonkeyPatch) -> Watch:
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Watch()
    run = Launch.run

    def watched(name: str) -> None:
        original = getattr(InterpreterBuilder, name)

        def access(self: Any, ptrs: Any, *rest: Any, **more: Any) -> Any:
            descriptor = "descriptor" in name
            if not descriptor:
                seen.look(ptrs.data, name)
            seen.descriptors += descriptor
            try:
                return original(self, ptrs, *rest, **more)
            finally:
                seen.descriptors -= descriptor

        monkeypatch.setattr(InterpreterBuilder, name, access)

    for name in ("create_masked_load", "create_masked_store", "create_descriptor_load", "create_descriptor_store"):
        watched(name)

    def watched_run(self: Launch) -> None:
        seen.allow(self.arguments)
        run(self)

    monkeypatch.setattr(Launch, "run", watched_run)
    return seen


def test_a_stray_lane_is_seen(watch: Watch) -> None:
    x, out = torch.zeros(3, 5), torch.zeros(3)
    Launch(unclamped, (1,), (x, out, 3, 5), dict(BLOCK=4), 1).run()
    assert watch.strays == ["1 lanes of create_masked_load"]


@pytest.mark.parametrize("name", CASES)
def test_every_lane_points_into_its_tensor(name: str, watch: Watch) -> None:
    case: Case = CASES[name]
    x, w, b = case.make(torch.float32, "cpu")
    last = turn([False, True], name)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    inputs = [t.requires_grad_() for t in (x, w, b) if t is not None]
    y = tribp.conv3x3(x, w, b, case.stride, case.padding, case.groups, case.activation)
    torch.autograd.grad(y, inputs, torch.randn_like(y))
    assert watch.lanes > 0
    assert watch.strays == []


def test_an_infinity_where_groups_are_taken_apart(watch: Watch) -> None:
    x, w = torch.randn(1, 12, 5, 6), torch.randn(20, 3, 3, 3)
    x[0, 3, 2, 2] = torch.inf
    tribp.conv3x3(x, w, None, 1, 1, 4)
    assert watch.strays == []
