r"""REINFORCE (Williams, "Simple statistical gradient-following algorithms", 1992).

    l_t = -A log pi(y_t)
    L   = mean of l_t over all tokens of the step

With whitened advantages and a clip it is REINFORCE++ (arXiv 2501.03262): use DAPO with
epsilon_high = epsilon_low. GPG is this loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusedpo.losses.base import Aggregation, GradientStructure, PolicyLoss, Tokens


@dataclass(frozen=True)
class REINFORCE(PolicyLoss):
    """REINFORCE: the plain policy gradient, without a ratio."""

    aggregation: ClassVar[Aggregation] = "token_mean"

    formula_structure: ClassVar[GradientStructure] = GradientStructure("token", unit="gate")

    def per_token(self, t: Tokens) -> Tensor:
        return -t.advantage * t.logprob
