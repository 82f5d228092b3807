"""The columns of the vocabulary that matter to each slab of rows, by their sums of probabilities.

A column's importance in a slab is its sum times the largest |g s| of the slab's rows, relative to
the 2-norm over all rows of g s (1 - p); more, where its weight or one of these rows is longer than
others are. Importances are comparable between slabs, so that slabs of
little gradient keep few columns, and between steps. The two gradients have thresholds of their own:
the head's needs fewer columns for the same error, as the rows' errors partly cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusedpo.engine.cost import Buffers, Problem
from fusedpo.engine.precision import largest, unit_gain
from fusedpo.engine.rows import blocks
from fusedpo.engine.tiles import Range, Tiles

# importances are told apart by quarters of a power of two, from 2^-64 up to 2^16
_PER_OCTAVE, _LOWEST, _HIGHEST = 4, -64, 16
_LEVELS = (_HIGHEST - _LOWEST) * _PER_OCTAVE


def buffers(p: Problem, slabs: int, few_columns: int) -> Buffers:
    """The memory of a choice of columns, in bytes.

    While they are chosen, three vectors over the vocabulary, of as many slabs as there is room for,
    are in the memory of the tile. What is left out of each gradient, and the columns of a slab, as
    flags and as numbers, are vectors of their own.
    """
    return {
        **dict.fromkeys(("kept for hidden", "kept for head"), slabs * p.vocab),
        # and those of a gradient, while they are put in order
        "chosen columns": 0 if p.on_cpu else 3 * slabs * p.vocab * 8,
        "columns of a slab": p.vocab * (2 * p.acc + 3 + (8 if p.on_cpu else 0)),
        "directions": slabs * few_columns * p.acc,
    }


def least_tile(p: Problem) -> int:
    """Bytes of the tile in whose memory columns are chosen."""
    return 3 * p.vocab * p.acc


@dataclass(frozen=True)
class Kept:
    """The kept columns of each slab, and the direction that stands for the others.

    Attributes:
        left_out: of "hidden" and "head", the squared importances [V] where a column is left out,
            summed over the slabs.
        needed: of these, the columns that the slab with the most would have to keep, a number on
            the device.
        counts: of these, how many columns each slab keeps, [slabs].
    """

    left_out: dict[str, Tensor]
    needed: dict[str, Tensor]
    counts: dict[str, Tensor]
    _t: Tiles
    _sums: Tensor
    _kept: dict[str, Tensor]
    _lost: dict[str, Tensor]
    # of capacities: [slabs, C], the head's first, both in order
    _chosen: tuple[Tensor, int] | None

    @property
    def slabs(self) -> int:
        return self._sums.shape[0]

    def columns(self, slab: int) -> tuple[Tensor, Tensor]:
        """The columns that the head's gradient takes, and so does the hidden states', and those
        that the hidden states' takes besides; of a slab, [C] int64 in order."""
        if self._chosen is not None:
            chosen, count = self._chosen
            return chosen[slab, :count], chosen[slab, count:]
        of_head, of_hidden = (self._kept[name][slab] for name in ("head", "hidden"))
        return of_head.nonzero()[:, 0], (of_hidden & ~of_head).nonzero()[:, 0]

    @cached_property
    def of_any_slab(self) -> Tensor | None:
        """[V] bool, the columns that the head's gradient takes in some slab; None: their numbers
        would have to be waited for."""
        return None if self._chosen is not None else self._kept["head"].any(0)

    def taken(self, hidden: bool, head: bool) -> Tensor:
        """How many columns a product takes, a mean over the products, a sum over the slabs."""
        of_head, of_both = (self.counts[name].sum() for name in ("head", "hidden"))
        return of_head + (of_both - of_head) * ((1 + hidden) / (1 + hidden + head))

    def directions(self, gradient: str, c: Range) -> Tensor:
        """[slabs, v] of vocabulary block c, until the next one is asked for: column sums where left
        out, 0 where kept; the whole vocabulary's sum to 1."""
        columns = slice(*c)
        rest = self._t.take("directions", self.slabs, c[1] - c[0]).copy_(self._sums[:, columns])
        rest.masked_fill_(self._kept[gradient][:, columns], 0.0)
        return rest.div_(self._lost[gradient][:, None])


def slabs(t: Tiles) -> Iterator[Range]:
    """The rows of each slab."""
    return blocks(0, t.count, t.plan.slab)


def choose(
    t: Tiles,
    g: Tensor,
    logprob: Tensor,
    sums: Tensor,
    sizes: tuple[Tensor, Tensor],
    allowed: Mapping[str, float],
    capacities: Mapping[str, int] | None,
) -> Kept:
    """The columns to keep.

    Args:
        g, logprob: [N], the gradient with respect to the log-probabilities, and these.
        sums: [slabs, V], column sums.
        sizes: [N] and [V], relative ones of the rows and of the columns' weight.
        allowed: of "hidden" and "head", the sum of squares that may be left out, relative to the
            gradient's own.
        capacities: of these, how many columns to keep, so that nothing waits for the device to say
            how many matter; the head's within the hidden states'. None: those that matter.
    """
    weights, of_columns = _slab_weights(t, g, logprob, sizes[0]), sizes[1]
    least = _thresholds(t, sums, weights, of_columns, allowed)
    kept = {
        name: t.take(f"kept for {name}", *sums.shape, dtype=torch.bool)
        for name in ("hidden", "head")
    }
    lost, counts = ({name: torch.empty_like(weights) for name in kept} for _ in range(2))
    left_out = {name: torch.zeros_like(sums[0]) for name in kept}
    needed = {name: torch.zeros_like(weights[0]) for name in kept}
    chosen = None
    if capacities is not None:
        chosen = t.take("chosen columns", len(sums), capacities["hidden"], dtype=torch.int64)
    targets = _by_slabs(t, t.targets, -1)
    for some in _batches(t, len(sums)):
        importance, rest, memory = _vectors(t, sums[some])
        _importance(sums[some], weights[some], of_columns, importance)
        _put_first(importance, targets[some])
        if chosen is not None and capacities is not None:
            of_slabs = chosen[some]
            largest = rest.view(-1)[: of_slabs.numel()].view(of_slabs.shape)
            torch.topk(importance, of_slabs.shape[1], out=(largest, of_slabs))
            for part in of_slabs.tensor_split((capacities["head"],), dim=1):
                part.copy_(part.sort().values)
        for name, threshold in least.items():
            keep = torch.ge(importance, threshold, out=kept[name][some])
            needed[name] = torch.maximum(needed[name], _count(keep, rest).amax())
            if chosen is not None and capacities is not None:
                keep.zero_().scatter_(1, chosen[some, : capacities[name]], True)
            counts[name][some] = _count(keep, rest)
        # those that come first are kept, and none of their importance is left out
        importance.square_()
        for name, flags in kept.items():
            rest.copy_(importance).masked_fill_(flags[some], 0.0)
            left_out[name] += torch.sum(rest, 0, out=memory[0])
            lost[name][some] = rest.copy_(sums[some]).masked_fill_(flags[some], 0.0).sum(1)
    for sums_left in lost.values():
        sums_left.clamp_(min=torch.finfo(sums.dtype).tiny)
    listed = None if chosen is None or capacities is None else (chosen, capacities["head"])
    return Kept(left_out, needed, counts, t, sums, kept, lost, listed)


def _batches(t: Tiles, count: int) -> Iterator[slice]:
    """As many slabs at a time as the tile has memory for, and at least one."""
    for start, stop in blocks(0, count, max(1, t.tile_numbers // (3 * t.vocab))):
        yield slice(start, stop)


def _vectors(t: Tiles, sums: Tensor) -> Tensor:
    """[3, slabs, V], in the memory of the tile."""
    return t.take("tile", 3, *sums.shape)


def _by_slabs(t: Tiles, values: Tensor, fill: float) -> Tensor:
    """[slabs, slab] from [N], with fill beyond the last."""
    missing = -t.count % t.plan.slab
    return torch.nn.functional.pad(values, (0, missing), value=fill).view(-1, t.plan.slab)


def _count(flags: Tensor, memory: Tensor) -> Tensor:
    """How many of each row [V] are True, exactly up to 2^24. A sum of flags would make wide ones of
    them."""
    return memory.copy_(flags).sum(1)


def _put_first(importance: Tensor, targets: Tensor) -> None:
    """Let each slab's targets come before all other columns [slabs, V], in place."""
    here = (targets >= 0) & (targets < importance.shape[1])
    first = torch.where(here, torch.inf, 0.0).to(importance.dtype)
    where = targets.clamp(0, importance.shape[1] - 1)
    importance.scatter_reduce_(1, where, first, "amax")


def _slab_weights(t: Tiles, g: Tensor, logprob: Tensor, sizes: Tensor) -> Tensor:
    """[slabs], the largest |g s| of each times a row's size, relative to the whole gradient."""
    scaled = t.scaled(g).abs()
    missed = scaled * -torch.expm1(logprob)
    # squares of what is small would be 0, and nothing that is left out would count
    gain = unit_gain(largest(missed))
    norm = (missed * gain).norm()
    of_slabs = _by_slabs(t, scaled * sizes, 0.0).amax(1)
    return torch.where(norm > 0, of_slabs * gain / norm, 0.0)


def _importance(sums: Tensor, weights: Tensor, sizes: Tensor, out: Tensor) -> None:
    """[slabs, V]; what is no number counts as large, so that it is kept and seen."""
    large = 2.0**_HIGHEST
    torch.mul(sums, weights[:, None], out=out).mul_(sizes).nan_to_num_(large, large)


def _thresholds(
    t: Tiles, sums: Tensor, weights: Tensor, sizes: Tensor, allowed: Mapping[str, float]
) -> dict[str, Tensor]:
    """The least importance that each gradient keeps: all below it add up to what it may leave out.

    Of a gradient that is not wanted, what the other keeps.
    """
    energy = torch.zeros(_LEVELS, dtype=t.acc, device=sums.device)
    for some in _batches(t, len(sums)):
        importance, level, memory = _vectors(t, sums[some])
        _importance(sums[some], weights[some], sizes, importance)
        torch.log2(importance, out=level)
        whole = memory.view(torch.int32)
        whole.copy_(level.clamp_(min=_LOWEST).sub_(_LOWEST).mul_(_PER_OCTAVE))
        whole.clamp_(max=_LEVELS - 1)
        energy.index_add_(0, whole.view(-1), importance.square_().view(-1))
    if t.shard is not None:
        t.shard.add_up(energy)
    reached = energy.cumsum(0)

    def least(gradient: str) -> Tensor:
        below = (reached <= allowed[gradient]).sum()
        return torch.where(below > 0, torch.exp2(_LOWEST + below / _PER_OCTAVE), 0.0)

    if "hidden" not in t.call.needs:
        return dict.fromkeys(("hidden", "head"), least("head"))
    hidden = least("hidden")
    if not t.call.needs & {"weight", "bias"}:
        return {"hidden": hidden, "head": torch.full_like(hidden, torch.inf)}
    head = least("head")
    return {"hidden": torch.minimum(hidden, head), "head": head}
