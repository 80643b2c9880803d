"""torch's modules of activations, and what tribp calls them."""

from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.activations import DEFAULTS, ActivationLike, activation_of

# What tribp calls them, and the attributes that are their numbers. A subclass before its base.
ACTIVATIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Sigmoid: ("sigmoid",),
    nn.Tanh: ("tanh",),
    nn.ReLU: ("relu",),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.Softplus: ("softplus", "beta", "threshold"),
    nn.Hardsigmoid: ("hardsigmoid",),
    nn.ReLU6: ("relu6",),
    nn.Hardtanh: ("hardtanh", "min_val", "max_val"),
}
# Those of which torch's backward keeps the output, as tribp's does: both raise an error where that was changed in
# place. Of the others torch keeps the input, or a copy of that.
_OUTPUT_KEPT = (nn.Sigmoid, nn.Tanh, nn.ReLU)
_OUTPUT_KEPT_IN_PLACE = (nn.LeakyReLU, nn.ELU)
# Those that tribp does not compute, which the report names, and the names of torch's functions.
_OTHERS: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardswish, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.SELU, nn.SiLU,
    nn.Softmax, nn.Softshrink, nn.Softsign, nn.Tanhshrink,
)  # fmt: skip
OTHER_ACTIVATIONS = {**{kind: kind.__name__.lower() for kind in _OTHERS}, nn.LogSoftmax: "log_softmax"}


def torchs(library: ModuleType, name: str) -> object:
    """A function of torch's; None where another took its place before tribp was imported."""
    function = getattr(library, name)
    own = getattr(function, "__module__", None) in (None, "torch", "torch._C._nn", library.__name__)
    return function if own and not hasattr(function, "__wrapped__") else None


# The functions that the forwards of torch's modules call, each where they look it up, and what some of these call.
_LIBRARIES = {"sigmoid": torch, "tanh": torch}
_CALLED = {
    name: (library := _LIBRARIES.get(name, F), torchs(library, name))
    for name in ("linear", "conv2d", "batch_norm", *(name for name, *_ in ACTIVATIONS.values()))
}
_BELOW = {name: torchs(torch, name) for name in ("relu", "batch_norm")}


def is_torchs(name: str) -> bool:
    """Whether the function of that name, which a module of torch's calls, is torch's: tools that count or change what
    is computed put others there.
    """
    library, function = _CALLED[name]
    return getattr(library, name) is function and (name not in _BELOW or getattr(torch, name) is _BELOW[name])


def activation_kind(module: nn.Module | None) -> type[nn.Module] | None:
    """Which of the activations that tribp computes a module is, itself or as a subclass."""
    return next((kind for kind in ACTIVATIONS if isinstance(module, kind)), None)


def keeps_input(module: nn.Module) -> bool:
    """Whether it is an activation of which torch's backward does not need the output, which may be changed in place."""
    if type(module) not in ACTIVATIONS or isinstance(module, _OUTPUT_KEPT):
        return False
    return not (isinstance(module, _OUTPUT_KEPT_IN_PLACE) and module.inplace)


def activation_like(module: nn.Module) -> ActivationLike:
    """What tribp calls an activation of torch's."""
    kind = activation_kind(module)
    assert kind is not None
    name, *attributes = ACTIVATIONS[kind]
    numbers = tuple(float(getattr(module, attribute)) for attribute in attributes)
    return name if numbers == tuple(DEFAULTS[name].values()) else (name, *numbers)


def refused(subject: str, module: nn.Module) -> str:
    """Why tribp does not take an activation's numbers; nothing if it does."""
    try:
        activation_of(subject, activation_like(module))
    except (TypeError, ValueError, OverflowError) as error:
        return str(error)
    return ""


def torch_activation(activation: ActivationLike) -> nn.Module:
    """The module of torch's that computes it."""
    name, *numbers = activation if isinstance(activation, tuple) else (activation,)
    kind = next(kind for kind, (known, *_) in ACTIVATIONS.items() if known == name)
    return kind(*numbers)
