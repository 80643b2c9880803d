"""A training loop of Hugging Face's accelerate, with layers and an optimizer of tribp.

`prepare` wraps the optimizer as it wraps torch's: gradients are summed over two batches, and the steps between are
skipped. The gradients are clipped within the step. Printed: the loss of the first and of the last batch, from about 1.1
to below 0.2, and the number of steps that the optimizer made, half of that of the batches.
"""

import math

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tribp

try:
    from accelerate import Accelerator
except ImportError as error:
    raise SystemExit(f"{error.name} is missing: pip install accelerate") from None

torch.manual_seed(0)
radius = torch.rand(768)
labels = torch.arange(768) % 3
angle = 2 * math.pi * (radius + labels / 3)
points = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)

accelerator = Accelerator(gradient_accumulation_steps=2)
model = tribp.nn.MLP([2, 64, 64, 3], activation="tanh")
optimizer = tribp.optim.Adam(model.parameters(), lr=1e-2, max_grad_norm=1.0)
loader = DataLoader(TensorDataset(points, labels), batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for _ in range(30):
    for x, target in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

(count,) = {int(state["step"]) for state in optimizer.state.values()}
print(f"first loss: {losses[0]:.3f}")
print(f"last loss: {losses[-1]:.3f}")
print(f"batches: {len(losses)}")
print(f"steps: {count}")
