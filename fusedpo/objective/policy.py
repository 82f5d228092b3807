"""A policy loss as a function of log-probabilities: tokens, formula, averages, metrics.

Letters: B sampled responses, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpo.losses import PolicyLoss
from fusedpo.losses.loss import part_of
from fusedpo.losses.scores import Tokens
from fusedpo.objective.arguments import PolicyArguments
from fusedpo.objective.layout import Layout
from fusedpo.objective.sequences import Sequences
from fusedpo.objective.tail import run_tail


@dataclass(frozen=True)
class PolicyProblem:
    """A loss on the scored tokens of some responses, as a function of their log-probabilities.

    Attributes:
        sequences: of the N rows.
        advantage: [N] fp64.
        weight: [N] fp64, of the token's loss in the mean.
        old, reference: [N] fp64, log-probabilities; None: of the policy itself; no reference.
        correction: [N] fp64, factor of the token's loss, or None.
        log_correction: [N] fp64, logarithm of its response's, for a loss that has it inside.
        entropy_weight: of each token's entropy, which is subtracted.
        scored: [N] bool, or None if all rows are.
        by_kernel: whether the tail kernel evaluates it.
    """

    loss: PolicyLoss
    sequences: Sequences
    advantage: Tensor
    weight: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    correction: Tensor | None = None
    log_correction: Tensor | None = None
    entropy_weight: float | Tensor = 0.0
    scored: Tensor | None = None
    by_kernel: bool = False

    @classmethod
    def of(
        cls,
        layout: Layout,
        arguments: PolicyArguments,
        ref_logprob: Tensor | None,
        *,
        by_kernel: bool,
    ) -> PolicyProblem:
        """The problem of a call.

        Args:
            ref_logprob: [N], or None without a reference.
            by_kernel: whether the tail kernel may evaluate it.
        """
        return cls(
            loss=arguments.loss,
            sequences=layout.sequences,
            advantage=arguments.advantage,
            weight=arguments.weight,
            old=arguments.old,
            reference=None if ref_logprob is None else ref_logprob.double(),
            correction=arguments.correction,
            log_correction=arguments.log_correction,
            entropy_weight=arguments.entropy_weight,
            scored=layout.rows.scored,
            by_kernel=by_kernel and not arguments.loss.kl_weight,
        )

    def tokens(self, logprob: Tensor) -> Tokens:
        return Tokens(
            logprob.double(),
            self.advantage,
            self.sequences,
            self.old,
            self.log_correction,
            self.scored,
        )

    def evaluate(self, stats: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss (scalar), and the mean of its tokens' losses for each response [B]."""
        logprob = stats["logprob"]
        if self.by_kernel:
            total, per_sequence = self._by_kernel(logprob)
        else:
            per_token = self.per_token(self.tokens(logprob))
            if self.scored is not None:
                per_token = torch.where(self.scored, per_token, 0)
            total = (self.weight * per_token).sum()
            means = self.sequences.sum(per_token.detach())
            per_sequence = means / self.sequences.lengths.clamp(min=1)
        if self.loss.entropy_bonus:
            entropy = stats["entropy"].double()
            if self.scored is not None:
                entropy = torch.where(self.scored, entropy, 0)
            total = total - self.entropy_weight * entropy.sum()
        if self.sequences.parts is not None:
            total = self.sequences.parts.sum(total)
        return total.to(logprob.dtype), per_sequence.to(logprob.dtype)

    def per_token(self, t: Tokens) -> Tensor:
        """[N], the loss of each token before the mean."""
        value = part_of(self.loss, "per_token", t.logprob, t)
        if self.correction is not None:
            value = value * self.correction
        if self.reference is not None:
            value = value + self.loss.kl_weight * self.loss.kl(t, self.reference)
        return value

    def _by_kernel(self, logprob: Tensor) -> tuple[Tensor, Tensor]:
        tail, sequences = self.loss.tail, self.sequences
        assert tail is not None, "there is a kernel only for a loss with a tail"
        # a response's tokens share these; 0 for one without tokens
        advantage = self.of_sequence(self.advantage)
        corrected = advantage
        if self.correction is not None:
            corrected = advantage * self.of_sequence(self.correction)
        scale = self.of_sequence(self.weight) * sequences.lengths
        total, losses, _ = run_tail(
            logprob,
            tail,
            sequences,
            baseline=logprob.detach() if self.old is None else self.old,
            tau=self.loss.tau(advantage),
            weight=-corrected * scale,
        )
        return total, torch.where(scale == 0, 0.0, losses / scale)

    def of_sequence(self, values: Tensor) -> Tensor:
        """[B], from values [N] that the tokens of a response share; 0 without tokens."""
        empty = self.sequences.lengths == 0
        first = self.sequences.starts.clamp(max=max(values.shape[0] - 1, 0))
        return torch.where(empty, 0.0, values[first]) if values.numel() else empty.double() * 0.0

    def output(
        self, stats: Mapping[str, Tensor], states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss, which alone is differentiable; that of each response [B]; and the metrics."""
        total, per_sequence = self.evaluate(stats)
        metrics = self.metrics({name: value.detach() for name, value in stats.items()})
        return total, per_sequence.detach(), metrics

    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Detached scalars by name."""
        logprob = stats["logprob"]
        with torch.no_grad():
            t = self.tokens(logprob)
            metrics = self.loss.metrics(t)
            if self.old is not None:
                metrics["ratio/mean"] = t.average(t.ratio)
                # of the new policy from the old one, by k3
                metrics["kl_old"] = t.average(torch.expm1(-t.delta.clamp(min=-20)) + t.delta)
            if self.reference is not None:
                metrics["kl"] = t.average(self.loss.kl(t, self.reference))
            if "entropy" in stats:
                metrics["entropy"] = t.average(stats["entropy"].double())
            return {name: value.to(logprob.dtype) for name, value in metrics.items()}
