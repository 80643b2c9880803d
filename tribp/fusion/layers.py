"""`fuse` and `unfuse`."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..nn import Conv3x3, Linear
from .folding import fold_batchnorms, unfold_batchnorms
from .forward import unread_forward
from .modules import (
    LAYERS,
    FusedActivation,
    activation_kind,
    activation_like,
    computes,
    full_name,
    fused_layer,
    is_other_activation,
    layer_kind,
    looks_like_conv3x3,
    obstacle,
    refused,
    shown_name,
    torch_activation,
    torch_conv2d,
    torch_linear,
    unreadable,
)
from .plan import Place, Plan, runs_in_order
from .report import Report
from .sequential import FusedSequential, flatten, is_plain_layer, rows


def fuse(model: nn.Module, *, fold_batchnorm: bool = False) -> Report:
    """Put tribp's modules where torch's stand in `model`, in place; the report tells what was replaced, what left, why.

    - `nn.Linear` with an activation directly behind it becomes a `Linear` with that activation, or a `LinearSigmoid`.
      Activations are `nn.Sigmoid`, `Tanh`, `ReLU`, `LeakyReLU`, `ELU`, `Softplus`, `Hardsigmoid`, `Hardtanh` and
      `ReLU6`, in place or not, with numbers that `tribp.linear` takes, and torch's functions and methods of those;
    - every 3×3 `nn.Conv2d` that `Conv3x3` takes becomes one, with the activation directly behind it; a `Conv3x3` or a
      tribp `Linear` without one takes that in, too;
    - linear layers with activations that follow each other in an `nn.Sequential`, also through Sequentials inside it,
      with or without one behind the last, run as one `tribp.mlp`: the last becomes a `Linear`, and the Sequential that
      holds them a `FusedSequential`.

    An activation is behind a layer in an `nn.Sequential`, or in the source of the `forward` of the module that holds
    the layer: `self.act(self.conv(x))`, `F.relu(self.conv(x))`, `self.conv(x).relu()`, or in the line after
    `y = self.conv(x)` where nothing else reads that y. In a Sequential, a `FusedActivation`, which does nothing, keeps
    the activation's place. A module with another `forward` gets a class derived from its own, whose `forward` is the
    same code without those calls; nothing is traced, so that flags, modes and branches go on to mean what they do.

    The Parameters are the same objects, so that an optimizer built before goes on; mode, device, dtype, attributes that
    were set on a module, and the state_dict's keys are the same. What stands at several places, or is called several
    times, becomes one module again; its activation is taken in only if the same follows each time. Left are modules
    with hooks, parametrizations or more parameters, subclasses, lazy and scripted modules, what FSDP holds, layers in
    front of another activation of torch's, as `nn.GELU`, and what is in a Sequential that the model's own code takes
    apart: that does more than call it or run `for layer in self.layers: x = layer(x)`.

    Not seen is code outside the model that takes it apart, or code without a source: `model.layers[0](x)` and
    `model.conv(x)` now have the activation applied. Nor is what changes after fuse: a class's `forward`, or the module
    in an activation's place.

    Args:
        fold_batchnorm: whether to fold each `BatchNorm2d` directly behind a convolution, of any size, and each
            `BatchNorm1d` directly behind a linear layer, into that layer first, for inference. An activation behind the
            batch norm is then behind the layer. The layer gets new parameters without gradients, and its state_dict a
            bias; a `FoldedBatchNorm`, which has no keys in the state_dict, keeps the batch norm's place and raises in
            training mode. Outputs are equal but for rounding. `unfuse` brings the same Parameters and buffers back, as
            they were when they were folded. Left are batch norms without running statistics, and what is shared.

    Raises:
        TypeError: model is no module.
        ValueError: fold_batchnorm is True and the model, or a batch norm in it, is in training mode.
    """
    plan = Plan("fuse", model, FusedActivation)
    if fold_batchnorm:
        return fold_batchnorms(model) + fuse(model)
    for module, places in plan.modules:
        done = isinstance(module, (Linear, Conv3x3)) and module.activation is not None
        if isinstance(module, LAYERS) and not done:
            _fuse_layer(plan, module, places)
        elif looks_like_conv3x3(module):
            plan.leave(places, f"it is a {full_name(module)}, no torch.nn.Conv2d")
        elif isinstance(module, torch.jit.ScriptModule):
            plan.leave(places, "it is compiled by TorchScript")
        else:
            plan.leave(places, unread_forward(module))
    sequentials = [(m, places) for m, places in plan.modules if isinstance(m, nn.Sequential) and runs_in_order(m)]
    for module, _ in sequentials:
        if not _fixed_class(plan, module):
            _fuse_last_layers(plan, module)
    for module, places in sequentials:
        _fuse_rows(plan, module, places)
    _leave_other_activations(plan)
    return plan.carry_out()


def _fuse_layer(plan: Plan, module: nn.Module, places: Sequence[Place]) -> None:
    """A convolution of torch's is replaced also without an activation, other layers with one alone."""
    kind = layer_kind(module)
    pairs = [place for place in places if activation_kind(place.behind)]
    if not pairs and kind is not nn.Conv2d:
        return
    alone = _unpaired(places)
    activation = None if alone else activation_like(places[0].behind)
    reason = plan.obstacle(module, kind)
    if not reason and kind in (nn.Linear, nn.Conv2d):
        reason = unreadable(module, 2 if kind is nn.Linear else 4)
    if not reason and kind is not nn.Conv2d:
        reason = alone
    made = reason or fused_layer(module, activation)
    if isinstance(made, str):
        if kind in (Linear, Conv3x3) and made == alone:
            plan.leave_activations(pairs, alone)
        else:
            plan.leave(places if kind is nn.Conv2d else pairs, made)
        return
    was = kind.__name__ if alone else f"{kind.__name__} + {type(places[0].behind).__name__}"
    plan.replace(places, made, was, shown_name(made), not alone)
    if alone:
        plan.leave_activations(pairs, alone)


def _fuse_last_layers(plan: Plan, module: nn.Sequential) -> None:
    """Linear layers of torch's directly behind one with an activation, which they can join, become tribp's."""
    for layer in _last_layers(plan, module):
        places = plan.places[id(layer)]
        made = plan.obstacle(layer, nn.Linear) or unreadable(layer, 2) or fused_layer(layer, None)
        if isinstance(made, str):
            plan.leave(places, made)
        else:
            plan.replace(places, made, "torch.nn.Linear", shown_name(made), pair=False)


def _fuse_rows(plan: Plan, module: nn.Sequential, places: Sequence[Place]) -> None:
    """A Sequential gets another class if what follows each other in it makes fewer rows than each child alone."""
    children = plan.children_of(module)
    apart = sum(len(rows(_flatten(plan, [child]))) for child in children)
    joined = len(rows(_flatten(plan, children))) < apart
    reason = _fixed_class(plan, module)
    if reason and (joined or _last_layers(plan, module)):
        plan.leave(places, f"{reason}, so that its layers run one by one")
    elif joined and not isinstance(module, FusedSequential):
        plan.change_class(places, FusedSequential)


def _leave_other_activations(plan: Plan) -> None:
    """Report layers in front of activations that tribp does not compute; of those that are tribp's, the activations."""
    left, replaced = ({entry.name for entry in entries} for entries in (plan.left, plan.replaced))
    for module, places in plan.modules:
        if not isinstance(module, LAYERS) or getattr(module, "activation", None) is not None:
            continue
        for place in places:
            if place.name in left or not is_other_activation(place.behind):
                continue
            reason = f"tribp computes no {type(place.behind).__name__}"
            if isinstance(module, (Linear, Conv3x3)) or place.name in replaced:
                plan.leave_activations([place], reason)
            else:
                plan.leave([place], f"{reason}, which is behind it")


def _last_layers(plan: Plan, module: nn.Sequential) -> list[nn.Module]:
    """Linear layers of torch's directly behind one that will have its activation."""
    left = {entry.name for entry in plan.left}
    modules = [m for m in _flatten(plan, plan.children_of(module)) if not isinstance(m, FusedActivation)]
    return [
        layer
        for before, layer in itertools.pairwise(modules)
        if isinstance(layer, nn.Linear) and is_plain_layer(before) and before.activation is not None
        if not any(place.name in left for place in plan.places[id(layer)])
    ]


def _flatten(plan: Plan, modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    return flatten(modules, plan.children_of)


def _fixed_class(plan: Plan, module: nn.Module) -> str:
    """Why a Sequential cannot become a `FusedSequential`; nothing if it can, or is one."""
    return "" if isinstance(module, FusedSequential) else _of_another_class(plan, module, nn.Sequential)


def _of_another_class(plan: Plan, module: nn.Module, kind: type[nn.Module]) -> str:
    """Why a module cannot get another class, which one of exactly this kind can; nothing if it can."""
    if id(module) in plan.sharded:
        return "FSDP holds its parameters"
    return "" if type(module) is kind else f"it is a subclass of {kind.__name__}: {full_name(module)}"


def unfuse(model: nn.Module) -> Report:
    """Put torch's modules where tribp's stand in `model`, in place: what `fuse` did is undone.

    Modules that a user wrote into the model become torch's too. One that computes an activation and has no
    `FusedActivation` behind it becomes an `nn.Sequential` of two in its place: its keys in the state_dict then have a
    "0." more, as the report says. Everything else that `fuse` keeps is kept. Left are those that `fuse` would leave for
    hooks, parametrizations, more parameters, subclasses, and FSDP.

    Raises:
        TypeError: model is no module.
    """
    plan = Plan("unfuse", model, _original)
    for module, places in plan.modules:
        if isinstance(module, (Linear, Conv3x3)):
            pair = any(computes(module, place.behind) for place in places)
            reason = plan.obstacle(module, layer_kind(module)) or (_not_behind(module, places) if pair else "")
            if reason:
                plan.leave(places, reason)
                continue
            made: nn.Module = torch_conv2d(module) if isinstance(module, Conv3x3) else torch_linear(module)
            now = f"torch.nn.{type(made).__name__}" if isinstance(module, Linear) else type(made).__name__
            if module.activation is None:
                plan.replace(places, made, shown_name(module), now, pair=False)
            elif pair:
                behind = next(b for b in (place.behind for place in places) if isinstance(b, FusedActivation))
                plan.replace(
                    places, made, shown_name(module), f"{type(made).__name__} + {type(behind.original).__name__}"
                )
            else:
                second = torch_activation(module.activation)
                both = nn.Sequential(made, second).train(module.training)
                now = f"Sequential({type(made).__name__}, {type(second).__name__}), keys with 0."
                plan.replace(places, both, shown_name(module), now, pair=False)
        elif isinstance(module, FusedActivation):
            orphans = [place for place in places if not computes(place.before, module)]
            plan.leave(orphans, f"no module that computes the {type(module.original).__name__} is before it")
        elif isinstance(module, FusedSequential):
            reason = _of_another_class(plan, module, FusedSequential)
            plan.leave(places, reason)
            if not reason:
                plan.change_class(places, nn.Sequential)
        for place in places:
            if place.site and isinstance(place.behind, FusedActivation) and not computes(module, place.behind):
                plan.leave([place], f"it does not compute the {type(place.behind.original).__name__} behind it")
    return plan.carry_out() + unfold_batchnorms(model)


def _unpaired(places: Sequence[Place]) -> str:
    """Why what stands at `places` does not, at each of them, run right before the same activation."""
    first = places[0]
    for place in places:
        kind = activation_kind(place.behind)
        if place.behind is None or kind is None:
            return f"no activation is behind {place.name}"
        subject = f"the {kind.__name__} at {place.behind_name}"
        reason = obstacle(subject, place.behind, kind) or refused(subject, place.behind)
        if reason:
            return reason
        if activation_like(place.behind) != activation_like(first.behind):
            return f"one activation is behind {first.name}, another behind {place.name}"
        if place.doubt:
            return place.doubt
    return ""


def _not_behind(module: nn.Module, places: Sequence[Place]) -> str:
    """Why what stands at `places` does not, at each of them, run right before what stands for its activation."""
    for place in places:
        if place.behind is None or not computes(module, place.behind):
            return f"no place for its activation is behind {place.name}"
        reason = obstacle(f"the FusedActivation at {place.behind_name}", place.behind, FusedActivation)
        if reason:
            return reason
        if place.doubt:
            return place.doubt
    return ""


def _original(fused: nn.Module) -> nn.Module:
    assert isinstance(fused, FusedActivation)
    return fused.original.train(fused.training)
