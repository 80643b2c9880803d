"""Linear + activation on the Triton kernels: which launches make up each direction. Matrices only; imports triton.

A config's block_i × block_j is the tile of a result, and block_l a step of its sum. The kernels name sides of tiles
after x (M, K) and w (N, K):

    forward           block_i BLOCK_M    block_j BLOCK_N    block_l BLOCK_K
    dgrad, backward   block_i BLOCK_M    block_j BLOCK_K    block_l BLOCK_N
    wgrad             block_i BLOCK_N    block_j BLOCK_K    block_l BLOCK_M
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...dispatch import dtype_name
from ...kernels import linear as kernels
from ...launch.arch import cdiv, precision_of
from ...launch.buffer import Buffer
from ...launch.configs import register_limit, rows_per_split
from ...launch.layout import Operand, accumulator, matrix, operand, precision_in_kernel, vector_length
from ...launch.matmul import MatmulConfig
from ...launch.plan import Plan
from ...launch.reduce import Partials, append_sums, partials_of, reduce_partials, sum_parts
from ..activations import NONE, Activation, as_stored
from ..checks import check_dtypes, matrices_fit, saved_fit
from ..shared import Needs
from .checks import check_layouts
from .config import BackwardProblem, DgradProblem, ForwardProblem, OutputGradProblem, WgradProblem
from .reference import grad_sizes


def forward(
    plan: Plan, input: Buffer, weight: Buffer, bias: Buffer | None, *, activation: Activation, tf32: bool
) -> None:
    """act(input·weightᵀ + bias), contiguous; nothing where kernels can't take them. input: (*, K)."""
    check_call(input, weight, bias)
    if not matrices_fit(input, weight):
        return
    output = plan.output((*input.shape[:-1], weight.shape[0]), input.dtype)
    forward_layer(plan, matrix(plan, input), weight, bias, matrix(plan, output), activation=activation, tf32=tf32)
    plan.returns(output)


def check_call(input: Buffer, weight: Buffer, bias: Buffer | None) -> None:
    """Once for each kind of call: no call whose layouts are known is checked again."""
    check_layouts("linear", input, weight, bias)
    check_dtypes("linear", input, weight=weight, bias=bias)


def forward_layer(
    plan: Plan, x: Buffer, w: Buffer, b: Buffer | None, y: Buffer, *, activation: Activation, tf32: bool
) -> None:
    """y = act(x·wᵀ + b), one launch, or two of a long sum for few tiles.

    x: (M, K), w: (N, K), b: (N,), or one number for all; y: (M, N) contiguous.
    """
    if b is not None and b.shape != y.shape[1:]:
        b = b.viewed(y.shape[1:], (0,))
    b = None if b is None else plan.contiguous(b)
    shares = form_y(plan, x, w, b, y, activation=activation, tf32=tf32)
    if shares is not None:
        sum_parts(plan, shares, b, y, activation, (y.shape[0], y.shape[1]))


def form_y(
    plan: Plan, x: Buffer, w: Buffer, b: Buffer | None, y: Buffer, *, activation: Activation, tf32: bool
) -> Buffer | None:
    """y = act(x·wᵀ + b), or of a long sum for few tiles what is returned: parts (parts, M, N) of x·wᵀ."""
    (m, k), n = x.shape, w.shape[0]
    dtype = dtype_name(x.dtype)
    precision = precision_of(dtype, tf32, plan.arch)
    xs, ws, ys = operand(plan, x), operand(plan, w), operand(plan, y)
    vec = min(xs.vec, ws.vec)
    along = not (xs.transposed or ws.transposed)
    s = plan.config(
        ForwardProblem(m, n, k, dtype, precision, plan.arch, vec, xs.tma and ws.tma, along, activation.costly)
    )
    split = s.splits > 1
    shares = plan.scratch((s.splits, m, n), accumulator(x.dtype)) if split else None
    store_tma = s.tma and ys.tma and not split
    precision = precision_in_kernel(precision, s.tma)
    tiles = s.tiles(m, n)
    plan.launch(
        kernels.forward,
        (min(plan.arch.processors, tiles) if s.persistent else tiles, s.splits),
        (
            xs.argument(s.tma, s.block_i, s.block_l, precision),
            ws.argument(s.tma, s.block_j, s.block_l, precision),
            None if split else b,
            ys.argument(store_tma, s.block_i, s.block_j) if shares is None else shares,
            m, n, k, xs.ld, ws.ld, rows_per_split(k, s.splits, s.block_l),
        ),
        kernels.Product(
            BLOCK_M=s.block_i, BLOCK_N=s.block_j, BLOCK_K=s.block_l, GROUP=s.group, PRECISION=precision,
            TMA=s.tma, TMA_STORE=store_tma, X_TRANSPOSED=xs.transposed, W_TRANSPOSED=ws.transposed,
            PREFETCH=prefetched(s, xs, ws), PERSISTENT=s.persistent, VEC=vec,
            VEC_STORE=ys.vec if shares is None else vector_length(shares.element_size(), n),
            ACT=NONE if split else activation, PTX=plan.arch.backend != "hip", SPLIT=split,
        ),
        s,
    )  # fmt: skip
    return shares


class LowerLayer(NamedTuple):
    """The layer whose output is this layer's x: its dz is wanted in place of dx."""

    y: Buffer
    activation: Activation
    db: Buffer | None


class OutputGradient:
    """dz of a layer, and the sums of its db: formed by the first launch that can, and read by the others."""

    def __init__(self, plan: Plan, dy: Buffer, y: Buffer | None, activation: Activation, db: Buffer | None) -> None:
        self.dy, self.y = operand(plan, dy), None if y is None else operand(plan, y)
        self.activation = as_stored(activation, dy.dtype)
        self.readable = not self.dy.transposed and self.dy.ld >= dy.shape[1]  # an expanded dy has no rows to load
        self.dz = self.dy if self.readable and y is None else None  # where it can be read
        self.db = db  # until its sums are formed
        self.sums = Partials()
        self._plan = plan

    @property
    def fusable(self) -> bool:
        """Whether a product may form dz while it loads its operand."""
        return self.dz is None and self.readable

    def formed(self) -> Operand:
        """dz, after a pass over memory where it is not there to be read, or db's sums are not formed."""
        if self.dz is None or self.db is not None:
            out = self._plan.scratch(self.dy.tensor.shape, self.dy.tensor.dtype) if self.dz is None else None
            self.sum_rows(out)
        assert self.dz is not None
        return self.dz

    def sum_rows(self, out: Buffer | None) -> None:
        """One pass over dy and y, that writes `out` and the sums of db, where these are given."""
        y = None if self.y is None else self.y.tensor
        self.was_formed(out, sum_rows(self._plan, self.dy.tensor, y, self.activation, out, self.db))

    def was_formed(self, dz: Buffer | None, sums: Partials) -> None:
        """Say what a launch has left."""
        if dz is not None:
            self.dz = operand(self._plan, dz)
        self.sums, self.db = sums, None


def backward(
    plan: Plan, grad: Buffer, input: Buffer | None, weight: Buffer | None, output: Buffer | None,
    *, activation: Activation, needs: Needs, tf32: bool,
) -> None:  # fmt: skip
    """Gradients of input, weight and bias, each where `needs` says so; nothing where kernels can't take the tensors.

    output is given if there is an activation; input for dw, weight for dx.
    """
    if not (matrices_fit(grad, input, weight) and saved_fit(grad, input, [output], [weight])):
        return
    sizes = zip(grad_sizes(grad, input, weight), needs, strict=True)
    dx, dw, db = (plan.output(size, grad.dtype) if need else None for size, need in sizes)
    dy, x, y, flat_dx = (None if t is None else matrix(plan, t) for t in (grad, input, output, dx))
    assert dy is not None
    # Kernels read outputs as rows without gaps; a saved tensor's hooks may have returned anything.
    y = None if y is None else plan.contiguous(y)
    reduce_partials(plan, *backward_layer(plan, dy, x, weight, y, flat_dx, dw, db, activation=activation, tf32=tf32))
    plan.returns(dx, dw, db)


def backward_layer(
    plan: Plan, dy: Buffer, x: Buffer | None, w: Buffer | None, y: Buffer | None,
    dx: Buffer | None, dw: Buffer | None, db: Buffer | None,
    *, activation: Activation, tf32: bool, lower: LowerLayer | None = None, pending: Sequence[Partials] = (),
) -> Sequence[Partials]:  # fmt: skip
    """Those of dx, dw and db that are given, of matrices. y is given if there is an activation; x for dw, w for dx.

    With `lower`, `dx` gets that layer's dz, and its db is formed, too.

    pending: sums that the launches before have left to be added up. Returns those that are left now.
    """
    (m, n), dtype = dy.shape, dtype_name(dy.dtype)
    precision = precision_of(dtype, tf32, plan.arch)
    dz, xs, ws = OutputGradient(plan, dy, y, activation, db), *(None if t is None else operand(plan, t) for t in (x, w))
    if dx is None and dw is None:
        if db is not None:
            dz.sum_rows(None)
        return (dz.sums, *pending)
    if xs is not None and ws is not None and dx is not None and dw is not None:
        problem = BackwardProblem(m, n, xs.tensor.shape[1], dtype, precision, plan.arch, xs.vec)
        if problem.pays and dz.readable and not xs.transposed:
            own = in_one_pass(plan, problem, dz, xs, ws, dx, dw, lower)
            return (*append_sums(plan, *pending), *own)
    if y is None:
        dz.formed()
    shares = Partials()
    if dw is not None:
        assert xs is not None
        shares = form_dw(plan, dz, xs, dw, precision, hand_on=dx is not None)
    if dx is None:
        return (shares, dz.sums, *pending)
    assert ws is not None
    lower_sums = form_dx(plan, dz, ws, dx, precision, lower, tf32=tf32)
    return (*append_sums(plan, shares, dz.sums, *pending), lower_sums)


def in_one_pass(
    plan: Plan, problem: BackwardProblem, dz: OutputGradient, x: Operand, w: Operand, dx: Buffer, dw: Buffer,
    lower: LowerLayer | None,
) -> Sequence[Partials]:  # fmt: skip
    """dx, dw and db of a layer of few outputs, one launch. Returns the sums that are left."""
    (m, n, k), dtype, s = problem[:3], dx.dtype, plan.config(problem)
    dy, y = dz.dy, dz.y
    _, lower_act, lower_db = lower or (None, None, None)
    own = [partials_of(plan, t, s.splits) for t in (dw, dz.db, lower_db)]
    plan.launch(
        kernels.backward,
        (cdiv(k, s.block_j) * s.splits,),
        (
            dy.tensor, None if y is None else y.tensor, x.tensor, w.tensor, dx, *(sums.partials for sums in own), None,
            m, n, k, dy.ld, x.ld, w.ld, rows_per_split(m, s.splits, s.block_i),
        ),
        kernels.Backward(
            BLOCK_M=s.block_i, BLOCK_N=s.block_l, BLOCK_K=s.block_j, PRECISION=problem.precision,
            VEC=min(t.vec for t in (dy, y) if t is not None), VEC_X=x.vec, VEC_W=w.vec,
            VEC_STORE=vector_length(dx.element_size(), k), W_TRANSPOSED=w.transposed,
            FUSE_DZ=y is not None, ACT=None if y is None else dz.activation,
            LOWER_ACT=None if lower_act is None else as_stored(lower_act, dtype),
        ),
        s,
    )  # fmt: skip
    return own


def form_dw(plan: Plan, dz: OutputGradient, x: Operand, dw: Buffer, precision: str, *, hand_on: bool) -> Partials:
    """dw, and where that is fused dz and db with it. hand_on: dz is wanted after. Returns the sums that dw is of."""
    (m, n), dtype, k = dz.dy.tensor.shape, dw.dtype, x.tensor.shape[1]
    # What may be read, as a dz of its own lies as y does.
    read = [t for t in (dz.dz, dz.dy if dz.fusable else None, dz.y, x) if t is not None]
    spare = (x if hand_on else dz.dy).tensor.numel() * dw.element_size()
    s = plan.config(
        WgradProblem(
            m, n, k, dtype_name(dtype), precision, plan.arch, vec=min(t.vec for t in read),
            tma=all(t.tma for t in read), may_fuse=dz.fusable, spare=spare,
        )
    )  # fmt: skip
    shares = partials_of(plan, dw, s.splits)
    assert shares.partials is not None
    if s.fuse_dz:
        out = plan.scratch((m, n), dtype) if hand_on else None
        sums = partials_of(plan, dz.db, s.splits)
        wgrad(plan, dz.dy, dz.y, x, shares.partials, out, sums.partials, s, dz.activation, precision)
        dz.was_formed(out, sums)
    else:
        wgrad(plan, dz.formed(), None, x, shares.partials, None, None, s, dz.activation, precision)
    return shares


def form_dx(
    plan: Plan, dz: OutputGradient, w: Operand, dx: Buffer, precision: str, lower: LowerLayer | None, *, tf32: bool
) -> Partials:  # fmt: skip
    """dx, or with `lower` that layer's dz. Returns the sums that the lower layer's db is of.

    A long sum for few tiles is left to `forward`, which splits it; what adds up the parts forms the lower layer's dz.
    """
    (m, n), dtype, k = dz.dy.tensor.shape, dx.dtype, w.tensor.shape[1]

    def problem(*read: Operand | None, may_fuse: bool = False) -> DgradProblem:
        operands = [t for t in (*read, w) if t is not None]
        return DgradProblem(
            m, n, k, dtype_name(dtype), precision, plan.arch, vec=min(t.vec for t in operands),
            tma=all(t.tma for t in operands), may_fuse=may_fuse, along=w.transposed, for_lower=lower is not None,
        )  # fmt: skip

    fused = problem(dz.dy, dz.y, may_fuse=True) if dz.fusable and dz.db is None else None
    if (fused or problem(dz.dz or dz.dy)).is_split:
        turned = w.tensor.viewed((k, n), w.tensor.stride()[::-1])
        if lower is None:
            forward_layer(plan, dz.formed().tensor, turned, None, dx, activation=NONE, tf32=tf32)
            return Partials()
        whole = plan.scratch((m, k), dtype)
        shares = form_y(plan, dz.formed().tensor, turned, None, whole, activation=NONE, tf32=tf32)
        lower_y = lower.y if lower.activation.name else None
        return sum_rows(plan, shares or whole, lower_y, as_stored(lower.activation, dtype), dx, lower.db)
    source, y, s = dz.dy, dz.y, plan.config(fused) if fused else None
    if s is None or not s.fuse_dz:
        source, y = dz.formed(), None
        s = plan.config(problem(source))
    sums = Partials()
    if lower is not None:
        sums = partials_of(plan, lower.db, cdiv(m, s.block_i))
        lower = lower._replace(db=sums.partials)
    dgrad(plan, source, y, w, dx, s, dz.activation, precision, lower)
    return sums


def sum_rows(
    plan: Plan, dy: Buffer, y: Buffer | None, activation: Activation, dz: Buffer | None, db: Buffer | None
) -> Partials:
    """dz = dy·act′, and partial sums of db, which are returned: those of dz over so many rows each.

    dy: (M, N), or (parts, M, N), whose sum it is.
    """
    *parts, m, n = dy.shape
    s, vec = plan.config(OutputGradProblem(m, n, dtype_name(dy.dtype), plan.arch)), vector_length(dy.element_size(), n)
    blocks = cdiv(m, s.rows)
    sums = partials_of(plan, db, blocks)
    # Compiled: ptxas rounds down to a step of occupancy, and spills: 4 to 8 bytes beside parts, and with Triton 3.9 of
    # float64 in odd rows, each of which has an address.
    limit = register_limit(plan.arch) if parts or (dy.element_size() == 8 and vec == 1) else None
    plan.launch(
        kernels.output_grad,
        (cdiv(n, s.block_n), blocks),  # the second axis ends at 65,535, and n can be larger
        (dy, y, dz, sums.partials, m, n, parts[0] if parts else None, *dy.stride()[-2:], s.rows),
        kernels.OutputGrad(s.block_m, s.block_n, activation, vec, vector_length(dy.element_size(), dy.stride(-2))),
        s,
        max_registers=limit,
    )
    return sums


def dgrad(
    plan: Plan, dz: Operand, y: Operand | None, w: Operand, dx: Buffer, s: MatmulConfig, activation: Activation,
    precision: str, lower: LowerLayer | None = None,
) -> None:  # fmt: skip
    """dx = dz·w. With `s.fuse_dz`, `dz` is dy.

    With `lower`, `dx` is that layer's dz, and each tile leaves the sums of its rows in its db: (rows of tiles, K), or
    (K,) of one row of tiles.
    """
    (m, n), k = dz.tensor.shape, w.tensor.shape[1]
    out = operand(plan, dx)
    store_tma = s.tma and out.tma
    precision = precision_in_kernel(precision, s.tma)
    lower_y, lower_act, lower_db = lower or (None, None, None)
    beneath = None if lower_y is None else operand(plan, lower_y)
    plan.launch(
        kernels.dgrad,
        (s.tiles(m, k),),
        (
            dz.argument(s.tma, s.block_i, s.block_l, "ieee" if s.fuse_dz else precision),
            y.argument(s.tma, s.block_i, s.block_l) if s.fuse_dz and y is not None else None,
            w.argument(s.tma, s.block_l, s.block_j, precision),
            out.argument(store_tma, s.block_i, s.block_j),
            None if beneath is None else beneath.argument(s.tma and beneath.tma, s.block_i, s.block_j),
            lower_db, None, m, n, k, dz.ld, w.ld,
        ),
        kernels.Product(
            BLOCK_M=s.block_i, BLOCK_N=s.block_l, BLOCK_K=s.block_j, GROUP=s.group, STAGES=s.num_stages,
            PRECISION=precision, FUSE_DZ=s.fuse_dz, ACT=activation if s.fuse_dz else None, TMA=s.tma,
            TMA_STORE=store_tma, W_TRANSPOSED=w.transposed,
            LOWER_ACT=None if lower_act is None else as_stored(lower_act, dx.dtype),
            VEC_LOWER=None if beneath is None else beneath.vec,
            PREFETCH=prefetched(s, dz, w), VEC=min(t.vec for t in (dz, w, y) if t is not None), VEC_STORE=out.vec,
        ),
        s,
    )  # fmt: skip


def wgrad(
    plan: Plan, dz: Operand, y: Operand | None, x: Operand, dw: Buffer, dz_out: Buffer | None, db: Buffer | None,
    s: MatmulConfig, activation: Activation, precision: str,
) -> None:  # fmt: skip
    """dw = dzᵀ·x, or with splits each split's share of it. dw: (N, K), or (splits, N, K).

    With `s.fuse_dz`, `dz` is dy, and dz_out (M, N) and db (splits, N) are written too where they are given.
    """
    (m, n), k = dz.tensor.shape, x.tensor.shape[1]
    precision = precision_in_kernel(precision, s.tma)
    assert dw.numel() == s.splits * n * k
    plan.launch(
        kernels.wgrad,
        (s.tiles(n, k), s.splits),
        (
            dz.argument(s.tma, s.block_l, s.block_i, "ieee" if s.fuse_dz else precision),
            y.argument(s.tma, s.block_l, s.block_i) if s.fuse_dz and y is not None else None,
            x.argument(s.tma, s.block_l, s.block_j, precision),
            dw, dz_out, db, m, n, k, dz.ld, x.ld,
            rows_per_split(m, s.splits, s.block_l),
        ),
        kernels.Product(
            BLOCK_M=s.block_l, BLOCK_N=s.block_i, BLOCK_K=s.block_j, GROUP=s.group, STAGES=s.num_stages,
            PRECISION=precision, FUSE_DZ=s.fuse_dz, ACT=activation if s.fuse_dz else None, TMA=s.tma,
            X_TRANSPOSED=x.transposed,
            PREFETCH=prefetched(s, dz, x), VEC=min(dz.vec, x.vec), VEC_STORE=vector_length(dw.element_size(), k),
        ),
        s,
    )  # fmt: skip


def prefetched(s: MatmulConfig, *operands: Operand) -> bool:
    """Whether to prefetch by hand: with offsets of 32 bits within a tile, which has at most 256 lines."""
    return s.prefetch and all(matrix.ld < 1 << 23 for matrix in operands)
