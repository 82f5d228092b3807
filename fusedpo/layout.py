"""Where the sequences of a call are: padded or packed, shifted or not, scored or not.

Letters: B sequences, T positions of a padded row, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.distributed import SequenceParts
from fusedpo.engine.backend import resolve
from fusedpo.engine.rows import Rows
from fusedpo.head import Head
from fusedpo.scored import (
    Fault,
    assert_on_device,
    border_fault,
    count_parts,
    count_scored,
    label_fault,
    temperature_faults,
    to_device,
    tracing,
)
from fusedpo.scores import Sequences

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Layout:
    """The scored tokens of a call and the sequences they belong to.

    Attributes:
        labels: aligned with hidden.
        rows: the scored tokens; in a graph that is traced, every position.
        sequences: of the rows.
        counts: scored tokens of each sequence, here or elsewhere, or None in a graph, where
            numbers are not known.
        backend: the one that is used; as it was given in a graph.
    """

    labels: Tensor
    rows: Rows
    sequences: Sequences
    counts: list[int] | None
    backend: str

    @property
    def last_rows(self) -> Tensor:
        """[B], the row of each sequence's last scored token; [K], of those where it is here."""
        if self.rows.scored is None:
            last = self.sequences.starts + self.sequences.here - 1
            return last if self.sequences.parts is None else last[self.sequences.parts.last_here]
        places = torch.arange(self.rows.targets.shape[0], device=self.labels.device)
        none = torch.zeros_like(self.sequences.starts)
        found = torch.where(self.rows.scored, places, 0)
        return none.scatter_reduce(0, self.sequences.index, found, "amax")

    @property
    def positions(self) -> Tensor:
        """[N], how many scored tokens of its sequence a row comes after."""
        starts = self.sequences.starts[self.sequences.index]
        if self.rows.scored is None:
            here = torch.arange(self.rows.count, device=self.labels.device) - starts
            parts = self.sequences.parts
            return here if parts is None else here + parts.before[self.sequences.index]
        before = self.rows.scored.long().cumsum(0) - self.rows.scored.long()
        return before - before[starts]

    def by_example(self, roles: int) -> Layout:
        """The same with the rows of an example's sequences side by side.

        Sequence i is one of example i % (B / roles).
        """
        assert self.counts is not None, "rows are not reordered in a graph"
        examples = self.sequences.count // roles
        index = self.sequences.index
        order = torch.argsort(index % examples * roles + index // examples, stable=True)
        places = [e + r * examples for e in range(examples) for r in range(roles)]
        return Layout(
            self.labels,
            self.rows.reorder(order),
            _laid_out(index[order], self.counts, self.sequences.lengths, places),
            self.counts,
            self.backend,
        )


def lay_out(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float | Tensor,
    num_scored: Sequence[int] | None,
    backend: str,
    empty: bool,
    sequence_group: ProcessGroup | None = None,
) -> Layout:
    """Check head, labels, borders and temperature, and find the scored tokens.

    Args:
        empty: whether a sequence may be without scored tokens. Checked here in a graph only, where
            it has to be asserted on the device.
        sequence_group: the ranks that share the sequences, or None.
    """
    head.check(hidden)
    labels = checks.label_tensor(
        labels, hidden, ignore_index, unshifted="pass shift=True with both at full length"
    )
    borders, faults = _borders(labels, cu_seqlens, empty=sequence_group is not None)
    faults.append(label_fault(labels, head.vocab, ignore_index))
    if shift:
        labels = _shifted(labels, borders, ignore_index)
    faults += temperature_faults(temperature, labels, ignore_index)
    if tracing():
        assert_on_device(faults)
        rows = Rows.all_of(labels, ignore_index)
        return Layout(labels, rows, _traced_sequences(rows, borders, empty), None, backend)
    backend = resolve(backend, hidden, head.weight, head.bias)
    if sequence_group is not None:
        every, rank = count_parts(
            labels, ignore_index, faults, sequence_group, borders=borders, num_scored=num_scored
        )
        rows = Rows.of(labels, ignore_index, sum(every[rank]))
        parts = SequenceParts.of(sequence_group, every, labels.device)
        here = _sequences(rows, borders, every[rank])
        counts = [sum(of) for of in zip(*every, strict=True)]
        lengths = to_device(counts, labels.device)
        return Layout(labels, rows, replace(here, lengths=lengths, parts=parts), counts, backend)
    counts = count_scored(labels, ignore_index, faults, borders=borders, num_scored=num_scored)
    rows = Rows.of(labels, ignore_index, sum(counts))
    return Layout(labels, rows, _sequences(rows, borders, counts), counts, backend)


def _borders(
    labels: Tensor, cu_seqlens: Tensor | None, *, empty: bool
) -> tuple[Tensor, list[Fault]]:
    """[B + 1] int64, where each sequence starts among the flattened positions; and what of it is
    still to be looked at. empty: whether one may be without any position."""
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise checks.bad_value(
                "labels",
                "[B, T], or packed [N] with cu_seqlens",
                str(list(labels.shape)),
                "pass cu_seqlens [B + 1]",
            )
        return torch.arange(labels.shape[0] + 1, device=labels.device) * labels.shape[1], []
    cu_seqlens = checks.at_hand("cu_seqlens", cu_seqlens, labels.device)
    if cu_seqlens.dtype not in checks.LABELS:
        raise checks.bad_type("cu_seqlens", "int32 or int64 [B + 1]", str(cu_seqlens.dtype))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise checks.bad_value("cu_seqlens", "[B + 1]", str(list(cu_seqlens.shape)))
    if labels.dim() != 1 and not (labels.dim() == 2 and labels.shape[0] == 1):
        raise checks.bad_value("labels", "[N] or [1, N] with cu_seqlens", str(list(labels.shape)))
    borders = to_device(cu_seqlens.long(), labels.device)
    return borders, [border_fault(borders, labels.numel(), empty=empty)]


def _shifted(labels: Tensor, borders: Tensor, ignore_index: int) -> Tensor:
    """labels[t] <- labels[t + 1] within each sequence; nothing follows its last token."""
    flat = labels.reshape(-1)
    shifted = torch.full_like(flat, ignore_index)
    shifted[:-1] = flat[1:]
    if flat.numel():
        # without a fault the borders rise; with one, an error follows
        shifted[(borders[1:] - 1).clamp(0, flat.shape[0] - 1)] = ignore_index
    return shifted.view(labels.shape)


def _sequences(rows: Rows, borders: Tensor, counts: list[int]) -> Sequences:
    positions = rows.positions
    if positions is None:
        positions = torch.arange(rows.count, device=borders.device)
    index = torch.searchsorted(borders[1:].contiguous(), positions, right=True)
    return _laid_out(index, counts, to_device(counts, borders.device))


def _traced_sequences(rows: Rows, borders: Tensor, empty: bool) -> Sequences:
    """Sequences of all positions, scored or not; what is not scored counts 0 in every sum."""
    assert rows.scored is not None, "these rows are every position"
    positions = torch.arange(rows.targets.shape[0], device=borders.device)
    index = torch.searchsorted(borders[1:].contiguous(), positions, right=True)
    # borders that end too early are a fault, but are not to be an index out of range
    index = index.clamp(max=borders.shape[0] - 2)
    none = torch.zeros_like(borders[:-1])
    lengths = none.index_add(0, index, rows.scored.long())
    if not empty:
        torch._assert_async(
            (lengths > 0).all(), "labels: expected at least one scored token in every sequence"
        )
    return Sequences(index, lengths, borders[:-1])


def _laid_out(
    index: Tensor, counts: list[int], lengths: Tensor, order: Sequence[int] | None = None
) -> Sequences:
    """Sequences one after the other, in this order; by number if not given."""
    if order is None:
        order = range(len(counts))
    starts = [0] * len(counts)
    for before, i in zip(accumulate((counts[i] for i in order), initial=0), order, strict=False):
        starts[i] = before
    return Sequences(index, lengths, to_device(starts, index.device))
