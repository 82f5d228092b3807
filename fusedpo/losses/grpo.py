r"""Group Relative Policy Optimization (Shao et al., arXiv 2402.03300, eq. 3).

    r_t = exp(log pi(y_t) - log pi_old(y_t))
    l_t = -min(r_t A, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A)
    L   = mean over responses of the mean of l_t over tokens

DeepSeek's KL term is kl_weight = 0.04 or 0.001 with the estimator k3.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedpo.losses.base import ClippedLoss


@dataclass(frozen=True)
class GRPO(ClippedLoss):
    """Group Relative Policy Optimization: clipped token ratios, mean over responses of means."""
