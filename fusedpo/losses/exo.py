r"""Efficient Exact Optimization for pairs (Ji et al., arXiv 2402.00856, eq. 16).

    q = sigmoid(beta (a(y_w) - a(y_l))),   a(y) = log pi(y | x) - log pi_ref(y | x)
    L = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)

the reverse Kullback-Leibler divergence from (1 - e, e) to (q, 1 - q). It needs e > 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import bad_value, in_range
from fusedpo.losses.base import MarginLoss, RatioLoss, hyperparameter, neg_log_sigmoid


def _label_smoothing(name: str, value: Any) -> float:
    if in_range(name, value, 0.0, 0.5) == 0.0:
        raise bad_value(name, "a number above 0, whose logarithm is taken", "0", "try 1e-3")
    return float(value)


@dataclass(frozen=True)
class EXO(RatioLoss, MarginLoss):
    """Efficient Exact Optimization: reverse KL from smoothed labels to the implied preference."""

    label_smoothing: float = hyperparameter(
        1e-3,
        "probability that a preference is recorded the wrong way round, in (0, 0.5)",
        _label_smoothing,
    )

    def of_margin(self, margin: Tensor, **inputs: Any) -> Tensor:
        z, e = self.beta * margin, self.label_smoothing
        q, log_q, log_rest = torch.sigmoid(z), -neg_log_sigmoid(z), -neg_log_sigmoid(-z)
        return q * (log_q - math.log1p(-e)) + torch.sigmoid(-z) * (log_rest - math.log(e))
