"""Whole rows of J, for the routes that keep them: exponentials first, then J in place.

Of a vocabulary in slices, exponentials are stored before the statistics of all slices are known.
They are then still to be brought to the common shift: by a power of two, and the rest of the factor
goes to the row's other numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedpo.engine.cost import row_stride
from fusedpo.engine.tiles import Range, Tiles
from fusedpo.kernels.row_stats import MOST_STEPS, RowStats, power_of_two


def new_rows(t: Tiles, name: str, rows: int) -> Tensor:
    """Memory for rows of J [rows, V] in a declared buffer, in the operands' dtype."""
    stride = row_stride(t.vocab, on_cpu=t.plan.on_cpu)
    return t.take(name, rows, stride, dtype=t.operand)[:, : t.vocab]


def rows_of_jacobian(
    t: Tiles,
    out: Tensor,
    b: Range,
    hidden_rows: Callable[[int, int], Tensor],
    all_stats: RowStats,
) -> Tensor | float:
    """Write J of rows b, over a residual, into out; their merged statistics into all_stats.

    Returns:
        The residual, 1 or [n] in [1, 2).
    """
    tile = None if t.operand == t.acc else t.tile()
    # of a row block that is rescaled at once, or of all rows, which wait for the other slices
    all_steps = None if t.shard is None else _new_steps(t, b[1] - b[0])
    for r in t.row_blocks(*b):
        within, stats = slice(r[0] - b[0], r[1] - b[0]), all_stats.of(slice(*r))
        steps = _new_steps(t, r[1] - r[0]) if all_steps is None else all_steps[:, within]
        _exponentials(t, out[within], tile, hidden_rows(*r), r, stats, steps)
        if all_steps is None:
            _settle(t, out[within], r, stats.target, stats.total, steps, stats.steps)
    stats = all_stats.of(slice(*b))
    residual, last = _residual(t, stats, t.merge(stats))
    if all_steps is not None:
        total = stats.total / residual
        for r in t.row_blocks(*b):
            within = slice(r[0] - b[0], r[1] - b[0])
            _settle(
                t,
                out[within],
                r,
                stats.target[within],
                total[within],
                all_steps[:, within],
                last[within],
            )
    return residual


def _new_steps(t: Tiles, rows: int) -> Tensor:
    """Memory [tiles, rows] for the shifts of each tile's exponentials, in steps of log 2."""
    shape = -(-t.vocab // t.plan.cols), rows
    return t.vector(*shape) if t.shard is None else t.take("waiting steps", *shape)


def _exponentials(
    t: Tiles,
    out: Tensor,
    tile: Tensor | None,
    hidden: Tensor,
    r: Range,
    stats: RowStats,
    steps: Tensor,
) -> None:
    """Write the exponentials of a row block, all of its vocabulary, into out [n, V].

    Their statistics go into stats, and each tile's distance from the first shift into steps
    [tiles, n].
    """
    for i, c in enumerate(t.col_blocks()):
        e = out[:, slice(*c)]
        x = e if tile is None else tile[: r[1] - r[0], : c[1] - c[0]]
        t.fold(x, hidden, t.weight_rows(*c), r, c, stats, exponentials=e)
        steps[i] = stats.steps


def _residual(t: Tiles, stats: RowStats, rescale: Tensor | None) -> tuple[Tensor | float, Tensor]:
    """(residual, steps), [n] each: J equals softmax statistics at the merged shift, divided by
    ``residual`` in [1, 2), where its exponentials have been brought to ``steps``.

    J's shift is whole steps from where the slice's exponentials are, so that bringing them there is
    exact.
    """
    if rescale is None:
        return 1.0, stats.steps
    half, exponent = torch.frexp(rescale)
    # 0: nothing here, or nothing that counts beside the others
    none = rescale == 0
    down = (1 - exponent).to(t.acc).masked_fill(none, 2.0 * MOST_STEPS)
    return (2 * half).masked_fill(none, 1.0), stats.steps + down


def _settle(
    t: Tiles,
    out: Tensor,
    r: Range,
    target: Tensor,
    total: Tensor,
    steps: Tensor,
    last: Tensor,
) -> None:
    """Turn rows of exponentials into J, in place.

    Args:
        out: [n, V].
        target, total: [n], the targets' logits and the sum of J's other entries.
        steps: [tiles, n], the shifts of each tile's exponentials.
        last: [n], the shifts of J's.
    """
    narrow = t.row_gain(total)
    # powers of two
    factors = power_of_two(steps - last) * (narrow / t.gain)
    entry = -t.target_entry(total, target, r) * narrow
    t.kernels.settle(out, t.targets[slice(*r)], entry, factors, t.plan.cols)
