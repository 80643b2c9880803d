"""The layers of a perceptron, read off a model that is one."""

from collections.abc import Iterator
from types import NoneType

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..footprint import dict_versions
from ..nn import MLP, Linear, LinearSigmoid, runs_forward_alone
from ..ops.activations import ActivationLike, activation_of
from ..ops.mlp.reference import Layer
from .activations import ACTIVATIONS, activation_like
from .places import HOOKS, full_name
from .rows import flatten, runs_in_order

LINEARS = (nn.Linear, Linear, LinearSigmoid)


class Perceptron:
    """The layers of a model, which are read again when one of its modules has changed."""

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._model: nn.Module | None = None  # that they were read off

    def __reduce__(self) -> tuple[type["Perceptron"], tuple[()]]:
        return Perceptron, ()  # a copy belongs to another model

    def layers(self, model: nn.Module) -> list[Layer] | str:
        """The layers in their order, or why the model is no perceptron."""
        if model is self._model and self._is_as_it_was():
            return self._layers
        self._model, layers = None, _layers_of(model)
        if not isinstance(layers, str):
            self._layers = layers
            self._remember(model)
        return layers

    def _remember(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules, self._kinds = modules, list[type[nn.Module]](map(type, modules))
        self._forwards = [(kind, kind.forward) for kind in {*self._kinds}]
        self._sequentials = [kind for kind in set(self._kinds) if issubclass(kind, nn.Sequential)]
        # A module's own dict has its numbers, its forward if it has one, and the dicts that stand here beside it.
        self._dicts = list(map(vars, modules))
        self._dicts += [m._modules for m in modules if isinstance(m, (nn.Sequential, MLP))]
        self._dicts += [m._parameters for m in modules if isinstance(m, LINEARS)]
        self._hooks = [getattr(m, name) for m in modules for name in HOOKS]
        self._versions = dict_versions(self._dicts)
        names = {**ACTIVATIONS, Linear: ("", "activation"), MLP: ("", "activation", "output_activation")}
        given = (getattr(m, name) for m in modules for name in names.get(type(m), ())[1:])
        if all(self._dicts) and all(map(_cannot_change, given)):
            self._model = model

    def _is_as_it_was(self) -> bool:
        return (
            dict_versions(self._dicts) == self._versions
            and list(map(type, self._modules)) == self._kinds
            and not any(self._hooks)
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
            and all(kind.forward is forward for kind, forward in self._forwards)
            and all(map(runs_in_order, self._sequentials))
        )


def _cannot_change(given: object) -> bool:
    """Whether a number, or an activation, is what it was as long as it is the same object."""
    return type(given) in (str, int, float, NoneType) or (type(given) is tuple and all(map(_cannot_change, given)))


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, ActivationLike]]:
    """A model's modules in the order in which it calls them, each with the activation that an MLP gives it."""
    for module in flatten([model]):
        yield module, None
        if type(module) is MLP:
            layers = module.layers
            for n, layer in enumerate(layers, 1):
                yield layer, module.output_activation if n == len(layers) else module.activation


def _layers_of(model: nn.Module) -> list[Layer] | str:
    """The layers of a perceptron in their order, or why it is none."""
    layers: list[Layer] = []
    for module, follows in _modules(model):
        kind = type(module)
        if not runs_forward_alone(module):
            return f"a {kind.__name__} has hooks, or a forward of its own"
        if isinstance(module, LINEARS) and kind in LINEARS:
            act = module.activation if isinstance(module, Linear) else None  # torch's own may have a note of that name
            if act is not None and follows is not None:
                return "two activations follow on one layer"
            layers.append(Layer(module.weight, module.bias, activation_of("train_step", act or follows)))
        elif kind in ACTIVATIONS:
            if not layers or layers[-1].activation.name is not None:
                return f"a {kind.__name__} stands behind no linear layer"
            try:
                activation = activation_of(f"the {kind.__name__}", activation_like(module))
            except (TypeError, ValueError, OverflowError) as error:
                return str(error)
            layers[-1] = layers[-1]._replace(activation=activation)
        elif isinstance(module, MLP) and any(type(layer) not in LINEARS for layer in module.layers):
            return "a layer of the MLP was replaced"
        elif kind not in (MLP, nn.Identity):
            return f"it has a {full_name(module)}"
    return layers or "it has no linear layer"
