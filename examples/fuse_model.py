"""Fuse a model that exists already: `tribp.fuse` has tribp's kernels run its layers, and `unfuse` undoes that.

Printed: the report of what runs together and what was skipped; the largest difference of an output before and after (0,
or the rounding of float32); and the losses of two steps of an optimizer that was made before `fuse`.
"""

import torch
from torch import nn
from torch.nn import functional as F

import tribp


class Block(nn.Module):
    """A residual block: an activation in `forward` is found as well as a module of its own."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.first(x))
        return F.relu(x + self.second(y))  # an addition comes between: the convolution runs alone


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Block(16), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
).to(device)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images, labels = torch.randn(8, 3, 16, 16, device=device), torch.arange(8, device=device)

keys, before = list(model.state_dict()), model(images)
print(tribp.fuse(model))
print(f"largest difference of an output: {(model(images) - before).abs().max():.1e}")
print(f"same keys of the state_dict: {list(model.state_dict()) == keys}")
for step in (1, 2):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss:.4f}")
tribp.unfuse(model)
print(f"tribp's modules after unfuse: {sum(type(m).__module__.startswith('tribp') for m in model.modules())}")
