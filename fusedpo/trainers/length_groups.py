"""A batch of very unequal rows, run in forwards of nearly their own lengths.

A batch is padded to its longest row: three rows of 1,000, 1,000 and 7,000 tokens are run as 21,000.
Here rows of nearly one length are run together, each group cut to its own longest row, and what
feeds the head at the scored tokens is gathered for one call of the loss. Loss and gradient are
those of the padded batch; random numbers, as of dropout, are others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.model_head import at_head, strip_virtual_tokens
from fusedpo.model_head.forward import AtHead
from fusedpo.trainers.forwards import Batch

PADDED = 1.1
"""What a group may hold at most, padding with it, for each token of its rows."""


@dataclass(frozen=True)
class Group:
    """Rows that are run together.

    Attributes:
        inputs: of the model's forward, [b, t].
        picked: [b, t] bool, the positions whose states the loss sees.
    """

    inputs: dict[str, Tensor]
    picked: Tensor

    def states(self, hidden: Tensor, head: Head) -> Tensor:
        """[n, H], the states at the picked positions: a task for ``at_head``."""
        hidden = strip_virtual_tokens(hidden, self.picked)
        return hidden[self.picked.to(hidden.device)]


@dataclass(frozen=True, kw_only=True)
class GroupedBatch(Batch):
    """A batch in several forwards, which is packed at the head: [1, N], scored tokens alone.

    Attributes:
        groups: in the order in which they are run; none has a row of another.
        order: [N], the place of each scored token among those of the groups.
    """

    groups: tuple[Group, ...]
    order: Tensor

    def at_head(self, model: Any, task: AtHead) -> tuple[Any, Tensor | None]:
        """As of ``Batch``, with the states [1, N, H] of all groups, at the head of the last."""
        *before, last = self.groups
        parts = [at_head(model, group.states, **group.inputs)[0] for group in before]

        def of_all(hidden: Tensor, head: Head) -> Any:
            states = torch.cat([*parts, last.states(hidden, head)])
            return task(states[self.order.to(states.device)][None], head)

        return at_head(model, of_all, **last.inputs)


def in_length_groups(batch: Batch, accelerator: Any = None) -> Batch:
    """The batch in length groups; itself where it is one group, packed, or of other inputs, which
    a warning says.

    Waits for the device. Of several processes all run as many forwards, as a wrapper may wait for
    the others in each.

    Args:
        batch: padded on the right; what is padded on the left stays so.
        accelerator: of the trainer; None for one process.
    """
    mask = batch.inputs.get("attention_mask")
    tensors = {name: v for name, v in batch.inputs.items() if isinstance(v, Tensor)}
    shape = batch.labels.shape
    if batch.cu_seqlens is not None:
        return batch
    others = sorted(name for name, value in tensors.items() if value.shape != shape)
    if mask is None or others:
        what = f"with {', '.join(others)} beside the tokens" if others else "without attention_mask"
        warnings.warn(f"length_groups: batches {what} are padded, one forward each", stacklevel=2)
        return batch
    places = torch.arange(1, shape[1] + 1, device=mask.device)
    lengths = ((mask != 0) * places).amax(1).clamp(min=1).tolist()
    groups = length_groups(lengths)
    count = len(groups)
    if accelerator is not None and accelerator.num_processes > 1:
        counts = accelerator.gather(torch.tensor([count], device=mask.device))
        count = int(counts.max())
    return batch if count == 1 else _grouped(batch, tensors, lengths, groups, count)


def are_on(length_groups: object, trainer: Any, roles: int, *, experts: bool) -> bool:
    """Whether a trainer runs batches in length groups.

    Args:
        length_groups: the argument: True, False, or None for losses of more than two responses.
        trainer: of transformers.
        roles: responses of an example.
        experts: whether a loss is added that balances their load over a batch.

    Raises:
        TypeError: for anything else.
        ValueError: for True where groups are not possible or of no use: sharded weights are
            gathered once a forward and step, the load of experts is balanced over a whole batch,
            images have no rows to cut, and packed rows no padding.
    """
    if not isinstance(length_groups, bool | None):
        raise bad_type("length_groups", "True, False or None", repr(length_groups))
    hindrances = {
        "under FSDP": trainer.is_fsdp_enabled,
        "under DeepSpeed": trainer.is_deepspeed_enabled,
        "with the auxiliary loss of experts": experts,
        # as TRL finds them
        "with images": getattr(trainer, "_is_vision_dataset", False),
        "with packed rows": getattr(trainer.data_collator, "packed", False),
    }
    hindered = [where for where, there in hindrances.items() if there]
    if length_groups and hindered:
        raise bad_value("length_groups", f"None or False {hindered[0]}", "True", "leave it out")
    return not hindered and (roles > 2 if length_groups is None else length_groups)


def length_groups(lengths: Sequence[int]) -> list[list[int]]:
    """The rows of each group, longest first, from the tokens of each row."""
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        joined = groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1)
        if joined and joined <= PADDED * (tokens + lengths[row]):
            groups[-1].append(row)
            tokens += lengths[row]
        else:
            groups.append([row])
            tokens = lengths[row]
    return groups


def _grouped(
    batch: Batch,
    tensors: Mapping[str, Tensor],
    lengths: Sequence[int],
    groups: Sequence[Sequence[int]],
    count: int,
) -> GroupedBatch:
    labels = batch.labels
    picked = labels != IGNORE_INDEX
    # a row without any has a position too, at which nothing is scored
    picked[:, 0] |= ~picked.any(1)
    made, order = [], []
    for rows in groups:
        index = torch.tensor(rows, device=labels.device)
        length = lengths[rows[0]]
        cut = {name: value[index, :length] for name, value in tensors.items()}
        made.append(Group({**batch.inputs, **cut}, picked[index, :length]))
        order.append(index[:, None] * labels.shape[1] + torch.arange(length, device=labels.device))
    nothing = {name: torch.ones_like(value[:1, :1]) for name, value in tensors.items()}
    none = torch.zeros_like(picked[:1, :1])
    # the last one holds something: what is run before it does not have to
    filler = [Group({**batch.inputs, **nothing}, none)] * (count - len(groups))
    counts = picked.sum(1)
    places = torch.cat([o[g.picked] for o, g in zip(order, made, strict=True)])
    return GroupedBatch(
        inputs=batch.inputs,
        labels=labels[picked][None],
        cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        groups=(*filler, *made),
        order=places.argsort(),
    )
