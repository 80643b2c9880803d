"""Optimizer steps in numpy's long double, for results in float64: whatever else is in float64 errs as much itself.

The formulas are torch's documentation's, of each class. x86 has 64 bits of mantissa there, 11 more than float64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

Wide = Any  # numpy arrays of long doubles, whose results its types call what they like
IS_WIDER = np.finfo(np.longdouble).eps < 2.0**-60


def _wide(x: Tensor) -> Wide:
    return np.array(x.detach().numpy(), dtype=np.longdouble)


class Steps:
    """A parameter, its states, and the steps it takes with the options of its group, as torch's class holds them."""

    def __init__(self, name: str, p: Tensor, options: dict[str, Any]) -> None:
        self.rule = RULES[name]
        self.values = {"param": _wide(p)}
        self.t = 0
        if name == "Adagrad":
            self.values["sum"] = np.full_like(self.values["param"], options["initial_accumulator_value"])

    def step(self, grad: Tensor, options: dict[str, Any]) -> None:
        """options may change from step to step, and be tensors."""
        self.t += 1
        p = self.values["param"]
        g = _wide(grad) * (-1 if options["maximize"] else 1)
        decay = options["weight_decay"]
        if decay and options.get("decoupled_weight_decay"):
            p = p - _number(options["lr"]) * np.longdouble(decay) * p
        else:
            g = g + np.longdouble(decay) * p
        self.values["param"] = p - self.rule(self, g, options)

    def state(self, key: str) -> Wide:
        return self.values.get(key, np.zeros_like(self.values["param"]))

    def average(self, key: str, of: Wide, beta: object) -> Wide:
        """The state becomes β·state + (1 − β)·of."""
        self.values[key] = _number(beta) * self.state(key) + (1 - _number(beta)) * of
        return self.values[key]


def _number(x: Any) -> Any:
    return np.longdouble(float(x))


def _sgd(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    if o["momentum"]:
        first = "momentum_buffer" not in s.values
        share = 1 if first else 1 - _number(o["dampening"])
        buffer = s.values["momentum_buffer"] = _number(o["momentum"]) * s.state("momentum_buffer") + share * g
        g = g + _number(o["momentum"]) * buffer if o["nesterov"] else buffer
    return _number(o["lr"]) * g


def _rmsprop(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    v = s.average("square_avg", g * g, o["alpha"])
    if o["centered"]:
        v = v - s.average("grad_avg", g, o["alpha"]) ** 2
    change = g / (np.sqrt(v) + _number(o["eps"]))
    if o["momentum"]:
        change = s.values["momentum_buffer"] = _number(o["momentum"]) * s.state("momentum_buffer") + change
    return _number(o["lr"]) * change


def _adagrad(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    total = s.values["sum"] = s.values["sum"] + g * g
    rate = _number(o["lr"]) / (1 + (s.t - 1) * _number(o["lr_decay"]))
    return rate * g / (np.sqrt(total) + _number(o["eps"]))


def _adam(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    one, two = map(_number, o["betas"])
    m, v = s.average("exp_avg", g, one), s.average("exp_avg_sq", g * g, two)
    if o["amsgrad"]:
        v = s.values["max_exp_avg_sq"] = np.maximum(s.state("max_exp_avg_sq"), v)
    return _number(o["lr"]) / (1 - one**s.t) * m / (np.sqrt(v / (1 - two**s.t)) + _number(o["eps"]))


RULES: dict[str, Callable[[Steps, Wide, dict[str, Any]], Wide]] = {
    "SGD": _sgd, "Momentum": _sgd, "RMSprop": _rmsprop, "Adagrad": _adagrad, "Adam": _adam, "AdamW": _adam,
}  # fmt: skip
