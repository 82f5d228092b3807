r"""Decoupled clip and dynamic sampling Policy Optimization (Yu et al., arXiv 2503.14476, eq. 8).

    l_t = -min(r_t A, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A)
    L   = mean of l_t over all tokens of the step

Its dynamic sampling and overlong shaping are done to the data. TRL's ``bnpo`` is this mean over one
micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedpo.checks import non_negative
from fusedpo.losses.base import Aggregation, ClippedLoss, hyperparameter


@dataclass(frozen=True)
class DAPO(ClippedLoss):
    """Decoupled clip Policy Optimization: clips higher above than below, mean over all tokens."""

    aggregation: ClassVar[Aggregation] = "token_mean"

    epsilon_high: float = hyperparameter(0.28, "how far above 1 a ratio counts", non_negative)
