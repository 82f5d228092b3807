"""Policy losses: a formula on tokens, how tokens are averaged, and regularisers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_value, non_negative, number
from fusedpo.engine.structure import GradientStructure
from fusedpo.losses.hyperparameters import hyperparameter, one_of, optional
from fusedpo.losses.loss import Loss, pick
from fusedpo.losses.scores import RATIO_LIMIT, Tokens

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

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0.0

    @property
    def stats(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_bonus else ()

    @property
    def formula_structure(self) -> GradientStructure:
        """How much of the gradient of ``per_token`` is known when.

        By default one factor a ``sequence``. Where tokens stand alone the scope is ``token``; a
        token may then have an advantage and an importance weight of its own.
        """
        return GradientStructure("sequence", unit="gate")

    @property
    def gradient_structure(self) -> GradientStructure:
        """The formula's with the KL term and the entropy bonus; not overridden."""
        structure = self.formula_structure
        # a token's KL term has no part in the factor of its sequence
        beside = self.kl_weight and structure.scope == "sequence"
        return replace(structure, scope="batch") if self.entropy_bonus or beside else structure

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
        """Logarithms of importance weights, for a loss whose formula has them inside.

        A loss that does not define this has them as factors.
        """
        raise NotImplementedError(f"{type(self).__name__} has importance weights as factors")

    @property
    def absorbs_correction(self) -> bool:
        """Whether importance weights are part of the formula, rather than a factor of it."""
        return type(self).log_correction is not PolicyLoss.log_correction

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
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) on some ratio r, by default the token's.

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

    @property
    def formula_structure(self) -> GradientStructure:
        """One factor a token."""
        return GradientStructure("token", unit="gate")

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
        by_token = self.formula_structure.scope == "token"
        share = t.average if by_token else t.average_of_sequences
        return {
            "clip_ratio/low_mean": share(low.double()),
            "clip_ratio/high_mean": share(high.double()),
            "clip_ratio/region_mean": share((low | high).double()),
        }
