r"""Anchored Preference Optimization (D'Oosterlinck et al., arXiv 2408.06266, eqs. 7 and 8).

    r(y) = beta (log pi(y | x) - log pi_ref(y | x))
    L    = 1 - sigmoid(r(y_w)) + sigmoid(r(y_l))                       zero
    L    = sigmoid(r(y_w)) + 1 - sigmoid(r(y_w) - r(y_l))              down

zero: for chosen responses that are better than the model's own; down: for worse ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.losses.base import RatioLoss, ResponseLoss, Scores


@dataclass(frozen=True)
class APOZero(RatioLoss, ResponseLoss):
    """Anchored Preference Optimization, zero: raises the chosen and lowers the rejected."""

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        r = self.reward(s)
        return torch.sigmoid(r if role == "rejected" else -r)


@dataclass(frozen=True)
class APODown(RatioLoss):
    """Anchored Preference Optimization, down: lowers both, the rejected more."""

    def per_example(self, chosen: Scores, rejected: Scores, **inputs: Any) -> Tensor:
        r_w, r_l = self.reward(chosen), self.reward(rejected)
        return torch.sigmoid(r_w) + torch.sigmoid(r_l - r_w)
