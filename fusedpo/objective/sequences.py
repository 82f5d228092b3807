"""The sequences that scored tokens belong to, and sums over them.

Letters: N scored tokens, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpo.distributed import SequenceParts


@dataclass(frozen=True)
class Sequences:
    """Which sequence each scored token belongs to.

    Attributes:
        index: [N] int64, the sequence of each scored token.
        lengths: [B] int64, scored tokens of each sequence, here or elsewhere.
        starts: [B] int64, the first of its tokens; they follow each other.
        parts: which of the tokens are here, if other ranks have others; None: all.
    """

    index: Tensor
    lengths: Tensor
    starts: Tensor
    parts: SequenceParts | None = None

    @property
    def here(self) -> Tensor:
        """[B] int64, scored tokens of each sequence that are here."""
        return self.lengths if self.parts is None else self.parts.lengths

    @property
    def count(self) -> int:
        return self.lengths.shape[0]

    def sum(self, values: Tensor, *, same: bool = True) -> Tensor:
        """[B] fp64, the sum of values [N] over each sequence.

        Not rounded to fp32: a reference is yet to be subtracted, which over tens of thousands of
        tokens is a small difference of large sums.

        Args:
            same: whether every rank that has tokens of the sequences computes the same from the
                sums, rather than something of its own tokens.
        """
        sums = self._sum_here(values)
        return sums if self.parts is None else self.parts.sum(sums, same=same)

    def total(self, values: Tensor) -> Tensor:
        """The sum of values [N], a number."""
        total = values.sum()
        return total if self.parts is None else self.parts.sum(total)

    def _sum_here(self, values: Tensor) -> Tensor:
        values = values.double()
        if values.is_cuda and not torch.compiler.is_compiling():
            return self._sum_in_order(values)
        total = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.index, values)

    def _sum_in_order(self, values: Tensor) -> Tensor:
        """The same where index_add would add in any order, so that results repeat."""
        order = self.starts.argsort()
        # unsafe: without a check of the lengths, which would wait for the device
        sums = torch.segment_reduce(values, "sum", lengths=self.here[order], unsafe=True)
        return torch.zeros_like(sums).index_copy(0, order, sums)

    def sum_by_kernel(self, values: Tensor) -> Tensor:
        """As ``sum``, without a gradient, to the last bit as the tail kernel sums.

        A reference's sums are subtracted from the kernel's: by other sums, equal policies would
        differ by rounding.
        """
        # Triton is not there on every platform
        from fusedpo.kernels.tail import tail

        return tail(values, self.starts, self.lengths, combine="single", link="linear")[1]
