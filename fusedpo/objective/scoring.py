"""Statistics of tokens without a loss: of the public functions, and of a reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedpo import checks
from fusedpo.engine.plan import Plan
from fusedpo.engine.rows import Rows
from fusedpo.engine.score import plan_for, score, score_in_graph
from fusedpo.engine.stats import STATS, TokenStats
from fusedpo.head import Head


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
    hidden: Tensor,
    head: Head,
    rows: Rows,
    memory_budget: int | float | str | Plan | None,
    *,
    stats: tuple[str, ...] = ("logprob",),
    temperature: float | Tensor,
    backend: str,
    like: Plan | None = None,
) -> TokenStats:
    """Statistics [N] of the rows, planned and scored.

    Args:
        backend: the one that is used; in a graph that is traced, the argument.
        like: a policy's plan, whose tiles are taken where the sizes are the same.
    """
    if rows.scored is not None:
        return score_in_graph(
            hidden,
            head,
            rows,
            memory_budget,
            stats=stats,
            temperature=temperature,
            backend=backend,
        )[0]
    plan = plan_for(hidden, head, rows, memory_budget, stats=stats, backend=backend, like=like)
    return score(hidden, head, rows, plan, stats=stats, temperature=temperature, backend=backend)[0]
