"""Convolutions to test with, laid out in memory in every way: for the files that test `tribp.conv3x3`."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tribp

from ..oracle import Activation, Conv3x3, activated


class Case(NamedTuple):
    size: tuple[int, int, int, int]  # N, C, H, W
    out: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    activation: Activation = None
    bias: bool = True

    def ours(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return tribp.conv3x3(x, w, b, self.stride, self.padding, self.groups, self.activation)

    def exact(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Conv3x3:
        return Conv3x3(x, w, b, self.stride, self.padding, self.groups, self.activation)

    def theirs(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, w, b, self.stride, self.padding, 1, self.groups)
        return activated(y, self.activation)

    def make(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias, whose outputs are of size 1."""
        fan = self.size[1] // self.groups * 9
        x = torch.randn(self.size, dtype=torch.float64).to(device, dtype)
        w = (torch.randn(self.out, fan // 9, 3, 3, dtype=torch.float64) / fan**0.5).to(device, dtype)
        b = torch.randn(self.out, dtype=torch.float64).to(device, dtype) if self.bias else None
        return x, w, b


# Few input channels and many, one channel a group and several, groups that fill a tile and that do not; images smaller
# and wider than a tile; outputs that see zeros alone, and rows that no window sees; sums that are split (the
# interpreter's tiles have 32 pixels and 32 channels, and a kernel costs it 10 ms a tile and tap).
CASES = {
    "one pixel": Case((1, 1, 1, 1), 1, padding=(1, 1)),
    "image": Case((2, 3, 9, 9), 8, padding=(1, 1), activation="sigmoid"),
    "strided image": Case((2, 3, 7, 6), 18, (2, 2), (1, 1)),
    "wide image": Case((3, 4, 9, 34), 12, padding=(2, 1)),
    "dense": Case((2, 12, 3, 6), 16, padding=(1, 1), activation="sigmoid"),
    "many channels": Case((1, 34, 4, 3), 20, padding=(1, 1), bias=False),
    "many pixels": Case((2, 8, 16, 9), 8, padding=(1, 1), activation="sigmoid"),
    "wide": Case((1, 9, 3, 34), 7, padding=(0, 1)),
    "strided": Case((2, 17, 8, 7), 9, (2, 2), (1, 1), activation="sigmoid"),
    "strided, unseen": Case((2, 16, 6, 8), 5, (2, 2), (0, 0)),
    "strided across": Case((2, 8, 5, 6), 16, (1, 2), (1, 0), activation="sigmoid", bias=False),
    "strided down": Case((1, 10, 8, 3), 34, (2, 1), (0, 2)),
    "far padding": Case((1, 9, 2, 3), 5, padding=(4, 3)),
    "far padding, strided": Case((1, 5, 3, 2), 6, (2, 2), (3, 5), activation="sigmoid"),
    "groups": Case((1, 21, 4, 5), 35, padding=(1, 1), groups=7, activation="sigmoid"),
    "strided groups": Case((2, 15, 7, 6), 10, (2, 2), (1, 1), groups=5, bias=False),
    "large groups": Case((1, 34, 3, 4), 36, (1, 2), (2, 1), groups=2),
    "many to one": Case((2, 24, 4, 4), 3, padding=(1, 1), groups=3, activation="sigmoid"),
    "depthwise": Case((1, 20, 9, 5), 20, padding=(1, 1), groups=20, activation="sigmoid"),
    "strided depthwise": Case((1, 9, 9, 8), 9, (2, 2), (0, 1), groups=9, bias=False),
    "multiplied depthwise": Case((1, 5, 7, 4), 15, (2, 1), (1, 2), groups=5),
}

# One for each way that the kernels go.
WAYS = {
    "small": Case((2, 3, 3, 4), 5, padding=(1, 1), activation="sigmoid"),
    "dense": Case((2, 8, 3, 4), 10, padding=(1, 1), activation="sigmoid"),
    "groups": Case((2, 8, 4, 3), 4, (2, 1), (1, 1), groups=2),
    "depthwise": Case((2, 6, 4, 3), 6, padding=(1, 1), groups=6, activation="sigmoid"),
}


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def images_last(t: Tensor) -> Tensor:
    return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def every_other(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]


def cropped(t: Tensor) -> Tensor:
    """The middle of a larger image: rows apart, and an address that is a multiple of nothing."""
    return F.pad(t, (1, 2, 1, 1), value=torch.nan)[..., 1:-1, 1:-2]


def cropped_last(t: Tensor) -> Tensor:
    return last(F.pad(t, (1, 1, 1, 1), value=torch.nan))[..., 1:-1, 1:-1]


def sliced_last(t: Tensor) -> Tensor:
    """Some channels of more."""
    return last(torch.cat([t, torch.full_like(t, torch.nan)], 1))[:, : t.shape[1]]


def one_image(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def one_channel(t: Tensor) -> Tensor:
    return t[:, :1].expand_as(t)


def one_pixel(t: Tensor) -> Tensor:
    """As the gradient of a mean over the pixels lies in memory."""
    return t[:, :, :1, :1].expand_as(t)


def one_number(t: Tensor) -> Tensor:
    return t[:1, :1, :1, :1].expand_as(t)


Layout = Callable[[Tensor], Tensor]
DENSE: list[Layout] = [contiguous, last, transposed, images_last]
LAYOUTS = [*DENSE, every_other, cropped, cropped_last, sliced_last, one_image, one_channel, one_pixel, one_number]


def grad_of(case: Case, x: Tensor, w: Tensor) -> Tensor:
    return torch.randn_like(case.theirs(x, w, None), memory_format=torch.contiguous_format)


@pytest.fixture
def ieee() -> Iterator[None]:
    """float32 as such: on CUDA torch's convolutions default to TF32."""
    torch.backends.cudnn.allow_tf32 = False  # of convolutions and RNNs: torch.export refuses to see them differ
    yield
    torch.backends.cudnn.allow_tf32 = True
