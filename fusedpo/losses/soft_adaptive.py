r"""Soft Adaptive Policy Optimization (Gao et al., arXiv 2511.20347), TRL's ``sapo``.

    r_t = exp(log pi(y_t) - log pi_old(y_t))
    tau = tau_pos if A > 0 else tau_neg
    l_t = -A (4 / tau) sigmoid(tau (r_t - 1))
    L   = mean over responses of the mean of l_t over tokens

As in TRL, verl and Liger, which agree; the paper's formula was not read. A ratio above exp(20)
counts as exp(20), without a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses.base import (
    GradientStructure,
    PolicyLoss,
    Tokens,
    advantage_sign,
    hyperparameter,
)


@dataclass(frozen=True)
class SoftAdaptive(PolicyLoss):
    """Soft Adaptive Policy Optimization: a sigmoid gate on each token's ratio."""

    tau_pos: float = hyperparameter(1.0, "temperature of the gate where A > 0", positive)
    tau_neg: float = hyperparameter(1.05, "temperature elsewhere", positive)

    formula_structure: ClassVar[GradientStructure] = GradientStructure("token", unit="gate")

    def per_token(self, t: Tokens) -> Tensor:
        tau = advantage_sign(t.advantage, self.tau_pos, self.tau_neg)
        return -t.advantage * 4.0 / tau * torch.sigmoid(tau * (t.ratio - 1.0))
