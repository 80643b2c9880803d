"""`python -m bench run conv`: what is measured and checked, and that a wrong convolution gets no time."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tribp
from bench import conv3x3 as conv
from bench import results
from bench.conv3x3 import ConvCase, pairs
from bench.operation import DifferentiableWorkload, Operation, Target, Work

from .test_run import run_with, smoke, with_provider

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIRECTIONS = ("forward", "dgrad", "wgrad", "both")
CPU = torch.device("cpu")


def convolution(tribps: Callable[..., Tensor] | None = None) -> Operation:
    """The operation, tribp's provider replaced if one is given."""
    return with_provider("conv", tribps)


@pytest.mark.usefixtures("interpreter")
def test_smoke_walks_through_all_kernels_and_directions(tmp_path: Path, launched: list[str]) -> None:
    operation = convolution()
    status, rows = smoke(operation, tmp_path)
    assert status == 0
    expected = [(case.name, direction) for case in operation.smoke_cases for direction in DIRECTIONS]
    assert [(row["case"], row["direction"]) for row in rows] == expected
    for row in rows:
        assert row["providers"]["tribp"]["status"] == "ok"
        assert row["providers"]["compile"]["status"] == "skipped"
        assert row["floor_us"] > 0
        assert {target["verdict"] for target in row["targets"]} <= {"unmeasured"}, "a CPU's clock meets no target"
        assert row["settings"]
    assert results.table(operation, rows).count("\n| ") == len(rows)
    assert set(launched) == {
        "forward", "dgrad", "wgrad", "few_channels_forward", "few_channels_dgrad", "few_channels_wgrad",
        "depthwise_forward", "depthwise_dgrad", "depthwise_wgrad", "relayout", "pack", "spread_weight",
    }  # fmt: skip
    text = " ".join(setting for row in rows for setting in row["settings"])
    assert all(word in text for word in ("box", "step2×2", "groups_per_tile", "channels_last", "sigmoid", "src_pixels"))


CASE = "2x16-16x4x4 bfloat16 NHWC bias"
EXACT = "1x8-8x3x5:2 float32 NHWC bias"


def wrong_bias(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
    """Right forward, and a bias gradient that is off."""
    shift = 0.1 * b - 0.1 * b.detach()
    return conv.eager(x, w, b, **options) + shift[:, None, None]


def wrong_weight(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
    return conv.eager(x, w.detach() + 1.1 * (w - w.detach()), b, **options)


def wrong_input(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
    return conv.eager(x.detach() + 1.1 * (x - x.detach()), w, b, **options)


def without_padding(*tensors: Tensor, **options: Any) -> Tensor:
    inner = conv.eager(*tensors, **options | {"padding": 0})
    return F.pad(inner, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("provider", "directions"),
    [
        (wrong_bias, {"wgrad", "both"}),
        (wrong_weight, {"wgrad", "both"}),
        (wrong_input, {"dgrad", "both"}),
        (without_padding, {"forward", "dgrad", "wgrad", "both"}),
    ],
)
def test_a_wrong_result_is_called_wrong_and_gets_no_time(
    provider: Callable[..., Tensor], directions: set[str], tmp_path: Path
) -> None:
    status, rows = smoke(convolution(provider), tmp_path, CASE)
    assert status == 1
    assert {row["direction"] for row in rows if row["providers"]["tribp"]["status"] == "wrong"} == directions
    assert all(("device_us" in row["providers"]["tribp"]) == (row["direction"] not in directions) for row in rows)


def test_a_wrong_image_of_many_is_noticed(tmp_path: Path) -> None:
    def last_image_off(*tensors: Tensor, **options: Any) -> Tensor:
        y = conv.eager(*tensors, **options)
        return torch.cat([y[:-1], y[-1:] * 1.1])

    status, rows = smoke(convolution(last_image_off), tmp_path, CASE)
    assert status == 1
    assert all(row["providers"]["tribp"]["status"] == "wrong" for row in rows)


def test_precision_and_cudnns_benchmark_hold_while_measuring_and_are_given_back(tmp_path: Path) -> None:
    """torch's default for convolutions is TF32: a float32 case must switch it off."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.benchmark
    seen: list[tuple[str, bool, bool, bool]] = []

    def recording(*tensors: Tensor, **options: Any) -> Tensor:
        allowed = tribp.dispatch.tf32_allowed(convolution=True), tribp.dispatch.tf32_allowed()
        seen.append((cudnn.conv.fp32_precision, *allowed, cudnn.benchmark))
        return conv.eager(*tensors, **options)

    only = dataclasses.replace(convolution(recording), directions=("forward",))
    cudnn.conv.fp32_precision, cudnn.benchmark = "tf32", False
    try:
        smoke(only, tmp_path, EXACT)
        assert set(seen) == {("ieee", False, False, True)}
        assert (cudnn.conv.fp32_precision, cudnn.benchmark) == ("tf32", False)
        seen.clear()
        cudnn.conv.fp32_precision = "ieee"
        smoke(only, tmp_path, "1x8-16x3x6/2 float32 tf32 NHWC")
        assert set(seen) == {("tf32", True, True, True)}
        assert cudnn.conv.fp32_precision == "ieee"
    finally:
        cudnn.conv.fp32_precision, cudnn.benchmark = before


@pytest.mark.gpu
def test_run_on_a_gpu(tmp_path: Path) -> None:
    cases = ["3x5-7x33x29", "64x384-384x56x56:384 bfloat16 NHWC bias", "64x128-256x28x28/2 bfloat16 NCHW bias"]
    assert run_with(convolution(), case=cases, compile=False, out=tmp_path) == 0


# -- cases ------------------------------------------------------------------------------------------------------------


def test_cases_are_told_apart_by_their_names() -> None:
    names = [case.name for case in convolution().cases]
    assert len(set(names)) == len(names)
    assert names[0] == "256x1-32x28x28 bfloat16 NHWC bias"
    assert {"64x384-384x56x56:384 float32 tf32 NHWC bias", "64x128-256x28x28/2 bfloat16 NHWC bias sigmoid"} <= set(
        names
    )
    for case in convolution().cases:
        dtype = tribp.dispatch.dtype_name(case.dtype)
        assert case.name.split()[1] == dtype, "`bench static --dtype` reads the second word"


def test_what_memory_bounds_is_judged_by_bytes_over_the_copys_rate() -> None:
    case = ConvCase((64, 384, 384, 56, 56), BF16, groups=384)
    operation, work = convolution(), convolution().work(case, "forward")
    for time, verdict in ((1.24, "met"), (1.26, "missed")):
        entries = {"tribp": {"device_us": {"median": time * 1e6 * work.bytes / 2e12}}}
        # The products' rate is so low that operations set the floor: the copy's share must not depend on it.
        row = results.row(operation, case, "forward", entries, 2e12, 1e9)
        assert row["bound_by"] == "operations"
        judged = {target["target"]: target for target in row["targets"]}
        assert judged["≥ 80% of copy"]["verdict"] == verdict
        assert judged["≥ 80% of copy"]["ratio"] == pytest.approx(1 / time)
        assert judged["≥ 2.00x eager"]["verdict"] == "unmeasured"
    unmeasured = results.judge(Target("copy", 0.8, "bandwidth"), {"providers": {}, "copy_fraction": None})
    assert (unmeasured["ratio"], unmeasured["verdict"]) == (None, "unmeasured")


# -- the work model, by hand ------------------------------------------------------------------------------------------


def test_taps_outside_the_image_are_no_work() -> None:
    # Rows 0 … 3: taps −1 and 4 lie outside, each of one row.
    assert pairs(4, 1) == 4 * 3 - 2
    assert pairs(1, 1) == 1
    # Stride 2 of 5 rows: around 0, 2 and 4; of 4 rows: around 0 and 2, whose last tap is row 3.
    assert pairs(5, 2) == 2 + 3 + 2
    assert pairs(4, 2) == 2 + 3


def test_work_counts_every_tensor_once() -> None:
    operation = convolution()
    case = ConvCase((2, 6, 4, 4, 5), FP16)
    x, w, b, y, product = 2 * 6 * 20, 4 * 6 * 9, 4, 2 * 4 * 20, 2 * (2 * 4 * 6) * (10 * 13)
    assert operation.work(case, "forward") == Work(2 * (x + w + b + y), product)
    assert operation.work(case, "dgrad") == Work(2 * (y + w + x), product)
    assert operation.work(case, "wgrad") == Work(2 * (y + x + w + b), product)
    assert operation.work(case, "both") == Work(2 * ((x + w + b + y) + (y + x + w) + (x + w + b)), 3 * product)

    narrow = ConvCase((2, 6, 4, 4, 5), FP32, stride=2, groups=2, bias=False, activation="sigmoid")
    w, y, product = 4 * 3 * 9, 2 * 4 * 2 * 3, 2 * (2 * 4 * 3) * (5 * 7)
    assert operation.work(narrow, "forward") == Work(4 * (x + w + y), product)
    assert operation.work(narrow, "dgrad") == Work(4 * (y + y + w + x), product), "the derivative takes the output"
    assert operation.work(narrow, "wgrad") == Work(4 * (y + y + x + w), product)
    assert operation.work(narrow, "both") == Work(4 * ((x + w + y) + (2 * y + x + w) + (x + w)), 3 * product)


# -- the workload -----------------------------------------------------------------------------------------------------


def workload(case: ConvCase) -> DifferentiableWorkload:
    return conv.workload(case, CPU)


@pytest.mark.parametrize("last", [True, False])
def test_tensors_lie_as_the_case_says(last: bool) -> None:
    case = ConvCase((2, 4, 6, 5, 7), FP32, last=last, stride=2, bias=False)
    asked = workload(case)
    function = conv.eager
    tensors = [asked.arguments["input"], asked.arguments["weight"], asked.output_grad]
    tensors += asked.results(function, "both").values()
    assert [tuple(t.shape) for t in tensors[:3]] == list(case.sizes)
    assert case.sizes[-1] == (2, 6, 3, 4)
    for tensor in tensors:
        assert tensor.is_contiguous(memory_format=torch.channels_last) == last
        assert tensor.is_contiguous() == (not last)


def test_directions_want_the_gradients_they_say() -> None:
    for bias, direction in itertools.product((True, False), DIRECTIONS):
        asked = workload(ConvCase((1, 2, 3, 4, 4), FP32, bias=bias, activation="sigmoid"))
        of_weight = {"weight.grad", "bias.grad"} if bias else {"weight.grad"}
        needs: list[list[bool]] = []

        def recording(*tensors: Tensor, **options: Any) -> Tensor:
            needs.append([t.requires_grad for t in tensors])  # noqa: B023
            return conv.eager(*tensors, **options)

        assert (
            set(asked.results(recording, direction))
            == {
                "forward": {"output"},
                "dgrad": {"input.grad"},
                "wgrad": of_weight,
                "both": {"output", "input.grad", *of_weight},
            }[direction]
        )
        frozen = {"dgrad": [True, False, False], "wgrad": [False, True, True]}.get(direction, [True] * 3)
        assert needs == [frozen[: 2 + bias]]
        action = asked.action(conv.eager, direction)
        action.call()
        action.call()  # the graph is kept


def test_results_are_checked_against_float64_in_parts_as_in_one() -> None:
    """The largest outputs take more memory in float64, with all that a gradient keeps, than a GPU may have."""
    for activation in ("sigmoid", None):
        whole = workload(ConvCase((5, 3, 64, 6, 5), FP32, activation=activation))
        assert whole.rows is not None
        assert whole.rows >= 5
        one = whole.reference
        assert set(one) == {"output", "input.grad", "weight.grad", "bias.grad"}
        parts = dataclasses.replace(whole, rows=2).reference
        for name, exact in one.items():
            assert exact.value.dtype == torch.float64
            torch.testing.assert_close(parts[name].value, exact.value, rtol=1e-12, atol=1e-12)
            assert parts[name].scale == pytest.approx(exact.scale, rel=0.5)
        x, w, b = (value.double() for value in whole.arguments.values())
        y = F.conv2d(x, w, b, padding=1)
        y = torch.sigmoid(y) if activation else y
        torch.testing.assert_close(one["output"].value, y)
        dz = whole.output_grad.double() * (y * (1 - y) if activation else 1)
        torch.testing.assert_close(one["bias.grad"].value, dz.sum((0, 2, 3)))


def test_a_bias_gradient_that_cancels_is_measured_by_its_terms() -> None:
    asked = workload(ConvCase((1, 2, 64, 4, 4), FP32))
    dy = asked.output_grad - asked.output_grad.mean((0, 2, 3), keepdim=True)
    found = dataclasses.replace(asked, output_grad=dy).reference["bias.grad"]
    assert float(found.value.norm()) < 1e-5
    assert found.scale == pytest.approx(float(dy.double().norm()), rel=0.3)


def test_the_largest_case_is_taken_in_parts_that_fit() -> None:
    case = ConvCase((256, 3, 64, 224, 224), BF16)
    images = conv.images_at_a_time(case)
    assert 1 <= images * (64 + 3) * 224**2 * 8 <= 1 << 30
    assert conv.images_at_a_time(ConvCase((1, 1, 1, 1 << 14, 1 << 14), BF16)) == 1


def test_a_case_that_does_not_fit_leaves_the_others_theirs(tmp_path: Path) -> None:
    def too_large(case: ConvCase, device: torch.device) -> DifferentiableWorkload:
        if case.stride == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return conv.workload(case, device)

    operation = dataclasses.replace(convolution(conv.eager), workload=too_large)
    status, rows = smoke(operation, tmp_path, "1x8-16x3x6/2", CASE)
    assert status == 1
    for row in rows:
        entry = row["providers"]["tribp"]
        assert (entry["status"] == "ok") == (row["case"] == CASE)
        if row["case"] != CASE:
            assert "more memory than the device has" in entry["note"]
