"""How a case of each kernel family is computed, and how far its results may be from float64's.

A case is data. `wrong()` computes it with whatever runs the kernels, and says in words what is wrong with the results.
`processors` is how many the GPU has for a case: few, so that the launch rules give small shapes the tiles, splits and
persistent programs of large ones.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tribp

from ..conv3x3 import cases as conv3x3_cases
from ..optim import cases as optim_cases
from ..oracle import LinearSigmoid

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
Layout = Callable[[Tensor], Tensor]


# ---- how far a result may be from float64's


class Rounding(NamedTuple):
    """What the number formats cost, relative to a number (`unit`) or to the root of the sum of squared terms."""

    dtype: torch.dtype
    tf32: bool = False

    @property
    def unit(self) -> float:
        """Of one rounding to the type, at most."""
        return float(torch.finfo(self.dtype).eps) / 2

    def sum_of(self, terms: int, rounded: bool = False) -> float:
        """Of a sum of products. rounded: one factor of each was rounded to the type on its way into the product.

        Tensor cores cut a float32 sum after every instruction: an error of 2⁻²³ of the sum so far, which of terms of
        either sign is as large as the root of their squares. The errors of rounded factors are independent of each
        other: their root mean square is a third of their bound, at most, and nothing lies nine of them out.
        """
        accumulator = 2.0**-52 if self.dtype == DOUBLE else 2.0**-23
        factors = 3 * self.unit * rounded + 3 * 2.0**-11 * self.tf32
        return (terms + 8) * accumulator + factors


def differences(name: str, result: Tensor, exact: Tensor, bound: Tensor) -> list[str]:
    """What is wrong if an element of `result` is further from `exact` than `bound` says: how many, where, the worst.

    A few of the type's smallest steps are granted: what is rounded to them loses more than a part of itself.
    """
    bound = bound + 4 * torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    result = result.detach().double()
    if result.shape != exact.shape:
        return [f"{name} has the shape {tuple(result.shape)}, not {tuple(exact.shape)}"]
    off = (result - exact).abs()
    wrong = ~(off <= bound)  # also what is not a number
    if not wrong.any():
        return []
    excess = (off / bound).nan_to_num(math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    box = ", ".join(f"{int(i.min())}…{int(i.max())}" for i in wrong.nonzero(as_tuple=True))
    return [
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, at [{box}] of {list(result.shape)}; "
        f"{name}{list(worst)} is {float(result[worst]):.9g}, not {float(exact[worst]):.9g}: {float(excess[worst]):.3g} "
        "times as far off as rounding explains"
    ]


class Gradients(NamedTuple):
    """Exact gradients of x, w and b, and how far off each may be besides its own rounding."""

    x: tuple[Tensor, Tensor]
    w: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]

    def differences(self, found: dict[str, Tensor], rounding: Rounding) -> list[str]:
        wrong = []
        for name, result in found.items():
            exact, error = getattr(self, name)
            wrong += differences(f"d{name}", result, exact, rounding.unit * exact.abs() + error)
        return wrong


def require_gradients(needs: str, x: Tensor, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """Of these tensors, those whose letters are in `needs`."""
    inputs = {name: t for name, t in (("x", x), ("w", w), ("b", b)) if t is not None and name in needs}
    for t in inputs.values():
        t.requires_grad_()
    return inputs


def gradients(y: Tensor, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(y, list(inputs.values()), dy) if inputs else ()
    return dict(zip(inputs, found, strict=True))


# ---- σ(x·wᵀ + b)


def expanded(t: Tensor) -> Tensor:
    """As `y.sum().backward()` leaves a gradient."""
    return t.detach().flatten()[:1].reshape(1, 1).expand(t.shape)


class Linear(NamedTuple):
    size: tuple[int, int, int]  # M, N, K
    dtype: torch.dtype = BRAIN
    x: Layout = optim_cases.plain
    w: Layout = optim_cases.plain
    dy: Layout = optim_cases.plain
    needs: str = "xwb"  # whose gradients
    bias: bool = True
    tf32: bool = False
    processors: int = 2

    def wrong(self) -> list[str]:
        m, n, k = self.size
        # A cut operand is too small: the errors of terms that are all positive do not cancel.
        draw = torch.rand if self.tf32 else torch.randn
        x = self.x(draw(m, k, dtype=DOUBLE).to(self.dtype))
        w = self.w((draw(n, k, dtype=DOUBLE) / (k if self.tf32 else k**0.5)).to(self.dtype))
        b = draw(n, dtype=DOUBLE).to(self.dtype) if self.bias else None
        dy = self.dy(draw(m, n, dtype=DOUBLE).to(self.dtype))
        inputs = require_gradients(self.needs, x, w, b)
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        y = tribp.linear_sigmoid(x, w, b)
        found = gradients(y, inputs, dy)

        rounding = Rounding(self.dtype, self.tf32)
        oracle = LinearSigmoid(x, w, b)
        size = oracle.x.square() @ oracle.w.square().t()
        size = (size if b is None else size + b.detach().double().square()).sqrt()
        wrong = differences("y", y, oracle.y, sigmoid_bound(rounding, oracle.y, rounding.sum_of(k) * size))
        dx, dw, db, terms = oracle.gradients(dy, y)
        dz = (dy.double() * y.detach().double() * (1 - y.detach().double())).square()
        exact = Gradients(
            (dx, rounding.sum_of(n, rounded=True) * (dz @ oracle.w.square()).sqrt()),
            (dw, rounding.sum_of(m, rounded=True) * (dz.t() @ oracle.x.square()).sqrt()),
            (db, Rounding(self.dtype).sum_of(m) * terms),
        )
        return wrong + exact.differences(found, rounding)


def sigmoid_bound(rounding: Rounding, y: Tensor, error: Tensor) -> Tensor:
    """Of y = σ(z), where z has the error; the slope is ¼ at most, and σ itself takes a few operations."""
    operations = 2.0**-50 if rounding.dtype == DOUBLE else 2.0**-21
    return rounding.unit * y.abs() + error / 4 + operations


# ---- convolutions


class Conv(NamedTuple):
    case: conv3x3_cases.Case
    dtype: torch.dtype = BRAIN
    x: Layout = conv3x3_cases.last
    w: Layout = conv3x3_cases.last
    dy: Layout | None = None  # None: as y lies
    needs: str = "xwb"
    tf32: bool = False
    processors: int = 2

    def wrong(self) -> list[str]:
        case = self.case
        draw = torch.rand if self.tf32 else torch.randn
        terms_of_y = case.size[1] // case.groups * 9
        x = self.x(draw(case.size, dtype=DOUBLE).to(self.dtype))
        w = draw(case.out, terms_of_y // 9, 3, 3, dtype=DOUBLE) / (terms_of_y if self.tf32 else terms_of_y**0.5)
        w = self.w(w.to(self.dtype))
        b = draw(case.out, dtype=DOUBLE).to(self.dtype) if case.bias else None
        inputs = require_gradients(self.needs, x, w, b)
        torch.backends.cudnn.allow_tf32 = self.tf32
        y = case.ours(x, w, b)
        dy = draw(y.shape, dtype=DOUBLE).to(self.dtype)
        dy = self.dy(dy) if self.dy else torch.empty_like(y).copy_(dy)
        found = gradients(y, inputs, dy)

        rounding = Rounding(self.dtype, self.tf32)
        oracle = case.exact(x, w, b)
        # The same sums over squares: how large the terms of each are.
        squares = [None if t is None else t.detach().double().square() for t in (x, w, b)]
        square = case._replace(activation=None).exact(*squares)  # type: ignore[arg-type]
        error = rounding.sum_of(terms_of_y) * square.y.sqrt()
        dz = dy.double()
        if case.activation:
            wrong = differences("y", y, oracle.y, sigmoid_bound(rounding, oracle.y, error))
            dz = dz * y.detach().double() * (1 - y.detach().double())
        else:
            wrong = differences("y", y, oracle.y, rounding.unit * oracle.y.abs() + error)
        dx, dw, db, terms = oracle.gradients(dy, y)
        dx_size, dw_size, *_ = square.gradients(dz.square(), square.y)
        pixels, rounded = dz.numel() // dz.shape[1], case.activation is not None
        exact = Gradients(
            (dx, rounding.sum_of(9 * case.out // case.groups, rounded) * dx_size.sqrt()),
            (dw, rounding.sum_of(pixels, rounded) * dw_size.sqrt()),
            (db, Rounding(self.dtype).sum_of(pixels) * terms),
        )
        return wrong + exact.differences(found, rounding)


class Apart(NamedTuple):
    """Groups that share a tile, an infinity in one of them: no other group may see it."""

    channels: int
    groups: int
    processors: int = 2

    def wrong(self) -> list[str]:
        x = conv3x3_cases.last(torch.randn(2, self.channels, 8, 8, dtype=DOUBLE).to(BRAIN))
        w = conv3x3_cases.last(torch.randn(self.channels, self.channels // self.groups, 3, 3, dtype=DOUBLE).to(BRAIN))
        dy = conv3x3_cases.last(torch.randn(x.shape, dtype=DOUBLE).to(BRAIN))
        x[0, 5, 3, 3] = dy[1, 9, 2, 2] = math.inf
        y = tribp.conv3x3(x.requires_grad_(), w, None, padding=1, groups=self.groups)
        found = {"y": y, "dx": torch.autograd.grad(y, x, dy)[0]}
        wide = x.detach().double().contiguous().requires_grad_()
        exact = torch.nn.functional.conv2d(wide, w.double().contiguous(), None, 1, 1, 1, self.groups)
        wrong = []
        for name, wanted in {"y": exact.detach(), "dx": torch.autograd.grad(exact, wide, dy.double())[0]}.items():
            finite = wanted.isfinite()
            if not torch.equal(found[name].isfinite(), finite):
                wrong.append(f"{name} is not finite where it should be, or the other way round")
            bound = torch.full_like(wanted, 2 * Rounding(BRAIN).unit * float(wanted[finite].abs().max()))
            wrong += differences(name, found[name][finite], wanted[finite], bound[finite])
        return wrong


# ---- optimizers

# Several blocks and a rest in every layout: only whole blocks of aligned memory are moved 16 bytes at a time.
SHAPES = {
    "block and rest": (20_003,), "channels_last": (6, 8, 7, 7), "channels_last, contiguous gradient": (6, 8, 7, 5),
    "contiguous, channels_last gradient": (6, 8, 5, 7), "transposed": (36, 50),
    "transposed, contiguous gradient": (45, 36), "permuted, gradient with gaps": (6, 7, 8, 9),
    "gaps": (40, 33), "gaps, contiguous gradient": (33, 40),
    "misaligned": (1037,), "misaligned gradient": (2050,), "expanded gradient": (36, 44), "0-d": (), "empty": (0, 3),
}  # fmt: skip
ALIGNED = ("block and rest", "channels_last", "0-d", "empty")


def tensors(
    layouts: Sequence[str], dtypes: Sequence[torch.dtype], step: int = 0, scale: float = 1.0
) -> list[Tensor]:  # fmt: skip
    """Parameters (step 0), or the gradients of a step: in these layouts, of these types in turn."""
    found = []
    for i, (name, dtype) in enumerate(zip(layouts, itertools.cycle(dtypes), strict=False)):
        _, of_param, of_grad = optim_cases.LAYOUTS[name]
        drawn = optim_cases.values(SHAPES[name], dtype, 1 + step, i) * scale
        found.append(of_grad(drawn) if step else of_param(drawn))
    return found


class Rule(NamedTuple):
    """Steps of one class on two groups, as near to float64's as torch's own loop is."""

    name: str
    own: optim_cases.Options
    dtype: torch.dtype = SINGLE
    layouts: Sequence[str] = tuple(SHAPES)
    second: optim_cases.Options | None = None  # more options, of the second group
    processors: int = 1

    def wrong(self) -> list[str]:
        half = len(self.layouts) // 2
        params = tensors(self.layouts, [self.dtype])
        trial = optim_cases.Trial(
            self.name,
            self.own,
            [
                (optim_cases.common(self.name, 0.0, False, False), params[:half]),
                (optim_cases.common(self.name, 0.1, True, True) | (self.second or {}), params[half:]),
            ],
        )
        for step in (1, 2, 3):
            grads: list[Tensor | None] = [*tensors(self.layouts, [self.dtype], step)]
            grads[step % len(grads)] = None  # one that has none in this step
            trial.step(grads)
        try:
            trial.check()
        except AssertionError as error:
            return [str(error)]
        return []


class Beyond(NamedTuple):
    """Steps with options that torch does not have, each beside torch's own step in float64 from the same state."""

    name: str
    dtypes: tuple[torch.dtype, ...]  # of the parameters, in turn
    extra: optim_cases.Options
    scale: float | None = None  # a GradScaler's; the second step is then skipped
    layouts: Sequence[str] = tuple(SHAPES)
    processors: int = 1

    def wrong(self) -> list[str]:
        options = optim_cases.NUMBERS[self.name] | optim_cases.LIVELY[self.name]
        beyond = self.extra | ({} if self.scale is None else {"fused": True})
        params, copies = (tensors(self.layouts, self.dtypes) for _ in range(2))
        optimizer: Any = optim_cases.ours(self.name, params, **options, **beyond)
        fallback: Any = optim_cases.ours(self.name, copies, **options, **beyond)
        wrong = []
        for step in (1, 2, 3):
            skipped = self.scale is not None and step == 2
            for each, own in ((optimizer, params), (fallback, copies)):
                for p, g in zip(own, tensors(self.layouts, self.dtypes, step, self.scale or 1.0), strict=True):
                    p.grad = g
                if self.scale is not None:
                    each.grad_scale, each.found_inf = torch.tensor(self.scale), torch.tensor(float(skipped))
            exact = Exact(self, options, optimizer, tensors(self.layouts, self.dtypes, step))
            if self.extra.get("stochastic_rounding"):
                torch._foreach_copy_(copies, params)
                fallback.load_state_dict(optimizer.state_dict())
                with tribp.use_backend("torch"):
                    fallback.step()
            optimizer.step()
            wrong += [f"step {step}: {what}" for what in exact.differences(optimizer, skipped)]
            if self.extra.get("stochastic_rounding"):
                rounded = [(p != q).flatten() for p, q in zip(params, copies, strict=True) if p.dtype == BRAIN]
                differ = float(torch.cat(rounded).double().mean())
                # The same random numbers; what they round may differ in float32's last bit, which decides one in
                # 65,536, from equal states: those are rounded to nearest, where 0.9·b + 0.1·g often is a tie.
                if differ > 1e-3:
                    wrong.append(f"step {step}: {differ:.2%} of the elements are not rounded as by the fallback")
        return wrong


class Exact:
    """One step in float64 by torch's own class, from where an optimizer stands."""

    def __init__(self, case: Beyond, options: optim_cases.Options, optimizer: Any, grads: list[Tensor]) -> None:
        self.extra = case.extra
        self.inside = options["eps"] if case.extra.get("eps_inside_sqrt") else 0.0
        if self.inside:
            assert case.name == "Adagrad", "whose denominator is one state"
            options = options | {"eps": 0.0}
        self.before = [optim_cases.plain(p) for p in optimizer.param_groups[0]["params"]]
        self.params = [p.double() for p in self.before]
        self.twin = optim_cases.genuine(case.name, self.params, **options)
        state, self.averages = {}, {}
        for i, kept in optimizer.state_dict()["state"].items():
            values = {key: optim_cases.plain(value) for key, value in kept.items() if isinstance(value, Tensor)}
            self.averages[i] = values.pop("ema", None)
            values.pop("ema_step", None)
            state[i] = {key: value if key == "step" else value.double() for key, value in values.items()}
        if any(state.values()):
            self.twin.load_state_dict({"state": state, "param_groups": self.twin.state_dict()["param_groups"]})
        for p, g in zip(self.params, grads, strict=True):
            p.grad = optim_cases.plain(g).double()
        self.norm = torch.nn.utils.clip_grad_norm_(self.params, case.extra.get("max_grad_norm", math.inf))

    def differences(self, optimizer: Any, skipped: bool) -> list[str]:
        params, state = optimizer.param_groups[0]["params"], optimizer.state_dict()["state"]
        if skipped:
            same = all(map(torch.equal, params, self.before))
            return [] if same else ["a step that is skipped changed a parameter"]
        self.twin.step()
        wrong = []
        if "max_grad_norm" in self.extra:
            wrong += differences("the norm", optimizer.grad_norm, self.norm, 1e-6 * self.norm)
        for i, (p, exact) in enumerate(zip(params, self.params, strict=True)):
            if self.inside:  # √(s + ε) in place of √s
                s = self.twin.state[exact]["sum"]
                start = self.before[i].double()
                exact.copy_(start + (exact - start) * (s / (s + self.inside)).sqrt())
            # Where rounding is stochastic either neighbour is right.
            neighbours = 2.0 if self.extra.get("stochastic_rounding") and p.dtype == BRAIN else 1.0
            wrong += differences(f"parameter {i}", p, exact, stored(p, exact, neighbours))
            for key, value in self.twin.state[exact].items():
                if key != "step" and isinstance(value, Tensor):
                    wrong += differences(f"{key} of {i}", state[i][key], value, stored(state[i][key], value))
            if (decay := self.extra.get("ema_decay")) is not None:
                average, now = self.averages.get(i), p.double()
                average = now if average is None else decay * average.double() + (1 - decay) * now
                wrong += differences(f"average of {i}", state[i]["ema"], average, stored(state[i]["ema"], average))
        return wrong


def stored(kept: Tensor, exact: Tensor, halves: float = 1.0) -> Tensor:
    """Half a unit (or `halves` of it) of the type it is kept in, and what a dozen operations in float32 cost."""
    operations = 2.0**-49 if kept.dtype == DOUBLE else 2.0**-20
    largest = exact.abs().max() if exact.numel() else torch.zeros((), dtype=DOUBLE)
    return halves * Rounding(kept.dtype).unit * exact.abs() + operations * largest


Case = Linear | Conv | Apart | Rule | Beyond
