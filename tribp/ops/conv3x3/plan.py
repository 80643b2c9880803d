"""The 3×3 convolution on the Triton kernels: which of them, on what layout, in which order. Imports triton.

Three algorithms: `depthwise`, one channel a group; `few_channels`, of the input; `dense`, everything else. The first
two read either memory format. Dense wants the channels of x, dz and w side by side, in rows of whole 16 bytes: other
layouts are packed first, all that a direction needs in one launch.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...dispatch import dtype_name
from ...kernels import conv3x3, conv3x3_depthwise, conv3x3_few_channels
from ...launch.arch import cdiv, power_of_2, precision_of
from ...launch.buffer import Buffer
from ...launch.launches import Launch
from ...launch.layout import descriptor, precision_in_kernel, vector_length
from ...launch.plan import Plan
from ...launch.reduce import Partials, append_sums, partials_of, reduce_partials, sum_parts
from ..activations import NONE, Activation, as_stored
from ..checks import check_dtypes, images_fit
from ..shared import Needs
from .boxes import ConvConfig
from .checks import check_layouts, small_enough
from .config import ConvProblem, ConvWgradProblem, choose_groups_per_tile
from .config_depthwise import DepthwiseProblem
from .config_few_channels import FEW_CHANNELS, FewChannelsDgradProblem, FewChannelsProblem
from .images import (
    Image,
    Packing,
    channels_last_scratch,
    dense_image,
    image,
    is_channels_last,
    output_grad,
    padded,
    parts_of,
    with_unit_stride,
)
from .reference import ChannelsLast, Window, conv3x3_format, formats, grad_sizes, output_size

WgradPartials = tuple[Partials, Partials]  # what is left to add up of dw and db


def forward(
    plan: Plan, input: Buffer, weight: Buffer, bias: Buffer | None,
    *, window: Window, activation: Activation, tf32: bool,
) -> None:  # fmt: skip
    """act(input ⋆ weight + bias), in torch's memory format; nothing where kernels can't take them."""
    if input.dim() != 4:  # of the operator, called directly
        raise ValueError(f"conv3x3: input must have shape (N, C, H, W), got {tuple(input.shape)}")
    check_layouts(input, weight, bias, window)
    check_dtypes("conv3x3", input, weight=weight, bias=bias)
    if not (images_fit(input, weight) and small_enough(*weight.shape[:2])):
        return
    output = plan.output(output_size(input, weight, window), input.dtype, conv3x3_format(input, weight))
    forward_layer(plan, input, weight, bias, output, window=window, activation=activation, tf32=tf32)
    plan.returns(output)


def forward_layer(
    plan: Plan, x: Buffer, w: Buffer, b: Buffer | None, y: Buffer,
    *, window: Window, activation: Activation, tf32: bool,
) -> None:  # fmt: skip
    """y = act(x ⋆ w + b)."""
    algorithm = algorithm_for(x.shape[1], y.shape[1], window.groups, x)
    precision = precision_of(dtype_name(x.dtype), tf32, plan.arch)
    b, ys = None if b is None else plan.contiguous(b), dense_image(y)
    if algorithm == "depthwise":
        _depthwise_forward(plan, x, w, b, ys, window, activation)
    elif algorithm == "few_channels":
        _few_channels_forward(plan, x, w, b, ys, window, activation, precision)
    else:
        _dense_forward(plan, x, w, b, ys, window, activation, precision)


def _depthwise_forward(
    plan: Plan, x: Buffer, w: Buffer, b: Buffer | None, y: Image, window: Window, activation: Activation
) -> None:
    n, c, p, q = y.tensor.shape
    xs, w = with_unit_stride(plan, x, y.channels_last), plan.contiguous(w)
    crowded = activation.costly or window.stride != (1, 1)
    s = plan.config(DepthwiseProblem(
        n, p, q, c, dtype_name(x.dtype), plan.arch, channels_last=y.channels_last, wgrad=False, crowded=crowded
    ))  # fmt: skip
    arguments = (xs.strided, w, b, y.strided, n, *x.shape[2:], p, q, c, *window.padding)
    constants = conv3x3_depthwise.Depthwise(
        s.block_j, conv3x3.Box(*s.box), *window.stride, CHANNELS_LAST=y.channels_last, VEC=xs.vec, VEC_STORE=y.vec,
        ACT=activation, PTX=plan.arch.backend != "hip",
    )  # fmt: skip
    grid = (s.boxes(n, p, q) * cdiv(c, s.block_j),)
    plan.launch(conv3x3_depthwise.depthwise_forward, grid, arguments, constants, s)


def _few_channels_forward(
    plan: Plan, x: Buffer, w: Buffer, b: Buffer | None, y: Image, window: Window, activation: Activation, precision: str
) -> None:
    (n, o, p, q), c, (sh, sw) = y.tensor.shape, x.shape[1], window.stride
    w = _either_order(plan, w)
    s = plan.config(FewChannelsProblem(n, p, q, o, c, dtype_name(x.dtype), plan.arch, wgrad=False))
    xs = conv3x3.Strided(x, *x.stride())
    arguments = (xs, w, b, y.strided, n, *x.shape[2:], p, q, o, *window.padding)
    constants = conv3x3_few_channels.FewChannels(
        s.block_j, s.block_l, conv3x3.Box(*s.box), c, TAPS_LAST=w.is_contiguous(), PRECISION=precision,
        CHANNELS_LAST=y.channels_last, STEP_H=sh, STEP_W=sw, VEC_STORE=y.vec, ACT=activation,
        PTX=plan.arch.backend != "hip",
    )  # fmt: skip
    grid = (s.boxes(n, p, q) * cdiv(o, s.block_j),)
    plan.launch(conv3x3_few_channels.few_channels_forward, grid, arguments, constants, s)


def _dense_forward(
    plan: Plan, x: Buffer, w: Buffer, b: Buffer | None, y: Image, window: Window, activation: Activation, precision: str
) -> None:
    (n, o, p, q), groups, arch = y.tensor.shape, window.groups, plan.arch
    packing = Packing(plan)
    xs = packing.image(x, groups)
    og, cg = o // groups, xs.tensor.shape[1] // groups
    groups_per_tile = choose_groups_per_tile(groups, cg, og, 64 if arch.has_tma else 32)
    ws = _packed_weight(plan, packing, w, o, cg, groups_per_tile, groups)
    packing.launch()
    group_tiles = cdiv(groups, groups_per_tile)
    vec = _tile_vec(xs, groups, groups_per_tile)
    s = plan.config(ConvProblem(
        n, p, q, groups_per_tile * og, groups_per_tile * cg, group_tiles, groups_per_tile, 1, dtype_name(x.dtype),
        precision, arch, vec=vec, tma=xs.tma and ws.tma and _steppable(x, window), along=True,
        whole=group_tiles > 1 or window.stride[1] == 2, wide=not y.channels_last, stepped=max(window.stride) > 1,
    ))  # fmt: skip
    precision = precision_in_kernel(precision, s.tma)
    split = s.splits > 1
    shares, out = parts_of(plan, y, s.splits) if split else (None, y)
    arguments = (
        xs.argument(s.tma, s.box, s.block_l, precision, window.stride), xs.strides,
        _weight_argument(ws, s.tma, s.block_j, s.block_l, precision),
        (xs.tensor, ws.tensor) if groups_per_tile > 1 else None, None if split else b, out.strided,
        n, *x.shape[2:], groups, og, cg, *window.stride,
    )  # fmt: skip
    constants = conv3x3.Product(
        **_dense_config(s, window, precision, out), VEC=vec, VEC_W=ws.vec,
        VEC_STORE=_tile_vec(out, groups, groups_per_tile), ACT=NONE if split else activation, PTX=arch.backend != "hip",
    )  # fmt: skip
    plan.launch(conv3x3.forward, (s.boxes(n, p, q) * s.columns(og, groups), s.splits), arguments, constants, s)
    if shares is not None:
        shape, run = ((n * p * q, o), None) if y.channels_last else ((n, o), p * q)
        sum_parts(plan, shares, b, y.tensor, activation, shape, run)


def backward(
    plan: Plan, grad: Buffer, input: Buffer | None, weight: Buffer | None, output: Buffer | None,
    *, input_size: Sequence[int], window: Window, activation: Activation, needs: Needs, last: ChannelsLast, tf32: bool,
) -> None:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so; nothing where kernels can't take the tensors.

    output is given if there is an activation; input for dw, weight for dx.
    """
    small = small_enough(grad.shape[1], input_size[1] // window.groups)
    # Kernels derive the size of dz's images from that of x's; what was saved a hook may have exchanged.
    same_window = (input_size[0], *window.output_size(*input_size[2:])) == (grad.shape[0], *grad.shape[2:])
    weight_size = (grad.shape[1], input_size[1] // window.groups, 3, 3)
    expected = ((input, tuple(input_size)), (weight, weight_size), (output, grad.shape))
    fits = all(t is None or (t.shape == size and t.dtype == grad.dtype) for t, size in expected)
    if not (small and same_window and fits and images_fit(grad, input, weight)) or 0 in input_size:
        return
    sizes = zip(grad_sizes(grad, input_size, window), formats(last), needs, strict=True)
    dx, dw, db = (plan.output(size, grad.dtype, layout) if need else None for size, layout, need in sizes)
    tensors = grad, input, weight, output, dx, dw, db
    backward_layer(plan, *tensors, window=window, activation=activation, tf32=tf32)
    plan.returns(dx, dw, db)


def backward_layer(
    plan: Plan, dy: Buffer, x: Buffer | None, w: Buffer | None, y: Buffer | None,
    dx: Buffer | None, dw: Buffer | None, db: Buffer | None,
    *, window: Window, activation: Activation, tf32: bool,
) -> None:  # fmt: skip
    """Those of dx, dw and db that are given. y is given if there is an activation; x for dw, w for dx."""
    activation = as_stored(activation, dy.dtype)
    # Of db alone no algorithm's kernel is launched, and any number of channels will do.
    image_like = dx if dx is not None else x
    c = image_like.shape[1] if image_like is not None else 0
    algorithm = algorithm_for(c, dy.shape[1], window.groups, x)
    precision = precision_of(dtype_name(dy.dtype), tf32, plan.arch)
    if algorithm == "few_channels" and dw is not None and dx is None:
        assert x is not None
        dys = with_unit_stride(plan, dy, is_channels_last(dy if y is None else y))
        reduce_partials(plan, *_few_channels_wgrad(plan, dys, y, x, dw, db, window, activation, precision))
        return
    summed = y is not None or dw is None  # db: on the way to dz, else wgrad has it for nothing
    needed = dx is not None or dw is not None
    packing = Packing(plan)
    dense = algorithm != "depthwise"
    dz, sums = output_grad(plan, dy, y, activation, db if summed else None, needed, dense, window.groups, packing)
    xs = packing.image(x, window.groups) if algorithm == "dense" and x is not None and dw is not None else None
    # Built before wgrad, for it may add its weight to what is packed; launched after it, so as to add up its sums.
    dgrad, dx_parts = None, Partials()
    if dx is not None:
        assert w is not None
        assert dz is not None
        if algorithm == "depthwise":
            dgrad = _depthwise_dgrad(plan, dz, w, dx, window)
        elif algorithm == "few_channels" and has_few_channels_dgrad(c, w.shape[0], window, dx.dtype):
            dgrad = _few_channels_dgrad(plan, dz, w, dx, window, precision)
        else:
            dgrad, dx_parts = _dense_dgrad(plan, packing, dz, w, dx, window, precision)
    packing.launch()
    pending = Partials(), Partials()
    if dw is not None:
        assert x is not None
        assert dz is not None
        tensors = (x, dw, None if summed else db, window)
        if algorithm == "depthwise":
            pending = _depthwise_wgrad(plan, dz, *tensors)
        elif algorithm == "few_channels":
            pending = _few_channels_wgrad(plan, dz, None, *tensors, NONE, precision)
        else:
            assert xs is not None
            spare = (x.numel() if dx is not None else dy.numel()) * x.element_size()
            pending = _dense_wgrad(plan, dz, xs, *tensors, precision, spare)
    if dgrad is not None and dgrad.kernel is conv3x3.dgrad:
        plan.add(dgrad)
        reduce_partials(plan, dx_parts, *append_sums(plan, *pending, sums))
        return
    reduce_partials(plan, *pending, sums)
    if dgrad is not None:
        plan.add(dgrad)


def algorithm_for(c: int, o: int, groups: int, x: Buffer | None) -> str:
    """Which kernels: "depthwise", "few_channels" or "dense". c, o: input and output channels; x, if it is read.

    `few_channels` has 32 bits for an offset within an image.
    """
    if groups == c == o and groups > 1:
        return "depthwise"
    extent = 0 if x is None else sum((x.shape[d] - 1) * x.stride(d) for d in (1, 2, 3))
    return "few_channels" if groups == 1 and c <= FEW_CHANNELS and extent < 2**31 else "dense"


def _dense_dgrad(
    plan: Plan, packing: Packing, dz: Image, w: Buffer, dx: Buffer, window: Window, precision: str
) -> tuple[Launch, Partials]:
    """The launch that writes dx, once `packing` is done, or parts of it, which are left to be added up."""
    (n, c, height, width), ((sh, sw), _, groups), arch = dx.shape, window, plan.arch
    out = dense_image(dx)
    og = dz.tensor.shape[1] // groups  # with padding
    cg = padded(c, dx.element_size()) if groups == 1 else c // groups
    groups_per_tile = choose_groups_per_tile(groups, cg, og, 64 if arch.has_tma else 32)
    # wgmma takes TF32 from rows that lie along the sum.
    along = precision == "tf32" and groups == 1 and (arch.has_wgmma or arch.backend == "interpreter")
    rows, cols = (cg, og) if along else (og * groups, cg)
    ws = _packed_weight(plan, packing, w, rows, cols, groups_per_tile, groups, swapped=along)
    group_tiles = cdiv(groups, groups_per_tile)
    vec = _tile_vec(dz, groups, groups_per_tile)
    p, q = cdiv(height, sh), cdiv(width, sw)  # of the largest class
    s = plan.config(ConvProblem(
        n, p, q, groups_per_tile * (c // groups), groups_per_tile * og, group_tiles, groups_per_tile, sh * sw,
        dtype_name(dx.dtype), precision, arch, vec=vec, tma=dz.tma and ws.tma, along=along, whole=group_tiles > 1,
        wide=not out.channels_last, stepped=sh * sw > 1,
    ))  # fmt: skip
    precision = precision_in_kernel(precision, s.tma)
    shares, out = parts_of(plan, out, s.splits) if s.splits > 1 else (dx, out)
    arguments = (
        dz.argument(s.tma, s.box, s.block_l, precision), dz.strides,
        _weight_argument(ws, s.tma, *((s.block_j, s.block_l) if along else (s.block_l, s.block_j)), precision),
        (dz.tensor, ws.tensor) if groups_per_tile > 1 else None, out.strided, None,
        n, height, width, groups, og, cg, c // groups, sh, sw,
    )  # fmt: skip
    constants = conv3x3.Product(
        **_dense_config(s, window, precision, out), VEC=vec, VEC_W=ws.vec,
        VEC_STORE=1 if sw == 2 and not out.channels_last else _tile_vec(out, groups, groups_per_tile),
        W_TRANSPOSED=along,
    )  # fmt: skip
    grid = (s.boxes(n, p, q) * s.columns(c // groups, groups), sh * sw * s.splits)
    return Launch.of(conv3x3.dgrad, grid, arguments, constants, s), Partials(shares, dx)


def _dense_wgrad(
    plan: Plan, dz: Image, xs: Image, x: Buffer, dw: Buffer, db: Buffer | None, window: Window, precision: str,
    spare: int,
) -> WgradPartials:  # fmt: skip
    (n, _, p, q), (o, cg, *_), groups = dz.tensor.shape, dw.shape, window.groups
    og = o // groups
    groups_per_tile = choose_groups_per_tile(groups, cg, og, 32)
    group_tiles = cdiv(groups, groups_per_tile)
    vec_o, vec_c = _tile_vec(dz, groups, groups_per_tile), _tile_vec(xs, groups, groups_per_tile)
    s = plan.config(ConvWgradProblem(
        n, p, q, groups_per_tile * og, groups_per_tile * cg, group_tiles, groups_per_tile, dtype_name(x.dtype),
        precision, plan.arch, vec=min(vec_o, vec_c), tma=dz.tma and xs.tma and _steppable(x, window), spare=spare,
    ))  # fmt: skip
    shares, sums = partials_of(plan, dw, s.splits, (o, 9, cg)), partials_of(plan, db, s.splits)
    assert shares.partials is not None
    in_order = dw.is_contiguous(memory_format=torch.channels_last)
    precision = precision_in_kernel(precision, s.tma and db is None)  # db sums dz as it is, not rounded
    arguments = (
        dz.argument(s.tma, s.box, s.block_i, precision), dz.strides,
        xs.argument(s.tma, s.box, s.block_j, precision, window.stride), xs.strides, shares.partials, sums.partials,
        n, *x.shape[2:], groups, og, cg, *window.stride, cdiv(s.boxes(n, p, q), s.splits),
    )  # fmt: skip
    constants = conv3x3.Wgrad(
        s.block_i, s.block_j, conv3x3.Box(*s.box), *window.padding, s.taps, groups_per_tile,
        DIAGONAL=groups_per_tile > 1, TMA=s.tma, X_FIRST=s.x_first, TAPS_LAST=s.splits == 1 and not in_order,
        PRECISION=precision, VEC_O=vec_o, VEC_C=vec_c, VEC_STORE=vector_length(shares.partials.element_size(), cg),
    )  # fmt: skip
    grid = (s.tiles(groups_per_tile * og, groups_per_tile * cg) * group_tiles * (9 // s.taps), s.splits)
    plan.launch(conv3x3.wgrad, grid, arguments, constants, s)
    return shares._replace(transposed=None if in_order else (9, cg)), sums


def _few_channels_wgrad(
    plan: Plan, dz: Image, y: Buffer | None, x: Buffer, dw: Buffer, db: Buffer | None, window: Window,
    activation: Activation, precision: str,
) -> WgradPartials:  # fmt: skip
    """With y, `dz` holds dy."""
    (n, c, *_), o, (p, q), (sh, sw) = x.shape, dw.shape[0], dz.tensor.shape[2:], window.stride
    fused, summed = y is not None, db is not None
    s = plan.config(FewChannelsProblem(n, p, q, o, c, dtype_name(x.dtype), plan.arch, True, fused, summed))
    ys = None if y is None else with_unit_stride(plan, y, dz.channels_last)
    shares, sums = partials_of(plan, dw, s.splits), partials_of(plan, db, s.splits)
    arguments = (
        dz.strided, None if ys is None else ys.strided, conv3x3.Strided(x, *x.stride()), shares.partials, sums.partials,
        n, *x.shape[2:], p, q, o, *window.padding, cdiv(s.boxes(n, p, q), s.splits),
    )  # fmt: skip
    vec = dz.vec if ys is None else min(dz.vec, ys.vec)
    if dz.channels_last:
        vec = min(vec, vector_length(x.element_size(), o))
    constants = conv3x3_few_channels.FewChannels(
        s.block_i, s.block_j, conv3x3.Box(*s.box), c, TAPS_LAST=dw.is_contiguous(), PRECISION=precision,
        CHANNELS_LAST=dz.channels_last, STEP_H=sh, STEP_W=sw, VEC=vec, FUSE_DZ=ys is not None, ACT=activation,
    )  # fmt: skip
    plan.launch(conv3x3_few_channels.few_channels_wgrad, (cdiv(o, s.block_i), s.splits), arguments, constants, s)
    return shares, sums


def has_few_channels_dgrad(c: int, o: int, window: Window, dtype: torch.dtype) -> bool:
    """Whether few input channels have a dgrad of their own: at most four, and o of a type that is summed in one step.

    Compiled: float64 spills 844 bytes on sm_100.
    """
    return c <= 4 and window.stride == (1, 1) and dtype.itemsize <= 4 and o * dtype.itemsize <= 256


def _few_channels_dgrad(plan: Plan, dz: Image, w: Buffer, dx: Buffer, window: Window, precision: str) -> Launch:
    (n, c, height, width), o, dtype = dx.shape, w.shape[0], dtype_name(dx.dtype)
    w, out = _either_order(plan, w), dense_image(dx)
    s = plan.config(FewChannelsDgradProblem(n, height, width, o, dtype, precision, plan.arch, dz.tma))
    precision = precision_in_kernel(precision, s.tma)
    arguments = (
        dz.argument(s.tma, (s.box[0], 1, s.box[2]), s.block_l, precision), dz.strides, w, out.strided,
        n, height, width, *dz.tensor.shape[2:], o, *window.padding,
    )  # fmt: skip
    constants = conv3x3_few_channels.FewChannels(
        s.block_l, 64, conv3x3.Box(*s.box), c, TAPS_LAST=w.is_contiguous(), PRECISION=precision,
        CHANNELS_LAST=out.channels_last, VEC=dz.vec, VEC_STORE=out.vec if out.channels_last else 1, TMA=s.tma,
    )  # fmt: skip
    grid = (s.boxes(n, height, width, rim=2),)
    return Launch.of(conv3x3_few_channels.few_channels_dgrad, grid, arguments, constants, s)


def _depthwise_wgrad(plan: Plan, dz: Image, x: Buffer, dw: Buffer, db: Buffer | None, window: Window) -> WgradPartials:
    (n, c, *_), (p, q) = x.shape, dz.tensor.shape[2:]
    stepped = window.stride != (1, 1)
    s = plan.config(DepthwiseProblem(
        n, p, q, c, dtype_name(x.dtype), plan.arch, channels_last=dz.channels_last, wgrad=True, crowded=stepped
    ))  # fmt: skip
    xs = with_unit_stride(plan, x, dz.channels_last)
    shares, sums = partials_of(plan, dw, s.splits), partials_of(plan, db, s.splits)
    arguments = (
        dz.strided, xs.strided, shares.partials, sums.partials, n, *x.shape[2:], p, q, c, *window.padding,
        cdiv(s.boxes(n, p, q), s.splits),
    )  # fmt: skip
    constants = conv3x3_depthwise.Depthwise(
        s.block_j, conv3x3.Box(*s.box), *window.stride, CHANNELS_LAST=dz.channels_last, VEC=xs.vec, VEC_Z=dz.vec,
        WHOLE=p % s.box[1] == 0,
    )  # fmt: skip
    plan.launch(conv3x3_depthwise.depthwise_wgrad, (cdiv(c, s.block_j), s.splits), arguments, constants, s)
    return shares, sums


def _depthwise_dgrad(plan: Plan, dz: Image, w: Buffer, dx: Buffer, window: Window) -> Launch:
    (n, c, height, width), (sh, sw) = dx.shape, window.stride
    out = dense_image(dx)
    dz = with_unit_stride(plan, dz.tensor, out.channels_last)
    p, q = cdiv(height, sh), cdiv(width, sw)  # of the largest class
    stepped = window.stride != (1, 1)
    s = plan.config(DepthwiseProblem(
        n, p, q, c, dtype_name(dx.dtype), plan.arch, channels_last=out.channels_last, wgrad=False, crowded=stepped
    ))  # fmt: skip
    arguments = (
        dz.strided, plan.contiguous(w), out.strided, n, height, width, *dz.tensor.shape[2:], c, *window.padding,
    )  # fmt: skip
    constants = conv3x3_depthwise.Depthwise(
        s.block_j, conv3x3.Box(*s.box), sh, sw, CHANNELS_LAST=out.channels_last, VEC=dz.vec,
        VEC_STORE=1 if sw == 2 and not out.channels_last else out.vec,
    )  # fmt: skip
    grid = (s.boxes(n, p, q) * cdiv(c, s.block_j), sh * sw)
    return Launch.of(conv3x3_depthwise.depthwise_dgrad, grid, arguments, constants, s)


def _dense_config(s: ConvConfig, window: Window, precision: str, out: Image) -> dict[str, Any]:
    """The fields that `forward` and `dgrad` share, but for the lengths of vectors."""
    pad_h, pad_w = window.padding
    return dict(
        BLOCK_J=s.block_j, BLOCK_L=s.block_l, BOX=conv3x3.Box(*s.box), PAD_H=pad_h, PAD_W=pad_w, GROUP=s.group,
        GROUPS_PER_TILE=s.groups_per_tile, DIAGONAL=s.groups_per_tile > 1, FLAT=s.flat, TMA=s.tma, PRECISION=precision,
        CHANNELS_LAST=out.channels_last, SPLIT=s.splits > 1,
    )  # fmt: skip


def _either_order(plan: Plan, w: Buffer) -> Buffer:
    """A weight whose nine taps and input channels are one dense row, whichever of them comes first."""
    dense = w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)
    return w if dense else plan.contiguous(w)


def _steppable(x: Buffer, window: Window) -> bool:
    """Whether descriptors can step over x: with an odd number of rows, the last pair would hold the next image's."""
    return all(length % step == 0 for length, step in zip(x.shape[2:], window.stride, strict=True))


def _tile_vec(image: Image, groups: int, groups_per_tile: int) -> int:
    """Elements that divide all that `image.vec` does, and the channels of a tile's groups; so they divide a shorter
    last tile's.
    """
    if groups == 1 or not image.channels_last:
        return image.vec
    channels = image.tensor.shape[1] // groups
    return min(image.vec, vector_length(image.tensor.element_size(), groups_per_tile * channels))


def _weight_argument(w: Image, use_tma: bool, rows: int, cols: int, precision: str) -> object:
    """The kernel argument: the tensor itself, or a descriptor (taps, O, C) of tiles of one tap."""
    if not use_tma:
        return w.tensor
    o, c = w.tensor.shape[:2]
    return descriptor(w.tensor, [9, o, c], [c, 9 * c, 1], [1, rows, cols], precision)


def _packed_weight(
    plan: Plan, packing: Packing, w: Buffer, rows: int, cols: int, groups_per_tile: int, groups: int,
    swapped: bool = False,
) -> Image:  # fmt: skip
    """w as (rows, 9, cols) in memory, with zeros where it has no such output or input channel.

    Of several groups a tile, their cols stand side by side: (rows, 9, groups_per_tile · cols). swapped: rows are input
    channels.
    """
    if groups_per_tile > 1:
        out = channels_last_scratch(plan, w, groups_per_tile * cols)
        arguments = (w, out, rows // groups, cols, *w.stride())
        config = conv3x3.SpreadWeight(groups_per_tile, power_of_2(9 * groups_per_tile * cols))
        plan.add(Launch(conv3x3.spread_weight, (rows,), arguments, dict(CONFIG=config), 4))
        return image(out, True)
    if not swapped and w.shape[:2] == (rows, cols) and w.is_contiguous(memory_format=torch.channels_last):
        return image(w, True)
    size, zero = (rows, cols, 3, 3), rows > w.shape[1 if swapped else 0]
    return packing.pack(w, plan.scratch(size, w.dtype, torch.channels_last, zero=zero), swapped)
