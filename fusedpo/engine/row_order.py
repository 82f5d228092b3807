"""An order of the rows in which neighbours are alike, so that a slab of them needs few columns.

Hidden states that point the same way give their probability to the same tokens. The rows are split
in halves along their main direction, each half again, until what is left is a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpo.engine.column_sums import PRODUCTS
from fusedpo.engine.cost import Problem
from fusedpo.engine.tiles import Tiles

# numbers that stand for a row, each the sum of a run of features, and power iterations for a main
# direction: a pass over the features, and next to nothing. What the order saves is asked by
# benchmarks/compact_errors.py
_FEATURES, _ITERATIONS = 64, 2


def least_tile(p: Problem, n: int) -> int:
    """Bytes of the tile in whose memory rows are ordered, n at a time: their features, twice; and
    then numbers of all rows."""
    return max(2 * n * min(_FEATURES, p.hidden), p.tokens * PRODUCTS) * p.acc


def alike(t: Tiles, slab: int) -> Tensor | None:
    """[N] int64, the rows in an order in which each slab's are alike; None: as they are.

    Rows stay in their row block of the forward, which begins with a slab: the sums of its slabs are
    made of one tile. The same on all ranks that share a vocabulary.
    """
    rows = min(t.plan.rows, t.count)
    if rows <= slab or (rows < t.count and rows % slab):
        return None
    order = torch.arange(t.count, device=t.hidden.device)
    for start, stop in t.row_blocks():
        features, memory = t.take("tile", 2, stop - start, min(_FEATURES, t.width))
        _features(t.hidden_rows(start, stop), features)
        _split(order[start:stop], features, slab, start, memory)
    return order if t.shard is None else t.shard.of_first(order)


def _split(order: Tensor, features: Tensor, slab: int, first: int, memory: Tensor) -> None:
    """Order rows first .. of features [n, K], in place; memory is like these."""
    ranges = [(0, order.shape[0])]
    while ranges:
        start, stop = ranges.pop()
        slabs = -(-(stop - start) // slab)
        if slabs == 1:
            continue
        own, middle = order[start:stop], start + (slabs + 1) // 2 * slab
        rows = torch.index_select(features, 0, own - first, out=memory[start:stop])
        order[start:stop] = own[_along_main_direction(rows).argsort(stable=True)]
        ranges += [(start, middle), (middle, stop)]


def _features(hidden: Tensor, out: Tensor) -> None:
    """Sums [n, K] of runs of the features of rows [n, H], over their own norm."""
    count = out.shape[1]
    runs = hidden[:, : hidden.shape[1] // count * count].view(len(hidden), count, -1)
    torch.sum(runs, dim=2, dtype=out.dtype, out=out)
    # rows that are no numbers are alike
    out.div_(torch.linalg.vector_norm(out, dim=1, keepdim=True)).nan_to_num_(0.0, 0.0, 0.0)


def _along_main_direction(rows: Tensor) -> Tensor:
    """[n], the places of rows [n, K] along the direction in which they differ most; overwritten."""
    rows -= rows.mean(0)
    direction = rows[torch.linalg.vector_norm(rows, dim=1).argmax()]
    for _ in range(_ITERATIONS):
        direction = (rows @ direction) @ rows
        direction /= torch.linalg.vector_norm(direction).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows @ direction
