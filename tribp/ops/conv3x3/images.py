"""Images in memory: how kernels read them, and the pass that brings them into an order that kernels can read."""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import dtype_name
from ...kernels import common
from ...kernels import relayout as kernels
from ...launch.arch import Arch, cdiv
from ...launch.calls import scratch
from ...launch.conv3x3 import Box, Relayout, choose_relayout
from ...launch.layout import Launch, Partials, accumulator, descriptor, partials_of, vector_length
from ...versions import descriptor_unit


class Image(NamedTuple):
    """A tensor (N, C, H, W) as kernels read it: which dimension is contiguous, and how wide an access can be."""

    tensor: Tensor
    strides: tuple[int, int, int, int]  # of N, C, H, W; those of dimensions of length 1 as if it were dense
    channels_last: bool  # channels are contiguous; else columns are
    vec: int  # elements, 16 bytes at most, that divide the other strides, the contiguous length and the address
    tma: bool  # whether a tensor descriptor can describe it

    def argument(
        self, use_tma: bool, box: Box, channels: int, precision: str, step: tuple[int, int] = (1, 1)
    ) -> object:
        """The kernel argument: the tensor itself, or a descriptor of boxes of every step-th pixel (`load_box`)."""
        if not use_tma:
            return self.tensor
        (n, c, h, w), (stride_n, _, stride_h, stride_w), (sh, sw) = self.tensor.shape, self.strides, step
        shape = [n, cdiv(h, sh), sh, cdiv(w, sw), (sw - 1) * stride_w + c]
        strides = [stride_n, stride_h * sh, stride_h, stride_w * sw, 1]
        block = [box[0], box[1], 1, box[2], channels]
        if box[1] * box[2] == 1:
            for dimensions in (shape, strides, block):
                dimensions.insert(3, dimensions.pop(0))
        return descriptor(self.tensor, shape, strides, block, precision)


def image(tensor: Tensor, channels_last: bool) -> Image:
    """`tensor`, whose channels or columns are contiguous."""
    size, stride = tensor.shape, list(tensor.stride())
    extent = 1
    for d in (1, 3, 2, 0) if channels_last else (3, 2, 1, 0):
        if size[d] == 1:
            stride[d] = extent
        extent = max(extent, stride[d] * size[d])
    itemsize, inner = tensor.element_size(), 1 if channels_last else 3
    others = [stride[d] for d in range(4) if d != inner]
    aligned = tensor.data_ptr() % 16 == 0
    vec = vector_length(itemsize, size[inner], *others) if aligned else 1
    unit = descriptor_unit(itemsize, bool(common.INTERPRETED))
    tma = channels_last and aligned and all(s > 0 and s % unit == 0 for s in others)
    return Image(tensor, (stride[0], stride[1], stride[2], stride[3]), channels_last, vec, tma)


def padded(channels: int, itemsize: int) -> int:
    """The channels, and as many more as make a row of whole 16 bytes."""
    return cdiv(channels, 16 // itemsize) * (16 // itemsize)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether to take a tensor (N, C, H, W) for channels_last: if it is, and not at the same time contiguous."""
    return tensor.stride(1) == 1 and not tensor.is_contiguous()


def dense_image(tensor: Tensor) -> Image:
    """A tensor that tribp allocated: contiguous or channels_last."""
    return image(tensor, is_channels_last(tensor))


def with_unit_stride(tensor: Tensor, channels_last: bool) -> Image:
    """The tensor with contiguous channels or columns; torch copies what has neither."""
    inner = 1 if channels_last else 3
    if tensor.shape[inner] > 1 and tensor.stride(inner) != 1:
        tensor = tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return image(tensor, channels_last)


class Move(NamedTuple):
    """One tensor to be packed."""

    src: "Planes"
    dst: Tensor
    sizes: tuple[int, ...]  # the kernel's, but for its programs
    vecs: tuple[int, ...]  # of src's strides, of pixels, of channels and of dst's: elements that divide them
    settings: Relayout

    @property
    def programs(self) -> int:
        """For each of `columns`."""
        tiles, n, pixels = self.sizes[:3]
        return cdiv(n * cdiv(pixels, self.settings.block_p), tiles)

    @property
    def columns(self) -> int:
        return cdiv(self.dst.shape[1], self.settings.block_c)

    def arguments(self, programs: int) -> tuple[object, ...]:
        return self.src.tensor, self.dst, programs, *self.sizes

    def config(self, vecs: tuple[int, ...], third: kernels.Pack | None = None) -> kernels.Pack:
        vec, vec_p, vec_c, vec_dst = vecs
        s = self.settings
        return kernels.Pack(
            self.src.pixels, self.src.channels, vec, vec_p, vec_c, vec_dst, s.block_p, s.block_c, THIRD=third
        )

    @property
    def form(self) -> tuple[object, ...]:
        """What the code depends on, besides how wide its accesses are."""
        return self.src.pixels, self.src.channels, self.settings.block_p, self.settings.block_c, *self.launched

    @property
    def launched(self) -> tuple[object, ...]:
        return self.settings.num_warps, self.settings.max_registers


class Packing:
    """What a call's dense kernels read, and the launches that pack those of it that do not lie so: one, if possible."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._moves: list[Move] = []
        self.others: list[Launch] = []  # that write what is needed, too

    def image(self, tensor: Tensor, groups: int) -> Image:
        """The tensor as dense kernels read it: channels side by side, at least four bytes to an access.

        Derived: cp.async moves four bytes or more, so two-byte reads are not pipelined, and there are nine of each
        element. Two for a copy of all cost less. It has rows of whole 16 bytes, unless groups follow one another.
        """
        if fits_dense(tensor):
            return image(tensor, True)
        channels = padded(tensor.shape[1], tensor.element_size()) if groups == 1 else tensor.shape[1]
        return self.pack(tensor, channels_last_scratch(tensor, channels))

    def pack(self, src: Tensor, dst: Tensor, swapped: bool = False) -> Image:
        """dst, which is channels_last: src, with zeros in the channels dst has more.

        swapped: src with images and channels exchanged. (A view given as src would be no tensor that `calls` knows.)
        """
        view = src.transpose(0, 1) if swapped else src
        plane = planes(view)
        if plane.tensor is view:
            plane = plane._replace(tensor=src)
        n, c, height, width = view.shape
        pixels, channels = height * width, dst.shape[1]
        s = choose_relayout(n, pixels, channels, dtype_name(src.dtype), self._arch)
        vecs = (plane.vec, *(vector_length(src.element_size(), length) for length in (pixels, c, channels)))
        self._moves.append(Move(plane, dst, (s.tiles, n, pixels, c, channels, *plane.strides), vecs, s))
        return image(dst, True)

    def launches(self) -> Iterator[Launch]:
        """The launches that pack what was asked for, and has not been packed yet."""
        yield from self.others
        self.others = []
        while self._moves:
            first = self._moves.pop(0)
            second = self._take([move for move in self._moves if move.form == first.form])
            third = self._take([move for move in self._moves if move.launched == first.launched])
            yield pack(first, second, third)

    def _take(self, moves: list[Move]) -> Move | None:
        """The first of some of them, if there is one."""
        for move in moves[:1]:
            self._moves = [other for other in self._moves if other is not move]
            return move
        return None


def pack(first: Move, second: Move | None, third: Move | None) -> Launch:
    """A launch that packs up to three tensors, the second of the first one's form."""
    again, last = second or first, third or first
    programs = [0 if move is None else move.programs for move in (first, second, third)]
    missing = (None, None, *(0 for _ in last.arguments(0)[2:]))
    return Launch(
        kernels.pack,
        (sum(n * move.columns for n, move in zip(programs, (first, again, last), strict=True)),),
        (
            *first.arguments(programs[0]),
            *again.arguments(programs[1]),  # with no programs if there is none: the kernel is the same
            *(missing if third is None else third.arguments(programs[2])),
        ),
        dict(CONFIG=first.config(tuple(map(min, first.vecs, again.vecs)), last.config(last.vecs))),
        first.settings.num_warps,
        max_registers=first.settings.max_registers,
    )  # fmt: skip


def fits_dense(tensor: Tensor) -> bool:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        return False
    return image(tensor, True).vec * tensor.element_size() >= 4


def output_grad(
    dy: Tensor, y: Tensor | None, db: Tensor | None, needed: bool, dense: bool, groups: int, packing: Packing,
    arch: Arch,
) -> "Generator[Launch, None, tuple[Image | None, Partials]]":  # fmt: skip
    """dz, which is dy or dy·y·(1 − y), in the layout that its readers want, and the partial sums of a db."""
    if dense and needed and y is None and db is None:
        return packing.image(dy, groups), Partials(None, None)
    last = dense or is_channels_last(dy if y is None else y)
    dz: Image | None = None
    out: Tensor | None = None
    if needed and y is None and (fits_dense(dy) if dense else dy.stride(1 if last else 3) == 1):
        dz = image(dy, last)
    elif needed:
        channels = padded(dy.shape[1], dy.element_size()) if dense and groups == 1 else dy.shape[1]
        out = channels_last_scratch(dy, channels) if last else scratch(dy.shape, dy.dtype, dy.device)
        dz = image(out, last)
    sums = Partials(None, None)
    if out is not None or db is not None:
        sums = yield from relayout(dy, y, out, db, arch)
    return dz, sums


def channels_last_scratch(like: Tensor, channels: int) -> Tensor:
    """Scratch like the tensor, but with as many channels."""
    return scratch((like.shape[0], channels, *like.shape[2:]), like.dtype, like.device, torch.channels_last)


def relayout(
    src: Tensor, y: Tensor | None, dst: Tensor | None, db: Tensor | None, arch: Arch
) -> "Generator[Launch, None, Partials]":
    """dst = src, or src·y·(1 − y), with zeros in the channels dst has more. Returns the partial sums of db: those of
    dst over images and pixels.
    """
    n, c, height, width = src.shape
    pixels, channels = height * width, c if dst is None else dst.shape[1]
    s = choose_relayout(n, pixels, channels, dtype_name(src.dtype), arch)
    programs = cdiv(n * cdiv(pixels, s.block_p), s.tiles)
    sums = partials_of(db, programs, accumulator(src.dtype))
    tensors = [planes(t) for t in (src, y, dst)]
    vec_p, vec_c, vec_dst = (vector_length(src.element_size(), length) for length in (pixels, c, channels))
    layouts = [kernels.Layout(plane.pixels, plane.channels, plane.vec) for plane in tensors]
    yield Launch(
        kernels.relayout,
        (programs, cdiv(channels, s.block_c)),
        (
            *(plane.tensor for plane in tensors), sums, n, pixels, c, channels, s.tiles,
            *(stride for plane in tensors for stride in plane.strides),
        ),
        dict(CONFIG=kernels.Relayout(s.block_p, s.block_c, vec_p, vec_c, vec_dst, *layouts)),
        s.num_warps,
        max_registers=s.max_registers,
    )  # fmt: skip
    return Partials(sums, db)


class Planes(NamedTuple):
    """A tensor (N, C, H, W) as (N, C, H·W)."""

    tensor: Tensor | None
    strides: tuple[int, int, int]  # of images, pixels, channels
    pixels: bool  # contiguous are the pixels
    channels: bool  # or the channels
    vec: int


def planes(tensor: Tensor | None) -> Planes:
    """torch copies a tensor whose rows do not follow each other at one distance."""
    if tensor is None:
        return Planes(None, (0, 0, 0), False, False, 1)
    c, height, width = tensor.shape[1:]
    if height > 1 and width > 1 and tensor.stride(2) != width * tensor.stride(3):
        tensor = tensor.contiguous()
    of_n, of_c, of_h, of_w = tensor.stride()
    of_p = of_w if width > 1 else of_h
    pixels, channels = of_p == 1 and height * width > 1, of_c == 1
    pixels = pixels and not (channels and c > 1)
    others = (of_n, of_c) if pixels else (of_n, of_p)
    aligned = tensor.data_ptr() % 16 == 0
    vec = vector_length(tensor.element_size(), *others) if aligned and (pixels or channels) else 1
    return Planes(tensor, (of_n, of_p, of_c), pixels, channels and not pixels, vec)
