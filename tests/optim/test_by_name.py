"""Subclasses that call torch's classes by name, under `patch` and after it: what that name means has changed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import tribp.optim

from .cases import LATE_ADAGRAD, TORCHS

# A group is added late.
every_name = pytest.mark.parametrize("name", [name for name in TORCHS if LATE_ADAGRAD or name != "Adagrad"])


def by_name(name: str) -> Any:
    """A subclass of what `torch.optim` has at this name now; it will ask for the name again at every call."""

    class ByName(getattr(torch.optim, name)):  # type: ignore[misc]
        def __init__(self, params: Any, **options: Any) -> None:
            getattr(torch.optim, name).__init__(self, params, **options)

        def add_param_group(self, group: dict[str, Any]) -> None:
            getattr(torch.optim, name).add_param_group(self, group)

        def step(self, closure: Any = None) -> Any:
            return getattr(torch.optim, name).step(self, closure)

        def state_dict(self) -> dict[str, Any]:
            return getattr(torch.optim, name).state_dict(self)  # type: ignore[no-any-return]

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            getattr(torch.optim, name).load_state_dict(self, state_dict)

        def __setstate__(self, state: dict[str, Any]) -> None:
            getattr(torch.optim, name).__setstate__(self, state)

    return ByName


def trained(kind: Any) -> list[Tensor]:
    """Parameters after steps by one optimizer and by another one that has loaded its checkpoint."""
    params = [Parameter(torch.linspace(-1, 1, n)) for n in (5, 3)]
    optimizers = []
    for _ in range(2):
        optimizer = kind(params[:1], lr=0.1)
        optimizer.add_param_group({"params": params[1:], "lr": 0.2})
        optimizers.append(optimizer)
    for i in range(4):
        if i == 2:
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        for p in params:
            p.grad = torch.cos(p.detach() + i)
        optimizers[i // 2].step()
    assert len(optimizers[1].param_groups) == 2
    return [p.detach() for p in params]


@every_name
def test_a_class_defined_before_the_patch(name: str) -> None:
    """torch's own code updates its parameters, though `torch.optim.Adam` is tribp's."""
    kind, genuine = by_name(name), trained(getattr(torch.optim, name))
    with tribp.optim.patch():
        assert not issubclass(kind, getattr(torch.optim, name))
        found = trained(kind)
    assert all(map(torch.equal, found, genuine))


@every_name
def test_a_class_defined_under_the_patch(name: str) -> None:
    """tribp's code updates its parameters under the patch, torch's where the subclass names that again."""
    genuine = trained(getattr(torch.optim, name))
    with tribp.optim.patch():
        kind = by_name(name)
        assert issubclass(kind, getattr(tribp.optim, name))
        torch.testing.assert_close(trained(kind), genuine)
    torch.testing.assert_close(trained(kind), genuine)


def test_the_constructor_is_that_of_the_class_that_is_named() -> None:
    """AdamW's default decay is none of Adam's."""

    class Plain(torch.optim.AdamW):
        def __init__(self, params: Any) -> None:
            torch.optim.Adam.__init__(self, params)

    decays = [Plain([torch.zeros(2)]).defaults["weight_decay"]]
    with tribp.optim.patch():
        decays.append(Plain([torch.zeros(2)]).defaults["weight_decay"])
    assert decays == [0, 0]
