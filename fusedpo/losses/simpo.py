r"""Simple Preference Optimization (Meng, Xia and Chen, arXiv 2405.14734, eq. 6).

    m(y) = log pi(y | x) / |y|
    z    = beta (m(y_w) - m(y_l)) - gamma
    L    = -(1 - e) log sigmoid(z) - e log sigmoid(-z)      link="sigmoid"
    L    = max(0, 1 - z)                                    link="hinge"

plus sft_weight times the cross-entropy of the chosen responses, averaged over all their tokens.
gamma is absolute, as in TRL's ``simpo_gamma`` and in the paper's Table 8; the authors' code takes
gamma / beta, by default 0.25. ``fusedpo.recipes.groups.pairs_of_samples`` makes their pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fusedpo.checks import non_negative, number, positive
from fusedpo.losses.base import MarginLoss, Scores, Tail, hyperparameter, label_smoothing, one_of


@dataclass(frozen=True)
class SimPO(MarginLoss):
    """Simple Preference Optimization: reference-free, length-normalised, with a target margin."""

    beta: float = hyperparameter(2.0, "scale of the per-token log-probabilities", positive)
    gamma: float = hyperparameter(0.5, "target margin, absolute", number)
    label_smoothing: float = label_smoothing(only={"link": ("sigmoid",)})
    link: Literal["sigmoid", "hinge"] = hyperparameter(
        "sigmoid", "from margin to loss", one_of("sigmoid", "hinge")
    )
    sft_weight: float = hyperparameter(
        0.0, "weight of the chosen responses' cross-entropy", non_negative
    )

    @property
    def nll_weight(self) -> float:
        return self.sft_weight

    @property
    def tail(self) -> Tail:
        return Tail(
            aggregate="mean",
            link="hinge" if self.link == "hinge" else "neg_log_sigmoid",
            scale=self.beta,
            shift=-self.gamma,
            label_smoothing=self.label_smoothing,
        )

    def reward(self, s: Scores) -> Tensor:
        return self.beta * s.mean

    def logged_logp(self, s: Scores) -> Tensor:
        return s.mean
