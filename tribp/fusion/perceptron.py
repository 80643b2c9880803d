"""The layers of a perceptron, read off a model that is one."""

from collections.abc import Iterator
from operator import is_
from types import NoneType
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..footprint import dict_versions
from ..nn import MLP, Linear, LinearSigmoid, runs_forward_alone
from ..ops.activations import ActivationLike, activation_of
from ..ops.mlp.reference import Layer
from .activations import ACTIVATIONS, activation_like, is_torchs
from .places import CALL_HOOKS, full_name
from .rows import FusedSequential, flatten, runs_in_order

LINEARS = (nn.Linear, Linear, LinearSigmoid)


# What is read of a module of each class. Of any other class, and of a Sequential's subclass, nothing is remembered.
READ: dict[type[nn.Module], tuple[str, ...]] = {
    **{kind: known[1:] for kind, known in ACTIVATIONS.items()},
    **dict.fromkeys((nn.Identity, nn.Sequential, FusedSequential), ()),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Linear: ("weight", "bias"),
    **dict.fromkeys((Linear, LinearSigmoid), ("weight", "bias", "activation")),
    MLP: ("sizes", "layers", "activation", "output_activation"),
}


class Perceptron:
    """The layers of a model, which are read again when one of its modules has changed.

    `flattens` says whether what comes before the layers makes a row of each sample, of any number of dimensions.
    """

    def __init__(self) -> None:
        self.flattens = False
        self._model: nn.Module | None = None  # that they were read off
        self._layers: list[Layer] = []
        self._modules: list[nn.Module] = []
        self._attributes: list[dict[str, Any]] = []  # of each module
        self._dicts: list[dict[str, Any]] = []  # these, and those of parameters and children
        self._hooks: list[dict[int, Any]] = []

    def __reduce__(self) -> tuple[type["Perceptron"], tuple[()]]:
        return Perceptron, ()  # a copy belongs to another model

    def layers(self, model: nn.Module) -> list[Layer] | str:
        """The layers in their order, or why the model is no perceptron."""
        if model is self._model and self._is_as_it_was():
            return self._layers
        self.__init__()  # type: ignore[misc]  # which holds nothing of before
        layers = _layers_of(model)
        if not isinstance(layers, str):
            self.flattens = type(next(_working(model))) is nn.Flatten
            self._remember(model, layers)
        return layers

    def _remember(self, model: nn.Module, layers: list[Layer]) -> None:
        self._modules = modules = list(_visited(model))
        self._kinds = list[type[nn.Module]](map(type, modules))
        if not READ.keys() >= {*self._kinds}:
            return
        self._attributes = list(map(vars, modules))
        parameters = [m._parameters for m in modules if isinstance(m, LINEARS)]
        self._dicts = [*self._attributes, *parameters]
        self._dicts += [m._modules for m in modules if isinstance(m, (nn.Sequential, MLP))]
        self._hooks = [getattr(m, name) for m in modules for name in CALL_HOOKS]
        self._of_classes = [
            (kind, name, getattr(kind, name, None))
            for kind in {*self._kinds}
            for name in ("forward", "__getattr__", *READ[kind])
        ]
        self._functions = [name for kind in {*self._kinds} if (name := _function_of(kind))]
        numbers = (
            getattr(m, name) for m in modules for name in READ[type(m)] if name not in ("weight", "bias", "layers")
        )
        # A dict that is not plain, or empty, may change unnoticed; so may a number that is an object, as a tensor is.
        plain = all(type(mapping) is dict and mapping for mapping in self._dicts)
        own = all("weight" in names and "bias" in names for names in parameters)
        if plain and own and all(map(_cannot_change, numbers)):
            self._model, self._layers, self._versions = model, layers, dict_versions(self._dicts)

    def _is_as_it_was(self) -> bool:
        return (
            dict_versions(self._dicts) == self._versions
            and all(map(is_, map(vars, self._modules), self._attributes))
            and list(map(type, self._modules)) == self._kinds
            and not any(self._hooks)
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
            and all(getattr(kind, name, None) is value for kind, name, value in self._of_classes)
            and runs_in_order(nn.Sequential)
            and all(map(is_torchs, self._functions))
        )


def _function_of(kind: type[nn.Module]) -> str:
    """The function that the forward of a module of torch's calls; nothing for one of ours."""
    return "linear" if kind is nn.Linear else ACTIVATIONS.get(kind, ("",))[0]


def _visited(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that `_modules` looks at, Sequentials too."""
    yield model
    if isinstance(model, (nn.Sequential, MLP)):
        for child in model._modules.values():
            if child is not None:
                yield from _visited(child)


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


def _working(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that do something, in the order in which the model calls them."""
    return (module for module, _ in _modules(model) if type(module) is not nn.Identity)


def _layers_of(model: nn.Module) -> list[Layer] | str:
    """The layers of a perceptron in their order, or why it is none."""
    layers: list[Layer] = []
    for module, follows in _modules(model):
        kind = type(module)
        if not runs_forward_alone(module):
            return f"a {kind.__name__} has hooks, or a forward of its own"
        if (function := _function_of(kind)) and not is_torchs(function):
            return f"something else stands in the place of torch's {function}"
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
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
            return f"it has a {module}"
        elif kind not in (MLP, nn.Identity, nn.Flatten):
            return f"it has a {full_name(module)}"
    return layers or "it has no linear layer"
