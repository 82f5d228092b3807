"""The sweeps of the engine: the problem cut into tiles, and every loop over them.

Letters: N scored tokens, P positions (scored or not), V vocabulary, H hidden size; n rows and v
vocabulary columns of the tile of logits that exists at a time. J is the negated Jacobian of the
log-probability with respect to the logits, but for one factor a row: see kernels/logit_tile.py.

What is done to a tile is a backend's, chosen by the call; the products and the order of everything
are the same for all.

Of a vocabulary in slices, one on each rank of a group, V and J are this rank's. The statistics of
the rows of a pass are merged over the group once they are complete, and so is the gradient with
respect to the hidden states: one collective each, never one a tile. Where exponentials are stored
before that (retain, one_pass) they are then still to be brought to the common shift: by a power of
two, and what is left of the factor goes to the row's other numbers.

What a sweep allocates is what fusedpo.plan counts; a buffer added here is to be added there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedpo.checks import TORCH
from fusedpo.distributed import VocabShard
from fusedpo.kernels import logit_tile
from fusedpo.kernels.logit_tile import MOST_STEPS, LogitMap, RowStats, power_of_two
from fusedpo.plan import FINISHED_ROWS, Backend, Needs, Plan, padded

# fp32 results of half-precision operands, on CUDA: torch.mm since 2.8; torch.addmm exists as long,
# but took an fp32 accumulator only later
_HAS_MM_OUT_DTYPE = TORCH >= (2, 8) and torch.version.hip is None
_HAS_ADDMM_OUT_DTYPE = TORCH >= (2, 10) and torch.version.hip is None


DIFFERENTIABLE = ("logprob", "entropy")
# what every forward leaves per token, for the backward
KEPT = ("logprob", "shift", "total")

# fp16 has few exponents: exponentials, at most 1, are stored this much larger, and Jacobians so
# that their largest entry, the total, is at most twice this
_FP16_GAIN = 2.0**14


class Groups(Protocol):
    """What ``one_pass`` knows of a loss.

    The gradient of a group of rows is known when its last row has been scored. Until then it is
    known up to one factor for each run of rows.
    """

    starts: Sequence[int]
    """Group i is rows starts[i] .. starts[i + 1]; it may be empty."""

    runs: Sequence[int]
    """Run i is rows runs[i] .. runs[i + 1]; no group begins within one."""

    def units(self, start: int, stop: int, stats: Mapping[str, Tensor]) -> Tensor:
        """[stop - start], the gradient of these rows up to one factor per run."""
        ...

    def gradient(self, first: int, last: int, stats: Mapping[str, Tensor]) -> Tensor:
        """Gradient of the loss with respect to the log-probabilities of groups first .. last.

        Here and in ``units``, stats are the statistics of the very rows asked for, by name.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """The scored tokens of a call.

    While a graph is traced their number is not known; then all positions are rows, and ``scored``
    tells them apart.

    Attributes:
        targets: [N] int64, labels of the scored tokens.
        positions: [N] int64 into the flattened labels, or None if every position is a row, in
            order.
        shape: shape of the labels.
        scored: [N] bool, or None if all rows are scored.
    """

    targets: Tensor
    positions: Tensor | None
    shape: torch.Size
    scored: Tensor | None = None

    @classmethod
    def all_of(cls, labels: Tensor, ignore_index: int) -> Rows:
        """Every position, scored or not."""
        flat = labels.reshape(-1).long()
        return cls(flat, None, labels.shape, flat != ignore_index)

    @classmethod
    def of(cls, labels: Tensor, ignore_index: int, count: int | None = None) -> Rows:
        """count: how many labels are scored, if that is known; else it is read from the device."""
        flat = labels.reshape(-1)
        scored = flat != ignore_index
        if count is None:
            count = int(scored.sum())
        if count == flat.shape[0]:
            # a copy: the caller may change the labels before the backward
            return cls(flat.to(torch.int64, copy=True), None, labels.shape)
        # nonzero() would wait for the device to learn the count; the ignored share one entry more
        rank = torch.where(scored, scored.cumsum(0) - 1, count)
        everywhere = torch.arange(flat.shape[0], device=flat.device)
        room = torch.empty(count + 1, dtype=torch.int64, device=flat.device)
        positions = room.scatter_(0, rank, everywhere)[:count]
        return cls(flat[positions].long(), positions, labels.shape)

    @property
    def count(self) -> int:
        return self.targets.shape[0]

    def reorder(self, order: Tensor) -> Rows:
        """The same tokens, row i being the former row order[i]."""
        positions = order if self.positions is None else self.positions[order]
        return Rows(self.targets[order], positions, self.shape)

    def gather(self, values: Tensor) -> Tensor:
        """[N] from values shaped like the labels."""
        flat = values.reshape(-1)
        if self.scored is not None:
            return torch.where(self.scored, flat, 0)
        return flat if self.positions is None else flat[self.positions]

    def scatter(self, values: Tensor) -> Tensor:
        """Shaped like the labels from [N]; 0 where ignored."""
        if self.positions is None:
            return values.reshape(self.shape)
        out = values.new_zeros(self.shape.numel())
        return out.index_put((self.positions,), values).reshape(self.shape)


def accumulated_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated, and kept per token: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """What the products take.

    On the CPU a half-precision product would round its result to half precision, so tiles of the
    operands are widened first; elsewhere the product accumulates and returns fp32 from
    half-precision operands.
    """
    device = hidden.device.type
    if device == "cpu":
        return accumulated_dtype(hidden.dtype)
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@dataclass(frozen=True)
class Call:
    """What a call to the engine carries besides its differentiable tensors."""

    rows: Rows
    softcap: float | None
    scale: float | Tensor  # logit_scale / temperature; a tensor is [N]
    plan: Plan
    needs: frozenset[Needs]
    stats: tuple[str, ...]
    operand: torch.dtype  # of the products; decided once, for a backward outside autocast
    backend: Backend
    differentiable: tuple[str, ...] = DIFFERENTIABLE
    groups: Groups | None = None
    states: Tensor | None = None  # [K] rows whose hidden states are wanted too
    shard: VocabShard | None = None  # of the vocabulary; None: all of it is here


def _blocks(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


def _product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
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
        _product(out, a.to(out.dtype), b.to(out.dtype), add=add)


def gathers(hidden: Tensor, rows: Rows) -> bool:
    """Whether rows of hidden have to be copied: some are left out, or they are no rectangle."""
    return rows.positions is not None or _flat(hidden)[1] is not None


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


class Tiles:
    """The problem cut into tiles: reads operands, makes logits, and runs the sweeps over them."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> None:
        # kernels read memory, which holds the negatives where the bit says so; then it is copied
        self.hidden, self.weight, self.call = hidden.resolve_neg(), weight.resolve_neg(), call
        self.bias = None if bias is None else bias.resolve_neg().contiguous()
        self.rows, self.plan = call.rows, call.plan
        self.acc = accumulated_dtype(hidden.dtype)
        self.operand = call.operand
        self.kernels = _kernels(call.backend)
        self.gain = _FP16_GAIN if call.operand == torch.float16 else 1.0
        self.vocab, self.width = weight.shape
        self.shard = call.shard
        # beyond this slice where another has it
        self.targets = call.rows.targets
        if self.shard is not None:
            self.targets = self.targets - self.shard.offset
        self.count = call.rows.count
        self.flat, self.steps = _flat(self.hidden)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.hidden.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.acc, device=self.hidden.device)

    def row_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        return _blocks(start, self.count if stop is None else stop, self.plan.rows)

    def col_blocks(self) -> Iterator[tuple[int, int]]:
        return _blocks(0, self.vocab, self.plan.cols)

    def tile(self, *, backward: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for one tile [rows, cols], in the accumulated dtype; sliced by its users.

        Rows start at multiples of 16 numbers, for loads of whole vectors.
        """
        p = self.plan
        rows, cols = (p.back_rows, p.back_cols) if backward else (p.rows, p.cols)
        shape = (min(rows, self.count), padded(cols))
        return torch.empty(shape, dtype=dtype or self.acc, device=self.hidden.device)

    def narrow_tile(self, *, backward: bool = False) -> Tensor | None:
        """Memory for a tile as products take it, if that is another dtype."""
        if self.operand == self.acc:
            return None
        return self.tile(backward=backward, dtype=self.operand)

    def full_rows(self, rows: int) -> Tensor:
        """Memory for rows of J [rows, V], as products take it."""
        shape = (rows, padded(self.vocab))
        block = torch.empty(shape, dtype=self.operand, device=self.hidden.device)
        return block[:, : self.vocab]

    def hidden_rows(self, start: int, stop: int) -> Tensor:
        """[n, H] in the operands' dtype."""
        places = self.places(start, stop)
        block = self.flat[start:stop] if places is None else self.flat[places]
        return block.to(self.operand)

    def places(self, start: int, stop: int) -> Tensor | None:
        """[n] int64, where rows start .. stop are among those in memory; None: right there."""
        positions = self.rows.positions
        if positions is not None:
            return self.in_memory(positions[start:stop])
        if self.steps is None:
            return None
        return self.in_memory(torch.arange(start, stop, device=self.hidden.device))

    def in_memory(self, positions: Tensor) -> Tensor:
        """Flattened positions, as rows in memory: by numbers that no device has to be sent."""
        if self.steps is None:
            return positions
        places = torch.zeros_like(positions)
        for size, step in zip(reversed(self.hidden.shape[:-1]), reversed(self.steps), strict=True):
            places += positions % size * step
            positions = positions // size
        return places

    def state_positions(self) -> Tensor:
        """[K] into the flattened positions, of the rows whose hidden states are wanted."""
        states, positions = self.call.states, self.rows.positions
        assert states is not None, "asked for only if there are some"
        return states if positions is None else positions[states]

    def states(self) -> Tensor:
        """[K, H] in full precision."""
        return self.flat[self.in_memory(self.state_positions())].to(self.acc)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """[v, H] in the operands' dtype."""
        return self.weight[start:stop].to(self.operand)

    def scale_rows(self, start: int, stop: int) -> float | Tensor:
        scale = self.call.scale
        return scale[start:stop] if isinstance(scale, Tensor) else scale

    def scaled(self, values: Tensor, start: int, stop: int) -> Tensor:
        """values [n] times the rows' scale."""
        return values * self.scale_rows(start, stop)

    def logit_map(self, r: tuple[int, int], c: tuple[int, int]) -> LogitMap:
        """What makes logits of the products of row block r and vocabulary block c."""
        bias = None if self.bias is None else self.bias[slice(*c)]
        return LogitMap(bias, self.call.softcap, self.scale_rows(*r))

    def start_stats(self) -> RowStats:
        asked = self.call.stats
        return RowStats.start(
            self.count,
            self.empty(0),
            entropy="entropy" in asked,
            squares="log_sum_sq_probs" in asked,
            mean="mean_logit" in asked,
        )

    def results(self, stats: RowStats) -> dict[str, Tensor]:
        """[N] of every statistic that is kept or asked for, after all tiles."""
        found = {}
        for name in dict.fromkeys((*KEPT, *self.call.stats)):
            if name == "mean_logit":
                assert stats.plain is not None, "start_stats() asks for it"
                whole = self.vocab if self.shard is None else self.shard.total
                found[name] = stats.plain / whole
            else:
                found[name] = getattr(stats, name)
        return found

    def new_hidden_gradient(self) -> Tensor:
        """[P, H] in hidden's dtype; 0 at positions that are not scored."""
        shape = (self.hidden.shape[:-1].numel(), self.width)
        make = torch.empty if self.rows.positions is None else torch.zeros
        return make(shape, dtype=self.hidden.dtype, device=self.hidden.device)

    @property
    def unit_is_output(self) -> bool:
        """Whether dlogp/dhidden waits for the backward in the memory of the hidden gradient."""
        return self.hidden.dtype == self.acc or not self.plan.wide

    def new_unit(self) -> Tensor:
        """Memory for dlogp/dhidden: [P, H] in hidden's dtype, or [N, H] in full precision."""
        if self.unit_is_output:
            return self.new_hidden_gradient()
        return self.empty(self.count, self.width)

    def write_unit(self, unit: Tensor, r: tuple[int, int], values: Tensor) -> None:
        if self.unit_is_output:
            self.write_rows(unit, *r, values)
        else:
            unit[slice(*r)] = values

    def finish_unit(self, unit: Tensor, g: Tensor) -> Tensor:
        """The hidden gradient [P, H]: g [N] times unit, in place if unit is the output."""
        if self.unit_is_output:
            factor = self.at_positions(g)[:, None]
            # in blocks: a half-precision tensor times fp32 is widened whole
            for start, stop in _blocks(0, unit.shape[0], self.plan.rows):
                part = unit[start:stop]
                part.copy_(part * factor[start:stop])
            return unit
        out = self.new_hidden_gradient()
        for r in self.row_blocks():
            self.write_rows(out, *r, unit[slice(*r)] * g[slice(*r), None])
        return out

    def finish_head(self, head: HeadGradient, factor: Tensor) -> HeadGradient:
        """factor times the head's gradient in the head's dtype; in place in full precision."""
        weight = head.weight
        if weight is None or weight.dtype == self.weight.dtype:
            return head.scale(factor)
        out = torch.empty_like(weight, dtype=self.weight.dtype)
        for c in self.col_blocks():
            out[slice(*c)] = weight[slice(*c)] * factor
        return HeadGradient(out, None if head.bias is None else head.bias * factor)

    def new_head_gradient(self, *, weight: bool, bias: bool) -> HeadGradient:
        """weight in the head's dtype, its slices to be written once; bias accumulated."""
        # without a row nothing would be written
        make = torch.empty if self.count else torch.zeros
        device = self.hidden.device
        return HeadGradient(
            make(self.weight.shape, dtype=self.weight.dtype, device=device) if weight else None,
            make(self.vocab, dtype=self.acc, device=device) if bias else None,
        )

    def at_positions(self, values: Tensor) -> Tensor:
        """[P] from values [N]; 0 at positions that are not scored."""
        return self.rows.scatter(values).reshape(-1)

    def write_rows(self, out: Tensor, start: int, stop: int, values: Tensor) -> None:
        """values [n, H] to their positions in out [P, H]."""
        positions = self.rows.positions
        if positions is None:
            out[start:stop] = values
        else:
            out[positions[start:stop]] = values.to(out.dtype)

    # over the slices of a vocabulary

    def merge(self, stats: RowStats) -> Tensor | None:
        """Statistics of this slice become those of the whole vocabulary, in place.

        Returns [n], what sums of this slice are still to be multiplied with; None: nothing.
        """
        return None if self.shard is None else self.shard.merge(stats)

    def partial(self, unit: Tensor | None) -> Tensor | None:
        """Memory [N, H] in full precision for this slice's part of dlogp/dhidden: unit, if it is
        that; None without slices, whose parts have to be added up."""
        if unit is None or self.shard is None:
            return None
        whole = not self.unit_is_output or self.rows.positions is None
        return unit if whole and unit.dtype == self.acc else self.empty(self.count, self.width)

    def add_up(self, partial: Tensor | None, unit: Tensor | None) -> None:
        """The sum of all slices' parts into unit."""
        if partial is None or unit is None or self.shard is None:
            return
        self.shard.add_up(partial)
        if partial is not unit:
            self.write_rows(unit, 0, self.count, partial)

    # the forward sweeps

    def sweep_forward(self, unit: Tensor | None) -> dict[str, Tensor]:
        """Statistics of all rows; with ``unit`` [P, H], also dlogp/dhidden into it."""
        if self.plan.fused:
            return self.fused_forward()
        everything = self.start_stats()
        buffer, narrow = self.tile(), None if unit is None else self.narrow_tile()
        # what has to wait for the statistics of the whole vocabulary
        waiting = self.partial(unit)
        for r in self.row_blocks():
            hidden, n = self.hidden_rows(*r), r[1] - r[0]
            stats = everything.of(slice(*r))
            # sum over non-target entries of exp(z - shift) slope W, relative to the shift so far
            rest = None
            if waiting is not None:
                rest = waiting[slice(*r)].zero_()
            elif unit is not None:
                rest = self.zeros(n, self.width)
            for c in self.col_blocks():
                x = buffer[:n, : c[1] - c[0]]
                e = None if unit is None else x if narrow is None else narrow[:n, : c[1] - c[0]]
                self.fold_tile(x, hidden, r, c, stats, e, rest)
            if unit is not None and rest is not None and waiting is None:
                self.finish(unit, rest, stats, r)
            del hidden, rest  # before the next block's are made
        rescale = self.merge(everything)
        if waiting is not None:
            for r in self.row_blocks():
                self.finish_partial(waiting[slice(*r)], everything.of(slice(*r)), r, rescale)
            self.add_up(waiting, unit)
        return self.results(everything)

    def fused_forward(self) -> dict[str, Tensor]:
        """Statistics of all rows by one kernel, which holds no logits."""
        from fusedpo.kernels.product_fold import product_fold

        asked = self.call.stats
        found = product_fold(
            self.flat,
            self.weight,
            self.targets,
            positions=self.places(0, self.count),
            bias=self.bias,
            softcap=self.call.softcap,
            scale=self.call.scale,
            entropy="entropy" in asked,
            squares="log_sum_sq_probs" in asked,
            mean="mean_logit" in asked,
        )
        target = found["target"]
        if self.shard is not None:
            here = (self.targets >= 0) & (self.targets < self.vocab)
            target = target.masked_fill(~here, -torch.inf)
        stats = RowStats(
            peak=found["peak"],
            shift=found["peak"].masked_fill(found["peak"] == -torch.inf, 0.0),
            steps=torch.zeros_like(found["peak"]),
            total=found["total"],
            target=target,
            weighted=found.get("weighted"),
            squares=found.get("squares"),
            plain=found.get("plain"),
        )
        self.merge(stats)
        return self.results(stats)

    def fold_tile(
        self,
        x: Tensor,
        hidden: Tensor,
        r: tuple[int, int],
        c: tuple[int, int],
        stats: RowStats,
        e: Tensor | None = None,
        rest: Tensor | None = None,
    ) -> None:
        """Products of one tile into x, folded into stats, exponentials into e and, times W, rest.

        A function of its own, so that its temporaries go with it.
        """
        weight, head = self.weight_rows(*c), self.logit_map(r, c)
        _product(x, hidden, weight.T, add=False)
        targets = self.targets[slice(*r)]
        moved = rest if c[0] else None
        self.kernels.fold(x, head, targets, c[0], stats, out=e, gain=self.gain, rest=moved)
        if rest is not None and e is not None:
            _product(rest, e, weight, add=True)

    def finish(
        self,
        unit: Tensor,
        rest: Tensor,
        stats: RowStats,
        r: tuple[int, int],
    ) -> None:
        """dlogp/dhidden of a finished row block into unit, from its sum over non-target entries."""
        positions = self.rows.positions
        if not self.unit_is_output:
            unit, positions = unit[slice(*r)], None
        elif positions is None:
            unit = unit[slice(*r)]
        else:
            positions = positions[slice(*r)]
        factor = row_factor(stats.logprob, stats.total)
        self.kernels.finish(
            rest,
            self.scaled(-factor / self.gain, *r),
            self.weight,
            self.targets[slice(*r)],
            self.scaled(factor * self.own_entry(stats.total, stats.target, r), *r),
            unit,
            positions,
            block=FINISHED_ROWS,
        )

    def finish_partial(
        self, rest: Tensor, stats: RowStats, r: tuple[int, int], rescale: Tensor | None
    ) -> None:
        """Likewise this slice's part of it, in place."""
        assert rescale is not None, "slices have been merged"
        factor, targets = row_factor(stats.logprob, stats.total), self.targets[slice(*r)]
        here = (targets >= 0) & (targets < self.vocab)
        own = factor * self.own_entry(stats.total, stats.target, r)
        self.kernels.finish(
            rest,
            self.scaled(-factor * rescale[slice(*r)] / self.gain, *r),
            self.weight,
            targets.clamp(0, self.vocab - 1),
            self.scaled(torch.where(here, own, 0.0), *r),
            rest,
            None,
            block=FINISHED_ROWS,
        )

    def own_entry(self, total: Tensor, target: Tensor, r: tuple[int, int]) -> Tensor:
        """What J holds at the targets, negated, [n]: the total times softcap's slope."""
        slope = self.logit_map(r, (0, self.vocab)).slope(target)
        return total if slope is None else total * slope

    def full_rows_of_exponentials(
        self,
        out: Tensor,
        tile: Tensor | None,
        hidden: Tensor,
        r: tuple[int, int],
        stats: RowStats,
        steps: Tensor,
    ) -> None:
        """What J is made of in a row block, all of its vocabulary, into out [n, V]; its statistics
        into stats; how far each tile's are from the first shift into steps [tiles, n]."""
        for i, c in enumerate(self.col_blocks()):
            e = out[:, slice(*c)]
            x = e if tile is None else tile[: r[1] - r[0], : c[1] - c[0]]
            self.fold_tile(x, hidden, r, c, stats, e)
            steps[i] = stats.steps

    def new_steps(self, rows: int) -> Tensor:
        return self.empty(-(-self.vocab // self.plan.cols), rows)

    def leave(self, stats: RowStats, rescale: Tensor | None) -> tuple[Tensor | float, Tensor]:
        """How J differs from the merged statistics, and the steps at which it is, [n].

        J's shift is whole steps from where the slice's exponentials are, so that bringing them
        there is exact. J is then what it would be at the common shift over a number in [1, 2).
        """
        if rescale is None:
            return 1.0, stats.steps
        half, exponent = torch.frexp(rescale)
        # 0: nothing here, or nothing that counts beside the others
        none = rescale == 0
        down = (1 - exponent).to(self.acc).masked_fill(none, 2.0 * MOST_STEPS)
        return (2 * half).masked_fill(none, 1.0), stats.steps + down

    def settle(
        self,
        out: Tensor,
        r: tuple[int, int],
        target: Tensor,
        total: Tensor,
        steps: Tensor,
        last: Tensor,
    ) -> None:
        """Rows of exponentials become J.

        Args:
            out: [n, V]. target, total: [n], the targets' logits and what J adds up to.
            steps: [tiles, n], where each tile's exponentials are; last: [n], where J's are.
        """
        narrow = self.row_gain(total)
        # powers of two
        factors = power_of_two(steps - last) * (narrow / self.gain)
        own = -self.own_entry(total, target, r) * narrow
        self.kernels.settle(out, self.targets[slice(*r)], own, factors, self.plan.cols)

    def row_gain(self, total: Tensor) -> Tensor | float:
        """Powers of two [n] that keep J within the range of the products' dtype; |J| <= total."""
        return 2 * _FP16_GAIN * _power_of_two(total) if self.operand == torch.float16 else 1.0

    def factor(self, logprob: Tensor, total: Tensor) -> Tensor:
        """[n], what J lacks to be softmax - onehot."""
        return row_factor(logprob, total) / self.row_gain(total)

    def row_products(self, jacobian: Tensor) -> Tensor:
        """J W [n, H] from J [n, V]."""
        out = self.empty(jacobian.shape[0], self.width)
        for c in self.col_blocks():
            _product(out, jacobian[:, slice(*c)], self.weight_rows(*c), add=c[0] > 0)
        return out

    def sweep_retain(self, kept: Tensor) -> dict[str, Tensor]:
        """Statistics of all rows, and J into kept [N, V].

        Of a slice of a vocabulary, the shift and the total are those of its J.
        """
        everything = self.start_stats()
        over = self.rows_of_jacobian(kept, (0, self.count), self.hidden_rows, everything)
        found = self.results(everything)
        if isinstance(over, Tensor):
            found["shift"] = everything.shift + over.log()
            found["total"] = everything.total / over
        return found

    def rows_of_jacobian(
        self,
        out: Tensor,
        b: tuple[int, int],
        hidden_rows: Callable[[int, int], Tensor],
        everything: RowStats,
    ) -> Tensor | float:
        """J of rows b into out, over a number that is returned, 1 or [n]; their statistics into
        everything, merged over all slices."""
        tile = None if self.operand == self.acc else self.tile()
        # of a row block that is settled at once, or of all rows, which wait for the other slices
        waiting = None if self.shard is None else self.new_steps(b[1] - b[0])
        for r in self.row_blocks(*b):
            own, stats = slice(r[0] - b[0], r[1] - b[0]), everything.of(slice(*r))
            steps = self.new_steps(r[1] - r[0]) if waiting is None else waiting[:, own]
            self.full_rows_of_exponentials(out[own], tile, hidden_rows(*r), r, stats, steps)
            if waiting is None:
                self.settle(out[own], r, stats.target, stats.total, steps, stats.steps)
        stats = everything.of(slice(*b))
        over, last = self.leave(stats, self.merge(stats))
        if waiting is not None:
            total = stats.total / over
            for r in self.row_blocks(*b):
                own = slice(r[0] - b[0], r[1] - b[0])
                self.settle(out[own], r, stats.target[own], total[own], waiting[:, own], last[own])
        return over

    def sweep_one_pass(
        self, unit: Tensor | None, out: HeadGradient, groups: Groups
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Statistics of all rows; dlogp/dhidden into unit, the head's gradient into out.

        Returns also the gradient [N] that the head's was formed with.

        A group's gradient has to be known when its last row has been scored, so the slices of a
        vocabulary are merged slab by slab.
        """
        everything = self.start_stats()
        upstream = self.zeros(self.count)
        slab_buffer = self.full_rows(min(self.plan.slab, self.count))
        partial_unit = self.partial(unit)
        # accumulators of runs that wait for the rest of their group, and those that are free: with
        # a single group the output itself
        waiting: list[tuple[slice, HeadGradient]] = []
        spare = [out] if len(groups.starts) == 2 else []
        for b in _blocks(0, self.count, self.plan.slab):
            z, hidden = slab_buffer[: b[1] - b[0]], self.hidden_rows(*b)
            over = self.rows_of_jacobian(z, b, _part_of(hidden, b[0]), everything)
            stats = everything.of(slice(*b))
            factor = self.factor(stats.logprob, stats.total / over)
            if unit is not None:
                for r in self.row_blocks(*b):
                    own = slice(r[0] - b[0], r[1] - b[0])
                    products = self.row_products(z[own])
                    products.mul_(self.scaled(-factor[own], *r)[:, None])
                    if partial_unit is not None:
                        partial_unit[slice(*r)] = products
                    else:
                        self.write_unit(unit, r, products)
                    del products
            for first, last, start, stop, ends in _pieces(groups.starts, *b):
                if not ends:
                    for run in _cut(groups.runs, start, stop):
                        within = slice(run[0] - b[0], run[1] - b[0])
                        unit_g = self.units(groups, everything, slice(*run))
                        coefficient = -self.scaled(unit_g * factor[within], *run)
                        begin = groups.runs[bisect_right(groups.runs, run[0]) - 1]
                        if begin < run[0]:  # its first part waits already
                            _, partial = waiting.pop()
                        else:
                            partial = spare.pop() if spare else out.like()
                        waiting.append((slice(begin, run[1]), partial))
                        self.add_head_gradient(partial, z[within], hidden[within], coefficient)
                    continue
                whole = slice(groups.starts[first], stop)
                g = groups.gradient(first, last, self.results(everything.of(whole)))
                upstream[whole] = g
                for part, partial in waiting:
                    of_part = g[part.start - whole.start : part.stop - whole.start]
                    slope = ratio(of_part, self.units(groups, everything, part))
                    if partial is out:  # the first of them, and alone so far
                        out.scale(slope)
                    else:
                        out.add(partial, slope)
                        partial.empty = True
                        spare.append(partial)
                waiting.clear()
                within = slice(start - b[0], stop - b[0])
                coefficient = -self.scaled(upstream[start:stop] * factor[within], start, stop)
                self.add_head_gradient(out, z[within], hidden[within], coefficient)
        out.finished()
        self.add_up(partial_unit, unit)
        return self.results(everything), upstream

    def units(self, groups: Groups, everything: RowStats, rows: slice) -> Tensor:
        """[n], the gradient of these rows up to one factor per run."""
        stats = self.results(everything.of(rows))
        return groups.units(rows.start, rows.stop, stats).to(self.acc)

    # the backward sweeps

    def add_head_gradient(
        self, out: HeadGradient, jacobian: Tensor, hidden: Tensor, coefficient: Tensor
    ) -> None:
        """out += J^T (c h) for J [n, V], h [n, H], c [n]."""
        rows = self.weighted(hidden, coefficient if out.weight is not None else None)
        for c in self.col_blocks():
            weight, bias = out.slices(c)
            self.add_slice(weight, bias, jacobian[:, slice(*c)], rows, coefficient, not out.empty)
        out.empty = False

    def weighted(self, hidden: Tensor, coefficient: Tensor | None) -> Tensor:
        """c h [n, H] in the operands' dtype, computed in full precision; None: h as it is."""
        if coefficient is None:
            return hidden
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        return torch.mul(hidden, coefficient[:, None], out=out)

    def add_slice(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        jacobian: Tensor,
        rows: Tensor,
        coefficient: Tensor | None,
        add: bool,
    ) -> None:
        """A slice of the head's gradient: weight (+)= J^T (c h), bias (+)= J^T c, for J [n, v].

        rows: c h [n, H]. coefficient None: c is in J, and rows are h.
        """
        if weight is not None:
            _product(weight, jacobian.T, rows, add=add)
        if bias is None:
            return
        if coefficient is None:
            coefficient = torch.ones_like(jacobian[:, 0], dtype=self.acc)
        if self.operand == self.acc:
            bias.addmv_(jacobian.T, coefficient, beta=int(add))
            return
        # in two parts, so that the products' dtype does not round it
        high = coefficient.to(self.operand)
        parts = torch.stack((high, (coefficient - high.to(self.acc)).to(self.operand)), 1)
        sums = self.empty(bias.shape[0], 2)
        _product(sums, jacobian.T, parts, add=False)
        bias.copy_(sums.sum(1).add_(bias) if add else sums.sum(1))

    def sweep_head(
        self,
        stats: dict[str, Tensor],
        upstream: Tensor,
        upstream_entropy: Tensor | None,
        out: HeadGradient,
        hidden_gradient: Tensor | None = None,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Recompute the logits, a slice of the vocabulary at a time, and write the gradients.

        Each slice of out.weight is written once. hidden_gradient [rows, H] is accumulated over the
        slices; it is wanted here only with a gradient through the entropy, and for the given rows
        only.
        """
        if not self.count:
            return
        buffer, narrow = self.tile(backward=True), self.narrow_tile(backward=True)
        scratch = self.slice_scratch(out)
        first, last = rows or (0, self.count)
        j, gain = self.row_coefficients(stats, upstream, upstream_entropy)
        blocks = self.row_operands(first, last, j.left if out.weight is not None else None)
        for c in _blocks(0, self.vocab, self.plan.back_cols):
            part, bias_part = out.slices(c, scratch)
            weight = self.weight_rows(*c)
            for r, hidden, weighted in blocks():
                x = buffer[: r[1] - r[0], : c[1] - c[0]]
                z = x if narrow is None else narrow[: r[1] - r[0], : c[1] - c[0]]
                own = j.of(slice(*r))
                _product(x, hidden, weight.T, add=False)
                self.kernels.jacobian(
                    x,
                    self.logit_map(r, c),
                    self.targets[slice(*r)],
                    c[0],
                    stats["shift"][slice(*r)],
                    own.own,
                    factor=own.factor,
                    tilt=own.tilt,
                    out=z,
                )
                self.add_slice(part, bias_part, z, weighted, own.left, r[0] > first)
                if hidden_gradient is not None:
                    piece = hidden_gradient[r[0] - first : r[1] - first]
                    _product(piece, z, weight, add=c[0] > 0)
                del hidden, weighted
            del weight
            self.write_slice(out, c, part, bias_part, gain)
        if hidden_gradient is not None:
            if j.left is not None:
                hidden_gradient.mul_(j.left[first:last, None])
            _divide(gain, hidden_gradient)

    def row_operands(
        self, first: int, last: int, coefficient: Tensor | None
    ) -> Callable[[], Iterator[tuple[tuple[int, int], Tensor, Tensor]]]:
        """The backward's row blocks: (range, h [n, H], c h [n, H]), as often as they are asked for.

        A single block is gathered and weighted once for all slices of the vocabulary.
        """

        def blocks() -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
            for r in _blocks(first, last, self.plan.back_rows):
                hidden = self.hidden_rows(*r)
                own = None if coefficient is None else coefficient[slice(*r)]
                yield r, hidden, self.weighted(hidden, own)
                del hidden

        if last - first > self.plan.back_rows:
            return blocks
        only = list(blocks())
        return lambda: iter(only)

    def slice_scratch(self, out: HeadGradient) -> Tensor | None:
        """Memory for a slice of the head's gradient in full precision, if the head is not."""
        if out.weight is None or out.weight.dtype == self.acc:
            return None
        return self.empty(min(self.plan.back_cols, self.vocab), self.width)

    def write_slice(
        self,
        out: HeadGradient,
        c: tuple[int, int],
        part: Tensor | None,
        bias_part: Tensor | None,
        gain: Tensor | None,
    ) -> None:
        """A finished slice, divided by the gain, into the head's gradient."""
        _divide(gain, part, bias_part)
        if out.weight is not None and part is not None and part.dtype != out.weight.dtype:
            out.weight[slice(*c)] = part[: c[1] - c[0]]

    def row_coefficients(
        self, stats: dict[str, Tensor], g: Tensor, e: Tensor | None
    ) -> tuple[RowCoefficients, Tensor | None]:
        """The numbers of each row [N] that make J the gradient of sum(g logp + e entropy), and the
        power of two that the gradients are then too large by, or None.
        """
        fp16 = self.operand == torch.float16
        if e is not None:
            g, e = self.scaled(g, 0, self.count), self.scaled(e, 0, self.count)
            gain = None
            if fp16:
                gain = 2.0**10 * _power_of_two(_largest(torch.cat((g, e))))
                g, e = g * gain, e * gain
            factor, tilt, own = entropy_coefficients(stats, -g, -e)
            return RowCoefficients(own, factor, tilt, None), gain
        narrow = self.row_gain(stats["total"])
        left = -self.scaled(g * self.factor(stats["logprob"], stats["total"]), 0, self.count)
        own = -stats["total"] * narrow
        if self.kernels.ABSORBS_FACTORS and not fp16:
            return RowCoefficients(own * left, left, None, None), None
        if not fp16:
            return RowCoefficients(own, None, None, left), None
        gain = _power_of_two(_largest(left))
        return RowCoefficients(own, narrow, None, left * gain), gain  # type: ignore[arg-type]

    def sweep_kept(
        self,
        kept: Tensor,
        stats: dict[str, Tensor],
        upstream: Tensor,
        out: HeadGradient,
        hidden_gradient: Tensor | None,
    ) -> None:
        """All gradients from the retained J [N, V], left as it is; hidden_gradient is [P, H]."""
        factor = self.factor(stats["logprob"], stats["total"])
        coefficient = -self.scaled(upstream * factor, 0, self.count)
        if hidden_gradient is not None:
            partial = self.partial(hidden_gradient)
            for r in self.row_blocks():
                rows = self.row_products(kept[slice(*r)])
                rows.mul_(coefficient[slice(*r), None])
                if partial is not None:
                    partial[slice(*r)] = rows
                else:
                    self.write_rows(hidden_gradient, *r, rows)
                del rows
            self.add_up(partial, hidden_gradient)
            del partial
        if not self.count:
            return
        gain = None
        if self.operand == torch.float16:
            gain = _power_of_two(_largest(coefficient))
            coefficient = coefficient * gain
        scratch = self.slice_scratch(out)
        blocks = self.row_operands(0, self.count, coefficient if out.weight is not None else None)
        for c in _blocks(0, self.vocab, self.plan.back_cols):
            part, bias_part = out.slices(c, scratch)
            for r, _, weighted in blocks():
                tile, own = kept[slice(*r), slice(*c)], coefficient[slice(*r)]
                self.add_slice(part, bias_part, tile, weighted, own, r[0] > 0)
                del weighted
            self.write_slice(out, c, part, bias_part, gain)

    def both_gradients(
        self,
        stats: dict[str, Tensor],
        g: Tensor,
        e: Tensor | None,
        head: HeadGradient,
        need_hidden: bool,
    ) -> Tensor | None:
        """Gradients of sum(g logp + e entropy): the head's into head; returns the hidden [P, H]."""
        out = accumulated = None
        apart = self.plan.split or not head.wanted
        if need_hidden:
            out = self.new_hidden_gradient()
            if self.shard is not None or not apart:
                in_place = out.dtype == self.acc and self.rows.positions is None
                accumulated = out if in_place else self.empty(self.count, self.width)
        if out is not None and apart:
            for r in self.row_blocks():
                if accumulated is not None:
                    part = accumulated[slice(*r)]
                else:
                    part = self.empty(r[1] - r[0], self.width)
                self.sweep_head(stats, g, e, HeadGradient(None, None), part, r)
                if accumulated is None:
                    self.write_rows(out, *r, part)
        if head.wanted:
            self.sweep_head(stats, g, e, head, None if apart else accumulated)
        if out is not None and accumulated is not None:
            if self.shard is not None:
                self.shard.add_up(accumulated)
            if accumulated is not out:
                self.write_rows(out, 0, self.count, accumulated)
        return out


@dataclass(frozen=True)
class RowCoefficients:
    """What makes a gradient of a tile's exponentials; each [N] or None. See logit_tile.jacobian."""

    own: Tensor
    factor: Tensor | None
    tilt: Tensor | None
    left: Tensor | None  # what J still lacks; None: nothing

    def of(self, rows: slice) -> RowCoefficients:
        return RowCoefficients(
            *(None if t is None else t[rows] for t in (self.own, self.factor, self.tilt, self.left))  # type: ignore[arg-type]
        )


def _kernels(backend: Backend) -> Any:
    """The module whose functions work on tiles: fold, settle, jacobian."""
    if backend == "torch":
        return logit_tile
    # Triton is not there on every platform
    import fusedpo.kernels.logit_tile_triton as kernels

    return kernels


def entropy_coefficients(
    stats: dict[str, Tensor], g: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """factor, tilt and own [N] of the negated gradient of sum(g logp + e entropy) by the logits:

    g (P - onehot) + e P (log P + entropy), P being exp(z - shift) exp(shift - logsumexp).
    """
    logprob, entropy = stats["logprob"], stats["entropy"]
    below = logit_tile.below_logsumexp(logprob, stats["total"])
    weight, below = below.exp(), below.clamp(min=logit_tile.LOWEST)
    finite = logprob.clamp(min=logit_tile.LOWEST)
    own = g * torch.expm1(logprob) + e * finite.exp() * (finite + entropy)
    return weight * (g + e * (below + entropy)), weight * e, own


def row_factor(logprob: Tensor, total: Tensor) -> Tensor:
    """(1 - p) / total [n], what J lacks to be softmax - onehot; 0 for a vocabulary of one."""
    return torch.where(total == 0, 0.0, -torch.expm1(logprob) / total)


def _power_of_two(values: Tensor) -> Tensor:
    """The power of two that brings each |value| into [1/2, 1); 1 for 0 and what is not finite.

    Found on the device. Without such factors fp16 products over- and underflow: a gradient that is
    a mean over many tokens is smaller than fp16's least number.
    """
    usable = torch.isfinite(values) & (values != 0)
    exponent = torch.frexp(torch.where(usable, values.abs(), 1.0)).exponent
    return power_of_two(-exponent.to(values.dtype))


def _divide(gain: Tensor | None, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if gain is not None and tensor is not None:
            tensor.div_(gain)


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax() if values.numel() else values.new_ones(())


def ratio(g: Tensor, a: Tensor) -> Tensor:
    """The factor f with g = f a, a number on the device."""
    g, a = g.double(), a.double()
    square = torch.dot(a, a)
    return torch.where(square == 0, 0.0, torch.dot(g, a) / square)


def _part_of(hidden: Tensor, begin: int) -> Callable[[int, int], Tensor]:
    """Rows start .. stop of hidden, whose first row is row ``begin``."""
    return lambda start, stop: hidden[start - begin : stop - begin]


def _pieces(
    starts: Sequence[int], begin: int, end: int
) -> Iterator[tuple[int, int, int, int, bool]]:
    """Cut rows begin .. end at group borders; groups that end within are taken together.

    Yields (first group, last group + 1, start, stop, whether the last group ends here). Only the
    first piece can hold a group that began before.
    """
    position = begin
    while position < end:
        # the last of those that start here, as the others are empty
        group = bisect_right(starts, position) - 1
        last = bisect_right(starts, end) - 1
        if starts[group] < position and last > group:
            last = group + 1  # by itself, as part of it is elsewhere
        ends = last > group
        stop = starts[last] if ends else end
        yield group, last if ends else group + 1, position, stop, ends
        position = stop


def _cut(borders: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """begin .. end, cut at the borders within."""
    while begin < end:
        stop = min(borders[bisect_right(borders, begin)], end)
        yield begin, stop
        begin = stop


@dataclass
class HeadGradient:
    """The head's gradient: weight [V, H], bias [V]; None: not wanted.

    empty: nothing has been added yet, and what is in memory means nothing. To begin with zeros
    would be a pass over all of it.
    """

    weight: Tensor | None
    bias: Tensor | None
    empty: bool = False

    @property
    def wanted(self) -> bool:
        return self.weight is not None or self.bias is not None

    def slices(
        self, c: tuple[int, int], scratch: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The parts of vocabulary block c; the weight's in scratch [v, H], if that is given."""
        weight = self.weight if scratch is None else scratch
        start, stop = c if scratch is None else (0, c[1] - c[0])
        return (
            None if weight is None else weight[start:stop],
            None if self.bias is None else self.bias[slice(*c)],
        )

    def like(self) -> HeadGradient:
        weight, bias = (
            None if t is None else torch.empty_like(t) for t in (self.weight, self.bias)
        )
        return HeadGradient(weight, bias, empty=True)

    def scale(self, factor: Tensor) -> HeadGradient:
        for t in (self.weight, self.bias):
            if t is not None:
                t.mul_(factor)
        return self

    def add(self, other: HeadGradient, factor: Tensor) -> None:
        for t, o in ((self.weight, other.weight), (self.bias, other.bias)):
            if t is None or o is None:
                continue
            if self.empty:
                torch.mul(o, factor.to(o.dtype), out=t)
            else:
                t.addcmul_(o, factor.to(o.dtype))
        self.empty = False

    def finished(self) -> None:
        """Nothing more will be added: what is empty is zero."""
        for t in (self.weight, self.bias):
            if t is not None and self.empty:
                t.zero_()
        self.empty = False

    def clone(self) -> HeadGradient:
        weight, bias = (None if t is None else t.clone() for t in (self.weight, self.bias))
        return HeadGradient(weight, bias)

    def to(self, weight: torch.dtype, bias: torch.dtype | None) -> HeadGradient:
        return HeadGradient(
            None if self.weight is None else self.weight.to(weight),
            None if self.bias is None else self.bias.to(bias),
        )
