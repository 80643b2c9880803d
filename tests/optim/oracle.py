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

    def __init__(self, name: str, p: Tensor, options: dict[str, Any], t: int, off: float = 0.0) -> None:
        """t: how many steps were taken before, with gradients of 0. off: relative error of RAdam's βᵗ, of the squares.

        While few steps were taken, its step size multiplies that error by ten and more.
        """
        self.rule = RULES[name]
        self.off = off
        self.values = {"param": _wide(p)}
        self.t = t
        if name == "Adagrad":
            self.values["sum"] = np.full_like(self.values["param"], options["initial_accumulator_value"])
        if name == "Rprop":
            self.values["step_size"] = np.full_like(self.values["param"], _number(options["lr"]))
        # torch rounds these to float32 from step to step, whatever the parameter's type.
        if name == "NAdam":
            self.values["mu_product"] = np.float32(1)
        if name == "ASGD":
            self.values |= {"eta": np.float32(options["lr"]), "mu": np.float32(1)}

    def step(self, grad: Tensor, options: dict[str, Any]) -> None:
        """options may change from step to step, and be tensors."""
        self.t += 1
        p = self.values["param"]
        g = _wide(grad) * (-1 if options["maximize"] else 1)
        decay = options["weight_decay"] if self.rule is not _rprop else 0
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


def _adadelta(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    v = s.average("square_avg", g * g, o["rho"])
    change = np.sqrt(s.state("acc_delta") + _number(o["eps"])) / np.sqrt(v + _number(o["eps"])) * g
    s.average("acc_delta", change * change, o["rho"])
    return _number(o["lr"]) * change


def _adamax(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    one, two = map(_number, o["betas"])
    m = s.average("exp_avg", g, one)
    s.values["exp_inf"] = np.maximum(two * s.state("exp_inf"), np.abs(g) + _number(o["eps"]))
    return _number(o["lr"]) / (1 - one**s.t) * m / s.values["exp_inf"]


def _rprop(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    turns = g * s.state("prev")
    factor = np.where(turns > 0, _number(o["etas"][1]), np.where(turns < 0, _number(o["etas"][0]), _number(1)))
    size = s.values["step_size"] = np.clip(s.values["step_size"] * factor, *map(_number, o["step_sizes"]))
    g = s.values["prev"] = np.where(turns < 0, 0, g)
    return np.sign(g) * size


def _nadam(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    one, two = map(_number, o["betas"])
    m, v = s.average("exp_avg", g, one), s.average("exp_avg_sq", g * g, two)
    mu, after = (one * (1 - _number(0.96) ** (t * _number(o["momentum_decay"])) / 2) for t in (s.t, s.t + 1))
    product = s.values["mu_product"] = s.values["mu_product"] * np.float32(mu)
    mean = (1 - mu) * g / (1 - np.longdouble(product)) + after * m / (1 - np.longdouble(product) * after)
    return _number(o["lr"]) * mean / (np.sqrt(v / (1 - two**s.t)) + _number(o["eps"]))


def _radam(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    one, two = map(_number, o["betas"])
    m, v = s.average("exp_avg", g, one), s.average("exp_avg_sq", g * g, two)
    change = _number(o["lr"]) * m / (1 - one**s.t)
    rho_inf = 2 / (1 - two) - 1
    decayed = two**s.t * (1 + np.longdouble(s.off))
    rho_t = rho_inf - 2 * s.t * decayed / (1 - decayed)
    if rho_t <= 5:
        return change
    rect = np.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))
    return change * rect * np.sqrt(1 - decayed) / (np.sqrt(v) + _number(o["eps"]))


def _asgd(s: Steps, g: Wide, o: dict[str, Any]) -> Wide:
    p, lr, lambd = s.values["param"], _number(o["lr"]), _number(o["lambd"])
    eta, mu = np.longdouble(s.values["eta"]), np.longdouble(s.values["mu"])
    change = eta * (lambd * p + g)
    s.average("ax", p - change, 1 - mu)
    s.values["eta"] = np.float32(lr / (1 + lambd * lr * s.t) ** _number(o["alpha"]))
    s.values["mu"] = np.float32(1 / max(_number(1), s.t - _number(o["t0"])))
    return change


RULES: dict[str, Callable[[Steps, Wide, dict[str, Any]], Wide]] = {
    "SGD": _sgd, "Momentum": _sgd, "RMSprop": _rmsprop, "Adagrad": _adagrad, "Adam": _adam, "AdamW": _adam,
    "Adadelta": _adadelta, "Adamax": _adamax, "NAdam": _nadam, "RAdam": _radam, "Rprop": _rprop, "ASGD": _asgd,
}  # fmt: skip
