"""The problem cut into tiles: reads operands, makes logits of their products, and folds them.

Letters: N scored tokens, P positions (scored or not), V vocabulary, H hidden size; n rows and v
vocabulary columns of the tile of logits that exists at a time. J is the negated Jacobian of the
log-probability with respect to the logits, but for one factor a row: see kernels/logit_tile.py.

The backend decides how a tile is worked on; the products and the order of everything are the same
for all.

Of a vocabulary in slices, one on each rank of a group, V and J are this rank's. The statistics of
the rows of a pass are merged over the group once they are complete, and so is the gradient with
respect to the hidden states: one collective each, never one a tile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedpo.engine import stats as statistics
from fusedpo.engine.cost import Backend, Needs, padded
from fusedpo.engine.plan import Plan
from fusedpo.engine.precision import FP16_GAIN, accumulated_dtype, multiply, unit_gain
from fusedpo.engine.rows import Rows, blocks
from fusedpo.engine.structure import Groups
from fusedpo.engine.workspace import Workspace
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.row_stats import RowStats
from fusedpo.kernels.tile_operations import tile_operations
from fusedpo.vocab_shards import VocabShard

Range = tuple[int, int]

_HANDFUL = 32


@dataclass(frozen=True)
class Call:
    """The constants of a call to the engine, beside its differentiable tensors.

    Attributes:
        rows: the scored tokens.
        softcap: bound of the logits, or None.
        scale: logit_scale / temperature; a tensor is [N].
        plan: the route and its tiles.
        needs: the gradients that are wanted.
        stats: names of the statistics to return.
        operand: dtype of the products; decided once, for a backward outside autocast.
        backend: of the work on tiles.
        differentiable: those statistics that pass a gradient on.
        groups: for ``one_pass``, the loss's gradient as far as it is known early.
        states: [K] rows whose hidden states are wanted too.
        shard: of the vocabulary; None: all of it is here.
        tolerance: relative error of a gradient tensor that is allowed, whatever the route.
    """

    rows: Rows
    softcap: float | None
    scale: float | Tensor
    plan: Plan
    needs: frozenset[Needs]
    stats: tuple[str, ...]
    operand: torch.dtype
    backend: Backend
    differentiable: tuple[str, ...] = statistics.DIFFERENTIABLE
    groups: Groups | None = None
    states: Tensor | None = None
    shard: VocabShard | None = None
    tolerance: float = 0.0


def _flat(hidden: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """Rows [R, H] in the memory of hidden [..., H]; and from each to the next along the leading
    axes, in rows, or None if they are the positions in order.

    A slice as ``hidden[:, :-1]`` cannot be flattened without a copy of all of it; rows may overlap.
    """
    try:
        return hidden.view(-1, hidden.shape[-1]), None
    except RuntimeError:
        *strides, within = hidden.stride()
    apart = max(1, math.gcd(*strides))
    steps = tuple(stride // apart for stride in strides)
    last = sum((size - 1) * step for size, step in zip(hidden.shape, steps, strict=False))
    return hidden.as_strided((last + 1, hidden.shape[-1]), (apart, within)), steps


class HiddenRows:
    """Reads the hidden states of scored tokens, wherever in memory they are.

    Attributes:
        flat: [R, H], rows in the memory of hidden, among them those of all positions.
    """

    def __init__(self, hidden: Tensor, rows: Rows) -> None:
        self.flat, self._steps = _flat(hidden)
        self._leading, self._rows = hidden.shape[:-1], rows

    def places(self, start: int, stop: int) -> Tensor | None:
        """[n] int64, where rows start .. stop are in ``flat``; None: right there."""
        positions = self._rows.positions
        if positions is not None:
            return self._in_memory(positions[start:stop])
        if self._steps is None:
            return None
        return self._in_memory(torch.arange(start, stop, device=self.flat.device))

    def positions_of(self, rows: Tensor) -> Tensor:
        """[K] into the flattened positions, of rows [K]."""
        positions = self._rows.positions
        return rows if positions is None else positions[rows]

    def some(self, rows: Tensor) -> Tensor:
        """[K, H], the hidden states of rows [K]."""
        return self.flat[self._in_memory(self.positions_of(rows))]

    def _in_memory(self, positions: Tensor) -> Tensor:
        """Flattened positions as rows of ``flat``: by numbers that no device has to be sent."""
        if self._steps is None:
            return positions
        places = torch.zeros_like(positions)
        for size, step in zip(reversed(self._leading), reversed(self._steps), strict=True):
            places += positions % size * step
            positions = positions // size
        return places


class Tiles:
    """A call's operands and memory, tile by tile, for one pass: a forward or a backward."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        *,
        backward: bool = False,
    ) -> None:
        # kernels read memory, which holds the negatives where the bit says so; then it is copied
        self.hidden, self.weight, self.call = hidden.resolve_neg(), weight.resolve_neg(), call
        self.bias = None if bias is None else bias.resolve_neg().contiguous()
        self.rows, self.plan = call.rows, call.plan
        self.acc, self.operand = accumulated_dtype(hidden.dtype), call.operand
        self.kernels = tile_operations(call.backend)
        self.gain = FP16_GAIN if call.operand == torch.float16 else 1.0
        self.vocab, self.width = weight.shape
        self.count = call.rows.count
        self.shard = call.shard
        # beyond this slice where another has it
        self.targets = call.rows.targets
        if self.shard is not None:
            self.targets = self.targets - self.shard.offset
        self.reader = HiddenRows(self.hidden, call.rows)
        self.workspace = Workspace(call.plan.passes[backward], hidden.device)
        p = call.plan
        rows, cols = (p.back_rows, p.back_cols) if backward else (p.rows, p.cols)
        self._tile = min(rows, self.count), padded(min(cols, self.vocab))

    def reordered(self, order: Tensor | None) -> Tiles:
        """The same operands and memory, row i being the former row order[i]; None: as they are."""
        if order is None:
            return self
        scale = self.call.scale
        scale = scale[order] if isinstance(scale, Tensor) else scale
        rows, other = self.rows.reorder(order), copy.copy(self)
        other.call = replace(self.call, rows=rows, scale=scale)
        other.rows, other.targets = rows, self.targets[order]
        other.reader = HiddenRows(self.hidden, rows)
        return other

    # memory

    def vector(self, *shape: int) -> Tensor:
        """Uninitialised numbers a token, or a vocabulary entry, in the dtype of sums."""
        return torch.empty(shape, dtype=self.acc, device=self.hidden.device)

    def take(
        self, name: str, *shape: int, dtype: torch.dtype | None = None, part: int = 0
    ) -> Tensor:
        """A declared buffer, or a part of one, in the dtype of sums if no other is asked for."""
        return self.workspace.take(name, *shape, dtype=dtype or self.acc, part=part)

    def column_major(self, rows: int, columns: int) -> bool:
        """Whether a product [rows, columns] is written faster by columns.

        On a CPU it is where rows are few, as in the slabs of kept columns; but not a handful, where
        a sum of products takes twice as long by columns. Kernels write rows.
        """
        return self.plan.on_cpu and self.call.backend == "torch" and _HANDFUL < rows < columns

    def matrix(
        self, name: str, rows: int, columns: int, most: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[rows, columns] of a declared buffer, as a product is written fastest.

        Args:
            most: columns that there ever are: a buffer that grew would stand beside the smaller.
        """
        memory = self.take(name, rows * padded(most), dtype=dtype)
        if self.column_major(rows, columns):
            return memory[: rows * columns].view(columns, rows).T
        return memory[: rows * padded(columns)].view(rows, padded(columns))[:, :columns]

    def tile(self) -> Tensor:
        """Memory for the logits of one tile [rows, cols].

        Rows start at multiples of 16 numbers, for loads of whole vectors.
        """
        return self.take("tile", *self._tile)

    @property
    def tile_numbers(self) -> int:
        """How many numbers the memory of a tile has room for; it is not made for the question."""
        return math.prod(self._tile)

    def narrow_tile(self) -> Tensor | None:
        """Memory for a tile as products take it, if that is another dtype."""
        if self.operand == self.acc:
            return None
        return self.take("tile copies", *self._tile, dtype=self.operand)

    # ranges

    def row_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Range]:
        return blocks(start, self.count if stop is None else stop, self.plan.rows)

    def col_blocks(self) -> Iterator[Range]:
        return blocks(0, self.vocab, self.plan.cols)

    # operands

    def hidden_rows(self, start: int, stop: int) -> Tensor:
        """[n, H] in the operands' dtype."""
        flat, places = self.reader.flat, self.reader.places(start, stop)
        if places is None and flat.dtype == self.operand:
            return flat[start:stop]
        out = self.take("hidden rows", stop - start, self.width, dtype=self.operand)
        if places is None:
            return out.copy_(flat[start:stop])
        if flat.dtype == self.operand:
            return torch.index_select(flat, 0, places, out=out)
        narrow = self.take("gathered hidden rows", *out.shape, dtype=flat.dtype)
        return out.copy_(torch.index_select(flat, 0, places, out=narrow))

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """[v, H] in the operands' dtype."""
        rows = self.weight[start:stop]
        if rows.dtype == self.operand:
            return rows
        return self.take("weight rows", *rows.shape, dtype=self.operand).copy_(rows)

    def some_weight_rows(self, columns: Tensor, out: Tensor) -> Tensor:
        """Rows [C, H] of the weight, of columns [C], into out in the operands' dtype."""
        if self.weight.dtype == self.operand:
            return torch.index_select(self.weight, 0, columns, out=out)
        narrow = self.take("gathered weight rows", *out.shape, dtype=self.weight.dtype)
        return out.copy_(torch.index_select(self.weight, 0, columns, out=narrow))

    def scale_rows(self, start: int, stop: int) -> float | Tensor:
        """The factor of the rows' logits after softcap: a number, or [n]."""
        scale = self.call.scale
        return scale[start:stop] if isinstance(scale, Tensor) else scale

    def scaled(self, values: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """values [n] times the rows' scale."""
        return values * self.scale_rows(start, self.count if stop is None else stop)

    def logit_map(self, r: Range, c: Range) -> LogitMap:
        """The map from the products of row block r and vocabulary block c to their logits."""
        bias = None if self.bias is None else self.bias[slice(*c)]
        return LogitMap(bias, self.call.softcap, self.scale_rows(*r))

    # statistics

    def start_stats(self) -> RowStats:
        return statistics.start(self.call.stats, self.count, self.vector(0))

    def finish_stats(self, stats: RowStats) -> dict[str, Tensor]:
        """[n] of every statistic that is saved or asked for, after all tiles."""
        whole = self.vocab if self.shard is None else self.shard.total
        return statistics.finish(self.call.stats, stats, whole)

    def merge(self, stats: RowStats) -> Tensor | None:
        """Statistics of this slice become those of the whole vocabulary, in place.

        Returns:
            [n], the factor that sums of this slice still lack; None: nothing.
        """
        return None if self.shard is None else self.shard.merge(stats)

    # a tile

    def fold(
        self,
        x: Tensor,
        hidden: Tensor,
        weight: Tensor,
        r: Range,
        c: Range,
        stats: RowStats,
        *,
        exponentials: Tensor | None = None,
        rest: Tensor | None = None,
    ) -> None:
        """Make the logits of one tile and fold them into the statistics of its rows.

        Args:
            x: [n, v], memory for the logits.
            hidden, weight: [n, H] of row block r, [v, H] of vocabulary block c.
            exponentials: [n, v], to be filled with exp(z - shift) times softcap's slope.
            rest: [n, K], sums of those of earlier tiles; brought to the new shift, in place.
        """
        multiply(x, hidden, weight.T, add=False)
        head, targets = self.logit_map(r, c), self.targets[slice(*r)]
        moved = rest if c[0] else None
        self.kernels.fold(
            x, head, targets, c[0], stats, out=exponentials, gain=self.gain, rest=moved
        )

    def target_entry(self, total: Tensor, target: Tensor, r: Range) -> Tensor:
        """J's entries at the targets, negated, [n]: the total times softcap's slope."""
        slope = self.logit_map(r, (0, self.vocab)).slope(target)
        return total if slope is None else total * slope

    def row_gain(self, total: Tensor) -> Tensor | float:
        """Powers of two [n] that keep J within the range of the products' dtype; |J| <= total."""
        return 2 * FP16_GAIN * unit_gain(total) if self.operand == torch.float16 else 1.0

    def row_factor(self, logprob: Tensor, total: Tensor) -> Tensor:
        """[n], the factor that J lacks to be softmax - onehot."""
        return row_factor(logprob, total) / self.row_gain(total)

    def jacobian_products(self, jacobian: Tensor) -> Tensor:
        """J W [n, H] from J [n, V]."""
        out = self.take("row products", jacobian.shape[0], self.width)
        for c in self.col_blocks():
            multiply(out, jacobian[:, slice(*c)], self.weight_rows(*c), add=c[0] > 0)
        return out


def row_factor(logprob: Tensor, total: Tensor) -> Tensor:
    """(1 - p) / total [n], the factor from J to softmax - onehot; 0 for a vocabulary of one."""
    return torch.where(total == 0, 0.0, -torch.expm1(logprob) / total)
