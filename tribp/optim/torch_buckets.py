"""The update where no kernel runs: torch's fused CPU kernels, the rule's formula, or torch's own code."""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, groupby
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import codes, layouts, reference
from .buckets import Bucket, ParamSlot, Step
from .layouts import local
from .options import compresses, rounds_stochastically, torch_lacks
from .rule import Group, Rule, Tensors, counter_dtype
from .tracked_state import peek

# torch's fused CPU kernels wake all threads for more than 16 elements, its other operations for this many and more.
# Measured, two idle cores: 200 tensors of 17 elements 254 µs with two threads, 75 with one; of 1,000 elements 381 and
# 159. While other processes keep the cores busy, a single small tensor may wait 5 to 15 ms for the second thread.
_GRAIN = 32768
# Up to this many elements a tensor is small: torch's loop takes longer to call its operations than to compute them.
# Measured, two cores: from 6 small ones on it is faster to put them side by side first.
_SMALL, _MANY = 4096, 6


def worth_packing(params: Sequence[Tensor]) -> bool:
    return sum(p.numel() <= _SMALL for p in params) >= _MANY


def kind_of(rule: Rule, group: Group, tensors: Sequence[Tensor], pack: bool) -> str:
    """Which code updates a parameter: "fused", "packed", "reference" or "torch", its own.

    tensors: the parameter, its gradient and its states, local and plain. pack: whether there are many small ones.
    """
    p = tensors[0]
    dtypes = {t.dtype for t in tensors[: 2 + sum(name is not None for name in rule.states(group))]}
    if torch_lacks(group, p) or len(dtypes) > 1 or not rule.has_torch_update():
        return "reference"
    on_cpu = p.device.type == "cpu"
    if on_cpu and layouts.layout(tensors) == []:
        fused = p.is_floating_point() and rule.fused_on_cpu(group, p.dtype)
        if fused and not rule.loops_on_cpu:
            return "fused"
        floats = p.dtype.to_real() in dispatch.FLOATS
        if pack and p.numel() <= _SMALL and floats and not group.get("capturable"):  # which torch refuses on the CPU
            return "packed"
        if fused:
            return "fused"
    if p.dtype == torch.float16 and "eps" in group and (on_cpu or not (p.is_meta or group.get("capturable"))):
        return "reference"  # torch's own code adds ε in float16, where 1e-8 is 0: a gradient of 0 would give 0/0
    return "torch"


def refuse_options(caller: str, group: Group, p: Tensor, grad: Tensor) -> None:
    """Raise RuntimeError if a gradient that only torch's own code takes meets an option that torch does not have."""
    options = torch_lacks(group, p)
    if group.get("max_grad_norm") and (options or grad.layout != torch.strided or group.get("differentiable")):
        options.append("max_grad_norm")  # elsewhere scaled copies of the gradients will do
    if not options:
        return
    if grad.layout != torch.strided:
        what = f"a {str(grad.layout).removeprefix('torch.')} gradient"
    elif group.get("differentiable"):
        what = "differentiable=True"
    else:
        what = f"a {type(grad).__name__} of {grad.dtype} on {grad.device}"
    raise RuntimeError(f"{caller}: {', '.join(options)} can't be combined with {what}")


def cpu_buckets(
    rule: Rule, groups: list[Group], fused: list[ParamSlot], packed: list[ParamSlot], by_formula: list[ParamSlot],
    same_options: Sequence[object],
) -> list[Bucket]:  # fmt: skip
    """Neighbouring groups share a call while their options are the same; same_options: equal for groups where they are.

    Makes the counters that are missing.
    """
    buckets: list[Bucket] = []
    for kind, small in ((FusedBucket, fused), (PackedBucket, packed)):
        for _, neighbours in groupby(small, lambda slot: same_options[slot.group]):
            by_type: dict[tuple[torch.dtype, bool], list[ParamSlot]] = {}
            for slot in neighbours:
                by_type.setdefault((slot.param.dtype, slot.param.numel() < _GRAIN), []).append(slot)
            for slots in by_type.values():
                buckets.append(kind(rule, slots, groups))
    for slot in by_formula:
        if "step" in slot.state and slot.state["step"] is None:
            dtype = counter_dtype(bool(groups[slot.group].get("fused")))
            slot.state["step"] = torch.zeros((), dtype=dtype, device="cpu")
    for slot in (*fused, *packed, *by_formula):
        if "ema_step" in slot.state and slot.state["ema_step"] is None:
            slot.state["ema_step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    if by_formula:
        buckets.append(ReferenceBucket(rule, by_formula))
    return buckets


def unscaled_and_clipped(grads: list[Tensor], group: Group, step: Step) -> list[Tensor]:
    """Gradients divided by the GradScaler's scale, in place as torch's fused steps do it, and clipped copies."""
    if step.grad_scale is not None:
        for grad in {id(grad): grad for grad in grads}.values():  # a parameter may be listed twice
            grad.div_(step.grad_scale.to(grad.device))
    if step.norm is None:
        return grads
    coefficient = (group["max_grad_norm"] / (step.norm + 1e-6)).clamp(max=1.0)
    return [grad * coefficient.to(grad.device, grad.real.dtype) for grad in grads]


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


def update_average(p: Tensor, state: dict[str, Any], decay: float) -> None:
    """v₁ = x₁, then v ← d·v + (1 − d)·x."""
    if "ema" not in state:
        state["ema"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        state["ema_step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    ema, count = layouts.local(peek(state, "ema")), peek(state, "ema_step")
    first = bool(count == 0)
    count += 1
    weight = layouts.local(p).to(ema.dtype)
    ema.copy_(weight) if first else ema.lerp_(weight, 1.0 - decay)


def join(slots: Sequence[ParamSlot], name: str, dtype: torch.dtype) -> Tensor:
    """Puts a state of one number, of all these slots, into one tensor, which is returned."""
    numbers = [slot.state[name] for slot in slots]
    joined = torch.tensor([0.0 if t is None else float(t) for t in numbers], dtype=dtype, device="cpu")
    for slot, view in zip(slots, joined.unbind(), strict=True):
        slot.state[name] = view
    return joined


class FusedBucket:
    """Slots of one set of options, by one call of torch's fused CPU kernel, all tensors dense and lying alike."""

    def __init__(self, rule: Rule, slots: list[ParamSlot], groups: list[Group]) -> None:
        self.rule, self.slots = rule, slots
        self.groups = sorted({slot.group for slot in slots})
        self._indices = [slot.index for slot in slots]
        self._every = self._indices == list(range(sum(len(group["params"]) for group in groups)))
        self._small = 16 < max(slot.param.numel() for slot in slots) < _GRAIN  # up to 16 torch takes one thread anyway
        self._params = [slot.param for slot in slots]
        names = [name for name in (*slots[0].names, *rule.scalar_states) if name is not None]
        self._states = [[local(peek(slot.state, name)).detach() for slot in slots] for name in names]
        self._counters: Tensor | None = None  # all of them in one tensor, which one addition moves
        self._steps: list[Tensor] = []
        if rule.counts_steps:
            self._counters = join(slots, "step", counter_dtype(bool(groups[slots[0].group].get("fused"))))
            self._steps = [slot.state["step"].detach() for slot in slots]
        # A list that C++ takes costs a fifth less where C++ holds its tensors already: the first reference from there
        # counts in Python's object too. Aliases, for `torch.utils.swap_tensors` wants no reference to the states.
        self._script_lists = [torch.ScriptList(some) for some in (*self._states, self._steps) if some]
        self._zeros: Tensor | None = None  # the memory of `_scratch`
        self._scratch: list[Tensor] = []
        self._begun = False  # whether every momentum buffer is known to have begun

    def _make_scratch(self) -> list[Tensor]:
        """Zeros like the parameters, for what a kernel insists on writing; and steps that correct no bias."""
        if self._zeros is None:
            # Adam's bias corrections are 1 − βᵗ; at this t they are 1 for every β up to 1 − 4e-8.
            self._steps = [torch.full((), 2.0**30, dtype=torch.float32, device="cpu")] * len(self._params)
            self._zeros = torch.zeros(sum(p.numel() for p in self._params), dtype=self._params[0].dtype, device="cpu")
            pieces: Sequence[Tensor] = torch.split(self._zeros, [p.numel() for p in self._params])
            self._scratch = [x.as_strided(p.shape, p.stride()) for x, p in zip(pieces, self._params, strict=True)]
            self._script_lists.append(torch.ScriptList(self._scratch))
        self._zeros.zero_()  # 0·∞ from an earlier gradient would stay NaN
        return self._scratch

    def run(self, step: Step) -> None:
        group = step.groups[self.slots[0].group]
        grads: list[Any] = step.grads if self._every else [step.grads[i] for i in self._indices]
        scratch = self._make_scratch() if self.rule.needs_scratch else []
        slots, params, states, steps = self.slots, self._params, self._states, self._steps
        if step.complete:
            if self._counters is not None and not self.rule.loops_on_cpu:
                self._counters += 1
        else:
            there = [grad is not None for grad in grads]
            slots = list(compress(slots, there))
            grads, params, steps, scratch, *states = (
                list(compress(x, there)) for x in (grads, params, steps, scratch, *states)
            )
            if self._counters is not None and not self.rule.loops_on_cpu:
                self._counters[torch.tensor(there, device="cpu")] += 1
        if not grads:
            return
        if step.grad_scale is not None or step.norm is not None:
            grads = unscaled_and_clipped(grads, group, step)
        tensors = Tensors(params, grads, states, steps, scratch, self._fresh(slots))
        plain_sgd = len(params) == 1 and not (states or group["weight_decay"])  # takes no fused kernel
        threads = torch.get_num_threads() if self._small and not plain_sgd else 1
        set_threads = set_own_threads() if threads > 1 else None
        try:
            if set_threads is not None:
                set_threads(1)
            if len(params) <= 8:
                self.rule.fused_update(group, tensors)
            else:  # autograd would copy every list; to leave it out takes 0.4 µs
                with torch._C._AutoDispatchBelowAutograd():
                    self.rule.fused_update(group, tensors)
        finally:
            if set_threads is not None:
                set_threads(threads)
        if decay := group.get("ema_decay"):
            for slot in slots:
                update_average(slot.param, slot.state, decay)

    def _fresh(self, slots: list[ParamSlot]) -> list[bool] | None:
        """Which momentum buffers begin now; None if there are none or, at no cost, if none does."""
        if self._begun or self.rule.counts_steps or not self._states:
            return None
        fresh = [float(slot.count.value) == 0.0 for slot in slots]
        for slot in slots:
            slot.count.value = 1
        self._begun = len(slots) == len(self.slots)
        return fresh if any(fresh) else None


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
    is_torchs = torch.get_num_threads() == threads + 1  # or another library's OpenMP, or torch's own thread pool
    set_threads(threads)
    return set_threads if is_torchs else None


def apply_formula(
    rule: Rule, group: Group, p: Tensor, grad: Tensor, states: Sequence[Tensor | None], scalars: Sequence[Tensor],
    count: float,
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:  # fmt: skip
    """The parameter (all tensors are real) and the states in at least float32, and the states of one number."""
    common, own = rule.common(group), rule.hyper(group)
    lr, eps, sign, decay, decoupled, *_ = map(float, common)
    double = any(x is not None and x.dtype == torch.float64 for x in (p, *states))
    wide = torch.float64 if double else torch.float32
    x, g = p.to(wide), sign * grad.to(wide)
    if decay:
        g = g + decay * x
    changed, *others = rule.formula(
        x * (1 - lr * decoupled) if decoupled else x, g, *(None if s is None else s.to(wide) for s in states),
        lr, eps, own._make(map(float, own)), count, bool(group.get("eps_inside_sqrt")), *scalars,
    )  # fmt: skip
    return changed, others[: len(states)], others[len(states) :]


class PackedBucket:
    """Small slots of one set of options, dense and lying alike, by the formula on their elements side by side.

    An operation takes as long on one tensor of 8 elements as on one of 1,000; torch's loop has a dozen for each.
    """

    def __init__(self, rule: Rule, slots: list[ParamSlot], groups: list[Group]) -> None:
        self.rule, self.slots = rule, slots
        self.groups = sorted({slot.group for slot in slots})
        self._indices = [slot.index for slot in slots]
        self._numbers = []  # of the slots: the counters, then the rule's states of one number
        if rule.counts_steps:
            self._numbers.append(join(slots, "step", counter_dtype(bool(groups[slots[0].group].get("fused")))))
        self._numbers += [join(slots, name, slots[0].state[name].dtype) for name in rule.scalar_states]
        self._packs: dict[tuple[int, ...], Pack] = {}  # by the slots that are updated together

    def run(self, step: Step) -> None:
        group = step.groups[self.slots[0].group]
        present = [k for k, i in enumerate(self._indices) if step.grads[i] is not None]
        grads: list[Any] = [step.grads[self._indices[k]] for k in present]
        if not grads:
            return
        if step.grad_scale is not None or step.norm is not None:
            grads = unscaled_and_clipped(grads, group, step)
        given = dict(zip(present, grads, strict=True))
        for key, members in self._alike(present):
            pack = self._packs.get(members)
            if pack is None:
                if len(self._packs) == 8:  # models that skip layers alternate
                    self._packs.clear()
                pack = self._packs[members] = Pack(self.slots, members)
            scalars = [numbers[members[0]] for numbers in self._numbers[self.rule.counts_steps :]]
            changed = pack.update(self.rule, group, [given[k] for k in members], scalars, key[0])
            for numbers, scalar in zip(self._numbers[self.rule.counts_steps :], changed, strict=True):
                numbers[pack.at] = scalar
        if decay := group.get("ema_decay"):
            for k in present:
                update_average(self.slots[k].param, self.slots[k].state, decay)

    def _alike(self, present: list[int]) -> Iterator[tuple[tuple[float, ...], tuple[int, ...]]]:
        """Counts the step; yields slots that agree in it and in the states of one number, few enough for one thread."""
        if self.rule.counts_steps:
            if len(present) == len(self.slots):
                self._numbers[0] += 1
            else:
                self._numbers[0][torch.tensor(present, device="cpu")] += 1
            columns = [numbers.tolist() for numbers in self._numbers]
        else:
            for k in present:
                self.slots[k].count.value = int(self.slots[k].count.value) + 1
            columns = [[float(slot.count.value) for slot in self.slots]]
        keys = list(zip(*columns, strict=True))
        for key, some in groupby(sorted(present, key=keys.__getitem__), keys.__getitem__):
            members: list[int] = []
            elements = 0
            for k in some:
                elements += self.slots[k].param.numel()
                if members and elements >= _GRAIN:
                    yield key, tuple(members)
                    members, elements = [], self.slots[k].param.numel()
                members.append(k)
            yield key, tuple(members)


class Pack:
    """Slots whose elements the formula takes side by side."""

    def __init__(self, slots: list[ParamSlot], members: tuple[int, ...]) -> None:
        def flat(t: Tensor) -> Tensor:
            return layouts.as_reals(t.detach().as_strided((t.numel(),), (1,))).view(-1)

        self.at = slice(None) if len(members) == len(slots) else torch.tensor(members, device="cpu")
        slots = [slots[k] for k in members]
        params = [slot.param for slot in slots]
        self._params = list(map(flat, params))
        self._states = [
            None if name is None else [flat(local(peek(slot.state, name))) for slot in slots]
            for name in slots[0].names
        ]  # fmt: skip
        memory = torch.empty(sum(p.numel() for p in params), dtype=params[0].dtype, device="cpu")
        pieces = memory.split([p.numel() for p in params])
        self._grads = [piece.as_strided(p.shape, p.stride()) for piece, p in zip(pieces, params, strict=True)]
        self._memory = flat(memory)  # of the gradients, and then of one result after the other
        self._results = list(map(flat, pieces))

    def update(
        self, rule: Rule, group: Group, grads: list[Tensor], scalars: list[Tensor], count: float
    ) -> list[Tensor]:  # fmt: skip
        """Updates parameters and states; returns what becomes of the states of one number."""
        torch._foreach_copy_(self._grads, grads)
        joined = [None if tensors is None else torch.cat(tensors) for tensors in (self._params, *self._states)]
        assert joined[0] is not None
        changed, moments, scalars = apply_formula(rule, group, joined[0], self._memory, joined[1:], scalars, count)
        for tensors, result in zip((self._params, *self._states), (changed, *moments), strict=True):
            if tensors is not None and result is not None:
                self._memory.copy_(result)
                torch._foreach_copy_(tensors, self._results)
        return scalars


class ReferenceBucket:
    """Slots with options that torch does not have, one by one, by the rule's formula."""

    def __init__(self, rule: Rule, slots: list[ParamSlot]) -> None:
        self.rule, self.slots = rule, slots
        self.groups: list[int] = []

    def run(self, step: Step) -> None:
        unscaled: set[int] = set()  # a parameter may be listed twice
        updated: dict[int, ParamSlot] = {}
        for slot in self.slots:
            if (grad := step.grads[slot.index]) is None:
                continue
            once = step if id(grad) not in unscaled else step._replace(grad_scale=None)
            unscaled.add(id(grad))
            updated[id(slot.state)] = slot
            group = step.groups[slot.group]
            (scaled,) = unscaled_and_clipped([grad], group, once)
            self._update(slot, group, scaled)
        for slot in updated.values():
            if decay := step.groups[slot.group].get("ema_decay"):
                update_average(slot.weight, slot.state, decay)

    def _update(self, slot: ParamSlot, group: Group, grad: Tensor) -> None:
        count = random_step = 0.0
        if "step" in slot.state:
            counter = peek(slot.state, "step")
            counter += 1
            count = random_step = float(counter)
        if not self.rule.counts_steps:
            count = float(slot.count.value) + 1
            slot.count.value = int(count)
        states = [None if x is None else layouts.as_reals(x) for x in slot.states]
        values = [
            x if x is None or scale is None else codes.decode(x, scale)
            for x, scale in zip(states, slot.scales, strict=True)
        ]
        scalars = [peek(slot.state, name) for name in self.rule.scalar_states]
        p = layouts.as_reals(slot.param)
        changed, moments, results = apply_formula(
            self.rule, group, layouts.as_reals(slot.weight), layouts.as_reals(grad), values, scalars, count
        )  # fmt: skip
        of_random = group.get("seed", 0), int(random_step), slot.index
        stochastic = rounds_stochastically(group, p)
        if slot.residual is not None:
            below = reference.random_numbers(p, *of_random) & 0xFF if stochastic else 128
            changed, low = codes.split(changed.float(), below)
            slot.residual.copy_(low)
        elif stochastic:
            changed = reference.round_stochastically(changed, p, *of_random)
        p.copy_(changed)
        bits = codes.random_bits(p, *of_random) if compresses(group, p) else None
        for k, (state, scale, moment) in enumerate(zip(states, slot.scales, moments, strict=True)):
            if state is None or moment is None:
                continue
            if scale is None or bits is None:
                state.copy_(moment)
            else:
                codes.encode(moment, state, scale, bits & 0xFFFF if k == 0 else bits >> 16)
        for scalar, result in zip(scalars, results, strict=True):
            scalar.copy_(result)


class TorchBucket:
    """Parameters of one group that only torch's own code updates: sparse, differentiable, on another device …"""

    def __init__(self, rule: Rule, group: int, params: list[Tensor], in_turn: bool) -> None:
        """in_turn: one after the other, for some are the same or share memory."""
        self.rule, self.params, self.in_turn = rule, params, in_turn
        self.slots: list[ParamSlot] = []
        self.groups = [group]

    def run(self, step: Step) -> None:
        group, states = step.groups[self.groups[0]], step.optimizer.state
        params = [p for p in self.params if p.grad is not None]
        if not params:
            return
        if not (group.get("capturable") or group.get("fused")):
            for p in params:  # counters that a kernel kept on the device go back to where torch has them
                state = states.get(p, {})
                if "step" in state and state["step"].device.type != "cpu":
                    state["step"] = state["step"].cpu()
        with torch.set_grad_enabled(bool(group.get("differentiable"))):
            chosen = {**group, "params": params} | ({"foreach": False} if self.in_turn else {})
            self.rule.torch_update(step.optimizer, chosen, lambda grads: unscaled_and_clipped(grads, group, step))
        if decay := group.get("ema_decay"):
            for p in dict.fromkeys(params):
                update_average(p.detach(), states[p], decay)
