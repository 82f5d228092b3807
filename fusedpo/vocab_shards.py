"""Vocabulary-parallel heads: the slices of a head's weight, one on each rank of a group.

Letters: V vocabulary, H hidden size, n rows.

Each rank has some rows of the head's weight. It folds its own logits into row statistics; those of
all ranks are merged once, by one gather of a few numbers a row, and are then the statistics over
the whole vocabulary. Everything else stays local but the gradient with respect to the hidden
states, a sum over the vocabulary, which is added up once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusedpo.checks import FLOATS, bad_type, bad_value
from fusedpo.distributed import device_of, gather
from fusedpo.kernels.row_stats import LOWEST, RowStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of a vocabulary.

    Attributes:
        group: the ranks that share the vocabulary; their slices follow each other in its order.
        sizes: entries of each rank's slice.
        rank: this one.
    """

    group: ProcessGroup
    sizes: tuple[int, ...]
    rank: int

    @property
    def offset(self) -> int:
        """The first entry of the slice in the whole vocabulary."""
        return sum(self.sizes[: self.rank])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of the group, in the whole world."""
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Entries of the largest slice, from which every rank plans, so that all do the same."""
        return max(self.sizes)

    def merge(self, stats: RowStats) -> Tensor:
        """The statistics of rows over this slice become those over the vocabulary, in place.

        They are the same on every rank to the last bit. One all-gather of 4 to 7 numbers a row.

        Returns:
            [n], what sums over this slice are multiplied with to be relative to the new shift.
        """
        if not stats.total.numel():
            return stats.total
        found = {f.name: getattr(stats, f.name) for f in fields(stats) if f.name != "steps"}
        found = {name: value for name, value in found.items() if value is not None}
        # a slice without a logit has no shift
        found["shift"] = found["shift"].masked_fill(stats.total == 0, -torch.inf)
        own = torch.stack(list(found.values()))
        of = dict(zip(found, gather(own, self.group).unbind(1), strict=True))  # [ranks, n] each
        shift = of["shift"].amax(0)
        shift = torch.where(shift == -torch.inf, 0.0, shift)
        distance = (of["shift"] - shift).clamp_(min=LOWEST)
        rescale = distance.exp()
        if stats.weighted is not None:
            moved = distance.mul_(of["total"]).add_(of["weighted"])
            stats.weighted.copy_(moved.mul_(rescale).sum(0))
        if stats.squares is not None:
            stats.squares.copy_((of["squares"] * rescale * rescale).sum(0))
        if stats.plain is not None:
            stats.plain.copy_(of["plain"].sum(0))
        stats.total.copy_(of["total"].mul_(rescale).sum(0))
        stats.target.copy_(of["target"].amax(0))
        stats.peak.copy_(of["peak"].amax(0))
        stats.shift.copy_(shift)
        return rescale[self.rank].clone()

    def add_up(self, values: Tensor) -> None:
        """The sum over the ranks, in place."""
        if not values.numel():
            return
        # gloo adds up memory as it lies: of rows that are apart, also what is between them
        whole = values.contiguous()
        dist.all_reduce(whole, group=self.group)
        if whole is not values:
            values.copy_(whole)

    def of_first(self, values: Tensor) -> Tensor:
        """Those of the first rank, in place: its numbers decide where all have to decide alike."""
        if self.rank:
            values.zero_()
        self.add_up(values)
        return values


# weight -> its VocabShard. Looked at by all ranks with their own slice of the same weight, so that
# either all of them find it or none does.
_SHARDS: Any = WeakTensorKeyDictionary()


def shard_of(weight: object, group: ProcessGroup, argument: str = "weight") -> VocabShard:
    """The slices of a plain weight [V_local, H], one on each rank of the group.

    The sizes are exchanged, and read, once a weight tensor. What is wrong with one rank's weight is
    raised on all.
    """
    known = _SHARDS.get(weight) if isinstance(weight, Tensor) else None
    if isinstance(weight, Tensor) and known is not None and known.group is group:
        if known.sizes[known.rank] != weight.shape[0]:
            raise bad_value(
                argument,
                f"{known.sizes[known.rank]} entries, as when it was first seen",
                str(weight.shape[0]),
                "make a new tensor for a vocabulary of another size",
            )
        return known
    own = [0, 0, 0]
    device = device_of(group)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype in FLOATS:
        own, device = [*weight.shape, FLOATS.index(weight.dtype)], weight.device
    seen = gather(torch.tensor(own, device=device), group).tolist()
    sizes = tuple(rows for rows, _, _ in seen)
    if min(sizes) < 1 or len({(width, dtype) for _, width, dtype in seen}) > 1:
        got = "; ".join(
            f"[{rows}, {width}] {str(FLOATS[dtype])[6:]}" if rows else "nothing of the kind"
            for rows, width, dtype in seen
        )
        raise bad_value(
            argument,
            "a slice [V_local, H] of one head on each rank, none of them empty",
            got,
            "cut the head's rows with tensor_split(world_size)[rank]",
        )
    shard = VocabShard(group, sizes, dist.get_rank(group))
    _SHARDS[weight] = shard  # a tensor, or this rank's slice would be empty
    return shard


def is_dtensor(value: object) -> bool:
    """By name, as its module takes a while to import."""
    return type(value).__name__ == "DTensor" and hasattr(value, "device_mesh")


# DTensors whose ranks have been seen to have the same labels
_ALIKE: Any = WeakTensorKeyDictionary()


def _check_alike(weight: Tensor, labels: Tensor, group: ProcessGroup) -> None:
    """Raise on all ranks if their labels differ; looked at once a weight.

    FSDP shards a head just as a vocabulary-parallel one is, but over ranks with data of their own.
    """
    if weight in _ALIKE:
        return
    flat = labels.detach().reshape(-1).long()
    places = torch.arange(1, flat.numel() + 1, device=flat.device)
    every = gather(torch.stack((places.sum(), (flat * places).sum())), group)
    if bool((every != every[0]).any()):
        raise bad_value(
            "labels",
            "the same on every rank of the mesh of weight, a DTensor with Shard(0)",
            "others on another rank",
            "if the head is sharded by FSDP, not over the vocabulary, pass weight.full_tensor()",
        )
    _ALIKE[weight] = True


def local_head(
    weight: Any,
    bias: Any,
    group: ProcessGroup | None,
    prefix: str = "",
    labels: object = None,
) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """Weight and bias of a DTensor head as plain tensors, and the slices they are of.

    Sharded over the vocabulary, their gradients go back as DTensors that are sharded alike; a
    replicated head is this rank's own. The ranks of a sharded one are to have the same labels.
    """
    if not is_dtensor(weight):
        if is_dtensor(bias):
            remedy = f"pass {prefix}bias.full_tensor()"
            raise bad_type(f"{prefix}bias", "a plain tensor like weight", "a DTensor", remedy)
        return weight, bias, None if group is None else shard_of(weight, group, f"{prefix}weight")
    if bias is not None and not is_dtensor(bias):
        remedy = "pass distribute_tensor(bias, weight.device_mesh, weight.placements)"
        raise bad_type(f"{prefix}bias", "a DTensor like weight", type(bias).__name__, remedy)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_placement(prefix + name, tensor)
    placements = list(weight.placements)
    if bias is not None and (bias.device_mesh, list(bias.placements)) != (
        weight.device_mesh,
        placements,
    ):
        raise bad_value(
            f"{prefix}bias", f"placed as weight is, {placements}", str(list(bias.placements))
        )
    local = weight.to_local(grad_placements=placements)
    local_bias = None if bias is None else bias.to_local(grad_placements=placements)
    own = weight.device_mesh.get_group()
    if placements[0].is_replicate():
        if group is not None:
            raise bad_value(
                f"{prefix}weight",
                "a slice, to go with vocab_group",
                str(placements[0]),
                "leave vocab_group out",
            )
        return local, local_bias, None
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(
        own
    ):
        raise bad_value("vocab_group", f"None, or the group of {prefix}weight's mesh", "another")
    ranks, vocab = dist.get_world_size(own), weight.shape[0]
    # as torch.chunk cuts
    most = -(-vocab // ranks)
    sizes = tuple(max(0, min(most, vocab - rank * most)) for rank in range(ranks))
    if min(sizes) < 1:
        remedy = "cut it over fewer ranks, or pass slices of your own and vocab_group"
        got = f"{vocab} entries on {ranks} ranks"
        raise bad_value(f"{prefix}weight", "no empty slice", got, remedy)
    if ranks > 1 and isinstance(labels, Tensor):
        _check_alike(weight, labels, own)
    shard = VocabShard(own, sizes, dist.get_rank(own))
    if local.shape[0] != sizes[shard.rank]:
        raise bad_value(
            f"{prefix}weight",
            f"slices of {', '.join(map(str, sizes))} entries, as Shard(0) has them",
            f"{local.shape[0]} on rank {shard.rank}",
            "pass weight.to_local() and vocab_group",
        )
    return local, local_bias, shard if ranks > 1 else None


def _check_placement(argument: str, tensor: Any) -> None:
    if tensor.device_mesh.ndim != 1:
        raise bad_value(
            argument,
            "a DTensor on a mesh of one dimension",
            f"{tensor.device_mesh.ndim} dimensions",
            "gather the others first, then pass the local tensor and vocab_group",
        )
    (placement,) = tensor.placements
    if not (placement.is_shard(0) or placement.is_replicate()):
        raise bad_value(
            argument,
            "a DTensor with Shard(0) or Replicate()",
            str(placement),
            "pass it redistributed: .redistribute(placements=[Shard(0)])",
        )
