"""A GradScaler's steps, and the mistakes of torch's fused ones."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
import tribp.optim

from .cases import (
    CLASSES,
    Layout,
    Twins,
    channels_last,
    each_class,
    expanded,
    lively,
    transposed,
    values,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- GradScaler, and what torch's fused classes get wrong

FUSED = [name for name in CLASSES if name != "RMSprop"]  # those whose torch class has fused=True at all


def scaled_step(optimizer: Any, scale: float, found_inf: float) -> None:
    """What `GradScaler.step` does with an optimizer whose `_step_supports_amp_scaling` is true."""
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.grad_scale = torch.tensor(scale, device=device)
    optimizer.found_inf = torch.tensor(found_inf, device=device)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def snapshot(optimizer: Any) -> list[Tensor]:
    state_dict = optimizer.state_dict()["state"]
    tensors = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [t.cpu().clone() for t in [*tensors, *(v for s in state_dict.values() for v in s.values() if v is not None)]]


def assert_unchanged(optimizer: Any, before: list[Tensor]) -> None:
    """To the last bit: parameters, states and counters."""
    after = snapshot(optimizer)
    assert len(after) == len(before), "states came or went"
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)


@each_class
def test_unscaling_and_skipping_in_the_step(name: str, device: str) -> None:
    twins = lively(name, device, mine={"fused": True})
    for scale, found_inf in [(8.0, 0.0), (4.0, 1.0), (4.0, 2.0), (0.5, 0.0)]:
        grads = twins.grads()
        twins.give(grads)
        for p in twins.params:
            assert p.grad is not None
            p.grad *= scale
        before = snapshot(twins.ours)
        scaled_step(twins.ours, scale, found_inf)
        if found_inf:
            assert_unchanged(twins.ours, before)
            continue
        twins.genuine.step()
        twins.check()
        for p, g in zip(twins.params, grads, strict=True):  # what gradient clipping or logging reads afterwards
            assert p.grad is not None
            assert g is not None
            assert torch.equal(p.grad.cpu(), g), "the unscaled gradient is written back"


@each_class
@pytest.mark.parametrize("fused", [True, False])
def test_torchs_grad_scaler(name: str, fused: bool, device: str) -> None:
    """With an infinity in the first step, where nothing has begun yet, and in a later one."""
    twins = lively(name, device, dtype=torch.float32, mine={"fused": fused})
    scalers = [torch.amp.GradScaler(where, 4.0, growth_interval=2) for where in (device, "cpu")]
    assert getattr(twins.ours, "_step_supports_amp_scaling", False) == fused, "as torch: Lightning and GradScaler ask"
    for t in range(6):
        grads = twins.grads()
        for (optimizer, params), scaler in zip(twins.both, scalers, strict=True):
            loss = torch.zeros((), device=params[0].device)
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                assert g is not None
                factor = torch.inf if t in (0, 3) and i == 1 else 1.0
                p.grad = None
                p.requires_grad_()
                loss = loss + (p * g.to(p)).sum() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if t:  # the first, skipped step has made states, as torch's fused one makes them, or has not
            twins.check(1e-5, 1e-6)
        assert scalers[0].get_scale() == scalers[1].get_scale()


def test_bug_1_an_infinity_in_the_first_step_leaves_no_garbage_in_the_buffer(device: str) -> None:
    """torch: a skipped first step leaves the momentum buffer as `empty_like` made it, and the second step reads it."""
    twins = Twins("SGD", device=device, momentum=0.9, dampening=0.5, mine={"fused": True})
    twins.give(twins.grads())
    scaled_step(twins.ours, 2.0, 1.0)
    twins.check()
    twins.step()  # its first buffer is the whole gradient, undamped
    twins.step()


@pytest.mark.parametrize("name", FUSED)
def test_bug_2_a_first_gradient_that_comes_late(name: str, device: str) -> None:
    """torch: TypeError, for the list of buffers has a None in it."""
    twins = lively(name, device, mine={"fused": True})
    twins.step(0)
    twins.step(0, 1)
    twins.step(1)


@each_class
@pytest.mark.parametrize("found_inf", [2.0, 3.0, 0.5, math.inf, math.nan])
def test_bug_3_found_inf_is_any_number_but_0(name: str, found_inf: float, device: str) -> None:
    """torch compares with 1; it is a sum over devices, and where it is 2 the parameters become NaN."""
    twins = lively(name, device, mine={"fused": True})
    twins.step()
    before = snapshot(twins.ours)
    twins.give([torch.full_like(p, torch.inf) for p in twins.twins])
    scaled_step(twins.ours, 2.0, found_inf)
    assert_unchanged(twins.ours, before)
    twins.step()


@pytest.mark.parametrize("name", FUSED)
def test_bug_4_strided_parameters(name: str, device: str) -> None:
    """torch: wrong without a word on the CPU, an error on CUDA."""
    twins = lively(name, device, shapes=[(3, 4), (2, 3, 2, 2)], mine={"fused": True})
    twins.params[0].data = transposed(twins.params[0])
    twins.params[1].data = channels_last(twins.params[1])
    for _ in range(2):
        twins.step()  # with contiguous gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 257])
def test_bug_5_sgd_in_16_bits_skips_no_vector(size: int, dtype: torch.dtype, device: str) -> None:
    """torch: whole vectors of the parameter keep their old values (pytorch #191763)."""
    p = torch.zeros(size, dtype=dtype, device=device)
    optimizer = tribp.optim.SGD([p], lr=0.5, momentum=0.5, fused=True)
    for expected in (-0.5, -1.25):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, expected))


@each_class
def test_clipping_what_is_unscaled(name: str, device: str) -> None:
    twins = lively(name, device, mine={"max_grad_norm": 0.5, "fused": True})
    for _ in range(2):
        grads = twins.grads()
        twins.give(grads)
        norm = torch.nn.utils.clip_grad_norm_(twins.twins, 0.5)
        for p in twins.params:
            assert p.grad is not None
            p.grad *= 16
        scaled_step(twins.ours, 16.0, 0.0)
        twins.genuine.step()
        twins.check()
        torch.testing.assert_close(twins.ours.grad_norm.cpu(), norm, rtol=1e-12, atol=0)
        for p, g in zip(twins.params, grads, strict=True):
            assert p.grad is not None
            assert g is not None
            assert torch.equal(p.grad.cpu(), g), "unscaled, not clipped"


# ---- gradients that have no memory of their own


def windows(x: Tensor) -> Tensor:
    """Rows that overlap the next ones."""
    rows, columns = x.shape
    return x.flatten()[: rows + columns - 1].clone().as_strided((rows, columns), (1, 1))


@each_class
@pytest.mark.parametrize("overlapping", [expanded, windows])
def test_a_gradient_that_overlaps_itself(name: str, overlapping: Layout, device: str) -> None:
    """Each element is divided once, in a copy. torch's `unscale_` raises and asks for a clone; its fused step on the
    CPU writes behind the gradient.

    First without a scale, so that a plan for such a gradient is there, then in a step that is skipped, and in two more.
    """
    twins = lively(name, device, shapes=[(40, 30), (5,)], mine={"fused": True})
    for scale, found_inf in [(1.0, None), (4.0, 1.0), (8.0, 0.0), (2.0, 0.0)]:
        large, small = twins.grads()
        assert large is not None
        scaled = overlapping((large * scale).to(device))
        before, held = snapshot(twins.ours), scaled.clone()
        twins.give([held.cpu() / scale, small])
        twins.params[0].grad = scaled
        assert twins.params[1].grad is not None
        twins.params[1].grad *= scale
        if found_inf is None:
            twins.ours.step()
        else:
            scaled_step(twins.ours, scale, found_inf)
        assert torch.equal(scaled, held), "others may hold it"
        if found_inf:
            assert_unchanged(twins.ours, before)
            assert torch.equal(twins.params[0].grad, held)
            continue
        twins.genuine.step()
        twins.check()
        assert torch.equal(twins.params[0].grad, held / scale)


@each_class
def test_a_gradient_that_two_parameters_share(name: str, device: str) -> None:
    """By hand; torch divides it twice. Of the same shape, or not: views of the same memory."""
    twins = lively(name, device, shapes=[(4, 5), (20,), (4, 5)], mine={"fused": True})
    for scale in (8.0, 2.0):
        (grad, *_) = twins.grads(0)
        assert grad is not None
        twins.give([grad, grad.flatten(), grad])
        shared = (grad * scale).to(device)
        for p, g in zip(twins.params, (shared, shared.view(20), shared), strict=True):
            p.grad = g
        scaled_step(twins.ours, scale, 0.0)
        twins.genuine.step()
        twins.check()
        for p in twins.params:
            assert p.grad is not None
            assert torch.equal(p.grad.cpu().view_as(grad), grad), "unscaled, once"


def test_gradients_with_memory_of_their_own_stay_there(device: str) -> None:
    """Columns of one matrix, beside one without: whoever holds the matrix sees them unscaled."""
    twins = lively("Adam", device, shapes=[(4, 5), (4, 3), (2, 2)], mine={"fused": True})
    for step in range(2):
        first, second, third = (values(p.shape, p.dtype, 3 + step, i) for i, p in enumerate(twins.twins))
        third = expanded(third)
        twins.give([first, second, third])
        matrix = torch.cat([first, second], 1).to(device) * 4.0
        columns = [*matrix.split([5, 3], 1), expanded(third.to(device) * 4.0)]
        for p, g in zip(twins.params, columns, strict=True):
            p.grad = g
        scaled_step(twins.ours, 4.0, 0.0)
        assert torch.equal(matrix.cpu(), torch.cat([first, second], 1))
        assert [p.grad is g for p, g in zip(twins.params, columns, strict=True)] == [True, True, False]
        twins.genuine.step()
        twins.check()
