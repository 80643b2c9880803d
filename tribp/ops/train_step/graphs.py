"""A training step in a CUDA graph: captured when a call is like the one before, repeated as long as nothing moves."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from ..shared import NAMESPACE

StepFunction = Callable[[Tensor, Tensor], Tensor]  # of input and target, to the loss
# One for each kind of batch, with the memory of its step; the one not used for longest goes first.
MAX_GRAPHS = 8
# Modules whose optimizers' steps do nothing that a graph would not repeat; a class of somebody's own may.
OWN_STEPS = ("torch.optim.", f"{NAMESPACE}.optim.")


class CapturedStep:
    """A graph of one step, and the batch and loss that it reads and writes."""

    def __init__(self, input: Tensor, target: Tensor) -> None:
        self._batch = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (input, target)]
        self._graph: torch.cuda.CUDAGraph | None = None
        self.performed = False  # whether a step was, which the next one is to repeat
        self.norm: Tensor | None = None  # of the gradients, if the graph writes one
        self.reads: list[object] = []  # what of the optimizer's

    def perform(self, step: StepFunction, input: Tensor, target: Tensor) -> Tensor:
        """On the graph's own batch, lest another layout's kernels be compiled while it is captured."""
        self._load(input, target)
        value = step(*self._batch)
        self.performed = True
        return value

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def replay(self, input: Tensor, target: Tensor) -> Tensor:
        assert self._graph is not None
        self._load(input, target)
        self._graph.replay()
        return self._loss.clone()

    def capture(self, step: StepFunction) -> None:
        graph, device = torch.cuda.CUDAGraph(), self._batch[0].device
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # thread_local: a loader of data pins memory in its own thread meanwhile.
        capturing = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
        # The stream, outermost: of a capture that failed torch leaves its own the current one.
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.device(device), capturing:
            self._loss = step(*self._batch)
        self._graph = graph

    def drop(self) -> None:
        """What a graph reads must outlive its last replay."""
        if self._graph is not None:
            torch.cuda.synchronize(self._batch[0].device)
        self._graph, self.performed, self.reads = None, False, []

    def _load(self, input: Tensor, target: Tensor) -> None:
        for own, given in zip(self._batch, (input, target), strict=True):
            own.copy_(given)


class StepGraphs:
    """The graphs of one training step. `reason` says why the last call was no replay; None if it was."""

    reason: str | None = "no call was made"

    def __init__(self) -> None:
        self._facts: object = None  # what the graphs repeat without looking, as the last step left it
        self._graphs: dict[Hashable, CapturedStep] = {}
        self._values: object = None  # of the options, as they were last read
        self._fact_of_values: object = None

    def __reduce__(self) -> tuple[type["StepGraphs"], tuple[()]]:
        return StepGraphs, ()  # a copy captures its own

    def __call__(
        self, optimizer: torch.optim.Optimizer, step: StepFunction, input: Tensor, target: Tensor, kind: Hashable,
        own: object,
    ) -> Tensor:  # fmt: skip
        """The loss of a step, performed or replayed.

        kind: of the batch, besides its layout: each has a graph of its own. own: of the facts that the graph would
        repeat, those that are not the optimizer's.
        """
        self.reason = obstacle(optimizer, input.device)
        if self.reason:
            return step(input, target)
        self._compare((optimizer, own, self._facts_of(optimizer)))
        kind = (input.shape, input.dtype, target.shape, target.dtype, kind)
        graph = self._graphs.pop(kind, None) or CapturedStep(input, target)
        if not graph.performed:
            self.reason = "the step before had other tensors or options, or there was none"
            value = graph.perform(step, input, target)
            self._compare((optimizer, own, self._facts_of(optimizer)))
        else:
            if not graph.captured:
                _capture(graph, optimizer, step)
            value = graph.replay(input, target)
            _finish_step(optimizer, graph)
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs))).drop()
        self._graphs[kind] = graph
        return value

    def _facts_of(self, optimizer: Any) -> object:
        """What a captured step of the optimizer would repeat: equal as long as the next step is that one.

        tribp's own looks at its plan as at every step. Of torch's: where states lie, and the groups' options.
        """
        if hasattr(optimizer, "_steady_plan"):
            plan = optimizer._steady_plan()
            if plan is None:
                return object()
            values = plan.watch.options.values  # another list as soon as one of them may have changed
            if values is not self._values:
                self._values, self._fact_of_values = values, _fact(values)
            return plan, self._fact_of_values
        states = [_fact([*state.items()]) for state in optimizer.state.values() if isinstance(state, dict)]
        return states, [_fact([*group.items()]) for group in optimizer.param_groups]

    def _compare(self, facts: object) -> None:
        if facts != self._facts:
            for graph in self._graphs.values():
                graph.drop()
            self._facts = facts


def _capture(graph: CapturedStep, optimizer: Any, step: StepFunction) -> None:
    captured = getattr(optimizer, "_captured", [])
    before = len(captured)
    graph.capture(step)
    graph.reads, captured[before:] = captured[before:], []  # held as long as the graph, not as long as the optimizer
    graph.norm = getattr(optimizer, "grad_norm", None)


def _finish_step(optimizer: Any, graph: CapturedStep) -> None:
    """Set on the optimizer what `step` would have set."""
    optimizer._opt_called = True  # schedulers warn of steps that were not made
    if graph.norm is not None:
        optimizer.grad_norm = graph.norm.clone()


def obstacle(optimizer: Any, device: torch.device) -> str | None:
    """Why this step can't be captured or replayed; None if it can."""
    if device.type != "cuda":
        return f"there are no CUDA graphs on {device.type}"
    if torch.cuda.is_current_stream_capturing():
        return "another graph is being captured"
    if not all(group.get("capturable") for group in optimizer.param_groups):
        return "capturable is not True in every group of the optimizer"
    if not _steps_as_its_class(optimizer):
        return "the optimizer has a step method of its own, not that of torch's or tribp's class"
    everywhere = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    if everywhere or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks on its steps"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "the optimizer divides by a GradScaler's scale"
    return None


def _steps_as_its_class(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's or tribp's, and nobody has put another step in the place of its own; schedulers may."""
    kind, step = type(optimizer), vars(optimizer).get("step")
    of_scheduler = getattr(step, "_wrapped_by_lr_sched", False) and getattr(step, "__wrapped__", None) is kind.step
    own = kind.__module__.startswith(OWN_STEPS) and kind.step.__module__.startswith(OWN_STEPS)
    return own and (step is None or of_scheduler)


def _fact(value: object) -> object:
    """Constants by value, tensors on the device by their place, all else by identity."""
    if isinstance(value, Tensor):
        return value.tolist() if value.is_cpu else (value.data_ptr(), value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(map(_fact, value))
    return value if isinstance(value, (str, int, float, type(None))) else id(value)
