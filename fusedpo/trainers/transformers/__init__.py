"""Preference training with ``transformers.Trainer``, without logits.

    trainer = PreferenceTrainer(
        model, TrainingArguments("out", report_to="none"), loss=SimPO(),
        train_dataset=rows, processing_class=tokenizer,
    )
    trainer.train()

Batches are pairs: the chosen rows, then the rejected rows. A model is entered through its wrapper,
so that what the wrapper does before and after a forward (DistributedDataParallel, FSDP, autocast)
is done; see ``add_fused_head``. A trainer of one's own gets the same by a mixin:

    class MyTrainer(PreferenceTrainerMixin, Trainer): ...
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fusedpo.trainers.transformers needs transformers: pip install 'fusedpo[demo]'"
    ) from error

from fusedpo.model_head import add_fused_head, hidden_and_head, remove_fused_head
from fusedpo.trainers.transformers.batches import PreferenceCollator, padding_token
from fusedpo.trainers.transformers.mixin import FusedTrainer, FusedTrainerMixin
from fusedpo.trainers.transformers.pairs import PreferenceTrainer, PreferenceTrainerMixin

__all__ = [
    "FusedTrainer",
    "FusedTrainerMixin",
    "PreferenceCollator",
    "PreferenceTrainer",
    "PreferenceTrainerMixin",
    "add_fused_head",
    "hidden_and_head",
    "padding_token",
    "remove_fused_head",
]
