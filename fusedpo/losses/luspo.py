r"""Length-Unbiased Sequence Policy Optimization (arXiv 2602.05261).

    s = exp(mean over tokens of (log pi(y_t) - log pi_old(y_t)))
    l = -|y| min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A)
    L = mean of l over responses

GSPO times the length, so that long responses do not count less. As in TRL and Liger; the paper's
formula was not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedpo.checks import non_negative
from fusedpo.losses.base import Aggregation, hyperparameter
from fusedpo.losses.gspo import GSPO


@dataclass(frozen=True)
class LUSPO(GSPO):
    """Length-Unbiased Sequence Policy Optimization: GSPO weighted by the response's length."""

    aggregation: ClassVar[Aggregation] = "sequence_sum"

    epsilon_low: float = hyperparameter(2e-3, "how far below 1 a ratio counts", non_negative)
    epsilon_high: float = hyperparameter(2.5e-3, "how far above 1 a ratio counts", non_negative)
