"""What chosen and rejected share."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpo.checks import bad_value


def mask_shared_prefix(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels without the tokens that chosen and rejected share from their start.

    Such a token has the same context in both, so that its terms cancel in every loss that is a
    function of the difference of summed log-ratios: DPO, hinge, IPO with ``average=False``. Loss
    and gradients are then the same with fewer tokens to score. It is not so for losses of lengths
    or of each response (SimPO, ORPO, SPPO, IPO with ``average=True``), nor with dropout, which
    differs between the two; and the rewards of chosen and rejected lose the same amount each,
    while their margin does not.

    Args:
        input_ids: [2 P, T], chosen rows first.
        labels: [2 P, T], those of Hugging Face: labels[t] is token t, scored from position t - 1.
        attention_mask: [2 P, T]; needed if rows are padded on the left to different extents. The
            model must then count positions from the first token of a row.
        ignore_index: marks what is not scored.

    Returns:
        labels [2 P, T]. Where a sequence would have nothing left to score, as with two equal ones,
        the last shared token stays in both.

    Raises:
        ValueError: if ``input_ids`` is not [2 P, T] of at least one pair, or the others have other
            shapes.
    """
    if input_ids.dim() != 2 or len(input_ids) % 2 or not input_ids.numel():
        raise bad_value("input_ids", "[2 P, T], chosen rows first", str(list(input_ids.shape)))
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            expected = f"the shape of input_ids, {list(input_ids.shape)}"
            raise bad_value(name, expected, str(list(tensor.shape)))
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    # [2 P, T]: column of each row's i-th token, and whether there is one
    column = real.argmax(1, keepdim=True) + columns
    there = column < len(columns)
    column = column.clamp(max=len(columns) - 1)
    ids, real, targets = (t.gather(1, column) for t in (input_ids, real, labels))
    there &= real.bool()

    def alike(tensor: Tensor) -> Tensor:  # [P, T]
        chosen, rejected = tensor.chunk(2)
        return chosen == rejected

    both = there.chunk(2)[0] & there.chunk(2)[1]
    shared = (both & alike(ids)).long().cumprod(1).bool()
    # scored in one alone, it would not cancel; the first token has no context in the row
    shared &= alike(targets) & (targets.chunk(2)[0] != ignore_index) & (columns > 0)
    scored = there & (targets != ignore_index) & (columns > 0)
    bare = (scored.sum(1) <= shared.sum(1).repeat(2)).view(2, -1).any(0)  # [P]
    last = columns == (shared * columns).amax(1, keepdim=True)
    shared = (shared & ~(last & bare[:, None])).repeat(2, 1)
    # back to columns; added, as places past the end of a row all stand for its last column
    gone = torch.zeros_like(labels).scatter_add(1, column, shared.to(labels.dtype))
    return labels.masked_fill(gone != 0, ignore_index)
