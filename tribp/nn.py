"""Modules, with torch.nn's parameter names, shapes, initialization and state_dict."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .ops.activations import ActivationLike, activate, activation_of
from .ops.checks import is_whole
from .ops.conv3x3.checks import window_of
from .ops.conv3x3.op import conv3x3
from .ops.linear.op import linear
from .ops.mlp.op import mlp

__all__ = ["MLP", "Conv3x3", "Linear", "LinearSigmoid"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # torch.nn's


def _check_sizes(caller: str, smallest: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if not is_whole(size):
            raise TypeError(f"{caller}: {name} must be a whole number, got {size!r}")
        if size < smallest:
            raise ValueError(f"{caller}: {name} must be at least {smallest}, got {size}")


def _check_bias(caller: str, bias: object) -> None:
    """An activation by position may get there, and would count as True; else it is as for torch.nn's layers."""
    if isinstance(bias, (str, tuple)):
        takes = "an activation goes into activation=, which Linear, MLP and Conv3x3 have"
        raise TypeError(f"{caller}: bias must be True or False, got {bias!r}; {takes}")


class _Activated(nn.Module):
    """A layer with an activation, as users give it and, for TorchScript, as a tuple of plain values."""

    __jit_ignored_attributes__ = ("activation",)
    activation: ActivationLike

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            self._act = activation_of(type(self).__name__, value)
        super().__setattr__(name, value)


class Linear(_Activated):
    """`nn.Linear` and the activation that may follow it, as one kernel: y = act(x · weightᵀ + bias).

    Parameters, their initialization, the random numbers it draws, and the state_dict are those of `nn.Linear`, so that
    checkpoints load both ways. It is no subclass of `nn.Linear`: tools that replace those would lose the activation.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias of shape `(out_features,)`.
        device, dtype: of the parameters, as for `nn.Linear`; float16, bfloat16, float32 or float64.
        activation: as for `tribp.linear`.

    Shape: `(*, in_features)` to `(*, out_features)`. Errors: those of `tribp.linear`.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__()
        _check_sizes(type(self).__name__, 0, in_features=in_features, out_features=out_features)
        _check_bias(type(self).__name__, bias)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize weight and bias as `nn.Linear` does, by torch's own code: it reads those two and nothing else."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + activation

    def forward(self, input: Tensor) -> Tensor:
        # torch.jit.script, like torch.jit.trace, keeps torch's own operations.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            name, a, b = self._act
            return activate(F.linear(input, self.weight, self.bias), name, a, b)
        else:  # TorchScript would compile what stands behind the branch
            return linear(input, self.weight, self.bias, self.activation)


class LinearSigmoid(Linear):
    """`Linear` with the activation "sigmoid": y = σ(x · weightᵀ + bias). Arguments are those of `nn.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, activation="sigmoid")


def runs_forward_alone(module: nn.Module) -> bool:
    """Whether to call a module does nothing but run the forward of its class: no hooks, no forward of its own."""
    return not (is_watched(module) or _has_any_global_hook())  # type: ignore[no-untyped-call]


def is_watched(module: nn.Module) -> bool:
    """Whether a call of a module does more than the forward of its class, hooks on all modules aside.

    Or its class was given another forward, as some tools do for all layers of a program.
    """
    kind = type(module)
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
        or "forward" in module.__dict__ or module._compiled_call_impl
        or (kind in FORWARDS and kind.forward is not FORWARDS[kind])
    )  # fmt: skip


class MLP(nn.Module):
    """Linear layers with activations, whose backward pass is fused across the layers: `tribp.mlp`.

    The state_dict is that of the `nn.Sequential(nn.Linear, activation, nn.Linear, …)` it stands for: weight and bias of
    layer l are `2l.weight` and `2l.bias`. Their initialization and the random numbers it draws are `nn.Linear`'s, in
    this order. Where a layer was replaced or has hooks, it and the others are called one after the other.

    Args:
        sizes: of the input, of each layer's output: at least two.
        activation: of all layers but the last, as for `tribp.linear`.
        output_activation: of the last layer.
        bias: whether to add learned biases.
        device, dtype: of the parameters, as for `nn.Linear`.

    Shape: `(*, sizes[0])` to `(*, sizes[-1])`. Errors: those of `tribp.mlp`. TorchScript can trace it, not compile it.
    """

    sizes: tuple[int, ...]
    activation: ActivationLike
    output_activation: ActivationLike

    def __init__(
        self,
        sizes: Sequence[int],
        activation: ActivationLike = "sigmoid",
        output_activation: ActivationLike = None,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            self.sizes = tuple(map(operator.index, sizes))
        except TypeError:
            raise TypeError(f"MLP: sizes must be a sequence of whole numbers, got {sizes!r}") from None
        if len(self.sizes) < 2:
            raise ValueError(f"MLP: sizes must be at least two, of the input and of each layer, got {self.sizes}")
        if min(self.sizes) < 0:
            raise ValueError(f"MLP: sizes must be at least 0, got {self.sizes}")
        activation_of("MLP", activation)
        activation_of("MLP", output_activation, "output_activation")
        _check_bias("MLP", bias)
        self.activation = activation
        self.output_activation = output_activation
        for n, (before, after) in enumerate(itertools.pairwise(self.sizes)):
            self.add_module(str(2 * n), Linear(before, after, bias, device, dtype))

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers, without their activations: a `Linear` each, unless somebody replaced it."""
        return tuple(self.get_submodule(str(2 * n)) for n in range(len(self.sizes) - 1))

    def extra_repr(self) -> str:
        names = f"activation={self.activation!r}, output_activation={self.output_activation!r}"
        return f"sizes={self.sizes}, {names}"

    def forward(self, input: Tensor) -> Tensor:
        layers = self.layers
        plain = [layer for layer in layers if type(layer) is Linear and layer.activation is None]
        if len(plain) == len(layers) and all(map(runs_forward_alone, layers)):
            weights, biases = [layer.weight for layer in plain], [layer.bias for layer in plain]
            return mlp(input, weights, biases, self.activation, self.output_activation)
        for n, layer in enumerate(layers, 1):
            activation = self.output_activation if n == len(layers) else self.activation
            input = activate(layer(input), *activation_of("MLP", activation))
        return input


class Conv3x3(_Activated):
    """`nn.Conv2d` with a 3×3 kernel, and the activation that may follow it, as one kernel.

    Parameters, their initialization, the random numbers it draws, and the state_dict are those of
    `nn.Conv2d(…, kernel_size=3)`, so that checkpoints load both ways. It is no subclass of `nn.Conv2d`: tools that
    replace those would lose the activation.

    Args:
        in_channels, out_channels: of the input and of the output.
        stride: 1 or 2, or a pair (vertical, horizontal).
        padding: added on all four sides, a number or a pair; "same" (1, for stride 1) or "valid" (0).
        groups: into which the channels are divided.
        bias: whether to add a learned bias of shape `(out_channels,)`.
        activation: as for `tribp.linear`.
        padding_mode: what is added: "zeros", "reflect", "replicate" or "circular" (the latter three by `F.pad`).
        device, dtype: of the parameters, as for `nn.Conv2d`; float16, bfloat16, float32 or float64.
        dilation: 1.

    Shape: `(N, in_channels, H, W)` or `(in_channels, H, W)` to `(N, out_channels, P, Q)` or `(out_channels, P, Q)`.
    Errors: those of `tribp.conv3x3`.
    """

    in_channels: int
    out_channels: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    padding_mode: str
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        activation: ActivationLike = None,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        window = window_of("Conv3x3", stride, padding, groups, dilation)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"Conv3x3: padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        _check_sizes("Conv3x3", 1, in_channels=in_channels, out_channels=out_channels)
        _check_bias("Conv3x3", bias)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"Conv3x3: {name} must be a multiple of groups ({groups}), got {channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride, self.padding, self.groups = window
        self.activation = activation
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, 3, 3, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize weight and bias as `nn.Conv2d` does, by torch's own code: it reads those two and nothing else."""
        nn.Conv2d.reset_parameters(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, stride={self.stride}"]
        defaults = {"padding": (0, 0), "groups": 1, "activation": None, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual]
        return ", ".join([*parts, f"bias={self.bias is not None}"])

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            vertical, horizontal = padding
            padding = (0, 0)
            input = F.pad(input, (horizontal, horizontal, vertical, vertical), mode=self.padding_mode)
        # As for Linear.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            name, a, b = self._act
            return activate(F.conv2d(input, self.weight, self.bias, self.stride, padding, 1, self.groups), name, a, b)
        else:
            return conv3x3(input, self.weight, self.bias, self.stride, padding, self.groups, self.activation)


def defined(kind: type[nn.Module], name: str) -> object:
    """The method that a class of torch's or of ours was defined with; None where another has taken its place."""
    base = next(base for base in kind.__mro__ if name in vars(base))
    method = vars(base)[name]
    theirs = base.__module__ == __name__ or base.__module__.startswith("torch.nn.modules.")
    own = theirs and getattr(method, "__module__", None) == base.__module__ and not hasattr(method, "__wrapped__")
    return method if own else None


# Of the classes whose calls tribp leaves out, and computes the same by itself, and of others that cost nothing.
FORWARDS = {
    kind: defined(kind, "forward")
    for kind in (*vars(nn).values(), Linear, LinearSigmoid, Conv3x3, MLP)
    if isinstance(kind, type) and issubclass(kind, nn.Module)
}
