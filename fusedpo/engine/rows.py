"""The scored tokens of a call, and how their hidden states are read from memory.

Letters: N scored tokens, P positions (scored or not), H hidden size, n rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def gathers(shape: Sequence[int], strides: Sequence[int], rows: Rows) -> bool:
    """Whether rows of hidden states, of this shape and these strides, have to be copied: some are
    left out, or they are no rectangle."""
    return rows.positions is not None or not is_flat(shape, strides)


def is_flat(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the leading axes of a tensor can be made one without a copy."""
    size, step = 1, None
    for length, stride in reversed([*zip(shape[:-1], strides[:-1], strict=True)]):
        if length == 0:
            return True
        if length == 1:
            continue
        if step is not None and stride != step * size:
            return False
        step, size = (stride if step is None else step), size * length
    return True
