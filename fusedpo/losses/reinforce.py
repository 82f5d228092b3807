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

from fusedpo.losses._policy import Aggregation, PolicyLoss
from fusedpo.scores import Tokens


@dataclass(frozen=True)
class REINFORCE(PolicyLoss):
    """REINFORCE: the plain policy gradient, without a ratio."""

    aggregation: ClassVar[Aggregation] = "token_mean"

    @property
    def sees_sequences(self) -> bool:
        return False

    @property
    def terms(self) -> tuple[str, str, str, str, str]:
        return ("identity", "token mean", "identity", "advantage", "linear")

    def per_token(self, t: Tokens) -> Tensor:
        return -t.advantage * t.logprob
