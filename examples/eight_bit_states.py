"""AdamW with 7.25 bytes a parameter in place of 16: moments in 8 bits, and bfloat16 weights with 8 bits more.

A model of a million parameters learns the next character of Python's own manual from the 16 before it. Printed, for
each way to keep the numbers: the bytes a parameter (weight, gradient, moments), and for each seed the loss on text that
the model never saw. The ways differ by no more than the seeds do.

    python examples/eight_bit_states.py            # one seed, 30 steps
    python examples/eight_bit_states.py 3 1000     # three seeds, 1,000 steps: a quarter of an hour on two cores
"""

import pydoc_data.topics
import sys

import torch
from torch import nn

import tribp.optim

device = "cuda" if torch.cuda.is_available() else "cpu"
seeds, steps = map(int, sys.argv[1:3] if len(sys.argv) == 3 else (1, 30))
WAYS = {
    "float32": (torch.float32, {}),
    "float32, moments of 8 bits": (torch.float32, {"state_bits": 8}),
    "24 bits, moments of 8 bits": (torch.bfloat16, {"state_bits": 8, "master_bits": 24}),
}

text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
characters = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
known, held_out = characters[:-50_000], characters[-50_000:]


def batch(source, generator, size):
    """Stretches of 16 characters, and the one that follows each."""
    start = torch.randint(len(source) - 16, (size, 1), generator=generator).to(device)
    stretch = source[start + torch.arange(17, device=device)]
    return stretch[:, :16], stretch[:, 16]


def train(seed, dtype, options):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(128, 32), nn.Flatten(),
        nn.Linear(16 * 32, 1024), nn.ReLU(), nn.Linear(1024, 384), nn.ReLU(), nn.Linear(384, 128),
    ).to(device, dtype)  # fmt: skip
    optimizer = tribp.optim.AdamW(model.parameters(), lr=2e-3, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = batch(known, generator, 256)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        schedule.step()
    x, y = batch(held_out, torch.Generator().manual_seed(0), 8192)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x).float(), y).item()
    held = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.numel() > 1]
    return loss, sum(t.nbytes for t in held) / sum(p.numel() for p in model.parameters())


for way, (dtype, options) in WAYS.items():
    results = [train(seed, dtype, options) for seed in range(seeds)]
    losses = ", ".join(f"{loss:.4f}" for loss, _ in results)
    print(f"{way}: {results[0][1]:.2f} bytes, loss {losses}")
