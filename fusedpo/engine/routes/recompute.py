"""The route ``recompute``: logits are made anew in the backward, a slice of the head at a time.

The hidden gradient is formed in the forward as by ``frozen``, except for a gradient through the
entropy, whose coefficients are known in the backward only: then both gradients are formed there,
together or (``split``) in a pass of their own each, which holds less and costs a product more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedpo.engine import hidden_gradient
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.head_gradient import (
    HeadGradient,
    RowCoefficients,
    add_slice,
    new_output,
    row_coefficients,
    row_operands,
    slice_scratch,
    write_slice,
)
from fusedpo.engine.plan import RouteName
from fusedpo.engine.precision import divide_, multiply
from fusedpo.engine.routes.base import (
    Backward,
    Forward,
    forward_to_scale,
    graph_is_kept,
    scaled_hidden,
    tall_shapes,
)
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Range, Tiles


class Recompute:
    """``recompute``: the one route that serves every need, in the least memory."""

    name: RouteName = "recompute"
    fused = False

    def __init__(self, *, split: bool) -> None:
        self.split = split

    def serves(self, p: Problem) -> bool:
        if self.split:  # of one gradient there is nothing to split
            return p.entropy and "hidden" in p.needs and len(p.needs) > 1
        return bool(p.needs) and (p.entropy or p.needs != {"hidden"})

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        return list(tall_shapes(p, n, v))

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        back = p.back or (n, v)
        head = bool(p.needs & {"weight", "bias"})
        products = 1 + head + ("hidden" in p.needs) + ("weight" in p.needs)
        forward = {**p.tile(n, v, gradient=True), **p.held_gradient(), **p.partial()}
        if "hidden" in p.needs:
            forward |= p.running_product(n)
        backward = p.tile(*back, gradient=True)
        if head:
            backward |= p.weight_slice(*back, absorbed=True)
        if p.entropy:
            # the hidden gradient is formed anew, while the one of the forward waits
            products += (not head) + ("hidden" in p.needs)
            if "hidden" in p.needs:
                whole = 0 if p.is_whole_output else p.tokens
                rows = n if (self.split or not head) and p.shards == 1 else whole
                backward["hidden gradient"] = rows * p.hidden * p.acc
            backward |= p.held_gradient()
        return Cost(products + self.split, forward, backward)

    def forward(self, t: Tiles) -> Forward:
        return forward_to_scale(t)

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        needs = t.call.needs
        if b.e is not None:
            if not graph_is_kept():
                b.held.clear()  # of no use to a gradient through the entropy
            head = new_output(t, weight="weight" in needs, bias="bias" in needs)
            return both_gradients(t, b, head, "hidden" in needs), head
        hidden = scaled_hidden(t, b)
        head = new_output(t, weight="weight" in needs, bias="bias" in needs)
        if head.wanted:
            backward_pass(t, b, head)
        return hidden, head


def both_gradients(t: Tiles, b: Backward, head: HeadGradient, need_hidden: bool) -> Tensor | None:
    """Gradients of sum(g logp + e entropy): the head's into head; returns the hidden [P, H]."""
    out = whole = None
    apart = t.plan.split or not head.wanted
    if need_hidden:
        out = hidden_gradient.new_output(t)
        if t.shard is not None or not apart:
            in_place = out.dtype == t.acc and t.rows.positions is None
            whole = out if in_place else t.take("hidden gradient", t.count, t.width)
    if out is not None and apart:
        for r in t.row_blocks():
            if whole is not None:
                part = whole[slice(*r)]
            else:
                part = t.take("hidden gradient", r[1] - r[0], t.width)
            backward_pass(t, b, HeadGradient(None, None), part, r)
            if whole is None:
                hidden_gradient.write_rows(t, out, *r, part)
    if head.wanted:
        backward_pass(t, b, head, None if apart else whole)
    if out is not None and whole is not None:
        if t.shard is not None:
            t.shard.add_up(whole)
        if whole is not out:
            hidden_gradient.write_rows(t, out, 0, t.count, whole)
    return out


def backward_pass(
    t: Tiles,
    b: Backward,
    out: HeadGradient,
    hidden_grad: Tensor | None = None,
    rows: Range | None = None,
    retained: Tensor | None = None,
) -> None:
    """Make J anew, a slice of the vocabulary at a time, and write the gradients.

    Each slice of out.weight is written once. hidden_grad [rows, H] is accumulated over the slices;
    it is wanted here only where both gradients are formed in the backward, and for the given rows
    only.

    Args:
        retained: [k, V], J of the first k rows, which is not to be made again.
    """
    if not t.count:
        return
    scratch = slice_scratch(t, out)
    first, last = rows or (0, t.count)
    stored = 0 if retained is None else retained.shape[0]
    memory = None if stored == last else (t.tile(), t.narrow_tile())
    j, gain = row_coefficients(t, b.stats, b.g, b.e)

    def missing(r: Range) -> Tensor | None:
        values = j.of_retained if r[1] <= stored else j.missing
        return None if values is None else values[slice(*r)]

    coefficient = missing if out.weight is not None else lambda r: None
    operands = row_operands(t, first, last, coefficient, stored)
    for c in blocks(0, t.vocab, t.plan.back_cols):
        part, bias_part = out.slices(c, scratch)
        weight = None if memory is None else t.weight_rows(*c)
        for r, hidden, weighted in operands():
            if memory is None or weight is None or r[1] <= stored:
                assert retained is not None, "memory is wanted where a row is not retained"
                z = retained[slice(*r), slice(*c)]
            else:
                of_rows = j.of(slice(*r)), b.stats["shift"][slice(*r)]
                z = _jacobian(t, memory, *of_rows, hidden, weight, r, c)
            add_slice(t, part, bias_part, z, weighted, missing(r), r[0] > first)
            if hidden_grad is not None and weight is not None:
                multiply(hidden_grad[r[0] - first : r[1] - first], z, weight, add=c[0] > 0)
        write_slice(out, c, part, bias_part, gain)
    if hidden_grad is not None:
        if j.missing is not None:
            hidden_grad.mul_(j.missing[first:last, None])
        divide_(gain, hidden_grad)


def _jacobian(
    t: Tiles,
    memory: tuple[Tensor, Tensor | None],
    of_rows: RowCoefficients,
    shift: Tensor,
    hidden: Tensor,
    weight: Tensor,
    r: Range,
    c: Range,
) -> Tensor:
    """J of one tile [n, v], from its logits made anew.

    Args:
        memory: of a tile, and of its narrow copy.
    """
    (x, narrow), within = memory, (slice(r[1] - r[0]), slice(c[1] - c[0]))
    x = x[within]
    z = x if narrow is None else narrow[within]
    multiply(x, hidden, weight.T, add=False)
    t.kernels.jacobian(
        x,
        t.logit_map(r, c),
        t.targets[slice(*r)],
        c[0],
        shift,
        of_rows.entry,
        factor=of_rows.factor,
        tilt=of_rows.tilt,
        out=z,
    )
    return z
