"""The update where no kernel runs: torch's fused CPU kernels, the rule's formula, or torch's own code."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import dispatch
from . import codes, layouts, reference
from .buckets import Bucket, ParamSlot, StepInputs
from .cpu_updates import GRAIN, Formula, unscaled_and_clipped, update_average
from .fused_bucket import FusedBucket
from .options import compresses, rounds_stochastically, torch_lacks
from .packed_bucket import PackedBucket
from .rule import Group, Rule, counter_dtype
from .tracked_state import peek

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
    if on_cpu and layouts.layout_row(tensors) == []:
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
        offender = grad if type(p) in layouts.PLAIN else p
        what = f"a {type(offender).__name__} of {offender.dtype} on {offender.device}"
    raise RuntimeError(f"{caller}: {', '.join(options)} can't be combined with {what}")


def cpu_buckets(
    rule: Rule, groups: list[Group], fused: list[ParamSlot], packed: list[ParamSlot], by_formula: list[ParamSlot],
    same_options: Sequence[object],
) -> list[Bucket]:  # fmt: skip
    """Neighbouring groups share a call while their options are the same; same_options: equal for groups where they are.

    Makes the counters that are missing.
    """
    buckets: list[Bucket] = []
    for bucket_class, slots_of_class in ((FusedBucket, fused), (PackedBucket, packed)):
        for _, neighbours in groupby(slots_of_class, lambda slot: same_options[slot.group]):
            by_type: dict[tuple[torch.dtype, bool], list[ParamSlot]] = {}
            for slot in neighbours:
                by_type.setdefault((slot.param.dtype, slot.param.numel() < GRAIN), []).append(slot)
            for slots in by_type.values():
                buckets.append(bucket_class(rule, slots, groups))
    for slot in (*fused, *packed, *by_formula):
        step_dtype = counter_dtype(bool(groups[slot.group].get("fused")))
        for name, dtype in (("step", step_dtype), ("ema_step", torch.float32)):
            if name in slot.state and slot.state[name] is None:
                slot.state[name] = torch.zeros((), dtype=dtype, device="cpu")
    if by_formula:
        buckets.append(ReferenceBucket(rule, by_formula, groups))
    return buckets


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


class ReferenceBucket(Bucket):
    """Slots with options that torch does not have, one by one, by the rule's formula."""

    def run(self, step: StepInputs) -> None:
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
        formula = Formula(self.rule, group)
        code_key, param_key = reference.random_keys(group.get("seed", 0), int(random_step), slot.index)
        stochastic, coded = rounds_stochastically(group, slot.param), compresses(group, slot.param)
        scalars = [peek(slot.state, name) for name in self.rule.scalar_states]
        results: list[float] = []
        for first, p, g, residual, states, scales in _pieces(slot, grad):
            values = [
                x if x is None or scale is None else codes.decode(x, scale)
                for x, scale in zip(states, scales, strict=True)
            ]
            weight = p if residual is None else codes.join(p, residual)
            changed, moments, results = formula(weight, g, values, scalars, count)
            if residual is not None:
                dither = reference.random_bits(p, param_key, first) & 0xFF if stochastic else 128
                changed, low = codes.split(changed.float(), dither)
                residual.copy_(low)
            elif stochastic:
                changed = reference.round_stochastically(changed, reference.random_bits(p, param_key, first))
            p.copy_(changed)
            bits = reference.random_bits(p, code_key, first) if coded else None
            for k, (state, scale, moment) in enumerate(zip(states, scales, moments, strict=True)):
                if state is None or moment is None:
                    continue
                if scale is None or bits is None:
                    state.copy_(moment)
                else:
                    codes.encode(moment, state, scale, bits if k == 0 else bits >> 16)
        for scalar, result in zip(scalars, results, strict=True):
            scalar.fill_(result)
        if not self.rule.counts_steps:  # a momentum buffer has begun when it was written
            slot.count.value = int(count)


class _Piece(NamedTuple):
    """Some elements of a slot, real ones."""

    first: int  # the number of the first one
    param: Tensor
    grad: Tensor
    residual: Tensor | None
    states: list[Tensor | None]
    scales: list[Tensor | None]


# Elements, a whole number of blocks. Measured, one core: of 16 M elements each takes 290 ns in one piece, 60 in these.
_PIECE = 1 << 16


def _pieces(slot: ParamSlot, grad: Tensor) -> Iterator[_Piece]:
    """A slot in pieces that stay in the caches: numbers of 8 bits become many of 64. In one where it is not dense."""
    p, several = slot.param, [slot.residual, *slot.states]
    n = p.numel()
    whole = n <= _PIECE or p.is_complex() or layouts.layout_row([t for t in (p, grad, *several) if t is not None]) != []

    def piece(t: Tensor, first: int) -> Tensor:
        return layouts.as_reals(t) if whole else t.as_strided((n,), (1,))[first : first + _PIECE]

    for first in [0] if whole else range(0, n, _PIECE):
        residual, *states = [None if t is None else piece(t, first) for t in several]
        blocks = slice(None) if whole else slice(first // codes.BLOCK, (first + _PIECE) // codes.BLOCK)
        scales = [None if t is None else t[blocks] for t in slot.scales]
        yield _Piece(first, piece(p, first), piece(grad, first), residual, states, scales)


class TorchBucket(Bucket):
    """Parameters of one group that only torch's own code updates: sparse, differentiable, on another device …"""

    def __init__(self, rule: Rule, group: int, params: list[Tensor], in_turn: bool) -> None:
        """in_turn: one after the other, for some are the same or share memory."""
        super().__init__(rule, [], [])
        self.params, self.in_turn, self.groups = params, in_turn, [group]

    def run(self, step: StepInputs) -> None:
        group, states = step.groups[self.groups[0]], step.optimizer.state
        params = [p for p in self.params if p.grad is not None]
        if not params:
            return
        if not self.rule.scalars_on_device(group):
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
