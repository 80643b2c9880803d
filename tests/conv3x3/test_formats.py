"""The memory formats of `tribp.conv3x3`'s results: those of torch, for a compiled graph has been told of them."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import tribp

from ..covering import cover, name
from ..oracle import assert_close
from .cases import DENSE, LAYOUTS, Case, Layout, last, one_channel, sliced_last
from .cases import ieee as ieee

pytestmark = pytest.mark.usefixtures("ieee", "one_thread")

SHAPES = {
    "usual": Case((2, 3, 4, 5), 4, padding=(1, 1)),
    "one image": Case((1, 3, 4, 5), 4, padding=(1, 1), activation="sigmoid"),
    "one channel": Case((2, 1, 4, 3), 4, padding=(1, 1)),
    "one channel out": Case((2, 3, 4, 5), 1, padding=(1, 1)),
    "one of each": Case((1, 1, 3, 3), 1, padding=(1, 1)),
    "one pixel out": Case((2, 3, 3, 3), 4),
    "one image, one pixel out": Case((1, 3, 4, 4), 4, (2, 2)),
    "one number an image": Case((2, 1, 1, 1), 4, padding=(1, 1)),
    "one row": Case((2, 3, 1, 5), 4, padding=(1, 1)),
    "one column": Case((2, 3, 5, 1), 4, padding=(1, 1)),
    "depthwise": Case((2, 4, 4, 5), 4, (2, 2), (1, 1), groups=4),
    "depthwise, one image": Case((1, 4, 3, 3), 8, (1, 2), groups=4),
}


def assert_laid_out_as_torchs(case: Case, x_layout: Layout, w_layout: Layout, dtype: torch.dtype, device: str) -> None:
    x, w, _ = case.make(dtype, device)
    x, w = x_layout(x).detach().requires_grad_(), w_layout(w).detach().requires_grad_()
    y, theirs = case.ours(x, w), case.theirs(x, w)
    assert y.stride() == theirs.stride()
    dy = torch.randn(y.shape, device=device, dtype=dtype)
    dx, dw = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
    assert dx.stride() == torch.autograd.grad(theirs, x, dy)[0].stride()
    assert dw.is_contiguous() or dw.is_contiguous(memory_format=torch.channels_last)
    y.backward(dy)
    theirs_w = w.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    case.theirs(x.detach(), theirs_w, None).backward(dy)
    assert w.grad is not None
    assert theirs_w.grad is not None
    if w_layout in (DENSE[0], last):
        assert w.grad.stride() == theirs_w.grad.stride()


@pytest.mark.parametrize(
    ("shape", "x_layout", "w_layout"),
    cover(
        SHAPES, LAYOUTS, [*DENSE[:3], one_channel, sliced_last],
        quick=lambda shape, x_layout, w_layout: shape == "one of each" and w_layout == last and x_layout in DENSE[:2],
    ),
)  # fmt: skip
def test_strides_are_torchs(shape: str, x_layout: Layout, w_layout: Layout, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert_laid_out_as_torchs(SHAPES[shape], x_layout, w_layout, dtype, device)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rule_for_formats_is_torchs(shape: str) -> None:
    """Every combination of layouts, on the rule alone: what the operators, real and fake, give their results."""
    from tribp.ops.conv3x3.reference import channels_last_of

    case = SHAPES[shape]
    x, w, _ = case.make(torch.float32, "cpu")
    for x_layout, w_layout in itertools.product(LAYOUTS, [*DENSE[:3], one_channel, sliced_last]):
        a, b = x_layout(x).detach().requires_grad_(), w_layout(w)
        theirs = case.theirs(a, b)
        (dx,) = torch.autograd.grad(theirs.sum(), a)
        where = f"input {name(x_layout)}, weight {name(w_layout)}"
        last_of = channels_last_of(a, b)
        formats = {True: torch.channels_last, False: torch.contiguous_format}
        for tensor in (theirs, dx):
            dense = torch.empty(tensor.shape, memory_format=formats[last_of.input])
            assert dense.stride() == tensor.stride(), where


@pytest.mark.parametrize("layouts", list(itertools.product(DENSE[:2], repeat=2)), ids=lambda p: "-".join(map(name, p)))
def test_channels_last_in_channels_last_out(layouts: tuple[Layout, Layout], device: str) -> None:
    assert_laid_out_as_torchs(Case((2, 3, 3, 4), 4, padding=(1, 1)), *layouts, torch.float32, device)


@pytest.mark.parametrize("layouts", list(itertools.product(DENSE[:2], repeat=2)), ids=lambda p: "-".join(map(name, p)))
def test_weights_gradient_lies_as_the_weight(layouts: tuple[Layout, Layout], kernels: str) -> None:
    """As the parameter's `grad` must: torch has it in the input's format, and then copies."""
    x, w, _ = Case((2, 3, 3, 4), 4).make(torch.float32, kernels)
    w = layouts[1](w).requires_grad_()
    (dw,) = torch.autograd.grad(tribp.conv3x3(layouts[0](x), w).sum(), w)
    assert dw.stride() == w.stride()


def test_unbatched_strides_are_torchs(device: str) -> None:
    x, w = torch.randn(3, 4, 4, device=device), torch.randn(4, 3, 3, 3, device=device)
    for image in (x, x.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        for weight in (w, last(w)):
            assert tribp.conv3x3(image, weight).stride() == F.conv2d(image, weight).stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_strides_of_dimensions_of_length_one_mean_nothing(groups: int, dtype: torch.dtype) -> None:
    """torch's own convolution on the CPU reads them, and computes another gradient of the weight."""
    for size in ((1, 8, 1, 9), (1, 8, 9, 1), (2, 8, 1, 5), (1, 8, 1, 1), (1, 8, 4, 5)):
        case = Case(size, 8, padding=(1, 1), groups=groups)
        dense, w = (last(torch.randint(-2, 3, t.shape).to(dtype)) for t in case.make(dtype, "cpu")[:2])
        dy, exact = torch.randint(-2, 3, size).to(dtype), case.exact(dense, w)
        for odd in (0, 1, 7919):
            strides = [odd if length == 1 else stride for length, stride in zip(size, dense.stride(), strict=True)]
            x, v = dense.as_strided(size, strides).requires_grad_(), w.clone().requires_grad_()
            with tribp.use_backend("torch"):
                operator = torch.ops.tribp.conv3x3(x, v, None, [1, 1], [1, 1], groups, None)
                for y in (case.ours(x, v), operator):
                    found = (y, *torch.autograd.grad(y, (x, v), dy))
                    for ours, value in zip(found, (exact.y, *exact.gradients(dy, y)), strict=False):
                        assert torch.equal(ours, value.to(dtype)), (size, odd)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
@pytest.mark.parametrize(("width", "padding"), [(1, 1), (2, 1), (3, 0), (4, 0)])
def test_one_column_of_results(width: int, padding: int, activation: str | None) -> None:
    """torch's own bfloat16 convolution of stride 2 reads memory there that nobody wrote, on CPUs with AVX-512."""
    case = Case((2, 16, 17, width), 32, (1, 2), (1, padding), activation=activation)
    x, w, b = (t.requires_grad_() for t in case.make(torch.bfloat16, "cpu") if t is not None)
    dy = torch.randn(2, 32, 17, 1, dtype=torch.bfloat16)
    exact = case.exact(x, w, b)
    with tribp.use_backend("torch"):
        operator = torch.ops.tribp.conv3x3(x, w, b, [1, 2], [1, padding], 1, activation)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = case.ours(x, w, b)
            of_float32 = case.ours(*(t.float() for t in (x, w, b)))
        for y in (case.ours(x, w, b), operator, autocast, of_float32):
            assert_close(y, exact.y)
            dx, dw, db, terms = exact.gradients(dy, y)
            found = torch.autograd.grad(y, (x, w, b), dy)
            for ours, value, scale in zip(found, (dx, dw, db), (None, None, terms), strict=True):
                assert_close(ours, value, scale=scale)
