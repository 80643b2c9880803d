"""States in 8 bits and parameters in 24 in a training: what else takes part in it, and what happens to tensors."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tribp
import tribp.optim
from tribp.optim import SGD, Adam, AdamW, RMSprop, codes

from .cases import Options, genuine, transposed, values

pytestmark = pytest.mark.usefixtures("one_thread")

BITS: Options = {"state_bits": 8, "master_bits": 24, "seed": 3}
SHAPES = ((5, 40), (70,), (), (0, 3))
types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Run:
    """A training; two that are given the same agree to the bit."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, kind: Any = Adam, **options: Any) -> None:
        self.params = [values(shape, dtype, 1, i).to(device) for i, shape in enumerate(SHAPES)]
        self.optimizer = kind(self.params, **{"lr": 0.01, **BITS, **options})

    def give(self, step: int, scale: float = 1.0) -> None:
        for i, p in enumerate(self.params):
            p.grad = values(p.shape, p.dtype, 10 + step, i).to(p.device) * scale

    def step(self, *steps: int) -> "Run":
        for step in steps:
            self.give(step)
            self.optimizer.step()
        return self

    @property
    def states(self) -> list[dict[str, Tensor]]:
        return [dict(self.optimizer.state[p]) for p in self.params]

    def same(self, other: "Run") -> None:
        for p, q, mine, theirs in zip(self.params, other.params, self.states, other.states, strict=True):
            assert torch.equal(p, q)
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert value.dtype == theirs[key].dtype
                assert torch.equal(value, theirs[key]), key


def weights(run: Run) -> list[Tensor]:
    """With all their bits."""
    return [
        codes.join(p, state[codes.RESIDUAL]) if codes.RESIDUAL in state else p.clone()
        for p, state in zip(run.params, run.states, strict=True)
    ]


# ---- options


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False}], ids=str
)
def test_torchs_switches_change_nothing(options: Options, device: str) -> None:
    Run(device, **options).step(0, 1, 2).same(Run(device).step(0, 1, 2))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_differentiable_is_refused(name: str, device: str) -> None:
    p = torch.ones(3, requires_grad=True, device=device)
    p.grad = torch.ones_like(p)
    optimizer = getattr(tribp.optim, name)([p], lr=0.1, state_bits=8, differentiable=True)
    with pytest.raises(RuntimeError, match="state_bits can't be combined with differentiable=True"):
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_a_variance_needs_every_bit(noise: float, momentum: float, device: str) -> None:
    """v − ḡ² of codes was 0 as often as not, and an update 10⁷ times that of float32."""
    params = [torch.zeros(64, device=device) for _ in range(2)]
    size = values((64,), torch.float32, 1).abs() + 0.1
    own: Options = dict(lr=1e-3, alpha=0.9, centered=True, momentum=momentum)
    optimizers = [RMSprop(params[:1], state_bits=8, **own), RMSprop(params[1:], **own)]
    for step in range(12):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = (size * (1 + noise * values((64,), torch.float32, 2 + step))).to(device)
            optimizer.step()
    state = optimizers[0].state[params[0]]
    assert state["square_avg"].dtype == state["grad_avg"].dtype == torch.float32
    assert ("momentum_buffer" in state) == (momentum > 0) == any(t.dtype == torch.int8 for t in state.values())
    # With μ each step is off by a code of the buffer, 1.6 % of the largest, and 1/(1 − μ) steps add up.
    allowed = 2 * 12 * 0.016 * float((params[1] / 12).abs().max()) / (1 - momentum) if momentum else 1e-6
    assert_close(params[0], params[1], rtol=1e-5, atol=allowed)


@pytest.mark.parametrize("first", [True, False])
def test_each_group_rounds_as_it_says(first: bool, device: str) -> None:
    """Also where all have random numbers, for their codes: an update of 2⁻¹² is lost to nearest, and not at random."""
    params = [torch.ones(64, dtype=torch.bfloat16, device=device) for _ in range(2)]
    groups = [{"params": [p], "stochastic_rounding": on} for p, on in zip(params, (first, not first), strict=True)]
    optimizer = SGD(groups, lr=2.0**-12, momentum=0.5, state_bits=8)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    stochastic, nearest = params if first else params[::-1]
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert len(stochastic.unique()) > 1


def test_groups_with_and_without(device: str) -> None:
    """Of one optimizer, the second one added later: as two optimizers, but for the random numbers' stream."""
    run = Run(device, state_bits=None, master_bits=None).step(0)
    late = [values((70,), torch.bfloat16, 5).to(device)]
    run.optimizer.add_param_group({"params": late, **BITS})
    run.params += late
    run.step(1, 2)
    alone = Run(device, state_bits=None, master_bits=None).step(0, 1, 2)
    for p, q in zip(run.params, alone.params, strict=False):
        assert torch.equal(p, q)
    assert "exp_avg_scale" not in run.optimizer.state[run.params[0]]
    state = run.optimizer.state[late[0]]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype, state["residual"].dtype, float(state["step"])) == (
        torch.int8, torch.uint8, torch.int8, 2.0,
    )  # fmt: skip


# ---- what takes part


@types
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool, dtype: torch.dtype, device: str) -> None:
    """A power of two divides exactly; a step with an infinity changes nothing, not even random numbers."""
    if device == "cuda" and dtype == torch.bfloat16:
        pytest.skip("torch has no GradScaler for bfloat16 on CUDA")
    scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=1000)
    run = Run(device, dtype, fused=fused)
    for step, infinite in ((0, True), (0, False), (1, False), (2, True), (2, False)):
        scale = float(scaler.scale(torch.ones((), device=device)))
        run.give(step, scale)
        if infinite:
            assert run.params[1].grad is not None
            run.params[1].grad[3] = torch.inf
        before = [p.clone() for p in run.params], copy.deepcopy(run.states)
        scaler.step(run.optimizer)
        scaler.update()
        if infinite:
            for p, q in zip(run.params, before[0], strict=True):
                assert torch.equal(p, q)
            for state, old in zip(run.states, before[1], strict=True):
                for key, value in old.items():
                    assert torch.equal(state[key], value), key
    plain = Run(device, dtype, fused=fused)
    if fused:  # a kernel that unscales is compiled for itself: on a GPU it contracts others of its products and sums
        plain.optimizer.grad_scale = torch.ones((), device=device)
        plain.optimizer.found_inf = torch.zeros((), device=device)
    run.same(plain.step(0, 1, 2))


def test_a_square_below_float32_is_not_0(device: str) -> None:
    """Of float64: √v of 0 beside a momentum that is not would make the update infinite."""
    p = torch.ones(32, dtype=torch.float64, device=device)
    optimizer = Adam([p], lr=1e-3, eps=0.0, state_bits=8)
    for small in (1e-24, 0.0):
        p.grad = torch.full_like(p, small)
        p.grad[:4] = 1e-3
        optimizer.step()
    assert ((1 - p).abs() <= 2.1e-3).all()


@types
def test_averages_of_parameters_with_all_their_bits(dtype: torch.dtype, device: str) -> None:
    """They swap in and out, and training goes on as if nothing was."""
    run = Run(device, dtype, AdamW, ema_decay=0.75, max_grad_norm=0.5)
    averages: list[Tensor] = []
    for step in range(3):
        run.step(step)
        averages = (
            [a.lerp(w, 0.25) for a, w in zip(averages, weights(run), strict=True)] if step else weights(run)
        )  # fmt: skip
    for average, state in zip(averages, run.states, strict=True):
        assert_close(state["ema"], average, rtol=1e-6, atol=1e-7)
    full = weights(run)
    with run.optimizer.swap_ema():
        for p, average in zip(run.params, averages, strict=True):
            assert_close(p, average.to(dtype), rtol=float(torch.finfo(dtype).eps), atol=1e-7)
    for w, back in zip(full, weights(run), strict=True):
        assert torch.equal(w, back)
    run.step(3).same(Run(device, dtype, AdamW, ema_decay=0.75, max_grad_norm=0.5).step(0, 1, 2, 3))


def test_learning_rates_from_a_scheduler(device: str) -> None:
    run, twin = Run(device), Run(device)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=0.1, total_steps=6)
    for step in range(4):
        for name in ("lr", "betas"):
            twin.optimizer.param_groups[0][name] = run.optimizer.param_groups[0][name]
        run.step(step)
        twin.step(step)
        scheduler.step()
    run.same(twin)


def test_patched_torch(device: str) -> None:
    with tribp.optim.patch():
        run = Run(device, kind=torch.optim.Adam).step(0, 1)
    run.same(Run(device).step(0, 1))


@types
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on(copied: Callable[[Run], Run], dtype: torch.dtype, device: str) -> None:
    run = Run(device, dtype).step(0, 1)
    other = copied(run)
    other.step(2)
    run.step(2).same(other)
    assert all(p is not q for p, q in zip(run.params, other.params, strict=True))


# ---- what happens to tensors


def test_states_that_move(device: str) -> None:
    """Codes, scales and residuals get other memory, which no tensor tells: all of them are looked at."""
    run = Run(device, torch.bfloat16).step(0)
    for key in list(run.states[0]):
        for state in run.states:
            if key != "step":
                old = state[key].data
                state[key].data = old.clone()
                old.fill_(99)
        run.step(1)
        del state
    steps = [0] + [1] * len(run.states[0])
    run.same(Run(device, torch.bfloat16).step(*steps))


def test_shared_memory() -> None:
    run = Run("cpu", torch.bfloat16).step(0)
    for p, state in zip(run.params, run.states, strict=True):
        for t in (p, *state.values()):
            t.share_memory_()
    run.step(1, 2).same(Run("cpu", torch.bfloat16).step(0, 1, 2))


def test_another_type_and_back(device: str) -> None:
    """The codes stay; a residual is of the parameter that it was the rest of, and of no other."""
    run = Run(device, torch.bfloat16).step(0, 1)
    moments = [codes.decoded(state, "exp_avg") for state in run.states]
    for p in run.params:
        p.data = p.data.float()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in run.params]
    run.step(2)
    for p, old, state, moment in zip(run.params, before, run.states, moments, strict=True):
        assert torch.equal(p, old)
        assert codes.RESIDUAL not in state
        found = codes.decoded(state, "exp_avg")
        assert p.grad is not None
        exact = 0.9 * moment + 0.1 * p.grad
        code = 4 * exact.abs().max() / 254 if p.numel() else torch.zeros(())
        assert_close(found, exact, rtol=0, atol=float(code))
    for p in run.params:
        p.data = p.data.bfloat16()
    rounded = [p.clone() for p in run.params]
    run.step(3)
    for w, p in zip(weights(run), rounded, strict=True):
        assert torch.equal(w, p.float())
    assert [float(state["step"]) for state in run.states] == [4.0] * 4


def test_another_layout(device: str) -> None:
    """… keeps 24 bits and the moments, and the kernel."""
    run = Run(device, torch.bfloat16, SGD, momentum=0.9).step(0, 1)
    full, moment = weights(run), codes.decoded(run.states[0], "momentum_buffer")
    run.params[0].data = transposed(run.params[0].data)
    for group in run.optimizer.param_groups:
        group["lr"], group["momentum"] = 0.0, 1.0
    for p in run.params:
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    for w, old in zip(weights(run), full, strict=True):
        assert torch.equal(w, old)
    state = run.states[0]
    assert state["residual"].stride() == state["momentum_buffer"].stride() == run.params[0].stride()
    found = codes.decoded(state, "momentum_buffer")
    assert_close(found, moment, rtol=0, atol=1.5 * 4 / 254 * float(moment.abs().max()))
    assert {type(bucket).__name__ for bucket in run.optimizer._plan.buckets} == {
        "TritonBucket" if tribp.dispatch.backend_of(run.params[0]) == "triton" else "ReferenceBucket"
    }


def test_a_moment_that_somebody_set(device: str) -> None:
    """Numbers become codes with the next step, or, where codes are off, stay what they are without a scale."""
    run = Run(device, kind=SGD, momentum=0.5, lr=0.0).step(0)
    new = values((5, 40), torch.float32, 77).to(device)
    run.optimizer.state[run.params[0]]["momentum_buffer"] = new.clone()
    assert torch.equal(run.optimizer.state_dict()["state"][0]["momentum_buffer"], new)
    for p in run.params:
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    state = run.states[0]
    assert state["momentum_buffer"].dtype == torch.int8
    code = 4 / 254 * float(new.abs().max())
    assert_close(codes.decoded(state, "momentum_buffer"), 0.5 * new, rtol=0, atol=0.75 * code)
    run.optimizer.state[run.params[0]]["momentum_buffer"] = new.clone()
    run.optimizer.param_groups[0]["state_bits"] = None
    run.optimizer.step()
    assert_close(run.states[0]["momentum_buffer"], 0.5 * new, rtol=1e-6, atol=0)
    assert "momentum_buffer_scale" not in run.states[0]


def test_frozen_empty_listed_twice(device: str) -> None:
    p, frozen, empty = torch.ones(70, device=device), torch.ones(5, device=device), torch.ones(0, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a list with duplicates
        optimizer = SGD([p, frozen, empty, p], lr=0.25, momentum=0.5, **BITS)
    for _ in range(2):
        p.grad, empty.grad = torch.ones_like(p), torch.ones_like(empty)
        optimizer.step()
    # b = 1, 1.5, 1.75, 1.875: all of a block alike, so that every one is its largest.
    assert_close(p, torch.full_like(p, 1 - 0.25 * (1 + 1.5 + 1.75 + 1.875)))
    assert torch.equal(frozen, torch.ones_like(frozen))
    assert not optimizer.state.get(frozen)
    assert optimizer.state[empty]["momentum_buffer"].dtype == torch.int8
    assert optimizer.state[empty]["momentum_buffer_scale"].shape == (0,)


def test_parameters_that_share_memory(device: str) -> None:
    """One after the other, as torch's loop: what both hold moves twice."""
    whole = torch.ones(100, device=device)
    optimizer = SGD([whole[:64], whole[32:]], lr=0.25, momentum=0.5, **BITS)
    for _ in range(2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    once = torch.full((32,), 1 - 0.25 * 2.5, device=device)
    assert_close(whole, torch.cat([once, 2 * once - 1, torch.full((36,), 1 - 0.25 * 2.5, device=device)]))


# ---- checkpoints


@pytest.mark.parametrize("compressed", [False, True])
def test_a_checkpoint_of_another_layout(compressed: bool, device: str) -> None:
    """The numbers are the elements', wherever they lie; their blocks are others."""
    run, other = Run(device).step(0, 1), Run(device)
    other.params[0].data = transposed(run.params[0].data)
    other.optimizer.load_state_dict(run.optimizer.state_dict(compressed=compressed))
    numbers = run.optimizer.state_dict()["state"][0]
    assert torch.equal(other.optimizer.state_dict()["state"][0]["exp_avg"], numbers["exp_avg"])
    other.step(2)
    assert other.states[0]["exp_avg"].stride() == (1, 5)
    assert_close(other.params[0], run.step(2).params[0], rtol=0, atol=0.05 * 0.01)  # of a step of about 0.01
    exact = 0.9 * numbers["exp_avg"] + 0.1 * values((5, 40), torch.float32, 12, 0).to(device)
    code = 4 / 254 * float(torch.maximum(exact.abs().max(), numbers["exp_avg"].abs().max()))
    assert_close(codes.decoded(other.states[0], "exp_avg"), exact, rtol=0, atol=1.5 * code)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_checkpoint_of_another_shape(compressed: bool, device: str) -> None:
    run, other = Run(device).step(0), Run(device)
    other.params[1].data = other.params[1].data[:60].clone()
    other.optimizer.load_state_dict(run.optimizer.state_dict(compressed=compressed))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 of group 0 must have the parameter's shape, \(60,\)"):
        other.step(1)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_checkpoint_says_which_of_two_options_holds(compressed: bool, device: str) -> None:
    """A type for the states and bits for their codes exclude each other, and cut no scale."""
    eight, sixteen = Run(device).step(0), Run(device, state_bits=None, state_dtype=torch.bfloat16).step(0)
    cases: list[tuple[Run, Options, int | None, torch.dtype]] = [
        (eight, {"state_bits": None, "state_dtype": torch.bfloat16}, 8, torch.int8),
        (sixteen, {}, None, torch.bfloat16),
        (Run(device, state_bits=None).step(0), {}, 8, torch.int8),
    ]
    for saved, options, bits, kind in cases:
        other = Run(device, **options)
        other.optimizer.load_state_dict(saved.optimizer.state_dict(compressed=compressed))
        for p, q in zip(other.params, saved.params, strict=True):
            p.copy_(q)
        group = other.optimizer.param_groups[0]
        assert group.get("state_bits") == bits
        assert not (group.get("state_bits") and group.get("state_dtype"))
        other.step(1)
        assert other.states[0]["exp_avg"].dtype == kind
        if saved.optimizer.param_groups[0].get("state_bits") == bits:
            saved.step(1).same(other)


def test_a_residual_that_torchs_class_has_had(device: str) -> None:
    """torch casts it to the parameter's type, which holds it exactly."""
    run = Run(device, torch.bfloat16, SGD).step(0, 1)
    theirs = genuine("SGD", [p.clone() for p in run.params], lr=0.01)
    theirs.load_state_dict(run.optimizer.state_dict())
    assert theirs.state_dict()["state"][0]["residual"].dtype == torch.bfloat16
    back = Run(device, torch.bfloat16, SGD)
    for p, q in zip(back.params, run.params, strict=True):
        p.copy_(q)
    back.optimizer.load_state_dict(theirs.state_dict())
    run.step(2).same(back.step(2))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", [{}, {"state_dtype": torch.bfloat16}], ids=str)
def test_a_checkpoint_whose_bits_are_taken_out(
    compressed: bool, dtype: torch.dtype, option: Options, device: str
) -> None:
    """Its codes have their scales as they were, whatever type states are to have."""
    run, other = Run(device, dtype).step(0), Run(device, dtype, state_bits=None, **option)
    saved = run.optimizer.state_dict(compressed=compressed)
    saved["param_groups"][0]["state_bits"] = None
    other.optimizer.load_state_dict(saved)
    other.step(1)
    exact = 0.9 * codes.decoded(run.states[1], "exp_avg") + 0.1 * values((70,), dtype, 11, 1).to(device)
    assert other.states[1]["exp_avg"].dtype == option.get("state_dtype", dtype)
    assert_close(other.states[1]["exp_avg"].double(), exact.double(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_an_average_that_torchs_class_has_had(dtype: torch.dtype, wide: torch.dtype, device: str) -> None:
    """In float32 again, at least: in the parameter's type it would not move."""
    run = Run(device, dtype, ema_decay=0.99).step(0, 1)
    theirs = genuine("Adam", [p.clone() for p in run.params], lr=0.01)
    theirs.load_state_dict(run.optimizer.state_dict())
    run.optimizer.load_state_dict(theirs.state_dict())
    run.step(2)
    assert run.states[0]["ema"].dtype == wide


# ---- what else may happen


@pytest.mark.parametrize("what", ["layout", "on", "off"])
def test_a_buffer_that_was_not_used_yet(what: str, device: str) -> None:
    """The first step is skipped, and then the buffer gets another form: the next one is still the first."""
    p = torch.ones(4, 40, device=device)
    bits = None if what == "on" else 8
    optimizer: Any = SGD([p], lr=0.0, momentum=0.9, dampening=0.9, fused=True, state_bits=bits)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    optimizer.found_inf = torch.zeros((), device=device)
    if what == "layout":
        p.data = transposed(p.data)
    else:
        optimizer.param_groups[0]["state_bits"] = 8 if what == "on" else None
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert_close(optimizer.state_dict()["state"][0]["momentum_buffer"], p.grad)


@pytest.mark.parametrize(
    ("of", "dtype", "options", "later"),
    [
        ("AdamW", torch.bfloat16, {}, {"master_bits": 24}),
        ("AdamW", torch.float32, {}, {"ema_decay": 0.9}),
        ("AdamW", torch.bfloat16, {"master_bits": 24}, {}),
        ("AdamW", torch.float32, {"state_bits": 8, "ema_decay": 0.9}, {}),
        ("RMSprop", torch.float32, {"centered": True}, {"state_bits": 8, "momentum": 0.9}),
    ],
)
def test_a_checkpoint_of_another_layout_keeps_the_kernel(
    of: str, dtype: torch.dtype, options: Options, later: Options, device: str
) -> None:
    """Also where states of the checkpoint's layout meet new ones, or codes."""
    kind = getattr(tribp.optim, of)
    runs = []
    for lie in (lambda x: x.clone(), transposed):
        p = values((5, 40), dtype, 1).to(device)
        first = kind([p], lr=0.01, **options)
        p.grad = values((5, 40), dtype, 2).to(device)
        first.step()
        q = lie(p)
        optimizer = kind([q], lr=0.01, **options, **later)
        optimizer.load_state_dict(first.state_dict())
        optimizer.param_groups[0].update(later)
        q.grad = lie(values((5, 40), dtype, 3).to(device))
        optimizer.step()
        runs.append(q)
        assert "TritonBucket" in str(optimizer._plan.buckets) or tribp.dispatch.backend_of(p) != "triton"
    assert_close(*runs, rtol=0, atol=0.01 * 0.05)


@pytest.mark.parametrize("of", ["NAdam", "RAdam", "Adamax"])
def test_bits_that_a_group_was_given_later(of: str, device: str) -> None:
    """… by an edit or a checkpoint are refused as the constructor refuses them, and not taken for others."""
    p = torch.ones(40, device=device)
    p.grad = torch.ones_like(p)
    optimizer = getattr(tribp.optim, of)([p], lr=0.1)
    optimizer.param_groups[0]["state_bits"] = 8
    with pytest.raises(TypeError, match=f"{of} keeps no states in 8 bits"):
        optimizer.step()
    for bits, message in (({"state_bits": 4}, "8 or None, got 4"), ({"master_bits": 16}, "24 or None, got 16")):
        wrong = Adam([p], lr=0.1)
        wrong.param_groups[0].update(bits)
        with pytest.raises(ValueError, match=message):
            wrong.step()
    both = Adam([p], lr=0.1, state_dtype=torch.bfloat16)
    both.param_groups[0]["state_bits"] = 8
    with pytest.raises(ValueError, match="exclude each other"):
        both.step()
    assert torch.equal(p, torch.ones_like(p))


def test_a_gradient_that_is_a_negative_view(device: str) -> None:
    """As `imag` of a conjugate is: its memory holds the other sign."""
    runs = [Run(device).step(0), Run(device).step(0)]
    for run, lazy in zip(runs, (False, True), strict=True):
        run.give(1)
        for p in run.params:
            if lazy:
                p.grad = torch._neg_view(-p.grad)  # type: ignore[operator]
        run.optimizer.step()
    runs[0].same(runs[1])


@pytest.mark.parametrize("negative", [False, True])
def test_a_gradient_that_is_a_conjugate_view(negative: bool, device: str) -> None:
    """Of complex parameters, whose numbers are read from memory: there they have the other imaginary part."""
    g = torch.randn(40, dtype=torch.complex64, device=device)
    results: list[Tensor] = []
    for lazy in (False, True):
        p = torch.ones_like(g)
        optimizer = Adam([p], lr=0.1, max_grad_norm=1.0)
        p.grad = torch.conj((-g if lazy and negative else g).conj().resolve_conj()) if lazy else g.clone()
        if lazy and negative:
            p.grad = torch._neg_view(p.grad)
        optimizer.step()
        results.append(p)
    assert torch.equal(*results)
