"""The batch of a call and its sequences: padded or packed, shifted or not, scored or not.

Letters: B sequences, T positions of a padded row, N scored tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.checks import tracing
from fusedpo.distributed import SequenceParts, checked_group
from fusedpo.engine.backend import resolve
from fusedpo.engine.batch import Batch
from fusedpo.engine.rows import Rows
from fusedpo.head import Head
from fusedpo.labels import aligned_labels
from fusedpo.objective.device_checks import (
    DeferredCheck,
    assert_on_device,
    border_check,
    count_parts,
    count_scored,
    label_check,
    temperature_checks,
    to_device,
)
from fusedpo.objective.sequences import Sequences

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Layout:
    """The batch of a call with its labels and sequences.

    Attributes:
        batch: the rows in the order in which they are scored.
        labels: [...], aligned with hidden.
        sequences: of the rows.
        counts: scored tokens of each sequence, here or elsewhere, or None in a graph, where
            numbers are not known.
    """

    batch: Batch
    labels: Tensor
    sequences: Sequences
    counts: list[int] | None

    @property
    def rows(self) -> Rows:
        """The scored tokens; in a graph that is traced, every position."""
        return self.batch.rows

    @property
    def device(self) -> torch.device:
        """The device of hidden, where all tensors are."""
        return self.labels.device

    @property
    def last_rows(self) -> Tensor:
        """[B], the row of each sequence's last scored token; with parts [K], of those here."""
        if self.rows.scored is None:
            last = self.sequences.starts + self.sequences.here - 1
            return last if self.sequences.parts is None else last[self.sequences.parts.last_here]
        places = torch.arange(self.rows.targets.shape[0], device=self.labels.device)
        none = torch.zeros_like(self.sequences.starts)
        scored = torch.where(self.rows.scored, places, 0)
        return none.scatter_reduce(0, self.sequences.index, scored, "amax")

    @property
    def positions(self) -> Tensor:
        """[N], the place of each scored token among those of its sequence, from 0."""
        starts = self.sequences.starts[self.sequences.index]
        if self.rows.scored is None:
            here = torch.arange(self.rows.count, device=self.labels.device) - starts
            parts = self.sequences.parts
            return here if parts is None else here + parts.before[self.sequences.index]
        before = self.rows.scored.long().cumsum(0) - self.rows.scored.long()
        return before - before[starts]

    def by_example(self, roles: int) -> Layout:
        """The batch with the rows of an example's sequences side by side.

        Sequence i is one of example i % (B / roles).
        """
        assert self.counts is not None, "rows are not reordered in a graph"
        examples = self.sequences.count // roles
        index = self.sequences.index
        order = torch.argsort(index % examples * roles + index // examples, stable=True)
        places = [e + r * examples for e in range(examples) for r in range(roles)]
        return replace(
            self,
            batch=replace(self.batch, rows=self.rows.reorder(order)),
            sequences=_sequences_in(places, index[order], self.counts, self.sequences.lengths),
        )

    def within(self, gradient_tolerance: float) -> Layout:
        """The same layout, whose gradients may have this relative error."""
        return replace(self, batch=self.batch.within(gradient_tolerance))


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
    sequence_group: ProcessGroup | None,
) -> Layout:
    """The batch of a call, whose head, labels, borders and temperature are checked here.

    Args:
        empty: whether a sequence may be without scored tokens. Checked here in a graph only, where
            it has to be asserted on the device.
        sequence_group: the ranks that share the sequences, or None.
    """
    group = _sequence_group(sequence_group, head, shift)
    checks.head_inputs(hidden, head.weight, head.bias)
    head.check_logits()
    labels = checks.label_tensor(
        labels, hidden, ignore_index, unshifted="pass shift=True with both at full length"
    )
    borders, deferred = _borders(labels, cu_seqlens, empty=group is not None)
    deferred.append(label_check(labels, head.vocab, ignore_index))
    if shift:
        labels = aligned_labels(labels, borders, ignore_index=ignore_index)
    deferred += temperature_checks(temperature, labels, ignore_index)
    counts: list[int] | None = None
    if tracing():
        assert_on_device(deferred)
        rows = Rows.all_of(labels, ignore_index)
        sequences = _traced_sequences(rows, borders, empty)
    else:
        backend = resolve(backend, hidden, head.weight, head.bias)
        if group is None:
            counts = count_scored(
                labels, ignore_index, deferred, borders=borders, num_scored=num_scored
            )
            rows = Rows.of(labels, ignore_index, sum(counts))
            sequences = _sequences(rows, borders, counts)
        else:
            every, rank = count_parts(
                labels, ignore_index, deferred, group, borders=borders, num_scored=num_scored
            )
            rows = Rows.of(labels, ignore_index, sum(every[rank]))
            counts = [sum(of_ranks) for of_ranks in zip(*every, strict=True)]
            sequences = replace(
                _sequences(rows, borders, every[rank]),
                lengths=to_device(counts, labels.device),
                parts=SequenceParts.of(group, every, labels.device),
            )
    return Layout(Batch(hidden, head, rows, temperature, backend), labels, sequences, counts)


def lay_out_tokens(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    backend: str,
    num_scored: int | None,
) -> Batch:
    """The batch of a call without sequences; all of it is checked here."""
    checks.head_inputs(hidden, head.weight, head.bias)
    head.check_logits()
    labels = checks.label_tensor(labels, hidden, ignore_index)
    deferred = [
        label_check(labels, head.vocab, ignore_index),
        *temperature_checks(temperature, labels, ignore_index),
    ]
    if tracing():
        assert_on_device(deferred)
        rows = Rows.all_of(labels, ignore_index)
    else:
        backend = resolve(backend, hidden, head.weight, head.bias)
        (count,) = count_scored(labels, ignore_index, deferred, num_scored=num_scored)
        rows = Rows.of(labels, ignore_index, count)
    return Batch(hidden, head, rows, temperature, backend)


def _sequence_group(group: ProcessGroup | None, head: Head, shift: bool) -> ProcessGroup | None:
    """The ranks that share the sequences, checked; None for none or one."""
    if group is None:
        return None
    if tracing():
        raise checks.bad_value(
            "sequence_group",
            "None inside torch.compile",
            "a group",
            "call the loss outside of the graph, under torch.compiler.disable",
        )
    if shift:
        raise checks.bad_value(
            "shift",
            "False beside sequence_group",
            "True",
            "shift the labels before they are cut: a part's last token predicts the next part's "
            "first",
        )
    ranks = checked_group("sequence_group", group)
    if ranks is not None and head.shard is not None and ranks is head.shard.group:
        raise checks.bad_value(
            "sequence_group",
            "another group than vocab_group, whose ranks have the same tokens",
            "the same group",
            "make a group of the ranks that share the sequences: torch.distributed.new_group",
        )
    return ranks


def _borders(
    labels: Tensor, cu_seqlens: Tensor | None, *, empty: bool
) -> tuple[Tensor, list[DeferredCheck]]:
    """[B + 1] int64, the start of each sequence among the flattened positions and their end; and
    the checks of it that are left.

    Args:
        empty: whether a sequence may be without any position.
    """
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
        remedy = "pass cu_seqlens.long()"
        raise checks.bad_type("cu_seqlens", "int32 or int64 [B + 1]", str(cu_seqlens.dtype), remedy)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        expected = (
            "the first position of each of B sequences, then the number of positions, [B + 1]"
        )
        raise checks.bad_value("cu_seqlens", expected, str(list(cu_seqlens.shape)))
    if labels.dim() != 1 and not (labels.dim() == 2 and labels.shape[0] == 1):
        remedy = "leave cu_seqlens out if rows are padded"
        raise checks.bad_value(
            "labels", "[N] or [1, N] with cu_seqlens", str(list(labels.shape)), remedy
        )
    borders = to_device(cu_seqlens.long(), labels.device)
    return borders, [border_check(borders, labels.numel(), empty=empty)]


def _sequences(rows: Rows, borders: Tensor, counts: list[int]) -> Sequences:
    positions = rows.positions
    if positions is None:
        positions = torch.arange(rows.count, device=borders.device)
    index = torch.searchsorted(borders[1:].contiguous(), positions, right=True)
    return _sequences_in(range(len(counts)), index, counts, to_device(counts, borders.device))


def _traced_sequences(rows: Rows, borders: Tensor, empty: bool) -> Sequences:
    """Sequences of all positions, scored or not; those not scored count 0 in every sum."""
    assert rows.scored is not None, "these rows are every position"
    positions = torch.arange(rows.targets.shape[0], device=borders.device)
    index = torch.searchsorted(borders[1:].contiguous(), positions, right=True)
    # borders that end too early fail a check, and must not be an index out of range before it
    index = index.clamp(max=borders.shape[0] - 2)
    none = torch.zeros_like(borders[:-1])
    lengths = none.index_add(0, index, rows.scored.long())
    if not empty:
        torch._assert_async(
            (lengths > 0).all(), "labels: expected at least one scored token in every sequence"
        )
    return Sequences(index, lengths, borders[:-1])


def _sequences_in(
    order: Iterable[int], index: Tensor, counts: list[int], lengths: Tensor
) -> Sequences:
    """Sequences whose tokens follow each other in this order."""
    order = list(order)
    starts = [0] * len(counts)
    for before, i in zip(accumulate((counts[i] for i in order), initial=0), order, strict=False):
        starts[i] = before
    return Sequences(index, lengths, to_device(starts, index.device))
