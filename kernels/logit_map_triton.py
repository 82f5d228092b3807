"""LogitMap in a kernel: products to logits, and softcap's slope. Arithmetic is in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels.device_math import tanh
from fusedpo.kernels.logit_map import LogitMap


@triton.jit
def logits(
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
def slope(z, limit):
    """Derivative of softcap at logits z; limit is softcap times scale."""
    ratio = z / limit
    return 1.0 - ratio * ratio


def head_arguments(head: LogitMap, x: Tensor) -> dict[str, object]:
    """A head's arguments of a launch; x stands in for pointers that nothing is read from."""
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
