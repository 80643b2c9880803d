"""Sorts an optimizer's parameters into buckets, once, and runs the buckets every step while nothing has changed.

Finding out what can be updated how costs 5 ms for 1,000 parameters; `watch.py` finds in 0.3 ms that it still holds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from .. import dispatch
from . import checks, codes, layouts, torch_buckets
from .buckets import Bucket, ParamSlot, StepInputs, UpdateCount
from .layouts import local
from .options import common_max_grad_norm, compresses, keeps_residual, rounds_stochastically
from .rule import Group, Rule, counter_dtype, is_shared
from .tracked_state import WatchedState, peek
from .watch import Options, Watch, is_plain

if TYPE_CHECKING:
    from .triton_bucket import TritonBucket

KERNEL_TYPES = {*dispatch.FLOATS, *codes.CODES}


class UpdatePlan:
    """How every parameter of an optimizer is updated; valid while `watch.checked_gradients` returns them."""

    watch: Watch

    def __init__(self, rule: Rule, optimizer: torch.optim.Optimizer, before: "UpdatePlan | None") -> None:
        """before: the optimizer's last plan, which no longer holds."""
        groups: list[Group] = optimizer.param_groups
        self._rule, self._optimizer_name = rule, type(optimizer).__name__
        options = Options(rule, groups)
        self.max_grad_norm = common_max_grad_norm(groups)
        counts = [] if before is None else list(before._counts.values())
        self._counts: dict[int, UpdateCount] = {id(c.owner): UpdateCount(c.owner, c.value) for c in counts}  # by owner
        shared = (before is not None and before.watch.shared) or any(
            type(state) is not WatchedState or state.notes.accessed for state in optimizer.state.values()
        )
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._group_of = [group_index for group_index, group in enumerate(groups) for _ in group["params"]]
        self._pack = torch_buckets.worth_packing(self.params)
        used = [
            self._checked_state(optimizer, group_index, position)
            for group_index, group in enumerate(groups)
            for position in range(len(group["params"]))
        ]
        entangled = _entangled(self.params, used)
        kinds = [  # of all, which may raise, before any state is made
            self._kind(groups[group_index], p, state, index in entangled)
            for index, (p, group_index, state) in enumerate(zip(self.params, self._group_of, used, strict=True))
        ]
        slots, for_torch = self._make_states(optimizer, kinds, entangled, before)
        self._triton_buckets: list[TritonBucket] = []
        if slots["triton"]:
            from . import triton_bucket

            self._triton_buckets = triton_bucket.triton_buckets(rule, optimizer, slots["triton"])
        cpu_slots = slots["fused"], slots["packed"], slots["reference"]
        self.buckets: list[Bucket] = [
            *for_torch,  # first, for torch may refuse (sparse gradients, say), and then nothing shall have been updated
            *self._triton_buckets,
            *torch_buckets.cpu_buckets(rule, groups, *cpu_slots, options.comparable),
        ]
        self._all_triton = len(self.buckets) == len(self._triton_buckets)
        every = [slot for kind in slots.values() for slot in kind]
        self._counts = {id(slot.count.owner): slot.count for slot in every}
        self.watch = Watch(rule, optimizer, options, self.buckets, kinds, shared, apart=not entangled)
        self._running = self._released = False
        self.watch.notes.on_change = WeakMethod(self.release)
        for slot in every:
            slot.grad = slot.whole  # or a whole set of gradients would live as long as the plan

    def _checked_state(
        self, optimizer: torch.optim.Optimizer, group_index: int, position: int
    ) -> dict[str, Any] | None:
        """What the update of a parameter uses of its state, checked; None before the first gradient."""
        group = optimizer.param_groups[group_index]
        p = group["params"][position]
        if is_lazy(p) and p.grad is None:
            return None
        state = optimizer.state.get(p, {})
        names = [*self._rule.states(group), *self._rule.scalar_states, "step" if self._rule.counts_steps else None]
        if p.grad is None and any(name is not None and peek(state, name) is None for name in names):
            return None  # torch makes a state when it sees the first gradient
        needed = [name for name in names if name is not None and name not in self._rule.optional_states]
        checks.check_complete(optimizer, group_index, position, state, needed)
        entries = [*self._rule.entries(group), *([codes.RESIDUAL] if keeps_residual(group, p) else [])]
        used = {name: value for name in entries if (value := peek(state, name)) is not None}
        try:
            checks.check_state_tensors(
                optimizer, group_index, position, p.grad, used, self._rule.scalars(), codes.coded_entries(state)
            )
        except (TypeError, ValueError):
            if p.grad is None:  # nothing is updated: memory may have been given away meanwhile
                return None
            raise
        return used

    def _kind(self, group: Group, p: Tensor, used: dict[str, Any] | None, entangled: bool) -> str | None:
        """Which code updates a parameter: "triton", "fused", "packed", "reference", "torch"; None if none does yet."""
        if used is None:
            return None
        g = p if p.grad is None else p.grad
        states = [t for name, t in used.items() if name not in self._rule.scalars()]
        kind = "torch"
        if not (g.layout != torch.strided or p.layout != torch.strided or group.get("differentiable")):
            tensors = layouts.local_parts(p, g, *states)
            if tensors is not None and not any(
                t.is_conj() or t.is_neg() or t.device != tensors[0].device or t.shape != tensors[0].shape
                for t in tensors
            ):
                if (
                    dispatch.backend_of(tensors[0]) == "triton"
                    and not entangled
                    and {t.dtype.to_real() for t in tensors} <= KERNEL_TYPES
                    and layouts.layout_row([layouts.as_reals(t) for t in tensors]) is not None
                ):
                    return "triton"
                kind = torch_buckets.kind_of(self._rule, group, tensors, self._pack)
        numbers = (used.get(name) for name in self._rule.scalars())
        if kind in ("fused", "packed") and (entangled or any(isinstance(t, Tensor) and is_shared(t) for t in numbers)):
            kind = "torch"
        if kind == "torch":
            torch_buckets.refuse_options(self._optimizer_name, group, p, g)
        return kind

    def _make_states(
        self, optimizer: torch.optim.Optimizer, kinds: Sequence[str | None], entangled: set[int],
        before: "UpdatePlan | None",
    ) -> tuple[dict[str, list[ParamSlot]], list[torch_buckets.TorchBucket]]:  # fmt: skip
        """Slots by kind, and buckets for torch's own code; makes the states that are missing, in torch's order."""
        slots: dict[str, list[ParamSlot]] = {"triton": [], "fused": [], "packed": [], "reference": []}
        by_group: dict[int, list[Tensor]] = {}
        in_turn: set[int] = set()  # groups whose parameters torch's own code updates one after the other
        for index, (kind, p, group_index) in enumerate(zip(kinds, self.params, self._group_of, strict=True)):
            group = optimizer.param_groups[group_index]
            if kind == "torch":
                by_group.setdefault(group_index, []).append(p)
                if p.grad is not None and self._rule.has_state(group):
                    optimizer.state[p]  # made by being asked for
                if index in entangled:
                    in_turn.add(group_index)
                if before is not None and before.is_unused(peek(optimizer.state.get(p, {}), "momentum_buffer")):
                    del optimizer.state[p]["momentum_buffer"]  # torch's code takes one that is there for begun
            elif kind is not None:
                slots[kind].append(self._slot(optimizer, group, group_index, index))
        return slots, [torch_buckets.TorchBucket(self._rule, n, ps, n in in_turn) for n, ps in by_group.items()]

    def _slot(self, optimizer: torch.optim.Optimizer, group: Group, group_index: int, index: int) -> ParamSlot:
        """A parameter with its states, as torch would make them; counters come later, all at once."""
        rule, p = self._rule, self.params[index]
        state: dict[str, Any] = optimizer.state[p] if rule.has_state(group) else {}
        if type(state) is not WatchedState and rule.has_state(group):
            state = optimizer.state[p] = WatchedState(state)
        dtype = group.get("state_dtype")
        if dtype is None or p.is_complex():
            dtype = p.dtype
        random = rounds_stochastically(group, p) or compresses(group, p)
        if (rule.counts_steps or random) and "step" not in state:
            state["step"] = None  # torch's first key; SGD has it for its random numbers
        for scalar in rule.scalar_states:
            if peek(state, scalar) is None:
                state[scalar] = torch.tensor(rule.new_scalar(group, scalar), dtype=counter_dtype(False), device="cpu")
        names = rule.states(group)
        made: list[Tensor] = []
        for name in names:
            if name is not None and peek(state, name) is None:
                new, code = rule.new_state(group, p, name, dtype), codes.code_type(rule, group, p, name)
                if code is None:
                    state[name] = new
                else:
                    codes.store_codes(state, name, new, p, code)
                made.append(peek(state, name))
        if keeps_residual(group, p) and codes.RESIDUAL not in state:
            state[codes.RESIDUAL] = torch.zeros_like(p, dtype=torch.int8)
        if group.get("ema_decay") and "ema" not in state:
            state["ema"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            state["ema_step"] = None
        owner = next((peek(state, name) for name in names if name is not None), p)
        count = self._counts.get(id(owner))
        if count is None:  # a buffer that was there before us has begun
            count = self._counts[id(owner)] = UpdateCount(owner, 0 if any(owner is t for t in made) else 1)
        grad = local(p if p.grad is None else p.grad)
        has_residual, has_ema = keeps_residual(group, p), bool(group.get("ema_decay"))
        return ParamSlot(index, group_index, p, grad, state, names, has_residual, has_ema, count)

    def is_unused(self, buffer: object) -> bool:
        """Whether this plan made a momentum buffer that no step has used yet, for the first one was skipped."""
        count = self._counts.get(id(buffer))
        return not self._rule.counts_steps and count is not None and count.owner is buffer and not float(count.value)

    def release(self) -> None:
        """Let go of all states: somebody replaces them, perhaps by copies elsewhere, and wants their memory.

        What is left says which momentum buffers have not begun.
        """
        if self._running or self._released or self.watch.captured:
            return
        self._released = True
        self.buckets, self._triton_buckets = [], []
        self.watch.release()
        counts = list(self._counts.values())
        begun: Sequence[object] = [True] * len(counts)
        if not self._rule.counts_steps:
            values = [count.value for count in counts]
            on_device = [value for value in values if isinstance(value, Tensor)]
            begun = torch.stack(on_device).tolist() if on_device and len(on_device) == len(values) else values
        for count, has_begun in zip(counts, begun, strict=True):
            if has_begun:
                count.owner = None

    # The step.

    def run(
        self, optimizer: torch.optim.Optimizer, grads: list[Tensor | None], grad_scale: Tensor | None,
        found_inf: Tensor | None, captured: list[object] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """One step; returns the gradients' norm if they are clipped by it. grad_scale, found_inf: a GradScaler's."""
        for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if scalar is not None:
                checks.check_scalar(f"{self._optimizer_name}: {name}", scalar)
        if not self._all_triton and found_inf is not None:
            if found_inf.item() != 0:
                return None if self.max_grad_norm is None else self._norm_by_torch(grad_scale)
            found_inf = None
        watch = self.watch
        step = StepInputs(
            optimizer, optimizer.param_groups, watch.options.values, grads, watch.complete, grad_scale, None, found_inf,
            captured,
        )  # fmt: skip
        self._running = True  # torch's own code replaces counters
        try:
            for kernels in self._triton_buckets:
                kernels.write_tables(step)
            if self.max_grad_norm is not None:
                step = step._replace(norm=self._norm(step))
            for bucket in self.buckets:
                bucket.run(step)
        finally:
            self._running = False
        # Autograd then refuses a backward pass that needs what they were. Kernels, torch's fused too, don't tell it.
        increment_version(self.params if watch.complete else [p for p in self.params if p.grad is not None])
        watch.after_step()
        return step.norm

    def _norm(self, step: StepInputs) -> Tensor:
        """‖g‖₂ over all gradients, unscaled: by one more launch, or by torch where they are not all in one place."""
        one_device = len({bucket.device for bucket in self._triton_buckets}) == 1
        if self._all_triton and one_device and not self.watch.sharded:
            from . import triton_bucket

            return triton_bucket.gradient_norm(self._triton_buckets, step)
        return self._norm_by_torch(step.grad_scale)

    def _norm_by_torch(self, grad_scale: Tensor | None) -> Tensor:
        norm = torch_buckets.total_norm([p.grad for p in dict.fromkeys(self.params) if p.grad is not None])
        return norm if grad_scale is None else norm / grad_scale.to(norm.device)


def _entangled(params: Sequence[Tensor], used: Sequence[dict[str, Any] | None]) -> set[int]:
    """Parameters that are listed twice, or share memory with another one or its states.

    In a launch two programs would race on it; torch's loop updates one after the other.
    """
    listed: dict[int, list[int]] = {}
    owned: list[tuple[int, Tensor]] = []
    for index, (p, state) in enumerate(zip(params, used, strict=True)):
        listed.setdefault(id(p), []).append(index)
        if state is not None:
            tensors = [local(t) for t in (p, *state.values()) if isinstance(t, Tensor)]
            owned += [(index, t) for t in tensors if is_plain(t) and t.device.type != "meta"]
    entangled = layouts.overlapping(owned)
    for indices in listed.values():
        if len(indices) > 1:
            entangled.update(indices)
    return entangled
