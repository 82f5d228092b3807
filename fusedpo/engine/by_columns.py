"""The gradients by kept columns: what these give, and what stands for all others.

A slab's kept columns are gathered from the weight, a chunk at a time; their logits are made anew,
and both products are of them alone. What is left out is one direction a slab, and what the weight's
main directions still lack.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedpo.engine import audit
from fusedpo.engine.columns import Kept, slabs
from fusedpo.engine.cost import Buffers, Problem, padded
from fusedpo.engine.entries import Entries
from fusedpo.engine.head_gradient import HeadGradient, add_slice, weighted
from fusedpo.engine.precision import divide_, multiply
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Tiles

# columns that few rows take at a time at most: as many tiles as a GPU has multiprocessors
_WIDEST = 2**15


def widest(vocab: int, slab: int, chunk: int, *, narrow: bool) -> int:
    """Columns that few rows take at a time, in the memory of a tile [slab, chunk]. A chunk's would
    leave most of a GPU idle.

    Args:
        narrow: whether they take no more than that, as on a CPU, or where the weight is copied.
    """
    fitting = slab * chunk // audit.ROWS // 16 * 16
    return min(vocab, chunk if narrow else max(chunk, min(fitting, _WIDEST)))


def buffers(p: Problem, slab: int, chunk: int, few_columns: int, directions: int) -> Buffers:
    """The memory of the gradients, with slabs of so many rows, chunks of so many columns, so many
    of few rows, and main directions of the weight, in bytes."""
    slabs, head = -(-p.tokens // slab), bool(p.needs & {"weight", "bias"})
    few = slabs + audit.ROWS
    in_columns = p.on_cpu and p.backend == "torch" and "hidden" in p.needs
    return {
        "kept weight rows": chunk * p.hidden * p.operand,
        "gathered weight rows": chunk * p.hidden * p.weight_size if p.weight_cast else 0,
        "kept gradient rows": head * chunk * (p.hidden + 1) * p.acc,
        "wide rows": slab * p.hidden * p.acc if p.operand < p.acc else 0,
        "slab pulls": slabs * (p.hidden + 1) * p.acc,
        "lacking products": p.tokens * directions * p.acc if "hidden" in p.needs else 0,
        "slab gradient": in_columns * min(slab, p.hidden - 1) * padded(p.hidden) * p.acc,
        "few rows": few * padded(p.hidden) * p.acc,
        "few coefficients": few * padded(few_columns) * p.operand,
    }


def add_kept(
    t: Tiles,
    entries: Entries,
    kept: Kept,
    row_sums: Tensor,
    head: HeadGradient,
    hidden_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add what the kept columns give; to the hidden gradient, without the factor that J is missing.

    Args:
        row_sums: [N], those of J.

    Returns:
        pulls [slabs, H + 1]: what each row lost in the head's gradient, times the row and times 1,
        a sum over the slab. lost [N]: what J of each row lost in the hidden gradient.
    """
    lost = row_sums.clone()
    pulls = t.take("slab pulls", kept.slabs, t.width + 1)
    touched = kept.of_any_slab
    for whole in (head.weight, head.bias):
        if whole is not None and touched is None:
            whole.zero_()
        elif whole is not None and touched is not None:
            # zeros in all columns would be a pass more
            whole.index_fill_(0, touched.nonzero()[:, 0], 0.0)
    for i, r in enumerate(slabs(t)):
        rows, hidden = slice(*r), t.hidden_rows(*r)
        missing = None if entries.missing is None else entries.missing[rows]
        scaled = hidden if head.weight is None else weighted(t, hidden, missing)
        of_rows = None if hidden_grad is None else _slab_gradient(t, hidden_grad[rows])
        of_head, of_hidden = kept.columns(i)
        for columns in _chunks(t, of_head):
            z = _add_rows(t, entries, rows, hidden, columns, lost, of_rows)
            _add_columns(t, head, columns, z, scaled, missing)
        pull = lost[rows] if missing is None else lost[rows] * missing
        if head.weight is not None:
            wide = hidden
            if hidden.dtype != t.acc:
                wide = t.take("wide rows", *hidden.shape).copy_(hidden)
            pulls[i, :-1] = pull @ wide
        pulls[i, -1] = pull.sum()
        for columns in _chunks(t, of_hidden):
            _add_rows(t, entries, rows, hidden, columns, lost, of_rows)
        if hidden_grad is not None and of_rows is not None and not _is_in_place(t, of_rows):
            hidden_grad[rows] = of_rows
    return pulls, lost


def _slab_gradient(t: Tiles, rows: Tensor) -> Tensor:
    """Zeros to add a slab's hidden gradient to: its rows [n, H], or where it is added up faster."""
    if not _is_in_place(t, rows):
        rows = t.matrix("slab gradient", rows.shape[0], t.width, t.width)
    return rows.zero_()


def _is_in_place(t: Tiles, rows: Tensor) -> bool:
    return not t.column_major(rows.shape[0], t.width)


def _chunks(t: Tiles, columns: Tensor) -> Iterator[Tensor]:
    for start, stop in blocks(0, columns.shape[0], t.plan.back_cols):
        yield columns[start:stop]


def _kept_weight(t: Tiles, columns: Tensor) -> Tensor:
    """[C, H], rows of the head's weight in the operands' dtype."""
    count = columns.shape[0]
    out = t.take("kept weight rows", _most(t), t.width, dtype=t.operand)[:count]
    return t.some_weight_rows(columns, out)


def _most(t: Tiles) -> int:
    """Columns of the largest chunk: a buffer that grew would stand beside the smaller one."""
    return min(t.plan.back_cols, t.vocab)


def _add_rows(
    t: Tiles,
    entries: Entries,
    rows: slice,
    hidden: Tensor,
    columns: Tensor,
    lost: Tensor,
    of_rows: Tensor | None,
) -> Tensor:
    """Add a slab's part of the hidden gradient, for some of its columns, which are then not lost;
    J of these, [n, C]."""
    weight = _kept_weight(t, columns)
    z = entries.tile(rows, hidden, columns, weight)
    lost[rows] -= z.sum(1, dtype=t.acc)
    if of_rows is not None:
        multiply(of_rows, z, weight, add=True)
    return z


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
    memory = t.take("kept gradient rows", _most(t) * (t.width + 1))[: count * (t.width + 1)]
    weight = memory[: count * t.width].view(count, t.width) if head.weight is not None else None
    bias = memory[count * t.width :] if head.bias is not None else None
    add_slice(t, weight, bias, z, rows, coefficient, False)
    for whole, part in ((head.weight, weight), (head.bias, bias)):
        if whole is not None and part is not None:
            whole.index_add_(0, columns, part)


def finish_hidden(
    t: Tiles,
    entries: Entries,
    kept: Kept,
    lost: Tensor,
    directions: Tensor,
    row_products: Tensor,
    hidden: Tensor,
) -> Tensor:
    """Add what is left out to the hidden gradient [N, H], and complete it.

    Args:
        directions: [H, K], the weight's main ones.
        row_products: [N, 16], the first K of them of J W with these, but for its factor.

    Returns:
        [2], squares of its error and of itself.
    """
    sample = audit.sample_rows(t, entries.complete(lost))
    others, exact = _few_rows(t, entries, kept, sample.chosen)
    for i, r in enumerate(slabs(t)):
        hidden[slice(*r)].addmm_(lost[slice(*r), None], others[i, None])
    # in the main directions of the weight, nothing was left out
    count = directions.shape[1]
    there = torch.mm(hidden, directions, out=t.take("lacking products", t.count, count))
    products = row_products[:, :count]
    if entries.inside is None:
        lacking = torch.sub(products, there, out=there)
    else:
        lacking = there.neg_().addcmul_(products, entries.inside[:, None])
    hidden.addmm_(lacking, directions.T)
    if entries.missing is not None:
        hidden *= entries.missing[:, None]
        exact *= entries.missing[sample.chosen, None]
    divide_(entries.gain, hidden, exact)
    return audit.of_rows(t, sample, exact, hidden)


def _few_rows(t: Tiles, entries: Entries, kept: Kept, rows: Tensor) -> tuple[Tensor, Tensor]:
    """q W [slabs, H], the weight along each slab's direction; and J W [n, H] of some rows, exactly.

    Together, as both read all of the weight for few products.
    """
    states = t.reader.some(rows).to(t.operand)
    count = kept.slabs
    out = t.matrix("few rows", count + states.shape[0], t.width, t.width)
    narrow, slab = t.plan.on_cpu or t.weight.dtype != t.operand, min(t.plan.slab, t.count)
    most = widest(t.vocab, slab, t.plan.back_cols, narrow=narrow)
    for c in blocks(0, t.vocab, most):
        weight = t.weight_rows(*c)
        left = t.matrix("few coefficients", len(out), len(weight), most, t.operand)
        # in fp16, shares of columns would be rounded to nothing
        left[:count] = kept.directions("hidden", c).mul_(t.gain)
        left[count:] = entries.tile(rows, states, c, weight)
        multiply(out, left, weight, add=c[0] > 0)
    out[:count] /= t.gain
    return out[:count], out[count:]


def finish_head(
    t: Tiles, entries: Entries, kept: Kept, pulls: Tensor, head: HeadGradient
) -> list[Tensor]:
    """Add what is left out to the head's gradient, a slab's direction times its pull, and complete
    it; [2] of weight and of bias, squares of its error and of itself."""
    if not head.wanted:
        return []
    squares = t.vector(1).zero_()
    touched = kept.of_any_slab
    for c in blocks(0, t.vocab, t.plan.back_cols):
        directions = kept.directions("head", c).T
        # nothing is in memory but where some slab keeps a column
        unset = None if touched is None else (~touched[slice(*c)]).nonzero()[:, 0]
        for whole, pull in ((head.weight, pulls[:, :-1]), (head.bias, pulls[:, -1:])):
            if whole is None:
                continue
            block = whole[slice(*c)]
            if unset is not None:
                block.index_fill_(0, unset, 0.0)
            block.view(len(block), -1).addmm_(directions, pull)
            divide_(entries.gain, block)
            if block.dim() > 1:  # while it is in a cache
                numbers = block.view(-1)
                squares += torch.dot(numbers, numbers)  # torch's norm takes twice as long
    head.empty = False
    return audit.of_columns(t, entries, kept, head, squares)
