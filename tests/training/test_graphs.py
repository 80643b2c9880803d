"""`train_step(…, cuda_graph=True)`: what a graph repeats, and what it must not. Without a GPU launches are recorded."""

import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp.ops.train_step import graphs
from tribp.training import TrainStep

from ..optim.test_gpu import CLASSES

SIZES = (6, 8, 3)


class Recorded(graphs.CapturedStep):
    """Runs nothing while it records, then repeats the launches on the tensors they had."""

    made = 0

    def capture(self, step: graphs.StepFunction) -> None:
        from tribp.launch.plan import Plan

        runs: list[tuple[Plan, list[Tensor | None]]] = []

        def record(plan: Plan, tensors: Any, into: object = None) -> list[Tensor | None]:
            runs.append((plan, list(tensors)))
            return []

        with mock.patch.object(Plan, "run", record):
            self._loss = step(*self._batch)
        self._graph = SimpleNamespace(replay=lambda: [plan.run(tensors) for plan, tensors in runs])  # type: ignore[assignment]
        Recorded.made += 1


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, kernels: str) -> str:
    """The kernels' device, where graphs are made up if there are none."""
    if kernels != "cuda":
        obstacle, cuda = graphs.obstacle, torch.device("cuda")
        monkeypatch.setattr(graphs, "CapturedStep", Recorded)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(graphs, "obstacle", lambda optimizer, device: obstacle(optimizer, cuda))
    return kernels


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3))


def batch(device: str, seed: int, rows: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator)
    return x.to(device), target.to(device)


class Pair:
    """A step with a graph and one without, of equal models; `both` makes one step of each and compares all there is."""

    def __init__(self, device: str, kind: Any = tribp.optim.Adam, **options: Any) -> None:
        self.device, self.calls = device, 0
        self.models = [network().to(device)]
        self.models.append(copy.deepcopy(self.models[0]))
        self.optimizers = [kind(m.parameters(), capturable=True, **options) for m in self.models]
        self.steps = [
            tribp.train_step(m, o, "cross_entropy", cuda_graph=m is self.models[0])
            for m, o in zip(self.models, self.optimizers, strict=True)
        ]

    @property
    def graphed(self) -> TrainStep:
        return self.steps[0]

    def each(self, change: Callable[[Any, Any], object]) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            change(model, optimizer)

    def both(self, rows: int = 7) -> bool:
        """Whether the step was a replay."""
        self.calls += 1
        x, target = batch(self.device, self.calls, rows)
        ours, theirs = (step(x, target) for step in self.steps)
        assert self.steps[1].reason == self.graphed.reason
        assert torch.equal(ours, theirs)
        for p, q in zip(*(model.parameters() for model in self.models), strict=True):
            assert torch.equal(p, q)
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad)
        for p, q in zip(*(optimizer.state.values() for optimizer in self.optimizers), strict=True):
            assert {k: v for k, v in p.items() if not torch.equal(v, q[k])} == {}
        return self.graphed.graph_reason is None

    def many(self, steps: int) -> list[bool]:
        return [self.both() for _ in range(steps)]


FEW = (tribp.optim.SGD, tribp.optim.Adam, tribp.optim.NAdam)  # without a GPU what they launch is tested elsewhere


@pytest.mark.parametrize(
    ("kind", "options"), [pytest.param(*c, marks=[] if c[0] in FEW else pytest.mark.gpu) for c in CLASSES]
)
def test_steps_are_repeated_to_the_bit(kind: Any, options: dict[str, Any], recording: str) -> None:
    """From the second on, also for batches of another size in between: losses, parameters, gradients, states."""
    pair = Pair(recording, kind, **options)
    assert pair.many(4) == [False, True, True, True]
    assert [pair.both(rows) for rows in (4, 7, 4, 7)] == [False, True, True, True]
    losses = [pair.graphed(*batch(recording, seed)) for seed in range(2)]
    assert not torch.equal(*losses), "each loss has memory of its own"


@pytest.mark.parametrize("options", [dict(max_grad_norm=0.1, ema_decay=0.9), dict(state_bits=8)], ids=str)
def test_options_of_the_optimizer(options: dict[str, Any], recording: str) -> None:
    pair = Pair(recording, **options)
    assert pair.many(4) == [False, True, True, True]


def scaled_lr(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def filled_lr(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"].mul_(0.5)


def loaded(model: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def moved(model: Any, optimizer: Any) -> None:
    model.before = model[0].weight.data  # what a graph of before would write
    model[0].weight.data = model.before.clone()


def frozen(model: Any, optimizer: Any) -> None:
    model[0].weight.requires_grad_(False)


def steeper(model: Any, optimizer: Any) -> None:
    model[1].negative_slope = 0.3


def with_own_grads(model: Any, optimizer: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def grown(model: Any, optimizer: Any) -> None:
    torch.manual_seed(0)
    new = nn.Linear(3, 3).to(model[0].weight.device)
    model.append(new)
    optimizer.add_param_group({"params": list(new.parameters())})


def listed(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["betas"][0] = 0.1


def of_another_group(model: Any, optimizer: Any) -> None:
    one, other = optimizer.param_groups
    other["params"].append(one["params"].pop())


def clipped(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = optimizer.param_groups[1]["max_grad_norm"] = 1e-3


def noted(model: Any, optimizer: Any) -> None:
    next(iter(optimizer.state.values())).update(seen=torch.ones(()))


def scheduled(model: Any, optimizer: Any) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 100)


def cut(model: Any, optimizer: Any) -> None:
    model.before = [p.data for p in model.parameters()]
    model[0].weight.data, model[0].bias.data = model[0].weight.data[:4], model[0].bias.data[:4]
    model[2].weight.data = model[2].weight.data[:, :4].contiguous()
    for p in (model[0].weight, model[0].bias, model[2].weight):
        optimizer.state[p] = {k: v if v.dim() == 0 else torch.zeros_like(p) for k, v in optimizer.state[p].items()}


CHANGES = {
    "lr": scaled_lr, "states loaded": loaded, "a parameter moved": moved, "a parameter frozen": frozen,
    "an activation's argument": steeper, "gradients of others": with_own_grads, "a layer more": grown,
    "betas in place": listed, "another group": of_another_group, "clipping": clipped, "layers cut": cut,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_not_repeated(change: Any, recording: str) -> None:
    """The first step after it is performed; then it is what the graph repeats."""
    pair = Pair(recording)
    for optimizer, model in zip(pair.optimizers, pair.models, strict=True):
        optimizer.param_groups[0]["betas"] = [0.9, 0.99]  # as from a file
        optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [list(model.parameters())[-1]], "lr": 0.1})
    pair.many(3)
    pair.each(change)
    assert pair.many(3) == [False, True, True]


@pytest.mark.parametrize("change", [noted, scheduled])
def test_what_a_graph_may_find_after_one_step(change: Any, recording: str) -> None:
    """The next step makes another plan, which is nothing to be captured."""
    pair = Pair(recording)
    assert not pair.both()
    pair.each(change)
    assert pair.many(3) == [False, True, True]


def test_another_optimizer(recording: str) -> None:
    pair = Pair(recording)
    pair.many(3)
    for n, step in enumerate(pair.steps):
        pair.optimizers[n] = step.optimizer = tribp.optim.SGD(step.model.parameters(), lr=0.5, capturable=True)
    assert pair.many(3) == [False, True, True]


def test_copies_and_schedules(recording: str) -> None:
    """A copy captures its own; a schedule that is made after replays finds that steps were made."""
    pair = Pair(recording)
    pair.many(3)
    twin = copy.deepcopy(pair.graphed)
    for seed in range(3):
        twin(*batch(recording, seed))
    assert twin.graph_reason is None
    assert pair.both(), "the original's parameters are where they were"
    schedule = torch.optim.lr_scheduler.StepLR(pair.optimizers[0], 100)
    for seed in range(2):
        pair.graphed(*batch(recording, seed))
    pair.optimizers[0]._opt_called = False
    pair.graphed(*batch(recording, 0))
    assert pair.graphed.graph_reason is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


def test_states_that_were_loaded_are_let_go(recording: str) -> None:
    """Of a plan that a graph has read nothing is kept once another is made."""
    pair = Pair(recording)
    pair.many(3)
    held = [weakref.ref(s["exp_avg"].untyped_storage()) for s in pair.optimizers[0].state.values()]
    pair.each(loaded)
    assert pair.many(3) == [False, True, True]
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)
    assert not pair.optimizers[0]._captured


def test_a_step_in_its_own_names_place(recording: str) -> None:
    pair = Pair(recording)
    pair.many(2)
    calls: list[int] = []
    inner = pair.optimizers[0].step

    @functools.wraps(inner)
    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return inner(*arguments)

    pair.optimizers[0].step = counted
    assert not any(pair.many(3))
    assert len(calls) == 3


def test_no_layout_of_a_batch_is_new_to_the_capture(recording: str) -> None:
    """Whatever the caller's lie like, kernels were compiled for the graph's own when it is captured."""
    from tribp.launch import plan as plans

    pair = Pair(recording)
    x, target = torch.randn(9, 8, device=recording), torch.randint(3, (9,), device=recording)
    made = []
    for _ in range(3):
        pair.graphed(x[1:8, 1:7], target[1:8])
        made.append(plans.planned.cache_info().misses)
    assert pair.graphed.graph_reason is None
    assert made[0] == made[-1]


def test_what_a_graph_follows(recording: str) -> None:
    """Gradients that were set to None, and in-place changes of parameters and states."""
    pair = Pair(recording)
    pair.many(2)
    for _ in range(2):
        pair.each(lambda model, optimizer: optimizer.zero_grad())
        assert pair.both()
    with torch.no_grad():
        pair.each(lambda model, optimizer: [t.mul_(0.5) for t in model.parameters()])
        pair.each(lambda model, optimizer: [s["exp_avg"].zero_() for s in optimizer.state.values()])
    assert pair.both()


def test_an_lr_on_the_device(recording: str) -> None:
    """Is followed there; on the CPU its value is what the graph has."""
    pair = Pair(recording)
    pair.each(lambda model, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.01, device=recording)))
    pair.many(2)
    pair.each(filled_lr)
    assert pair.both() == (recording == "cuda")


def test_a_schedule_of_every_step(recording: str) -> None:
    """Numbers that change every time are never captured; what stays the same for two steps is."""
    pair, made = Pair(recording), Recorded.made
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9) for optimizer in pair.optimizers]
    for _ in range(3):
        assert not pair.both()
        for schedule in schedules:
            schedule.step()
    assert Recorded.made == made
    assert pair.many(2) == [False, True]


def test_few_graphs_are_kept(recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    pair = Pair(recording)
    for rows in (1, 2, 3):
        pair.both(rows)
    assert pair.both(2)
    assert not pair.both(1)


def test_why_a_step_is_performed(recording: str) -> None:
    pair = Pair(recording, ema_decay=0.5)
    pair.many(2)
    handles: list[Any] = []

    def hook(model: Any, optimizer: Any) -> None:
        handles.append(optimizer.register_step_post_hook(lambda *_: None))

    pair.each(hook)
    assert not pair.both()
    assert "hook" in str(pair.graphed.graph_reason)
    for handle in handles:
        handle.remove()
    assert pair.both()
    with torch.autocast(recording, torch.bfloat16):
        assert not pair.both()
    assert "autocast" in str(pair.graphed.graph_reason)
    assert pair.many(2) == [False, True]
    with pair.optimizers[0].swap_ema(), pytest.raises(RuntimeError, match="within swap_ema"):
        pair.graphed(*batch(recording, 0))
    assert pair.many(2) == [False, True]
    step = pair.optimizers[0].step
    pair.optimizers[0].step = lambda: step()
    assert not pair.both()
    assert "of its own" in str(pair.graphed.graph_reason)
    pair.optimizers[0].step = step
    pair.each(lambda model, optimizer: optimizer.param_groups[0].update(capturable=False))
    assert not pair.both()
    assert "capturable" in str(pair.graphed.graph_reason)


def test_norms_of_gradients_stay(recording: str) -> None:
    """Each step's norm is a tensor of its own, as without a graph."""
    pair = Pair(recording, max_grad_norm=1.0)
    norms: list[list[Tensor]] = [[], []]
    for _ in range(4):
        pair.both()
        for found, optimizer in zip(norms, pair.optimizers, strict=True):
            found.append(optimizer.grad_norm)
    assert list(map(float, norms[0])) == list(map(float, norms[1]))


def test_refuses_and_says_why() -> None:
    model = network()
    with pytest.raises(ValueError, match="capturable=True in every group of Adam"):
        tribp.train_step(model, tribp.optim.Adam(model.parameters()), "cross_entropy", cuda_graph=True)
    step = tribp.train_step(model, tribp.optim.Adam(model.parameters()), "cross_entropy")
    assert step.graph_reason == "cuda_graph is off"
    step = tribp.train_step(
        model, tribp.optim.Adam(model.parameters(), capturable=True), F.cross_entropy, cuda_graph=True
    )
    step(*batch("cpu", 0))
    assert step.graph_reason == step.reason == "Triton's kernels do not run here"


def test_on_a_device_without_graphs(kernels: str) -> None:
    model = network().to(kernels)
    step = tribp.train_step(
        model, tribp.optim.Adam(model.parameters(), capturable=True), "cross_entropy", cuda_graph=True
    )
    for seed in range(3):
        step(*batch(kernels, seed))
    assert step.graph_reason == (None if kernels == "cuda" else "there are no CUDA graphs on cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop])
def test_optimizers_of_torch(kind: Any) -> None:
    pair = Pair("cuda", kind)
    assert pair.many(4) == [False, True, True, True]


@pytest.mark.gpu
def test_streams_and_a_graph_of_the_user() -> None:
    """A step that is being captured from outside is performed there; replays run where they are called."""
    pair = Pair("cuda")
    pair.many(3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert pair.many(2) == [True, True]
    torch.cuda.current_stream().wait_stream(side)
    x, target = batch("cuda", 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = pair.graphed(x, target)
    assert pair.graphed.graph_reason == "another graph is being captured"
    graph.replay()
    assert torch.equal(loss, pair.steps[1](x, target))
    assert pair.both()
