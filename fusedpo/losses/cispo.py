r"""Clipped Importance Sampling Policy Optimization (MiniMax-M1, arXiv 2506.13585, eq. 5).

    l_t = -sg[min(r_t, epsilon_high)] A log pi(y_t),   r_t = exp(log pi(y_t) - log pi_old(y_t))
    L   = mean of l_t over all tokens of the step

epsilon_high is the absolute cap, as in TRL and Liger (ScaleRL recommends 5.0); verl's is 1 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses.base import Aggregation, GradientStructure, PolicyLoss, Tokens, hyperparameter


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """Clipped Importance Sampling Policy Optimization: REINFORCE with capped token ratios."""

    aggregation: ClassVar[Aggregation] = "token_mean"

    epsilon_high: float = hyperparameter(5.0, "the most a ratio counts", positive)

    formula_structure: ClassVar[GradientStructure] = GradientStructure("token", unit="gate")

    def per_token(self, t: Tokens) -> Tensor:
        return -t.ratio.detach().clamp(max=self.epsilon_high) * t.advantage * t.logprob

    def metrics(self, t: Tokens) -> dict[str, Tensor]:
        capped = (t.ratio > self.epsilon_high) & (t.advantage > 0)
        return {"cispo_clip_ratio": t.average(capped.double())}
