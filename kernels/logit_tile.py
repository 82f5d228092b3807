"""What is done to one tile of logits: fold it into running row statistics, or turn it into a
Jacobian.

Letters: n rows of a tile, v vocabulary columns of a tile, y the target column of a row.

A tile holds z [n, v], the final logits of n rows against v vocabulary entries, in fp32 (fp64 for
fp64 inputs). Two things are ever done to it.

*Fold.* The row statistics are kept over all entries **but the target's**:

    peak = max_{j != y} z_j         total = sum_{j != y} exp(z_j - peak)

so that the log-probability of the target is

    logp = z_y - logsumexp(z) = logsigmoid(z_y - peak - log(total))

which has no cancellation: for a confident token, z_y and logsumexp(z) agree in all their digits and
their difference would be rounding noise, while the log-sigmoid of a large number is exact.

*Jacobian.* With the statistics known, the tile becomes J, the negated derivative of logp with
respect to z, but for one factor a row:

    softmax(z) - onehot(y) = (1 - p) / total * J,   J_j = exp(z_j - peak) for j != y,   J_y = -total

The factor is formed from expm1(logp), again without cancellation, and scales rows of hidden size,
not of vocabulary size. The entries of a row of J cancel as exactly as they were summed, however
large the logits, which a softmax from a rounded logsumexp does not achieve.

The functions with the suffix ``_torch`` are the definition; every kernel is held to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(LOWEST) is 0 and 0 * LOWEST is 0, where exp(-inf) * -inf would be NaN
LOWEST = -1e30


@dataclass
class RowStats:
    """Running statistics of n rows; all [n], in the tile's dtype. None: not asked for."""

    peak: Tensor  # largest non-target logit so far
    total: Tensor  # sum of exp(z - peak) over the non-target logits so far
    target: Tensor  # the target's logit, once its tile has been seen
    weighted: Tensor | None  # sum of exp(z - peak) (z - peak) over non-target logits: entropy
    squares: Tensor | None  # sum of exp(2 (z - peak)) over non-target logits: log-sum of squares
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
        def zeros() -> Tensor:
            return torch.zeros(rows, dtype=like.dtype, device=like.device)

        return cls(
            peak=torch.full((rows,), -torch.inf, dtype=like.dtype, device=like.device),
            total=zeros(),
            target=torch.full((rows,), -torch.inf, dtype=like.dtype, device=like.device),
            weighted=zeros() if entropy else None,
            squares=zeros() if squares else None,
            plain=zeros() if mean else None,
        )

    @property
    def rest(self) -> Tensor:
        """logsumexp over the non-target logits, [n]."""
        return self.peak + self.total.log()

    @property
    def logprob(self) -> Tensor:
        """log-probability of the target, [n], never above 0; NaN for a target of +inf."""
        logprob = torch.nn.functional.logsigmoid(self.target - self.rest)
        return logprob.masked_fill(self.target == torch.inf, torch.nan)

    @property
    def logsumexp(self) -> Tensor:
        return torch.logaddexp(self.rest, self.target)

    @property
    def entropy(self) -> Tensor:
        """-sum p log p, [n]: a sum of non-negative terms, so a confident row keeps its digits."""
        assert self.weighted is not None, "entropy was not asked for when the rows were started"
        logprob, lse = self.logprob, self.logsumexp
        above = torch.where(self.total > 0, (lse - self.peak) * self.total - self.weighted, 0.0)
        own = torch.where(logprob == -torch.inf, 0.0, logprob.exp() * logprob)
        return torch.exp(_difference(self.peak, lse)) * above - own

    @property
    def log_sum_sq_probs(self) -> Tensor:
        """log of the sum of squared probabilities, [n]."""
        assert self.squares is not None, "squares were not asked for when the rows were started"
        rest = 2 * _difference(self.peak, self.logsumexp) + self.squares.log()
        return torch.logaddexp(rest, 2 * self.logprob)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b where a may be -inf because nothing was folded: then -inf, also for b = -inf."""
    return torch.where(a == -torch.inf, a, a - b)


def _locate(target: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each row's target inside the tile, clamped into it [n, 1], and whether it is inside
    [n, 1].

    Without a data-dependent shape, so that nothing waits for the device.
    """
    local = target - start
    inside = (local >= 0) & (local < columns)
    return local.clamp(0, columns - 1)[:, None], inside[:, None]


def fold_torch(z: Tensor, target: Tensor, start: int, stats: RowStats) -> Tensor:
    """Fold one tile into ``stats`` and leave exp(z - peak) in it, 0 at the targets; both in place.

    Args:
        z: [n, v] logits of vocabulary entries start .. start + v.
        target: [n] int64, the target's index in the whole vocabulary.
        start: first vocabulary entry of the tile.
        stats: running statistics of these rows.

    Returns:
        [n], exp(old peak - new peak): what sums relative to the old peak are to be multiplied with.
    """
    local, inside = _locate(target, start, z.shape[1])
    at_target = z.gather(1, local)
    if stats.plain is not None:
        stats.plain += z.sum(1)
    stats.target = torch.where(inside[:, 0], at_target[:, 0], stats.target)
    z.scatter_(1, local, at_target.masked_fill(inside, -torch.inf))

    peak = torch.maximum(stats.peak, z.amax(1))
    safe = finite_peak(peak)
    rescale = torch.exp(stats.peak - safe)
    e = z.sub_(safe[:, None])
    if stats.weighted is not None:
        shift = torch.where(stats.total > 0, (stats.peak - safe) * stats.total, 0.0)
        exponent = e.clamp(min=LOWEST)
        e.exp_()
        stats.weighted = rescale * (stats.weighted + shift) + exponent.mul_(e).sum(1)
    else:
        e.exp_()
    stats.total = rescale * stats.total + e.sum(1)
    if stats.squares is not None:
        stats.squares = rescale.square() * stats.squares + torch.einsum("nv,nv->n", e, e)
    stats.peak = peak
    return rescale


def finite_peak(peak: Tensor) -> Tensor:
    """The peak to subtract: a row without a finite entry has none, and any number gives zeros."""
    return peak.masked_fill(peak == -torch.inf, 0.0)


def softcap_slope_torch(z: Tensor, limit: float | Tensor) -> Tensor:
    """Derivative of softcap: 1 - (z / limit)^2, [n, v]; limit is the largest z there can be."""
    return torch.div(z, limit).square_().neg_().add_(1.0)


def jacobian_torch(
    z: Tensor,
    target: Tensor,
    start: int,
    peak: Tensor,
    total: Tensor,
    *,
    limit: float | Tensor | None = None,
) -> Tensor:
    """Turn a tile of logits into J, in place; with softcap, times its slope.

    Args:
        z: [n, v] logits; overwritten.
        target, start: as in fold_torch.
        peak, total: [n], over the whole vocabulary.
        limit: softcap times the row's scale, a number or [n, 1]: the bound of |z|.
    """
    local, inside = _locate(target, start, z.shape[1])
    slope = None if limit is None else softcap_slope_torch(z, limit)
    z.sub_(finite_peak(peak)[:, None]).exp_()
    z.scatter_(1, local, torch.where(inside, -total[:, None], z.gather(1, local)))
    return z if slope is None else z.mul_(slope)


def weighted_jacobian_torch(
    z: Tensor,
    target: Tensor,
    start: int,
    logsumexp: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    upstream: Tensor,
    upstream_entropy: Tensor,
    *,
    limit: float | Tensor | None = None,
) -> Tensor:
    """Turn a tile of logits into the negated gradient of sum_t(g_t logp_t + e_t entropy_t), in
    place.

    -d/dz = g (P - onehot) + e P (log P + entropy). As jacobian_torch, with ``upstream`` g [n],
    ``upstream_entropy`` e [n] and the rows' ``entropy`` [n].
    """
    local, inside = _locate(target, start, z.shape[1])
    slope = None if limit is None else softcap_slope_torch(z, limit)
    logp = z.sub_(logsumexp[:, None]).clamp_(min=LOWEST)
    weight = (logp + entropy[:, None]).mul_(upstream_entropy[:, None]).add_(upstream[:, None])
    z = logp.exp_().mul_(weight)
    finite = logprob.clamp(min=LOWEST)
    own = upstream * torch.expm1(logprob) + upstream_entropy * finite.exp() * (finite + entropy)
    z.scatter_(1, local, torch.where(inside, own[:, None], z.gather(1, local)))
    return z if slope is None else z.mul_(slope)
