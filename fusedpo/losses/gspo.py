r"""Group Sequence Policy Optimization (Zheng et al., arXiv 2507.18071, eq. 5).

    s = exp(mean over tokens of (log pi(y_t) - log pi_old(y_t)))
    l = -min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A)
    L = mean of l over responses

Advantages are one number a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusedpo.checks import non_negative
from fusedpo.losses.base import ClippedLoss, GradientStructure, Tokens, exponential, hyperparameter


@dataclass(frozen=True)
class GSPO(ClippedLoss):
    """Group Sequence Policy Optimization: the clipped ratio of whole responses."""

    epsilon_low: float = hyperparameter(3e-4, "how far below 1 a ratio counts", non_negative)
    epsilon_high: float = hyperparameter(4e-4, "how far above 1 a ratio counts", non_negative)

    formula_structure: ClassVar[GradientStructure] = GradientStructure("sequence", unit="gate")

    def ratio(self, t: Tokens) -> Tensor:
        return exponential(t.mean(t.delta))
