r"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290, eq. 7).

    a(y) = log pi(y | x) - log pi_ref(y | x)
    z    = beta (a(y_w) - a(y_l))
    L    = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

e is the label smoothing of conservative DPO (Mitchell, "A note on DPO with noisy preferences",
2023); 0 is the paper's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses._base import PairLoss, hyperparameter, label_smoothing
from fusedpo.losses._links import Tail
from fusedpo.scores import Scores


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct Preference Optimization: log-sigmoid of beta times the difference of log-ratios."""

    needs_reference: ClassVar[bool] = True

    beta: float = hyperparameter(0.1, "strength of the pull towards the reference", positive)
    label_smoothing: float = label_smoothing()

    @property
    def tail(self) -> Tail:
        return Tail(link="log_sigmoid", scale=self.beta, label_smoothing=self.label_smoothing)

    def reward(self, s: Scores) -> Tensor:
        return self.beta * s.ratio
