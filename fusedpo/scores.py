"""From one number per token to one number per sequence.

Letters: N scored tokens, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Which sequence each scored token belongs to.

    Attributes:
        index: [N] int64, the sequence of each scored token.
        lengths: [B] int64, scored tokens of each sequence.
        starts: [B] int64, the first of its tokens; they follow each other.
    """

    index: Tensor
    lengths: Tensor
    starts: Tensor

    @property
    def count(self) -> int:
        return self.lengths.shape[0]

    def sum(self, values: Tensor) -> Tensor:
        """[B] fp64, the sum of values [N] over each sequence.

        Not rounded to fp32: a reference is yet to be subtracted, which over tens of thousands of
        tokens is a small difference of large sums.
        """
        values = values.double()
        if values.is_cuda and not torch.compiler.is_compiling():
            return self._sum_in_order(values)
        total = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.index, values)

    def _sum_in_order(self, values: Tensor) -> Tensor:
        """Likewise where index_add would add in any order, so that results repeat."""
        order = self.starts.argsort()
        # unsafe: without a look at the lengths, for which it would wait
        sums = torch.segment_reduce(values, "sum", lengths=self.lengths[order], unsafe=True)
        return torch.zeros_like(sums).index_copy(0, order, sums)

    def sum_by_kernel(self, values: Tensor) -> Tensor:
        """As ``sum``, without a gradient, to the last bit as the tail kernel sums.

        What is subtracted from the kernel's sums has to come from it, or equal policies would
        differ by rounding.
        """
        # Triton is not there on every platform
        from fusedpo.kernels.tail import tail

        options = {"combine": "single", "link": "linear"}
        return tail(values, self.starts, self.lengths, **options)[1]


@dataclass(frozen=True)
class Scores:
    """What a loss sees of some sequences; every tensor is [B'] in fp64.

    Attributes:
        logp: log-probability of the response, summed over its tokens.
        length: number of scored tokens.
        ref_logp: the reference's logp, or None.
    """

    logp: Tensor
    length: Tensor
    ref_logp: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Log-probability per token."""
        return self.logp / self.length

    @property
    def ratio(self) -> Tensor:
        """log(pi / pi_ref) of the response."""
        if self.ref_logp is None:
            raise ValueError(
                "ref_logprobs: this loss compares with a reference, and none was given"
            )
        return self.logp - self.ref_logp

    @property
    def mean_ratio(self) -> Tensor:
        """log(pi / pi_ref) per token."""
        return self.ratio / self.length

    def __getitem__(self, which: slice | Tensor) -> Scores:
        ref = None if self.ref_logp is None else self.ref_logp[which]
        return Scores(self.logp[which], self.length[which], ref)
