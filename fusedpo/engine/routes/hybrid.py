"""The route ``hybrid``: J of as many rows as the budget holds is retained, and that of the others
made anew in the backward, so that any more memory saves a part of a product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fusedpo.engine import hidden_gradient
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.head_gradient import HeadGradient, new_output
from fusedpo.engine.plan import RouteName
from fusedpo.engine.routes.base import Backward, Forward, scaled_hidden, tall_shapes
from fusedpo.engine.routes.recompute import Recompute, backward_pass
from fusedpo.engine.routes.retain import retained_rows, stats_of_rows
from fusedpo.engine.tiles import Tiles

_RECOMPUTE = Recompute(split=False)


class Hybrid:
    """``hybrid``: ``retain`` for the first rows and ``recompute`` for the rest.

    The rows are whole row blocks of the forward, so that these stay as in all other routes. The
    hidden gradient of all rows waits for the backward as in ``recompute``, in full precision: to
    round it would leave room for more rows, but a route that costs precision is no bargain.
    """

    name: RouteName = "hybrid"
    fused = split = False

    def serves(self, p: Problem) -> bool:
        return _RECOMPUTE.serves(p) and not p.entropy

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        least = min(n, p.tokens)
        rounds = not p.wide and "hidden" in p.needs and p.hidden_size < p.acc
        if rounds or p.most < least:
            return []
        return [replace(_tall(p, n, v), retained=max(least, self.rows_that_fit(p, n, v)))]

    def rows_that_fit(self, p: Problem, n: int, v: int) -> int:
        """Rows of J that are within p.room, and no more than p.most: whole blocks, not all rows."""
        most, shape = min(p.most, p.tokens - 1), _tall(p, n, v)
        if most < n:
            return 0
        none, one = (self.cost(replace(shape, retained=retained), n, v) for retained in (0, 1))
        left = p.room - p.row_bytes() - sum(none.worst.values())
        row = sum(one.forward.values()) - sum(none.forward.values())
        return max(0, min(left // row, most) // n * n)

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        back, retained = p.back or (n, v), min(p.retained, p.tokens)
        whole = _RECOMPUTE.cost(p, n, v)
        jacobian = {"retained jacobian": p.jacobian(retained)}
        forward = {**whole.forward, **jacobian, **p.steps(retained, v)}
        if "hidden" in p.needs and p.shards > 1:
            forward["row products"] += n * p.hidden * p.acc  # J W of retained rows
        backward = {**whole.backward, **p.weight_slice(*back, absorbed=False), **jacobian}
        return Cost(whole.products - retained / max(1, p.tokens), forward, backward)

    def forward(self, t: Tiles) -> Forward:
        """The hidden gradient of the retained rows is formed from their J."""
        retained, all_stats = min(t.plan.retained, t.count), t.start_stats()
        wanted = "hidden" in t.call.needs
        unscaled = hidden_gradient.new_unscaled(t) if wanted else None
        partial = hidden_gradient.new_partial(t, unscaled)
        rows, residual = retained_rows(t, retained, all_stats)
        if unscaled is not None:
            stats = all_stats.of(slice(0, retained))
            factor = t.row_factor(stats.logprob, stats.total / residual)
            hidden_gradient.multiply_rows(t, unscaled, partial, rows, factor, (0, retained))
        hidden_gradient.fold_rows(t, unscaled, partial, all_stats, (retained, t.count))
        hidden_gradient.add_slices(t, partial, unscaled)
        held = {} if unscaled is None else {"dlogp_dhidden": unscaled}
        return Forward(stats_of_rows(t, all_stats, residual), saved=(rows,), held=held)

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        needs, (rows,) = t.call.needs, b.saved
        hidden = scaled_hidden(t, b)
        head = new_output(t, weight="weight" in needs, bias="bias" in needs)
        backward_pass(t, b, head, retained=rows)
        return hidden, head


def _tall(p: Problem, n: int, v: int) -> Problem:
    return next(tall_shapes(p, n, v))
