"""Mixed precision: autocast to float16, and a GradScaler that keeps small gradients from vanishing.

The scaler multiplies the loss by a large number. With `fused=True` the optimizer's step divides the gradients by it,
and skips itself where one is infinite, in the pass over memory that it makes anyway. The scale starts far too large
here: the first steps are skipped, and it is halved until the gradients fit. Printed: the scale in the end, how many
steps were made (about 95 of 100), and the first and the last loss, from about 0.5 to below a tenth of it.
"""

import torch
from torch.nn import functional as F

import tribp

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x = torch.randn(256, 32, device=device)
target = torch.sin(x[:, :4])

model = tribp.nn.MLP([32, 128, 4], activation="tanh").to(device)
optimizer = tribp.optim.Adam(model.parameters(), lr=3e-3, fused=True)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24)

losses = []
for _ in range(100):
    optimizer.zero_grad()
    with torch.autocast(device, torch.float16):
        output = model(x)  # weights are cast to float16, products are summed in float32
        loss = F.mse_loss(output.float(), target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())

(count,) = {int(state["step"]) for state in optimizer.state.values()}
print(f"type of the output: {output.dtype}")
print(f"scale: {scaler.get_scale():.0f}")
print(f"steps made: {count} of {len(losses)}")
print(f"first loss: {losses[0]:.4f}")
print(f"last loss: {losses[-1]:.4f}")
