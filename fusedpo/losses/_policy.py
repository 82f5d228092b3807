"""What a policy loss is: a formula on tokens, how tokens are averaged, and its regularisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_value, non_negative, number
from fusedpo.engine.structure import GradientStructure, Scope
from fusedpo.losses._base import Loss, hyperparameter, one_of, optional, pick
from fusedpo.scores import RATIO_LIMIT, Tokens

Aggregation = Literal["sequence_mean", "sequence_sum", "token_mean"]


@dataclass(frozen=True)
class PolicyLoss(Loss):
    """A loss of sampled responses with advantages: one number a token, then a mean.

    Every policy loss can be regularised: ``kl_weight`` times an estimate of the KL divergence from
    a reference is added to each token's loss, and ``entropy_bonus`` times the mean entropy of all
    tokens is subtracted. A gradient through the entropy leaves no route but ``recompute``, with 5
    or 6 products (4 beside a frozen head). A KL term on a loss of whole sequences rules out
    ``one_pass``.
    """

    kl_weight: float = hyperparameter(
        0.0, "weight of the KL divergence from a reference", non_negative, kw_only=True
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3_corrected"] = hyperparameter(
        "k3",
        "p - q; (p - q)^2 / 2; exp(q - p) - (q - p) - 1; that times the ratio to the old policy",
        one_of("k1", "k2", "k3", "k3_corrected"),
        kw_only=True,
    )
    entropy_bonus: float = hyperparameter(
        0.0, "weight of the mean entropy, which is subtracted", non_negative, kw_only=True
    )

    aggregation: ClassVar[Aggregation] = "sequence_mean"
    """The mean over sequences of the mean (or the sum) over tokens, or the mean over all tokens."""

    absorbs_correction: ClassVar[bool] = False
    """Whether importance weights are part of the formula, rather than a factor of it."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0.0

    @property
    def stats(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_bonus else ()

    @property
    def sees_sequences(self) -> bool:
        """Whether a token's gradient depends on other tokens of its sequence."""
        return True

    @property
    def scope(self) -> Scope:
        if self.entropy_bonus:
            return "batch"
        if not self.sees_sequences:
            return "token"
        return "batch" if self.kl_weight else "sequence"

    @property
    def gradient_structure(self) -> GradientStructure:
        return GradientStructure(self.scope, unit="gate")

    @property
    def divisor(self) -> float:
        """What the mean is divided by in addition."""
        return 1.0

    def per_token(self, t: Tokens) -> Tensor:
        """[N], the loss of each token; a loss of whole sequences repeats it for each token."""
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def gated(self, t: Tokens) -> Tensor:
        """[N], what the formula adds up over a sequence, if it does.

        Within a sequence, the loss's gradient is this one's times a factor.
        """
        return t.logprob

    def tau(self, advantage: Tensor) -> Tensor | None:
        """[B], the gate's temperature by sequence, for a loss with a ``tail``."""
        return None

    def ratio(self, t: Tokens) -> Tensor:
        """[N], the importance ratio of the formula."""
        return t.ratio

    def log_correction(self, weight: Tensor) -> Tensor:
        """What importance weights add to the logarithm of a response's, if they are absorbed."""
        return weight.log()

    def kl(self, t: Tokens, reference: Tensor) -> Tensor:
        """[N], the estimate of the KL divergence from the reference's log-probabilities [N].

        Beyond q - p = 20 it is constant and has no gradient.
        """
        behind = (reference - t.logprob).clamp(max=RATIO_LIMIT)
        if self.kl_estimator == "k1":
            return -behind
        if self.kl_estimator == "k2":
            return 0.5 * behind.square()
        # expm1: the two terms cancel for a policy that is near
        k3 = torch.expm1(behind) - behind
        return k3 * self.ratio(t) if self.kl_estimator == "k3_corrected" else k3

    def metrics(self, t: Tokens) -> dict[str, Tensor]:
        """Scalars to log beside those of every policy loss."""
        return {}


def advantage_sign(advantage: Tensor, positive: float, negative: float) -> Tensor:
    """positive where the advantage is above 0, else negative; like the advantage."""
    return pick(advantage > 0, positive, negative)


def _above_one(name: str, value: float) -> float:
    if number(name, value) <= 1.0:
        raise bad_value(name, "a number above 1", f"{value:g}")
    return float(value)


@dataclass(frozen=True)
class ClippedLoss(PolicyLoss):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) on some ratio r.

        l = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)

    ratio_cap (INTELLECT-2, arXiv 2505.07291; TRL's ``delta``) limits r in the first term. That is
    for negative advantages; a cap below 1 + epsilon_high limits positive ones too. dual_clip
    (arXiv 1912.09729) limits l to -c A for negative ones. Both are off.
    """

    epsilon_low: float = hyperparameter(0.2, "how far below 1 a ratio counts", non_negative)
    epsilon_high: float = hyperparameter(0.2, "how far above 1 a ratio counts", non_negative)
    dual_clip: float | None = hyperparameter(
        None, "for negative advantages, the most a ratio counts in the loss", optional(_above_one)
    )
    ratio_cap: float | None = hyperparameter(
        None, "the most a ratio counts, clipped or not", optional(_above_one)
    )

    def per_token(self, t: Tokens) -> Tensor:
        ratio, advantage = self.ratio(t), t.advantage
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        if self.ratio_cap is not None:
            ratio = ratio.clamp(max=self.ratio_cap)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.dual_clip is not None:
            limited = torch.minimum(loss, -self.dual_clip * advantage)
            loss = torch.where(advantage < 0, limited, loss)
        return loss

    def metrics(self, t: Tokens) -> dict[str, Tensor]:
        ratio = self.ratio(t)
        low = (ratio < 1 - self.epsilon_low) & (t.advantage < 0)
        high = (ratio > 1 + self.epsilon_high) & (t.advantage > 0)
        share = t.average_of_sequences if self.sees_sequences else t.average
        return {
            "clip_ratio/low_mean": share(low.double()),
            "clip_ratio/high_mean": share(high.double()),
            "clip_ratio/region_mean": share((low | high).double()),
        }


@dataclass(frozen=True)
class TokenClippedLoss(ClippedLoss):
    """The clipped surrogate on each token's own ratio."""

    @property
    def sees_sequences(self) -> bool:
        return False

    @property
    def terms(self) -> tuple[str, str, str, str, str]:
        return (
            "clipped ratio",
            self.aggregation.replace("_", " "),
            "identity",
            "advantage",
            "linear",
        )
