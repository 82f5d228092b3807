r"""Binary Classifier Optimization for pairs (Jung et al., arXiv 2404.04656, eq. 9 without shift).

    r(y) = beta (log pi(y | x) - log pi_ref(y | x))
    L    = -log sigmoid(r(y_w)) - log sigmoid(-r(y_l))

The paper's shift of the rewards is left out, as in TRL's ``bco_pair``.
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
class BCO(RatioLoss, ResponseLoss):
    """Binary Classifier Optimization: chosen and rejected classified by their rewards' sign."""

    beta: float = inverse_temperature(0.01)

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        r = self.reward(s)
        return neg_log_sigmoid(-r if role == "rejected" else r)
