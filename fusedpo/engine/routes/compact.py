"""The route ``compact``: gradients by the columns that matter, within a tolerance.

In a trained model nearly all of J = softmax(z) - onehot(y) is too small to matter, and what is
small is nearly the same direction in every row. For a slab of rows the columns K that matter are
kept, and their part of both products is exact. All others stand together as one direction: with
m_i the probability that row i loses by leaving them out, and q their column sums, normalised,

    J_i ~ J_i,K + m_i q      dL/dh_i = -g_i s_i (J_i,K W_K + m_i q W)
                             dL/dW_K = -J_K^T (g s h)       dL/dW -= q^T sum_i g_i s_i m_i h_i

A row of J still sums to 0, as m_i is what its kept entries lack.

The forward is that of ``recompute`` and makes the column sums besides, so log-probabilities are
exact, to the bit. The backward knows the upstream gradient before it chooses the columns. Then it
estimates the error of what it did: above the tolerance, the gradients are made again, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusedpo.engine import audit, by_columns, column_sums, columns, hidden_gradient, row_order
from fusedpo.engine.column_sums import ColumnSums
from fusedpo.engine.columns import Kept, choose
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.entries import Entries
from fusedpo.engine.head_gradient import HeadGradient, new_output
from fusedpo.engine.plan import RouteName
from fusedpo.engine.routes.base import Backward, Forward
from fusedpo.engine.routes.recompute import Recompute, both_gradients
from fusedpo.engine.tiles import Tiles
from fusedpo.engine.tolerance import Record, Seen, record_of

# Rows of a slab, on the CPU and elsewhere: few keep few columns, many multiply faster, and fill a
# GPU. From one size to twice that the kept share grows by 1.36 (benchmarks/compact_errors.py).
_SLAB = {True: 128, False: 1024}
_GROWTH = 0.44

# Operations of a product that take about as long as the small steps of a slab, on a CPU (the toy
# of benchmarks/compact.py) and elsewhere (the model of benchmarks/roofline.py). On a small
# vocabulary these are more than the products that are saved.
_SLAB_WORK = {True: 5e8, False: 8e10}

# kept columns that are gathered at a time, on the CPU and elsewhere: the best first
_CHUNKS = {True: (4096, 2048, 1024, 512), False: (8192, 4096, 2048, 1024, 512)}


class Compact:
    """``compact``: 1 + 3 C/V products where C of V columns are kept, for column sums of slabs."""

    name: RouteName = "compact"
    fused = split = False

    def serves(self, p: Problem) -> bool:
        return p.tolerance > 0 and bool(p.needs & {"hidden", "weight"}) and not p.entropy

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        slabs, slab = [], _SLAB[p.on_cpu]
        while slab < p.tokens:
            slabs.append(slab)
            slab *= 2
        chunks = dict.fromkeys(min(chunk, p.vocab) for chunk in _CHUNKS[p.on_cpu])
        return [
            replace(p, slab=slab, back=(n, chunk))
            for chunk in chunks
            for slab in (*slabs, max(1, p.tokens))
        ]

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        rows = max(1, min(p.slab or n, p.tokens))
        count, (back_rows, chunk) = -(-p.tokens // rows), p.back or (n, v)
        copied = replace(p, gathered=True)  # into another order, in the backward
        forward = {**p.tile(n, v, gradient=True), **column_sums.buffers(p, rows, n, v)}
        forward["tile"] = max(forward["tile"], p.hidden * p.acc, row_order.least_tile(p, n))
        # of the exact gradients, if they have to be made after all
        exact = Recompute(split=False).cost(replace(p, entropy=True), n, v).backward
        exact |= copied.tile(back_rows, chunk, gradient=True)
        few = by_columns.widest(p.vocab, rows, chunk, narrow=p.on_cpu or p.weight_cast)
        own = {
            **copied.tile(rows, chunk, gradient=True),
            "weighted rows": rows * p.hidden * p.operand,
            "weight rows": 0,
        }
        backward = {name: max(exact.get(name, 0), own.get(name, 0)) for name in {**exact, **own}}
        whole = 0 if p.is_whole_output or "hidden" not in p.needs else p.tokens
        backward |= {
            **column_sums.saved(p, rows),
            **columns.buffers(p, count, few),
            **by_columns.buffers(p, rows, chunk, few, column_sums.PRODUCTS),
            **audit.buffers(p),
            "tile": max(backward["tile"], columns.least_tile(p)),
            "hidden gradient": max(whole * p.hidden * p.acc, exact.get("hidden gradient", 0)),
        }
        if "weight" in p.needs and p.weight_size < p.acc:
            backward["weight gradient accumulators"] = p.vocab * p.hidden * p.acc
        kept = 1 + len(p.needs & {"hidden", "weight"})
        products = 1 + kept * min(1.0, p.share * _growth(p.on_cpu, rows))
        products += audit.products(p) + 2 * count / max(1, p.tokens)
        return Cost(products, forward, backward, _beside(p, count))

    def forward(self, t: Tiles) -> Forward:
        if not t.count:
            return Forward(hidden_gradient.forward_pass(t, None), held={"aim": None})
        order = row_order.alike(t, t.plan.slab)
        sums = ColumnSums(t, order)
        stats = hidden_gradient.forward_pass(t, None, sums)
        # what is aimed at is settled here: a second backward of the graph repeats the first
        record = _record(t)
        # of a plan that was given, nobody has asked it yet
        exact = record.owes_exact()
        allowed = {name: record.allowed(name) for name in ("hidden", "head")}
        # elsewhere a backward that read how many columns matter would stand still meanwhile
        capacities = None if t.plan.on_cpu else record.capacities(t.vocab, t.plan.slab)
        sizes = sums.row_sizes, sums.column_sizes
        saved = sums.values, sums.directions, sums.row_products, *sizes
        held = {"aim": None if exact else (allowed, capacities), "order": order}
        return Forward(stats, saved=saved, held=held)

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        needs = t.call.needs
        if b.held["aim"] is None:
            _record(t).skip()
            return _exact(t, b)
        out = whole = None
        if "hidden" in needs:
            out = hidden_gradient.new_output(t)
            in_place = out.dtype == t.acc and t.rows.positions is None
            whole = out if in_place else t.take("hidden gradient", t.count, t.width)
        head = _accumulators(t)
        order = b.held["order"]
        if not _within(t.reordered(order), _reordered(b, order), head, whole):
            # not beside those that take their place
            del out, whole, head
            return _exact(t, b)
        if out is not None and whole is out:
            hidden_gradient.restore_order(t, out, order)
        elif out is not None and whole is not None:
            hidden_gradient.write_rows(t.reordered(order), out, 0, t.count, whole)
        return out, head


def _exact(t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
    needs = t.call.needs
    head = new_output(t, weight="weight" in needs, bias="bias" in needs)
    return both_gradients(t, b, head, "hidden" in needs), head


def _reordered(b: Backward, order: Tensor | None) -> Backward:
    """The inputs of rows in another order, by columns; the gradients do not need the entropy's."""
    if order is None:
        return b
    stats = {name: values[order] for name, values in b.stats.items() if values is not None}
    return replace(b, stats=stats, g=b.g[order])


def _beside(p: Problem, slabs: int) -> float:
    """What small steps take, and the products with main directions, in products."""
    product = 2 * max(1, p.tokens) * p.vocab * p.hidden
    main = column_sums.PRODUCTS * (1 / p.hidden + 1 / max(1, p.tokens))
    return main + slabs * _SLAB_WORK[p.on_cpu] / product


def _growth(on_cpu: bool, slab: int) -> float:
    return float((slab / _SLAB[on_cpu]) ** _GROWTH)


def _accumulators(t: Tiles) -> HeadGradient:
    """Memory of the head's gradient in full precision."""
    weight = bias = None
    if "weight" in t.call.needs and t.weight.dtype == t.acc:
        weight = t.vector(*t.weight.shape)
    elif "weight" in t.call.needs:
        weight = t.take("weight gradient accumulators", *t.weight.shape)
    if "bias" in t.call.needs:
        bias = t.vector(t.vocab)
    return HeadGradient(weight, bias, empty=True)


def _record(t: Tiles) -> Record:
    """Of calls like this one, by all that tells kinds apart."""
    return record_of(t.plan.tolerance, t.hidden.device.type, t.plan.vocab, t.width, t.shard)


def _within(t: Tiles, b: Backward, head: HeadGradient, hidden: Tensor | None) -> bool:
    """Write the gradients by kept columns; whether they are within the tolerance.

    Args:
        head: empty.
        hidden: [N, H].
    """
    sums, directions, row_products, of_rows, of_columns = b.saved
    sizes = of_rows, of_columns
    kept = choose(t, b.g, b.stats["logprob"], sums, sizes, *b.held["aim"])
    entries = Entries(t, b.stats, b.g)
    # the last place is that of the sums, unless they are 0 and it is a direction's
    row_sums = row_products[:, -1] * float(row_products.shape[1] > directions.shape[1])
    if entries.inside is not None:
        row_sums *= entries.inside
    main = directions, row_products
    pulls, lost = by_columns.add_kept(t, entries, kept, row_sums, head, hidden)
    of_hidden: list[Tensor] = []
    if hidden is not None:
        of_hidden.append(by_columns.finish_hidden(t, entries, kept, lost, *main, hidden))
    of_head = by_columns.finish_head(t, entries, kept, pulls, head)
    squares = {"hidden": of_hidden, "head": of_head}
    errors = {k: audit.relative_error(each) for k, each in squares.items() if each}
    seen = _seen(t, b.g, entries, kept, lost, errors)
    record, growth = _record(t), _growth(t.plan.on_cpu, t.plan.slab)
    if t.plan.on_cpu:
        return record.note(seen.read(seen.tensor().tolist()), growth)
    record.note_later(seen, growth)
    # of a first call, nothing is known yet
    return record.known


def _seen(
    t: Tiles,
    g: Tensor,
    entries: Entries,
    kept: Kept,
    lost: Tensor,
    errors: dict[str, Tensor],
) -> Seen:
    """What the record is told: the same on all ranks, as it decides the route."""
    scaled = t.scaled(g).abs()
    of_rows = entries.complete(lost).abs() / scaled
    rows = (scaled > 0).sum()
    dropped = torch.where(scaled > 0, of_rows, 0.0).sum() / rows.clamp(min=1)
    left_out = {name: squares.sum() for name, squares in kept.left_out.items()}
    taken = kept.taken("hidden" in errors, "head" in errors).to(dropped.dtype)
    parts = torch.stack((taken, dropped, *left_out.values(), *kept.needed.values()))
    columns = t.vocab
    if t.shard is not None:
        t.shard.add_up(parts)
        columns = t.shard.total
    taken, dropped, *rest = parts.unbind()
    return Seen(
        rows=rows,
        share=taken / (kept.slabs * columns),
        dropped=dropped,
        left_out=dict(zip(left_out, rest, strict=False)),
        needed={k: v / columns for k, v in zip(kept.needed, rest[len(left_out) :], strict=True)},
        errors=errors,
    )
