"""A policy loss by name in TRL's ``GRPOTrainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.functional import LossOutput, policy_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.model_head import aligned_labels, at_head, strip_virtual_tokens
from fusedpo.trainers.forwards import moved
from fusedpo.trainers.trl.configs import FusedGRPOConfig
from fusedpo.trainers.trl.record import head_options, note_metrics

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


# of a batch of responses to images, as TRL passes them on
_OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class LossOfGroups(Base):  # type: ignore[misc]
    """For a subclass of TRL's ``GRPOTrainer``: the policy loss that its configuration names."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        loss = self.args.the_loss() if isinstance(self.args, FusedGRPOConfig) else None
        if loss is None:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"]
        scored = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        before = inputs["prompt_ids"].shape[1]
        labels = ids.clone()
        labels[:, :before] = IGNORE_INDEX
        labels[:, before:] = labels[:, before:].masked_fill(scored == 0, IGNORE_INDEX)
        of_model = {
            "input_ids": ids,
            "attention_mask": torch.cat([inputs["prompt_mask"], mask], 1),
            "use_cache": False,
        }
        if inputs.get("num_images") is not None:
            expected = "None with images in the prompts"
            raise bad_value("fused_loss", expected, repr(loss), "leave it out")
        of_model |= {n: inputs[n] for n in _OF_IMAGES if inputs.get(n) is not None}
        if self.aux_loss_enabled:
            of_model["output_router_logits"] = True

        def placed(values: Tensor | None, *, whole: bool = False) -> Tensor | None:
            """[B, T] from values of the completion [B, C]: position t predicts token t + 1.

            whole: or [B] from one number a response, [B] or [B, 1].
            """
            if values is None or (whole and values.dim() == 1):
                return values
            if whole and values.shape[1] == 1:
                return values[:, 0]
            return torch.nn.functional.pad(values, (before - 1, 1))

        share = self.current_gradient_accumulation_steps if mode == "train" else 1
        counts: dict[str, Any] = {}
        if loss.aggregation == "token_mean":
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if mode == "train":
                tokens = tokens * share / self.args.steps_per_generation
            counts["num_tokens"] = tokens
        else:
            counts["num_items"] = ids.shape[0] * share
            if loss.entropy_bonus:
                counts["num_tokens"] = scored.sum().clamp(min=1) * share
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        found: list[LossOutput] = []

        def task(hidden: Tensor, head: Head) -> Tensor:
            given = {
                "labels": aligned_labels(labels),
                "advantages": placed(inputs["advantages"], whole=True),
                "old_logprobs": placed(inputs.get("old_per_token_logps")),
            }
            if loss.kl_weight:
                given["ref_logprobs"] = placed(inputs["ref_per_token_logps"])
            if corrected:
                ratio = inputs["importance_sampling_ratio"]
                given["importance_weights"] = placed(ratio, whole=True)
            output = policy_loss(
                loss,
                strip_virtual_tokens(hidden, labels),
                head.weight,
                log_entropy=True,
                temperature=self.temperature,
                **moved(counts, hidden.device),
                **head_options(self),
                **head.options(),
                **moved(given, hidden.device),
            )
            found.append(output)
            return output.loss

        value, aux_loss = at_head(model, task, **of_model)
        if self.aux_loss_enabled and aux_loss is not None:
            value = value + self.router_aux_loss_coef * aux_loss / share
            found[0].metrics["aux_loss"] = aux_loss.detach()
        note_metrics(self, mode, found[0].metrics)
        return value
