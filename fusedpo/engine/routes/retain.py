"""The route ``retain``: J of all scored tokens is stored in the forward, in the operands' dtype,
and both products are formed in the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedpo.engine import hidden_gradient, jacobian
from fusedpo.engine.cost import Cost, Problem, padded
from fusedpo.engine.head_gradient import (
    HeadGradient,
    add_slice,
    new_output,
    row_operands,
    slice_scratch,
    write_slice,
)
from fusedpo.engine.plan import RouteName
from fusedpo.engine.precision import largest, unit_gain
from fusedpo.engine.routes.base import Backward, Forward, tall_shapes
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Tiles


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
            "retained jacobian": p.tokens * padded(p.vocab) * p.operand,
            "row products": n * p.hidden * p.acc if "hidden" in p.needs else 0,
            **p.partial(waits=False),
            **p.steps(p.tokens, v),
        }
        if p.copies_rows:
            buffers["hidden rows"] = max(n, back[0]) * p.hidden * p.operand
        products = 1 + ("hidden" in p.needs) + ("weight" in p.needs)
        return Cost(products, buffers, buffers)

    def forward(self, t: Tiles) -> Forward:
        """Of a slice of a vocabulary, the shift and the total are those of its J."""
        rows = jacobian.new_rows(t, "retained jacobian", t.count)
        all_stats = t.start_stats()
        residual = jacobian.rows_of_jacobian(t, rows, (0, t.count), t.hidden_rows, all_stats)
        stats = t.finish_stats(all_stats)
        if isinstance(residual, Tensor):
            stats["shift"] = all_stats.shift + residual.log()
            stats["total"] = all_stats.total / residual
        return Forward(stats, saved=(rows,))

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        needs, (rows,) = t.call.needs, b.saved
        head = new_output(t, weight="weight" in needs, bias="bias" in needs)
        factor = t.row_factor(b.stats["logprob"], b.stats["total"])
        coefficient = -t.scaled(b.g * factor)
        hidden = self._hidden(t, rows, coefficient) if "hidden" in needs else None
        if t.count:
            self._head(t, rows, coefficient, head)
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

    def _head(self, t: Tiles, rows: Tensor, coefficient: Tensor, head: HeadGradient) -> None:
        gain = None
        if t.operand == torch.float16:
            gain = unit_gain(largest(coefficient))
            coefficient = coefficient * gain
        scratch = slice_scratch(t, head)
        operands = row_operands(t, 0, t.count, coefficient if head.weight is not None else None)
        for c in blocks(0, t.vocab, t.plan.back_cols):
            part, bias_part = head.slices(c, scratch)
            for r, _, weighted in operands():
                tile, of_rows = rows[slice(*r), slice(*c)], coefficient[slice(*r)]
                add_slice(t, part, bias_part, tile, weighted, of_rows, r[0] > 0)
            write_slice(head, c, part, bias_part, gain)
