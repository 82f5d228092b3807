"""logit_tile.settle as a kernel: rows of J whose exponentials are relative to earlier shifts.

It reads 2 bytes of half precision and writes 2 for each logit, only where a row's shift has risen.

No two threads meet: a number of the block is written by the thread that read it, and the target's
entry alone where nothing else is touched. Tiles of a row, programs of their own, share no column.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.tiles import on_device_of, row_tile


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
