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

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusedpo.engine import audit, column_sums, hidden_gradient
from fusedpo.engine.column_sums import ColumnSums
from fusedpo.engine.columns import Kept, choose, slabs
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.entries import Entries
from fusedpo.engine.head_gradient import HeadGradient, add_slice, new_output, weighted
from fusedpo.engine.plan import RouteName
from fusedpo.engine.precision import divide_, multiply
from fusedpo.engine.routes.base import Backward, Forward
from fusedpo.engine.routes.recompute import Recompute, both_gradients
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Tiles
from fusedpo.engine.tolerance import Record, record_of

# Rows of a slab, on the CPU and elsewhere: few keep few columns, many multiply faster, and fill a
# GPU. From one size to twice that the kept share grows by 1.2 (benchmarks/compact.py).
_SLAB = {True: 64, False: 1024}
_GROWTH = 0.26

# kept columns that are gathered at a time
_CHUNKS = (4096, 2048, 1024, 512)


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
        chunks = dict.fromkeys(min(chunk, p.vocab) for chunk in _CHUNKS)
        return [
            replace(p, slab=slab, back=(n, chunk))
            for chunk in chunks
            for slab in (*slabs, max(1, p.tokens))
        ]

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        rows = max(1, min(p.slab or n, p.tokens))
        count, (back_rows, chunk) = -(-p.tokens // rows), p.back or (n, v)
        of_sums = column_sums.buffers(p, rows, v)
        forward = {**p.tile(n, v, gradient=True), **of_sums}
        forward["tile"] = max(forward["tile"], p.hidden * p.acc)
        # of the exact gradients, if they have to be made after all
        exact = Recompute(split=False).cost(replace(p, entropy=True), n, v).backward
        exact |= p.tile(back_rows, chunk, gradient=True)
        own = {
            **p.tile(rows, chunk, gradient=True),
            "weighted rows": rows * p.hidden * p.operand,
            "weight rows": 0,
        }
        backward = {name: max(exact.get(name, 0), own.get(name, 0)) for name in {**exact, **own}}
        whole = 0 if p.is_whole_output or "hidden" not in p.needs else p.tokens
        backward |= {
            "column sums": of_sums["column sums"],
            "main directions": of_sums["main directions"],
            **dict.fromkeys(("kept for hidden", "kept for head"), count * p.vocab),
            **audit.buffers(p),
            "hidden gradient": max(whole * p.hidden * p.acc, exact.get("hidden gradient", 0)),
            "kept weight rows": chunk * p.hidden * p.operand,
            "kept gradient rows": chunk * (p.hidden + 1) * p.acc,
            "slab directions": 2 * count * (p.hidden + 1) * p.acc,
        }
        if "weight" in p.needs and p.weight_size < p.acc:
            backward["weight gradient accumulators"] = p.vocab * p.hidden * p.acc
        kept = 1 + len(p.needs & {"hidden", "weight"})
        products = 1 + kept * min(1.0, p.share * _growth(p.on_cpu, rows))
        products += audit.products(p) + 2 * count / max(1, p.tokens)
        return Cost(products, forward, backward)

    def forward(self, t: Tiles) -> Forward:
        sums = ColumnSums(t)
        stats = hidden_gradient.forward_pass(t, None, sums)
        # what is aimed at is settled here: a second backward of the graph repeats the first
        allowed = {name: _record(t).allowed(name) for name in ("hidden", "head")}
        saved = sums.values, sums.directions, sums.row_products
        return Forward(stats, saved=saved, held={"allowed": allowed})

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        needs = t.call.needs
        out = whole = None
        if "hidden" in needs:
            out = hidden_gradient.new_output(t)
            in_place = out.dtype == t.acc and t.rows.positions is None
            whole = out if in_place else t.take("hidden gradient", t.count, t.width)
        head = _accumulators(t)
        if t.count and not _by_columns(t, b, head, whole):
            # not beside those that take their place
            del out, whole, head
            head = new_output(t, weight="weight" in needs, bias="bias" in needs)
            return both_gradients(t, b, head, "hidden" in needs), head
        if out is not None and whole is not None and whole is not out:
            hidden_gradient.write_rows(t, out, 0, t.count, whole)
        return out, head


def _growth(on_cpu: bool, slab: int) -> float:
    return float((slab / _SLAB[on_cpu]) ** _GROWTH)


def _accumulators(t: Tiles) -> HeadGradient:
    """The head's gradient in full precision, 0."""
    weight = bias = None
    if "weight" in t.call.needs and t.weight.dtype == t.acc:
        # zeros() of a large tensor takes no pass over it on the CPU, as zero_() does
        weight = torch.zeros_like(t.weight, memory_format=torch.contiguous_format)
    elif "weight" in t.call.needs:
        weight = t.take("weight gradient accumulators", *t.weight.shape).zero_()
    if "bias" in t.call.needs:
        bias = t.vector(t.vocab).zero_()
    return HeadGradient(weight, bias)


def _record(t: Tiles) -> Record:
    """Of calls like this one, by all that tells kinds apart."""
    return record_of(t.plan.tolerance, t.hidden.device.type, t.plan.vocab, t.width)


def _by_columns(t: Tiles, b: Backward, head: HeadGradient, hidden: Tensor | None) -> bool:
    """Write the gradients by kept columns; whether they are within the tolerance.

    Args:
        head: of zeros.
        hidden: [N, H].
    """
    sums, directions, row_products = b.saved
    kept = choose(t, b.g, b.stats["logprob"], sums, b.held["allowed"])
    entries = Entries(t, b.stats, b.g)
    lost = _write(t, entries, kept, directions, row_products, head, hidden)
    errors = audit.errors(t, entries, kept, lost, head, hidden)
    taken, dropped, *left_out = _noted(t, b.g, kept, lost, hidden is not None, head.wanted)
    share = taken / (kept.slabs * (t.vocab if t.shard is None else t.shard.total))
    return _record(t).note(
        min(1.0, share / _growth(t.hidden.device.type == "cpu", t.plan.slab)),
        dict(zip(kept.left_out, left_out, strict=True)),
        errors,
        kept=share,
        dropped=dropped,
    )


def _noted(
    t: Tiles, g: Tensor, kept: Kept, lost: Tensor, of_hidden: bool, of_head: bool
) -> list[float]:
    """How many columns a product took, a sum over the slabs; the mean probability that a row with
    a gradient lost; and the squared importances that the gradients left out. Of the whole
    vocabulary: records decide the route, which all ranks have to share."""
    scaled = t.scaled(g).abs()
    dropped = torch.where(scaled > 0, lost.abs() / scaled, 0.0).sum()
    dropped /= (scaled > 0).sum().clamp(min=1)
    taken = kept.taken(of_hidden, of_head).to(dropped.dtype)
    noted = torch.stack((taken, dropped, *(v.sum() for v in kept.left_out.values())))
    if t.shard is not None:
        t.shard.add_up(noted)
    return noted.tolist()


def _write(
    t: Tiles,
    entries: Entries,
    kept: Kept,
    directions: Tensor,
    row_products: Tensor,
    head: HeadGradient,
    hidden_grad: Tensor | None,
) -> Tensor:
    """Write the gradients; what each row of the hidden states' lost, times its upstream gradient,
    [N]."""
    lost = t.vector(t.count)
    others = _others(t, kept) if hidden_grad is not None else None
    pulls = t.take("slab directions", kept.slabs, t.width + 1, part=1)
    for i, r in enumerate(slabs(t)):
        rows, hidden = slice(*r), t.hidden_rows(*r)
        missing = None if entries.missing is None else entries.missing[rows]
        inside = 1.0 if entries.inside is None else entries.inside[rows, None]
        products = row_products[rows] * inside
        scaled = hidden if head.weight is None else weighted(t, hidden, missing)
        of_rows = None if hidden_grad is None else hidden_grad[rows].zero_()
        left = products[:, -1].clone()
        of_head, of_hidden = kept.columns(i)
        for columns in _chunks(t, of_head):
            weight = _kept_weight(t, columns)
            z = entries.tile(rows, hidden, columns, weight)
            left -= z.sum(1, dtype=t.acc)
            if of_rows is not None:
                multiply(of_rows, z, weight, add=True)
            _add_columns(t, head, columns, z, scaled, missing)
        if head.wanted:
            pull = left if missing is None else left * missing
            pulls[i, :-1] = pull @ hidden.to(t.acc)
            pulls[i, -1] = pull.sum()
        if of_rows is not None and others is not None:
            for columns in _chunks(t, of_hidden):
                weight = _kept_weight(t, columns)
                z = entries.tile(rows, hidden, columns, weight)
                left -= z.sum(1, dtype=t.acc)
                multiply(of_rows, z, weight, add=True)
            of_rows.addmm_(left[:, None], others[i, None])
            # in the main directions of the weight, nothing was left out
            of_rows.addmm_(products[:, :-1] - of_rows @ directions, directions.T)
            if missing is not None:
                of_rows *= missing[:, None]
        lost[rows] = left if missing is None else left * missing
    _add_others(t, kept, head, pulls)
    divide_(entries.gain, hidden_grad, head.weight, head.bias, lost)
    return lost


def _chunks(t: Tiles, columns: Tensor) -> Iterator[Tensor]:
    for start, stop in blocks(0, columns.shape[0], t.plan.back_cols):
        yield columns[start:stop]


def _kept_weight(t: Tiles, columns: Tensor) -> Tensor:
    """[C, H], rows of the head's weight in the operands' dtype."""
    out = t.take("kept weight rows", columns.shape[0], t.width, dtype=t.operand)
    if t.weight.dtype == t.operand:
        return torch.index_select(t.weight, 0, columns, out=out)
    return out.copy_(t.weight[columns])


def _add_columns(
    t: Tiles,
    head: HeadGradient,
    columns: Tensor,
    z: Tensor,
    rows: Tensor,
    coefficient: Tensor | None,
) -> None:
    """Add a slab's part of the head's gradient, for some of its columns."""
    if not head.wanted:
        return
    count = columns.shape[0]
    memory = t.take("kept gradient rows", count * (t.width + 1))
    weight = memory[: count * t.width].view(count, t.width) if head.weight is not None else None
    bias = memory[count * t.width :] if head.bias is not None else None
    add_slice(t, weight, bias, z, rows, coefficient, False)
    for whole, part in ((head.weight, weight), (head.bias, bias)):
        if whole is not None and part is not None:
            whole.index_add_(0, columns, part)


def _others(t: Tiles, kept: Kept) -> Tensor:
    """q W [slabs, H] of what the hidden gradient leaves out, in full precision."""
    out = t.take("slab directions", kept.slabs, t.width).zero_()
    for c in blocks(0, t.vocab, t.plan.back_cols):
        out.addmm_(kept.directions("hidden", c), t.weight_rows(*c).to(t.acc))
    return out


def _add_others(t: Tiles, kept: Kept, head: HeadGradient, pulls: Tensor) -> None:
    """Add what the head's gradient leaves out: its direction times the sum of the rows."""
    if not head.wanted:
        return
    for c in blocks(0, t.vocab, t.plan.back_cols):
        directions = kept.directions("head", c).T
        if head.weight is not None:
            head.weight[slice(*c)].addmm_(directions, pulls[:, :-1])
        if head.bias is not None:
            head.bias[slice(*c)].addmv_(directions, pulls[:, -1])
