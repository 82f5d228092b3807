r"""Self-Play Preference Optimization (Wu et al., arXiv 2405.00675, eq. 4.7 and the authors' code).

    a(y) = log pi(y | x) - log pi_ref(y | x),   pi_ref the policy of the iteration before
    L    = 1/2 (a(y_w) - (P_w - 1/2) / beta)^2 + 1/2 (a(y_l) - (P_l - 1/2) / beta)^2

P is the average win rate of a response against the samples of its prompt, itself included. The
factor 1/2 is that of the authors' code; their eq. 4.7 and TRL's ``sppo_hard`` (P_w = 1, P_l = 0)
have none: ``2.0 * SPPO()``. beta is the paper's 1 / eta. The 1/2 of P - 1/2 stands for
beta log Z(x), Z = E exp(P / beta) the normaliser of eq. 4.4: at least 1/2 by Jensen's inequality,
as rates have the mean 1/2, and at most 1. Anything between can be taken for it (App. A):
``baseline``. ``scaled`` multiplies the loss by beta^2, which has the same minimum and keeps numbers
near 1 in mixed precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from fusedpo.checks import bad_value, number, positive
from fusedpo.losses.base import Input, RatioLoss, ResponseLoss, Scores, flag, hyperparameter

WIN_RATES = {
    "win_rate_chosen": Input("share of comparisons that the chosen response wins", 1.0, 0.0, 1.0),
    "win_rate_rejected": Input("the rejected response's", 0.0, 0.0, 1.0),
}


def _baseline(name: str, value: object) -> float:
    if not 0.5 <= (value := number(name, value)) <= 1.0:
        raise bad_value(name, "a number in [0.5, 1]", f"{value:g}")
    return value


@dataclass(frozen=True)
class SPPO(RatioLoss, ResponseLoss):
    """Self-Play Preference Optimization: log-ratios fitted to win rates by least squares."""

    beta: float = hyperparameter(1e-3, "1 / eta; aims at (P - baseline) / beta", positive)
    scaled: bool = hyperparameter(False, "times beta^2: the same minimum, numbers near 1", flag)
    baseline: float = hyperparameter(
        0.5, "what a win rate is compared with, in place of beta log Z", _baseline, kw_only=True
    )

    is_square: ClassVar[bool] = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        return MappingProxyType(WIN_RATES)

    def target(self, role: str, **inputs: Any) -> Tensor:
        """[P], the win rate that a response is fitted to."""
        rate: Tensor = inputs[f"win_rate_{role}"]
        return rate

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        aim = self.target(role, **inputs).to(s.logp.dtype) - self.baseline
        if self.scaled:
            return 0.5 * (self.beta * s.ratio - aim).square()
        return 0.5 * (s.ratio - aim / self.beta).square()
