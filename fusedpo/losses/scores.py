"""Scores and Tokens: what a loss sees of responses.

Letters: N scored tokens, B responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# a ratio above exp(20) counts as exp(20): the exponential and its derivative stay finite
RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Scores:
    """What a preference loss sees of some responses; every tensor is [B'] in fp64.

    Attributes:
        logp: log-probability of the response, summed over its tokens.
        length: number of scored tokens.
        ref_logp: the reference's logp, or None.
        confidence: mean over the tokens of log p_t - log sum_v p_v^2, or None: not asked for.
    """

    logp: Tensor
    length: Tensor
    ref_logp: Tensor | None = None
    confidence: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Log-probability per token."""
        return self.logp / self.length

    @property
    def given_ref(self) -> Tensor:
        """The reference's logp, which has to be there."""
        if self.ref_logp is None:
            raise ValueError(
                "ref_logprobs: expected a reference, which this loss compares with, got none; pass "
                "ref_logprobs, or ref_hidden and ref_weight"
            )
        return self.ref_logp

    @property
    def ratio(self) -> Tensor:
        """log(pi / pi_ref) of the response."""
        return self.logp - self.given_ref

    @property
    def mean_ratio(self) -> Tensor:
        """log(pi / pi_ref) per token."""
        return self.ratio / self.length

    def __getitem__(self, which: slice | Tensor) -> Scores:
        return Scores(
            self.logp[which],
            self.length[which],
            None if self.ref_logp is None else self.ref_logp[which],
            None if self.confidence is None else self.confidence[which],
        )


class Responses(Protocol):
    """Which response each token belongs to, as far as a loss asks."""

    @property
    def index(self) -> Tensor:
        """[N] int64, the response of each token."""

    @property
    def lengths(self) -> Tensor:
        """[B] int64, scored tokens of each response."""

    @property
    def count(self) -> int:
        """B."""

    def sum(self, values: Tensor, *, same: bool = True) -> Tensor:
        """[B] fp64, the sum of values [N] over each response."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of values [N], a number."""


@dataclass(frozen=True)
class Tokens:
    """What a policy loss sees of some sampled responses; every tensor is [N] in fp64.

    Attributes:
        logprob: log-probability under the policy.
        advantage: of the token's response, or its own.
        sequences: which response a token belongs to.
        old: log-probability under the policy that sampled; None: this very policy.
        log_correction: logarithm of the importance weight of the token's response, or None.
        scored: [N] bool, or None if all are; others count nowhere.
    """

    logprob: Tensor
    advantage: Tensor
    sequences: Responses
    old: Tensor | None = None
    log_correction: Tensor | None = None
    scored: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """log(pi / pi_old) of each token; exactly 0, with a gradient, for the policy itself."""
        return self.logprob - (self.logprob.detach() if self.old is None else self.old)

    @property
    def ratio(self) -> Tensor:
        """pi / pi_old of each token. Above exp(20) it is constant and has no gradient."""
        return self.delta.clamp(max=RATIO_LIMIT).exp()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of values over each token's sequence."""
        return self.sequences.sum(values, same=False)[self.sequences.index]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values over each token's sequence."""
        sums = self.sequences.sum(values, same=False)
        return (sums / self.sequences.lengths.clamp(min=1))[self.sequences.index]

    def average(self, values: Tensor) -> Tensor:
        """The mean over all tokens, a number; 0 without any."""
        if self.scored is not None:
            values = torch.where(self.scored, values, 0)
        return self.sequences.total(values) / self.sequences.lengths.sum().clamp(min=1)

    def average_of_sequences(self, values: Tensor) -> Tensor:
        """The mean over all sequences of what their tokens share, a number."""
        means = self.sequences.sum(values) / self.sequences.lengths.clamp(min=1)
        return means.sum() / max(1, self.sequences.count)
