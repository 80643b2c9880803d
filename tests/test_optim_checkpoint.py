"""Checkpoints of the optimizers: torch's, key for key; loaded both ways; and nothing of them lost on the way."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer
from torch.testing import assert_close

import tribp.optim
from tribp.optim import SGD, Adagrad, Adam, AdamW, Momentum, RMSprop

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
    "adamw amsgrad": ("AdamW", dict(amsgrad=True, foreach=False)),
}
FEW = ["sgd momentum", "rmsprop everything", "adagrad fused", "adam amsgrad"]
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
                assert state[key].device.type == "cpu" or found["param_groups"][0]["fused"]


@every_case
def test_state_dicts_are_torchs_and_load_both_ways(case: str, device: str) -> None:
    """Keys and their order, types, devices, values, from before the first step on; and training goes on unchanged."""
    a, b = ours(case, groups(weights(device))), theirs(case, groups(weights(device)))
    for steps in ([], [0], [1, 2]):
        train(a, steps)
        train(b, steps)
        same_state_dict(a.state_dict(), b.state_dict())
    # The checkpoint holds the moments, the parameters come from the other run: it must fit both.
    resumed_a = ours(case, groups(copy.deepcopy(parameters(b))))
    resumed_b = theirs(case, groups(copy.deepcopy(parameters(a))))
    resumed_a.load_state_dict(through_file(b.state_dict()))
    resumed_b.load_state_dict(through_file(a.state_dict()))
    same_state_dict(resumed_a.state_dict(), b.state_dict())
    for optimizer in (a, b, resumed_a, resumed_b):
        train(optimizer, range(3, 5))
    for optimizer in (a, resumed_a, resumed_b):
        same_parameters(optimizer, b)
    same_state_dict(resumed_a.state_dict(), resumed_b.state_dict())


def by_file(optimizer: Optimizer, case: str) -> Optimizer:
    resumed = ours(case, groups(copy.deepcopy(parameters(optimizer))))
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    return resumed


WAYS: dict[str, Callable[[Optimizer, str], Optimizer]] = {
    "file": by_file,
    "pickle": lambda optimizer, case: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": lambda optimizer, case: copy.deepcopy(optimizer),
    "whole file": lambda optimizer, case: whole_file(optimizer),
}


def whole_file(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
@a_few
def test_resuming_gives_the_same_bits(case: str, way: str, device: str) -> None:
    """… and neither run touches the other, whichever is first."""
    straight = ours(case, groups(weights(device)))
    train(straight, range(4))
    original = ours(case, groups(weights(device)))
    train(original, range(2))
    copied = WAYS[way](original, case)
    same_state_dict(copied.state_dict(), original.state_dict())
    train(copied, range(2, 3))
    train(original, range(2, 4))
    train(copied, range(3, 4))
    same_parameters(original, straight, exactly=True)
    same_parameters(copied, straight, exactly=True)


@pytest.mark.parametrize("kind", [SGD, Momentum, RMSprop, Adagrad, Adam])
def test_random_rounding_resumes(kind: Any, device: str) -> None:
    """The random numbers depend on the step, which the checkpoint must therefore tell: the same bits after resuming."""
    found = []
    for stop in (False, True):
        params = weights(device, torch.bfloat16)
        options: State = dict(lr=1e-3, stochastic_rounding=True, seed=3)
        optimizer = kind(params, **options)
        train(optimizer, range(2))
        if stop:
            saved, optimizer = through_file(optimizer.state_dict()), kind(params, **options)
            optimizer.load_state_dict(saved)
        train(optimizer, range(2, 4))
        found.append(params)
    assert_close(*found, rtol=0, atol=0)


def test_a_copy_goes_with_the_copy_of_its_model(device: str) -> None:
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = Adam(model.parameters(), lr=0.1)
    train(optimizer, range(2))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    before = model.weight.detach().clone()
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    train(optimizer2, range(2, 3))
    assert torch.equal(model.weight, before)
    assert not torch.equal(model2.weight, before)


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "whole file"])
def test_copies_keep_what_was_switched_on(way: str) -> None:
    """Options, the marks of `fused`, and their hold on groups that come later."""
    options: State = dict(ema_decay=0.5, max_grad_norm=1.0, state_dtype=torch.float32, capturable=True, fused=True)
    original = SGD(weights("cpu", torch.bfloat16), stochastic_rounding=True, seed=3, **options)
    copied = WAYS[way](original, "")
    assert type(copied) is SGD
    assert copied._step_supports_amp_scaling
    copied.add_param_group(dict(params=[Parameter(torch.ones(2))]))
    for group in copied.param_groups:
        assert options.items() <= group.items()
        assert group["stochastic_rounding"]
        assert group["seed"] == 3
    assert not hasattr(WAYS[way](Adam(weights("cpu")), ""), "_step_supports_amp_scaling")


@pytest.mark.parametrize("case", [*FEW, "adam"])
def test_a_live_checkpoint_is_not_shared(case: str, device: str) -> None:
    """torch's load_state_dict uses the very tensors it is given: two runs would change each other's moments."""
    straight, first = ours(case, groups(weights(device))), ours(case, groups(weights(device)))
    train(straight, range(4))
    train(first, range(2))
    second = ours(case, groups(copy.deepcopy(parameters(first))))
    given = first.state_dict()
    second.load_state_dict(given)
    held = {id(v): v for optimizer in (first, second) for s in optimizer.state.values() for v in s.values()}
    assert len({v.data_ptr() for v in held.values()}) == len(held)
    kept = copy.deepcopy(given)
    train(second, range(2, 4))
    assert_close(given, kept, rtol=0, atol=0)
    train(first, range(2, 4))
    same_parameters(first, straight, exactly=True)
    same_parameters(second, straight, exactly=True)


@pytest.mark.parametrize("case", ["sgd momentum", "rmsprop everything", "adagrad", "adam amsgrad"])
def test_a_loaded_state_keeps_its_type(case: str, device: str) -> None:
    """float32 moments of bfloat16 parameters: torch cuts them to bfloat16 without a word (pytorch #43706)."""
    wide = theirs(case, groups(weights(device, torch.float32)))
    train(wide, range(3))
    saved = wide.state_dict()
    narrow = ours(case, groups(weights(device, torch.bfloat16)))
    narrow.load_state_dict(saved)

    assert_close(moments(narrow), moments(wide), rtol=0, atol=0)  # types too
    train(narrow, range(3, 5))
    assert {v.dtype for v in moments(narrow)} == {torch.float32}
    train(wide, range(3, 5))
    if case != "adagrad":  # its first moments are those of the parameters
        again = ours(case, groups(weights(device, torch.bfloat16)))
        again.load_state_dict(through_file(narrow.state_dict()))
        assert_close(moments(again), moments(narrow), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["sgd momentum", "rmsprop everything", "adagrad", "adam amsgrad"])
def test_state_dtype_decides_the_type_of_a_loaded_state(case: str, device: str) -> None:
    """… unless the checkpoint has that option itself, whose value then holds, as every option's does."""
    wide = theirs(case, groups(weights(device, torch.float32)))
    train(wide, range(3))
    saved = wide.state_dict()
    cut = ours(case, groups(weights(device, torch.bfloat16)), state_dtype=torch.bfloat16)
    cut.load_state_dict(saved)
    train(cut, range(3, 4))
    assert {v.dtype for v in moments(cut)} == {torch.bfloat16}
    widened = ours(case, groups(weights(device, torch.bfloat16)), state_dtype=torch.float32)
    widened.load_state_dict(cut.state_dict())
    assert {v.dtype for v in moments(widened)} == {torch.bfloat16}  # the checkpoint's own option
    for group in (checkpoint := cut.state_dict())["param_groups"]:
        del group["state_dtype"]
    widened = ours(case, groups(weights(device, torch.bfloat16)), state_dtype=torch.float32)
    widened.load_state_dict(checkpoint)
    train(widened, range(3, 4))
    assert {v.dtype for v in moments(widened)} == {torch.float32}


# What is beyond torch, by class: its options and values that are not the default.
COMMON: State = dict(ema_decay=0.9, max_grad_norm=1.0, state_dtype=torch.float32, stochastic_rounding=True, seed=5)
BEYOND: list[tuple[type[Optimizer], State]] = [
    (SGD, COMMON | dict(capturable=True)),
    (Momentum, COMMON | dict(capturable=True)),
    (Adagrad, COMMON | dict(capturable=True, eps_inside_sqrt=True)),
    (RMSprop, COMMON | dict(fused=True, eps_inside_sqrt=True)),
    (Adam, COMMON | dict(eps_inside_sqrt=True)),
    (AdamW, COMMON | dict(eps_inside_sqrt=True)),
]


@pytest.mark.parametrize(("kind", "options"), BEYOND, ids=lambda value: getattr(value, "__name__", ""))
def test_options_beyond_torchs(kind: type[Optimizer], options: State) -> None:
    """In the state_dict only when on; still on after torch's checkpoint, which does not know them, was loaded."""
    name = "SGD" if kind is Momentum else kind.__name__
    torchs: Optimizer = getattr(torch.optim, name)(groups(weights("cpu")))
    known = {key for group in torchs.state_dict()["param_groups"] for key in group}
    for option, value in options.items():
        optimizer = kind(groups(weights("cpu")), **{option: value})
        for group in optimizer.state_dict()["param_groups"]:
            assert group.keys() - known == {option} - known
            assert group[option] == value
        optimizer.load_state_dict(torchs.state_dict())
        assert [group[option] for group in optimizer.param_groups] == [value, value], option
        off = {"stochastic_rounding": False, "eps_inside_sqrt": False, "capturable": False, "seed": 0}.get(option)
        nothing: State = {option: off}
        written = kind(groups(weights("cpu")), **nothing).state_dict()["param_groups"]
        assert all(group.keys() == known for group in written), option
    plain = kind(groups(weights("cpu")))  # type: ignore[call-arg]
    assert {key for group in plain.state_dict()["param_groups"] for key in group} == known


def test_options_of_one_group_alone(device: str) -> None:
    params = weights(device, torch.bfloat16)
    made: list[State] = [
        dict(params=params[:1]),
        dict(params=params[1:], ema_decay=0.5, state_dtype=torch.float32),
    ]
    optimizer = Adam(made)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    assert "ema_decay" not in saved["param_groups"][0]
    assert "ema" not in saved["state"][0]
    assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert saved["state"][1]["ema"].dtype == torch.float32
    assert saved["state"][1]["exp_avg"].dtype == torch.float32
    genuine = torch.optim.Adam(groups([torch.zeros_like(p) for p in params]))
    genuine.param_groups[0]["params"], genuine.param_groups[1]["params"] = params[:1], params[1:]
    optimizer.load_state_dict(genuine.state_dict())
    assert [group.get("ema_decay") for group in optimizer.param_groups] == [None, 0.5]
    assert [group.get("state_dtype") for group in optimizer.param_groups] == [None, torch.float32]


def test_options_in_a_checkpoint_are_loaded() -> None:
    """As torch does it with every option: the checkpoint's values hold."""
    saved = through_file(Adam(weights("cpu"), ema_decay=0.75, seed=3, eps_inside_sqrt=True).state_dict())
    optimizer = Adam(weights("cpu"), ema_decay=0.5, max_grad_norm=2.0)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["ema_decay"], group["max_grad_norm"], group["seed"]) == (0.75, 2.0, 3)
    assert group["eps_inside_sqrt"]


def test_loaded_options_hold_in_the_next_step(device: str) -> None:
    """Neither the plan nor the groups remember what was before the loading."""
    a = ours("adam", groups(weights(device)))
    train(a, range(2))
    saved = a.state_dict()
    for group in saved["param_groups"]:
        group |= dict(lr=0.5, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)
    b = theirs("adam", groups(copy.deepcopy(parameters(a))))
    b.load_state_dict(copy.deepcopy(saved))
    a.load_state_dict(saved)
    train(a, range(2, 4))
    train(b, range(2, 4))
    same_parameters(a, b)


# Hooks.


def test_load_hooks_run_in_order_and_have_their_say() -> None:
    """Ours take part for one call only: between the user's last pre-hook and first post-hook."""
    a = Adam(weights("cpu", torch.bfloat16), ema_decay=0.5)
    train(a, range(2))
    b = Adam(weights("cpu", torch.bfloat16), max_grad_norm=3.0)
    seen: list[str] = []
    wide = torch.full((3, 4), 0.1, dtype=torch.float32)

    def replace(optimizer: Optimizer, state_dict: State) -> State:
        seen.append("replace")
        states = {**state_dict["state"], 0: dict(state_dict["state"][0], exp_avg=wide)}
        return dict(state_dict, state=states)

    def change(optimizer: Optimizer, state_dict: State) -> None:
        seen.append("change")
        assert state_dict["state"][0]["exp_avg"] is wide
        state_dict["param_groups"] = [dict(group, lr=0.25) for group in state_dict["param_groups"]]

    def first(optimizer: Optimizer) -> None:
        seen.append("first")
        assert torch.equal(optimizer.state[parameters(optimizer)[0]]["exp_avg"], wide)
        assert optimizer.param_groups[0]["max_grad_norm"] == 3.0
        optimizer.param_groups[0]["weight_decay"] = 0.125

    b.register_load_state_dict_pre_hook(change)
    b.register_load_state_dict_pre_hook(replace, prepend=True)
    b.register_load_state_dict_post_hook(lambda optimizer: seen.append("second"))
    b.register_load_state_dict_post_hook(first, prepend=True)
    counts = [len(b._optimizer_load_state_dict_pre_hooks), len(b._optimizer_load_state_dict_post_hooks)]
    b.load_state_dict(a.state_dict())
    assert seen == ["replace", "change", "first", "second"]
    (group,) = b.param_groups
    assert (group["lr"], group["weight_decay"], group["ema_decay"]) == (0.25, 0.125, 0.5)
    assert b.state[parameters(b)[0]]["exp_avg"] is not wide
    assert [len(b._optimizer_load_state_dict_pre_hooks), len(b._optimizer_load_state_dict_post_hooks)] == counts


def test_state_dict_hooks_run_in_order_and_have_their_say(device: str) -> None:
    for kind in (torch.optim.Adam, Adam):
        optimizer = kind(weights(device), lr=0.1)
        train(optimizer, range(2))
        seen: list[str] = []

        def alter(optimizer: Optimizer, state_dict: State, seen: list[str] = seen) -> None:
            seen.append("alter")
            step = state_dict["state"][0]["step"]
            assert (step.device.type, step.item(), step.untyped_storage().nbytes()) == ("cpu", 2.0, 4)
            state_dict["state"] = {n: dict(s, mark=torch.ones(1)) for n, s in state_dict["state"].items()}
            state_dict["mark"] = 1

        def renew(optimizer: Optimizer, state_dict: State, seen: list[str] = seen) -> State:
            seen.append("renew")
            return dict(state_dict, renewed=True, param_groups=[dict(g, lr=7.0) for g in state_dict["param_groups"]])

        def before(optimizer: Optimizer, seen: list[str] = seen) -> None:
            seen.append("pre")

        optimizer.register_state_dict_pre_hook(before)
        optimizer.register_state_dict_post_hook(renew)
        optimizer.register_state_dict_post_hook(alter, prepend=True)
        saved = optimizer.state_dict()
        assert seen == ["pre", "alter", "renew"]
        assert list(saved) == ["state", "param_groups", "mark", "renewed"]
        assert all(torch.equal(state["mark"], torch.ones(1)) for state in saved["state"].values())
        assert saved["param_groups"][0]["lr"] == 7.0
        assert "mark" not in optimizer.state[parameters(optimizer)[0]]


def test_a_state_dict_hook_may_pack_everything() -> None:
    """A hook's result need not look like a checkpoint any more."""
    optimizer = Adam(weights("cpu"))
    train(optimizer, range(1))

    def pack(optimizer: Optimizer, state_dict: State) -> State:
        return {"packed": state_dict}

    optimizer.register_state_dict_post_hook(pack)
    assert list(optimizer.state_dict()) == ["packed"]
    assert list(optimizer.state_dict()["packed"]["state"][0]) == ["step", "exp_avg", "exp_avg_sq"]


# Other checkpoints.


@pytest.mark.parametrize("step", [3, 3.0])
@pytest.mark.parametrize("case", ["adam", "rmsprop", "adagrad"])
def test_steps_that_are_numbers(case: str, step: float, device: str) -> None:
    """As torch wrote them before 1.12."""
    a, b = ours(case, groups(weights(device))), theirs(case, groups(weights(device)))
    train(b, range(3))
    saved = b.state_dict()
    for number, state in saved["state"].items():
        saved["state"][number] = dict(state, step=step)
    resumed_b = theirs(case, groups(weights(device)))
    for optimizer in (a, resumed_b):
        optimizer.load_state_dict(copy.deepcopy(saved))
    same_state_dict(a.state_dict(), resumed_b.state_dict())
    for optimizer in (a, resumed_b):
        train(optimizer, range(3, 5))
    same_parameters(a, resumed_b)
    same_state_dict(a.state_dict(), resumed_b.state_dict())


@pytest.mark.parametrize("case", ["sgd", "sgd momentum", "momentum"])
def test_momentum_buffers_that_are_none(case: str, device: str) -> None:
    """As older SGDs wrote them, also without momentum: the first gradient is then the buffer, undamped."""
    pair = ours(case, groups(weights(device))), theirs(case, groups(weights(device)))
    for optimizer in pair:
        saved = optimizer.state_dict()
        saved["state"] = {number: {"momentum_buffer": None} for number in range(4)}
        optimizer.load_state_dict(saved)
        train(optimizer, range(3))
    same_parameters(*pair)
    found, expected = (optimizer.state_dict() for optimizer in pair)
    same_state_dict(  # torch keeps the None of parameters it did not touch
        *(
            dict(s, state={n: t for n, t in s["state"].items() if t["momentum_buffer"] is not None})
            for s in (found, expected)
        )
    )


def test_a_checkpoint_with_other_options(device: str) -> None:
    """Moments for more than the group now uses, and for less: amsgrad switched on, momentum off."""
    plain, ams = theirs("adam", groups(weights(device))), theirs("adam amsgrad", groups(weights(device)))
    train(plain, range(2))
    train(ams, range(2))
    for saved in (plain.state_dict(), ams.state_dict()):
        pair = ours("adam", groups(weights(device))), theirs("adam", groups(weights(device)))
        for optimizer in pair:
            checkpoint = copy.deepcopy(saved)
            for group in checkpoint["param_groups"]:
                group["amsgrad"] = False
            optimizer.load_state_dict(checkpoint)
            train(optimizer, range(2, 4))
        same_parameters(*pair)
        same_state_dict(pair[0].state_dict(), pair[1].state_dict())


def _wrong(case: str) -> list[State]:
    saved = ours(case, groups(weights("cpu"))).state_dict()
    first, second = saved["param_groups"]
    return [
        dict(saved, param_groups=[first]),
        dict(saved, param_groups=[first, dict(second, params=[2])]),
        {"state": {}},
    ]


@pytest.mark.parametrize("which", range(3), ids=["groups", "parameters", "no groups"])
def test_a_checkpoint_of_another_model(which: str, device: str) -> None:
    """torch's error, and everything as it was: the hooks, the state, the run."""
    saved = _wrong("adam")[int(which)]
    a, b = ours("adam", groups(weights(device))), theirs("adam", groups(weights(device)))
    errors = []
    for optimizer in (a, b):
        train(optimizer, range(2))
        with pytest.raises((ValueError, KeyError)) as caught:
            optimizer.load_state_dict(saved)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert not a._optimizer_load_state_dict_pre_hooks
    assert not a._optimizer_load_state_dict_post_hooks
    train(a, range(2, 4))
    train(b, range(2, 4))
    same_parameters(a, b)


def test_state_that_belongs_to_no_parameter(device: str) -> None:
    """torch copies such entries as they are."""
    a = ours("adam", groups(weights(device)))
    train(a, range(2))
    notes: State = {"note": {"answer": 42}, "none": None, "step": {"step": torch.ones(3)[0]}}
    a.state.update(notes)  # type: ignore[arg-type]
    saved = through_file(a.state_dict())
    assert {key: saved["state"][key] for key in notes} == notes
    b = ours("adam", groups(copy.deepcopy(parameters(a))))
    b.load_state_dict(saved)
    assert {key: b.state[key] for key in notes} == notes  # type: ignore[index]
    for optimizer in (a, b):
        train(optimizer, range(2, 4))
    same_parameters(a, b, exactly=True)


@a_few
def test_loading_into_a_run_that_has_other_state(case: str, device: str) -> None:
    """A jump back in time: nothing of the abandoned steps is left, in plan, counters or buffers."""
    straight, other = ours(case, groups(weights(device))), ours(case, groups(weights(device)))
    train(straight, range(2))
    saved, at = copy.deepcopy(straight.state_dict()), copy.deepcopy(parameters(straight))
    train(straight, range(2, 4))
    train(other, range(1, 4))
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(parameters(other), at, strict=True):
            p.copy_(value)
    train(other, range(2, 4))
    same_parameters(other, straight, exactly=True)


def test_a_fresh_checkpoint_begins_anew(device: str) -> None:
    """Loading a checkpoint without state: the next momentum step is a first one again."""
    pair = ours("momentum", groups(weights(device))), theirs("momentum", groups(weights(device)))
    for optimizer in pair:
        fresh = copy.deepcopy(optimizer.state_dict())
        train(optimizer, range(3))
        optimizer.load_state_dict(fresh)
        train(optimizer, range(3, 5))
    same_parameters(*pair)


def test_scheduler_and_optimizer_resume_together(device: str) -> None:
    """The scheduler's own state_dict, and the optimizer's, which knows the current rate."""

    def make(params: Sequence[Tensor]) -> tuple[Optimizer, Any]:
        optimizer = Momentum(groups(params), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=8)

    straight, schedule = make(weights(device))
    for i in range(6):
        train(straight, [i])
        schedule.step()
    first, its_schedule = make(weights(device))
    for i in range(3):
        train(first, [i])
        its_schedule.step()
    resumed, resumed_schedule = make(copy.deepcopy(parameters(first)))
    resumed.load_state_dict(through_file(first.state_dict()))
    resumed_schedule.load_state_dict(through_file(its_schedule.state_dict()))
    for i in range(3, 6):
        train(resumed, [i])
        resumed_schedule.step()
    same_parameters(resumed, straight, exactly=True)
    for key in ("lr", "momentum", "dampening", "initial_lr", "max_momentum"):
        assert resumed.param_groups[0][key] == straight.param_groups[0][key]


def test_averages_are_saved_and_go_on(device: str) -> None:
    """v₁ = x₁, then v ← d·v + (1 − d)·x, across a checkpoint; a checkpoint without any starts them."""
    params, decay = weights(device, torch.float32), 0.75
    optimizer = Adam(groups(params), lr=0.1, ema_decay=decay)
    train(optimizer, range(2))
    resumed = Adam(groups(copy.deepcopy(params)), lr=0.1, ema_decay=decay)
    saved = through_file(optimizer.state_dict())
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq", "ema", "ema_step"]
    assert saved["state"][0]["ema_step"].device.type == "cpu"
    resumed.load_state_dict(saved)
    for k, p in enumerate(parameters(resumed)[:3]):
        assert torch.equal(resumed.state[p]["ema"], optimizer.state[params[k]]["ema"])
    average = [resumed.state[p]["ema"].double() for p in parameters(resumed)[:3]]
    for i in range(2, 4):
        train(resumed, [i])
        average = [
            decay * v + (1 - decay) * p.detach().double() for v, p in zip(average, parameters(resumed)[:3], strict=True)
        ]
    with resumed.swap_ema():
        assert_close([p.detach().double() for p in parameters(resumed)[:3]], average, rtol=1e-6, atol=1e-7)
    # torch's class carries them along unused, and its checkpoint gives them back.
    genuine = torch.optim.Adam(groups(copy.deepcopy(params)), lr=0.1)
    genuine.load_state_dict(through_file(optimizer.state_dict()))
    train(genuine, range(2, 3))
    assert "ema" in genuine.state_dict()["state"][0]
    # And a checkpoint of torch's has none: the next step begins them.
    fresh = torch.optim.Adam(groups(copy.deepcopy(params)), lr=0.1)
    train(fresh, range(2))
    late = Adam(groups(copy.deepcopy(params)), lr=0.1, ema_decay=decay)
    train(late, range(2))
    late.load_state_dict(fresh.state_dict())
    train(late, range(2, 3))
    for p in parameters(late)[:3]:
        assert torch.equal(late.state[p]["ema"], p)


def test_nothing_is_saved_half_swapped() -> None:
    optimizer = Adam(weights("cpu"), ema_decay=0.5)
    train(optimizer, range(2))
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="swap_ema"):
        optimizer.state_dict()
    optimizer.state_dict()


@pytest.mark.parametrize("case", ["sgd momentum", "rmsprop everything", "adagrad", "adam amsgrad", "adam"])
def test_files_are_no_larger_than_torchs(case: str, device: str) -> None:
    """torch.save writes whole storages: a counter that is a view of all counters would drag them along."""
    shapes = [(2,)] * 12
    sizes = []
    for make in (ours, theirs):
        optimizer = make(case, [Parameter(torch.ones(shape, device=device)) for shape in shapes])
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
        for written in (optimizer.state_dict(), optimizer):
            file = io.BytesIO()
            torch.save(written, file)
            sizes.append(file.getbuffer().nbytes)
        for state in optimizer.state_dict()["state"].values():
            assert all(v.untyped_storage().nbytes() == v.nbytes for v in state.values())
        one = copy.deepcopy(optimizer.state_dict()["state"][0])
        assert all(v.untyped_storage().nbytes() == v.nbytes for v in one.values())
    assert sizes[0] <= sizes[2] + 256
    assert sizes[1] <= sizes[3] + 1024


def test_a_written_checkpoint_stays_what_it_was(device: str) -> None:
    """Counters in an earlier state_dict do not run on with… what torch shares, it may share; what it copies, not.

    torch's state_dict holds the live tensors, ours too; so a caller copies. A deep copy must then be complete.
    """
    optimizer = Adam(weights(device))
    train(optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    train(optimizer, range(2, 4))
    assert kept["state"][0]["step"].item() == 2.0
    assert optimizer.state_dict()["state"][0]["step"].item() == 4.0


def test_a_step_that_was_skipped_leaves_no_buffer(device: str) -> None:
    """GradScaler finds an infinity in the first step: no momentum has begun then, and none may be saved as if."""
    options: State = dict(lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    expected = torch.optim.SGD(weights(device), **options)
    train(expected, range(2))
    optimizer = SGD(weights(device), **options)
    for p in parameters(optimizer)[:3]:
        p.grad = torch.full_like(p, float("inf"))
    optimizer.grad_scale = torch.tensor(2.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    assert optimizer.state_dict()["state"] == {}
    resumed = SGD(weights(device), **options)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for run in (resumed, copy.deepcopy(optimizer), optimizer):
        train(run, range(2))
        same_parameters(run, expected)


def test_groups_and_lr_tensors_are_not_shared(device: str) -> None:
    rate = torch.tensor(0.1)
    a = Adam(weights(device), lr=rate)
    train(a, range(1))
    b = Adam(weights(device), lr=torch.tensor(0.5))
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["lr"] == 0.1
    assert b.param_groups[0]["lr"] is not a.param_groups[0]["lr"]
    rate.fill_(0.25)
    assert b.param_groups[0]["lr"] == torch.tensor(0.1)


def test_named_parameters_go_through_checkpoints() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    optimizers = [kind(model.named_parameters(), lr=0.1) for kind in (Adam, torch.optim.Adam)]
    for optimizer in optimizers:
        train(optimizer, range(2))
    saved = [through_file(optimizer.state_dict()) for optimizer in optimizers]
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    assert saved[0]["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    unnamed = Adam(model.parameters())
    unnamed.load_state_dict(saved[1])
    assert unnamed.param_groups[0]["param_names"] == saved[1]["param_groups"][0]["param_names"]
    assert list(itertools.chain(unnamed.state_dict()["param_groups"][0])) == list(saved[1]["param_groups"][0])
