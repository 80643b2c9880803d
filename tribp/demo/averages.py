"""Moving averages of a series."""

from collections.abc import Sequence

import torch


def simple(series: Sequence[float], window: int) -> list[float]:
    """The mean over each `window` consecutive values: `len(series) − window + 1` of them, valid positions only."""
    values: list[float] = torch.tensor(series, dtype=torch.float64, device="cpu").unfold(0, window, 1).mean(1).tolist()
    return values


def exponential(series: Sequence[float], beta: float) -> list[float]:
    """v_1 = x_1, then v_t = β v_{t−1} + (1 − β) x_t."""
    values = list(series[:1])
    for x in series[1:]:
        values.append(beta * values[-1] + (1 - beta) * x)
    return values
