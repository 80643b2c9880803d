"""The kernel's side of a plan: tables on the device, and one launch for all tensors of one combination of types."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..kernels import optim as kernels
from ..launch.arch import cdiv
from ..launch.optim import MultiTensorConfig, MultiTensorProblem
from ..launch.plan import Buffer, Launch, config_for, perform
from ..launch.plan import Plan as LaunchPlan
from . import layouts
from .buckets import Member, Step
from .device_tables import Table, bits

if TYPE_CHECKING:
    from .optimizer import Group, Optimizer
    from .plan import Plan

_TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip
_HYPER = kernels.HYPER.value
_NOWHERE = [0.0] * _HYPER  # the same bits as so many addresses that are 0
Dtypes = tuple[torch.dtype | None, ...]  # of the parameter, the gradient, the rule's three states, the average


def parts(plan: "Plan", optimizer: "Optimizer", members: list[Member]) -> "list[Kernel]":
    """As few launches as there are devices and combinations of types; a state that a tensor lacks fits any type."""
    combinations: list[tuple[object, list[torch.dtype | None], list[Member]]] = []
    for m in members:
        group = optimizer.param_groups[m.group]
        kinds = _dtypes(m)
        fixed = (m.param.device, bool(group.get("eps_inside_sqrt")), _seed(group, m.param))
        for other, dtypes, found in combinations:
            if other == fixed and all(a is None or b is None or a == b for a, b in zip(dtypes, kinds, strict=True)):
                dtypes[:] = [b if a is None else a for a, b in zip(dtypes, kinds, strict=True)]
                found.append(m)
                break
        else:
            combinations.append((fixed, list(kinds), [m]))
    return [Kernel(plan, optimizer, found, tuple(dtypes)) for _, dtypes, found in combinations]


def _dtypes(m: Member) -> Dtypes:
    return tuple(None if t is None else t.dtype.to_real() for t in (m.param, m.grad, *m.states, m.ema))


def _seed(group: "Group", p: Tensor) -> int | None:
    """The seed of stochastic rounding; None without it."""
    return group.get("seed", 0) if group.get("stochastic_rounding") and p.dtype == torch.bfloat16 else None


class Kernel:
    """One launch: members on one device, of one combination of types, of however many groups."""

    def __init__(self, plan: "Plan", optimizer: "Optimizer", members: list[Member], dtypes: Dtypes) -> None:
        self.members, self.dtypes = members, dtypes
        self.groups: list[int] = []
        self.device = members[0].param.device
        self._indices = [m.index for m in members]
        self._every = self._indices == list(range(len(plan.params)))
        self._empty = [i for i, m in enumerate(members) if not m.param.numel()]
        with dispatch.on_device(members[0].param):
            self._make_tables(plan, optimizer)
        self._grads, self._hypers = Table(self.device), Table(self.device)
        self._capturable = all(group.get("capturable") for group in optimizer.param_groups)
        self._finished = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._values: object = None
        self._words: list[int] = []
        self._on_device = False  # whether some hyperparameters are tensors on the device
        self._fixed = self._launches_alike(optimizer)

    def _make_tables(self, plan: "Plan", optimizer: "Optimizer") -> None:
        self._count(plan, optimizer)
        found = [layouts.layout([layouts.as_reals(t) for t in m.parts]) for m in self.members]
        if None in found:
            raise RuntimeError(
                f"{type(optimizer).__name__}: the states of parameter {self.members[found.index(None)].index} lie in "
                "memory in different ways; give them one layout, e.g. by .contiguous()"
            )
        self.strided = any(found)
        self._layouts = _on(self.device, [word for layout in found if layout for word in layout], torch.int64)
        numbers = [m.param.numel() * (2 if m.param.is_complex() else 1) for m in self.members]
        arch = dispatch.arch_of(self.device.index)
        types = {dispatch.dtype_name(dtype) for dtype in self.dtypes if dtype is not None}
        problem = MultiTensorProblem(sum(numbers), tuple(sorted(types)), self.strided, arch)
        self.config: MultiTensorConfig = config_for(problem)
        rows: list[int] = []
        at = self._layouts.data_ptr()
        for m, layout, numel, counter in zip(self.members, found, numbers, self._counters, strict=True):
            rows += [m.param.data_ptr(), *map(_address, m.states), _address(m.ema), counter.data_ptr()]
            random_step = None if optimizer._COUNTS else m.state.get("step")
            rows += [
                _address(m.state.get("ema_step")),
                _address(random_step),
                numel,
                m.group,
                at if layout else 0,
                m.index,
            ]
            at += 8 * len(layout or ())
        self._rows = _on(self.device, rows, torch.int64)
        self._chunks = _chunks(numbers, self.config.chunk, self.device)

    def _count(self, plan: "Plan", optimizer: "Optimizer") -> None:
        """Counters on the device: those that are there already stay, the others get a place in one tensor."""
        for key in ("step", "ema_step"):
            counted = [m for m in self.members if key in m.state]
            for m, counter in zip(counted, self._adopt([m.state[key] for m in counted]), strict=True):
                m.state[key] = counter
        if optimizer._COUNTS:
            self._counters = [m.state["step"] for m in self.members]
        else:
            self._counters = self._adopt([plan.counter(m) for m in self.members])
            for m, counter in zip(self.members, self._counters, strict=True):
                plan.count_on(m, counter)

    def _adopt(self, counters: Sequence[Tensor | int | None]) -> list[Tensor]:
        def stays(c: Tensor | int | None) -> bool:
            return isinstance(c, Tensor) and c.device == self.device and c.dtype == torch.float32 and c.dim() == 0

        new = iter(_on(self.device, [float(c or 0) for c in counters if not stays(c)], torch.float32).unbind())
        return [c if stays(c) else next(new) for c in counters]  # type: ignore[misc]

    def _launches_alike(self, optimizer: "Optimizer") -> "Fixed":
        group = optimizer.param_groups[self.members[0].group]
        param, grad, *states, ema = (None if t is None else _TYPES[t] for t in self.dtypes)
        seed = _seed(group, self.members[0].param)
        constants = dict(
            SCALARS=getattr(kernels, optimizer._RULE + "_scalars"),
            RULE=getattr(kernels, optimizer._RULE),
            PARAM_TYPE=param, GRAD_TYPE=grad, STATE0=states[0], STATE1=states[1], STATE2=states[2], EMA_TYPE=ema,
            ACC=tl.float64 if torch.float64 in self.dtypes else tl.float32,
            EPS_INSIDE=bool(group.get("eps_inside_sqrt")),
            STOCHASTIC=seed is not None,
            OPTIONAL=any(_dtypes(m).count(None) != self.dtypes.count(None) for m in self.members),
            STRIDED=self.strided,
            BLOCK=self.config.block,
        )  # fmt: skip
        return Fixed(len(self._chunks), len(self.members), seed or 0, self.config, constants)

    # Every step.

    def write_tables(self, step: Step) -> None:
        """Bring the tables on the device up to date: before anything is launched."""
        with dispatch.on_device(self.members[0].param):
            self._write_tables(step)

    def _write_tables(self, step: Step) -> None:
        found = step.grads if self._every else [step.grads[i] for i in self._indices]
        if step.complete:
            addresses = list(map(Tensor.data_ptr, found))  # type: ignore[arg-type]
        else:
            addresses = [0 if grad is None else grad.data_ptr() for grad in found]
        for i in self._empty:
            addresses[i] = 0 if found[i] is None else 16  # an empty tensor has no address, and its step counts
        self.grads = self._grads.write(addresses, capturing=step.capturing)
        if step.values is not self._values:
            self._words = self._hyper_words(step)
            self._values = step.values
        self.hypers = self._hypers.write(self._words, capturing=step.capturing)
        if self._capturable and not step.capturing:
            self._grads.reserve(len(addresses))
            self._hypers.reserve(len(self._words))

    def _hyper_words(self, step: Step) -> list[int]:
        """The groups' rows: values, then the addresses of those that lie on the device."""
        flat: list[Any] = []
        for group in step.groups:
            flat += step.optimizer._values(group)
            flat += _NOWHERE
        self._on_device = False
        if set(map(type, flat)) <= {float, int}:
            return bits(flat)
        where: dict[int, int] = {}
        for k, value in enumerate(flat):
            if isinstance(value, Tensor):
                if value.device.type == self.device.type:
                    flat[k], where[k + _HYPER] = 0.0, _scalar_address(value, self.device)
                else:
                    flat[k] = value.item()
        words = bits(flat)
        self._on_device = bool(where)
        for k, address in where.items():
            words[k] = address
        return words

    def run(self, step: Step) -> None:
        """Update all members; the tables must be up to date."""
        with dispatch.on_device(self.members[0].param):
            found_inf, scale, norm = (
                None if t is None else t.to(self.device, non_blocking=True)
                for t in (step.found_inf, step.grad_scale, step.norm)
            )
            tensors = (
                self._rows, self.grads, self._chunks, self.hypers, self._finished, found_inf, scale, norm,
            )  # fmt: skip
            perform(_step, tensors, self.device, fixed=self._fixed, on_device=self._on_device)


@dataclass(eq=False)  # one of these is as good as another, and found at once
class Fixed:
    """What the launches of a part have in common as long as it lives."""

    programs: int
    members: int
    seed: int
    config: MultiTensorConfig
    constants: dict[str, object]

    def launch(self, kernel: Any, arguments: tuple[object, ...], constants: dict[str, object]) -> Launch:
        s = self.config
        return Launch(kernel, (self.programs,), arguments, constants, s.num_warps, max_registers=s.max_registers)


def _step(
    plan: LaunchPlan, rows: Buffer, grads: Buffer, chunks: Buffer, hypers: Buffer, finished: Buffer,
    found_inf: Buffer | None, scale: Buffer | None, norm: Buffer | None, *, fixed: Fixed, on_device: bool,
) -> None:  # fmt: skip
    """The launch that updates all members of a part."""
    tensors = rows, grads, chunks, hypers, finished, found_inf, scale, norm
    numbers = fixed.members, fixed.config.chunk_blocks, fixed.seed
    plan.add(fixed.launch(kernels.multi_tensor_step, tensors + numbers, fixed.constants | {"ON_DEVICE": on_device}))


def _norm(
    plan: LaunchPlan, rows: Buffer, grads: Buffer, chunks: Buffer, partials: Buffer, norm: Buffer, finished: Buffer,
    scale: Buffer | None, *, fixed: Fixed, first: int, programs: int, last: bool,
) -> None:  # fmt: skip
    """The launch that adds the members' gradients to a norm."""
    arguments = (
        rows, grads, chunks, partials, norm, finished, scale, first, programs, fixed.config.chunk_blocks,
    )  # fmt: skip
    constants = {name: fixed.constants[name] for name in ("GRAD_TYPE", "STRIDED", "BLOCK")} | {"LAST": last}
    plan.add(fixed.launch(kernels.gradient_norm, arguments, constants))


def gradient_norm(parts: "Sequence[Kernel]", step: Step) -> Tensor:
    """‖g‖₂ over the gradients of all parts, on one device, as a float64 scalar there: one launch a part."""
    with dispatch.on_device(parts[0].members[0].param):
        counts = [len(part._chunks) for part in parts]
        partials = torch.empty(sum(counts), dtype=torch.float64, device=parts[0].device)
        norm = torch.empty((), dtype=torch.float64, device=parts[0].device)
        scale = None if step.grad_scale is None else step.grad_scale.to(parts[0].device, non_blocking=True)
        first = 0
        for part, count in zip(parts, counts, strict=True):
            tensors = part._rows, part.grads, part._chunks, partials, norm, part._finished, scale
            last = part is parts[-1]
            perform(_norm, tensors, part.device, fixed=part._fixed, first=first, programs=sum(counts), last=last)
            first += count
    return norm


def _chunks(numbers: Sequence[int], chunk: int, device: torch.device) -> Tensor:
    """A row (tensor, which of its chunks) for every program, at least one."""
    counts = torch.tensor([cdiv(n, chunk) for n in numbers], device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(numbers), device="cpu"), counts)
    within = torch.arange(len(owners), device="cpu") - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    chunks = torch.stack([owners, within], 1) if len(owners) else torch.tensor([[-1, 0]], device="cpu")
    return chunks.to(torch.int32).to(device)


def _on(device: torch.device, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scalar_address(value: Tensor, device: torch.device) -> int:
    """Where a hyperparameter lies on the device; the lowest bit says that it is float64."""
    if value.numel() != 1 or not layouts.is_held(value):
        raise ValueError(f"a hyperparameter that is a tensor must hold one number, got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64) or value.device != device:
        raise TypeError(
            "a hyperparameter that is a tensor must be on the CPU, or float32 or float64 on its parameters' device, "
            f"{device}; got {value.dtype} on {value.device}"
        )
    return value.data_ptr() + (value.dtype == torch.float64)
