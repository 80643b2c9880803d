"""Modules that run one after the other, in as few kernels as tribp has for them.

They stay torch's own, each complete where it stands. What is computed together is looked for in each call, so that a
module which is replaced, wrapped, inserted, hooked or moved counts from the next call on.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch import FLOATS, autocast_of, backend, dynamo_compiling
from ..nn import FORWARDS, Conv3x3, Linear, LinearSigmoid, defined, is_watched
from ..ops.activations import ActivationLike, activation_of
from ..ops.conv3x3.op import conv3x3
from ..ops.linear.op import linear
from ..ops.mlp.op import mlp
from .activations import ACTIVATIONS, activation_like, is_torchs, keeps_input, refused
from .folding import BATCH_NORMS, PLAIN_TYPE_NAMES, can_fold, folded, folds_now, is_folding

STRIDES = {(1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)}  # that conv3x3 takes
REFUSED = object()
CONV_FORWARD = defined(nn.Conv2d, "_conv_forward")


class FusedConv2d(nn.Conv2d):
    """`nn.Conv2d`, by tribp's `conv3x3` where that takes it. `fuse` makes one by changing an `nn.Conv2d`'s class."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.padding_mode != "zeros":
                padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
                return F.conv2d(padded, weight, bias, self.stride, [0, 0], self.dilation, self.groups)
            return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        else:  # TorchScript would compile what stands behind the branch
            w, b = weight, bias
            if is_fx_symbolic_tracing():  # which puts other objects in their places
                w, b = parameter(self, "weight"), parameter(self, "bias")  # type: ignore[assignment]
            own = nn.Conv2d._conv_forward is CONV_FORWARD and is_torchs("conv2d")
            if own and not unreadable(self, w, b) and _is_3x3(self, w):
                output = _unless_refused(_convolve, self, input, weight, bias, None)
                if output is not REFUSED:
                    return output  # type: ignore[no-any-return]
            return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs what it has in as few kernels as tribp has for it: `run`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            for module in self:
                input = module(input)
            return input
        else:
            return _run_in_order(self, input)


def _run_in_order(modules: nn.Sequential, input: Tensor) -> Tensor:
    if nn.Sequential.forward is FORWARDS[nn.Sequential]:
        return run(modules, input)
    return nn.Sequential.forward(modules, input)  # type: ignore[no-any-return, no-untyped-call]  # somebody's, for all


# How the classes of layers are computed, and whether they are tribp's own, which check their arguments themselves.
LAYERS: dict[type[nn.Module], tuple[str, bool]] = {
    nn.Linear: ("linear", False),
    Linear: ("linear", True),
    LinearSigmoid: ("linear", True),
    nn.Conv2d: ("conv2d", False),
    FusedConv2d: ("conv2d", False),
    Conv3x3: ("conv3x3", True),
}


class Applied:
    """An activation that a forward calls as a function of torch's, or as a method of a tensor."""

    def __init__(
        self, module: nn.Module, function: Callable[[Tensor], Tensor], look_up: Callable[[], object] = lambda: None
    ) -> None:
        """module: one that computes the same. look_up: what is called, which another may have taken the place of."""
        self.module, self.function = module, function
        self._look_up, self._found = look_up, look_up()
        self._activation = _taken(module)

    @property
    def activation(self) -> ActivationLike:
        """None if somebody would miss that it is called, or its numbers are not taken."""
        try:
            return self._activation if self._look_up() is self._found else None
        except (AttributeError, NameError):  # which its call raises again
            return None

    def __call__(self, input: Tensor) -> Tensor:
        return self.function(input)


Step = nn.Module | Applied


def run(modules: Iterable[Step], input: Tensor) -> Tensor:
    """What modules compute that take each other's output.

    Together run: a linear layer or a 3×3 convolution, and the activation behind it; linear layers with one activation
    that follow each other, and another behind, as one `mlp`; a layer and the folded batch norm behind it, where both
    are frozen. Rows cross plain Sequentials. Every other module is called.

    So is every module where torch computes whatever they do, unless a batch norm is folded: on the CPU fused rows took
    0.9 to 1.1 times as long as modules of 256 features and more, and up to twice as long for fewer.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        for module in modules:
            input = module(input)
        return input
    flat, start = flatten(modules), 0
    # A graph that is compiled or exported may run elsewhere.
    anywhere = backend() == "triton" or is_compiling() or any(map(is_folding, flat))
    while start < len(flat):
        row = row_at(flat, start, input) if anywhere or not _on_cpu(input) else []
        compute = _run_row
        if row and _may_be_changed(flat, row[-1].stop) and _trains(row, input):
            if _can_hold_output(row, input):
                compute = _run_and_hold_output
            else:
                row = _without_last_activation(row)
        output: Any = _unless_refused(compute, row, input) if row else REFUSED
        if output is REFUSED:
            input, start = flat[start](input), start + 1
        else:
            input, start = output, row[-1].stop
    return input


def _unless_refused(compute: Callable[..., Tensor], *arguments: Any) -> Any:
    """REFUSED for arguments that tribp's checks refuse: torch's modules do so, too, with errors of their own."""
    try:
        return compute(*arguments)
    except (TypeError, ValueError) as error:
        if is_compiling() or getattr(error, "refused_by_check", False):
            return REFUSED
        raise


def _on_cpu(input: Tensor) -> bool:
    return isinstance(input, Tensor) and input.is_cpu


class Part(NamedTuple):
    """A layer, and what is behind it that is computed with it."""

    layer: Any
    function: str  # that computes it
    weight: Any
    bias: Tensor | None
    norm: nn.Module | None
    activation: ActivationLike
    stop: int  # the index of what is behind


def row_at(modules: Sequence[Step], start: int, input: Tensor | None = None, norms: bool = False) -> list[Part]:
    """What starts at `start` and runs together: one convolution, or linear layers with one activation between them.

    Empty if that module is called. Without an input, it says what can be: with frozen layers in evaluation mode, say.
    norms: whether every batch norm may be folded, or those that are marked.
    """
    row: list[Part] = []
    stop = start
    while part := _part_at(modules, stop, input, norms):
        if row and (part.function != "linear" or not _same(row[0].activation, row[-1].activation)):
            break
        row.append(part)
        stop = part.stop
        if part.function != "linear" or part.activation is None:
            break
    return row if stop > start + 1 else []


def _may_be_changed(modules: Sequence[Step], stop: int) -> bool:
    """Whether what the module before `stop` returns may be changed in place, for all that torch keeps for backward."""
    read_alone = stop < len(modules) and type(modules[stop]) in LAYERS and not is_watched(module_of(modules[stop]))
    return keeps_input(module_of(modules[stop - 1])) and not read_alone


def _trains(row: Sequence[Part], input: Tensor) -> bool:
    """Whether backward may need what a row of layers keeps."""
    if not torch.is_grad_enabled():
        return False
    tensors = [input, *(t for part in row for t in (part.weight, part.bias) if t is not None)]
    return any(not isinstance(t, Tensor) or t.requires_grad for t in tensors)  # no tensor: in tracing


def _can_hold_output(row: Sequence[Part], input: Any) -> bool:
    """Whether `_run_and_hold_output` can: not where a compiler or others' hooks keep what is saved, nor in torch.fx.

    Nor of a frozen layer, whose input torch does not keep, so that it may be changed, too.
    """
    if is_compiling() or type(input) not in (Tensor, nn.Parameter) or not row[0].weight.requires_grad:
        return False
    hooks: Any = torch._C._autograd
    return hooks._saved_tensors_hooks_is_enabled() and hooks._top_saved_tensors_default_hooks(False) is None


def _run_and_hold_output(row: Sequence[Part], input: Tensor) -> Tensor:
    """`_run_row`, of which the output may be changed in place afterwards, where torch keeps the activation's input.

    For backward tribp keeps the output, which is computed again if it was changed.
    """
    norms = (part.norm.state_dict(keep_vars=True).values() for part in row if part.norm is not None)
    parameters = [t for part in row for t in (part.weight, part.bias) if t is not None]
    read = [input, *parameters, *itertools.chain(*norms)]
    versions, autocast = [*map(_version, read)], autocast_of(input.device.type)

    def keep(t: Tensor) -> tuple[Tensor, int]:
        return t.detach(), t._version  # of both the versions are the same later, too

    def kept(pair: tuple[Tensor, int]) -> Tensor:
        if dynamo_compiling():  # backward alone is compiled: in its graph tensors have other versions
            return torch.compiler.disable(kept)(pair)  # type: ignore[no-any-return, no-untyped-call]
        t, version = pair
        if t._version == version:
            return t
        if [*map(_version, read)] != versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"input or a parameter of {function_of(row)}"
            )
        with autocast():
            return _run_row(row, input).view(t.shape)  # a single image's has another in the function

    with torch.autograd.graph.saved_tensors_hooks(keep, kept):
        return _run_row(row, input)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _without_last_activation(row: Sequence[Part]) -> list[Part]:
    """Empty if that leaves a layer by itself."""
    *before, last = row
    shorter = [*before, last._replace(activation=None, stop=last.stop - 1)]
    return shorter if len(shorter) > 1 or last.norm is not None else []


def module_of(step: Step) -> nn.Module:
    """A module, or the one that computes what a function does."""
    return step.module if isinstance(step, Applied) else step


def _same(first: ActivationLike, second: ActivationLike) -> bool:
    return first == second or activation_of("", first) == activation_of("", second)


def function_of(row: Sequence[Part]) -> str:
    return "mlp" if len(row) > 1 else row[0].function


def _run_row(row: Sequence[Part], input: Any) -> Tensor:
    layer, function, weight, bias, norm, activation, _ = row[0]
    traced = not isinstance(input, Tensor) or is_fx_symbolic_tracing()
    if len(row) > 1:
        weights, biases = zip(*(_parameters(part, traced) for part in row), strict=True)
        return mlp(input, weights, biases, activation, row[-1].activation)
    if traced or norm is not None:
        weight, bias = _parameters(row[0], traced)
    if function == "linear":
        return linear(input, weight, bias, activation)
    if function == "conv3x3":
        return _convolve(layer, input, weight, bias, activation)
    return layer._conv_forward(input, weight, bias)  # type: ignore[no-any-return]


def _parameters(part: Part, traced: bool) -> tuple[Any, Tensor | None]:
    if part.norm is not None:
        return folded(part.layer, part.norm)
    if traced:
        return part.layer.weight, part.layer.bias  # what torch.fx puts in their places
    return part.weight, part.bias


def _part_at(modules: Sequence[Step], start: int, input: Tensor | None, norms: bool) -> Part | None:
    """What a layer at `start` is computed with; nothing if there is none of which nobody would miss a call."""
    if start == len(modules):
        return None
    layer: Any = modules[start]
    function, own = LAYERS.get(type(layer), ("", False))
    if not function or is_watched(layer):
        return None
    weight, bias = parameter(layer, "weight"), parameter(layer, "bias")
    if not own:
        if unreadable(layer, weight, bias) or not is_torchs(function):
            return None
        if function == "conv2d":
            if not convolves_as_torch(layer):
                return None
            if _is_3x3(layer, weight):
                function = "conv3x3"
    stop = start + 1
    norm: Any = None
    activation = layer.activation if own else None
    behind = modules[stop] if stop < len(modules) else None
    if activation is None and type(behind) in BATCH_NORMS and _folds(layer, behind, input, norms):
        norm = behind
        stop += 1
    if activation is None and stop < len(modules) and function != "conv2d":
        activation = _taken(modules[stop])
        stop += activation is not None
    return Part(layer, function, weight, bias, norm, activation, stop)


def _folds(layer: nn.Module, norm: Any, input: Tensor | None, norms: bool) -> bool:
    if not (norms or is_folding(norm)) or not can_fold(layer, norm) or not is_torchs("batch_norm"):
        return False
    return input is None or folds_now(layer, norm, input)


def _taken(step: Step) -> ActivationLike:
    """What tribp calls an activation of torch's; None if somebody would miss its call, or its numbers are not taken."""
    if isinstance(step, Applied):
        return step.activation
    names = ACTIVATIONS.get(type(step))
    if names is None or is_watched(step) or not is_torchs(names[0]):
        return None
    return names[0] if len(names) == 1 else None if refused("", step) else activation_like(step)


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """What an attribute is, a parameter in most cases: not what a tracer puts in its place, and 0.5 µs sooner."""
    for attributes in (module.__dict__, module._parameters):
        if name in attributes:
            return attributes[name]
    return getattr(module, name, None)


def unreadable(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> str:
    """Why a kernel does not take a layer's parameters, which users replace too; nothing if one does."""
    if weight is None:
        return "it has no weight"
    if bias is None and not hasattr(layer, "bias"):
        return "it has no bias"
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if type(t).__name__ not in PLAIN_TYPE_NAMES:  # of a tensor subclass, a Parameter has the subclass's type
            return f"its {name} is a {type(t).__name__}"
        if t.layout is not torch.strided:
            return f"its {name} is {str(t.layout).removeprefix('torch.')}"
        if t.dtype not in FLOATS:
            return f"its {name} is {str(t.dtype).removeprefix('torch.')}"
    dimensions = 4 if isinstance(layer, (nn.Conv2d, Conv3x3)) else 2
    if weight.dim() != dimensions or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = " and ".join(str(tuple(p.shape)) for p in (weight, bias) if p is not None)
        return f"its parameters have the shapes {shapes}"
    return ""


def convolves_as_torch(layer: nn.Module) -> bool:
    """Whether nobody has put another method in the place of `nn.Conv2d`'s, as for images whose edges meet."""
    defined = nn.Conv2d.forward is FORWARDS[nn.Conv2d] and nn.Conv2d._conv_forward is CONV_FORWARD
    return defined and "_conv_forward" not in layer.__dict__


def _is_3x3(layer: Any, weight: Any) -> bool:
    """Whether `conv3x3` takes a convolution of torch's with this readable weight."""
    _, channels, *size = weight.shape
    if size != [3, 3] or not channels or layer.dilation not in ((1, 1), (1,)):
        return False
    return type(layer.stride) is tuple and layer.stride in STRIDES


def _convolve(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: ActivationLike) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros":
        if isinstance(layer, Conv3x3):
            (vertical, horizontal), padding = padding, (0, 0)
            pads = [horizontal, horizontal, vertical, vertical]
        else:
            pads, padding = layer._reversed_padding_repeated_twice, (0, 0)
        input = F.pad(input, pads, mode=layer.padding_mode)
    return conv3x3(input, weight, bias, layer.stride, padding, layer.groups, activation)


def flatten(modules: Iterable[Step]) -> list[Any]:
    """Modules that run one after the other, a plain Sequential's in its place."""
    flat: list[Any] = []
    for module in modules:
        if isinstance(module, nn.Sequential) and is_plain_sequential(module):
            flat += flatten(module)
        else:
            flat.append(module)
    return flat


def is_plain_sequential(module: Step | None) -> TypeGuard[nn.Sequential]:
    """Whether a module is a Sequential of which nobody would miss that it is called."""
    return isinstance(module, nn.Sequential) and runs_in_order(type(module)) and not is_watched(module)


def runs_in_order(kind: type[nn.Sequential]) -> bool:
    """Whether a class of Sequentials runs its modules in their order, and does nothing else."""
    called = kind.__call__ is nn.Module.__call__ and kind._call_impl is nn.Module._call_impl
    in_order = kind.forward is FORWARDS[nn.Sequential] or kind.forward is FusedSequential.forward
    return called and in_order and kind.__iter__ is nn.Sequential.__iter__
