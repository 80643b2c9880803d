"""States in 8 bits and parameters in 24: how far off they are, where they live, and that they train as well."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tribp
import tribp.optim
from tribp.optim import SGD, Adam, AdamW, RMSprop, codes, reference

from .cases import LAYOUTS, NUMBERS, Options, genuine, ours, plain, transposed, values
from .checkpoint_cases import through_file

pytestmark = pytest.mark.usefixtures("one_thread")

# Of each class the options with most codes.
CLASSES: dict[str, Options] = {
    "SGD": {"momentum": 0.9, "nesterov": True}, "Momentum": {}, "RMSprop": {"momentum": 0.9},
    "Adagrad": {"initial_accumulator_value": 0.2}, "Adam": {"amsgrad": True}, "AdamW": {},
}  # fmt: skip
BITS: Options = {"state_bits": 8, "master_bits": 24}
each_class = pytest.mark.parametrize("name", CLASSES)


def coded(x: Tensor, dtype: torch.dtype, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    found = torch.empty_like(x, dtype=dtype)
    scale = torch.empty(-(-x.numel() // codes.BLOCK))
    codes.encode(x, found, scale, random)
    return found, scale


def every_half(largest: float) -> Tensor:
    """A block a row: every float16 number of at most this size, and beside them the largest itself."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    halves = halves[halves.abs() <= largest]
    halves = torch.nn.functional.pad(halves, (0, -len(halves) % 31)).view(-1, 31)
    return torch.cat([halves, torch.full((len(halves), 1), largest)], 1)


@pytest.mark.parametrize("largest", [65504.0, 1.0, 0.75, 2.0**-14, 2.0**-24])
def test_a_signed_state_is_off_by_half_a_code(largest: float) -> None:
    """x = s·q/(254 − |q|) has the slope (s + |x|)²/(254·s): finest at 0, twice as fine as 127 equal steps."""
    x = every_half(largest)
    q, scale = coded(x, torch.int8)
    assert torch.equal(scale, torch.full_like(scale, largest))
    found = codes.decode(q, scale).double()
    x = x.double()
    farther = torch.maximum(x.abs(), found.abs())  # the slope grows between them
    assert ((found - x).abs() <= 0.5 * (largest + farther) ** 2 / (254 * largest) * (1 + 1e-6)).all()
    assert (found.sign() * x.sign() >= 0).all()
    assert torch.equal(found[:, 31], x[:, 31])


@pytest.mark.parametrize("largest", [65504.0, 1.0, 2.0**-14, 2.0**-24])
def test_a_square_is_off_by_half_a_code_of_its_root(largest: float) -> None:
    """And is never 0: a moment beside it is divided by its root."""
    v = every_half(largest).abs()
    q, scale = coded(v, torch.uint8)
    found = codes.decode(q, scale).double()
    v = v.double()
    off = (found.sqrt() - v.sqrt()).abs() / largest**0.5
    least = v.sqrt() < 0.5 / 255 * largest**0.5
    rounding = 1 + 2e-4  # of 255·√v in float32, against half a code
    assert (off[~least] <= 0.5 / 255 * rounding).all()
    assert (off[least] <= 1 / 255 * rounding).all()
    assert torch.equal(found == 0, v == 0)
    assert torch.equal(found[:, 31], v[:, 31])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_every_code_comes_back(dtype: torch.dtype) -> None:
    """What was decoded is encoded as it was: a checkpoint of float32 numbers loses nothing."""
    least = -127 if dtype == torch.int8 else 0
    largest = torch.iinfo(dtype).max
    some = torch.arange(least, largest + 1).view(-1, 1).repeat(1, 31)
    q = torch.cat([some, torch.full((len(some), 1), largest)], 1).to(dtype)
    for size in (codes.SMALLEST, 1e-9, 0.3, 7e20):
        scale = torch.full((len(q),), size)
        again, scale_again = coded(codes.decode(q, scale), dtype)
        assert torch.equal(scale_again, scale)
        assert torch.equal(again, q)


def test_no_code_is_beyond_the_last() -> None:
    """x/s is rounded, of some sizes up, and random bits of 0 round down."""
    x = -torch.logspace(-30, 30, 256)[:, None].repeat(1, 32)
    q, _ = coded(x, torch.int8, torch.zeros_like(x, dtype=torch.int64))
    assert (q == -127).all()


def test_what_has_no_code() -> None:
    x = torch.zeros(4, 32)
    x[1, 3], x[2, 4], x[3, 5] = torch.nan, -torch.inf, 1e-42
    for dtype in (torch.int8, torch.uint8):
        found = codes.decode(*coded(x.abs() if dtype == torch.uint8 else x, dtype))
        assert torch.equal(found[0], x[0])
        assert found[1:3].isnan().all(), "a block that holds an infinity or NaN is NaN"
        # Beside the smallest scale it is next to nothing, but no square is 0.
        assert_close(found[3], x[3], rtol=0, atol=codes.SMALLEST / 254)
        assert (found[3, 5] > 0) == (dtype == torch.uint8)
    assert len(coded(torch.zeros(0, 3), torch.int8)[1]) == 0


def test_rounding_at_random_is_right_on_average() -> None:
    """To 4 standard deviations of the mean of as many numbers; rounding to nearest is off by 0.3 codes."""
    x = torch.full((4096, 32), 0.2)
    x[:, 31] = 1.0
    random = reference.random_bits(x, 5)
    q, _ = coded(x, torch.int8, random)
    exact, n = 254 * 0.2 / 1.2, 31 * 4096
    assert abs(float(q[:, :31].double().mean()) - exact) < 4 * 0.5 / n**0.5
    assert set(q[:, :31].unique().tolist()) == {42, 43}
    q, _ = coded(x, torch.uint8, random >> 16)
    assert abs(float(q[:, :31].double().mean()) - 255 * 0.2**0.5) < 4 * 0.5 / n**0.5


def test_random_bits_are_those_of_element_step_and_tensor() -> None:
    like = torch.empty(1 << 12)
    keys = reference.random_keys(1, 2, 3)
    bits = reference.random_bits(like, keys[0])
    others = [key for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)) for key in reference.random_keys(*other)]
    for key in (keys[1], *others):
        assert (reference.random_bits(like, key) == bits).sum() <= 1
    assert len(bits.unique()) == len(bits)
    ones = torch.stack([(bits >> k & 1).double().mean() for k in range(32)])
    assert (ones - 0.5).abs().max() < 4 * 0.5 / 64


def test_a_parameter_has_24_bits() -> None:
    """Every bfloat16 number with every 8 bits below it, and what float32 is in between."""
    high = torch.arange(1 << 16)
    high = high[(high & 0x7F80) != 0x7F80]  # finite
    for low in range(-128, 128, 5):
        bits = (high << 8) + low
        bits = bits[(bits >> 23) == (high >> 15)]  # 0 less something would be of the other sign
        x = torch.where(bits >= 1 << 23, (bits << 8) - (1 << 32), bits << 8).to(torch.int32).view(torch.float32)
        p, residual = codes.split(x, 128)
        assert torch.equal(codes.join(p, residual), x)
        off = (p.double() - x.double()).abs()[p.isfinite()]
        nearest = (x.bfloat16().double() - x.double()).abs()[p.isfinite()]
        assert torch.equal(off, nearest)
    x = values((100_000,), torch.float32, 1)
    assert ((codes.join(*codes.split(x, 128)) - x).abs() <= 2.0**-17 * 2 * x.abs()).all()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    assert torch.equal(
        codes.join(*codes.split(odd, 128)).view(torch.int32)[[0, 1, 3, 4]], odd.view(torch.int32)[[0, 1, 3, 4]]
    )
    worst = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaN: a carry would make −0 of it
    assert codes.join(*codes.split(worst, 128)).isnan().all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, torch.inf, -torch.inf])
def test_a_parameter_that_somebody_set(value: float, device: str) -> None:
    """Its residual is an old one: it moves the parameter by half a unit in the last place at most, and no infinity."""
    p = values((64,), torch.bfloat16, 1).to(device)
    optimizer = SGD([p], lr=1e-3, **BITS)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    p.fill_(value)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close(p.cpu(), torch.full_like(p, value, device="cpu"))


@each_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_kernel_and_fallback_agree(name: str, dtype: torch.dtype, kernels: str) -> None:
    """In every layout, with one optimizer for all, a group without the options, and gradients that come and go."""
    runs: list[tuple[list[Tensor], Any]] = []
    for backend in ("torch", "triton"):
        device = "cpu" if backend == "torch" else kernels
        params = [
            layout(values(shape, dtype, 1, i).to(device)) for i, (shape, layout, _) in enumerate(LAYOUTS.values())
        ]
        optimizer = ours(
            name, [{"params": params[::2]}, {"params": params[1::2], "lr": 0.01}],
            **NUMBERS[name] | CLASSES[name] | BITS | {"ema_decay": 0.9, "seed": 7},
        )  # fmt: skip
        runs.append((params, optimizer))
        for step in range(3):
            for i, (p, (shape, _, of_grad)) in enumerate(zip(params, LAYOUTS.values(), strict=True)):
                p.grad = None if (i + step) % 5 == 0 else of_grad(values(shape, dtype, 2 + step, i).to(device))
            with tribp.use_backend(backend):
                optimizer.step()
    (params, optimizer), (others, other) = runs
    differ = total = 0
    for p, q in zip(params, others, strict=True):
        a, b = optimizer.state.get(p, {}), other.state.get(q, {})
        assert list(a) == list(b)
        # A state that was codes is a float32 number, of a division that on a GPU is the fast one.
        unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert_close(q.cpu(), p, rtol=0, atol=4 * unit)
        for key in a:
            mine, theirs = a[key].cpu(), b[key].cpu()
            assert mine.dtype == theirs.dtype
            if mine.dtype in codes.CODES:
                off = (mine.int() - theirs.int()).abs()
                # 24 bits are 2⁻¹⁷ of the parameter, float32's rounding is 2⁻²⁴.
                differ, total = differ + int((off > 0).sum()), total + off.numel()
                assert off.numel() == 0 or off.max() <= 1 or key == codes.RESIDUAL
            elif key.endswith("_scale"):
                # A buffer adds terms of other signs: of three steps' roundings 12 units were seen on one processor.
                assert_close(mine, theirs, rtol=4e-6, atol=0)
    assert differ <= 0.01 * total


@each_class
def test_states_have_a_byte_a_number_and_a_scale_a_block(name: str) -> None:
    p = torch.nn.Parameter(values((1024,), torch.bfloat16, 1))
    optimizer = ours(name, [p], **NUMBERS[name] | CLASSES[name] | BITS)
    p.grad = values((1024,), torch.bfloat16, 2)
    optimizer.step()
    state = optimizer.state[p]
    moments = [key for key, t in state.items() if t.dtype in codes.CODES and key != codes.RESIDUAL]
    assert moments
    held = sum(t.nbytes for t in state.values() if t.numel() > 1)
    assert held == 1024 + len(moments) * (1024 + 4 * 32)
    if name == "AdamW":
        assert (p.nbytes + held) / 1024 == 5.25  # with a gradient of two bytes 7.25


def test_an_average_falls_as_it_should() -> None:
    """One element's gradients stop: its square falls by 0.99 a step. Rounded to nearest it would stay where it was."""
    p = torch.zeros(32, 32)
    optimizer = RMSprop([p], lr=0.0, alpha=0.99, state_bits=8)
    start = None
    for step in range(400):
        p.grad = torch.ones_like(p)
        if step >= 200:
            p.grad[:, 1:] = 0
        optimizer.step()
        if step == 199:
            start = optimizer.state_dict()["state"][0]["square_avg"]
    assert start is not None
    end = optimizer.state_dict()["state"][0]["square_avg"]
    fallen = float(end[:, 1:].mean() / start[:, 1:].mean())
    assert 0.8 < fallen / 0.99**200 < 1.3
    assert_close(end[:, 0], torch.full((32,), 1 - 0.99**400), rtol=1e-4, atol=0)  # the largest is exact


def test_small_updates_are_not_lost() -> None:
    """256 updates of a unit in the 24-bit parameter's last place are one in bfloat16's, which by itself takes none."""

    def after(steps: int, update: float, **options: Any) -> Tensor:
        p = torch.ones(256, dtype=torch.bfloat16)
        optimizer = SGD([p], lr=update, maximize=True, **options)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        residual = optimizer.state.get(p, {}).get("residual")
        return p if residual is None else codes.join(p, residual)

    assert torch.equal(after(256, 2.0**-15), torch.ones(256, dtype=torch.bfloat16))
    assert torch.equal(after(256, 2.0**-15, master_bits=24), torch.full((256,), 1 + 2.0**-7))
    assert torch.equal(after(256, 2.0**-17, master_bits=24), torch.ones(256))
    moved = after(256, 2.0**-17, master_bits=24, stochastic_rounding=True) - 1
    assert abs(float(moved.mean()) / 2.0**-9 - 1) < 0.05  # 65,536 throws of 1 in 4: 0.7 % is a standard deviation


# ---- checkpoints


def trained(kind: Any, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], Any]:
    params = [transposed(values((5, 40), dtype, 1)), values((70,), dtype, 2), values((), dtype, 3)]
    optimizer = kind(params, lr=0.01, **options)
    continued(params, optimizer, range(steps))
    return params, optimizer


def continued(params: list[Tensor], optimizer: Any, steps: Any) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = values(p.shape, p.dtype, 10 + step, i)
        optimizer.step()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_to_the_bit(compressed: bool, dtype: torch.dtype) -> None:
    params, optimizer = trained(Adam, dtype=dtype, **BITS)
    saved = through_file(optimizer.state_dict(compressed=compressed))
    moment = saved["state"][1]["exp_avg"]
    assert moment.dtype == (torch.int8 if compressed else torch.float32)
    assert ("exp_avg_scale" in saved["state"][1]) == compressed
    copies = [p.clone() for p in params]
    resumed = Adam(copies, lr=0.5)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["state_bits"] == 8
    for each, own in ((optimizer, params), (resumed, copies)):
        continued(own, each, range(3, 6))
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key]), key


def test_torchs_class_takes_the_moments_as_float32() -> None:
    params, optimizer = trained(Adam, state_bits=8)
    theirs = genuine("Adam", [p.clone() for p in params], lr=0.01)
    theirs.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        ours_, torchs = optimizer.state[p], theirs.state[q]
        assert set(torchs) == {"step", "exp_avg", "exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(torchs[key], codes.decode(ours_[key], ours_[f"{key}_scale"]))
    copies = [p.clone() for p in params]
    back = Adam(copies, lr=0.01, state_bits=8)
    back.load_state_dict(theirs.state_dict())
    for each, own in ((back, copies), (optimizer, params)):
        continued(own, each, [3])
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


def test_an_option_that_is_switched() -> None:
    """In the middle of training: nothing is lost but the last bits."""
    params, optimizer = trained(AdamW)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["state_bits"] = 8
    continued(params, optimizer, [3])
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8
    optimizer.param_groups[0]["state_bits"] = None
    continued(params, optimizer, [4])
    state = optimizer.state[params[0]]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert state["exp_avg"].dtype == torch.float32
    twins, twin = trained(AdamW)
    twin.load_state_dict({"state": before, "param_groups": twin.state_dict()["param_groups"]})
    continued(twins, twin, [3, 4])
    for p, q in zip(params, twins, strict=True):
        assert_close(p, q, rtol=0, atol=2 * 0.01 * 0.05)


def test_copies_and_layouts() -> None:
    """A copy goes on to the bit; a parameter that changes its layout takes its codes along."""
    params, optimizer = trained(Adam, **BITS)
    copied = copy.deepcopy(optimizer)
    copies = copied.param_groups[0]["params"]
    before = codes.decoded(dict(optimizer.state[params[0]]), "exp_avg")
    params[0].data = plain(params[0])
    for each, own in ((copied, copies), (optimizer, params)):
        continued(own, each, [3])
    assert optimizer.state[params[0]]["exp_avg"].stride() == params[0].stride() == (40, 1)
    assert_close(params[0], plain(copies[0]), rtol=0, atol=0.01 * 0.05)
    assert torch.equal(params[1], copies[1])
    moved = codes.decoded(dict(optimizer.state[params[0]]), "exp_avg")
    assert_close(moved, 0.9 * before + 0.1 * values((5, 40), torch.float32, 13, 0), rtol=0, atol=0.05)


# ---- what is refused


def test_what_is_refused() -> None:
    p = torch.zeros(3)
    for options, message in (
        ({"state_bits": 4}, "state_bits must be 8 or None"),
        ({"state_bits": 8.0}, r"state_bits must be 8 or None, got 8\.0"),
        ({"state_bits": True}, "state_bits must be 8 or None, got True"),
        ({"state_bits": False}, "state_bits must be 8 or None, got False"),
        ({"master_bits": 24.0}, r"master_bits must be 24 or None, got 24\.0"),
        ({"master_bits": 16}, "master_bits must be 24 or None"),
        ({"state_bits": 8, "state_dtype": torch.float32}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            Adam([p], **options)
    for name in ("Rprop", "ASGD", "NAdam", "Adamax"):
        with pytest.raises(TypeError, match="no states in 8 bits"):
            ours(name, [p], state_bits=8)
        with pytest.raises(TypeError, match="no states in 8 bits"):
            ours(name, [{"params": [p], "state_bits": 8}])
    sparse = torch.zeros(3, 2, requires_grad=True)
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2))
    with pytest.raises(RuntimeError, match="state_bits can't be combined with a sparse_coo gradient"):
        SGD([sparse], lr=0.1, momentum=0.9, state_bits=8).step()
    other = type("Other", (torch.nn.Parameter,), {})(torch.zeros(3))
    other.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="state_bits can't be combined with a Other of"):
        Adam([other], state_bits=8).step()


def test_codes_without_their_scales() -> None:
    params, optimizer = trained(Adam, state_bits=8)
    optimizer.state[params[1]]["exp_avg_scale"] = torch.ones(2)
    with pytest.raises(TypeError, match=r"exp_avg of parameter 1 of group 0 must be real.*int8"):
        continued(params, optimizer, [3])


def test_a_complex_parameter_keeps_its_moments() -> None:
    p = values((5,), torch.complex64, 1)
    q = p.clone()
    both = [Adam([p], lr=0.1, state_bits=8, master_bits=24), Adam([q], lr=0.1)]
    for optimizer in both:
        x = optimizer.param_groups[0]["params"][0]
        x.grad = values((5,), torch.complex64, 2)
        optimizer.step()
    assert torch.equal(p, q)
    assert both[0].state[p]["exp_avg"].dtype == torch.complex64


def test_a_skipped_first_step_leaves_no_buffer() -> None:
    p = torch.ones(40)
    optimizer: Any = SGD([p], lr=0.1, momentum=0.9, state_bits=8, fused=True)
    p.grad = torch.full_like(p, torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p, torch.ones(40))
    assert set(optimizer.state_dict()["state"].get(0, {})) <= {"step"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_next_to_nothing_is_no_code(dtype: torch.dtype) -> None:
    """Below 0 the least number, and random bits of 0, made −s/255 of it: 1 time in 32,768, beside a √v of 0."""
    x = torch.full((2, 32), -1e-30 if dtype == torch.int8 else 0.0)
    x[:, 31] = 1.0
    for random in (0, 0x7FFF):
        q, _ = coded(x, dtype, torch.full_like(x, random, dtype=torch.int64))
        assert (q[:, :31] == 0).all()


def test_gradients_whose_squares_vanish(device: str) -> None:
    p = torch.zeros(40 if device == "cpu" else 4, 32, device=device)
    optimizer = Adam([p], lr=1e-3, state_bits=8)
    for _ in range(40):
        p.grad = torch.full_like(p, -1e-25)
        p.grad[:, 0] = 1.0
        optimizer.step()
    assert (p[:, 1:].abs() < 1e-15).all()


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is updated in pieces where no kernel is: the same random numbers, the same bits."""
    results: list[list[Tensor]] = []
    for size in (1 << 16, 64):
        monkeypatch.setattr("tribp.optim.torch_buckets._PIECE", size)
        found: list[Tensor] = []
        rounded = {"momentum": 0.9, "stochastic_rounding": True}
        for kind, options in ((Adam, {"amsgrad": True} | BITS), (SGD, rounded | BITS), (SGD, rounded)):
            p = transposed(values((7, 67), torch.bfloat16, 1))
            optimizer = kind([p], lr=0.01, **options)
            for step in range(3):
                p.grad = transposed(values((7, 67), torch.bfloat16, 2 + step))
                optimizer.step()
            found += [p, *optimizer.state[p].values()]
        results.append(found)
    assert all(map(torch.equal, *results))
