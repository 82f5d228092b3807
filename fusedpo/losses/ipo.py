r"""Identity Preference Optimization (Azar et al., arXiv 2310.12036, eq. 17).

    a(y) = log pi(y | x) - log pi_ref(y | x)
    L    = (a(y_w) - a(y_l) - 1 / (2 beta))^2                      average=False, the paper's text
    L    = (a(y_w) / |y_w| - a(y_l) / |y_l| - 1 / (2 beta))^2      average=True

beta is the paper's tau. The average over tokens is what TRL trains with, after asking the authors.
Rewards are beta times the summed log-ratio in both forms, as TRL logs them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedpo.checks import positive
from fusedpo.losses.base import MarginLoss, RatioLoss, Tail, flag, hyperparameter


@dataclass(frozen=True)
class IPO(RatioLoss, MarginLoss):
    """Identity Preference Optimization: squared distance of the log-ratio gap from 1 / (2 beta)."""

    beta: float = hyperparameter(0.1, "regularisation; the gap aimed at is 1 / (2 beta)", positive)
    average: bool = hyperparameter(True, "log-ratios per token rather than summed", flag)

    @property
    def tail(self) -> Tail:
        return Tail(
            aggregate="mean" if self.average else "sum",
            link="squared",
            shift=-1 / (2 * self.beta),
        )
