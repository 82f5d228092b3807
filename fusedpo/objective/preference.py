"""A preference loss as a function of log-probabilities: scores, formula, denominators, metrics.

Letters: P examples of R responses each, B = R P sequences, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpo.losses import PreferenceLoss
from fusedpo.losses.links import Tail
from fusedpo.losses.loss import part_of
from fusedpo.losses.scores import Scores
from fusedpo.objective.arguments import PreferenceArguments
from fusedpo.objective.layout import Layout
from fusedpo.objective.sequences import Sequences
from fusedpo.objective.tail import run_tail


@dataclass(frozen=True)
class Side:
    """Sequences in one role, and the examples that they belong to."""

    role: str
    sequences: slice
    examples: slice


@dataclass(frozen=True)
class PreferenceProblem:
    """A loss on the scored tokens of some sequences, as a function of their log-probabilities.

    Attributes:
        sequences: of the N rows.
        sides: the roles of the sequences. All of an example's, unless responses stand alone.
        inputs: the loss's own, [P] or as they are.
        ref_logp: [B] fp64, the reference's scores.
        token_weight: [N], weight of a token in its response; None: all 1.
        denominator, nll_denominator: of the sum over examples, and over chosen tokens.
        tail: for the kernel; None: the formula in PyTorch.
    """

    loss: PreferenceLoss
    sequences: Sequences
    sides: tuple[Side, ...]
    inputs: Mapping[str, Tensor]
    ref_logp: Tensor | None
    token_weight: Tensor | None
    denominator: float | Tensor
    nll_denominator: float | Tensor
    tail: Tail | None

    @classmethod
    def of(
        cls, layout: Layout, arguments: PreferenceArguments, *, by_kernel: bool
    ) -> PreferenceProblem:
        """The problem of a call, yet without its reference.

        Args:
            by_kernel: whether the tail kernel may evaluate it.
        """
        loss, examples = arguments.loss, arguments.examples
        token_weight = None
        if loss.weights_tokens:
            sequences = layout.sequences
            lengths = sequences.lengths.view(len(loss.roles), examples)
            shortest = lengths.amin(0)[sequences.index % examples]
            token_weight = loss.token_weight(layout.positions, shortest)
        return cls(
            loss=loss,
            sequences=layout.sequences,
            sides=tuple(
                Side(role, slice(r * examples, (r + 1) * examples), slice(0, examples))
                for r, role in enumerate(loss.roles)
            ),
            inputs=arguments.inputs,
            ref_logp=None,
            token_weight=token_weight,
            denominator=arguments.denominator,
            nll_denominator=arguments.nll_denominator,
            tail=loss.tail if by_kernel and token_weight is None and not arguments.inputs else None,
        )

    def total(self, values: Tensor) -> Tensor:
        """[B], values [N] summed over each sequence, to the last bit as the scores are."""
        return self.weighted(values) if self.tail is None else self.sequences.sum_by_kernel(values)

    def weighted(self, values: Tensor) -> Tensor:
        """[B], the sum of values [N] over each sequence, as its tokens count."""
        values = values.double()
        return self.sequences.sum(
            values if self.token_weight is None else values * self.token_weight
        )

    def scores(self, stats: Mapping[str, Tensor]) -> Scores:
        """[B], from the statistics [N] of the rows."""
        logprob, length = stats["logprob"], self.sequences.lengths.double()
        confidence = None
        if "log_sum_sq_probs" in stats:
            certainty = logprob.detach().double() - stats["log_sum_sq_probs"].double()
            confidence = self.sequences.sum(certainty) / length
        return Scores(self.weighted(logprob), length, self.ref_logp, confidence)

    def evaluate(
        self, stats: Mapping[str, Tensor], states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Scores, Tensor | None]:
        """The loss (scalar), that of each example [P], the scores [B], and the states' part [P].

        Args:
            stats: [N] each, by name.
            states: [B, H], last hidden states, if the loss uses them.
        """
        logprob = stats["logprob"]
        if self.tail is None:
            scores = self.scores(stats)
            per_example = self._formula(scores)
            total = per_example.sum()
        else:
            total, per_example, score = run_tail(
                logprob, self.tail, self.sequences, reference=self.ref_logp
            )
            scores = self._scores_of(score, self.tail)
        of_states = None
        if states is not None:
            last = [states[side.sequences] for side in self.sides]
            of_states = part_of(self.loss, "of_states", last[0][:, 0], *last)
            total = total + of_states.double().sum()
            per_example = per_example.detach() + of_states.detach()
        total = total / self.denominator
        if self.loss.nll_weight:
            total = total - self.loss.nll_weight * self._chosen(logprob) / self.nll_denominator
        return total.to(logprob.dtype), per_example.detach().to(logprob.dtype), scores, of_states

    def _formula(self, scores: Scores) -> Tensor:
        if self.loss.formula_structure.scope != "sequence":
            inputs = self._inputs_of(self.sides[0])
            responses = [scores[side.sequences] for side in self.sides]
            return part_of(self.loss, "per_example", responses[0].logp, *responses, **inputs)
        # of a group: its examples, each with the responses that are here
        parts = []
        for side in self.sides:
            s, inputs = scores[side.sequences], self._inputs_of(side)
            parts.append(part_of(self.loss, "of_response", s.logp, side.role, s, **inputs))
        if all(part.shape == parts[0].shape for part in parts):
            return sum(parts[1:], parts[0])
        return torch.cat(parts)

    def _inputs_of(self, side: Side) -> dict[str, Tensor]:
        known = self.loss.inputs
        return {
            name: value[side.examples] if known[name].per == "example" else value
            for name, value in self.inputs.items()
        }

    def _chosen(self, logprob: Tensor) -> Tensor:
        """The log-probability of all chosen tokens that are here."""
        sums = self.sequences.sum(logprob)
        chosen = [sums[side.sequences].sum() for side in self.sides if side.role == "chosen"]
        return sum(chosen[1:], chosen[0]) if chosen else sums.new_zeros(())

    def _scores_of(self, score: Tensor, tail: Tail) -> Scores:
        """[B], from the sums of the tail kernel."""
        length = self.sequences.lengths.double()
        logp = score * length if tail.aggregate == "mean" else score
        return Scores(
            logp if self.ref_logp is None else logp + self.ref_logp, length, self.ref_logp
        )

    def output(
        self, stats: Mapping[str, Tensor], states: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss, which alone is differentiable; that of each example [P]; and the metrics."""
        total, per_example, scores, of_states = self.evaluate(stats, states)
        return total, per_example, self.metrics(stats["logprob"].detach(), scores, of_states)

    def metrics(
        self, logprob: Tensor, scores: Scores, of_states: Tensor | None
    ) -> dict[str, Tensor]:
        """Detached scalars by name."""
        with torch.no_grad():
            responses = [scores[side.sequences] for side in self.sides]
            metrics = self.loss.metrics(*responses, **self._inputs_of(self.sides[0]))
            if of_states is not None:
                metrics["loss/states"] = of_states.mean()
            if self.loss.nll_weight:
                chosen = self.sides[0].sequences
                tokens = self.sequences.lengths[chosen].sum()
                metrics["nll_loss"] = -self.sequences.sum(logprob)[chosen].sum() / tokens
            return {name: value.to(logprob.dtype) for name, value in metrics.items()}
