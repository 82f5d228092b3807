"""The route ``retain``: J of all scored tokens is stored in the forward, in the operands' dtype,
and both products are formed in the backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedpo.engine import hidden_gradient, jacobian
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.head_gradient import HeadGradient, new_output
from fusedpo.engine.plan import RouteName
from fusedpo.engine.routes.base import Backward, Forward, tall_shapes
from fusedpo.engine.routes.recompute import backward_pass
from fusedpo.engine.tiles import Tiles
from fusedpo.kernels.row_stats import RowStats


class Retain:
    """``retain``: three products, for the memory of J [N, V]."""

    name: RouteName = "retain"
    fused = split = False

    def serves(self, p: Problem) -> bool:
        return bool(p.needs & {"weight", "bias"}) and not p.entropy

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        return list(tall_shapes(p, n, v))

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        back = p.back or (n, v)
        buffers = {
            **p.tile(n, v, gradient=True, full_rows=True),
            **p.weight_slice(*back, absorbed=False),
            "retained jacobian": p.jacobian(p.tokens),
            "row products": n * p.hidden * p.acc if "hidden" in p.needs else 0,
            **p.partial(waits=False),
            **p.steps(p.tokens, v),
        }
        if p.copies_rows:
            buffers |= p.hidden_rows(max(n, back[0]))
        products = 1 + ("hidden" in p.needs) + ("weight" in p.needs)
        return Cost(products, buffers, buffers)

    def forward(self, t: Tiles) -> Forward:
        """Of a slice of a vocabulary, the shift and the total are those of its J."""
        all_stats = t.start_stats()
        rows, residual = retained_rows(t, t.count, all_stats)
        return Forward(stats_of_rows(t, all_stats, residual), saved=(rows,))

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        needs, (rows,) = t.call.needs, b.saved
        head = new_output(t, weight="weight" in needs, bias="bias" in needs)
        factor = t.row_factor(b.stats["logprob"], b.stats["total"])
        coefficient = -t.scaled(b.g * factor)
        hidden = self._hidden(t, rows, coefficient) if "hidden" in needs else None
        backward_pass(t, b, head, retained=rows)
        return hidden, head

    def _hidden(self, t: Tiles, rows: Tensor, coefficient: Tensor) -> Tensor:
        out = hidden_gradient.new_output(t)
        partial = hidden_gradient.new_partial(t, out)
        for r in t.row_blocks():
            products = t.jacobian_products(rows[slice(*r)])
            products.mul_(coefficient[slice(*r), None])
            if partial is not None:
                partial[slice(*r)] = products
            else:
                hidden_gradient.write_rows(t, out, *r, products)
        hidden_gradient.add_slices(t, partial, out)
        return out


def retained_rows(t: Tiles, count: int, all_stats: RowStats) -> tuple[Tensor, Tensor | float]:
    """J [count, V] of the first rows, over a residual, and that; their statistics are merged."""
    rows = jacobian.new_rows(t, "retained jacobian", count)
    return rows, jacobian.rows_of_jacobian(t, rows, (0, count), t.hidden_rows, all_stats)


def stats_of_rows(t: Tiles, all_stats: RowStats, residual: Tensor | float) -> dict[str, Tensor]:
    """Statistics of all rows. Of a slice of a vocabulary, the shift and the total of the retained
    ones are those of their J."""
    stats = t.finish_stats(all_stats)
    if isinstance(residual, Tensor):
        count = residual.shape[0]
        shift, total = all_stats.shift.clone(), all_stats.total.clone()
        shift[:count] += residual.log()
        total[:count] /= residual
        stats |= {"shift": shift, "total": total}
    return stats
