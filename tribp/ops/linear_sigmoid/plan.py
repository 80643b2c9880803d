"""Linear + sigmoid on the Triton kernels: which launches make up each direction. Matrices only; imports triton."""

from collections.abc import Generator, Iterator

from torch import Tensor

from ...dispatch import dtype_name
from ...kernels import linear_sigmoid as kernels
from ...launch.arch import Arch, cdiv, precision_of
from ...launch.calls import scratch
from ...launch.layout import (
    Launch,
    Operand,
    Partials,
    accumulator,
    operand,
    partials_of,
    precision_in_kernel,
    reduce_partials,
    vector_length,
)
from ...launch.linear_sigmoid import choose_dgrad, choose_forward, choose_pass, choose_wgrad
from ...launch.matmul import Product


def forward(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, arch: Arch, tf32: bool, settings: Product | None = None
) -> Iterator[Launch]:
    """The one launch that writes y = σ(x·wᵀ + b). x: (M, K), w: (N, K), b: (N,) or None, y: (M, N) contiguous.

    `settings` replaces the rules' choice (tests and tuning).
    """
    (m, k), n = x.shape, w.shape[0]
    dtype = dtype_name(x.dtype)
    precision = precision_of(dtype, tf32, arch)
    xs, ws, ys = operand(x), operand(w), operand(y)
    vec = min(xs.vec, ws.vec)
    along = not (xs.transposed or ws.transposed)
    s = settings or choose_forward(m, n, k, dtype, precision, arch, vec=vec, tma=xs.tma and ws.tma, along=along)
    store_tma = s.tma and ys.tma
    precision = precision_in_kernel(precision, s.tma)
    yield Launch(
        kernels.forward,
        (min(s.persistent, s.tiles(m, n)) or s.tiles(m, n),),
        (
            xs.argument(s.tma, s.block_i, s.block_l, precision),
            ws.argument(s.tma, s.block_j, s.block_l, precision),
            None if b is None else b.contiguous(),
            ys.argument(store_tma, s.block_i, s.block_j),
            m, n, k, xs.ld, ws.ld,
        ),
        dict(CONFIG=kernels.Forward(
            BLOCK_M=s.block_i, BLOCK_N=s.block_j, BLOCK_K=s.block_l, GROUP=s.group, PRECISION=precision,
            TMA=s.tma, TMA_STORE=store_tma, X_TRANSPOSED=xs.transposed, W_TRANSPOSED=ws.transposed,
            PREFETCH=prefetched(s, xs, ws), PERSISTENT=s.persistent > 0, VEC=vec, VEC_STORE=ys.vec,
            PTX=arch.backend != "hip",
        )),
        s.num_warps,
        s.num_stages,
        s.max_registers,
    )  # fmt: skip


def output_grad(dy: Tensor, y: Tensor, dz: Tensor | None, db: Tensor | None, arch: Arch) -> Launch:
    """The launch that writes dz = dy·y·(1 − y) and the sums of its rows. db: (row blocks, N), see `row_blocks`."""
    m, n = y.shape
    s, vec = choose_pass(m, n, dtype_name(y.dtype), arch), vector_length(y.element_size(), n)
    # Compiled: each float64 of an odd row has an address. ptxas stays at 80 registers, and with Triton 3.9 spills.
    unrounded = arch.backend == "cuda" and y.element_size() == 8 and vec == 1
    return Launch(
        kernels.output_grad,
        (cdiv(n, s.block_n), cdiv(m, s.rows)),  # the second axis ends at 65,535, and n can be larger
        (dy, y, dz, db, m, n, dy.stride(0), dy.stride(1), s.rows),
        dict(CONFIG=kernels.OutputGrad(
            s.block_m, s.block_n, VEC=vec, VEC_DY=vector_length(dy.element_size(), dy.stride(0))
        )),
        s.num_warps,
        max_registers=255 if unrounded else None,
    )  # fmt: skip


def dgrad(
    dz: Operand, y: Tensor | None, w: Operand, dx: Tensor, arch: Arch, tf32: bool, settings: Product | None = None
) -> Launch:
    """The launch that writes dx = dz·w. With `y`, which allows the fused form, `dz` holds dy."""
    (m, n), k = dz.tensor.shape, w.tensor.shape[1]
    dtype = dtype_name(dx.dtype)
    precision = precision_of(dtype, tf32, arch)
    out = operand(dx)
    ys = None if y is None else operand(y)
    vec = min(t.vec for t in (dz, w, ys) if t is not None)
    tma = all(t.tma for t in (dz, w, ys) if t is not None)
    s = settings or choose_dgrad(
        m, n, k, dtype, precision, arch, vec=vec, tma=tma, may_fuse=y is not None, along=w.transposed
    )  # fmt: skip
    store_tma = s.tma and out.tma
    precision = precision_in_kernel(precision, s.tma)
    return Launch(
        kernels.dgrad,
        (s.tiles(m, k),),
        (
            dz.argument(s.tma, s.block_i, s.block_l, "ieee" if s.fuse_dz else precision),
            ys.argument(s.tma, s.block_i, s.block_l) if s.fuse_dz and ys is not None else None,
            w.argument(s.tma, s.block_l, s.block_j, precision),
            out.argument(store_tma, s.block_i, s.block_j),
            m, n, k, dz.ld, w.ld,
        ),
        dict(CONFIG=kernels.Dgrad(
            BLOCK_M=s.block_i, BLOCK_N=s.block_l, BLOCK_K=s.block_j, GROUP=s.group, STAGES=s.num_stages,
            PRECISION=precision, FUSE_DZ=s.fuse_dz, TMA=s.tma, TMA_STORE=store_tma, W_TRANSPOSED=w.transposed,
            PREFETCH=prefetched(s, dz, w), VEC=vec, VEC_STORE=out.vec,
        )),
        s.num_warps,
        s.num_stages,
        s.max_registers,
    )  # fmt: skip


def wgrad(
    dz: Operand, y: Tensor | None, x: Operand, dw: Tensor, dz_out: Tensor | None, db: Tensor | None,
    arch: Arch, tf32: bool, settings: Product,
) -> Launch:  # fmt: skip
    """The launch that writes dw = dzᵀ·x, or with splits each split's share of it. dw: (N, K), or (splits, N, K).

    With `settings.fuse_dz`, `dz` holds dy, and dz_out (M, N) and db (splits, N) are written too where they are given.
    """
    (m, n), k = dz.tensor.shape, x.tensor.shape[1]
    s = settings
    precision = precision_in_kernel(precision_of(dtype_name(x.tensor.dtype), tf32, arch), s.tma)
    assert dw.numel() == s.splits * n * k
    return Launch(
        kernels.wgrad,
        (s.tiles(n, k), s.splits),
        (
            dz.argument(s.tma, s.block_l, s.block_i, "ieee" if s.fuse_dz else precision),
            operand(y).argument(s.tma, s.block_l, s.block_i) if s.fuse_dz and y is not None else None,
            x.argument(s.tma, s.block_l, s.block_j, precision),
            dw, dz_out, db, m, n, k, dz.ld, x.ld,
            cdiv(cdiv(m, s.splits), s.block_l) * s.block_l,
        ),
        dict(CONFIG=kernels.Wgrad(
            BLOCK_M=s.block_l, BLOCK_N=s.block_i, BLOCK_K=s.block_j, GROUP=s.group, STAGES=s.num_stages,
            PRECISION=precision, FUSE_DZ=s.fuse_dz, TMA=s.tma, X_TRANSPOSED=x.transposed,
            PREFETCH=prefetched(s, dz, x), VEC=min(dz.vec, x.vec), VEC_STORE=vector_length(dw.element_size(), k),
        )),
        s.num_warps,
        s.num_stages,
        s.max_registers,
    )  # fmt: skip


def prefetched(s: Product, *operands: Operand) -> bool:
    """Whether to prefetch by hand: with offsets of 32 bits within a tile, which has at most 256 lines."""
    return s.prefetch and all(matrix.ld < 1 << 23 for matrix in operands)


def backward(
    dy: Tensor, x: Tensor | None, w: Tensor | None, y: Tensor, arch: Arch, tf32: bool,
    dx: Tensor | None, dw: Tensor | None, db: Tensor | None, fuse: bool = True,
) -> Iterator[Launch]:  # fmt: skip
    """The launches that write those of dx, dw and db that are given, in order; each is to be run as it comes.

    `fuse=False` keeps dz in a pass of its own, whatever the rules say (tests and tuning).
    """
    (m, n), dtype = y.shape, y.dtype
    partial = accumulator(dtype)

    def room() -> Tensor:
        return scratch((m, n), dtype, y.device)

    dys, ys = operand(dy), operand(y)
    fuse = fuse and not dys.transposed and dys.ld >= n  # an expanded dy has no rows to load tiles of
    dz: Tensor | None = None

    if dw is not None:
        assert x is not None
        xs = operand(x)
        k = x.shape[1]
        settings = choose_wgrad(
            m, n, k, dtype_name(dtype), precision_of(dtype_name(dtype), tf32, arch), arch,
            vec=min(dys.vec if fuse else ys.vec, ys.vec, xs.vec),  # a dz of its own lies as y does
            tma=xs.tma and ys.tma and (dys.tma or not fuse),
            may_fuse=fuse,
            spare=(x.numel() if dx is not None else y.numel()) * y.element_size(),
        )  # fmt: skip
        if settings.fuse_dz:
            dz = room() if dx is not None else None
            sums = Partials(partials_of(db, settings.splits, partial), db)
            source = dys
        else:
            dz = room()
            sums = yield from _output_grad(dy, y, dz, db, arch)
            source = operand(dz)
        shares = partials_of(dw, settings.splits, partial)
        assert shares is not None
        dz_out, sums_out = (dz, sums.partials) if settings.fuse_dz else (None, None)
        yield wgrad(source, y, xs, shares, dz_out, sums_out, arch, tf32, settings)
        yield from reduce_partials(arch, Partials(shares, dw), sums)
        del shares
        db = None

    if dx is not None:
        assert w is not None
        ws = operand(w)
        if dz is None and fuse and db is None:
            launch = dgrad(dys, y, ws, dx, arch, tf32)
            if launch.named["FUSE_DZ"]:
                yield launch
                return
        if dz is None:
            dz = room()
            yield from reduce_partials(arch, (yield from _output_grad(dy, y, dz, db, arch)))
            db = None
        yield dgrad(operand(dz), None, ws, dx, arch, tf32)

    if db is not None:
        yield from reduce_partials(arch, (yield from _output_grad(dy, y, None, db, arch)))


def _output_grad(
    dy: Tensor, y: Tensor, dz: Tensor | None, db: Tensor | None, arch: Arch
) -> "Generator[Launch, None, Partials]":
    """`output_grad`. Returns the partial sums of db."""
    m, n = y.shape
    blocks = cdiv(m, choose_pass(m, n, dtype_name(y.dtype), arch).rows)
    sums = partials_of(db, blocks, accumulator(y.dtype))
    yield output_grad(dy, y, dz, sums, arch)
    return Partials(sums, db)
