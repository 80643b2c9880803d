"""Each form of each convolution kernel by itself, whatever the heuristics would choose: boxes, loops, TMA, bundles,
taps, splits.

Shapes leave a remainder in every dimension, and every output starts as NaN.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tribp
from tribp.launch.arch import ARCHS, cdiv
from tribp.launch.buffer import Buffer
from tribp.launch.configs import whole_splits
from tribp.launch.launches import Launch
from tribp.launch.plan import Plan, launches_of
from tribp.launch.reduce import reduce_partials
from tribp.ops.activations import NONE, Activation
from tribp.ops.conv3x3 import plan as ops
from tribp.ops.conv3x3.boxes import ConvConfig, choose_box
from tribp.ops.conv3x3.checks import small_enough
from tribp.ops.conv3x3.config import ConvProblem, ConvWgradProblem, choose_groups_per_tile
from tribp.ops.conv3x3.config_depthwise import DepthwiseProblem
from tribp.ops.conv3x3.config_few_channels import FewChannelsDgradProblem, FewChannelsProblem
from tribp.ops.conv3x3.images import Packing, relayout
from tribp.ops.conv3x3.reference import Window, conv3x3_backward

from ..covering import DTYPES, cover, turn
from ..launch.plans import plan_of, run
from ..oracle import assert_close

SIGMOID = Activation("sigmoid")
BASE = ConvConfig(32, 16, 16, num_warps=4, num_stages=2, reason="test", group=2, box=(2, 4, 4))
FORMS = {
    "pointers": BASE,
    "flat": replace(BASE, flat=True, box=(1, 2, 16)),
    "tma": replace(BASE, tma=True),
    "flat tma": replace(BASE, tma=True, flat=True, box=(32, 1, 1)),
    "one image": replace(BASE, block_i=64, block_j=32, box=(1, 8, 8), group=8),
}
# Strides, paddings, groups; channels in and out: two steps and two columns of tiles in the first, one in most, for a
# step costs the interpreter 10 ms. Of three groups two share a bundle and one has its own, of five four.
WINDOWS = {
    "plain": (Window((1, 1), (1, 1)), 32, 24),
    "no padding": (Window((1, 1), (0, 0)), 16, 12),
    "wide padding": (Window((1, 1), (3, 4)), 16, 16),
    "stride 2": (Window((2, 2), (1, 1)), 32, 16),
    "stride 2, no padding": (Window((2, 2), (0, 0)), 16, 12),
    "stride 1, 2": (Window((1, 2), (1, 2)), 16, 12),
    "stride 2, 1": (Window((2, 1), (2, 0)), 16, 12),
    "groups": (Window((1, 1), (1, 1), 2), 32, 32),
    "bundles": (Window((1, 1), (1, 1), 3), 12, 24),
    "bundles, stride 2": (Window((2, 2), (1, 1), 5), 20, 20),
    "bundles of whole steps": (Window((1, 1), (1, 1), 4), 64, 32),
}


def tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str, last: bool) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    return values.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def nan_like(values: Tensor) -> Tensor:
    return torch.full_like(values, torch.nan)


def terms(summed: Tensor) -> Tensor:
    """The size of the terms of a sum over images and pixels."""
    return summed.double().square().sum((0, 2, 3)).sqrt().cpu()


def backward(
    tensors: tuple[Tensor | None, ...], window: Window, configs: dict[Any, ConvConfig] | None = None
) -> list[Launch]:
    """tensors: dy, x, w, y, dx, dw, db."""
    return run(ops.backward_layer, tensors, configs, window=window, activation=SIGMOID, tf32=False)


class Case:
    """Inputs of a window, and what float64 makes of them."""

    def __init__(
        self, window: str, dtype: torch.dtype, device: str, last: bool, size: tuple[int, int] = (4, 6)
    ) -> None:
        self.window, c, o = WINDOWS[window]
        self.x = tensor((3, c, *size), dtype, device, last)
        self.w = tensor((o, c // self.window.groups, 3, 3), dtype, device, last) / (9 * c) ** 0.5
        self.b = tensor((1, o, 1, 1), dtype, device, False).flatten()
        stride, padding, groups = self.window
        self.exact = F.conv2d(self.x.double(), self.w.double(), self.b.double(), stride, padding, 1, groups).cpu()
        self.y = nan_like(tensor(tuple(self.exact.shape), dtype, device, last))
        self.dy = tensor(tuple(self.exact.shape), dtype, device, last)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        dy, x, w = (t.double().cpu() for t in (self.dy, self.x, self.w))
        dx, dw, db = conv3x3_backward(dy, x, w, None, x.shape, self.window, NONE, (True, True, True))
        assert dx is not None
        assert dw is not None
        assert db is not None
        return dx, dw, db

    @property
    def groups_per_tile(self) -> int:
        """Groups a tile: two of three or four, or four of five."""
        return {3: 2, 4: 2, 5: 4}.get(self.window.groups, 1)

    def fitted(self, config: ConvConfig) -> ConvConfig:
        tma = config.tma and self.window.groups in (1, 2, 4)
        return replace(config, groups_per_tile=self.groups_per_tile, tma=tma)


@pytest.fixture
def bundles(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], None]:
    """Have the groups of a case share tiles as it says."""

    def share(case: Case) -> None:
        monkeypatch.setattr(ops, "choose_groups_per_tile", lambda *facts: case.groups_per_tile)

    return share


Bundles = Callable[[Case], None]


def is_quick(window: str, form: str, dtype: torch.dtype) -> bool:
    """Two forms of each window, in turn, each in one type: the interpreter takes 50 ms for a program's nine taps."""
    first = list(WINDOWS).index(window)
    forms = list(FORMS)
    chosen = forms[first % len(forms)], forms[(first + 2) % len(forms)]
    return form in chosen and dtype == turn(DTYPES, window, form)


@pytest.mark.parametrize(("window", "form", "dtype"), cover(WINDOWS, FORMS, DTYPES, quick=is_quick))
def test_forward(window: str, form: str, dtype: torch.dtype, kernels: str, bundles: Bundles) -> None:
    case = Case(window, dtype, kernels, last=turn([True, False], window, form, dtype))
    bundles(case)
    config = case.fitted(FORMS[form])
    tensors = (case.x, case.w, case.b, case.y)
    launches = run(ops.forward_layer, tensors, {ConvProblem: config}, window=case.window, activation=NONE, tf32=False)
    (launch,) = [launch for launch in launches if launch.kernel.__name__ == "forward"]
    assert launch.named["TMA"] == config.tma
    assert launch.named["DIAGONAL"] == (case.window.groups > 2)
    assert_close(case.y, case.exact)


@pytest.mark.parametrize(("window", "form", "dtype"), cover(WINDOWS, FORMS, DTYPES, quick=is_quick))
def test_dgrad(window: str, form: str, dtype: torch.dtype, kernels: str, bundles: Bundles) -> None:
    case = Case(window, dtype, kernels, last=turn([True, False], window, form, dtype))
    whole = case.dy.shape[1] % 16 == 0
    bundles(case)
    config = case.fitted(replace(FORMS[form], tma=FORMS[form].tma and whole))
    dx = nan_like(case.x)
    backward((case.dy, None, case.w, None, dx, None, None), case.window, {ConvProblem: config})
    assert_close(dx, case.gradients()[0])


# Of 18 turns: four parts of four and one of two, which begin at either step of a tap; or a part each.
SPLIT_FORMS = {
    "pointers": replace(FORMS["flat"], splits=5),
    "tma": replace(BASE, tma=True, flat=True, splits=18),
    "tma, one image": replace(BASE, block_i=16, tma=True, flat=True, splits=5, box=(1, 4, 4)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", SPLIT_FORMS)
@pytest.mark.parametrize("window", ["plain", "stride 2"])
@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
def test_forward_of_parts(last: bool, window: str, form: str, bias: bool, kernels: str) -> None:
    """Sums in parts, then what adds them up, and bias and activation, in y's memory format."""
    case = Case(window, turn(DTYPES, window, form, bias), kernels, last)
    b, act = (case.b, SIGMOID) if bias else (None, NONE)
    exact = torch.sigmoid(case.exact) if bias else case.exact - case.b.double().cpu()[:, None, None]
    configs, tensors = {ConvProblem: SPLIT_FORMS[form]}, (case.x, case.w, b, case.y)
    launches = run(ops.forward_layer, tensors, configs, window=case.window, activation=act, tf32=False)
    product, output = launches[-2:]
    assert (product.kernel.__name__, output.kernel.__name__) == ("forward", "output")
    assert product.grid[1] == output.named["parts"] == SPLIT_FORMS[form].splits
    assert_close(case.y, exact)


@pytest.mark.parametrize("form", SPLIT_FORMS)
@pytest.mark.parametrize("window", ["wide padding", "plain"])
@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
def test_dgrad_of_parts(last: bool, window: str, form: str, kernels: str) -> None:
    """With wgrad before it, whose sums its programs add up; those of dx have a launch of their own."""
    case = Case(window, turn(DTYPES, window, form), kernels, last)
    dx, dw, db = nan_like(case.x), nan_like(case.w), nan_like(case.b)
    whole = case.dy.shape[1] % 16 == 0
    config = replace(SPLIT_FORMS[form], tma=SPLIT_FORMS[form].tma and whole, splits=5)
    wgrad = replace(WGRAD, splits=2)
    configs = {ConvProblem: config, ConvWgradProblem: wgrad}
    launches = backward((case.dy, case.x, case.w, None, dx, dw, db), case.window, configs)
    assert [launch.kernel.__name__ for launch in launches[-3:]] == ["wgrad", "dgrad", "reduce_partials"]
    for found, exact in zip((dx, dw), case.gradients(), strict=False):
        assert_close(found, exact)
    assert_close(db, case.gradients()[2], scale=terms(case.dy))


WGRAD = replace(BASE, block_i=16, block_j=16, block_l=32)
WGRAD_FORMS = {
    "one tap": WGRAD,
    "three taps": replace(WGRAD, taps=3, block_i=32),
    "three taps, x first": replace(WGRAD, taps=3, block_j=32, x_first=True),
    "three taps, tma": replace(WGRAD, taps=3, tma=True, block_l=16, box=(16, 1, 1)),
    "one tap, tma": replace(WGRAD, tma=True, block_j=32, block_l=16, box=(1, 1, 16)),
}


@pytest.mark.parametrize(
    ("window", "form", "splits", "dtype"),
    cover(
        WINDOWS, WGRAD_FORMS, [1, 4], DTYPES,
        quick=lambda window, form, splits, dtype: dtype == turn(DTYPES, window, form)
        and (list(WGRAD_FORMS).index(form) - list(WINDOWS).index(window)) % len(WGRAD_FORMS) < 2
        and splits == turn((1, 4), form, window),
    ),
)  # fmt: skip
def test_wgrad(window: str, form: str, splits: int, dtype: torch.dtype, kernels: str, bundles: Bundles) -> None:
    case = Case(window, dtype, kernels, last=turn([True, False], window, form, dtype))
    bundles(case)
    config = case.fitted(WGRAD_FORMS[form])
    tma = config.tma and all(t.shape[1] % 16 == 0 for t in (case.x, case.dy))
    splits = whole_splits(config.boxes(3, *case.y.shape[2:]), splits, 1)
    config = replace(config, tma=tma, splits=splits)
    dw, db = nan_like(case.w), nan_like(case.b)
    backward((case.dy, case.x, None, None, None, dw, db), case.window, {ConvWgradProblem: config})
    _, exact_dw, exact_db = case.gradients()
    assert_close(dw, exact_dw)
    assert_close(db, exact_db, scale=terms(case.dy))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", [NONE, SIGMOID], ids=["none", "sigmoid"])
def test_what_the_config_of_few_channels_is_chosen_for(act: Activation, bias: bool) -> None:
    """Whether dz is formed on load, and whether it is added up: of both, two stages would meet in the same banks."""
    x, w, y = (torch.empty(size, dtype=torch.bfloat16) for size in ((2, 3, 8, 8), (16, 3, 3, 3), (2, 16, 8, 8)))
    db = torch.empty(16, dtype=torch.bfloat16) if bias else None
    tensors, window = (y, x, None, y if act.name else None, None, torch.empty_like(w), db), Window((1, 1), (1, 1), 1)
    (problem,) = (
        problem
        for problem in plan_of(ops.backward_layer, tensors, window=window, activation=act, tf32=False).configs
        if isinstance(problem, FewChannelsProblem)
    )
    assert (problem.wgrad, problem.fused, problem.summed) == (True, bool(act.name), bias)
    stages = {gpu: problem._replace(arch=ARCHS[gpu]).choose().num_stages for gpu in ("sm_80", "gfx942")}
    assert stages == {"sm_80": 1 if act.name and bias else 2, "gfx942": 2}
    for dtype, most in (("float32", 1), ("float64", 1), ("float16", stages["sm_80"])):
        assert problem._replace(arch=ARCHS["sm_80"], dtype=dtype).choose().num_stages == most


@pytest.mark.parametrize("c", range(1, 8))
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_few_input_channels(c: int, last: bool, kernels: str) -> None:
    """The gathered product, forward and wgrad, its dz formed on the way in or not."""
    dtype = DTYPES[(c + last) % 4]
    window = Window(((1, 2)[c % 2], (1, 2)[c // 2 % 2]), (c % 3, c // 3), 1)
    x, w = tensor((3, c, 7, 9), dtype, kernels, last), tensor((20, c, 3, 3), dtype, kernels, c % 3 == 0) / 3
    b = tensor((1, 20, 1, 1), dtype, kernels, False).flatten()
    z = F.conv2d(x.double(), w.double(), b.double(), window.stride, window.padding)
    y = nan_like(tensor(tuple(z.shape), dtype, kernels, last))
    (launch,) = run(ops.forward_layer, (x, w, b, y), window=window, activation=SIGMOID, tf32=False)
    assert launch.kernel.__name__ == "few_channels_forward"
    assert_close(y, torch.sigmoid(z).cpu())
    dy, dw, db = tensor(tuple(z.shape), dtype, kernels, c == 5), nan_like(w), nan_like(b)
    done = backward((dy, x, None, y, None, dw, db), window)
    assert [launch.named.get("FUSE_DZ") for launch in done if launch.kernel.__name__ == "few_channels_wgrad"] == [True]
    dz = dy.double() * y.double() * (1 - y.double())
    _, exact, sums = conv3x3_backward(
        dz.cpu(), x.double().cpu(), None, None, x.shape, window, NONE, (False, True, True)
    )
    assert exact is not None
    assert sums is not None
    assert_close(dw, exact, tolerance=None if dtype.itemsize > 2 else 6e-3)  # dz is rounded on its way in
    assert_close(db, sums, scale=terms(dz))


@pytest.mark.parametrize("c", range(1, 5))
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_dx_of_few_input_channels(c: int, tma: bool, kernels: str) -> None:
    """Boxes that end within rows and columns, and an infinity at their rim, which reaches nine pixels of dx."""
    dtype, last = (torch.float16, torch.bfloat16, torch.float32)[c % 3], c in (2, 3)
    window, o = Window((1, 1), (c % 3, 4 - c), 1), 16 if tma else 5 + c
    w, dx = tensor((o, c, 3, 3), dtype, kernels, c % 2 == 0) / 3, nan_like(tensor((3, c, 11, 19), dtype, kernels, last))
    dy = tensor((3, o, 9 + 2 * (c % 3), 17 + 2 * (4 - c)), dtype, kernels, tma)
    dy[1, 4, 5, 7] = torch.inf
    s = replace(BASE, block_i=16, block_j=64, box=(1, 4, 16) if tma else (2, 4, 8), tma=tma, num_warps=1, num_stages=1)
    *_, launch = backward((dy, None, w, None, dx, None, None), window, {FewChannelsDgradProblem: s})
    assert launch.kernel.__name__ == "few_channels_dgrad"
    exact, _, _ = conv3x3_backward(
        dy.double().cpu(), None, w.double().cpu(), None, dx.shape, window, NONE, (True, False, False)
    )
    assert exact is not None
    assert (~exact.isfinite()).sum() == 9 * c
    assert torch.equal(dx.isfinite().cpu(), exact.isfinite())
    assert_close(dx.cpu().nan_to_num(0, 0, 0), exact.nan_to_num(0, 0, 0))


@pytest.mark.parametrize(
    ("stride", "last", "rows"),
    cover(
        [(1, 1), (2, 2), (1, 2), (2, 1)], [False, True], [1, 2, 4],
        quick=lambda stride, last, rows: rows == {(1, 1): 2, (2, 2): 1 + last, (1, 2): 4, (2, 1): 2}[stride],
    ),
)  # fmt: skip
def test_one_channel_a_group(rows: int, last: bool, stride: tuple[int, int], kernels: str) -> None:
    """Forward, dgrad and wgrad of each channel by itself, with 1, 2 and 4 rows that share what they read."""
    dtype = turn(DTYPES, rows, last, stride)
    window = Window(stride, (turn(range(3), stride, last), rows % 3), 12)
    x, w = tensor((2, 12, 5, 6), dtype, kernels, last), tensor((12, 1, 3, 3), dtype, kernels, False) / 3
    b = tensor((1, 12, 1, 1), dtype, kernels, False).flatten()
    z = F.conv2d(x.double(), w.double(), b.double(), window.stride, window.padding, 1, 12).cpu()
    y, dx, dw, db = nan_like(tensor(tuple(z.shape), dtype, kernels, last)), nan_like(x), nan_like(w), nan_like(b)
    config = ConvConfig(8, 8, 1, 4, 1, "test", box=(2, rows, 4))
    run(ops.forward_layer, (x, w, b, y), {DepthwiseProblem: config}, window=window, activation=NONE, tf32=False)
    assert_close(y, z)
    dy = tensor(tuple(z.shape), dtype, kernels, last)
    backward((dy, None, w, None, dx, None, None), window, {DepthwiseProblem: config})
    wgrad = replace(config, splits=whole_splits(config.boxes(2, *z.shape[2:]), 3, 1))
    backward((dy, x, None, None, None, dw, db), window, {DepthwiseProblem: wgrad})
    exact = conv3x3_backward(
        dy.double().cpu(), x.double().cpu(), w.double().cpu(), None, x.shape, window, NONE, (True, True, True)
    )
    for result, value in zip((dx, dw, db), exact, strict=True):
        assert value is not None
        assert_close(result, value, scale=terms(dy) if value.dim() == 1 else None)


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda t: t.contiguous(),
    "NHWC": lambda t: t.contiguous(memory_format=torch.channels_last),
    "cropped": lambda t: F.pad(t, (1, 1, 2, 1), value=torch.nan)[..., 2:-1, 1:-1],
    "strided": strided,
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "channels first": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padded", [8, 16])
@pytest.mark.parametrize("with_y", [False, True], ids=["copy", "dz"])
def test_relayout(with_y: bool, padded: int, layout: str, kernels: str) -> None:
    """The pass that packs channels: zeros where it pads, dy·y·(1 − y) and sums on the way."""
    dtype = turn(DTYPES, with_y, padded, layout)
    src = LAYOUTS[layout](torch.randn(3, 7, 5, 9, device=kernels).to(dtype))
    y = LAYOUTS["NHWC" if padded == 8 else "NCHW"](torch.rand(3, 7, 5, 9, device=kernels).to(dtype)) if with_y else None
    exact = src.double() * (y.double() * (1 - y.double()) if y is not None else 1)
    dst, db = nan_like(tensor((3, padded, 5, 9), dtype, kernels, True)), torch.full((7,), torch.nan, dtype=dtype)
    db = db.to(kernels)

    def build(plan: Plan, src: Buffer, y: Buffer | None, dst: Buffer, db: Buffer) -> None:
        reduce_partials(plan, relayout(plan, src, y, SIGMOID, dst, db))

    run(build, (src, y, dst, db))
    assert_close(dst[:, :7], exact.cpu())
    assert not dst[:, 7:].any(), "what pads the channels must be zero: it is multiplied"
    assert_close(db, exact.sum((0, 2, 3)).cpu(), scale=terms(exact))


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", ["NCHW", "NHWC", "cropped"])
def test_tensors_are_packed_in_one_launch(first: str, second: str, kernels: str) -> None:
    """Two images and a weight, or as many launches as there are forms; each with zeros where it is padded."""
    dtype = turn(DTYPES, first, second)
    images = [
        LAYOUTS[layout](torch.randn(size, device=kernels).to(dtype))
        for layout, size in ((first, (3, 39, 5, 9)), (second, (2, 41, 7, 6)))
    ]
    w = torch.randn(33, 7, 3, 3, device=kernels).to(dtype)
    found = [
        nan_like(tensor((n, -(-c // 8) * 8, *size), dtype, kernels, True))
        for n, c, *size in (image.shape for image in images)
    ]
    found.append(nan_like(tensor((40, 7, 3, 3), dtype, kernels, True)))
    counts = []

    def build(plan: Plan, *buffers: Buffer) -> None:
        packing = Packing(plan)
        for src, dst in zip(buffers[:3], buffers[3:], strict=True):
            packing.pack(src, dst)
        for _ in range(2):
            packing.launch()
            counts.append(len(plan.launches))

    run(build, (*images, w, *found))
    assert counts[0] == 1 or (first != second and counts[0] == 2)
    assert counts[1] == counts[0], "nothing is packed twice"
    swapped = nan_like(tensor((7, 40, 3, 3), dtype, kernels, True))

    def exchange(plan: Plan, src: Buffer, dst: Buffer) -> None:
        packing = Packing(plan)
        packing.pack(src, dst, swapped=True)
        packing.launch()

    run(exchange, (w, swapped))
    for result, exact in zip(found, [*images, w], strict=True):
        rows, channels = exact.shape[:2]
        assert torch.equal(result[:rows, :channels], exact)
        assert not result[:rows, channels:].any(), "what pads the channels must be zero: it is multiplied"
    assert found[2][33:].isnan().all(), "rows that src has not are left as they are"
    assert torch.equal(swapped[:, :33], w.transpose(0, 1))
    assert not swapped[:, 33:].any()


def test_a_nan_of_one_group_stays_in_it(kernels: str) -> None:
    """Groups that share a tile meet each other's zeros, and zero times infinity is NaN."""
    x = torch.randn(1, 12, 6, 7, device=kernels)
    x[0, 4, 2, 3], x[0, 9, 1, 1] = torch.inf, torch.nan
    w = torch.randn(24, 3, 3, 3, device=kernels)
    window = Window((1, 1), (1, 1), 4)
    assert choose_groups_per_tile(4, 3, 6, 64) > 1
    y = torch.empty(1, 24, 6, 7, device=kernels)
    run(ops.forward_layer, (x, w, None, y), window=window, activation=NONE, tf32=False)
    exact = F.conv2d(x, w, None, 1, 1, 1, 4)
    torch.testing.assert_close(y, exact, equal_nan=True, rtol=1e-5, atol=1e-5)
    dy = torch.randn(1, 24, 6, 7, device=kernels)
    dy[0, 5, 1, 1] = -torch.inf
    dx = torch.empty_like(x)
    backward((dy, None, w, None, dx, None, None), window)
    theirs = conv3x3_backward(dy, None, w, None, x.shape, window, NONE, (True, False, False))[0]
    torch.testing.assert_close(dx, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("c", "groups"), [(2, 1), (16, 1), (6, 3), (8, 8)], ids=["small", "dense", "bundles", "depthwise"]
)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_an_infinity_at_the_edge_reaches_its_taps_alone(c: int, groups: int, last: bool, kernels: str) -> None:
    """Boxes hang over the edge: there a zero that stands for no pixel of dz must not meet a pixel of x."""
    x = tensor((1, c, 5, 7), torch.float32, kernels, last)
    x[:, :, 4], x[:, :, :, 6] = torch.inf, torch.inf
    w, dy = torch.zeros(c, c // groups, 3, 3, device=kernels), tensor((1, c, 5, 7), torch.float32, kernels, last)
    dy[:, :, 3:], dy[:, :, :, 5:] = 0, 0
    window, dw = Window((1, 1), (1, 1), groups), nan_like(w)
    backward((dy, x, None, None, None, dw, None), window)
    exact = conv3x3_backward(dy.cpu(), x.cpu(), None, None, x.shape, window, NONE, (False, True, False))[1]
    assert exact is not None
    torch.testing.assert_close(dw.cpu(), exact, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert exact[:, :, 0, 0].isfinite().all(), "the tap that looks back meets no infinity but beyond the edge"


@pytest.mark.filterwarnings("error:divide by zero")
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("size", [(1, 5), (5, 1)], ids=str)
def test_a_class_without_pixels(size: tuple[int, int], groups: int, kernels: str) -> None:
    """Of one row with a padding of 1 and a stride of 2, all pixels meet tap 1, and none the others."""
    window = Window((2, 2), (1, 1), groups)
    w, dx = tensor((8, 8 // groups, 3, 3), torch.float32, kernels, True), torch.full((1, 8, *size), torch.nan)
    dy, dx = tensor((1, 8, *window.output_size(*size)), torch.float32, kernels, True), dx.to(kernels)
    backward((dy, None, w, None, dx, None, None), window)
    exact = conv3x3_backward(dy.double(), None, w.double(), None, dx.shape, window, NONE, (True, False, False))[0]
    assert exact is not None
    assert_close(dx, exact.cpu())


def test_every_second_column_is_stored_by_itself() -> None:
    """A vector of neighbours would overwrite the other class; hints do nothing in the interpreter."""
    dy, w, dx = (torch.empty(s, device="meta") for s in ((2, 16, 8, 8), (16, 16, 3, 3), (2, 16, 16, 16)))
    for stride, vec in (((1, 1), 4), ((2, 1), 4), ((1, 2), 1)):
        window = Window(stride, (1, 1))
        grad = dy.new_empty((2, 16, 16 // stride[0], 16 // stride[1]))
        tensors = (grad, None, w, None, dx, None, None)
        *_, launch = launches_of(
            ops.backward_layer, ARCHS["sm_90"], tensors, window=window, activation=NONE, tf32=False
        )
        assert launch.named["VEC_STORE"] == vec


def test_weights_beyond_32_bit_offsets_go_through_torch(
    kernels: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small_enough(15_000, 15_000)
    assert not small_enough(16_000, 16_000)
    monkeypatch.setattr(ops, "small_enough", lambda o, c: False)
    x, w = torch.randn(1, 8, 3, 3, device=kernels), torch.randn(4, 8, 3, 3, device=kernels, requires_grad=True)
    y = tribp.conv3x3(x, w)
    launched.clear()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], x.expand(4, 8, 3, 3))
    assert not launched


@pytest.mark.parametrize("size", [(2, 5, 6), (2, 6, 7), (1, 6, 6)], ids=str)
def test_a_gradient_of_another_size_reaches_no_kernel(
    size: tuple[int, int, int], kernels: str, launched: list[str]
) -> None:
    """They derive its size from the input's, and would read past its end. Only direct calls of the operator do it."""
    n, p, q = size
    x, w, dy = (torch.randn(s, device=kernels) for s in ((2, 8, 6, 6), (16, 8, 3, 3), (n, 16, p, q)))
    for needs in ([True, False, False], [False, True, False]):
        with pytest.raises(RuntimeError):
            torch.ops.tribp.conv3x3_backward(
                dy, x, w, None, list(x.shape), [1, 1], [1, 1], 1, None, 0.0, 0.0, needs, False, False
            )
    assert not launched


def test_a_descriptor_does_not_run_into_the_next_pixel(kernels: str) -> None:
    """Every second pixel is a row of two pixels' channels: 48 of them are a step and a half."""
    x, w = tensor((1, 48, 4, 4), torch.float32, kernels, True), tensor((8, 48, 3, 3), torch.float32, kernels, True)
    window = Window((2, 2), (1, 1))
    y = nan_like(tensor((1, 8, 2, 2), torch.float32, kernels, True))
    run(ops.forward_layer, (x, w, None, y), window=window, activation=NONE, tf32=False)
    assert_close(y, F.conv2d(x.double(), w.double(), None, 2, 1).cpu())
    # What it read there would meet the zeros behind the weights: only an infinity would tell.
    x = tensor((1, 48, 4, 6), torch.float32, kernels, True)
    x[..., 3] = torch.inf
    y = nan_like(tensor((1, 8, 1, 2), torch.float32, kernels, True))
    run(ops.forward_layer, (x, w, None, y), window=Window((2, 2)), activation=NONE, tf32=False)
    assert y[..., 0].isfinite().all()


# ---- heuristics


@pytest.mark.parametrize("l", [16, 48, 64, 96, 100])
def test_descriptors_step_over_whole_channels_where_others_follow(l: int) -> None:
    for j in (32, 256):
        problem = ConvProblem(
            64, 14, 14, j, l, 1, 1, 1, "bfloat16", "ieee", ARCHS["sm_90"],
            vec=8, tma=True, along=True, whole=True, wide=False, stepped=False,
        )  # fmt: skip
        s = problem.choose()
        assert not s.tma or l % s.block_l == 0
        assert problem._replace(whole=False).choose().tma


def test_boxes_cover_with_little_outside() -> None:
    for pixels in (16, 64, 128, 256):
        for n, p, q in ((1, 1, 1), (256, 56, 56), (64, 7, 7), (3, 33, 29), (1, 224, 224), (5, 1, 300), (1, 300, 1)):
            for wide in (False, True):
                box = choose_box(pixels, n, p, q, wide=wide)
                assert box[0] * box[1] * box[2] == pixels
                covered = cdiv(n, box[0]) * cdiv(p, box[1]) * cdiv(q, box[2]) * pixels
                assert covered < 2 * n * p * q + 2 * pixels
    assert choose_box(128, 256, 56, 56, wide=False) == (16, 1, 8)  # 56 = 7·8: nothing lies outside
    assert choose_box(128, 256, 7, 7, wide=False) == (128, 1, 1)


def test_splits_cover_the_boxes_exactly() -> None:
    for n, p, q in ((1, 3, 3), (64, 56, 56), (256, 7, 7), (3, 33, 29)):
        for o, c in ((64, 64), (512, 512), (16, 8)):
            for spare in (0, 1 << 40):
                s = ConvWgradProblem(
                    n, p, q, o, c, 1, 1, "bfloat16", "ieee", ARCHS["sm_90"], vec=8, tma=True, spare=spare
                ).choose()
                boxes = s.boxes(n, p, q)
                each = cdiv(boxes, s.splits)
                assert each * (s.splits - 1) < boxes <= each * s.splits


@pytest.mark.parametrize(("groups", "c", "o"), [(1, 3, 5), (2, 64, 64), (32, 4, 4), (3, 8, 16), (5, 1, 3), (100, 1, 2)])
def test_bundles_fill_a_tile_and_no_more(groups: int, c: int, o: int) -> None:
    for columns in (32, 64):
        groups_per_tile = choose_groups_per_tile(groups, c, o, columns)
        assert groups_per_tile & (groups_per_tile - 1) == 0
        assert groups_per_tile == 1 or groups_per_tile * max(c, o) <= columns
    assert groups_per_tile < 2 * groups
