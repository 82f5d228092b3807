"""A preference loss as a function of log-probabilities: scores, formula, denominators, groups.

Letters: P examples of R responses each, B = R P sequences, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fusedpo.losses import PreferenceLoss
from fusedpo.losses._links import Tail
from fusedpo.scores import Scores, Sequences
from fusedpo.tail import run_tail


@dataclass(frozen=True)
class Side:
    """Some sequences in one role: which they are, and of which examples."""

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
        token_weight: [N], how much a token counts in its response; None: all 1.
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
        """The loss (scalar), that of each example [P], the scores [B], and what states add [P].

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
            of_states = self.loss.of_states(*(states[side.sequences] for side in self.sides))
            assert of_states is not None, "there are states only for a loss that uses them"
            total = total + of_states.double().sum()
            per_example = per_example.detach() + of_states.detach()
        total = total / self.denominator
        if self.loss.nll_weight:
            total = total - self.loss.nll_weight * self._chosen(logprob) / self.nll_denominator
        return total.to(logprob.dtype), per_example.detach().to(logprob.dtype), scores, of_states

    def _formula(self, scores: Scores) -> Tensor:
        if self.loss.coupling != "response":
            own = self._inputs_of(self.sides[0])
            return self.loss.per_example(*(scores[side.sequences] for side in self.sides), **own)
        # of some sequences: as many examples as there are, each with the responses that are here
        parts = [
            self.loss.of_response(side.role, scores[side.sequences], **self._inputs_of(side))
            for side in self.sides
        ]
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
        """[B], from what the tail kernel has summed."""
        length = self.sequences.lengths.double()
        logp = score * length if tail.aggregate == "mean" else score
        return Scores(
            logp if self.ref_logp is None else logp + self.ref_logp, length, self.ref_logp
        )

    def metrics(
        self, logprob: Tensor, scores: Scores, of_states: Tensor | None
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            responses = [scores[side.sequences] for side in self.sides]
            found = self.loss.metrics(*responses, **self._inputs_of(self.sides[0]))
            if of_states is not None:
                found["loss/states"] = of_states.mean()
            if self.loss.nll_weight:
                chosen = self.sides[0].sequences
                tokens = self.sequences.lengths[chosen].sum()
                found["nll_loss"] = -self.sequences.sum(logprob)[chosen].sum() / tokens
            return {name: value.to(logprob.dtype) for name, value in found.items()}


def group_sizes(loss: PreferenceLoss, counts: list[int]) -> list[int]:
    """Rows of each group of ``one_pass``, from those of the responses."""
    if loss.coupling == "response":
        return counts
    examples = len(counts) // len(loss.roles)
    return [sum(counts[example::examples]) for example in range(examples)]


class PreferenceGroups:
    """Examples (or responses, where they stand alone) as the groups of ``one_pass``.

    The rows of a group follow each other, a response's rows within them.
    """

    def __init__(self, problem: PreferenceProblem, counts: list[int]) -> None:
        loss, sequences = problem.loss, problem.sequences
        self.problem, self.counts = problem, counts
        self.alone = loss.coupling == "response"
        self.examples = len(counts) // len(loss.roles)
        places = range(len(counts))
        roles = len(loss.roles)
        by_place = [
            counts[i if self.alone else i // roles + i % roles * self.examples] for i in places
        ]
        borders = [0, *accumulate(by_place)]
        self.starts: Sequence[int] = [0, *accumulate(group_sizes(loss, counts))]
        self.runs: Sequence[int] = self.starts if loss.coupling == "margin" else borders
        unit = torch.ones_like(sequences.index, dtype=torch.float64)
        if loss.coupling == "margin":
            unit = torch.where(sequences.index < self.examples, unit, -unit)
            if loss.averages:
                unit = unit / sequences.lengths[sequences.index]
        self.unit = unit if problem.token_weight is None else unit * problem.token_weight

    def units(self, start: int, stop: int, stats: Mapping[str, Tensor]) -> Tensor:
        return self.unit[start:stop]

    def gradient(self, first: int, last: int, stats: Mapping[str, Tensor]) -> Tensor:
        part = self._part(first, last)
        with torch.enable_grad():
            leaf = stats["logprob"].detach().requires_grad_()
            total = part.evaluate({**stats, "logprob": leaf})[0]
            # of a cross-entropy, responses that are not chosen are no part
            return torch.autograd.grad(total, leaf)[0] if total.requires_grad else leaf * 0.0

    def _part(self, first: int, last: int) -> PreferenceProblem:
        """The problem of groups first .. last."""
        problem, examples = self.problem, self.examples
        rows = slice(self.starts[first], self.starts[last])
        index = problem.sequences.index[rows]
        roles = problem.loss.roles
        if self.alone:
            which = torch.arange(first, last, device=index.device)
            local = index - first
            sides = []
            for r, role in enumerate(roles):
                begin, end = max(first, r * examples), min(last, (r + 1) * examples)
                if begin < end:
                    own = slice(begin - first, end - first)
                    of = slice(begin - r * examples, end - r * examples)
                    sides.append(Side(role, own, of))
        else:
            some = last - first
            one = torch.arange(first, last, device=index.device)
            which = torch.cat([one + r * examples for r in range(len(roles))])
            local = index % examples - first + index // examples * some
            sides = [
                Side(role, slice(r * some, (r + 1) * some), slice(first, last))
                for r, role in enumerate(roles)
            ]
        weight, ref = problem.token_weight, problem.ref_logp
        return replace(
            problem,
            sequences=Sequences(
                local,
                problem.sequences.lengths[which],
                problem.sequences.starts[which] - rows.start,
            ),
            sides=tuple(sides),
            ref_logp=None if ref is None else ref[which],
            token_weight=None if weight is None else weight[rows],
        )
