"""Memory that a step is not given, or finds elsewhere: of another size, freed, moved, restrided, shared."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
import tribp.optim
from tribp.optim import layouts
from tribp.optim.torch_buckets import TorchBucket
from tribp.optim.watch import Watch

from .cases import CLASSES, LIVELY, Options, Twins, each_class, genuine, lively, ours, plain, transposed, values

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {
    "SGD": ("momentum_buffer",),
    "Momentum": ("momentum_buffer",),
    "RMSprop": ("square_avg", "momentum_buffer", "grad_avg"),
    "Adagrad": ("sum",),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adadelta": ("square_avg", "acc_delta"),
    "Adamax": ("exp_avg", "exp_inf"),
    "NAdam": ("exp_avg", "exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "Rprop": ("prev", "step_size"),
    "ASGD": ("ax",),
}
COUNTED = tuple(name for name in CLASSES if name not in ("SGD", "Momentum"))


# ---- what does not fit


def cut(t: Tensor, part: int) -> None:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() * part // 4)


def assigned(make: Callable[[Tensor], object]) -> Callable[[Options, str], None]:
    def change(state: Options, key: str) -> None:
        state[key] = make(state[key])

    return change


# What is done to a state of shape (3, 4), and what the error says of it.
UNFIT: dict[str, tuple[Callable[[Options, str], object], str]] = {
    "fewer": (assigned(lambda t: t.new_zeros(3, 3)), r"shape, \(3, 4\), got \(3, 3\)"),
    "more": (assigned(lambda t: t.new_zeros(3, 400)), r"shape, \(3, 4\), got \(3, 400\)"),
    "as many": (assigned(lambda t: t.new_zeros(12)), r"shape, \(3, 4\), got \(12,\)"),
    "one": (assigned(lambda t: t.new_zeros(())), r"shape, \(3, 4\), got \(\)"),
    "complex": (assigned(lambda t: t.to(torch.complex128)), r"must be real, .* got torch.complex128"),
    "integer": (assigned(lambda t: t.to(torch.int64)), r"must be real, .* got torch.int64"),
    "device": (assigned(lambda t: t.to("meta")), r"parameter's device, .*, got meta"),
    "no tensor": (assigned(lambda t: 1.0), "must be a tensor, got float"),
    "data": (lambda state, key: setattr(state[key], "data", state[key].new_zeros(3, 3)), r"got \(3, 3\)"),
    "resized": (lambda state, key: state[key].resize_(2, 2), r"got \(2, 2\)"),
    "set": (lambda state, key: state[key].set_(state[key].new_zeros(5)), r"got \(5,\)"),
    "freed": (lambda state, key: cut(state[key], 0), "cut to 0 bytes"),
    "cut": (lambda state, key: cut(state[key], 2), "cut to 48 bytes"),
}


def refused(twins: Twins, error: Any, message: str) -> None:
    """Nothing has happened: neither to the parameters nor to the states that are whole."""
    before = [plain(p) for p in twins.params]
    for _ in range(2):  # it is no accident of the first time
        with pytest.raises(error, match=message):
            twins.ours.step()
    for p, value in zip(twins.params, before, strict=True):
        assert torch.equal(p, value)


@each_class
@pytest.mark.parametrize("way", UNFIT)
def test_states_that_do_not_fit(name: str, way: str, device: str) -> None:
    twins = lively(name, device)
    twins.step()
    twins.step()
    state = twins.ours.state[twins.params[1]]
    for key in KEYS[name]:
        if key not in state:
            continue
        kept = state[key].clone()
        change, message = UNFIT[way]
        change(state, key)
        twins.give(twins.grads())
        refused(twins, (ValueError, TypeError), f"{key} of parameter 1 of group 0 .*{message}|{key} of .*{message}")
        state[key] = kept
    twins.step()


@each_class
def test_a_checkpoint_of_another_model(name: str, device: str) -> None:
    """torch's `load_state_dict` compares no sizes; of parameters with names the error gives that."""
    small, large = (values((n,), torch.float64, n).to(device) for n in (5, 70))
    for own, loaded in ((small, large), (large, small)):
        other = ours(name, [("first", plain(own)), ("layer.weight", loaded)], **LIVELY[name])
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        other.step()
        params = [plain(own), plain(own)]
        optimizer = ours(name, [("first", params[0]), ("layer.weight", params[1])], **LIVELY[name])
        optimizer.load_state_dict(other.state_dict())
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=rf"{KEYS[name][0]} of parameter 1 of group 0 \('layer.weight'\)"):
            optimizer.step()
        assert torch.equal(params[0], own)


@pytest.mark.parametrize("name", COUNTED)
def test_states_of_one_number_that_are_none(name: str, device: str) -> None:
    twins = lively(name, device)
    twins.step()
    state = twins.ours.state[twins.params[1]]
    wrong = (torch.zeros(3), torch.zeros(0), torch.zeros((), dtype=torch.complex64))
    for key, value in itertools.product(("step", *twins.ours._rule.scalar_states), wrong):
        kept = state[key].clone()
        state[key] = value.to(device)
        twins.give(twins.grads())
        refused(twins, ValueError, f"{key} of parameter 1 of group 0 must be one real number")
        state[key] = kept
    twins.step()


@pytest.mark.parametrize("name", COUNTED)
def test_a_checkpoint_has_numbers_of_its_own(name: str, device: str) -> None:
    """Those of many parameters lie in one tensor, which goes on changing."""
    optimizer = ours(name, [torch.ones(n, device=device) for n in range(1, 9)], **LIVELY[name])
    saved = None
    for _ in range(2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        saved = saved or optimizer.state_dict()["state"]
    assert saved is not None
    for key in ("step", *optimizer._rule.scalar_states):
        kept, now = saved[7][key], optimizer.state_dict()["state"][7][key]
        assert kept.untyped_storage().nbytes() == kept.element_size()
        assert kept != now or key == "mu"


@pytest.mark.parametrize("way", ["fewer", "more", "integer", "freed", "data"])
def test_averages_that_do_not_fit(way: str, device: str) -> None:
    twins = lively("Adam", device, mine={"ema_decay": 0.5})
    twins.give(twins.grads())
    twins.ours.step()
    state = twins.ours.state[twins.params[1]]
    change, message = UNFIT[way]
    change(state, "ema")
    refused(twins, (ValueError, TypeError), f"ema of parameter 1 of group 0.*{message}")


# What is done to a parameter with a gradient, both of shape (3, 4).
UNFIT_GRADS: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "fewer": (lambda p, g: setattr(g, "data", g.new_zeros(3)), r"gradient of .* shape, \(3, 4\), got \(3,\)"),
    "more": (lambda p, g: setattr(g, "data", g.new_zeros(3, 40)), r"gradient of .* shape, \(3, 4\), got \(3, 40\)"),
    "resized": (lambda p, g: g.resize_(2), r"gradient of .* shape, \(3, 4\), got \(2,\)"),
    "freed": (lambda p, g: cut(g, 0), "gradient of .* cut to 0 bytes"),
    "cut": (lambda p, g: cut(g, 1), "gradient of .* cut to 24 bytes"),
    "larger parameter": (lambda p, g: setattr(p, "data", p.new_zeros(3, 40)), r"shape, \(3, 40\), got \(3, 4\)"),
    "parameter freed": (lambda p, g: cut(p, 0), "parameter 1 of group 0 .* cut to 0 bytes"),
    "parameter cut": (lambda p, g: cut(p, 3), "parameter 1 of group 0 .* cut to 72 bytes"),
}


@each_class
@pytest.mark.parametrize("way", UNFIT_GRADS)
@pytest.mark.parametrize("steps", [0, 2])
def test_gradients_that_do_not_fit(name: str, steps: int, way: str, device: str) -> None:
    """In the first step, and where a plan is there already."""
    twins = lively(name, device)
    for _ in range(steps):
        twins.step()
    twins.give(twins.grads())
    p, g = twins.params[1], twins.params[1].grad
    assert g is not None
    before, data, grad = plain(twins.params[0]), plain(p), plain(g)
    change, message = UNFIT_GRADS[way]
    with torch.no_grad():
        change(p, g)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            twins.ours.step()
    assert torch.equal(twins.params[0], before)
    p.data, p.grad = data, None  # a gradient of another shape could not be assigned
    p.grad = grad
    twins.each(lambda optimizer: optimizer.step())
    twins.check()


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("wrong", [torch.zeros(0), torch.zeros(2), torch.zeros((), dtype=torch.int32)], ids=str)
def test_scalars_of_a_scaler(name: str, wrong: Tensor, device: str) -> None:
    twins = lively("Adam", device)
    twins.step()
    setattr(twins.ours, name, wrong.to(device))
    twins.give(twins.grads())
    refused(twins, ValueError, f"Adam: {name} must hold one floating-point number")


# ---- what moved


def resized(t: Tensor) -> None:
    """The same values in other memory of the same storage, as offloading by storages does it."""
    storage = t.untyped_storage()
    size = storage.nbytes()
    storage.resize_(1 << 20)
    storage.resize_(size)


def old_kept(t: Tensor) -> None:
    """The memory before lives on, in somebody's hands."""
    kept.append(t.data)
    t.data = t.data.clone()
    kept[-1].fill_(torch.nan)


kept: list[Tensor] = []

MOVES: dict[str, Callable[[Tensor], object]] = {
    "resized": resized,
    "set": lambda t: t.set_(t.clone()),  # type: ignore[call-overload]
    "old kept": old_kept,
    "restrided": lambda t: setattr(t, "data", transposed(t) if t.dim() == 2 else t.clone()),
    "same memory restrided": lambda t: setattr(t, "data", t.data.as_strided((3, 4), (1, 3))) if t.dim() == 2 else None,
    "swapped": lambda t: torch.utils.swap_tensors(t, t.clone()),
    "view resized": lambda t: resized(t.view(-1) if t.is_contiguous() else t.data),
    "doubled": lambda t: t.mul_(2),
}


MOVED = [  # at once every pair of a class and a way, where kernels are interpreted
    pytest.param(device, name, way, held, marks=[pytest.mark.slow] * (device == "triton" and (n + w) % 3 != h))
    for device in ("torch", "triton")
    for (n, name), (w, way), (h, held) in itertools.product(
        enumerate(CLASSES), enumerate(MOVES), enumerate(["just looked up", "held since", "held by a checkpoint"])
    )
]


@pytest.mark.parametrize(("device", "name", "way", "held"), MOVED, indirect=["device"])
def test_states_that_move(name: str, way: str, held: str, device: str) -> None:
    """Whoever was given a state may move it at once, or many steps later."""
    if way == "resized" and device != "cpu":
        pytest.skip("the bytes are the CPU's")
    twins = lively(name, device)
    twins.step()
    twins.step()
    for key in ("step", *KEYS[name]):
        if key not in twins.ours.state[twins.params[1]]:
            continue
        if held == "held by a checkpoint":
            found = [optimizer.state_dict()["state"][1][key] for optimizer, _ in twins.both]
            if key == "step":
                continue  # a copy
        else:
            found = [optimizer.state[params[1]][key] for optimizer, params in twins.both]
        if held != "just looked up":
            twins.step()
            twins.step()
        for t in found:
            MOVES[way](t)
        del found
        twins.step()
    twins.step()
    kept.clear()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_parameters_of_the_same_memory_and_other_strides(name: str, device: str) -> None:
    twins = lively(name, device)
    for change in (
        lambda p: p.data.as_strided((3, 4), (1, 3)),
        lambda p: transposed(p.data),
        lambda p: p.data.as_strided((3, 4), (4, 1)),
    ):
        twins.step()
        for _, params in twins.both:
            params[1].data = change(params[1])
        twins.step()
    for _, params in twins.both:  # of as many elements, and another shape
        params[1].data = params[1].data.t()
    twins.give([None, None])
    twins.params[1].grad = torch.ones_like(twins.params[1])
    with pytest.raises(ValueError, match=r"of parameter 1 of group 0 must have the parameter's shape, \(4, 3\)"):
        twins.ours.step()


@each_class
def test_parameters_that_are_swapped(name: str, device: str) -> None:
    """As `Module.to` does it with DTensors: torch refuses to swap tensors that anybody but Python holds."""
    twins = lively(name, device)
    for _ in range(3):
        twins.step()
        for _, params in twins.both:
            for p in params:
                torch.utils.swap_tensors(p, torch.nn.Parameter(plain(p)))
    twins.step()


def test_states_are_looked_at_only_while_somebody_holds_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing 3,000 tensors costs 0.5 ms, which a step does without until somebody has been given a state."""
    twins = lively("Adam", device)
    for _ in range(2):
        twins.step()
    twins.ours.step()
    plan = twins.ours._plan
    calls: list[object] = []
    still = Watch._states_lie_still

    def counted(watch: Any) -> Any:
        calls.append(watch)
        return still(watch)

    monkeypatch.setattr(Watch, "_states_lie_still", counted)

    def looks() -> int:
        calls.clear()
        for _ in range(3):
            twins.ours.step()
        assert twins.ours._plan is plan
        return len(calls)

    state = twins.ours.state[twins.params[0]]
    assert looks() == 0, "nobody has looked"
    assert float(state["exp_avg"].sum()) == float(sum(state["exp_avg"].tolist()))
    assert looks() == 1, "somebody has looked, and holds nothing"
    held: Any = state["exp_avg"]
    assert looks() == 3
    held = held.untyped_storage()
    assert looks() == 3
    held = state["exp_avg"].view(-1)
    assert looks() == 3
    held = twins.ours.state_dict()
    assert looks() == 3
    del held
    assert looks() == 1
    assert looks() == 0
    ways: list[Callable[[Any], object]] = [
        dict, list, lambda s: {**s}, lambda s: s | {}, lambda s: {} | s, lambda s: s.get("exp_avg"),
        lambda s: [*s.values()], lambda s: [*s.items()], lambda s: s.copy(), lambda s: s.setdefault("step"),
    ]  # fmt: skip
    for way in ways:
        state.notes.accessed = False
        way(state)
        assert state.notes.accessed, "unnoticed"


@pytest.mark.parametrize("how", [lambda p: p.set_(torch.empty(0)), lambda p: setattr(p, "data", torch.empty(0))])
def test_parameters_without_gradients_may_give_their_memory_away(how: Callable[[Tensor], object]) -> None:
    """Blocks that are not trained for the time being: torch leaves them alone."""
    params = [torch.ones(4) for _ in range(2)]
    optimizer = ours("Adam", params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[0].grad = None
    how(params[0])
    optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == 2
    params[0].data = torch.ones(4)
    params[0].grad = torch.ones(4)
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 2


# ---- what is listed twice, or shares memory


def alone(name: str, params: Any, **options: Any) -> Any:
    """torch's own loop, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return genuine(name, params, **options)


def run_beside(name: str, make: Callable[[], list[Tensor]], device: str, **mine: Any) -> None:
    """Three steps of the tensors that `make` lists, by ours and by torch's loop."""
    results = []
    for kind in (ours, alone):
        place = device if kind is ours else "cpu"
        made = make()
        moved = {id(p): p.to(place) for p in made}  # what is listed twice stays one tensor
        params = [moved[id(p)] for p in made]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = kind(name, params, **LIVELY[name], **(mine if kind is ours else {}))
        for step in range(3):
            for i, p in enumerate({id(p): p for p in params}.values()):
                p.grad = values(p.shape, p.dtype, step, i).to(p.device)
            optimizer.step()
        states = [
            [value for key, value in state.items() if not key.startswith("ema")] for state in optimizer.state.values()
        ]
        results.append([*(p.detach().cpu() for p in params), *(t.cpu() for state in states for t in state)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def twice() -> list[Tensor]:
    a, b, empty = values((5,), torch.float64, 1), values((3, 4), torch.float64, 2), torch.zeros(0, dtype=torch.float64)
    return [a, b, a, empty, empty]


def tied() -> list[Tensor]:
    """Two parameters of the same memory, as `p.data = q.data` leaves them, and one of a part of it."""
    a = values((3, 4), torch.float64, 1)
    return [a, a.detach(), values((5,), torch.float64, 2), a.detach()[1:]]


def interleaved() -> list[Tensor]:
    """Columns of one matrix: no element is shared."""
    whole = values((3, 4), torch.float64, 1)
    return [whole[:, :2].detach(), whole[:, 2:].detach()]


@each_class
@pytest.mark.parametrize("make", [twice, tied, interleaved])
def test_listed_twice_or_of_the_same_memory(name: str, make: Callable[[], list[Tensor]], device: str) -> None:
    """Numbers and counters of torch's loop, which updates one after the other."""
    if make is not twice and device != "cpu":
        pytest.skip("`to` would part them")
    run_beside(name, make, device)
    run_beside(name, make, device, eps_inside_sqrt=False, ema_decay=0.5)


@pytest.mark.parametrize("name", CLASSES)
def test_listed_twice_in_two_groups_is_an_error(name: str) -> None:
    p = torch.ones(3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours(name, [{"params": [p]}, {"params": [p]}])


def test_listed_twice_with_options_beyond_torchs(device: str) -> None:
    """One by one by the reference: the same as two steps with half the parameters; averaged once a step."""
    a, b = (torch.linspace(0, 1, 5, dtype=torch.float64, device=device) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = tribp.optim.Adam([a, a], lr=0.1, eps_inside_sqrt=True, eps=1e-3, ema_decay=0.5)
    single = tribp.optim.Adam([b], lr=0.1, eps_inside_sqrt=True, eps=1e-3)
    for step in range(3):
        a.grad = values((5,), torch.float64, step).to(device)
        b.grad = a.grad.clone()
        listed.step()
        single.step()
        single.step()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert listed.state[a]["step"] == 6
    assert listed.state[a]["ema_step"] == 3


@pytest.mark.parametrize("options", [{}, {"eps_inside_sqrt": True}], ids=["torch's", "reference"])
def test_listed_twice_under_a_scaler(options: Options, device: str) -> None:
    """The gradient is divided by the scale once."""
    a = torch.ones(5, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer: Any = tribp.optim.Adam([a, a], lr=0.1, fused=True, **options)
    a.grad = torch.full_like(a, 8.0)
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.step()
    assert a.grad.tolist() == [2.0] * 5


def test_a_state_that_two_parameters_share(device: str) -> None:
    """By hand: torch's loop moves it twice a step."""
    twins = lively("Adam", device, shapes=[(5,), (5,)])
    twins.step()
    for optimizer, params in twins.both:
        optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"]
    twins.step()
    twins.step()


@each_class
def test_a_parameter_that_overlaps_itself(name: str, device: str) -> None:
    """torch refuses to write to expanded tensors; so do we, and no kernel runs."""
    for make in (ours, genuine):
        p = torch.ones(1, device=device).expand(4)
        p.grad = torch.ones(4, device=device)
        with pytest.raises(RuntimeError, match="single memory location"):
            make(name, [p]).step()


def test_what_overlaps() -> None:
    base = torch.zeros(100)
    for overlapping in (base[:1].expand(3), base.as_strided((3, 3), (1, 1)), base.as_strided((2, 2, 2), (1, 8, 8))):
        assert layouts.overlaps_itself(overlapping)
    for dense in (base, base.view(10, 10).t(), base[::3], base.view(10, 10)[:, :3], base[:1].view(1, 1), base[:0]):
        assert not layouts.overlaps_itself(dense)
    stretches = [base[:10], base[10:20], base[15:18], base[0:0], base[50:60], base[12:30], base[29:31]]
    assert layouts.overlapping(enumerate(stretches)) == {1, 2, 5, 6}


@each_class
def test_states_of_our_own_making_are_nobodys(name: str, device: str) -> None:
    """Made in the first step or the constructor, loaded, kept over a new group, averaged: nothing to be looked at."""
    twins = lively(name, device, mine={"ema_decay": 0.5})
    optimizer = twins.ours

    def held() -> bool:
        for _ in range(2):
            twins.give(twins.grads())
            optimizer.step()
        watch = optimizer._plan.watch
        return bool(watch.shared or watch.notes.accessed)

    if held():
        assert isinstance(optimizer._plan.buckets[-1], TorchBucket), "only torch's own code looks at every step"
        return
    saved = optimizer.state_dict()
    assert held()
    del saved
    assert not held()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not held()
    optimizer.add_param_group({"params": [torch.ones(3, dtype=torch.float64, device=device)]})
    assert not held()
