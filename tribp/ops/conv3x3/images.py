"""Images in memory: how kernels read them, and the pass that brings them into an order that kernels can read."""

from typing import NamedTuple

import torch

from ...dispatch import dtype_name
from ...kernels import common
from ...kernels import relayout as kernels
from ...kernels.conv3x3 import Strided
from ...launch.arch import cdiv
from ...launch.buffer import Buffer, dense_strides
from ...launch.launches import in_tuple
from ...launch.layout import accumulator, descriptor, vector_length
from ...launch.plan import Plan
from ...launch.reduce import Partials, partials_of
from ...versions import descriptor_unit
from ..activations import Activation
from .boxes import BoxSize
from .config_relayout import RelayoutConfig, RelayoutProblem


class Image(NamedTuple):
    """A tensor (N, C, H, W) as kernels read it: which dimension is contiguous, and how wide an access can be."""

    tensor: Buffer
    strides: tuple[int, int, int, int]  # of N, C, H, W; those of dimensions of length 1 as if it were dense
    channels_last: bool  # channels are contiguous; else columns are
    vec: int  # elements, 16 bytes at most, that divide the other strides, the contiguous length and the address
    tma: bool  # whether a tensor descriptor can describe it

    @property
    def strided(self) -> Strided:
        """As a kernel's argument."""
        return Strided(self.tensor, *self.strides)

    def argument(
        self, use_tma: bool, box: BoxSize, channels: int, precision: str, step: tuple[int, int] = (1, 1)
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


def image(tensor: Buffer, channels_last: bool) -> Image:
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


def is_channels_last(tensor: Buffer) -> bool:
    """Whether to take a tensor (N, C, H, W) for channels_last: if it is, and not at the same time contiguous."""
    return tensor.stride(1) == 1 and not tensor.is_contiguous()


def dense_image(tensor: Buffer) -> Image:
    """A tensor that tribp allocated: contiguous or channels_last."""
    return image(tensor, is_channels_last(tensor))


def parts_of(plan: Plan, out: Image, parts: int) -> tuple[Buffer, Image]:
    """Room for `parts` partial results of an output, one behind the other in its memory format; and the first."""
    (n, c, h, w), dtype = out.tensor.shape, accumulator(out.tensor.dtype)
    shares = plan.scratch((parts, n, h, w, c) if out.channels_last else (parts, n, c, h, w), dtype)
    memory_format = torch.channels_last if out.channels_last else torch.contiguous_format
    strides = dense_strides(out.tensor.shape, memory_format)
    return shares, image(shares.viewed(out.tensor.shape, strides), out.channels_last)


def with_unit_stride(plan: Plan, tensor: Buffer, channels_last: bool) -> Image:
    """The tensor with contiguous channels or columns; torch copies what has neither."""
    inner = 1 if channels_last else 3
    if tensor.shape[inner] > 1 and tensor.stride(inner) != 1:
        tensor = plan.contiguous(tensor, torch.channels_last if channels_last else torch.contiguous_format)
    return image(tensor, channels_last)


class PackJob(NamedTuple):
    """One tensor to be packed."""

    src: "Planes"
    dst: Buffer
    sizes: tuple[int, ...]  # the kernel's, but for its programs
    vecs: tuple[int, ...]  # of src's strides, of pixels, of channels and of dst's: elements that divide them
    config: RelayoutConfig

    @property
    def programs(self) -> int:
        """For each of `columns`."""
        tiles, n, pixels = self.sizes[:3]
        return cdiv(n * cdiv(pixels, self.config.block_p), tiles)

    @property
    def columns(self) -> int:
        return cdiv(self.dst.shape[1], self.config.block_c)

    def argument(self, programs: int) -> kernels.Move:
        return kernels.Move(self.src.tensor, self.dst, *map(in_tuple, (programs, *self.sizes)))

    def compiled(self, vecs: tuple[int, ...], third: kernels.Relayout | None = None) -> kernels.Relayout:
        vec, vec_p, vec_c, vec_dst = vecs
        layout = kernels.Contiguous(self.src.pixels, self.src.channels, vec)
        return kernels.Relayout(self.config.block_p, self.config.block_c, vec_p, vec_c, vec_dst, layout, THIRD=third)

    @property
    def form(self) -> tuple[object, ...]:
        """What the code depends on, besides how wide its accesses are."""
        return self.src.pixels, self.src.channels, self.config.block_p, self.config.block_c, *self.launched

    @property
    def launched(self) -> tuple[object, ...]:
        return self.config.num_warps, self.config.max_registers


class Packing:
    """What a call's dense kernels read, and the launches that pack what is laid out otherwise: one, if possible."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._jobs: list[PackJob] = []

    def image(self, tensor: Buffer, groups: int) -> Image:
        """The tensor as dense kernels read it: channels side by side, at least four bytes to an access.

        Derived: cp.async moves four bytes or more, so two-byte reads are not pipelined, and there are nine of each
        element. Two for a copy of all cost less. It has rows of whole 16 bytes, unless groups follow one another.
        """
        if fits_dense(tensor):
            return image(tensor, True)
        channels = padded(tensor.shape[1], tensor.element_size()) if groups == 1 else tensor.shape[1]
        return self.pack(tensor, channels_last_scratch(self._plan, tensor, channels))

    def pack(self, src: Buffer, dst: Buffer, swapped: bool = False) -> Image:
        """dst, which is channels_last: src, with zeros in the channels dst has more.

        swapped: src with images and channels exchanged.
        """
        src = src.transpose(0, 1) if swapped else src
        plane = planes(self._plan, src)
        n, c, height, width = src.shape
        pixels, channels = height * width, dst.shape[1]
        s = self._plan.config(RelayoutProblem(n, pixels, channels, dtype_name(src.dtype), self._plan.arch))
        vecs = (plane.vec, *(vector_length(src.element_size(), length) for length in (pixels, c, channels)))
        self._jobs.append(PackJob(plane, dst, (s.tiles, n, pixels, c, channels, *plane.strides), vecs, s))
        return image(dst, True)

    def launch(self) -> None:
        """Launch what packs all that was asked for, and has not been packed yet."""
        while self._jobs:
            first = self._jobs.pop(0)
            second = self._take([job for job in self._jobs if job.form == first.form])
            third = self._take([job for job in self._jobs if job.launched == first.launched])
            pack(self._plan, first, second, third)

    def _take(self, jobs: list[PackJob]) -> PackJob | None:
        """The first of some of them, if there is one."""
        first = next(iter(jobs), None)
        self._jobs = [job for job in self._jobs if job is not first]
        return first


def pack(plan: Plan, first: PackJob, second: PackJob | None, third: PackJob | None) -> None:
    """Pack up to three tensors in one launch, the second of the first one's form."""
    like_first, last_job = second or first, third or first
    programs = [0 if job is None else job.programs for job in (first, second, third)]
    plan.launch(
        kernels.pack,
        (sum(n * job.columns for n, job in zip(programs, (first, like_first, last_job), strict=True)),),
        (
            first.argument(programs[0]),
            like_first.argument(programs[1]),  # with no programs if there is none: the kernel is the same
            None if third is None else third.argument(programs[2]),
        ),
        first.compiled(tuple(map(min, first.vecs, like_first.vecs)), last_job.compiled(last_job.vecs)),
        first.config,
    )  # fmt: skip


def fits_dense(tensor: Buffer) -> bool:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        return False
    return image(tensor, True).vec * tensor.element_size() >= 4


def output_grad(
    plan: Plan, dy: Buffer, y: Buffer | None, activation: Activation, db: Buffer | None, needed: bool, dense: bool,
    groups: int, packing: Packing,
) -> tuple[Image | None, Partials]:  # fmt: skip
    """dz, which is dy or dy·act′(y), in the layout that its readers want, and the partial sums of a db."""
    if dense and needed and y is None and db is None:
        return packing.image(dy, groups), Partials()
    channels_last = dense or is_channels_last(dy if y is None else y)
    dz: Image | None = None
    out: Buffer | None = None
    if needed and y is None and (fits_dense(dy) if dense else dy.stride(1 if channels_last else 3) == 1):
        dz = image(dy, channels_last)
    elif needed:
        channels = padded(dy.shape[1], dy.element_size()) if dense and groups == 1 else dy.shape[1]
        out = channels_last_scratch(plan, dy, channels) if channels_last else plan.scratch(dy.shape, dy.dtype)
        dz = image(out, channels_last)
    sums = Partials()
    if out is not None or db is not None:
        sums = relayout(plan, dy, y, activation, out, db)
    return dz, sums


def channels_last_scratch(plan: Plan, like: Buffer, channels: int) -> Buffer:
    """Scratch like the tensor, but with as many channels."""
    return plan.scratch((like.shape[0], channels, *like.shape[2:]), like.dtype, torch.channels_last)


def relayout(
    plan: Plan, src: Buffer, y: Buffer | None, activation: Activation, dst: Buffer | None, db: Buffer | None
) -> Partials:
    """dst = src, or src·act′(y), with zeros in the channels dst has more. Returns the partial sums of db: those of
    dst over images and pixels.
    """
    n, c, height, width = src.shape
    pixels, channels = height * width, c if dst is None else dst.shape[1]
    s = plan.config(RelayoutProblem(n, pixels, channels, dtype_name(src.dtype), plan.arch))
    programs = cdiv(n * cdiv(pixels, s.block_p), s.tiles)
    sums = partials_of(plan, db, programs)
    tensors = [planes(plan, t) for t in (src, y, dst)]
    vec_p, vec_c, vec_dst = (vector_length(src.element_size(), length) for length in (pixels, c, channels))
    of_src, of_y, of_dst = (kernels.Contiguous(plane.pixels, plane.channels, plane.vec) for plane in tensors)
    plan.launch(
        kernels.relayout,
        (cdiv(channels, s.block_c), programs),
        (
            *(plane.strided for plane in tensors), sums.partials, n, pixels, c, channels, s.tiles,
        ),
        kernels.Relayout(s.block_p, s.block_c, vec_p, vec_c, vec_dst, of_src, of_y, of_dst, activation),
        s,
    )  # fmt: skip
    return sums


class Planes(NamedTuple):
    """A tensor (N, C, H, W) as (N, C, H·W)."""

    tensor: Buffer | None
    strides: tuple[int, int, int]  # of images, pixels, channels
    pixels: bool  # contiguous are the pixels
    channels: bool  # or the channels
    vec: int

    @property
    def strided(self) -> kernels.StridedPlanes | None:
        """As a kernel's argument."""
        return None if self.tensor is None else kernels.StridedPlanes(self.tensor, *self.strides)


def planes(plan: Plan, tensor: Buffer | None) -> Planes:
    """torch copies a tensor whose rows do not follow each other at one distance."""
    if tensor is None:
        return Planes(None, (0, 0, 0), False, False, 1)
    c, height, width = tensor.shape[1:]
    if height > 1 and width > 1 and tensor.stride(2) != width * tensor.stride(3):
        tensor = plan.contiguous(tensor)
    of_n, of_c, of_h, of_w = tensor.stride()
    of_p = of_w if width > 1 else of_h
    pixels, channels = of_p == 1 and height * width > 1, of_c == 1
    pixels = pixels and not (channels and c > 1)
    others = (of_n, of_c) if pixels else (of_n, of_p)
    aligned = tensor.data_ptr() % 16 == 0
    vec = vector_length(tensor.element_size(), *others) if aligned and (pixels or channels) else 1
    return Planes(tensor, (of_n, of_p, of_c), pixels, channels and not pixels, vec)
