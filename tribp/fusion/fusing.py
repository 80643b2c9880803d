"""`fuse`: which modules of a model get another class, and what it says of that."""

import itertools
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from ..nn import Conv3x3, Linear
from ..ops.conv3x3.checks import window_of
from .activations import ACTIVATIONS, activation_kind, refused
from .folding import BATCH_NORMS, FOLDS, can_fold, is_folding
from .forward import (
    Line,
    activation_of_torch,
    class_for,
    class_in_order,
    joined,
    lines_of,
    made_of,
    named_flatten,
    read,
    shown_name,
    sites_of,
    underivable,
    unread_layers,
)
from .places import another, full_name, places, watched
from .report import Replaced, Report, Skipped
from .rows import (
    LAYERS,
    FusedConv2d,
    FusedSequential,
    Part,
    function_of,
    module_of,
    parameter,
    row_at,
    runs_in_order,
    unreadable,
)

Entry = TypeVar("Entry", Replaced, Skipped)
BASES = (nn.Linear, nn.Conv2d, Linear, Conv3x3)


def fuse(model: nn.Module, *, fold_batchnorm: bool = False) -> Report:
    """Have tribp's kernels run what they can of `model`, in place. The report says what they run, what not, and why.

    - every 3×3 `nn.Conv2d` that `tribp.conv3x3` takes, with the activation directly after it;
    - `nn.Linear` with an activation directly after it, as `tribp.linear`. Activations are `nn.Sigmoid`, `Tanh`,
      `ReLU`, `LeakyReLU`, `ELU`, `Softplus`, `Hardsigmoid`, `Hardtanh` and `ReLU6`, in place or not, with numbers that
      `tribp.linear` takes, and torch's functions and methods of those;
    - linear layers in a row with the same activation between them, with or without another after the last, as one
      `tribp.mlp`.

    They may follow each other in an `nn.Sequential`, also through Sequentials inside it, or in the source of a
    `forward`: `self.act(self.conv(x))`, `F.relu(self.conv(x))`, `self.conv(x).relu()`, in the line after
    `y = self.conv(x)` where nothing else reads that y, or as `for layer in self.layers: x = layer(x)`; layers of a list
    as `F.relu(self.layers[i](x))`, or `F.relu(layer(x))` in a loop over it.

    What torch trains can be trained: kernels keep the output of an activation for backward, which code behind it must
    not change in place then. Where torch keeps the input, as of LeakyReLU, ELU, Softplus, Hardsigmoid, Hardtanh and
    ReLU6, and it is not certain that nothing changes the output, it is called by itself while a gradient is wanted.

    No module is replaced: a Sequential becomes a `FusedSequential`, a convolution a `FusedConv2d`, and a module with
    another `forward` gets a class derived from its own, whose `forward` is the same code with those calls made
    together. Nothing is traced, so flags, modes and branches keep their meaning. All modules, Parameters, hooks,
    attributes and the state_dict's keys stay. What runs together is decided in each call: a layer or an activation that
    was replaced, wrapped, hooked, parametrized or moved by then, or that other code calls, is called by itself, as in
    torch. Skipped are subclasses of layers and activations, those with hooks, a forward of their own or parameters that
    kernels do not take, and scripted modules.

    Args:
        fold_batchnorm: whether each `BatchNorm2d` directly after a convolution, of any size, and each `BatchNorm1d`
            directly after a linear layer may become part of that layer's weight and bias. An activation after the
            batch norm then directly follows the layer. A batch norm is folded while it is in evaluation mode and no
            parameter of the two requires a gradient; otherwise it runs as before. The folded weight and bias are kept
            until torch counts that one of their tensors was written to; writes through `.data`, for instance, it does
            not count. Outputs are equal but for rounding.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    plan = _Plan(model, fold_batchnorm)
    seen: set[int] = set()
    for name, module in plan.places:
        prefix = f"{name}." if name else ""
        if isinstance(module, torch.jit.ScriptModule):
            plan.skip(name, module, "it is compiled by TorchScript")
        elif id(module) in seen:
            continue
        elif isinstance(module, (nn.Sequential, nn.ModuleList)):
            plan.add_container(name, prefix, module)
        elif any(isinstance(child, (*BASES, nn.Sequential, nn.ModuleList)) for child in module.children()):
            plan.add_forward(name, prefix, module)
        seen.add(id(module))
    for name, module in plan.places:
        plan.add_convolution(name, module)
    for line in plan.lines:
        plan.skip_layers(line)
    plan.skip_unread_layers()
    read.cache_clear()  # which would keep the model's classes
    return plan.apply()


class _Plan:
    """Everything is decided before anything is changed."""

    def __init__(self, model: nn.Module, fold_batchnorm: bool) -> None:
        self.places = list(places(model))
        self.order = {name: n for n, (name, _) in reversed(list(enumerate(self.places)))}
        self.norms = fold_batchnorm
        self.folded: list[nn.Module] = []
        self.classes: dict[int, tuple[nn.Module, type[nn.Module]]] = {}  # by the module's identity
        self.replaced: dict[str, Replaced] = {}
        self.skipped: dict[str, Skipped] = {}
        self.lines: list[Line] = []
        self.unread: list[tuple[str, nn.Linear, str]] = []  # layers, and why it is not known what is behind them
        self.joined: set[str] = set()  # names of what runs together with something else
        self.pairs: set[tuple[str, str]] = set()  # of layers and what is behind them

    def skip(self, name: str, module: nn.Module, reason: str) -> None:
        if reason:
            self.skipped.setdefault(name, Skipped(name, type(module).__name__, reason))

    def add_container(self, name: str, prefix: str, module: nn.Sequential | nn.ModuleList) -> None:
        """A Sequential gets another class if something crosses from one of its children to another."""
        children = [nn.ModuleDict({key: child}) for key, child in module._modules.items() if child is not None]
        named = [(*entry, n) for n, child in enumerate(children) for entry in named_flatten(prefix, child)]
        names, modules, where = zip(*named, strict=True) if named else ((), (), ())
        doubt = ""
        if isinstance(module, nn.ModuleList) or not runs_in_order(type(module)) or "forward" in vars(module):
            doubt = f"the {type(module).__name__} around it may not run its modules in order"
            if isinstance(module, nn.ModuleList):
                doubt = "forward does not run the ModuleList around it in order"
            else:
                layers = zip(names, modules, strict=True)
                self.unread += [(name, layer, doubt) for name, layer in layers if isinstance(layer, nn.Linear)]
        elif type(module) not in (nn.Sequential, FusedSequential):
            doubt = underivable(module)
        line = Line(names, modules, doubt=doubt)
        self.lines.append(line)
        if doubt or not joined(modules, where, self.norms):
            return
        assert isinstance(module, nn.Sequential)
        new = type(module).forward is not FusedSequential.forward
        if new:
            self.classes[id(module)] = module, class_in_order(type(module))
        self.add_rows(line, new)

    def add_forward(self, name: str, prefix: str, module: nn.Module) -> None:
        try:
            lines = lines_of(module, prefix, self.norms)
        except ValueError as error:
            if any(isinstance(child, BASES) for child in module.children()):
                self.skip(name, module, f"what its forward applies to its layers is not known: {error}")
            return
        self.lines += lines
        self.unread += unread_layers(module, prefix)
        kind = class_for(module, {line.site for line in lines if line.site})
        if kind is not type(module):
            self.classes[id(module)] = module, kind
        for line in lines:
            if line.site:
                self.add_rows(line, line.site not in sites_of(module))

    def add_rows(self, line: Line, new: bool) -> None:
        """new: whether the line did not run together before."""
        start = 0
        while start < len(line.modules):
            row = row_at(line.modules, start, None, self.norms)
            for part in row:
                names, modules = line.names[start : part.stop], line.modules[start : part.stop]
                name, start = names[0], part.stop
                if folds := part.norm is not None and not is_folding(part.norm):
                    self.folded.append(part.norm)
                if (new or folds) and name not in self.joined:
                    was = " + ".join(shown_name(type(module_of(m))).removeprefix("Fused") for m in modules)
                    once = " once frozen, in evaluation mode" if part.norm is not None and _trains(part) else ""
                    self.replaced.setdefault(name, Replaced(name, was, function_of(row) + once))
                self.joined |= {*names}
                self.pairs |= {*itertools.pairwise(names)}
            start += not row

    def add_convolution(self, name: str, module: nn.Module) -> None:
        """One by itself; what looks like one is skipped."""
        if isinstance(module, torch.jit.ScriptModule) or name in self.skipped:
            return
        if isinstance(module, nn.Conv2d):
            reason = _untaken(module)
            if not reason and type(module) is nn.Conv2d:
                self.classes[id(module)] = module, FusedConv2d
                self.replaced.setdefault(name, Replaced(name, "Conv2d", "conv3x3"))
            elif name not in self.joined:
                self.skip(name, module, reason)
        elif _looks_like_conv3x3(module):
            self.skip(name, module, f"it is a {full_name(module)}, no torch.nn.Conv2d")

    def skip_layers(self, line: Line) -> None:
        """Report what stands behind layers and does not run with them: as the layer, if that is a Linear of torch's."""
        for n, (name, layer) in enumerate(zip(line.names[:-1], line.modules[:-1], strict=True)):
            behind_name, behind = line.names[n + 1], module_of(line.modules[n + 1])
            if not isinstance(layer, BASES) or (name, behind_name) in self.pairs or name in self.skipped:
                continue
            if isinstance(layer, torch.jit.ScriptModule) or getattr(layer, "_act", (None,))[0] is not None:
                continue
            norm = self.norms and isinstance(behind, BATCH_NORMS)
            kind = activation_of_torch(behind)
            at_layer = isinstance(layer, nn.Linear) and not norm and name not in self.joined
            if kind and kind not in ACTIVATIONS:
                reason = f"tribp computes no {type(behind).__name__}" + ", which follows it" * at_layer
            elif kind or norm:
                subject = "it" if at_layer else f"the {type(layer).__name__} at {name}"
                reason = _not_called(subject, layer) or line.doubt or _not_behind(layer, behind, behind_name)
            else:
                continue
            self.skip(*((name, layer) if at_layer else (behind_name, behind)), reason)

    def skip_unread_layers(self) -> None:
        """Report linear layers that could be taken, if it is not known whether an activation is behind them."""
        for name, layer, reason in self.unread:
            if name not in self.joined and not _not_called("it", layer):
                self.skip(name, layer, reason)

    def apply(self) -> Report:
        for name, module in self.places:
            if id(module) in self.classes:
                _, kind = self.classes[id(module)]
                self.replaced.setdefault(name, Replaced(name, made_of(module).__name__, shown_name(kind)))
        for module, kind in self.classes.values():
            object.__setattr__(module, "__class__", kind)  # a module's own may do something else
        for norm in self.folded:
            vars(norm)[FOLDS] = True
        layers = {id(module): False for _, module in self.places if _is_layer(module)}
        for name, module in self.places:
            if id(module) in layers:
                own = isinstance(module, (FusedConv2d, Linear, Conv3x3))
                layers[id(module)] |= own or name in self.joined
        return Report(self._entries(self.replaced), self._entries(self.skipped), sum(layers.values()), len(layers))

    def _entries(self, entries: Mapping[str, Entry]) -> tuple[Entry, ...]:
        """In the order of the places; not by further names of what stands in a container that has several."""
        ours = (entry for name, entry in entries.items() if name in self.order)
        return tuple(sorted(ours, key=lambda entry: self.order[entry.name]))


def _trains(part: Part) -> bool:
    """Whether a batch norm that may fold does not yet."""
    assert part.norm is not None
    return part.norm.training or any(p.requires_grad for m in (part.layer, part.norm) for p in m.parameters())


def _is_layer(module: nn.Module) -> bool:
    """Whether it is of a kind that tribp has a function for: linear, or a 3×3 convolution."""
    return isinstance(module, (nn.Linear, Linear, Conv3x3)) or (
        isinstance(module, nn.Conv2d) and tuple(module.kernel_size) == (3, 3)
    )


def _untaken(layer: nn.Module) -> str:
    """Why a kernel does not compute what a layer does; nothing if one does."""
    linear = isinstance(layer, (nn.Linear, Linear))
    kinds = [kind for kind, (function, _) in LAYERS.items() if (function == "linear") == linear]
    reason = another("it", layer, *kinds) or unreadable(layer, parameter(layer, "weight"), parameter(layer, "bias"))
    if reason or linear or isinstance(layer, Conv3x3):
        return reason
    assert isinstance(layer, nn.Conv2d)
    size = tuple(layer.weight.shape[2:])
    if size != (3, 3):
        return f"its kernel size is {size}"
    try:
        window_of("conv3x3", layer.stride, 0, layer.groups, layer.dilation)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("conv3x3: ").partition(";")[0]
    return ""


def _not_called(subject: str, layer: nn.Module) -> str:
    reason = _untaken(layer)
    return reason.replace("it ", f"{subject} ", 1) if reason.startswith("it ") else reason or watched(subject, layer)


def _not_behind(layer: nn.Module, behind: nn.Module, name: str) -> str:
    """Why what is behind a layer that can be taken does not run with it; nothing if it does."""
    if isinstance(behind, BATCH_NORMS):
        kind = next(kind for kind in BATCH_NORMS if isinstance(behind, kind))
        reason = another("it", behind, kind) or watched("it", behind)
        return reason or (
            ""
            if can_fold(layer, behind)
            else "its tensors do not fit the layer's weight, or are not parameters and buffers"
        )
    activation = activation_kind(behind)
    assert activation is not None
    subject = f"the {activation.__name__} at {name}"
    return another(subject, behind, activation) or watched(subject, behind) or refused(subject, behind)


def _looks_like_conv3x3(module: nn.Module) -> bool:
    """Whether it is a convolution of another kind, transposed or quantized, say."""
    options = vars(module)
    size = options.get("kernel_size")
    return isinstance(size, tuple) and size == (3, 3) and "in_channels" in options and not isinstance(module, Conv3x3)
