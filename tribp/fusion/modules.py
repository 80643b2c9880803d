"""Layers and activations: torch's modules, tribp's, and what makes one of the other."""

from collections.abc import Set
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..dispatch import FLOATS
from ..nn import Conv3x3, Linear, LinearSigmoid
from ..ops.activations import DEFAULTS, ActivationLike, activation_of

MODULE = frozenset(vars(nn.Module()))  # the attributes of every module
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
PARAMETERS = {"weight", "bias"}
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Linear, nn.Conv2d, LinearSigmoid, Linear, Conv3x3)  # a subclass before its base
WORDS = {"same": (1, 1), "valid": (0, 0)}  # paddings
# torch's activations: what tribp calls them, and the attributes that are their numbers. A subclass before its base.
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
# Those that tribp does not compute, which the report names, and the names of torch's functions.
OTHER_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.GLU: "glu",
    nn.Hardshrink: "hardshrink",
    nn.Hardswish: "hardswish",
    nn.LogSigmoid: "logsigmoid",
    nn.LogSoftmax: "log_softmax",
    nn.Mish: "mish",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.SELU: "selu",
    nn.SiLU: "silu",
    nn.Softmax: "softmax",
    nn.Softshrink: "softshrink",
    nn.Softsign: "softsign",
    nn.Tanhshrink: "tanhshrink",
}
WORD = "_padding_word"  # attribute of a Conv3x3 made of a Conv2d whose padding was "same" or "valid"


class FusedActivation(nn.Identity):
    """Stands where an activation stood that the module before it computes now, and keeps it for `unfuse`.

    So no other module of the Sequential changes its index, and with it its keys in the state_dict.
    """

    original: nn.Module
    __jit_ignored_attributes__ = ("original",)  # torch.jit.script knows no module that is no child

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        vars(self)["original"] = original  # not as a child: whoever looks for the model's sigmoids must not find it
        self.training = original.training

    def extra_repr(self) -> str:
        return f"{type(self.original).__name__} computed by the module before"


FusedSigmoid = FusedActivation  # its name when it stood for sigmoids alone


@torch.fx.wrap  # which symbolic tracing then calls, for it cannot look at dimensions
def check_dimensions(input: Tensor, dimensions: int) -> Tensor:
    if input.dim() != dimensions:
        raise RuntimeError(f"a folded batch norm takes {dimensions} dimensions, got {input.dim()}")
    return input


class FoldedBatchNorm(nn.Identity):
    """Stands where a batch norm stood that the layer before it computes now, and keeps it for `unfuse`.

    Raises:
        RuntimeError: it is in training mode, or the input has dimensions for which the layer does not compute it.
    """

    original: nn.Module
    layer: nn.Module
    __jit_ignored_attributes__ = ("original", "layer", "folded")

    def __init__(self, original: nn.Module, layer: nn.Module, folded: object) -> None:
        """`layer` has the parameters that the layer had, `folded` is the weight that it has now."""
        super().__init__()
        kept = nn.Module()
        vars(kept)["_parameters"] = layer._parameters.copy()
        vars(self).update(original=original, layer=kept, folded=folded)  # not as children or parameters
        self.dimensions = 4 if isinstance(original, nn.BatchNorm2d) else 2
        self.training = original.training

    def is_behind(self, layer: nn.Module) -> bool:
        """Whether this is the layer that the batch norm was folded into."""
        return isinstance(layer, LAYERS) and layer._parameters.get("weight") is vars(self)["folded"]

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("a folded batch norm cannot train: call tribp.unfuse(model) before model.train()")
        return check_dimensions(input, self.dimensions)

    def _apply(self, fn: Any, recurse: bool = True) -> "FoldedBatchNorm":
        """What `unfuse` brings back moves and changes its type along with the model."""
        for module in (self.original, self.layer):
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self  # which has no tensors itself

    def extra_repr(self) -> str:
        return f"{type(self.original).__name__} folded into the layer before"


def obstacle(subject: str, module: nn.Module, kind: type[nn.Module]) -> str:
    """Why `module` is more than a module of this kind with its parameters and attributes; nothing if it is not."""
    if parametrize.is_parametrized(module):
        return f"{subject} is parametrized"
    if isinstance(module, LazyModuleMixin):
        return f"{subject} is lazy: run the model once before"
    if type(module) is not kind:
        return f"{subject} is a subclass of {kind.__name__}: {full_name(module)}"
    for name in HOOKS:
        if getattr(module, name):
            return f"{subject} has {name.strip('_').replace('_', ' ')}"
    for name, value in vars(module).items():
        if name not in MODULE and value is not getattr(kind, name, value):
            return f"{subject} has a {name} of its own"  # forward, say; or what Module.compile leaves
    parameters = PARAMETERS if kind in (*LAYERS, *BATCH_NORMS) else set()
    buffers = STATISTICS if kind in BATCH_NORMS else set()
    expected, present = parameters | buffers, {*module._parameters, *module._buffers, *module._modules}
    for verb, names in (
        ("lacks the parameter", expected - present),
        ("has more than its parameters:", present - expected),
    ):
        if names:
            return f"{subject} {verb} {', '.join(sorted(names))}"
    for place, names, tensors in (
        ("parameter", parameters, module._parameters),
        ("buffer", buffers, module._buffers),
    ):
        for name in sorted(names - tensors.keys()):
            return f"{subject} has a {name} that is no {place}"
    return ""


def unreadable(module: nn.Module, dimensions: int) -> str:
    """Why a kernel would not take the parameters, which users replace too; nothing if one would."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None and name == "bias":
            continue
        reason = unusual(f"its {name}", parameter)
        if reason:
            return reason
    assert weight is not None
    if weight.dim() != dimensions or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = " and ".join(str(tuple(p.shape)) for p in (weight, bias) if p is not None)
        return f"its parameters have the shapes {shapes}"
    if dimensions == 4 and weight.shape[2:] != (3, 3):
        return f"its kernel size is {tuple(weight.shape[2:])}"
    return ""


def unusual(subject: str, tensor: Tensor | None) -> str:
    """Why a tensor is none that a kernel takes; nothing if it is one."""
    if type(tensor) not in (nn.Parameter, Tensor):  # of a tensor subclass, a Parameter has the subclass's type
        return f"{subject} is a {type(tensor).__name__}"
    assert tensor is not None
    if tensor.layout != torch.strided:
        return f"{subject} is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.dtype not in FLOATS:
        return f"{subject} is {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def layer_kind(module: nn.Module) -> type[nn.Module]:
    """Of which kind of layer a module is, itself or as a subclass."""
    return next(kind for kind in LAYERS if isinstance(module, kind))


def shown_name(made: nn.Module) -> str:
    """The class, in a way that tells tribp's from torch's."""
    return "tribp.nn.Linear" if type(made) is Linear else type(made).__name__


def activation_kind(module: nn.Module | None) -> type[nn.Module] | None:
    return next((kind for kind in ACTIVATIONS if isinstance(module, kind)), None)


def is_other_activation(module: nn.Module | None) -> bool:
    return isinstance(module, tuple(OTHER_ACTIVATIONS))


def activation_like(module: nn.Module | None) -> ActivationLike:
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
    except ValueError as error:
        return str(error)
    return ""


def torch_activation(activation: ActivationLike) -> nn.Module:
    """The module of torch's that computes it."""
    name, *numbers = activation if isinstance(activation, tuple) else (activation,)
    kind = next(kind for kind, (known, *_) in ACTIVATIONS.items() if known == name)
    return kind(*numbers)


def computes(module: nn.Module | None, behind: nn.Module | None) -> bool:
    """Whether `behind` stands for an activation that `module` computes."""
    if not isinstance(module, (Linear, Conv3x3)) or not isinstance(behind, FusedActivation) or not module.activation:
        return False
    return activation_of("", module.activation) == activation_of("", activation_like(behind.original))


def fused_layer(module: nn.Module, activation: ActivationLike) -> nn.Module | str:
    """tribp's module that computes a layer and an activation, or why there is none."""
    if isinstance(module, (nn.Conv2d, Conv3x3)):
        return _conv3x3(torch_conv2d(module) if isinstance(module, Conv3x3) else module, activation)
    assert isinstance(module, (nn.Linear, Linear))
    if isinstance(module, nn.Linear) and "activation" in vars(module):
        return "it has an activation of its own"
    # On meta, here and below, a constructor allocates nothing and draws no random numbers.
    sizes = (module.in_features, module.out_features, module.bias is not None)
    made = (
        LinearSigmoid(*sizes, device="meta") if activation == "sigmoid"
        else Linear(*sizes, device="meta", activation=activation)
    )  # fmt: skip
    _hand_over(module, made)
    return made


def torch_linear(fused: Linear) -> nn.Linear:
    made = nn.Linear(fused.in_features, fused.out_features, fused.bias is not None, device="meta")
    _hand_over(fused, made, without={"activation", "_act"})
    return made


def _conv3x3(conv: nn.Conv2d, activation: ActivationLike) -> Conv3x3 | str:
    """The module that computes what `conv` does, or why there is none."""
    if "activation" in vars(conv):
        return "it has an activation of its own"
    try:
        made = Conv3x3(
            conv.in_channels, conv.out_channels, conv.stride, conv.padding, conv.groups, conv.bias is not None,
            activation, conv.padding_mode, device="meta", dilation=conv.dilation,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("Conv3x3: ").partition(";")[0]
    (vertical, horizontal), pads = made.padding, list(conv._reversed_padding_repeated_twice)
    if conv.padding_mode != "zeros" and pads != [horizontal, horizontal, vertical, vertical]:
        return f"its padding is {conv.padding}, but it pads by {pads}"  # set after construction, or given as (1,)
    # kernel_size, dilation and the others come along: whoever reads them of the model's convolutions still can.
    _hand_over(conv, made)
    if isinstance(conv.padding, str):
        vars(made)[WORD] = conv.padding
    return made


def torch_conv2d(fused: Conv3x3) -> nn.Conv2d:
    padding: str | tuple[int, int] = vars(fused).get(WORD, fused.padding)
    if isinstance(padding, str) and (fused.padding != WORDS[padding] or (padding == "same" and fused.stride != (1, 1))):
        padding = fused.padding  # changed since
    made = nn.Conv2d(
        fused.in_channels, fused.out_channels, 3, fused.stride, padding, 1, fused.groups, fused.bias is not None,
        fused.padding_mode, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    _hand_over(fused, made, without={"activation", "_act", WORD})
    return made


def copy_layer(layer: nn.Module) -> nn.Module:
    """Another module of the same class with the same parameters and attributes, for some of them to change."""
    made = type(layer).__new__(type(layer))
    nn.Module.__init__(made)
    _hand_over(layer, made)
    return made


def _hand_over(old: nn.Module, new: nn.Module, without: Set[str] = frozenset()) -> None:
    """Give `new` the parameters, the mode, and the attributes of `old` that it does not have itself."""
    vars(new)["_parameters"] = old._parameters.copy()
    new.training = old.training
    vars(new).update({name: value for name, value in vars(old).items() if name not in without | vars(new).keys()})


def looks_like_conv3x3(module: nn.Module) -> bool:
    """Whether it is a convolution of another kind, transposed or quantized, say."""
    options = vars(module)
    size = options.get("kernel_size")
    return isinstance(size, tuple) and size == (3, 3) and "in_channels" in options and not isinstance(module, Conv3x3)


def full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
