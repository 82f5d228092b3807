"""The gradient with respect to the hidden states, and the forward pass that leaves it unscaled.

dlogp/dhidden of a token is J W times a factor that is known with the token's statistics. It is
formed in the forward, tile by tile, by the rescaling that online softmax uses; the backward scales
its rows by the upstream gradient, one number a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpo.engine.column_sums import ColumnSums
from fusedpo.engine.cost import FINISHED_ROWS
from fusedpo.engine.precision import multiply
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Range, Tiles, row_factor
from fusedpo.kernels.row_stats import RowStats


def new_output(t: Tiles) -> Tensor:
    """Memory [P, H] for the gradient, in hidden's dtype; 0 at positions that are not scored."""
    shape = (t.hidden.shape[:-1].numel(), t.width)
    make = torch.empty if t.rows.positions is None else torch.zeros
    return make(shape, dtype=t.hidden.dtype, device=t.hidden.device)


def waits_in_output(t: Tiles) -> bool:
    """Whether dlogp/dhidden waits for the backward in the memory of the hidden gradient."""
    return t.hidden.dtype == t.acc or not t.plan.wide


def new_unscaled(t: Tiles) -> Tensor:
    """Memory for dlogp/dhidden: [P, H] in hidden's dtype, or [N, H] in full precision."""
    if waits_in_output(t):
        return new_output(t)
    return t.take("held hidden gradient", t.count, t.width)


def write_rows(t: Tiles, out: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Write values [n, H] to their positions in out [P, H]."""
    positions = t.rows.positions
    if positions is None:
        out[start:stop] = values
    else:
        out[positions[start:stop]] = values.to(out.dtype)


def restore_order(t: Tiles, out: Tensor, order: Tensor | None) -> None:
    """Bring out [N, H], whose row i is the gradient of row order[i], to the rows' own order."""
    if order is None:
        return
    # in the memory of the tile, some columns at a time
    width = max(1, t.tile_numbers // t.count)
    for start, stop in blocks(0, t.width, width):
        part = t.take("tile", t.count, stop - start).copy_(out[:, start:stop])
        out[:, start:stop].index_copy_(0, order, part)


def write_unscaled(t: Tiles, unscaled: Tensor, r: Range, values: Tensor) -> None:
    """Write rows [n, H] of dlogp/dhidden to where they wait."""
    if waits_in_output(t):
        write_rows(t, unscaled, *r, values)
    else:
        unscaled[slice(*r)] = values


def scale(t: Tiles, unscaled: Tensor, g: Tensor) -> Tensor:
    """The hidden gradient [P, H]: dlogp/dhidden times g [N], in place if it waits in the output."""
    if waits_in_output(t):
        factor = t.rows.scatter(g).reshape(-1)[:, None]
        # in blocks: a half-precision tensor times fp32 is widened whole
        for start, stop in blocks(0, unscaled.shape[0], t.plan.rows):
            part = unscaled[start:stop]
            part.copy_(part * factor[start:stop])
        return unscaled
    out = new_output(t)
    for r in t.row_blocks():
        write_rows(t, out, *r, unscaled[slice(*r)] * g[slice(*r), None])
    return out


# over the slices of a vocabulary


def new_partial(t: Tiles, output: Tensor | None) -> Tensor | None:
    """Memory [N, H] in full precision for this slice's part of a gradient: ``output``, if it is
    that; None without slices, whose parts have to be added up."""
    if output is None or t.shard is None:
        return None
    has_every_row = t.rows.positions is None or not waits_in_output(t)
    if has_every_row and output.dtype == t.acc:
        return output
    return t.take("partial hidden gradient", t.count, t.width)


def add_slices(t: Tiles, partial: Tensor | None, output: Tensor | None) -> None:
    """Write the sum of all slices' parts to the output."""
    if partial is None or output is None or t.shard is None:
        return
    t.shard.add_up(partial)
    if partial is not output:
        write_rows(t, output, 0, t.count, partial)


# the forward pass


def forward_pass(
    t: Tiles, unscaled: Tensor | None, sums: ColumnSums | None = None
) -> dict[str, Tensor]:
    """Statistics of all rows; dlogp/dhidden into ``unscaled``, column sums into ``sums``, if they
    are given."""
    all_stats = t.start_stats()
    partial = new_partial(t, unscaled)
    fold_rows(t, unscaled, partial, all_stats, (0, t.count), sums)
    add_slices(t, partial, unscaled)
    return t.finish_stats(all_stats)


def fold_rows(
    t: Tiles,
    unscaled: Tensor | None,
    partial: Tensor | None,
    all_stats: RowStats,
    rows: Range,
    sums: ColumnSums | None = None,
) -> None:
    """Statistics of these rows, merged; their dlogp/dhidden into ``unscaled``, if that is given, or
    this slice's part of it into ``partial``; their column sums into ``sums``."""
    exponentials = unscaled is not None or sums is not None
    buffer, narrow = t.tile(), t.narrow_tile() if exponentials else None
    for r in t.row_blocks(*rows):
        hidden, n = t.hidden_rows(*r), r[1] - r[0]
        stats = all_stats.of(slice(*r))
        # sum over non-target entries of exp(z - shift) slope W, relative to the shift so far
        products = None
        if partial is not None:
            products = partial[slice(*r)].zero_()
        elif unscaled is not None:
            products = t.take("row products", n, t.width).zero_()
        # never both
        rest = products if sums is None else sums.row_products[slice(*r)]
        for c in t.col_blocks():
            x, weight = buffer[:n, : c[1] - c[0]], t.weight_rows(*c)
            e = None
            if exponentials:
                e = x if narrow is None else narrow[:n, : c[1] - c[0]]
            t.fold(x, hidden, weight, r, c, stats, exponentials=e, rest=rest)
            if products is not None and e is not None:
                multiply(products, e, weight, add=True)
            if sums is not None and e is not None:
                sums.add(r, c, stats, e, weight)
        if unscaled is not None and products is not None and partial is None:
            _finish(t, unscaled, products, stats, r)
    # rows of a slice have to wait for the statistics of the whole vocabulary
    rescale = t.merge(all_stats.of(slice(*rows)))
    if sums is not None:
        sums.finish(all_stats, rescale)
    if partial is not None and rescale is not None:
        for r in t.row_blocks(*rows):
            of_rows = rescale[r[0] - rows[0] : r[1] - rows[0]]
            _finish_partial(t, partial[slice(*r)], all_stats.of(slice(*r)), r, of_rows)


def multiply_rows(
    t: Tiles, unscaled: Tensor, partial: Tensor | None, jacobian: Tensor, factor: Tensor, b: Range
) -> None:
    """dlogp/dhidden of rows b from their J [n, V], which lacks ``factor`` [n], into ``unscaled``;
    or this slice's part of it into ``partial``."""
    for r in t.row_blocks(*b):
        within = slice(r[0] - b[0], r[1] - b[0])
        products = t.jacobian_products(jacobian[within])
        products.mul_(t.scaled(-factor[within], *r)[:, None])
        if partial is not None:
            partial[slice(*r)] = products
        else:
            write_unscaled(t, unscaled, r, products)


def _finish(t: Tiles, unscaled: Tensor, products: Tensor, stats: RowStats, r: Range) -> None:
    """Write dlogp/dhidden of a row block, from its sum over non-target entries."""
    positions = t.rows.positions if waits_in_output(t) else None
    if positions is None:
        unscaled = unscaled[slice(*r)]
    else:
        positions = positions[slice(*r)]
    factor = row_factor(stats.logprob, stats.total)
    t.kernels.finish(
        products,
        t.scaled(-factor / t.gain, *r),
        t.weight,
        t.targets[slice(*r)],
        t.scaled(factor * t.target_entry(stats.total, stats.target, r), *r),
        unscaled,
        positions,
        block=FINISHED_ROWS,
    )


def _finish_partial(t: Tiles, products: Tensor, stats: RowStats, r: Range, rescale: Tensor) -> None:
    """Likewise this slice's part of it, in place."""
    factor, targets = row_factor(stats.logprob, stats.total), t.targets[slice(*r)]
    here = (targets >= 0) & (targets < t.vocab)
    entry = factor * t.target_entry(stats.total, stats.target, r)
    t.kernels.finish(
        products,
        t.scaled(-factor * rescale / t.gain, *r),
        t.weight,
        targets.clamp(0, t.vocab - 1),
        t.scaled(torch.where(here, entry, 0.0), *r),
        products,
        None,
        block=FINISHED_ROWS,
    )
