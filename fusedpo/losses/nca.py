r"""Noise Contrastive Alignment for pairs (Chen et al., arXiv 2402.05369, eq. 10).

    r(y) = beta (log pi(y | x) - log pi_ref(y | x))
    L    = -log sigmoid(r(y_w)) - 1/2 log sigmoid(-r(y_w)) - 1/2 log sigmoid(-r(y_l))

TRL's ``nca_pair``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusedpo.losses.base import (
    RatioLoss,
    ResponseLoss,
    Scores,
    inverse_temperature,
    neg_log_sigmoid,
)


@dataclass(frozen=True)
class NCA(RatioLoss, ResponseLoss):
    """Noise Contrastive Alignment: raises the chosen's own likelihood, not only the gap."""

    beta: float = inverse_temperature(0.01)

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        r = self.reward(s)
        if role == "rejected":
            return 0.5 * neg_log_sigmoid(-r)
        return neg_log_sigmoid(r) + 0.5 * neg_log_sigmoid(-r)
