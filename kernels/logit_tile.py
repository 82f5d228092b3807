"""What is done to one tile of logits: fold it into running row statistics, or turn it into a
Jacobian.

Letters: n rows of a tile, v vocabulary columns of a tile, y the target column of a row, z logits.

A tile comes as the bare product hidden weight^T, [n, v], in fp32 (fp64 for fp64 inputs).
``LogitMap`` says how logits come of it. Two things are ever done to it.

*Fold.* The row statistics are kept over all entries **but the target's**:

    shift ~ max_{j != y} z_j         total = sum_{j != y} exp(z_j - shift)

so that the log-probability of the target is

    logp = z_y - logsumexp(z) = logsigmoid(z_y - shift - log(total))

which has no cancellation: for a confident token, z_y and logsumexp(z) agree in all their digits and
their difference would be rounding noise, while the log-sigmoid of a large number is exact.

The shift of a row is the peak of the first tile that had one, and rises from there by whole
multiples of log 2. So what has been summed or stored relative to an earlier shift is brought to a
later one by a power of two, which is exact in every dtype: exponentials can be kept in half
precision before the last tile is known, with one rounding. A rise by more than 2^126 leaves nothing
of the past, and the row starts anew from its peak.

*Jacobian.* With the statistics known, the tile becomes J, the negated derivative of logp with
respect to z, but for one factor a row:

    softmax(z) - onehot(y) = (1 - p) / total * J
    J_j = exp(z_j - shift) for j != y,   J_y = -total

The factor is formed from expm1(logp), again without cancellation. The entries of a row of J cancel
as exactly as they were summed, however large the logits, which a softmax from a rounded logsumexp
does not achieve. A gradient through the entropy too makes J_j = exp(z_j - shift) (a + b (z_j -
shift)) with two numbers a row, so one shape serves both.

The functions here are the definition, in PyTorch; logit_tile_triton has kernels of the same names
and arguments, which are held to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# exp(LOWEST) is 0 in every dtype and 0 * LOWEST is 0, where exp(-inf) * -inf would be NaN
LOWEST = -1e4

# a rise by more steps than this leaves nothing of what was summed before, in any dtype
MOST_STEPS = 126

_LOG_2 = math.log(2.0)

# Whether a Jacobian comes with its row's factor multiplied in. Here that would be one more pass
# over the tile, where scaling the hidden rows instead is one over [n, H].
ABSORBS_FACTORS = False


@dataclass(frozen=True)
class LogitMap:
    """From products to logits: z = x + bias, then softcap tanh(z / softcap), then times scale.

    Attributes:
        bias: [v] or None.
        softcap: a number or None.
        scale: a number, or [n].
    """

    bias: Tensor | None = None
    softcap: float | None = None
    scale: float | Tensor = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """The logits [n, v], in place."""
        if self.bias is not None:
            x += self.bias
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        if isinstance(self.scale, Tensor):
            x.mul_(self.scale[:, None])
        elif self.scale != 1.0:
            x.mul_(self.scale)
        return x

    def slope(self, z: Tensor) -> Tensor | None:
        """Derivative of softcap at logits z [n] or [n, v]: 1 - (z / limit)^2; None without softcap.

        limit = softcap times scale is the largest z there can be.
        """
        if self.softcap is None:
            return None
        limit = self.softcap * self.scale
        if isinstance(limit, Tensor) and z.dim() > 1:
            limit = limit[:, None]
        return torch.div(z, limit).square_().neg_().add_(1.0)


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
        """Those of some rows, in the same memory."""
        found = (getattr(self, field.name) for field in fields(self))
        return RowStats(*(None if t is None else t[rows] for t in found))  # type: ignore[arg-type]

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


def _locate(target: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each row's target inside the tile, clamped into it [n, 1], and whether it is inside
    [n, 1].

    Without a data-dependent shape, so that nothing waits for the device.
    """
    local = target - start
    inside = (local >= 0) & (local < columns)
    return local.clamp(0, columns - 1)[:, None], inside[:, None]


def fold(
    x: Tensor,
    head: LogitMap,
    target: Tensor,
    start: int,
    stats: RowStats,
    *,
    out: Tensor | None = None,
    gain: float = 1.0,
    rest: Tensor | None = None,
) -> None:
    """Fold one tile into ``stats``.

    Args:
        x: [n, v] products of vocabulary entries start .. start + v; overwritten.
        head: what makes logits of them.
        target: [n] int64, the target's index in the whole vocabulary; it need not be in it.
        start: first vocabulary entry of the tile.
        stats: running statistics of these rows; updated.
        out: [n, v] of any floating dtype, may be x: exp(z - shift) times softcap's slope, 0 at the
            targets; what the tile contributes to a product with the weight.
        gain: a power of two that multiplies ``out``, to keep it in the range of its dtype.
        rest: [n, H], sums relative to the shift so far; brought to the new shift, in place.
    """
    z = head.apply(x)
    slope = None if out is None else head.slope(z)
    local, inside = _locate(target, start, z.shape[1])
    at_target = z.gather(1, local)
    if stats.plain is not None:
        stats.plain += z.sum(1)
    torch.where(inside[:, 0], at_target[:, 0], stats.target, out=stats.target)
    z.scatter_(1, local, at_target.masked_fill(inside, -torch.inf))

    unseen = stats.peak == -torch.inf
    torch.maximum(stats.peak, z.amax(1), out=stats.peak)
    rise = ((stats.peak - stats.shift) / _LOG_2).ceil().clamp(min=0.0)
    anew = unseen | (rise > MOST_STEPS)
    before = stats.shift.clone()
    peak = stats.peak.masked_fill(stats.peak == -torch.inf, 0.0)
    torch.where(anew, peak, before + rise * _LOG_2, out=stats.shift)
    # beyond the range of power_of_two: what is left of the past is 0
    stats.steps.add_(rise.masked_fill(anew, 2.0 * MOST_STEPS))
    rescale = power_of_two(-rise).masked_fill(anew, 0.0)

    e = z.sub_(stats.shift[:, None])
    if stats.weighted is not None:
        moved = ((before - stats.shift) * stats.total).masked_fill(anew, 0.0)
        exponent = e.clamp(min=LOWEST)
        e.exp_()
        stats.weighted.add_(moved).mul_(rescale).add_(exponent.mul_(e).sum(1))
    else:
        e.exp_()
    stats.total.mul_(rescale).add_(e.sum(1))
    if stats.squares is not None:
        stats.squares.mul_(rescale.square()).add_(torch.einsum("nv,nv->n", e, e))
    if rest is not None:
        rest.mul_(rescale[:, None])
    if out is None:
        return
    if slope is not None:
        e.mul_(slope)
    if gain != 1.0:
        e.mul_(gain)
    if out is not e:
        out.copy_(e)


def settle(
    block: Tensor,
    target: Tensor,
    own: Tensor,
    factors: Tensor,
    columns: int,
) -> None:
    """Finish rows of J whose exponentials were taken relative to the shifts so far, in place.

    Args:
        block: [n, V], what ``fold`` left in ``out``, tile beside tile.
        target: [n] int64; one outside of the block's columns is left alone.
        own: [n], the entry at the target.
        factors: [tiles, n], powers of two.
        columns: columns of each tile but the last.
    """
    for i, factor in enumerate(factors):
        block[:, i * columns : (i + 1) * columns].mul_(factor[:, None].to(block.dtype))
    local, inside = _locate(target, 0, block.shape[1])
    entry = torch.where(inside, own[:, None].to(block.dtype), block.gather(1, local))
    block.scatter_(1, local, entry)


def jacobian(
    x: Tensor,
    head: LogitMap,
    target: Tensor,
    start: int,
    shift: Tensor,
    own: Tensor,
    *,
    factor: Tensor | None = None,
    tilt: Tensor | None = None,
    out: Tensor,
) -> None:
    """Turn a tile of products into a tile of J, times softcap's slope.

    J_j = exp(z_j - shift) (factor + tilt (z_j - shift)), and ``own`` at the target.

    Args:
        x: [n, v] products; overwritten.
        head, target, start: as in ``fold``.
        shift: [n], over the whole vocabulary.
        own: [n], the entry at the target, but for softcap's slope.
        factor: [n], or None for 1.
        tilt: [n], or None for 0; needs a factor.
        out: [n, v] of any floating dtype, may be x.
    """
    z = head.apply(x)
    slope = head.slope(z)
    local, inside = _locate(target, start, z.shape[1])
    z.sub_(shift[:, None])
    if factor is None:
        z.exp_()
    elif tilt is None:
        z.exp_().mul_(factor[:, None])
    else:
        z.clamp_(min=LOWEST)
        weight = (z * tilt[:, None]).add_(factor[:, None])
        z.exp_().mul_(weight)
    z.scatter_(1, local, torch.where(inside, own[:, None], z.gather(1, local)))
    if slope is not None:
        z.mul_(slope)
    if out is not z:
        out.copy_(z)


def finish(
    rest: Tensor,
    rest_factor: Tensor,
    weight: Tensor,
    target: Tensor,
    target_factor: Tensor,
    out: Tensor,
    positions: Tensor | None,
    *,
    block: int,
) -> None:
    """out_i = rest_factor_i rest_i + target_factor_i W_{y_i}: dlogp/dhidden of finished rows.

    Args:
        rest: [n, H]; overwritten.
        rest_factor, target_factor: [n].
        weight: [V, H] of any floating dtype.
        target: [n] int64.
        out: [n, H], or [P, H] with ``positions``; of any floating dtype.
        positions: [n] int64, the rows of out, or None.
        block: rows that are finished at a time.
    """
    for start in range(0, rest.shape[0], block):
        rows = slice(start, start + block)
        done = rest[rows].mul_(rest_factor[rows, None])
        done.addcmul_(weight[target[rows]].to(rest.dtype), target_factor[rows, None])
        if positions is None:
            out[rows] = done
        else:
            out[positions[rows]] = done.to(out.dtype)
