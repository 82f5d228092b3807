"""The sweeps of the engine: the problem cut into tiles, and every loop over them.

Letters: N scored tokens, P positions (scored or not), V vocabulary, H hidden size; n rows and v
vocabulary columns of the tile of logits that exists at a time. J = softmax(z) - onehot(y), the
negated Jacobian of the log-probability with respect to the logits.

What a sweep allocates is what fusedpo.plan counts; a buffer added here is to be added there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fusedpo.kernels.logit_tile import (
    RowStats,
    fold_torch,
    jacobian_torch,
    softcap_slope_torch,
    weighted_jacobian_torch,
)
from fusedpo.plan import Needs, Plan

# torch.mm(..., out_dtype=torch.float32) from half-precision operands exists since 2.8, for CUDA
_HAS_OUT_DTYPE = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 8)


class Groups(Protocol):
    """What ``one_pass`` knows of a loss: groups of rows with a gradient known up to one factor."""

    starts: Sequence[int]
    """Group i is rows starts[i] .. starts[i + 1]."""

    def units(self, start: int, stop: int) -> Tensor:
        """[stop - start], the gradient of these rows up to one factor per group."""
        ...

    def gradient(self, first: int, last: int, logprob: Tensor) -> Tensor:
        """Gradient of the loss with respect to ``logprob``, the rows of groups first .. last."""
        ...


@dataclass(frozen=True)
class Rows:
    """The scored tokens of a call.

    Attributes:
        targets: [N] int64, labels of the scored tokens.
        positions: [N] int64 into the flattened labels, or None if every position is scored, in
            order.
        shape: shape of the labels.
    """

    targets: Tensor
    positions: Tensor | None
    shape: torch.Size

    @classmethod
    def of(cls, labels: Tensor, ignore_index: int) -> Rows:
        flat = labels.reshape(-1)
        scored = flat != ignore_index
        if bool(scored.all()):
            return cls(flat.long(), None, labels.shape)
        positions = scored.nonzero()[:, 0]
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
    groups: Groups | None
    operand: torch.dtype  # of the products; decided once, for a backward outside autocast


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
    elif out.device.type == "cuda" and _HAS_OUT_DTYPE:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        _product(out, a.to(out.dtype), b.to(out.dtype), add=add)


class Tiles:
    """The problem cut into tiles: reads operands, makes logits, and runs the sweeps over them."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> None:
        self.hidden, self.weight, self.bias, self.call = hidden, weight, bias, call
        self.rows, self.plan = call.rows, call.plan
        self.acc = accumulated_dtype(hidden.dtype)
        self.operand = call.operand
        self.vocab, self.width = weight.shape
        self.count = call.rows.count
        try:
            self.flat: Tensor | None = hidden.view(-1, self.width)
        except RuntimeError:  # a slice that cannot be flattened without a copy of all of it
            self.flat = None

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.hidden.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.acc, device=self.hidden.device)

    def row_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        return _blocks(start, self.count if stop is None else stop, self.plan.rows)

    def col_blocks(self) -> Iterator[tuple[int, int]]:
        return _blocks(0, self.vocab, self.plan.cols)

    def tile(self) -> Tensor:
        """Memory for one tile; sliced by ``view_tile``."""
        return self.empty(self.plan.rows * self.plan.cols)

    @staticmethod
    def view_tile(buffer: Tensor, n: int, v: int) -> Tensor:
        return buffer[: n * v].view(n, v)

    def hidden_rows(self, start: int, stop: int) -> Tensor:
        """[n, H] in the operands' dtype."""
        positions = self.rows.positions
        if self.flat is not None:
            block = self.flat[start:stop] if positions is None else self.flat[positions[start:stop]]
        else:
            if positions is None:
                chosen = torch.arange(start, stop, device=self.hidden.device)
            else:
                chosen = positions[start:stop]
            block = self.hidden[torch.unravel_index(chosen, self.hidden.shape[:-1])]
        return block.to(self.operand)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """[v, H] in the operands' dtype."""
        return self.weight[start:stop].to(self.operand)

    def scale_rows(self, start: int, stop: int) -> float | Tensor:
        scale = self.call.scale
        return scale[start:stop] if isinstance(scale, Tensor) else scale

    def scaled(self, values: Tensor, start: int, stop: int) -> Tensor:
        """values [n] times the rows' scale."""
        return values * self.scale_rows(start, stop)

    def limit(self, start: int, stop: int) -> float | Tensor | None:
        """The bound that softcap puts on |z| of these rows: a number, [n, 1], or None."""
        if self.call.softcap is None:
            return None
        scale = self.scale_rows(start, stop)
        bound = self.call.softcap * scale
        return bound[:, None] if isinstance(bound, Tensor) else bound

    def logits(
        self, out: Tensor, hidden: Tensor, weight: Tensor, r: tuple[int, int], c: tuple[int, int]
    ) -> None:
        """z [n, v] of row block r against vocabulary block c, into out."""
        _product(out, hidden, weight.T, add=False)
        if self.bias is not None:
            out += self.bias[c[0] : c[1]]
        if self.call.softcap is not None:
            out.div_(self.call.softcap).tanh_().mul_(self.call.softcap)
        scale = self.scale_rows(*r)
        if isinstance(scale, Tensor):
            out.mul_(scale[:, None])
        elif scale != 1.0:
            out.mul_(scale)

    def start_stats(self, n: int) -> RowStats:
        asked = self.call.stats
        return RowStats.start(
            n,
            self.empty(0),
            entropy="entropy" in asked,
            squares="log_sum_sq_probs" in asked,
            mean="mean_logit" in asked,
        )

    def new_stats(self) -> dict[str, Tensor]:
        """[N] of every statistic that is kept or asked for."""
        names = dict.fromkeys(("logprob", "logsumexp", *self.call.stats))
        device = self.hidden.device
        return {
            name: torch.empty(
                self.count, dtype=torch.bool if name == "top1" else self.acc, device=device
            )
            for name in names
        }

    def store(
        self, everything: dict[str, Tensor], r: tuple[int, int], stats: RowStats
    ) -> dict[str, Tensor]:
        """A finished row block's statistics into the [N] tensors; returns its part of them."""
        block = {name: value[slice(*r)] for name, value in everything.items()}
        for name, value in block.items():
            if name == "mean_logit":
                assert stats.plain is not None, "start_stats() asks for it"
                value.copy_(stats.plain / self.vocab)
            elif name == "top1":
                value.copy_(stats.target >= stats.peak)
            else:
                value.copy_(getattr(stats, name))
        return block

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
            return unit.mul_(self.at_positions(g)[:, None])
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

    # the forward sweeps

    def sweep_forward(self, unit: Tensor | None) -> dict[str, Tensor]:
        """Statistics of all rows; with ``unit`` [P, H], also dlogp/dhidden into it."""
        everything = self.new_stats()
        buffer = self.tile()
        for r in self.row_blocks():
            hidden, n = self.hidden_rows(*r), r[1] - r[0]
            stats = self.start_stats(n)
            # sum over non-target entries of exp(z - peak) slope W, rescaled as the peak rises
            rest = None if unit is None else self.zeros(n, self.width)
            for c in self.col_blocks():
                self.fold_tile(self.view_tile(buffer, n, c[1] - c[0]), hidden, r, c, stats, rest)
            block = self.store(everything, r, stats)
            if unit is not None and rest is not None:
                self.write_unit(unit, r, self.unit_rows(rest, stats, block, r))
        return everything

    def fold_tile(
        self,
        z: Tensor,
        hidden: Tensor,
        r: tuple[int, int],
        c: tuple[int, int],
        stats: RowStats,
        rest: Tensor | None,
    ) -> None:
        """One tile of sweep_forward. A function of its own, so that its temporaries go with it."""
        weight, limit = self.weight_rows(*c), self.limit(*r)
        self.logits(z, hidden, weight, r, c)
        slope = None if limit is None or rest is None else softcap_slope_torch(z, limit)
        rescale = fold_torch(z, self.rows.targets[slice(*r)], c[0], stats)
        if rest is None:
            return
        if slope is not None:
            z.mul_(slope)
        if c[0]:
            rest.mul_(rescale[:, None])
        _product(rest, z.to(self.operand), weight, add=True)

    def unit_rows(
        self, rest: Tensor, stats: RowStats, block: dict[str, Tensor], r: tuple[int, int]
    ) -> Tensor:
        """dlogp/dhidden [n, H] of a finished row block, from its sum over non-target entries."""
        own = -torch.expm1(block["logprob"])
        limit = self.limit(*r)
        if limit is not None:
            own = own * softcap_slope_torch(stats.target[:, None], limit)[:, 0]
        others = torch.where(stats.total > 0, torch.exp(stats.peak - block["logsumexp"]), 0.0)
        target_rows = self.weight[self.rows.targets[slice(*r)]].to(self.acc)
        rest.mul_(self.scaled(-others, *r)[:, None])
        return rest.addcmul_(target_rows, self.scaled(own, *r)[:, None])

    def full_row_logits(
        self, out: Tensor, scratch: Tensor, hidden: Tensor, r: tuple[int, int], stats: RowStats
    ) -> None:
        """All logits of a row block into out [n, V], folded into stats on the way."""
        n = r[1] - r[0]
        for c in self.col_blocks():
            z = out[:, c[0] : c[1]]
            self.logits(z, hidden, self.weight_rows(*c), r, c)
            fold_torch(
                z,
                self.rows.targets[slice(*r)],
                c[0],
                stats,
                out=self.view_tile(scratch, n, c[1] - c[0]),
            )

    def jacobian(
        self, z: Tensor, r: tuple[int, int], c: tuple[int, int], stats: dict[str, Tensor]
    ) -> Tensor:
        """A tile of logits to a tile of J, in place; stats are of these rows."""
        return jacobian_torch(
            z,
            self.rows.targets[slice(*r)],
            c[0],
            stats["logsumexp"],
            stats["logprob"],
            limit=self.limit(*r),
        )

    def full_row_jacobian(self, z: Tensor, r: tuple[int, int], block: dict[str, Tensor]) -> None:
        for c in self.col_blocks():
            self.jacobian(z[:, c[0] : c[1]], r, c, block)

    def row_products(self, jacobian: Tensor) -> Tensor:
        """J W [n, H] from J [n, V]."""
        out = self.empty(jacobian.shape[0], self.width)
        for c in self.col_blocks():
            _product(
                out, jacobian[:, c[0] : c[1]].to(self.operand), self.weight_rows(*c), add=c[0] > 0
            )
        return out

    def sweep_retain(self, kept: Tensor) -> dict[str, Tensor]:
        """Statistics of all rows, and J into kept [N, V]."""
        everything = self.new_stats()
        scratch = self.tile()
        in_place = kept.dtype == self.acc
        block_buffer = None if in_place else self.empty(self.plan.rows, self.vocab)
        for r in self.row_blocks():
            stats = self.start_stats(r[1] - r[0])
            z = kept[slice(*r)] if block_buffer is None else block_buffer[: r[1] - r[0]]
            self.full_row_logits(z, scratch, self.hidden_rows(*r), r, stats)
            self.full_row_jacobian(z, r, self.store(everything, r, stats))
            if not in_place:
                kept[slice(*r)] = z
        return everything

    def sweep_one_pass(
        self, unit: Tensor | None, out: HeadGradient, groups: Groups
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Statistics of all rows; dlogp/dhidden into unit, the head's gradient into out.

        Returns also the gradient [N] that the head's was formed with.
        """
        everything = self.new_stats()
        upstream = self.zeros(self.count)
        scratch, block_buffer = self.tile(), self.empty(self.plan.rows, self.vocab)
        several = len(groups.starts) > 2
        partial = out
        for r in self.row_blocks():
            stats = self.start_stats(r[1] - r[0])
            z, hidden = block_buffer[: r[1] - r[0]], self.hidden_rows(*r)
            self.full_row_logits(z, scratch, hidden, r, stats)
            self.full_row_jacobian(z, r, self.store(everything, r, stats))
            if unit is not None:
                self.write_unit(unit, r, self.negate_scaled(self.row_products(z), *r))
            for first, last, start, stop, ends in _pieces(groups.starts, *r):
                within = slice(start - r[0], stop - r[0])
                if ends and groups.starts[first] >= r[0]:
                    # groups that lie within the block: their gradient is known
                    g = groups.gradient(first, last, everything["logprob"][start:stop])
                    upstream[start:stop] = g
                    self.add_head_gradient(
                        out, z[within], hidden[within], -self.scaled(g, start, stop)
                    )
                    continue
                if several and partial is out:
                    partial = out.like()
                unit_g = groups.units(start, stop).to(self.acc)
                self.add_head_gradient(
                    partial, z[within], hidden[within], -self.scaled(unit_g, start, stop)
                )
                if ends:
                    whole = slice(groups.starts[first], stop)
                    g = groups.gradient(first, last, everything["logprob"][whole])
                    upstream[whole] = g
                    factor = ratio(g, groups.units(whole.start, stop).to(self.acc))
                    if partial is out:
                        out.scale(factor)
                    else:
                        out.add(partial, factor)
                        partial.zero()
        return everything, upstream

    # the backward sweeps

    def add_head_gradient(
        self, out: HeadGradient, jacobian: Tensor, hidden: Tensor, coefficient: Tensor
    ) -> None:
        """out += J^T (c h) for J [n, V], h [n, H], c [n]."""
        for c in self.col_blocks():
            weight, bias = out.slices(c)
            self.add_slice(weight, bias, jacobian[:, c[0] : c[1]], hidden, coefficient, True)

    def add_slice(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        jacobian: Tensor,
        hidden: Tensor,
        coefficient: Tensor,
        add: bool,
    ) -> None:
        """A slice of the head's gradient: weight (+)= J^T (c h), bias (+)= J^T c, for J [n, v]."""
        if weight is not None:
            weighted = (hidden.to(self.acc) * coefficient[:, None]).to(self.operand)
            _product(weight, jacobian.to(self.operand).T, weighted, add=add)
        if bias is not None:
            bias.addmv_(jacobian.to(self.acc).T, coefficient, beta=int(add))

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
        buffer = self.tile()
        scratch = None
        if out.weight is not None and out.weight.dtype != self.acc:
            scratch = self.empty(self.plan.cols, self.width)
        first, last = rows or (0, self.count)
        gain = None
        if self.operand == torch.float16:
            gain = _power_of_two(
                upstream if upstream_entropy is None else torch.cat((upstream, upstream_entropy))
            )
            upstream = upstream * gain
            upstream_entropy = None if upstream_entropy is None else upstream_entropy * gain
        outer = upstream if upstream_entropy is None else torch.ones_like(upstream)
        coefficient = -self.scaled(outer, 0, self.count)
        for c in self.col_blocks():
            part, bias_part = out.slices(c, scratch)
            weight = self.weight_rows(*c)
            for r in self.row_blocks(first, last):
                z = self.view_tile(buffer, r[1] - r[0], c[1] - c[0])
                hidden = self.hidden_rows(*r)
                self.logits(z, hidden, weight, r, c)
                own = {name: value[slice(*r)] for name, value in stats.items()}
                if upstream_entropy is None:
                    self.jacobian(z, r, c, own)
                else:
                    g, e = upstream[slice(*r)], upstream_entropy[slice(*r)]
                    self.weighted_jacobian(z, r, c, own, g, e)
                self.add_slice(part, bias_part, z, hidden, coefficient[slice(*r)], r[0] > first)
                del hidden
                if hidden_gradient is not None:
                    piece = hidden_gradient[r[0] - first : r[1] - first]
                    _product(piece, z.to(self.operand), weight, add=c[0] > 0)
            del weight
            if gain is not None:
                for tensor in (part, bias_part):
                    if tensor is not None:
                        tensor.div_(gain)
            if scratch is not None and out.weight is not None:
                out.weight[slice(*c)] = scratch[: c[1] - c[0]]
        if hidden_gradient is not None:
            self.negate_scaled(hidden_gradient, first, last)
            if gain is not None:
                hidden_gradient.div_(gain)

    def sweep_kept(
        self, kept: Tensor, upstream: Tensor, out: HeadGradient, hidden_gradient: Tensor | None
    ) -> None:
        """All gradients from the retained J [N, V], left as it is; hidden_gradient is [P, H]."""
        coefficient = -self.scaled(upstream, 0, self.count)
        if hidden_gradient is not None:
            for r in self.row_blocks():
                rows = self.row_products(kept[slice(*r)])
                self.write_rows(hidden_gradient, *r, rows.mul_(coefficient[slice(*r), None]))
        if not self.count:
            return
        scratch = None
        if out.weight is not None and out.weight.dtype != self.acc:
            scratch = self.empty(self.plan.cols, self.width)
        for c in self.col_blocks():
            part, bias_part = out.slices(c, scratch)
            for r in self.row_blocks():
                tile = kept[slice(*r), slice(*c)]
                own = coefficient[slice(*r)]
                self.add_slice(part, bias_part, tile, self.hidden_rows(*r), own, r[0] > 0)
            if scratch is not None and out.weight is not None:
                out.weight[slice(*c)] = scratch[: c[1] - c[0]]

    def entropy_gradients(
        self, stats: dict[str, Tensor], g: Tensor, e: Tensor, head: HeadGradient, need_hidden: bool
    ) -> Tensor | None:
        """Gradients of sum(g logp + e entropy): the head's into head; returns the hidden [P, H]."""
        out = accumulated = None
        if need_hidden:
            out = self.new_hidden_gradient()
        if out is not None and (self.plan.split or not head.wanted):
            for r in self.row_blocks():
                part = self.empty(r[1] - r[0], self.width)
                self.sweep_head(stats, g, e, HeadGradient(None, None), part, r)
                self.write_rows(out, *r, part)
        elif out is not None:
            in_place = out.dtype == self.acc and self.rows.positions is None
            accumulated = out if in_place else self.empty(self.count, self.width)
        if head.wanted:
            self.sweep_head(stats, g, e, head, accumulated)
            if out is not None and accumulated is not None and accumulated is not out:
                self.write_rows(out, 0, self.count, accumulated)
        return out

    def weighted_jacobian(
        self,
        z: Tensor,
        r: tuple[int, int],
        c: tuple[int, int],
        stats: dict[str, Tensor],
        g: Tensor,
        e: Tensor,
    ) -> Tensor:
        """A tile of logits to the negated gradient of sum(g logp + e entropy), in place."""
        return weighted_jacobian_torch(
            z,
            self.rows.targets[slice(*r)],
            c[0],
            stats["logsumexp"],
            stats["logprob"],
            stats["entropy"],
            g,
            e,
            limit=self.limit(*r),
        )

    def negate_scaled(self, values: Tensor, start: int, stop: int) -> Tensor:
        """-scale * values, in place; values [n, H]."""
        scale = self.scale_rows(start, stop)
        return values.mul_(-scale[:, None] if isinstance(scale, Tensor) else -scale)


def _power_of_two(values: Tensor) -> Tensor:
    """A power of two that brings the largest |value| near 1, found on the device.

    Without it fp16 products of a gradient that is a mean over many tokens would underflow.
    """
    largest = values.abs().amax() if values.numel() else values.new_ones(())
    exponent = torch.frexp(
        torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    ).exponent
    return torch.ldexp(torch.ones_like(largest), -exponent)


def ratio(g: Tensor, a: Tensor) -> Tensor:
    """The factor f with g = f a, a number on the device."""
    g, a = g.double(), a.double()
    square = torch.dot(a, a)
    return torch.where(square == 0, 0.0, torch.dot(g, a) / square)


def _pieces(
    starts: Sequence[int], begin: int, end: int
) -> Iterator[tuple[int, int, int, int, bool]]:
    """Cut rows begin .. end at group borders; groups that lie within are taken together.

    Yields (first group, last group + 1, start, stop, whether the last group ends here).
    """
    position = begin
    group = next(i for i in range(len(starts) - 1) if starts[i + 1] > begin)
    while position < end:
        if starts[group] < position or starts[group + 1] > end:
            stop = min(starts[group + 1], end)
            yield group, group + 1, position, stop, stop == starts[group + 1]
            position, group = stop, group + 1
            continue
        last = group
        while last + 1 < len(starts) and starts[last + 1] <= end:
            last += 1
        yield group, last, position, starts[last], True
        position, group = starts[last], last


@dataclass
class HeadGradient:
    """The head's gradient: weight [V, H], bias [V]; None: not wanted."""

    weight: Tensor | None
    bias: Tensor | None

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
        return HeadGradient(
            *(None if t is None else torch.zeros_like(t) for t in (self.weight, self.bias))
        )

    def scale(self, factor: Tensor) -> HeadGradient:
        for t in (self.weight, self.bias):
            if t is not None:
                t.mul_(factor)
        return self

    def add(self, other: HeadGradient, factor: Tensor) -> None:
        for t, o in ((self.weight, other.weight), (self.bias, other.bias)):
            if t is not None and o is not None:
                t.addcmul_(o, factor.to(o.dtype))

    def zero(self) -> None:
        for t in (self.weight, self.bias):
            if t is not None:
                t.zero_()

    def clone(self) -> HeadGradient:
        return HeadGradient(*(None if t is None else t.clone() for t in (self.weight, self.bias)))

    def to(self, weight: torch.dtype, bias: torch.dtype | None) -> HeadGradient:
        return HeadGradient(
            None if self.weight is None else self.weight.to(weight),
            None if self.bias is None else self.bias.to(bias),
        )
