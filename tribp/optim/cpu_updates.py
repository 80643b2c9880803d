"""What the updates without a kernel share: the rule's formula, gradients, averages, counters, threads."""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import layouts
from .buckets import ParamSlot, StepInputs
from .rule import Group, Rule
from .tracked_state import peek

# torch's fused CPU kernels wake all threads for more than 16 elements, its other operations for this many and more.
# Measured, two idle cores: 200 tensors of 17 elements 254 µs with two threads, 75 with one; of 1,000 elements 381 and
# 159. While other processes keep the cores busy, a single small tensor may wait 5 to 15 ms for the second thread.
GRAIN = 32768


class Formula:
    """A rule's formula, with the hyperparameters of one group as numbers."""

    def __init__(self, rule: Rule, group: Group) -> None:
        own = rule.hyper(group)
        self._formula, self._own = rule.formula, own._make(map(float, own))
        self._lr, self._eps, self._sign, self._decay, decoupled, *_ = map(float, rule.common(group))
        self._shrinkage = self._lr * decoupled if decoupled else 0.0  # ∞ · 0 is NaN
        self._eps_inside = bool(group.get("eps_inside_sqrt"))

    def __call__(
        self, p: Tensor, grad: Tensor, states: Sequence[Tensor | None], scalars: Sequence[Tensor], count: float
    ) -> tuple[Tensor, list[Tensor | None], list[float]]:
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


def unscaled_and_clipped(grads: list[Tensor], group: Group, step: StepInputs) -> list[Tensor]:
    """Gradients divided by the GradScaler's scale, in place as torch's fused steps do it, and clipped copies."""
    if step.grad_scale is not None:
        for grad in {id(grad): grad for grad in grads}.values():  # a parameter may be listed twice
            grad.div_(step.grad_scale.to(grad.device))
    if step.norm is None:
        return grads
    coefficient = (group["max_grad_norm"] / (step.norm + 1e-6)).clamp(max=1.0)
    return [grad * coefficient.to(grad.device, grad.real.dtype) for grad in grads]


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


def gather_scalars(slots: Sequence[ParamSlot], name: str, dtype: torch.dtype) -> Tensor:
    """Puts a state of one number, of all these slots, into one tensor, which is returned.

    Tensors that are there become its elements: whoever has put one there, or was given it, has the one that counts.
    """
    scalars: list[Tensor | float | None] = [slot.state[name] for slot in slots]
    if (base := _gathered(scalars, dtype)) is not None:
        return base
    joined = torch.tensor([0.0 if t is None else float(t) for t in scalars], dtype=dtype, device="cpu")
    for slot, scalar, element in zip(slots, scalars, joined.unbind(), strict=True):
        if type(scalar) is Tensor and (scalar.dtype, scalar.shape, scalar.device) == (dtype, (), element.device):
            scalar.data = element
        else:
            slot.state[name] = element
    return joined


def _gathered(scalars: Sequence[Tensor | float | None], dtype: torch.dtype) -> Tensor | None:
    """The tensor whose elements these are, in this order, and no others; None if there is none."""
    first, *others = scalars
    if type(first) is not Tensor or first.dtype != dtype or not first.is_cpu:
        return None
    storage, start, size = first.untyped_storage(), first.data_ptr(), first.element_size()
    if storage.nbytes() != len(scalars) * size:
        return None
    for n, t in enumerate(others, 1):
        if type(t) is not Tensor or t.dtype != dtype or t.data_ptr() != start + n * size:
            return None
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (len(scalars),), (1,))


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


def held_in_cpp(*lists: Sequence[Tensor]) -> list[Tensor]:
    """What keeps a reference of C++ to each of these tensors, none of them a view: views, whose bases they are.

    A list that C++ takes then costs a fifth less: the first reference from there counts in Python's object too. A
    `torch.ScriptList` holds tensors as well, but asks Python what they are, and a signal's exception in there, of
    Ctrl-C, ends the process (torch 2.9 to 2.15).
    """
    return [tensor.view_as(tensor) for tensors in lists for tensor in tensors]
