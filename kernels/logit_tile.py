"""What is done to one tile of logits: fold it into running row statistics, or turn it into a
Jacobian.

Letters: n rows of a tile, v vocabulary columns of a tile, y the target column of a row, z logits.

A tile comes as the bare product hidden weight^T, [n, v], in fp32 (fp64 for fp64 inputs);
``LogitMap`` turns it into logits. Two things are ever done to it.

*Fold.* The row statistics (``RowStats``) are kept over all entries **but the target's**:

    shift ~ max_{j != y} z_j         total = sum_{j != y} exp(z_j - shift)

so that the log-probability of the target is

    logp = z_y - logsumexp(z) = logsigmoid(z_y - shift - log(total))

which has no cancellation: for a confident token, z_y and logsumexp(z) agree in all their digits and
their difference would be rounding noise, while the log-sigmoid of a large number is exact.

The shift of a row is the peak of the first tile that had one, and rises from there by whole
multiples of log 2. So what has been summed or stored relative to an earlier shift is brought to a
later one by a power of two, which is exact in every dtype: exponentials can be kept in half
precision before the last tile is known, with one rounding. A rise by more than 2^126 leaves nothing
of the past, and the row starts anew from its peak.

*Jacobian.* With the statistics known, the tile becomes J, the negated derivative of logp with
respect to z, but for one factor a row:

    softmax(z) - onehot(y) = (1 - p) / total * J
    J_j = exp(z_j - shift) for j != y,   J_y = -total

The factor is formed from expm1(logp), again without cancellation. The entries of a row of J cancel
as exactly as they were summed, however large the logits, which a softmax from a rounded logsumexp
does not achieve. A gradient through the entropy too makes J_j = exp(z_j - shift) (a + b (z_j -
shift)) with two numbers a row, so one shape serves both.

The functions here are the definition, in PyTorch; logit_tile_triton has kernels of the same names
and arguments, which are held to them. TileOperations has their types.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.row_stats import LOWEST, MOST_STEPS, RowStats, power_of_two

_LOG_2 = math.log(2.0)

# Whether a Jacobian comes with its row's factor multiplied in. Here that would be one more pass
# over the tile, where scaling the hidden rows instead is one over [n, H].
ABSORBS_FACTORS = False


def _locate(target: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each row's target inside the tile, clamped into it [n, 1], and whether it is inside
    [n, 1].

    Without a data-dependent shape, so that nothing waits for the device.
    """
    local = target[:, None] - start
    clamped = local.clamp(0, columns - 1)
    return clamped, clamped == local


def fold(
    x: Tensor,
    head: LogitMap,
    target: Tensor,
    start: int,
    stats: RowStats,
    *,
    out: Tensor | None = None,
    gain: float = 1.0,
    rest: Tensor | None = None,
) -> None:
    """Fold one tile into ``stats``.

    Args:
        x: [n, v] products of vocabulary entries start .. start + v; overwritten.
        head: what makes logits of them.
        target: [n] int64, the target's index in the whole vocabulary; it need not be in it.
        start: first vocabulary entry of the tile.
        stats: running statistics of these rows; updated.
        out: [n, v] of any floating dtype, may be x: exp(z - shift) times softcap's slope, 0 at the
            targets; what the tile contributes to a product with the weight.
        gain: a power of two that multiplies ``out``, to keep it in the range of its dtype.
        rest: [n, H], sums relative to the shift so far; brought to the new shift, in place.
    """
    z = head.apply(x)
    slope = None if out is None else head.slope(z)
    local, inside = _locate(target, start, z.shape[1])
    at_target = z.gather(1, local)
    if stats.plain is not None:
        stats.plain += z.sum(1)
    of_rows = stats.target[:, None]
    torch.where(inside, at_target, of_rows, out=of_rows)
    z.scatter_(1, local, at_target.masked_fill_(inside, -torch.inf))

    unseen = stats.peak == -torch.inf
    torch.maximum(stats.peak, z.amax(1), out=stats.peak)
    rise = (stats.peak - stats.shift).div_(_LOG_2).ceil_().clamp_(min=0.0)
    anew = unseen | (rise > MOST_STEPS)
    before = stats.shift.clone()
    peak = stats.peak.masked_fill(stats.peak == -torch.inf, 0.0)
    torch.where(anew, peak, before + rise * _LOG_2, out=stats.shift)
    rescale = power_of_two(-rise).masked_fill_(anew, 0.0)
    # beyond the range of power_of_two: what is left of the past is 0
    stats.steps.add_(rise.masked_fill_(anew, 2.0 * MOST_STEPS))

    e = z.sub_(stats.shift[:, None])
    if stats.weighted is not None:
        moved = ((before - stats.shift) * stats.total).masked_fill(anew, 0.0)
        exponent = e.clamp(min=LOWEST)
        e.exp_()
        stats.weighted.add_(moved).mul_(rescale).add_(exponent.mul_(e).sum(1))
    else:
        e.exp_()
    stats.total.mul_(rescale).add_(e.sum(1))
    if stats.squares is not None:
        stats.squares.mul_(rescale.square()).add_(torch.einsum("nv,nv->n", e, e))
    if rest is not None:
        rest.mul_(rescale[:, None])
    if out is None:
        return
    if slope is not None:
        e.mul_(slope)
    if gain != 1.0:
        e.mul_(gain)
    if out is not e:
        out.copy_(e)


def settle(
    block: Tensor,
    target: Tensor,
    own: Tensor,
    factors: Tensor,
    columns: int,
) -> None:
    """Finish rows of J whose exponentials were taken relative to the shifts so far, in place.

    Args:
        block: [n, V], what ``fold`` left in ``out``, tile beside tile.
        target: [n] int64; one outside of the block's columns is left alone.
        own: [n], the entry at the target.
        factors: [tiles, n], powers of two.
        columns: columns of each tile but the last.
    """
    for i, factor in enumerate(factors):
        block[:, i * columns : (i + 1) * columns].mul_(factor[:, None].to(block.dtype))
    local, inside = _locate(target, 0, block.shape[1])
    entry = torch.where(inside, own[:, None].to(block.dtype), block.gather(1, local))
    block.scatter_(1, local, entry)


def jacobian(
    x: Tensor,
    head: LogitMap,
    target: Tensor,
    start: int,
    shift: Tensor,
    own: Tensor,
    *,
    factor: Tensor | None = None,
    tilt: Tensor | None = None,
    out: Tensor,
) -> None:
    """Turn a tile of products into a tile of J, times softcap's slope.

    J_j = exp(z_j - shift) (factor + tilt (z_j - shift)), and ``own`` at the target.

    Args:
        x: [n, v] products; overwritten.
        head, target, start: as in ``fold``.
        shift: [n], over the whole vocabulary.
        own: [n], the entry at the target, but for softcap's slope.
        factor: [n], or None for 1.
        tilt: [n], or None for 0; needs a factor.
        out: [n, v] of any floating dtype, may be x.
    """
    z = head.apply(x)
    slope = head.slope(z)
    local, inside = _locate(target, start, z.shape[1])
    z.sub_(shift[:, None])
    if factor is None:
        z.exp_()
    elif tilt is None:
        z.exp_().mul_(factor[:, None])
    else:
        z.clamp_(min=LOWEST)
        weight = (z * tilt[:, None]).add_(factor[:, None])
        z.exp_().mul_(weight)
    z.scatter_(1, local, torch.where(inside, own[:, None], z.gather(1, local)))
    if slope is not None:
        z.mul_(slope)
    if out is not z:
        out.copy_(z)


def finish(
    rest: Tensor,
    rest_factor: Tensor,
    weight: Tensor,
    target: Tensor,
    target_factor: Tensor,
    out: Tensor,
    positions: Tensor | None,
    *,
    block: int,
) -> None:
    """out_i = rest_factor_i rest_i + target_factor_i W_{y_i}: dlogp/dhidden of finished rows.

    Args:
        rest: [n, H]; overwritten.
        rest_factor, target_factor: [n].
        weight: [V, H] of any floating dtype.
        target: [n] int64.
        out: [n, H], or [P, H] with ``positions``; of any floating dtype.
        positions: [n] int64, the rows of out, or None.
        block: rows that are finished at a time.
    """
    for start in range(0, rest.shape[0], block):
        rows = slice(start, start + block)
        done = rest[rows].mul_(rest_factor[rows, None])
        done.addcmul_(weight[target[rows]].to(rest.dtype), target_factor[rows, None])
        if positions is None:
            out[rows] = done
        else:
            out[positions[rows]] = done.to(out.dtype)
