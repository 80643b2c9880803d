"""`python -m bench host`: what tribp costs the host; no GPU needed.

Three things are compared. What an optimizer's step on a GPU costs besides its kernels: tribp's plan, brought up to date
and made into a launch that is not performed, beside torch's fused Adam with its kernels taken out. The step of CPU
tensors, and of DTensors as FSDP2 makes them, where no kernel of tribp's runs, beside torch's as a user calls it by
default and with `fused=True`; what is left of it where nothing is looked at, and what each look takes. And steps and
calls of layers up to the driver of a GPU, the first ones too (`host_layers.py`). Providers take turns; load on the
machine falsifies it.
"""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

import tribp
from tribp import dispatch, optim
from tribp.footprint import address_guard, layout_guard, storage_sizes
from tribp.launch.arch import ARCHS
from tribp.optim.layouts import GRAD, gradients, local_all

from .no_gpu import always, pretending_h100, pretending_h100_anew, running_on
from .options import Options
from .results import commit, markdown, verdict, write_json
from .timing import Comparison, Conditions, HostTarget, Repeated, Samples, summary, versions

unchanged = functools.partial(tribp.use_backend, "torch")


# -- an optimizer at work ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    make: Callable[[list[dict[str, Any]]], Any]
    conditions: Conditions = unchanged  # under which it is made and run; entering them is not timed
    grouped: bool = True  # False: every tensor in a parameter group of its own


class Running(Repeated):
    """Steps, each with other gradients than the one before it.

    backward: they come from a backward pass, so that Python has yet to make objects for them and caches hold other
    things, as in training. Otherwise two sets of gradients, which Python holds, take turns. cold: before every step
    torch's default Adam updates the same tensors, which leaves none of them in the caches.
    """

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


def optimizers(
    name: str, sizes: Sequence[int], providers: Mapping[str, Provider], *targets: HostTarget, backward: bool = False,
    sharded: bool = False, cold: bool = False,
) -> Comparison:  # fmt: skip
    """Steps on tensors of so many elements, each provider's own. sharded: on DTensors."""

    @contextlib.contextmanager
    def start() -> Iterator[Samples]:
        with one_rank() if sharded else contextlib.nullcontext(torch.randn) as make:
            yield {name: Running(one, sizes, backward, make, cold).sample for name, one in providers.items()}

    return Comparison(f"{name}, after backward" if backward else name, start, targets)


@contextlib.contextmanager
def one_rank() -> Iterator[Callable[[int], Tensor]]:
    """A process group of this process alone; given is what makes tensors that are sharded over it.

    As FSDP2 does it, which gives a parameter and its gradients one description.
    """
    from torch import distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        distributed: Any = DTensor

        @functools.cache
        def parameter(n: int) -> Any:
            return Parameter(distribute_tensor(torch.empty(n), mesh, [Shard(0)]))

        yield lambda n: distributed(torch.randn(n), parameter(n)._spec, requires_grad=False)
    finally:
        dist.destroy_process_group()


# -- what is compared -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """CPU tensors have the plan of an H100's, and its launches are not performed."""
    from tribp.launch.launches import CachedLaunch

    with running_on(ARCHS["sm_90"]), mock.patch.object(CachedLaunch, "__call__", always(None)):
        yield


def without_kernels() -> contextlib.AbstractContextManager[object]:
    """torch's fused Adam without its kernels: the update, and the counting of steps."""

    def nothing(*arguments: object, **options: object) -> None:
        pass

    return mock.patch.multiple(torch, _fused_adam_=nothing, _foreach_add_=nothing)


PLANS = {
    "plan": Provider(optim.Adam, launching_nothing),
    "fused bookkeeping": Provider(functools.partial(torch.optim.Adam, fused=True), without_kernels),
    "fused": Provider(functools.partial(torch.optim.Adam, fused=True), contextlib.nullcontext),
}


def plans(smoke: bool) -> Iterator[Comparison]:
    """tribp's plan beside the bookkeeping of torch's fused Adam."""
    tensors, groups = (5, 3) if smoke else (1000, 465)
    apart = {name: replace(one, grouped=False) for name, one in PLANS.items()} | {"plan, one group": PLANS["plan"]}
    beside = HostTarget("fused bookkeeping", "plan", 4)
    for backward in (False, True):
        whole = HostTarget("fused", "plan", 10)
        yield optimizers(f"Adam plan, {tensors}x8", [8] * tensors, PLANS, beside, whole, backward=backward)
        name, alike = f"Adam plan, {groups} groups of 1x8", HostTarget("plan, one group", "plan", 0.8)
        yield optimizers(name, [8] * groups, apart, beside, alike, backward=backward)


def steps() -> Iterator[Comparison]:
    """A whole step on a GPU, up to the driver: its launch repeated, and as Triton performs a new one."""
    anew = Provider(optim.Adam, pretending_h100_anew)
    providers = {"tribp": Provider(optim.Adam, pretending_h100), "tribp, a new launch": anew}
    return (optimizers(f"Adam step, {n}x8", [8] * n, providers) for n in (1, 62))


CLASSES: dict[str, tuple[str, dict[str, Any], float]] = {  # and how many times as fast as torch's on small tensors
    "Adam": ("Adam", {}, 30),
    "AdamW": ("AdamW", {}, 30),
    "SGD momentum": ("SGD", {"momentum": 0.9}, 12),
    "Adagrad": ("Adagrad", {}, 20),
    "RMSprop": ("RMSprop", {}, 12),
    "SGD": ("SGD", {}, 1),
    **{name: (name, {}, 10) for name in ("Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")},
}
ROUNDS = 15  # samples of each provider
SIZES = (1, 100, 10_000, 300_000, 600_000, 1_000_000, 16_000_000)  # two of few pieces (`Rule.piece`)


def beside_torch(name: str, *modes: str) -> dict[str, Provider]:
    """A class of CLASSES: tribp's, also unchecked, and torch's, as a user calls it by default and in these modes."""
    class_name, fixed, _ = CLASSES[name]
    ours, theirs = (functools.partial(getattr(module, class_name), **fixed) for module in (optim, torch.optim))
    unchecked = Provider(lambda groups: Unchecked(ours(groups)))
    providers = {"tribp": Provider(ours), "torch": Provider(theirs), "tribp, unchecked": unchecked}
    return providers | {f"torch {mode}": Provider(functools.partial(theirs, **{mode: True})) for mode in modes}


def fallbacks(smoke: bool) -> Iterator[Comparison]:
    """tribp on CPU tensors beside torch as a user calls it by default and, for many tensors, with `fused=True`."""
    count = 5 if smoke else 1000
    for backward in (False, True):
        for name, (class_name, _, limit) in CLASSES.items():
            modes = ["fused"] if "fused" in inspect.signature(getattr(torch.optim, class_name)).parameters else []
            targets = [HostTarget("torch", "tribp", limit), *(HostTarget(f"torch {m}", "tribp", 1.2) for m in modes)]
            yield optimizers(f"{name}, {count}x8", [8] * count, beside_torch(name, *modes), *targets, backward=backward)
    for name in CLASSES:
        providers = beside_torch(name)
        del providers["tribp, unchecked"]
        target = HostTarget("torch", "tribp", 1)
        yield from (optimizers(f"{name}, {n}", [n], providers, target) for n in SIZES[: 1 if smoke else None])


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
                grads = local_all(gradients(plan.params)) if plan.watch.sharded else list(map(GRAD, plan.params))
                plan.run(self._optimizer, grads, None, None)


def shards(smoke: bool) -> Iterator[Comparison]:
    """tribp on DTensors, as FSDP2's parameters are, beside torch's default, foreach and, where there is one, fused."""
    if not torch.distributed.is_available():
        return
    sizes = [64, 8] * (2 if smoke else 200)
    for name in CLASSES:
        if name == "Rprop":  # torch's own writes by a mask, which DTensors do not know
            providers = beside_torch(name)
            del providers["torch"]
            yield optimizers(f"{name}, {len(sizes)} DTensors", sizes, providers, sharded=True)
            continue
        # To the others' fused kernels DTensors are unknown.
        modes = ["foreach", "fused"] if name in ("Adam", "AdamW") else ["foreach"]
        targets = [HostTarget(f"torch {mode}", "tribp", 10) for mode in modes]
        yield optimizers(f"{name}, {len(sizes)} DTensors", sizes, beside_torch(name, *modes), *targets, sharded=True)
    providers = beside_torch("Adam")
    del providers["torch"]
    yield optimizers(f"Adam, {len(sizes)} DTensors, in no cache", sizes, providers, sharded=True, cold=True)


def questions(tensors: int) -> contextlib.AbstractContextManager[Samples]:
    """What a step asks about so many tensors: the first question of states too, the second one of gradients too."""
    params = [Parameter(torch.randn(8)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(8)
    same, grads, alike, there = list(params), list(map(GRAD, params)), layout_guard(params), address_guard(params)
    questions: dict[str, Callable[[], object]] = {
        "same objects": lambda: all(map(is_, params, same)),
        "types, shapes, strides": lambda: alike(params),
        "addresses": lambda: there(params),
        "gradients": lambda: list(map(GRAD, params)),
        "storages' sizes": lambda: storage_sizes(grads),  # type: ignore[arg-type]
    }
    return contextlib.nullcontext({name: Repeated(ask, unchanged).sample for name, ask in questions.items()})


def comparisons(smoke: bool) -> Iterator[Comparison]:
    """All that can be compared here: those of this file, and of `host_layers`."""
    if dispatch.has_triton():
        yield from plans(smoke)
    if dispatch.has_triton() and not dispatch.interpreting():
        from . import host_layers

        yield from (*steps(), *host_layers.comparisons())
    yield from fallbacks(smoke)
    count = 5 if smoke else 1000
    yield Comparison(f"questions, {count}x8", functools.partial(questions, count))
    yield from shards(smoke)


KEYS = "smoke commit cpus load versions rows"  # of the file that is written


# -- measuring and showing --------------------------------------------------------------------------------------------


def measure(comparison: Comparison, rounds: int) -> dict[str, Any]:
    """A row: the times of all providers in µs, and what became of the targets."""
    with comparison.start() as samples:
        times: dict[str, list[float]] = {name: [] for name in samples}
        for _ in range(rounds):
            for name, sample in samples.items():  # in turns: a slow minute of the machine's is everybody's
                times[name].append(sample())
    summaries = {name: summary(us) for name, us in times.items()}
    medians = {name: us["median"] for name, us in summaries.items()}
    judged = [judge(target, medians) for target in comparison.targets]
    return {"case": comparison.name, "host_us": summaries, "targets": judged}


def judge(target: HostTarget, medians: Mapping[str, float] | None) -> dict[str, Any]:
    """Compare the ratio of two medians with its target. `medians` is None if nothing was measured."""
    ratio = None if medians is None else medians[target.over] / medians[target.under]
    return verdict(f"{target.over} / {target.under} ≥ {target.limit:g}", ratio, target.limit)


def unmeasured() -> list[dict[str, Any]]:
    """Rows of all comparisons, with nothing in them measured."""
    everything = (*plans(False), *fallbacks(False), *shards(False))
    return [{"case": c.name, "targets": [judge(target, None) for target in c.targets]} for c in everything]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[list[str]] = []
    for row in rows:
        times = ", ".join(f"{name} {us['median']:.4g}" for name, us in row["host_us"].items())
        targets = [[t["target"], f"{t['ratio']:.3g}", t["verdict"]] for t in row["targets"]] or [[""] * 3]
        lines += [[row["case"], "" if n else times, *target] for n, target in enumerate(targets)]
    return markdown(["case", "µs a step or a call", "target", "ratio", "verdict"], lines)


def main(options: Options) -> int:
    """Measure, print and write; 0 whatever the verdicts: a noisy machine is no mistake."""
    if not dispatch.has_triton():
        print("left out is what a GPU would be given, the plan's part and the calls': it needs triton")
    elif dispatch.interpreting():
        print("calls of layers are left out: under TRITON_INTERPRET=1 Triton compiles nothing")
    smoke = options.smoke
    there = list(comparisons(smoke))
    chosen = [c for c in there if options.selects(c)]
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
