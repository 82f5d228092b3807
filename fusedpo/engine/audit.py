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
from fusedpo.engine.precision import divide_, multiply
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Tiles

_ROWS, _COLUMNS = 16, 128


def buffers(p: Problem) -> Buffers:
    """The memory of an audit, in bytes."""
    rows, columns = min(_ROWS, p.tokens), min(_COLUMNS, p.vocab)
    return {
        "audited rows": 2 * rows * p.hidden * p.acc,
        "audited weight rows": columns * p.hidden * p.operand,
        "audited columns": columns * (p.hidden + 1) * p.acc,
    }


def products(p: Problem) -> float:
    """Products of an audit: two of its rows, two of its columns."""
    rows = 2 * _ROWS / max(1, p.tokens) if "hidden" in p.needs else 0.0
    columns = 2 * _COLUMNS / p.vocab if p.needs & {"weight", "bias"} else 0.0
    return min(rows, 2.0) + min(columns, 2.0)


def errors(
    t: Tiles,
    entries: Entries,
    kept: Kept,
    dropped: Tensor,
    head: HeadGradient,
    hidden: Tensor | None,
) -> dict[str, float]:
    """The relative errors of the gradients of "hidden" and "head", in the 2-norm; of weight and
    bias the larger.

    Args:
        dropped: [N], the probability that each row lost times its upstream gradient.
        head, hidden: the gradients in full precision, hidden [N, H]; of this slice of a vocabulary,
            of which hidden's parts are added up here.
    """
    squares = {}
    if hidden is not None:
        squares["hidden"] = [_of_rows(t, entries, dropped, hidden)]
    if head.wanted:
        squares["head"] = _of_columns(t, entries, kept, head)
    return {name: _relative(torch.stack(parts)) for name, parts in squares.items()}


def _relative(squares: Tensor) -> float:
    """The largest relative error, of squares [n, 2] of errors and of gradients.

    NaN where a gradient is not finite: no sample tells anything of it.
    """
    wrong, whole = squares.unbind(1)
    relative = torch.where(wrong == 0, 0.0, wrong / whole)
    return float(torch.where(whole.isfinite(), relative, torch.nan).amax().sqrt())


@dataclass(frozen=True)
class _Sample:
    """Places that stand for all: the sum of f over all is that of f(chosen) times their factors."""

    chosen: Tensor
    factors: Tensor

    @classmethod
    def of(cls, weights: Tensor, count: int) -> _Sample:
        """Places in proportion to weights [n], for an f that is nearly so; in order, each once."""
        reached = weights.double().cumsum(0)
        steps = torch.arange(count, device=weights.device, dtype=torch.float64) + 0.5
        at = torch.searchsorted(reached, steps * (reached[-1] / count))
        at = at.clamp_(max=weights.shape[0] - 1)
        chosen, times = torch.unique(at, return_counts=True)
        share = weights[chosen].double() * count / reached[-1]
        return cls(chosen, torch.where(share > 0, times / share, 0.0))

    def sum(self, squares: Tensor) -> Tensor:
        return (squares.double() * self.factors).sum()


def _of_rows(t: Tiles, entries: Entries, dropped: Tensor, hidden: Tensor) -> Tensor:
    """[2], squares of the hidden gradient's error and of itself; its slices are added up."""
    weights = dropped.double().square()
    if t.shard is not None:
        t.shard.add_up(weights)
    sample = _Sample.of(weights, min(_ROWS, t.count, t.plan.back_rows))
    states = t.reader.some(sample.chosen).to(t.operand)
    exact = t.take("audited rows", states.shape[0], t.width).zero_()
    for c in blocks(0, t.vocab, t.plan.back_cols):
        weight = t.weight_rows(*c)
        multiply(exact, entries.tile(sample.chosen, states, c, weight), weight, add=True)
    if entries.missing is not None:
        exact *= entries.missing[sample.chosen, None]
    divide_(entries.gain, exact)
    exact -= hidden[sample.chosen]
    if t.shard is not None:
        t.shard.add_up(exact)
        t.shard.add_up(hidden)
    squares = exact.double().square().sum(1)
    return torch.stack((sample.sum(squares), hidden.norm().double().square()))


def _of_columns(t: Tiles, entries: Entries, kept: Kept, head: HeadGradient) -> list[Tensor]:
    """[2] for each gradient of the head, squares of its error and of itself."""
    sample = _Sample.of(kept.left_out["head"], min(_COLUMNS, t.vocab, t.plan.back_cols))
    count = sample.chosen.shape[0]
    rows = t.weight[sample.chosen]
    weight = t.take("audited weight rows", *rows.shape, dtype=t.operand).copy_(rows)
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
        wrong = (exact - whole[sample.chosen]).double().square()
        squares = sample.sum(wrong.sum(1) if wrong.dim() > 1 else wrong)
        found.append(torch.stack((squares, whole.norm().double().square())))
        if t.shard is not None:
            t.shard.add_up(found[-1])
    return found
