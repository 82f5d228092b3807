r"""Geometric-Mean Policy Optimization (Zhao et al., arXiv 2507.20673, eq. 4 and the authors' code).

    d_t = sign(A) min(sign(A) delta_t, sign(A) clip(delta_t, -epsilon, epsilon))
    s   = exp(mean of d_t over tokens),   delta_t = log pi(y_t) - log pi_old(y_t)
    L   = mean over responses of -A s

The clip is in log space: ratios count within exp(-epsilon) .. exp(epsilon). TRL's experimental
trainer is this loss, with a bound for each side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses.base import PolicyLoss, Tail, Tokens, clip_log, exponential, hyperparameter


@dataclass(frozen=True)
class GMPO(PolicyLoss):
    """Geometric-Mean Policy Optimization: log-ratios clipped one by one, then averaged."""

    epsilon: float = hyperparameter(0.4, "the most a log-ratio counts", positive)

    @property
    def tail(self) -> Tail:
        return Tail("clip_log", "mean", "exp", combine="single", link="linear")

    def tau(self, advantage: Tensor) -> Tensor | None:
        return self.epsilon * torch.sign(advantage)

    def gated(self, t: Tokens) -> Tensor:
        return clip_log(t.delta, self.epsilon * torch.sign(t.advantage))

    def sequence_weight(self, t: Tokens) -> Tensor:
        """[N], s of each token's response."""
        return exponential(t.mean(self.gated(t)))

    def per_token(self, t: Tokens) -> Tensor:
        return -t.advantage * self.sequence_weight(t)
