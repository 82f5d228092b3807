r"""Sequence Likelihood Calibration on log-ratios (arXiv 2305.10425; RSO, arXiv 2309.06657, eq. 8).

    L = max(0, 1 - beta (a(y_w) - a(y_l))),   a(y) = log pi(y | x) - log pi_ref(y | x)

beta is RSO's gamma; the authors use 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedpo.losses.base import MarginLoss, RatioLoss, Tail, inverse_temperature


@dataclass(frozen=True)
class SLiC(RatioLoss, MarginLoss):
    """Sequence Likelihood Calibration: hinge of beta times the difference of log-ratios."""

    beta: float = inverse_temperature(0.05)

    @property
    def tail(self) -> Tail:
        return Tail(link="hinge", scale=self.beta)
