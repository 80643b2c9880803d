"""Tensors by the rule's formula: small ones side by side, large ones in pieces."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import layouts, reference
from .buckets import Bucket, ParamSlot, StepInputs
from .cpu_updates import (
    GRAIN,
    Formula,
    gather_scalars,
    held_in_cpp,
    one_thread,
    unscaled_and_clipped,
    update_average,
)
from .layouts import local
from .rule import Group, Rule, counter_dtype
from .tracked_state import peek


class PackedBucket(Bucket):
    """Dense slots of one set of options that lie alike, by the formula: small ones side by side, large ones in pieces.

    An operation takes as long on one tensor of 8 elements as on one of 1,000, and torch's loop has a dozen for each. Of
    a large tensor a piece stays in the caches from the formula's first operation to its last.
    """

    def __init__(self, rule: Rule, slots: list[ParamSlot], groups: list[Group]) -> None:
        super().__init__(rule, slots, groups)
        self.groups = sorted({slot.group for slot in slots})
        self._scalars = []  # of the slots: the counters, then the rule's states of one number
        if rule.counts_steps:
            self._scalars.append(
                gather_scalars(slots, "step", counter_dtype(bool(groups[slots[0].group].get("fused"))))
            )
        self._scalars += [gather_scalars(slots, name, slots[0].state[name].dtype) for name in rule.scalar_states]
        self._columns = [scalars.unbind() for scalars in self._scalars]
        self._everyone = tuple(range(len(slots)))
        self._packs: dict[tuple[int, ...], list[Pack | Pieces]] = {}  # by the slots that are updated together
        self.parameters_moved()
        self._values: list[Any] | None = None  # that the formula was made with
        self._formula: Formula

    def parameters_moved(self) -> None:
        self._packs.clear()
        self._of_everyone = self._make_packs(self._everyone)

    def _make_packs(self, members: tuple[int, ...]) -> "list[Pack | Pieces]":
        """Neighbours share a pack while they are few enough for one thread."""
        runs: list[list[ParamSlot]] = [[]]
        elements = 0
        for slot in (self.slots[k] for k in members):
            elements += slot.param.numel()
            if elements >= GRAIN and runs[-1]:
                runs.append([])
                elements = slot.param.numel()
            runs[-1].append(slot)
        return [Pack(slots) if len(slots) > 1 else Pieces(slots[0], self.rule.piece) for slots in runs]

    def run(self, step: StepInputs) -> None:
        group = step.groups[self.slots[0].group]
        if step.values is not self._values:
            self._formula, self._values = Formula(self.rule, group), step.values
        grads = self.gradients(step)
        present = self._everyone
        if not step.complete:
            present = tuple(k for k, grad in enumerate(grads) if grad is not None)
            if not present:
                return
        if step.grad_scale is not None or step.norm is not None:
            scaled = iter(unscaled_and_clipped([grads[k] for k in present], group, step))
            grads = [None if grad is None else next(scaled) for grad in grads]
        if self.rule.counts_steps:
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
        if not self.rule.counts_steps:  # a momentum buffer has begun when it was written
            for k in present:
                self.slots[k].count.value = int(self.slots[k].count.value) + 1
        if decay := group.get("ema_decay"):
            for k in present:
                update_average(self.slots[k].param, self.slots[k].state, decay)

    def _count(self, present: tuple[int, ...]) -> None:
        if present is self._everyone:
            self._scalars[0].add_(reference.scalar(1.0, torch.float32))
        else:
            self._scalars[0][torch.tensor(present, device="cpu")] += 1

    def _agree(self) -> bool:
        """Whether all slots agree in the number of the step and in their states of one number."""
        if len(self.slots) == 1:
            return True
        if not self.rule.counts_steps:
            return len({slot.count.value for slot in self.slots}) == 1
        return all(
            bool((scalars == column[0]).all()) for scalars, column in zip(self._scalars, self._columns, strict=True)
        )

    def _alike(self, present: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Slots that agree in these."""
        columns = [scalars.tolist() for scalars in self._scalars]
        if not self.rule.counts_steps:
            columns = [[int(slot.count.value) for slot in self.slots]]
        keys = list(zip(*columns, strict=True))
        for _, members in groupby(sorted(present, key=keys.__getitem__), keys.__getitem__):
            yield tuple(members)

    def _update(self, packs: "list[Pack | Pieces]", members: tuple[int, ...], grads: list[Tensor]) -> None:
        first, counts = members[0], self.rule.counts_steps
        scalars = [column[first] for column in self._columns]
        count = float(scalars.pop(0) if counts else self.slots[first].count.value + 1)
        results: list[float] = []
        start = 0
        with torch._C._AutoDispatchBelowAutograd():  # which has no part in this, and would copy every list
            for pack in packs:
                theirs = grads[start : start + pack.members]
                start += pack.members
                results = pack.update(self._formula, theirs, scalars, count)
        for kept, result in zip(self._scalars[counts:], results, strict=True):
            if members is self._everyone:
                kept.fill_(result)
            else:
                kept[torch.tensor(members, device="cpu")] = result


def _flat(t: Tensor) -> Tensor:
    """A dense tensor's elements, real ones, in the order in which they lie in memory."""
    return layouts.as_reals(t.detach().as_strided((t.numel(),), (1,))).view(-1).detach()


class Pieces:
    """A slot whose elements the formula takes in pieces, each of a size that keeps every thread busy."""

    members = 1

    def __init__(self, slot: ParamSlot, size: int) -> None:
        """size: of a piece, in elements a thread; up to 1.5 times as many stay together."""
        size *= torch.get_num_threads()
        elements = layouts.as_reals(slot.param.detach()).numel()
        count = (2 * elements + size) // (2 * size)
        # Of one size: a short one would cost as much besides. They begin where cache lines do.
        self._size = None if count <= 1 else -(-elements // (16 * count)) * 16
        params = self._split(slot.param)
        states = [[None] * len(params) if t is None else self._split(t) for t in slot.states]
        self._pieces: list[tuple[Tensor, Sequence[Tensor | None]]] = [
            (p, of_p) for p, *of_p in zip(params, *states, strict=True)
        ]

    def _split(self, t: Tensor) -> Sequence[Tensor]:
        return [layouts.as_reals(t.detach())] if self._size is None else _flat(t).split(self._size)

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
        gradients, self._grads = _packed_buffer(params)
        copies, pieces = _packed_buffer(params)
        self._grad, self._copy = _flat(gradients), _flat(copies)
        self._copies = list(map(_flat, pieces))
        self._one_dimensional = all(p.dim() == 1 and not p.is_complex() for p in params)
        self._states = [
            None if name is None else [_flat(local(peek(slot.state, name))) for slot in slots]
            for name in slots[0].names
        ]  # fmt: skip
        self._one_thread = max(p.numel() for p in self._params) > 16  # up to 16 torch takes one anyway
        self._held = held_in_cpp(self._params, self._grads, self._copies, *filter(None, self._states))

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


def _packed_buffer(like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One tensor with room for the elements of all these, and its pieces, which lie as these do."""
    memory = torch.empty(sum(t.numel() for t in like), dtype=like[0].dtype, device="cpu")
    pieces: Sequence[Tensor] = memory.split([t.numel() for t in like])
    return memory, [piece.as_strided(t.shape, t.stride()).detach() for piece, t in zip(pieces, like, strict=True)]


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
