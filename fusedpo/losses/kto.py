r"""Kahneman-Tversky Optimization (Ethayarajh et al., arXiv 2402.01306, eq. 8).

    a(y) = log pi(y | x) - log pi_ref(y | x)
    z0   = max(0, mean of a over mismatched responses), without a gradient
    L    = w_D (1 - sigmoid(beta (a - z0)))         desirable
    L    = w_U (1 - sigmoid(beta (z0 - a)))         undesirable

variant="apo_zero" has z0 = 0 (TRL's ``apo_zero_unpaired``) and takes no ``kl``. Rows are single
responses, each with its label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.checks import non_negative
from fusedpo.losses.base import (
    Input,
    RatioLoss,
    ResponseLoss,
    Scores,
    hyperparameter,
    one_of,
    pick,
)

_DESIRABLE = Input(
    "whether the response is desirable: True or 1, False or 0", low=0.0, high=1.0, binary=True
)
_KL = Input(
    "the estimate z0, or log-ratios of mismatched responses, whose mean it is; 0 at least",
    per="any",
)


@dataclass(frozen=True)
class KTO(RatioLoss, ResponseLoss):
    """Kahneman-Tversky Optimization: single responses that are desirable or not."""

    desirable_weight: float = hyperparameter(1.0, "weight of desirable responses", non_negative)
    undesirable_weight: float = hyperparameter(1.0, "weight of undesirable ones", non_negative)
    variant: Literal["kto", "apo_zero"] = hyperparameter(
        "kto", "where rewards are compared with: z0 or 0", one_of("kto", "apo_zero")
    )

    @property
    def roles(self) -> tuple[str, ...]:
        return ("response",)

    @property
    def inputs(self) -> Mapping[str, Input]:
        known = {"desirable": _DESIRABLE}
        return MappingProxyType(known if self.variant == "apo_zero" else {**known, "kl": _KL})

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        desirable = inputs["desirable"].bool()
        a = s.ratio
        if self.variant == "kto":
            a = a - inputs["kl"].to(a.dtype).mean().clamp(min=0)
        sign = pick(desirable, 1.0, -1.0)
        weight = pick(desirable, self.desirable_weight, self.undesirable_weight)
        # 1 - sigmoid(u) would round a small loss to 0
        return weight * torch.sigmoid(-self.beta * sign * a)

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        """Means over the desirable ("chosen") and the undesirable responses; NaN without any."""
        (s,) = responses
        desirable = inputs["desirable"].bool()
        reward, logp = self.reward(s), s.logp

        def mean(values: Tensor, which: Tensor) -> Tensor:
            return torch.where(which, values, 0.0).sum() / which.sum()

        chosen, rejected = mean(reward, desirable), mean(reward, ~desirable)
        found = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": mean(logp, desirable),
            "logps/rejected": mean(logp, ~desirable),
        }
        if self.variant == "kto":
            found["kl"] = inputs["kl"].to(reward.dtype).mean().clamp(min=0)
        return found
