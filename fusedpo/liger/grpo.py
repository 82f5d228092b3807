"""GRPO: sampled responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedpo import checks, losses
from fusedpo.distributed import global_count
from fusedpo.functional import policy_loss
from fusedpo.liger.base import Fused, Returned, check_rows, reference_states
from fusedpo.losses.base import one_of

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # whose ratios may be of whole responses
_GRPO = (*_CLIPPED, "cispo", "sapo", "vespo")


@dataclass(eq=False)
class LigerFusedLinearGRPOLoss(Fused):
    """Liger's GRPO: a policy-gradient loss of sampled responses.

    Args:
        epsilon_low, epsilon_high: how far below and above 1 a ratio counts; for "cispo"
            epsilon_high is the most that it counts.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: what "dr_grpo" divides the sum over a response by.
        importance_sampling_level: "token", or "sequence" for ratios of whole responses, which
            "cispo", "sapo" and "vespo" have not.
        temperature: divides the logits, the reference's too.
        delta: the most that a ratio counts, clipped or not; above 1, or None.
        use_bias_correction_kl: whether the divergence is multiplied by the ratio.
        sapo_temperature_pos, sapo_temperature_neg: of "sapo".
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo".
    """

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def _check_options(self) -> None:
        kind = one_of(*_GRPO)("loss_type", self.loss_type)
        clipped = kind in _CLIPPED  # and only then of whole responses
        levels = ("token", "sequence") if clipped else ("token",)
        one_of(*levels)(f"importance_sampling_level of {kind!r}", self.importance_sampling_level)
        if kind == "dr_grpo":
            checks.positive("max_completion_length", self.max_completion_length)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            checks.positive(name, getattr(self, name))
        if self.delta is not None and checks.positive("delta", self.delta) <= 1 and clipped:
            raise checks.bad_value("delta", "a number above 1, or None", f"{self.delta:g}")

    def _formula(self) -> losses.PolicyLoss:
        """What a token loses. Liger's clipped types differ in what the sum is divided by alone."""
        self._check_options()
        kind, whole = self.loss_type, self.importance_sampling_level == "sequence"
        shared: dict[str, Any] = {
            "kl_weight": self.beta if self.use_ref_model else 0.0,
            "kl_estimator": "k3_corrected" if self.use_bias_correction_kl else "k3",
        }
        if kind == "cispo":
            return losses.CISPO(epsilon_high=self.epsilon_high, **shared)
        if kind == "sapo":
            shared["tau_pos"] = self.sapo_temperature_pos
            return losses.SoftAdaptive(tau_neg=self.sapo_temperature_neg, **shared)
        if kind == "vespo":
            shared |= {"k_pos": self.vespo_k_pos, "k_neg": self.vespo_k_neg}
            # a decay below 1e-4 is 1e-4, as in Liger and TRL
            above, below = (max(x, 1e-4) for x in (self.vespo_lambda_pos, self.vespo_lambda_neg))
            return losses.VESPO(lambda_pos=above, lambda_neg=below, **shared)
        shared |= {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        averaged, summed = (losses.GSPO, losses.LUSPO) if whole else (losses.GRPO, losses.DAPO)
        return (averaged if kind == "grpo" else summed)(ratio_cap=self.delta, **shared)

    def _denominator(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor | float | None:
        """What the sum over all tokens is divided by; None: the mean that the formula is."""
        kind, responses = self.loss_type, mask.shape[0]
        if kind in ("grpo", "sapo"):
            return None
        if kind in ("luspo", "dr_grpo"):
            length = self.max_completion_length if kind == "dr_grpo" else None
            return float(responses * (length or 1))
        tokens = mask.sum()
        if kind != "bnpo" and num_items is None:
            tokens = global_count(tokens)
        elif kind != "bnpo":
            ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            tokens = torch.as_tensor(num_items, device=mask.device).detach().double() / ranks
        return tokens.double().clamp(min=1.0)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Returned:
        """As LigerFusedLinearDPOLoss, for any B: the loss, and what to log.

        Args:
            selected_token_ids, attention_mask: [B, T], what _input predicts; 1 if it counts, or 0.
            advantages: [B].
            ref_per_token_logps, old_per_token_logps: [B, T], under the reference, in place of
                ref_input, and under the policy that sampled; the policy itself if not given.
            vllm_is_ratio: importance weights, [B] or [B, 1]; [B, T] for ratios of tokens, but not
                in "vespo".
            num_items_in_batch: tokens of the whole step, on all processes, for "dapo", "cispo" and
                "vespo"; those of this call, on all processes, if not given.

        Returns:
            The loss; the mean divergence from the reference, if beta is not 0; and the share of
            tokens, under "sequence" of responses, whose ratio was clipped.
        """
        ids, loss = selected_token_ids, self._formula()
        check_rows(_input, ids, "selected_token_ids")
        mask = checks.is_tensor("attention_mask", attention_mask) != 0
        checks.shaped("attention_mask", mask, ids.shape, "that of selected_token_ids")
        checks.same_device(_input=_input, attention_mask=mask)
        if mask.device.type == "cpu" and not bool((attention_mask == mask).all()):
            raise checks.bad_value("attention_mask", "1 or 0", "other numbers")
        checks.shaped("advantages", checks.floating("advantages", advantages), ids.shape[:1], "[B]")
        options = {"temperature": self.temperature, "advantages": advantages, **self._options}
        options["old_logprobs"] = old_per_token_logps
        if vllm_is_ratio is not None:
            whole = self.importance_sampling_level == "sequence" or self.loss_type == "vespo"
            options["importance_weights"] = _importance_weights(vllm_is_ratio, ids.shape, whole)
        if loss.kl_weight and ref_per_token_logps is not None:
            options["ref_logprobs"] = ref_per_token_logps
        elif loss.kl_weight:
            either = "ref_per_token_logps or ref_input"
            options |= reference_states(either, ref_input, ref_weight, ref_bias)
        counted = "num_tokens" if loss.aggregation == "token_mean" else "num_items"
        options[counted] = self._denominator(mask, num_items_in_batch)
        # an id that is the ignored label by chance is to be refused like any other wrong one
        labels = ids.clamp(min=-1).masked_fill(~mask, self.ignore_index)
        out = policy_loss(loss, _input, self._head(lin_weight, bias), labels, **options)
        zero = torch.zeros_like(out.loss)
        divergence = (out.metrics.get("kl", zero),) if self.beta else ()
        names = ("clip_ratio/region_mean", "cispo_clip_ratio")
        clipped = next((out.metrics[name] for name in names if name in out.metrics), zero)
        return out.loss, (*divergence, clipped)


def _importance_weights(ratios: object, shape: torch.Size, whole: bool) -> Tensor:
    """[B], or [B, T] unless ratios are of whole responses."""
    weights, rows = checks.floating("vllm_is_ratio", ratios), shape[0]
    if weights.shape in ((rows,), (rows, 1)):
        return weights.reshape(-1)
    if whole or weights.shape != shape:
        expected = f"[{rows}] or [{rows}, 1]" + " of ratios of whole responses" * whole
        expected += f" or {list(shape)}" * (not whole)
        raise checks.bad_value("vllm_is_ratio", expected, str(list(weights.shape)))
    return weights
