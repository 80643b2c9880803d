"""Keyword arguments beyond torch's."""

import operator
from collections.abc import Callable
from typing import Any, TypedDict

import torch

from .rule import Group

Requirement = tuple[str, Callable[[Any], object]]


class ExtraOptions(TypedDict, total=False):
    """Keyword arguments beyond torch's, off by default. All but the first may also be set in one group.

    max_grad_norm: clip all gradients together to this L2 norm, as `torch.nn.utils.clip_grad_norm_` does, within the
        step: the gradients are read once more and not written. The norm is then in `grad_norm`, a float64 tensor. It is
        the norm over all groups; a step raises ValueError if their `max_grad_norm` differ.
    seed: of the random numbers by which parameters (stochastic rounding) and states of 8 bits are rounded. A number
        depends only on the seed, the step, the parameter's place in the optimizer and the element.
    ema_decay: keep in `state[p]["ema"]` an exponential moving average of the parameters, in float32 at least:
        v₁ = x₁, then v ← d·v + (1 − d)·x after every step that updates x; without a gradient both stay as they are.
        `swap_ema()` puts the averages in the parameters' place. None or 0: no average.
    state_dtype: keep the moments of real parameters in this type; the default is the parameter's.
    stochastic_rounding: round bfloat16 parameters up or down at random, so that they are right on average: then
        updates that are too small for the type are not lost. Other types are rounded to nearest.
    eps_inside_sqrt: √(v + ε) instead of √v + ε; not for classes without such a root, such as SGD.
    state_bits: with 8, keep the moments of real parameters in 8 bits a number, with a float32 scale for every 32.
        For SGD, Momentum, RMSprop (but for its averages if it is `centered`: their difference needs every bit),
        Adagrad, Adam and AdamW.
    master_bits: with 24, keep 8 further bits of each bfloat16 parameter, in `state[p]["residual"]`. Other types have
        none.
    """

    max_grad_norm: float | None
    seed: int
    ema_decay: float | None
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
    eps_inside_sqrt: bool
    state_bits: int | None
    master_bits: int | None


# Values that mean "off". What is off is in no group, so that a checkpoint has torch's keys and no others. The last two
# are arguments of tribp's where the torch class lacks them.
DEFAULTS: Group = dict(
    max_grad_norm=None, seed=0, ema_decay=None, state_dtype=None, stochastic_rounding=False, eps_inside_sqrt=False,
    state_bits=None, master_bits=None, capturable=False, fused=None,
)  # fmt: skip

# What those that are on must be: in words, and as a function of the value. torch checks its own.
FLAG: Requirement = ("True or False", lambda flag: flag in (True, False, None))
REQUIREMENTS: dict[str, Requirement] = dict(
    max_grad_norm=("a positive number", lambda norm: norm > 0 and not isinstance(norm, bool)),
    seed=("a whole number of 64 bits",
          lambda seed: -(2**63) <= operator.index(seed) < 2**64 and not isinstance(seed, bool)),
    ema_decay=("a number in [0, 1)", lambda decay: 0 <= decay < 1),
    state_dtype=("float16, bfloat16, float32 or float64",
                 lambda dtype: dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    stochastic_rounding=FLAG,
    eps_inside_sqrt=FLAG,
    state_bits=("8 or None", lambda bits: type(bits) is int and bits == 8),
    master_bits=("24 or None", lambda bits: type(bits) is int and bits == 24),
)  # fmt: skip

EXCLUSIVE = ("state_dtype", "state_bits")  # at most one of them is on

# Options that decide how a group is updated, whatever the class; the others are numbers.
SWITCHES = (
    "differentiable", "fused", "foreach", "capturable", "state_dtype", "stochastic_rounding", "seed",
    "eps_inside_sqrt", "state_bits", "master_bits", "max_grad_norm",
)  # fmt: skip


def enable_options(extra: Group, caller: str) -> Group:
    """Those that are on, checked. Raises TypeError for an unknown option, ValueError for a value out of range."""
    for name in extra:
        if name not in DEFAULTS:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
    return enabled_options(extra, caller)


def satisfy(requirement: Callable[..., object], *values: Any) -> bool:
    """Whether the requirement holds; an exception from it, as of a value of the wrong kind, means no."""
    try:
        return bool(requirement(*values))
    except (TypeError, ValueError, RuntimeError):
        return False


def enabled_options(group: Group, caller: str) -> Group:
    """Those of a group's extra options that are on. Raises ValueError for a value out of range."""
    extra = {name: value for name, value in group.items() if name in DEFAULTS}
    options = {name: value for name, value in extra.items() if not satisfy(operator.eq, value, DEFAULTS[name])}
    for name, value in options.items():
        if name in REQUIREMENTS and not satisfy(REQUIREMENTS[name][1], value):
            raise ValueError(f"{caller}: {name} must be {REQUIREMENTS[name][0]}, got {value!r}")
    if "seed" in options:
        options["seed"] = operator.index(options["seed"])
    if all(name in options for name in EXCLUSIVE):
        raise ValueError(f"{caller}: state_bits and state_dtype exclude each other")
    return options


def common_max_grad_norm(groups: list[Group]) -> float | None:
    """The groups' max_grad_norm. Raises ValueError if they differ."""
    norms = {group.get("max_grad_norm") for group in groups}
    if len(norms) > 1:
        raise ValueError(
            f"max_grad_norm is the norm of all gradients together and must be equal in all groups, got {norms}"
        )
    return norms.pop()


def torch_lacks(group: Group, p: torch.Tensor) -> list[str]:
    """The options that are on, matter to this parameter, and are unknown to torch's code."""
    state_dtype = group.get("state_dtype")
    asked = {
        "eps_inside_sqrt": group.get("eps_inside_sqrt"),
        "stochastic_rounding": rounds_stochastically(group, p),
        "state_dtype": state_dtype not in (None, p.dtype) and not p.is_complex(),
        "state_bits": compresses(group, p),
        "master_bits": keeps_residual(group, p),
    }
    return [name for name, on in asked.items() if on]


def rounds_stochastically(group: Group, p: torch.Tensor) -> bool:
    return bool(group.get("stochastic_rounding")) and p.dtype == torch.bfloat16


def compresses(group: Group, p: torch.Tensor) -> bool:
    """Whether a parameter's states are codes; each is rounded at random."""
    return bool(group.get("state_bits")) and not p.is_complex()


def keeps_residual(group: Group, p: torch.Tensor) -> bool:
    return bool(group.get("master_bits")) and p.dtype == torch.bfloat16
