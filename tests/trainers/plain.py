"""Training in which nothing hides the scale of a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def plain_sgd(folder: Path, options: dict[str, Any]) -> TrainingArguments:
    """One step of plain SGD in fp32, whose update is the gradient; and what of the options are
    arguments of a training, which are taken out of them."""
    names = [name for name in options if name in TrainingArguments.__annotations__]
    given = {name: options.pop(name) for name in names}
    plain = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**plain, **given})
