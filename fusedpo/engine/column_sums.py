"""Sums over the probabilities of a slab or a row, while tiles are folded.

A slab is a run of rows. Its column sums tell which columns of the vocabulary matter to it, and for
all others how their probability is spread. They are formed before the statistics of a row are
complete: relative to the row's shift and total so far, and to its target's logit, which is known
beforehand. Once they are complete, the sums of each tile are brought to the mean of what they are
too large by. They decide which columns are kept, not what a kept column's gradient is.

A row's products with the weight's main directions are exact. Of what is left out of the hidden
gradient, the largest part lies in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpo.engine.cost import FINISHED_ROWS, Buffers, Problem
from fusedpo.engine.precision import multiply
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Range, Tiles, row_factor
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.row_stats import RowStats, power_of_two

# Main directions of the weight, found from this many of its rows by so many multiplications. More
# take more of the error away, but little: 8 take a third, 16 two fifths, 64 half
# (benchmarks/compact.py).
_DIRECTIONS, _SAMPLE, _ROUNDS = 16, 2048, 4


def buffers(p: Problem, slab: int, v: int) -> Buffers:
    """The memory of the sums, with slabs of so many rows and tiles of v columns, in bytes."""
    slabs, tiles = -(-p.tokens // slab), -(-p.vocab // v)
    count = _count(p.hidden) + 1
    return {
        "column sums": slabs * p.vocab * p.acc,
        "column weights": 2 * tiles * p.tokens * p.acc,
        "main directions": (p.tokens + p.hidden) * count * p.acc,
        "main products": p.vocab * count * p.operand,
    }


def _count(hidden: int) -> int:
    return min(_DIRECTIONS, hidden)


class ColumnSums:
    """Sums of probabilities over the rows of each slab, the targets' own left out.

    Attributes:
        values: [slabs, V].
        directions: [H, K], orthonormal.
        row_products: [N, K + 1], J times the weight's products with the directions, and J's sums.
    """

    def __init__(self, t: Tiles) -> None:
        slabs, tiles = -(-t.count // t.plan.slab), -(-t.vocab // t.plan.cols)
        self.t = t
        self.values = t.take("column sums", slabs, t.vocab).zero_()
        self._weights, self._steps = t.take("column weights", 2, tiles, t.count)
        self._targets = _target_logits(t)
        self.directions = main_directions(t)
        count = self.directions.shape[1]
        self._of_weight = t.take("main products", t.vocab, count + 1, dtype=t.operand)
        self._of_weight[:, count] = 1.0
        for c in t.col_blocks():
            rows = t.weight_rows(*c)
            self._of_weight[slice(*c), :count] = rows @ self.directions.to(rows.dtype)
        self.row_products = t.take("main directions", t.count, count + 1).zero_()

    def add(self, r: Range, c: Range, stats: RowStats, exponentials: Tensor) -> None:
        """Add a tile, of row block r and vocabulary block c, right after its fold."""
        t, rows, i = self.t, slice(*r), c[0] // self.t.plan.cols
        whole = stats.total + torch.exp(self._targets[rows] - stats.shift)
        weights = torch.where(whole > 0, 1.0 / whole, 0.0)
        if i:
            moved = power_of_two(self._steps[i - 1, rows] - stats.steps)
            self.row_products[rows] *= moved[:, None]
        self._weights[i, rows], self._steps[i, rows] = weights, stats.steps
        multiply(self.row_products[rows], exponentials, self._of_weight[slice(*c)], add=True)
        first, last = r[0] // t.plan.slab, -(-r[1] // t.plan.slab)
        slab = torch.arange(*r, device=weights.device) // t.plan.slab
        member = slab == torch.arange(first, last, device=weights.device)[:, None]
        of_rows = (member * (weights / t.gain)).to(exponentials.dtype)
        multiply(self.values[first:last, slice(*c)], of_rows, exponentials, add=True)

    def finish(self, stats: RowStats, rescale: Tensor | None) -> None:
        """Bring the sums to complete statistics.

        Args:
            rescale: [N], the factor that sums of this rank's columns still lack; None: nothing.
        """
        t, slab = self.t, self.t.plan.slab
        lacking = torch.ones_like(stats.total) if rescale is None else rescale
        factor = row_factor(stats.logprob, stats.total) * lacking
        complete = _sum_slabs(factor * power_of_two(self._steps - stats.steps), slab)
        ratio = complete / _sum_slabs(self._weights, slab)
        for i, c in enumerate(t.col_blocks()):
            self.values[:, slice(*c)] *= ratio[i].nan_to_num(0.0, 0.0)[:, None]
        own = t.target_entry(stats.total, stats.target, (0, t.count))
        own = torch.where((t.targets >= 0) & (t.targets < t.vocab), own, 0.0)
        of_targets = self._of_weight[t.targets.clamp(0, t.vocab - 1)].to(t.acc)
        self.row_products *= (lacking / t.gain)[:, None]
        self.row_products -= own[:, None] * of_targets


def _sum_slabs(values: Tensor, slab: int) -> Tensor:
    """[tiles, slabs] from [tiles, N]."""
    missing = -values.shape[1] % slab
    return torch.nn.functional.pad(values, (0, missing)).view(values.shape[0], -1, slab).sum(2)


def main_directions(t: Tiles) -> Tensor:
    """[H, K], an orthonormal basis that holds most of the weight's rows, by subspace iteration."""
    # in the memory of the tile, as much as there is
    count = max(1, min(_SAMPLE, t.vocab, t.tile().numel() // t.width))
    sample = t.weight[:: t.vocab // count][:count]
    rows = t.take("tile", *sample.shape).copy_(sample)
    basis = torch.zeros(t.width, _count(t.width), dtype=t.acc, device=rows.device)
    first = rows[: basis.shape[1]].T
    basis[:, : first.shape[1]] = first
    for _ in range(_ROUNDS):
        basis = rows.T @ (rows @ basis)
        if t.shard is not None:  # the same on every rank
            t.shard.add_up(basis)
        # a number that is none would be everywhere afterwards
        basis = torch.linalg.qr(basis.nan_to_num(0.0, 0.0, 0.0)).Q
    return basis


def _target_logits(t: Tiles) -> Tensor:
    """[N], logits of the targets; -inf where another rank has them. Not to the last bit."""
    out = t.vector(t.count)
    for start, stop in blocks(0, t.count, FINISHED_ROWS):
        rows, targets = slice(start, stop), t.targets[start:stop]
        here = (targets >= 0) & (targets < t.vocab)
        safe = targets.clamp(0, t.vocab - 1)
        products = (t.hidden_rows(start, stop).to(t.acc) * t.weight[safe].to(t.acc)).sum(1)
        if t.bias is not None:
            products += t.bias[safe]
        head = LogitMap(None, t.call.softcap, t.scale_rows(start, stop))
        out[rows] = head.apply(products[:, None])[:, 0].masked_fill(~here, -torch.inf)
    return out
