"""What the ranks of a group tell each other: slices of a vocabulary, parts of sequences, counts.

Letters: V vocabulary, H hidden size, B sequences, n rows.

*Vocabulary-parallel heads.* Each rank has some rows of the head's weight. It folds its own logits
into row statistics; those of all ranks are merged once, by one gather of a few numbers a row, and
are then what they would have been over the whole vocabulary. Everything else stays local but the
gradient with respect to the hidden states, a sum over the vocabulary, which is added up once.

*Sequence-parallel inputs.* Each rank has some tokens of every sequence. What a loss sees are sums
over sequences, so those are added up, and nothing else is.

All of it is torch.distributed's, on whatever device the tensors are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusedpo.checks import FLOATS, bad_type, bad_value, first_order, number
from fusedpo.kernels.logit_tile import LOWEST, RowStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def global_count(count: int | float | Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The mean of a count over the ranks of a group: the denominator where gradients are averaged.

    DistributedDataParallel, FSDP and their like average gradients over ranks. For the loss to be
    the sum over all ranks divided by the count of all ranks, each divides its own sum by the mean
    of the counts::

        items = global_count(len(labels) // 2)
        loss = preference_loss(DPO(), ..., num_items=items).loss

    Over an accumulation of several micro-batches it is the count of all of them that is given.

    Args:
        count: a number, or a tensor with one number, of this rank.
        group: the ranks over which gradients are averaged; the default group if not given.

    Returns:
        A float64 scalar, the same on every rank: on the count's device, or for a Python number on
        the CPU, or on the current GPU if the group works on nothing else. The count itself without
        an initialised process group. Costs one all-reduce of one number.

    Raises:
        TypeError, ValueError: for anything else than one finite number.
    """
    together = dist.is_available() and dist.is_initialized()
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise bad_value("count", "one number", str(list(count.shape)))
        own = count.detach().double().reshape(()).clone()
    else:
        device = _device_of(group) if together else torch.device("cpu")
        own = torch.tensor(number("count", count), dtype=torch.float64, device=device)
    if not together:
        return own
    dist.all_reduce(own, group=group)
    return own / dist.get_world_size(group)


def _device_of(group: ProcessGroup | None) -> torch.device:
    if "gloo" in dist.get_backend(group) or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def checked_group(argument: str, group: Any) -> ProcessGroup | None:
    """The group, or None if it has but one member."""
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise bad_type(
            argument, "a torch.distributed.ProcessGroup that this rank is in", type(group).__name__
        )
    return group if dist.get_world_size(group) > 1 else None


def gather(values: Tensor, group: ProcessGroup) -> Tensor:
    """[ranks, ...] from values [...] of each rank."""
    every, own = values.new_empty(dist.get_world_size(group), *values.shape), values.contiguous()
    if values.device.type == "cpu":  # older versions of gloo know nothing else
        dist.all_gather(list(every.unbind(0)), own, group=group)
    else:
        # under its newer name where there is one; no copies of what is gathered
        into_one = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        into_one(every.view(-1), own.view(-1), group=group)
    return every


def get_rank(group: ProcessGroup) -> int:
    return dist.get_rank(group)


# slices of the vocabulary


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
        if values.numel():
            dist.all_reduce(values, group=self.group)


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
    device = _device_of(group)
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
            argument, "a slice [V_local, H] of one head on each rank, none of them empty", got
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
            raise bad_type(f"{prefix}bias", "a plain tensor like weight", "a DTensor")
        return weight, bias, None if group is None else shard_of(weight, group, f"{prefix}weight")
    if bias is not None and not is_dtensor(bias):
        raise bad_type(f"{prefix}bias", "a DTensor like weight", type(bias).__name__)
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
                f"{prefix}weight", "a slice, to go with vocab_group", str(placements[0])
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
        raise bad_value(f"{prefix}weight", "no empty slice", f"{vocab} entries on {ranks} ranks")
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
            argument, "a DTensor with Shard(0) or Replicate()", str(placement), "redistribute it"
        )


# parts of sequences


@dataclass(frozen=True)
class SequenceParts:
    """Which tokens of the sequences this rank has.

    Attributes:
        group: the ranks that share the sequences; their parts follow each other in its order.
        lengths: [B] int64, scored tokens of each sequence that are here.
        before: [B] int64, those on the ranks before this one.
        last_here: [K] int64, the sequences whose last scored token is here, in order.
    """

    group: ProcessGroup
    lengths: Tensor
    before: Tensor
    last_here: Tensor

    @classmethod
    def of(
        cls, group: ProcessGroup, counts: list[list[int]], device: torch.device
    ) -> SequenceParts:
        """From the scored tokens of each sequence, by rank."""
        rank, every = dist.get_rank(group), torch.tensor(counts, device="cpu")
        owner = [max((r for r, n in enumerate(of) if n), default=0) for of in every.T.tolist()]
        last_here = [i for i, r in enumerate(owner) if r == rank]
        return cls(
            group,
            every[rank].to(device),
            every[:rank].sum(0).to(device),
            torch.tensor(last_here, dtype=torch.int64, device=device),
        )

    def sum(self, values: Tensor, *, same: bool = True) -> Tensor:
        return sum_over(self.group, values, same=same)

    def of_last(self, values: Tensor) -> Tensor:
        """[B, H] of all sequences, from those [K, H] whose last scored token is here."""
        own = values.new_zeros(self.lengths.shape[0], values.shape[1])
        return self.sum(own.index_copy(0, self.last_here, values))


def sum_over(group: ProcessGroup, values: Tensor, *, same: bool = True) -> Tensor:
    """The sum over the ranks, differentiable, on every rank.

    Args:
        same: whether all ranks make the same of the sum, as of a loss. Then the gradient of one's
            own values is the one that comes back. Otherwise each rank's share of it comes back, and
            the shares are added up.
    """
    return _SumOver.apply(values, group, same)  # type: ignore[no-untyped-call]


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup, same: bool) -> Tensor:
        ctx.group, ctx.same = group, same
        total = values.detach().clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.same and upstream.numel():
            upstream = upstream.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(upstream, group=ctx.group)
        return upstream, None, None
