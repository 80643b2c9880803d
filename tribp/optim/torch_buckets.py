"""The update where no kernel runs: torch's fused CPU kernels behind a plan, the reference, or torch's own code."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import compress, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import layouts
from .buckets import Member, Part, Step
from .layouts import local
from .tracked_state import peek

if TYPE_CHECKING:
    from .optimizer import Group, Optimizer
    from .plan import Plan

# torch's fused CPU kernels wake all threads for more than 16 elements, its other operations for this many and more.
# Measured, two idle cores: 200 tensors of 17 elements 254 µs with two threads, 75 with one; of 1,000 elements 381 and
# 159. While other processes keep the cores busy, a single small tensor may wait 5 to 15 ms for the second thread.
_GRAIN = 32768


def beyond_torch(group: "Group", p: Tensor) -> list[str]:
    """The options that are on and that torch's code can't follow; not those that ask nothing of this parameter."""
    state_dtype = group.get("state_dtype")
    asked = {
        "eps_inside_sqrt": group.get("eps_inside_sqrt"),
        "stochastic_rounding": group.get("stochastic_rounding") and p.dtype == torch.bfloat16,
        "state_dtype": state_dtype not in (None, p.dtype) and not p.is_complex(),
    }
    return [name for name, on in asked.items() if on]


def kind(optimizer: "Optimizer", group: "Group", parts: Sequence[Tensor]) -> str:
    """Which of the ways below a parameter, its gradient and its states (local and plain) can go."""
    p = parts[0]
    dtypes = {t.dtype for t in parts[: 2 + sum(name is not None for name in optimizer._names(group))]}
    if beyond_torch(group, p) or len(dtypes) > 1:
        return "reference"
    on_cpu = p.device.type == "cpu"
    if on_cpu and p.is_floating_point() and optimizer._fused_on_cpu(group, p.dtype) and layouts.layout(parts) == []:
        return "fused"
    if p.dtype == torch.float16 and "eps" in group and (on_cpu or not (p.is_meta or group.get("capturable"))):
        return "reference"  # torch's own code adds ε in float16, where 1e-8 is 0: a gradient of 0 would give 0/0
    return "rest"


def refuse_options(optimizer: "Optimizer", group: "Group", p: Tensor, grad: Tensor) -> None:
    """Raise RuntimeError if a gradient that only torch's own code takes meets an option that torch does not have."""
    wanted = beyond_torch(group, p)
    if group.get("max_grad_norm") and (wanted or grad.layout != torch.strided or group.get("differentiable")):
        wanted.append("max_grad_norm")  # elsewhere scaled copies of the gradients will do
    if not wanted:
        return
    if grad.layout != torch.strided:
        what = f"a {str(grad.layout).removeprefix('torch.')} gradient"
    elif group.get("differentiable"):
        what = "differentiable=True"
    else:
        what = f"a {type(grad).__name__} of {grad.dtype} on {grad.device}"
    raise RuntimeError(f"{type(optimizer).__name__}: {', '.join(wanted)} can't be combined with {what}")


def parts(plan: "Plan", fused: list[Member], by_reference: list[Member]) -> list[Part]:
    """Neighbouring groups share a call while their options are the same."""
    found: list[Part] = []
    for _, same in groupby(fused, lambda m: plan.alike[m.group]):
        by_type: dict[tuple[torch.dtype, bool], list[Member]] = {}
        for m in same:
            by_type.setdefault((m.param.dtype, m.param.numel() < _GRAIN), []).append(m)
        found += [Fused(plan, some) for some in by_type.values()]
    for m in by_reference:
        if "step" in m.state and m.state["step"] is None:
            m.state["step"] = torch.zeros((), dtype=counter_dtype(plan.fused[m.group]), device="cpu")
    for m in (*fused, *by_reference):
        if "ema_step" in m.state and m.state["ema_step"] is None:
            m.state["ema_step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    if by_reference:
        found.append(Reference(plan, by_reference))
    return found


def counter_dtype(fused: bool) -> torch.dtype:
    """The type of torch's `step`."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32


def counters_together(members: Sequence[Member], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The members' steps as views of one tensor on the CPU, so that one addition moves them all."""
    counts = [m.state["step"] for m in members]
    together = torch.tensor([0.0 if t is None else float(t) for t in counts], dtype=dtype, device="cpu")
    views = list(together.unbind())
    for member, view in zip(members, views, strict=True):
        member.state["step"] = view
    return together, views


def unscaled_and_clipped(grads: list[Tensor], group: "Group", step: Step) -> list[Tensor]:
    """Gradients divided by the GradScaler's scale, in place as torch's fused steps do it, and clipped copies."""
    if step.grad_scale is not None:
        for grad in {id(grad): grad for grad in grads}.values():  # a parameter may be listed twice
            grad.div_(step.grad_scale.to(grad.device))
    if step.norm is None:
        return grads
    coefficient = (group["max_grad_norm"] / (step.norm + 1e-6)).clamp(max=1.0)
    return [grad * coefficient.to(grad.device, grad.real.dtype) for grad in grads]


@functools.cache
def set_own_threads() -> Callable[[int], object] | None:
    """OpenMP's function that sets how many threads the calling thread's operations take; None where there is none.

    `torch.set_num_threads` sets it for the process: a thread that first asks meanwhile keeps that number for life.
    """
    try:
        set_threads: Callable[[int], object] = ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # the last one: Windows has no library that is called None
        return None
    threads = torch.get_num_threads()
    set_threads(threads + 1)
    torchs = torch.get_num_threads() == threads + 1  # or another library's OpenMP, or torch's own thread pool
    set_threads(threads)
    return set_threads if torchs else None


def total_norm(grads: list[Tensor]) -> Tensor:
    """‖g‖₂ over all gradients, as a float64 scalar; over all shards of distributed ones.

    As `torch.nn.utils.get_total_norm` does it, whose norm of bfloat16 gradients is a bfloat16 number.
    """
    norms: dict[object, list[Tensor]] = {}
    for grad in grads:
        wide = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None
        mesh = getattr(grad, "device_mesh", None)
        norms.setdefault(grad.device if mesh is None else mesh, []).append(torch.linalg.vector_norm(grad, dtype=wide))
    totals: list[Tensor] = []
    for some in norms.values():
        total = torch.linalg.vector_norm(torch.stack([norm.to(torch.float64) for norm in some]))
        totals.append(total.full_tensor() if layouts.is_dtensor(total) else total)
    if not totals:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    norm: Tensor = torch.linalg.vector_norm(torch.stack([total.to(totals[0].device) for total in totals]))
    return norm


def average(p: Tensor, state: dict[str, Any], decay: float) -> None:
    """v₁ = x₁, then v ← d·v + (1 − d)·x."""
    if "ema" not in state:
        state["ema"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        state["ema_step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    ema, count = layouts.local(peek(state, "ema")), peek(state, "ema_step")
    first = bool(count == 0)
    count += 1
    weight = layouts.local(p).to(ema.dtype)
    ema.copy_(weight) if first else ema.lerp_(weight, 1.0 - decay)


class Fused:
    """Members of one set of options, by one call of torch's fused CPU kernel, all tensors dense and lying alike."""

    def __init__(self, plan: "Plan", members: list[Member]) -> None:
        self.members = members
        self._plan = plan
        self.groups = sorted({m.group for m in members})
        self._indices = [m.index for m in members]
        self._every = self._indices == list(range(len(plan.params)))
        self._small = 16 < max(m.param.numel() for m in members) < _GRAIN  # up to 16 torch takes one thread anyway
        self._params = [m.param for m in members]
        names = members[0].names
        self._states = [[local(peek(m.state, name)).detach() for m in members] for name in names if name is not None]
        self._together: Tensor | None = None
        self._steps: list[Tensor] = []
        if plan.counts:
            self._together, steps = counters_together(members, counter_dtype(plan.fused[members[0].group]))
            self._steps = [step.detach() for step in steps]
        # A list that C++ takes costs a fifth less where C++ holds its tensors already: the first reference from there
        # counts in Python's object too. Aliases, for `torch.utils.swap_tensors` wants no reference to the states.
        self._held = [torch.ScriptList(some) for some in (*self._states, self._steps) if some]
        self._zeros: Tensor | None = None  # the memory of `_scratch`
        self._scratch: list[Tensor] = []
        self._begun = False  # whether every momentum buffer is known to have begun

    def scratch(self) -> list[Tensor]:
        """Zeros like the parameters, for what a kernel insists on writing; and steps that correct no bias."""
        if self._zeros is None:
            # Adam's bias corrections are 1 − βᵗ; at this t they are 1 for every β up to 1 − 4e-8.
            self._steps = [torch.full((), 2.0**30, dtype=torch.float32, device="cpu")] * len(self._params)
            self._zeros = torch.zeros(sum(p.numel() for p in self._params), dtype=self._params[0].dtype, device="cpu")
            pieces: Sequence[Tensor] = torch.split(self._zeros, [p.numel() for p in self._params])
            self._scratch = [x.as_strided(p.shape, p.stride()) for x, p in zip(pieces, self._params, strict=True)]
            self._held.append(torch.ScriptList(self._scratch))
        self._zeros.zero_()  # 0·∞ from an earlier gradient would stay NaN
        return self._scratch

    def run(self, step: Step) -> None:
        optimizer, group = step.optimizer, step.groups[self.members[0].group]
        found = step.grads if self._every else [step.grads[i] for i in self._indices]
        scratch = self.scratch() if optimizer._SCRATCH else []
        members, params, states, steps = self.members, self._params, self._states, self._steps
        if step.complete:
            grads: list[Any] = found
            if self._together is not None:
                self._together += 1
        else:
            there = [grad is not None for grad in found]
            grads = list(compress(found, there))
            members = list(compress(members, there))
            params, steps, scratch, *states = (list(compress(x, there)) for x in (params, steps, scratch, *states))
            if self._together is not None:
                self._together[torch.tensor(there, device="cpu")] += 1
        if not grads:
            return
        if step.grad_scale is not None or step.norm is not None:
            grads = unscaled_and_clipped(grads, group, step)
        taken = Tensors(params, grads, states, steps, scratch, self._fresh(members))
        plain_sgd = len(params) == 1 and not (states or group["weight_decay"])  # takes no fused kernel
        small = self._small and not plain_sgd
        threads = torch.get_num_threads() if small else 1
        set_threads = set_own_threads() if threads > 1 else None
        try:
            if set_threads is not None:
                set_threads(1)
            if len(params) <= 8:
                optimizer._fused_update(group, taken)
            else:  # autograd would copy every list; to leave it out takes 0.4 µs
                with torch._C._AutoDispatchBelowAutograd():
                    optimizer._fused_update(group, taken)
        finally:
            if set_threads is not None:
                set_threads(threads)
        if decay := group.get("ema_decay"):
            for m in members:
                average(m.param, m.state, decay)

    def _fresh(self, members: list[Member]) -> list[bool] | None:
        """Which momentum buffers begin now; None if there are none or, at no cost, if none does."""
        if self._together is not None or not self._states:
            return None
        if self._begun:
            return None
        fresh = [float(self._plan.counter(m)) == 0.0 for m in members]
        for m in members:
            self._plan.count_on(m, 1)
        self._begun = len(members) == len(self.members)
        return fresh if any(fresh) else None


class Reference:
    """Members with options that torch does not have, one by one, by the formulas of `tribp.reference`."""

    def __init__(self, plan: "Plan", members: list[Member]) -> None:
        self.members = members
        self.groups: list[int] = []
        self._plan = plan

    def run(self, step: Step) -> None:
        unscaled: set[int] = set()  # a parameter may be listed twice
        last: dict[int, Member] = {}
        for m in self.members:
            if (found := step.grads[m.index]) is None:
                continue
            group = step.groups[m.group]
            once = step if id(found) not in unscaled else step._replace(grad_scale=None)
            unscaled.add(id(found))
            last[id(m.state)] = m
            (grad,) = unscaled_and_clipped([found], group, once)
            count = random_step = 0.0
            if "step" in m.state:
                counter = peek(m.state, "step")
                counter += 1
                count = random_step = float(counter)
            if not step.optimizer._COUNTS:
                count = float(self._plan.counter(m)) + 1
                self._plan.count_on(m, int(count))
            values = [float(value) for value in step.optimizer._values(group)]
            states = [None if x is None else layouts.as_reals(x) for x in m.states]
            p = layouts.as_reals(m.param)
            wide = (
                torch.float64
                if any(x is not None and x.dtype == torch.float64 for x in (p, *states))
                else torch.float32
            )
            rule = getattr(reference, step.optimizer._RULE)
            changed, *moments = rule(
                p.to(wide), layouts.as_reals(grad).to(wide), *(None if x is None else x.to(wide) for x in states),
                values, count, bool(group.get("eps_inside_sqrt")),
            )  # fmt: skip
            if group.get("stochastic_rounding") and p.dtype == torch.bfloat16:
                changed = reference.round_stochastically(changed, p, group.get("seed", 0), int(random_step), m.index)
            p.copy_(changed)
            for state, moment in zip(states, moments, strict=True):
                if state is not None:
                    state.copy_(moment)
        for m in last.values():
            if decay := step.groups[m.group].get("ema_decay"):
                average(m.param, m.state, decay)


class Tensors(NamedTuple):
    """What a fused CPU kernel takes, one list entry a parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]  # first all of the first kind
    steps: list[Tensor]
    scratch: list[Tensor]
    fresh: list[bool] | None  # which momentum buffers begin with this step


def torchs_fused(group: "Group", steps: list[Tensor]) -> bool | None:
    """Whether torch's own code takes its fused kernel: where counters are fake, for it reads the others' values.

    Parameters with true counters are here for how they lie in memory, which torch's fused kernels do not look at.
    """
    return True if group["fused"] and any(type(step) not in layouts.PLAIN for step in steps) else None


def run_rest(group: "Group", params: list[Tensor], step: Step, in_turn: bool) -> None:
    """torch's own code for these parameters of a group: sparse, differentiable, on another device …

    in_turn: one after the other, for some are the same or share memory.
    """
    optimizer = step.optimizer
    params = [p for p in params if p.grad is not None]
    if not params:
        return
    for p in params:  # counters that a kernel kept on the device go back to where torch has them
        state = optimizer.state.get(p, {})
        if (
            "step" in state
            and not (group.get("capturable") or group.get("fused"))
            and state["step"].device.type != "cpu"
        ):
            state["step"] = state["step"].cpu()
    with torch.set_grad_enabled(bool(group.get("differentiable"))):
        chosen = {**group, "params": params} | ({"foreach": False} if in_turn else {})
        optimizer._torch_update(chosen, lambda grads: unscaled_and_clipped(grads, group, step))
    if decay := group.get("ema_decay"):
        for p in dict.fromkeys(params):
            average(p.detach(), optimizer.state[p], decay)
