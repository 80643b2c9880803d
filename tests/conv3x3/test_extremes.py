"""What is extreme for `tribp.conv3x3`: infinities and NaN, and on a GPU sizes that fill it or leave int32."""

import pytest
import torch
from torch import Tensor

import tribp
from tribp import dispatch

from ..covering import DTYPES, cover, name, turn
from ..oracle import assert_close
from .cases import Case, Layout, contiguous, grad_of, last
from .cases import ieee as ieee

pytestmark = pytest.mark.usefixtures("ieee", "one_thread")

EXTREMES = {
    "small": Case((1, 3, 4, 5), 5, padding=(1, 1)),
    "strided small": Case((1, 3, 6, 5), 5, (2, 2), (1, 1)),
    "dense": Case((1, 8, 4, 5), 10, padding=(1, 1)),
    "strided": Case((1, 8, 6, 7), 10, (2, 2), (1, 1)),
    "groups": Case((1, 8, 4, 5), 12, padding=(1, 1), groups=4),
    "strided groups": Case((1, 9, 6, 6), 6, (2, 2), (1, 1), groups=3),
    "depthwise": Case((1, 6, 4, 5), 6, padding=(1, 1), groups=6),
    "multiplied depthwise": Case((1, 3, 7, 6), 6, (2, 2), (1, 1), groups=3),
}


PIXELS = [(2, 3), (0, 0), (-1, -1), (-1, 2)]


def bad_case(way: str, at: tuple[int, int], device: str) -> tuple[Case, float, list[Tensor]]:
    """A convolution, and an infinity or NaN, each type and value having its turn.

    The fallback's in 32 and 64 bits: with AVX-512's or AMX's bfloat16 torch multiplies pairs of pixels, and an
    infinity in one reaches a tap that meets only the zero beside it.
    """
    case = EXTREMES[way]
    types = [torch.float32, torch.float64] if dispatch.backend() == "torch" else DTYPES
    bad = turn([torch.inf, -torch.inf, torch.nan], at, way)
    return case, bad, [t for t in case.make(turn(types, way, at), device) if t is not None]


def assert_same(result: Tensor, exact: Tensor) -> None:
    tolerance = 8 * torch.finfo(result.dtype).eps
    wrong = int((result.isfinite().cpu() != exact.isfinite()).sum())
    assert not wrong, f"{wrong} of {exact.numel()} are finite where they must not be, or the other way round"
    torch.testing.assert_close(result.double().cpu(), exact, rtol=tolerance, atol=tolerance * 4, equal_nan=True)


every_way = pytest.mark.parametrize(
    ("way", "at"), cover(EXTREMES, PIXELS, quick=lambda way, at: at == turn([PIXELS[0], PIXELS[2]], way))
)


@every_way
@pytest.mark.filterwarnings("ignore:.*encountered in")  # numpy's, of the interpreter
def test_one_bad_pixel_reaches_the_outputs_and_taps_that_see_it(way: str, at: tuple[int, int], device: str) -> None:
    """Neither another group, nor an output whose window ends beside it, nor a tap that never meets it."""
    case, bad, (x, w, b) = bad_case(way, at, device)
    x[-1, turn([0, case.size[1] - 1, 2], way, at), at[0], at[1]] = bad
    y = case.ours(x, w.requires_grad_(), b)
    exact = case.exact(x, w, b)
    assert_same(y, exact.y)
    dy = grad_of(case, x, w)
    (dw,) = torch.autograd.grad(y, w, dy)
    assert_same(dw, exact.gradients(dy, y)[1])


@every_way
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_one_bad_gradient_reaches_what_it_saw(way: str, at: tuple[int, int], device: str) -> None:
    case, bad, inputs = bad_case(way, at, device)
    y = case.ours(*(t.requires_grad_() for t in inputs))
    dy = torch.randn_like(y)
    spot = (1, 1) if at == PIXELS[0] else at
    dy[-1, turn([0, case.out - 1, 4], way, at), spot[0], spot[1]] = bad
    dx, dw, db = torch.autograd.grad(y, inputs, dy)
    exact_dx, exact_dw, exact_db, _ = case.exact(*inputs).gradients(dy, y)
    assert_same(dx, exact_dx)
    assert_same(db, exact_db)
    # At the rim an infinity meets zeros beside the image, which torch multiplies or leaves out as it likes.
    clear = exact_db.isfinite() | (spot == (1, 1))
    assert_same(dw[clear.to(device)], exact_dw[clear])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("way", ["groups", "strided groups", "depthwise", "multiplied depthwise"])
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_one_bad_weight_stays_in_its_group(way: str, bad: float, device: str) -> None:
    case = EXTREMES[way]
    x, w, b = (t for t in case.make(torch.float32, device) if t is not None)
    per_group = case.out // case.groups
    w[per_group, 0, 1, 1] = bad  # the second group's first
    y = case.ours(x.requires_grad_(), w, b)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    finite = [t.isfinite().transpose(0, 1).flatten(1).all(1).unflatten(0, (case.groups, -1)).all(1) for t in (y, dx)]
    expected = torch.arange(case.groups, device=device) != 1
    assert torch.equal(finite[0], expected)
    assert torch.equal(finite[1], expected)


@pytest.mark.parametrize(
    ("groups", "dtype"), cover([1, 8], DTYPES, quick=lambda groups, dtype: dtype == DTYPES[groups % 4])
)
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_saturated_sigmoid(groups: int, dtype: torch.dtype, device: str) -> None:
    """Infinities and NaN end up where torch's sigmoid has them. The window's middle alone sees a 1×1 image."""
    z = torch.tensor([-torch.inf, -200.0, -90.0, -80.0, -20.0, 0.0, 20.0, 90.0, 200.0, torch.inf, torch.nan]).to(dtype)
    x = z.to(device)[:, None, None, None].expand(-1, groups, 1, 1)
    w = torch.zeros(8, 1, 3, 3, dtype=dtype, device=device)
    w[:, :, 1, 1] = 1
    y = tribp.conv3x3(x, w, None, 1, 1, groups, "sigmoid").cpu()
    limits = torch.finfo(dtype)
    smallest = max(limits.tiny, 1.2e-38 if dtype != torch.float64 else 0)
    expected = torch.sigmoid(z.double())[:, None].expand(-1, 8)
    torch.testing.assert_close(y[..., 0, 0].double(), expected, rtol=4 * limits.eps, atol=smallest, equal_nan=True)


# ---- what only a GPU can show: the rules' own settings, as they are chosen on this machine

FILLING = {
    "dense": Case((16, 128, 30, 29), 192, padding=(1, 1), activation="sigmoid"),
    "large": Case((32, 256, 28, 28), 256, padding=(1, 1)),
    "odd": Case((9, 77, 41, 37), 85, padding=(2, 0), bias=False),
    "strided": Case((16, 128, 29, 30), 256, (2, 2), (1, 1)),
    "strided across": Case((8, 64, 33, 64), 64, (1, 2), (1, 1), activation="sigmoid"),
    "few pixels": Case((4, 512, 7, 7), 512, padding=(1, 1)),
    "few columns": Case((8, 256, 56, 56), 10, padding=(1, 1), activation="sigmoid"),
    "many pixels": Case((2, 16, 300, 310), 16, padding=(1, 1)),
    "stem": Case((16, 3, 112, 110), 64, (2, 2), (1, 1), activation="sigmoid"),
    "digits": Case((512, 1, 28, 28), 32, padding=(1, 1), activation="sigmoid"),
    "seven": Case((32, 7, 32, 32), 40, padding=(1, 1)),
    "bundles": Case((16, 128, 28, 28), 128, padding=(1, 1), groups=32, activation="sigmoid"),
    "odd bundles": Case((16, 33, 28, 28), 55, (2, 2), (1, 1), groups=11),
    "large groups": Case((16, 256, 28, 28), 128, padding=(1, 1), groups=4),
    "depthwise": Case((32, 192, 28, 28), 192, padding=(1, 1), groups=192, activation="sigmoid"),
    "strided depthwise": Case((16, 99, 57, 56), 99, (2, 2), (1, 1), groups=99),
    "multiplied depthwise": Case((16, 48, 28, 28), 96, padding=(1, 1), groups=48),
}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [contiguous, last], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FILLING)
def test_shapes_that_fill_a_gpu(shape: str, dtype: torch.dtype, layout: Layout, kernels: str) -> None:
    """Two runs alike to the bit; float64 for the first and the last image, and for the first and the last channels."""
    case = FILLING[shape]
    x, w, b = case.make(dtype, kernels)
    inputs = [t.requires_grad_() for t in (layout(x), w, b) if t is not None]
    dy = layout(torch.randn_like(case.theirs(x, w)))
    runs = []
    for _ in range(2):
        y = case.ours(*inputs)
        runs.append([y, *torch.autograd.grad(y, inputs, dy)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second), "two runs differ"
    y, dx, dw, *db = runs[0]
    theirs = case.theirs(*inputs)
    # What torch makes of the same y: its own is rounded elsewhere.
    dz = torch.ops.aten.sigmoid_backward(dy, y) if case.activation else dy
    plain = case._replace(activation=None).theirs(*inputs)
    their_dx, their_dw, *their_db = torch.autograd.grad(plain, inputs, dz)

    x, w = inputs[:2]
    for n in (slice(0, 1), slice(case.size[0] - 1, None)):
        exact = case.exact(x[n], w, b)
        assert_close(y[n], exact.y, theirs[n])
        assert_close(dx[n], exact.gradients(dy[n], y[n])[0], their_dx[n])
    per_group = case.size[1] // case.groups
    few = min(3, case.out // case.groups)
    for o, c in (
        (slice(0, few), slice(0, per_group)),
        (slice(case.out - few, None), slice(case.size[1] - per_group, None)),
    ):
        _, exact_dw, exact_db, terms = case._replace(groups=1).exact(x[:, c], w[o]).gradients(dy[:, o], y[:, o])
        assert_close(dw[o], exact_dw, their_dw[o])
        if db:
            # Not beside torch's float32 sum, which is a cascade. Ours is rounded with every box: by 2⁻²³/√12 of the
            # sum so far, on average and at most; of the 784 boxes of "large" that makes 7e-7 of the terms.
            torchs = None if dtype == torch.float32 else their_db[0][o]
            assert_close(db[0][o], exact_db, torchs, scale=terms)


HUGE = {
    "many images": Case((8200, 64, 64, 64), 8),
    "one image": Case((1, 16, 11600, 11600), 8),
    "large output": Case((8200, 8, 66, 66), 64),
    "strided": Case((8200, 64, 64, 64), 16, (2, 2)),
    "image": Case((1, 3, 26800, 26800), 8, (2, 2)),
    "many colour images": Case((2700, 3, 520, 520), 4, (2, 2)),
    "groups": Case((8200, 64, 64, 64), 32, groups=16),
    "depthwise": Case((8200, 64, 64, 64), 64, groups=64),
}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [contiguous, last], ids=name)
@pytest.mark.parametrize("shape", HUGE)
def test_more_than_2_to_the_31_elements(shape: str, layout: Layout, kernels: str) -> None:
    """The last corner of the last image, which lies behind element 2³¹, and the gradients of it."""
    case = HUGE[shape]
    _, c, h, wide = case.size
    (sh, sw), at = case.stride, torch.channels_last if layout is last else torch.contiguous_format
    x = torch.empty(case.size, dtype=torch.float16, device=kernels, memory_format=at).normal_().requires_grad_()
    _, w, _ = case._replace(size=(1, c, 3, 3)).make(torch.float16, kernels)
    y = case.ours(x, w.requires_grad_(), None)
    assert max(x.numel(), y.numel()) > 1 << 31
    # Output pixels at the end of the last image, and the input pixels that they see.
    p, q = y.shape[2] - 6, y.shape[3] - 5
    corner = x[-1:, :, p * sh :, q * sw :]
    corner = corner[..., : 5 * sh + 3, : 4 * sw + 3]
    exact = case.exact(corner, w)
    assert_close(y[-1:, :, p:, q:], exact.y)
    dy = torch.zeros_like(y)
    dy[-1:, :, p:, q:].normal_()
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    exact_dx, exact_dw, _, _ = exact.gradients(dy[-1:, :, p:, q:], y[-1:, :, p:, q:])
    assert_close(dx[-1:, :, p * sh :, q * sw :][..., : 5 * sh + 3, : 4 * sw + 3], exact_dx)
    assert_close(dw, exact_dw)
    assert not dx[0, :, : min(h, p * sh), : min(wide, q * sw)].any()
