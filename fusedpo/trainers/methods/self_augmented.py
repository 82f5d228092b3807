"""Pairs that the model makes of its own text."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fusedpo.data.rows import vocabulary
from fusedpo.losses import Loss, MarginLoss
from fusedpo.losses.base import flag, hyperparameter
from fusedpo.recipes import self_augmented as recipe
from fusedpo.report import PAIR_SIGNALS, Signal
from fusedpo.trainers.methods.base import Defaults, Method

if TYPE_CHECKING:
    from fusedpo.trainers.transformers import FusedTrainerMixin

# responses of which segments are written anew at a time
_GENERATED = 64


@dataclass(frozen=True)
class SelfAugmented(recipe.PairSettings, Method):
    """Pairs that an average of the policy makes, by writing a segment of each response anew.

    Each of several processes writes pairs of its own rows into a buffer of its own, with an average
    that is the same on all of them. Held-out pairs are made likewise, by the policy as it is at the
    start: every process makes all of them, the same ones.
    """

    # papers share acronyms; on the command line this one is the method that writes its own pairs
    names: ClassVar[tuple[str, ...]] = ("sapo", "selfaugmented")
    base: ClassVar[str | None] = "orpo"
    writes: ClassVar[bool] = True
    signals: ClassVar[tuple[Signal, ...]] = (
        *PAIR_SIGNALS,
        Signal("buffer size", "buffer/size", ".0f", "pairs"),
        Signal("buffer reuse", "buffer/reuse", ".2f", "times a pair was drawn"),
        Signal("segments with an end", "segment/eos_share", ".1%", "share"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 16, 100, 1.0)

    skip_shared_prefix: bool = hyperparameter(
        True, "leave out the tokens that both responses begin with, where they cancel", flag
    )

    def check(self, loss: Loss) -> None:
        super().check(loss)
        self.settings().check_loss(loss.needs_reference)

    def settings(self, **others: Any) -> recipe.Settings:
        """Of the recipe: those that are told here, and others."""
        own = {f.name: getattr(self, f.name) for f in fields(recipe.PairSettings)}
        return recipe.Settings(**own, **others)

    def is_saved(self, checkpoint: Path, processes: int) -> bool:
        folder = checkpoint / "self_augmented"
        return all(
            (folder / f"{name}-{rank}.safetensors").is_file()
            for rank in range(processes)
            for name in ("self_augmented", "ahead")
        )

    def trainer(self, model: Any, args: Any, **options: Any) -> FusedTrainerMixin:
        from fusedpo.trainers.self_augmented import (
            MaskSharedPrefix,
            SelfAugmentedCallback,
            SelfAugmentedDataset,
        )
        from fusedpo.trainers.transformers import (
            PreferenceCollator,
            PreferenceTrainer,
            padding_token,
        )
        from fusedpo.trainers.transformers.reference import frozen_copy

        loss, tokenizer = options["loss"], options["processing_class"]
        train, held_out = options["train_dataset"], options["eval_dataset"]
        lengths = (len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in [*train, *held_out])
        settings = self.settings(max_length=max(lengths), seed=args.seed)
        pad = padding_token(tokenizer, vocabulary(model))
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
        source = recipe.SelfAugmented(model, train, settings, rank=args.process_index, **ids)
        # each row once, however often training makes new pairs and however many it keeps
        once = replace(
            settings, seed=args.seed + 1, sample_every=1, buffer_size=max(1, len(held_out))
        )
        by_itself = recipe.SelfAugmented(model, held_out, once, **ids)
        for start in range(0, len(held_out), _GENERATED):
            by_itself.next_batch(min(_GENERATED, len(held_out) - start))
        dataset = SelfAugmentedDataset(source)
        options |= {"train_dataset": dataset, "eval_dataset": list(by_itself.buffer.rows)}
        collator: Any = PreferenceCollator(pad)
        # of sums, what both responses begin with cancels in the margin
        by_sums = isinstance(loss, MarginLoss) and loss.gradient_structure.unit == "margin"
        if self.skip_shared_prefix and by_sums:
            collator = MaskSharedPrefix(collator)
        options["data_collator"] = collator
        if loss.needs_reference and self.ref_mode != "fixed" and hasattr(model, "peft_config"):
            # which is renewed, and so is more than the model without its adapters
            options["ref_model"] = frozen_copy(model)
        trainer = PreferenceTrainer(model, args, **options)
        settings.check_loss(loss.needs_reference, adapters=trainer.ref_model is None)
        trainer.add_callback(SelfAugmentedCallback(dataset, ref_model=trainer.ref_model))
        return trainer
