"""What the optimizers are tested on: classes, options, awkward layouts, and runs beside the genuine classes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tribp.optim

from . import oracle as optim_oracle

Options = dict[str, Any]
Genuine = torch.optim.Optimizer


def genuine(name: str, params: Any, **options: Any) -> Genuine:
    """torch's own class, as a loop over the parameters; `Momentum` is its SGD."""
    if name == "Momentum":
        beta = options.pop("beta", 0.9)
        options = {"momentum": beta, "dampening": beta, **options}
    kind: Any = getattr(torch.optim, "SGD" if name == "Momentum" else name)
    return kind(params, **{"foreach": False, **options})  # type: ignore[no-any-return]


def ours(name: str, params: Any, **options: Any) -> tribp.optim.optimizer.Optimizer:
    kind: Any = getattr(tribp.optim, name)
    return kind(params, **options)  # type: ignore[no-any-return]


CLASSES = (
    "SGD", "Momentum", "RMSprop", "Adagrad", "Adam", "AdamW", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD",
)  # fmt: skip
TORCHS = tuple(name for name in CLASSES if name != "Momentum")
FUSED = ("SGD", "Momentum", "Adagrad", "Adam", "AdamW")  # in torch too
# Steps of many units in the last place even of bfloat16, and an ε that matters: a wrong one is seen.
NUMBERS: dict[str, Options] = {
    "SGD": dict(lr=0.2),
    "Momentum": dict(lr=0.2),
    "RMSprop": dict(lr=0.05, eps=1e-2),
    "Adagrad": dict(lr=0.2, eps=1e-2),
    "Adam": dict(lr=0.1, eps=1e-2),
    "AdamW": dict(lr=0.1, eps=1e-2, weight_decay=0.0),
    "Adadelta": dict(lr=1.0, eps=1e-2),
    "Adamax": dict(lr=0.1, eps=1e-2),
    "NAdam": dict(lr=0.1, eps=1e-2),
    "RAdam": dict(lr=0.1, eps=1e-2),
    "Rprop": dict(lr=0.2),
    "ASGD": dict(lr=0.2),
}
_OWN: dict[str, list[Options]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    "Momentum": [{}],
    "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}],
    "Adagrad": [
        {}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.3}, {"lr_decay": 0.1, "initial_accumulator_value": 0.3},
    ],
    "Adam": [
        {}, {"amsgrad": True}, {"decoupled_weight_decay": True}, {"amsgrad": True, "decoupled_weight_decay": True},
    ],
    "AdamW": [{}, {"amsgrad": True}],
    "Adadelta": [{}],
    "Adamax": [{}],
    "NAdam": [{}, {"momentum_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{}, {"betas": (0.8, 0.95), "decoupled_weight_decay": True}],
    "Rprop": [{}, {"etas": (0.3, 1.7), "step_sizes": (0.15, 0.3)}],
    "ASGD": [{}, {"lambd": 0.1, "alpha": 0.6, "t0": 0.0}],
}  # fmt: skip
# Steps that a trial begins after: RAdam has no second moment in its first five.
BEGUN = {"RAdam": 4}
# torch 2.13's own Adagrad makes states for groups that are added late, 2.11's raises KeyError.
LATE_ADAGRAD = "full_like" in torch.optim.Adagrad._init_group.__code__.co_names
VARIANTS = [(name, own) for name in CLASSES for own in _OWN[name]]
# What any class may be asked for: (weight_decay, maximize, whether hyperparameters are tensors).
COMMON = list(itertools.product([0.0, 0.1], [False, True], [False, True]))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def title(variant: tuple[str, Options]) -> str:
    return "-".join([variant[0], *variant[1]])


def common(name: str, decay: float, maximize: bool, as_tensors: bool) -> Options:
    """Options of a group. Tensors hold float32 numbers; in what type, makes no difference then."""
    options: Options = {"weight_decay": decay, "maximize": maximize}
    if as_tensors:
        options["lr"] = torch.tensor(NUMBERS[name]["lr"]).double()
        if name in ("Adam", "AdamW"):
            options["betas"] = (torch.tensor(0.875).double(), torch.tensor(0.996).double())
    return options


def own_tensors(options: Options) -> Options:
    """The same options, sharing no tensor."""

    def copy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(copy, value))
        return value.clone() if isinstance(value, Tensor) else value

    return {key: copy(value) for key, value in options.items()}


# ---- layouts: the same values, lying in memory in different ways

Layout = Callable[[Tensor], Tensor]


def plain(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def channels_last(x: Tensor) -> Tensor:
    return plain(x).contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.detach().mT.clone(memory_format=torch.contiguous_format).mT


def permuted(x: Tensor) -> Tensor:
    return x.detach().permute(2, 0, 3, 1).clone(memory_format=torch.contiguous_format).permute(1, 3, 0, 2)


def gaps(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7.0)
    wide[..., ::2] = x.detach()
    return wide[..., ::2]


def shifted(x: Tensor) -> Tensor:
    """One element past an aligned address."""
    longer = x.new_full((x.numel() + 1,), 7.0)
    longer[1:] = x.detach().flatten()
    return longer[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    """As `sum().backward()` leaves a gradient: one element for all."""
    return x.detach().flatten()[:1].clone().reshape((1,) * x.dim()).expand(x.shape)


# Shape, the parameter's layout, the gradient's. One program each; the first has a full block and a rest.
LAYOUTS: dict[str, tuple[tuple[int, ...], Layout, Layout]] = {
    "block and rest": ((67,), plain, plain),
    "channels_last": ((2, 3, 2, 2), channels_last, channels_last),
    "channels_last, contiguous gradient": ((2, 3, 2, 2), channels_last, plain),
    "contiguous, channels_last gradient": ((2, 3, 2, 2), plain, channels_last),
    "transposed": ((3, 5), transposed, transposed),
    "transposed, contiguous gradient": ((3, 5), transposed, plain),
    "permuted, gradient with gaps": ((2, 3, 2, 3), permuted, gaps),
    "gaps": ((4, 3), gaps, gaps),
    "gaps, contiguous gradient": ((4, 3), gaps, plain),
    "misaligned": ((13,), shifted, shifted),
    "misaligned gradient": ((66,), plain, shifted),
    "expanded gradient": ((3, 4), plain, expanded),
    "0-d": ((), plain, plain),
    "empty": ((0, 3), plain, plain),
}


def values(shape: Sequence[int], dtype: torch.dtype, seed: int, *labels: object) -> Tensor:
    """Random numbers that depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(seed * 7919 + sum(map(ord, repr(labels))))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), dtype=wide, generator=generator).to(dtype)


# ---- the genuine class beside ours


class Trial:
    """The same steps by tribp, by the genuine class in the same type, and by the genuine class in float64.

    Of float64 itself also in long double, where that is wider: no float64 result tells which of two others is better.
    """

    def __init__(self, name: str, own: Options, groups: Sequence[tuple[Options, Sequence[Tensor]]]) -> None:
        options = NUMBERS[name] | own
        self.params = [p for _, params in groups for p in params]
        self.torchs = [plain(p.cpu()) for p in self.params]
        self.exact = [plain(p).to(torch.promote_types(p.dtype, torch.float64)) for p in self.torchs]

        def split(tensors: list[Tensor]) -> list[Options]:
            rest = iter(tensors)
            return [{"params": list(itertools.islice(rest, len(p))), **own_tensors(o)} for o, p in groups]

        self.runs: list[tuple[list[Tensor], Genuine]] = [
            (self.params, ours(name, split(self.params), **options)),
            (self.torchs, genuine(name, split(self.torchs), **options)),
            (self.exact, genuine(name, split(self.exact), **options)),
        ]
        begun = BEGUN.get(name, 0)
        for params, optimizer in self.runs if begun else ():
            for p in params:
                state = {"step": torch.tensor(float(begun)), "exp_avg": torch.zeros_like(p)}
                optimizer.state[p] = state | {"exp_avg_sq": torch.zeros_like(p)}
        self._options = [group for group in self.runs[2][1].param_groups for _ in group["params"]]
        self._wide = {
            i: optim_oracle.Steps(name, self.torchs[i], options, begun)
            for i, options in enumerate(self._options)
            if optim_oracle.IS_WIDER and self.params[i].dtype == torch.float64
        }
        # The same after one rounding of βᵗ in RAdam: in that number alone, torch's own error is luck.
        self._rounded = {
            i: optim_oracle.Steps(name, self.torchs[i], self._options[i], begun, 2.0**-53)
            for i in (self._wide if name == "RAdam" else ())
        }
        self._peaks: dict[tuple[int, str], Tensor] = {}
        self._note()

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for i, steps in (*self._wide.items(), *self._rounded.items()):
            if (grad := grads[i]) is not None:
                steps.step(grad.cpu(), self._options[i])
        for params, optimizer in self.runs:
            for p, g in zip(params, grads, strict=True):
                p.grad = g if g is None or params is self.params else plain(g.cpu()).to(p.dtype)
            optimizer.step()
        self._note()

    def _note(self) -> None:
        for index, key, exact in self._found(2):
            size, peak = exact.abs(), self._peaks.get((index, key))
            if key == "ax":  # averages parameters: one that cancels to almost 0 has been rounded at the size it had
                size = torch.maximum(size, self._peaks[index, "param"])
            self._peaks[index, key] = size if peak is None else torch.maximum(peak, size)

    def _found(self, run: int) -> Iterator[tuple[int, str, Tensor]]:
        params, optimizer = self.runs[run]
        states = optimizer.state_dict()["state"]
        for index, p in enumerate(params):
            yield index, "param", _reals(p)
            for key, state in states.get(index, {}).items():
                if state is not None:
                    yield index, key, _reals(state)

    def check(self) -> None:
        """Errors against float64 are torch's own, and one unit in the last place of what the element held, at most.

        Of all elements of one type and key together: the root of their mean square, so that torch's luck in one place
        does not count against us, and the largest, which is luck in part but is not lost in the mean if it is wrong.
        Of float64, where nothing is wider, torch's own error is unknown, and granted: one unit, and two to the largest.
        """

        def off(index: int, key: str, result: Tensor, wanted: Tensor) -> Tensor:
            if (steps := self._wide.get(index)) is None:
                return (result.double() - wanted).abs()
            return torch.as_tensor(np.abs(result.numpy() - steps.values[key]).astype(np.float64))

        mine, torchs, exact = ({(i, key): value for i, key, value in self._found(run)} for run in range(3))
        assert mine.keys() == torchs.keys() == exact.keys(), "states differ from torch's"
        errors: dict[tuple[torch.dtype, str], list[tuple[int, Tensor, Tensor]]] = {}
        for (index, key), wanted in exact.items():
            result, torch_s = mine[index, key], torchs[index, key]
            assert result.dtype == torch_s.dtype, f"{key} is {result.dtype}, torch's {torch_s.dtype}"
            assert result.shape == torch_s.shape
            if key == "step":
                assert result == torch_s, f"step {result}, torch's {torch_s}"
                continue
            limits = torch.finfo(result.dtype)
            unit = limits.eps * self._peaks[index, key].clamp_min(limits.tiny)
            ours_off, torchs_off = (off(index, key, each, wanted) / unit for each in (result, torch_s))
            if (rounded := self._rounded.get(index)) is not None:
                least = np.abs(rounded.values[key] - self._wide[index].values[key])
                torchs_off = torch.maximum(torchs_off, torch.as_tensor(least.astype(np.float64)) / unit)
            errors.setdefault((result.dtype, key), []).append((index, ours_off, torchs_off))
        for (dtype, key), parts in errors.items():
            our, their = (torch.cat([part.flatten() for part in parts_]) for parts_ in _columns(parts))
            if not len(our):
                continue
            # 2²⁰ units in float64 are 2e-10: another formula would be further from torch's.
            assert their.isfinite().all(), f"{dtype} {key}: torch's own result is not finite, so it is no measure"
            assert their.max() < 2**20, f"{dtype} {key}: torch's own result is {float(their.max()):.3g} units off"
            owners = [index for index, units, _ in parts for _ in range(units.numel())]
            worst = owners[int(our.nan_to_num(torch.inf).argmax())]
            for what, of, factor in (("rms", _rms, 1), ("max", torch.max, 2)):
                granted = factor if dtype == torch.float64 and not self._wide else 0
                error, allowed = float(of(our)), factor * (float(of(their)) + granted) + 1
                assert error <= allowed, f"{dtype} {key}: {what} {error:.3g} units, over {allowed:.3g}; most in {worst}"


def _columns(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [ours for _, ours, _ in parts], [theirs for _, _, theirs in parts]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _reals(t: Tensor) -> Tensor:
    t = t.detach().cpu().resolve_conj()
    return torch.view_as_real(t) if t.is_complex() else t


class Twins:
    """tribp's optimizer and the genuine one, in float64, given the same treatment: equal but for rounding."""

    def __init__(
        self, name: str, shapes: Sequence[Sequence[int]] = ((5,), (3, 4)), device: str = "cpu", *,
        groups: Sequence[Options] | None = None, dtype: torch.dtype = torch.float64, mine: Options | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        """groups: options of as many groups, the shapes dealt out among them. mine: what only tribp's gets."""
        options = NUMBERS[name] | options
        self.name, self.device, self.time = name, device, 0
        self.rtol, self.atol = 1e-12, 1e-13
        self.params = [values(s, dtype, 1, i).to(device) for i, s in enumerate(shapes)]
        self.twins = [plain(p.cpu()) for p in self.params]

        def split(params: list[Tensor]) -> list[Options]:
            parts = groups or [{}]
            return [{"params": params[i :: len(parts)], **own_tensors(o)} for i, o in enumerate(parts)]

        self.ours: Any = ours(name, split(self.params), **own_tensors(options), **(mine or {}))
        self.genuine: Any = genuine(name, split(self.twins), **own_tensors(options))
        self.both = [(self.ours, self.params), (self.genuine, self.twins)]

    def grads(self, *present: int) -> list[Tensor | None]:
        """New gradients, of these parameters only; of all of them by default."""
        self.time += 1
        return [
            values(p.shape, p.dtype, 2 + self.time, i) if i in present or not present else None
            for i, p in enumerate(self.twins)
        ]

    def give(self, grads: Sequence[Tensor | None], layout: Layout = plain) -> None:
        for (p, twin), g in zip(zip(self.params, self.twins, strict=True), grads, strict=True):
            twin.grad = None if g is None else g.clone()
            p.grad = None if g is None else layout(g.to(p.device, p.dtype))

    def step(self, *present: int) -> None:
        self.give(self.grads(*present))
        for optimizer, _ in self.both:
            optimizer.step()
        self.check()

    def add(self, shape: Sequence[int], **options: Any) -> None:
        p = values(shape, self.twins[0].dtype, 1, len(self.params)).to(self.device)
        self.params.append(p)
        self.twins.append(plain(p.cpu()))
        for optimizer, params in self.both:
            optimizer.add_param_group({"params": [params[-1]], **own_tensors(options)})

    def each(self, change: Callable[[Any], object]) -> None:
        """The same change to either optimizer."""
        for optimizer, _ in self.both:
            change(optimizer)

    def check(self, rtol: float | None = None, atol: float | None = None) -> None:
        """Rounding in another order is a thousand times less than the bound, any other difference far more."""
        rtol, atol = rtol or self.rtol, atol or self.atol

        def same(result: Tensor, twin: Tensor, what: str) -> None:
            # Zeros of either sign are alike, dtypes not: a state of another type is another checkpoint.
            torch.testing.assert_close(
                result.detach().cpu(), twin.detach(), rtol=rtol, atol=atol, equal_nan=True,
                msg=lambda text: f"{what}: {text}",
            )  # fmt: skip

        for i, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            same(p, twin, f"parameter {i}")
        mine, theirs = (optimizer.state_dict()["state"] for optimizer, _ in self.both)
        assert mine.keys() == theirs.keys(), f"states of {mine.keys()}, torch's of {theirs.keys()}"
        for i, state in theirs.items():
            assert mine[i].keys() == state.keys(), f"{mine[i].keys()} of {i}, torch has {state.keys()}"
            for key, value in state.items():
                if isinstance(value, Tensor):
                    same(mine[i][key], value, f"{key} of {i}")


# ---- what happens while training

# With momentum and the like: their states are what late gradients and new groups can get wrong.
LIVELY: dict[str, Options] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "Momentum": {},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "Adadelta": {"weight_decay": 0.1},
    "Adamax": {"weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1, "momentum_decay": 0.1},
    "RAdam": {"weight_decay": 0.1},
    "Rprop": {"step_sizes": (0.1, 0.5)},
    "ASGD": {"weight_decay": 0.1, "lambd": 0.1, "t0": 0.0},
}


each_class = pytest.mark.parametrize("name", CLASSES)


def lively(name: str, device: str, **options: Any) -> Twins:
    return Twins(name, device=device, **{**LIVELY[name], **options})


def moved(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """`p.data = …`, with the old memory overwritten: a stale pointer reads or writes what nobody looks at."""

    def apply(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                old = p.data
                p.data = change(old)
                old.fill_(torch.nan)

    return apply


def transposed_if_2d(x: Tensor) -> Tensor:
    return transposed(x) if x.dim() == 2 else plain(x)
