"""Row statistics of splits of the vocabulary to those of all of it, in a fixed order.

A program reads ``part``, which is complete before it starts, and writes its own rows of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.product_tile import ceil_div
from fusedpo.kernels.tiles import on_device_of

_BLOCK = 128


@triton.jit
def store_slots(
    out,
    peak,
    total,
    own,
    weighted,
    squares,
    plain,
    slot_stride,
    inside,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Write the slots that there are, one after the other."""
    tl.store(out, peak, mask=inside)
    out += slot_stride
    tl.store(out, total, mask=inside)
    out += slot_stride
    tl.store(out, own, mask=inside)
    if WEIGHTED:
        out += slot_stride
        tl.store(out, weighted, mask=inside)
    if SQUARES:
        out += slot_stride
        tl.store(out, squares, mask=inside)
    if PLAIN:
        out += slot_stride
        tl.store(out, plain, mask=inside)


@triton.jit(
    do_not_specialize=[
        "part_slot_stride",
        "part_split_stride",
        "out_slot_stride",
        "rows",
        "splits",
        "columns_per_split",
    ]
)
def merge_kernel(
    part_ptr,
    target_ptr,
    out_ptr,
    part_slot_stride,
    part_split_stride,
    out_slot_stride,
    target_stride,
    rows,
    splits,
    columns_per_split,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program BLOCK rows: part[slot, split, row] to out[slot, row], split after split."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    y = tl.load(target_ptr + row * target_stride, mask=inside, other=0)

    part_ptr += row
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        at = part_ptr + tl.cast(split, tl.int64) * part_split_stride
        peak = tl.maximum(peak, tl.load(at, mask=inside, other=0.0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)

    total = tl.zeros([BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        at = part_ptr + tl.cast(split, tl.int64) * part_split_stride
        d = tl.load(at, mask=inside, other=0.0) - shift
        rescale = tl.exp(d)
        at += part_slot_stride
        part_total = tl.load(at, mask=inside, other=0.0)
        total += rescale * part_total
        at += part_slot_stride
        begin = tl.cast(split, tl.int64) * columns_per_split
        here = (y >= begin) & (y < begin + columns_per_split)
        own = tl.where(here, tl.load(at, mask=inside, other=0.0), own)
        if WEIGHTED:
            at += part_slot_stride
            moved = tl.where(part_total > 0, d * part_total, 0.0)
            weighted += rescale * (tl.load(at, mask=inside, other=0.0) + moved)
        if SQUARES:
            at += part_slot_stride
            squares += rescale * rescale * tl.load(at, mask=inside, other=0.0)
        if PLAIN:
            at += part_slot_stride
            plain += tl.load(at, mask=inside, other=0.0)

    out = out_ptr + row
    store_slots(
        out,
        peak,
        total,
        own,
        weighted,
        squares,
        plain,
        out_slot_stride,
        inside,
        WEIGHTED,
        SQUARES,
        PLAIN,
    )


def merge(
    part: Tensor,
    target: Tensor,
    out: Tensor,
    columns_per_split: int,
    *,
    entropy: bool,
    squares: bool,
    mean: bool,
) -> None:
    """part [slots, splits, n] to out [slots, n].

    Args:
        part: fp32, the slots of product_fold.
        target: [n] int64.
        out: fp32, written.
        columns_per_split: vocabulary entries of each split but the last.
        entropy, squares, mean: which slots there are beside peak, total and target.
    """
    n = target.shape[0]
    with on_device_of(part):
        merge_kernel[(ceil_div(n, _BLOCK),)](
            part,
            target,
            out,
            part.stride(0),
            part.stride(1),
            out.stride(0),
            target.stride(0),
            n,
            part.shape[1],
            columns_per_split,
            WEIGHTED=entropy,
            SQUARES=squares,
            PLAIN=mean,
            BLOCK=_BLOCK,
            num_warps=4,
        )
