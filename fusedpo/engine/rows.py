"""The scored tokens of a call, and how their hidden states are read from memory.

Letters: N scored tokens, P positions (scored or not), H hidden size, n rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The scored tokens of a call.

    While a graph is traced their number is not known; then all positions are rows, and ``scored``
    tells them apart.

    Attributes:
        targets: [N] int64, labels of the scored tokens.
        positions: [N] int64 into the flattened labels, or None if every position is a row, in
            order.
        shape: shape of the labels.
        scored: [N] bool, or None if all rows are scored.
    """

    targets: Tensor
    positions: Tensor | None
    shape: torch.Size
    scored: Tensor | None = None

    @classmethod
    def all_of(cls, labels: Tensor, ignore_index: int) -> Rows:
        """Every position, scored or not."""
        flat = labels.reshape(-1).long()
        return cls(flat, None, labels.shape, flat != ignore_index)

    @classmethod
    def of(cls, labels: Tensor, ignore_index: int, count: int | None = None) -> Rows:
        """The scored positions.

        Args:
            count: how many labels are scored, if that is known; else it is read from the device.
        """
        flat = labels.reshape(-1)
        scored = flat != ignore_index
        if count is None:
            count = int(scored.sum())
        if count == flat.shape[0]:
            # a copy: the caller may change the labels before the backward
            return cls(flat.to(torch.int64, copy=True), None, labels.shape)
        # nonzero() would wait for the device to learn the count; the ignored share one entry more
        rank = torch.where(scored, scored.cumsum(0) - 1, count)
        everywhere = torch.arange(flat.shape[0], device=flat.device)
        room = torch.empty(count + 1, dtype=torch.int64, device=flat.device)
        positions = room.scatter_(0, rank, everywhere)[:count]
        return cls(flat[positions].long(), positions, labels.shape)

    @property
    def count(self) -> int:
        return self.targets.shape[0]

    def reorder(self, order: Tensor) -> Rows:
        """The same tokens, row i being the former row order[i]."""
        positions = order if self.positions is None else self.positions[order]
        return Rows(self.targets[order], positions, self.shape)

    def gather(self, values: Tensor) -> Tensor:
        """[N] from values shaped like the labels."""
        flat = values.reshape(-1)
        if self.scored is not None:
            return torch.where(self.scored, flat, 0)
        return flat if self.positions is None else flat[self.positions]

    def scatter(self, values: Tensor) -> Tensor:
        """Shaped like the labels from [N]; 0 where ignored."""
        if self.positions is None:
            return values.reshape(self.shape)
        out = values.new_zeros(self.shape.numel())
        return out.index_put((self.positions,), values).reshape(self.shape)


def blocks(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges (begin, end) of at most ``step`` that cover start .. stop."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


def gathers(hidden: Tensor, rows: Rows) -> bool:
    """Whether rows of hidden have to be copied: some are left out, or they are no rectangle."""
    return rows.positions is not None or _flat(hidden)[1] is not None


def _flat(hidden: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """Rows [R, H] in the memory of hidden [..., H]; and from each to the next along the leading
    axes, in rows, or None if they are the positions in order.

    A slice as ``hidden[:, :-1]`` cannot be flattened without a copy of all of it; rows may overlap.
    """
    try:
        return hidden.view(-1, hidden.shape[-1]), None
    except RuntimeError:
        *strides, within = hidden.stride()
    apart = max(1, math.gcd(*strides))
    steps = tuple(stride // apart for stride in strides)
    last = sum((size - 1) * step for size, step in zip(hidden.shape, steps, strict=False))
    return hidden.as_strided((last + 1, hidden.shape[-1]), (apart, within)), steps


class HiddenRows:
    """Reads the hidden states of scored tokens, wherever in memory they are.

    Attributes:
        flat: [R, H], rows in the memory of hidden, among them those of all positions.
    """

    def __init__(self, hidden: Tensor, rows: Rows) -> None:
        self.flat, self._steps = _flat(hidden)
        self._leading, self._rows = hidden.shape[:-1], rows

    def places(self, start: int, stop: int) -> Tensor | None:
        """[n] int64, where rows start .. stop are in ``flat``; None: right there."""
        positions = self._rows.positions
        if positions is not None:
            return self._in_memory(positions[start:stop])
        if self._steps is None:
            return None
        return self._in_memory(torch.arange(start, stop, device=self.flat.device))

    def positions_of(self, rows: Tensor) -> Tensor:
        """[K] into the flattened positions, of rows [K]."""
        positions = self._rows.positions
        return rows if positions is None else positions[rows]

    def some(self, rows: Tensor) -> Tensor:
        """[K, H], the hidden states of rows [K]."""
        return self.flat[self._in_memory(self.positions_of(rows))]

    def _in_memory(self, positions: Tensor) -> Tensor:
        """Flattened positions as rows of ``flat``: by numbers that no device has to be sent."""
        if self._steps is None:
            return positions
        places = torch.zeros_like(positions)
        for size, step in zip(reversed(self._leading), reversed(self._steps), strict=True):
            places += positions % size * step
            positions = positions // size
        return places
