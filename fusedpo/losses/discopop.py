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
from fusedpo.losses._base import RatioLoss, hyperparameter, inverse_temperature
from fusedpo.losses._gates import exponential
from fusedpo.losses._links import log_sigmoid


@dataclass(frozen=True)
class DiscoPOP(RatioLoss):
    """Discovered Preference Optimization: a blend of the logistic and the exponential loss."""

    beta: float = inverse_temperature(0.05)
    tau: float = hyperparameter(0.05, "temperature of the blend", positive)

    @property
    def terms(self) -> tuple[str, str, str, str, str]:
        return ("identity", "sum", "identity", "pair", "log_sigmoid and exp, blended")

    def of_margin(self, margin: Tensor, **inputs: Any) -> Tensor:
        z = self.beta * margin
        return torch.sigmoid(-z / self.tau) * log_sigmoid(z) + torch.sigmoid(
            z / self.tau
        ) * exponential(-z)
