"""Plans with configs that no heuristic would choose: for the files that test kernels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from tribp import dispatch
from tribp.launch.plan import Launch, Plan, layout_of


class OfKind(dict[Any, Any]):
    """Configs for all problems of a class."""

    def get(self, problem: Any, default: Any = None) -> Any:
        return super().get(type(problem), default)


def plan_of(
    build: Callable[..., None], tensors: Sequence[Tensor | None], configs: Mapping[Any, Any] | None = None, **facts: Any
) -> Plan:
    """configs: by the classes of the problems they are for."""
    arch = dispatch.arch_of(next(t for t in tensors if t is not None).device.index)
    plan = Plan(arch, [layout_of(tensor) for tensor in tensors], OfKind(configs or {}))
    build(plan, *plan.given, **facts)
    return plan


def run(
    build: Callable[..., None], tensors: Sequence[Tensor | None], configs: Mapping[Any, Any] | None = None, **facts: Any
) -> list[Launch]:
    """Build a plan and run it on the tensors. Returns its launches."""
    plan = plan_of(build, tensors, configs, **facts)
    plan.run(tensors, next(t for t in tensors if t is not None).device)
    return plan.launches


def with_settings(launch: Launch, **changes: object) -> Launch:
    """The launch with other constants, or other fields of its CONFIG. Raises ValueError for a name it has not."""
    constants = dict(launch.constants)
    for name, value in changes.items():
        if name in constants:
            constants[name] = value
        else:
            constants["CONFIG"] = cast(Any, constants.get("CONFIG", ()))._replace(**{name: value})
    return launch._replace(constants=constants)
