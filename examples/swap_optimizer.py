"""Swap an optimizer: change the import, and keep the checkpoints.

A network is trained for 50 steps by torch's AdamW, 50 by tribp's and 50 by torch's again, each from a checkpoint of the
one before; beside it a copy by torch's alone. Printed: the losses, and the largest difference of a parameter of the two
in the end: the rounding of float32, a few 1e-7.
"""

import copy
import io

import torch
from torch.nn import functional as F

import tribp.optim

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x = torch.randn(256, 20, device=device)
labels = (x[:, 0] * x[:, 1] > 0).long()  # the signs of two of the 20 numbers are equal


def train(model, optimizer, steps=50):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2)).to(device)
reference = copy.deepcopy(model)
file = io.BytesIO()

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
print(f"torch.optim.AdamW, steps   1 to  50: loss {train(model, optimizer):.4f}")
torch.save(optimizer.state_dict(), file)

file.seek(0)
optimizer = tribp.optim.AdamW(model.parameters(), lr=3e-3)  # the only line that differs
optimizer.load_state_dict(torch.load(file))
print(f"tribp.optim.AdamW, steps  51 to 100: loss {train(model, optimizer):.4f}")
file.seek(0)
torch.save(optimizer.state_dict(), file)

file.seek(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
optimizer.load_state_dict(torch.load(file))
print(f"torch.optim.AdamW, steps 101 to 150: loss {train(model, optimizer):.4f}")

train(reference, torch.optim.AdamW(reference.parameters(), lr=3e-3), 150)
pairs = zip(model.parameters(), reference.parameters(), strict=True)
print(f"largest difference of a parameter from 150 steps by torch: {max((p - q).abs().max() for p, q in pairs):.1e}")
