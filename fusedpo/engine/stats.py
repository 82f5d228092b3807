"""The statistics of a token, one row of a table each, and the record that carries them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusedpo.kernels.row_stats import RowStats


@dataclass(frozen=True)
class Statistic:
    """A number per token that comes out of one pass over the logits.

    Attributes:
        name: in TokenStats, and in the argument ``stats``.
        finish: [n] from the accumulated RowStats of n rows and the size of the vocabulary.
        accumulator: the optional sum of the kernels that it is made of; None: those every pass has.
        differentiable: whether a gradient can be passed on.
        dtype: of its values; None: that of the sums.
    """

    name: str
    finish: Callable[[RowStats, int], Tensor]
    accumulator: Literal["entropy", "squares", "mean"] | None = None
    differentiable: bool = False
    dtype: torch.dtype | None = None


def _mean_logit(rows: RowStats, vocab: int) -> Tensor:
    assert rows.plain is not None, "started with its accumulator"
    return rows.plain / vocab


STATISTICS = {
    statistic.name: statistic
    for statistic in (
        Statistic("logprob", lambda rows, vocab: rows.logprob, differentiable=True),
        Statistic(
            "entropy",
            lambda rows, vocab: rows.entropy,
            accumulator="entropy",
            differentiable=True,
        ),
        Statistic("logsumexp", lambda rows, vocab: rows.logsumexp),
        Statistic("mean_logit", _mean_logit, accumulator="mean"),
        Statistic(
            "log_sum_sq_probs", lambda rows, vocab: rows.log_sum_sq_probs, accumulator="squares"
        ),
        Statistic("top1", lambda rows, vocab: rows.top1, dtype=torch.bool),
    )
}
STATS = tuple(STATISTICS)
DIFFERENTIABLE = tuple(name for name, s in STATISTICS.items() if s.differentiable)

# numbers per token that every forward leaves for the backward
SAVED = ("logprob", "shift", "total")


def accumulators(names: Iterable[str]) -> dict[str, bool]:
    """Which optional sums of the kernels these statistics need: keyword arguments for them."""
    needed = {STATISTICS[name].accumulator for name in names}
    return {name: name in needed for name in ("entropy", "squares", "mean")}


def start(names: Iterable[str], rows: int, like: Tensor) -> RowStats:
    """Accumulators of n rows for these statistics, in the dtype and on the device of ``like``."""
    return RowStats.start(rows, like, **accumulators(names))


def finish(names: Iterable[str], rows: RowStats, vocab: int) -> dict[str, Tensor]:
    """[n] of these statistics and of those that are saved, once all tiles have been folded."""
    values = {name: getattr(rows, name) for name in SAVED}
    for name in names:
        if name not in values:
            values[name] = STATISTICS[name].finish(rows, vocab)
    return values


class TokenStats(NamedTuple):
    """Per-token statistics of a language-model head, each shaped like the labels; None: not asked
    for.

    Everything is fp32 (fp64 for fp64 inputs) and 0 (False) at ignored positions.

    Attributes:
        logprob: log-probability of the label. Differentiable.
        entropy: entropy of the next-token distribution, in nats. Differentiable.
        logsumexp: logsumexp of the logits.
        mean_logit: mean of the logits over the vocabulary.
        log_sum_sq_probs: log of the sum of squared probabilities.
        top1: whether no other token has a larger logit than the label.
        aux_loss: of ``model(..., fused=True)`` only: a scalar, the load-balancing loss of a mixture
            of experts.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    top1: Tensor | None = None
    aux_loss: Tensor | None = None
