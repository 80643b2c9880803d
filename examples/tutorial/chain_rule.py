"""The chain rule on one neuron: y = σ(w x + b) at x = 1, w = 0.5, b = 0.5.

With z = w x + b = 1, y = σ(z) and σ′(z) = y (1 − y), the chain rule gives dy/dw = y (1 − y) · x and dy/db = y (1 − y).
The derivative follows from the output alone: that is why tribp's layers keep y for the backward pass, and not z.

Printed twice, by hand and by autograd through tribp's layer: y = 0.731059, dy/dw = dy/db = 0.196612.
"""

import math

import torch

import tribp

x, w, b = 1.0, 0.5, 0.5
y = 1 / (1 + math.exp(-(w * x + b)))
print("by hand")
print(f"  y      {y:.6f}")
print(f"  dy/dw  {y * (1 - y) * x:.6f}")
print(f"  dy/db  {y * (1 - y):.6f}")

device = "cuda" if torch.cuda.is_available() else "cpu"
input = torch.tensor([[x]], device=device)
weight = torch.tensor([[w]], device=device, requires_grad=True)  # (out_features, in_features), as torch has it
bias = torch.tensor([b], device=device, requires_grad=True)
output = tribp.linear_sigmoid(input, weight, bias)
output.backward()
print("by tribp.linear_sigmoid")
print(f"  y      {output.item():.6f}")
print(f"  dy/dw  {weight.grad.item():.6f}")
print(f"  dy/db  {bias.grad.item():.6f}")
