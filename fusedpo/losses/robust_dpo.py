r"""Robust DPO (Ray Chowdhury, Kini and Natarajan, arXiv 2403.00409, eq. 12).

    z = beta (a(y_w) - a(y_l)),   a(y) = log pi(y | x) - log pi_ref(y | x)
    L = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)

An unbiased estimate of DPO's loss when a share e of the preferences is flipped. For e > 0 it is not
bounded from below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusedpo.losses.base import MarginLoss, RatioLoss, label_smoothing, neg_log_sigmoid


@dataclass(frozen=True)
class RobustDPO(RatioLoss, MarginLoss):
    """Robust DPO: DPO's loss, debiased for a known share of flipped preferences."""

    label_smoothing: float = label_smoothing(0.1)

    def of_margin(self, margin: Tensor, **inputs: Any) -> Tensor:
        z, e = self.beta * margin, self.label_smoothing
        # (1 - e) l(z) - e l(-z) with l(-z) = l(z) + z
        return neg_log_sigmoid(z) - e / (1 - 2 * e) * z
