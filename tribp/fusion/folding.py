"""Batch norms folded into the layer before them, for inference, and taken out again."""

import torch
from torch import Tensor, nn

from ..nn import Conv3x3, Linear
from .forward import calls_once, doubt_about
from .modules import (
    BATCH_NORMS,
    LAYERS,
    FoldedBatchNorm,
    copy_layer,
    layer_kind,
    obstacle,
    shown_name,
    unusual,
)
from .plan import Place, Plan
from .report import Report


def fold_batchnorms(model: nn.Module) -> Report:
    """Fold each batch norm that is directly behind a linear layer or a convolution into its weight and bias.

    Raises:
        ValueError: the model, or a batch norm in it, is in training mode.
    """
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, BATCH_NORMS)):
            where = f"{type(module).__name__} at {name}" if name else "model"
            raise ValueError(
                f"fuse: fold_batchnorm=True needs a model in eval mode, but the {where} is in training mode"
            )
    stand_ins: dict[int, nn.Module] = {}
    plan = Plan("fuse", model, lambda norm: stand_ins[id(norm)], harmless=frozenset())
    folded = [module for module, _ in plan.modules if isinstance(module, FoldedBatchNorm)]
    for module, places in plan.modules:
        before_norm = [place for place in places if isinstance(place.behind, BATCH_NORMS)]
        if not isinstance(module, LAYERS) or not before_norm or _has_activation(module):
            continue
        place, norm = before_norm[0], before_norm[0].behind
        assert norm is not None
        reason = plan.obstacle(module, layer_kind(module))
        if not reason and any(other.is_behind(module) for other in folded):
            reason = "another batch norm is folded into the layer before it"
        if not reason and len(places) + len(plan.places[id(norm)]) > 2:
            reason = "it or the layer before it stands at several places, or is called several times"
        reason = reason or place.doubt or (_doubt_about_norm(plan, place) if place.site else "")
        reason = reason or _unfoldable(module, norm)
        if reason:
            plan.leave_activations(before_norm, reason)
            continue
        made = copy_layer(module)
        parameters = _folded(module, norm)
        vars(made)["_parameters"] = {name: nn.Parameter(p, requires_grad=False) for name, p in parameters.items()}
        stand_ins[id(norm)] = FoldedBatchNorm(norm, module, made.weight)
        was = f"{shown_name(module)} + {type(norm).__name__}"
        plan.replace([place._replace(site=())], made, was, shown_name(module))
    return plan.carry_out()


def unfold_batchnorms(model: nn.Module) -> Report:
    """Put batch norms and the parameters of layers back, the same objects, where no activation lies between them."""
    plan = Plan("unfuse", model, _original)
    for module, places in plan.modules:
        if not isinstance(module, FoldedBatchNorm):
            continue
        for place in places:
            parent = place.parent
            layers = [] if parent is None else [*parent._modules.items()]
            key, layer = next(((k, m) for k, m in layers if m is not None and module.is_behind(m)), ("", None))
            reason = obstacle("it", module, FoldedBatchNorm)
            if not reason and layer is None:
                reason = "the layer that it was folded into is not beside it"
            elif not reason and layer is not None:
                name = place.name.removesuffix(place.key) + key
                subject = f"the layer at {name}"
                reason = obstacle(subject, layer, layer_kind(layer))
                if not reason and _has_activation(layer):
                    reason = f"{subject} computes an activation"
            if reason or layer is None:
                plan.leave([place], reason)
                continue
            made = copy_layer(layer)
            vars(made)["_parameters"] = dict(module.layer._parameters)
            now = f"{shown_name(layer)} + {type(module.original).__name__}"
            pair = Place(parent, key, name, layer, None, module, place.key, place.name)
            plan.replace([pair], made, shown_name(layer), now)
    return plan.carry_out()


def _has_activation(layer: nn.Module) -> bool:
    return isinstance(layer, (Linear, Conv3x3)) and layer.activation is not None


def _doubt_about_norm(plan: Plan, place: Place) -> str:
    """Why a batch norm in a module's own forward may take something else than the layer's output."""
    assert place.parent is not None
    if not calls_once(place.parent, place.behind_key):
        return f"{type(place.parent).__name__}.forward calls it several times"
    return doubt_about(place.parent, place.behind_key, plan.reached, plan.harmless)


def _unfoldable(layer: nn.Module, norm: nn.Module) -> str:
    """Why a batch norm cannot become part of a layer's parameters; nothing if it can."""
    convolution = isinstance(layer, (nn.Conv2d, Conv3x3))
    kind = nn.BatchNorm2d if convolution else nn.BatchNorm1d
    reason = obstacle("it", norm, kind) if isinstance(norm, kind) else f"it is no {kind.__name__}"
    if reason:
        return reason
    if norm._buffers["running_mean"] is None or norm._buffers["running_var"] is None:
        return "it has no running statistics"
    tensors: dict[str, Tensor | None] = {f"the layer's {name}": p for name, p in layer._parameters.items()}
    tensors |= {f"its {name}": norm._parameters[name] for name in ("weight", "bias")}
    tensors |= {f"its {name}": norm._buffers[name] for name in ("running_mean", "running_var")}
    weight = layer._parameters["weight"]
    for name, tensor in tensors.items():
        if tensor is None and name != "the layer's weight":
            continue
        reason = unusual(name, tensor)
        if reason:
            return reason
        assert weight is not None
        assert tensor is not None
        if tensor.shape != weight.shape[:1] and tensor is not weight:
            return f"{name} has the shape {tuple(tensor.shape)}, the layer's weight {tuple(weight.shape)}"
        if tensor.device != weight.device:
            return f"{name} is on {tensor.device}, the layer's weight on {weight.device}"
    assert weight is not None
    return "" if weight.dim() == (4 if convolution else 2) else f"the layer's weight has {weight.dim()} dimensions"


@torch.no_grad()
def _folded(layer: nn.Module, norm: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of the layer that computes both, in float64 until they are stored."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    mean, var = (norm.get_buffer(name).double() for name in ("running_mean", "running_var"))
    eps = norm.eps
    assert isinstance(eps, float)
    scale, shift = torch.rsqrt(var + eps), -mean if bias is None else bias.double() - mean
    if norm._parameters["weight"] is not None:
        scale = scale * norm._parameters["weight"]
    shift = shift * scale
    if norm._parameters["bias"] is not None:
        shift = shift + norm._parameters["bias"]
    scaled = weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1))
    # in the layout of the old weight, channels last perhaps
    return {"weight": torch.empty_like(weight).copy_(scaled), "bias": shift.to(weight.dtype)}


def _original(folded: nn.Module) -> nn.Module:
    assert isinstance(folded, FoldedBatchNorm)
    return folded.original.train(folded.training)
