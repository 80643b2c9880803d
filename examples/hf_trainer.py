"""Train a Hugging Face model by its Trainer, with an optimizer of tribp.

The optimizer is handed to the Trainer, which leaves the clipping of gradients (`max_grad_norm=0`) to the step itself. A
tiny BERT with random weights learns whether a sentence holds the word 7. Printed: its accuracy before training and
after, from about 50 % to 100 %.
"""

import tempfile

import torch

import tribp.optim

try:
    import accelerate  # noqa: F401  # the Trainer needs it
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
except ImportError as error:
    raise SystemExit(f"{error.name} is missing: pip install accelerate transformers") from None

torch.manual_seed(0)
sentences = torch.randint(8, 50, (512, 8))
labels = torch.arange(512) % 2
sentences[labels == 1, torch.randint(0, 8, (256,))] = 7
data = [{"input_ids": s, "labels": label} for s, label in zip(sentences, labels, strict=True)]

model = BertForSequenceClassification(
    BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
)
optimizer = tribp.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=5, per_device_train_batch_size=32, per_device_eval_batch_size=128, max_grad_norm=0,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=data[:384], eval_dataset=data[384:], optimizers=(optimizer, None),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
    )  # fmt: skip
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
print(f"accuracy before: {100 * before:.0f} %")
print(f"accuracy after: {100 * after:.0f} %")
print(f"norm of the last gradients: {optimizer.grad_norm:.3f}")
