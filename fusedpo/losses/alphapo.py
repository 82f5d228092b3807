r"""AlphaPO (Gupta et al., arXiv 2501.03884, eq. 7): SimPO with a reward of another shape.

    m(y) = log pi(y | x) / |y|
    r(y) = (1 - exp(-alpha m(y))) / alpha,   m(y) for alpha = 0
    z    = beta (r(y_w) - r(y_l)) - gamma
    L    = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

The exponent is limited to 80, without a gradient beyond. gamma is absolute, as in SimPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import number, positive
from fusedpo.losses.base import (
    MAP_LIMIT,
    PreferenceLoss,
    Scores,
    hyperparameter,
    label_smoothing,
    neg_log_sigmoid,
)


@dataclass(frozen=True)
class AlphaPO(PreferenceLoss):
    """AlphaPO: SimPO on a reward that saturates (alpha < 0) or steepens (alpha > 0)."""

    beta: float = hyperparameter(2.0, "scale of the rewards", positive)
    gamma: float = hyperparameter(0.5, "target margin, absolute", number)
    alpha: float = hyperparameter(0.25, "shape of the reward; 0 is SimPO", number)
    label_smoothing: float = label_smoothing()

    def per_example(self, chosen: Scores, rejected: Scores, **inputs: Any) -> Tensor:
        z = self.reward(chosen) - self.reward(rejected) - self.gamma
        return neg_log_sigmoid(z, self.label_smoothing)

    def reward(self, s: Scores) -> Tensor:
        if self.alpha == 0.0:
            return self.beta * s.mean
        exponent = (-self.alpha * s.mean).clamp(max=MAP_LIMIT)
        return -self.beta / self.alpha * torch.expm1(exponent)

    def logged_logp(self, s: Scores) -> Tensor:
        return s.mean
