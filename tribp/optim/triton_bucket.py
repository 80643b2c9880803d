"""The kernel's side of a plan: tables on the device, and one launch for all tensors of one combination of types."""

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..kernels import optim as kernels
from ..kernels import optim_rules
from ..launch.arch import cdiv
from ..launch.buffer import Buffer, layout_of
from ..launch.launches import Launch
from ..launch.optim import MultiTensorConfig, MultiTensorProblem, NormConfig, StepConfig
from ..launch.plan import Build, Plan, build_plan, config_for
from . import layouts
from .buckets import Bucket, ParamSlot, StepInputs
from .device_tables import Table, bits
from .options import compresses, rounds_stochastically
from .rule import CommonHyper, Group, Rule

_TYPES = {
    None: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float64: tl.float64, torch.int8: tl.int8, torch.uint8: tl.uint8,
}  # fmt: skip
Dtypes = tuple[torch.dtype | None, ...]  # of the parameter, the gradient, the rule's three states, the average


def triton_buckets(rule: Rule, optimizer: torch.optim.Optimizer, slots: list[ParamSlot]) -> "list[TritonBucket]":
    """As few launches as there are devices and combinations of types; a state that a tensor lacks fits any type."""
    combinations: list[tuple[object, list[torch.dtype | None], list[ParamSlot]]] = []
    for slot in slots:
        group = optimizer.param_groups[slot.group]
        own = _dtypes(slot)
        fixed = (
            slot.param.device, bool(group.get("eps_inside_sqrt")), _seed(group, slot.param),
            rounds_stochastically(group, slot.param), slot.has_residual,
        )  # fmt: skip
        for other, dtypes, members in combinations:
            if other == fixed and all(a is None or b is None or a == b for a, b in zip(dtypes, own, strict=True)):
                dtypes[:] = [b if a is None else a for a, b in zip(dtypes, own, strict=True)]
                members.append(slot)
                break
        else:
            combinations.append((fixed, list(own), [slot]))
    return [TritonBucket(rule, optimizer, members, tuple(dtypes)) for _, dtypes, members in combinations]


def _dtypes(slot: ParamSlot) -> Dtypes:
    tensors = (slot.param, slot.grad, *_three(slot.states), slot.ema)
    return tuple(None if t is None else t.dtype.to_real() for t in tensors)


def _three(states: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The kernel has places for three states."""
    return [*states, None, None, None][:3]


def _seed(group: Group, p: Tensor) -> int | None:
    """The seed of random numbers; None where there are none."""
    return group.get("seed", 0) if rounds_stochastically(group, p) or compresses(group, p) else None


class TritonBucket(Bucket):
    """One launch: slots on one device, of one combination of types, of however many groups."""

    def __init__(self, rule: Rule, optimizer: torch.optim.Optimizer, slots: list[ParamSlot], dtypes: Dtypes) -> None:
        groups = optimizer.param_groups
        super().__init__(rule, slots, groups)
        self.device = slots[0].param.device
        self._empty = [i for i, slot in enumerate(slots) if not slot.param.numel()]
        self._capturable = all(group.get("capturable") for group in groups)
        self._grads, self._hypers = Table(self.device), Table(self.device)
        self._values: object = None
        self._words: list[int] = []
        self._on_device = False  # whether some hyperparameters are tensors on the device
        with dispatch.on_device(self.device):
            self._finished = torch.zeros(1, dtype=torch.int32, device=self.device)
            self._launch = self._make_tables(groups, dtypes, type(optimizer).__name__)
        self._plans: dict[tuple[object, ...], Plan] = {}  # of the bucket's launches

    def _make_tables(self, groups: list[Group], dtypes: Dtypes, caller: str) -> "StepLaunch":
        layout_rows = self._layout_rows(caller)
        strided = any(layout_rows)
        lengths = [slot.param.numel() * (2 if slot.param.is_complex() else 1) for slot in self.slots]
        types = {dispatch.dtype_name(dtype) for dtype in dtypes if dtype is not None}
        arch = dispatch.arch_of(self.device.index)
        pass_config = config_for(MultiTensorProblem(sum(lengths), tuple(sorted(types)), strided, arch))
        scalar_type = self._adopt_scalars()
        self._layouts = _on(self.device, [word for row in layout_rows for word in row], torch.int64)
        self._row_words = self._words_of_rows(layout_rows, lengths, self._adopt_counters())
        self._rows = _on(self.device, self._row_words, torch.int64)
        self._chunks = _chunks(lengths, pass_config.chunk, self.device)
        group, p = groups[self.slots[0].group], self.slots[0].param
        param, grad, state0, state1, state2, ema = (_TYPES[dtype] for dtype in dtypes)
        config = StepConfig(
            param, grad, state0, state1, state2, ema, _TYPES[scalar_type],
            ACC=tl.float64 if torch.float64 in dtypes else tl.float32,
            ON_DEVICE=False,
            EPS_INSIDE=bool(group.get("eps_inside_sqrt")),
            STOCHASTIC=rounds_stochastically(group, p),
            CODED=torch.int8 in dtypes or torch.uint8 in dtypes,
            PTX=arch.backend != "hip",
            RESIDUAL=self.slots[0].has_residual,
            OPTIONAL=any(_dtypes(slot).count(None) != dtypes.count(None) for slot in self.slots),
            LAYOUT_DIMS=layouts.MAX_DIMS if strided else 0,
            BLOCK=pass_config.block,
        )  # fmt: skip
        name = self.rule.formula.__name__
        names = CommonHyper._fields + self.rule.hyper(group)._fields
        constants = dict(
            SCALARS=getattr(optim_rules, name + "_scalars"),
            RULE=getattr(optim_rules, name),
            HYPER=namedtuple("Hyper", names)(*range(len(names))),
        )
        return StepLaunch(len(self._chunks), len(self.slots), _seed(group, p) or 0, pass_config, config, constants)

    def _layout_rows(self, caller: str) -> list[list[int]]:
        """Of each slot sizes and strides; empty where its parts have one layout."""
        rows: list[list[int]] = []
        for slot in self.slots:
            row = layouts.layout_row([layouts.as_reals(t) for t in slot.tensors])
            if row is None:
                raise RuntimeError(
                    f"{caller}: the states of parameter {slot.index} lie in memory in different ways; give them one "
                    "layout, e.g. by .contiguous()"
                )
            rows.append(row)
        return rows

    def _words_of_rows(self, layout_rows: list[list[int]], lengths: list[int], counters: list[Tensor]) -> list[int]:
        words: list[int] = []
        layout_address = self._layouts.data_ptr()
        for slot, layout, length, counter in zip(self.slots, layout_rows, lengths, counters, strict=True):
            state0, state1, state2 = map(_address, _three(slot.states))
            code_scale0, code_scale1, code_scale2 = map(_address, _three(slot.scales))
            scalar0, scalar1, *_ = *(_address(slot.state[name]) for name in self.rule.scalar_states), 0, 0
            words += kernels.Row(
                param=_address(slot.param), state0=state0, state1=state1, state2=state2, ema=_address(slot.ema),
                step=_address(counter), ema_step=_address(slot.state["ema_step"] if slot.has_ema else None),
                random_step=_address(None if self.rule.counts_steps else slot.state.get("step")),
                numel=length, group=slot.group, layout=layout_address if layout else 0, stream=slot.index,
                scalar0=scalar0, scalar1=scalar1,
                code_scale0=code_scale0, code_scale1=code_scale1, code_scale2=code_scale2,
                residual=_address(slot.residual),
            )  # fmt: skip
            layout_address += 8 * len(layout)
        return words

    def _adopt_counters(self) -> list[Tensor]:
        """Brings the counters of the slots to the device; returns those that say how often a slot was updated."""
        for key in ("step", "ema_step"):
            counted = [slot for slot in self.slots if key in slot.state]
            for slot, counter in zip(counted, self._adopt([slot.state[key] for slot in counted]), strict=True):
                slot.state[key] = counter
        if self.rule.counts_steps:
            return [slot.state["step"] for slot in self.slots]
        counters = self._adopt([slot.count.value for slot in self.slots])
        for slot, counter in zip(self.slots, counters, strict=True):
            slot.count.value = counter
        return counters

    def _adopt_scalars(self) -> torch.dtype | None:
        """Brings the states of one number to the device, in one type, which it returns."""
        names, dtype = self.rule.scalar_states, None
        for name in names:
            dtype = reduce(torch.promote_types, (slot.state[name].dtype for slot in self.slots), dtype or torch.float32)
        for name in names:
            scalars = self._adopt([slot.state[name] for slot in self.slots], dtype or torch.float32)
            for slot, scalar in zip(self.slots, scalars, strict=True):
                slot.state[name] = scalar
        return dtype

    def _adopt(self, counters: Sequence[Tensor | int | None], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Those that are there already stay, the others get a place in one tensor."""

        def stays(c: Tensor | int | None) -> bool:
            return isinstance(c, Tensor) and c.device == self.device and c.dtype == dtype and c.dim() == 0

        new = iter(_on(self.device, [float(c or 0) for c in counters if not stays(c)], dtype).unbind())
        return [c if stays(c) else next(new) for c in counters]  # type: ignore[misc]

    def parameters_moved(self) -> None:
        fields = kernels.Row._fields
        self._row_words[fields.index("param") :: len(fields)] = [_address(slot.param) for slot in self.slots]
        with dispatch.on_device(self.device):
            self._rows = _on(self.device, self._row_words, torch.int64)

    # Every step.

    def write_tables(self, step: StepInputs) -> None:
        """Bring the tables on the device up to date: before anything is launched."""
        with dispatch.on_device(self.device):
            grads = self.gradients(step)
            if step.complete:
                addresses = list(map(Tensor.data_ptr, grads))
            else:
                addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
            for i in self._empty:
                addresses[i] = 0 if grads[i] is None else 16  # an empty tensor has no address, and its step counts
            self.grads = self._grads.write(addresses, captured=step.captured)
            if step.values is not self._values:
                self._words = self._hyper_words(step.groups)
                self._values = step.values
            self.hypers = self._hypers.write(self._words, captured=step.captured)
            if self._capturable and step.captured is None:
                self._grads.reserve(len(addresses))
                self._hypers.reserve(len(self._words))

    def _hyper_words(self, groups: list[Group]) -> list[int]:
        """The groups' rows: of each hyperparameter the value, and the address if it lies on the device."""
        values: list[Any] = []
        for group in groups:
            values += self.rule.common(group)
            values += self.rule.hyper(group)
        addresses: dict[int, int] = {}
        if not set(map(type, values)) <= {float, int}:
            for k, value in enumerate(values):
                if isinstance(value, Tensor):
                    if value.device.type == self.device.type:
                        values[k], addresses[2 * k + 1] = 0.0, _scalar_address(value, self.device)
                    else:
                        values[k] = value.item()
        self._on_device = bool(addresses)
        words = [0] * (2 * len(values))
        words[::2] = bits(values)
        for k, address in addresses.items():
            words[k] = address
        return words

    def run(self, step: StepInputs) -> None:
        """Update all slots; the tables must be up to date."""
        with dispatch.on_device(self.device):
            tables = self._rows, self.grads, self._chunks, self.hypers, self._finished
            scalars = [
                None if t is None else t.to(self.device, non_blocking=True)
                for t in (step.found_inf, step.grad_scale, step.norm)
            ]
            self._perform(_step, tables, scalars, on_device=self._on_device)

    def _perform(self, build: Build, tables: tuple[Tensor, ...], others: list[Tensor | None], **facts: object) -> None:
        """Run a launch of the bucket. Its tables keep their layouts; to ask for them at every step would take 5 µs."""
        tensors = *tables, *others
        key = build, *map(layout_of, others), *facts.items()
        plan = self._plans.get(key)
        if plan is None:
            arch, layouts_of_all = dispatch.arch_of(self.device.index), list(map(layout_of, tensors))
            plan = self._plans[key] = build_plan(build, arch, layouts_of_all, {"launch": self._launch, **facts})
        plan.run(tensors)


@dataclass(eq=False)  # one of these is as good as another, and compared by identity
class StepLaunch:
    """What the launches of a bucket have in common as long as it lives."""

    programs: int
    slots: int
    seed: int
    pass_config: MultiTensorConfig
    config: StepConfig
    constants: dict[str, object]

    def of(self, kernel: Any, arguments: tuple[object, ...], **constants: object) -> Launch:
        config = self.pass_config
        return Launch(
            kernel, (self.programs,), arguments, constants, config.num_warps, max_registers=config.max_registers
        )


def _step(plan: Plan, *tensors: Buffer | None, launch: StepLaunch, on_device: bool) -> None:
    """The launch that updates all slots of a bucket. tensors: those of `multi_tensor_step`, in its order."""
    integers = launch.slots, launch.pass_config.chunk_blocks, launch.seed
    config = launch.config._replace(ON_DEVICE=on_device)
    plan.add(launch.of(kernels.multi_tensor_step, tensors + integers, **launch.constants, CONFIG=config))


def _norm(
    plan: Plan, rows: Buffer, grads: Buffer, chunks: Buffer, finished: Buffer, partials: Buffer, norm: Buffer,
    scale: Buffer | None, *, launch: StepLaunch, first: int, programs: int, last: bool,
) -> None:  # fmt: skip
    """The launch that adds a bucket's gradients to a norm."""
    arguments = (
        rows, grads, chunks, partials, norm, finished, scale, first, programs, launch.pass_config.chunk_blocks,
    )  # fmt: skip
    config = NormConfig(launch.config.GRAD_TYPE, launch.config.LAYOUT_DIMS, launch.config.BLOCK, last)
    plan.add(launch.of(kernels.gradient_norm, arguments, CONFIG=config))


def gradient_norm(buckets: "Sequence[TritonBucket]", step: StepInputs) -> Tensor:
    """‖g‖₂ over the gradients of all buckets, on one device, as a float64 scalar there: one launch a bucket."""
    device = buckets[0].device
    with dispatch.on_device(device):
        counts = [len(bucket._chunks) for bucket in buckets]
        partials = torch.empty(sum(counts), dtype=torch.float64, device=device)
        norm = torch.empty((), dtype=torch.float64, device=device)
        scale = None if step.grad_scale is None else step.grad_scale.to(device, non_blocking=True)
        first = 0
        for bucket, count in zip(buckets, counts, strict=True):
            tables, last = (bucket._rows, bucket.grads, bucket._chunks, bucket._finished), bucket is buckets[-1]
            bucket._perform(_norm, tables, [partials, norm, scale], first=first, programs=sum(counts), last=last)
            first += count
    return norm


def _chunks(lengths: Sequence[int], chunk: int, device: torch.device) -> Tensor:
    """A row (tensor, which of its chunks) for every program; an empty tensor has one too, for its scalar states."""
    counts = torch.tensor([max(1, cdiv(n, chunk)) for n in lengths], device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), counts)
    within = torch.arange(len(owners), device="cpu") - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([owners, within], 1).to(torch.int32).to(device)


def _on(device: torch.device, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scalar_address(value: Tensor, device: torch.device) -> int:
    """Where a hyperparameter lies on the device; the lowest bit says that it is float64."""
    if value.numel() != 1 or not layouts.fits_storage(value):
        raise ValueError(f"a hyperparameter that is a tensor must hold one number, got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64) or value.device != device:
        raise TypeError(
            "a hyperparameter that is a tensor must be on the CPU, or float32 or float64 on its parameters' device, "
            f"{device}; got {value.dtype} on {value.device}"
        )
    return value.data_ptr() + (value.dtype == torch.float64)
