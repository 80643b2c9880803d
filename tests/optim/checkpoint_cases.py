"""What the tests of the optimizers' checkpoints share: classes with options, and how they are trained and compared."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer
from torch.testing import assert_close

import tribp.optim

State = dict[str, Any]


# Class, options, and the genuine optimizer's class and options where those differ.
CASES: dict[str, tuple[str, State]] = {
    "sgd": ("SGD", {}),
    "sgd momentum": ("SGD", dict(momentum=0.9, weight_decay=0.1)),
    "sgd dampening": ("SGD", dict(momentum=0.9, dampening=0.5, maximize=True)),
    "sgd nesterov fused": ("SGD", dict(momentum=0.9, nesterov=True, fused=True)),
    "momentum": ("Momentum", dict(beta=0.8)),
    "rmsprop": ("RMSprop", dict(weight_decay=0.1)),
    "rmsprop everything": ("RMSprop", dict(momentum=0.9, centered=True, maximize=True)),
    "rmsprop foreach": ("RMSprop", dict(momentum=0.5, foreach=True)),
    "adagrad": ("Adagrad", dict(lr_decay=0.1)),
    "adagrad fused": ("Adagrad", dict(initial_accumulator_value=0.5, fused=True)),
    "adam": ("Adam", dict(betas=(0.8, 0.9))),
    "adam amsgrad": ("Adam", dict(amsgrad=True, weight_decay=0.1, maximize=True)),
    "adam decoupled fused": ("Adam", dict(weight_decay=0.1, decoupled_weight_decay=True, fused=True)),
    "adam tensor lr": ("Adam", dict(lr=torch.tensor(0.02, dtype=torch.float64))),
    "adamw": ("AdamW", {}),
    "adadelta": ("Adadelta", dict(rho=0.8)),
    "adamax": ("Adamax", dict(betas=(0.8, 0.9), maximize=True)),
    "nadam": ("NAdam", dict(momentum_decay=0.1)),
    "radam": ("RAdam", dict(betas=(0.8, 0.9))),
    "rprop": ("Rprop", dict(step_sizes=(0.05, 0.2))),
    "asgd": ("ASGD", dict(lambd=0.1, t0=0.0, foreach=False)),  # else torch computes η in float32 on a GPU
    "adamw amsgrad": ("AdamW", dict(amsgrad=True, foreach=False)),
}


FEW = ["sgd momentum", "rmsprop everything", "adagrad fused", "adam amsgrad", "nadam", "rprop", "asgd"]


every_case = pytest.mark.parametrize("case", CASES)


a_few = pytest.mark.parametrize("case", FEW)


def ours(case: str, params: Any, **more: Any) -> Optimizer:
    name, options = CASES[case]
    return getattr(tribp.optim, name)(params, **dict(dict(lr=0.1), **options, **more) | options)  # type: ignore[no-any-return]


def theirs(case: str, params: Any) -> Optimizer:
    name, options = CASES[case]
    if name == "Momentum":
        name, options = "SGD", dict(momentum=options["beta"], dampening=options["beta"])
    return getattr(torch.optim, name)(params, **dict(lr=0.1) | options)  # type: ignore[no-any-return]


def weights(device: str, dtype: torch.dtype = torch.float64) -> list[Parameter]:
    """The same every time: a matrix, a vector whose gradient comes late, a scalar, one that never has a gradient."""
    made = torch.Generator().manual_seed(1)
    shapes: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (), (2,))
    return [Parameter(torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype)) for shape in shapes]


def groups(params: Sequence[Tensor]) -> list[State]:
    return [dict(params=list(params[:2])), dict(params=list(params[2:]), weight_decay=0.2)]


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Step number i has gradients that depend on i alone. (torch's fused SGD can't take one that comes late.)"""
    late = not (isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"])
    for i in steps:
        made = torch.Generator().manual_seed(100 + i)
        for k, p in enumerate(parameters(optimizer)):
            grad = torch.randn(p.shape, generator=made, dtype=torch.float64).to(p.device, p.dtype)
            p.grad = None if k == 3 or (late and k == 1 and i < 1) else grad
        optimizer.step()


def through_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moments(optimizer: Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]


def same_parameters(a: Optimizer, b: Optimizer, exactly: bool = False) -> None:
    tolerance = dict(rtol=0, atol=0) if exactly else dict(rtol=1e-11, atol=1e-13)
    assert_close(parameters(a), parameters(b), **tolerance)


def same_state_dict(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for group, torchs in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert list(group) == list(torchs)
        assert group == torchs
        assert [type(value) for value in group.values()] == [type(value) for value in torchs.values()]
    assert list(found["state"]) == list(expected["state"])
    for number, torchs in expected["state"].items():
        state = found["state"][number]
        assert list(state) == list(torchs)
        for key, value in torchs.items():
            assert type(state[key]) is type(value)
            assert (state[key].dtype, state[key].device) == (value.dtype, value.device), key
            assert state[key].stride() == value.stride()
            assert_close(state[key], value, rtol=1e-11, atol=1e-13)
            if key == "step":
                assert state[key].shape == ()
                assert state[key].dtype == torch.float32
