r"""Alignment via Optimal Transport (Melnyk et al., arXiv 2406.05882, eqs. 4 and 5).

    M_i = log pi(y_w,i) - log pi(y_l,i),  M^ref_i the same under the reference
    L_k = f(beta (M_(k) - M^ref_(k)))                        paired: both sorted over the batch
    L_k = f(beta (a(y_w)_(k) - a(y_l)_(k)))                  unpaired: each side sorted
    f(z) = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

The batch is what one call sees. Equal numbers keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fusedpo.losses.base import (
    GradientStructure,
    RatioLoss,
    Scores,
    flag,
    hyperparameter,
    inverse_temperature,
    label_smoothing,
    neg_log_sigmoid,
)


@dataclass(frozen=True)
class AOT(RatioLoss):
    """Alignment via Optimal Transport: DPO's loss after sorting over the batch."""

    formula_structure: ClassVar[GradientStructure] = GradientStructure("batch")

    beta: float = inverse_temperature(0.01)
    paired: bool = hyperparameter(True, "sort margins of pairs rather than each side", flag)
    label_smoothing: float = label_smoothing()

    def per_example(self, chosen: Scores, rejected: Scores, **inputs: Any) -> Tensor:
        if self.paired:
            ahead = chosen.logp - rejected.logp
            behind = chosen.given_ref - rejected.given_ref
        else:
            ahead, behind = chosen.ratio, rejected.ratio
        gap = _sorted(ahead) - _sorted(behind)
        return neg_log_sigmoid(self.beta * gap, self.label_smoothing)


def _sorted(values: Tensor) -> Tensor:
    return values.sort(stable=True).values
