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

# Products of a row with the weight's main directions, and one place for the sum of its J. More
# directions take more of the error away, but little: 8 take 40 %, 16 43 %, 64 half of it
# (benchmarks/compact_errors.py); and for 16 columns a product is faster than for 12, or 17.
PRODUCTS = 16

# they are found from this many rows of the weight, by so many multiplications
_SAMPLE, _ROUNDS = 2048, 4

# numbers of the rows in several tiles that are brought to complete statistics at a time
_AT_ONCE = 2**14


def buffers(p: Problem, slab: int, n: int, v: int) -> Buffers:
    """The memory of the sums, with slabs of so many rows and tiles [n, v], in bytes."""
    tiles = -(-p.vocab // v)
    return {
        **saved(p, slab),
        "slab sums": most_slabs(slab, n) * v * p.operand,
        "slab weights": most_slabs(slab, n) * n * p.operand,
        "column weights": 2 * tiles * p.tokens * p.acc,
        "squared sizes": p.vocab * p.acc,
        "main products": p.vocab * PRODUCTS * p.operand,
        "sampled products": min(_SAMPLE, p.vocab) * PRODUCTS * p.acc,
        "new directions": 3 * p.hidden * PRODUCTS * p.acc,
    }


def most_slabs(slab: int, n: int) -> int:
    """The most slabs that have rows among n that follow each other."""
    return -(-(n - 1) // slab) + 1


def saved(p: Problem, slab: int) -> Buffers:
    """Of these, what the backward is left, with slabs of so many rows."""
    return {
        "column sums": -(-p.tokens // slab) * p.vocab * p.acc,
        "column sizes": p.vocab * p.acc,
        "row products": p.tokens * PRODUCTS * p.acc,
        "main directions": p.hidden * PRODUCTS * p.acc,
    }


class ColumnSums:
    """Sums of probabilities over the rows of each slab, the targets' own left out.

    Attributes:
        values: [slabs, V].
        directions: [H, K], orthonormal.
        row_products: [N, 16], J times the weight's products with the directions, then zeros; and
            in the last place the sums of J, unless these are 0 and all places are the directions'.
        row_sizes, column_sizes: [N] and [V], 2-norms of the hidden rows and of the weight's over
            their root mean square, or 1 where that is less.
    """

    def __init__(self, t: Tiles, order: Tensor | None = None) -> None:
        slabs, tiles = -(-t.count // t.plan.slab), -(-t.vocab // t.plan.cols)
        self.t, self._order = t, order
        # [N], rows slab by slab
        self._by_slabs = torch.arange(t.count, device=t.hidden.device) if order is None else order
        self.values = t.take("column sums", slabs, t.vocab).zero_()
        self._weights, self._steps = t.take("column weights", 2, tiles, t.count)
        self._targets, sizes = _targets_and_sizes(t)
        self.row_sizes = _relative(sizes, torch.empty_like(sizes))
        self.column_sizes = t.take("column sizes", t.vocab)
        # a softcap's slope, or a part of a vocabulary, takes a row's sum away from 0
        self._sums_rows = t.call.softcap is not None or t.shard is not None
        self.directions = main_directions(t, min(PRODUCTS - 1 + (not self._sums_rows), t.width))
        self._of_weight = t.take("main products", t.vocab, PRODUCTS, dtype=t.operand).zero_()
        self._of_weight[:, -1] = float(self._sums_rows)
        self.row_products = t.take("row products", t.count, PRODUCTS).zero_()

    def add(
        self, r: Range, c: Range, stats: RowStats, exponentials: Tensor, weight: Tensor
    ) -> None:
        """Add a tile, of row block r and vocabulary block c, right after its fold.

        Its ``rest`` is row_products of the rows. weight: [v, H], which has just been read.
        """
        t, rows, i = self.t, slice(*r), c[0] // self.t.plan.cols
        whole = torch.sub(self._targets[rows], stats.shift).exp_().add_(stats.total)
        # of a row that has seen nothing yet, what is left out of the sums is nothing
        weights = whole.reciprocal_().nan_to_num_(0.0, 0.0, 0.0)
        self._weights[i, rows], self._steps[i, rows] = weights, stats.steps
        if r[0] == 0:
            count, directions = self.directions.shape[1], self.directions.to(weight.dtype)
            torch.mm(weight, directions, out=self._of_weight[slice(*c), :count])
            self.column_sizes[slice(*c)] = torch.linalg.vector_norm(weight, dim=1, dtype=t.acc)
        multiply(self.row_products[rows], exponentials, self._of_weight[slice(*c)], add=True)
        self._sum_columns(r, c, weights / t.gain, exponentials)

    def _sum_columns(self, r: Range, c: Range, weights: Tensor, exponentials: Tensor) -> None:
        t, slab = self.t, self.t.plan.slab
        first, rows = r[0] // slab, r[1] - r[0]
        count = -(-r[1] // slab) - first
        out = self.values[first : first + count, slice(*c)]
        if c[0] == 0:  # rows of the block, slab by slab, and where each slab begins
            starts = torch.arange(first * slab - r[0], rows, slab, device=weights.device)
            self._within = self._by_slabs[slice(*r)] - r[0], starts.clamp_(min=0)
        within, starts = self._within
        weights = weights[within]
        if t.plan.on_cpu and exponentials.is_contiguous():
            # a product with zeros for the rows of other slabs takes four times as long
            out += torch.nn.functional.embedding_bag(
                within, exponentials, starts, mode="sum", per_sample_weights=weights
            )
            return
        which = torch.arange(*r, device=within.device) // slab - first
        of_slabs = t.take("slab weights", count, rows, dtype=exponentials.dtype).zero_()
        of_slabs.view(-1)[which * rows + within] = weights.to(of_slabs.dtype)
        memory = t.take("slab sums", count, exponentials.shape[1], dtype=exponentials.dtype)
        out += torch.mm(of_slabs, exponentials, out=memory)

    def finish(self, stats: RowStats, rescale: Tensor | None) -> None:
        """Bring the sums to complete statistics.

        Args:
            rescale: [N], the factor that sums of this rank's columns still lack; None: nothing.
        """
        t = self.t
        _relative(self.column_sizes, t.take("squared sizes", t.vocab))
        lacking = torch.ones_like(stats.total) if rescale is None else rescale
        factor = row_factor(stats.logprob, stats.total) * lacking
        for start, stop in blocks(0, len(self._steps), max(1, _AT_ONCE // max(1, t.count))):
            some = slice(start, stop)
            complete = self._sum_slabs(factor * power_of_two(self._steps[some] - stats.steps))
            ratio = complete / self._sum_slabs(self._weights[some])
            self._weights[some, : ratio.shape[1]] = ratio.nan_to_num(0.0, 0.0)
        for i, c in enumerate(t.col_blocks()):
            self.values[:, slice(*c)] *= self._weights[i, : len(self.values), None]
        own = t.target_entry(stats.total, stats.target, (0, t.count))
        own = torch.where((t.targets >= 0) & (t.targets < t.vocab), own, 0.0)
        self.row_products *= (lacking / t.gain)[:, None]
        for start, stop in t.row_blocks():
            rows = slice(start, stop)
            of_targets = t.take("tile", stop - start, PRODUCTS)
            of_targets.copy_(self._of_weight[t.targets[rows].clamp(0, t.vocab - 1)])
            self.row_products[rows] -= of_targets.mul_(own[rows, None])
        if self._order is not None:
            for values in (self.row_products, self.row_sizes):
                memory = t.take("tile", *values.shape)
                values.copy_(torch.index_select(values, 0, self._order, out=memory))

    def _sum_slabs(self, values: Tensor) -> Tensor:
        """[tiles, slabs] from [tiles, N]."""
        values = values if self._order is None else values[:, self._order]
        missing, slab = -values.shape[1] % self.t.plan.slab, self.t.plan.slab
        return torch.nn.functional.pad(values, (0, missing)).view(len(values), -1, slab).sum(2)


def main_directions(t: Tiles, count: int) -> Tensor:
    """[H, K], an orthonormal basis that holds most of the weight's rows, by subspace iteration."""
    # in the memory of the tile, as much as there is
    most = max(1, min(_SAMPLE, t.vocab, t.tile_numbers // t.width))
    sample = t.weight[:: t.vocab // most][:most]
    rows = t.take("tile", *sample.shape).copy_(sample)
    basis = torch.zeros(t.width, count, dtype=t.acc, device=rows.device)
    first = rows[:count].T
    basis[:, : first.shape[1]] = first
    for _ in range(_ROUNDS):
        basis = rows.T @ torch.mm(rows, basis, out=t.take("sampled products", len(rows), count))
        if t.shard is not None:  # the same on every rank
            t.shard.add_up(basis)
        # a number that is none would be everywhere afterwards
        basis = torch.linalg.qr(basis.nan_to_num(0.0, 0.0, 0.0)).Q
    return basis


def _relative(sizes: Tensor, memory: Tensor) -> Tensor:
    """Sizes over their root mean square, or 1 where that is less: what is small may matter. In
    place; memory is for as many numbers."""
    mean = torch.square(sizes, out=memory).mean()
    return sizes.div_(mean.sqrt()).nan_to_num_(1.0).clamp_(min=1.0)


def _targets_and_sizes(t: Tiles) -> tuple[Tensor, Tensor]:
    """[N] each: logits of the targets, also of those that another rank has, not to the last bit;
    and the 2-norms of the hidden rows."""
    out, sizes = t.vector(2, t.count)
    safe = t.targets.clamp(0, t.vocab - 1)
    # in the memory of the tile, as much as there is
    most = max(1, t.tile_numbers // t.width)
    for start, stop in blocks(0, t.count, min(FINISHED_ROWS, t.plan.rows, most)):
        rows = slice(start, stop)
        hidden, products = t.hidden_rows(start, stop), t.take("tile", stop - start, t.width)
        torch.linalg.vector_norm(hidden, dim=1, dtype=t.acc, out=sizes[rows])
        torch.sum(products.copy_(t.weight[safe[rows]]).mul_(hidden), 1, out=out[rows])
    if t.bias is not None:
        out += t.bias[safe]
    LogitMap(None, t.call.softcap, t.call.scale).apply(out[:, None])
    out.masked_fill_(t.targets != safe, 0.0)
    if t.shard is not None:
        t.shard.add_up(out)
    return out, sizes
