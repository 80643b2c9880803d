"""Train in bfloat16 without a float32 copy of the weights: stochastic rounding.

bfloat16 has 8 bits of precision: below 1 its numbers are 1/256 apart. A step of 0.001 is less than half of that, and
rounding to nearest loses it every time; rounding up or down at random, in proportion, keeps it on average. Printed: the
mean of 4,096 weights that start at 1 and go down by 0.001 in each of 200 steps: 0.8 in float32, still 1 in bfloat16
rounded to nearest, and 0.80 with stochastic rounding.
"""

import torch

import tribp.optim

device = "cuda" if torch.cuda.is_available() else "cpu"


def descend(dtype, **options):
    weight = torch.ones(4096, dtype=dtype, device=device, requires_grad=True)
    optimizer = tribp.optim.SGD([weight], lr=0.001, **options)
    weight.grad = torch.ones_like(weight)
    for _ in range(200):
        optimizer.step()
    return weight.detach().double().mean().item()


print(f"float32: {descend(torch.float32):.4f}")
print(f"bfloat16, to nearest: {descend(torch.bfloat16):.4f}")
print(f"bfloat16, stochastic: {descend(torch.bfloat16, stochastic_rounding=True, seed=0):.4f}")
