"""Statistics of tokens without a loss: of the public functions, and of a reference."""

from __future__ import annotations

from collections.abc import Sequence

from fusedpo import checks
from fusedpo.engine.batch import Batch
from fusedpo.engine.plan import Plan
from fusedpo.engine.score import plan_for, score, score_in_graph
from fusedpo.engine.stats import STATS, TokenStats


def check_stats(stats: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the statistics, in the order of ``STATS``."""
    if isinstance(stats, str):
        stats = (stats,)
    if not isinstance(stats, Sequence):
        raise checks.bad_type("stats", "a sequence of names", type(stats).__name__)
    for name in stats:
        if name not in STATS:
            raise checks.bad_choice("stats", name, STATS)
    return tuple(name for name in STATS if name in stats)


def score_tokens(
    batch: Batch,
    memory_budget: int | float | str | Plan | None,
    *,
    stats: tuple[str, ...] = ("logprob",),
    like: Plan | None = None,
) -> TokenStats:
    """Statistics [N] of the rows, planned and scored.

    Args:
        like: a policy's plan, whose tiles are taken where the sizes are the same.
    """
    if batch.rows.scored is not None:
        return score_in_graph(batch, memory_budget, stats=stats)[0]
    return score(batch, plan_for(batch, memory_budget, stats=stats, like=like), stats=stats)[0]
