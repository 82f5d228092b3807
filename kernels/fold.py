"""logit_tile.fold as a kernel: a tile of logits into running row statistics.

It reads a tile once: 4 bytes a logit for fp32 products, and writes 2 if exponentials are wanted in
half precision.

What is read and written again, and why no two warps meet: the row's peak and shift, which all warps
read before the barrier of the row's maximum, and one thread writes behind it; steps, total,
weighted, squares and plain, of which only what the writing thread itself has read is written; a
number of rest, or of x where it is out, by the thread that read it. The target's own product is
read before that barrier, too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.device_math import two_to_the
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.logit_map_triton import head_arguments, logits, slope
from fusedpo.kernels.row_stats import RowStats
from fusedpo.kernels.tiles import on_device_of, whole_row_tile


@triton.jit
def _others(z, columns, inside, y):
    """Logits with the target's, and what lies beyond the tile, taken out."""
    return tl.where(inside & (columns != y), z, float("-inf"))


@triton.jit
def _next_shift(before, old_shift, highest):
    """(peak, shift, steps, rescale): the shift after a tile whose largest logit is ``highest``.

    The first peak there was, and above that whole multiples of log 2; ``rescale`` brings to it what
    is relative to the old one.
    """
    peak = tl.maximum(before, highest)
    rise = tl.maximum(tl.ceil((peak - old_shift) * 1.4426950408889634), 0.0)
    # nothing is left of the past, or there is none
    anew = (before == float("-inf")) | (rise > 126.0)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    shift = tl.where(anew, finite, old_shift + rise * 0.6931471805599453)
    rescale = tl.where(anew, 0.0, two_to_the(-rise))
    return peak, shift, tl.where(anew, 252.0, rise), rescale, anew


@triton.jit
def _rescale(rest_ptr, rescale, hidden, BLOCK: tl.constexpr):
    """Bring a row of sums to a new shift. Most rows' shifts stay: their sums are not touched."""
    if rescale != 1.0:
        for begin in range(0, hidden, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < hidden
            part = tl.load(rest_ptr + columns, mask=inside, other=0.0)
            tl.store(rest_ptr + columns, part * rescale, mask=inside)


@triton.jit
def fold_kernel(
    x_ptr,
    out_ptr,
    rest_ptr,
    bias_ptr,
    scale_ptr,
    target_ptr,
    peak_ptr,
    shift_ptr,
    steps_ptr,
    total_ptr,
    own_ptr,
    weighted_ptr,
    squares_ptr,
    plain_ptr,
    x_stride,
    out_stride,
    rest_stride,
    start,
    width,
    hidden,
    softcap,
    scale,
    gain,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
    PLAIN: tl.constexpr,
    OUT: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row, which BLOCK holds and which is read once."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    y = tl.load(target_ptr + row) - start
    if ROW_SCALE:
        scale = tl.load(scale_ptr + row)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width

    # the target's own logit: one number more to read, rather than a search among all
    here = (y >= 0) & (y < width)
    own = tl.load(x_ptr + y, mask=here, other=0.0).to(tl.float32)

    x = tl.load(x_ptr + lanes, mask=inside, other=0.0).to(tl.float32)
    z = logits(x, bias_ptr, lanes, inside, softcap, scale, BIAS, SOFTCAP)
    if PLAIN:
        plain = tl.sum(tl.where(inside, z, 0.0), 0)
    z = _others(z, lanes, inside, y)
    # before the barrier of the maximum: behind it, one warp writes what all have read by then
    before = tl.load(peak_ptr + row)
    old_shift = tl.load(shift_ptr + row)
    highest = tl.max(z, 0)
    # not earlier: pointers may alias, so a store keeps the row's loads behind it
    own = logits(own, bias_ptr, y, here, softcap, scale, BIAS, SOFTCAP)
    tl.store(own_ptr + row, own, mask=here)
    if PLAIN:
        tl.store(plain_ptr + row, tl.load(plain_ptr + row) + plain)

    peak, shift, steps, rescale, anew = _next_shift(before, old_shift, highest)
    # at once, so that it takes no register while the row does
    tl.store(steps_ptr + row, tl.load(steps_ptr + row) + steps)
    tl.store(peak_ptr + row, peak)
    tl.store(shift_ptr + row, shift)

    limit = softcap * scale
    d = z - shift
    e = tl.exp(d)
    added = tl.sum(e, 0)
    if WEIGHTED:
        added_weighted = tl.sum(e * tl.maximum(d, -1e4), 0)
    if SQUARES:
        added_squares = tl.sum(e * e, 0)
    if OUT:
        if SOFTCAP:
            # from z again; at the target and beyond the tile, where it is -inf, e is 0
            e *= slope(tl.maximum(d, -1e4) + shift, limit)
        tl.store(out_ptr + lanes, (e * gain).to(out_ptr.dtype.element_ty), mask=inside)

    total = tl.load(total_ptr + row)
    if WEIGHTED:
        moved = tl.where(anew, 0.0, (old_shift - shift) * total)
        weighted = tl.load(weighted_ptr + row)
        tl.store(weighted_ptr + row, rescale * (weighted + moved) + added_weighted)
    if SQUARES:
        squares = tl.load(squares_ptr + row)
        tl.store(squares_ptr + row, rescale * rescale * squares + added_squares)
    tl.store(total_ptr + row, rescale * total + added)
    if REST:
        _rescale(rest_ptr + row * rest_stride, rescale, hidden, BLOCK)


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
    """Fold one tile into ``stats``, in place: logit_tile.fold for fp32 or half-precision products.

    x is overwritten only if it is ``out``.
    """
    n, width = x.shape
    if n == 0:
        return
    tile = whole_row_tile(width)
    with on_device_of(x):
        fold_kernel[(n,)](
            x_ptr=x,
            out_ptr=x if out is None else out,
            rest_ptr=x if rest is None else rest,
            target_ptr=target,
            peak_ptr=stats.peak,
            shift_ptr=stats.shift,
            steps_ptr=stats.steps,
            total_ptr=stats.total,
            own_ptr=stats.target,
            weighted_ptr=stats.peak if stats.weighted is None else stats.weighted,
            squares_ptr=stats.peak if stats.squares is None else stats.squares,
            plain_ptr=stats.peak if stats.plain is None else stats.plain,
            x_stride=x.stride(0),
            out_stride=x.stride(0) if out is None else out.stride(0),
            rest_stride=0 if rest is None else rest.stride(0),
            start=start,
            width=width,
            hidden=0 if rest is None else rest.shape[1],
            gain=gain,
            **head_arguments(head, x),
            WEIGHTED=stats.weighted is not None,
            SQUARES=stats.squares is not None,
            PLAIN=stats.plain is not None,
            OUT=out is not None,
            REST=rest is not None,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
