"""`unfuse`: torch's classes again, and torch's modules where tribp's stand."""

from collections.abc import Set

from torch import nn

from ..nn import MLP, Conv3x3, Linear, LinearSigmoid
from .activations import torch_activation
from .folding import forget, is_folding
from .forward import made_base, made_of, shown_name
from .places import another, places
from .report import Replaced, Report, Skipped
from .rows import FusedConv2d, FusedSequential

TRIBP_CLASSES = (Linear, LinearSigmoid), (Conv3x3,), (MLP,)
ALL_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
CLASSES: dict[type[nn.Module], type[nn.Module]] = {FusedSequential: nn.Sequential, FusedConv2d: nn.Conv2d}


def unfuse(model: nn.Module) -> Report:
    """Undo what `fuse` did, in place, and put torch's modules where tribp's stand.

    A layer of `tribp.nn` becomes torch's. One with an activation becomes an `nn.Sequential` of two modules, so its keys
    in the state_dict gain a "0.", as the report says. An `MLP` becomes the `nn.Sequential` that it stands for, with the
    same keys. Skipped are modules with hooks, parametrizations or more than their parameters, subclasses, and a module
    that is the model itself.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model must be a torch.nn.Module, got {type(model).__name__}")
    replaced: list[Replaced] = []
    skipped: list[Skipped] = []
    made: dict[int, nn.Module] = {}  # by the old one's identity: what stands at several places stays one module
    kept: set[int] = set()  # layers of an MLP that stays
    folding: list[nn.Module] = []
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module in places(model):
        kind = CLASSES.get(type(module), made_of(module))
        if kind is not type(module):
            classes.append((module, kind))
            replaced.append(Replaced(name, shown_name(type(module)), kind.__name__))
        elif isinstance(module, tuple(CLASSES)):
            skipped.append(Skipped(name, type(module).__name__, another("it", module, *CLASSES)))
        elif (base := made_base(kind)) is not None:
            skipped.append(Skipped(name, kind.__name__, another("it", module, base)))
        elif is_folding(module):
            folding.append(module)
            replaced.append(Replaced(name, f"folded {kind.__name__}", kind.__name__))
        elif isinstance(module, (Linear, Conv3x3, MLP)) and id(module) not in kept:
            reason = "it is the model itself: no module that could hold another is around it" if not name else ""
            if reason := reason or _obstacle(module):
                skipped.append(Skipped(name, type(module).__name__, reason))
                kept |= {id(layer) for layer in module.children()}
                continue
            made[id(module)] = torchs = _torchs(module)
            now = f"torch.nn.{type(torchs).__name__}"
            if isinstance(torchs, nn.Sequential):
                keys = "" if isinstance(module, MLP) else ", keys with 0."
                now = f"Sequential({', '.join(type(m).__name__ for m in torchs)}){keys}"
            replaced.append(Replaced(name, shown_name(type(module)), now))
    for module, kind in classes:
        object.__setattr__(module, "__class__", kind)
    for norm in folding:
        forget(norm)
    for parent in (*model.modules(), *made.values()):
        new = {key: made[id(child)] for key, child in parent._modules.items() if id(child) in made}
        parent._modules.update(new)  # setattr may mean something else to the parent
    return Report(tuple(replaced), tuple(skipped))


def _obstacle(module: Linear | Conv3x3 | MLP) -> str:
    """Why a module is more than one of tribp's with its parameters; nothing if it is not."""
    if reason := another("it", module, *next(kinds for kinds in TRIBP_CLASSES if isinstance(module, kinds))):
        return reason
    for name in ALL_HOOKS:
        if getattr(module, name):
            return f"it has {name.strip('_').replace('_', ' ')}"
    if module._compiled_call_impl is not None:
        return "it was compiled by itself"
    own = {"weight", "bias"} if not isinstance(module, MLP) else {str(2 * n) for n in range(len(module.sizes) - 1)}
    held = {*module._parameters, *module._buffers, *module._modules}
    if extra := held - own:
        return f"it has more than its parameters: {', '.join(sorted(extra))}"
    missing = own - (module._modules if isinstance(module, MLP) else module._parameters).keys()
    return f"it has a {min(missing)} that is no parameter" if missing else ""


def _torchs(module: Linear | Conv3x3 | MLP) -> nn.Module:
    """torch's module, or several in a row, that compute what one of tribp's does."""
    if isinstance(module, MLP):
        return _row_of(module)
    # On meta a constructor allocates nothing and draws no random numbers.
    made: nn.Module
    if isinstance(module, Conv3x3):
        made = nn.Conv2d(
            module.in_channels, module.out_channels, 3, module.stride, module.padding, 1, module.groups,
            module.bias is not None, module.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    _hand_over(module, made, {"activation", "_act"})
    if module.activation is None:
        return made
    return nn.Sequential(made, torch_activation(module.activation)).train(module.training)


def _row_of(module: MLP) -> nn.Sequential:
    """The layers as they are, and the activations at the numbers between."""
    row = nn.Sequential()
    for n, layer in enumerate(module.layers):
        last = n == len(module.sizes) - 2
        activation = module.output_activation if last else module.activation
        row.append(layer)
        if activation is not None:
            row.append(torch_activation(activation).train(module.training))
        elif not last:
            row.append(nn.Identity().train(module.training))
    _hand_over(module, row, {"sizes", "activation", "output_activation"})
    return row


def _hand_over(old: nn.Module, new: nn.Module, without: Set[str]) -> None:
    """Give `new` the parameters, the mode, and the attributes of `old` that it does not have itself."""
    vars(new)["_parameters"] = old._parameters.copy()
    new.training = old.training
    vars(new).update({name: value for name, value in vars(old).items() if name not in without | vars(new).keys()})
