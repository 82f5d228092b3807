"""KTO: single responses."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks, losses
from fusedpo.liger.base import Preference, Returned, check_rows
from fusedpo.losses.base import one_of
from fusedpo.losses.modifiers import ComparedWith


@dataclass(eq=False)
class LigerFusedLinearKTOLoss(Preference):
    """Liger's KTO: single responses that are desirable or not.

    Args:
        loss_type: Liger's "kto", or TRL's "apo_zero_unpaired", for which ``kl`` plays no part.
    """

    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1
    _: KW_ONLY
    loss_type: str = "kto"

    def _formula(self) -> losses.Loss:
        one_of("kto", "apo_zero_unpaired")("loss_type", self.loss_type)
        return ComparedWith(losses.KTO(self.beta, variant="apo_zero"))

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Returned:
        """As LigerFusedLinearDPOLoss, for any B: the loss, a mean over responses, and what to log.

        Args:
            preference_labels: [B], whether a response is desirable: bool, or 1 and 0. Not optional.
            kl: what log-ratios are compared with, a scalar, [1] or [B], which may be below 0; 0 if
                not given. Not differentiated.

        Returns:
            The loss, and chosen_logps_sum, rejected_logps_sum, chosen_logits_sum,
            rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum, chosen being desirable.
        """
        check_rows(_input, target, "target")
        labels = checks.is_tensor("preference_labels", preference_labels)
        checks.shaped("preference_labels", labels, target.shape[:1], "one a response,")
        inputs: dict[str, Any] = {"desirable": labels}
        if kl is not None and self.loss_type == "kto":
            if checks.is_tensor("kl", kl).numel() != 1:
                checks.shaped("kl", kl, target.shape[:1], "one number, or one a response")
            inputs["z0"] = kl.reshape(-1).expand(target.shape[0])
        head, states = self._head(lin_weight, bias), (ref_input, ref_weight, ref_bias)
        out = self._call(_input, head, target, states, 0.0, **inputs)
        logits = self._mean_logits(_input, head).sum(1) * lin_weight.shape[0]
        return out.loss, tuple(
            torch.where(which, values, 0).sum().to(out.loss.dtype)
            for values in (out.metrics["logps/response"], logits, out.metrics["rewards/response"])
            for which in (labels.bool(), ~labels.bool())
        )
