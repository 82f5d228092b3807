"""Training on single responses that are desirable or not, and what KTO's z0 is made of.

    trainer = ResponseTrainer(
        model, TrainingArguments("out", report_to="none"), loss=KTO(),
        train_dataset=rows, processing_class=tokenizer,
    )

The reference point z0 estimates the KL divergence from the reference model by mismatched rows
(Ethayarajh et al., arXiv 2402.01306, section 4.1): each prompt of a batch with the response of the
row before it, the first one with that of the last, as in TRL. It is the mean of their log-ratios
over all processes, taken for each batch by a forward of its own without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fusedpo.data.padding import further_inputs
from fusedpo.data.rows import vocabulary
from fusedpo.data.tokenizing import keep_end
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import Loss
from fusedpo.trainers.forwards import Batch
from fusedpo.trainers.methods.responses import check_loss, check_size, takes_kl
from fusedpo.trainers.transformers import (
    PreferenceCollator,
    PreferenceTrainerMixin,
    padding_token,
)
from fusedpo.trainers.transformers.means import Means

__all__ = ["ResponseCollator", "ResponseTrainer", "ResponseTrainerMixin"]

# of the mismatched rows in a batch
_MISMATCHED = "kl_"
# what is logged as a mean over the responses of one kind
_KINDS = ("chosen", "rejected")


@dataclass(frozen=True)
class ResponseCollator(PreferenceCollator):
    """Rows of token ids to one batch of P sequences, and as many mismatched ones.

    Attributes:
        mismatched: also make the mismatched rows, for a loss that takes ``kl``.
        max_length: tokens of a mismatched row; a longer one loses the start of its prompt first,
            and then the end of its response. As long as it gets if None.
        bos_token_id: of the tokenizer, which such a prompt keeps.
        pad_token_id, pad_to_multiple_of, packed, vocab_size: as of ``PreferenceCollator``.
    """

    mismatched: bool = True
    max_length: int | None = None
    bos_token_id: int | None = None

    columns: ClassVar[tuple[str, ...]] = ("prompt_ids", "completion_ids")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Each row has prompt_ids, completion_ids, and in ``inputs`` whether it is desirable.

        Returns:
            As of ``PreferenceCollator``, of P sequences, and ``desirable`` [P] fp32. Those of the
            mismatched rows have the prefix ``kl_``. One row alone has no other response; its
            mismatched row has no labels.

        Raises:
            ValueError: as of ``PreferenceCollator``.
        """
        self.check(rows)
        prompts = [row["prompt_ids"] for row in rows]
        responses = [row["completion_ids"] for row in rows]
        batch = self.joined(prompts, responses)
        batch |= further_inputs(rows)
        if self.mismatched:
            pairs = zip(prompts, mismatched(responses), strict=True)
            others = self.joined(*zip(*(self._cut(*pair) for pair in pairs), strict=True))
            if len(rows) == 1:
                others["labels"] = torch.full_like(others["labels"], IGNORE_INDEX)
            batch |= {_MISMATCHED + name: value for name, value in others.items()}
        return batch

    def _cut(self, prompt: Any, response: Any) -> tuple[Any, Any]:
        if self.max_length is None or len(prompt) + len(response) <= self.max_length:
            return prompt, response
        room = max(1, self.max_length - len(response))
        kept = keep_end(list(prompt), room, self.bos_token_id)
        return kept, response[: self.max_length - len(kept)]


def mismatched(responses: list[Any]) -> list[Any]:
    """For each row of a batch the response of the one before it, in a circle."""
    return responses[-1:] + responses[:-1]


class _MeansOfKinds(Means):
    """Means in which what is of one kind of responses counts by how many of them there are."""

    def add(self, metrics: Mapping[str, Tensor], pairs: int) -> None:
        share = metrics["share"]
        shares = {"chosen": share, "rejected": 1 - share}
        weighted = {
            name: torch.where(shares[kind] > 0, value * shares[kind], 0.0)
            if (kind := name.rpartition("/")[2]) in shares
            else value
            for name, value in metrics.items()
        }
        super().add(weighted, pairs)

    def take(self, accelerator: Any) -> dict[str, float]:
        """As of Means; a kind that there was no response of is left out, as in TRL."""
        found = super().take(accelerator)
        if not found:
            return found
        share = found.pop("share")
        found.pop("rewards/margins")
        for kind, of_kind in zip(_KINDS, (share, 1 - share), strict=True):
            for name in [name for name in found if name.endswith(f"/{kind}")]:
                mean = found.pop(name)
                if of_kind > 0:
                    found[name] = mean / of_kind
        if all(f"rewards/{kind}" in found for kind in _KINDS):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


class ResponseTrainerMixin(PreferenceTrainerMixin):
    """What a subclass of ``transformers.Trainer`` needs for KTO; stands before it among the bases.

    Rows have prompt_ids, completion_ids and inputs={"desirable": 1.0 or 0.0}. Arguments are those
    of ``PreferenceTrainerMixin``; batch sizes count responses, and are of at least 2 on each
    process where the loss takes ``kl``. A last batch of one row has no mismatched one: where no
    process has any, z0 is 0.

    ``rewards/chosen``, ``logps/chosen`` and the same of ``rejected`` are logged as means over the
    desirable and the undesirable responses, ``rewards/margins`` as the difference, ``kl`` as z0.

    Raises:
        ValueError: for a batch size of 1 and a loss with ``kl``, and for a loss of other responses.
    """

    means: ClassVar[type[Means]] = _MeansOfKinds

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        loss: Loss,
        **options: Any,
    ) -> None:
        args = args or TrainingArguments()
        check_loss(loss)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            check_size(loss, name, getattr(args, name))
        if options.get("data_collator") is None:
            tokenizer = options.get("processing_class")
            options["data_collator"] = ResponseCollator(
                padding_token(tokenizer, vocabulary(model)),
                mismatched=takes_kl(loss),
                max_length=getattr(getattr(model, "config", None), "max_position_embeddings", None),
                bos_token_id=getattr(tokenizer, "bos_token_id", None),
            )
        super().__init__(model, args, loss=loss, **options)

    def _batch(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows themselves, and what the loss takes of the mismatched ones."""
        own = {n: v for n, v in inputs.items() if not n.startswith(_MISMATCHED)}
        if takes_kl(self.loss):
            others = {n.removeprefix(_MISMATCHED): inputs[n] for n in inputs if n not in own}
            own["kl"] = self._mean_log_ratio(model, Batch.of(others), self._examples(own))
        return own

    @torch.no_grad()
    def _mean_log_ratio(self, model: Any, batch: Batch, rows: int) -> Tensor:
        """Of mismatched rows, over all processes: each has its part in the sum."""
        batch = self._in_groups(batch)
        logprobs = self._logprobs_of(batch)
        policy, _ = batch.at_head(model, logprobs)
        reference = self._reference(model, batch)
        if isinstance(reference, tuple):
            reference = logprobs(*reference)
        assert reference is not None, "KTO has a reference"
        total = (policy - reference.to(policy.device)).double().sum()
        counted = rows if model.training else self._not_repeated(rows)
        there = (batch.labels != IGNORE_INDEX).any().to(total)
        sums = torch.stack([total * (counted / rows), there * counted])
        total, count = self.accelerator.reduce(sums, "sum").unbind()
        return total / count.clamp(min=1)

    def _further_metrics(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # a mean over the desirable ones says nothing without how many they are
        return {"share": batch["desirable"].mean()}


class ResponseTrainer(ResponseTrainerMixin, Trainer):
    __doc__ = ResponseTrainerMixin.__doc__
