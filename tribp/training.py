"""A training step as one call: forward, loss, backward, update; for a small perceptron in a few kernel launches."""

from collections.abc import Callable, Sequence
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import dispatch
from .footprint import layout_guard
from .fusion.perceptron import Perceptron
from .nn import runs_forward_alone
from .ops.mlp.reference import Layer
from .ops.shared import import_plan, uses_tf32
from .ops.train_step.config import TrainProblem
from .ops.train_step.graphs import StepGraphs

__all__ = ["TrainStep", "train_step"]

Loss = Callable[..., Tensor]
_IS_LEAF = attrgetter("is_leaf")
MODULE_REDUCTIONS = ("mean", "sum")  # what torch's modules of these losses reduce by, to a number
REDUCTIONS = (*MODULE_REDUCTIONS, "batchmean")


def half_squared_error(output: Tensor, target: Tensor, reduction: str = "sum") -> Tensor:
    """½ (output − target)², summed or averaged over all elements."""
    return 0.5 * F.mse_loss(output, target, reduction=reduction)


# By their names; those of torch are called as `torch.nn.functional` calls them.
LOSSES: dict[str, Loss] = {
    "half_squared_error": half_squared_error,
    "mse_loss": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy,
}


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: str | Loss, reduction: str | None = None,
    *, cuda_graph: bool = False,
) -> "TrainStep":  # fmt: skip
    """A function that trains `model` on one batch: `step(input, target)` returns the loss before the update.

        step = tribp.train_step(model, optimizer, "cross_entropy")
        for input, target in batches:
            loss = step(input, target)

    It computes what `optimizer.zero_grad(); loss(model(input), target).backward(); optimizer.step()` computes, to
    rounding. Where Triton's kernels run and the model is a small perceptron, forward and backward take two launches, or
    three with a large first layer, and the update takes the optimizer's one. Otherwise the step is done the ordinary
    way, by the model, autograd and the optimizer; the attribute `reason` of what is returned says why. Gradients are in
    `.grad` afterwards; the kernels write them into the tensors of the step before.

    Args:
        model: for the kernels an `MLP`, or an `nn.Sequential` of linear layers (torch's, tribp's) and activations
            that `tribp.linear` knows, behind an `nn.Flatten()` or not: up to 8 layers of up to 256 outputs (of float64
            128), weights above the first layer of up to 1 MiB, on batches of up to 1,024 rows. Any other is trained the
            ordinary way.
        optimizer: torch's or tribp's; its hooks and schedulers work.
        loss: "mse_loss", "cross_entropy" (of classes, int64 `(N,)`) or "binary_cross_entropy" (of outputs between 0 and
            1), with torch's values, or torch's module or function of these three; or "half_squared_error", which is
            ½ (output − target)², averaged over all elements unless `reduction` says otherwise. With any other function
            of output and target the model is trained the ordinary way. Where torch raises an error, because a target is
            no class, or a target or an output of binary_cross_entropy lies outside of 0 to 1, the kernels make the loss
            NaN, and that row or element adds nothing to the gradients.
        reduction: of a loss that is a name: "mean" (the default) of all elements (of cross_entropy: of rows whose
            target is not −100), their "sum", or "batchmean", the sum by the number of rows (cross_entropy: the mean).
        cuda_graph: whether to capture the launches, the update's included, in a CUDA graph when a step has the tensors
            and options of the one before, and to replay it until an address or an option changes. An `lr` that changes
            at every step must be a tensor on the device. Gradients are then the same tensors in every step.

    Raises:
        TypeError: model is no module, optimizer no optimizer, loss neither a name nor a function.
        ValueError: a name that is not known; a reduction of a loss that is no name; LBFGS; cuda_graph with an optimizer
            that is not `capturable`.
    """
    return TrainStep(model, optimizer, loss, reduction, cuda_graph=cuda_graph)


# Modules that compute a loss of LOSSES, and what must be as it is by default.
LOSS_MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse_loss",
    nn.BCELoss: "binary_cross_entropy",
}
LOSS_DEFAULTS = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}


def _known_loss(loss: str | Loss, reduction: str) -> tuple[str, str] | None:
    """The name of a loss in LOSSES and its reduction, as it is now; None of any other."""
    if isinstance(loss, str):
        return loss, reduction
    if isinstance(loss, nn.Module):
        plain = type(loss) in LOSS_MODULES and runs_forward_alone(loss) and loss.reduction in MODULE_REDUCTIONS
        usual = plain and all(getattr(loss, name, value) == value for name, value in LOSS_DEFAULTS.items())
        return (LOSS_MODULES[type(loss)], str(loss.reduction)) if usual else None
    name = next((name for name in LOSS_MODULES.values() if LOSSES[name] is loss), None)  # it may have no hash
    return (name, "mean") if name else None


class CheckedCall:
    """Tensors that a training step takes, and whether those of another call are like them."""

    def __init__(self) -> None:
        self._loss, self._parameters = "", list[Tensor]()
        self._same_layouts: Callable[[Sequence[Tensor]], bool] | None = None

    def __reduce__(self) -> tuple[type["CheckedCall"], tuple[()]]:
        return CheckedCall, ()  # a copy trains other parameters

    def are_alike(self, loss: str, tensors: list[Tensor]) -> bool:
        """Whether the parameters are the same objects, still leaves, and all tensors are of the same kind."""
        parameters = tensors[2:]
        return (
            self._same_layouts is not None
            and loss == self._loss
            and len(parameters) == len(self._parameters)
            and all(map(is_, parameters, self._parameters))
            and all(map(_IS_LEAF, parameters))
            and self._same_layouts(tensors)
        )

    def remember(self, loss: str, tensors: list[Tensor]) -> None:
        self._loss, self._parameters, self._same_layouts = loss, tensors[2:], layout_guard(tensors)


class TrainStep:
    """What `train_step` returns. `reason` says why the last call did not use the kernels of a step; None if it did."""

    reason: str | None = "no call was made"

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: str | Loss, reduction: str | None = None,
        *, cuda_graph: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"train_step: model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"train_step: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("train_step: LBFGS evaluates the model several times a step; call its step(closure)")
        if isinstance(loss, type) or not (isinstance(loss, str) or callable(loss)):
            raise TypeError(f"train_step: loss must be a name or a function, got {loss!r}")
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"train_step: loss must be a function or one of {', '.join(LOSSES)}, got {loss!r}")
        if reduction is not None and (reduction not in REDUCTIONS or not isinstance(loss, str)):
            raise ValueError(
                f"train_step: reduction must be one of {', '.join(REDUCTIONS)}, for a loss that is a name, got "
                f"{reduction!r}"
            )
        if cuda_graph and not all(group.get("capturable") for group in optimizer.param_groups):
            raise ValueError(
                f"train_step: cuda_graph=True needs capturable=True in every group of {type(optimizer).__name__}; each "
                "class of tribp.optim takes it"
            )
        self.model, self.optimizer, self.loss, self.reduction = model, optimizer, loss, reduction or "mean"
        self._graphs = StepGraphs() if cuda_graph else None
        self._perceptron, self._checked_call = Perceptron(), CheckedCall()
        self._grads: dict[int, Tensor] = {}  # by parameter, what the last step wrote

    def __repr__(self) -> str:
        outcome = "fused" if self.reason is None else self.reason
        return f"train_step({type(self.model).__name__}, {type(self.optimizer).__name__}, {self.loss!r}): {outcome}"

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        named = _known_loss(self.loss, self.reduction)
        layers = self._layers(input, target, named[0]) if named else "the kernels do not compute this loss function"
        self.reason = layers if isinstance(layers, str) else None
        if isinstance(layers, str) or named is None:
            return self._ordinary(input, target)
        trained = self._prepare_gradients(layers)
        increment_version([*self._grads.values(), *trained])  # what autograd keeps of them must not be taken for theirs

        def step(input: Tensor, target: Tensor) -> Tensor:
            value = self._by_kernels(input, target, layers, *named)
            self.optimizer.step()
            return value

        if self._graphs is None:
            return step(input, target)
        grads = [(key, grad.data_ptr()) for key, grad in self._grads.items()]
        addresses = [(t.data_ptr(), t.shape) for layer in layers for t in layer[:2] if t is not None]
        facts = grads, addresses, [layer.activation for layer in layers]
        return self._graphs(self.optimizer, step, input, target, (*named, uses_tf32(input)), facts)

    @property
    def graph_reason(self) -> str | None:
        """Why the last call was no replay of a CUDA graph; None if it was."""
        if self._graphs is None:
            return "cuda_graph is off"
        return self.reason or self._graphs.reason

    def _ordinary(self, input: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        value = self._value(self.model(input), target)
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return value.detach()

    def _value(self, output: Tensor, target: Tensor) -> Tensor:
        if not isinstance(self.loss, str):
            return self.loss(output, target)
        loss = LOSSES[self.loss]
        if self.reduction != "batchmean":
            return loss(output, target, reduction=self.reduction)
        if self.loss == "cross_entropy":
            return loss(output, target, reduction="mean")
        return loss(output, target, reduction="sum") / len(output)

    def _layers(self, input: Tensor, target: Tensor, loss: str) -> list[Layer] | str:
        """The model's layers, or why these tensors, or this model, take the ordinary way."""
        if any(not isinstance(t, Tensor) for t in (input, target)):
            return "input and target must be tensors"
        if dispatch.needs_operator() or dispatch.kernels_cannot_read(input, target):
            return "kernels do not run under torch.compile, modes and transforms, or on such tensors"
        if torch.is_anomaly_enabled() or _function_mode():
            return "anomaly detection is on, or a mode for torch's functions (TorchFunctionMode) is active"
        if dispatch.backend_of(input) != "triton":
            return "Triton's kernels do not run here"
        if dispatch.autocasting(input.device.type):
            return "autocast is on"
        if not torch.is_grad_enabled() or input.requires_grad or target.requires_grad:
            return "gradients are disabled, or the input or target requires one"
        layers = self._perceptron.layers(self.model)
        if isinstance(layers, str):
            self._checked_call = CheckedCall()
            return layers
        parameters = [t for layer in layers for t in layer[:2] if t is not None]
        trained = {id(p) for p in parameters if p.requires_grad}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not trained or not trained <= held:
            return "no parameter requires a gradient, or one that does is not the optimizer's"
        if getattr(self.optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
            return "the optimizer has a zero_grad of its own"
        if any(map(_has_hooks, parameters)):
            return "a parameter has hooks"
        if any(map(_has_gradients_of_another_type, parameters)):
            return "a parameter's gradients are of another type than it is"
        tensors = [input, target, *parameters]
        if self._checked_call.are_alike(loss, tensors):
            return layers
        misfit = self._misfit(self._rows(input), target, layers, parameters, loss)
        if misfit is None:
            self._checked_call.remember(loss, tensors)
        return misfit or layers

    def _rows(self, input: Tensor) -> Tensor:
        """What the first layer takes: a row for each sample."""
        return input.flatten(1) if self._perceptron.flattens and input.dim() > 2 else input

    def _misfit(
        self, input: Tensor, target: Tensor, layers: list[Layer], parameters: list[Tensor], loss: str
    ) -> str | None:
        """Why the kernels don't take these tensors. What is wrong with them torch says, in the ordinary way."""
        if len({id(p) for p in parameters}) != len(parameters):
            return "layers share parameters"
        if dispatch.kernels_cannot_read(*parameters):
            return "a parameter is no plain tensor"
        if not all(p.is_contiguous() and p.is_leaf for p in parameters):
            return "a parameter is not contiguous, or is not a leaf"
        sizes = [input.shape[-1] if input.dim() else 0]
        for layer in layers:
            n, k = layer.weight.shape
            if k != sizes[-1] or (layer.bias is not None and layer.bias.shape != (n,)):
                return "shapes of layers do not fit together"
            sizes.append(n)
        if input.dim() != 2 or 0 in (*input.shape, *sizes):
            return "the input does not have two dimensions, or a size is 0"
        classes = loss == "cross_entropy"
        if target.shape != (input.shape[:1] if classes else (len(input), sizes[-1])):
            return "the target has another shape"
        kinds = {p.dtype for p in parameters} | ({input.dtype} if classes else {input.dtype, target.dtype})
        if kinds != {input.dtype} or (classes and target.dtype != torch.int64):
            return "dtypes differ, or the targets of cross_entropy are not int64"
        if input.dtype not in dispatch.FLOATS or {t.device for t in (target, *parameters)} != {input.device}:
            return "a dtype that kernels do not take, or several devices"
        if max(input.numel(), len(input) * max(sizes)) >= 2**31:
            return "the batch is too large: its elements are counted in 32 bits"
        arch = dispatch.arch_of(input.device.index)
        return TrainProblem(len(input), tuple(sizes), dispatch.dtype_name(input.dtype), arch).obstacle()

    def _prepare_gradients(self, layers: list[Layer]) -> list[Tensor]:
        """Set each trained parameter's `p.grad` to the tensor that kernels write, the optimizer's other ones' to None.

        Returns the trained parameters.
        """
        trained = {id(t): t for layer in layers for t in layer[:2] if t is not None and t.requires_grad}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in trained:
                    p.grad = None
        self._grads = {key: self._grad_of(p) for key, p in trained.items()}
        return list(trained.values())

    def _by_kernels(self, input: Tensor, target: Tensor, layers: list[Layer], loss: str, reduction: str) -> Tensor:
        """The loss; leaves the gradients where `backward` would."""
        perform, plan = import_plan("train_step")
        value = torch.empty((), dtype=input.dtype, device=input.device)
        tensors: list[Tensor | None] = [self._rows(input.detach()), target.detach(), value]
        for w, b, _ in layers:
            tensors += [w, b, self._grads.get(id(w)), self._grads.get(id(b))]
        acts = tuple(layer.activation for layer in layers)
        facts = dict(activations=acts, kind=loss, reduction=reduction, tf32=uses_tf32(input))
        with torch.no_grad():
            perform(plan.train, tensors, **facts)
        return value

    def _grad_of(self, p: Tensor) -> Tensor:
        """The tensor for a parameter's gradient: the last step's, or a new one where the gradient is anything else.

        So nobody else's gradient is overwritten. With CUDA graphs the last step's also stands in for a missing one.
        """
        last = self._grads.get(id(p))
        grad = last if p.grad is None and self._graphs is not None else p.grad
        if grad is None or grad is not last or grad.requires_grad or not _has_layout_of(grad, p):
            grad = torch.empty_like(p, memory_format=torch.contiguous_format).detach()
        if p.grad is not grad:
            p.grad = grad
        return grad


def _has_layout_of(grad: Tensor, p: Tensor) -> bool:
    return grad.stride() == p.stride() and grad.shape == p.shape and grad.dtype is p.dtype and grad.device == p.device


def _function_mode() -> bool:
    """Whether somebody's mode sees the functions that are called; that of `torch.set_default_device` aside."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def _has_hooks(p: Tensor) -> bool:
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


def _has_gradients_of_another_type(p: Tensor) -> bool:
    """Whether autograd is told to turn gradients into another type: newer torch's `grad_dtype`, which leaves have."""
    return p.is_leaf and getattr(p, "grad_dtype", None) not in (None, p.dtype)
