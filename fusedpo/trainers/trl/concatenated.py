"""CPO and ORPO: what their ``concatenated_forward`` does with the logits is replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.model_head import Score, aligned_labels, mean_logits
from fusedpo.trainers.trl import places
from fusedpo.trainers.trl.at_head import Method, at_fused_head, without_logits
from fusedpo.trainers.trl.places import still_trls
from fusedpo.trainers.trl.replace import Options, replace
from fusedpo.trainers.trl.whole_pairs import of_whole_pairs


def concatenated_forward(original: Method, options: Options) -> Method:
    """CPO's and ORPO's ``concatenated_forward`` without logits.

    They differ in what the cross-entropy of the chosen responses counts, whether log-probabilities
    are averaged, and in the positions whose logits are averaged for the metrics.
    """

    def forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        if self.is_encoder_decoder:
            result: tuple[Any, ...] = original(self, model, batch)
            return result
        orpo = not hasattr(self, "cpo_alpha")
        rows = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=self.padding_value if orpo else self.pad_token_id,
            device=self.accelerator.device,
        )
        pairs = batch["chosen_labels"].shape[0]
        ids, attended = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        labels = rows["concatenated_labels"]
        wanted = labels
        if orpo:  # the cross-entropy counts the prompt too
            wanted = labels.clone()
            wanted[:pairs] = torch.where(attended[:pairs] == 1, ids[:pairs], IGNORE_INDEX)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attended, "use_cache": False}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        wanted, labels = aligned_labels(wanted), aligned_labels(labels)
        score = Score(wanted, **vars(options))

        def task(hidden: Tensor, head: Head) -> tuple[Tensor | None, Tensor]:
            budget, backend = options.memory_budget, options.backend
            # of every position, scored or not
            means = mean_logits(hidden, head, memory_budget=budget, backend=backend)
            return score(hidden, head).logprob, means

        (logprob, mean_logit), aux_loss = at_fused_head(model, options, task, inputs)
        scored = labels != IGNORE_INDEX
        sums = logprob.masked_fill(~scored, 0).sum(1)
        averaged = orpo or self.loss_type in ("ipo", "simpo")
        logps = sums / scored.sum(1) if averaged else sums
        if orpo or self.cpo_alpha != 0:
            counted = wanted[:pairs] != IGNORE_INDEX
            nll = -logprob[:pairs].sum() / counted.sum()
        else:
            nll = logprob.new_zeros(())
        if orpo:
            mean_logit = mean_logit[:, :-1]
        result = (logps[:pairs], logps[pairs:], mean_logit[:pairs], mean_logit[pairs:], nll)
        return (*result, aux_loss) if self.aux_loss_enabled else result

    return without_logits(forward, original)


def replace_concatenated(options: Options) -> dict[str, str]:
    """Reach CPO and ORPO."""
    reached = {}
    for method in ("cpo", "orpo"):
        cls = places.class_of(method)
        original = getattr(cls, "concatenated_forward", None)
        if original is not None and still_trls(original):
            replace(cls, "concatenated_forward", concatenated_forward(original, options))
            replace(cls, "get_batch_loss_metrics", of_whole_pairs(cls.get_batch_loss_metrics))
            reached[method.upper()] = ""
    return reached
