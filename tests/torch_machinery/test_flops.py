"""What `torch.utils.flop_counter` counts of tribp's layers: what it counts of torch's."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tribp

from ..processes import forked


def count(function: object, *inputs: Tensor, backward: bool = True) -> int:
    assert callable(function)
    with FlopCounterMode(display=False) as counter:
        y = function(*inputs)
        if backward:
            y.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "and backward"])
@pytest.mark.parametrize("frozen", ["", "input", "weight"])
def test_a_fused_model_counts_as_before(frozen: str, backward: bool, device: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Sigmoid(),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.Sigmoid(),
    ).to(device)
    x = torch.randn(2, 3, 8, 8, device=device, requires_grad=frozen != "input")
    for layer in (model[0], model[4]):
        layer.weight.requires_grad_(frozen != "weight")
    expected = count(model, x, backward=backward)
    assert len(tribp.fuse(model).replaced) == 4
    assert count(model, x, backward=backward) == expected > 0


def test_groups_count_once(kernels: str) -> None:
    """torch counts the weight's gradient as if there were no groups, where it computes one."""
    x = torch.randn(2, 6, 5, 4, device=kernels, requires_grad=True)
    layer = tribp.nn.Conv3x3(6, 9, padding=1, groups=3, device=kernels)
    forward = 2 * 2 * 9 * 20 * 2 * 9  # outputs, and 2 channels × 9 taps each
    assert count(layer, x, backward=False) == forward
    assert count(layer, x) == 3 * forward


@pytest.mark.parametrize("first", ["tribp", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    """And tribp imports neither the counter nor, with it, triton."""
    second = {"tribp": "torch.utils.flop_counter"}.get(first, "tribp")
    code = f"""
import sys, {first}
assert {first!r} != "tribp" or not {{"torch.utils.flop_counter", "triton"}} & sys.modules.keys()
import torch, {second}
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    tribp.linear_sigmoid(torch.ones(2, 3), torch.ones(4, 3))
assert counter.get_total_flops() == 48
"""
    run = forked("-c", code)
    assert run.returncode == 0, run.stderr
