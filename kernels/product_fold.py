"""Row statistics of the logits hidden weight^T without the logits in memory.

Letters: n rows, P rows of hidden before selection, H hidden size, V vocabulary entries, z logits,
y the target of a row.

A program keeps BLOCK_N rows and walks the vocabulary tiles of one split of the vocabulary. A tile
of logits exists in registers only, and is folded into running statistics at once. Those are kept
over all entries **but the target's**, so that the log-probability has no cancellation:

    peak = max_{j != y} z_j         total = sum_{j != y} exp(z_j - peak)
    logp = logsigmoid(z_y - peak - log(total))

A second kernel, of product_merge, merges the splits in a fixed order. Nothing is added atomically:
results repeat bit for bit.

A program reads its rows of hidden once a vocabulary tile, and a tile of the weight is read once a
row block. So programs are numbered by groups of row blocks whose hidden rows stay in the L2 cache:
a group walks all splits before the next one starts, and the programs of a split, which read the
same weight tiles at about the same time, are neighbours: the weight is streamed once a group.

Offsets are 64 bits wide; accumulators and statistics are fp32. A program writes its own rows of its
own split of ``part``, and reads none of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.device_math import tanh
from fusedpo.kernels.product_merge import merge, store_slots
from fusedpo.kernels.product_operands import check_operands, descriptor, tma_can_load
from fusedpo.kernels.product_tile import Tile, ceil_div, chip, default_tile
from fusedpo.kernels.tiles import on_device_of


@triton.jit
def _product(
    z,
    hidden,
    weight,
    first_row,
    first_column,
    size,
    WHOLE_K: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA_HIDDEN: tl.constexpr,
    TMA_WEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z plus a tile of hidden weight^T; operands are pointers to a first step, or descriptors."""
    lanes = tl.arange(0, BLOCK_K)
    for k in range(0, size, BLOCK_K):
        if TMA_HIDDEN:
            h = hidden.load([first_row, k])
        elif WHOLE_K:
            h = tl.load(hidden + k)
        else:
            h = tl.load(hidden + k, mask=(k + lanes < size)[None, :], other=0.0)
        if TMA_WEIGHT:
            w = weight.load([first_column, k])
        elif WHOLE_K:
            w = tl.load(weight + k)
        else:
            w = tl.load(weight + k, mask=(k + lanes < size)[None, :], other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        # "ieee": fp32 operands are not rounded to TF32; half precision knows nothing else
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    return z


@triton.jit
def _fold(z, peak, total, weighted, squares, WEIGHTED: tl.constexpr, SQUARES: tl.constexpr):
    """(peak, total, weighted, squares) with a tile of logits added, the target's left out."""
    new_peak = tl.maximum(peak, tl.max(z, 1))
    # relative to 0 as long as all entries are -inf: -inf - -inf would be NaN
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    rescale = tl.exp(peak - shift)
    d = z - shift[:, None]
    e = tl.exp(d)
    if WEIGHTED:
        moved = tl.where(total > 0, (peak - shift) * total, 0.0)
        # exp(-1e30) is 0 and 0 * -1e30 is 0, where exp(-inf) * -inf would be NaN
        weighted = rescale * (weighted + moved) + tl.sum(e * tl.maximum(d, -1e30), 1)
    total = rescale * total + tl.sum(e, 1)
    if SQUARES:
        squares = rescale * rescale * squares + tl.sum(e * e, 1)
    return new_peak, total, weighted, squares


# what varies from call to call is no reason to compile again
@triton.jit(
    do_not_specialize=[
        "part_slot_stride",
        "part_split_stride",
        "rows",
        "splits",
        "tiles_per_split",
        "group",
    ]
)
def product_fold_kernel(
    hidden,
    weight,
    bias_ptr,
    scale_ptr,
    target_ptr,
    positions_ptr,
    part_ptr,
    hidden_stride,
    weight_stride,
    bias_stride,
    scale_stride,
    target_stride,
    positions_stride,
    part_slot_stride,
    part_split_stride,
    rows,
    vocab,
    size,
    splits,
    tiles_per_split,
    group,
    softcap,
    scale,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    POSITIONS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
    PLAIN: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA_HIDDEN: tl.constexpr,
    TMA_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a row block and split; writes part[slot, split, row], fp32.

    ``hidden`` and ``weight`` are pointers, or tensor descriptors where TMA_* says so. WHOLE_K: H is
    a multiple of BLOCK_K, so that no load needs a mask along it. WIDEN: multiply in fp32.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows, BLOCK_N)
    first_block = pid // (group * splits) * group
    group_blocks = tl.minimum(blocks - first_block, group)
    local = pid % (group * splits)
    block = first_block + local % group_blocks
    split = local // group_blocks

    # rows and columns beyond the last repeat it, which no load has to be masked for; such rows are
    # not written, and such columns are taken out of the logits
    first_row = block * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    row_inside = row < rows
    safe_row = tl.minimum(row, rows - 1).to(tl.int64)
    y = tl.load(target_ptr + safe_row * target_stride).to(tl.int32)
    if ROW_SCALE:
        row_scale = tl.load(scale_ptr + safe_row * scale_stride).to(tl.float32)
    lanes = tl.arange(0, BLOCK_K)
    hidden_tile = hidden
    if not TMA_HIDDEN:
        at = safe_row
        if POSITIONS:
            at = tl.load(positions_ptr + safe_row * positions_stride)
        hidden_tile = hidden + at[:, None] * hidden_stride + lanes[None, :]

    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    own = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    plain = tl.zeros([BLOCK_N], tl.float32)

    tiles = tl.cdiv(vocab, BLOCK_V)
    first = tl.minimum(split * tiles_per_split, tiles)
    last = tl.minimum(first + tiles_per_split, tiles)
    for tile in range(first, last):
        begin = tile * BLOCK_V
        column = begin + tl.arange(0, BLOCK_V)
        column_inside = column < vocab
        safe_column = tl.minimum(column, vocab - 1).to(tl.int64)
        weight_tile = weight
        if not TMA_WEIGHT:
            weight_tile = weight + safe_column[:, None] * weight_stride + lanes[None, :]

        z = _product(
            tl.zeros([BLOCK_N, BLOCK_V], tl.float32),
            hidden_tile,
            weight_tile,
            first_row,
            begin,
            size,
            WHOLE_K,
            WIDEN,
            TMA_HIDDEN,
            TMA_WEIGHT,
            BLOCK_K,
        )
        if BIAS:
            z += tl.load(bias_ptr + safe_column * bias_stride).to(tl.float32)[None, :]
        if SOFTCAP:
            z = softcap * tanh(z / softcap)
        if ROW_SCALE:
            z *= row_scale[:, None]
        else:
            z *= scale

        if PLAIN:
            plain += tl.sum(tl.where(column_inside[None, :], z, 0.0), 1)
        # most tiles hold no row's target, and only the last one sticks out
        if tl.max(((y >= begin) & (y < begin + BLOCK_V)).to(tl.int32), 0) > 0:
            is_target = column[None, :] == y[:, None]
            own += tl.sum(tl.where(is_target, z, 0.0), 1)
            z = tl.where(is_target, float("-inf"), z)
        if begin + BLOCK_V > vocab:
            z = tl.where(column_inside[None, :], z, float("-inf"))

        peak, total, weighted, squares = _fold(z, peak, total, weighted, squares, WEIGHTED, SQUARES)

    # the target's logit is 0 where the target is in another split: merging takes the right one
    out = part_ptr + split.to(tl.int64) * part_split_stride + row
    store_slots(
        out,
        peak,
        total,
        own,
        weighted,
        squares,
        plain,
        part_slot_stride,
        row_inside,
        WEIGHTED,
        SQUARES,
        PLAIN,
    )


# the interpreter multiplies the bits of bf16 as integers
_INTERPRETED = not isinstance(product_fold_kernel, triton.JITFunction)


def product_fold(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | Tensor = 1.0,
    entropy: bool = False,
    squares: bool = False,
    mean: bool = False,
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    """Row statistics of z = scale * softcap * tanh((hidden weight^T + bias) / softcap).

    Args:
        hidden: [P, H] fp32, bf16 or fp16; any row stride, entries of a row side by side.
        weight: [V, H], likewise, of the same dtype.
        target: [n] int64, from 0 to V - 1; elsewhere for a row whose target is not among these
            entries, whose "target" is then without meaning.
        positions: [n] int64, the row of hidden for each row; None: all P, in order.
        bias: [V] of any floating dtype, or None.
        softcap: a number, or None for none.
        scale: a number, or [n].
        entropy: also sum exp(z - peak) (z - peak).
        squares: also sum exp(2 (z - peak)).
        mean: also the sum of all logits, the target's among them.
        tile: instead of ``default_tile``'s.

    Returns:
        [n] fp32 each: "peak" (-inf without another finite logit; sums are then relative to 0),
        "total", "target", and where asked for "weighted", "squares" and "plain". All but "target"
        and "plain" leave the target's entry out.

    Raises:
        TypeError: for dtypes other than the above, or different ones.
        ValueError: for shapes that do not fit together, or rows with gaps between their entries.
    """
    check_operands(hidden, weight, target, positions, bias, scale)
    n, (vocab, size) = target.shape[0], weight.shape
    names = ["peak", "total", "target"]
    names += ["weighted"] * entropy + ["squares"] * squares + ["plain"] * mean
    out = torch.empty((len(names), n), dtype=torch.float32, device=hidden.device)
    if n == 0:
        return dict(zip(names, out, strict=True))
    if tile is None:
        arch, sms = chip(hidden.device)
        tile = default_tile(arch, n, vocab, size, hidden.dtype, sms)
    tma_hidden = tile.tma and positions is None and tma_can_load(hidden)
    tma_weight = tile.tma and tma_can_load(weight)
    one = tile.splits == 1
    shape = (len(names), tile.splits, n)
    part = out[:, None] if one else torch.empty(shape, dtype=torch.float32, device=hidden.device)
    row_scale = scale if isinstance(scale, Tensor) else None
    with on_device_of(hidden):
        product_fold_kernel[(ceil_div(n, tile.BLOCK_N) * tile.splits,)](
            descriptor(hidden, tile.BLOCK_N, tile.BLOCK_K) if tma_hidden else hidden,
            descriptor(weight, tile.BLOCK_V, tile.BLOCK_K) if tma_weight else weight,
            target if bias is None else bias,
            target if row_scale is None else row_scale,
            target,
            target if positions is None else positions,
            part,
            hidden.stride(0),
            weight.stride(0),
            0 if bias is None else bias.stride(0),
            0 if row_scale is None else row_scale.stride(0),
            target.stride(0),
            0 if positions is None else positions.stride(0),
            *part.stride()[:2],
            n,
            vocab,
            size,
            tile.splits,
            tile.tiles_per_split(vocab),
            tile.group,
            1.0 if softcap is None else float(softcap),
            float(scale) if row_scale is None else 1.0,
            BIAS=bias is not None,
            SOFTCAP=softcap is not None,
            ROW_SCALE=row_scale is not None,
            POSITIONS=positions is not None,
            WEIGHTED=entropy,
            SQUARES=squares,
            PLAIN=mean,
            WHOLE_K=size % tile.BLOCK_K == 0,
            WIDEN=_INTERPRETED,
            TMA_HIDDEN=tma_hidden,
            TMA_WEIGHT=tma_weight,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_V=tile.BLOCK_V,
            BLOCK_K=tile.BLOCK_K,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if not one:
        columns = tile.tiles_per_split(vocab) * tile.BLOCK_V
        merge(part, target, out, columns, entropy=entropy, squares=squares, mean=mean)
    return dict(zip(names, out, strict=True))
