"""The optimizers where compiled code is executed: cases, and how far off their results may be."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tribp
from tribp.optim import codes

from ..executed.checks import BRAIN, DOUBLE, HALF, SINGLE, Case, Rounding, differences
from . import cases as lies

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
        _, of_param, of_grad = lies.LAYOUTS[name]
        drawn = lies.values(SHAPES[name], dtype, 1 + step, i) * scale
        found.append(of_grad(drawn) if step else of_param(drawn))
    return found


class Rule(NamedTuple):
    """Steps of one class, as near to float64's as torch's own loop is; common options are dealt out to the layouts."""

    name: str
    own: lies.Options
    dtype: torch.dtype = SINGLE
    layouts: Sequence[str] = tuple(SHAPES)
    second: lies.Options | None = None  # more options, of the second half of the layouts
    processors: int = 1
    deal: int = 0  # which common options the first layout has

    def common(self) -> list[tuple[float, bool, bool]]:
        """The common options of each layout; 8 deals give every layout all of them."""
        return [lies.COMMON[(3 * i + self.deal) % len(lies.COMMON)] for i in range(len(self.layouts))]

    def wrong(self) -> list[str]:
        half = len(self.layouts) // 2
        group_of = [(common, i >= half and self.second is not None) for i, common in enumerate(self.common())]
        keys = list(dict.fromkeys(group_of))
        order = sorted(range(len(group_of)), key=lambda i: keys.index(group_of[i]))

        def grouped(step: int) -> list[Tensor]:
            made = tensors(self.layouts, [self.dtype], step)
            return [made[i] for i in order]

        params = iter(grouped(0))
        groups = [
            (
                lies.common(self.name, *common) | ((self.second or {}) if has_second else {}),
                list(itertools.islice(params, group_of.count((common, has_second)))),
            )
            for common, has_second in keys
        ]
        trial = lies.Trial(self.name, self.own, groups)
        for step in (1, 2, 3):
            grads: list[Tensor | None] = [*grouped(step)]
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
    extra: lies.Options
    scale: float | None = None  # a GradScaler's; the second step is then skipped
    layouts: Sequence[str] = tuple(SHAPES)
    processors: int = 1

    def wrong(self) -> list[str]:
        options = lies.NUMBERS[self.name] | lies.LIVELY[self.name]
        beyond = self.extra | ({} if self.scale is None else {"fused": True})
        params, copies = (tensors(self.layouts, self.dtypes) for _ in range(2))
        optimizer: Any = lies.ours(self.name, params, **options, **beyond)
        fallback: Any = lies.ours(self.name, copies, **options, **beyond)
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


class Coded(NamedTuple):
    """Steps with states in 8 bits, and parameters in 24, beside the fallback's from the same state."""

    name: str
    dtype: torch.dtype
    own: lies.Options
    layouts: Sequence[str] = tuple(SHAPES)
    processors: int = 1

    def wrong(self) -> list[str]:
        options = lies.NUMBERS[self.name] | self.own | {"state_bits": 8, "master_bits": 24, "seed": 3}
        params, copies = (tensors(self.layouts, [self.dtype]) for _ in range(2))
        optimizer: Any = lies.ours(self.name, params, **options)
        fallback: Any = lies.ours(self.name, copies, **options)
        wrong = []
        for step in (1, 2, 3):
            for own in (params, copies):
                for p, g in zip(own, tensors(self.layouts, [self.dtype], step), strict=True):
                    p.grad = g
            optimizer.step()
            with tribp.use_backend("torch"):
                fallback.step()
            for i, (p, q) in enumerate(zip(params, copies, strict=True)):
                state, other = optimizer.state[p], fallback.state[q]
                if "residual" in state:
                    mine, theirs = codes.join(p, state["residual"]), codes.join(q, other["residual"]).double()
                    # A unit in the last place of 24 bits, where float32's last bit decides.
                    allowed = stored(mine, theirs) + 2.0**-15 * theirs.abs()
                else:
                    mine, theirs = p, q.double()
                    allowed = stored(p, theirs, 2.0)
                wrong += differences(f"parameter {i} in step {step}", mine, theirs, allowed)
                for key, kept in state.items():
                    if key.endswith("_scale"):
                        wrong += differences(
                            f"{key} of {i}", kept, other[key].double(), 1e-6 * other[key].double().abs()
                        )
                    elif key != "residual" and kept.dtype in codes.CODES and kept.numel():
                        off = (kept.int() - other[key].int()).abs()
                        share = float((off > 0).double().mean())
                        if share > 0.01 or off.max() > 1:
                            wrong.append(f"{key} of {i} in step {step}: {share:.2%} differ, by up to {off.max()}")
                    other[key].copy_(kept)
                q.copy_(p)
        return wrong


class Tiny(NamedTuple):
    """A step with states in 8 bits whose gradients have squares that are subnormal, or are 0, beside torch's."""

    name: str
    own: lies.Options
    processors: int = 1

    def wrong(self) -> list[str]:
        rate, moves = 2.0**-10, []
        for make, more in ((lies.ours, {"state_bits": 8}), (lies.genuine, {})):
            p = torch.ones(64)
            p.grad = torch.full((64,), 1e-3)
            p.grad[4], p.grad[5], p.grad[40:] = 1e-18, 0.0, 2e-18
            make(self.name, [p], lr=rate, **self.own, **more).step()
            moves.append((1 - p) / rate)
        mine, exact = moves[0], moves[1].double()
        return differences("the update", mine, exact, 1e-3 * exact.abs() + 2.0**-13)


class Exact:
    """One step in float64 by torch's own class, from where an optimizer stands."""

    def __init__(self, case: Beyond, options: lies.Options, optimizer: Any, grads: list[Tensor]) -> None:
        self.extra = case.extra
        self.inside = options["eps"] if case.extra.get("eps_inside_sqrt") else 0.0
        if self.inside:
            assert case.name == "Adagrad", "whose denominator is one state"
            options = options | {"eps": 0.0}
        self.before = [lies.plain(p) for p in optimizer.param_groups[0]["params"]]
        self.params = [p.double() for p in self.before]
        self.twin = lies.genuine(case.name, self.params, **options)
        state, self.averages = {}, {}
        for i, kept in optimizer.state_dict()["state"].items():
            values = {key: lies.plain(value) for key, value in kept.items() if isinstance(value, Tensor)}
            self.averages[i] = values.pop("ema", None)
            values.pop("ema_step", None)
            state[i] = {key: value if key == "step" else value.double() for key, value in values.items()}
        if case.name == "Rprop" and not state:  # step sizes begin as the rate, rounded to the type that keeps them
            for i, p in enumerate(self.before):
                kept = torch.full_like(p, options["lr"], dtype=case.extra.get("state_dtype") or p.dtype).double()
                state[i] = {"step": torch.zeros(()), "prev": torch.zeros_like(kept), "step_size": kept}
        if any(state.values()):
            self.twin.load_state_dict({"state": state, "param_groups": self.twin.state_dict()["param_groups"]})
        for p, g in zip(self.params, grads, strict=True):
            p.grad = lies.plain(g).double()
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


def dealt(cases: dict[str, Case]) -> dict[str, Case]:
    """Each rule's case deals the common options out in another way."""
    return {
        name: case._replace(deal=number) if isinstance(case, Rule) else case
        for number, (name, case) in enumerate(cases.items())
    }


QUICK: dict[str, Case] = {"8 bits": Coded("AdamW", BRAIN, {})}
QUICK_ON_HOPPER: dict[str, Case] = {
    "Adam, amsgrad in one group": Rule("Adam", {}, DOUBLE, second={"amsgrad": True}),
    "AdamW": Rule("AdamW", {}, BRAIN),
    "aligned, clipping, ε inside": Beyond(
        "Adagrad", (SINGLE,), {"max_grad_norm": 1.0, "eps_inside_sqrt": True}, layouts=ALIGNED
    ),
    "clipping, GradScaler": Beyond("SGD", (HALF, SINGLE), {"max_grad_norm": 1.0, "state_dtype": SINGLE}, 8.0),
    "8 bits, tiny squares and ε": Tiny("RMSprop", {"eps": 1e-40}),
    "averages, stochastic rounding": Beyond("AdamW", (BRAIN,), {"ema_decay": 0.9, "stochastic_rounding": True}),
    "SGD": Rule("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "RMSprop": Rule("RMSprop", {"momentum": 0.9, "centered": True}, HALF),
    "Adagrad": Rule("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.3}),
    "Adadelta": Rule("Adadelta", {}, HALF),
    "Adamax": Rule("Adamax", {}),
    "NAdam": Rule("NAdam", {"momentum_decay": 0.1}, DOUBLE, second={"decoupled_weight_decay": True}),
    "RAdam": Rule("RAdam", {}, second={"decoupled_weight_decay": True}),
    "Rprop": Rule("Rprop", {"step_sizes": (0.15, 0.3)}, BRAIN),
    "ASGD": Rule("ASGD", {"lambd": 0.1, "t0": 0.0}),
    "Adagrad, 600 tensors": Rule(
        "Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.3}, layouts=("0-d",) * 600
    ),
}
QUICK_ON_HOPPER = dealt(QUICK_ON_HOPPER)

DTYPES = (HALF, BRAIN, SINGLE, DOUBLE)
WIDE = {HALF: SINGLE, BRAIN: SINGLE, SINGLE: SINGLE, DOUBLE: DOUBLE}
SLOW: dict[str, Case] = {
    "8 bits, tiny squares": Tiny("Adam", {"eps": 1e-30}),
    **{
        f"{lies.title(variant)}, {str(dtype)[6:]}": Rule(*variant, dtype)
        for variant, dtype in itertools.product(lies.VARIANTS, lies.DTYPES)
    },
    **{
        f"{name} beyond, {str(dtype)[6:]}": Beyond(
            name, (dtype,), {"max_grad_norm": 0.5, "ema_decay": 0.99, "state_dtype": WIDE[dtype]}, 4.0
        )
        for name, dtype in itertools.product(lies.CLASSES, DTYPES)
    },
    **{
        f"{name}, 8 bits, {str(dtype)[6:]}": Coded(name, dtype, lies.LIVELY[name] | own)
        for (name, own), dtype in itertools.product(
            [("SGD", {}), ("RMSprop", {}), ("Adagrad", {}), ("Adam", {"stochastic_rounding": True, "ema_decay": 0.9})],
            [HALF, BRAIN, SINGLE],
        )
    },
    **{
        f"{name}, stochastic rounding": Beyond(name, (BRAIN,), {"stochastic_rounding": True, "seed": 7})
        for name in lies.CLASSES
    },
}  # fmt: skip
SLOW = dealt(SLOW)


def random_rule(chance: random.Random) -> Case:
    layouts = chance.choices(list(SHAPES), k=chance.randint(2, 9))
    variant, dtype = chance.choice(lies.VARIANTS), chance.choice(lies.DTYPES)
    return Rule(*variant, dtype, layouts, processors=chance.choice([1, 108]), deal=chance.randrange(len(lies.COMMON)))


def random_beyond(chance: random.Random) -> Case:
    dtypes = tuple(chance.choices(DTYPES, k=chance.choice([1, 1, 2])))
    extra: lies.Options = {"ema_decay": 0.9} if chance.random() < 0.5 else {}
    if chance.random() < 0.3:  # not beside clipping: the fallback rounds what it has clipped
        dtypes, extra["stochastic_rounding"] = (BRAIN, *dtypes), True
    elif chance.random() < 0.7:
        extra["max_grad_norm"] = chance.choice([0.5, 1e3])
        if HALF in dtypes:  # where small squares are 0: a centered RMSprop has negative variances, torch's root is NaN
            extra["state_dtype"] = DOUBLE if DOUBLE in dtypes else SINGLE
    layouts, scale = chance.choices(list(SHAPES), k=chance.randint(2, 9)), chance.choice([None, 8.0])
    return Beyond(chance.choice(lies.CLASSES), dtypes, extra, scale, layouts, processors=chance.choice([1, 108]))


RANDOM: dict[str, Callable[[random.Random], Case]] = {"rule": random_rule, "beyond": random_beyond}
