"""Clip gradients in the step, without a pass over memory that writes them back.

`max_grad_norm` does what `torch.nn.utils.clip_grad_norm_` does before a step: where the norm of all gradients together
is larger, they are scaled down to it. It reads them once for the norm, and scales as it updates. The norm is then in
`optimizer.grad_norm`, on the device. Printed: the norms of three steps, by both ways, and the largest difference of a
parameter: the rounding of float32, about 1e-8.
"""

import copy

import torch
from torch.nn import functional as F

import tribp.optim

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).to(device)
twin = copy.deepcopy(model)
x, target = torch.randn(64, 16, device=device), 10 * torch.randn(64, 1, device=device)

clipping = tribp.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0)
plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
for step in (1, 2, 3):
    clipping.zero_grad()
    F.mse_loss(model(x), target).backward()
    clipping.step()

    plain.zero_grad()
    F.mse_loss(twin(x), target).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    plain.step()
    print(f"step {step}, norm: in the step {clipping.grad_norm:.4f}, by clip_grad_norm_ {norm:.4f}")

pairs = zip(model.parameters(), twin.parameters(), strict=True)
print(f"largest difference of a parameter: {max((p - q).abs().max() for p, q in pairs):.1e}")
