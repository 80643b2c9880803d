"""Tensors by torch's fused CPU kernels, in one call."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from . import reference
from .buckets import Bucket, ParamSlot, StepInputs
from .cpu_updates import GRAIN, gather_scalars, held_in_cpp, set_own_threads, unscaled_and_clipped, update_average
from .layouts import local
from .rule import FusedTensors, Group, Rule, counter_dtype
from .tracked_state import peek


class FusedBucket(Bucket):
    """Slots of one set of options, by one call of torch's fused CPU kernel, all tensors dense and lying alike."""

    def __init__(self, rule: Rule, slots: list[ParamSlot], groups: list[Group]) -> None:
        super().__init__(rule, slots, groups)
        self.groups = sorted({slot.group for slot in slots})
        self._small = 16 < max(slot.param.numel() for slot in slots) < GRAIN  # up to 16 torch takes one thread anyway
        self._params = [slot.param for slot in slots]
        names = [name for name in (*slots[0].names, *rule.scalar_states) if name is not None]
        self._states = [[local(peek(slot.state, name)).detach() for slot in slots] for name in names]
        self._counters: Tensor | None = None  # all of them in one tensor, which one addition moves
        self._steps: list[Tensor] = []
        if rule.counts_steps:
            self._counters = gather_scalars(slots, "step", counter_dtype(bool(groups[slots[0].group].get("fused"))))
            self._steps = [slot.state["step"].detach() for slot in slots]
        # Aliases, for `torch.utils.swap_tensors` wants no reference to the states.
        self._held = held_in_cpp(*self._states, self._steps)
        self._zeros: Tensor | None = None  # the memory of `_scratch`
        self._scratch: list[Tensor] = []
        self._values: list[Any] | None = None  # that the arguments were read from
        self._arguments: Group
        self._begun = False  # whether every momentum buffer is known to have begun

    def _make_scratch(self) -> list[Tensor]:
        """Zeros like the parameters, for what a kernel insists on writing; and steps that correct no bias."""
        if self._zeros is None:
            # Adam's bias corrections are 1 − βᵗ; at this t they are 1 for every β up to 1 − 4e-8.
            self._steps = [torch.full((), 2.0**30, dtype=torch.float32, device="cpu")] * len(self._params)
            self._zeros = torch.zeros(sum(p.numel() for p in self._params), dtype=self._params[0].dtype, device="cpu")
            pieces: Sequence[Tensor] = torch.split(self._zeros, [p.numel() for p in self._params])
            strided = (x.as_strided(p.shape, p.stride()) for x, p in zip(pieces, self._params, strict=True))
            self._scratch = [x.detach() for x in strided]
            self._held += held_in_cpp(self._scratch)
        self._zeros.zero_()  # 0·∞ from an earlier gradient would stay NaN
        return self._scratch

    def run(self, step: StepInputs) -> None:
        group = step.groups[self.slots[0].group]
        if step.values is not self._values:
            self._arguments, self._values = self.rule.fused_arguments(group), step.values
        grads = self.gradients(step)
        scratch = self._make_scratch() if self.rule.needs_scratch else []
        slots, params, states, steps = self.slots, self._params, self._states, self._steps
        if step.complete:
            if self._counters is not None:
                self._counters.add_(reference.scalar(1.0, torch.float32))
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
        tensors = FusedTensors(params, grads, states, steps, scratch, self._fresh(slots))
        plain_sgd = len(params) == 1 and not (states or group["weight_decay"])  # takes no fused kernel
        threads = torch.get_num_threads() if self._small and not plain_sgd else 1
        set_threads = set_own_threads() if threads > 1 else None
        try:
            if set_threads is not None:
                set_threads(1)
            if len(params) <= 8:
                self.rule.fused_update(self._arguments, tensors)
            else:  # autograd would copy every list; to leave it out takes 0.4 µs
                with torch._C._AutoDispatchBelowAutograd():
                    self.rule.fused_update(self._arguments, tensors)
        finally:
            if set_threads is not None:
                set_threads(threads)
        if tensors.fresh is not None:
            for slot in slots:
                slot.count.value = 1
        if decay := group.get("ema_decay"):
            for slot in slots:
                update_average(slot.param, slot.state, decay)

    def _fresh(self, slots: list[ParamSlot]) -> list[bool] | None:
        """Which momentum buffers begin now; None if there are none or, at no cost, if none does."""
        if self._begun or self.rule.counts_steps or not self._states:
            return None
        fresh = [float(slot.count.value) == 0.0 for slot in slots]
        if any(fresh):
            return fresh
        self._begun = len(slots) == len(self.slots)
        return None
