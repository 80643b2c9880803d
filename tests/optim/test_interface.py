"""The optimizers as torch's schedulers and GradScaler see them: arguments, errors, groups."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    Optimizer,
)
from torch.optim.swa_utils import SWALR

import tribp.optim
from tribp.optim import SGD, Adagrad, Adam, AdamW, Momentum, RMSprop

from .cases import FUSED, TORCHS
from .ecosystem_cases import PAIRS, Options, close, every_pair, gradients, loss_of, model, weights

# What it looks like.


@every_pair
def test_arguments_are_torchs(kind: type[Optimizer], genuine: type[Optimizer]) -> None:
    """Names, kinds, order, defaults; what is ours comes after them and by keyword."""
    found, expected = (inspect.signature(c).parameters for c in (kind, genuine))
    own = [p for p in found.values() if p.name not in expected]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in own)
    assert {p.name for p in own} <= {"capturable", "fused", "extra"}
    assert [(p.name, p.kind, p.default) for p in found.values() if p.name in expected] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]
    assert list(inspect.signature(kind.step).parameters) == list(inspect.signature(genuine.step).parameters)


@every_pair
def test_it_is_one_of_torchs(kind: type[Optimizer], genuine: type[Optimizer]) -> None:
    """Lightning, accelerate and schedulers ask isinstance; people read the repr and set `defaults`."""
    a, b = kind(weights()), genuine(weights())  # type: ignore[call-arg]
    assert isinstance(a, genuine)
    assert repr(a) == repr(b)
    assert list(a.defaults.items()) == list(b.defaults.items())
    assert kind.__name__ == genuine.__name__


def test_relations_between_the_classes() -> None:
    assert issubclass(AdamW, Adam)  # as in torch
    assert isinstance(AdamW(weights()), torch.optim.AdamW)
    assert isinstance(Momentum(weights()), SGD)
    assert tribp.optim.RMSProp is RMSprop
    assert tribp.optim.AdaGrad is Adagrad


def test_every_name_of_torchs_is_there() -> None:
    """`import tribp.optim as optim` serves a script: what tribp has no class for is torch's own."""
    classes = [name for name in vars(torch.optim) if name[0].isupper()]
    for name in dict.fromkeys([*torch.optim.__all__, *classes]):
        found, torchs = getattr(tribp.optim, name), getattr(torch.optim, name)
        if name in TORCHS:
            assert issubclass(found, torchs)
            assert found is not torchs
        else:
            assert found is torchs
        assert name in tribp.optim.__all__


WRONG: list[tuple[str, Options]] = [
    ("Adam", dict(lr=-1.0)),
    ("Adam", dict(betas=(1.0, 0.9))),
    ("Adam", dict(betas=(0.9, -0.1))),
    ("Adam", dict(betas=(0.9, torch.tensor(0.9)))),
    ("Adam", dict(eps=-1.0)),
    ("Adam", dict(weight_decay=-1.0)),
    ("Adam", dict(fused=True, foreach=True)),
    ("Adam", dict(fused=True, differentiable=True)),
    ("Adam", dict(lr=torch.tensor(0.1), foreach=True)),
    ("Adam", dict(lr=torch.tensor([0.1, 0.2]))),
    ("Adam", dict(surprise=1)),
    ("AdamW", dict(lr=-1.0)),
    ("AdamW", dict(decoupled_weight_decay=True)),
    ("AdamW", dict(fused=True, foreach=True)),
    ("SGD", dict(lr=-1.0)),
    ("SGD", dict(momentum=-1.0)),
    ("SGD", dict(nesterov=True)),
    ("SGD", dict(nesterov=True, momentum=0.9, dampening=0.1)),
    ("SGD", dict(fused=True, foreach=True)),
    ("SGD", dict(fused=True, differentiable=True)),
    ("SGD", dict(surprise=1)),
    ("RMSprop", dict(lr=-1.0)),
    ("RMSprop", dict(alpha=-1.0)),
    ("RMSprop", dict(momentum=-1.0)),
    ("RMSprop", dict(eps=-1.0)),
    ("Adagrad", dict(lr=-1.0)),
    ("Adagrad", dict(lr_decay=-1.0)),
    ("Adagrad", dict(initial_accumulator_value=-1.0)),
    ("Adagrad", dict(fused=True, foreach=True)),
    ("Adagrad", dict(fused=True, differentiable=True)),
    ("Adadelta", dict(rho=2.0)),
    ("Adamax", dict(betas=(1.0, 0.9))),
    ("NAdam", dict(momentum_decay=-1.0)),
    ("RAdam", dict(betas=(0.9, 1.0))),
    ("Rprop", dict(etas=(1.0, 1.2))),
    ("ASGD", dict(weight_decay=-1.0)),
]


@pytest.mark.parametrize(("name", "options"), WRONG, ids=str)
def test_wrong_arguments_are_torchs_errors(name: str, options: Options) -> None:
    errors = []
    for library in (tribp.optim, torch.optim):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            getattr(library, name)(weights(), **options)
        errors.append((type(caught.value), str(caught.value).replace(f"{name}.__init__", name)))
    assert errors[0] == errors[1]


GROUPS: dict[str, Callable[[list[Parameter]], Any]] = {
    "none": lambda p: [],
    "a tensor": lambda p: p[0],
    "a number": lambda p: [1.0],
    "not a leaf": lambda p: [p[0] * 2],
    "a set": lambda p: [dict(params=set(p))],
    "in two groups": lambda p: [dict(params=p), dict(params=p[:1])],
    "half named": lambda p: [("a", p[0]), p[1]],
    "wrong lr": lambda p: [dict(params=p, lr=None), 3],
}


@pytest.mark.parametrize("which", GROUPS)
def test_wrong_groups_are_torchs_errors(which: str) -> None:
    """A parameter that two groups share would be updated twice."""
    errors = []
    for kind in (Adam, torch.optim.Adam):
        with pytest.raises((ValueError, TypeError)) as caught:
            kind(GROUPS[which](weights()))
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_groups_that_torch_only_warns_of() -> None:
    for kind in (Adam, torch.optim.Adam):
        (p,) = weights()[:1]
        with pytest.warns(UserWarning, match="duplicate parameters"):
            kind([p, p])


def test_named_parameters_make_groups() -> None:
    network = model()
    optimizer = Adam(network.named_parameters(), ema_decay=0.5)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in network.named_parameters()]
    loss_of(network).backward()
    optimizer.step()
    assert set(optimizer.state) == set(network.parameters())


# Schedulers.


def _lambda(epoch: int) -> float:
    return 0.5**epoch


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [_lambda, lambda epoch: 0.9]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.7),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.PolynomialLR(o)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("kind", "genuine"), [PAIRS[0], PAIRS[3]], ids=["SGD", "Adam"])
def test_schedulers(kind: Any, genuine: Any, schedule: str) -> None:
    """Every family; those that move the momentum, or Adam's β₁, too."""
    options: Options = dict(momentum=0.9) if kind is SGD else {}
    found = []
    for c in (kind, genuine):
        params = weights()
        optimizer = c([dict(params=params[:1]), dict(params=params[1:], lr=0.3)], lr=0.1, **options)
        scheduler = SCHEDULES[schedule](optimizer)
        for i in range(5):
            gradients(params, i)
            optimizer.step()
            scheduler.step()
        found.append((params, [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]))
    close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("schedule", ["OneCycleLR", "SequentialLR"])
def test_schedulers_on_both_backends(schedule: str, device: str) -> None:
    """The kernel reads the rate and β₁ from a table that must follow."""
    found = []
    for kind in (Adam, torch.optim.Adam):
        params = weights(device)
        groups: list[Options] = [dict(params=params[:1]), dict(params=params[1:], lr=0.3)]
        optimizer = kind(groups, lr=0.1)
        scheduler = SCHEDULES[schedule](optimizer)
        for i in range(4):
            gradients(params, i)
            optimizer.step()
            scheduler.step()
        found.append(params)
    close(*found)


def test_reduce_on_plateau_and_tensor_rates(device: str) -> None:
    found = []
    for kind in (Adam, torch.optim.Adam):
        params = weights(device)
        optimizer = kind(params, lr=torch.tensor(0.1, dtype=torch.float64))
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        for i in range(4):
            gradients(params, i)
            optimizer.step()
            scheduler.step(1.0)
        assert float(optimizer.param_groups[0]["lr"]) < 0.1
        found.append(params)
    close(*found)


def test_no_warning_that_schedulers_come_first() -> None:
    """Schedulers watch `step` on the instance, to warn when they are stepped before the optimizer."""
    import warnings

    optimizer = Adam(weights())
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    gradients(weights(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()


# Mixed precision.


@pytest.mark.parametrize("fused", [False, True])
@every_pair
def test_grad_scaler(kind: Any, genuine: Any, fused: bool, device: str) -> None:
    """Three steps, the second one with an infinity: skipped, the scale halved. Later also clipped after unscale_."""
    options: Options = dict(fused=True) if fused else {}
    found = []
    for c in (kind, genuine):
        if c is genuine and genuine.__name__ not in FUSED:
            options = {}
        # On a GPU torch's fused Adagrad does not run, and its ASGD computes η in float32.
        where = device if c is kind else "cpu"
        network = model(where)
        optimizer = c(network.parameters(), lr=0.1, **options)
        scaler = torch.amp.GradScaler(where, init_scale=4.0, growth_interval=2)
        scales = []
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(network, i)).backward()
            if i == 1:
                next(network.parameters()).grad.view(-1)[1] = float("inf")  # type: ignore[union-attr]
            if i == 3:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            before = [p.detach().clone() for p in network.parameters()]
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            skipped = all(map(torch.equal, before, network.parameters()))
            assert skipped == (i == 1)
        grads = [p.grad.cpu() for p in network.parameters() if p.grad is not None]
        found.append(([p.detach().cpu() for p in network.parameters()], scales, grads))
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    close(found[0][2], found[1][2])  # unscaled in place


@every_pair
def test_it_scales_exactly_when_told(kind: Any, genuine: Any) -> None:
    """Lightning refuses gradient clipping where the mark is, so a plain optimizer must not have it."""
    assert not getattr(kind(weights()), "_step_supports_amp_scaling", False)
    fused = kind(weights(), fused=True)
    assert fused._step_supports_amp_scaling is True
    assert getattr(copy.deepcopy(fused), "_step_supports_amp_scaling", False) is True
    if genuine in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):  # torch 2.11's Adagrad has none
        assert genuine(weights(), fused=True)._step_supports_amp_scaling is True


def test_the_mark_is_not_found_on_the_class() -> None:
    """GradScaler asks the instance or its class; a mark on the class would hold for every optimizer."""
    for kind, _ in PAIRS:
        assert not hasattr(kind, "_step_supports_amp_scaling")
