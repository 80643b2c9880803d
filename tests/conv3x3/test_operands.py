"""What a convolution's products read: weights beside which others lie, boxes that are lines, dz that is summed too.

wgmma reads both operands from shared memory while the program goes on (`conv3x3.convolve`, `conv3x3.wgrad`); the
interpreter shows that what those forms compute is right, `python -m bench static` that they are compiled to it.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tribp import versions
from tribp.launch.arch import ARCHS
from tribp.launch.buffer import Buffer
from tribp.launch.neighbors import neighbors
from tribp.launch.plan import Plan
from tribp.ops.activations import NONE
from tribp.ops.conv3x3 import plan as ops
from tribp.ops.conv3x3.config import ConvProblem, ConvWgradProblem
from tribp.ops.conv3x3.config_few_channels import FewChannelsProblem
from tribp.ops.conv3x3.config_relayout import RelayoutConfig, RelayoutProblem
from tribp.ops.conv3x3.images import relayout
from tribp.ops.conv3x3.reference import Window, conv3x3_backward

from ..launch.plans import plan_of, run
from ..oracle import assert_close
from .test_kernels import BASE, WGRAD, WGRAD_FORMS, backward, nan_like, tensor


def test_a_step_past_the_channels_meets_no_weight(kernels: str) -> None:
    """48 channels are a step and a half: what follows them in memory, the next tap's weights, is not to be read."""
    w = tensor((16, 48, 3, 3), torch.float32, kernels, True)
    w[0, 0, 1, 1] = torch.inf
    w[1, 47, 1, 1] = torch.nan
    x, dy = tensor((2, 48, 5, 6), torch.float32, kernels, True), tensor((2, 16, 3, 4), torch.float32, kernels, True)
    configs = {ConvProblem: replace(BASE, tma=True, flat=True, block_l=32)}
    y, dx = nan_like(dy), nan_like(x)
    run(ops.forward_layer, (x, w, None, y), configs, window=Window(), activation=NONE, tf32=False)
    exact = F.conv2d(x.double(), w.double()).float()
    torch.testing.assert_close(y, exact, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert exact[:, 0].isinf().all(), "one term is infinite, and a zero times it would be NaN"
    backward((dy, None, w, None, dx, None, None), Window(), configs)
    assert dx[:, 1:47].isfinite().all(), "a column of weights reaches its own channel alone"


LINES = {"images": (16, 1, 1), "columns": (1, 1, 16)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("line", LINES)
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_wgrad_by_descriptors_keeps_what_is_not_finite_where_it_belongs(
    line: str, dtype: torch.dtype, kernels: str
) -> None:
    """In x at its edges, which only taps that look there meet; beyond the images; in dz, of one channel's db."""
    x, dy = tensor((3, 16, 3, 16), dtype, kernels, True), tensor((3, 16, 3, 16), dtype, kernels, True)
    x[:, :, 2], x[:, :, :, 15] = torch.inf, torch.nan
    dy[:, :, 1:], dy[:, :, :, 14:] = 0, 0
    dw, db = tensor((16, 16, 3, 3), dtype, kernels, True), tensor((1, 16, 1, 1), dtype, kernels, False).flatten()
    configs = {ConvWgradProblem: replace(WGRAD, taps=3, tma=True, block_l=16, box=LINES[line], splits=2)}

    def check(dy: Tensor) -> Tensor:
        backward((dy, x, None, None, None, dw, db), window, configs)
        exact = conv3x3_backward(
            dy.double().cpu(), x.double().cpu(), None, None, x.shape, window, NONE, (False, True, True)
        )  # fmt: skip
        for result, expected in zip((dw, db), exact[1:], strict=True):
            assert expected is not None
            finite = expected.isfinite()
            assert torch.equal(result.isfinite().cpu(), finite)
            assert_close(result[finite.to(kernels)], expected[finite])
        assert exact[1] is not None
        return exact[1]

    window = Window((1, 1), (1, 1))
    assert check(dy)[:, :, 0, 0].isfinite().all(), "the tap that looks back meets no infinity but beyond the edge"
    dy[1, 5, 0, 0], x[:, :, 2], x[:, :, :, 15] = torch.inf, 0, 0
    assert not check(dy)[5].isfinite().any()


@pytest.mark.parametrize(
    ("dtype", "tf32", "value"),
    [(torch.float32, True, 1 + 2**-12), (torch.float32, False, 2e37), (torch.bfloat16, False, 2e37)],
)
@pytest.mark.parametrize("form", ["three taps", "three taps, x first", "three taps, tma"])
def test_db_sums_what_dz_holds(form: str, dtype: torch.dtype, tf32: bool, value: float, kernels: str) -> None:
    """float32's terms are not cut to TF32's on the way, and no sum on the way is larger than the sum."""
    dy = torch.full((3, 16, 1, 5), value, dtype=dtype, device=kernels).contiguous(memory_format=torch.channels_last)
    x, dw, db = torch.zeros_like(dy), tensor((16, 16, 3, 3), dtype, kernels, True), nan_like(dy[0, :, 0, 0])
    window, configs = Window((1, 1), (1, 1)), {ConvWgradProblem: WGRAD_FORMS[form]}
    run(ops.backward_layer, (dy, x, None, None, None, dw, db), configs, window=window, activation=NONE, tf32=tf32)
    torch.testing.assert_close(db, dy.double().sum((0, 2, 3)).to(dtype), rtol=2e-7, atol=0)


# ---- heuristics


IMAGES = [(64, 56, (64, 1, 1)), (32, 7, (32, 1, 1)), (60, 7, (64, 1, 1))]
COLUMNS = [(8, 224, (1, 1, 32)), (1, 128, (1, 1, 64))]


@pytest.mark.parametrize(("n", "q", "line"), [*IMAGES, *COLUMNS, (8, 56, None), (48, 7, None), (100, 14, None)])
def test_descriptors_of_wgrad_take_lines(
    n: int, q: int, line: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images, few of which are none, or of columns that divide the image's; and so do the configs beside them."""
    monkeypatch.setattr(versions, "triton_version", lambda: (3, 7))
    facts: dict[str, Any] = dict(
        n=n, p=q, q=q, o=128, c=128, group_tiles=1, groups_per_tile=1, dtype="bfloat16", precision="ieee"
    )
    facts |= dict(arch=ARCHS["sm_90"], vec=8, tma=True, spare=0)
    problem = ConvWgradProblem(**facts)
    chosen = problem.choose()
    assert chosen.tma == (line is not None)
    assert line in (None, chosen.box)
    assert (chosen.block_i, chosen.block_j) == (128, 128), "pointers or not"
    for s in [chosen, *neighbors(problem, chosen)]:
        assert math.prod(s.box) == s.block_l
        assert not s.tma or s.box == (s.block_l, 1, 1) or (s.box == (1, 1, s.block_l) and q % s.block_l == 0)


def test_wgmma_does_not_share_tiles_that_triton_overwrites(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = dict(n=64, p=56, q=56, o=128, c=128, group_tiles=1, groups_per_tile=1, precision="ieee")
    facts |= dict(arch=ARCHS["sm_90"], vec=8, tma=True, spare=0)
    for version in ((3, 5), (3, 6)):
        monkeypatch.setattr(versions, "triton_version", lambda version=version: version)
        problem = ConvWgradProblem(**facts, dtype="bfloat16")
        chosen = problem.choose()
        assert {s.tma for s in [chosen, *neighbors(problem, chosen)]} == (
            {False} if version == (3, 5) else {True, False}
        )
        assert ConvWgradProblem(**facts, dtype="float64").choose().tma, "DMMA reads registers"


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_wgmma_does_not_read_float32_that_is_summed_as_well(precision: str) -> None:
    """Nor would it be right to: `cp.async` brings the next tile too early."""
    facts: dict[str, Any] = dict(n=64, p=56, q=56, o=128, dtype="float32", arch=ARCHS["sm_90"])
    dense: dict[str, Any] = dict(c=128, group_tiles=1, groups_per_tile=1, precision=precision, vec=4, tma=True, spare=0)
    wgrad = ConvWgradProblem(**facts, **dense)
    for s in [wgrad.choose(), *neighbors(wgrad, wgrad.choose())]:
        assert s.block_i < 64 or s.num_warps < 4, "wgmma takes 64 rows and more, and four warps"
    few = FewChannelsProblem(**facts, c=3, wgrad=True)
    assert {s.num_stages for s in [few.choose(), *neighbors(few, few.choose())]} == {1}


def test_a_box_that_is_no_line_is_refused(kernels: str) -> None:
    x, dy, dw = (tensor((16, 16, size, size), torch.float32, kernels, True) for size in (4, 4, 3))
    configs = {ConvWgradProblem: replace(WGRAD, tma=True, box=(2, 4, 4))}
    with pytest.raises(Exception, match="the box of a descriptor must be a line"):
        backward((dy, x, None, None, None, dw, None), Window((1, 1), (1, 1)), configs)


# ---- sizes past what 32 bits and a grid hold


def test_more_channels_than_a_grids_second_axis_has_programs() -> None:
    """Of 65,536 blocks of 32 channels, which the first axis holds."""
    channels = 65_536 * 32

    def build(plan: Plan, src: Buffer, db: Buffer) -> None:
        relayout(plan, src, None, NONE, None, db)

    src, db = torch.zeros(1).expand(1, channels, 3, 3), torch.zeros(1).expand(channels)
    config = RelayoutConfig(32, 32, 1, 4, "test")
    (launch,) = plan_of(build, (src, db), {RelayoutProblem: config}).launches
    assert launch.grid == (65_536, 1)


@pytest.mark.parametrize(("channels", "launches"), [(238_609_294, 1), (238_609_295, 0)])
def test_weights_past_32_bits_are_torchs(channels: int, launches: int) -> None:
    """9 · 238,609,295 is the first that an offset within a weight of one output cannot be."""
    x, w = (torch.zeros(1).expand(1, channels, size, size) for size in (1, 3))
    window = Window((1, 1), (1, 1), 1)
    plan = plan_of(ops.forward, (x, w, None), window=window, activation=NONE, tf32=False)
    assert len([launch for launch in plan.launches if launch.kernel.__name__ == "forward"]) == launches
