r"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290, eq. 7).

    a(y) = log pi(y | x) - log pi_ref(y | x)
    z    = beta (a(y_w) - a(y_l))
    z    = beta (a(y_w) / |y_w| - a(y_l) / |y_l|)      length_normalized (arXiv 2411.15124)
    L    = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

e is the label smoothing of conservative DPO (Mitchell, "A note on DPO with noisy preferences",
2023); 0 is the paper's loss. Self-play fine-tuning (SPIN, arXiv 2401.01335) is this loss with the
reference being the policy of the iteration before, and its responses the rejected ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedpo.losses.base import MarginLoss, RatioLoss, Tail, flag, hyperparameter, label_smoothing


@dataclass(frozen=True)
class DPO(RatioLoss, MarginLoss):
    """Direct Preference Optimization: log-sigmoid of beta times the difference of log-ratios."""

    label_smoothing: float = label_smoothing()
    length_normalized: bool = hyperparameter(
        False, "log-ratios per token; beta is then to be much larger", flag
    )

    @property
    def tail(self) -> Tail:
        return Tail(
            aggregate="mean" if self.length_normalized else "sum",
            link="neg_log_sigmoid",
            scale=self.beta,
            label_smoothing=self.label_smoothing,
        )
