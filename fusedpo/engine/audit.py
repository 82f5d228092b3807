"""The error of gradients by kept columns, estimated from a few rows and columns done exactly.

The hidden gradient's error is measured in rows that are taken in proportion to the square of the
probability that they lost, times their upstream gradient; the head's in columns, in proportion to
the square of their importance where they were left out. An error is nearly proportional to these,
so that a few of them tell the 2-norm of the whole well, and a row that lost much is never missed.
They are taken at even steps of the cumulative sum: no random number is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpo.engine.columns import Kept
from fusedpo.engine.cost import Buffers, Problem
from fusedpo.engine.entries import Entries
from fusedpo.engine.head_gradient import HeadGradient, add_slice, weighted
from fusedpo.engine.precision import divide_
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Tiles

ROWS, _COLUMNS = 16, 128

# rows whose squares are summed up at a time, in double precision: those of a small gradient are
# beyond the range of fp32
_AT_ONCE, _DOUBLE = 16, 8


def buffers(p: Problem) -> Buffers:
    """The memory of an audit, in bytes."""
    columns = min(_COLUMNS, p.vocab) if p.needs & {"weight", "bias"} else 0
    return {
        "audited weight rows": columns * p.hidden * p.operand,
        "audited columns": columns * (p.hidden + 1) * p.acc,
        "audited squares": _AT_ONCE * p.hidden * _DOUBLE,
    }


def products(p: Problem) -> float:
    """Products of an audit: two of its rows, two of its columns."""
    rows = 2 * ROWS / max(1, p.tokens) if "hidden" in p.needs else 0.0
    columns = 2 * _COLUMNS / p.vocab if p.needs & {"weight", "bias"} else 0.0
    return min(rows, 2.0) + min(columns, 2.0)


def relative_error(squares: list[Tensor]) -> Tensor:
    """The largest relative error, of squares [2] of an error and of its gradient; a number on the
    device.

    NaN where a gradient is not finite: no sample tells anything of it.
    """
    wrong, whole = torch.stack(squares).unbind(1)
    relative = torch.where(wrong == 0, 0.0, wrong / whole)
    return torch.where(whole.isfinite(), relative, torch.nan).amax().sqrt()


@dataclass(frozen=True)
class Sample:
    """Places that stand for all: the sum of f over all is that of f(chosen) times their factors."""

    chosen: Tensor
    factors: Tensor

    @classmethod
    def of(cls, weights: Tensor, count: int) -> Sample:
        """Places in proportion to weights [n], for an f that is nearly so; in order."""
        reached = weights.to(torch.float64, copy=True).cumsum_(0)
        steps = torch.arange(count, device=weights.device, dtype=torch.float64) + 0.5
        at = torch.searchsorted(reached, steps * (reached[-1] / count))
        chosen = at.clamp_(max=weights.shape[0] - 1)
        # one that is met several times counts so often where it is first, and not again
        again = torch.cat((torch.zeros_like(chosen[:1]), chosen[1:] == chosen[:-1])).bool()
        group = (~again).cumsum(0) - 1
        times = torch.zeros_like(steps).index_add_(0, group, torch.ones_like(steps))[group]
        share = weights[chosen].double() * count / reached[-1]
        factors = torch.where(share > 0, times / share, 0.0)
        return cls(chosen, factors.masked_fill_(again, 0.0))

    def sum(self, squares: Tensor) -> Tensor:
        return (squares.double() * self.factors).sum()


def sample_rows(t: Tiles, lost: Tensor) -> Sample:
    """Rows to do exactly, in proportion to the square of what they lost.

    Args:
        lost: [N], the probability that each row lost times its upstream gradient.
    """
    weights = lost.double().square_()
    if t.shard is not None:
        t.shard.add_up(weights)
    return Sample.of(weights, min(ROWS, t.count, t.plan.back_rows))


def of_rows(t: Tiles, sample: Sample, exact: Tensor, hidden: Tensor) -> Tensor:
    """[2], squares of the hidden gradient's error and of itself.

    Args:
        exact: [n, H], the gradient of the sampled rows; overwritten.
        hidden: [N, H]; of this slice of a vocabulary, whose parts are added up here.
    """
    wrong = _difference(t, exact, hidden, sample.chosen)
    if t.shard is not None:
        t.shard.add_up(wrong)
        t.shard.add_up(hidden)
    squares = sample.sum(_squares(t, wrong))
    return torch.stack((squares, hidden.norm().double().square()))


def _difference(t: Tiles, exact: Tensor, whole: Tensor, chosen: Tensor) -> Tensor:
    """[n, H], the exact rows minus those of a gradient that were chosen, in place of the former."""
    for part in blocks(0, len(chosen), _AT_ONCE):
        rows, where = exact[slice(*part)], chosen[slice(*part)]
        memory = t.take("audited squares", *rows.shape)
        rows -= torch.index_select(whole, 0, where, out=memory)
    return exact


def _squares(t: Tiles, wrong: Tensor) -> Tensor:
    """[n] float64, the squares of the 2-norms of rows [n, H]."""
    out = wrong.new_empty(len(wrong), dtype=torch.float64)
    for part in blocks(0, len(wrong), _AT_ONCE):
        rows = wrong[slice(*part)]
        memory = t.take("audited squares", *rows.shape, dtype=torch.float64)
        out[slice(*part)] = memory.copy_(rows).square_().sum(1)
    return out


def of_columns(
    t: Tiles, entries: Entries, kept: Kept, head: HeadGradient, squares: Tensor
) -> list[Tensor]:
    """[2] for each gradient of the head, squares of its error and of itself.

    Args:
        head: in full precision.
        squares: the square of the weight's 2-norm.
    """
    sample = Sample.of(kept.left_out["head"], min(_COLUMNS, t.vocab, t.plan.back_cols))
    count = sample.chosen.shape[0]
    memory = t.take("audited weight rows", count, t.width, dtype=t.operand)
    weight = t.some_weight_rows(sample.chosen, memory)
    memory = t.take("audited columns", count, t.width + 1)
    of_weight = memory.view(-1)[: count * t.width].view(count, t.width)
    of_bias = memory.view(-1)[count * t.width :]
    for r in blocks(0, t.count, t.plan.back_rows):
        hidden, missing = t.hidden_rows(*r), entries.missing
        missing = None if missing is None else missing[slice(*r)]
        z = entries.tile(slice(*r), hidden, sample.chosen, weight)
        add_slice(
            t,
            None if head.weight is None else of_weight,
            None if head.bias is None else of_bias,
            z,
            hidden if head.weight is None else weighted(t, hidden, missing),
            missing,
            r[0] > 0,
        )
    divide_(entries.gain, memory)
    found = []
    for exact, whole in ((of_weight, head.weight), (of_bias, head.bias)):
        if whole is None:
            continue
        one, other = (each.view(len(each), -1) for each in (exact, whole))
        of_errors = sample.sum(_squares(t, _difference(t, one, other, sample.chosen)))
        of_whole = squares[0] if whole.dim() > 1 else whole.norm().square()
        found.append(torch.stack((of_errors, of_whole.double())))
        if t.shard is not None:
            t.shard.add_up(found[-1])
    return found
