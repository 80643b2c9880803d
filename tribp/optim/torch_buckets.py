"""The update where no kernel runs: torch's fused CPU kernels, the rule's formula, or torch's own code."""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

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
# Of a large tensor so many elements a thread are updated at a time: 256 KiB of each tensor, of 2 MiB of cache.
_PIECE = 65536
# Up to this many elements a tensor is small: torch's loop takes longer to call its operations than to compute them.
# Measured, two cores: from 6 small ones on it is faster to put them side by side first.
_SMALL, _MANY = 4096, 6


def worth_packing(params: Sequence[Tensor]) -> bool:
    return sum(not is_lazy(p) and p.numel() <= _SMALL for p in params) >= _MANY


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
        if p.is_floating_point() and rule.fused_on_cpu(group, p.dtype):
            return "fused"
        real = p.dtype.to_real()
        suits = (rule.formula_on_cpu and real in (torch.float32, torch.float64)) or (pack and p.numel() <= _SMALL)
        if suits and real in dispatch.FLOATS and not group.get("capturable"):  # which torch refuses on the CPU
            return "packed"
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
    """Puts a state of one number, of all these slots, into one tensor, which is returned.

    Where the last plan has done so it stays: whoever holds a counter has the one that counts.
    """
    numbers = [slot.state[name] for slot in slots]
    base = getattr(numbers[0], "_base", None)
    if base is not None and base.shape == (len(slots),) and base.dtype == dtype:
        places = [t.storage_offset() if getattr(t, "_base", None) is base else None for t in numbers]
        if places == list(range(len(slots))):
            return base  # type: ignore[no-any-return]
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
            if self._counters is not None:
                self._counters.add_(reference.number(1.0, torch.float32))
        else:
            there = [grad is not None for grad in grads]
            slots = list(compress(slots, there))
            grads, params, steps, scratch, *states = (
                list(compress(x, there)) for x in (grads, params, steps, scratch, *states)
            )
            if self._counters is not None:
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


class Formula:
    """A rule's formula, with the hyperparameters of one group as numbers."""

    def __init__(self, rule: Rule, group: Group) -> None:
        own = rule.hyper(group)
        self._formula, self._own = rule.formula, own._make(map(float, own))
        self._lr, self._eps, self._sign, self._decay, decoupled, *_ = map(float, rule.common(group))
        self._shrinkage = self._lr * decoupled
        self._eps_inside = bool(group.get("eps_inside_sqrt"))

    def __call__(
        self, p: Tensor, grad: Tensor, states: Sequence[Tensor | None], scalars: Sequence[Tensor], count: float
    ) -> tuple[Tensor, list[Tensor | None], list[float]]:  # fmt: skip
        """The parameter (all tensors are real) and the states in at least float32, and the states of one number.

        It may overwrite the parameter and the states, and return them.
        """
        wide = torch.float64 if torch.float64 in [x.dtype for x in (p, *states) if x is not None] else torch.float32
        x, g, *kept = [None if t is None else t if t.dtype == wide else t.to(wide) for t in (p, grad, *states)]
        assert x is not None
        assert g is not None
        if self._sign != 1:
            g = -g
        if self._decay:
            g = g.add(x, alpha=self._decay)
        if self._shrinkage:
            x.mul_(1 - self._shrinkage)
        changed, *others = self._formula(x, g, *kept, self._lr, self._eps, self._own, count, self._eps_inside, *scalars)
        return changed, others[: len(states)], others[len(states) :]


class PackedBucket:
    """Dense slots of one set of options that lie alike, by the formula: small ones side by side, large ones in pieces.

    An operation takes as long on one tensor of 8 elements as on one of 1,000, and torch's loop has a dozen for each. Of
    a large tensor a piece stays in the caches from the formula's first operation to its last.
    """

    def __init__(self, rule: Rule, slots: list[ParamSlot], groups: list[Group]) -> None:
        self.rule, self.slots = rule, slots
        self.groups = sorted({slot.group for slot in slots})
        self._indices = [slot.index for slot in slots]
        self._every = self._indices == list(range(sum(len(group["params"]) for group in groups)))
        self._numbers = []  # of the slots: the counters, then the rule's states of one number
        if rule.counts_steps:
            self._numbers.append(join(slots, "step", counter_dtype(bool(groups[slots[0].group].get("fused")))))
        self._numbers += [join(slots, name, slots[0].state[name].dtype) for name in rule.scalar_states]
        self._columns = [numbers.unbind() for numbers in self._numbers]
        self._everyone = tuple(range(len(slots)))
        self._packs: dict[tuple[int, ...], list[Pack | Pieces]] = {}  # by the slots that are updated together
        self._of_everyone = self._make_packs(self._everyone)
        self._values: list[Any] | None = None  # that the formula was made with
        self._formula: Formula

    def _make_packs(self, members: tuple[int, ...]) -> "list[Pack | Pieces]":
        """Neighbours share a pack while they are few enough for one thread."""
        runs: list[list[ParamSlot]] = [[]]
        elements = 0
        for slot in (self.slots[k] for k in members):
            elements += slot.param.numel()
            if elements >= _GRAIN and runs[-1]:
                runs.append([])
                elements = slot.param.numel()
            runs[-1].append(slot)
        return [Pack(slots) if len(slots) > 1 else Pieces(*slots) for slots in runs]

    def run(self, step: Step) -> None:
        group = step.groups[self.slots[0].group]
        if step.values is not self._values:
            self._formula, self._values = Formula(self.rule, group), step.values
        grads: list[Any] = step.grads if self._every else [step.grads[i] for i in self._indices]
        present = self._everyone
        if not step.complete:
            present = tuple(k for k, grad in enumerate(grads) if grad is not None)
            if not present:
                return
        if step.grad_scale is not None or step.norm is not None:
            scaled = iter(unscaled_and_clipped([grads[k] for k in present], group, step))
            grads = [None if grad is None else next(scaled) for grad in grads]
        self._count(present)
        if present is self._everyone and self._agree():
            self._update(self._of_everyone, present, grads)
        else:
            for members in self._alike(present):
                packs = self._packs.get(members)
                if packs is None:
                    if len(self._packs) == 8:  # models that skip layers alternate
                        self._packs.clear()
                    packs = self._packs[members] = self._make_packs(members)
                self._update(packs, members, [grads[k] for k in members])
        if decay := group.get("ema_decay"):
            for k in present:
                update_average(self.slots[k].param, self.slots[k].state, decay)

    def _count(self, present: tuple[int, ...]) -> None:
        if not self.rule.counts_steps:
            for k in present:
                self.slots[k].count.value = int(self.slots[k].count.value) + 1
        elif present is self._everyone:
            self._numbers[0].add_(reference.number(1.0, torch.float32))
        else:
            self._numbers[0][torch.tensor(present, device="cpu")] += 1

    def _agree(self) -> bool:
        """Whether all slots agree in the number of the step and in their states of one number."""
        if len(self.slots) == 1:
            return True
        if not self.rule.counts_steps:
            return len({slot.count.value for slot in self.slots}) == 1
        return all(
            bool((numbers == column[0]).all()) for numbers, column in zip(self._numbers, self._columns, strict=True)
        )

    def _alike(self, present: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Slots that agree in these."""
        columns = [numbers.tolist() for numbers in self._numbers]
        if not self.rule.counts_steps:
            columns = [[int(slot.count.value) for slot in self.slots]]
        keys = list(zip(*columns, strict=True))
        for _, members in groupby(sorted(present, key=keys.__getitem__), keys.__getitem__):
            yield tuple(members)

    def _update(self, packs: "list[Pack | Pieces]", members: tuple[int, ...], grads: list[Tensor]) -> None:
        first, counts = members[0], self.rule.counts_steps
        scalars = [column[first] for column in self._columns]
        count = float(scalars.pop(0) if counts else self.slots[first].count.value)
        results: list[float] = []
        start = 0
        with torch._C._AutoDispatchBelowAutograd():  # which has no part in this, and would copy every list
            for pack in packs:
                theirs = grads[start : start + pack.members]
                start += pack.members
                results = pack.update(self._formula, theirs, scalars, count)
        for numbers, result in zip(self._numbers[counts:], results, strict=True):
            if members is self._everyone:
                numbers.fill_(result)
            else:
                numbers[torch.tensor(members, device="cpu")] = result


def _flat(t: Tensor) -> Tensor:
    """A dense tensor's elements, real ones, in the order in which they lie in memory."""
    return layouts.as_reals(t.detach().as_strided((t.numel(),), (1,))).view(-1)


class Pieces:
    """A slot whose elements the formula takes in pieces, each of a size that keeps every thread busy."""

    members = 1

    def __init__(self, slot: ParamSlot) -> None:
        self._size = _PIECE * torch.get_num_threads()
        params = self._split(slot.param)
        states = [[None] * len(params) if t is None else self._split(t) for t in slot.states]
        self._pieces: list[tuple[Tensor, Sequence[Tensor | None]]] = [
            (p, of_p) for p, *of_p in zip(params, *states, strict=True)
        ]

    def _split(self, t: Tensor) -> Sequence[Tensor]:
        return [layouts.as_reals(t.detach())] if t.numel() <= self._size else _flat(t).split(self._size)

    def update(self, formula: Formula, grads: list[Tensor], scalars: list[Tensor], count: float) -> list[float]:
        """Updates parameters and states; returns what becomes of the states of one number."""
        results: list[float] = []
        for (p, states), grad in zip(self._pieces, self._split(grads[0]), strict=True):
            changed, moments, results = formula(p, grad, states, scalars, count)
            for old, new in zip((p, *states), (changed, *moments), strict=True):
                _become(old, new)
        return results


def _become(old: Tensor | None, new: Tensor | None) -> None:
    if new is not old and old is not None and new is not None:
        old.copy_(new)


class Pack:
    """Several slots whose elements are put side by side to be updated together."""

    def __init__(self, slots: list[ParamSlot]) -> None:
        self.members = len(slots)
        params = [slot.param for slot in slots]
        self._params = list(map(_flat, params))
        gradients, self._grads = _stretch(params)
        copies, pieces = _stretch(params)
        self._grad, self._copy = _flat(gradients), _flat(copies)
        self._copies = list(map(_flat, pieces))
        self._one_dimensional = all(p.dim() == 1 and not p.is_complex() for p in params)
        self._states = [
            None if name is None else [_flat(local(peek(slot.state, name))) for slot in slots]
            for name in slots[0].names
        ]  # fmt: skip
        self._one_thread = max(p.numel() for p in self._params) > 16  # up to 16 torch takes one anyway
        lists = (self._params, self._grads, self._copies, *filter(None, self._states))
        self._script_lists = list(map(torch.ScriptList, lists))  # as `FusedBucket` has them

    def update(self, formula: Formula, grads: list[Tensor], scalars: list[Tensor], count: float) -> list[float]:
        """Updates parameters and states; returns what becomes of the states of one number."""
        with one_thread() if self._one_thread else contextlib.nullcontext():
            if self._one_dimensional:
                torch.cat(grads, out=self._grad)
            else:
                copy_all(self._grads, grads, scratch=self._copies)
            torch.cat(self._params, out=self._copy)
            states = [None if tensors is None else torch.cat(tensors) for tensors in self._states]
            changed, moments, results = formula(self._copy, self._grad, states, scalars, count)
            for tensors, value in zip((self._params, *self._states), (changed, *moments), strict=True):
                if tensors is not None and value is not None:
                    _become(self._copy, value)
                    copy_all(tensors, self._copies, scratch=self._copies)
        return results


def _stretch(like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One tensor with room for the elements of all these, and its pieces, which lie as these do."""
    memory = torch.empty(sum(t.numel() for t in like), dtype=like[0].dtype, device="cpu")
    pieces: Sequence[Tensor] = memory.split([t.numel() for t in like])
    return memory, [piece.as_strided(t.shape, t.stride()) for piece, t in zip(pieces, like, strict=True)]


def copy_all(targets: list[Tensor], sources: list[Tensor], scratch: list[Tensor]) -> None:
    """Copy small tensors that lie alike. scratch: as many of their size, whose elements are lost; or the sources.

    A fused SGD's first step with momentum copies gradients into buffers. Measured on one core: 0.09 µs a tensor, where
    `torch._foreach_copy_` takes 0.28.
    """
    if sources[0].dtype in (torch.float32, torch.float64):
        torch._fused_sgd_(
            scratch, sources, targets, weight_decay=0.0, momentum=1.0, lr=0.0, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=True,
        )  # fmt: skip
    else:  # in 16 bits it skips whole vectors (pytorch #191763)
        torch._foreach_copy_(targets, sources)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the `with` block the calling thread's operations take no other thread, where that can be arranged."""
    threads = torch.get_num_threads()
    set_threads = set_own_threads() if threads > 1 else None
    try:
        if set_threads is not None:
            set_threads(1)
        yield
    finally:
        if set_threads is not None:
            set_threads(threads)


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
        weight = layouts.as_reals(slot.weight)
        changed, moments, results = Formula(self.rule, group)(weight, layouts.as_reals(grad), values, scalars, count)
        code_key, param_key = reference.random_keys(group.get("seed", 0), int(random_step), slot.index)
        stochastic = rounds_stochastically(group, p)
        if slot.residual is not None:
            dither = reference.random_bits(p, param_key) & 0xFF if stochastic else 128
            changed, low = codes.split(changed.float(), dither)
            slot.residual.copy_(low)
        elif stochastic:
            changed = reference.round_stochastically(changed, reference.random_bits(p, param_key))
        p.copy_(changed)
        bits = reference.random_bits(p, code_key) if compresses(group, p) else None
        for k, (state, scale, moment) in enumerate(zip(states, slot.scales, moments, strict=True)):
            if state is None or moment is None:
                continue
            if scale is None or bits is None:
                state.copy_(moment)
            else:
                codes.encode(moment, state, scale, bits if k == 0 else bits >> 16)
        for scalar, result in zip(scalars, results, strict=True):
            scalar.fill_(result)


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
        if not self.rule.numbers_on_device(group):
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
