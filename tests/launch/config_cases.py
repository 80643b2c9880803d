"""Problems that configs are chosen for, of every kind, for the files that test configs."""

from collections.abc import Iterator
from typing import Any

from tribp.launch.arch import ITEMSIZE, Arch, precision_of
from tribp.launch.reduce_config import ReduceProblem
from tribp.ops.conv3x3.config import ConvProblem, ConvWgradProblem
from tribp.ops.conv3x3.config_depthwise import DepthwiseProblem
from tribp.ops.conv3x3.config_few_channels import FewChannelsDgradProblem, FewChannelsProblem
from tribp.ops.conv3x3.config_relayout import RelayoutProblem
from tribp.ops.linear.config import BackwardProblem, DgradProblem, ForwardProblem, OutputGradProblem, WgradProblem

PRODUCTS = [(4096, 4096, 4096), (65536, 256, 784), (8192, 1024, 1024), (512, 128, 784), (64, 10, 128), (1000, 77, 333)]
LONG = [(64, 128, 9216), (256, 512, 32000), (8, 512, 20000)]  # sums that forward has in parts
FEW_IMAGES = [(1, 7, 7, 512, 512), (2, 8, 8, 1280, 1280), (1, 16, 16, 64, 1280)]  # sums in parts
IMAGES = [(64, 56, 56, 64, 64), (256, 7, 7, 512, 512), (3, 33, 29, 7, 9), (1, 1, 300, 24, 200), (256, 14, 14, 256, 256)]
COLUMNS = [(64, 100, 1, 512, 512), (600, 50, 1, 2, 2)]  # images of one column: sequences, of many channels and of few
DTYPES = list(ITEMSIZE)


def problems(arch: Arch) -> list[Any]:
    """Many of every kind, each once."""
    return list(dict.fromkeys(_problems(arch)))


def _problems(arch: Arch) -> Iterator[Any]:
    for dtype in DTYPES:
        for tf32 in (False, True):
            precision = precision_of(dtype, tf32, arch)
            for vec, tma in ((16 // ITEMSIZE[dtype], True), (16 // ITEMSIZE[dtype], False), (1, False)):
                yield from _products(dtype, precision, arch, vec, tma)
                yield from _convolutions(dtype, precision, arch, vec, tma)
        yield from _passes(dtype, arch)
    for parts, length in ((2, 10), (16, 1 << 20), (500, 256), (70_000, 3)):
        yield ReduceProblem(parts, length, arch)
        yield ReduceProblem(parts, length, arch, rows=9, vec=1)


def _products(dtype: str, precision: str, arch: Arch, vec: int, tma: bool) -> Iterator[Any]:
    for m, n, k in LONG:
        yield ForwardProblem(m, n, k, dtype, precision, arch, vec, tma)
    for m, n, k in PRODUCTS:
        facts = (m, n, k, dtype, precision, arch, vec, tma)
        for costly in (False, True):
            yield ForwardProblem(*facts, costly=costly)
        backward = BackwardProblem(m, min(n, 16), k, dtype, precision, arch, vec)
        if backward.pays:
            yield backward
        for may_fuse in (False, True):
            for for_lower in (False, True):
                yield DgradProblem(*facts, may_fuse, for_lower=for_lower)
            for spare in (0, 1 << 40):
                yield WgradProblem(*facts, may_fuse, spare)


def _convolutions(dtype: str, precision: str, arch: Arch, vec: int, tma: bool) -> Iterator[Any]:
    facts = (dtype, precision, arch, vec)
    for n, p, q, o, c in FEW_IMAGES:
        for wide in (False, True):
            yield ConvProblem(n, p, q, o, c, 1, 1, 1, *facts, tma, not wide, False, wide, False)
    for n, p, q, o, c in IMAGES:
        yield FewChannelsDgradProblem(n, p, q, min(o, 256 // ITEMSIZE[dtype]), dtype, precision, arch, tma)
        for spare in (0, 1 << 40):
            yield ConvWgradProblem(n, p, q, o, c, 1, 1, *facts, tma, spare)
        for classes, whole, wide in ((1, False, False), (1, True, False), (4, False, True)):
            yield ConvProblem(n, p, q, o, c, 1, 1, classes, *facts, tma, classes == 1, whole, wide, classes > 1)
        yield ConvProblem(n, p, q, 32, 32, 4, 8, 1, *facts, False, True, True, False, False)
        # One output channel a group: descriptors can read a pixel's row of all groups, but not a tile's one channel.
        yield ConvProblem(n, p, q, 128, 1, 8, 1, 1, *facts[:3], 1, tma, False, True, False, False)


def _passes(dtype: str, arch: Arch) -> Iterator[Any]:
    for m, n, _ in PRODUCTS:
        yield OutputGradProblem(m, n, dtype, arch)
    for n, p, q, o, c in (*IMAGES, *COLUMNS):
        yield RelayoutProblem(n, p * q, c, dtype, arch)
        for flag in (False, True):
            for wgrad in (False, True):
                yield DepthwiseProblem(n, p, q, c, dtype, arch, flag, wgrad)
                yield FewChannelsProblem(n, p, q, o, 3, dtype, arch, wgrad, flag and wgrad, wgrad)
