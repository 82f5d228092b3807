r"""Odds Ratio Preference Optimization (Hong, Lee and Thorne, arXiv 2403.07691, eqs. 6 and 7).

    m(y)    = log pi(y | x) / |y|
    odds(y) = m(y) - log(1 - exp(m(y)))                        its logarithm
    L       = nll_weight NLL - beta log sigmoid(odds(y_w) - odds(y_l))

NLL is the cross-entropy of the chosen responses, averaged over all their tokens; TRL's counts the
prompts' tokens too. beta is the paper's lambda. A response that is
certain (m = 0) counts as m = -1e-7, without a gradient: its odds are infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import non_negative, positive
from fusedpo.losses.base import PreferenceLoss, Scores, hyperparameter, neg_log_sigmoid

_LARGEST = -1e-7


@dataclass(frozen=True)
class ORPO(PreferenceLoss):
    """Odds Ratio Preference Optimization: cross-entropy plus a reference-free odds-ratio term."""

    beta: float = hyperparameter(0.1, "weight of the odds-ratio term", positive)
    nll_weight: float = hyperparameter(
        1.0, "weight of the chosen responses' cross-entropy", non_negative
    )

    def per_example(self, chosen: Scores, rejected: Scores, **inputs: Any) -> Tensor:
        gap = self.alignment_reward(chosen) - self.alignment_reward(rejected)
        return self.beta * neg_log_sigmoid(gap)

    def alignment_reward(self, s: Scores) -> Tensor:
        """[P], the log-odds of the response."""
        mean = s.mean.clamp(max=_LARGEST)
        return mean - log1mexp(mean)

    def reward(self, s: Scores) -> Tensor:
        return self.beta * s.mean

    def logged_logp(self, s: Scores) -> Tensor:
        return s.mean

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        gap = self.alignment_reward(responses[0]) - self.alignment_reward(responses[1])
        return {
            **super().metrics(*responses, **inputs),
            "log_odds_ratio": -neg_log_sigmoid(gap).mean(),
            "log_odds_chosen": gap.mean(),
        }


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, value and gradient to full precision on either side of -log 2."""
    near = x > -math.log(2.0)
    # each branch sees numbers that it can take: the gradient of what is not selected is 0, not NaN
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)
