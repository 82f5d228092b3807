"""Statistics of tokens without a loss: of the public functions, and of a reference."""

from __future__ import annotations

from collections.abc import Sequence

from fusedpo import checks
from fusedpo.engine.batch import Batch
from fusedpo.engine.plan import Plan
from fusedpo.engine.score import plan_for, score, score_in_graph
from fusedpo.engine.stats import DIFFERENTIABLE, STATS, TokenStats


def check_stats(
    stats: str | Sequence[str], argument: str = "stats", choices: Sequence[str] = STATS
) -> tuple[str, ...]:
    """The names of the statistics, in the order of the choices."""
    if isinstance(stats, str):
        stats = (stats,)
    if not isinstance(stats, Sequence):
        raise checks.bad_type(argument, "a sequence of names", type(stats).__name__)
    for name in stats:
        if name not in choices:
            raise checks.bad_choice(argument, name, choices)
    return tuple(name for name in choices if name in stats)


def score_tokens(
    batch: Batch,
    memory_budget: int | float | str | Plan | None,
    *,
    stats: tuple[str, ...] = ("logprob",),
    differentiable: tuple[str, ...] = DIFFERENTIABLE,
    like: Plan | None = None,
) -> TokenStats:
    """Statistics [N] of the rows, planned and scored.

    Args:
        differentiable: which of logprob and entropy pass a gradient on.
        like: a policy's plan, whose tiles are taken where the sizes are the same.
    """
    if batch.rows.scored is not None:
        return score_in_graph(batch, memory_budget, stats=stats, differentiable=differentiable)[0]
    plan = plan_for(batch, memory_budget, stats=stats, differentiable=differentiable, like=like)
    return score(batch, plan, stats=stats, differentiable=differentiable)[0]
