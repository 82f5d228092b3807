"""The trainer of pairs, and of other responses that a preference loss takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from fusedpo.checks import bad_type, bad_value
from fusedpo.data.padding import RowCollator
from fusedpo.data.rows import some_rows, vocabulary
from fusedpo.functional import LossOutput, preference_loss
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.model_head import aligned_labels, causal_model
from fusedpo.trainers.length_groups import are_on
from fusedpo.trainers.transformers.arguments import check_rows
from fusedpo.trainers.transformers.batches import PreferenceCollator, padding_token
from fusedpo.trainers.transformers.mixin import FusedTrainerMixin


def _check_pairs(loss: PreferenceLoss) -> None:
    """Refuse a loss of other rows than the batches of pairs have, which are made by default."""
    if loss.roles == ("chosen", "rejected"):
        return
    expected = "one that makes batches of other rows than a chosen and a rejected response"
    remedy = "see fusedpo.recipes.short_to_long.ShortToLongCollator"
    if "chosen" not in loss.roles:
        remedy = "for single responses take fusedpo.trainers.responses.ResponseTrainer"
    raise bad_value("data_collator", f"{expected}, with {loss!r}", "none", remedy)


class PreferenceTrainerMixin(FusedTrainerMixin):
    """What a subclass of ``transformers.Trainer`` needs for a preference loss; stands before it
    among the bases.

    Args:
        model: a causal language model; its head is fused, see ``add_fused_head``. None with
            ``model_init``, whose models are prepared likewise, each with its own reference.
        args: batch sizes count pairs.
        loss: one of ``fusedpo.losses``; for one of other responses than a chosen and a rejected
            one, ``data_collator`` makes the batches (``ShortToLongCollator``).
        ref_model: the reference of a loss that compares with one. If not given: a frozen copy of
            ``model`` as it is now. With new LoRA adapters it is ``model`` without them; with others
            a copy of them, and of what else is trained, over the same frozen weights. These are
            refused over weights of 8 bits, and under FSDP and DeepSpeed. ``"base"`` is ``model``
            without its adapters, whatever they have learned.
        memory_budget: what the head may hold at a time, in bytes or as "512MiB".
        gradient_tolerance: the relative error that a gradient of the head may have, as of
            ``linear_logprobs``; if not given that of the model's head, which is 0 unless
            ``add_fused_head`` was told another.
        length_groups: run rows of nearly one length together, each group in a forward of its own
            length, where a batch would be padded to its longest row: the same loss, with at most
            1.1 times the tokens of the rows. If not given, for a loss of more than two responses
            (``ShortToLong``). Not where weights are sharded, not with images or packed rows, and
            not with experts whose load is balanced over a batch: there a batch is one forward.
        options: ``gradient_tolerance``, and as of ``transformers.Trainer``. The datasets have rows
            as ``rows.tokenize`` makes them. Arguments of Trainer and TrainingArguments that change
            a loss of logits are refused.

    The metrics of the loss (``rewards/chosen``, ``rewards/margins``, ...) are logged beside
    ``loss`` as means over all pairs since the last time, with the prefix ``eval_`` in evaluation.
    A mixture of experts whose ``output_router_logits`` is set adds its load-balancing loss.
    """

    functional: ClassVar[Callable[..., LossOutput]] = staticmethod(preference_loss)

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        loss: Loss,
        length_groups: bool | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(loss, PreferenceLoss):
            raise bad_type("loss", "a preference loss, such as fusedpo.losses.SimPO()", repr(loss))
        vocab = vocabulary(model)
        if options.get("data_collator") is None:
            _check_pairs(loss)
            pad = padding_token(options.get("processing_class"), vocab)
            options["data_collator"] = PreferenceCollator(pad)
        collator: Any = options["data_collator"]
        if isinstance(collator, RowCollator):
            if collator.vocab_size is None:
                options["data_collator"] = replace(options["data_collator"], vocab_size=vocab)
            check_rows(options, collator.columns, collator.made_by)
        self.roles = len(loss.roles)
        super().__init__(model, args, loss=loss, **options)
        config = causal_model(self.model).config.get_text_config()
        experts = bool(getattr(config, "output_router_logits", False))
        self.length_groups = are_on(length_groups, self, self.roles, experts=experts)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        # without rows there would be no metrics, and no word of it
        some_rows({"eval_dataset": eval_dataset})
        return super().get_eval_dataloader(eval_dataset)

    def _examples(self, batch: Mapping[str, Tensor]) -> int:
        borders = batch.get("cu_seqlens")
        count = batch["labels"].shape[0] if borders is None else borders.shape[0] - 1
        return int(count) // self.roles

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Also count the pairs and the chosen tokens of the step, [2], averaged over the ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        pairs = sum(self._examples(batch) for batch in batches)
        tokens = sum(self._chosen_tokens(batch) for batch in batches)
        counts = torch.tensor([pairs, tokens], dtype=torch.float64, device=device)
        # gradients are averaged over the ranks too
        return batches, self.accelerator.reduce(counts, "mean")

    def _chosen_tokens(self, batch: Mapping[str, Tensor]) -> int:
        borders, examples = batch.get("cu_seqlens"), self._examples(batch)
        labels = aligned_labels(batch["labels"], borders)
        chosen = labels[:examples] if borders is None else labels[0, : int(borders[examples])]
        return int((chosen != IGNORE_INDEX).sum())

    def _loss_arguments(self, step_counts: Tensor | None) -> dict[str, Any]:
        pairs, tokens = (None, None) if step_counts is None else step_counts.unbind()
        return {"num_items": pairs, "num_tokens": tokens if self.loss.nll_weight else None}

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        count, kept = self._examples(inputs), self._not_repeated(self._examples(inputs))
        if 0 < kept < count and "cu_seqlens" not in inputs:
            inputs = self._first(inputs, kept, count)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics = self.compute_loss(model, inputs, return_outputs=True)
        self._eval_means.add({"loss": loss, **metrics}, kept)
        return loss.detach(), None, None

    def _not_repeated(self, count: int) -> int:
        """How many examples of a batch are not there to give every process as many.

        In the last round accelerate fills the batches with rows of the first ones.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0 or not self.accelerator.even_batches:
            return count
        size = self.args.eval_batch_size
        if self.accelerator.split_batches:
            size //= self.args.world_size
        before = self.args.process_index * size
        return min(max(state.remainder - before, 0), count)

    def _first(self, inputs: Mapping[str, Tensor], kept: int, count: int) -> dict[str, Tensor]:
        """The first examples of a batch, which is of one role's rows after the other's."""
        return {
            name: value.view(-1, count, *value.shape[1:])[:, :kept].flatten(0, 1)
            for name, value in inputs.items()
        }

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As of Trainer, with the loss and its metrics as means over pairs."""
        self._eval_means = self.means()
        halves = (
            (self.args.fp16_full_eval, torch.float16),
            (self.args.bf16_full_eval, torch.bfloat16),
        )
        for asked, dtype in halves:
            # the policy is cast likewise, and stays so
            if asked and not self.is_in_train and self.ref_model is not None:
                self.ref_model.to(dtype)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._eval_means.take(self.accelerator)
        found = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **found})


class PreferenceTrainer(PreferenceTrainerMixin, Trainer):
    __doc__ = PreferenceTrainerMixin.__doc__
