"""Plans with configs that no heuristic would choose: for the files that test kernels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from tribp.launch.buffer import layout_of
from tribp.launch.launches import Launch
from tribp.launch.plan import Plan, arch_of


class OfKind(dict[Any, Any]):
    """Configs for all problems of a class."""

    def get(self, problem: Any, default: Any = None) -> Any:
        return super().get(type(problem), default)


def plan_of(
    build: Callable[..., object],
    tensors: Sequence[Tensor | None],
    configs: Mapping[Any, Any] | None = None,
    **facts: Any,
) -> Plan:
    """configs: by the classes of the problems they are for."""
    layouts = [layout_of(tensor) for tensor in tensors]
    plan = Plan(arch_of(layouts), layouts, OfKind(configs or {}))
    build(plan, *plan.given, **facts)
    return plan


def run(
    build: Callable[..., object],
    tensors: Sequence[Tensor | None],
    configs: Mapping[Any, Any] | None = None,
    **facts: Any,
) -> list[Launch]:
    """Build a plan and run it on the tensors. Returns its launches."""
    plan = plan_of(build, tensors, configs, **facts)
    plan.run(tensors)
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
