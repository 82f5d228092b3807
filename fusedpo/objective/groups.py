"""Groups of tokens, within which the gradient of a loss is known early up to a few factors.

Letters: P examples of R responses each, B sequences, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fusedpo.engine.structure import Groups
from fusedpo.losses import Loss, PolicyLoss, PreferenceLoss
from fusedpo.objective.policy import PolicyProblem
from fusedpo.objective.preference import PreferenceProblem, Side
from fusedpo.objective.sequences import Sequences


def plan_options(
    loss: Loss,
    sequences: int,
    counts: list[int] | None = None,
    *,
    split: bool = False,
    log_entropy: bool = False,
) -> dict[str, Any]:
    """The keyword arguments of ``plan_for`` that come from the loss.

    Args:
        loss: a preference or policy loss.
        sequences: responses of the call.
        counts: their scored tokens, if these are known; of all ranks that have parts of them.
        split: whether several ranks have parts of each sequence.
        log_entropy: whether the entropy is wanted for a metric.
    """
    structure = loss.gradient_structure
    roles = len(loss.roles) if isinstance(loss, PreferenceLoss) else 1
    stats, differentiable = ["logprob", *loss.stats], ["logprob"]
    if isinstance(loss, PolicyLoss) and loss.entropy_bonus:
        differentiable.append("entropy")
    elif log_entropy:
        stats.append("entropy")
    examples = sequences // roles
    groups: int | list[int]
    if counts is None or split:  # of split sequences, only parts of the rows are here
        groups = max(1, sequences if structure.scope == "sequence" else examples)
    else:
        groups = group_sizes(loss, counts)
    return {
        "stats": tuple(stats),
        "differentiable": tuple(differentiable),
        "scope": "batch" if split else structure.scope,
        "groups": groups,
        "factors": structure.factors,
        "reordered": examples > 1 and roles > 1 and structure.scope == "pair",
    }


def group_sizes(loss: Loss, counts: list[int]) -> list[int]:
    """Rows of each group of ``one_pass``, from those of the responses."""
    if not isinstance(loss, PreferenceLoss) or loss.gradient_structure.scope == "sequence":
        return counts
    examples = len(counts) // len(loss.roles)
    return [sum(counts[example::examples]) for example in range(examples)]


def groups_of(problem: PreferenceProblem | PolicyProblem, counts: list[int]) -> Groups:
    """The groups of a problem for ``one_pass``.

    Args:
        counts: scored tokens of each sequence.
    """
    if isinstance(problem, PolicyProblem):
        return PolicyGroups(problem, counts)
    return PreferenceGroups(problem, counts)


class PreferenceGroups:
    """Examples (or responses, where they stand alone) as the groups of ``one_pass``.

    The rows of a group follow each other, a response's rows within them.
    """

    def __init__(self, problem: PreferenceProblem, counts: list[int]) -> None:
        loss, sequences = problem.loss, problem.sequences
        structure = loss.gradient_structure
        self.problem, self.counts = problem, counts
        self.alone = structure.scope == "sequence"
        self.examples = len(counts) // len(loss.roles)
        places = range(len(counts))
        roles = len(loss.roles)
        by_place = [
            counts[i if self.alone else i // roles + i % roles * self.examples] for i in places
        ]
        borders = [0, *accumulate(by_place)]
        self.starts: Sequence[int] = [0, *accumulate(group_sizes(loss, counts))]
        self.runs: Sequence[int] = borders if structure.unit == "one" else self.starts
        unit = torch.ones_like(sequences.index, dtype=torch.float64)
        if structure.unit in ("margin", "mean_margin"):
            unit = torch.where(sequences.index < self.examples, unit, -unit)
        if structure.unit == "mean_margin":
            unit = unit / sequences.lengths[sequences.index]
        self.unit = unit if problem.token_weight is None else unit * problem.token_weight

    def units(self, start: int, stop: int, stats: Mapping[str, Tensor]) -> Tensor:
        return self.unit[start:stop]

    def gradient(self, first: int, last: int, stats: Mapping[str, Tensor]) -> Tensor:
        part = self._part(first, last)
        with torch.enable_grad():
            leaf = stats["logprob"].detach().requires_grad_()
            total = part.evaluate({**stats, "logprob": leaf})[0]
            # responses that are not chosen have no part in a cross-entropy
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
                    places = slice(begin - first, end - first)
                    of_examples = slice(begin - r * examples, end - r * examples)
                    sides.append(Side(role, places, of_examples))
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


class PolicyGroups:
    """Tokens, or responses where a formula looks at whole ones, as the groups of ``one_pass``."""

    def __init__(self, problem: PolicyProblem, counts: list[int]) -> None:
        self.problem = problem
        self.alone = problem.loss.gradient_structure.scope == "token"
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
