"""A loss of pairs by name in TRL's ``DPOTrainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from fusedpo.checks import bad_type, bad_value
from fusedpo.data.rows import vocabulary
from fusedpo.functional import LossOutput, preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import PreferenceLoss
from fusedpo.model_head import Score, aligned_labels
from fusedpo.trainers.forwards import Batch, moved
from fusedpo.trainers.length_groups import are_on, in_length_groups
from fusedpo.trainers.transformers import padding_token
from fusedpo.trainers.trl.collator import Collator, long_columns
from fusedpo.trainers.trl.configs import FusedDPOConfig
from fusedpo.trainers.trl.record import head_options, note_metrics

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


# what of a batch is the loss's, not the model's
_NOT_OF_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_LONG, _NUMBER = "long_prompt", "row_number"


class LossOfPairs(Base):  # type: ignore[misc]
    """For a subclass of TRL's ``DPOTrainer``: the loss that its configuration names."""

    fused_loss: PreferenceLoss | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        loss = config.the_loss() if isinstance(config, FusedDPOConfig) else None
        if loss is None:
            super().__init__(*args, **kwargs)
            return
        if kwargs.get("compute_metrics", args[7] if len(args) > 7 else None) is not None:
            raise bad_value("compute_metrics", "None with fused_loss, as no logits are made", "one")
        self.fused_loss = loss
        model = kwargs.get("model", args[0] if args else None)
        adapted = kwargs.get("peft_config") is not None or hasattr(model, "get_base_model")
        unneeded = not loss.needs_reference and not adapted
        if unneeded and len(args) < 2 and kwargs.get("ref_model") is None:
            # else TRL would load one
            kwargs["ref_model"] = torch.nn.Identity()
        super().__init__(*args, **kwargs)
        if unneeded:
            self.ref_model = None
        names = (*loss.inputs, *long_columns(loss))
        self._further_columns = names
        plain: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = Collator(plain, tuple(loss.inputs), len(loss.roles))
        self._length_groups = are_on(
            self.args.length_groups, self, len(loss.roles), experts=self.aux_loss_enabled
        )
        if self.args.self_augmented:
            _augment(self)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in getattr(self, "_further_columns", ()):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        loss = self.fused_loss
        if loss is None:
            return super()._prepare_dataset(dataset, processing_class, args, name)
        # of a stream that was mapped they are not known
        columns = dataset.column_names or list(next(iter(dataset)))
        if args.self_augmented and "rejected" not in columns and "rejected_ids" not in columns:
            # what stands here is not trained on
            dataset = dataset.map(lambda row: {"rejected": row["chosen"]})
        for column, about in loss.inputs.items():
            if about.default is None and column not in columns:
                expected = f"a column {column!r}: {about.meaning}"
                raise bad_value(f"{name} dataset", expected, str(columns))
        if not long_columns(loss) or "long_prompt_ids" in columns:
            return super()._prepare_dataset(dataset, processing_class, args, name)
        if _LONG not in columns:
            raise bad_value(f"{name} dataset", f"a column {_LONG!r}", str(columns))
        if not isinstance(dataset, Dataset):
            raise bad_type(f"{name} dataset", "a datasets.Dataset", type(dataset).__name__)
        # TRL drops rows that do not fit, of either kind: what is left of both belongs together
        numbered = dataset.add_column(_NUMBER, list(range(len(dataset))))
        longer = numbered.map(lambda row: {"prompt": row[_LONG]})
        prepared, longer = (
            super(LossOfPairs, self)._prepare_dataset(each, processing_class, args, name)
            for each in (numbered, longer)
        )
        long_ids = dict(zip(longer[_NUMBER], longer["prompt_ids"], strict=True))
        prepared = prepared.filter(lambda row: row[_NUMBER] in long_ids)
        return prepared.map(lambda row: {"long_prompt_ids": long_ids[row[_NUMBER]]})

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        # there are no logits to return
        only = prediction_loss_only or self.fused_loss is not None
        return super().prediction_step(model, inputs, only, ignore_keys)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        loss = self.fused_loss
        if loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        if return_outputs:
            expected = "False with fused_loss, as no logits are made"
            raise bad_value("return_outputs", expected, "True")
        extra = {name: inputs[name] for name in loss.inputs if name in inputs}
        apart = (*_NOT_OF_MODEL, *extra)
        of_model = {name: value for name, value in inputs.items() if name not in apart}
        of_model["use_cache"] = False
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        batch = Batch(of_model, aligned_labels(labels))
        if self._length_groups:
            batch = in_length_groups(batch, self.accelerator)
        reference = self._reference_of(inputs, batch)
        if self.aux_loss_enabled:
            of_model["output_router_logits"] = True
        found: list[LossOutput] = []

        def task(hidden: Tensor, head: Head) -> Tensor:
            given = {"labels": batch.labels, "ref_logprobs": reference, **extra}
            output = preference_loss(
                loss,
                hidden,
                head.weight,
                cu_seqlens=batch.cu_seqlens,
                **head_options(self),
                **head.options(),
                **moved(given, hidden.device),
            )
            found.append(output)
            return output.loss

        value, aux_loss = batch.at_head(model, task)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum()
            self._total_train_tokens += int(tokens) // getattr(self, "_tp_size", 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled and aux_loss is not None:
            value = value + self.router_aux_loss_coef * aux_loss
            found[0].metrics["aux_loss"] = aux_loss.detach()
        note_metrics(self, mode, found[0].metrics)
        return value

    def _reference_of(self, inputs: dict[str, Any], batch: Batch) -> Tensor | None:
        """Log-probabilities under the reference, shaped as the labels or per sequence, or None."""
        loss = self.fused_loss
        if loss is None or not loss.needs_reference:
            return None
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        score = Score(batch.labels, **head_options(self))
        options = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, options):
            if self.ref_model is None:
                inner = self.accelerator.unwrap_model(self.model)
                with use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
                    found, _ = batch.at_head(self.model, score)
            else:
                found, _ = batch.at_head(self.ref_model, score)
        logprobs: Tensor = found.logprob
        return logprobs


def _augment(trainer: Any) -> None:
    """Train on pairs that an average of the model makes of the dataset's responses."""
    from fusedpo.recipes.self_augmented import SelfAugmented
    from fusedpo.trainers.self_augmented import SelfAugmentedCallback, SelfAugmentedDataset

    settings = trainer.args.settings_of_pairs()
    needs_reference = trainer.fused_loss.needs_reference
    settings.check_loss(needs_reference, adapters=trainer.ref_model is None)
    tokenizer = trainer.processing_class
    rows = [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": row["chosen_ids"]}
        for row in trainer.train_dataset
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    source = SelfAugmented(
        model,
        rows,
        settings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_token(tokenizer, vocabulary(model)),
        rank=trainer.accelerator.process_index,
    )
    trainer.train_dataset = SelfAugmentedDataset(source)
    trainer.add_callback(SelfAugmentedCallback(trainer.train_dataset, ref_model=trainer.ref_model))
