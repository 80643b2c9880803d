"""What the tests of the main job share."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import tribp
from tribp.demo.methods import METHODS
from tribp.demo.models import MODELS

ROOT = Path(__file__).parents[2]


PNG = b"\x89PNG\r\n\x1a\n"


def new_training(demo: SimpleNamespace, seed: int = 0, **changed: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    data = demo.digits.load(torch.device("cpu"), generator)
    settings: dict[str, Any] = {
        "model": "mlp",
        "method": METHODS["adam"],
        "batch_size": 16,
        "epochs": 3,
        "lr": 0.01,
    } | changed
    settings["model"] = model = MODELS[settings["model"]]
    return demo.training.Training(data, generator, **{"epsilon": model.epsilon} | settings)


TWINS: dict[
    str, tuple[Any, Any, dict[str, Any], dict[str, Any]]
] = {  # ours and torch's, and the hyperparameters that make them the same
    "sgd": (tribp.optim.SGD, torch.optim.SGD, {"momentum": 0, "dampening": 0}, {"momentum": 0, "dampening": 0}),
    "momentum": (
        tribp.optim.Momentum,
        torch.optim.SGD,
        {"momentum": 0.5, "dampening": 0.5},
        {"momentum": 0.5, "dampening": 0.5, "nesterov": False},
    ),
    "adagrad": (
        tribp.optim.AdaGrad,
        torch.optim.Adagrad,
        {"eps": 1e-8, "eps_inside_sqrt": True, "initial_accumulator_value": 0, "lr_decay": 0},
        {"eps": 0, "initial_accumulator_value": 1e-8, "lr_decay": 0},
    ),
    "rmsprop": (tribp.optim.RMSProp, torch.optim.RMSprop, {"alpha": 0.99}, {"alpha": 0.99, "eps": 1e-8}),
    "adam": (tribp.optim.Adam, torch.optim.Adam, {"betas": (0.9, 0.999)}, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "adamw": (tribp.optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.01}, {"weight_decay": 0.01}),
}
