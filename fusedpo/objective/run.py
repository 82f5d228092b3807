"""The steps that ``preference_loss`` and ``policy_loss`` share, once their arguments are checked:
reference, plan, problem, scores, output.

Letters: B sequences, P examples, N scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedpo.engine.plan import Plan
from fusedpo.engine.score import plan_for, score, score_in_graph
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.objective.arguments import PolicyArguments, PreferenceArguments
from fusedpo.objective.groups import groups_of, plan_options
from fusedpo.objective.layout import Layout
from fusedpo.objective.policy import PolicyProblem
from fusedpo.objective.preference import PreferenceProblem
from fusedpo.objective.reference import (
    Reference,
    ReferenceArguments,
    check_reference,
    sequence_logprobs,
    token_logprobs,
)


@dataclass(frozen=True)
class Run:
    """A call of a loss between its checks and its scores.

    Attributes:
        layout: with rows in the order in which they are scored.
        memory_budget: the argument.
        plan: of the policy; None in a graph that is traced, which has only the budget.
        stats: what is scored, by name.
        differentiable: which of them pass a gradient on.
        by_kernel: whether the tail kernel may evaluate the loss.
        state_rows: the rows whose hidden states the loss sees, or None.
    """

    layout: Layout
    reference: Reference
    memory_budget: int | float | str | Plan | None
    plan: Plan | None
    stats: tuple[str, ...]
    differentiable: tuple[str, ...]
    by_kernel: bool
    state_rows: Tensor | None


def prepare(
    loss: Loss,
    layout: Layout,
    reference: ReferenceArguments,
    memory_budget: int | float | str | Plan | None,
    *,
    log_entropy: bool = False,
) -> Run:
    """A call with its reference checked and its plan made.

    Args:
        log_entropy: whether the entropy is wanted for a metric.
    """
    checked = check_reference(loss, layout, reference)
    counts, sequences = layout.counts, layout.sequences
    split = sequences.parts is not None  # among ranks
    options = plan_options(loss, sequences.count, counts, split=split, log_entropy=log_entropy)
    plan: Plan | None = None
    if counts is not None:
        plan = plan_for(layout.batch, memory_budget, **options)
        reordered = plan.route == "one_pass" and options["reordered"]
        if isinstance(loss, PreferenceLoss) and reordered:
            # an example's rows side by side, so that its gradient is known as early as can be
            layout = layout.by_example(len(loss.roles))
    # a graph that is traced has the formula itself, for the compiler to fuse
    by_kernel = (
        layout.batch.backend == "triton"
        and counts is not None
        and loss.tail is not None
        and not split
    )
    uses_states = isinstance(loss, PreferenceLoss) and loss.uses_states
    return Run(
        layout,
        checked,
        memory_budget,
        plan,
        options["stats"],
        options["differentiable"],
        by_kernel,
        layout.last_rows if uses_states else None,
    )


def preference_problem(run: Run, arguments: PreferenceArguments) -> PreferenceProblem:
    """The loss of a call as a function of log-probabilities, with its reference."""
    problem = PreferenceProblem.of(run.layout, arguments, by_kernel=run.by_kernel)
    ref_logp = sequence_logprobs(
        run.reference, run.layout, run.memory_budget, run.plan, problem.total
    )
    return replace(problem, ref_logp=ref_logp)


def policy_problem(run: Run, arguments: PolicyArguments) -> PolicyProblem:
    """The loss of a call as a function of log-probabilities, with its reference."""
    ref_logprob = token_logprobs(run.reference, run.layout, run.memory_budget, run.plan)
    return PolicyProblem.of(run.layout, arguments, ref_logprob, by_kernel=run.by_kernel)


def finish(
    run: Run, problem: PreferenceProblem | PolicyProblem
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """The loss, that of each example, metrics, and log-probabilities shaped like the labels."""
    layout = run.layout
    if run.plan is None or layout.counts is None:
        scores, states = score_in_graph(
            layout.batch,
            run.memory_budget,
            stats=run.stats,
            differentiable=run.differentiable,
            states=run.state_rows,
        )
    else:
        one_pass = run.plan.route == "one_pass"
        scores, states = score(
            layout.batch,
            run.plan,
            stats=run.stats,
            differentiable=run.differentiable,
            groups=groups_of(problem, layout.counts) if one_pass else None,
            states=run.state_rows,
        )
    stats = {name: getattr(scores, name) for name in run.stats}
    parts = layout.sequences.parts
    if states is not None and parts is not None:
        states = parts.of_last(states)
    total, per_example, metrics = problem.output(stats, states)
    batch = layout.batch
    if run.plan is not None and run.plan.needs and batch.tolerance:
        seen = batch.record.metrics()
        metrics |= {name: torch.full_like(total.detach(), value) for name, value in seen.items()}
    return total, per_example, metrics, layout.rows.scatter(stats["logprob"].detach())
