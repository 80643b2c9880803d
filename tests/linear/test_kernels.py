"""Each form of each kernel by itself, whatever the heuristics would choose: tiles, TMA, persistence, splits, fusion.

Shapes leave a remainder in every dimension, every output starts as NaN, and every type can have descriptors (a pitch
that is a multiple of 16 bytes).
"""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tribp import dispatch
from tribp.kernels import common
from tribp.launch.arch import ARCHS, cdiv
from tribp.launch.buffer import Buffer, layout_of
from tribp.launch.configs import WORKSPACE
from tribp.launch.layout import operand
from tribp.launch.matmul import MatmulConfig
from tribp.launch.plan import Plan
from tribp.launch.reduce import Partials, reduce_partials
from tribp.ops.activations import NONE, Activation, activate, gradient
from tribp.ops.linear import plan as ops
from tribp.ops.linear.config import BackwardProblem, ForwardProblem, WgradProblem
from tribp.versions import descriptor_unit

from ..covering import DTYPES, cover, turn
from ..launch.plans import plan_of, run
from ..oracle import LinearSigmoid, assert_close, matrix

SIGMOID = Activation("sigmoid")
M, N, K = 80, 48, 48
BASE = MatmulConfig(32, 32, 32, num_warps=4, num_stages=2, reason="test", group=2)
# Pairwise over the forms: (TMA, persistent programs, prefetch, splits).
FORMS = {
    "pointers": BASE,
    "prefetch": replace(BASE, prefetch=True),
    "persistent": replace(BASE, persistent=True),
    "tma": replace(BASE, tma=True),
    "tma persistent": replace(BASE, tma=True, persistent=True),
    "deep and narrow": replace(BASE, block_i=16, block_j=64, block_l=16, group=8),
}
SPLIT_FORMS = {"split": replace(BASE, block_l=16, splits=3), "split tma": replace(BASE, block_l=16, tma=True, splits=2)}
SPLIT_FORMS["split prefetch"] = replace(SPLIT_FORMS["split"], prefetch=True)


@triton.jit
def round_to_bfloat16(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(y + i, common.round_to(tl.load(x + i), tl.bfloat16))


def nan(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("bias", ["bias", "one", None])
@pytest.mark.parametrize("act", [SIGMOID, Activation("relu"), NONE], ids=lambda act: str(act.name))
@pytest.mark.parametrize("form", SPLIT_FORMS)
def test_forward_of_parts(form: str, act: Activation, bias: str | None, kernels: str) -> None:
    """Sums in parts, the last of them shorter, then what adds them up, and bias and activation."""
    k = {"split": K - 8, "split tma": K, "split prefetch": K - 3}[form]
    dtype = turn(DTYPES, form, act.name, bias)
    x, w = matrix(M, k, dtype, kernels), matrix(N, k, dtype, kernels) / k**0.5
    b = matrix(1, N, dtype, kernels)[0] if bias else None
    y = nan(M, N, dtype=dtype, device=kernels)
    given = b[1:2] if b is not None and bias == "one" else b
    configs = {ForwardProblem: SPLIT_FORMS[form]}
    launches = run(ops.forward_layer, (x, w, given, y), configs, activation=act, tf32=False)
    assert [launch.kernel.__name__ for launch in launches] == ["forward", "output"]
    assert launches[0].grid[1] == SPLIT_FORMS[form].splits
    exact = torch.nn.functional.linear(x.double(), w.double(), None if given is None else given.double().expand(N))
    assert_close(y, activate(exact, *act).cpu())


@pytest.mark.parametrize(
    ("form", "transposed", "dtype"),
    cover(
        FORMS,
        ["", "x", "w", "xw"],
        DTYPES,
        quick=lambda form, transposed, dtype: not transposed or dtype == turn(DTYPES, form, transposed),
    ),
)
def test_forward(form: str, transposed: str, dtype: torch.dtype, kernels: str) -> None:
    x, w = matrix(M, K, dtype, kernels, "x" in transposed), matrix(N, K, dtype, kernels, "w" in transposed) / K**0.5
    b = matrix(1, N, dtype, kernels)[0] if form != "prefetch" else None
    y = nan(M, N, dtype=dtype, device=kernels)
    (launch,) = run(ops.forward_layer, (x, w, b, y), {ForwardProblem: FORMS[form]}, activation=SIGMOID, tf32=False)
    assert launch.named["PERSISTENT"] == FORMS[form].persistent
    assert_close(y, LinearSigmoid(x, w, b).y)


@pytest.mark.parametrize(
    ("form", "transposed", "dtype"),
    cover(
        ["pointers", "prefetch", "tma", "fused", "fused tma"], [False, True], DTYPES,
        quick=lambda form, transposed, dtype: not transposed or dtype == turn(DTYPES, form),
    ),
)  # fmt: skip
def test_dgrad(form: str, transposed: bool, dtype: torch.dtype, kernels: str) -> None:
    w = matrix(N, K, dtype, kernels, transposed)
    dy, y = matrix(M, N, dtype, kernels), torch.sigmoid(matrix(M, N, torch.float32, kernels)).to(dtype)
    dx = nan(M, K, dtype=dtype, device=kernels)
    config = replace(BASE, tma="tma" in form, prefetch=form == "prefetch", fuse_dz="fused" in form)

    def build(plan: Plan, dy: Buffer, y: Buffer, w: Buffer, dx: Buffer) -> None:
        ys = operand(plan, y) if config.fuse_dz else None
        ops.dgrad(plan, operand(plan, dy), ys, operand(plan, w), dx, config, SIGMOID, "ieee")

    run(build, (dy, y, w, dx))
    dz = dy.double()
    if config.fuse_dz:
        # dz is rounded to the storage type on its way into the product, as torch's is on its way to memory.
        dz = (dz * y.double() * (1 - y.double())).to(dtype).double()
    assert_close(dx, (dz @ w.double()).cpu())


@pytest.mark.parametrize(
    ("form", "splits", "transposed", "dtype"),
    cover(
        ["pointers", "prefetch", "tma", "fused", "fused tma"], [1, 3], [False, True], DTYPES,
        quick=lambda form, splits, transposed, dtype: not transposed or dtype == turn(DTYPES, form, splits),
    ),
)  # fmt: skip
def test_wgrad(form: str, splits: int, transposed: bool, dtype: torch.dtype, kernels: str) -> None:
    x = matrix(M, K, dtype, kernels, transposed)
    dy, y = matrix(M, N, dtype, kernels), torch.sigmoid(matrix(M, N, torch.float32, kernels)).to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    dw = nan(splits, N, K, dtype=dtype if splits == 1 else accumulator, device=kernels)
    db = nan(splits, N, dtype=dtype if splits == 1 else accumulator, device=kernels)
    dz_out = nan(M, N, dtype=dtype, device=kernels)
    config = replace(BASE, tma="tma" in form, prefetch=form == "prefetch", fuse_dz="fused" in form, splits=splits)

    def build(
        plan: Plan, dy: Buffer, y: Buffer, x: Buffer, dw: Buffer, dz_out: Buffer | None, db: Buffer | None
    ) -> None:
        ops.wgrad(
            plan, operand(plan, dy), operand(plan, y), operand(plan, x), dw, dz_out, db, config, SIGMOID, "ieee"
        )  # fmt: skip

    run(build, (dy, y, x, dw, *((dz_out, db) if config.fuse_dz else (None, None))))
    if config.fuse_dz:
        exact = dy.double() * y.double() * (1 - y.double())
        assert_close(dz_out, exact.cpu())
        dz = dz_out.double()
        assert_close(db.double().sum(0).to(dtype), exact.sum(0).cpu(), scale=exact.norm(dim=0).cpu())
    else:
        dz = dy.double()
    assert_close(dw.double().sum(0).to(dtype), (dz.t() @ x.double()).cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("write", ["dz", "db", "both"])
@pytest.mark.parametrize("parts", [0, 3])
def test_output_grad(parts: int, write: str, dtype: torch.dtype, kernels: str) -> None:
    """parts: of how many dy is the sum, which the layer above has left."""
    y = torch.sigmoid(matrix(M, N, torch.float32, kernels)).to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    dy = matrix(parts * M, N, accumulator, kernels).view(parts, M, N) if parts else matrix(M, N, dtype, kernels)
    whole = dy.sum(0) if parts else dy
    exact = whole.double() * y.double() * (1 - y.double())
    dz = nan(M, N, dtype=dtype, device=kernels) if write != "db" else None
    db = nan(N, dtype=dtype, device=kernels) if write != "dz" else None

    def build(plan: Plan, dy: Buffer, y: Buffer, dz: Buffer | None, db: Buffer | None) -> None:
        reduce_partials(plan, ops.sum_rows(plan, dy, y, SIGMOID, dz, db))

    run(build, (dy, y, dz, db))
    if dz is not None:
        assert_close(dz, exact.cpu(), torch.ops.aten.sigmoid_backward(whole.to(dtype), y))
    if db is not None:
        assert_close(db, exact.sum(0).cpu(), scale=exact.norm(dim=0).cpu())


def whole_backward(plan: Plan, *tensors: Buffer | None, **facts: Any) -> None:
    reduce_partials(plan, *ops.backward_layer(plan, *tensors, **facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("splits", "act", "lower", "transposed", "dtype"),
    cover(
        [1, 2, 3], [None, "sigmoid"], [None, "elu"], [False, True], DTYPES,
        quick=lambda splits, act, lower, transposed, dtype: dtype == turn(DTYPES, splits, act, lower, transposed),
    ),
)  # fmt: skip
def test_one_pass(
    splits: int, act: str | None, lower: str | None, transposed: bool, dtype: torch.dtype, kernels: str
) -> None:
    """Of few outputs: two programs for the columns of x, and behind them one that adds up a sum of a layer above."""
    n, acts = 10, (Activation(act), Activation(lower))
    x, w, dy = matrix(M, K, dtype, kernels), matrix(n, K, dtype, kernels, transposed), matrix(M, n, dtype, kernels)
    y = torch.sigmoid(matrix(M, n, torch.float32, kernels)).to(dtype)
    dx, dw, db, lower_db, sum_before = (
        nan(*s, dtype=dtype, device=kernels) for s in ((M, K), (n, K), (n,), (K,), (9,))
    )
    before = torch.randn(4, 9, device=kernels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    config = MatmulConfig(16, 32, 16, num_warps=4, num_stages=2, reason="test", splits=splits)

    def build(plan: Plan, *tensors: Buffer | None) -> None:
        *layer, lower_db, before, sum_before = tensors
        below = ops.LowerLayer(cast(Buffer, layer[1]), acts[1], lower_db) if lower else None
        facts: dict[str, Any] = dict(activation=acts[0], tf32=False, pending=(Partials(before, sum_before),))
        whole_backward(plan, *layer, lower=below, **facts)

    tensors = (dy, x, w, y if act else None, dx, dw, db, lower_db, before, sum_before)
    launch, *sums = run(build, tensors, {BackwardProblem: config})
    assert launch.kernel.__name__ == "backward"
    assert len(sums) == (0 if splits == 1 else 2 if lower else 1)
    dz = gradient(dy.double(), y.double(), acts[0]) if act else dy.double()
    stored = dz.to(dtype).double()  # rounded on its way into the products, as torch's is on its way to memory
    exact = gradient(stored @ w.double(), x.double(), acts[1]) if lower else stored @ w.double()
    assert_close(dx, exact.cpu())  # compiled, float32 in three parts has more than one rounding
    assert_close(dw, (stored.t() @ x.double()).cpu())
    assert_close(db, dz.sum(0).cpu(), scale=dz.norm(dim=0).cpu())
    if lower:
        assert_close(lower_db, exact.sum(0).cpu(), scale=exact.norm(dim=0).cpu())
    assert_close(sum_before, before.double().sum(0).cpu(), scale=before.double().norm(dim=0).cpu())


@pytest.mark.parametrize("dw", [False, True])
@pytest.mark.parametrize("act", [None, "sigmoid"])
@pytest.mark.parametrize("lower", [None, "none", "elu"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_dx_of_parts(transposed: bool, lower: str | None, act: str | None, dw: bool, kernels: str) -> None:
    """Of many outputs and few tiles: as `forward` forms a long sum. The layer below takes a pass of its own."""
    dtype = turn(DTYPES, transposed, lower, act, dw)
    # Of 40 rows the lower layer's db is in parts as well; wider types then keep whole sums.
    m, n, k = 40 if dtype.itemsize == 2 else 7, 4105 if transposed else 4104, 24
    below = Activation(None if lower == "none" else lower)
    x, w, dy = matrix(m, k, dtype, kernels), matrix(n, k, dtype, kernels, transposed), matrix(m, n, dtype, kernels)
    y = torch.sigmoid(matrix(m, n, torch.float32, kernels)).to(dtype)
    outputs = [nan(*shape, dtype=dtype, device=kernels) for shape in ((m, k), (n, k), (n,), (k,), (9,))]
    before = torch.randn(4, 9, device=kernels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def build(plan: Plan, *tensors: Buffer | None) -> None:
        *layer, lower_db, before, sum_before = tensors
        layer_below = ops.LowerLayer(cast(Buffer, layer[1]), below, lower_db) if lower else None
        facts: dict[str, Any] = dict(activation=Activation(act), tf32=False, pending=(Partials(before, sum_before),))
        whole_backward(plan, *layer, lower=layer_below, **facts)

    dx, grad, db, lower_db, sum_before = outputs
    tensors = (dy, x, w, y if act else None, dx, grad if dw else None, db, lower_db, before, sum_before)
    names = [launch.kernel.__name__ for launch in run(build, tensors)]
    assert "forward" in names
    assert "dgrad" not in names
    dz = gradient(dy.double(), y.double(), Activation(act)) if act else dy.double()
    stored = dz.to(dtype).double()
    product = stored @ w.double()
    exact = gradient(product.to(dtype).double() if lower else product, x.double(), below) if lower else product
    assert_close(dx, exact.cpu())
    assert_close(db, dz.sum(0).cpu(), scale=dz.norm(dim=0).cpu())
    if dw:
        assert_close(grad, (stored.t() @ x.double()).cpu())
    if lower:
        assert_close(lower_db, exact.sum(0).cpu(), scale=exact.norm(dim=0).cpu())
    assert_close(sum_before, before.double().sum(0).cpu(), scale=before.double().norm(dim=0).cpu())


def test_one_pass_of_rows_that_do_not_exist(kernels: str) -> None:
    """In a tile that ends behind the last row, 0·∞ of such a weight is no part of the sum."""
    x, w, dy = torch.rand(5, 16, device=kernels), torch.full((8, 16), torch.inf, device=kernels), torch.rand(5, 8)
    dx, dw, lower_db = (nan(*s, dtype=torch.float32, device=kernels) for s in ((5, 16), (8, 16), (16,)))

    def build(plan: Plan, *tensors: Buffer | None) -> None:
        *layer, lower_db = tensors
        lower = ops.LowerLayer(cast(Buffer, layer[1]), Activation("elu", 1.0), lower_db)
        whole_backward(plan, *layer, activation=NONE, tf32=False, lower=lower)

    (launch,) = run(build, (dy.to(kernels), x, w, None, dx, dw, None, lower_db))
    assert launch.kernel.__name__ == "backward"
    assert dx.isposinf().all()
    assert lower_db.isposinf().all()


@pytest.mark.parametrize(
    ("needs", "expanded", "dtype"),
    cover(
        ["x", "w", "b", "xw", "xb", "wb", "xwb"], [False, True], DTYPES,
        quick=lambda needs, expanded, dtype: needs == "xwb" or dtype == turn(DTYPES, needs),
    ),
)  # fmt: skip
def test_backward_as_a_whole(needs: str, expanded: bool, dtype: torch.dtype, kernels: str) -> None:
    n = 72  # more than go in one pass
    x, w, dy = matrix(M, K, dtype, kernels), matrix(n, K, dtype, kernels), matrix(M, n, dtype, kernels)
    dy = dy[:1].expand(M, n) if expanded else dy  # as of a sum: there are no rows to form dz from on load
    y = torch.sigmoid(matrix(M, n, torch.float32, kernels)).to(dtype)
    dx = nan(M, K, dtype=dtype, device=kernels) if "x" in needs else None
    dw = nan(n, K, dtype=dtype, device=kernels) if "w" in needs else None
    db = nan(n, dtype=dtype, device=kernels) if "b" in needs else None
    tensors = (dy, x if "w" in needs else None, w if "x" in needs else None, y, dx, dw, db)
    fused = any(
        launch.named.get("FUSE_DZ", False) for launch in run(whole_backward, tensors, activation=SIGMOID, tf32=False)
    )
    # Somebody's product may carry it: not for db alone, nor for dx beside db. Whether it does, the heuristics say for
    # the GPU; the interpreter's always do with descriptors, which Triton 3.5 interprets of some strides only.
    configs = plan_of(whole_backward, tensors, activation=SIGMOID, tf32=False).configs
    may = any(getattr(problem, "may_fuse", False) for problem in configs)
    assert may == (not expanded and ("w" in needs or needs == "x"))
    assert fused == any(getattr(config, "fuse_dz", False) for config in configs.values())
    described = any(getattr(config, "tma", False) for config in configs.values())
    assert fused == (may and described) or not common.INTERPRETED
    exact_dx, exact_dw, exact_db, terms = LinearSigmoid(x, w, None).gradients(dy, y)
    for result, exact in ((dx, exact_dx), (dw, exact_dw)):
        if result is not None:
            assert_close(result, exact)
    if db is not None:
        assert_close(db, exact_db, scale=terms)


def test_operands_say_how_memory_lies() -> None:
    def facts(matrix: Tensor) -> tuple[bool, int, int, bool]:
        plan = Plan(ARCHS["sm_90"], [layout_of(matrix)])
        (given,) = plan.given
        assert given is not None
        found = operand(plan, given)
        assert found.tensor.shape == matrix.shape
        assert (found.tensor is given) == (not plan.steps)
        return found.transposed, found.ld, found.vec, found.tma

    x = torch.zeros(24, 48, dtype=torch.float16)
    assert facts(x) == (False, 48, 8, True)
    assert facts(x.t()) == (True, 48, 8, True)
    assert facts(x[:, :12]) == (False, 48, 4, True)  # pointers load 4 elements at a time; a descriptor masks the rest
    assert facts(x[:, :13]) == (False, 48, 1, True)
    assert facts(x[:, 1:33]) == (False, 48, 1, False)  # an address that is no multiple of 16 bytes
    assert facts(x[:, 8:]) == (False, 48, 8, True)
    assert facts(x[::2]) == (False, 96, 8, True)
    assert facts(x[:, :40:2]) == (False, 20, 4, False)  # copied
    assert facts(x[:1].expand(5, 48)) == (False, 0, 8, False)  # rows that overlap
    assert facts(torch.zeros(24, 42, dtype=torch.float16)) == (False, 42, 2, False)
    assert facts(torch.zeros(24, 33, dtype=torch.float16)) == (False, 33, 1, False)
    assert facts(torch.zeros(24, 33, dtype=torch.float64)) == (False, 33, 1, False)
    assert facts(torch.zeros(24, 34, dtype=torch.float64)) == (
        False,
        34,
        2,
        descriptor_unit(8, dispatch.interpreting()) == 2,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("parts", "length"), [(2, 1), (9, 40), (5, 1000), (70, 33)])
def test_reduce_partials(parts: int, length: int, dtype: torch.dtype, kernels: str) -> None:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    partials = torch.randn(parts, length, device=kernels, dtype=accumulator)
    out = nan(length, dtype=dtype, device=kernels)
    run(lambda plan, partials, out: reduce_partials(plan, Partials(partials, out)), (partials, out))
    assert_close(
        out, partials.double().sum(0).cpu(), partials.sum(0).to(dtype), scale=partials.double().norm(dim=0).cpu()
    )


@pytest.mark.parametrize(("parts", "size"), [(2, (3, 9, 5)), (7, (2, 9, 40)), (5, (1, 9, 64))])
def test_reduce_partials_of_two_results(parts: int, size: tuple[int, int, int], kernels: str) -> None:
    """Matrices whose transposes are wanted, and a shorter result of other parts, in one launch."""
    partials, more = torch.randn(parts, *size, device=kernels), torch.randn(parts + 1, 13, device=kernels)
    out, short = (nan(*s, dtype=torch.float32, device=kernels) for s in ((size[0], size[2], size[1]), (13,)))

    def build(plan: Plan, partials: Buffer, out: Buffer, more: Buffer, short: Buffer) -> None:
        reduce_partials(plan, Partials(partials, out, (size[1], size[2])), Partials(more, short))

    (launch,) = run(build, (partials, out, more, short))
    assert launch.kernel.__name__ == "reduce_partials"
    torch.testing.assert_close(out, partials.sum(0).transpose(1, 2))
    torch.testing.assert_close(short, more.sum(0))


def test_a_sum_of_many_parts_beside_one_of_few_takes_as_many_at_a_time_as_suit_it(kernels: str) -> None:
    partials, more = torch.randn(2, 600, device=kernels), torch.randn(700, 13, device=kernels)
    out, short = (nan(length, dtype=torch.float32, device=kernels) for length in (600, 13))

    def build(plan: Plan, partials: Buffer, out: Buffer, more: Buffer, short: Buffer) -> None:
        reduce_partials(plan, Partials(partials, out), Partials(more, short))

    (launch,) = run(build, (partials, out, more, short))
    form: Any = launch.constants["CONFIG"]
    assert dispatch.interpreting() or (form.BLOCK_PARTS, form.BLOCK_PARTS2) == (2, 16)
    torch.testing.assert_close(out, partials.sum(0))
    torch.testing.assert_close(short, more.sum(0))


def test_splits_cover_the_rows_exactly() -> None:
    for m in (1, 16, 17, 255, 1000, 4096, 5000, 65536, 200_000):
        for n, k in ((16, 16), (10, 128), (256, 784), (4096, 4096)):
            for spare in (0, 1 << 20, 1 << 40):
                chosen = WgradProblem(m, n, k, "bfloat16", "ieee", ARCHS["sm_90"], 8, True, True, spare).choose()
                rows = cdiv(cdiv(m, chosen.splits), chosen.block_l) * chosen.block_l
                assert rows * (chosen.splits - 1) < m <= rows * chosen.splits
                assert chosen.splits == 1 or chosen.splits * n * k * 4 <= max(spare, WORKSPACE)


VALUES = [0.0, -0.0, 1.0, -2.5, 3.0e38, -3.4e38, 1e-40, -1e-45, torch.inf, -torch.inf, 1.00390625, 1.01171875]


def test_rounding_to_bfloat16(kernels: str) -> None:
    """Ties, subnormals, overflow to infinity, and NaN with every payload stay what torch makes of them."""
    patterns = [0x7F800001, 0x7FFFFFFF, -1, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF]
    exact = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(VALUES), exact, torch.randn(45)]).to(kernels)
    y = nan(64, dtype=torch.bfloat16, device=kernels)
    round_to_bfloat16[(1,)](x, y, SIZE=64)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


# ---- what only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2048, 1024, 1280), (8192, 256, 784), (4096, 10, 128), (1000, 77, 333)], ids=str)
def test_shapes_that_fill_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype, kernels: str) -> None:
    """The heuristics' own configs: large tiles, persistence, splits and fusion as they are chosen on this machine."""
    import tribp

    m, n, k = shape
    x, w, dy = matrix(m, k, dtype, kernels), matrix(n, k, dtype, kernels) / k**0.5, matrix(m, n, dtype, kernels)
    b = matrix(1, n, dtype, kernels)[0]
    inputs = [t.requires_grad_() for t in (x, w, b)]
    runs = []
    for _ in range(2):
        y = tribp.linear_sigmoid(*inputs)
        runs.append([y, *torch.autograd.grad(y, inputs, dy)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second), "two runs differ"
    y, *found = runs[0]
    exact = LinearSigmoid(x, w, b)
    assert_close(y, exact.y, torch.sigmoid(torch.nn.functional.linear(x, w, b)))
    *gradients, terms = exact.gradients(dy, y)
    dz = torch.ops.aten.sigmoid_backward(dy, y)
    for result, value, theirs in zip(found, gradients, (dz @ w, dz.t() @ x, dz.sum(0)), strict=True):
        assert_close(result, value, theirs, scale=terms if value.dim() == 1 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_more_than_2_to_the_31_elements(transposed: bool, kernels: str) -> None:
    import tribp

    m, n, k = (1 << 26) + 40, 16, 33 if not transposed else 40
    x = torch.empty((k, m) if transposed else (m, k), dtype=torch.float16, device=kernels).normal_()
    x = x.t() if transposed else x
    assert x.numel() > 1 << 31
    w = matrix(n, k, torch.float16, kernels).requires_grad_()
    y = tribp.linear_sigmoid(x, w)
    for rows in (slice(0, 1000), slice(m - 1000, m)):
        assert_close(y[rows], LinearSigmoid(x[rows], w, None).y)
    dy = torch.zeros_like(y)
    dy[-1000:] = matrix(1000, n, torch.float16, kernels)  # what is summed lies behind element 2³¹
    (dw,) = torch.autograd.grad(y, w, dy)
    assert_close(dw, LinearSigmoid(x[-1000:], w, None).gradients(dy[-1000:], y[-1000:])[1])
