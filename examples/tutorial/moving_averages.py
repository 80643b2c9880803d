"""Two ways to smooth a series: the mean of a sliding window (SMA), and the exponential moving average (EMA).

Thirty days are averaged by both and drawn in `moving_averages.png`. The SMA over 5 days has 26 values: it is formed
where the window fits. The EMA starts from the first day, v₁ = x₁, and goes on by v_t = β v_{t−1} + (1 − β) x_t with
β = 0.9.

The same EMA is how gradient descent with momentum forms its steps: given the days as gradients, `tribp.optim.Momentum`
keeps the same numbers in its buffer. The last number is the largest difference of the two: the rounding of float32,
a few 1e-6.
"""

import torch

import tribp
from tribp.demo import averages

BETA, WINDOW = 0.9, 5

noise = torch.randn(30, generator=torch.Generator().manual_seed(0))
days = (20 + 0.2 * torch.arange(30) + 3 * noise).tolist()
sma = averages.simple(days, WINDOW)
ema = averages.exponential(days, BETA)

print("day   value     SMA     EMA")
for day, value in enumerate(days):
    mean = f"{sma[day - WINDOW + 1]:8.3f}" if day >= WINDOW - 1 else 8 * " "
    print(f"{day + 1:3} {value:8.3f}{mean}{ema[day]:8.3f}")

device = "cuda" if torch.cuda.is_available() else "cpu"
parameter = torch.zeros(1, device=device, requires_grad=True)
optimizer = tribp.optim.Momentum([parameter], lr=0.01, beta=BETA)
buffers = []
for value in days:
    parameter.grad = torch.tensor([value], device=device)
    optimizer.step()
    buffers.append(optimizer.state[parameter]["momentum_buffer"].item())
difference = max(abs(a - b) for a, b in zip(ema, buffers, strict=True))
print(f"largest difference of EMA and momentum buffer: {difference:.1e}")

try:
    from matplotlib.figure import Figure
except ImportError:
    print("no picture: it needs matplotlib (pip install matplotlib)")
else:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, 31), days, "o-", color="0.7", label="each day")
    axes.plot(range(WINDOW, 31), sma, label=f"SMA, window of {WINDOW} days")  # a mean stands at its window's last day
    axes.plot(range(1, 31), ema, label=f"EMA, β = {BETA}")
    axes.set(xlabel="day", ylabel="value")
    axes.legend()
    figure.savefig("moving_averages.png", dpi=120)
    print("picture: moving_averages.png")
