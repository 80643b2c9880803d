"""Instructions, one at a time, against numpy, torch and exact fractions; what memory accesses are counted as."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from .arrays import Array
from .by_hand import result_of, run
from .parse import PtxError

I = np.random.default_rng(0).integers(-(2**31), 2**31, 32).astype(np.int32)
J = np.random.default_rng(1).integers(-50, 50, 32).astype(np.int32) | 1
F, G = (np.random.default_rng(seed).normal(size=32).astype(np.float32) for seed in (2, 3))
D, E = (np.random.default_rng(seed).normal(size=32) for seed in (4, 5))
U, V = I.view(np.uint32), J.view(np.uint32)
LANE = np.arange(32)
Expected = Callable[[], Array]


def quotient(a: Array, b: Array) -> Array:
    """As C divides: towards zero."""
    return np.array([int(Fraction(int(x), int(y))) for x, y in zip(a, b, strict=True)])


def exact_fma(a: Array, b: Array, c: Array, kind: type) -> Array:
    def rounded(x: Fraction) -> Array:
        near = kind(x.numerator / x.denominator)  # rounds to float64 first: a neighbour may be nearer
        candidates = [np.nextafter(near, kind(-np.inf)), near, np.nextafter(near, kind(np.inf))]
        bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[candidates[0].itemsize]
        return min(candidates, key=lambda v: (abs(Fraction(float(v)) - x), int(v.view(bits)) & 1))

    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    return np.array([rounded(x) for x in exact], kind)


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("mul.lo.s32 %r20, %r10, %r11;", (I, J), lambda: I.astype(np.int64) * J),
        ("mul.hi.s32 %r20, %r10, %r11;", (I, I), lambda: I.astype(np.int64) * I >> 32),
        ("mul.hi.u32 %r20, %r10, 1431655766;", (I,), lambda: U.astype(np.uint64) * 1431655766 >> 32),
        ("mad.lo.s32 %r20, %r10, %r11, 7;", (I, J), lambda: I.astype(np.int64) * J + 7),
        ("div.s32 %r20, %r10, %r11;", (I, J), lambda: quotient(I, J)),
        ("rem.s32 %r20, %r10, %r11;", (I, J), lambda: I - quotient(I, J) * J),
        ("bfe.s32 %r20, %r10, 5, 7;", (I,), lambda: I << 20 >> 25),
        ("bfe.u32 %r20, %r10, 3, 4;", (I,), lambda: I >> 3 & 15),
        ("bfi.b32 %r20, %r10, %r11, 8, 8;", (I, J), lambda: (J & ~0xFF00) | ((I & 0xFF) << 8)),
        ("prmt.b32 %r20, %r10, %r11, 0x7632U;", (I, J), lambda: (U >> 16) | (V >> 16 << 16)),
        ("prmt.b32 %r20, %r10, %r11, 0x0123;", (I, J), lambda: I.byteswap()),
        ("shr.s32 %r20, %r10, 40;", (I,), lambda: I >> 31),
        ("shr.u32 %r20, %r10, 40;", (I,), lambda: I * 0),
        ("shl.b32 %r20, %r10, 32;", (I,), lambda: I * 0),
        ("shf.l.wrap.b32 %r20, %r10, %r11, 7;", (I, J), lambda: (J << 7) | (U >> 25).astype(np.int32)),
        ("lop3.b32 %r20, %r10, %r11, 255, 0x96;", (I, J), lambda: I ^ J ^ 255),
        ("popc.b32 %r20, %r10;", (I,), lambda: [int(x).bit_count() for x in U]),
        ("clz.b32 %r20, %r10;", (I,), lambda: [32 - int(x).bit_length() for x in U]),
        ("brev.b32 %r20, %r10;", (I,), lambda: [int(f"{x:032b}"[::-1], 2) for x in U]),
        ("min.s32 %r20, %r10, %r11;", (I, J), lambda: np.minimum(I, J)),
        (
            "add.s16x2 %r20, %r10, %r11;", (I, J),
            lambda: (I.view(np.uint16) + J.view(np.uint16)).view(np.uint32),
        ),
        ("shfl.sync.bfly.b32 %r20, %r10, 5, 31, -1;", (I,), lambda: I[LANE ^ 5]),
        ("shfl.sync.idx.b32 %r20, %r10, 3, 31, -1;", (I,), lambda: np.full(32, I[3])),
        ("shfl.sync.up.b32 %r20, %r10, 2, 0, -1;", (I,), lambda: I[np.where(LANE < 2, LANE, LANE - 2)]),
        ("shfl.sync.down.b32 %r20, %r10, 2, 31, -1;", (I,), lambda: I[np.where(LANE < 30, LANE + 2, LANE)]),
        ("redux.sync.add.s32 %r20, %r10, -1;", (J,), lambda: np.full(32, J.sum())),
        (
            "setp.lt.s32 %p1, %r10, 0;\nvote.sync.ballot.b32 %r20, %p1, -1;",
            (I,), lambda: np.full(32, sum(1 << k for k in range(32) if I[k] < 0)),
        ),
        (
            "setp.lt.s32 %p1, %r10, 0;\n@%p1 bra L1;\nmov.b32 %r20, 1;\nbra.uni L2;\nL1:\nmov.b32 %r20, 2;\nL2:\n",
            (I,), lambda: np.where(I < 0, 2, 1),
        ),
        (
            "mov.b32 %r20, 0;\nand.b32 %r21, %r10, 7;\nL1:\nadd.s32 %r20, %r20, 3;\nadd.s32 %r21, %r21, -1;\n"
            "setp.ge.s32 %p1, %r21, 0;\n@%p1 bra L1;",
            (I,), lambda: 3 * ((I & 7) + 1),
        ),
    ],
)  # fmt: skip
def test_integers(code: str, inputs: tuple[Array, ...], expected: Expected) -> None:
    assert np.array_equal(result_of(code, *inputs).view(np.uint32), np.asarray(expected()).astype(np.uint32))


def half_bits(x: Array, dtype: torch.dtype) -> Array:
    return torch.tensor(x).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


NAN = "0f7FC00000"


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("fma.rn.f32 %r20, %r10, %r11, %r12;", (F, G, -F * G), lambda: exact_fma(F, G, -F * G, np.float32)),
        ("div.rn.f32 %r20, %r10, %r11;", (F, G), lambda: F / G),
        ("sqrt.rn.f32 %r20, %r10;", (abs(F),), lambda: np.sqrt(abs(F))),
        (f"max.NaN.f32 %r20, %r10, {NAN};", (F,), lambda: F * np.float32("nan")),
        (f"max.f32 %r20, %r10, {NAN};", (F,), lambda: F),
        ("min.xorsign.abs.f32 %r20, %r10, 0f3F000000;", (F,), lambda: np.clip(F, -0.5, 0.5)),
        ("mul.ftz.f32 %r20, %r10, 0f00000001;", (F,), lambda: F * np.float32(0)),
        ("abs.f32 %r20, %r10;", (F,), lambda: abs(F)),
        (f"setp.neu.f32 %p1, %r10, {NAN};\nselp.f32 %r20, %r10, {NAN}, %p1;", (F,), lambda: F),
        *(
            (
                f"cvt.rn.{kind}x2.f32 %r13, %r10, %r11;\ncvt.rn.{kind}x2.f32 %r14, %r11, %r10;\n"
                f"setp.le.{kind}x2 %p1|%p2, %r13, %r14;\n"
                "selp.f32 %r20, 0f3F800000, 0f40000000, %p1;\n@%p2 add.f32 %r20, %r20, 0f40800000;",
                (F, G), lambda dtype=dtype: np.where(
                    half_bits(G, dtype) == half_bits(F, dtype), 5, np.where(G < F, 1, 6)
                ),
            )
            for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16))
        ),
        (f"setp.ne.f32 %p1, %r10, {NAN};\nselp.f32 %r20, {NAN}, %r10, %p1;", (F,), lambda: F),
        (
            "cvt.rn.bf16x2.f32 %r20, %r10, %r11;", (F, G),
            lambda: (half_bits(F, torch.bfloat16) << 16 | half_bits(G, torch.bfloat16)).view(np.float32),
        ),
        (
            "cvt.rn.f16x2.f32 %r20, %r10, %r11;", (F, G),
            lambda: (half_bits(F, torch.float16) << 16 | half_bits(G, torch.float16)).view(np.float32),
        ),
        (
            "cvt.rna.tf32.f32 %r20, %r10;", (F,),
            lambda: ((F.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32),
        ),
        (
            "mov.b32 {%rs1, %rs2}, %r10;\nmov.b32 %r20, {%rs2, %rs1};", (F,),
            lambda: (F.view(np.uint32) >> 16 | F.view(np.uint32) << 16).view(np.float32),
        ),
        ("cvt.rn.f32.s32 %r20, %r10;", (I,), lambda: I.astype(np.float32)),
        (
            "cvt.rn.bf16.f32 %rs1, %r10;\ncvt.f32.bf16 %r20, %rs1;", (F,),
            lambda: torch.tensor(F).bfloat16().float().numpy(),
        ),
    ],
)  # fmt: skip
def test_floats(code: str, inputs: tuple[Array, ...], expected: Expected) -> None:
    assert np.array_equal(result_of(code, *inputs, out=torch.float32), expected(), equal_nan=True)


def test_special_values_of_roundings() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3.4028e38, -0.0, 1e-45, 65520.0, 65519.0] * 4, np.float32)
    ours = result_of("cvt.rn.bf16x2.f32 %r20, 0f00000000, %r10;\nshl.b32 %r20, %r20, 16;", x, out=torch.float32)
    assert np.array_equal(ours, torch.tensor(x).bfloat16().float().numpy(), equal_nan=True)
    half = result_of("cvt.rn.f16.f32 %rs1, %r10;\ncvt.f32.f16 %r20, %rs1;", x, out=torch.float32)
    assert np.array_equal(half, torch.tensor(x).half().float().numpy(), equal_nan=True)
    tf32 = result_of("cvt.rna.tf32.f32 %r20, %r10;", x, out=torch.float32)
    assert np.array_equal(tf32[:4], np.array([np.inf, -np.inf, np.nan, np.inf], np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("fma.rn.f64 %rd20, %rd10, %rd11, %rd12;", (D, E, -D * E), lambda: exact_fma(D, E, -D * E, np.float64)),
        ("fma.rn.f64 %rd20, %rd10, %rd11, %rd12;", (D, E, D), lambda: exact_fma(D, E, D, np.float64)),
        ("div.rn.f64 %rd20, %rd10, %rd11;", (D, E), lambda: D / E),
        ("selp.f64 %rd20, %rd10, %rd11, 1;", (D, E), lambda: D),
    ],
)
def test_doubles(code: str, inputs: tuple[Array, ...], expected: Expected) -> None:
    assert np.array_equal(result_of(code, *inputs, out=torch.float64), expected())


@pytest.mark.parametrize(
    "code",
    [
        "tcgen05.alloc.b32 %r2, %r1;",
        "shfl.sync.spin.b32 %r2, %r1, 1, 31, -1;",
        "setp.approximately.s32 %p1, %r1, 0;",
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r2}, %rd1, %rd1, 1, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%r2}, %rd1, %rd1, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n64k16.f16.bf16.bf16 {%r2}, %rd1, %rd1, 1, 1, 1, 0, 0;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r2}, {%r3}, {%r4}, {%r2};",
        "mbarrier.guess.b64 [%r2], 1;",
        "cp.async.bulk.shared::cluster.global [%r2], [%rd1], 16;",
    ],
)
def test_an_unknown_instruction_is_named(code: str) -> None:
    with pytest.raises(PtxError) as caught:
        run(code, torch.zeros(4))
    assert code.split()[0] in str(caught.value)


def test_what_is_counted() -> None:
    t = torch.zeros(32 * 32, dtype=torch.int32)
    for stride, sectors in ((1, 4), (2, 8), (8, 32), (32, 32)):
        place = f"mul.wide.u32 %rd51, %r1, {4 * stride};\nadd.s64 %rd10, %rd1, %rd51;\n"
        counts, problems = run(place + "ld.global.b32 %r5, [%rd10];", t)
        assert not problems
        load = counts.total("global", "load")
        assert (load.parts, load.ideal, load.requests, load.bytes) == (sectors, 4, 1, 128)
    for stride, passes in ((1, 1), (2, 2), (32, 32), (33, 1)):
        counts, problems = run(f"mul.lo.s32 %r2, %r1, {4 * stride};\nst.shared.b32 [%r2], %r1;", t, shared=8192)
        assert not problems
        assert counts.total("shared").parts == passes
    counts, _ = run("shl.b32 %r2, %r1, 4;\nst.shared.v4.b32 [%r2], {%r1, %r1, %r1, %r1};", t, shared=8192)
    assert (counts.total("shared").parts, counts.total("shared").ideal) == (4, 4)
