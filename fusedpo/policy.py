"""A policy loss as a function of log-probabilities: tokens, formula, averages, groups.

Letters: B sampled responses, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fusedpo.losses import PolicyLoss
from fusedpo.scores import Sequences, Tokens
from fusedpo.tail import run_tail


@dataclass(frozen=True)
class PolicyProblem:
    """A loss on the scored tokens of some responses, as a function of their log-probabilities.

    Attributes:
        sequences: of the N rows.
        advantage: [N] fp64.
        weight: [N] fp64, what the token counts in the mean.
        old, reference: [N] fp64, log-probabilities; None: of the policy itself; no reference.
        correction: [N] fp64, factor of the token's loss, or None.
        log_correction: [N] fp64, logarithm of its response's, for a loss that has it inside.
        entropy_weight: of each token's entropy, which is subtracted.
        scored: [N] bool, or None if all rows are.
        by_kernel: let the tail kernel do it.
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
        value = self.loss.per_token(t)
        if self.correction is not None:
            value = value * self.correction
        if self.reference is not None:
            value = value + self.loss.kl_weight * self.loss.kl(t, self.reference)
        return value

    def _by_kernel(self, logprob: Tensor) -> tuple[Tensor, Tensor]:
        tail, sequences = self.loss.tail, self.sequences
        assert tail is not None, "the loss has been asked"
        # what a response's tokens have in common; 0 for one without tokens
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

    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logprob = stats["logprob"]
        with torch.no_grad():
            t = self.tokens(logprob)
            found = self.loss.metrics(t)
            if self.old is not None:
                found["ratio/mean"] = t.average(t.ratio)
                # of the new policy from the old one, by k3
                found["kl_old"] = t.average(torch.expm1(-t.delta.clamp(min=-20)) + t.delta)
            if self.reference is not None:
                found["kl"] = t.average(self.loss.kl(t, self.reference))
            if "entropy" in stats:
                found["entropy"] = t.average(stats["entropy"].double())
            return {name: value.to(logprob.dtype) for name, value in found.items()}


class PolicyGroups:
    """Tokens, or responses where a formula looks at whole ones, as the groups of ``one_pass``."""

    def __init__(self, problem: PolicyProblem, counts: list[int]) -> None:
        self.problem = problem
        self.alone = not problem.loss.sees_sequences
        self.starts: Sequence[int] = (
            range(sum(counts) + 1) if self.alone else [0, *accumulate(counts)]
        )
        self.runs: Sequence[int] = self.starts

    def units(self, start: int, stop: int, stats: Mapping[str, Tensor]) -> Tensor:
        part = self._rows(slice(start, stop))
        with torch.enable_grad():
            leaf = stats["logprob"].detach().double().requires_grad_()
            return torch.autograd.grad(part.loss.gated(part.tokens(leaf)).sum(), leaf)[0]

    def gradient(self, first: int, last: int, stats: Mapping[str, Tensor]) -> Tensor:
        part = self._rows(slice(self.starts[first], self.starts[last]))
        if not self.alone:
            sequences = part.sequences
            which = slice(first, last)
            part = replace(
                part,
                sequences=Sequences(
                    sequences.index - first,
                    sequences.lengths[which],
                    sequences.starts[which] - self.starts[first],
                ),
            )
        with torch.enable_grad():
            leaf = stats["logprob"].detach().requires_grad_()
            return torch.autograd.grad(part.evaluate({**stats, "logprob": leaf})[0], leaf)[0]

    def _rows(self, rows: slice) -> PolicyProblem:
        """The problem of some rows; its sequences are still all of them."""
        problem = self.problem

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            problem,
            sequences=replace(problem.sequences, index=problem.sequences.index[rows]),
            advantage=problem.advantage[rows],
            weight=problem.weight[rows],
            old=cut(problem.old),
            reference=cut(problem.reference),
            correction=cut(problem.correction),
            log_correction=cut(problem.log_correction),
        )
