"""logit_tile.finish as a kernel: dlogp/dhidden of finished rows, to their positions.

For each number of a hidden row it reads 4 bytes of sums and 2 of a half-precision weight, and
writes 2 or 4. Nothing that it writes is read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.tiles import jacobian_tile, on_device_of


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
