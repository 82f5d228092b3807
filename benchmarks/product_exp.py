"""An experiment, of which the library uses nothing: exponentials straight from the product.

bf16 reaches as far as fp32, so that exp(z - shift) keeps its relative precision whatever the shift,
as long as it is within 80 or so of the row's largest logit. With a shift that is known before the
product (from a sample of the vocabulary), a persistent kernel can write the exponentials in bf16
and add up rows while the logits are in registers: no tile of fp32 logits, and nothing to rescale.
It is worth having if what its product is slower than cuBLAS's costs less than the memory traffic
that it saves; section ``experiment`` of benchmarks/gpu.py measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedpo.kernels import interpreter
from fusedpo.kernels.tiles import on_device_of

interpreter.mend()

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class ExpTile:
    """Rows, columns, hidden entries of a step; warps, steps in flight, row tiles side by side."""

    rows: int = 128
    columns: int = 256
    step: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8

    def __str__(self) -> str:
        size = f"{self.rows} x {self.columns} x {self.step}"
        return f"{size}, {self.warps} warps, {self.stages} stages"


@triton.jit
def _exponentials(z, shift, y, column, vocab, scale2):
    """exp2 of scaled logits [rows, columns] less the shift; 0 at the target and beyond V."""
    e = tl.exp2(z * scale2 - shift[:, None])
    return tl.where((column[None, :] != y[:, None]) & (column < vocab)[None, :], e, 0.0)


@triton.jit
def product_exp_kernel(
    hidden,
    weight,
    out,
    shift_ptr,
    target_ptr,
    part_ptr,
    rows,
    vocab,
    size,
    part_stride,
    scale2,
    PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program takes every PROGRAMS-th tile. hidden, weight, out: descriptors, out of half a tile.

    Shifts are in units of log 2; part[column tile, row]. WIDEN: multiply in fp32.
    """
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_N), tl.cdiv(vocab, BLOCK_V)
    HALF: tl.constexpr = BLOCK_V // 2
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        side = tl.minimum(row_tiles - first, GROUP)
        n = first + tile % (GROUP * column_tiles) % side
        v = tile % (GROUP * column_tiles) // side
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for k in range(0, size, BLOCK_K):
            h, w = hidden.load([n * BLOCK_N, k]), weight.load([v * BLOCK_V, k])
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            z = tl.dot(h, w.T, z)
        row = n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < rows
        shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
        y = tl.load(target_ptr + row, mask=inside, other=-1).to(tl.int32)
        # in halves, of which one at a time is turned into exponentials
        left, right = tl.split(tl.permute(tl.reshape(z, [BLOCK_N, 2, HALF]), (0, 2, 1)))
        column = v * BLOCK_V + tl.arange(0, HALF)
        e = _exponentials(left, shift, y, column, vocab, scale2)
        total = tl.sum(e, 1)
        out.store([n * BLOCK_N, v * BLOCK_V], e.to(out.dtype))
        e = _exponentials(right, shift, y, column + HALF, vocab, scale2)
        total += tl.sum(e, 1)
        out.store([n * BLOCK_N, v * BLOCK_V + HALF], e.to(out.dtype))
        tl.store(part_ptr + v.to(tl.int64) * part_stride + row, total, mask=inside)


def product_exp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shift: Tensor,
    out: Tensor,
    tile: ExpTile,
    scale: float = 1.0,
) -> Tensor:
    """Sums of exp(z - shift) over the others than the target, [N]; the exponentials go to out.

    Args:
        hidden: [N, H], bf16; H a multiple of 8.
        weight: [V, H], likewise.
        target: [N], int64.
        shift: [N], fp32, within 80 of the row's largest logit.
        out: [N, V], bf16; V a multiple of 8.
        tile: of the kernel.
        scale: of the logits.
    """
    (n, size), vocab = hidden.shape, weight.shape[0]
    programs = 1
    if hidden.is_cuda:
        programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    part = torch.empty(-(-vocab // tile.columns), n, device=hidden.device)
    with on_device_of(hidden):
        product_exp_kernel[(programs,)](
            TensorDescriptor.from_tensor(hidden, [tile.rows, tile.step]),
            TensorDescriptor.from_tensor(weight, [tile.columns, tile.step]),
            TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // 2]),
            shift * LOG2_E,
            target,
            part,
            n,
            vocab,
            size,
            part.stride(0),
            scale * LOG2_E,
            PROGRAMS=programs,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.columns,
            BLOCK_K=tile.step,
            GROUP=tile.group,
            # the interpreter multiplies no bf16
            WIDEN=not hidden.is_cuda,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return part.sum(0)
