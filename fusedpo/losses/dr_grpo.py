r"""GRPO Done Right (Liu et al., arXiv 2503.20783, eq. 4).

    l_t = -min(r_t A, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A)
    L   = (1 / (G max_completion_length)) sum of l_t over all tokens of G responses

so that the weight of a token does not depend on the length of its response; TRL and verl 0.9.1
divide by responses and length likewise. Its advantages are not
divided by the group's standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedpo.checks import positive
from fusedpo.losses.base import Aggregation, ClippedLoss, hyperparameter


@dataclass(frozen=True)
class DrGRPO(ClippedLoss):
    """GRPO Done Right: token losses over a constant rather than over the response's length."""

    aggregation: ClassVar[Aggregation] = "sequence_sum"

    max_completion_length: float = hyperparameter(
        3000, "tokens that the sum over a response is divided by", positive
    )

    @property
    def divisor(self) -> float:
        return float(self.max_completion_length)
