"""A trainer's options at the head, and its record of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedpo.model_head import fused_forward
from fusedpo.trainers.trl.replace import Calls


def head_options(trainer: Any) -> dict[str, Any]:
    """What ``patch`` was told, of the head that the trainer's model has."""
    fused = fused_forward(trainer.accelerator.unwrap_model(trainer.model))
    assert fused is not None, "the trainer was built while TRL was patched"
    return fused.options


def note_metrics(trainer: Any, mode: str, metrics: Mapping[str, Tensor]) -> None:
    """Into TRL's record, as means over the ranks, and counted as a call."""
    Calls.count += 1
    names = list(metrics)
    values = torch.stack([metrics[name].float() for name in names])
    means = trainer.accelerator.reduce(values, "mean").tolist()
    for name, mean in zip(names, means, strict=True):
        trainer._metrics[mode][name].append(mean)
