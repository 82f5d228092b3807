r"""Noise Contrastive Alignment for pairs (Chen et al., arXiv 2402.05369, eq. 10).

    r(y) = beta (log pi(y | x) - log pi_ref(y | x))
    L    = -log sigmoid(r(y_w)) - 1/2 log sigmoid(-r(y_w)) - 1/2 log sigmoid(-r(y_l))

TRL's ``nca_pair``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusedpo.losses._base import ResponseRatioLoss, inverse_temperature
from fusedpo.losses._links import log_sigmoid
from fusedpo.scores import Scores


@dataclass(frozen=True)
class NCA(ResponseRatioLoss):
    """Noise Contrastive Alignment: raises the chosen's own likelihood, not only the gap."""

    beta: float = inverse_temperature(0.01)

    @property
    def terms(self) -> tuple[str, str, str, str, str]:
        return ("identity", "sum", "identity", "single", "log_sigmoid, three")

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        r = self.reward(s)
        if role == "rejected":
            return 0.5 * log_sigmoid(-r)
        return log_sigmoid(r) + 0.5 * log_sigmoid(-r)
