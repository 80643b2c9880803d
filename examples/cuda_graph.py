"""Capture a whole training step as a CUDA graph, and replay it.

A replay costs the host one call, whatever the number of kernels in the graph. `capturable=True` keeps the step counters
on the device; the learning rate is a tensor, so that a schedule reaches the graph. On the CPU there are no graphs: the
program says so, and runs the step plainly. Printed: the first and the last loss, from about 0.5 to below a tenth of it,
and the learning rate in the end, 0.001098.
"""

import torch
from torch.nn import functional as F

import tribp

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = tribp.nn.MLP([32, 128, 4], activation="tanh").to(device)
rate = torch.tensor(3e-3, device=device)
optimizer = tribp.optim.Adam(model.parameters(), lr=rate, capturable=device == "cuda")
x = torch.randn(256, 32, device=device)  # a graph reads and writes these very tensors: new batches are copied into them
target = torch.sin(x[:, :4])


def step():
    optimizer.zero_grad(set_to_none=False)
    loss = F.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


if device == "cuda":
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch wants it before a capture: kernels are compiled, states are made
        first = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        last = step()
    for _ in range(100):
        rate.mul_(0.99)  # read when the graph runs
        graph.replay()
    print("a graph of the step was replayed 100 times")
else:
    first = step()
    for _ in range(100):
        rate.mul_(0.99)
        last = step()
    print("there is no CUDA device, and so no graph: the step ran plainly 100 times")
print(f"first loss: {first:.4f}")
print(f"last loss: {last:.4f}")
print(f"rate: {rate:.6f}")
