"""Exchanges between the ranks of a group: counts, and sums over sequences that ranks share.

Letters: B sequences.

*Sequence-parallel inputs.* Each rank has some tokens of every sequence. A loss sees sums over
sequences, so those are added up, and nothing else is.

All of it is torch.distributed's, on whatever device the tensors are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedpo.checks import bad_type, bad_value, first_order, number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def global_count(count: int | float | Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The mean of a count over the ranks of a group: the denominator where gradients are averaged.

    DistributedDataParallel, FSDP and their like average gradients over ranks. For the loss to be
    the sum over all ranks divided by the count of all ranks, each divides its own sum by the mean
    of the counts:

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
        device = device_of(group) if together else torch.device("cpu")
        own = torch.tensor(number("count", count), dtype=torch.float64, device=device)
    if not together:
        return own
    dist.all_reduce(own, group=group)
    return own / dist.get_world_size(group)


def device_of(group: ProcessGroup | None) -> torch.device:
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
