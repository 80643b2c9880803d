"""HF Trainer, accelerate and Lightning: a few steps with tribp's optimizers, passed or by `patch`, equal torch's.

Each is skipped where it is not installed (`pip install -e '.[ecosystem]'`). Models and data are made here.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tribp.optim
from tribp.optim.optimizer import Optimizer

STEPS = 4


class Examples(Dataset[Any]):
    """(x, labels), the same every time."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(5)
        self._x = torch.randn(8 * STEPS, 3, generator=made)

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self._x[i], "labels": self._x[i].sum()}


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layers(x).squeeze(-1)
        return {"loss": (y - labels).square().mean(), "logits": y}


def unwrapped(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def compare(train: Callable[[Any, Path], tuple[torch.nn.Module, Any]], name: str, patched: bool, folder: Path) -> None:
    """Parameters that `train` makes of a new `Regression`, by tribp's class and by torch's, are equal.

    train: returns the trained `Regression` and its optimizer. patched: it is given `torch.optim`'s class, as patched.
    """
    with tribp.optim.patch() if patched else contextlib.nullcontext():
        ours, optimizer = train(getattr(torch.optim if patched else tribp.optim, name), folder / "tribp")
    assert isinstance(unwrapped(optimizer), Optimizer)
    assert unwrapped(optimizer)._plan is not None, "it has updated nothing"
    theirs, optimizer = train(getattr(torch.optim, name), folder / "torch")
    assert not isinstance(unwrapped(optimizer), Optimizer)
    parameters = (model.parameters() for model in (ours, theirs, Regression()))
    for p, q, before in zip(*parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, before), "nothing was learnt"


every_way = pytest.mark.parametrize("patched", [False, True], ids=["passed", "patched"])


@every_way
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_transformers_trainer(name: str, patched: bool, tmp_path: Path) -> None:
    """With clipping, warm-up and a checkpoint in the middle, from which a second trainer resumes.

    Under the patch the trainer itself finds the class, by a name of its own.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # the trainer needs it

    def train(kind: Any, folder: Path) -> tuple[torch.nn.Module, Any]:
        for resume in (False, True):
            arguments = transformers.TrainingArguments(
                output_dir=str(folder), max_steps=STEPS if resume else STEPS // 2, per_device_train_batch_size=4,
                optim={"AdamW": "adamw_torch", "SGD": "sgd", "Adagrad": "adagrad"}[name], learning_rate=0.05,
                weight_decay=0.1, lr_scheduler_type="constant_with_warmup", warmup_steps=2, max_grad_norm=0.5,
                save_steps=STEPS // 2, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            given = None if patched else (kind, {"lr": 0.05})
            trainer = transformers.Trainer(
                Regression(), arguments, train_dataset=Examples(), optimizer_cls_and_kwargs=given
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == STEPS
        return trainer.model, trainer.optimizer

    compare(train, name, patched, tmp_path)


@every_way
@pytest.mark.parametrize("name", ["Adam", "RMSprop", "NAdam"])
def test_accelerate(name: str, patched: bool, tmp_path: Path) -> None:
    """With gradients accumulated over two batches, clipping, a scheduler, and a state that is saved and loaded."""
    accelerate = pytest.importorskip("accelerate")

    def train(kind: Any, folder: Path) -> tuple[torch.nn.Module, Any]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = Regression()
        optimizer = kind(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        loader = DataLoader(Examples(), batch_size=4)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        for epoch in (0, 1, 2):  # the last one does the second one's again
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch)["loss"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            if epoch == 0:
                accelerator.save_state(str(folder))
            elif epoch == 1:
                accelerator.load_state(str(folder))
        return model, optimizer

    compare(train, name, patched, tmp_path)


@every_way
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "RAdam"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning(manual: bool, name: str, patched: bool, tmp_path: Path) -> None:
    """Closures around the step (automatic) or none (manual), a scheduler, a second trainer that resumes the first's."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.model, self.kind = Regression(), kind
            self.automatic_optimization = not manual

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = self.kind(self.parameters(), lr=0.05)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}

    def train(kind: Any, folder: Path) -> tuple[torch.nn.Module, Any]:
        for epochs in (1, 2):
            module = Module(kind)
            trainer = lightning.Trainer(
                max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                gradient_clip_val=None if manual else 0.5,
            )  # fmt: skip
            last = folder / "last.ckpt"
            trainer.fit(module, DataLoader(Examples(), batch_size=8), ckpt_path=last if epochs == 2 else None)
            trainer.save_checkpoint(last)
        assert trainer.global_step == 2 * STEPS
        return module.model, trainer.optimizers[0]

    compare(train, name, patched, tmp_path)
