"""The gradient with respect to the head, weight [V, H] and bias [V], a slice of V at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpo.engine.precision import divide_, largest, multiply, unit_gain
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Range, Tiles
from fusedpo.kernels import row_stats
from fusedpo.kernels.row_stats import LOWEST


@dataclass
class HeadGradient:
    """The head's gradient: weight [V, H], bias [V]; None: not wanted.

    empty: nothing has been added yet, and the numbers in memory mean nothing. To begin with zeros
    would be a pass over all of it.
    """

    weight: Tensor | None
    bias: Tensor | None
    empty: bool = False

    @property
    def wanted(self) -> bool:
        return self.weight is not None or self.bias is not None

    def slices(
        self, c: Range, scratch: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The parts of vocabulary block c; the weight's in scratch [v, H], if that is given."""
        weight = self.weight if scratch is None else scratch
        start, stop = c if scratch is None else (0, c[1] - c[0])
        return (
            None if weight is None else weight[start:stop],
            None if self.bias is None else self.bias[slice(*c)],
        )

    def scale(self, factor: Tensor) -> HeadGradient:
        """Multiply in place."""
        for t in (self.weight, self.bias):
            if t is not None:
                t.mul_(factor)
        return self

    def add(self, other: HeadGradient, factor: Tensor) -> None:
        """Add factor times the other, in place."""
        for t, o in ((self.weight, other.weight), (self.bias, other.bias)):
            if t is None or o is None:
                continue
            if self.empty:
                torch.mul(o, factor.to(o.dtype), out=t)
            else:
                t.addcmul_(o, factor.to(o.dtype))
        self.empty = False

    def fill_empty(self) -> None:
        """Write zeros if nothing was ever added."""
        for t in (self.weight, self.bias):
            if t is not None and self.empty:
                t.zero_()
        self.empty = False

    def clone(self) -> HeadGradient:
        weight, bias = (None if t is None else t.clone() for t in (self.weight, self.bias))
        return HeadGradient(weight, bias)

    def to(self, weight: torch.dtype, bias: torch.dtype | None) -> HeadGradient:
        """The gradient in the dtypes of the head."""
        return HeadGradient(
            None if self.weight is None else self.weight.to(weight),
            None if self.bias is None else self.bias.to(bias),
        )


def new_output(t: Tiles, *, weight: bool, bias: bool) -> HeadGradient:
    """weight in the head's dtype, its slices to be written once; bias accumulated."""
    # without a row nothing would be written
    make = torch.empty if t.count else torch.zeros
    device = t.hidden.device
    return HeadGradient(
        make(t.weight.shape, dtype=t.weight.dtype, device=device) if weight else None,
        make(t.vocab, dtype=t.acc, device=device) if bias else None,
    )


def scaled_output(t: Tiles, head: HeadGradient, factor: Tensor) -> HeadGradient:
    """factor times an accumulated gradient in the head's dtype; in place in full precision."""
    weight = head.weight
    if weight is None or weight.dtype == t.weight.dtype:
        return head.scale(factor)
    out = torch.empty_like(weight, dtype=t.weight.dtype)
    for c in t.col_blocks():
        out[slice(*c)] = weight[slice(*c)] * factor
    return HeadGradient(out, None if head.bias is None else head.bias * factor)


# slices of the vocabulary


def weighted(t: Tiles, hidden: Tensor, coefficient: Tensor | None, part: int = 0) -> Tensor:
    """c h [n, H] in the operands' dtype, computed in full precision; without c, h as it is.

    Args:
        part: of the buffer, where more than one block is in use.
    """
    if coefficient is None:
        return hidden
    out = t.take("weighted rows", *hidden.shape, dtype=hidden.dtype, part=part)
    return torch.mul(hidden, coefficient[:, None], out=out)


def add_slice(
    t: Tiles,
    weight: Tensor | None,
    bias: Tensor | None,
    jacobian: Tensor,
    rows: Tensor,
    coefficient: Tensor | None,
    add: bool,
) -> None:
    """A slice of the head's gradient: weight (+)= J^T (c h), bias (+)= J^T c, for J [n, v].

    Args:
        rows: c h [n, H].
        coefficient: c [n]; None: c is in J, and rows are h.
    """
    if weight is not None:
        multiply(weight, jacobian.T, rows, add=add)
    if bias is None:
        return
    if coefficient is None:
        coefficient = torch.ones_like(jacobian[:, 0], dtype=t.acc)
    if t.operand == t.acc:
        bias.addmv_(jacobian.T, coefficient, beta=int(add))
        return
    # in two parts, so that the products' dtype does not round it
    high = coefficient.to(t.operand)
    parts = torch.stack((high, (coefficient - high.to(t.acc)).to(t.operand)), 1)
    sums = t.vector(bias.shape[0], 2)
    multiply(sums, jacobian.T, parts, add=False)
    bias.copy_(sums.sum(1).add_(bias) if add else sums.sum(1))


def accumulate(
    t: Tiles, out: HeadGradient, jacobian: Tensor, hidden: Tensor, coefficient: Tensor
) -> None:
    """out += J^T (c h) for J [n, V], h [n, H], c [n]."""
    rows = weighted(t, hidden, coefficient if out.weight is not None else None)
    for c in t.col_blocks():
        weight, bias = out.slices(c)
        add_slice(t, weight, bias, jacobian[:, slice(*c)], rows, coefficient, not out.empty)
    out.empty = False


def slice_scratch(t: Tiles, out: HeadGradient) -> Tensor | None:
    """Memory for a slice of the head's gradient in full precision, if the head is not."""
    if out.weight is None or out.weight.dtype == t.acc:
        return None
    return t.take("weight gradient slice", min(t.plan.back_cols, t.vocab), t.width)


def write_slice(
    out: HeadGradient, c: Range, part: Tensor | None, bias_part: Tensor | None, gain: Tensor | None
) -> None:
    """Divide a complete slice by the gain, and write it to the head's gradient."""
    divide_(gain, part, bias_part)
    if out.weight is not None and part is not None and part.dtype != out.weight.dtype:
        out.weight[slice(*c)] = part[: c[1] - c[0]]


def row_operands(
    t: Tiles, first: int, last: int, coefficient: Callable[[Range], Tensor | None], border: int = 0
) -> Callable[[], Iterator[tuple[Range, Tensor, Tensor]]]:
    """The backward's row blocks: (range, h [n, H], c h [n, H]), as often as they are asked for.

    A single block is gathered and weighted once for all slices of the vocabulary.

    Args:
        coefficient: c [n] of a block, or None.
        border: a row over which no block reaches.
    """
    border = max(first, border)

    def every() -> Iterator[tuple[Range, Tensor, Tensor]]:
        for start, stop in ((first, border), (border, last)):
            for r in blocks(start, stop, t.plan.back_rows):
                hidden = t.hidden_rows(*r)
                yield r, hidden, weighted(t, hidden, coefficient(r))

    if last - first > t.plan.back_rows:
        return every
    hidden = t.hidden_rows(first, last)
    only: list[tuple[Range, Tensor, Tensor]] = []
    for r in ((first, border), (border, last)):
        if r[0] < r[1]:
            rows = hidden[r[0] - first : r[1] - first]
            only.append((r, rows, weighted(t, rows, coefficient(r), len(only))))
    return lambda: iter(only)


@dataclass(frozen=True)
class RowCoefficients:
    """The numbers that make a gradient of a tile's exponentials; each [N] or None.

    Attributes:
        entry, factor, tilt: as the kernel ``jacobian`` takes them.
        missing: the factor that J still lacks; None: nothing.
        of_retained: the factor that J lacks where it was stored in the forward.
    """

    entry: Tensor
    factor: Tensor | None
    tilt: Tensor | None
    missing: Tensor | None

    @property
    def of_retained(self) -> Tensor | None:
        return self.factor if self.missing is None else self.missing

    def of(self, rows: slice | Tensor) -> RowCoefficients:
        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return RowCoefficients(
            self.entry[rows], some(self.factor), some(self.tilt), some(self.missing)
        )


def row_coefficients(
    t: Tiles, stats: dict[str, Tensor], g: Tensor, e: Tensor | None
) -> tuple[RowCoefficients, Tensor | None]:
    """The numbers of each row [N] that make J the gradient of sum(g logp + e entropy), and the
    power of two that the gradients are then too large by, or None.
    """
    fp16 = t.operand == torch.float16
    if e is not None:
        g, e = t.scaled(g), t.scaled(e)
        gain = None
        if fp16:
            gain = 2.0**10 * unit_gain(largest(torch.cat((g, e))))
            g, e = g * gain, e * gain
        factor, tilt, entry = entropy_coefficients(stats, -g, -e)
        return RowCoefficients(entry, factor, tilt, None), gain
    narrow = t.row_gain(stats["total"])
    missing = -t.scaled(g * t.row_factor(stats["logprob"], stats["total"]))
    entry = -stats["total"] * narrow
    if t.kernels.ABSORBS_FACTORS and not fp16:
        return RowCoefficients(entry * missing, missing, None, None), None
    if not fp16:
        return RowCoefficients(entry, None, None, missing), None
    assert isinstance(narrow, Tensor), "of fp16 it is"
    gain = unit_gain(largest(missing))
    return RowCoefficients(entry, narrow, None, missing * gain), gain


def entropy_coefficients(
    stats: dict[str, Tensor], g: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """factor, tilt and entry [N] of the negated gradient of sum(g logp + e entropy) by the logits:

    g (P - onehot) + e P (log P + entropy), P being exp(z - shift) exp(shift - logsumexp).
    """
    logprob, entropy = stats["logprob"], stats["entropy"]
    below = row_stats.below_logsumexp(logprob, stats["total"])
    weight, below = below.exp(), below.clamp(min=LOWEST)
    finite = logprob.clamp(min=LOWEST)
    entry = g * torch.expm1(logprob) + e * finite.exp() * (finite + entropy)
    return weight * (g + e * (below + entropy)), weight * e, entry
