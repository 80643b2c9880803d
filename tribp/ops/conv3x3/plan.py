"""The 3×3 convolution on the Triton kernels: which of them, on what layout, in which order. Imports triton.

Three algorithms: `depthwise`, one channel a group; `few_channels`, of the input; `dense`, everything else. The first
two read either memory format. Dense wants the channels of x, dz and w side by side, in rows of whole 16 bytes: other
layouts are packed first, all that a direction needs in one launch.
"""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...dispatch import dtype_name
from ...kernels import conv3x3, conv3x3_depthwise, conv3x3_few_channels
from ...launch.arch import Arch, cdiv, power_of_2, precision_of
from ...launch.calls import scratch
from ...launch.conv3x3 import (
    SMALL,
    Convolution,
    bundle_of,
    choose_conv,
    choose_conv_wgrad,
    choose_depthwise,
    choose_small,
    choose_small_dgrad,
)
from ...launch.layout import (
    Launch,
    Partials,
    accumulator,
    descriptor,
    partials_of,
    precision_in_kernel,
    reduce_partials,
    vector_length,
)
from ...reference import Window
from .images import (
    Image,
    Packing,
    channels_last_scratch,
    dense_image,
    image,
    is_channels_last,
    output_grad,
    padded,
    with_unit_stride,
)

if TYPE_CHECKING:
    import triton

Sums = Generator[Launch, None, tuple[Partials, Partials]]  # launches, and what is then left to add up of dw and db


def forward(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, window: Window, activation: str | None, arch: Arch, tf32: bool,
    settings: Convolution | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """The launches that write y = act(x ⋆ w + b), in order; each is to be run as it comes.

    `settings` replaces the rules' choice for the convolution itself (tests and tuning).
    """
    (n, o, p, q), c = y.shape, x.shape[1]
    ys = dense_image(y)
    dtype = dtype_name(x.dtype)
    precision = precision_of(dtype, tf32, arch)
    sizes = (n, *x.shape[2:], p, q)
    sigmoid, ptx = activation == "sigmoid", arch.backend != "hip"
    b = None if b is None else b.contiguous()
    algorithm = algorithm_for(c, o, window.groups, x)
    if algorithm == "depthwise":
        xs, w = with_unit_stride(x, ys.channels_last), w.contiguous()
        s = settings or choose_depthwise(n, p, q, o, dtype, arch, last=ys.channels_last, wgrad=False)
        grid = s.boxes(n, p, q) * cdiv(o, s.block_j)
        arguments = (xs.tensor, w, b, y, *sizes, o, *window.padding, *xs.strides, *ys.strides)
        config: tuple[object, ...] = conv3x3_depthwise.Forward(
            s.block_j, *s.box, *window.stride, CHANNELS_LAST=ys.channels_last, VEC=xs.vec, VEC_STORE=ys.vec,
            SIGMOID=sigmoid, PTX=ptx,
        )  # fmt: skip
        yield _launch(conv3x3_depthwise.depthwise_forward, (grid,), arguments, config, s)
        return
    if algorithm == "few_channels":
        w = _either_order(w)
        s = settings or choose_small(n, p, q, o, c, dtype, arch, wgrad=False)
        grid = s.boxes(n, p, q) * cdiv(o, s.block_j)
        arguments = (x, w, b, y, *sizes, o, *window.padding, *x.stride(), *ys.strides)
        config = conv3x3_few_channels.Forward(
            s.block_j, s.block_l, *s.box, c, *window.stride, TAPS_LAST=w.is_contiguous(), PRECISION=precision,
            CHANNELS_LAST=ys.channels_last, VEC_STORE=ys.vec, SIGMOID=sigmoid, PTX=ptx,
        )  # fmt: skip
        yield _launch(conv3x3_few_channels.few_channels_forward, (grid,), arguments, config, s)
        return
    groups, og = window.groups, o // window.groups
    packing = Packing(arch)
    xs = packing.image(x, groups)
    cg = xs.tensor.shape[1] // groups
    per_tile = settings.bundle if settings else bundle_of(groups, cg, og, 64 if arch.has_tma else 32)
    ws = _packed_weight(packing, w, o, cg, per_tile, groups)
    yield from packing.launches()
    tiles = cdiv(groups, per_tile)
    vec = _tile_vec(xs, groups, per_tile)
    s = settings or choose_conv(
        n, p, q, per_tile * og, per_tile * cg, tiles, per_tile, 1, dtype, precision, arch,
        vec=vec, tma=xs.tma and ws.tma and _steppable(x, window), along=True,
        whole=tiles > 1 or window.stride[1] == 2, wide=not ys.channels_last, stepped=max(window.stride) > 1,
    )  # fmt: skip
    precision = precision_in_kernel(precision, s.tma)
    arguments = (
        xs.argument(s.tma, s.box, s.block_l, precision, window.stride),
        _weight_argument(ws, s.tma, s.block_j, s.block_l, precision),
        *((xs.tensor, ws.tensor) if per_tile > 1 else (None, None)), b, y,
        *sizes, groups, og, cg, *window.padding, *window.stride, *_without_channels(xs), *ys.strides,
    )  # fmt: skip
    config = conv3x3.Forward(
        **_dense_config(s, precision, ys), VEC=vec, VEC_W=ws.vec, VEC_STORE=_tile_vec(ys, groups, per_tile),
        SIGMOID=sigmoid, PTX=ptx,
    )  # fmt: skip
    yield _launch(conv3x3.forward, (s.boxes(n, p, q) * s.columns(og, groups),), arguments, config, s)


def backward(
    dy: Tensor, x: Tensor | None, w: Tensor | None, y: Tensor | None, window: Window, arch: Arch, tf32: bool,
    dx: Tensor | None, dw: Tensor | None, db: Tensor | None,
    settings: Convolution | None = None, wgrad_settings: Convolution | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """The launches that write those of dx, dw and db that are given, in order; each is to be run as it comes.

    y is given if the activation is a sigmoid; x for dw, w for dx. `settings` and `wgrad_settings` replace the rules'
    choices for dx and dw.
    """
    image_like = dx if dx is not None else x
    c = image_like.shape[1] if image_like is not None else 0
    algorithm = algorithm_for(c, dy.shape[1], window.groups, x)
    if algorithm == "few_channels" and dw is not None and dx is None:
        assert x is not None
        last = is_channels_last(dy if y is None else y)
        dys = with_unit_stride(dy, last)
        pending = yield from _few_channels_wgrad(dys, y, x, dw, db, window, arch, tf32, wgrad_settings)
        yield from reduce_partials(arch, *pending)
        return
    summed = y is not None or dw is None  # db: on the way to dz, else wgrad has it for nothing
    needed = dx is not None or dw is not None
    packing = Packing(arch)
    dz, sums = yield from output_grad(
        dy, y, db if summed else None, needed, algorithm != "depthwise", window.groups, packing, arch
    )
    xs = packing.image(x, window.groups) if algorithm == "dense" and x is not None and dw is not None else None
    dgrad = None
    if dx is not None:
        assert w is not None
        assert dz is not None
        if algorithm == "depthwise":
            dgrad = _depthwise_dgrad(dz, w, dx, window, arch, settings)
        elif algorithm == "few_channels" and has_few_channels_dgrad(c, w.shape[0], window, dx.dtype):
            dgrad = _few_channels_dgrad(dz, w, dx, window, arch, tf32, settings)
        else:
            dgrad = _dense_dgrad(packing, dz, w, dx, window, arch, tf32, settings)
    yield from packing.launches()
    pending = Partials(None, None), Partials(None, None)
    if dw is not None:
        assert x is not None
        assert dz is not None
        rest = (x, dw, None if summed else db, window, arch)
        if algorithm == "depthwise":
            pending = yield from _depthwise_wgrad(dz, *rest, wgrad_settings)
        elif algorithm == "few_channels":
            pending = yield from _few_channels_wgrad(dz, None, *rest, tf32, wgrad_settings)
        else:
            assert xs is not None
            spare = (x.numel() if dx is not None else dy.numel()) * x.element_size()
            pending = yield from _dense_wgrad(dz, xs, *rest, tf32, spare, wgrad_settings)
    yield from reduce_partials(arch, *pending, sums)
    del pending, xs
    if dgrad is not None:
        yield dgrad


def algorithm_for(c: int, o: int, groups: int, x: Tensor | None) -> str:
    """Which kernels: "depthwise", "few_channels" or "dense". c, o: input and output channels; x, if it is read.

    `few_channels` has 32 bits for an offset within an image.
    """
    if groups == c == o and groups > 1:
        return "depthwise"
    extent = 0 if x is None else sum((x.shape[d] - 1) * x.stride(d) for d in (1, 2, 3))
    return "few_channels" if groups == 1 and c <= SMALL and extent < 2**31 else "dense"


def _dense_dgrad(
    packing: Packing, dz: Image, w: Tensor, dx: Tensor, window: Window, arch: Arch, tf32: bool,
    settings: Convolution | None,
) -> Launch:  # fmt: skip
    """The launch that writes dx, once `packing` is done."""
    (n, c, height, width), (sh, sw), groups = dx.shape, window.stride, window.groups
    dtype = dtype_name(dx.dtype)
    precision = precision_of(dtype, tf32, arch)
    out = dense_image(dx)
    og = dz.tensor.shape[1] // groups  # with padding
    cg = padded(c, dx.element_size()) if groups == 1 else c // groups
    per_tile = settings.bundle if settings else bundle_of(groups, cg, og, 64 if arch.has_tma else 32)
    # wgmma takes TF32 from rows that lie along the sum.
    along = precision == "tf32" and groups == 1 and (arch.has_wgmma or arch.backend == "interpreter")
    if along:
        ws = _packed_weight(packing, w, cg, og, per_tile, groups, swapped=True)
    else:
        ws = _packed_weight(packing, w, og * groups, cg, per_tile, groups)
    tiles = cdiv(groups, per_tile)
    vec = _tile_vec(dz, groups, per_tile)
    p, q = cdiv(height, sh), cdiv(width, sw)  # of the largest class
    s = settings or choose_conv(
        n, p, q, per_tile * (c // groups), per_tile * og, tiles, per_tile, sh * sw, dtype, precision, arch,
        vec=vec, tma=dz.tma and ws.tma, along=along, whole=tiles > 1, wide=not out.channels_last, stepped=sh * sw > 1,
    )  # fmt: skip
    precision = precision_in_kernel(precision, s.tma)
    arguments = (
        dz.argument(s.tma, s.box, s.block_l, precision),
        _weight_argument(ws, s.tma, *((s.block_j, s.block_l) if along else (s.block_l, s.block_j)), precision),
        *((dz.tensor, ws.tensor) if per_tile > 1 else (None, None)), dx,
        n, height, width, *dz.tensor.shape[2:], groups, og, cg, c // groups, *window.padding, sh, sw,
        *_without_channels(dz), *out.strides,
    )  # fmt: skip
    config = conv3x3.Dgrad(
        **_dense_config(s, precision, out), VEC=vec, VEC_W=ws.vec,
        VEC_STORE=1 if sw == 2 and not out.channels_last else _tile_vec(out, groups, per_tile), W_TRANSPOSED=along,
    )  # fmt: skip
    grid = (s.boxes(n, p, q) * s.columns(c // groups, groups), sh * sw)
    return _launch(conv3x3.dgrad, grid, arguments, config, s)


def _dense_wgrad(
    dz: Image, xs: Image, x: Tensor, dw: Tensor, db: Tensor | None, window: Window, arch: Arch, tf32: bool, spare: int,
    settings: Convolution | None,
) -> Sums:  # fmt: skip
    n, groups, (o, cg, *_) = x.shape[0], window.groups, dw.shape
    p, q = dz.tensor.shape[2:]
    dtype, partial = dtype_name(x.dtype), accumulator(x.dtype)
    precision = precision_of(dtype, tf32, arch)
    og = o // groups
    per_tile = settings.bundle if settings else bundle_of(groups, cg, og, 32)
    tiles = cdiv(groups, per_tile)
    vec_o, vec_c = _tile_vec(dz, groups, per_tile), _tile_vec(xs, groups, per_tile)
    s = settings or choose_conv_wgrad(
        n, p, q, per_tile * og, per_tile * cg, tiles, per_tile, dtype, precision, arch,
        vec=min(vec_o, vec_c), tma=dz.tma and xs.tma and _steppable(x, window), spare=spare,
    )  # fmt: skip
    shares, sums = partials_of(dw, s.splits, partial, (o, 9, cg)), partials_of(db, s.splits, partial)
    assert shares is not None
    in_order = dw.is_contiguous(memory_format=torch.channels_last)
    precision = precision_in_kernel(precision, s.tma and sums is None)  # db sums dz as it is, not rounded
    arguments = (
        dz.argument(s.tma, s.box, s.block_i, precision),
        xs.argument(s.tma, s.box, s.block_j, precision, window.stride), shares, sums,
        n, *x.shape[2:], p, q, groups, og, cg, dz.tensor.shape[1] // groups, xs.tensor.shape[1] // groups,
        *window.padding, *window.stride, *_without_channels(dz), *_without_channels(xs),
        cdiv(s.boxes(n, p, q), s.splits),
    )  # fmt: skip
    config = conv3x3.Wgrad(
        s.block_i, s.block_j, *s.box, s.taps, per_tile, DIAGONAL=per_tile > 1, TMA=s.tma, X_FIRST=s.x_first,
        TAPS_LAST=s.splits == 1 and not in_order, PRECISION=precision, VEC_O=vec_o, VEC_C=vec_c,
        VEC_STORE=vector_length(shares.element_size(), cg),
    )  # fmt: skip
    grid = (s.tiles(per_tile * og, per_tile * cg) * tiles * (9 // s.taps), s.splits)
    yield _launch(conv3x3.wgrad, grid, arguments, config, s)
    return Partials(shares, dw, None if in_order else (9, cg)), Partials(sums, db)


def _few_channels_wgrad(
    dz: Image, y: Tensor | None, x: Tensor, dw: Tensor, db: Tensor | None, window: Window, arch: Arch, tf32: bool,
    settings: Convolution | None,
) -> Sums:  # fmt: skip
    """With y, `dz` holds dy."""
    (n, c, *_), o, (p, q) = x.shape, dw.shape[0], dz.tensor.shape[2:]
    dtype, partial = dtype_name(x.dtype), accumulator(x.dtype)
    s = settings or choose_small(n, p, q, o, c, dtype, arch, wgrad=True, fused=y is not None)
    ys = None if y is None else with_unit_stride(y, dz.channels_last)
    shares, sums = partials_of(dw, s.splits, partial), partials_of(db, s.splits, partial)
    arguments = (
        dz.tensor, None if ys is None else ys.tensor, x, shares, sums, n, *x.shape[2:], p, q, o, *window.padding,
        *x.stride(), *dz.strides, *(dz if ys is None else ys).strides, cdiv(s.boxes(n, p, q), s.splits),
    )  # fmt: skip
    vec = dz.vec if ys is None else min(dz.vec, ys.vec)
    if dz.channels_last:
        vec = min(vec, vector_length(x.element_size(), o))
    config = conv3x3_few_channels.Wgrad(
        s.block_i, s.block_j, *s.box, c, *window.stride, TAPS_LAST=dw.is_contiguous(), FUSE_DZ=ys is not None,
        PRECISION=precision_of(dtype, tf32, arch), CHANNELS_LAST=dz.channels_last, VEC=vec,
    )  # fmt: skip
    yield _launch(conv3x3_few_channels.few_channels_wgrad, (cdiv(o, s.block_i), s.splits), arguments, config, s)
    return Partials(shares, dw), Partials(sums, db)


def has_few_channels_dgrad(c: int, o: int, window: Window, dtype: torch.dtype) -> bool:
    """Whether few input channels have a dgrad of their own: at most four, and o of a type that is summed in one step.

    Compiled: float64 spills 844 bytes on sm_100.
    """
    return c <= 4 and window.stride == (1, 1) and dtype.itemsize <= 4 and o * dtype.itemsize <= 256


def _few_channels_dgrad(
    dz: Image, w: Tensor, dx: Tensor, window: Window, arch: Arch, tf32: bool, settings: Convolution | None
) -> Launch:
    (n, c, height, width), o = dx.shape, w.shape[0]
    dtype = dtype_name(dx.dtype)
    precision = precision_of(dtype, tf32, arch)
    w, out = _either_order(w), dense_image(dx)
    s = settings or choose_small_dgrad(n, height, width, o, dtype, precision, arch, tma=dz.tma)
    precision = precision_in_kernel(precision, s.tma)
    arguments = (
        dz.argument(s.tma, (s.box[0], 1, s.box[2]), s.block_l, precision), w, dx,
        n, height, width, *dz.tensor.shape[2:], o, *window.padding, *_without_channels(dz), *out.strides,
    )  # fmt: skip
    config = conv3x3_few_channels.Dgrad(
        s.block_l, *s.box, c, TAPS_LAST=w.is_contiguous(), TMA=s.tma, PRECISION=precision,
        CHANNELS_LAST=out.channels_last, VEC=dz.vec, VEC_STORE=out.vec if out.channels_last else 1,
    )  # fmt: skip
    grid = (s.boxes(n, height, width, rim=2),)
    return _launch(conv3x3_few_channels.few_channels_dgrad, grid, arguments, config, s)


def _depthwise_wgrad(
    dz: Image, x: Tensor, dw: Tensor, db: Tensor | None, window: Window, arch: Arch, settings: Convolution | None
) -> Sums:
    (n, c, *_), (p, q) = x.shape, dz.tensor.shape[2:]
    partial = accumulator(x.dtype)
    s = settings or choose_depthwise(n, p, q, c, dtype_name(x.dtype), arch, last=dz.channels_last, wgrad=True)
    xs = with_unit_stride(x, dz.channels_last)
    shares, sums = partials_of(dw, s.splits, partial), partials_of(db, s.splits, partial)
    arguments = (
        dz.tensor, xs.tensor, shares, sums, n, *x.shape[2:], p, q, c, *window.padding, *dz.strides, *xs.strides,
        cdiv(s.boxes(n, p, q), s.splits),
    )  # fmt: skip
    config = conv3x3_depthwise.Wgrad(
        s.block_j, *s.box, *window.stride, WHOLE=p % s.box[1] == 0, CHANNELS_LAST=dz.channels_last, VEC=xs.vec,
        VEC_Z=dz.vec,
    )  # fmt: skip
    yield _launch(conv3x3_depthwise.depthwise_wgrad, (cdiv(c, s.block_j), s.splits), arguments, config, s)
    return Partials(shares, dw), Partials(sums, db)


def _depthwise_dgrad(
    dz: Image, w: Tensor, dx: Tensor, window: Window, arch: Arch, settings: Convolution | None
) -> Launch:
    (n, c, height, width), (sh, sw) = dx.shape, window.stride
    out = dense_image(dx)
    dz = with_unit_stride(dz.tensor, out.channels_last)
    p, q = cdiv(height, sh), cdiv(width, sw)  # of the largest class
    s = settings or choose_depthwise(n, p, q, c, dtype_name(dx.dtype), arch, last=out.channels_last, wgrad=False)
    arguments = (
        dz.tensor, w.contiguous(), dx, n, height, width, *dz.tensor.shape[2:], c, *window.padding,
        *dz.strides, *out.strides,
    )  # fmt: skip
    config = conv3x3_depthwise.Dgrad(
        s.block_j, *s.box, sh, sw, CHANNELS_LAST=out.channels_last, VEC=dz.vec,
        VEC_STORE=1 if sw == 2 and not out.channels_last else out.vec,
    )  # fmt: skip
    grid = (s.boxes(n, p, q) * cdiv(c, s.block_j), sh * sw)
    return _launch(conv3x3_depthwise.depthwise_dgrad, grid, arguments, config, s)


def _launch(
    kernel: "triton.JITFunction[Any]", grid: tuple[int, ...], arguments: tuple[object, ...],
    config: tuple[object, ...], s: Convolution,
) -> Launch:  # fmt: skip
    return Launch(kernel, grid, arguments, dict(CONFIG=config), s.num_warps, s.num_stages, s.max_registers)


def _dense_config(s: Convolution, precision: str, out: Image) -> dict[str, Any]:
    """The fields that `forward` and `dgrad` share, but for the lengths of vectors."""
    return dict(
        BLOCK_J=s.block_j, BLOCK_L=s.block_l, BOX_N=s.box[0], BOX_H=s.box[1], BOX_W=s.box[2], ROWS=s.rows,
        GROUP=s.group, GROUPS_PER_TILE=s.bundle, DIAGONAL=s.bundle > 1, FLAT=s.flat, TMA=s.tma, PRECISION=precision,
        CHANNELS_LAST=out.channels_last,
    )  # fmt: skip


def _either_order(w: Tensor) -> Tensor:
    """A weight whose nine taps and input channels are one dense row, whichever of them comes first."""
    dense = w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)
    return w if dense else w.contiguous()


def _steppable(x: Tensor, window: Window) -> bool:
    """Whether descriptors can step over x: with an odd number of rows, the last pair would hold the next image's."""
    return all(length % step == 0 for length, step in zip(x.shape[2:], window.stride, strict=True))


def _tile_vec(image: Image, groups: int, per_tile: int) -> int:
    """Elements that divide all that `image.vec` does, and the channels of a tile's groups; so they divide a shorter
    last tile's.
    """
    if groups == 1 or not image.channels_last:
        return image.vec
    channels = image.tensor.shape[1] // groups
    return min(image.vec, vector_length(image.tensor.element_size(), per_tile * channels))


def _without_channels(image: Image) -> tuple[int, int, int]:
    return image.strides[0], image.strides[2], image.strides[3]


def _weight_argument(w: Image, use_tma: bool, rows: int, cols: int, precision: str) -> object:
    """The kernel argument: the tensor itself, or a descriptor (taps, O, C) of tiles of one tap."""
    if not use_tma:
        return w.tensor
    o, c = w.tensor.shape[:2]
    return descriptor(w.tensor, [9, o, c], [c, 9 * c, 1], [1, rows, cols], precision)


def _packed_weight(
    packing: Packing, w: Tensor, rows: int, cols: int, per_tile: int, groups: int, swapped: bool = False
) -> Image:
    """w as (rows, 9, cols) in memory, with zeros where it has no such output or input channel.

    Of several groups a tile, their cols stand side by side: (rows, 9, per_tile · cols). swapped: rows are input
    channels.
    """
    if per_tile > 1:
        out = channels_last_scratch(w, per_tile * cols)
        arguments = (w, out, rows // groups, cols, *w.stride())
        config = conv3x3.SpreadWeight(per_tile, power_of_2(9 * per_tile * cols))
        packing.others.append(Launch(conv3x3.spread_weight, (rows,), arguments, dict(CONFIG=config), 4))
        return image(out, True)
    if not swapped and w.shape[:2] == (rows, cols) and w.is_contiguous(memory_format=torch.channels_last):
        return image(w, True)
    size, zero = (rows, cols, 3, 3), rows > w.shape[1 if swapped else 0]
    return packing.pack(w, scratch(size, w.dtype, w.device, torch.channels_last, zero=zero), swapped)
