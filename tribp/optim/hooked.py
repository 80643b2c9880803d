"""Wraps `step` for hooks and profilers as torch does, at little cost where there are none."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from typing_extensions import ParamSpec

P = ParamSpec("P")
T = TypeVar("T")


def wrap(func: Callable[P, T]) -> Callable[P, T]:
    """Does what `torch.optim.Optimizer.profile_hook_step` does, which takes over where a hook may change the arguments.

    Most of its time goes into the range that it shows to profilers: torch opens and closes it by operators, in 8 µs
    (one thread of a Xeon, torch 2.13); the functions below take 1 for the same range. It is there at every step,
    because `torch.autograd._profiler_enabled` knows neither of an `ExecutionTraceObserver` nor of a profiler of all
    threads.
    """
    torch_wrapped = torch.optim.Optimizer.profile_hook_step(func)
    try:
        enter: Callable[[str], Any] = torch.autograd._record_function_with_args_enter  # type: ignore[attr-defined]
        leave: Callable[[Any], None] = torch.autograd._record_function_with_args_exit  # type: ignore[attr-defined]
        from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
    except (AttributeError, ImportError):
        return torch_wrapped  # they are no public interface

    @functools.wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        optimizer = cast(Any, args[0])
        before = _global_optimizer_pre_hooks or optimizer._optimizer_step_pre_hooks
        if before or torch.compiler.is_dynamo_compiling():
            return torch_wrapped(*args, **kwargs)
        shown = enter(f"Optimizer.step#{optimizer.__class__.__name__}.step")
        try:
            result = func(*args, **kwargs)
            optimizer._optimizer_step_code()  # does nothing; the memory profiler looks for its frame
            after = optimizer._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()
            for hook in itertools.chain(*after):
                hook(optimizer, args, kwargs)
            return result
        finally:
            leave(shown)

    return wrapper
