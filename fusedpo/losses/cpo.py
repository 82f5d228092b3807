r"""Contrastive Preference Optimization (Xu et al., arXiv 2401.08417, eq. 5).

    z = beta (log pi(y_w | x) - log pi(y_l | x))
    L = -(1 - e) log sigmoid(z) - e log sigmoid(-z)            link="sigmoid"
    L = max(0, 1 - z)                                          link="hinge"
    L = (m(y_w) - m(y_l) - 1 / (2 beta))^2                     link="ipo", m = log pi / |y|

plus nll_weight times the cross-entropy of the chosen responses, averaged over all their tokens
(TRL's ``cpo_alpha``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fusedpo.checks import non_negative, positive
from fusedpo.losses.base import MarginLoss, Scores, Tail, hyperparameter, label_smoothing, one_of


@dataclass(frozen=True)
class CPO(MarginLoss):
    """Contrastive Preference Optimization: DPO without a reference, plus cross-entropy."""

    beta: float = hyperparameter(0.1, "scale of the log-probabilities", positive)
    nll_weight: float = hyperparameter(
        1.0, "weight of the chosen responses' cross-entropy", non_negative
    )
    link: Literal["sigmoid", "hinge", "ipo"] = hyperparameter(
        "sigmoid", "from margin to loss", one_of("sigmoid", "hinge", "ipo")
    )
    label_smoothing: float = label_smoothing(only={"link": ("sigmoid",)})

    @property
    def tail(self) -> Tail:
        if self.link == "ipo":
            return Tail(aggregate="mean", link="squared", shift=-1 / (2 * self.beta))
        return Tail(
            link="hinge" if self.link == "hinge" else "neg_log_sigmoid",
            scale=self.beta,
            label_smoothing=self.label_smoothing,
        )

    def reward(self, s: Scores) -> Tensor:
        return self.beta * self.score(s)

    def logged_logp(self, s: Scores) -> Tensor:
        return self.score(s)
