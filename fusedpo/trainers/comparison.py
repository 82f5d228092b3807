"""At the end of a run: one batch of it by the fused loss, and with full logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedpo.benchmarks.compare import (
    Batch,
    compare,
    comparison_table,
    draw_comparison,
    is_comparable,
)
from fusedpo.model_head import Score, aligned_labels, at_head, hidden_and_head
from fusedpo.trainers.config import TrainJob

if TYPE_CHECKING:
    from rich.console import Console

    from fusedpo.trainers.transformers import FusedTrainerMixin


def add_comparison(
    job: TrainJob, trainer: FusedTrainerMixin, rows: list[Any], console: Console
) -> dict[str, Any]:
    """Print and draw the two ways, of some training rows; the numbers, for the run's metrics."""
    comparison = compare(_batch(job, trainer, rows))
    console.print(comparison_table(comparison))
    draw_comparison(job.output / "comparison.png", comparison)
    return comparison.to_json()


def _batch(job: TrainJob, trainer: FusedTrainerMixin, rows: list[Any]) -> Batch:
    """Some training rows, as the trained model sees them."""
    from fusedpo.trainers.transformers import PreferenceCollator

    assert is_comparable(job.loss), "TrainJob refuses to compare another loss"
    collate = PreferenceCollator(pad_token_id=0)
    batch = {
        name: value.to(trainer.args.device)
        for name, value in collate(rows[: trainer.args.train_batch_size]).items()
    }
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden, head = hidden_and_head(model, **inputs)
        reference = None
        if trainer.ref_model is not None:
            reference = _sequence_logprobs(trainer.ref_model, inputs, batch["labels"])
    options = (job.memory_budget, job.gradient_tolerance)
    return Batch(job.loss, hidden.to(head.weight.dtype), head, batch["labels"], reference, *options)


def _sequence_logprobs(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """[B], summed over the response."""
    found, _ = at_head(model, Score(aligned_labels(labels)), **inputs)
    return found.logprob.sum(1)
