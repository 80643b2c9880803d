"""Who takes part in a comparison of optimizer steps, at work, and whether their results are right."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tribp import optim

from .autograd import TOLERANCE
from .registry import Reference
from .step_cases import StepCase

LR = 1e-2
STEPS = 3  # that are checked
SCALE = 1024.0  # a GradScaler's, in the check; 1 while timing, which unscales the same gradients again and again
WHOLE = 1 << 27  # elements up to which all of them are checked; of larger tensors both ends and a spread

Groups = list[dict[str, Any]]
Make = Callable[..., torch.optim.Optimizer]  # of parameter groups, and of capturable where a CUDA graph is to hold it


def contenders(case: StepCase, compiled: str = "") -> dict[str, Make | str]:
    """What makes each optimizer; in place of one that is left out, a sentence. compiled: why `compile` is."""
    found: dict[str, Make | str] = {"tribp": _ours(case), "for-loop": _torchs(case, foreach=False)}
    found["foreach"] = _torchs(case, foreach=True)
    fused = case.optimizer != "RMSprop"
    found["fused"] = _torchs(case, fused=True) if fused else "torch has no fused RMSprop"
    found["compile"] = compiled or _torchs(case)
    found["apex"] = _apex(case)
    found["bitsandbytes"] = _bitsandbytes(case)
    lacking = [key for key in ("state_dtype", "stochastic_rounding") if key in case.beyond]
    if lacking:
        for name in ("for-loop", "foreach", "fused", "compile"):
            found[name] = f"torch has no {' and no '.join(lacking)}"
    return found


def _ours(case: StepCase) -> Make:
    fixed = {"lr": LR, **case.options, **case.beyond} | ({"fused": True} if case.scaler else {})
    return lambda groups, **more: getattr(optim, case.optimizer)(groups, **fixed, **more)


def _torchs(case: StepCase, **how: bool) -> Make:
    def make(groups: Groups, capturable: bool = False) -> torch.optim.Optimizer:
        has = case.optimizer in ("Adam", "RMSprop")
        more = {"capturable": True} if capturable and has else {}
        found: torch.optim.Optimizer = getattr(torch.optim, case.optimizer)(groups, LR, **case.options, **how, **more)
        return found

    return make


def _apex(case: StepCase) -> Make | str:
    name = {"Adam": "FusedAdam", "SGD": "FusedSGD", "Adagrad": "FusedAdagrad"}.get(case.optimizer)
    if name is None or case.scaler or set(case.options) - {"momentum"} or "stochastic_rounding" in case.beyond:
        return "apex has no such optimizer"
    if not importlib.util.find_spec("apex"):
        return "not installed"
    options = dict(case.options) | ({"adam_w_mode": False} if name == "FusedAdam" else {})

    def make(groups: Groups, capturable: bool = False) -> torch.optim.Optimizer:
        more = {"capturable": True} if capturable and name == "FusedAdam" else {}
        made: torch.optim.Optimizer = getattr(importlib.import_module("apex.optimizers"), name)(
            groups, lr=LR, **options, **more
        )
        return made

    return make


def _bitsandbytes(case: StepCase) -> Make | str:
    if case.scaler or case.beyond or set(case.options) - {"momentum"} or (case.optimizer == "SGD" and not case.options):
        return "bitsandbytes has no such optimizer"
    if not importlib.util.find_spec("bitsandbytes"):
        return "not installed"

    def make(groups: Groups, capturable: bool = False) -> torch.optim.Optimizer:
        module = importlib.import_module("bitsandbytes.optim")
        made: torch.optim.Optimizer = getattr(module, f"{case.optimizer}32bit")(groups, lr=LR, **case.options)
        return made

    return make


class Job:
    """A contender with parameters and gradients of its own, the same for all contenders."""

    def __init__(self, case: StepCase, name: str, make: Make, device: torch.device, **more: bool) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        self.params = [
            Parameter(torch.empty(shape, dtype=case.dtype, device=device).normal_(0, 0.1, generator=generator))
            for shape in case.shapes
        ]
        self.grads = [torch.empty_like(p.data) for p in self.params]
        groups = [{"params": self.params}] if case.grouped else [{"params": [p]} for p in self.params]
        self.optimizer: Any = make(groups, **more)
        self._scale, self._found_inf = torch.ones((), device=device), torch.zeros((), device=device)
        self._separately = self.optimizer.step if name != "compile" else torch.compile(self.optimizer.step)
        self._fused = name in ("tribp", "fused")
        self._clips = case.clip is not None and name != "tribp"

    def gradients(self, step: int, scale: float = 1.0) -> None:
        """Those of a step, which are the same each time."""
        generator = torch.Generator(self.device).manual_seed(step)
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad.normal_(generator=generator).mul_(scale)
        self._scale.fill_(scale)

    def renew(self) -> None:
        """Gradients as a backward pass leaves them: new tensors."""
        for p in self.params:
            p.grad = None
        torch.autograd.backward(self.params, self.grads)

    def step(self) -> None:
        """All that a training loop does between the backward pass and the next forward one."""
        if self.case.scaler:
            if self._fused:
                self.optimizer.grad_scale, self.optimizer.found_inf = self._scale, self._found_inf
            else:
                grads = [p.grad for p in self.params]
                inverse = self._scale.reciprocal()
                torch._amp_foreach_non_finite_check_and_unscale_(grads, self._found_inf, inverse)  # type: ignore[arg-type]
                if self._found_inf.item():
                    return
        if self._clips:
            assert self.case.clip is not None
            torch.nn.utils.clip_grad_norm_(self.params, self.case.clip)
        self._separately()

    def moments(self) -> dict[str, list[Tensor]]:
        """The states that are as large as their parameters, by name."""
        states = [self.optimizer.state[p] for p in self.params]
        names = [
            name
            for name, value in states[0].items()
            if isinstance(value, Tensor) and value.shape == self.params[0].shape
        ]
        return {name: [state[name] for state in states] for name in names}

    def bytes(self) -> int:
        """The least that a step moves: all read once, and what changes written once."""
        grad = (1 + self.case.scaler + (self.case.clip is not None)) * sum(map(_bytes, self.grads))
        changed = [*self.params, *(t for moment in self.moments().values() for t in moment)]
        return 2 * sum(map(_bytes, changed)) + grad


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Problem:
    """The results of STEPS steps: the parameters, and every state by its name, of all tensors in a row."""

    case: StepCase
    device: torch.device

    def sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """All elements, or of more than WHOLE those where a wrong offset would show."""
        flat = (
            torch.cat([t.detach().reshape(-1) for t in tensors]) if len(tensors) > 1 else tensors[0].detach().view(-1)
        )
        if len(flat) <= WHOLE:
            return flat.clone()
        return torch.cat([flat[: 1 << 20], flat[:: 997], flat[-(1 << 20) :]])  # fmt: skip

    def reference(self) -> dict[str, Reference]:
        """By the genuine class in float64. Every update is one of single elements, so that a sample will do."""
        job = Job(self.case, "for-loop", lambda groups: torch.optim.SGD(groups), self.device)
        p = Parameter(self.sample(job.params).double())
        make = _torchs(self.case, foreach=False)
        assert self.case.clip is None or self.case.elements <= WHOLE, "a norm of all gradients needs them all"
        exact = make([{"params": [p]}])
        for step in range(STEPS):
            job.gradients(step)
            p.grad = self.sample(job.grads).double()
            if self.case.clip is not None:
                torch.nn.utils.clip_grad_norm_([p], self.case.clip)
            exact.step()
        found = {"param": p.detach()}
        found |= {k: v for k, v in exact.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape}
        return {name: Reference(value, float(value.norm())) for name, value in found.items()}

    def results(self, job: Job, reference: Mapping[str, Reference]) -> dict[str, Tensor]:
        for step in range(STEPS):
            job.gradients(step, SCALE if self.case.scaler else 1.0)
            job.step()
        found = {"param": self.sample(job.params)}
        return found | {name: self.sample(value) for name, value in job.moments().items() if name in reference}

    def wrong(self, found: Mapping[str, float], yardstick: Mapping[str, float]) -> str:
        """What is wrong with results of these errors, or nothing; yardstick: the errors of torch's for-loop.

        One rounding of the type a step, or twice torch's error where that is a little more; not where it is much more,
        for then the comparison is at fault. Rounding at random goes up to a whole unit in the last place, not half.
        """
        wide = self.case.beyond.get("state_dtype", self.case.dtype)
        for name, error in found.items():
            limit = TOLERANCE[self.case.dtype if name == "param" else wide]
            if name == "param" and "stochastic_rounding" in self.case.beyond:
                limit *= 2
            bound = max(limit, min(2 * yardstick.get(name, 0.0), 4 * limit))
            if not error <= bound:
                return f"{name}: relative error {error:.2e}, allowed {bound:.2e}"
        return ""
