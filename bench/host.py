"""`python -m bench host`: what tribp costs the host. Needs no GPU.

Three things are compared. What an optimizer's step on a GPU costs besides its kernels: tribp's plan, brought up to date
and made into a launch that is not performed, beside torch's fused Adam with its kernels taken out. The step of CPU
tensors, and of DTensors as FSDP2 makes them, where no kernel of tribp's runs, beside torch's as a user calls it by
default and with `fused=True`; what is left of it where nothing is looked at, and what each look takes. And steps and
calls of layers up to the driver of a GPU, the first ones too (`host_layers.py`).
"""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

import tribp
from tribp import dispatch, optim
from tribp.optim.footprint import guard, places, storage_sizes
from tribp.optim.layouts import GRAD, local_grads

from .no_gpu import always, pretending_h100
from .options import Options
from .results import commit, markdown, verdict, write_json
from .timing import Conditions, Repeated, summary, versions


@dataclass(frozen=True)
class Provider:
    make: Callable[[list[dict[str, Any]]], Any]
    conditions: Conditions  # under which it is made and run; entering them is not timed
    grouped: bool = True  # False: every tensor in a parameter group of its own


@dataclass(frozen=True)
class Target:
    """`over`'s time divided by `under`'s is to be at most, or at least, the limit."""

    over: str
    under: str
    limit: float
    at_least: bool = False


@dataclass(frozen=True)
class Comparison:
    """Providers that are timed in turns, each on tensors of its own.

    backward: gradients come from a backward pass before every step, so that Python has yet to make objects for them and
    caches hold other things, as in training. Otherwise two sets of gradients, which Python holds, take turns.
    cold: before every step torch's default Adam updates the same tensors, which leaves none of them in the caches.
    """

    name: str
    sizes: Sequence[int]  # elements of each tensor
    providers: Mapping[str, Provider]
    targets: Sequence[Target]
    backward: bool = False
    sharded: bool = False  # whether the tensors are DTensors
    cold: bool = False

    @contextlib.contextmanager
    def start(self) -> Iterator[Mapping[str, Callable[[], float]]]:
        with one_rank() if self.sharded else contextlib.nullcontext(torch.randn) as make:
            fixed = self.sizes, self.backward, make, self.cold
            yield {name: Running(one, *fixed).sample for name, one in self.providers.items()}


class Running(Repeated):
    """An optimizer at work: every step with other gradients than the one before it."""

    def __init__(
        self, provider: Provider, sizes: Sequence[int], backward: bool, make: Callable[[int], Tensor] = torch.randn,
        cold: bool = False,
    ) -> None:  # fmt: skip
        self._backward = backward
        self._params = [Parameter(make(n)) for n in sizes]
        self._grads = [[make(n) for n in sizes] for _ in range(2)]
        self._displace = torch.optim.Adam(self._params).step if cold else None
        groups = [self._params] if provider.grouped else [[p] for p in self._params]
        with provider.conditions():
            self._optimizer = provider.make([{"params": group} for group in groups])
        super().__init__(self._optimizer.step, provider.conditions, self._new_gradients)

    def _new_gradients(self) -> None:
        if self._backward:
            self._optimizer.zero_grad()
            torch.autograd.backward(self._params, self._grads[0])
        else:
            self._grads.reverse()
            for p, grad in zip(self._params, self._grads[0], strict=True):
                p.grad = grad
        if self._displace is not None:
            self._displace()


@dataclass(frozen=True)
class Questions:
    """What a step asks about so many tensors: the first question of states too, the second one of gradients too."""

    tensors: int
    targets: ClassVar[Sequence[Target]] = ()

    @property
    def name(self) -> str:
        return f"questions, {self.tensors}x8"

    def start(self) -> contextlib.AbstractContextManager[Mapping[str, Callable[[], float]]]:
        params = [Parameter(torch.randn(8)) for _ in range(self.tensors)]
        for p in params:
            p.grad = torch.randn(8)
        same, grads, alike, there = list(params), list(map(GRAD, params)), guard(params), places(params)
        questions: dict[str, Callable[[], object]] = {
            "same objects": lambda: all(map(is_, params, same)),
            "types, shapes, strides": lambda: alike(params),
            "addresses": lambda: there(params),
            "gradients": lambda: list(map(GRAD, params)),
            "storages' sizes": lambda: storage_sizes(grads),  # type: ignore[arg-type]
        }
        return contextlib.nullcontext({name: Repeated(ask, unchanged).sample for name, ask in questions.items()})


# -- what is compared -------------------------------------------------------------------------------------------------


unchanged = functools.partial(tribp.use_backend, "torch")


@contextlib.contextmanager
def one_rank() -> Iterator[Callable[[int], Tensor]]:
    """A process group of this process alone; given is what makes tensors that are sharded over it."""
    from torch import distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda n: distribute_tensor(torch.randn(n), mesh, [Shard(0)])
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def launching_nothing() -> Any:
    """tribp's plan for CPU tensors, as for the interpreter; its launches are not performed."""
    from tribp.launch import plan as plans
    from tribp.launch.plan import Launch

    with (
        mock.patch.object(dispatch, "interpreting", always(True)),
        tribp.use_backend("triton"),
        mock.patch.object(Launch, "run", always(None)),
        mock.patch.object(plans.CachedLaunch, "__call__", always(None)),  # what is repeated
    ):
        yield


def nothing(*arguments: object, **options: object) -> None:
    pass


def without_kernels() -> contextlib.AbstractContextManager[object]:
    """torch's fused Adam without its kernels: the update, and the counting of steps."""
    return mock.patch.multiple(torch, _fused_adam_=nothing, _foreach_add_=nothing)


def plans(smoke: bool) -> list[Comparison]:
    """tribp's plan beside the bookkeeping of torch's fused Adam."""
    tensors, groups = (5, 3) if smoke else (1000, 465)
    torchs = Provider(lambda groups: torch.optim.Adam(groups, fused=True), without_kernels)
    whole = replace(torchs, conditions=contextlib.nullcontext)
    ours = Provider(lambda groups: optim.Adam(groups), launching_nothing)
    comparisons = [
        Comparison(
            f"Adam plan, {tensors}x8",
            [8] * tensors,
            {"plan": ours, "fused bookkeeping": torchs, "fused": whole},
            [Target("plan", "fused bookkeeping", 0.25), Target("plan", "fused", 0.1)],
        ),
        Comparison(
            f"Adam plan, {groups} groups of 1x8",
            [8] * groups,
            {
                "plan": replace(ours, grouped=False),
                "plan, one group": ours,
                "fused bookkeeping": replace(torchs, grouped=False),
                "fused": replace(whole, grouped=False),
            },
            [Target("plan", "fused bookkeeping", 0.25), Target("plan", "plan, one group", 1.25)],
        ),
    ]
    return comparisons + after_backward(comparisons)


def steps() -> list[Comparison]:
    """A whole step on a GPU, up to the driver: its launch repeated, and as Triton performs a new one."""
    from tribp.launch import plan as plans

    @contextlib.contextmanager
    def anew() -> Any:
        with (
            pretending_h100(),
            mock.patch.object(plans, "planned", functools.lru_cache(maxsize=0)(plans.planned.__wrapped__)),
        ):
            yield

    ours = Provider(lambda groups: optim.Adam(groups), pretending_h100)
    providers = {"tribp": ours, "tribp, a new launch": replace(ours, conditions=anew)}
    return [Comparison(f"Adam step, {n}x8", [8] * n, providers, []) for n in (1, 62)]


def after_backward(comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [replace(c, name=f"{c.name}, after backward", backward=True) for c in comparisons]


CLASSES: dict[str, tuple[str, dict[str, Any], float]] = {  # and how many times as fast as torch's on small tensors
    "Adam": ("Adam", {}, 30),
    "AdamW": ("AdamW", {}, 30),
    "SGD momentum": ("SGD", {"momentum": 0.9}, 12),
    "Adagrad": ("Adagrad", {}, 20),
    "RMSprop": ("RMSprop", {}, 12),
    "SGD": ("SGD", {}, 1),
    **{name: (name, {}, 10) for name in ("Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")},
}
LIBRARIES: dict[str, Any] = {"tribp": optim, "torch": torch.optim}
ROUNDS = 15  # samples of each provider
SIZES = (1, 100, 10_000, 1_000_000, 16_000_000)


def fallbacks(smoke: bool) -> list[Comparison]:
    """tribp on CPU tensors beside torch as a user calls it by default and, for many tensors, with `fused=True`."""

    def comparison(name: str, sizes: Sequence[int], limit: float) -> Comparison:
        class_name, options, _ = CLASSES[name]
        providers = {library: provider(module, class_name, **options) for library, module in LIBRARIES.items()}
        targets = [Target("torch", "tribp", limit, at_least=True)]
        if len(sizes) == 1:
            return Comparison(f"{name}, {sizes[0]}", sizes, providers, targets)
        providers["tribp, unchecked"] = unchecked(providers["tribp"])
        if "fused" in inspect.signature(getattr(torch.optim, class_name)).parameters:
            providers["torch fused"] = provider(torch.optim, class_name, **options, fused=True)
            targets.append(Target("torch fused", "tribp", 1.2, at_least=True))
        return Comparison(f"{name}, {len(sizes)}x{sizes[0]}", sizes, providers, targets)

    small = [comparison(name, [8] * (5 if smoke else 1000), limit) for name, (_, _, limit) in CLASSES.items()]
    single = [comparison(name, [n], 1) for name in CLASSES for n in (SIZES[:1] if smoke else SIZES)]
    return small + after_backward(small) + single


class Unchecked:
    """tribp's optimizer, its plan taken to fit: of a step there is left to read the gradients and to update.

    What a step takes beyond this is seeing that nothing has changed.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self.zero_grad = optimizer, optimizer.zero_grad

    def step(self) -> None:
        plan = self._optimizer._plan
        if plan is None:
            self._optimizer.step()
        else:
            with torch.no_grad():
                grads = local_grads(plan.params) if plan.watch.sharded else list(map(GRAD, plan.params))
                plan.run(self._optimizer, grads, None, None, False)


def unchecked(provider: Provider) -> Provider:
    return replace(provider, make=lambda groups: Unchecked(provider.make(groups)))


def provider(module: Any, class_name: str, **options: Any) -> Provider:
    return Provider(lambda groups: getattr(module, class_name)(groups, **options), unchanged)


def shards(smoke: bool) -> list[Comparison]:
    """tribp on DTensors, as FSDP2's parameters are, beside torch's default, foreach and, where there is one, fused."""
    if not torch.distributed.is_available():
        return []

    sizes = [64, 8] * (2 if smoke else 200)
    comparisons = []
    for name, (class_name, options, _) in CLASSES.items():
        if name == "Rprop":
            continue  # torch's own writes by a mask, which DTensors do not know
        # To the others' fused kernels DTensors are unknown.
        modes = ["foreach", "fused"] if class_name in ("Adam", "AdamW") else ["foreach"]
        providers = {library: provider(module, class_name, **options) for library, module in LIBRARIES.items()}
        for mode in modes:
            providers[f"torch {mode}"] = provider(torch.optim, class_name, **options, **{mode: True})
        targets = [Target(f"torch {mode}", "tribp", 10, at_least=True) for mode in modes]
        comparisons.append(Comparison(f"{name}, {len(sizes)} DTensors", sizes, providers, targets, sharded=True))
    ours = provider(optim, "Adam")
    providers = {"tribp": ours, "tribp, unchecked": unchecked(ours)}
    name = f"Adam, {len(sizes)} DTensors, in no cache"
    return [*comparisons, Comparison(name, sizes, providers, [], sharded=True, cold=True)]


# -- measuring and showing --------------------------------------------------------------------------------------------


def comparisons(smoke: bool) -> list[Any]:
    """All that can be compared here: those of this file, and of `host_layers`."""
    comparisons: list[Any] = []
    if dispatch.has_triton():
        comparisons += plans(smoke)
    if dispatch.has_triton() and not dispatch.interpreting():
        from . import host_layers

        comparisons += [*steps(), *host_layers.comparisons()]
    return [*comparisons, *fallbacks(smoke), Questions(5 if smoke else 1000), *shards(smoke)]


def measure(comparison: Any, rounds: int) -> dict[str, Any]:
    """A row: the times of all providers in µs, and what became of the targets."""
    with comparison.start() as samples:
        times: dict[str, list[float]] = {name: [] for name in samples}
        for _ in range(rounds):
            for name, sample in samples.items():  # in turns: a slow minute of the machine's is everybody's
                times[name].append(sample())
    summaries = {name: summary(us) for name, us in times.items()}
    medians = {name: us["median"] for name, us in summaries.items()}
    return {
        "case": comparison.name,
        "host_us": summaries,
        "targets": [judge(target, medians) for target in comparison.targets],
    }


def judge(target: Target, medians: Mapping[str, float] | None) -> dict[str, Any]:
    """Compare the ratio of two medians with its target. `medians` is None if nothing was measured."""
    ratio = None if medians is None else medians[target.over] / medians[target.under]
    limit, at_least = target.limit, target.at_least
    judged = verdict(
        f"{'≥' if at_least else '≤'} {limit:g}", ratio, lambda value: value >= limit if at_least else value <= limit
    )
    return {"what": f"{target.over} / {target.under}"} | judged


def unmeasured() -> list[dict[str, Any]]:
    """Rows of all comparisons, with nothing in them measured."""
    return [
        {"case": c.name, "targets": [judge(target, None) for target in c.targets]}
        for c in plans(False) + fallbacks(False) + shards(False)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        times = ", ".join(f"{name} {us['median']:.4g}" for name, us in row["host_us"].items())
        for target in row["targets"]:
            lines.append(
                [row["case"], times, target["what"], f"{target['ratio']:.3g}", target["target"], target["verdict"]]
            )
            times = ""
        if times:
            lines.append([row["case"], times, "", "", "", ""])
    return markdown(["case", "µs a step or a call", "ratio of", "ratio", "target", "verdict"], lines)


def main(options: Options) -> int:
    """Measure, print and write; 0 whatever the verdicts: a noisy machine is no mistake."""
    if not dispatch.has_triton():
        print("left out is what a GPU would be given, the plan's part and the calls': it needs triton")
    elif dispatch.interpreting():
        print("calls of layers are left out: under TRITON_INTERPRET=1 Triton compiles nothing")
    smoke = options.smoke
    there = comparisons(smoke)
    chosen = [c for c in there if not options.case or any(part in c.name for part in options.case)]
    if not chosen:
        raise ValueError(f"there is no such case; there are: {', '.join(c.name for c in there)}")
    rows = []
    for comparison in chosen:
        rows.append(measure(comparison, 2 if smoke else ROUNDS))
        if smoke:
            for target in rows[-1]["targets"]:
                target["verdict"] = "unmeasured"
        if sys.stderr.isatty():
            print(f"\r{len(rows)}/{len(chosen)} {comparison.name:<40}", end="", file=sys.stderr, flush=True)
    load = os.getloadavg()[0]
    head = {"smoke": smoke, "commit": commit(), "cpus": os.cpu_count(), "load": load, "versions": versions()}
    mark = "smoke: the times mean nothing; " if smoke else ""
    print(f"host ({mark}{os.cpu_count()} CPUs, load average {load:.1f}, of which this is about 1)\n\n{table(rows)}")
    if options.json:
        write_json(options.json, head | {"rows": rows})
    return 0
