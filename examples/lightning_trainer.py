"""Train a LightningModule whose layers and optimizer are tribp's.

Nothing is special about them: `configure_optimizers` returns the optimizer with a scheduler, and Lightning calls its
step. Three spirals of points are told apart. Printed: the share of points that are recognized, above 95 %.
"""

import math

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tribp

try:
    import lightning
except ImportError as error:
    raise SystemExit(f"{error.name} is missing: pip install lightning") from None


class Spirals(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = tribp.nn.MLP([2, 64, 64, 3], activation="tanh")

    def training_step(self, batch):
        x, labels = batch
        return F.cross_entropy(self.layers(x), labels)

    def configure_optimizers(self):
        optimizer = tribp.optim.Adam(self.parameters(), lr=2e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.96)]


lightning.seed_everything(0, verbose=False)
radius = torch.rand(768)
labels = torch.arange(768) % 3
angle = 2 * math.pi * (radius + labels / 3)
points = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)

model = Spirals()
trainer = lightning.Trainer(
    max_epochs=30, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, DataLoader(TensorDataset(points, labels), batch_size=64, shuffle=True))
with torch.no_grad():
    right = (model.cpu().layers(points).argmax(1) == labels).float().mean()
print(f"recognized: {100 * right:.1f} %")
