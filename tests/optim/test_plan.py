"""What a plan rests on, one by one: guards, layouts, and tables whose uploads must not overtake each other."""

from collections import UserDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from tribp import footprint
from tribp.launch.buffer import layout_of
from tribp.optim import Adam, device_tables, layouts
from tribp.optim.layouts import MAX_DIMS

from .cases import Twins, genuine, ours

LIKE = torch.zeros(4, 6)
UNLIKE: dict[str, Any] = {
    "absent": None,
    "dtype": torch.zeros(4, 6, dtype=torch.float64),
    "shape": torch.zeros(4, 5),
    "strides": torch.zeros(6, 4).t(),
    "layout": torch.zeros(4, 6).to_sparse(),
    "kind": torch.nn.Parameter(LIKE.clone()),
    "device": torch.zeros(4, 6, device="meta"),
}


@pytest.fixture(params=["torch's guards", "Python"])
def check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The guard of two tensors, in both ways; the second takes over where torch has no such class."""
    if request.param == "Python":
        monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    return footprint.layout_guard([LIKE, torch.zeros(3)])


@pytest.mark.parametrize("what", UNLIKE)
def test_guards_notice(check: Any, what: str) -> None:
    assert check([torch.ones(4, 6), torch.ones(3)])
    assert not check([UNLIKE[what], torch.ones(3)])
    if what != "absent":
        assert check([torch.ones(4, 6), torch.ones(3)]), "one mismatch is no reason to refuse what fits"


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "replaced": lambda d: d.update(lr=0.2),
    "by an equal one": lambda d: d.update(lr=float("0.1")),
    "added": lambda d: d.setdefault("eps", 0.1),
    "removed": lambda d: d.pop("betas"),
    "cleared": dict.clear,
}


@pytest.mark.parametrize("kind", [dict, defaultdict])
@pytest.mark.parametrize("change", CHANGES)
def test_dicts_tell_that_an_entry_changed(change: str, kind: type[dict[str, Any]]) -> None:
    mapping = kind()
    mapping.update(lr=float("0.1"), betas=(0.9, 0.99))
    before = footprint.dict_version(mapping)
    assert footprint.dict_version(mapping) == before
    assert mapping["lr"], "reading is no change"
    assert footprint.dict_version(mapping) == before
    CHANGES[change](mapping)
    assert footprint.dict_version(mapping) != before
    assert footprint.dict_version(dict(mapping)) != footprint.dict_version(mapping), "a copy is another one"


@pytest.mark.parametrize(
    "fill", [lambda d: d.update(lr=0.1), lambda d: d.__ior__({"lr": 0.1}), lambda d: d.setdefault("lr", 0.1)]
)
@pytest.mark.parametrize("kind", [dict, defaultdict])
def test_an_empty_dict_is_not_as_it_was_once_it_is_filled(
    fill: Callable[[dict[str, Any]], object], kind: type[dict[str, Any]]
) -> None:
    mapping = kind()
    before = footprint.dict_version(mapping)
    fill(mapping)
    assert footprint.dict_version(mapping) != before


@pytest.mark.parametrize("mapping", [{"lr": 0.1}, UserDict(lr=0.1)], ids=["a torch that can't say", "no dict"])
def test_nothing_is_equal_to_an_unknown_version(mapping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(mapping, dict):
        monkeypatch.setattr(footprint, "_version", None)
    assert footprint.dict_version(mapping) != footprint.dict_version(mapping)


@pytest.mark.parametrize("dims", [MAX_DIMS, MAX_DIMS + 1])
def test_as_many_dimensions_as_the_kernel_unrolls(dims: int, kernels: str, launched: list[str]) -> None:
    """One more is left to torch's own code, with the same result."""
    shape = (2,) * dims
    start = torch.arange(2.0 * 3**dims, device=kernels).resize_((3,) * dims).cos()
    params = [start[(slice(0, 2),) * dims].detach().clone(), start.clone()[(slice(0, 2),) * dims]]
    gaps = params[1].requires_grad_()
    dense = params[0].contiguous().requires_grad_()
    optimizers = ours("Adam", [gaps], lr=0.1), genuine("Adam", [dense], lr=0.1, foreach=False)
    for step in range(2):
        grad = torch.randn(shape, device=kernels, generator=torch.Generator(kernels).manual_seed(step))
        gaps.grad, dense.grad = grad, grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(gaps, dense, rtol=1e-6, atol=1e-6)
    assert bool(launched) == (dims == MAX_DIMS)


class Staging:
    """Page-locked memory as `tables` uses it; a copy out of it is finished when the test says so."""

    made: list["Staging"]

    def __init__(self, length: int) -> None:
        self.words = [0] * length
        self.idle = True
        self.pending: list[list[int]] = []  # what the device has still to read, as it was when the copy was issued
        self.copied = self
        Staging.made.append(self)

    def upload(self, words: list[int], target: Tensor) -> None:
        assert not self.pending, "written while a copy out of it was in flight"
        self.idle = False
        self.words = list(words)
        target.copy_(torch.tensor(words))

    def record(self) -> None:
        self.pending.append(self.words)

    def query(self) -> bool:
        return not self.pending


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> device_tables.Table:
    """A table that uploads as on a GPU."""
    Staging.made = []
    monkeypatch.setattr(device_tables, "_Staging", Staging)
    found = device_tables.Table(torch.device("cpu"))
    found._staged = True
    return found


def test_uploads_wait_for_nothing_and_overtake_nothing(table: device_tables.Table) -> None:
    for n in range(3):  # the device is busy: every upload takes memory of its own
        assert table.write([n, n + 1]).tolist() == [n, n + 1]
    assert len(Staging.made) == 3
    table.write([2, 3])
    assert len(Staging.made) == 3, "nothing changed, nothing is uploaded"
    for staging in Staging.made:
        staging.pending.clear()
    for n in range(10, 13):  # the device has caught up each time: memory is used again
        assert table.write([n, n]).tolist() == [n, n]
        for staging in Staging.made:
            staging.pending.clear()
    assert len(Staging.made) == 3


def test_what_a_graph_reads_is_never_written_again(table: device_tables.Table) -> None:
    table.write([1, 2])
    Staging.made[0].pending.clear()
    table.reserve(2)
    stock = len(Staging.made)
    kept: list[object] = []
    captured = [table.write([n, n], captured=kept) for n in (7, 8)]
    assert len(kept) == 2, "the graph's owner holds what it reads"
    assert len(Staging.made) == stock, "allocated during the capture"
    taken = [staging for staging in Staging.made if staging.words in ([7, 7], [8, 8])]
    for n in range(20, 40):
        assert table.write([n, n]).tolist() == [n, n]
        for staging in Staging.made:
            staging.pending.clear()
        table.reserve(2)
    assert [tensor.tolist() for tensor in captured] == [[7, 7], [8, 8]]
    assert [staging.words for staging in taken] == [[7, 7], [8, 8]]
    assert len(Staging.made) <= stock + 2, "the reserve is filled up once, not at every step"


def test_eager_steps_go_on_with_their_own_table(table: device_tables.Table) -> None:
    before = table.write([1, 2])
    table.write([3, 4], captured=[])
    assert table.write([1, 2]) is before
    assert before.tolist() == [1, 2]


@pytest.mark.parametrize("staged", [False, True])
def test_a_table_keeps_its_layout(table: device_tables.Table, staged: bool) -> None:
    """A bucket takes launches for it that were worked out before: outside captures it is one tensor, written again."""
    table._staged = staged
    first = table.write([1])
    lies = layout_of(first)
    assert table.write([2]) is first
    assert (first.tolist(), layout_of(first)) == ([2], lies)
    if staged:
        captured = table.write([3], captured=[])
        assert captured is not first
        assert layout_of(captured) == lies


def test_a_table_of_tensors_without_memory() -> None:
    """`bench static` asks what steps of `meta` tensors would launch."""
    assert device_tables.Table(torch.device("meta")).write([1, 2]).tolist() == [1, 2]


def test_layouts_in_as_few_dimensions_as_possible() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert layouts.layout_row([x, x.clone(), x.clone()]) == []
    last = x.contiguous(memory_format=torch.channels_last)
    assert layouts.layout_row([last, last.clone()]) == []
    row = layouts.layout_row([last, x])
    assert row is not None
    sizes, param, grad, state = (row[i : i + MAX_DIMS] for i in range(0, 4 * MAX_DIMS, MAX_DIMS))
    assert sizes[-3:] == [2, 20, 3]  # height and width lie together in both
    assert (param[-3:], grad[-3:], state[-3:]) == ([60, 3, 1], [60, 1, 20], [60, 3, 1])


@pytest.mark.parametrize("name", ["Adam", "SGD", "NAdam"])
def test_one_plan_where_gradients_come_and_go(name: str, device: str) -> None:
    """The first step sees half of them. Parameters are `Parameter`s, as users have them, and gradients are not."""
    params = [torch.nn.Parameter(torch.ones(4, device=device)) for _ in range(8)]
    optimizer = ours(name, params)
    plans = []
    for step in range(8):
        for k, p in enumerate(params):
            p.grad = torch.ones_like(p) if k % 2 == step % 2 else None
        optimizer.step()
        plans.append(optimizer._plan)
    assert len({id(plan) for plan in plans[1:]}) == 1


WRAPPERS: dict[str, Callable[[Any, Tensor], object]] = {
    "a state of their own": lambda o, p: o.state[p].__setitem__("previous", p.detach().clone()),
    "and taken out": lambda o, p: (o.state[p].setdefault("mine", 1), o.state[p].pop("mine")),
    "other memory": lambda o, p: setattr(p, "data", p.data.clone()),
    "a view of other memory": lambda o, p: setattr(p, "data", torch.cat([p.data, p.data])[: len(p)]),
}


@pytest.mark.parametrize("name", ["Adam", "SGD", "NAdam"])
@pytest.mark.parametrize("what", WRAPPERS)
def test_one_plan_within_other_optimizers(what: str, name: str, device: str) -> None:
    """SAM and Lookahead change this before every step."""
    twins = Twins(name, [(4,)] * 8, device)
    twins.step()
    plans = []
    for _ in range(4):
        twins.give(twins.grads())
        for optimizer, params in twins.both:
            for p in params:
                old = p.data
                WRAPPERS[what](optimizer, p)
                if p.data_ptr() != old.data_ptr():
                    old.fill_(torch.nan)  # stale addresses are seen
            optimizer.step()
        plans.append(twins.ours._plan)
    for p, twin in zip(twins.params, twins.twins, strict=True):
        torch.testing.assert_close(p.cpu(), twin, rtol=1e-12, atol=1e-13)
    assert len(set(map(id, plans))) == 1


def test_parameters_that_move_onto_each_other(device: str) -> None:
    """… are no longer updated side by side: torch's loop takes them in turn."""
    twins = Twins("Adam", [(4,), (4,)], device)
    twins.step()

    def tie(optimizer: Any) -> None:
        first, second = optimizer.param_groups[0]["params"]
        second.data = first.data

    twins.each(tie)
    plan = twins.ours._plan
    twins.step()
    assert twins.ours._plan is not plan


@pytest.mark.parametrize("versions", [True, False], ids=["versions", "none"])
def test_a_plan_is_kept(kernels: str, versions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """New gradients, other numbers: the same plan; another parameter: another one. Also where dicts have no version."""
    if not versions:
        monkeypatch.setattr(footprint, "_version", None)
    p = torch.ones(5, device=kernels).requires_grad_()
    optimizer = Adam([p])
    plans = set()
    for step in range(4):
        p.grad = torch.full_like(p, float(step))
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        plans.add(id(optimizer._plan))
    assert len(plans) == 1
    first = optimizer._plan
    optimizer.add_param_group({"params": [torch.ones(2, device=kernels).requires_grad_()]})
    optimizer.step()
    assert optimizer._plan is not first
    with tribp.use_backend("torch"):
        optimizer.step()
    assert optimizer._plan is not first
