"""`tribp.conv3x3`'s arguments, precision settings and errors, and the module around it."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tribp
from tribp.ops.conv3x3.checks import cached_window

from ..oracle import TF32_TOLERANCE, assert_close
from .cases import Case
from .cases import ieee as ieee

pytestmark = pytest.mark.usefixtures("ieee", "one_thread")


# ---- options


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        (dict(stride=2), ((2, 2), (0, 0))),
        (dict(stride=[2, 1], padding=[0, 3]), ((2, 1), (0, 3))),
        (dict(stride=(1,), padding=(2,)), ((1, 1), (2, 2))),
        (dict(padding="same"), ((1, 1), (1, 1))),
        (dict(stride=(1, 2), padding="valid"), ((1, 2), (0, 0))),
        (dict(stride=torch.Size([2, 2]), padding=5, dilation=(1, 1)), ((2, 2), (5, 5))),
    ],
    ids=str,
)
def test_ways_to_write_options(given: dict[str, Any], pairs: tuple[tuple[int, int], tuple[int, int]]) -> None:
    x, w = torch.randn(1, 2, 4, 6), torch.randn(3, 2, 3, 3)
    stride, padding = pairs
    assert torch.equal(tribp.conv3x3(x, w, **given), F.conv2d(x, w, None, stride, padding))
    module = tribp.nn.Conv3x3(2, 3, **given)
    assert (module.stride, module.padding) == pairs


def test_options_by_position() -> None:
    x, w, b = torch.randn(1, 2, 4, 6), torch.randn(4, 1, 3, 3), torch.randn(4)
    expected = torch.sigmoid(F.conv2d(x, w, b, (2, 1), (1, 0), 1, 2))
    assert torch.equal(tribp.conv3x3(x, w, b, (2, 1), (1, 0), 2, "sigmoid"), expected)


# ---- precision settings

CONV = torch.backends.cudnn.conv  # type: ignore[attr-defined]


@pytest.fixture
def precision_restored() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    holders: list[Any] = [torch.backends, cudnn, cudnn.rnn, CONV]
    before = [holder.fp32_precision for holder in holders]
    yield
    for holder, value in zip(holders, before, strict=True):
        holder.fp32_precision = value


WAYS_TO_SET = {
    "old": lambda allowed: setattr(torch.backends.cudnn, "allow_tf32", allowed),
    "new": lambda allowed: setattr(CONV, "fp32_precision", "tf32" if allowed else "ieee"),
    "cudnn": lambda allowed: setattr(torch.backends.cudnn, "fp32_precision", "tf32" if allowed else "ieee"),
    "everywhere": lambda allowed: setattr(torch.backends, "fp32_precision", "tf32" if allowed else "ieee"),
}


@pytest.mark.parametrize("way", WAYS_TO_SET)
@pytest.mark.usefixtures("precision_restored")
def test_tf32_setting_is_read_whichever_way_it_is_set(way: str) -> None:
    from tribp import dispatch

    if way in ("cudnn", "everywhere"):
        CONV.fp32_precision = "none"  # a setting of its own goes before those of all
    products = dispatch.tf32_allowed()
    for allowed in (True, False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WAYS_TO_SET[way](allowed)
        assert dispatch.tf32_allowed(convolution=True) == allowed
        assert way not in ("old", "new") or dispatch.tf32_allowed() == products, "products have a setting of their own"


@pytest.mark.usefixtures("precision_restored")
def test_what_the_kernels_are_told_of_tf32(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tribp.ops.conv3x3 import plan

    told = []
    for function in ("forward", "backward"):
        original = getattr(plan, function)

        def record(*buffers: Any, original: Any = original, **facts: Any) -> Any:
            told.append(facts["tf32"])
            return original(*buffers, **facts)

        monkeypatch.setattr(plan, function, record)
    x, w, _ = Case((1, 2, 3, 3), 2).make(torch.float32, kernels)
    for precision in ("ieee", "tf32"):
        CONV.fp32_precision = precision
        tribp.conv3x3(x, w.requires_grad_()).sum().backward()
    assert told == [False, False, True, True]


@pytest.mark.gpu
@pytest.mark.usefixtures("precision_restored")
def test_tf32_is_used_exactly_where_allowed(kernels: str) -> None:
    for case in (Case((8, 64, 28, 28), 128, padding=(1, 1)), Case((8, 3, 28, 28), 64, padding=(1, 1))):
        x, w, b = (t.requires_grad_() for t in case.make(torch.float32, kernels) if t is not None)
        exact = case.exact(x, w, b)
        dy = torch.randn_like(case.theirs(x, w, b))
        dx, dw, _, _ = exact.gradients(dy, dy)
        for precision in ("ieee", "tf32"):
            CONV.fp32_precision = precision
            y = case.ours(x, w, b)
            found = (y, *torch.autograd.grad(y, (x, w), dy))
            for result, value in zip(found, (exact.y, dx, dw), strict=True):
                assert_close(result, value, tolerance=TF32_TOLERANCE if precision == "tf32" else None)
        with pytest.raises(AssertionError):
            assert_close(y, exact.y)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    case = Case((1, 8, 3, 4), 4, padding=(1, 1), activation="sigmoid")
    x, w, b = (t.requires_grad_() for t in case.make(torch.float32, device) if t is not None)
    with torch.autocast(torch.device(device).type, dtype):
        y, theirs = case.ours(x, w, b), case.theirs(x, w, b)
    assert y.dtype == theirs.dtype == dtype
    assert_close(y, case.exact(*(t.to(dtype) for t in (x, w, b))).y, theirs)
    dy = torch.randn_like(y)
    found, expected = (torch.autograd.grad(v, (x, w, b), dy) for v in (y, theirs))
    for ours, torchs in zip(found, expected, strict=True):
        assert ours.dtype == torchs.dtype == torch.float32
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2)


def test_autocast_joins_types_but_leaves_float64_alone(device: str) -> None:
    case = Case((1, 2, 3, 3), 2)
    x, w, b = (t for t in case.make(torch.float64, device) if t is not None)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert tribp.conv3x3(x, w, b).dtype == torch.float64
        assert tribp.conv3x3(x.float(), w.bfloat16(), b.float()).dtype == torch.bfloat16


def test_backward_under_autocast_keeps_float32(device: str) -> None:
    case = Case((1, 8, 3, 3), 4, padding=(1, 1))
    x, w, _ = case.make(torch.float32, device)
    y = case.ours(x, w.requires_grad_())
    dy = torch.randn_like(y)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        (dw,) = torch.autograd.grad(y, w, dy)
    assert_close(dw, case.exact(x, w).gradients(dy, y)[1])


# ---- errors: one line that names the argument, what was given and what is needed

X, W = torch.ones(2, 4, 5, 6), torch.ones(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, ["input", "(N, C, H, W)", "(C, H, W)", "(5, 6)"], dict(input=X[0, 0])),
        (ValueError, ["input", "(1, 2, 4, 5, 6)"], dict(input=X[None])),
        (ValueError, ["input", "3 high and wide", "channels of 2 x 6", "(0, 1)"],
         dict(input=X[:, :, :2], padding=(0, 1))),
        (ValueError, ["input", "4 channels of 5 x 2"], dict(input=X[0, ..., :2])),
        (ValueError, ["input", "4 channels of 0 x 6", "(2, 2)"], dict(input=X[:, :, :0], padding=2)),
        (ValueError, ["input", "0 channels"], dict(input=X[:, :0], weight=W[:, :0])),
        (ValueError, ["weight", "(out_channels, in_channels / groups, 3, 3)", "(6, 4, 5, 5)", "torch.nn.Conv2d"],
         dict(weight=torch.ones(6, 4, 5, 5))),
        (ValueError, ["weight", "(6, 4, 1, 3)", "torch.nn.Conv2d"], dict(weight=W[:, :, :1])),
        (ValueError, ["weight", "(out_channels, 4, 3, 3)", "(2, 4, 5, 6)", "(6, 3, 3, 3)"], dict(weight=W[:, :3])),
        (ValueError, ["weight", "(out_channels, 2, 3, 3)", "groups=2", "(6, 4, 3, 3)"], dict(groups=2)),
        (ValueError, ["weight", "(4, 3, 3)"], dict(weight=W[0])),
        (ValueError, ["groups", "4 channels", "got 3"], dict(groups=3)),
        (ValueError, ["groups", "6 out_channels", "got 4"], dict(weight=W[:, :1], groups=4)),
        (ValueError, ["0 out_channels"], dict(weight=W[:0])),
        (ValueError, ["groups", "at least 1", "got 0"], dict(groups=0)),
        (ValueError, ["bias", "(6,)", "(1,)"], dict(bias=torch.ones(1))),
        (ValueError, ["bias", "(6,)", "(6, 1)"], dict(bias=torch.ones(6, 1))),
        (ValueError, ["stride", "1 or 2", "got 3", "torch.nn.Conv2d"], dict(stride=3)),
        (ValueError, ["stride must be at least 1, got 0"], dict(stride=0)),
        (ValueError, ["stride must be at least 1, got (0, 1)"], dict(stride=(0, 1))),
        (ValueError, ["stride must be at least 1, got (3, -2)"], dict(stride=(3, -2))),
        (TypeError, ["stride", "(1, 1, 1)"], dict(stride=(1, 1, 1))),
        (TypeError, ["stride", "1.0"], dict(stride=1.0)),
        (TypeError, ["stride", "True"], dict(stride=True)),
        (TypeError, ["stride", "array([1, 2])"], dict(stride=np.array([1, 2]))),
        *((TypeError, ["groups must be a whole number", repr(groups)], dict(groups=groups))
          for groups in (1.0, True, False, None, (1,), np.array([1, 2]), torch.tensor(1))),
        (ValueError, ["padding", "at least 0", "(0, -1)"], dict(padding=(0, -1))),
        (ValueError, ["padding", "'same', 'valid'", "'full'"], dict(padding="full")),
        (ValueError, ["padding='same'", "stride 1", "(1, 2)"], dict(padding="same", stride=(1, 2))),
        (TypeError, ["padding", "1.5"], dict(padding=(1, 1.5))),
        (TypeError, ["padding", "None"], dict(padding=None)),
        (ValueError, ["dilation", "must be 1", "got 2", "torch.nn.Conv2d"], dict(dilation=2)),
        (ValueError, ["dilation", "(1, 2)", "torch.nn.Conv2d"], dict(dilation=(1, 2))),
        (ValueError, ["activation", "None, one of 'sigmoid'", "'gelu'"], dict(activation="gelu")),
        (TypeError, ["weight", "float32", "float64"], dict(weight=W.double())),
        (TypeError, ["bias", "float32", "bfloat16"], dict(bias=torch.ones(6).bfloat16())),
        (TypeError, ["input", "int64", "float16, bfloat16, float32 or float64"], dict(input=X.long(), weight=W.long())),
        (TypeError, ["input", "complex64"], dict(input=X.to(torch.complex64))),
        (TypeError, ["input", "list"], dict(input=[[1.0]])),
        (TypeError, ["weight", "NoneType"], dict(weight=None)),
        (TypeError, ["bias", "float"], dict(bias=1.0)),
        (ValueError, ["weight", "cpu", "meta"], dict(weight=W.to("meta"))),
        (ValueError, ["bias", "cpu", "meta"], dict(bias=torch.ones(6, device="meta"))),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_errors(error: type[Exception], words: list[str], arguments: dict[str, Any]) -> None:
    tribp.conv3x3(X, W)  # what was taken once, of stride 1, does not speak for what equals it, as True does
    with pytest.raises(error) as caught:
        tribp.conv3x3(**{"input": X, "weight": W, **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("conv3x3: ")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", ["stride", "padding", "groups", "dilation"])
def test_whole_numbers_of_numpys(name: str, device: str) -> None:
    numpy = pytest.importorskip("numpy")
    x, w = X.to(device), W.to(device)
    cached_window.cache_clear()  # which takes them for Python's, once it knows those
    usual: dict[str, Any] = {name: 1}
    for n in (numpy.int64(1), numpy.int8(1)):
        given: dict[str, Any] = {name: n}
        assert torch.equal(tribp.conv3x3(x, w, **given), tribp.conv3x3(x, w, **usual))
        assert repr(tribp.nn.Conv3x3(2, 2, **given)) == repr(tribp.nn.Conv3x3(2, 2, **usual))


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["in_channels", "multiple of groups (4)", "got 6"], dict(in_channels=6, groups=4)),
        (["out_channels", "multiple of groups (3)", "got 4"], dict(in_channels=6, groups=3)),
        (["in_channels must be at least 1, got 0"], dict(in_channels=0)),
        (["out_channels must be at least 1, got -4"], dict(out_channels=-4)),
        (["stride", "1 or 2", "torch.nn.Conv2d"], dict(stride=4)),
        (["stride must be at least 1, got 0"], dict(stride=0)),
        (["dilation", "torch.nn.Conv2d"], dict(dilation=2)),
        (["padding", "-1"], dict(padding=-1)),
        (["groups", "0"], dict(groups=0)),
        (["activation", "'gelu'"], dict(activation="gelu")),
        (["padding_mode", "zeros, reflect, replicate, circular", "'constant'"], dict(padding_mode="constant")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_of_the_module(words: list[str], arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Conv3x3: [^\n]*$") as caught:
        tribp.nn.Conv3x3(**{"in_channels": 4, "out_channels": 4, **arguments})
    for word in words:
        assert word in str(caught.value), str(caught.value)
    with pytest.raises(TypeError, match=r"^Conv3x3: out_channels must be a whole number, got 4\.0$"):
        tribp.nn.Conv3x3(4, 4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Conv3x3: padding must be a whole number or a pair of them, got array"):
        tribp.nn.Conv3x3(4, 4, padding=np.array([1, 1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Conv3x3: bias must be True or False, got 'relu'; an activation goes into"):
        tribp.nn.Conv3x3(4, 4, 1, 0, 1, "relu")  # type: ignore[arg-type]


# ---- the module

OPTIONS: list[dict[str, Any]] = [
    dict(),
    dict(stride=2, padding=1, bias=False),
    dict(stride=(1, 2), padding=(3, 0), groups=2),
    dict(padding="same", groups=4),
    *(dict(padding=(1, 2), padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_module_is_interchangeable_with_conv2d(options: dict[str, Any], device: str) -> None:
    torch.manual_seed(3)
    theirs = nn.Conv2d(4, 8, 3, device=device, dtype=torch.float64, **options)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = tribp.nn.Conv3x3(4, 8, device=device, dtype=torch.float64, **options)
    assert torch.equal(torch.rand(1), after), "the same random numbers are drawn"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for value, torchs in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, torchs)
    with torch.no_grad():
        ours.weight.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 4, 4, 3, device=device, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    ours.load_state_dict(nn.Conv2d(4, 8, 3, **options).state_dict())


def test_module_with_sigmoid(device: str) -> None:
    ours = tribp.nn.Conv3x3(3, 4, padding=1, activation="sigmoid", device=device)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, device=device), nn.Sigmoid())
    theirs[0].load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 3, 4, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    for module in (ours, theirs):
        module(x).square().sum().backward()
    for parameter, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torchs.grad)


def test_module_in_channels_last(device: str) -> None:
    """`module.to(memory_format=…)` and the gradients that its parameters then get."""
    ours = tribp.nn.Conv3x3(3, 4, padding=1, device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert ours.weight.is_contiguous(memory_format=torch.channels_last)
    y = ours(torch.randn(2, 3, 3, 4, device=device))
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert ours.weight.grad.stride() == ours.weight.stride()


def test_module_repr() -> None:
    assert repr(tribp.nn.Conv3x3(4, 8)) == "Conv3x3(4, 8, stride=(1, 1), bias=True)"
    module = tribp.nn.Conv3x3(4, 8, 2, 1, 4, False, "sigmoid", "reflect")
    assert repr(module) == (
        "Conv3x3(4, 8, stride=(2, 2), padding=(1, 1), groups=4, activation=sigmoid, padding_mode=reflect, bias=False)"
    )


def test_module_on_meta_device() -> None:
    layer = tribp.nn.Conv3x3(3, 2, device="meta")
    assert layer(torch.ones(4, 3, 5, 6, device="meta")).shape == (4, 2, 3, 4)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.ones(4, 3, 5, 6))).all()
