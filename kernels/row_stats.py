"""Running statistics of rows of logits, and the results that come of them.

Sums leave the target's entry out and are relative to the row's shift; logit_tile says why, and how
a tile is folded in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(LOWEST) is 0 in every dtype and 0 * LOWEST is 0, where exp(-inf) * -inf would be NaN
LOWEST = -1e4

# a rise by more steps than this leaves nothing of what was summed before, in any dtype
MOST_STEPS = 126

_LOG_2 = math.log(2.0)


@dataclass
class RowStats:
    """Running statistics of n rows; all [n], in the tile's dtype. None: not asked for.

    Sums are relative to the row's ``shift``.
    """

    peak: Tensor  # largest non-target logit so far
    shift: Tensor  # what exponentials are taken relative to; 0 until a peak is finite
    steps: Tensor  # how often log 2 was added to it, a whole number
    total: Tensor  # sum of exp(z - shift) over the non-target logits so far
    target: Tensor  # the target's logit, once its tile has been seen
    weighted: Tensor | None  # sum of exp(z - shift) (z - shift) over non-target logits: entropy
    squares: Tensor | None  # sum of exp(2 (z - shift)) over non-target logits: log-sum of squares
    plain: Tensor | None  # sum of all logits: mean logit

    @classmethod
    def start(
        cls,
        rows: int,
        like: Tensor,
        *,
        entropy: bool = False,
        squares: bool = False,
        mean: bool = False,
    ) -> RowStats:
        """Statistics of rows of which no tile has been seen yet."""

        def full(value: float) -> Tensor:
            return torch.full((rows,), value, dtype=like.dtype, device=like.device)

        return cls(
            peak=full(-torch.inf),
            shift=full(0.0),
            steps=full(0.0),
            total=full(0.0),
            target=full(-torch.inf),
            weighted=full(0.0) if entropy else None,
            squares=full(0.0) if squares else None,
            plain=full(0.0) if mean else None,
        )

    def of(self, rows: slice) -> RowStats:
        """The statistics of some rows, in the same memory."""

        def of_rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        return RowStats(
            peak=self.peak[rows],
            shift=self.shift[rows],
            steps=self.steps[rows],
            total=self.total[rows],
            target=self.target[rows],
            weighted=of_rows(self.weighted),
            squares=of_rows(self.squares),
            plain=of_rows(self.plain),
        )

    @property
    def rest(self) -> Tensor:
        """logsumexp over the non-target logits, [n]."""
        return self.shift + self.total.log()

    @property
    def logprob(self) -> Tensor:
        """log-probability of the target, [n], never above 0; NaN for a target of +inf."""
        logprob = torch.nn.functional.logsigmoid(self.target - self.rest)
        return logprob.masked_fill(self.target == torch.inf, torch.nan)

    @property
    def logsumexp(self) -> Tensor:
        """logsumexp over all logits, [n]."""
        return torch.logaddexp(self.rest, self.target)

    @property
    def entropy(self) -> Tensor:
        """-sum p log p, [n]: a sum of non-negative terms, so a confident row keeps its digits."""
        assert self.weighted is not None, "entropy was not asked for when the rows were started"
        logprob = self.logprob
        below = below_logsumexp(logprob, self.total)
        others = -below.clamp(min=LOWEST) * self.total - self.weighted
        own = torch.where(logprob == -torch.inf, 0.0, logprob.exp() * logprob)
        return below.exp() * others - own

    @property
    def log_sum_sq_probs(self) -> Tensor:
        """log of the sum of squared probabilities, [n]."""
        assert self.squares is not None, "squares were not asked for when the rows were started"
        logprob = self.logprob
        rest = 2 * below_logsumexp(logprob, self.total) + self.squares.log()
        return torch.logaddexp(torch.where(self.squares > 0, rest, -torch.inf), 2 * logprob)

    @property
    def top1(self) -> Tensor:
        """Whether no other logit is larger than the target's, [n]."""
        return self.target >= self.peak


def below_logsumexp(logprob: Tensor, total: Tensor) -> Tensor:
    """shift - logsumexp [n], from 1 - p = total exp(shift - logsumexp); -inf for an empty total.

    The difference of the two numbers themselves would have the rounding of logits in it, which are
    as large as any offset that all of them share.
    """
    # log(1 - p), without cancellation on either side of p = 1/2
    likely = logprob > -_LOG_2
    others = torch.where(likely, (-torch.expm1(logprob)).log(), torch.log1p(-logprob.exp()))
    return torch.where(total > 0, others - total.log(), torch.where(total == 0, -torch.inf, total))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for whole numbers, exactly, by its bits: exp2 is an approximation on some devices.

    Clamped to the dtype's normal numbers.
    """
    if exponent.dtype == torch.float64:
        return ((exponent.clamp(-1022, 1023) + 1023).long() << 52).view(torch.float64)
    return ((exponent.clamp(-126, 127) + 127).int() << 23).view(torch.float32)
