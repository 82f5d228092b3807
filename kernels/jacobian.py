"""logit_tile.jacobian as a kernel: a tile of products to a tile of J.

It reads a tile once, 4 bytes a logit for fp32 products, and writes 2 in half precision. A number of
x, where it is out, is written by the thread that read it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.logit_map_triton import head_arguments, logits, slope
from fusedpo.kernels.tiles import jacobian_tile, on_device_of


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
    z = logits(x, bias_ptr, columns, inside, softcap, scale, BIAS, SOFTCAP)
    d = z - tl.load(shift_ptr + row)
    j = tl.exp(d)
    if FACTOR:
        factor = tl.load(factor_ptr + row)
        if TILT:
            factor = factor + tl.load(tilt_ptr + row) * tl.maximum(d, -1e4)
        j *= factor
    j = tl.where(columns == y, tl.load(own_ptr + row), j)
    if SOFTCAP:
        j *= slope(z, softcap * scale)
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
            **head_arguments(head, x),
            FACTOR=factor is not None,
            TILT=tilt is not None,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
