"""Questions that rules are asked, and what every answer to them must keep to: for the files that test tuning."""

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

from tribp.launch import conv3x3 as conv
from tribp.launch.arch import ITEMSIZE, Arch, cdiv, precision_of
from tribp.launch.conv3x3 import WORKSPACE, Convolution, Relayout
from tribp.launch.linear_sigmoid import Pass, choose_dgrad, choose_forward, choose_pass, choose_wgrad
from tribp.launch.matmul import Product, Sum, choose_sum
from tribp.launch.optim import MultiTensorConfig as Step
from tribp.launch.optim import choose_step
from tribp.launch.tuning import Question, hearing

PRODUCTS = [(4096, 4096, 4096), (65536, 256, 784), (8192, 1024, 1024), (512, 128, 784), (64, 10, 128), (1000, 77, 333)]
IMAGES = [(64, 56, 56, 64, 64), (256, 7, 7, 512, 512), (3, 33, 29, 7, 9), (1, 1, 300, 24, 200), (256, 14, 14, 256, 256)]
DTYPES = list(ITEMSIZE)


def questions(arch: Arch) -> dict[str, Question]:
    """All rules, asked about many facts."""
    with hearing() as heard:
        for dtype in DTYPES:
            for tf32 in (False, True):
                precision = precision_of(dtype, tf32, arch)
                for vec, tma in ((16 // ITEMSIZE[dtype], True), (16 // ITEMSIZE[dtype], False), (1, False)):
                    _ask_products(dtype, precision, arch, vec, tma)
                    _ask_convolutions(dtype, precision, arch, vec, tma)
            _ask_passes(dtype, arch)
        for parts, length in ((2, 10), (16, 1 << 20), (500, 256), (70_000, 3)):
            choose_sum(parts, length, arch)
        for elements in (1, 8000, 10**6, 10**9):
            for types in (["float32"], ["float32", "bfloat16"], ["float64"], ["float16"]):
                for strided in (False, True):
                    choose_step(elements, frozenset(types), strided, arch)
    return heard.questions


def _ask_products(dtype: str, precision: str, arch: Arch, vec: int, tma: bool) -> None:
    for m, n, k in PRODUCTS:
        choose_forward(m, n, k, dtype, precision, arch, vec=vec, tma=tma)
        for may_fuse in (False, True):
            choose_dgrad(m, n, k, dtype, precision, arch, vec=vec, tma=tma, may_fuse=may_fuse)
            for spare in (0, 1 << 40):
                choose_wgrad(m, n, k, dtype, precision, arch, vec=vec, tma=tma, may_fuse=may_fuse, spare=spare)


def _ask_convolutions(dtype: str, precision: str, arch: Arch, vec: int, tma: bool) -> None:
    for n, p, q, o, c in IMAGES:
        conv.choose_small_dgrad(n, p, q, min(o, 256 // ITEMSIZE[dtype]), dtype, precision, arch, tma=tma)
        for spare in (0, 1 << 40):
            conv.choose_conv_wgrad(n, p, q, o, c, 1, 1, dtype, precision, arch, vec=vec, tma=tma, spare=spare)
        for classes, whole, wide in ((1, False, False), (1, True, False), (4, False, True)):
            conv.choose_conv(
                n, p, q, o, c, 1, 1, classes, dtype, precision, arch,
                vec=vec, tma=tma, along=classes == 1, whole=whole, wide=wide, stepped=classes > 1,
            )  # fmt: skip
        conv.choose_conv(
            n, p, q, 32, 32, 4, 8, 1, dtype, precision, arch, vec=vec, tma=False, along=True, whole=True, wide=False,
            stepped=False
        )  # fmt: skip


def _ask_passes(dtype: str, arch: Arch) -> None:
    for m, n, _ in PRODUCTS:
        choose_pass(m, n, dtype, arch)
    for n, p, q, o, c in IMAGES:
        conv.choose_relayout(n, p * q, c, dtype, arch)
        for flag in (False, True):
            for wgrad in (False, True):
                conv.choose_depthwise(n, p, q, c, dtype, arch, last=flag, wgrad=wgrad)
                conv.choose_small(n, p, q, o, 3, dtype, arch, wgrad=wgrad, fused=flag and wgrad)


def check(question: Question, s: Any) -> None:
    """That the kernels compute correctly with these settings for these facts, on this machine."""
    facts = question.facts
    arch: Arch = facts["arch"]
    numbers = {k: v for k, v in dataclasses.asdict(s).items() if isinstance(v, int) and not isinstance(v, bool)}
    free = {"rows", "tiles", "num_stages", "splits", "persistent", "max_registers", "chunk_blocks", "taps"}
    for name in numbers.keys() - free:
        assert numbers[name] >= 1, name
        assert numbers[name] & (numbers[name] - 1) == 0, f"{name} is no power of two"
    most = 1024 // (64 if arch.backend == "hip" else 32)
    assert s.num_warps <= most
    if getattr(s, "max_registers", None) is not None:
        assert arch.backend == "cuda", "no option elsewhere"
    if isinstance(s, Convolution):
        _check_convolution(question.rule, facts, s, arch)
    elif isinstance(s, Product):
        _check_product(question.rule, facts, s, arch)
    elif isinstance(s, Pass):
        assert s.rows >= 1
        assert s.rows % s.block_m == 0
        assert cdiv(facts["m"], s.rows) <= 65_535, "the grid's second axis ends there"
    elif isinstance(s, Relayout):
        assert s.tiles >= 1
        assert cdiv(facts["c"], s.block_c) <= 65_535
    else:
        assert isinstance(s, Sum | Step)


def _check_product(rule: str, facts: Mapping[str, Any], s: Product, arch: Arch) -> None:
    size = ITEMSIZE[facts["dtype"]]
    for side in (s.block_i, s.block_j, s.block_l):
        assert 16 <= side <= 256, "a matrix instruction's least, and a descriptor's most"
    _check_memory(
        s, size, arch, s.block_j, s.block_i * s.block_l * s.fuse_dz, s.block_i * s.block_j * bool(s.persistent)
    )
    if s.tma:
        assert facts["tma"]
        assert arch.has_tma
        assert not s.prefetch
    if s.prefetch:
        assert s.num_stages == 1, "one pipeline on top of another does not compile"
    else:
        assert s.tma or facts["vec"] * size >= 4, "narrower loads are not pipelined"
    if s.fuse_dz:
        assert s.tma
        assert facts["may_fuse"]
    assert not s.persistent or rule == "choose_forward", "no other kernel knows it"
    if rule != "choose_wgrad":
        assert s.splits == 1
        return
    m, share = facts["m"], facts["n"] * facts["k"] * max(4, size)
    rows = cdiv(cdiv(m, s.splits), s.block_l) * s.block_l
    assert rows * (s.splits - 1) < m <= rows * s.splits
    assert s.splits == 1 or s.splits * share <= facts["spare"]


def _check_memory(s: Product, size: int, arch: Arch, block_j: int, extra: int = 0, output: int = 0) -> None:
    """One stage less where operands pass through registers."""
    assert s.num_stages >= 1
    stages = s.num_stages if arch.has_tma else s.num_stages - 1
    assert (((s.block_i + block_j) * s.block_l + extra) * stages + output) * size + 1024 <= arch.shared_memory


def _check_convolution(rule: str, facts: Mapping[str, Any], s: Convolution, arch: Arch) -> None:
    size = ITEMSIZE[facts["dtype"]]
    if rule == "choose_small_dgrad":
        assert s.block_i == s.box[0] * s.box[2] >= 16
        assert s.box[2] > 2, "a box's last two columns are the next one's"
        assert (s.block_j, s.splits) == (64, 1)
        assert s.block_l >= facts["o"], "one step"
        assert not s.tma or (facts["tma"] and arch.has_tma and s.box[0] == 1), "a line"
        copies = s.num_stages - (not arch.has_tma) if s.num_stages > 1 else 0
        assert copies * s.block_i * s.block_l * size < arch.shared_memory - 16 * 1024, "weights, and what is exchanged"
        return
    n, p, q = facts["n"], facts["p"], facts["q"]
    boxes = s.boxes(n, p, q)
    each = cdiv(boxes, s.splits)
    assert each * (s.splits - 1) < boxes <= each * s.splits
    assert max(s.box) <= 256
    if rule == "choose_depthwise":
        assert s.block_i == s.box[0] * s.box[2]
        assert s.box[1] <= (8 if facts["wgrad"] else 64), "rows are unrolled"
        return
    wgrad = rule == "choose_conv_wgrad" or facts.get("wgrad", False)
    assert min(s.block_i, s.block_j, s.block_l) >= 16
    if rule == "choose_small":
        assert not s.tma
        if wgrad:
            assert s.block_j == 32, "nine taps of three channels"
            assert prod(s.box) == s.block_l
        else:
            assert s.block_l == 16, "a row of three taps of three channels"
            assert s.box[0] * s.box[2] == s.block_i
        return
    size = ITEMSIZE[facts["dtype"]]
    assert prod(s.box) == (s.block_l if wgrad else s.block_i)
    if s.rows > 1:  # a turn's taps of one column, and the rows that they meet
        assert s.box[1] == 1
        _check_memory(s, size, arch, 3 * s.block_j, extra=(s.rows + 1) * s.block_i * s.block_l)
    else:
        _check_memory(s, size, arch, s.block_j * s.taps)
    assert s.bundle == facts["bundle"], "the operation asked about so many groups"
    if s.tma:
        assert facts["tma"]
        assert arch.has_tma
    if rule == "choose_conv":
        assert s.tma or not s.flat or s.num_warps <= 4, "pytorch #173068"
        assert not (s.tma and facts["whole"] and facts["l"] % s.block_l), "a step would read the next pixel"
        assert s.block_j <= (256 if s.tma and not facts["wide"] else 128)
    else:
        assert s.taps in (1, 3)
        assert not (s.tma and (p % s.box[1] or q % s.box[2])), "a descriptor does not know dz's edges"
        share = 9 * facts["o"] * facts["c"] * facts["bundles"] * max(4, size)
        assert s.splits == 1 or s.splits * share <= max(facts["spare"], WORKSPACE)
