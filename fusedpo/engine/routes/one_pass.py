"""The route ``one_pass``: both products are formed in the forward.

The gradient of a group of tokens (a response, or a pair) is known when its last row has been
scored, and before that up to one factor for each run of rows. So J^T (a h) of a run is accumulated
with the known a, and scaled once its group is complete.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedpo.engine import hidden_gradient, jacobian
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.head_gradient import HeadGradient, accumulate, scaled_output
from fusedpo.engine.plan import RouteName
from fusedpo.engine.routes.base import Backward, Forward, scaled_hidden
from fusedpo.engine.rows import blocks
from fusedpo.engine.structure import Groups
from fusedpo.engine.tiles import Range, Tiles


class OnePass:
    """``one_pass``: three products, for accumulators of the head's gradient and a slab of J."""

    name: RouteName = "one_pass"
    fused = split = False

    def serves(self, p: Problem) -> bool:
        known = p.structure is not None and p.structure.scope != "batch"
        # fp16 products need a power-of-two gain, which cannot be known before the loss is known
        return known and "weight" in p.needs and not p.entropy and not p.fp16_products

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        shapes = []
        slab = 0 if p.on_cpu else -(-p.tokens // n) * n
        while slab > n:
            shapes.append(replace(p, slab=slab))
            slab = -(-slab // (2 * n)) * n
        return [*shapes, p]

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        slab, structure = max(n, p.slab), p.structure
        partials = 0
        if structure is not None and structure.scope != "token":
            # a group that goes on in the next slab waits in them; a single one waits in the output
            partials = structure.factors - (p.groups == 1)
        if p.borders is not None and p.borders.issuperset(range(slab, p.tokens, slab)):
            partials = 0
        accumulators = int(p.weight_size < p.acc) + partials
        buffers = {
            **p.tile(n, v, gradient=True, full_rows=True),
            **p.weight_slice(slab, v, absorbed=False),
            "row block": p.jacobian(slab),
            "row products": n * p.hidden * (2 * p.acc) if "hidden" in p.needs else 0,
            "weight gradient accumulators": accumulators * p.vocab * p.hidden * p.acc,
            **p.held_gradient(),
            **p.partial(),
            **p.steps(slab, v),
        }
        buffers["weight gradient slice"] = 0
        if p.copies_rows:
            buffers |= p.hidden_rows(slab)
        products = 1 + ("hidden" in p.needs) + ("weight" in p.needs)
        return Cost(products, buffers, buffers)

    def forward(self, t: Tiles) -> Forward:
        needs, groups = t.call.needs, t.call.groups
        assert groups is not None, "whoever plans with a scope gives the groups"
        head = HeadGradient(
            _accumulator(t, 0) if "weight" in needs else None,
            t.vector(t.vocab) if "bias" in needs else None,
            empty=True,
        )
        unscaled = hidden_gradient.new_unscaled(t) if "hidden" in needs else None
        one_pass = _Pass(t, head, unscaled, groups)
        stats = one_pass.run()
        held: dict[str, Any] = {"head": head}
        if unscaled is not None:
            held["dlogp_dhidden"] = unscaled
        return Forward(stats, saved=(one_pass.early_gradient,), held=held)

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        (early_gradient,), weight = b.saved, b.held["head"].weight
        in_place = weight is None or t.weight.dtype == t.acc
        head = scaled_output(t, b.take("head", copy=in_place), ratio(b.g, early_gradient))
        return scaled_hidden(t, b), head


class _Pass:
    """The forward of ``one_pass``, a slab of rows at a time.

    Of a vocabulary in slices the statistics are merged slab by slab, as a group's gradient has to
    be known when its last row has been scored.

    Attributes:
        early_gradient: [N], the gradient by the log-probabilities that the head's was formed with.
    """

    def __init__(
        self, t: Tiles, head: HeadGradient, unscaled: Tensor | None, groups: Groups
    ) -> None:
        self.t, self.head, self.unscaled, self.groups = t, head, unscaled, groups
        self.all_stats = t.start_stats()
        self.early_gradient = t.vector(t.count).zero_()
        self.partial = hidden_gradient.new_partial(t, unscaled)
        # accumulators of runs that wait for the rest of their group, and those that are free: with
        # a single group the output itself
        self.pending: list[tuple[slice, HeadGradient]] = []
        self.spare = [head] if len(groups.starts) == 2 else []
        self.accumulators = 0

    def run(self) -> dict[str, Tensor]:
        """Statistics of all rows; the gradients are in head and unscaled afterwards."""
        t, slab = self.t, self.t.plan.slab
        memory = jacobian.new_rows(t, "row block", min(slab, t.count))
        for b in blocks(0, t.count, slab):
            rows, hidden = memory[: b[1] - b[0]], t.hidden_rows(*b)
            read = _part_of(hidden, b[0])
            residual = jacobian.rows_of_jacobian(t, rows, b, read, self.all_stats)
            stats = self.all_stats.of(slice(*b))
            factor = t.row_factor(stats.logprob, stats.total / residual)
            if self.unscaled is not None:
                hidden_gradient.multiply_rows(t, self.unscaled, self.partial, rows, factor, b)
            for first, last, start, stop, ends in _pieces(self.groups.starts, *b):
                within = slice(start - b[0], stop - b[0])
                piece = rows[within], hidden[within], factor[within]
                if ends:
                    self._complete(first, last, (start, stop), *piece)
                else:
                    self._wait((start, stop), *piece)
        self.head.fill_empty()
        hidden_gradient.add_slices(t, self.partial, self.unscaled)
        return t.finish_stats(self.all_stats)

    def _wait(self, piece: Range, rows: Tensor, hidden: Tensor, factor: Tensor) -> None:
        """Accumulate rows of a group that goes on, each run by itself."""
        t, runs = self.t, self.groups.runs
        for run in _cut(runs, *piece):
            within = slice(run[0] - piece[0], run[1] - piece[0])
            units = self._units(slice(*run))
            coefficient = -t.scaled(units * factor[within], *run)
            begin = runs[bisect_right(runs, run[0]) - 1]
            if begin < run[0]:  # its first part waits already
                _, partial = self.pending.pop()
            else:
                partial = self.spare.pop() if self.spare else self._new_partial()
            self.pending.append((slice(begin, run[1]), partial))
            accumulate(t, partial, rows[within], hidden[within], coefficient)

    def _complete(
        self,
        first: int,
        last: int,
        piece: Range,
        rows: Tensor,
        hidden: Tensor,
        factor: Tensor,
    ) -> None:
        """Add the gradient of groups first .. last, of which these are the last rows."""
        t, whole = self.t, slice(self.groups.starts[first], piece[1])
        g = self.groups.gradient(first, last, t.finish_stats(self.all_stats.of(whole)))
        self.early_gradient[whole] = g
        for run, partial in self.pending:
            slope = ratio(g[run.start - whole.start : run.stop - whole.start], self._units(run))
            if partial is self.head:  # the first of them, and alone so far
                self.head.scale(slope)
            else:
                self.head.add(partial, slope)
                partial.empty = True
                self.spare.append(partial)
        self.pending.clear()
        coefficient = -t.scaled(self.early_gradient[slice(*piece)] * factor, *piece)
        accumulate(t, self.head, rows, hidden, coefficient)

    def _new_partial(self) -> HeadGradient:
        """An empty accumulator beside the head's."""
        t, self.accumulators = self.t, self.accumulators + 1
        return HeadGradient(
            None if self.head.weight is None else _accumulator(t, self.accumulators),
            None if self.head.bias is None else t.vector(t.vocab),
            empty=True,
        )

    def _units(self, rows: slice) -> Tensor:
        """[n], the gradient of these rows up to one factor per run."""
        stats = self.t.finish_stats(self.all_stats.of(rows))
        return self.groups.units(rows.start, rows.stop, stats).to(self.t.acc)


def _accumulator(t: Tiles, number: int) -> Tensor:
    """Memory [V, H] in full precision. The first one of a head in full precision is the output."""
    if number == 0 and t.weight.dtype == t.acc:
        return t.vector(*t.weight.shape)
    return t.take("weight gradient accumulators", *t.weight.shape, part=number)


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
