r"""Discovered Preference Optimization (Lu et al., arXiv 2406.08414, eq. 5).

    z = beta (a(y_w) - a(y_l)),   a(y) = log pi(y | x) - log pi_ref(y | x)
    m = sigmoid(z / tau)
    L = -(1 - m) log sigmoid(z) + m exp(-z)

The exponent is limited to 80, without a gradient beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses.base import (
    MarginLoss,
    RatioLoss,
    exponential,
    hyperparameter,
    inverse_temperature,
    neg_log_sigmoid,
)


@dataclass(frozen=True)
class DiscoPOP(RatioLoss, MarginLoss):
    """Discovered Preference Optimization: a blend of the logistic and the exponential loss."""

    beta: float = inverse_temperature(0.05)
    tau: float = hyperparameter(0.05, "temperature of the blend", positive)

    def of_margin(self, margin: Tensor, **inputs: Any) -> Tensor:
        z = self.beta * margin
        return torch.sigmoid(-z / self.tau) * neg_log_sigmoid(z) + torch.sigmoid(
            z / self.tau
        ) * exponential(-z)
