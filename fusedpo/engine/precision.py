"""The engine's dtypes: operands of products, sums, and the gains that keep fp16 in range."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpo.checks import TORCH
from fusedpo.kernels.row_stats import power_of_two

# fp32 results of half-precision operands, on CUDA: torch.mm since 2.8; torch.addmm exists as long,
# but took an fp32 accumulator only later
_HAS_MM_OUT_DTYPE = TORCH >= (2, 8) and torch.version.hip is None
_HAS_ADDMM_OUT_DTYPE = TORCH >= (2, 10) and torch.version.hip is None

# fp16 has few exponents: exponentials, at most 1, are stored this much larger, and Jacobians so
# that their largest entry, the total, is at most twice this
FP16_GAIN = 2.0**14


def accumulated_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of numbers per token: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the products' operands, for hidden states of a dtype on a type of device.

    On the CPU a half-precision product would round its result to half precision, so tiles of the
    operands are widened first; elsewhere the product accumulates and returns fp32 from
    half-precision operands.
    """
    if device == "cpu":
        return accumulated_dtype(dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b, accumulated in out's dtype."""
    if a.dtype == out.dtype:
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif out.device.type == "cuda" and _HAS_MM_OUT_DTYPE:
        if not add:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif _HAS_ADDMM_OUT_DTYPE:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        multiply(out, a.to(out.dtype), b.to(out.dtype), add=add)


def unit_gain(values: Tensor) -> Tensor:
    """The power of two that brings each |value| into [1/2, 1); 1 for 0 and what is not finite.

    Computed on the device. Without such gains fp16 products over- and underflow: a gradient that is
    a mean over many tokens is smaller than fp16's least number.
    """
    usable = torch.isfinite(values) & (values != 0)
    exponent = torch.frexp(torch.where(usable, values.abs(), 1.0)).exponent
    return power_of_two(-exponent.to(values.dtype))


def divide_(gain: Tensor | None, *tensors: Tensor | None) -> None:
    """Divide by the gain in place; None: by nothing."""
    for tensor in tensors:
        if gain is not None and tensor is not None:
            tensor.div_(gain)


def largest(values: Tensor) -> Tensor:
    """The largest |value|, a number on the device; 1 without values."""
    return values.abs().amax() if values.numel() else values.new_ones(())
