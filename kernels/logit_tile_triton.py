"""The functions of logit_tile as Triton kernels: same names, same arguments, held to them by tests.

Letters: n rows of a tile, v vocabulary columns of a tile, z logits.

Each kernel reads a tile once. Bytes per logit, for fp32 products and half-precision operands:

    fold        4 read, and 2 written if the exponentials are wanted
    settle      2 read and 2 written, only where a row's shift has risen since
    jacobian    4 read, 2 written

and, per number of a hidden row, ``finish``: 4 and 2 read, 2 or 4 written.

Arithmetic is in fp32. A row belongs to one program, so nothing is added atomically and results
repeat bit for bit. Offsets are 64 bits wide.

Triton puts no barrier between what a program's warps load from global memory and what they store
there. What is read and written again, and why no two threads meet:

    fold        its row's peak and shift, which all warps read before the barrier of the row's
                maximum, and one thread writes behind it; steps, total, weighted, squares and plain,
                of which only what the writing thread itself has read is written; a number of rest,
                or of x where it is out, by the thread that read it; the target's own product is
                read before that barrier, too
    settle      a number of the block by the thread that read it; the target's entry alone where
                nothing else is touched. Tiles of a row, programs of their own, share no column
    jacobian    a number of x where it is out, by the thread that read it
    finish      nothing

That scalars are, ``machine_code`` reads from the compiled kernels (races.py).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.device_math import tanh, two_to_the
from fusedpo.kernels.logit_tile import LogitMap, RowStats
from fusedpo.kernels.tiles import jacobian_tile, on_device_of, row_tile

# A factor a row costs nothing here: the tile is in registers.
ABSORBS_FACTORS = True


@triton.jit
def _logits(
    x,
    bias_ptr,
    columns,
    inside,
    softcap,
    scale,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Products [BLOCK] to logits: bias, softcap, scale."""
    if BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x * scale


@triton.jit
def _slope(z, limit):
    """Derivative of softcap at logits z; limit is softcap times scale."""
    ratio = z / limit
    return 1.0 - ratio * ratio


@triton.jit
def _others(z, columns, inside, y):
    """Logits with the target's, and what lies beyond the tile, taken out."""
    return tl.where(inside & (columns != y), z, float("-inf"))


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
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. WHOLE: the row of the tile fits in BLOCK, and is read only once."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    y = tl.load(target_ptr + row) - start
    if ROW_SCALE:
        scale = tl.load(scale_ptr + row)
    lanes = tl.arange(0, BLOCK)

    # the target's own logit: one number more to read, rather than a search among all
    here = (y >= 0) & (y < width)
    own = tl.load(x_ptr + y, mask=here, other=0.0).to(tl.float32)

    # the largest of the others, and the sum of all
    if WHOLE:
        inside = lanes < width
        x = tl.load(x_ptr + lanes, mask=inside, other=0.0).to(tl.float32)
        z = _logits(x, bias_ptr, lanes, inside, softcap, scale, BIAS, SOFTCAP)
        if PLAIN:
            plain = tl.sum(tl.where(inside, z, 0.0), 0)
        z = _others(z, lanes, inside, y)
        # before the barrier of the maximum: behind it, one warp writes what all have read by then
        before = tl.load(peak_ptr + row)
        old_shift = tl.load(shift_ptr + row)
        highest = tl.max(z, 0)
    else:
        plains = tl.zeros([BLOCK], tl.float32)
        peaks = tl.full([BLOCK], float("-inf"), tl.float32)
        for begin in range(0, width, BLOCK):
            columns = begin + lanes
            inside = columns < width
            x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            z = _logits(x, bias_ptr, columns, inside, softcap, scale, BIAS, SOFTCAP)
            if PLAIN:
                plains += tl.where(inside, z, 0.0)
            peaks = tl.maximum(peaks, _others(z, columns, inside, y))
        if PLAIN:
            plain = tl.sum(plains, 0)
        before = tl.load(peak_ptr + row)
        old_shift = tl.load(shift_ptr + row)
        highest = tl.max(peaks, 0)
    # not earlier: pointers may alias, so a store keeps the row's loads behind it
    own = _logits(own, bias_ptr, y, here, softcap, scale, BIAS, SOFTCAP)
    tl.store(own_ptr + row, own, mask=here)
    if PLAIN:
        tl.store(plain_ptr + row, tl.load(plain_ptr + row) + plain)

    # the new shift: the first peak there was, and above that whole multiples of log 2
    peak = tl.maximum(before, highest)
    rise = tl.maximum(tl.ceil((peak - old_shift) * 1.4426950408889634), 0.0)
    # nothing is left of the past, or there is none
    anew = (before == float("-inf")) | (rise > 126.0)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    shift = tl.where(anew, finite, old_shift + rise * 0.6931471805599453)
    rescale = tl.where(anew, 0.0, two_to_the(-rise))
    # at once, so that it takes no register while the row does
    tl.store(steps_ptr + row, tl.load(steps_ptr + row) + tl.where(anew, 252.0, rise))
    tl.store(peak_ptr + row, peak)
    tl.store(shift_ptr + row, shift)

    limit = softcap * scale
    if WHOLE:
        d = z - shift
        e = tl.exp(d)
        added = tl.sum(e, 0)
        if WEIGHTED:
            weighted = tl.sum(e * tl.maximum(d, -1e4), 0)
        if SQUARES:
            squares = tl.sum(e * e, 0)
        if OUT:
            if SOFTCAP:
                # from z again; at the target and beyond the tile, where it is -inf, e is 0
                e *= _slope(tl.maximum(d, -1e4) + shift, limit)
            tl.store(out_ptr + lanes, (e * gain).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        sums = tl.zeros([BLOCK], tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, width, BLOCK):
            columns = begin + lanes
            inside = columns < width
            x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            z = _logits(x, bias_ptr, columns, inside, softcap, scale, BIAS, SOFTCAP)
            d = _others(z, columns, inside, y) - shift
            e = tl.exp(d)
            sums += e
            if WEIGHTED:
                weights += e * tl.maximum(d, -1e4)
            if SQUARES:
                second += e * e
            if OUT:
                if SOFTCAP:
                    e *= _slope(z, limit)
                tl.store(out_ptr + columns, (e * gain).to(out_ptr.dtype.element_ty), mask=inside)
        added = tl.sum(sums, 0)
        if WEIGHTED:
            weighted = tl.sum(weights, 0)
        if SQUARES:
            squares = tl.sum(second, 0)

    total = tl.load(total_ptr + row)
    if WEIGHTED:
        moved = tl.where(anew, 0.0, (old_shift - shift) * total)
        was = tl.load(weighted_ptr + row)
        tl.store(weighted_ptr + row, rescale * (was + moved) + weighted)
    if SQUARES:
        was = tl.load(squares_ptr + row)
        tl.store(squares_ptr + row, rescale * rescale * was + squares)
    tl.store(total_ptr + row, rescale * total + added)
    if REST:
        # most rows' shifts stay: their sums are not touched
        if rescale != 1.0:
            rest_ptr += row * rest_stride
            for begin in range(0, hidden, BLOCK):
                columns = begin + lanes
                inside = columns < hidden
                part = tl.load(rest_ptr + columns, mask=inside, other=0.0)
                tl.store(rest_ptr + columns, part * rescale, mask=inside)


def _of_head(head: LogitMap, x: Tensor) -> dict[str, Any]:
    """A head's part of a launch; x stands in for pointers that nothing is read from."""
    per_row = isinstance(head.scale, Tensor)
    return {
        "bias_ptr": x if head.bias is None else head.bias,
        "scale_ptr": head.scale if per_row else x,
        "softcap": float(head.softcap or 1.0),
        "scale": 1.0 if per_row else float(head.scale),
        "BIAS": head.bias is not None,
        "SOFTCAP": head.softcap is not None,
        "ROW_SCALE": per_row,
    }


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
    tile = row_tile(width)
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
            **_of_head(head, x),
            WEIGHTED=stats.weighted is not None,
            SQUARES=stats.squares is not None,
            PLAIN=stats.plain is not None,
            OUT=out is not None,
            REST=rest is not None,
            WHOLE=width <= tile.block,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )


# the last block of rows may have any number
@triton.jit(do_not_specialize=["rows"])
def settle_kernel(
    block_ptr,
    target_ptr,
    own_ptr,
    factors_ptr,
    stride,
    rows,
    columns,
    vocab,
    BLOCK: tl.constexpr,
):
    """One program a row and tile: its powers of two, and the entry at the target if it is here."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    block_ptr += row * stride
    factor = tl.load(factors_ptr + tile * rows + row)
    y = tl.load(target_ptr + row)
    own = tl.load(own_ptr + row)
    begin = tile * columns
    end = tl.minimum(begin + columns, vocab)
    if factor != 1.0:
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < end
            e = tl.load(block_ptr + at, mask=inside, other=0.0).to(tl.float32)
            e = tl.where(at == y, own, e * factor)
            tl.store(block_ptr + at, e.to(block_ptr.dtype.element_ty), mask=inside)
    else:
        if (y >= begin) & (y < end):
            tl.store(block_ptr + y, own.to(block_ptr.dtype.element_ty))


def settle(
    block: Tensor,
    target: Tensor,
    own: Tensor,
    factors: Tensor,
    columns: int,
) -> None:
    """Finish rows of J whose exponentials are relative to earlier shifts: logit_tile.settle."""
    n, vocab = block.shape
    if n == 0:
        return
    tile = row_tile(columns)
    with on_device_of(block):
        settle_kernel[(n, factors.shape[0])](
            block,
            target,
            own,
            factors.contiguous(),
            block.stride(0),
            n,
            columns,
            vocab,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )


@triton.jit
def jacobian_kernel(
    x_ptr,
    out_ptr,
    bias_ptr,
    scale_ptr,
    target_ptr,
    shift_ptr,
    own_ptr,
    factor_ptr,
    tilt_ptr,
    x_stride,
    out_stride,
    start,
    width,
    softcap,
    scale,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    TILT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    y = tl.load(target_ptr + row) - start
    if ROW_SCALE:
        scale = tl.load(scale_ptr + row)
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z = _logits(x, bias_ptr, columns, inside, softcap, scale, BIAS, SOFTCAP)
    d = z - tl.load(shift_ptr + row)
    j = tl.exp(d)
    if FACTOR:
        factor = tl.load(factor_ptr + row)
        if TILT:
            factor = factor + tl.load(tilt_ptr + row) * tl.maximum(d, -1e4)
        j *= factor
    j = tl.where(columns == y, tl.load(own_ptr + row), j)
    if SOFTCAP:
        j *= _slope(z, softcap * scale)
    tl.store(out_ptr + columns, j.to(out_ptr.dtype.element_ty), mask=inside)


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
    """Turn a tile of products into a tile of J: logit_tile.jacobian.

    x is overwritten only if it is ``out``.
    """
    n, width = x.shape
    if n == 0:
        return
    tile = jacobian_tile(width)
    with on_device_of(x):
        jacobian_kernel[(n, triton.cdiv(width, tile.block))](
            x_ptr=x,
            out_ptr=out,
            target_ptr=target,
            shift_ptr=shift,
            own_ptr=own,
            factor_ptr=own if factor is None else factor,
            tilt_ptr=own if tilt is None else tilt,
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            start=start,
            width=width,
            **_of_head(head, x),
            FACTOR=factor is not None,
            TILT=tilt is not None,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )


@triton.jit
def finish_kernel(
    rest_ptr,
    rest_factor_ptr,
    weight_ptr,
    target_ptr,
    target_factor_ptr,
    out_ptr,
    positions_ptr,
    rest_stride,
    weight_stride,
    weight_column_stride,
    out_stride,
    width,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    y = tl.load(target_ptr + row)
    rest = tl.load(rest_ptr + row * rest_stride + columns, mask=inside, other=0.0)
    entries = weight_ptr + y * weight_stride + columns.to(tl.int64) * weight_column_stride
    own = tl.load(entries, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(rest_factor_ptr + row) * rest + tl.load(target_factor_ptr + row) * own
    to = row
    if GATHERED:
        to = tl.load(positions_ptr + row)
    out = out_ptr + to * out_stride + columns
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


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
    """dlogp/dhidden of finished rows, to their positions: logit_tile.finish. rest is left alone."""
    n, width = rest.shape
    if n == 0:
        return
    tile = jacobian_tile(width)
    with on_device_of(rest):
        finish_kernel[(n, triton.cdiv(width, tile.block))](
            rest,
            rest_factor,
            weight,
            target,
            target_factor,
            out,
            target if positions is None else positions,
            rest.stride(0),
            weight.stride(0),
            weight.stride(1),
            out.stride(0),
            width,
            GATHERED=positions is not None,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
