"""The executor against numpy and torch: products through tiny Triton kernels, opcodes and mistakes in PTX by hand.

cd <a tribp checkout>; PYTHONPATH=<the folder of ptx> python -m pytest -p no:cacheprovider <this file>
"""

import os
import struct

os.environ.pop("TRITON_INTERPRET", None)

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.executor.machine import Options, launch
from tests.executor.memory import GlobalMemory, Problems
from tests.executor.parse import PtxError
from tests.executor.run import executed


@triton.jit
def product(
    a,
    b,
    c,
    sam,
    sak,
    sbk,
    sbn,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * sam + k[None, :] * sak)
    y = tl.load(b + k[:, None] * sbk + n[None, :] * sbn)
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=PRECISION, out_dtype=ACC))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layout", ["rr", "rc", "cr", "cc"])
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float16, "ieee", 1e-6), (torch.bfloat16, "ieee", 1e-6), (torch.float32, "tf32", 1e-3),
        (torch.float32, "tf32x3", 2e-6), (torch.float32, "ieee", 1e-6), (torch.float64, "ieee", 1e-15),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(16, 16, 16), (64, 32, 64), (32, 128, 32)])
def test_products(size, dtype, precision, bound, layout, target):
    M, N, K = size
    g = torch.Generator().manual_seed(sum(size))
    a, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((M, K), (K, N)))
    a = a.t().contiguous().t() if layout[0] == "c" else a
    b = b.t().contiguous().t() if layout[1] == "c" else b
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    c = torch.full((M, N), float("nan"), dtype=acc)
    with executed(target) as report:
        product[(1,)](
            a, b, c, a.stride(0), a.stride(1), b.stride(0), b.stride(1), M, N, K, precision,
            tl.float64 if acc == torch.float64 else tl.float32, num_warps=4,
        )  # fmt: skip
    report.check()
    exact = a.double() @ b.double()
    assert float((c.double() - exact).norm() / exact.norm()) < bound
    if precision != "ieee" or dtype != torch.float32:
        assert report.launches[0].matrix, "no tensor core was used"


HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
REGS = ".reg .pred %p<20>;\n.reg .b16 %rs<20>;\n.reg .b32 %r<60>;\n.reg .b64 %rd<60>;\n"


def run(body, *tensors, threads=32, grid=1, shared=0, problems=None, **options):
    """A kernel of this body; %rd1, %rd2 … are the tensors' addresses, %r1 the thread, %rd50 4 times it."""
    params = ",\n".join(f".param .u64 p{n}" for n in range(len(tensors)))
    loads = "".join(f"ld.param.b64 %rd{n + 1}, [p{n}];\n" for n in range(len(tensors)))
    text = f"{HEAD}.visible .entry k(\n{params}\n)\n.reqntid {threads}\n{{\n{REGS}{loads}mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd50, %r1, 4;\n{body}\nret;\n}}\n"
    memory = GlobalMemory()
    memory.start_launch()
    for tensor in tensors:
        memory.allow(tensor)
    packed = b"".join(struct.pack("<Q", tensor.data_ptr()) for tensor in tensors)
    found = Problems() if problems is None else problems
    counts = launch(text, (grid, 1, 1), packed, shared, memory, found, Options(**options))
    return counts, [p.kind for p in found]


def one(code, *inputs, out=torch.int32):
    """32 threads: inputs in %r10, %r11 … (or %rd10 … for 8 bytes); the result is %r20 or %rd20."""
    tensors = [torch.as_tensor(x) for x in inputs]
    result = torch.zeros(32, dtype=out)
    body = ""
    for n, t in enumerate(tensors):
        if t.element_size() == 8:
            body += (
                f"shl.b64 %rd51, %rd50, 1;\nadd.s64 %rd52, %rd{n + 1}, %rd51;\nld.global.b64 %rd{10 + n}, [%rd52];\n"
            )
        else:
            body += f"add.s64 %rd52, %rd{n + 1}, %rd50;\nld.global.b32 %r{10 + n}, [%rd52];\n"
    wide = result.element_size() == 8
    body += (
        code
        + f"\n{'shl.b64 %rd50, %rd50, 1;' if wide else ''}\nadd.s64 %rd52, %rd{len(tensors) + 1}, %rd50;\nst.global.{'b64' if wide else 'b32'} [%rd52], %r{'d' if wide else ''}20;"
    )
    _, kinds = run(body, *tensors, result)
    assert not kinds, kinds
    return result.numpy()


I = np.random.default_rng(0).integers(-(2**31), 2**31, 32).astype(np.int32)
J = np.random.default_rng(1).integers(-50, 50, 32).astype(np.int32) | 1
F = np.random.default_rng(2).normal(size=32).astype(np.float32)
G = np.random.default_rng(3).normal(size=32).astype(np.float32)
D = np.random.default_rng(4).normal(size=32)
E = np.random.default_rng(5).normal(size=32)


def c_div(a, b):
    return np.array([int(x) // int(y) if (int(x) < 0) == (int(y) < 0) else -(-int(x) // int(y)) for x, y in zip(a, b)])


def fma_exact(a, b, c, bits):
    from fractions import Fraction

    def rounded(x):
        if bits == 53:
            return x.numerator / x.denominator
        lo = np.float32(x.numerator / x.denominator)
        near = [np.nextafter(lo, np.float32(-np.inf)), lo, np.nextafter(lo, np.float32(np.inf))]
        return min(near, key=lambda v: (abs(Fraction(float(v)) - x), int(v.view(np.uint32)) & 1))

    return np.array([rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c)])


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("mul.lo.s32 %r20, %r10, %r11;", (I, J), lambda: (I.astype(np.int64) * J).astype(np.int32)),
        ("mul.hi.s32 %r20, %r10, %r11;", (I, I), lambda: (I.astype(np.int64) * I >> 32).astype(np.int32)),
        ("mul.hi.u32 %r20, %r10, 1431655766;", (I,), lambda: (I.view(np.uint32).astype(np.uint64) * 1431655766 >> 32).astype(np.uint32).view(np.int32)),
        ("div.s32 %r20, %r10, %r11;", (I, J), lambda: c_div(I, J)),
        ("rem.s32 %r20, %r10, %r11;", (I, J), lambda: I - c_div(I, J) * J),
        ("bfe.s32 %r20, %r10, 5, 7;", (I,), lambda: I << 20 >> 25),
        ("bfe.u32 %r20, %r10, 3, 4;", (I,), lambda: I >> 3 & 15),
        ("bfi.b32 %r20, %r10, %r11, 8, 8;", (I, J), lambda: (J & ~0xFF00) | ((I & 0xFF) << 8)),
        ("prmt.b32 %r20, %r10, %r11, 0x7632U;", (I, J), lambda: ((I.view(np.uint32) >> 16) | (J.view(np.uint32) >> 16 << 16)).view(np.int32)),
        ("prmt.b32 %r20, %r10, %r11, 0x0123;", (I, J), lambda: I.byteswap()),
        ("shr.s32 %r20, %r10, 40;", (I,), lambda: I >> 31),
        ("shl.b32 %r20, %r10, 32;", (I,), lambda: I * 0),
        ("shf.l.wrap.b32 %r20, %r10, %r11, 7;", (I, J), lambda: (J << 7) | (I.view(np.uint32) >> 25).astype(np.int32)),
        ("lop3.b32 %r20, %r10, %r11, 255, 0x96;", (I, J), lambda: I ^ J ^ 255),
        ("popc.b32 %r20, %r10;", (I,), lambda: np.array([bin(int(x) & 0xFFFFFFFF).count("1") for x in I])),
        ("clz.b32 %r20, %r10;", (I,), lambda: np.array([32 - (int(x) & 0xFFFFFFFF).bit_length() for x in I])),
        ("shfl.sync.bfly.b32 %r20, %r10, 5, 31, -1;", (I,), lambda: I[np.arange(32) ^ 5]),
        ("shfl.sync.idx.b32 %r20, %r10, 3, 31, -1;", (I,), lambda: I[3] + I * 0),
        ("shfl.sync.up.b32 %r20, %r10, 2, 0, -1;", (I,), lambda: I[np.maximum(np.arange(32) - 2, 0) + (np.arange(32) < 2) * np.arange(32)]),
        ("shfl.sync.down.b32 %r20, %r10, 2, 31, -1;", (I,), lambda: I[np.where(np.arange(32) < 30, np.arange(32) + 2, np.arange(32))]),
        ("redux.sync.add.s32 %r20, %r10, -1;", (J,), lambda: J.sum() + 0 * J),
        ("setp.lt.s32 %p1, %r10, 0;\nvote.sync.ballot.b32 %r20, %p1, -1;", (I,), lambda: np.array([sum(1 << k for k in range(32) if I[k] < 0)], np.uint32).astype(np.int64).astype(np.int32) + 0 * I),
        ("setp.lt.s32 %p1, %r10, 0;\n@%p1 bra L1;\nmov.b32 %r20, 1;\nbra.uni L2;\nL1:\nmov.b32 %r20, 2;\nL2:\n", (I,), lambda: np.where(I < 0, 2, 1)),
        ("mov.b32 %r20, 0;\nand.b32 %r21, %r10, 7;\nL1:\nadd.s32 %r20, %r20, 3;\nadd.s32 %r21, %r21, -1;\nsetp.ge.s32 %p1, %r21, 0;\n@%p1 bra L1;", (I,), lambda: 3 * ((I & 7) + 1)),
    ],
)  # fmt: skip
def test_integers(code, inputs, expected):
    assert np.array_equal(one(code, *inputs), np.asarray(expected()).astype(np.int32))


def bf16(x):
    return torch.tensor(x).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("fma.rn.f32 %r20, %r10, %r11, %r12;", (F, G, -F * G), lambda: fma_exact(F, G, -F * G, 24).astype(np.float32)),
        ("div.rn.f32 %r20, %r10, %r11;", (F, G), lambda: F / G),
        ("sqrt.rn.f32 %r20, %r10;", (abs(F),), lambda: np.sqrt(abs(F))),
        ("max.NaN.f32 %r20, %r10, 0f7FC00000;", (F,), lambda: F * np.float32("nan")),
        ("max.f32 %r20, %r10, 0f7FC00000;", (F,), lambda: F),
        ("mul.ftz.f32 %r20, %r10, 0f00000001;", (F,), lambda: F * np.float32(0)),
        ("abs.f32 %r20, %r10;", (F,), lambda: abs(F)),
        ("cvt.rn.bf16x2.f32 %r20, %r10, %r11;", (F, G), lambda: (bf16(F) << 16 | bf16(G)).view(np.float32)),
        ("cvt.rn.f16x2.f32 %r20, %r10, %r11;", (F, G), lambda: (F.astype(np.float16).view(np.uint16).astype(np.uint32) << 16 | G.astype(np.float16).view(np.uint16)).view(np.float32)),
        ("cvt.rna.tf32.f32 %r20, %r10;", (F,), lambda: ((F.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)),
        ("mov.b32 {%rs1, %rs2}, %r10;\nmov.b32 %r20, {%rs2, %rs1};", (F,), lambda: (F.view(np.uint32) >> 16 | F.view(np.uint32) << 16).view(np.float32)),
        ("cvt.rn.f32.s32 %r20, %r10;", (I,), lambda: I.astype(np.float32)),
        ("cvt.rn.bf16.f32 %rs1, %r10;\ncvt.f32.bf16 %r20, %rs1;", (F,), lambda: torch.tensor(F).bfloat16().float().numpy()),
    ],
)  # fmt: skip
def test_floats(code, inputs, expected):
    assert np.array_equal(one(code, *inputs, out=torch.float32), expected(), equal_nan=True)


def test_special_values_of_roundings():
    x = np.array([np.inf, -np.inf, np.nan, 3.4028e38, -0.0, 1e-45, 65520.0, 65519.0] * 4, np.float32)
    ours = one("cvt.rn.bf16x2.f32 %r20, 0f00000000, %r10;\nshl.b32 %r20, %r20, 16;", x, out=torch.float32)
    assert np.array_equal(ours, torch.tensor(x).bfloat16().float().numpy(), equal_nan=True)
    half = one("cvt.rn.f16.f32 %rs1, %r10;\ncvt.f32.f16 %r20, %rs1;", x, out=torch.float32)
    assert np.array_equal(half, torch.tensor(x).half().float().numpy(), equal_nan=True)
    tf = one("cvt.rna.tf32.f32 %r20, %r10;", x, out=torch.float32)
    assert np.isposinf(tf[0]) and np.isneginf(tf[1]) and np.isnan(tf[2]) and np.isposinf(tf[3])


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("fma.rn.f64 %rd20, %rd10, %rd11, %rd12;", (D, E, -D * E), lambda: fma_exact(D, E, -D * E, 53)),
        ("fma.rn.f64 %rd20, %rd10, %rd11, %rd12;", (D, E, D), lambda: fma_exact(D, E, D, 53)),
        ("div.rn.f64 %rd20, %rd10, %rd11;", (D, E), lambda: D / E),
        ("selp.f64 %rd20, %rd10, %rd11, 1;", (D, E), lambda: D),
    ],
)  # fmt: skip
def test_doubles(code, inputs, expected):
    assert np.array_equal(one(code, *inputs, out=torch.float64), expected())


def test_an_unknown_opcode_is_named():
    with pytest.raises(PtxError, match="tcgen05"):
        run("tcgen05.alloc.b32 %r2, %r1;", torch.zeros(4))


# What compute-sanitizer would say.

ADDRESS = "add.s64 %rd10, %rd1, %rd50;\n"
OFFSETS = "mov.b32 %r2, global_smem;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r2, %r3;\n"


@pytest.mark.parametrize(
    ("body", "options", "kind"),
    [
        (ADDRESS + "st.global.b32 [%rd10], %r1;", {}, None),
        (ADDRESS + "st.global.b32 [%rd10+4], %r1;", {}, "out of bounds"),
        (ADDRESS + "ld.global.b32 %r2, [%rd10+-4];", {}, "out of bounds"),
        (ADDRESS + "ld.global.v2.b32 {%r2, %r3}, [%rd10];", {}, "misaligned"),
        ("st.global.b32 [%rd1], %r1;", {}, "global race"),
        (ADDRESS + "mov.u32 %r2, %ctaid.x;\nst.global.b32 [%rd10], %r2;", {"grid": 2}, "global race"),
        (OFFSETS + "ld.shared.b32 %r5, [%r4];", {"shared": 128}, "read of uninitialised shared memory"),
        (OFFSETS + "st.shared.b32 [%r4], %r1;\nld.shared.b32 %r5, [%r4];", {"shared": 128}, None),
        (OFFSETS + "st.shared.b32 [%r4+4], %r1;", {"shared": 128}, "out of bounds (shared)"),
        (OFFSETS + "st.shared.b32 [%r4+2], %r1;", {"shared": 256}, "misaligned (shared)"),
        # The neighbour's word, with and without a barrier between.
        (OFFSETS + "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nxor.b32 %r6, %r4, 128;\nld.shared.b32 %r5, [%r6];", {"shared": 256, "threads": 64}, None),
        (OFFSETS + "st.shared.b32 [%r4], %r1;\nxor.b32 %r6, %r4, 128;\nld.shared.b32 %r5, [%r6];", {"shared": 256, "threads": 64}, "shared race"),
        (OFFSETS + "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nxor.b32 %r6, %r4, 128;\nld.shared.b32 %r5, [%r6];\nst.shared.b32 [%r4], %r1;", {"shared": 256, "threads": 64}, "shared race"),
        # An asynchronous copy: waited for, not waited for, too few groups waited for, no barrier.
        (OFFSETS + ADDRESS + "cp.async.ca.shared.global [%r4], [%rd10], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.b32 %r5, [%r4];", {"shared": 128}, None),
        (OFFSETS + ADDRESS + "cp.async.ca.shared.global [%r4], [%rd10], 4;\ncp.async.commit_group;\nld.shared.b32 %r5, [%r4];", {"shared": 128}, "read of a copy on its way"),
        (OFFSETS + ADDRESS + "cp.async.ca.shared.global [%r4], [%rd10], 4;\ncp.async.commit_group;\ncp.async.wait_group 1;\nld.shared.b32 %r5, [%r4];", {"shared": 128}, "read of a copy on its way"),
        (OFFSETS + "rem.u32 %r7, %r1, 32;\nmul.wide.u32 %rd11, %r7, 4;\nadd.s64 %rd10, %rd1, %rd11;\ncp.async.ca.shared.global [%r4], [%rd10], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;\nxor.b32 %r6, %r4, 128;\nld.shared.b32 %r5, [%r6];", {"shared": 256, "threads": 64}, "shared race"),
        # Zeros in place of what is not read: no access.
        (OFFSETS + "cp.async.ca.shared.global [%r4], [%rd1+4096], 4, 0;\ncp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.b32 %r5, [%r4];", {"shared": 128}, None),
        ("setp.lt.s32 %p1, %r1, 5;\n@%p1 bra L1;\nbar.sync 0;\nL1:\n", {}, None),  # those that have left are not waited for
        ("setp.lt.s32 %p1, %r1, 5;\n@%p1 bra L1;\nbar.sync 0, 64;\nL1:\n", {}, "deadlock"),
        ("setp.lt.s32 %p1, %r1, 5;\n@%p1 bra L1;\nmov.b32 %r2, 7;\nshfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;\nL1:\n", {}, "shuffle"),
        ("setp.eq.s32 %p1, %r1, 5;\n@%p1 trap;", {}, "trap"),
        ("div.s32 %r2, 5, %r1;", {}, "division by zero"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_mistakes(body, options, kind, schedule):
    _, kinds = run(body, torch.zeros(32, dtype=torch.int32), schedule=schedule, **options)
    assert (kind in kinds) if kind else not kinds, kinds


def test_gaps_of_a_strided_tensor_are_not_written():
    wide = torch.zeros(64, dtype=torch.int32)
    body = "shl.b64 %rd50, %rd50, 1;\nadd.s64 %rd10, %rd1, %rd50;\nst.global.b32 [%rd10{}], %r1;"
    assert run(body.format(""), wide[::2])[1] == []
    assert run(body.format("+4"), wide[::2])[1] == ["out of bounds", "write to a gap"]


def test_what_is_counted():
    t = torch.zeros(32 * 32, dtype=torch.int32)
    for stride, sectors in ((1, 4), (2, 8), (8, 32), (32, 32)):
        counts, kinds = run(
            f"mul.lo.s32 %r2, %r1, {4 * stride};\ncvt.u64.u32 %rd51, %r2;\nadd.s64 %rd10, %rd1, %rd51;\nld.global.b32 %r5, [%rd10];",
            t,
        )
        assert not kinds
        found = counts.total("global", "load")
        assert (found.parts, found.ideal, found.requests, found.bytes) == (sectors, 4, 1, 128)
    for stride, passes in ((1, 1), (2, 2), (32, 32), (33, 1)):
        counts, kinds = run(f"mul.lo.s32 %r2, %r1, {4 * stride};\nst.shared.b32 [%r2], %r1;", t, shared=8192)
        assert not kinds
        assert counts.total("shared").parts == passes
    counts, _ = run("shl.b32 %r2, %r1, 4;\nst.shared.v4.b32 [%r2], {%r1, %r1, %r1, %r1};", t, shared=8192)
    assert (counts.total("shared").parts, counts.total("shared").ideal) == (4, 4)
