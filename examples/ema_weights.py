"""Evaluate with averaged weights: an exponential moving average (EMA) that the step keeps by itself.

Noisy gradients carry the weights around the minimum; their average lies nearer to it. The step writes the average in
the pass over memory in which it updates the weights. `swap_ema()` exchanges the two for the time of an evaluation.
Printed: the error on data without noise, with the last weights and with their average, several times less.
"""

import torch
from torch.nn import functional as F

import tribp.optim

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
true = torch.randn(1, 32, device=device)
model = torch.nn.Linear(32, 1, bias=False).to(device)
optimizer = tribp.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0, ema_decay=0.98)

for _ in range(400):
    x = torch.randn(16, 32, device=device)
    target = x @ true.T + torch.randn(16, 1, device=device)
    optimizer.zero_grad()
    F.mse_loss(model(x), target).backward()
    optimizer.step()


@torch.no_grad()
def error():
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(1)).to(device)
    return F.mse_loss(model(x), x @ true.T).item()


print(f"error with the last weights: {error():.5f}")
with optimizer.swap_ema():
    print(f"error with their average: {error():.5f}")
print(f"error with the last weights, again: {error():.5f}")
