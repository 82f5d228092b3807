"""What the fused product asks of its operands, and how tensor descriptors are made of them."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
) -> None:
    """TypeError or ValueError for operands that the kernel cannot take, naming the first."""
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    for name, indices in (("target", target), ("positions", positions)):
        if indices is not None and indices.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {indices.dtype}")
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(matrix.shape)}")
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(
                f"the entries of a row of {name} must be contiguous, got strides {matrix.stride()}"
            )
    vocab, size = weight.shape
    if vocab == 0:
        raise ValueError("weight must have at least one row, got none")
    if hidden.shape[1] != size:
        raise ValueError(f"hidden must have weight's {size} columns, got {hidden.shape[1]}")
    if target.dim() != 1:
        raise ValueError(f"target must have one dimension, got shape {tuple(target.shape)}")
    n = target.shape[0]
    rows = hidden.shape[:1] if positions is None else positions.shape
    if rows != target.shape:
        name = "hidden" if positions is None else "positions"
        raise ValueError(f"{name} must have target's {n} rows, got {tuple(rows)}")
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must have shape ({vocab},), got {tuple(bias.shape)}")
    if isinstance(scale, Tensor) and scale.shape != (n,):
        raise ValueError(f"scale must be a number or have shape ({n},), got {tuple(scale.shape)}")


def tma_can_load(matrix: Tensor) -> bool:
    """Whether base and rows start at multiples of 16 bytes, and rows do not overlap."""
    rows, columns = matrix.shape
    stride = matrix.stride(0) if rows > 1 else columns
    aligned = matrix.data_ptr() % 16 == 0 and stride * matrix.element_size() % 16 == 0
    return aligned and columns > 0 and stride >= columns


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The tensor memory accelerator's view of a matrix, in blocks [rows, columns]."""
    stride = matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
    return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], [rows, columns])
