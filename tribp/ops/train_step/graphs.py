"""A training step in a CUDA graph: captured when a call is like the one before, repeated as long as nothing moves."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from ..shared import NAMESPACE

Step = Callable[[Tensor, Tensor], Tensor]  # of input and target, to the loss
KEPT = 8  # graphs, one for each kind of batch, with the memory of its step; the oldest goes first
# Modules whose optimizers' steps do nothing that a graph would not repeat; a class of somebody's own may.
OWN_STEPS = ("torch.optim.", f"{NAMESPACE}.optim.")


class CapturedStep:
    """A graph of one step, and the batch and loss that it reads and writes."""

    def __init__(self, step: Step, input: Tensor, target: Tensor) -> None:
        self._batch = [t.clone(memory_format=torch.contiguous_format) for t in (input, target)]
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(input.device)  # type: ignore[no-untyped-call]
        # thread_local: a loader of data pins memory in its own thread meanwhile.
        capturing = torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local")
        with torch.cuda.device(input.device), capturing:
            self._loss = step(*self._batch)

    def replay(self, input: Tensor, target: Tensor) -> Tensor:
        for own, given in zip(self._batch, (input, target), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._loss.clone()


@dataclass
class _Seen:
    facts: object  # what a graph would repeat without looking, as the last step of its kind left it
    captured: CapturedStep | None = None
    norm: Tensor | None = None  # of the gradients, which the graph writes


class StepGraphs:
    """The graphs of one training step. `reason` says why the last call was no replay; None if it was."""

    reason: str | None = "no call was made"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._seen: dict[Hashable, _Seen] = {}

    def __call__(self, step: Step, input: Tensor, target: Tensor, kind: Hashable, own: object) -> Tensor:
        """The loss of a step, performed or replayed.

        kind: of the batch, besides its layout: each has a graph of its own. own: of the facts that the graph would
        repeat, those that are not the optimizer's.
        """
        self.reason = obstacle(self._optimizer, input.device)
        if self.reason:
            return step(input, target)
        kind = (input.shape, input.dtype, target.shape, target.dtype, kind)
        seen = self._seen.get(kind)
        if seen is None or seen.facts != (own, facts_of(self._optimizer)):
            self.reason = "the step before had other tensors or options, or there was none"
            value = step(input, target)
            while len(self._seen) >= KEPT:
                self._seen.pop(next(iter(self._seen)))
            self._seen.pop(kind, None)
            self._seen[kind] = _Seen((own, facts_of(self._optimizer)))
            return value
        if seen.captured is None:
            seen.captured = CapturedStep(step, input, target)
            seen.norm = getattr(self._optimizer, "grad_norm", None)
        value = seen.captured.replay(input, target)
        if seen.norm is not None:
            self._optimizer.grad_norm = seen.norm.clone()  # type: ignore[attr-defined]
        return value


def obstacle(optimizer: Any, device: torch.device) -> str | None:
    """Why this step must be performed."""
    if device.type != "cuda":
        return f"there are no CUDA graphs on {device.type}"
    if torch.cuda.is_current_stream_capturing():
        return "another graph is being captured"
    if not all(group.get("capturable") for group in optimizer.param_groups):
        return "capturable is not True in every group of the optimizer"
    if not optimizer.step.__module__.startswith(OWN_STEPS):
        return "the optimizer has a step of its own"
    everywhere = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    if everywhere or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "a hook waits for the optimizer's steps"
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return "the optimizer divides by a GradScaler's scale"
    if getattr(optimizer, "_in_swap", False):
        return "the parameters are their averages"  # the step raises
    return None


def facts_of(optimizer: torch.optim.Optimizer) -> list[object]:
    """Where an optimizer's states lie, and its options, of tensors on the device their places."""
    facts: list[object] = []
    for group in optimizer.param_groups:
        facts += [_fact(group.get(name)) for name in optimizer.defaults]
    for state in optimizer.state.values():
        facts += [value.data_ptr() for value in state.values() if isinstance(value, Tensor)]
    return facts


def _fact(value: object) -> object:
    if isinstance(value, Tensor):
        return value.data_ptr() if value.is_cuda else value.tolist()
    return tuple(map(_fact, value)) if isinstance(value, tuple) else value
