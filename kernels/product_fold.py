"""Row statistics of the logits hidden weight^T without the logits in memory.

Letters: n rows, P rows of hidden before selection, H hidden size, V vocabulary entries, z logits,
y the target of a row.

A program keeps BLOCK_N rows and walks the vocabulary tiles of one split of the vocabulary. A tile
of logits exists in registers only, and is folded into running statistics at once. Those are kept
over all entries **but the target's**, so that the log-probability has no cancellation:

    peak = max_{j != y} z_j         total = sum_{j != y} exp(z_j - peak)
    logp = logsigmoid(z_y - peak - log(total))

A second kernel merges the splits in a fixed order. Nothing is added atomically: results repeat bit
for bit.

What is read again, and from where: a program reads its rows of hidden once a vocabulary tile, and
each tile of the weight is read once a row block. Programs are therefore numbered by groups of row
blocks whose hidden rows stay in the L2 cache: a group walks all splits before the next one starts,
and inside a group the programs that share a split, and so read the same weight tiles at about the
same time, are neighbours. The weight is streamed from memory once a group.

Offsets are 64 bits wide; accumulators and statistics are fp32.

No kernel here reads global memory that it writes: a program writes its own rows of its own split of
``part``, the merging kernel its own rows of the result, and ``part`` is complete before it starts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedpo.kernels.device_math import tanh
from fusedpo.kernels.tiles import on_device_of


@dataclass(frozen=True)
class Tile:
    """How much of the problem a program takes.

    Attributes:
        BLOCK_N: rows.
        BLOCK_V: vocabulary entries of a tile.
        BLOCK_K: hidden entries of one step of the product.
        num_warps: warps of a program.
        num_stages: how many steps of the product are in flight.
        splits: parts of the vocabulary, each of whole tiles.
        tma: whether tiles are loaded through tensor descriptors where alignment allows it.
        group: row blocks that walk the splits together.
    """

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    splits: int = 1
    tma: bool = False
    group: int = 8

    def tiles_per_split(self, vocab: int) -> int:
        return _ceil_div(_ceil_div(vocab, self.BLOCK_V), self.splits)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# (rows at most, tile), fewest rows first. Untested on a GPU: chosen by arithmetic, and held to
# their machine code. A matrix unit that multiplies 64 rows at a time (sm_90) or 128 (sm_100) should
# not be worth its tile for a handful of rows, which wait for the weight anyway.
_HALF = {
    "sm_80": (
        (16, Tile(16, 128, 128, 4, 3)),
        (64, Tile(64, 128, 64, 4, 3)),
        (None, Tile(128, 128, 64, 8, 3)),
    ),
    "sm_90": (
        (16, Tile(16, 128, 64, 8, 4)),
        (64, Tile(64, 256, 64, 8, 4, tma=True)),
        (None, Tile(128, 256, 64, 8, 4, tma=True)),
    ),
    "sm_100": (
        (16, Tile(16, 128, 64, 4, 4)),
        (64, Tile(64, 256, 64, 8, 4, tma=True)),
        (None, Tile(128, 128, 64, 8, 4, tma=True)),
    ),
    "gfx942": (
        (16, Tile(16, 128, 128, 4, 2)),
        (64, Tile(64, 128, 64, 4, 2)),
        (None, Tile(128, 128, 64, 8, 2)),
    ),
}
# no fp32 matrix unit without rounding to TF32 on NVIDIA: the products are plain multiply-adds
_SINGLE = {
    "sm_80": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
    "sm_90": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
    "sm_100": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
    "gfx942": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
}

# hidden rows of a group, in bytes: a third of the L2 cache of the GPUs above
_GROUP_BYTES = 16 << 20
# what a program costs beyond its tiles (filling the pipeline, writing statistics), in tiles
_PROGRAM_OVERHEAD = 0.5
_MOST_WAVES = 4


def _family(arch: str | int) -> str:
    """The row of the tile tables for ``arch``: 90, "sm_90", "sm_90a", "gfx942", ..."""
    name = str(arch)
    if name.startswith("gfx"):
        return "gfx942"
    capability = int(name.removeprefix("sm_").rstrip("af"))
    if 90 <= capability < 100:
        return "sm_90"
    # sm_120 has neither sm_100's matrix unit nor its shared memory
    return "sm_100" if 100 <= capability < 120 else "sm_80"


@functools.lru_cache(maxsize=4096)
def default_tile(
    arch: str | int,
    n: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    sms: int = 132,
) -> Tile:
    """The tile for a problem; a pure function.

    The splits are those that keep ``sms`` multiprocessors busy for the fewest tile times, and at
    least as many as it takes for the rows that are worked on at one time to stay in the L2 cache.

    Args:
        arch: compute capability (90, "sm_90") or the name of an AMD target ("gfx942").
        n: rows.
        vocab: V.
        hidden: H.
        dtype: of hidden and weight.
        sms: multiprocessors (compute units) of the device.
    """
    table = (_SINGLE if dtype == torch.float32 else _HALF)[_family(arch)]
    tile = next(tile for most, tile in table if most is None or n <= most)
    blocks = max(1, _ceil_div(n, tile.BLOCK_N))
    tiles = _ceil_div(vocab, tile.BLOCK_V)

    group = _GROUP_BYTES // max(1, tile.BLOCK_N * hidden * dtype.itemsize)
    group = min(max(1, group), blocks)
    fewest = min(tiles, _ceil_div(sms, group)) if group < blocks else 1
    most = max(2 * fewest, _MOST_WAVES * sms // blocks)

    def time(splits: int) -> float:
        waves = _ceil_div(blocks * splits, sms)
        return waves * (_ceil_div(tiles, splits) + _PROGRAM_OVERHEAD)

    splits = min(range(fewest, min(most, tiles) + 1), key=time)
    # as many as it takes at that many tiles each: none is empty
    splits = _ceil_div(tiles, _ceil_div(tiles, splits))
    return replace(tile, splits=splits, group=group)


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
    if not TMA_HIDDEN:
        at = safe_row
        if POSITIONS:
            at = tl.load(positions_ptr + safe_row * positions_stride)
        hidden_ptrs = hidden + at[:, None] * hidden_stride + lanes[None, :]

    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    own = tl.zeros([BLOCK_N], tl.float32)
    if WEIGHTED:
        weighted = tl.zeros([BLOCK_N], tl.float32)
    if SQUARES:
        squares = tl.zeros([BLOCK_N], tl.float32)
    if PLAIN:
        plain = tl.zeros([BLOCK_N], tl.float32)

    tiles = tl.cdiv(vocab, BLOCK_V)
    first = tl.minimum(split * tiles_per_split, tiles)
    last = tl.minimum(first + tiles_per_split, tiles)
    for tile in range(first, last):
        begin = tile * BLOCK_V
        column = begin + tl.arange(0, BLOCK_V)
        column_inside = column < vocab
        safe_column = tl.minimum(column, vocab - 1).to(tl.int64)
        if not TMA_WEIGHT:
            weight_ptrs = weight + safe_column[:, None] * weight_stride + lanes[None, :]

        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for k in range(0, size, BLOCK_K):
            if TMA_HIDDEN:
                h = hidden.load([first_row, k])
            elif WHOLE_K:
                h = tl.load(hidden_ptrs + k)
            else:
                h = tl.load(hidden_ptrs + k, mask=(k + lanes < size)[None, :], other=0.0)
            if TMA_WEIGHT:
                w = weight.load([begin, k])
            elif WHOLE_K:
                w = tl.load(weight_ptrs + k)
            else:
                w = tl.load(weight_ptrs + k, mask=(k + lanes < size)[None, :], other=0.0)
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            # "ieee": fp32 operands are not rounded to TF32; half precision knows nothing else
            z = tl.dot(h, tl.trans(w), z, input_precision="ieee")

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
        peak = new_peak

    # the target's logit is 0 where the target is in another split: merging takes the right one
    out = part_ptr + split.to(tl.int64) * part_split_stride + row
    tl.store(out, peak, mask=row_inside)
    out += part_slot_stride
    tl.store(out, total, mask=row_inside)
    out += part_slot_stride
    tl.store(out, own, mask=row_inside)
    if WEIGHTED:
        out += part_slot_stride
        tl.store(out, weighted, mask=row_inside)
    if SQUARES:
        out += part_slot_stride
        tl.store(out, squares, mask=row_inside)
    if PLAIN:
        out += part_slot_stride
        tl.store(out, plain, mask=row_inside)


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
    tl.store(out, peak, mask=inside)
    out += out_slot_stride
    tl.store(out, total, mask=inside)
    out += out_slot_stride
    tl.store(out, own, mask=inside)
    if WEIGHTED:
        out += out_slot_stride
        tl.store(out, weighted, mask=inside)
    if SQUARES:
        out += out_slot_stride
        tl.store(out, squares, mask=inside)
    if PLAIN:
        out += out_slot_stride
        tl.store(out, plain, mask=inside)


# the interpreter multiplies the bits of bf16 as integers
_INTERPRETED = not isinstance(product_fold_kernel, triton.JITFunction)

_MERGE_BLOCK = 128


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
    _check(hidden, weight, target, positions, bias, scale)
    n, (vocab, size) = target.shape[0], weight.shape
    names = ["peak", "total", "target"]
    names += ["weighted"] * entropy + ["squares"] * squares + ["plain"] * mean
    out = torch.empty((len(names), n), dtype=torch.float32, device=hidden.device)
    if n == 0:
        return dict(zip(names, out, strict=True))
    if tile is None:
        arch, sms = _chip(hidden.device)
        tile = default_tile(arch, n, vocab, size, hidden.dtype, sms)
    tma_hidden = tile.tma and positions is None and _tma_can_load(hidden)
    tma_weight = tile.tma and _tma_can_load(weight)
    one = tile.splits == 1
    shape = (len(names), tile.splits, n)
    part = out[:, None] if one else torch.empty(shape, dtype=torch.float32, device=hidden.device)
    row_scale = scale if isinstance(scale, Tensor) else None
    with on_device_of(hidden):
        product_fold_kernel[(_ceil_div(n, tile.BLOCK_N) * tile.splits,)](
            _descriptor(hidden, tile.BLOCK_N, tile.BLOCK_K) if tma_hidden else hidden,
            _descriptor(weight, tile.BLOCK_V, tile.BLOCK_K) if tma_weight else weight,
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
            part.stride(0),
            part.stride(1),
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
            merge_kernel[(_ceil_div(n, _MERGE_BLOCK),)](
                part,
                target,
                out,
                part.stride(0),
                part.stride(1),
                out.stride(0),
                target.stride(0),
                n,
                tile.splits,
                tile.tiles_per_split(vocab) * tile.BLOCK_V,
                WEIGHTED=entropy,
                SQUARES=squares,
                PLAIN=mean,
                BLOCK=_MERGE_BLOCK,
                num_warps=4,
            )
    return dict(zip(names, out, strict=True))


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
) -> None:
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


def _chip(device: torch.device) -> tuple[str | int, int]:
    """Architecture and multiprocessors; without a GPU, in the interpreter, those of an H100."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _tma_can_load(matrix: Tensor) -> bool:
    """Base and rows start at multiples of 16 bytes, and rows do not overlap."""
    rows, columns = matrix.shape
    stride = matrix.stride(0) if rows > 1 else columns
    aligned = matrix.data_ptr() % 16 == 0 and stride * matrix.element_size() % 16 == 0
    return aligned and columns > 0 and stride >= columns


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    stride = matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
    return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], [rows, columns])
