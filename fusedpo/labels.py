"""Labels of token positions: the index that marks a position as not scored, and the shift by one.

Both are Hugging Face's conventions: ``labels[t]`` is token t, and -100 on prompt and padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that is not scored: PyTorch's and Hugging Face's default."""


def aligned_labels(
    labels: Tensor, cu_seqlens: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Labels aligned with hidden states: element t is the token that the states at t predict.

    Args:
        labels: [B, T], or packed [N] or [1, N] with ``cu_seqlens``; integers, as Hugging Face gives
            them: ``labels[t]`` is token t.
        cu_seqlens: [B + 1], the positions at which packed sequences begin, and N.
        ignore_index: the label of the last position of each sequence, which predicts nothing.

    Returns:
        A new tensor of the same shape and dtype.
    """
    aligned = torch.full_like(labels, ignore_index, memory_format=torch.contiguous_format)
    if cu_seqlens is None:
        aligned[..., :-1] = labels[..., 1:]
        return aligned
    flat = aligned.view(-1)
    flat[:-1] = labels.reshape(-1)[1:]
    if flat.numel():
        # clamped, as borders are checked on the device and may be wrong until that is read
        flat[(cu_seqlens[1:] - 1).long().clamp(0, flat.shape[0] - 1)] = ignore_index
    return aligned
